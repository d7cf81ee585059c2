"""The two buffered sinks: what is accepted, delivered and dropped, and how they close."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import queue
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest

from coalestra.observability import (
    BufferedEventSink,
    BufferedMetricsSink,
    BufferOverflowPolicy,
    MetricRecord,
)
from tests.observability.recording import Held, Raising, Recorder
from tests.support.elsewhere import (
    PATIENCE,
    in_a_child,
    in_thread,
    needs_fork,
    outcome,
    side_by_side,
)
from tests.support.running import no_more_threads
from tests.support.strikes import Struck, at_every_line, raise_struck


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.endswith("-buffer")}


def held_buffer(max_pending: int, overflow: BufferOverflowPolicy) -> tuple[Held, BufferedEventSink]:
    """A buffer whose worker is held with the event ``first`` in its hands."""
    held = Held()
    sink = BufferedEventSink(held, max_pending=max_pending, overflow=overflow)
    sink.emit("first")
    held.wait_arrived()
    return held, sink


# Delivery


def test_counts_and_observations_arrive_as_they_were_made() -> None:
    downstream = Recorder()
    with BufferedMetricsSink(downstream) as sink:
        sink.increment("calls", 3, source="a")
        sink.observe("latency", 1.5, source="a")
        sink.increment("calls")
        assert sink.flush(PATIENCE)
    assert downstream.metrics == [
        MetricRecord("increment", "calls", 3, {"source": "a"}),
        MetricRecord("observe", "latency", 1.5, {"source": "a"}),
        MetricRecord("increment", "calls", 1, {}),
    ]


def test_without_a_record_there_is_no_thread() -> None:
    before = workers()
    sink = BufferedEventSink(Recorder())
    assert workers() <= before
    assert sink.stats().worker_alive
    assert sink.close(timeout=0)


def test_a_payload_is_delivered_as_it_was_when_it_was_emitted() -> None:
    held, sink = held_buffer(10, BufferOverflowPolicy.DROP_OLDEST)
    payload = {"number": 1}
    sink.emit("counted", **payload)
    payload["number"] = 2
    held.let_through()
    assert sink.close(timeout=PATIENCE)
    assert held.events[1].payload == {"number": 1}


def test_a_sink_may_emit_into_the_buffer_that_feeds_it() -> None:
    class Echo(Recorder):
        def emit(self, event_type: str, **payload: Any) -> None:
            super().emit(event_type, **payload)
            if event_type == "call":
                sink.emit("echo")

    downstream = Echo()
    sink = BufferedEventSink(downstream)
    sink.emit("call")
    assert sink.flush(PATIENCE)
    assert sink.flush(PATIENCE)
    assert downstream.emitted == ["call", "echo"]
    assert sink.close(timeout=PATIENCE)


def test_records_from_many_threads_all_arrive_each_threads_in_order() -> None:
    downstream = Recorder()

    def emit(name: int) -> None:
        for number in range(200):
            sink.emit("counted", thread=name, number=number)

    with BufferedEventSink(downstream) as sink:
        side_by_side(6, emit)
        assert sink.flush(PATIENCE)
    for name in range(6):
        payloads = [event.payload for event in downstream.events]
        numbers = [payload["number"] for payload in payloads if payload["thread"] == name]
        assert numbers == list(range(200))


# Overflow


@pytest.mark.parametrize(
    "settings, delivered",
    [
        ({}, ["first", "third", "fourth"]),
        ({"overflow": BufferOverflowPolicy.DROP_NEWEST}, ["first", "second", "third"]),
        ({"overflow": BufferOverflowPolicy.RAISE}, ["first", "second", "third"]),
    ],
    ids=["the oldest unless told otherwise", "the newest", "the newest, and the caller is told"],
)
def test_of_what_lacks_room_one_is_dropped(settings: dict[str, Any], delivered: list[str]) -> None:
    held = Held()
    sink = BufferedEventSink(held, max_pending=2, **settings)
    sink.emit("first")
    held.wait_arrived()
    sink.emit("second")
    sink.emit("third")
    raises = settings.get("overflow") is BufferOverflowPolicy.RAISE
    with pytest.raises(queue.Full, match="2 records wait") if raises else nullcontext():
        sink.emit("fourth")
    held.let_through()
    assert sink.close(timeout=PATIENCE)
    assert held.emitted == delivered
    assert sink.stats().dropped == 1


def test_metrics_overflow_by_the_same_rules() -> None:
    held = Held()
    sink = BufferedMetricsSink(held, max_pending=1, overflow=BufferOverflowPolicy.RAISE)
    sink.increment("first")
    held.wait_arrived()
    sink.increment("second")
    with pytest.raises(queue.Full):
        sink.observe("third", 1.0)
    held.let_through()
    assert sink.close(timeout=PATIENCE)


def test_a_flooded_buffer_never_has_more_pending_than_it_may() -> None:
    held, sink = held_buffer(3, BufferOverflowPolicy.DROP_OLDEST)
    for _ in range(50):
        sink.emit("again")
        assert sink.stats().pending <= 3
    stats = sink.stats()
    assert (stats.pending, stats.peak_pending, stats.max_pending) == (3, 3, 3)
    held.let_through()
    assert sink.close(timeout=PATIENCE)


@pytest.mark.parametrize("overflow", list(BufferOverflowPolicy))
def test_every_record_ends_as_delivered_failed_or_dropped(overflow: BufferOverflowPolicy) -> None:
    held, sink = held_buffer(2, overflow)
    for _ in range(5):
        with contextlib.suppress(queue.Full):
            sink.emit("again")
    held.let_through()
    assert sink.close(timeout=PATIENCE)
    sink.emit("too late")
    stats = sink.stats()
    assert stats.delivered + stats.failures + stats.dropped == 1 + 5 + 1
    assert stats.pending == 0
    assert len(held.events) == stats.delivered == 3


# Waiting for delivery


def test_flush_waits_for_the_record_in_delivery_though_later_ones_were_dropped() -> None:
    held, sink = held_buffer(1, BufferOverflowPolicy.DROP_OLDEST)
    for _ in range(5):
        sink.emit("again")
    assert not sink.flush(timeout=0)
    held.let_through()
    assert sink.flush(PATIENCE)
    assert held.emitted == ["first", "again"]
    assert sink.close(timeout=PATIENCE)


def test_flush_and_close_in_the_worker_itself_do_not_wait_for_themselves() -> None:
    answers: list[bool] = []

    class Impatient(Recorder):
        def emit(self, event_type: str, **payload: Any) -> None:
            answers.extend([sink.flush(), sink.close(timeout=None)])

    sink = BufferedEventSink(Impatient())
    sink.emit("first")
    assert sink.close(timeout=PATIENCE)
    assert answers == [False, False]


@pytest.mark.parametrize("overflow", list(BufferOverflowPolicy))
def test_what_comes_after_closing_is_dropped_and_no_error(overflow: BufferOverflowPolicy) -> None:
    downstream = Recorder()
    sink = BufferedEventSink(downstream, overflow=overflow)
    sink.close()
    sink.emit("too late")
    stats = sink.stats()
    assert downstream.events == []
    assert (stats.dropped, stats.enqueued, stats.pending) == (1, 0, 0)


# Closing


def test_a_forgotten_buffer_delivers_what_it_has_and_its_thread_ends() -> None:
    before = workers()
    held, sink = held_buffer(10, BufferOverflowPolicy.DROP_OLDEST)
    sink.emit("second")
    (worker,) = workers() - before
    gone = weakref.ref(sink)
    del sink
    gc.collect()
    held.let_through()
    worker.join(PATIENCE)
    assert gone() is None
    assert not worker.is_alive()
    assert held.emitted == ["first", "second"]


@pytest.mark.parametrize("records", [0, 1])
def test_a_closed_buffer_can_be_forgotten_though_its_sink_leads_to_it(records: int) -> None:
    """As an application does that is the sink of a builder of its own."""

    class Application(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.buffer = BufferedEventSink(self)

    application = Application()
    for _ in range(records):
        application.buffer.emit("event")
    assert application.buffer.close(timeout=PATIENCE)
    kept = weakref.ref(application)
    del application
    gc.collect()
    assert kept() is None


def test_a_record_waits_until_a_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    downstream = Recorder()
    sink = BufferedEventSink(downstream)
    with monkeypatch.context() as patch:
        no_more_threads(patch)
        sink.emit("first")
        assert sink.stats().pending == 1
    sink.emit("second")
    assert sink.close(timeout=PATIENCE)
    assert downstream.emitted == ["first", "second"]


@pytest.mark.parametrize("end", ["flush", "close"])
def test_who_waits_delivers_without_threads(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_more_threads(monkeypatch)
    downstream = Recorder()
    sink = BufferedEventSink(downstream)
    for number in range(80):
        sink.emit(str(number))
    assert sink.flush(PATIENCE) if end == "flush" else sink.close(timeout=PATIENCE)
    assert downstream.emitted == [str(number) for number in range(80)]
    assert sink.stats().pending == 0


def test_who_delivers_himself_keeps_to_his_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    no_more_threads(monkeypatch)
    sink = BufferedEventSink(Recorder())
    sink.emit("first")
    assert not sink.flush(timeout=0)
    assert not sink.close(timeout=0)
    assert sink.stats().pending == 1
    assert sink.close(timeout=PATIENCE)
    assert sink.stats().delivered == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_of_who_delivers_himself_reaches_him(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_more_threads(monkeypatch)
    sink = BufferedEventSink(Raising(error()))
    sink.emit("first")
    with pytest.raises(error):
        sink.close()
    assert sink.close()
    assert (sink.stats().failures, sink.stats().pending) == (1, 0)


def test_a_handler_that_strikes_at_any_line_of_emit_may_emit_and_flush() -> None:
    downstream = Recorder()
    with BufferedEventSink(downstream) as sink:
        sink.emit("first")

        def strike() -> None:
            sink.emit("of the handler")
            assert sink.flush(PATIENCE)

        lines = at_every_line(lambda: sink.emit("again"), strike)
        assert sink.flush(PATIENCE)
        stats = sink.stats()
    assert lines > 5
    assert (stats.delivered, stats.pending, stats.dropped) == (3 + 2 * lines, 0, 0)
    assert downstream.emitted.count("again") == 2 + lines


def test_an_exception_at_any_line_of_emit_leaves_the_counts_whole() -> None:
    held, sink = held_buffer(3, BufferOverflowPolicy.DROP_OLDEST)

    with contextlib.suppress(Struck):
        at_every_line(lambda: sink.emit("again"), raise_struck, errors=(Struck,))
    held.let_through()
    assert sink.close(timeout=PATIENCE)
    stats = sink.stats()
    assert stats.enqueued == stats.delivered + stats.failures + stats.dropped
    assert stats.pending == 0


def test_another_thread_may_report_while_a_handler_holds_one_up() -> None:
    """No lock is held where a handler may strike: it may wait for who reports elsewhere."""
    with BufferedEventSink(Recorder()) as sink:
        sink.emit("first")
        at_every_line(
            lambda: sink.emit("again"), lambda: outcome(in_thread(lambda: sink.emit("elsewhere")))
        )


@needs_fork
def test_a_forked_child_delivers_its_own_records_and_not_the_parents() -> None:
    held, sink = held_buffer(10, BufferOverflowPolicy.DROP_OLDEST)
    sink.emit("second")

    def in_the_child() -> None:
        held.let_through()
        sink.emit("of the child")
        assert sink.flush(PATIENCE)
        assert held.emitted == ["of the child"]

    in_a_child(in_the_child)
    held.let_through()
    assert sink.close(timeout=PATIENCE)
    assert held.emitted == ["first", "second"]


# Looking in, and settings


def test_a_buffer_tells_its_state() -> None:
    sink = BufferedEventSink(Recorder(), max_pending=5)
    sink.emit("first")
    sink.close()
    assert repr(sink) == (
        "<BufferedEventSink to Recorder closed pending=0/5 delivered=1 dropped=0 failures=0>"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(sink.stats(), "pending", 5)  # noqa: B010


@pytest.mark.parametrize("kind", [BufferedEventSink, BufferedMetricsSink])
def test_a_buffer_shows_the_sink_behind_it_and_says_that_it_never_blocks(kind: Any) -> None:
    downstream = Recorder()
    assert kind(downstream).downstream is downstream
    assert kind.coalestra_non_blocking is True


class Wrong:
    """No sink at all."""


@pytest.mark.parametrize("kind", [BufferedEventSink, BufferedMetricsSink])
@pytest.mark.parametrize("settings, error, parameter", [
    ({"max_pending": 0}, ValueError, "max_pending"),
    ({"max_pending": True}, TypeError, "max_pending"),
    ({"max_pending": 2.0}, TypeError, "max_pending"),
    ({"overflow": "raise"}, TypeError, "overflow"),
    ({"downstream": Wrong()}, TypeError, "downstream"),
])  # fmt: skip
def test_wrong_settings_are_refused_by_name(
    kind: Any, settings: dict[str, Any], error: type[Exception], parameter: str
) -> None:
    with pytest.raises(error, match=parameter):
        kind(**{"downstream": Recorder(), **settings})


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf")])
def test_a_timeout_must_be_a_finite_number_of_seconds(timeout: float) -> None:
    sink = BufferedEventSink(Recorder())
    with pytest.raises(ValueError, match="timeout"):
        sink.flush(timeout)
    with pytest.raises(ValueError, match="timeout"):
        sink.close(timeout=timeout)
    assert not sink.stats().closed


@pytest.mark.parametrize("huge", [1e10, 1e300, 10**30])
def test_a_timeout_beyond_what_threads_can_wait_is_one_without_end(huge: float) -> None:
    """They raise OverflowError; also while a record is in delivery, so that there is a wait."""
    held, sink = held_buffer(8, BufferOverflowPolicy.DROP_OLDEST)
    opening = in_thread(held.let_through)
    assert sink.flush(huge)
    assert sink.close(timeout=huge)
    outcome(opening)
