"""Values of one request are observed close enough together, or it says which are not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coalestra.core.errors import SnapshotConsistencyError
from coalestra.core.keys import ResourceKey
from coalestra.core.request import (
    SnapshotConsistencyPolicy,
    check_consistency,
)
from coalestra.core.snapshot import Snapshot
from coalestra.core.values import SnapshotValue

A, B, C, D = (ResourceKey("n", name) for name in "abcd")
NOW = 1_700_000_000.0


def value(key: ResourceKey, observed_at: float) -> SnapshotValue[Any]:
    return SnapshotValue(key, 1, "rest", observed_at, NOW, 0.0, False, False, 0.0)


def snapshot(**offsets: float) -> Snapshot:
    values = [value(ResourceKey("n", name), NOW + offset) for name, offset in offsets.items()]
    return Snapshot("id", NOW, {each.key: each for each in values})


def test_a_skew_up_to_the_limit_passes() -> None:
    check_consistency(SnapshotConsistencyPolicy(2.0), [A, B], [], snapshot(a=0.0, b=2.0))


def test_a_limit_is_not_missed_by_rounding() -> None:
    for step in range(1_000):
        start = step * 0.37
        values = [value(A, NOW + start), value(B, (NOW + start) + 0.2)]
        check_consistency(
            SnapshotConsistencyPolicy(0.2),
            [A, B],
            [],
            Snapshot("id", NOW, {each.key: each for each in values}),
        )


def test_a_larger_skew_raises_with_all_the_facts() -> None:
    taken = snapshot(a=0.0, b=-1.0, c=1.5)
    with pytest.raises(SnapshotConsistencyError) as caught:
        check_consistency(SnapshotConsistencyPolicy(2.0), [A, B, C], [], taken)
    error = caught.value
    assert error.keys == (A, B, C)
    assert (error.oldest_key, error.oldest_observed_at) == (B, NOW - 1.0)
    assert (error.newest_key, error.newest_observed_at) == (C, NOW + 1.5)
    assert (error.observation_skew_seconds, error.max_observation_skew_seconds) == (2.5, 2.0)
    assert error.snapshot is taken


def test_optional_values_take_part_only_if_the_policy_says_so() -> None:
    taken = snapshot(a=0.0, b=9.0)
    check_consistency(SnapshotConsistencyPolicy(1.0), [A], [B], taken)
    with pytest.raises(SnapshotConsistencyError):
        check_consistency(SnapshotConsistencyPolicy(1.0, True), [A], [B], taken)


def test_keys_without_a_value_do_not_count() -> None:
    check_consistency(SnapshotConsistencyPolicy(0.0), [A, B, D], [], snapshot(a=0.0))
    check_consistency(SnapshotConsistencyPolicy(0.0), [A, B], [], snapshot())
    check_consistency(SnapshotConsistencyPolicy(0.0), [A], [], snapshot(a=0.0, b=9.0))


@pytest.mark.parametrize(
    "settings, error, name",
    [
        ((-1,), ValueError, "max_observation_skew_seconds"),
        ((math.inf,), ValueError, "max_observation_skew_seconds"),
        ((math.nan,), ValueError, "max_observation_skew_seconds"),
        ((True,), TypeError, "max_observation_skew_seconds"),
        ((None,), TypeError, "max_observation_skew_seconds"),
        ((1.0, 1), TypeError, "include_optional_resources"),
    ],
)
def test_a_policy_is_checked(settings: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name} must be"):
        SnapshotConsistencyPolicy(*settings)
