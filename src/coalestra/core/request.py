"""What an application asks for in one go, and what it must be like."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

from coalestra.core.acceptance import SnapshotAcceptancePolicy
from coalestra.core.errors import SnapshotConsistencyError
from coalestra.core.frozen import immutable
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.validation import flag, instance, number
from coalestra.core.values import SnapshotValue

__all__ = ["SnapshotConsistencyPolicy", "SnapshotRequest"]

# Whether values were observed close enough in time to be used together ---------------------------


_observation = attrgetter("observed_at")


@immutable
@dataclass(frozen=True, slots=True)
class SnapshotConsistencyPolicy:
    """How far apart the values of a request may have been observed.

    Attributes:
        max_observation_skew_seconds: the longest time between the oldest and the newest.
        include_optional_resources: whether optional resources take part, where resolved.

    Raises:
        TypeError: for another type.
        ValueError: for a skew that is negative or not finite.
    """

    max_observation_skew_seconds: float
    include_optional_resources: bool = False

    def __post_init__(self) -> None:
        number("max_observation_skew_seconds", self.max_observation_skew_seconds, minimum=0)
        flag("include_optional_resources", self.include_optional_resources)


def check_consistency(
    policy: SnapshotConsistencyPolicy,
    required: Collection[ResourceKey],
    optional: Collection[ResourceKey],
    snapshot: Mapping[ResourceKey, SnapshotValue[Any]],
) -> None:
    """Judge the resolved values of a request by ``policy``; those without a value do not count.

    Raises:
        SnapshotConsistencyError: if they lie too far apart; carries ``snapshot``.
    """
    asked = (*required, *optional) if policy.include_optional_resources else required
    found: Mapping[ResourceKey, SnapshotValue[Any]] = getattr(snapshot, "resources", snapshot)
    values = [value for key in asked if (value := found.get(key)) is not None]
    if len(values) < 2:
        return
    oldest = min(values, key=_observation)
    newest = max(values, key=_observation)
    allowed = policy.max_observation_skew_seconds
    # Added, not subtracted: the same rounding as in a time that somebody computed by adding.
    if newest.observed_at <= oldest.observed_at + allowed:
        return
    raise SnapshotConsistencyError(
        keys=tuple(value.key for value in values),
        oldest_key=oldest.key,
        oldest_observed_at=oldest.observed_at,
        newest_key=newest.key,
        newest_observed_at=newest.observed_at,
        observation_skew_seconds=newest.observed_at - oldest.observed_at,
        max_observation_skew_seconds=allowed,
        snapshot=snapshot,
    )


_SHOWN = 5


@dataclass(frozen=True, init=False)
class SnapshotRequest:
    """The resources that a snapshot must have, those it may do without, and the rules for both.

    Attributes:
        required: the keys that must be resolved, each once, in the order given.
        optional: the keys that may fail.
        consistency_policy: how far apart the values may have been observed; None for any time.
        acceptance_policy: what the values must be like; None for no rules.

    Raises:
        TypeError: for another type.
        ValueError: without keys, with a key in both groups, or with a policy that names a key
            outside the request.
    """

    required: tuple[ResourceKey, ...] = ()
    optional: tuple[ResourceKey, ...] = ()
    consistency_policy: SnapshotConsistencyPolicy | None = None
    acceptance_policy: SnapshotAcceptancePolicy | None = None

    def __init__(
        self,
        *,
        required: Iterable[ResourceKey] = (),
        optional: Iterable[ResourceKey] = (),
        consistency_policy: SnapshotConsistencyPolicy | None = None,
        acceptance_policy: SnapshotAcceptancePolicy | None = None,
    ) -> None:
        instance("consistency_policy", consistency_policy, SnapshotConsistencyPolicy, optional=True)
        instance("acceptance_policy", acceptance_policy, SnapshotAcceptancePolicy, optional=True)
        object.__setattr__(self, "required", distinct_keys("required", required))
        object.__setattr__(self, "optional", distinct_keys("optional", optional))
        object.__setattr__(self, "consistency_policy", consistency_policy)
        object.__setattr__(self, "acceptance_policy", acceptance_policy)
        self._check_groups()

    def _check_groups(self) -> None:
        if not self.keys:
            raise ValueError("a request must have at least one key in required or optional")
        both = [key for key in self.optional if key in self._required]
        if both:
            raise ValueError(
                f"required and optional must have no key in common, got {_listed(both)} in both; "
                "leave it in one of them"
            )
        if self.acceptance_policy is not None:
            foreign = self.acceptance_policy.referenced_keys.difference(self.keys)
            if foreign:
                raise ValueError(
                    f"acceptance_policy must name keys of the request only, got "
                    f"{_listed(sorted(foreign))}; ask for it, or leave it out of the policy"
                )

    @cached_property
    def keys(self) -> tuple[ResourceKey, ...]:
        """All keys: the required ones, then the optional ones."""
        return self.required + self.optional

    @cached_property
    def _required(self) -> frozenset[ResourceKey]:
        return frozenset(self.required)

    def is_required(self, key: ResourceKey) -> bool:
        """Whether ``key`` is one of the required ones."""
        return key in self._required


def _listed(keys: list[ResourceKey]) -> str:
    shown = ", ".join(key.display for key in keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"
