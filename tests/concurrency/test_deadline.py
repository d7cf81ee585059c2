"""Deadlines: one instant on two clocks."""

from __future__ import annotations

import asyncio

import pytest

from coalestra.concurrency.deadline import CutOffExpired, Deadline
from tests.support import LoopClock, ManualClock


async def test_a_deadline_passes_by_whichever_clock_is_further() -> None:
    """A clock moved by hand and the loop's may run apart."""
    clock = ManualClock()
    by_clock, by_loop = Deadline(clock, 2.0), Deadline(clock, 2.0)
    assert by_clock.remaining() == 2.0
    await asyncio.sleep(0.5)
    assert by_loop.remaining() == pytest.approx(1.5)
    clock.advance(1.0)
    assert by_loop.remaining() == pytest.approx(1.0)
    await asyncio.sleep(1.5)
    assert by_loop.expired
    assert by_loop.remaining() == 0.0


async def test_less_than_a_microsecond_is_no_time_left() -> None:
    """A timer may fire early by the resolution of its clock, and means what it says."""
    clock = ManualClock()
    deadline = Deadline(clock, 1.0)
    clock.advance(1.0 - 1e-8)
    assert deadline.expired
    assert deadline.remaining() == 0.0


def test_outside_of_a_loop_its_place_is_fixed_on_first_use_inside_of_one() -> None:
    """A session may be made before its loop runs."""
    clock = ManualClock()
    deadline = Deadline(clock, 3.0)
    assert deadline.remaining() == 3.0
    with pytest.raises(RuntimeError, match="loop_time"):
        _ = deadline.loop_time
    clock.advance(1.0)

    async def inside() -> float:
        return deadline.loop_time - asyncio.get_running_loop().time()

    assert asyncio.run(inside()) == pytest.approx(2.0, abs=0.5)


async def test_when_a_timer_for_it_fires_it_has_expired() -> None:
    """Whatever the rounding between the two clocks."""
    clock = LoopClock()
    for budget in (0.1, 0.3, 1 / 3, 1e-3, 7.7):
        deadline = Deadline(clock, budget)
        with pytest.raises(CutOffExpired):
            with deadline.cut_off():
                await asyncio.sleep(1_000)
        assert deadline.expired


async def test_it_tells_about_itself() -> None:
    """Every stateful object can be looked into."""
    assert repr(Deadline(ManualClock(), 2)) == "<Deadline budget=2 s remaining=2.000 s>"
