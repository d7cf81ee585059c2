"""Turns per key: order, no circles, nothing left behind."""

from __future__ import annotations

import asyncio

import pytest

from coalestra._endings import look_after
from coalestra.cache.access import KeyLanes
from tests.contracts.samples import A
from tests.support import begun, settle

pytestmark = pytest.mark.concurrency


async def test_thousands_of_abandoned_turns_end_without_recursion() -> None:
    lanes = KeyLanes()

    async def operate() -> None:
        async with lanes.turn([A]):
            await asyncio.sleep(1)

    first = await begun(operate())
    others = [asyncio.ensure_future(operate()) for _ in range(3_000)]
    await settle()
    for task in others:
        task.cancel()
    await asyncio.gather(first, *others, return_exceptions=True)
    await operate()
    assert not lanes._last


async def test_a_task_that_is_looked_after_can_be_shown_however_many_there_are() -> None:
    tasks: set[asyncio.Task[None]] = set()
    for _ in range(30):
        look_after(asyncio.ensure_future(asyncio.sleep(1)), tasks)
    assert len(repr(next(iter(tasks)))) < 1_000
    await asyncio.sleep(2)
    assert not tasks
