"""Pacing gives the loop back."""

from __future__ import annotations

import asyncio

import pytest

from coalestra.concurrency.pace import SLICE_SECONDS, Pace, Slices, at_once
from tests.support import VirtualLoop

pytestmark = pytest.mark.concurrency


async def test_keeping_pace_rests_only_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    assert repr(pace) == "<Pace +0.0015 s left>"
    assert not await pace.keep()
    now += SLICE_SECONDS
    assert await pace.keep()
    assert not await pace.keep()


async def test_who_share_a_pace_use_one_slice_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes half a slice; whoever finds the slice used up lets the loop go on."""
    now, loop = 100.0, asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    steps: dict[int, int] = {}

    async def work() -> None:
        nonlocal now
        pace.begin()
        for _ in range(6):
            now += SLICE_SECONDS / 2
            steps[loop.steps] = steps.get(loop.steps, 0) + 1
            await pace.keep()

    await asyncio.gather(*(work() for _ in range(3)))
    assert sum(steps.values()) == 18
    assert max(steps.values()) <= 2 + 2  # a slice, and one step of each of the others


async def test_a_beginner_begins_no_slice_others_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    now += SLICE_SECONDS
    resting = pace.keep()
    resting.send(None)
    pace.begin()
    assert pace.due
    resting.close()
    pace.begin()
    assert not pace.due


async def test_a_beginner_begins_no_second_slice_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    now += SLICE_SECONDS
    assert pace.begin()
    now += SLICE_SECONDS
    assert not pace.begin()
    assert pace.due
    await asyncio.sleep(0)
    assert pace.begin()
    assert not pace.due


def test_work_may_begin_where_no_loop_runs_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    for _ in range(2):
        now += SLICE_SECONDS
        assert pace.begin()
        assert not pace.due


def test_work_may_begin_where_no_loop_runs_though_the_last_turn_of_one_has_had_a_slice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, loop = 100.0, asyncio.new_event_loop()
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    now += SLICE_SECONDS
    loop.call_soon(pace.begin)
    loop.call_soon(loop.stop)
    loop.run_forever()
    now += SLICE_SECONDS
    assert pace.begin()
    assert not pace.due
    loop.close()


async def test_a_clock_set_back_makes_no_slice_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by what freezes all clocks of a process for the length of a test."""
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace = Pace()
    now = 10.0
    assert pace.begin()
    now += SLICE_SECONDS
    assert pace.due


async def test_a_turn_whose_end_was_lost_to_an_interrupt_keeps_nobody_waiting_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr(Pace, "_turn_over", lambda pace: None)
    pace = Pace()
    now += SLICE_SECONDS
    assert pace.begin()
    await asyncio.sleep(0)
    now += SLICE_SECONDS
    assert not pace.begin()
    now += 1.0
    assert pace.begin()


async def test_work_in_slices_rests_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, loop = 100.0, asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    steps: list[int] = []

    def slices() -> Slices[str]:
        nonlocal now
        for _ in range(4):
            now += SLICE_SECONDS / 2
            steps.append(loop.steps)
            yield
        return "done"

    pace = Pace()
    assert await pace.through(slices()) == "done"
    assert [step - steps[0] for step in steps] == [0, 0, 1, 1]
    assert at_once(slices()) == "done"
    assert len(set(steps[4:])) == 1
