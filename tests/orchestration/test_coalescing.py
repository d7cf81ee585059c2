"""Two callers of one key: one acquisition, whatever the interleaving (invariants 1, 3, 8)."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from coalestra import (
    FetchContext,
    InMemoryMetrics,
    ResourceKey,
    Snapshot,
    SnapshotBuilder,
    SnapshotBuildError,
    SourcePayload,
)
from tests.orchestration.scripted import Single, builder, held_at, key, latency
from tests.support import Gate, begun, settle

pytestmark = pytest.mark.concurrency

A, B = key("single", "a"), key("single", "b")


# Many who need one key and nothing else wait as one


async def together(building: SnapshotBuilder, count: int = 5, **more: Any) -> list[Any]:
    """Begin builds of one key, the first of which has begun to acquire it."""
    first = asyncio.ensure_future(building.build([A], **more))
    await asyncio.sleep(1)
    others = [asyncio.ensure_future(building.build([A], **more)) for _ in range(count)]
    await settle()
    return [first, *others]


@pytest.mark.parametrize("settings", [{}, {"metrics": InMemoryMetrics()}, {"trace": True}])
async def test_a_crowd_is_told_what_each_of_them_would_be(settings: dict[str, Any]) -> None:
    """Where somebody follows what each of them does, they wait one by one."""
    building = builder(Single("single", fetch=latency(5)), **settings)
    tasks = await together(building)
    (flight,) = building.flights_under_way()
    assert flight.waiters == 6
    first, *others = await asyncio.gather(*tasks)
    assert len({snapshot.snapshot_id for snapshot in (first, *others)}) == 6
    for snapshot in others:
        counted = snapshot.diagnostics
        assert (counted.requested_resources, counted.resolved_resources) == (1, 1)
        assert (counted.cache_misses, counted.cache_batch_reads) == (1, 1)
        assert (counted.coalesced_requests, counted.source_calls) == (1, 0)
        assert counted.duration_ms == pytest.approx(4_000)
        assert snapshot.created_at == first.created_at + 1
        assert not snapshot[A].from_cache
        assert snapshot[A].metadata == {"coalesced_request": True}
    cache = (await building.health_snapshot()).cache
    assert cache is not None
    assert (cache.misses, cache.sets) == (6, 1)


@pytest.mark.parametrize("told", [{"price": "1"}, [1], [[1]], "atom"])
@pytest.mark.parametrize("settings", [{}, {"payload_copier": copy.deepcopy}])
async def test_each_of_a_crowd_has_a_copy_of_its_own(told: Any, settings: dict[str, Any]) -> None:
    """However many are told at once, and whoever leaves just then."""

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(5)
        return SourcePayload(told, metadata={"notes": ["x"]} if told == [1] else {"note": "x"})

    building = builder(Single("single", fetch=fetch), **settings)
    first, *tasks = await together(building, 40)
    loop = asyncio.get_running_loop()
    loop.call_at(loop.time() + 4, lambda: [task.cancel() for task in tasks[::3]])
    snapshots = await asyncio.gather(first, *tasks, return_exceptions=True)
    values = [each[A] for each in snapshots if isinstance(each, Snapshot)]
    assert len(values) == len(snapshots) - len(tasks[::3])
    assert [value.value for value in values] == [told] * len(values)
    assert len({id(value) for value in values}) == len(values)
    assert len({id(value.value) for value in values}) == (1 if told == "atom" else len(values))
    notes = [value.metadata["notes"] for value in values if "notes" in value.metadata]
    assert len({id(each) for each in notes}) == len(notes)
    assert {value.age_seconds for value in values} == {0.0}


@pytest.mark.parametrize("strict", [True, False])
async def test_each_of_a_crowd_has_an_error_of_its_own(strict: bool) -> None:
    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(5)
        raise ConnectionError("down")

    source = Single("single", fetch=fetch)
    building = builder(source)
    tasks = await together(building, strict=strict)
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    snapshots: list[Any] = [getattr(each, "snapshot", each) for each in ended]
    assert [isinstance(each, SnapshotBuildError) for each in ended] == [strict] * 6
    assert len({id(snapshot.errors[A]) for snapshot in snapshots}) == 6
    assert {snapshot.diagnostics.failed_resources for snapshot in snapshots} == {1}
    assert source.calls == [A]


async def test_one_who_leaves_a_crowd_takes_nobody_along_and_the_last_one_ends_the_call() -> None:
    ended = []

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        try:
            await asyncio.sleep(50)
        finally:
            ended.append(key)

    building = builder(Single("single", fetch=fetch))
    tasks = await together(building, 3)
    for task in tasks:
        assert not ended
        task.cancel()
        await settle()
    assert ended == [A]
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_who_comes_when_a_whole_crowd_has_left_joins_the_call_that_goes_on() -> None:
    gate = Gate()
    source = Single("single", fetch=held_at(gate, "value"))
    building = builder(source)
    first, *crowd = await together(building, 2)
    for task in crowd:
        task.cancel()
    await settle()
    last = await begun(building.build([A]))
    gate.open()
    assert {snapshot.value(A) for snapshot in await asyncio.gather(first, last)} == {"value"}
    assert source.calls == [A]


@pytest.mark.parametrize("goes", ["by a deadline", "cancelled", "after a crowd"])
@pytest.mark.parametrize("count", [1, 3])
async def test_who_joined_goes_on_in_his_own_name_as_the_owner_goes(count: int, goes: str) -> None:
    names: list[str] = []

    async def fail_late(key: ResourceKey, context: FetchContext) -> str:
        names.append(context.snapshot_id)
        await asyncio.sleep(3)
        raise ConnectionError("down")

    async def answer(key: ResourceKey, context: FetchContext) -> str:
        names.append(context.snapshot_id)
        return "value"

    first = Single("first", "single", fetch=fail_late, priority=20)
    second = Single("second", "single", fetch=fail_late, priority=15)
    building = builder(first, second, Single("third", "single", fetch=answer))
    deadline = 5 if goes == "by a deadline" else None
    going = [
        asyncio.ensure_future(
            building.build([A], deadline_seconds=deadline, snapshot_id="owner", strict=False)
        )
    ]
    await asyncio.sleep(1)
    if goes == "after a crowd":
        going += [asyncio.ensure_future(building.build([A])) for _ in range(2)]
        await asyncio.sleep(1)
        going[0].cancel()
    await asyncio.sleep(2)
    builds = (building.build([A], deadline_seconds=10) for _ in range(count))
    joining = [asyncio.ensure_future(build) for build in builds]
    await settle()
    for task in going if deadline is None else ():
        task.cancel()
    joined = await asyncio.gather(*joining)
    assert [snapshot[A].source for snapshot in joined] == ["third"] * count
    assert (names[1] == "owner") is (goes != "after a crowd")
    assert names[2] in {snapshot.snapshot_id for snapshot in joined}
    await asyncio.wait(going)


async def test_closing_the_builder_ends_a_crowd_with_an_error_for_each() -> None:
    building = builder(Single("single", fetch=latency(50)))
    tasks = await together(building, 3)
    await building.aclose()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(error).__name__ for error in ended} == {"BuilderClosedError"}
    assert len({id(error) for error in ended}) == 4


async def test_a_source_that_asks_for_what_it_serves_is_told_of_the_cycle_in_a_crowd() -> None:
    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(5)
        return (await building.build([A], strict=False)).errors[A]

    building = builder(Single("single", fetch=fetch))
    snapshots = await asyncio.gather(*await together(building, 3))
    assert all("Cycle" in repr(snapshot.value(A)) for snapshot in snapshots)


async def test_a_call_that_begins_when_its_first_reader_has_gone_counts_for_the_next() -> None:
    gate = Gate()
    building = builder(Single("x", fetch=held_at(gate)), max_concurrency=1)
    ahead = await begun(building.build([key("x", "ahead")]), gate)
    first = asyncio.ensure_future(
        building.build([key("x", "1")], strict=False, deadline_seconds=1.0)
    )
    await settle()
    second = asyncio.ensure_future(building.build([key("x", "1"), key("x", "2")]))
    assert (await first).diagnostics.source_calls == 0
    gate.open()
    assert (await second).diagnostics.source_calls == 2
    await ahead
