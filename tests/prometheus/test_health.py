"""The health of builders, read back from what a scrape brings."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from coalestra import (
    CircuitScope,
    FreshnessPolicy,
    RefreshMode,
    ResourceKey,
    SnapshotBuilder,
    SyncSnapshotBuilder,
)
from coalestra._lockfree import LONGEST_WAIT_SECONDS
from coalestra._telemetry import FACTS
from coalestra.prometheus import HealthCollector, _HealthCopies
from tests.docs.pages import ROOT
from tests.orchestration.scripted import Batch, Single, breaking, builder, held_at, key
from tests.prometheus.scrape import figure, metrics, series
from tests.support import Gate, ThreadGate, settle
from tests.support.leaks import look_after_none
from tests.support.running import until_logged

X = key("x")
NAMES = "coalestra_builder_up"


async def down(k: ResourceKey, context: Any) -> Any:
    raise ConnectionError("down")


async def test_work_under_way_is_seen_while_it_lasts(registry: CollectorRegistry) -> None:
    gate = Gate()
    building = builder(Single("x", fetch=held_at(gate, "fine")), source_concurrency={"x": 2})
    HealthCollector({"shop": building}, registry=registry)
    tasks = [asyncio.ensure_future(building.build([key("x", str(n))])) for n in range(5)]
    await gate.wait_arrived(2)
    await settle()
    shown = {
        name: figure(registry, f"coalestra_{name}", builder="shop", limiter="x")
        for name in ("capacity_limit", "capacity_in_use", "capacity_waiting")
    }
    assert list(shown.values()) == [2, 2, 3]
    assert figure(registry, "coalestra_capacity_limit", limiter="__global__") == 8
    assert figure(registry, "coalestra_keys_in_flight") == 5
    assert (figure(registry, "coalestra_dispatch_workers") or 0) > 0
    assert figure(registry, "coalestra_builder_severity") == 2
    gate.open()
    await asyncio.gather(*tasks)
    await settle()
    assert figure(registry, "coalestra_keys_in_flight") == 0
    assert figure(registry, "coalestra_builder_severity") == 0
    assert figure(registry, "coalestra_cache_entries") == 5


async def test_the_memory_cache_tells_its_answers_and_changes(registry: CollectorRegistry) -> None:
    building = builder(Batch("x"))
    HealthCollector({"shop": building}, registry=registry)
    await building.build([X, key("x", "2")])
    await building.build([X])
    await building.publisher.invalidate(X)
    lookups = {
        labels["result"]: n for labels, n in series(registry, "coalestra_cache_lookups_total")
    }
    assert lookups == {"fresh": 1, "stale": 0, "miss": 2}
    changes = {
        labels["change"]: n for labels, n in series(registry, "coalestra_cache_changes_total")
    }
    assert changes == {"set": 2, "invalidation": 1, "eviction": 0, "expiration": 0}
    assert figure(registry, "coalestra_cache_entries") == 1


async def test_keys_that_cannot_be_refreshed_are_counted(registry: CollectorRegistry) -> None:
    source = Single("x")
    policy = FreshnessPolicy(10.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(source, default_policy=policy)
    HealthCollector({"shop": building}, registry=registry)
    await building.build([X])
    source.answer = down
    await asyncio.sleep(20.0)
    await building.build([X])
    await building.wait_for_refreshes()
    assert figure(registry, "coalestra_failing_refreshes", builder="shop") == 1


async def test_a_circuit_is_a_number_with_its_failures_counted(registry: CollectorRegistry) -> None:
    source = Single("x", fetch=down)
    source.resilience_policy = breaking(2)
    building = builder(source, Single("calm"))
    HealthCollector({"shop": building}, registry=registry)

    def shown() -> tuple[float | None, ...]:
        return (
            figure(registry, "coalestra_source_circuit_state", source="x"),
            figure(registry, "coalestra_source_consecutive_failures", source="x"),
            figure(registry, "coalestra_source_circuits", source="x", state="half_open"),
            figure(registry, "coalestra_source_circuits", source="x", state="open"),
        )

    assert shown() == (0, 0, 0, 0)
    await building.build([X], strict=False)
    assert shown() == (0, 1, 0, 0)
    await building.build([X], strict=False)
    assert shown() == (2, 2, 0, 1)
    await asyncio.sleep(30.0)
    assert shown() == (1, 2, 1, 0)
    assert figure(registry, "coalestra_source_circuit_state", source="calm") == 0
    source.answer = Single("x").answer
    await building.build([X])
    assert shown() == (0, 0, 0, 0)


async def test_answers_too_late_for_their_readers_are_counted(registry: CollectorRegistry) -> None:
    async def slow(k: ResourceKey, context: Any) -> str:
        await asyncio.sleep(0.3)
        return "late"

    building = builder(Single("x", fetch=slow))
    HealthCollector({"shop": building}, registry=registry)
    for _ in range(2):
        await building.build([X], strict=False, deadline_seconds=0.2)
        await settle()
    assert figure(registry, "coalestra_source_consecutive_deadline_cuts", source="x") == 2
    assert figure(registry, "coalestra_deadlines_exceeded_total") == 2


async def test_of_many_circuits_the_open_ones_are_counted(registry: CollectorRegistry) -> None:
    source = Single("x", fetch=down)
    source.resilience_policy = breaking(2, scope=CircuitScope.RESOURCE)
    building = builder(source)
    HealthCollector({"shop": building}, registry=registry)
    keys = [key("x", f"SECRET{number}") for number in range(3)]
    await building.build(keys, strict=False)
    await building.build(keys[:2], strict=False)
    assert figure(registry, "coalestra_source_circuits", source="x", state="open") == 2
    assert figure(registry, "coalestra_source_circuit_state", source="x") == 2
    shown = [str(each.labels) for metric in metrics(registry).values() for each in metric.samples]
    assert not [each for each in shown if "SECRET" in each]


async def test_it_tells_when_a_source_last_answered_and_failed(registry: CollectorRegistry) -> None:
    building = builder(Single("x"), Single("y", fetch=down))
    HealthCollector({"shop": building}, registry=registry)
    success = "coalestra_source_last_success_timestamp_seconds"
    failure = "coalestra_source_last_error_timestamp_seconds"
    assert not series(registry, success) + series(registry, failure)
    await building.build([X, key("y")], strict=False)
    for source, failed in (("x", 0), ("y", 1)):
        assert figure(registry, "coalestra_source_attempts_total", source=source) == 1
        assert figure(registry, "coalestra_source_failed_attempts_total", source=source) == failed
        cuts = "coalestra_source_consecutive_deadline_cuts"
        assert figure(registry, cuts, source=source) == 0
    await asyncio.sleep(40.0)
    for sample, source, other in ((success, "x", "y"), (failure, "y", "x")):
        assert figure(registry, sample, source=source) == pytest.approx(time.time() - 40, abs=30)
        assert figure(registry, sample, source=other) is None


# Who asks, and whom -------------------------------------------------------------------------------


def test_a_scrape_waits_not_for_the_loop_of_a_threaded_builder(registry: CollectorRegistry) -> None:
    gate = ThreadGate()

    async def fetch(k: ResourceKey, context: Any) -> str:
        gate.pass_()
        return "fine"

    with SyncSnapshotBuilder(
        SnapshotBuilder([Single("x", fetch=fetch)]), max_pending_submissions=7
    ) as sync:
        HealthCollector({"sync": sync}, registry=registry)
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(sync.build, [X])
            gate.wait_arrived()
            assert figure(registry, "coalestra_keys_in_flight", builder="sync") == 1
            assert figure(registry, "coalestra_max_pending_submissions") == 7
            assert figure(registry, "coalestra_pending_submissions") == 0
            gate.open()
            building.result()
    assert figure(registry, NAMES) is None


async def test_builders_that_are_closed_or_gone_drop_out(registry: CollectorRegistry) -> None:
    built = {name: builder(Single("x")) for name in ("closed", "gone", "stays")}
    collector = HealthCollector(built, registry=registry)
    assert {labels["builder"] for labels, _ in series(registry, NAMES)} == set(built)
    await built["closed"].aclose()
    gone = weakref.ref(built.pop("gone"))
    look_after_none()
    gc.collect()
    assert gone() is None
    assert [labels["builder"] for labels, _ in series(registry, NAMES)] == ["stays"]
    assert repr(collector) == "<HealthCollector of stays>"
    await built["stays"].aclose()
    assert all(not metric.samples for metric in metrics(registry).values())


async def test_a_builder_may_take_the_place_of_another_later(registry: CollectorRegistry) -> None:
    old, new = builder(Single("x")), builder(Single("x"))
    collector = HealthCollector({"shop": old}, registry=registry)
    collector.watch("shop", new)
    collector.watch("annex", old)
    await new.build([X])
    assert figure(registry, "coalestra_cache_entries", builder="shop") == 1
    assert figure(registry, "coalestra_cache_entries", builder="annex") == 0


async def test_a_builder_that_fails_to_tell_takes_no_other_with_it(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sick, well = builder(Single("x")), builder(Single("x"))
    HealthCollector({"sick": sick, "well": well}, registry=registry)

    def fail() -> Any:
        raise ZeroDivisionError("no health")

    monkeypatch.setattr(sick.circuit_breaker, "counted", fail)
    with caplog.at_level(logging.INFO, "coalestra"):
        for _ in range(3):
            up = {labels["builder"]: each for labels, each in series(registry, NAMES)}
            assert up == {"sick": 0, "well": 1}
        assert figure(registry, "coalestra_keys_in_flight") == 0
        monkeypatch.undo()
        assert {each for _, each in series(registry, NAMES)} == {1}
        until_logged()
    subject = "reading the health of builder 'sick'"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{subject} fails: ZeroDivisionError", f"{subject} works again"]
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize("end", [SystemExit, asyncio.CancelledError])
def test_a_builder_that_ends_whoever_asks_it_takes_no_other_with_it(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    """Or else the thread of an exporter would be gone for good."""
    sick, well = builder(Single("x")), builder(Single("x"))
    HealthCollector({"sick": sick, "well": well}, registry=registry)

    def fail() -> Any:
        raise end

    monkeypatch.setattr(sick.circuit_breaker, "counted", fail)
    with ThreadPoolExecutor(1) as scraper:
        scraped = scraper.submit(series, registry, NAMES).result()
    assert {labels["builder"]: each for labels, each in scraped} == {"sick": 0, "well": 1}
    if end is SystemExit:
        with pytest.raises(SystemExit):
            series(registry, NAMES)


# Making one ---------------------------------------------------------------------------------------


async def test_a_second_collector_of_the_same_names_is_refused(registry: CollectorRegistry) -> None:
    HealthCollector({}, registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        HealthCollector({"shop": builder(Single("x"))}, registry=registry)
    Gauge("mine_keys_in_flight", "taken", registry=registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        HealthCollector({}, registry=registry, namespace="mine")


@pytest.mark.parametrize("settings,error,said", [
    ({"builders": None}, TypeError, "builders must"),
    ({"builders": {"a": 1}}, TypeError, "builder must"),
    ({"builders": {"a": None}}, TypeError, "builder must"),
    ({"registry": None}, TypeError, "registry must"),
    ({"namespace": "a b"}, ValueError, "namespace must"),
    ({"interval_seconds": 0}, ValueError, "interval_seconds must"),
])  # fmt: skip
def test_settings_are_checked(
    registry: CollectorRegistry, settings: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        HealthCollector(**{"builders": {}, "registry": registry, **settings})
    assert not list(registry.collect())


def test_an_interval_of_any_length_can_be_waited_for(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("coalestra.prometheus.time.sleep", slept.append)
    collector = HealthCollector({}, registry=registry, interval_seconds=1e300)
    collector._keep_copying(_HealthCopies("coalestra"))  # ends, as there is no builder
    assert slept == [LONGEST_WAIT_SECONDS]


async def test_the_name_of_a_builder_is_checked(registry: CollectorRegistry) -> None:
    with pytest.raises(ValueError, match="name must"):
        HealthCollector({"": builder(Single("x"))}, registry=registry)


def test_the_reference_names_every_metric_of_health() -> None:
    page = (ROOT / "docs" / "reference" / "prometheus.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `coalestra_(\w+)` \| (counter|gauge) \| ([^|]*) \| (.+) \|$", page, re.MULTILINE
    )
    assert rows == [(
        fact.name, "counter" if fact.counts else "gauge",
        ", ".join(f"`{label}`" for label in fact.labels), fact.description,
    ) for fact in FACTS.values()]  # fmt: skip
