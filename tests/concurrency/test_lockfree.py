"""State without locks: no change is lost, and who waits is told of every change."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from queue import Empty
from typing import Any

import pytest

from coalestra import _lockfree
from coalestra._lockfree import Cell, Changes, WorkerQueue
from tests.support.elsewhere import PATIENCE, in_thread, outcome, side_by_side
from tests.support.strikes import Struck, at_every_line, raise_struck


def test_no_change_of_a_cell_is_lost_between_threads() -> None:
    cell = Cell(0)

    def count(_: int) -> None:
        for _ in range(2_000):
            cell.change(lambda number: number + 1)

    side_by_side(4, count)
    assert cell.value == 8_000
    assert repr(cell) == "Cell(8000)"


def test_a_change_struck_by_another_is_made_to_the_newer_value() -> None:
    cell: Cell[tuple[str, ...]] = Cell(())

    def add(name: str) -> None:
        cell.change(lambda names: (*names, name))

    lines = at_every_line(lambda: add("struck"), lambda: add("striking"))
    names: Any = cell.value
    assert (names.count("struck"), names.count("striking")) == (lines + 2, lines)


def test_a_step_that_raises_changes_nothing() -> None:
    cell = Cell(1)
    with pytest.raises(ZeroDivisionError):
        cell.change(lambda number: number // 0)
    assert cell.value == 1


def test_who_waits_for_a_change_goes_on_when_it_has_come() -> None:
    changes, state = Changes(), [0]
    arrived = threading.Event()

    def looks() -> bool:
        arrived.set()
        return state[0] == 2

    waiting = in_thread(lambda: changes.wait_for(looks, PATIENCE))
    assert arrived.wait(PATIENCE)
    for number in (1, 2):
        state[0] = number
        changes.tell()
    assert outcome(waiting)


@pytest.mark.parametrize("seconds", [0, 0.001])
def test_who_waits_for_what_does_not_come_is_told_in_time(seconds: float) -> None:
    assert not Changes().wait_for(lambda: False, seconds)


@pytest.mark.parametrize("seconds", [1e10, 1e300, 10**30])
def test_longer_than_threads_can_wait_is_as_long_as_it_takes(seconds: float) -> None:
    changes, looks = Changes(), iter([False, False, True])

    def holds() -> bool:
        changes.tell()
        return next(looks)

    assert changes.wait_for(holds, seconds)


def test_the_main_thread_looks_up_each_second_for_a_signal_that_came_just_before_its_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a signal breaks no wait off: Python handles it at the next step of that thread."""
    waits: list[float] = []

    class Silent:
        put = print

        def get(self, timeout: float) -> None:
            waits.append(timeout)
            raise Empty

    def waited() -> list[float]:
        waits.clear()
        Changes().wait_for(lambda: len(waits) > 1)
        return [*waits]

    monkeypatch.setattr(_lockfree, "SimpleQueue", Silent)
    assert waited() == [1.0, 1.0]
    assert min(outcome(in_thread(waited))) > 1_000_000  # where no signal is handled


async def test_a_coroutine_waits_for_what_a_thread_changes() -> None:
    changes, state = Changes(), [False]

    def change() -> None:
        state[0] = True
        changes.tell()

    asyncio.get_running_loop().call_later(1.0, in_thread, change)
    assert await changes.until(lambda: state[0], 1_000.0)


async def test_a_coroutine_that_waits_for_what_does_not_come_is_told_in_time() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    assert not await Changes().until(lambda: False, 3.0)
    assert loop.time() - began == pytest.approx(3.0)


def test_a_change_told_after_the_loop_of_who_waited_is_gone_does_no_harm() -> None:
    changes = Changes()

    async def leave() -> None:
        task = asyncio.ensure_future(changes.until(lambda: False))
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(leave())
    changes.tell()


def test_a_wait_interrupted_at_any_line_leaves_nobody_who_would_be_told_for_ever() -> None:
    changes = Changes()

    def wait() -> None:
        answers = [True, False, False]

        def holds() -> bool:
            changes.tell()
            return answers.pop()

        assert changes.wait_for(holds, PATIENCE)

    at_every_line(wait, raise_struck, errors=(Struck,))
    assert not changes._ringers


def test_a_record_that_was_delivered_is_let_go_before_its_delivery_is_over() -> None:
    class Record:
        pass

    held: list[Callable[[], object]] = []

    class Watched(Changes):
        def tell(self) -> None:
            told.append(None if not held else held[0]())
            super().tell()
            heard.set()

    told: list[object] = []
    put, heard = threading.Event(), threading.Event()

    def deliver(record: Record) -> None:
        assert put.wait(PATIENCE)
        held.append(weakref.ref(record))

    queue = WorkerQueue[Record](deliver, 10, drop_oldest=False, name="test", lingers=False)
    queue._changes = Watched()
    queue.put(Record())
    put.set()
    assert queue.flush(PATIENCE)
    assert heard.wait(PATIENCE)  # a flush may see the end before anybody is told of it
    assert held
    assert told[0] is None
