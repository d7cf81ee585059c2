"""Many calls, few tasks: each bounded, each alone with its failure, none that holds others up."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from coalestra.cache.calls import call_each
from coalestra.core.errors import CacheTimeoutError
from tests.support import Gate, cancel_at_every_await, settle

pytestmark = pytest.mark.concurrency


class Panic(BaseException):
    """No ordinary exception."""


async def test_no_more_than_the_limit_run_at_a_time_and_all_are_done() -> None:
    running = peak = 0

    async def call(item: int) -> int:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(1)
        running -= 1
        return item * 10

    results, failures = await call_each(range(10), call, width=3, seconds=5)
    assert results == {item: item * 10 for item in range(10)}
    assert (peak, failures) == (3, {})


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("error", [ConnectionError, asyncio.CancelledError, Panic, GeneratorExit])
async def test_whatever_a_call_raises_is_its_own(width: int, error: type[BaseException]) -> None:
    async def call(item: int) -> int:
        await asyncio.sleep(1)
        if item % 2:
            raise error("away")
        return item

    results, failures = await call_each(range(10), call, width=width, seconds=5)
    assert set(results) == {0, 2, 4, 6, 8}
    assert {item: type(each) for item, each in failures.items()} == dict.fromkeys(
        (1, 3, 5, 7, 9), error
    )


async def test_a_call_that_takes_too_long_is_cut_off_and_the_others_go_on() -> None:
    ended = []

    async def call(item: int) -> int:
        try:
            await asyncio.sleep(100 if item in (2, 5) else 0.5)
        finally:
            ended.append(item)
        return item

    loop = asyncio.get_running_loop()
    began = loop.time()
    results, failures = await call_each(range(8), call, width=2, seconds=1)
    assert loop.time() - began < 5
    assert set(results) == {0, 1, 3, 4, 6, 7}
    assert {type(error) for error in failures.values()} == {CacheTimeoutError}
    await settle()
    assert len(ended) == 8


async def test_a_call_that_does_not_care_to_be_cancelled_is_left_behind() -> None:
    gate = Gate()

    async def call(item: int) -> int:
        while item == 1:
            with contextlib.suppress(asyncio.CancelledError):
                await gate.pass_()
                break
        return item

    results, failures = await call_each(range(3), call, width=1, seconds=1)
    assert (results, list(failures)) == ({0: 0, 2: 2}, [1])
    gate.open()
    await settle()
    assert set(results) == {0, 2}, "what it says in the end is not heard"


async def test_nothing_to_do_is_done_at_once() -> None:
    async def call(_: int) -> None:
        raise AssertionError("there is nothing")

    assert await call_each([], call, width=3, seconds=1) == ({}, {})


async def test_cancelling_at_any_await_leaves_no_call_behind() -> None:
    running: set[int] = set()

    async def call(item: int) -> None:
        running.add(item)
        try:
            await asyncio.sleep(0.1)
        finally:
            running.discard(item)

    async def work() -> None:
        await call_each(range(6), call, width=2, seconds=1)

    async def check() -> None:
        await settle()
        assert not running

    assert await cancel_at_every_await(work, check) > 1
