"""The dashboard and the alerts of the documentation, held against what a scrape brings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from coalestra import SyncSnapshotBuilder
from coalestra._telemetry import COUNTERS, OBSERVATIONS
from coalestra.prometheus import HealthCollector, PrometheusMetrics
from tests.docs.pages import ROOT
from tests.orchestration.scripted import Batch, Single, builder, key
from tests.prometheus.scrape import metrics

promql = pytest.importorskip("promql_parser")

ASSETS = ROOT / "docs" / "assets"
DASHBOARD: dict[str, Any] = json.loads((ASSETS / "grafana-dashboard.json").read_text("utf-8"))
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
QUERIES = [
    *(target["expr"] for panel in PANELS.values() for target in panel["targets"]),
    *(
        re.sub(r"label_values\((.+), \w+\)", r"\1", variable["query"]["query"])
        for variable in DASHBOARD["templating"]["list"]
        if variable["type"] == "query"
    ),
]
ALERTS = (ASSETS / "prometheus-alerts.yml").read_text("utf-8")
CONDITIONS = re.findall(r"^ +expr: (.+)$", ALERTS, re.MULTILINE)
OF_SCRAPES = {"job", "instance", "le"}


def vectors(expression: Any) -> Iterator[Any]:
    """Every selector in a parsed expression."""
    if isinstance(expression, promql.VectorSelector):
        yield expression
    for part in ("expr", "lhs", "rhs", "vector_selector", "param"):
        if (inner := getattr(expression, part, None)) is not None:
            yield from vectors(inner)
    for each in getattr(expression, "args", None) or ():
        yield from vectors(each)


def groupings(expression: Any) -> Iterator[str]:
    """Every label that something is grouped by."""
    if isinstance(expression, promql.AggregateExpr) and expression.modifier is not None:
        yield from expression.modifier.labels
    for part in ("expr", "lhs", "rhs"):
        if (inner := getattr(expression, part, None)) is not None:
            yield from groupings(inner)
    for each in getattr(expression, "args", None) or ():
        yield from groupings(each)


def parsed(query: str) -> Any:
    """What Grafana would send, as Prometheus reads it."""
    return promql.parse(query.replace("$__rate_interval", "5m").replace("$", ""))


@pytest.fixture(scope="module")
def shown() -> dict[str, set[str]]:
    """The names of all samples with their labels, of what has seen a bit of everything."""
    registry = CollectorRegistry()
    sink = PrometheusMetrics(registry=registry)
    for metric, (*_, labels) in COUNTERS.items():
        sink.increment(metric, **dict.fromkeys(labels, "a"))  # type: ignore[arg-type]  # labels
    for metric, (*_, labels) in OBSERVATIONS.items():
        sink.observe(metric, 1.0, **dict.fromkeys(labels, "a"))

    class Slow:
        def emit(self, event_type: str, **payload: Any) -> None:
            """Need a buffer."""

    async def down(*_: Any) -> Any:
        raise ConnectionError

    built = builder(Batch("x"), Single("y", fetch=down), events=Slow())
    with SyncSnapshotBuilder(built) as sync:
        sync.build([key("x"), key("y")], strict=False)
        HealthCollector({"default": sync}, registry=registry)
        return {
            sample.name: set(sample.labels)
            for metric in metrics(registry).values()
            for sample in metric.samples
        }


@pytest.mark.parametrize("query", [*QUERIES, *CONDITIONS])
def test_a_query_parses_and_asks_for_what_there_is(query: str, shown: dict[str, set[str]]) -> None:
    expression = parsed(query)
    asked = list(vectors(expression))
    assert len(asked) == query.count("coalestra_")
    for vector in asked:
        assert vector.name in shown
        names = {matcher.name for matcher in vector.matchers.matchers}
        assert names <= shown[vector.name] | OF_SCRAPES
        for group in groupings(expression):
            assert any(group in shown[each.name] | OF_SCRAPES for each in asked), group


def test_a_query_asks_for_values_that_labels_have() -> None:
    known: dict[str, set[str]] = {}
    for table in (COUNTERS, OBSERVATIONS):
        for metric, (*_, labels) in table.items():
            for label, every in labels.items():
                if every:
                    known.setdefault(f"{metric}/{label}", set()).update(every.split())
    checked = 0
    for query in [*QUERIES, *CONDITIONS]:
        for vector in vectors(parsed(query)):
            for matcher in vector.matchers.matchers:
                has = known.get(f"{vector.name.removeprefix('coalestra_')}/{matcher.name}")
                if has is not None:
                    checked += 1
                    assert set(matcher.value.split("|")) <= has, query
    assert checked > 5


def test_every_metric_that_is_shown_is_in_the_dashboard(shown: dict[str, set[str]]) -> None:
    asked = {vector.name for query in QUERIES for vector in vectors(parsed(query))}
    stems = {re.sub("_(bucket|sum|count|created)$", "", name) for name in shown} - {
        re.sub("_total$", "", name) for name in shown if name.endswith("_total")
    }
    left = {
        stem
        for stem in stems
        if not any(name == stem or name.startswith(f"{stem}_") for name in asked)
    }
    assert left == {
        "coalestra_dispatch_workers", "coalestra_cache_lookups_total",
        "coalestra_observability_max_pending", "coalestra_observability_pending",
        "coalestra_payload_copy_deadline_total", "coalestra_payload_copy_failures_total",
        "coalestra_queue_timeouts_total", "coalestra_snapshot_acceptance_total",
        "coalestra_source_attempts_total", "coalestra_source_failed_attempts_total",
        "coalestra_source_last_error_timestamp_seconds",
    }  # fmt: skip


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    read = json.loads(json.dumps(Dashboard.from_json(DASHBOARD), cls=JSONEncoder))
    assert lost(DASHBOARD, read) == []


def lost(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """What the schema has no place for, or not with this type."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            each
            for name, value in ours.items()
            for each in lost(value, theirs.get(name, "missing"), f"{where}.{name}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            each
            for index, (mine, other) in enumerate(zip(ours, theirs, strict=True))
            for each in lost(mine, other, f"{where}[{index}]")
        ]
    return [] if ours == theirs else [f"{where}: {ours!r} {theirs!r}"]


def test_what_the_schema_has_no_place_for_is_noticed() -> None:
    assert lost({"a": [{"b": 1}]}, {"a": [{"b": 1, "c": 2}], "d": 3}) == []
    assert lost({"a": [{"b": 1}]}, {"a": [{"c": 2}]}) == [".a[0].b: 1 'missing'"]


def test_panels_have_a_title_words_a_unit_and_a_place_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    for what in ("id", "title"):
        assert len({panel[what] for panel in panels}) == len(panels)
    for panel in PANELS.values():
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [each["refId"] for each in panel["targets"]] == ["A", "B", "C", "D"][
            : len(panel["targets"])
        ]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert 'job=~"$job", builder=~"$builder"' in target["expr"]
            assert target["datasource"]["uid"] == "${datasource}"
    taken = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) == 23


def test_every_alert_says_how_bad_it_is_and_what_it_means() -> None:
    names = re.findall(r"- alert: (\w+)\n", ALERTS)
    assert len(set(names)) == len(names) == len(CONDITIONS)
    for text in ALERTS.split("- alert: ")[1:]:
        assert re.search(r"severity: (warning|critical)\n", text)
        assert re.search(r'summary: ".*\{\{ \$labels\.builder \}\}.*"\n', text)
        assert "description: " in text
