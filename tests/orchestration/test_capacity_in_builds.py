"""How many source operations run at once, and who waits for whom (section 9)."""

from __future__ import annotations

import asyncio

import pytest

from coalestra import (
    FetchContext,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    SnapshotBuilder,
    SourceResiliencePolicy,
)
from tests.orchestration.scripted import Batch, Derived, Single, builder, key, latency, tuned
from tests.support import Gate, begun, settle, taking

pytestmark = pytest.mark.concurrency


class Crowd:
    """Counts those inside, and remembers how many there were at most."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0

    async def stay(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            await asyncio.sleep(1)
        finally:
            self.inside -= 1

    async def fetch(self, k: ResourceKey, context: FetchContext) -> str:
        await self.stay()
        return k.subject


def keys(name: str, count: int) -> list[ResourceKey]:
    return [key(name, str(i)) for i in range(count)]


@pytest.mark.parametrize("given", ["setting", "source", "both"])
async def test_a_source_keeps_to_its_own_limit_and_the_setting_wins(given: str) -> None:
    crowd = Crowd()
    source = Single("a", fetch=crowd.fetch)
    source.max_concurrency = {"setting": None, "source": 2, "both": 5}[given]
    limits = None if given == "source" else {"a": 2}
    building = builder(source, source_concurrency=limits)
    await building.build(keys("a", 8))
    assert crowd.most == 2
    assert building.capacity.limit_for("a") == 2


async def test_a_batch_costs_one_slot_however_many_its_keys() -> None:
    crowd = Crowd()
    building = builder(Batch("b", before=crowd.stay), max_concurrency=1)
    with taking(1):
        await building.build(keys("b", 100))


# Added: refreshes, places in the queue, order of results, leases


async def in_use(building: SnapshotBuilder, name: str = "__global__") -> tuple[int, int]:
    """How many slots are taken, and how many callers wait for one."""
    await settle()
    view = (await building.capacity_snapshot())[name]
    return view.in_use, view.waiting


def gated(gate: Gate, name: str = "x") -> Single:
    """A source that holds every call at a gate."""

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        await gate.pass_()
        return k.subject

    return Single(name, fetch=fetch)


async def test_who_waits_for_a_global_slot_holds_one_of_its_source_already() -> None:
    gate = Gate()
    building = builder(
        gated(gate, "x"), gated(gate, "y"), max_concurrency=1, source_concurrency={"y": 1}
    )
    first = await begun(building.build([key("x")]))
    second = asyncio.ensure_future(building.build([key("y")]))
    assert await in_use(building, "y") == (1, 0)
    assert await in_use(building) == (1, 1)
    second.cancel()
    assert await in_use(building, "y") == (0, 0)
    gate.open()
    await first


async def test_a_retry_joins_the_queue_behind_those_who_came_meanwhile() -> None:
    order: list[str] = []

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        order.append(k.subject)
        if k.subject == "fails" and order.count("fails") == 1:
            raise ConnectionError("down")
        await asyncio.sleep(3)
        return k.subject

    retry = RetryPolicy(base_delay_seconds=5, max_delay_seconds=5, jitter_ratio=0)
    source = tuned(Single("x", fetch=fetch), resilience_policy=SourceResiliencePolicy(retry=retry))
    building = builder(source, max_concurrency=1)
    failing = asyncio.ensure_future(building.build([key("x", "fails")]))
    assert await in_use(building) == (0, 0)
    await asyncio.sleep(4)
    other = asyncio.ensure_future(building.build([key("x", "other")]))
    await asyncio.sleep(2)
    assert await in_use(building) == (1, 1)
    await asyncio.gather(failing, other)
    assert order == ["fails", "other", "fails"]


@pytest.mark.parametrize("timeout, queue_timeout, deadline, expected", [
    (100.0, 2.0, None, "SourceQueueTimeoutError"), (2.0, None, None, "SourceQueueTimeoutError"),
    (None, 2.0, 5.0, "SourceQueueTimeoutError"), (None, 5.0, 2.0, "SnapshotDeadlineExceededError"),
])  # fmt: skip
async def test_waiting_for_capacity_ends_by_whichever_limit_comes_first(
    timeout: float | None, queue_timeout: float | None, deadline: float | None, expected: str
) -> None:
    """The timeout of the source is one if its queue has none."""
    source = tuned(Single("x", timeout=timeout), resilience_policy=None)
    source.queue_timeout_seconds = queue_timeout
    building = builder(source, max_concurrency=1)
    lease = await building.capacity.acquire("x")
    with taking(2):
        snapshot = await building.build([key("x")], strict=False, deadline_seconds=deadline)
    error = snapshot.errors[key("x")]
    assert isinstance(error, ResourceResolutionError)
    (failure,) = error.failures
    assert (failure.error_type, failure.attempts) == (expected, 0)
    assert "2 s" in failure.message
    queued = expected == "SourceQueueTimeoutError"
    assert ("waited 2 s for capacity of source 'x'" in failure.message) is queued
    health = await building.health_snapshot()
    assert (health.queue_timeout_count, health.source_timeout_count) == (queued, 0)
    assert health.circuits == {}
    lease.release()


@pytest.mark.parametrize("setting, workers", [(None, 6), (2, 2), (20, 20)])
async def test_as_many_workers_as_global_slots_serve_a_source_unless_told_otherwise(
    setting: int | None, workers: int
) -> None:
    gate = Gate()
    building = builder(gated(gate), max_concurrency=6, max_pending_tasks=setting)
    assert building.max_pending_tasks == workers
    task = asyncio.ensure_future(building.build(keys("x", 30)))
    assert sum(await in_use(building)) == workers
    assert (await building.health_snapshot()).active_dispatch_workers == workers
    gate.open()
    await task


@pytest.mark.parametrize("waits", ["joined", "derived", "queued"])
async def test_who_waited_for_capacity_until_its_deadline_is_told_who_has_it(waits: str) -> None:
    """Also if the wait was another one's, of what it rests on, or still to come."""
    first, second, top = key("x", "1"), key("x", "2"), key("top")
    building = builder(
        Single("x"),
        Derived("top", needs=lambda k: [first]),
        Single("holder", fetch=latency(50)),
        max_concurrency=1,
    )
    holder = await begun(building.build([key("holder")]))
    other = asyncio.ensure_future(
        building.build([first, second] if waits == "joined" else [second])
    )
    await settle()
    wanted = {"joined": [first], "derived": [top], "queued": [key("x", "3"), first]}[waits]
    snapshot = await building.build(wanted, strict=False, deadline_seconds=5)
    text = str(snapshot.error_for(wanted[-1]))
    assert "capacity of source 'x', held by 'holder' (1)" in text
    assert ("test:x:1: it waited" in text) is (waits == "derived")
    await asyncio.gather(holder, other)
