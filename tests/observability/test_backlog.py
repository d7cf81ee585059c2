"""The line of records behind a buffer, without threads."""

from __future__ import annotations

import queue

import pytest

from coalestra.observability.buffered import Backlog
from coalestra.observability.sinks import BufferOverflowPolicy

DROP_OLDEST = BufferOverflowPolicy.DROP_OLDEST


def backlog(max_pending: int = 3, overflow: BufferOverflowPolicy = DROP_OLDEST) -> Backlog[str]:
    return Backlog(max_pending, overflow)


def filled(overflow: BufferOverflowPolicy) -> Backlog[str]:
    line = backlog(3, overflow)
    for record in "abc":
        line.accept(record)
    return line


def drained(line: Backlog[str]) -> str:
    taken = ""
    while not line.empty:
        taken += line.take()
        line.settle(failed=False)
    return taken


@pytest.mark.parametrize(
    "overflow, accepted, left",
    [
        (BufferOverflowPolicy.DROP_OLDEST, True, "bcd"),
        (BufferOverflowPolicy.DROP_NEWEST, False, "abc"),
    ],
)
def test_a_record_too_many_is_handled_by_the_policy(
    overflow: BufferOverflowPolicy, accepted: bool, left: str
) -> None:
    line = filled(overflow)

    assert line.accept("d") is accepted
    assert drained(line) == left


def test_a_record_too_many_can_be_an_error_that_leaves_the_line_as_it_was() -> None:
    line = filled(BufferOverflowPolicy.RAISE)

    with pytest.raises(queue.Full) as raised:
        line.accept("d")

    assert str(raised.value) == (
        "3 records wait for delivery; raise max_pending, or choose an overflow policy that drops"
    )
    assert drained(line) == "abc"


def test_the_record_in_delivery_holds_up_what_is_settled() -> None:
    line = backlog()
    line.accept("a")
    line.accept("b")

    line.take()
    assert line.oldest_unsettled == 1
    line.settle(failed=False)
    assert line.oldest_unsettled == 2


def test_a_dropped_record_counts_as_settled() -> None:
    line = filled(DROP_OLDEST)

    line.accept("d")

    assert line.oldest_unsettled == 2
    assert line.newest == 4


def test_a_record_in_delivery_leaves_its_place_to_those_who_wait() -> None:
    line = filled(DROP_OLDEST)
    line.take()
    assert line.pending == 3

    line.accept("d")

    assert line.pending == 3
    assert drained(line) == "bcd"


def test_discarding_counts_what_waited_and_spares_what_is_in_delivery() -> None:
    line = filled(DROP_OLDEST)
    line.take()

    line.discard()
    line.settle(failed=True)

    stats = line.stats(closed=True, worker_alive=False, shutdown_timeout_count=0)
    assert (stats.dropped, stats.failures, stats.pending) == (2, 1, 0)


def test_disowning_forgets_what_is_pending_and_counts_nothing() -> None:
    line = filled(DROP_OLDEST)
    line.take()

    line.disown()

    stats = line.stats(closed=False, worker_alive=True, shutdown_timeout_count=0)
    assert (stats.enqueued, stats.dropped, stats.pending) == (3, 0, 0)
    assert line.oldest_unsettled > line.newest


def test_a_line_tells_how_long_it_is() -> None:
    assert repr(filled(DROP_OLDEST)) == "<Backlog 3/3 drop_oldest>"
