"""Many calls, few tasks: each bounded, each alone with its failure, none that holds others up."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from coalestra.cache.calls import call_each
from coalestra.core.errors import CacheTimeoutError
from tests.support import Gate, settle

pytestmark = pytest.mark.concurrency


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
