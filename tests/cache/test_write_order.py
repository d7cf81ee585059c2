"""The write order, as a table."""

from __future__ import annotations

from typing import Any

from coalestra.cache.store import best_per_key, decide
from coalestra.core.values import next_number, next_version, version_of
from tests.contracts.samples import NOW, A, B, revision_of


def fetch(ended_at: float, seconds: float, began: int = 0) -> Any:
    """Return what an undated fetch brought that took so long."""
    return revision_of(
        observed_at=ended_at, fetched_at=ended_at, latency_ms=seconds * 1000, dated=False,
        began=began,
    )  # fmt: skip


def event(at: float, *, dated: bool = False, known: bool = True) -> Any:
    number = 0 if dated else next_number()
    return revision_of(
        observed_at=at, fetched_at=at, latency_ms=0.0, attempts=0, dated=dated,
        began=number if known else 0,
        version=version_of(number) if number and known else f"elsewhere {number}",
    )  # fmt: skip


def test_the_later_of_two_equals_wins_and_keys_keep_their_order() -> None:
    first, second, other = revision_of(A), revision_of(A), revision_of(B)
    assert list(best_per_key([first, other, second]).items()) == [(A, second), (B, other)]


STORED, OLDER, DUPLICATE = "stored", "ignored_older", "ignored_duplicate"


def test_an_undated_fetch_counts_from_its_beginning() -> None:
    """By the clock, where nothing better is known: it may come from another process."""
    slow, quick = fetch(NOW + 10, 10), fetch(NOW + 3, 1)
    assert decide(slow, quick).value == OLDER
    assert decide(quick, slow).value == STORED
    assert decide(quick, fetch(NOW + 10, 10, began=next_number())).value == STORED
    assert decide(slow, event(NOW + 5, known=False)).value == OLDER
    assert decide(slow, event(NOW + 5, dated=True)).value == OLDER
    assert decide(slow, event(NOW - 1, dated=True)).value == STORED


def test_of_what_came_back_from_a_cache_the_end_of_its_reading_is_known() -> None:
    held = fetch(NOW, 1)
    held.version = next_version()
    after = fetch(NOW - 3600, 0, began=next_number())
    assert decide(after, held).value == STORED
    before = fetch(NOW, 1, began=1)
    assert decide(before, held).value == DUPLICATE, "they overlapped, and began at one time"


def test_at_the_same_time_an_undated_event_has_arrived_later_and_a_fetch_has_not() -> None:
    held = revision_of(observed_at=NOW)
    assert decide(event(NOW), held).value == STORED
    assert decide(fetch(NOW, 0), held).value == DUPLICATE
    assert decide(event(NOW, dated=True), event(NOW)).value == DUPLICATE


def test_what_is_held_from_beyond_the_horizon_does_not_win_by_its_date() -> None:
    held, new = revision_of(observed_at=NOW + 60), revision_of(observed_at=NOW)
    assert decide(new, held, horizon=NOW + 1).value == STORED
    assert decide(new, held, horizon=NOW + 60).value == OLDER
    outranking = revision_of(observed_at=NOW + 60, rank=1)
    assert decide(new, outranking, horizon=NOW).value == "ignored_lower_authority"
