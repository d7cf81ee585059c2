"""What the tracer makes of what it is told, step by step, on the real SDK."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from coalestra.opentelemetry import OpenTelemetryMetrics, OpenTelemetryTracer
from tests.opentelemetry.memory import Meters, Spans, attributes

CALL = {"source": "rates", "source_kind": "batch", "snapshot_id": "s1", "keys": 3, "attempt": 2}
BUILD = {"snapshot_id": "s1", "keys": 3}
DONE = {"resolved": 3, "failed": 0}
OTHERS = {"snapshot_id": "s0", "resource_namespace": "shop", "resource_name": "price"}


@pytest.fixture
def tracer(spans: Spans) -> OpenTelemetryTracer:
    return OpenTelemetryTracer(spans.provider)


def raised(error: BaseException, below: Callable[[], object] = lambda: None) -> BaseException:
    """The error, as it is after it was raised here."""
    try:
        below()
        raise error
    except BaseException as caught:
        return caught


@pytest.mark.parametrize("kind, attributes, name", [
    ("build", BUILD, "build snapshot"), ("resolve", BUILD, "resolve snapshot"),
    ("revalidate", BUILD, "revalidate snapshot"), ("refresh", BUILD, "refresh resources"),
    ("call", CALL, "fetch_many rates"), ("call", {**CALL, "source_kind": "single"}, "fetch rates"),
    ("call", {**CALL, "source_kind": "derived"}, "derive rates"),
])  # fmt: skip
def test_a_span_is_named_after_what_is_done_and_to_what_kind_of_thing(
    spans: Spans, tracer: OpenTelemetryTracer, kind: str, attributes: dict[str, object], name: str
) -> None:
    tracer.end(tracer.begin(kind, attributes), {})
    assert [span.name for span in spans.ended] == [name]


def test_every_text_is_one_plain_line(spans: Spans, tracer: OpenTelemetryTracer) -> None:
    class Id(str):
        pass

    tracer.end(tracer.begin("build", {**BUILD, "snapshot_id": Id("s\n1")}), {})
    span_id = attributes(spans.one("build snapshot"))["coalestra.snapshot.id"]
    assert (type(span_id), span_id) == (str, "s\\n1")


def test_what_callers_carry_is_there_for_calls(spans: Spans, tracer: OpenTelemetryTracer) -> None:
    def begin() -> None:
        context.attach(baggage.set_baggage("tenant", "blue"))
        build = tracer.begin("build", BUILD)
        call = tracer.begin("call", CALL, parent=build)
        tracer.enter(call)
        assert baggage.get_baggage("tenant") == "blue"

    contextvars.copy_context().run(begin)


def test_leaving_a_span_brings_the_callers_back_and_elsewhere_does_nothing(
    spans: Spans, tracer: OpenTelemetryTracer, caplog: pytest.LogCaptureFixture
) -> None:
    build = tracer.begin("build", BUILD)
    with spans.provider.get_tracer("test").start_as_current_span("request") as request:
        leave = tracer.enter(build)
        assert leave is not None
        contextvars.Context().run(leave)
        assert trace.get_current_span() is build.span
        leave()
        assert trace.get_current_span() is request
    assert caplog.records == []


# Readers that joined ------------------------------------------------------------------------------


def test_keys_that_join_a_call_are_a_linked_span(spans: Spans, tracer: OpenTelemetryTracer) -> None:
    build, call = tracer.begin("build", BUILD), tracer.begin("call", CALL)
    for seconds in (2.0, 3.0, 2.5):
        tracer.joined(build, call, seconds, OTHERS)
    tracer.joined(build, tracer.begin("call", CALL), 1.0, OTHERS)
    tracer.joined(build, None, 0.5, OTHERS)
    tracer.end(build, DONE)
    tracer.end(call, {})
    first, second, third = spans.named("join flight")
    assert [link.context for link in first.links] == [spans.one("fetch_many rates").context]
    assert attributes(first)["coalestra.keys.requested"] == 3
    assert attributes(first)["coalestra.flight.snapshot_id"] == "s0"
    assert attributes(first)["coalestra.resource.name"] == "price"
    assert attributes(first)["coalestra.flight.wait_time"] == pytest.approx(3.0, abs=0.5)
    assert first.start_time is not None
    assert first.end_time is not None
    assert (first.end_time - first.start_time) / 1e9 == pytest.approx(3.0, abs=0.5)
    assert len(second.links) == 1
    assert third.links == ()
    assert spans.tree() == ["build snapshot", *["  join flight"] * 3, "fetch_many rates"]


def test_the_spans_of_joined_calls_are_bounded(spans: Spans, tracer: OpenTelemetryTracer) -> None:
    build = tracer.begin("build", BUILD)
    for _ in range(1_000):
        tracer.joined(build, tracer.begin("call", CALL), 1.0, OTHERS)
    tracer.end(build, DONE)
    joins = spans.named("join flight")
    assert len(joins) == 129
    assert sum(attributes(span)["coalestra.keys.requested"] for span in joins) == 1_000
    assert sum(span.links == () for span in joins) == 1


# What went wrong ----------------------------------------------------------------------------------


def test_a_failure_never_raised_has_no_place(spans: Spans, tracer: OpenTelemetryTracer) -> None:
    tracer.end(tracer.begin("call", CALL), {"outcome": "timeout"}, TimeoutError())
    (event,) = spans.one("fetch_many rates").events
    assert attributes(event) == {"exception.type": "TimeoutError"}


def test_the_text_of_a_failure_is_told_if_it_is_asked_for(spans: Spans) -> None:
    tracer = OpenTelemetryTracer(spans.provider, include_messages=True)
    tracer.end(tracer.begin("call", CALL), {}, raised(ConnectionError("no route\nto SECRET")))
    span = spans.one("fetch_many rates")
    assert span.status.description == "ConnectionError: no route to SECRET"
    assert attributes(span.events[0])["exception.message"] == "no route\nto SECRET"
    assert repr(tracer) == "OpenTelemetryTracer(include_messages=True)"


def test_no_text_is_none_or_longer_than_exporters_take(spans: Spans, meters: Meters) -> None:
    tracer = OpenTelemetryTracer(spans.provider, include_messages=True)
    call = tracer.begin("call", {**CALL, "source": "rates\udc80", "snapshot_id": "i" * 9_000})
    tracer.end(call, {}, raised(ConnectionError("\ud800" + "x" * 90_000)))
    OpenTelemetryMetrics(meters.provider, builder="b\udc80").increment(
        "source_fetch_total", source="\ud800", status="success"
    )
    span = spans.one("fetch_many rates\\udc80")
    said = [span.status.description, *attributes(span).values()]
    said += attributes(span.events[0]).values()
    for point in meters.points("coalestra.source.keys"):
        said += attributes(point).values()
    for text in map(str, said):
        assert text.encode()
        assert len(text) < 5_000


class Unreadable(Exception):
    def __str__(self) -> str:
        raise OSError("unreadable")


@pytest.mark.parametrize("include_messages", [False, True])
def test_an_unreadable_error_ends_its_span_as_well(spans: Spans, include_messages: bool) -> None:
    tracer = OpenTelemetryTracer(spans.provider, include_messages=include_messages)
    tracer.end(tracer.begin("call", CALL), {}, raised(Unreadable()))
    span = spans.one("fetch_many rates")
    assert attributes(span)["error.type"].endswith("test_spans.Unreadable")


def test_a_traceback_is_cut_to_innermost_places(spans: Spans, tracer: OpenTelemetryTracer) -> None:
    def deeper(levels: int) -> None:
        if levels == 0:
            raise ValueError
        deeper(levels - 1)

    error = raised(AssertionError(), lambda: deeper(100))
    tracer.end(tracer.begin("build", BUILD), {}, error)
    (event,) = spans.one("build snapshot").events
    assert attributes(event)["exception.stacktrace"].count("in deeper") == 20


# Spans that nobody records ----------------------------------------------------------------------


def test_a_trace_that_is_not_sampled_still_shows_clients_where_they_are() -> None:
    spans = Spans(ALWAYS_OFF)
    tracer = OpenTelemetryTracer(spans.provider)
    build, inside = tracer.begin("build", BUILD), contextvars.copy_context()
    inside.run(tracer.enter, build)
    call = tracer.begin("call", CALL, parent=build)
    tracer.joined(build, call, 1.0, OTHERS)

    def traced() -> trace.SpanContext:
        return trace.get_current_span().get_span_context()

    assert inside.run(traced).trace_id == call.span.get_span_context().trace_id != 0
    tracer.end(call, {}, raised(ValueError()))
    tracer.end(build, DONE)
    assert spans.ended == ()


class NoSpans(trace.NoOpTracerProvider):
    """What old versions of the API give without an SDK: not even the trace of the caller."""

    def get_tracer(self, *_: Any, **__: Any) -> trace.Tracer:
        class Nothing(trace.NoOpTracer):
            def start_span(self, *_: Any, **__: Any) -> trace.Span:
                return trace.INVALID_SPAN

        return Nothing()


@pytest.mark.parametrize("provider", [trace.NoOpTracerProvider, NoSpans])
def test_without_an_sdk_the_callers_own_span_stays_current(
    spans: Spans, provider: type[trace.TracerProvider]
) -> None:
    tracer = OpenTelemetryTracer(provider())
    with spans.provider.get_tracer("test").start_as_current_span("request") as request:
        build, inside = tracer.begin("build", BUILD), contextvars.copy_context()
        inside.run(tracer.enter, build)
        current = inside.run(trace.get_current_span)
    tracer.joined(build, None, 1.0, OTHERS)
    tracer.end(build, DONE, raised(ValueError()))
    assert current is request  # who else would take what the caller says of it


def test_what_is_no_provider_or_no_flag_is_refused(spans: Spans) -> None:
    with pytest.raises(TypeError, match="tracer_provider"):
        OpenTelemetryTracer("here")  # type: ignore[arg-type]  # that is what is tested
    with pytest.raises(TypeError, match="include_messages"):
        OpenTelemetryTracer(
            spans.provider,
            include_messages="no",  # type: ignore[arg-type]  # that is what is tested
        )
