"""The write order, as a table."""

from __future__ import annotations

import itertools

import pytest

from coalestra.cache.store import best_of, best_per_key, decide
from coalestra.core.results import CacheWriteStatus
from tests.contracts.samples import A, B, revision_of


@pytest.mark.parametrize(
    "rank, observed_at, replace_equal, status",
    [
        (2, 0.0, False, "stored"),
        (0, 99.0, True, "ignored_lower_authority"),
        (1, 50.1, False, "stored"),
        (1, 49.9, True, "ignored_older"),
        (1, 50.0, False, "ignored_duplicate"),
        (1, 50.0, True, "stored"),
    ],
)
def test_rank_comes_before_time_and_equals_stay_unless_asked(
    rank: int, observed_at: float, replace_equal: bool, status: str
) -> None:
    candidate = revision_of(rank=rank, observed_at=observed_at)
    current = revision_of(rank=1, observed_at=50.0)
    assert decide(candidate, current, replace_equal=replace_equal) is CacheWriteStatus(status)
    assert decide(candidate, current, force=True) is CacheWriteStatus.STORED


def test_anything_may_fill_an_empty_place() -> None:
    assert decide(revision_of(rank=-5), None) is CacheWriteStatus.STORED


def test_the_best_of_a_batch_is_the_same_in_every_order() -> None:
    best = revision_of(rank=2, observed_at=1.0)
    others = [revision_of(rank=1, observed_at=9.0), revision_of(rank=2, observed_at=0.5)]
    for order in itertools.permutations([best, *others]):
        assert best_per_key(order) == {A: best}


def test_the_later_of_two_equals_wins_and_keys_keep_their_order() -> None:
    first, second, other = revision_of(A), revision_of(A), revision_of(B)
    assert best_of(first, second) is second
    assert list(best_per_key([first, other, second]).items()) == [(A, second), (B, other)]
