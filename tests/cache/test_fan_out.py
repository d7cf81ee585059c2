"""Many operations, few tasks, none left behind."""

from __future__ import annotations

import asyncio

import pytest

from coalestra.cache.foreign import for_each


async def test_no_more_than_the_limit_run_at_a_time_and_all_are_done() -> None:
    running = peak = 0
    done = []

    async def operate(item: int) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(1)
        running -= 1
        done.append(item)

    await for_each(range(10), operate, 3)
    assert (peak, sorted(done)) == (3, list(range(10)))


@pytest.mark.parametrize("limit", [1, 3])
async def test_the_first_failure_stops_the_rest_and_is_raised(limit: int) -> None:
    started = []

    async def operate(item: int) -> None:
        started.append(item)
        await asyncio.sleep(1 + item)
        if item == 1:
            raise ConnectionError("away")

    with pytest.raises(ConnectionError):
        await for_each(range(100), operate, limit)
    assert len(started) <= limit + 1


async def test_nothing_to_do_is_done_at_once() -> None:
    async def operate(_: int) -> None:
        raise AssertionError("there is nothing")

    await for_each([], operate, 3)
