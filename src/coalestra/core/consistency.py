"""Whether values were observed close enough in time to be used together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from coalestra.core.errors_snapshot import SnapshotConsistencyError
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import flag, number
from coalestra.core.values import SnapshotValue

_observation = attrgetter("observed_at")


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


def observation_skew(values: Iterable[SnapshotValue[Any]]) -> float:
    """Return the seconds between the oldest and the newest observation; 0.0 for fewer than two."""
    times = [value.observed_at for value in values]
    return max(times) - min(times) if times else 0.0


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
    values = [snapshot[key] for key in asked if key in snapshot]
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
