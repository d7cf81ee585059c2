"""The event sinks that come with the library."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from coalestra.observability import FAILURES, LoggingEventSink, NullEventSink
from tests.observability.recording import EVENTS


@pytest.mark.parametrize("given", [None, logging.getLogger("tests.of.events")])
def test_an_event_is_logged_at_info_to_the_logger_of_the_library_or_the_one_given(
    caplog: pytest.LogCaptureFixture, given: logging.Logger | None
) -> None:
    sink = LoggingEventSink(given)
    with caplog.at_level(logging.INFO, logger=sink.logger.name):
        sink.emit("cache_hit", resource="a:b", freshness="fresh")
    (record,) = caplog.records
    assert given in (None, sink.logger)
    assert (record.name, record.levelno) == (given.name if given else "coalestra", logging.INFO)
    assert record.getMessage() == "cache_hit {'resource': 'a:b', 'freshness': 'fresh'}"
    assert vars(record)["event_type"] == "cache_hit"
    assert vars(record)["event_payload"] == {"resource": "a:b", "freshness": "fresh"}


def test_a_payload_may_use_names_of_log_record_attributes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="coalestra"):
        LoggingEventSink().emit("custom", name="x", message="y", args="z")
    assert len(caplog.records) == 1


def test_what_is_no_logger_is_refused_by_name() -> None:
    wrong: Any = "coalestra"
    with pytest.raises(TypeError, match="logger"):
        LoggingEventSink(wrong)


def test_logging_may_block_and_null_may_not() -> None:
    assert not hasattr(LoggingEventSink, "coalestra_non_blocking")
    assert NullEventSink.coalestra_non_blocking is True


def test_a_null_sink_takes_everything_and_keeps_nothing() -> None:
    sink = NullEventSink()
    sink.emit("cache_hit", resource="a:b")
    assert repr(sink) == "NullEventSink()"


def test_a_logging_sink_tells_its_logger() -> None:
    assert "coalestra" in repr(LoggingEventSink())


@pytest.mark.parametrize("event_type, payload, level", [
    ("source_failed", {"error": "down"}, logging.WARNING),
    ("stale_fallback_used", {}, logging.WARNING),
    ("snapshot_built", {"failed": 1, "build_failed": False}, logging.WARNING),
    ("snapshot_built", {"failed": 0, "build_failed": True}, logging.WARNING),
    ("snapshot_built", {"failed": 0, "build_failed": False}, logging.INFO),
    ("cache_hit", {}, logging.INFO),
])  # fmt: skip
def test_failures_are_logged_as_warnings(
    event_type: str, payload: dict[str, Any], level: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "coalestra"):
        LoggingEventSink().emit(event_type, **payload)
    assert [record.levelno for record in caplog.records] == [level]


def test_every_event_about_a_failure_is_logged_as_one() -> None:
    assert {name for name in EVENTS if "fail" in name or "reject" in name} <= FAILURES
    assert set(EVENTS) >= FAILURES


def test_levels_can_be_set_by_type_of_event(caplog: pytest.LogCaptureFixture) -> None:
    sink = LoggingEventSink(
        levels={"cache_hit": "debug", "source_failed": logging.ERROR, "snapshot_built": None}
    )
    with caplog.at_level(logging.DEBUG, logger="coalestra"):
        for event_type in ("cache_hit", "source_failed", "snapshot_built", "resource_resolved"):
            sink.emit(event_type)
    assert [(r.levelname, getattr(r, "event_type", "")) for r in caplog.records] == [
        ("DEBUG", "cache_hit"),
        ("ERROR", "source_failed"),
        ("INFO", "resource_resolved"),
    ]


@pytest.mark.parametrize("levels, error", [
    ([("cache_hit", 10)], TypeError), ({"cache_hit": 1.5}, TypeError),
    ({"cache_hit": True}, TypeError), ({"cache_hit": "loud"}, ValueError),
    ({"cache_hit": -1}, ValueError), ({"": 10}, ValueError),
])  # fmt: skip
def test_a_level_that_logging_does_not_know_is_refused(levels: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="^levels"):
        LoggingEventSink(levels=levels)
