"""The reference names every span, attribute and metric that there is, and invents none."""

from __future__ import annotations

import re

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import Gauge

from coalestra import SyncSnapshotBuilder
from coalestra._telemetry import COUNTERS, OBSERVATIONS, Metrics
from coalestra.opentelemetry import OpenTelemetryMetrics, OpenTelemetryTracer
from tests.docs.pages import ROOT
from tests.opentelemetry.memory import Meters, Spans, attributes
from tests.orchestration.scripted import Single, builder, key

REFERENCE = ROOT / "docs" / "reference" / "opentelemetry.md"


def rows(title: str) -> list[list[str]]:
    """The cells of the rows of all tables below a title, without their heads."""
    section = REFERENCE.read_text("utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [[cell.strip() for cell in row.split(" | ")] for row in found]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`(coalestra\.[\w.]+)`", cell))


@pytest.mark.parametrize(
    "title, known", [("Counters", COUNTERS), ("Histograms", OBSERVATIONS)], ids=["sums", "rest"]
)
def test_the_table_of_metrics_says_name_unit_and_attributes_of_each(
    meters: Meters, title: str, known: Metrics
) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    told = {}
    for origin, (*_, labels) in known.items():
        report = sink.increment if title == "Counters" else sink.observe
        report(origin, 1, **dict.fromkeys(labels, "x"))
        ((name, metric),) = (
            (name, metric) for name, metric in meters.metrics().items() if name not in told
        )
        (point,) = metric.data.data_points
        told[name] = [f"`{origin}`", metric.unit, {*attributes(point)} - {"coalestra.builder.name"}]
    assert told == {
        name.strip("`"): [origin, unit.strip("`"), names(labels)]
        for origin, name, unit, labels in rows(title)
    }


def test_the_table_of_levels_says_name_unit_and_attributes_of_each(meters: Meters) -> None:
    sink = OpenTelemetryMetrics(meters.provider)
    with SyncSnapshotBuilder(builder(Single("a"))) as facade:
        sink.watch(facade)
        facade.build([key("a")])
        read = meters.metrics()
    told = {
        name: (metric.unit, {*attributes(metric.data.data_points[0])})
        for name, metric in read.items()
    }
    gauges = {name for name, metric in read.items() if isinstance(metric.data, Gauge)}
    assert gauges == {"coalestra.source.success.age", "coalestra.builder.severity"}
    assert told == {
        name.strip("`"): (unit.strip("`"), names(labels) | {"coalestra.builder.name"})
        for name, unit, labels, _ in (
            row if len(row) == 4 else [*row, ""] for row in rows("Levels")
        )
    }


def test_every_attribute_of_a_span_is_explained_once(spans: Spans) -> None:
    cells = rows("Spans")
    explained = [row[0].strip("`") for row in cells if len(row) == 2]
    used = {name for row in cells if len(row) == 3 for name in names(row[2])}
    assert len(set(explained)) == len(explained)
    assert set(explained) == used | {"error.type"}
    tracer = OpenTelemetryTracer(spans.provider)
    facts = {"snapshot_id": "s", "keys": 1, "reason": "stale", "parent_snapshot_id": "p"}
    of_call = {"source": "a", "source_kind": "single", "attempt": 1, "waited_seconds": 0.0}
    of_join = {"snapshot_id": "s", "resource_namespace": "n", "resource_name": "n"}
    build, call = tracer.begin("build", facts), tracer.begin("call", of_call)
    tracer.joined(build, call, 1.0, of_join)
    tracer.end(build, {"resolved": 1, "failed": 0})
    tracer.end(call, {"outcome": "failure"}, ValueError())
    assert {name for span in spans.ended for name in attributes(span)} == set(explained)
    assert {span.kind for span in spans.ended} == {trace.SpanKind.INTERNAL}
