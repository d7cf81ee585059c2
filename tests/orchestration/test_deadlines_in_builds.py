"""One absolute instant bounds everything that a build or a session does (section 11)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    CacheLookup,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    Obtained,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    SnapshotBuildError,
    SnapshotDeadlineExceededError,
    SourcePayload,
    SourceResiliencePolicy,
)
from coalestra.concurrency import pace
from coalestra.orchestration import readings, singleflight
from tests.observability.recording import Recorder
from tests.orchestration.scripted import Batch, Derived, Single, builder, down, key, latency, tuned
from tests.orchestration.stock import BASE, MIDDLE, OTHER, Shop, Stock, shown
from tests.support import Gate, ManualClock, ThreadGate, VirtualLoop, settle, taking

pytestmark = pytest.mark.concurrency

X = key("x", "1")


def says_deadline(error: Exception) -> bool:
    """Whether an error is the deadline's doing, directly or by its last source."""
    if isinstance(error, ResourceResolutionError):
        return error.failures[-1].error_type == "SnapshotDeadlineExceededError"
    return isinstance(error, SnapshotDeadlineExceededError)


@pytest.mark.parametrize("kind", ["single", "batch", "derived", "dependency"])
async def test_a_slow_source_of_any_kind_is_cut_off_at_the_deadline(kind: str) -> None:
    async def wait() -> None:
        await asyncio.sleep(50)

    source: Any = Single("x", fetch=latency(50))
    others: list[Any] = []
    if kind == "batch":
        source = Batch("x", before=wait)
    elif kind == "derived":
        source = Derived("x", needs=lambda k: [], before=wait)
    elif kind == "dependency":
        source = Derived("x", needs=lambda k: [key("base")])
        others = [Single("base", fetch=latency(50))]
    building = builder(source, Single("quick"), *others)
    with taking(2):
        with pytest.raises(SnapshotBuildError, match="of 2 s") as caught:
            await building.build([X, key("quick")], deadline_seconds=2)
    assert says_deadline(caught.value.errors[X])
    assert caught.value.snapshot is not None
    assert list(caught.value.snapshot) == [key("quick")]


class StuckCache(AsyncMemoryCache):
    """A cache of somebody else's that never answers a question, or never takes a value."""

    def __init__(self, *, stuck: str) -> None:
        super().__init__()
        self.stuck = stuck

    async def _wait(self, what: str) -> None:
        if self.stuck == what:
            await asyncio.sleep(1_000)

    async def get(self, key: ResourceKey, **how: Any) -> CacheLookup:
        await self._wait("read")
        return await super().get(key, **how)

    async def get_many(self, keys: Collection[ResourceKey], **how: Any) -> Any:
        await self._wait("read")
        return await super().get_many(keys, **how)

    async def set_many_if_newer(self, values: Any, **how: Any) -> Any:
        await self._wait("write")
        return await super().set_many_if_newer(values, **how)


@pytest.mark.parametrize("stuck", ["read", "write"])
async def test_a_cache_that_hangs_leaves_half_of_the_deadline_to_the_sources(stuck: str) -> None:
    building = builder(Single("x"), cache=StuckCache(stuck=stuck))
    loop = asyncio.get_running_loop()
    began = loop.time()
    snapshot = await building.build([X], deadline_seconds=0.5)
    assert loop.time() - began < (0.3 if stuck == "read" else 0.05)
    assert snapshot.complete
    await building.aclose()


async def test_delivery_that_does_not_fit_leaves_no_snapshot() -> None:
    gate = ThreadGate()
    metrics, events = InMemoryMetrics(), Recorder()
    copied = 0

    def copier(value: Any) -> Any:
        nonlocal copied
        copied += 1
        if copied > 1:
            gate.pass_()
        return list(value)

    building = builder(
        Stock("x", {"x": ["value"]}), cache=AsyncMemoryCache(), payload_copier=copier,
        run_payload_copies_in_thread=True, metrics=metrics, events=events,
        buffer_observability=False,
    )  # fmt: skip
    with pytest.raises(SnapshotBuildError, match="of 2 s") as caught:
        await building.build([X], deadline_seconds=2, snapshot_id="s")
    assert caught.value.snapshot is None
    assert isinstance(caught.value.errors[X], SnapshotDeadlineExceededError)
    assert metrics.counter("payload_copy_deadline_total", phase="snapshot_delivery") == 1
    told = [each.payload for each in events.events if "copy" in each.event_type]
    assert told == [{"snapshot_id": "s", "phase": "snapshot_delivery"}]
    assert (await building.health_snapshot()).deadline_exceeded_count == 1
    gate.open()


async def test_after_a_deadline_the_partial_snapshot_is_delivered_all_the_same() -> None:
    copied = 0

    def slow_copier(value: Any) -> Any:
        nonlocal copied
        copied += 1
        return list(value)

    building = builder(
        Single("x", fetch=latency(50)),
        Stock("quick", {"quick": ["value"]}),
        payload_copier=slow_copier,
        run_payload_copies_in_thread=True,
    )
    snapshot = await building.build([X, key("quick")], strict=False, deadline_seconds=2)
    assert snapshot.value(key("quick")) == ["value"]
    assert copied >= 2


async def test_a_stale_answer_of_a_source_stands_in_at_the_deadline() -> None:
    async def stale(k: ResourceKey, context: FetchContext) -> Any:
        return SourcePayload("stale", observed_at=context.requested_at - 5)

    building = builder(
        Single("first", "x", priority=20, fetch=stale),
        Single("second", "x", fetch=latency(50)),
        default_policy=FreshnessPolicy(1, 100),
    )
    value = (await building.build([X], deadline_seconds=2))[X]
    assert (value.value, value.source, value.stale) == ("stale", "first", True)
    assert "SnapshotDeadlineExceededError" in value.metadata["fallback_error"]
    await settle()


async def test_news_that_is_fresh_at_the_deadline_stands_in_for_nothing() -> None:
    """Whether it came as the source was running, or before it was called."""
    metrics = InMemoryMetrics()
    building = builder(
        Single("x", "x", "y", fetch=latency(50)), max_concurrency=1, metrics=metrics, trace=True
    )
    keys = [X, key("y")]
    reading = asyncio.ensure_future(building.build(keys, deadline_seconds=2))
    await asyncio.sleep(1)
    for k in keys:
        await building.publisher.publish(k, "news", source="feed")
    snapshot = await reading
    for k in keys:
        value = snapshot[k]
        assert (value.value, value.stale, value.from_cache) == ("news", False, True)
        assert value.metadata == {"published": True}
        assert snapshot.trace is not None
        assert snapshot.trace.keys[k].obtained is Obtained.PUBLISHED
    for name in ("x", "y"):
        kind = {"resource_namespace": "test", "resource_name": name}
        assert metrics.counter("cache_access_total", status="stale_fallback", **kind) == 0
    await settle()


async def test_a_call_counts_with_its_time_for_who_is_left_when_who_queued_it_has_gone() -> None:
    building = builder(Single("x", fetch=latency(3)), max_concurrency=1)
    holder = asyncio.ensure_future(building.build([key("x", "2")]))
    await asyncio.sleep(1)
    first = asyncio.ensure_future(building.build([X]))
    second = asyncio.ensure_future(building.session().resolve([X]))
    await asyncio.sleep(1)
    first.cancel()
    counted = (await second).diagnostics
    assert counted.source_calls_by_source == {"x": 1}
    assert counted.source_latency_ms_by_source == {"x": pytest.approx(3000)}
    await holder


# Added: threads, copies, ends of stages, callers with different deadlines


async def test_a_deadline_passed_on_the_builders_clock_ends_later_stages_at_once() -> None:
    clock = ManualClock()
    source = Single("x")
    building = builder(source, clock=clock)
    session = building.session(deadline_seconds=3)
    await session.resolve([key("x", "a")])
    clock.advance(3)
    loop = asyncio.get_running_loop()
    began = loop.time()
    late = await session.resolve([key("x", "b")], strict=False)
    assert loop.time() == began
    assert "of 3 s" in str(late.errors[key("x", "b")])
    assert late.value(key("x", "a")) == "a"
    with pytest.raises(SnapshotBuildError) as caught:
        await session.resolve([key("x", "c")])
    assert says_deadline(caught.value.errors[key("x", "c")])
    assert source.calls == [key("x", "a")]


async def test_dependencies_that_cannot_be_copied_fail_the_derived_key_alone() -> None:
    class Fickle:
        def __init__(self) -> None:
            self.copies = 0

        def __call__(self, value: Any) -> Any:
            self.copies += 1
            if self.copies > 1:
                raise ValueError("enough")
            return list(value)

    derived = Derived("x", needs=lambda k: [key("base")])
    building = builder(Stock("base", {"base": ["value"]}), derived, payload_copier=Fickle())
    snapshot = await building.build([X], strict=False)
    error = snapshot.errors[X]
    assert isinstance(error, ResourceResolutionError)
    (failure,) = error.failures
    assert (failure.error_type, failure.attempts) == ("PayloadIsolationError", 0)
    assert derived.calls == []


async def test_a_deadline_tells_what_each_call_was_at_and_whether_it_was_made() -> None:
    """A source that was never asked for a key has made no attempt for it."""
    source = Single("x", fetch=latency(50))
    building = builder(source, max_pending_tasks=1)
    asked, queued = key("x", "asked"), key("x", "queued")
    snapshot = await building.build([asked, queued], strict=False, deadline_seconds=2)
    told = {}
    for each in (asked, queued):
        error = snapshot.errors[each]
        assert isinstance(error, ResourceResolutionError)
        (failure,) = error.failures
        told[each] = failure.attempts, "was running" in failure.message
    assert told == {asked: (1, True), queued: (0, False)}


@pytest.mark.parametrize("at", ["resting between two attempts", "waiting for capacity"])
async def test_a_deadline_tells_how_its_key_stood_though_others_had_time_and_left(at: str) -> None:
    """Their call is ended then, as nobody waits: which is not why the key has failed."""
    retry = SourceResiliencePolicy(RetryPolicy(2, 10, max_delay_seconds=10, jitter_ratio=0))
    source = tuned(Single("x", fetch=down), resilience_policy=retry)
    building = builder(source, max_concurrency=1)
    lease = await building.capacity.acquire("other") if "capacity" in at else None
    first = asyncio.ensure_future(building.build([X], strict=False, deadline_seconds=5))
    patient = asyncio.ensure_future(building.build([X], deadline_seconds=50))
    await settle()
    assert [flight.state for flight in building.flights_under_way()] == [at]
    patient.cancel()
    error = (await first).errors[X]
    assert isinstance(error, ResourceResolutionError)
    (failure,) = error.failures
    assert failure.error_type == "SnapshotDeadlineExceededError"
    assert failure.attempts == len(source.calls) == (lease is None)
    assert ("rested" if lease is None else "waited for capacity") in failure.message
    if lease is not None:
        lease.release()


async def test_a_deadline_is_told_once_of_what_is_derived_from_what_is_late() -> None:
    """The call below may be cut off first, in the same instant: the key above fails of that."""
    derived = Derived("x", "x", "middle", needs=lambda k: [key("base" if k != X else "middle")])
    building = builder(Single("base", fetch=latency(50)), derived)
    first = asyncio.ensure_future(building.build([X], strict=False, deadline_seconds=3))
    await asyncio.sleep(2)
    last = await building.build([X], strict=False, deadline_seconds=1)
    for snapshot in (await first, last):
        error = snapshot.errors[X]
        assert isinstance(error, ResourceResolutionError)
        (failure,) = error.failures
        assert (failure.source, failure.attempts) == ("x", 0)
        assert failure.error_type == "SnapshotDeadlineExceededError"


@pytest.mark.parametrize("step", range(8))
async def test_a_loop_held_at_the_deadline_lets_nobody_see_old_beside_new(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine may be so late then that a timer of the reader's own ends his waiting."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    for module, name in ((singleflight, "_KEYS_PER_STEP"), (readings, "_PER_SLICE")):
        monkeypatch.setattr(module, name, 1)
    loop, shop = asyncio.get_running_loop(), Shop()
    assert isinstance(loop, VirtualLoop)
    await shop.builder.build([MIDDLE])
    shop.stock.before = Gate().pass_
    work = shop.builder.build([BASE, MIDDLE, OTHER], strict=False, deadline_seconds=2.0, trace=True)
    building = asyncio.ensure_future(work)
    await shop.publish(BASE, 2)
    await asyncio.sleep(1.0)
    while not building.done():
        step -= 1
        loop.be_busy(1.0 if step < 0 else 0.0)
        await asyncio.sleep(0)
    snapshot = await building
    assert shown(snapshot) in ({BASE: 1, MIDDLE: (1,)}, {BASE: 2})
    assert snapshot.trace is not None
    for k, error in snapshot.errors.items():
        assert snapshot.trace.keys[k].error_type == type(error).__name__
    await shop.builder.aclose()
