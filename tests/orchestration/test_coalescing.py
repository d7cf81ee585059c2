"""Two callers of one key: one acquisition, whatever the interleaving (invariants 1, 3, 8)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coalestra import (
    CacheLookup,
    FetchContext,
    FreshnessPolicy,
    ResourceKey,
    SnapshotBuildError,
    SnapshotValue,
)
from tests.orchestration.scripted import Batch, Single, builder, key, latency
from tests.support import Gate, no_leaks, settle

pytestmark = pytest.mark.concurrency

A, B = key("single", "a"), key("single", "b")


class SlowCache:
    """A cache with single-key methods that all pass a gate."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.values: dict[ResourceKey, SnapshotValue[Any]] = {}
        self.reads = 0

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        self.reads += 1
        await self.gate.pass_()
        value = self.values.get(key)
        if value is None:
            return CacheLookup(None, fresh=False, usable_stale=False)
        age = max(0.0, now - value.observed_at)
        return CacheLookup(value, age <= policy.ttl_seconds, age <= policy.max_stale_seconds, age)

    async def set(self, value: SnapshotValue[Any]) -> None:
        await asyncio.sleep(0)
        self.values[value.key] = value

    async def invalidate(self, key: ResourceKey) -> None:
        await asyncio.sleep(0)
        self.values.pop(key, None)

    async def clear(self) -> None:
        self.values.clear()


async def test_callers_that_arrive_together_cause_one_call() -> None:
    source = Single("single", fetch=latency(1))
    build = builder(source).build
    snapshots = await asyncio.gather(*(build([A]) for _ in range(50)))
    assert source.calls == [A]
    assert {snapshot.value(A) for snapshot in snapshots} == {"a"}
    joined = [s[A].metadata.get("coalesced_request", False) for s in snapshots]
    assert sorted(joined) == [False] + [True] * 49
    assert sum(s.diagnostics.coalesced_requests for s in snapshots) == 49


async def test_callers_over_a_cache_that_awaits_cause_one_call_and_one_read() -> None:
    gate = Gate()
    cache = SlowCache(gate)
    source = Single("single", fetch=latency(1))
    building = builder(source, cache=cache)
    first = asyncio.ensure_future(building.build([A]))
    await gate.wait_arrived()
    others = [asyncio.ensure_future(building.build([A])) for _ in range(9)]
    await settle()
    reads_before_the_write = cache.reads
    gate.open()
    await asyncio.gather(first, *others)
    assert (reads_before_the_write, source.calls) == (1, [A])


async def test_a_caller_between_the_cache_miss_and_the_answer_joins_the_call() -> None:
    cache = SlowCache(Gate(opened=True))
    at_source = Gate()

    async def fetch(key: ResourceKey, context: FetchContext) -> str:
        await at_source.pass_()
        return "value"

    source = Single("single", fetch=fetch)
    building = builder(source, cache=cache)
    first = asyncio.ensure_future(building.build([A]))
    await at_source.wait_arrived()
    second = asyncio.ensure_future(building.build([A]))
    await settle()
    at_source.open()
    await asyncio.gather(first, second)
    assert source.calls == [A]


async def test_a_caller_whose_cache_read_was_slow_does_not_repeat_the_call() -> None:
    gate = Gate()
    cache = SlowCache(gate)
    source = Single("single")
    building = builder(source, cache=cache)
    reader = asyncio.ensure_future(building.build([A]))
    await gate.wait_arrived()
    late = asyncio.ensure_future(building.build([A]))
    await settle()
    gate.open()
    await asyncio.gather(reader, late)
    assert source.calls == [A]


async def test_a_finished_key_is_delivered_while_its_owner_still_waits_for_others() -> None:
    gate = Gate()

    async def fetch(key: ResourceKey, context: FetchContext) -> str:
        if key == B:
            await gate.pass_()
        return key.subject

    source = Single("single", fetch=fetch)
    building = builder(source)
    owner = asyncio.ensure_future(building.build([A, B]))
    await gate.wait_arrived()
    joiner = await building.build([A])
    assert joiner.value(A) == "a"
    assert not owner.done()
    gate.open()
    await owner
    assert source.calls == [A, B]


async def test_a_joiner_of_a_batch_key_gets_it_when_the_batch_ends_not_when_the_owner_does() -> (
    None
):
    slow = Single("slow", fetch=latency(100))
    quick = Batch("quick")
    building = builder(slow, quick)
    loop = asyncio.get_running_loop()
    owner = asyncio.ensure_future(building.build([key("slow"), key("quick", "1")]))
    await asyncio.sleep(1)
    began = loop.time()
    await building.build([key("quick", "1")])
    assert loop.time() == began
    await owner


async def test_every_waiter_of_a_failed_key_gets_an_error_of_its_own() -> None:
    async def fetch(key: ResourceKey, context: FetchContext) -> str:
        await asyncio.sleep(1)
        raise ConnectionError("down")

    building = builder(Single("single", fetch=fetch))
    first, second = await asyncio.gather(
        building.build([A], strict=False), building.build([A], strict=False)
    )
    assert str(first.errors[A]) == str(second.errors[A])
    assert first.errors[A] is not second.errors[A]


async def test_a_cancelled_follower_leaves_the_shared_call_alone() -> None:
    source = Single("single", fetch=latency(5))
    building = builder(source)
    owner = asyncio.ensure_future(building.build([A]))
    await asyncio.sleep(1)
    follower = asyncio.ensure_future(building.build([A]))
    await asyncio.sleep(1)
    follower.cancel()
    assert (await owner).value(A) == "a"
    assert source.calls == [A]
    await no_leaks(building)


async def test_a_cancelled_owner_leaves_the_call_to_those_who_joined() -> None:
    source = Single("single", fetch=latency(5))
    building = builder(source)
    owner = asyncio.ensure_future(building.build([A]))
    await asyncio.sleep(1)
    joiner = asyncio.ensure_future(building.build([A]))
    await asyncio.sleep(1)
    owner.cancel()
    assert (await joiner).value(A) == "a"
    assert source.calls == [A]
    await no_leaks(building)


async def test_a_joiner_with_budget_left_gets_the_value_after_the_owners_deadline() -> None:
    source = Single("single", fetch=latency(5))
    building = builder(source)
    owner = asyncio.ensure_future(building.build([A], deadline_seconds=2))
    await asyncio.sleep(1)
    joiner = asyncio.ensure_future(building.build([A], deadline_seconds=10))
    with pytest.raises(SnapshotBuildError):
        await owner
    assert (await joiner).value(A) == "a"
    assert source.calls == [A]
    await no_leaks(building)


async def test_a_joiner_never_waits_past_its_own_deadline() -> None:
    source = Single("single", fetch=latency(50))
    building = builder(source)
    loop = asyncio.get_running_loop()
    owner = asyncio.ensure_future(building.build([A], deadline_seconds=100))
    await asyncio.sleep(1)
    began = loop.time()
    with pytest.raises(SnapshotBuildError) as caught:
        await building.build([A], deadline_seconds=2)
    assert loop.time() - began == pytest.approx(2)
    assert "SnapshotDeadlineExceededError" in str(caught.value)
    assert (await owner).value(A) == "a"


async def test_a_joiner_goes_on_to_the_next_source_after_the_owners_deadline() -> None:
    async def fail_late(key: ResourceKey, context: FetchContext) -> str:
        await asyncio.sleep(3)
        raise ConnectionError("down")

    first = Single("first", "single", fetch=fail_late, priority=20)
    second = Single("second", "single", fetch=latency(1))
    building = builder(first, second)
    owner = asyncio.ensure_future(building.build([A], deadline_seconds=2, strict=False))
    await asyncio.sleep(1)
    joiner = await building.build([A], deadline_seconds=10)
    assert joiner[A].source == "second"
    assert A in (await owner).errors
    assert (len(first.calls), len(second.calls)) == (1, 1)
