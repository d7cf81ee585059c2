"""The sink for Prometheus, read back from what a scrape brings."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from enum import Enum
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from coalestra import PublishStatus, ResourceKey, SnapshotAcceptanceReason, SnapshotBuildError
from coalestra import prometheus as module
from coalestra._telemetry import COUNTERS, OBSERVATIONS
from coalestra.prometheus import LATENCY_BUCKETS, HealthCollector, PrometheusMetrics
from tests.docs.pages import ROOT
from tests.orchestration.scripted import Batch, Single, builder, key
from tests.prometheus.scrape import figure, metrics, series
from tests.support import Gate, ThreadGate, begun
from tests.support.elsewhere import in_a_child, needs_fork
from tests.support.strikes import Struck, at_every_line, raise_struck

X = key("x", "SECRET")
KIND = {"resource_namespace": "test", "resource_name": "x"}


async def down(k: ResourceKey, context: Any) -> Any:
    raise ConnectionError("down")


# What is shown ------------------------------------------------------------------------------------


async def test_a_build_is_counted_and_timed_in_seconds(registry: CollectorRegistry) -> None:
    building = builder(Single("x"), metrics=PrometheusMetrics(registry=registry))
    took = (await building.build([X])).diagnostics.duration_ms
    took += (await building.build([X])).diagnostics.duration_ms
    assert figure(registry, "coalestra_snapshot_build_total", status="success") == 2
    latency = "coalestra_snapshot_build_latency_seconds"
    assert figure(registry, f"{latency}_count", builder="default", status="success") == 2
    assert figure(registry, f"{latency}_sum") == pytest.approx(took / 1000)
    assert figure(registry, "coalestra_source_fetch_total", source="x", status="success") == 1
    assert figure(registry, "coalestra_source_fetch_latency_seconds_count", source="x") == 1
    for status in ("miss", "fresh"):
        assert figure(registry, "coalestra_cache_access_total", **KIND, status=status) == 1


async def test_calls_batches_joins_and_publications_are_shown(registry: CollectorRegistry) -> None:
    gate = Gate()
    building = builder(
        Batch("b", "x", before=gate.pass_), metrics=PrometheusMetrics("shop", registry=registry)
    )
    first = await begun(building.build([X, key("x", "2")]), gate)
    second = await begun(building.build([X]))
    gate.open()
    await asyncio.gather(first, second)
    await building.publisher.publish(X, "new", source="news")
    of_shop = {"builder": "shop"}
    assert figure(registry, "coalestra_source_batch_size_sum", source="b", **of_shop) == 2
    assert figure(registry, "coalestra_singleflight_join_total", **KIND, **of_shop) == 1
    assert figure(registry, "coalestra_source_batch_call_total", status="success", **of_shop) == 1
    published = "coalestra_resource_publish_total"
    assert figure(registry, published, source="news", status="published", **KIND, **of_shop) == 1


@pytest.mark.parametrize("metric, label, kind", [
    ("snapshot_acceptance_violation_total", "reason", SnapshotAcceptanceReason),
    ("resource_publish_total", "status", PublishStatus),
])  # fmt: skip
def test_every_outcome_that_the_library_can_tell_begins_at_zero(
    registry: CollectorRegistry, metric: str, label: str, kind: type[Enum]
) -> None:
    sink, first = PrometheusMetrics(registry=registry), next(iter(kind)).value
    sink.increment(metric, **dict.fromkeys(COUNTERS[metric][3], "x") | {label: first})
    shown = {labels[label]: figure for labels, figure in series(registry, f"coalestra_{metric}")}
    assert shown == {each.value: float(each.value == first) for each in kind}


async def test_a_failure_is_an_increase_from_a_zero_of_before(registry: CollectorRegistry) -> None:
    failing = [False]

    async def fetch(k: ResourceKey, context: Any) -> Any:
        return await down(k, context) if failing[0] else "fine"

    building = builder(Single("x", fetch=fetch), metrics=PrometheusMetrics(registry=registry))
    of_build = {"sample": "coalestra_snapshot_build_total", "status": "error"}
    of_source = {"sample": "coalestra_source_fetch_total", "source": "x", "status": "failure"}
    assert (figure(registry, **of_build), figure(registry, **of_source)) == (0, None)
    await building.build([X])
    assert (figure(registry, **of_build), figure(registry, **of_source)) == (0, 0)
    failing[0] = True
    with pytest.raises(SnapshotBuildError):
        await building.build([key("x", "other")])
    assert (figure(registry, **of_build), figure(registry, **of_source)) == (1, 1)


async def test_no_label_tells_which_resource_it_was(registry: CollectorRegistry) -> None:
    building = builder(
        Single("x"), Single("y", fetch=down), metrics=PrometheusMetrics(registry=registry)
    )
    await building.build([X, key("y", "SECRET")], strict=False)
    await building.publisher.invalidate(X)
    shown = [labels for metric in metrics(registry).values() for labels in metric.samples]
    assert shown
    assert not [each for each in shown if "SECRET" in str(each.labels)]


def test_the_buckets_of_latencies_are_as_documented_or_given(registry: CollectorRegistry) -> None:
    for name, sink, bounds in (
        ("coalestra", PrometheusMetrics(registry=registry), LATENCY_BUCKETS),
        (
            "mine",
            PrometheusMetrics(registry=registry, namespace="mine", latency_buckets=(0.5, 1)),
            (0.5, 1.0),
        ),
    ):
        sink.observe("source_fetch_latency_ms", 700.0, source="a")
        found = {
            float(labels["le"]): each
            for labels, each in series(registry, f"{name}_source_fetch_latency_seconds_bucket")
        }
        assert found == {bound: bound >= 0.7 for bound in (*bounds, float("inf"))}


def test_a_size_is_no_time(registry: CollectorRegistry) -> None:
    PrometheusMetrics(registry=registry).observe("source_batch_size", 7, source="a")
    assert figure(registry, "coalestra_source_batch_size_bucket", le="5.0") == 0
    assert figure(registry, "coalestra_source_batch_size_bucket", le="10.0") == 1


def rows(title: str) -> dict[str, dict[str, set[str]]]:
    """The metrics of a table of the reference page, with their labels and the values of these."""
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition(f"## {title}\n")[2].partition("\n## ")[0]
    found = {}
    for metric, cell in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, re.MULTILINE):
        labels = {
            name: set(re.findall(r"\w+", every))
            for name, every in re.findall(r"`(\w+)`(?:: ([\w, ]+?))?(?=, `|$)", cell.strip())
        }
        kind: dict[str, set[str]] = (
            {"resource_namespace": set(), "resource_name": set()} if "*" in cell else {}
        )
        found[metric] = {**kind, **labels}
    return found


@pytest.mark.parametrize("title", ["Counters", "Observations"])
def test_the_sink_knows_every_metric_of_the_reference_with_its_labels(title: str) -> None:
    known = COUNTERS if title == "Counters" else OBSERVATIONS
    documented = rows(title)
    assert len(documented) > 3
    assert set(known) == set(documented)
    for metric, (*_, labels) in known.items():
        assert set(labels) == set(documented[metric]), metric
        for label, every in labels.items():
            # A status without a list of its own is success or error.
            assert set(every.split()) <= (documented[metric][label] or {"success", "error"}), metric


async def test_what_it_shows_can_be_asked_for_by_name(registry: CollectorRegistry) -> None:
    PrometheusMetrics(registry=registry).increment("snapshot_build_total", status="success")
    chosen = registry.restricted_registry(["coalestra_snapshot_build_total"])
    shown = [sample.name for metric in chosen.collect() for sample in metric.samples]
    assert set(shown) == {"coalestra_snapshot_build_total"}


# Bounds -------------------------------------------------------------------------------------------


def test_beyond_the_bound_what_applications_name_is_other(registry: CollectorRegistry) -> None:
    sink = PrometheusMetrics(registry=registry, max_series=15)
    for number in range(1000):
        sink.increment("source_fetch_total", source=f"s{number}", status="success")
        sink.increment("source_fetch_total", 2, source=f"s{number}", status="failure")
        sink.observe("source_fetch_latency_ms", 1.0, source=f"s{number}")
    found = series(registry, "coalestra_source_fetch_total")
    assert len(found) == 12 + 2  # six outcomes of each of two, and what there was of others
    assert sum(each for _, each in found) == 3000
    assert figure(registry, "coalestra_source_fetch_total", source="s0", status="failure") == 2
    others = "coalestra_source_fetch_total"
    assert figure(registry, others, source="other", status="failure") == 2 * 998
    assert figure(registry, others, source="other", status="success") == 998
    calls = series(registry, "coalestra_source_fetch_latency_seconds_count")
    assert len(calls) == 15 + 1
    assert figure(registry, "coalestra_source_fetch_latency_seconds_count", source="other") == 985


def test_an_outcome_that_is_new_is_shown_while_there_is_room(registry: CollectorRegistry) -> None:
    sink = PrometheusMetrics(registry=registry, max_series=10)
    sink.increment("source_fetch_total", source="a", status="brand_new")
    assert figure(registry, "coalestra_source_fetch_total", status="brand_new") == 1
    for number in range(100):
        sink.increment("source_fetch_total", source=f"s{number}", status=f"new{number}")
    assert figure(registry, "coalestra_source_fetch_total", source="other", status="other")
    found = series(registry, "coalestra_source_fetch_total")
    assert len(found) < 20
    assert sum(each for _, each in found) == 101


def test_memory_is_bounded_too(registry: CollectorRegistry) -> None:
    sink = PrometheusMetrics(registry=registry, max_series=5)
    for number in range(500):
        sink.increment("snapshot_build_total", status="success", extra=str(number))
        sink.increment("cache_access_total", 1, status="miss", **dict.fromkeys(KIND, str(number)))
    metrics(registry)
    assert len(sink._counts) <= 10
    assert figure(registry, "coalestra_snapshot_build_total", status="success") == 500


@pytest.mark.parametrize("report", [
    lambda sink: sink.increment("snapshot_build_total", -1, status="success"),
    lambda sink: sink.increment("snapshot_build_total", float("nan"), status="success"),
    lambda sink: sink.increment("source_batch_size", source="a"),
    lambda sink: sink.observe("snapshot_build_total", 1.0),
    lambda sink: sink.increment("door_total", side="left"), lambda sink: sink.increment("no name"),
    lambda sink: sink.observe("", 1.0),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_in_place(registry: CollectorRegistry, report: Any) -> None:
    sink = PrometheusMetrics(registry=registry)
    before = metrics(registry).keys()
    with pytest.raises(ValueError, match="must"):
        report(sink)
    assert metrics(registry).keys() == before


@pytest.mark.parametrize("report", [
    lambda sink: sink.increment("snapshot_build_total", "1", status="success"),
    lambda sink: sink.increment("snapshot_build_total", status=["success"]),
    lambda sink: sink.observe("source_batch_size", None, source="a"),
    lambda sink: sink.observe("source_fetch_latency_ms", "1", source="a"),
])  # fmt: skip
def test_what_is_no_number_or_text_spoils_nothing(registry: CollectorRegistry, report: Any) -> None:
    sink: Any = PrometheusMetrics(registry=registry)
    for _ in range(2):
        sink.increment("snapshot_build_total", Decimal(2), status="success")
        with pytest.raises(TypeError):
            report(sink)
        sink.observe("source_batch_size", Decimal(1), source="a")
    assert figure(registry, "coalestra_snapshot_build_total", status="success") == 4
    assert figure(registry, "coalestra_source_batch_size_count") == 2


# Several sinks ------------------------------------------------------------------------------------


async def test_builders_on_one_registry_are_told_apart(registry: CollectorRegistry) -> None:
    for name in ("a", "b", "b"):
        building = builder(Single("x"), metrics=PrometheusMetrics(name, registry=registry))
        await building.build([X])
    assert figure(registry, "coalestra_snapshot_build_total", builder="a", status="success") == 1
    assert figure(registry, "coalestra_snapshot_build_total", builder="b", status="success") == 2


def test_namespaces_and_registries_have_metrics_of_their_own(registry: CollectorRegistry) -> None:
    another = CollectorRegistry()
    PrometheusMetrics(registry=registry).increment("snapshot_build_total", status="success")
    PrometheusMetrics(registry=registry, namespace="mine")
    PrometheusMetrics(registry=another)
    assert figure(registry, "coalestra_snapshot_build_total", status="success") == 1
    assert figure(registry, "mine_snapshot_build_total", status="success") == 0
    assert figure(another, "coalestra_snapshot_build_total", status="success") == 0


@pytest.mark.parametrize("settings", [{"max_series": 5}, {"latency_buckets": (1.0,)}])
def test_sinks_that_share_their_metrics_share_their_settings(
    registry: CollectorRegistry, settings: Any
) -> None:
    PrometheusMetrics(registry=registry)
    with pytest.raises(ValueError, match="must be the same for all sinks .*another namespace"):
        PrometheusMetrics("b", registry=registry, **settings)
    PrometheusMetrics("b", registry=registry, namespace="mine", **settings)


def test_names_that_something_else_has_are_refused(registry: CollectorRegistry) -> None:
    Gauge("coalestra_source_batch_size", "mine", registry=registry)
    for _ in range(2):
        with pytest.raises(ValueError, match="Duplicated timeseries"):
            PrometheusMetrics(registry=registry)


def test_a_registry_is_not_kept_alive(registry: CollectorRegistry) -> None:
    own = CollectorRegistry()
    sink = PrometheusMetrics(registry=own)
    sink.increment("snapshot_build_total", status="success")
    kept = weakref.ref(own)
    metrics(registry)
    del own, sink
    with module._turn():
        pass
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("settings,error", [
    ({"builder": ""}, ValueError), ({"builder": 3}, TypeError), ({"registry": None}, TypeError),
    ({"namespace": ""}, ValueError), ({"namespace": "a b"}, ValueError),
    ({"latency_buckets": ()}, ValueError), ({"latency_buckets": (2.0, 1.0)}, ValueError),
    ({"latency_buckets": (1.0, 1.0)}, ValueError), ({"latency_buckets": ("1",)}, TypeError),
    ({"latency_buckets": 5}, TypeError), ({"max_series": 0}, ValueError),
    ({"max_series": 1.5}, TypeError),
])  # fmt: skip
def test_settings_are_checked(
    registry: CollectorRegistry, settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=f"{next(iter(settings))} must"):
        PrometheusMetrics(**{"registry": registry, **settings})
    assert not list(registry.collect())


# Threads, interruptions, forks --------------------------------------------------------------------


@pytest.mark.concurrency
def test_no_report_of_many_threads_is_lost_while_others_scrape(registry: CollectorRegistry) -> None:
    sink = PrometheusMetrics(registry=registry)
    begin = threading.Barrier(5)

    def report(source: str) -> None:
        begin.wait()
        for _ in range(1000):
            sink.increment("source_fetch_total", source=source, status="success")
            sink.observe("source_batch_size", 3, source=source)

    def scrape() -> None:
        begin.wait()
        for _ in range(20):
            metrics(registry)

    with ThreadPoolExecutor(5) as pool:
        work = [pool.submit(report, each) for each in ("a", "a", "b", "b")]
        for each in [*work, pool.submit(scrape)]:
            each.result()
    for source in ("a", "b"):
        name = "coalestra_source_fetch_total"
        assert figure(registry, name, source=source, status="success") == 2_000
        assert figure(registry, "coalestra_source_batch_size_sum", source=source) == 6_000


def test_a_report_in_the_middle_of_another_waits_for_nobody(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a signal handler or a finalizer, while a lock of prometheus_client is held."""
    sink = PrometheusMetrics(registry=registry)
    sink.increment("snapshot_build_total", status="success")
    metrics(registry)
    plain, struck = Counter.inc, list[bool]()

    def inc(counter: Counter, amount: float = 1, exemplar: Any = None) -> None:
        if not struck:
            struck.append(True)
            with counter._value._lock:
                for _ in range(5000):
                    sink.increment("snapshot_build_total", status="success")
        plain(counter, amount, exemplar)

    monkeypatch.setattr(Counter, "inc", inc)
    for _ in range(1000):
        sink.increment("snapshot_build_total", status="success")
    assert struck
    assert figure(registry, "coalestra_snapshot_build_total", status="success") == 6001


@pytest.mark.parametrize("in_one_process", [True, False])
def test_a_handler_that_raises_anywhere_leaves_nobody_at_the_line(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, in_one_process: bool
) -> None:
    """Else reports would pile up from then on, and every scrape would wait and show old figures."""
    monkeypatch.setattr(module, "_LONGEST_LINE", 1000 if in_one_process else 1)
    sink = PrometheusMetrics(registry=registry)

    def report_and_scrape() -> None:
        assert module._AT_IT.value() is None
        sink.increment("snapshot_build_total", status="success")
        list(registry.collect())

    at_every_line(report_and_scrape, raise_struck, errors=(Struck,))
    report_and_scrape()


def told_of_an_error(sink: PrometheusMetrics, registry: CollectorRegistry) -> None:
    """Report an error, which is the only one that a scrape shows."""
    sink.increment("snapshot_build_total", status="error")
    assert figure(registry, "coalestra_snapshot_build_total", status="error") == 1


@needs_fork
def test_a_child_forked_in_the_midst_of_settling_reports_too(registry: CollectorRegistry) -> None:
    sink = PrometheusMetrics(registry=registry)
    over = threading.Event()

    def report() -> None:
        while not over.is_set():
            sink.increment("snapshot_build_total", status="success")

    with ThreadPoolExecutor(1) as pool:
        reporting = pool.submit(report)
        try:
            for _ in range(5):
                in_a_child(lambda: told_of_an_error(sink, registry))
        finally:
            over.set()
        reporting.result()


def test_a_scrape_lets_no_fork_come_while_it_holds_locks(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    plain = Counter.collect

    def collect(counter: Counter) -> Any:
        held.append(module._AT_IT.value() is not None)
        return plain(counter)

    monkeypatch.setattr(Counter, "collect", collect)
    PrometheusMetrics(registry=registry)
    metrics(registry)
    assert held
    assert all(held)
    assert module._AT_IT.value() is None


async def test_a_label_that_utf_8_cannot_hold_fails_no_scrape(registry: CollectorRegistry) -> None:
    sink = PrometheusMetrics("b\udc80", registry=registry)
    source = Single("\ud800", "x")
    async with builder(source, metrics=sink) as building:
        HealthCollector({"b\udc80": building}, registry=registry)
        await building.build([ResourceKey("n\udfff", "x")])
        text = generate_latest(registry).decode()
    assert 'source="\\\\ud800",status="success"' in text
    assert 'coalestra_builder_up{builder="b\\\\udc80"} 1.0' in text
    assert 'resource_namespace="n\\\\udfff"' in text


@needs_fork
def test_a_fork_waits_a_moment_for_who_settles_and_takes_nothing_from_him(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = PrometheusMetrics(registry=registry)
    metrics(registry)
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.01)
    gate = ThreadGate()
    plain = Counter.inc

    def inc(counter: Counter, amount: float = 1, exemplar: Any = None) -> None:
        gate.pass_()
        plain(counter, amount, exemplar)

    monkeypatch.setattr(Counter, "inc", inc)
    sink.increment("snapshot_build_total", status="success")
    with ThreadPoolExecutor(1) as pool:
        settling = pool.submit(metrics, registry)
        gate.wait_arrived()

        def child() -> None:
            monkeypatch.setattr(Counter, "inc", plain)
            told_of_an_error(sink, registry)

        in_a_child(child)
        gate.open()
        settling.result()
    assert figure(registry, "coalestra_snapshot_build_total", status="success") == 1


async def test_a_sink_that_cannot_take_a_report_fails_no_build(registry: CollectorRegistry) -> None:
    sink = PrometheusMetrics(registry=registry)
    del sink._families._families["source_fetch_latency_ms"]
    building = builder(Single("x"), metrics=sink)
    assert (await building.build([X])).value(X) == "SECRET"
    health = await building.health_snapshot()
    assert health.observability_failure_count == 1
