"""Values of one request are observed close enough together, or it says which are not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotConsistencyPolicy, inconsistency_of
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
    policy = SnapshotConsistencyPolicy(2.0)
    assert inconsistency_of(policy, [A, B], [], snapshot(a=0.0, b=2.0)) is None


def test_a_limit_is_not_missed_by_rounding() -> None:
    for step in range(1_000):
        start = step * 0.37
        values = [value(A, NOW + start), value(B, (NOW + start) + 0.2)]
        taken = Snapshot("id", NOW, {each.key: each for each in values})
        assert inconsistency_of(SnapshotConsistencyPolicy(0.2), [A, B], [], taken) is None


def test_a_larger_skew_is_an_error_with_all_the_facts() -> None:
    taken = snapshot(a=0.0, b=-1.0, c=1.5)
    error = inconsistency_of(SnapshotConsistencyPolicy(2.0), [A, B, C], [], taken)
    assert error is not None
    assert error.keys == (A, B, C)
    assert (error.oldest_key, error.oldest_observed_at) == (B, NOW - 1.0)
    assert (error.newest_key, error.newest_observed_at) == (C, NOW + 1.5)
    assert (error.observation_skew_seconds, error.max_observation_skew_seconds) == (2.5, 2.0)
    assert error.snapshot is taken


def test_optional_values_take_part_only_if_the_policy_says_so() -> None:
    taken = snapshot(a=0.0, b=9.0)
    assert inconsistency_of(SnapshotConsistencyPolicy(1.0), [A], [B], taken) is None
    assert inconsistency_of(SnapshotConsistencyPolicy(1.0, True), [A], [B], taken) is not None


def test_keys_without_a_value_do_not_count() -> None:
    policy = SnapshotConsistencyPolicy(0.0)
    assert inconsistency_of(policy, [A, B, D], [], snapshot(a=0.0)) is None
    assert inconsistency_of(policy, [A, B], [], snapshot()) is None
    assert inconsistency_of(policy, [A], [], snapshot(a=0.0, b=9.0)) is None


@pytest.mark.parametrize("settings, error, name", [
    ((-1,), ValueError, "max_observation_skew_seconds"),
    ((math.inf,), ValueError, "max_observation_skew_seconds"),
    ((math.nan,), ValueError, "max_observation_skew_seconds"),
    ((True,), TypeError, "max_observation_skew_seconds"),
    ((None,), TypeError, "max_observation_skew_seconds"),
    ((1.0, 1), TypeError, "include_optional_resources"),
])  # fmt: skip
def test_a_policy_is_checked(settings: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name} must be"):
        SnapshotConsistencyPolicy(*settings)
