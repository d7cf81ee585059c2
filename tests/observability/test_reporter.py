"""The reporter as such: which sides it serves, and what happens when a sink fails."""

from __future__ import annotations

import asyncio
import copy
import enum
import json
from typing import Any

import pytest

from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import Snapshot, SnapshotDiagnostics
from coalestra.observability import NullEventSink, NullMetrics, Reporter, reporter_for
from tests.observability.recording import Raising, Recorder

PRICE = ResourceKey("market", "price", "BTC")


def reporter(metrics: Any, events: Any) -> Reporter:
    report = reporter_for(metrics, events)
    assert report is not None
    return report


def test_a_subclass_of_a_null_sink_may_listen() -> None:
    class Listening(NullEventSink):
        pass

    assert reporter_for(NullMetrics(), Listening()) is not None


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
    snapshot = Snapshot("id", 0.0, {}, diagnostics=diagnostics)
    reporter(NullMetrics(), sink).snapshot_built(snapshot, build_failed=False, strict=True)
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
