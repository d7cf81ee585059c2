"""Pacing gives the loop back."""

from __future__ import annotations

import asyncio

import pytest

from coalestra.concurrency.pace import SLICE_SECONDS, Pace, Slices, at_once
from tests.support import VirtualLoop

pytestmark = pytest.mark.concurrency


class Time:
    """The time that paces go by, in slices."""

    now = 100.0

    def go_on(self, slices: float = 1.0) -> None:
        self.now += slices * SLICE_SECONDS


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    passing = Time()
    monkeypatch.setattr("time.perf_counter", lambda: passing.now)
    return passing


async def test_keeping_pace_rests_only_when_it_is_time(time: Time) -> None:
    pace = Pace()
    assert repr(pace) == "<Pace +0.0015 s left>"
    assert not await pace.keep()
    time.go_on()
    assert await pace.keep()
    assert not await pace.keep()


async def test_a_beginner_does_not_begin_a_slice_while_others_wait_for_one(time: Time) -> None:
    pace = Pace()
    time.go_on()
    resting = pace.keep()
    resting.send(None)
    pace.begin()
    assert pace.due
    resting.close()
    pace.begin()
    assert not pace.due


async def test_a_beginner_begins_no_second_slice_in_a_turn(time: Time) -> None:
    pace = Pace()
    time.go_on()
    assert pace.begin()
    time.go_on()
    assert not pace.begin()
    assert pace.due
    await asyncio.sleep(0)
    assert pace.begin()
    assert not pace.due


def test_work_may_begin_where_no_loop_runs_any_more(time: Time) -> None:
    loop = asyncio.new_event_loop()
    pace = Pace()
    time.go_on()
    loop.call_soon(pace.begin)
    loop.call_soon(loop.stop)
    loop.run_forever()
    time.go_on()
    assert pace.begin()
    assert not pace.due
    loop.close()


async def test_a_clock_set_back_makes_no_slice_endless(time: Time) -> None:
    """As by what freezes all clocks of a process for the length of a test."""
    pace = Pace()
    time.now = 10.0
    assert pace.begin()
    time.go_on()
    assert pace.due


async def test_work_in_slices_rests_when_it_is_time(time: Time) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    steps: list[int] = []

    def slices() -> Slices[str]:
        for _ in range(4):
            time.go_on(0.5)
            steps.append(loop.steps)
            yield
        return "done"

    pace = Pace()
    assert await pace.through(slices()) == "done"
    assert [step - steps[0] for step in steps] == [0, 0, 1, 1]
    assert at_once(slices()) == "done"
    assert len(set(steps[4:])) == 1
