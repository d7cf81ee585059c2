"""The reporter as such: which sides it serves, and what happens when a sink fails."""

from __future__ import annotations

import asyncio
import copy
import enum
import json
from typing import Any

import pytest

from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import SnapshotDiagnostics
from coalestra.observability import NullEventSink, NullMetrics, Reporter, reporter_for
from tests.observability.recording import Raising, Recorder

PRICE = ResourceKey("market", "price", "BTC")


class Unrenderable:
    """A key that must not be rendered."""

    namespace = "market"
    name = "price"

    @property
    def display(self) -> str:
        raise AssertionError("rendered although nobody listens to events")


class Unlabelled:
    """A key that must not be turned into labels."""

    @property
    def namespace(self) -> str:
        raise AssertionError("labelled although nobody listens to metrics")

    display = "the key"


def reporter(metrics: Any, events: Any) -> Reporter:
    report = reporter_for(metrics, events)
    assert report is not None
    return report


def test_a_subclass_of_a_null_sink_may_listen() -> None:
    class Listening(NullEventSink):
        pass

    assert reporter_for(NullMetrics(), Listening()) is not None


def test_without_events_no_key_is_rendered() -> None:
    sink = Recorder()
    report = reporter(sink, NullEventSink())
    key: Any = Unrenderable()
    report.tell("cache_hit", resource=key, freshness="fresh", snapshot_id="s1")
    report.source_failed(key, "exchange", ValueError(), "s1")
    assert report.failures == 0
    assert [record.metric for record in sink.metrics] == [
        "cache_access_total",
        "source_fetch_total",
    ]


def test_fresh_values_of_one_kind_that_are_read_together_are_one_count() -> None:
    sink = Recorder()
    keys = [ResourceKey("shop", name, str(n)) for n in range(3) for name in ("price", "stock")]
    reporter(sink, sink).warm_hits([*keys, ResourceKey("bank", "price")], "s1")
    counted = [(each.metric, each.value, each.labels) for each in sink.metrics]
    assert counted == [
        (
            "cache_access_total",
            number,
            {"status": "fresh", "resource_namespace": namespace, "resource_name": name},
        )
        for namespace, name, number in (
            ("shop", "price", 3),
            ("shop", "stock", 3),
            ("bank", "price", 1),
        )
    ]
    assert sink.emitted == ["cache_hit"] * 7


def test_without_metrics_no_labels_are_built() -> None:
    sink = Recorder()
    report = reporter(NullMetrics(), sink)
    key: Any = Unlabelled()
    report.tell("cache_hit", resource=key, freshness="fresh", snapshot_id="s1")
    assert sink.events[0].payload == {
        "resource": "the key",
        "freshness": "fresh",
        "snapshot_id": "s1",
    }


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_program_comes_after_the_step_of_its_report(kind: type[BaseException]) -> None:
    steps: list[str] = []

    async def program() -> None:
        report = reporter(Raising(kind()), NullEventSink())
        report.count("cache_access_total", PRICE, status="miss")
        steps.append("the step goes on")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        steps.append("never reached")

    with pytest.raises(kind):
        asyncio.run(program())
    assert steps == ["the step goes on"]


def test_texts_in_labels_and_events_are_single_lines_of_bounded_length() -> None:
    sink = Recorder()
    report = reporter(sink, sink)
    key = ResourceKey("mar\nket", "x" * 1_000_000, "y" * 10_000_000)
    report.source_failed(key, "ex\nchange", ValueError("a\nb"), "s1")
    report.count("cache_access_total", key, status="miss")
    report.tell("resource_invalidated", resource=key, reason="re\nason" * 1_000_000)
    texts = [text for record in sink.metrics for text in record.labels.values()]
    texts += [text for event in sink.events for text in event.payload.values()]
    assert len(texts) > 10
    assert all(text.isprintable() and len(text) <= 300 for text in texts)


class Why(str, enum.Enum):
    RECALLED = "re\ncalled"


def test_a_text_of_a_class_of_the_applications_is_told_as_plain_text() -> None:
    sink = Recorder()
    reporter(sink, sink).tell(
        "resource_invalidated", resource=ResourceKey("a", "b"), reason=Why.RECALLED
    )
    (event,) = sink.events
    assert type(event.payload["reason"]) is str
    assert event.payload["reason"] == "re\\ncalled"


def test_the_diagnostics_of_an_event_are_json_and_read_like_the_snapshots() -> None:
    sink = Recorder()
    diagnostics = SnapshotDiagnostics(resolved_resources=2, source_calls_by_source={"a": 1})
    reporter(NullMetrics(), sink).snapshot_built("id", diagnostics, build_failed=False, strict=True)
    payload = sink.events[0].payload
    told = payload["diagnostics"]
    assert json.loads(json.dumps(payload))["diagnostics"]["source_calls_by_source"] == {"a": 1}
    assert told.resolved_resources == 2
    assert told == diagnostics
    assert told != SnapshotDiagnostics()
    assert copy.deepcopy(told) == told
    with pytest.raises(AttributeError, match="no field 'other'"):
        _ = told.other


def test_a_reporter_tells_which_sides_it_serves() -> None:
    report = reporter(NullMetrics(), Recorder())
    assert repr(report) == "<Reporter metrics=off events=Recorder failures=0>"
