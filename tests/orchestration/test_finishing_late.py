"""A call that outlives the deadlines of its readers may fill the cache; who is too slow shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    BuilderHealthReason,
    CallableBatchSource,
    CallableSource,
    CircuitBreakerPolicy,
    FetchContext,
    ResourceAbsent,
    ResourceAbsentError,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SourceResiliencePolicy,
)
from tests.orchestration.scripted import Batch, Derived, Single, builder, key, latency, tuned
from tests.support import ThreadGate, no_leaks, settle, taking

pytestmark = pytest.mark.concurrency

X, Y = key("x", "1"), key("y")
LATE = SourceResiliencePolicy(
    RetryPolicy(5, 1.0, jitter_ratio=0),
    CircuitBreakerPolicy(failure_threshold=2, recovery_timeout_seconds=1000),
    finish_late=True,
)


def slow(seconds: float = 3.0, timeout: float = 10.0, **settings: Any) -> Single:
    """A source of `x` that needs longer than the deadlines here, and may."""
    source = Single("x", fetch=latency(seconds), timeout=timeout)
    return tuned(source, **{"resilience_policy": LATE, **settings})


async def hasty(building: SnapshotBuilder, *keys: ResourceKey, seconds: float = 2) -> Snapshot:
    """Build with a deadline."""
    return await building.build(keys or [X], strict=False, deadline_seconds=seconds)


def cut(snapshot: Snapshot, of: ResourceKey = X) -> bool:
    error = snapshot.errors[of]
    assert isinstance(error, ResourceResolutionError)
    return error.failures[-1].error_type == "SnapshotDeadlineExceededError"


async def cuts(building: SnapshotBuilder, source: str = "x") -> int:
    health = await building.health_snapshot()
    count: int = health.sources[source].deadline_cuts_in_a_row
    return count


def a_batch() -> Any:
    async def before() -> None:
        await asyncio.sleep(3)

    return Batch("x", before=before, timeout=10)


def a_derivation() -> Any:
    async def before() -> None:
        await asyncio.sleep(3)

    return Derived("x", needs=lambda _: [], before=before, timeout=10)


class Awaited(AsyncMemoryCache):
    """A subclass has to be awaited."""


@pytest.mark.parametrize("cache", [AsyncMemoryCache, Awaited])
@pytest.mark.parametrize("make", [slow, a_batch, a_derivation])
async def test_an_answer_that_comes_too_late_for_its_readers_is_there_for_the_next(
    make: Callable[[], Any], cache: Callable[[], Any]
) -> None:
    source = tuned(make(), resilience_policy=LATE)
    building = builder(source, cache=cache())
    with taking(2):
        assert cut(await hasty(building))
    await asyncio.sleep(1.5)
    with taking(0):
        assert (await hasty(building))[X].from_cache
    assert len(source.calls) == 1


async def test_who_comes_meanwhile_shares_the_call() -> None:
    source = slow()
    building = builder(source)
    assert cut(await hasty(building))
    (seen,) = building.flights_under_way()
    assert (seen.waiters, seen.source, seen.running_seconds) == (0, "x", 2)
    assert (await building.health_snapshot()).singleflight_in_flight == 1
    with taking(1):
        snapshot = await hasty(building)
        assert snapshot.value(X) == "1"
    assert snapshot.diagnostics.coalesced_requests == 1
    assert len(source.calls) == 1


async def test_it_goes_on_for_as_long_as_its_source_may_take_and_no_longer() -> None:
    source = slow(50, timeout=5.0)
    building = builder(source)
    assert cut(await hasty(building))
    await asyncio.sleep(2.9)
    assert (await building.capacity_snapshot())["__global__"].in_use == 1
    await asyncio.sleep(0.2)
    await no_leaks(building)
    health = await building.health_snapshot()
    assert health.source_timeout_count == 1
    assert len(source.calls) == 1  # nobody waits for another attempt
    await hasty(building)
    await asyncio.sleep(4)
    snapshot = await hasty(building)  # it timed out twice: a failure of the source
    error = snapshot.errors[X]
    assert isinstance(error, ResourceResolutionError)
    assert error.failures[0].error_type == "CircuitOpenError"


async def test_an_error_that_comes_late_counts_against_the_circuit_and_is_not_retried() -> None:
    async def fails(k: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(3)
        raise ConnectionError("down")

    source = tuned(Single("x", fetch=fails, timeout=10), resilience_policy=LATE)
    building = builder(source)
    for _ in range(2):
        assert cut(await hasty(building))
        await asyncio.sleep(5)
    assert len(source.calls) == 2
    assert len(await building.circuit_breaker.snapshot()) == 1


async def test_only_what_runs_goes_on_and_what_waits_for_capacity_does_not() -> None:
    source = slow()
    building = builder(source, max_concurrency=1)
    snapshot = await hasty(building, X, key("x", "2"))
    assert cut(snapshot)
    await asyncio.sleep(10)
    assert source.calls == [X]


async def test_a_source_without_a_timeout_is_cut_off_all_the_same() -> None:
    source = Single("x", fetch=latency(3))
    building = builder(tuned(source, resilience_policy=None), default_resilience=LATE)
    assert cut(await hasty(building))
    await asyncio.sleep(5)
    assert cut(await hasty(building))
    assert len(source.calls) == 2
    with pytest.raises(ValueError, match="'x'; give it timeout_seconds"):
        builder(tuned(source, resilience_policy=LATE))


def test_it_is_a_flag_and_named() -> None:
    assert not SourceResiliencePolicy().finish_late
    with pytest.raises(TypeError, match="finish_late"):
        SourceResiliencePolicy(finish_late=1)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match="positional"):
        SourceResiliencePolicy(RetryPolicy(), CircuitBreakerPolicy(), True)  # type: ignore[call-arg]  # wrong on purpose


@pytest.mark.parametrize("news", ["event", "invalidation"])
async def test_news_of_the_key_counts_more_than_what_was_asked_before_it(news: str) -> None:
    source = slow()
    building = builder(source)
    assert cut(await hasty(building))
    if news == "event":
        await building.publisher.publish(X, "event", source="stream")
    else:
        await building.publisher.invalidate(X)
    await asyncio.sleep(2)
    snapshot = await building.build([X])
    assert snapshot.value(X) == ("event" if news == "event" else "1")
    assert len(source.calls) == (1 if news == "event" else 2)


@pytest.mark.parametrize("batch", [False, True])
async def test_a_thread_brings_its_answer_home(batch: bool) -> None:
    """Even one that could not be called at all within the deadline, as it cannot be stopped."""
    gate = ThreadGate()

    def read(asked: Any, context: FetchContext) -> Any:
        gate.pass_()
        return dict.fromkeys(asked, "row") if batch else "row"

    kind = CallableBatchSource if batch else CallableSource
    source = kind(
        name="x", priority=1, supports=lambda k: True, fetcher=read, timeout_seconds=30.0,
        blocking_io=True, transport_timeout_seconds=20.0, resilience_policy=LATE,
    )  # fmt: skip
    building = builder(source)
    assert cut(await hasty(building))
    assert gate.arrived == 1
    gate.open()
    await settle()
    assert (await hasty(building)).value(X) == "row"
    assert gate.arrived == 1


async def test_a_late_copy_that_takes_longer_than_the_source_may_is_given_up() -> None:
    gate = ThreadGate()

    def copier(value: Any) -> Any:
        gate.pass_()
        return value

    building = builder(slow(), payload_copier=copier, run_payload_copies_in_thread=True)
    assert cut(await hasty(building))
    await asyncio.sleep(9)
    assert (await building.health_snapshot()).singleflight_in_flight == 0
    gate.open()
    await settle()


async def test_what_is_said_too_late_to_be_absent_is_remembered_all_the_same() -> None:
    async def none(k: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(3)
        raise ResourceAbsent("no such row", ttl_seconds=60)

    source = tuned(Single("x", fetch=none, timeout=10), resilience_policy=LATE)
    building = builder(source, Single("y", priority=1))
    assert cut(await hasty(building))
    await asyncio.sleep(2)
    snapshot = await hasty(building)
    assert type(snapshot.errors[X]) is ResourceAbsentError
    assert len(source.calls) == 1


# Who is too slow for its readers ------------------------------------------------------------------


@pytest.mark.parametrize("policy", [LATE, SourceResiliencePolicy()], ids=["late", "cut off"])
async def test_health_counts_the_calls_in_a_row_that_were_too_slow_for_their_readers(
    policy: SourceResiliencePolicy,
) -> None:
    seconds = 3.0

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        await asyncio.sleep(seconds)
        return "value"

    source = tuned(Single("x", fetch=fetch, timeout=10), resilience_policy=policy)
    building = builder(source, Single("y"))
    for count in (1, 2, 3):
        health = await building.health_snapshot()
        assert health.assess().reasons == ()
        await hasty(building, key("x", str(count)), Y)
        await asyncio.sleep(5)
        assert await cuts(building) == count
    (finding,) = (await building.health_snapshot()).assess().findings
    assert finding.reason is BuilderHealthReason.SOURCE_SLOWER_THAN_DEADLINES
    assert (finding.component, finding.observed, finding.threshold) == ("x", 3, 3)
    assert await cuts(building, "y") == 0
    seconds = 1.0
    await hasty(building, key("x", "in time"))
    assert await cuts(building) == 0
    assert (await building.health_snapshot()).assess().reasons == ()


@pytest.mark.parametrize("timeout", [None, 30.0])
async def test_a_blocking_call_without_time_left_is_counted_unmade(timeout: float | None) -> None:
    """Unless it may finish late, for which it needs a timeout."""
    calls: list[ResourceKey] = []
    source = CallableSource(
        name="x", priority=1, supports=lambda k: True, fetcher=lambda k, context: calls.append(k),
        timeout_seconds=timeout, blocking_io=True, transport_timeout_seconds=20.0,
        resilience_policy=SourceResiliencePolicy() if timeout else None,
    )  # fmt: skip
    building = builder(source, default_resilience=LATE)
    for count in (1, 2):
        assert cut(await hasty(building))
        assert (await cuts(building), calls) == (count, [])
    await building.build([X])
    assert (await cuts(building), calls) == (0, [X])
