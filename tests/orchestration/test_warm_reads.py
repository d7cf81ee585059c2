"""The short way through the memory cache gives what the general way gives, or steps aside."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    FreshnessPolicy,
    InMemoryMetrics,
    NullEventSink,
    RequestOutcome,
    ResourceAcceptanceRule,
    SnapshotAcceptancePolicy,
    SnapshotBuildError,
    SnapshotConsistencyPolicy,
    SnapshotDeadlineExceededError,
    SnapshotRequest,
)
from coalestra.concurrency.pace import Pace
from tests.orchestration.scripted import Batch, builder, key
from tests.support import ManualClock

MANY = [key("x", str(number)) for number in range(2_000)]


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the slice clock finds the slice used up."""
    ticks = itertools.count(time.perf_counter())
    monkeypatch.setattr("coalestra.concurrency.pace.time.perf_counter", lambda: next(ticks))


@pytest.mark.parametrize("count", [1, 3, 40])
async def test_a_few_keys_are_told_of_as_any_others(count: int) -> None:
    clock = ManualClock()
    building = builder(Batch("x"), clock=clock, default_policy=FreshnessPolicy(10, 20))
    await building.build(MANY[:count])
    clock.advance(5)
    request = SnapshotRequest(required=MANY[:count])
    general = await building.build(MANY[:count], trace=True)
    for short in (
        await building.build(MANY[:count]),
        await building.build(MANY[:count], metadata={"for": "nobody"}),
        await building.build(MANY[:count], deadline_seconds=5, trace=False),
        await building.build_request(request),
        (await building.try_request(request, deadline_seconds=5)).require_accepted(),
        (await building.try_requests([request]))[0].require_accepted(),
    ):
        assert short.resources == general.resources
        assert (list(short), short.errors) == (MANY[:count], {})
        assert short.created_at == general.created_at == clock.now()
        assert short.diagnostics == general.diagnostics
        assert len({short.snapshot_id, general.snapshot_id}) == 2
        assert len(short.snapshot_id) == len(general.snapshot_id) == 32
    named = await building.build(MANY[:count], snapshot_id="mine")
    assert (named.snapshot_id, named.resources) == ("mine", general.resources)
    for wrong in (5, ""):
        with pytest.raises((TypeError, ValueError), match="snapshot_id must be"):
            await building.build(MANY[:count], snapshot_id=wrong)  # type: ignore[arg-type]  # so
    await building.aclose()
    with pytest.raises(RuntimeError):
        await building.build(MANY[:count])


@pytest.mark.parametrize("strict", [True, False])
async def test_a_few_keys_are_reported_as_any_others(strict: bool) -> None:
    class Recorder(NullEventSink):
        def emit(self, event_type: str, **payload: Any) -> None:
            emitted.append((event_type, {**payload, "snapshot_id": "an id"}))

    emitted: list[tuple[str, dict[str, Any]]] = []
    clock, metrics = ManualClock(), InMemoryMetrics()
    building = builder(
        Batch("x"), clock=clock, default_policy=FreshnessPolicy(10, 20), metrics=metrics,
        events=Recorder(),
    )  # fmt: skip
    await building.build(MANY[:3])
    told, counts = [], []
    for terms in ({}, {"metadata": {"for": "nobody"}}, {"deadline_seconds": 5}, {"trace": True}):
        emitted.clear()
        before = metrics.snapshot().counters
        await building.build(MANY[:3], strict=strict, **terms)
        told.append(list(emitted))
        after = metrics.snapshot().counters
        counts.append({series: after[series] - before.get(series, 0) for series in after})
    assert told == [told[0]] * 4
    assert counts == [counts[0]] * 4
    assert [name for name, _ in told[0]][::4] == ["snapshot_started", "snapshot_built"]


NO_POLICY: dict[str, Any] = {}
TOO_FAR_APART = {"consistency_policy": SnapshotConsistencyPolicy(0.5)}
TOO_OLD = {
    "acceptance_policy": SnapshotAcceptancePolicy(
        default_rule=ResourceAcceptanceRule(max_age_seconds=1.0)
    )
}


@pytest.mark.parametrize("policies", [NO_POLICY, TOO_FAR_APART, TOO_OLD])
async def test_a_request_of_a_few_keys_is_judged_and_told_of_as_any_other(
    policies: dict[str, Any],
) -> None:
    class Recorder(NullEventSink):
        def emit(self, event_type: str, **payload: Any) -> None:
            emitted.append((event_type, {**payload, "snapshot_id": "an id", "error": ""}))

    emitted: list[tuple[str, dict[str, Any]]] = []
    clock, metrics = ManualClock(), InMemoryMetrics()
    settings = {"clock": clock, "default_policy": FreshnessPolicy(10, 20)}
    building = builder(Batch("x"), metrics=metrics, events=Recorder(), **settings)
    await building.build(MANY[:2])
    clock.advance(2)
    await building.build(MANY[2:3])
    request = SnapshotRequest(required=MANY[:3], **policies)
    told, counts, said = [], [], []
    for terms in ({}, {"deadline_seconds": 5}, {"trace": True}):
        emitted.clear()
        before = metrics.snapshot().counters
        result = await building.try_request(request, **terms)
        said.append((result.outcome, result.reason))
        told.append(list(emitted))
        after = metrics.snapshot().counters
        counts.append({series: after[series] - before.get(series, 0) for series in after})
        if policies:
            assert result.error is not None
            with pytest.raises(type(result.error)):
                await building.build_request(request, **terms)
    assert said == [said[0]] * 3
    assert told == [told[0]] * 3
    assert counts == [counts[0]] * 3
    assert said[0][0] is (RequestOutcome.REJECTED if policies else RequestOutcome.ACCEPTED)


async def test_requests_of_what_is_in_memory_are_answered_before_anything_is_read() -> None:
    class Recorder(NullEventSink):
        def emit(self, event_type: str, **payload: Any) -> None:
            log.append(event_type)

    log: list[str] = []
    building = builder(Batch("x"), events=Recorder())
    await building.build(MANY[:3])
    log.clear()
    warm, cold = SnapshotRequest(required=MANY[:3]), SnapshotRequest(required=MANY[3:5])
    requests = {"cold": cold, "warm": warm, "again": cold}
    results = await building.try_requests(requests, max_concurrency=1)
    assert log.index("snapshot_built") < log.index("source_call_started")
    assert log.count("source_call_started") == 1
    found = {name: list(each.require_accepted()) for name, each in results.items()}
    assert list(found.items()) == [("cold", MANY[3:5]), ("warm", MANY[:3]), ("again", MANY[3:5])]


async def test_a_builder_that_is_closed_between_two_requests_gives_the_second_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    building = builder(Batch("x"))
    await building.build(MANY[:3])
    closing: list[asyncio.Task[None]] = []

    async def close(pace: Pace) -> bool:
        closing[:] = closing or [asyncio.ensure_future(building.aclose())]
        for _ in range(20):
            if not building.closed:
                await asyncio.sleep(0)
        return True

    monkeypatch.setattr(Pace, "keep", close)
    with pytest.raises(RuntimeError, match="closed"):
        await building.try_requests([SnapshotRequest(required=MANY[:3])] * 2)
    await closing[0]


@pytest.mark.parametrize("terms", [{}, {"snapshot_id": "mine"}])
async def test_what_is_in_memory_is_not_given_once_the_time_is_over(terms: dict[str, Any]) -> None:
    building = builder(Batch("x"), clock=ManualClock())
    await building.build(MANY[:3])
    with pytest.raises(SnapshotBuildError, match="the deadline of 1e-07 s passed"):
        await building.build(MANY[:3], deadline_seconds=1e-7, **terms)
    result = await building.try_request(SnapshotRequest(required=MANY[:3]), deadline_seconds=1e-7)
    assert result.outcome is RequestOutcome.REJECTED


async def test_hits_are_counted_once_whichever_way_is_taken_in_the_end() -> None:
    metrics = InMemoryMetrics()
    cache = AsyncMemoryCache()
    building = builder(Batch("x"), cache=cache, metrics=metrics)
    await building.build(MANY[:10])
    before = await cache.stats()
    plain = await building.build(MANY[:10])
    mixed = await building.build(MANY[:11])
    after = await cache.stats()
    assert (plain.diagnostics.cache_hits, mixed.diagnostics.cache_hits) == (10, 10)
    assert after.fresh_hits - before.fresh_hits == 20
    labels = {"resource_namespace": "test", "resource_name": "x"}
    assert metrics.counter("cache_access_total", status="fresh", **labels) == 20


async def test_what_is_read_the_short_way_is_kept_longest() -> None:
    building = builder(Batch("x"), cache=AsyncMemoryCache(max_entries=3))
    one, two, three, four = MANY[:4]
    await building.build([one, two, three])
    await building.build([one])
    await building.build([four])
    kept = await building.build([one, three, four])
    assert all(value.from_cache for value in kept.values())


@pytest.mark.usefixtures("slices")
async def test_a_deadline_that_passes_between_two_slices_strikes() -> None:
    clock = ManualClock()
    building = builder(Batch("x"), clock=clock, cache=AsyncMemoryCache(max_entries=None))
    await building.build(MANY)
    asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, clock.advance, 5.0)
    with pytest.raises(SnapshotBuildError) as caught:
        await building.build(MANY, deadline_seconds=2)
    assert all(
        isinstance(each, SnapshotDeadlineExceededError) for each in caught.value.errors.values()
    )


@pytest.mark.usefixtures("slices")
async def test_a_builder_that_closes_between_two_slices_ends_the_build() -> None:
    building = builder(Batch("x"), cache=AsyncMemoryCache(max_entries=None))
    await building.build(MANY)
    reading = asyncio.ensure_future(building.build(MANY))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(building.aclose())
    with pytest.raises(RuntimeError, match="closed"):
        await reading
    await closing


async def test_the_clock_is_read_after_each_slow_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nested payload may take a millisecond to copy; two of them shall not share a slice."""
    keys = MANY[:20]
    building = builder(Batch("x", answer=lambda k: {"nested": [[k.subject]]}))
    await building.build(keys)
    ticks = itertools.count(time.perf_counter())
    monkeypatch.setattr("coalestra.concurrency.pace.time.perf_counter", lambda: next(ticks))
    reading = asyncio.ensure_future(building.build(keys))
    steps = 0
    while not reading.done():
        steps += 1
        await asyncio.sleep(0)
    assert steps >= len(keys)


async def test_the_clock_is_read_after_each_event_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever listens takes some time for each of them."""

    class Listener(NullEventSink):
        def emit(self, event_type: str, **payload: Any) -> None:
            told.append(event_type)

    told: list[str] = []
    keys = MANY[:200]
    building = builder(Batch("x"), events=Listener(), buffer_observability=False)
    await building.build(keys)
    told.clear()
    ticks = itertools.count(time.perf_counter())
    monkeypatch.setattr("coalestra.concurrency.pace.time.perf_counter", lambda: next(ticks))
    reading, most, known = asyncio.ensure_future(building.build(keys)), 0, 0
    while not reading.done():
        await asyncio.sleep(0)
        most, known = max(most, len(told) - known), len(told)
    assert (told.count("cache_hit"), most <= 3) == (200, True)


@pytest.mark.parametrize("count", [1, 2])
async def test_what_takes_a_thread_to_be_copied_is_read_warm_all_the_same(count: int) -> None:
    large = [[number] for number in range(30_000)]
    building = builder(Batch("x", answer=lambda _: large))
    for _ in range(3):
        snapshot = await building.build(MANY[:count])
        assert [value.value for value in snapshot.values()] == [large] * count


@pytest.mark.usefixtures("slices")
async def test_a_stage_may_end_while_the_session_is_being_copied() -> None:
    building = builder(Batch("x"), cache=AsyncMemoryCache(max_entries=None))
    async with building.session() as session:
        await session.resolve(MANY[:500])
        copying = asyncio.ensure_future(session.snapshot_async())
        await asyncio.sleep(0)
        await session.resolve(MANY[500:510])
        assert len(await copying) == 500
        assert len(await session.snapshot_async()) == 510
