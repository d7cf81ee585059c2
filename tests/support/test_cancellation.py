"""Cancelling at every await finds what a cleanup forgot, and misses no point."""

from __future__ import annotations

import asyncio

import pytest

from tests.support import cancel_at_every_await


async def test_every_await_of_the_work_is_cancelled_once_at_least() -> None:
    reached: set[str] = set()
    struck: set[str] = set()

    async def work() -> None:
        for name in ("first", "second", "third"):
            reached.add(name)
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                struck.add(name)
                raise

    runs = await cancel_at_every_await(work)
    assert runs >= 3
    assert reached == struck == {"first", "second", "third"}


async def test_the_check_runs_after_every_run_and_finds_what_was_left() -> None:
    held: list[str] = []

    async def careless() -> None:
        held.append("slot")
        await asyncio.sleep(1)
        held.remove("slot")

    def check() -> None:
        assert held == []

    with pytest.raises(AssertionError):
        await cancel_at_every_await(careless, check)


async def test_an_error_that_comes_out_of_a_cancelled_run_is_reported_with_its_step() -> None:
    async def clumsy() -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            raise ValueError("clumsy") from None

    with pytest.raises(AssertionError, match="cancelled at step") as caught:
        await cancel_at_every_await(clumsy)
    assert isinstance(caught.value.__cause__, ValueError)


async def test_cancellation_also_meets_an_answer_that_is_just_arriving() -> None:
    """A future that was set in the same step: the result is there and is lost to the cancel."""
    lost: list[bool] = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def answer() -> None:
            if not future.done():
                future.set_result(None)

        loop.call_soon(answer)
        try:
            await future
        except asyncio.CancelledError:
            lost.append(future.done() and not future.cancelled())
            raise

    await cancel_at_every_await(work)
    assert True in lost
