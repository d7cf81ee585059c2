"""What an application asks for in one go, what it must be like, and what came of it."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any

from coalestra.core import errors
from coalestra.core.acceptance import SnapshotAcceptancePolicy, SnapshotAcceptanceViolation
from coalestra.core.errors import SnapshotBuildError, SnapshotConsistencyError
from coalestra.core.frozen import EMPTY, frozen, record
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.serialization import json_safe
from coalestra.core.snapshot import Snapshot
from coalestra.core.validation import flag, instance, number
from coalestra.core.values import SnapshotValue

__all__ = ["RequestOutcome", "RequestResult", "SnapshotConsistencyPolicy", "SnapshotRequest"]

_observation = attrgetter("observed_at")


@record
class SnapshotConsistencyPolicy:
    """How far apart the values of a request may have been observed.

    Attributes:
        max_observation_skew_seconds: the longest time between the oldest and the newest.
        include_optional_resources: whether optional resources take part, where resolved.
    """

    max_observation_skew_seconds: float
    include_optional_resources: bool = False

    def __post_init__(self) -> None:
        number("max_observation_skew_seconds", self.max_observation_skew_seconds, minimum=0)
        flag("include_optional_resources", self.include_optional_resources)


def inconsistency_of(
    policy: SnapshotConsistencyPolicy,
    required: Collection[ResourceKey],
    optional: Collection[ResourceKey],
    snapshot: Mapping[ResourceKey, SnapshotValue[Any]],
) -> SnapshotConsistencyError | None:
    """Return what ``policy`` has against the values of a request; keys without one do not count."""
    asked = (*required, *optional) if policy.include_optional_resources else required
    found: Mapping[ResourceKey, SnapshotValue[Any]] = getattr(snapshot, "resources", snapshot)
    values = [value for key in asked if (value := found.get(key)) is not None]
    if len(values) < 2:
        return None
    oldest = min(values, key=_observation)
    newest = max(values, key=_observation)
    allowed = policy.max_observation_skew_seconds
    # Added, not subtracted: the same rounding as in a time that somebody computed by adding.
    if newest.observed_at <= oldest.observed_at + allowed:
        return None
    return SnapshotConsistencyError(
        keys=tuple(value.key for value in values),
        oldest_key=oldest.key,
        oldest_observed_at=oldest.observed_at,
        newest_key=newest.key,
        newest_observed_at=newest.observed_at,
        observation_skew_seconds=newest.observed_at - oldest.observed_at,
        max_observation_skew_seconds=allowed,
        snapshot=snapshot,
    )


@dataclass(frozen=True, init=False)
class SnapshotRequest:
    """The resources that a snapshot must have, those it may do without, and the rules for both.

    Attributes:
        required: the keys that must be resolved, each once, in the order given.
        optional: the keys that may fail.
        consistency_policy: how far apart the values may have been observed; None for any time.
        acceptance_policy: what the values must be like; None for no rules.

    Raises:
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
        if not self.keys:
            raise ValueError("a request must have at least one key in required or optional")
        both = [key for key in self.optional if key in self._required]
        if both:
            raise ValueError(
                f"required and optional must have no key in common, got {errors.listed(both)} in "
                "both; leave it in one of them"
            )
        named = () if acceptance_policy is None else acceptance_policy.referenced_keys
        foreign = set(named).difference(self.keys) if named else ()
        if foreign:
            raise ValueError(
                "acceptance_policy must name keys of the request only, got "
                f"{errors.listed(sorted(foreign))}; ask for it, or leave it out of the policy"
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


# What came of a request that does not raise ------------------------------------------------------

_SCHEMA, _SCHEMA_VERSION = "coalestra.request-result", 1


class RequestOutcome(str, enum.Enum):
    """Whether a request has what it asked for: in full, in part, or not so that it will do.

    ``ACCEPTED``: every key has a value, none of them is stale, and the policies hold. An optional
    key may be absent: that something does not exist is an answer, too.
    ``DEGRADED``: the policies hold, but an optional key failed, or some value is stale.
    ``REJECTED``: a required key has no value, a policy does not hold, or something else went wrong.
    """

    ACCEPTED = "accepted"
    DEGRADED = "degraded"
    REJECTED = "rejected"


@dataclass(frozen=True, repr=False)
class RequestResult:
    """What came of a request, where it does not raise.

    Attributes:
        request: what was asked for.
        snapshot: what was read, also if it was turned down; None if there is none.
        error: why it was turned down, as the form that raises has it; else None.
    """

    request: SnapshotRequest
    snapshot: Snapshot | None
    error: Exception | None = None

    def __post_init__(self) -> None:
        instance("request", self.request, SnapshotRequest)
        instance("snapshot", self.snapshot, Snapshot, optional=self.error is not None)
        instance("error", self.error, Exception, optional=True)

    @cached_property
    def outcome(self) -> RequestOutcome:
        """Whether the request has what it asked for."""
        if self.error is not None:
            return RequestOutcome.REJECTED
        # That something does not exist is an answer.
        absent = [e for e in self.errors.values() if isinstance(e, errors.ResourceAbsentError)]
        answered = len(self._values) + len(absent) == len(self.request.keys)
        full = answered and not self.stale_keys
        return RequestOutcome.ACCEPTED if full else RequestOutcome.DEGRADED

    @cached_property
    def reason(self) -> str:
        """Why the outcome is what it is, as one sentence."""
        if isinstance(self.error, SnapshotBuildError):
            return errors.message_of(self.error)
        if self.error is not None:
            return f"the request failed with {errors.told(self.error)}"
        lacks = []
        if self.errors:
            without = errors.counted(len(self.errors), "value")
            lacks.append(f"without {without}: {errors.described(self.errors)}")
        if self.stale_keys:
            stale = [self._values[key] for key in self.stale_keys]
            first = stale[: errors.MAX_RESOURCES_SHOWN]
            ages = [f"{each.key.display} [{each.age_seconds:g} s old]" for each in first]
            number = errors.counted(len(stale), "stale value")
            lacks.append(f"with {number}: {errors.enumerated(ages, len(stale), 'value')}")
        return f"accepted {', and '.join(lacks) or 'in full'}"

    @cached_property
    def errors(self) -> Mapping[ResourceKey, Exception]:
        """Why keys of the request have no value, or one that was refused; read-only."""
        refused = self.error.errors if isinstance(self.error, SnapshotBuildError) else EMPTY
        failed = EMPTY if self.snapshot is None else self.snapshot.errors
        found = {**refused, **failed}  # what kept a value from being there says more
        return frozen({key: found[key] for key in self.request.keys if key in found})

    @property
    def violations(self) -> tuple[SnapshotAcceptanceViolation, ...]:
        """Every rule and requirement of the acceptance policy that is broken."""
        error = self.error
        return error.violations if isinstance(error, errors.SnapshotAcceptanceError) else ()

    @cached_property
    def stale_keys(self) -> tuple[ResourceKey, ...]:
        """The keys of the request whose values were stale when they were delivered."""
        return tuple(key for key, value in self._values.items() if value.stale)

    @cached_property
    def _values(self) -> Mapping[ResourceKey, SnapshotValue[Any]]:
        found = EMPTY if self.snapshot is None else self.snapshot.resources
        return {key: found[key] for key in self.request.keys if key in found}

    def require_accepted(self) -> Snapshot:
        """Return the snapshot, in full or degraded.

        Raises:
            Exception: `error`, if the request is rejected.
        """
        if self.error is None:
            assert self.snapshot is not None
            return self.snapshot
        try:
            # Without the traceback of an earlier call, which would grow by that of this one.
            raise BaseException.with_traceback(self.error, None)
        finally:
            del self  # whom the traceback leads to, and who leads to the traceback

    def to_dict(self, *, include_values: bool = False) -> dict[str, Any]:
        """Return the result as JSON-safe data; see the reference of data for its keys.

        Args:
            include_values: whether the payloads that were read and their metadata are in it.
        """
        flag("include_values", include_values)
        read = None
        if self.snapshot is not None:
            read = self.snapshot.to_dict(include_values=include_values)
        return {
            "schema": _SCHEMA,
            "schema_version": _SCHEMA_VERSION,
            "outcome": self.outcome.value,
            "reason": errors.folded_message(self.reason),
            "required": [key.canonical for key in self.request.required],
            "optional": [key.canonical for key in self.request.optional],
            "stale": [key.canonical for key in self.stale_keys],
            "error_type": None if self.error is None else errors.type_name(self.error),
            "errors": {k.canonical: errors.described_error(k, e) for k, e in self.errors.items()},
            "violations": [_as_data(violation) for violation in self.violations],
            "snapshot": read,
        }

    def __repr__(self) -> str:
        return f"<RequestResult {self.outcome.value}: {self.reason}>"


def _as_data(violation: SnapshotAcceptanceViolation) -> dict[str, Any]:
    facts = {each.name: getattr(violation, each.name) for each in fields(violation)}
    facts["keys"] = [key.canonical for key in violation.keys]
    facts["message"] = errors.folded_message(violation.message)
    keys = {name: key.canonical for name, key in facts.items() if isinstance(key, ResourceKey)}
    return {**json_safe(facts), **keys}
