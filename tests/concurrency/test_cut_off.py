"""Cut-offs: what runs too long ends, and nobody else's cancellation is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coalestra.concurrency.deadline import CutOff, CutOffExpired
from tests.support import Gate, VirtualLoop, begun

pytestmark = pytest.mark.concurrency


def soon(seconds: float = 1.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def outcome(task: asyncio.Task[Any]) -> str:
    """Tell in one word how a task ended."""
    await asyncio.wait([task])
    if task.cancelled():
        return "cancelled"
    return "done" if task.exception() is None else type(task.exception()).__name__


# Somebody else's cancellation ------------------------------------------------------------------


@pytest.mark.parametrize("outside_first", [True, False])
@pytest.mark.parametrize("arrives", [False, True], ids=["waits on", "is about to go on"])
async def test_a_cancellation_in_its_step_is_not_lost(arrives: bool, outside_first: bool) -> None:
    """Whichever of the two comes first; and if nothing but the task is left to be cancelled."""
    loop, when = asyncio.get_running_loop(), soon()
    arrived: asyncio.Future[None] = loop.create_future()
    task: asyncio.Task[None]

    async def work() -> None:
        with CutOff(when):
            await arrived
            await asyncio.sleep(10)

    if arrives:
        loop.call_at(when, arrived.set_result, None)
    if outside_first:
        loop.call_at(when, lambda: task.cancel())  # noqa: PLW0108 - the task is made below
    task = await begun(work())
    if not outside_first:
        loop.call_at(when, task.cancel)
    assert await outcome(task) == "cancelled"


async def test_a_cancellation_while_the_cut_off_block_cleans_up_is_not_swallowed() -> None:
    """The block has been told to end, takes its time, and then the whole task is cancelled."""
    cleaning = Gate("clean-up")

    async def work() -> None:
        with CutOff(soon(1)):
            try:
                await asyncio.sleep(10)
            finally:
                await cleaning.pass_()

    task = await begun(work(), cleaning)
    task.cancel()
    assert await outcome(task) == "cancelled"


async def test_a_cancellation_asked_for_earlier_and_caught_is_not_taken_for_a_new_one() -> None:
    """A task may go on after a cancellation; cut-offs then work as before."""

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            with CutOff(soon(1)):
                await asyncio.sleep(10)

    task = await begun(work())
    task.cancel()
    assert await outcome(task) == "CutOffExpired"


async def test_a_new_cancelled_error_raised_in_answer_to_the_cut_off_counts_as_expiry() -> None:
    """Code under way may replace the exception; nobody else asked for anything."""

    async def work() -> None:
        with CutOff(soon(1)):
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                raise asyncio.CancelledError("reworded") from None

    assert await outcome(asyncio.create_task(work())) == "CutOffExpired"


# Nesting -----------------------------------------------------------------------------------------


async def nested(outer: float, inner: float) -> str:
    try:
        with CutOff(soon(outer)):
            try:
                with CutOff(soon(inner)):
                    await asyncio.sleep(10)
            except CutOffExpired:
                return "inner"
    except CutOffExpired:
        return "outer"
    return "neither"


@pytest.mark.parametrize("outer,inner,struck", [(2, 1, "inner"), (1, 2, "outer"), (1, 1, "outer")])
async def test_of_nested_ones_the_first_reports(outer: float, inner: float, struck: str) -> None:
    """The outermost when both are."""
    assert await nested(outer, inner) == struck


@pytest.mark.parametrize("inner", [1.0, 2.0])
async def test_a_cancellation_with_two_cut_offs_striking_is_not_swallowed(inner: float) -> None:
    """Three requests in one step, one exception, and the one from outside must survive."""
    loop = asyncio.get_running_loop()
    task = await begun(nested(1, inner))
    loop.call_at(soon(1), task.cancel)
    assert await outcome(task) == "cancelled"


# Moving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first,then,ends", [(1, 3, 3), (1, 0.5, 0.5), (1, None, 10), (None, 2, 2)])
async def test_a_cut_off_can_be_moved_while_it_runs(
    first: float | None, then: float | None, ends: float
) -> None:
    """Later, earlier, away, and to a first time: a later reader may bound what had no bound."""

    async def move() -> None:
        cut.move(then and soon(then))

    began = soon(0)
    cut = CutOff(first and soon(first))
    mover = asyncio.create_task(move())
    try:
        with cut:
            await asyncio.sleep(10)
    except CutOffExpired:
        pass
    await mover
    assert soon(0) - began == pytest.approx(ends)


# Misuse ------------------------------------------------------------------------------------------


async def test_a_cut_off_serves_one_block_only() -> None:
    """A second would inherit the expiry of the first."""
    cut = CutOff(None)
    with cut:
        with pytest.raises(RuntimeError, match="once"):
            cut.__enter__()
    with pytest.raises(RuntimeError, match="once"):
        cut.__enter__()


def test_a_cut_off_needs_a_task() -> None:
    """There is nothing to cancel outside of one."""
    loop = asyncio.new_event_loop()
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            CutOff(None).__enter__()
        except RuntimeError as error:
            errors.append(error)
        loop.stop()

    loop.call_soon(enter)
    loop.run_forever()
    loop.close()
    assert "task" in str(errors[0])


async def test_it_tells_about_itself() -> None:
    """Every stateful object can be looked into."""
    cut = CutOff(None)
    states = [repr(cut)]
    with cut:
        await asyncio.sleep(0)
    states.append(repr(cut))
    assert states == ["<CutOff when=None open>", "<CutOff when=None left>"]


async def test_the_task_is_left_as_it_was_found() -> None:
    """On Python 3.10 the count of cancellations is kept on the task for the time of the block."""
    task = asyncio.current_task()
    assert task is not None
    before = repr(task.cancel)
    with CutOff(None):
        with CutOff(None):
            await asyncio.sleep(0)
    assert repr(task.cancel) == before


# A loop that was held ----------------------------------------------------------------------------


@pytest.mark.parametrize("looks", [True, False])
async def test_only_who_looks_first_has_what_came_while_the_loop_was_held(looks: bool) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)

    async def work() -> None:
        with CutOff(soon(1), looks=looks):
            await asyncio.sleep(0.9)
            await asyncio.sleep(0)

    loop.call_later(0.5, loop.be_busy, 5.0)
    assert await outcome(await begun(work())) == ("done" if looks else "CutOffExpired")


async def test_a_look_at_what_came_does_not_last_and_takes_no_time_that_was_up_before() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    for when, hold, ends_after in ((1.0, 5.0, 5.02), (-3.0, 0.0, 0.0)):
        began = loop.time()
        loop.call_soon(loop.be_busy, hold)
        with pytest.raises(CutOffExpired), CutOff(began + when, looks=True):
            await asyncio.sleep(10)
        assert loop.time() - began == pytest.approx(ends_after)
