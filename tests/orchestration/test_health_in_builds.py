"""What health says of a builder at work, and what is made of it (section 15)."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from coalestra import (
    BuilderHealth,
    BuilderHealthReason,
    BuilderHealthSeverity,
    CacheStats,
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    RefreshMode,
    ResourceKey,
    RetryPolicy,
    SnapshotBuilder,
    SourceResiliencePolicy,
    SourceUnavailableError,
)
from tests.contracts.caches import SingleKeyCache
from tests.orchestration.scripted import ONCE, Derived, Single, builder, held_at, key
from tests.orchestration.stock import BASE, Shop, Stock
from tests.support import Gate, ManualClock, begun, settle

K = key("k")


def reasons(health: BuilderHealth, **more: Any) -> dict[BuilderHealthReason, str]:
    return {each.reason: each.severity.value for each in health.assess(**more).findings}


async def test_a_builder_at_rest_is_healthy() -> None:
    shop = Shop()
    await shop.builder.build([BASE])
    await settle()
    health = await shop.builder.health_snapshot()
    assert health.assess().severity is BuilderHealthSeverity.HEALTHY
    assert health.assess().findings == ()
    assert not health.closed
    assert health.capacity["__global__"].limit == 8
    assert isinstance(health.cache, CacheStats)
    assert health.source_support_cache_entries == 1
    assert set(health.source_timeout_guarantees) == {"stock", "middle", "top"}


async def test_any_thread_reads_it_at_once_while_the_loop_goes_on() -> None:
    shop = Shop()
    await shop.builder.build([BASE])
    await settle()
    with ThreadPoolExecutor(1) as elsewhere:
        seen = elsewhere.submit(shop.builder.health_snapshot_nowait).result()
    assert seen == await shop.builder.health_snapshot()


async def test_at_once_means_that_a_cache_that_has_to_be_awaited_is_not_asked() -> None:
    class Cache(SingleKeyCache):
        async def stats(self) -> str:
            return "asked"

    building = builder(Single("k"), cache=Cache())
    await building.build([K])
    assert (await building.health_snapshot()).cache == "asked"
    health = building.health_snapshot_nowait()
    assert (health.cache, health.cache_call_count > 0) == (None, True)


async def test_work_under_way_is_seen_while_it_lasts() -> None:
    gate = Gate()
    building = builder(Stock("k", {"k": 1}, before=gate.pass_), source_concurrency={"k": 1})
    tasks = [asyncio.ensure_future(building.build([key("k", str(number))])) for number in range(3)]
    await gate.wait_arrived()
    await settle()
    health = await building.health_snapshot()
    assert health.singleflight_in_flight == 3
    assert health.capacity["k"].in_use == 1
    assert health.waiting_for_capacity == 2
    assert health.active_dispatch_workers >= 1
    assert reasons(health) == {BuilderHealthReason.SOURCE_CAPACITY_WAITING: "critical"}
    (finding,) = health.assess().findings
    assert finding.component == "k"
    gate.open()
    await asyncio.gather(*tasks)


async def test_timeouts_of_each_kind_are_counted_and_their_growth_is_found() -> None:
    gate = Gate()
    slow = Stock("slow", {"slow": 1}, before=gate.pass_, timeout=4)
    queued = Stock("queued", {"queued": 1}, before=gate.pass_)
    queued.queue_timeout_seconds = 1
    building = builder(slow, queued, source_concurrency={"queued": 1})
    before = await building.health_snapshot()
    holding = await begun(building.build([key("queued", "1")]), gate)
    await building.build([key("slow")], strict=False)
    await building.build([key("queued", "2")], strict=False)
    await building.build([key("slow", "3"), key("slow", "4")], strict=False, deadline_seconds=1)
    health = await building.health_snapshot()
    assert health.source_timeout_count == 1
    assert health.queue_timeout_count == 1
    assert health.deadline_exceeded_count == 1
    found = reasons(health, previous=before)
    for reason in (
        BuilderHealthReason.SOURCE_TIMEOUTS_INCREASED,
        BuilderHealthReason.QUEUE_TIMEOUTS_INCREASED,
        BuilderHealthReason.DEADLINES_EXCEEDED_INCREASED,
    ):
        assert found[reason] == "degraded"
    assert health.assess(previous=before).baseline_used
    assert not reasons(health, previous=health)
    gate.open()
    await holding


@pytest.mark.parametrize("scope", CircuitScope)
async def test_circuits_are_told_by_source_and_scope_not_by_resource(scope: CircuitScope) -> None:
    """Subjects and qualifiers may be anybody's; who may see them asks the breaker."""
    source = Single("balance", fetch=_fail)
    source.resilience_policy = SourceResiliencePolicy(
        RetryPolicy(max_attempts=1),
        CircuitBreakerPolicy(scope, failure_threshold=1, recovery_timeout_seconds=30.0),
    )
    building = builder(source)
    secrets = [
        ResourceKey("test", "balance", "anne", {"card": "4111"}),
        ResourceKey("test", "balance", "bert", {"card": "5111"}),
    ]
    for secret in secrets:
        await building.build([secret], strict=False)
    opened_at = asyncio.get_running_loop().time()
    await asyncio.sleep(7.5)
    health = await building.health_snapshot()
    told = json.dumps(health.to_dict()) + repr(health) + repr(health.assess())
    assert not [word for word in ("anne", "bert", "4111", "5111") if word in told]
    apart = scope in (CircuitScope.SUBJECT, CircuitScope.RESOURCE)
    (group,) = health.to_dict()["circuits"].values()
    assert group == {
        "state": "open", "count": 2 if apart else 1, "failures": 1, "opened_at": opened_at,
        "half_open_probe_active": False, "seconds_since_opened": 7.5, "seconds_until_probe": 22.5,
    }  # fmt: skip
    (finding,) = health.assess().findings
    assert (finding.component, finding.observed) == ("balance", group["count"])
    named = await building.circuit_breaker.snapshot()
    assert len(named) == group["count"], "only whoever asks the breaker is told the names"


async def _fail(_key: ResourceKey, _context: FetchContext) -> Any:
    raise LookupError(f"no such {_key}")


class FailingSink:
    """Raises whatever it is told."""

    coalestra_non_blocking = True

    def emit(self, event_type: str, **payload: Any) -> None:
        raise OSError("disk full")


async def test_failing_sinks_are_counted_and_never_reach_a_build() -> None:
    building = builder(Single("k"), events=FailingSink())
    before = await building.health_snapshot()
    assert (await building.build([K])).complete
    health = await building.health_snapshot()
    assert health.observability_failure_count > 0
    found = reasons(health, previous=before)
    assert BuilderHealthReason.OBSERVABILITY_FAILURES_INCREASED in found


async def test_a_cache_without_stats_has_none() -> None:
    building = builder(Single("k"), cache=SingleKeyCache())
    assert (await building.health_snapshot()).cache is None


# As data


def is_plain(data: Any) -> bool:
    if isinstance(data, Mapping):
        return all(isinstance(name, str) and is_plain(each) for name, each in data.items())
    if isinstance(data, list):
        return all(is_plain(each) for each in data)
    if isinstance(data, float):
        return math.isfinite(data)
    return data is None or isinstance(data, (str, int, bool))


async def worked() -> SnapshotBuilder:
    """A builder in which a little of everything has happened."""
    stock = Stock("k", {"k": 1, "bad": SourceUnavailableError("down")})
    stock.resilience_policy = SourceResiliencePolicy(
        retry=ONCE.retry, circuit=CircuitBreakerPolicy(failure_threshold=1)
    )
    building = builder(stock, source_concurrency={"k": 2})
    await building.build([K])
    await building.build([key("bad")], strict=False)
    return building


async def test_to_dict_holds_every_field_as_plain_data_of_its_moment() -> None:
    building = await worked()
    health = await building.health_snapshot()
    data = health.to_dict()
    assert data["schema"] == "coalestra.builder-health"
    assert data["schema_version"] == 1
    assert {each.name for each in dataclasses.fields(health)} <= set(data)
    assert is_plain(data)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["capacity"]["k"]["limit"] == 2
    assert data["assessment"]["severity"] == "degraded"
    assert health.to_dict(include_assessment=False)["assessment"] is None
    await building.build([key("k", "more")], strict=False)
    await building.aclose()
    assert health.to_dict() == data


# What is under way, and how each source has fared -------------------------------------------------


async def test_flights_under_way_say_what_they_wait_for_and_who_waits_for_them() -> None:
    gate = Gate()
    building = builder(Single("k", fetch=held_at(gate)), Derived("d", needs=lambda _: [key("k")]))
    assert building.flights_under_way() == ()
    first = await begun(building.build([key("d")]), gate)
    second = asyncio.ensure_future(building.build([key("k")]))
    await asyncio.sleep(2)
    derived, fetched = building.flights_under_way(limit=10**30)
    assert (derived.key, derived.state, derived.source) == (
        key("d"),
        "waiting for dependencies",
        None,
    )
    assert (derived.attempts, derived.running_seconds, derived.waiters) == (0, None, 1)
    assert (fetched.key, fetched.state, fetched.source) == (key("k"), "its source is running", "k")
    assert (fetched.waiters, fetched.attempts, fetched.refresh) == (2, 1, False)
    assert fetched.running_seconds == pytest.approx(2)
    assert building.flights_under_way(limit=1) == (derived,)
    gate.open()
    await asyncio.gather(first, second)
    assert building.flights_under_way() == ()


async def test_flights_whose_call_waits_or_rests_say_so() -> None:
    gate = Gate()

    async def fetch(key: ResourceKey, context: FetchContext) -> int:
        await gate.pass_()
        if key.subject == "fails":
            raise ConnectionError
        return 1

    source = Single("k", fetch=fetch)
    source.resilience_policy = SourceResiliencePolicy(
        retry=RetryPolicy(max_attempts=2, base_delay_seconds=9.0, max_delay_seconds=9.0)
    )
    building = builder(source, max_concurrency=1, max_pending_tasks=2)
    keys = [key("k", subject) for subject in ("fails", "waits")]
    build = await begun(building.build(keys, strict=False), gate)
    running, waiting = building.flights_under_way()
    assert (running.state, waiting.state) == ("its source is running", "waiting for capacity")
    assert (waiting.source, waiting.attempts, waiting.running_seconds) == ("k", 0, None)
    gate.open()
    await settle()
    (resting,) = building.flights_under_way()
    assert (resting.key.subject, resting.state) == ("fails", "resting between two attempts")
    assert (resting.attempts, resting.running_seconds) == (1, None)
    await build


async def test_a_flight_that_only_refreshes_says_that_no_reader_waits() -> None:
    gate = Gate(opened=True)
    policy = FreshnessPolicy(1.0, 1_000.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(Single("k", fetch=held_at(gate)), default_policy=policy)
    await building.build([key("k")])
    await asyncio.sleep(5)
    gate.opened = False
    await building.build([key("k")])
    await gate.wait_arrived(2)
    (flight,) = building.flights_under_way()
    assert flight.refresh
    assert (await building.health_snapshot()).background_refreshes == 1
    gate.open()
    await building.wait_for_refreshes()
    assert (await building.health_snapshot()).background_refreshes == 0


@pytest.mark.parametrize("limit", [0, True, 1.5])
async def test_how_many_flights_are_wanted_must_be_a_count(limit: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="limit must be"):
        builder(Single("k")).flights_under_way(limit=limit)


async def test_times_are_told_to_the_microsecond() -> None:
    """What the digits of a clock say beyond that is noise, which hides the rest."""
    clock, metrics = ManualClock(), InMemoryMetrics()

    async def take_a_while(*_: Any) -> int:
        clock.advance(0.123_456_789)
        return 1

    building = builder(Single("slow", "k", fetch=take_a_while), clock=clock, metrics=metrics)
    await building.build([K])
    clock.advance(0.123_456_789)
    fared = building.health_snapshot_nowait().sources["slow"]
    assert (fared.seconds_since_success, fared.total_latency_ms) == (0.123_457, 123.457)
    observed = metrics.summary("source_fetch_latency_ms", source="slow")
    assert observed is not None
    assert observed.total == 123.457
