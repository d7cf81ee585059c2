"""Turns per key: order, no circles, nothing left behind."""

from __future__ import annotations

import asyncio
import random

import pytest

from coalestra._endings import look_after
from coalestra.cache.near import KeyLanes
from coalestra.core.keys import ResourceKey
from tests.contracts.samples import A, B, C
from tests.support import begun, settle

pytestmark = pytest.mark.concurrency


async def test_overlapping_groups_of_keys_cannot_block_each_other() -> None:
    lanes = KeyLanes()
    chance = random.Random(1)
    busy: set[ResourceKey] = set()

    async def operate(keys: list[ResourceKey]) -> None:
        async with lanes.turn(keys):
            assert not busy.intersection(keys)
            busy.update(keys)
            await asyncio.sleep(chance.random())
            busy.difference_update(keys)

    groups = [chance.sample([A, B, C], chance.randrange(1, 4)) for _ in range(200)]
    await asyncio.gather(*map(operate, groups))
    assert len(lanes) == 0


async def test_a_cancelled_waiter_lets_nobody_overtake() -> None:
    lanes = KeyLanes()
    log: list[str] = []

    async def operate(name: str) -> None:
        async with lanes.turn([A]):
            log.append(name)
            await asyncio.sleep(1)
            log.append(name)

    tasks = [await begun(operate(name)) for name in "123"]
    tasks[1].cancel()
    await settle()
    assert log == ["1"]
    await asyncio.gather(*tasks, return_exceptions=True)
    assert log == ["1", "1", "3", "3"]
    assert len(lanes) == 0


async def test_ten_thousand_abandoned_turns_end_without_recursion() -> None:
    lanes = KeyLanes()

    async def operate() -> None:
        async with lanes.turn([A]):
            await asyncio.sleep(1)

    first = await begun(operate())
    others = [asyncio.ensure_future(operate()) for _ in range(10_000)]
    await settle()
    for task in others:
        task.cancel()
    await asyncio.gather(first, *others, return_exceptions=True)
    await operate()
    assert len(lanes) == 0


def test_lanes_describe_themselves() -> None:
    assert repr(KeyLanes()) == "KeyLanes(0 busy)"


async def test_a_task_that_is_looked_after_can_be_shown_however_many_there_are() -> None:
    tasks: set[asyncio.Task[None]] = set()
    for _ in range(30):
        look_after(asyncio.ensure_future(asyncio.sleep(1)), tasks)
    assert len(repr(next(iter(tasks)))) < 1_000
    await asyncio.sleep(2)
    assert not tasks
