"""The metrics as a reader of the real SDK reads them."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from opentelemetry.metrics import Meter, NoOpMeterProvider
from opentelemetry.sdk.metrics import ObservableCounter
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader

from coalestra import BuilderHealth, FetchContext, ResourceKey, SyncSnapshotBuilder
from coalestra._telemetry import COUNTERS, OBSERVATIONS
from coalestra.opentelemetry import OpenTelemetryMetrics
from tests.architecture.source_tree import PACKAGE
from tests.docs.pages import ROOT
from tests.opentelemetry.memory import Meters, attributes
from tests.orchestration.scripted import Batch, Single, breaking, builder, held_at, key, tuned
from tests.support import Gate, LoopClock, settle
from tests.support.elsewhere import in_thread, outcome
from tests.support.leaks import look_after_none
from tests.support.running import until_logged

pytestmark = pytest.mark.filterwarnings("error")


# What the library counts and observes ---------------------------------------------------------


def test_every_metric_of_the_library_has_an_instrument_with_its_labels(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    every = {**COUNTERS, **OBSERVATIONS}
    labels = {name: dict.fromkeys(names, "x") for name, (*_, names) in every.items()}
    for name in COUNTERS:
        sink.increment(name, 1, **labels[name])
    for name in OBSERVATIONS:
        sink.observe(name, 1.0, **labels[name])
    found = meters.metrics()
    assert len(found) == len(COUNTERS) + len(OBSERVATIONS)
    for metric in found.values():
        assert re.fullmatch(r"coalestra(\.[a-z_]+)+", metric.name)
        assert re.fullmatch(r"s|\{[a-z]+\}", metric.unit or "")
        assert metric.description
    kept = [attributes(point) for metric in found.values() for point in metric.data.data_points]
    assert sorted(map(len, kept)) == sorted(len(each) + 1 for each in labels.values())
    assert {name.split(".")[0] for each in kept for name in each} == {"coalestra"}


def test_counts_add_up_by_their_labels_and_sinks_on_one_provider_share_them(meters: Meters) -> None:
    one, other = OpenTelemetryMetrics(meters.provider), OpenTelemetryMetrics(meters.provider)
    orders = OpenTelemetryMetrics(meters.provider, builder="orders")
    one.increment("source_fetch_total", source="rates", status="success")
    other.increment("source_fetch_total", 2, status="success", source="rates")
    other.increment("source_fetch_total", source="rates", status="failure")
    orders.increment("source_fetch_total", source="rates", status="failure")
    orders.observe("source_fetch_latency_ms", 500.0, source="rates")
    assert meters.values("coalestra.source.keys") == {
        ("default", "rates", "failure"): 1,
        ("default", "rates", "success"): 3,
        ("orders", "rates", "failure"): 1,
    }
    assert meters.values("coalestra.source.fetch.duration") == {("orders", "rates"): (1, 0.5)}


def test_what_was_counted_by_a_sink_that_is_gone_stays_counted(meters: Meters) -> None:
    OpenTelemetryMetrics(meters.provider).increment("snapshot_build_total", status="success")
    gc.collect()
    OpenTelemetryMetrics(meters.provider).increment("snapshot_build_total", status="success")
    assert meters.values("coalestra.snapshot.builds") == {("default", "success"): 2}


def test_a_sink_of_another_thread_waits_until_the_instruments_are_there(meters: Meters) -> None:
    asked, gate = threading.Event(), threading.Event()

    class Slow:
        def get_meter(self, name: str, version: str) -> Meter:
            asked.set()
            gate.wait(10)
            return meters.provider.get_meter(name, version)

    def observe() -> None:
        OpenTelemetryMetrics(provider).observe("source_batch_size", 1.0, source="x")

    provider: Any = Slow()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(observe)
        asked.wait(10)
        second = threads.submit(observe)
        assert not wait([second], 0.02).done
        gate.set()
        first.result(10)
        second.result(10)
    assert meters.values("coalestra.source.batch.size")


def test_kinds_without_end_do_not_make_series_without_end(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    for number in range(2_100):
        sink.increment("resource_invalidation_total", resource_name=f"{number}")
    for _ in range(5):
        sink.increment("resource_invalidation_total", resource_name="0")
        sink.increment("resource_invalidation_total", resource_name="2099")
    counted = meters.values("coalestra.resource.invalidations")
    assert len(counted) == 2_001
    assert counted[True,] == 105


def test_two_providers_have_nothing_in_common(meters: Meters) -> None:
    OpenTelemetryMetrics(Meters().provider).increment("snapshot_build_total", status="success")
    OpenTelemetryMetrics(meters.provider)
    assert meters.values("coalestra.snapshot.builds") == {}


GLOBAL = """
from opentelemetry import metrics
from coalestra.opentelemetry import OpenTelemetryMetrics
from tests.opentelemetry.memory import Meters

meters, sinks = Meters(), []
for step in {steps}:
    if step == "sink":
        sinks.append(OpenTelemetryMetrics())
    elif step == "named":
        sinks.append(OpenTelemetryMetrics(meters.provider))
    else:
        metrics.set_meter_provider(meters.provider)
for sink in sinks:
    sink.increment("snapshot_build_total", status="success")
    sink.observe("source_fetch_latency_ms", 1.0, source="a")
assert meters.values("coalestra.snapshot.builds") == {{("default", "success"): len(sinks)}}
((count, _),) = meters.values("coalestra.source.fetch.duration").values()
assert count == len(sinks)
"""


@pytest.mark.parametrize(
    "steps", [["sink", "set", "sink", "named"], ["named", "set", "sink"]], ids=" ".join
)
def test_the_global_provider_may_be_set_up_before_or_after(steps: list[str]) -> None:
    program = GLOBAL.format(steps=steps)
    path = os.pathsep.join([str(ROOT), str(PACKAGE.parent)])
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )


def test_a_reader_of_differences_gets_what_came_since_it_last_read() -> None:
    delta: dict[type, AggregationTemporality] = {ObservableCounter: AggregationTemporality.DELTA}
    meters = Meters(InMemoryMetricReader(preferred_temporality=delta))
    sink = OpenTelemetryMetrics(meters.provider)
    read: list[int] = []
    for more in (2, 3):
        sink.increment("snapshot_build_total", more, status="success")
        read += meters.values("coalestra.snapshot.builds").values()
    assert read == [2, 3]


def test_durations_are_seconds_and_fall_into_buckets_that_suit_them(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    sink.observe("source_fetch_latency_ms", 30.0, source="rates")
    sink.observe("source_batch_size", 30, source="rates")
    (duration,) = meters.points("coalestra.source.fetch.duration")
    assert duration.sum == 0.03
    assert duration.explicit_bounds[0] == 0.001
    assert duration.explicit_bounds[-1] == 10
    (size,) = meters.points("coalestra.source.batch.size")
    assert size.sum == 30
    assert size.explicit_bounds[-1] >= 10_000


def test_a_metric_that_the_library_does_not_have_is_refused(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    with pytest.raises(KeyError):
        sink.increment("nothing_like_it")
    with pytest.raises(KeyError):
        sink.observe("nothing_like_it_ms", 1.0)


async def test_a_build_is_counted_and_no_attribute_names_any_subject(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    async with builder(Batch("batch"), Single("single"), metrics=sink) as used:
        assert used.metrics is sink, "no buffer stands between them"
        sink.watch(used)
        wanted = [key("batch", f"SECRET{n}") for n in range(3)]
        single = ResourceKey("test", "single", "SECRET", {"of": "SECRET"})
        await used.build([*wanted, single])
        await used.build(wanted)
        await used.publisher.publish(single, 2, source="stream")
        assert meters.values("coalestra.cache.lookups") == {
            ("default", "batch", "test", "miss"): 3,
            ("default", "single", "test", "miss"): 1,
            ("default", "batch", "test", "fresh"): 3,
        }
        assert meters.values("coalestra.snapshot.builds") == {("default", "success"): 2}
        assert meters.values("coalestra.source.batch.size") == {("default", "batch"): (1, 3)}
        assert meters.values("coalestra.resource.publications") == {
            ("default", "single", "test", "stream", "published"): 1
        }
        data = meters.reader.get_metrics_data()
        assert data is not None
        assert "coalestra.cache.entries" in data.to_json()
        assert "SECRET" not in data.to_json()


async def test_a_sink_that_counts_in_vain_does_no_harm() -> None:
    """As long as no SDK is set up, the API discards what it gets."""
    sink = OpenTelemetryMetrics(NoOpMeterProvider())
    async with builder(Single("single"), metrics=sink) as used:
        sink.watch(used)
        await used.build([key("single")])
        assert (await used.health_snapshot()).observability_failure_count == 0


# Health ---------------------------------------------------------------------------------------


async def test_levels_are_read_in_the_readers_thread_while_the_loop_is_held(meters: Meters) -> None:
    sink, gate = OpenTelemetryMetrics(meters.provider, builder="orders"), Gate()
    async with builder(
        Single("slow", fetch=held_at(gate)), max_concurrency=2, metrics=sink
    ) as used:
        sink.watch(used)
        builds = [asyncio.ensure_future(used.build([key("slow", str(n))])) for n in range(3)]
        await gate.wait_arrived(2)
        await settle()  # for the third to wait, too
        read: dict[str, object] = {}
        names = ("capacity.limit", "capacity.usage", "capacity.pending", "builder.flights")

        def reads() -> None:
            read.update((name, meters.values(f"coalestra.{name}")) for name in names)

        outcome(in_thread(reads))
        gate.open()
        await asyncio.gather(*builds)
        entries = meters.values("coalestra.cache.entries")
    assert read == {
        "capacity.limit": {("orders", "__global__"): 2},
        "capacity.usage": {("orders", "__global__"): 2},
        "capacity.pending": {("orders", "__global__"): 1},
        "builder.flights": {("orders",): 3},
    }
    assert entries == {("orders",): 3}


async def test_a_collection_asks_a_builder_for_its_health_once(
    meters: Meters, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    asked: list[BuilderHealth] = []
    async with builder(Single("single"), metrics=sink) as used:
        health = used.health_snapshot_nowait

        def counted() -> BuilderHealth:
            asked.append(health())
            return asked[-1]

        monkeypatch.setattr(used, "health_snapshot_nowait", counted)
        sink.watch(used)
        for _ in range(3):
            assert "coalestra.builder.severity" in meters.metrics()
    assert len(asked) == 3


async def test_an_open_circuit_shows_with_its_source_and_in_the_severity(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)

    async def fails(key: ResourceKey, context: FetchContext) -> int:
        raise ConnectionError(key.subject)

    source = tuned(Single("rates", fetch=fails), resilience_policy=breaking())
    async with builder(source, Single("sound"), metrics=sink) as used:
        sink.watch(used)
        severities = [meters.values("coalestra.builder.severity")]
        await used.build([key("rates"), key("sound")], strict=False)
        severities.append(meters.values("coalestra.builder.severity"))
        circuits = meters.values("coalestra.source.circuits")
        await asyncio.sleep(5)
        ages = meters.values("coalestra.source.success.age")
        await asyncio.sleep(30)
        later = meters.values("coalestra.source.circuits")
    assert severities == [{("default",): 0}, {("default",): 1}]
    assert circuits == {
        ("default", "open", "rates"): 1,
        ("default", "half_open", "rates"): 0,
        ("default", "open", "sound"): 0,
        ("default", "half_open", "sound"): 0,
    }
    assert ages == {("default", "sound"): 5}
    assert later["default", "half_open", "rates"] == 1
    assert later["default", "open", "rates"] == 0


async def test_a_builder_that_is_closed_or_gone_drops_out(meters: Meters) -> None:
    async with builder(Single("single")) as closed:
        OpenTelemetryMetrics(meters.provider, builder="closed").watch(closed)
        gone = builder(Single("single"))
        OpenTelemetryMetrics(meters.provider, builder="gone").watch(gone)
        assert set(meters.values("coalestra.builder.flights")) == {("closed",), ("gone",)}
        del gone
        look_after_none()
        gc.collect()
        assert set(meters.values("coalestra.builder.flights")) == {("closed",)}
    assert meters.values("coalestra.builder.flights") == {}


async def test_two_open_builders_cannot_go_by_one_name(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider, builder="orders")
    assert repr(sink) == "<OpenTelemetryMetrics of builder 'orders'>"
    async with builder(Single("single")) as first, builder(Single("single")) as second:
        sink.watch(first)
        sink.watch(first)
        with pytest.raises(ValueError, match="'orders' for another one that is open; give each"):
            OpenTelemetryMetrics(meters.provider, builder="orders").watch(second)
        await first.aclose()
        sink.watch(second)
        assert set(meters.values("coalestra.builder.flights")) == {("orders",)}


async def test_a_builder_that_cannot_say_how_it_is_hides_no_other_and_is_logged_once(
    meters: Meters, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(LoopClock):
        broken = False

        def monotonic(self) -> float:
            if self.broken:
                raise OSError("no time")
            return super().monotonic()

    clock, read = Broken(), []
    async with builder(Single("a"), clock=clock) as ill, builder(Single("b")) as well:
        OpenTelemetryMetrics(meters.provider, builder="ill").watch(ill)
        OpenTelemetryMetrics(meters.provider, builder="well").watch(well)
        for clock.broken in (True, True, False, True):
            read.append(set(meters.values("coalestra.builder.flights")))
        clock.broken = False
        until_logged()
    assert read == [{("well",)}, {("well",)}, {("ill",), ("well",)}, {("well",)}]
    assert [record.name for record in caplog.records] == ["coalestra"] * 2
    said = [f"{record.getMessage()} {record.exc_info}" for record in caplog.records]
    assert any("builder 'ill'" in each and "no time" in each for each in said)


def test_the_backlog_of_a_blocking_facade_is_a_level_of_its_own(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    with SyncSnapshotBuilder(builder(Single("single"), metrics=sink)) as facade:
        sink.watch(facade)
        facade.build([key("single")])
        assert meters.values("coalestra.submissions.pending") == {("default",): 0}
        assert meters.values("coalestra.cache.entries") == {("default",): 1}
    assert meters.values("coalestra.submissions.pending") == {}


async def test_a_builder_of_the_loop_has_no_backlog(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    async with builder(Single("single")) as used:
        sink.watch(used)
        assert "coalestra.submissions.pending" not in meters.metrics()


def test_what_is_no_provider_and_no_builder_is_refused(meters: Meters) -> None:
    with pytest.raises(TypeError, match="meter_provider"):
        OpenTelemetryMetrics("here")  # type: ignore[arg-type]  # that is what is tested
    sink = OpenTelemetryMetrics(meters.provider)
    with pytest.raises(TypeError, match="builder"):
        sink.watch(meters)  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(ValueError, match="builder"):
        OpenTelemetryMetrics(meters.provider, builder="")
