"""Spans and metrics for OpenTelemetry: needs the extra ``opentelemetry``.

Laws:

1. No attribute holds a subject, a qualifier or a rendered key. Texts of errors may name one: they
   are told only if that is asked for, and never in metrics.
2. The event loop waits for nothing here: a span begins and ends in memory, a count is a number in
   memory until a reader fetches it in a thread of its own. What an exporter does with them is not
   this module's to bound: it needs a batching processor.
3. The series of a counter are bounded by sources, kinds of resources and outcomes, and by
   `_MOST_SERIES`; the spans of joined readers by the calls that they joined, and by `_MOST_JOINS`
   for each unit of work.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from traceback import walk_tb
from typing import Any, Final

from coalestra import __version__, _telemetry
from coalestra._lockfree import Cell
from coalestra._telemetry import COUNTERS, FACTS, OBSERVATIONS, Builder, Fact, Reading, Watched
from coalestra.core.errors import folded_message, message_of
from coalestra.core.serialization import qualified_type
from coalestra.core.validation import flag, readable, require_methods, text

try:
    from opentelemetry import metrics, trace
    from opentelemetry.context import Context, attach, detach, get_current
except ImportError as error:
    raise ImportError(
        "coalestra.opentelemetry must have the package opentelemetry-api, which cannot be "
        "imported; install this package with its extra: python -m pip install '.[opentelemetry]'"
    ) from error

__all__ = ["OpenTelemetryMetrics", "OpenTelemetryTracer"]

_SCOPE: Final = "coalestra"

_ATTRIBUTES: Final[Mapping[str, str]] = {
    "builder": "coalestra.builder.name",
    "keys": "coalestra.keys.requested",
    "resolved": "coalestra.keys.resolved",
    "failed": "coalestra.keys.failed",
    "snapshot_id": "coalestra.snapshot.id",
    "parent_snapshot_id": "coalestra.snapshot.parent_id",
    "resource_namespace": "coalestra.resource.namespace",
    "resource_name": "coalestra.resource.name",
    "source": "coalestra.source.name",
    "source_kind": "coalestra.source.kind",
    "attempt": "coalestra.call.attempt",
    "waited_seconds": "coalestra.capacity.wait_time",
    "limiter": "coalestra.capacity.limiter",
    "state": "coalestra.circuit.state",
    "otel.metric.overflow": "otel.metric.overflow",
}
"""The semantic names of facts and labels; any other is put behind ``coalestra.``."""


def _attributes(facts: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {
        _ATTRIBUTES.get(name) or f"coalestra.{name}": (
            readable(str.__str__(value)) if isinstance(value, str) else value
        )
        for name, value in facts
    }


# Spans --------------------------------------------------------------------------------------------

_STAGES: Final[Mapping[str, str]] = {
    "build": "build snapshot",
    "resolve": "resolve snapshot",
    "revalidate": "revalidate snapshot",
    "refresh": "refresh resources",
}
_CALLS: Final[Mapping[str, str]] = {"single": "fetch", "batch": "fetch_many", "derived": "derive"}
_MOST_JOINS: Final = 128
_MOST_FRAMES: Final = 20
_LONGEST_MESSAGE: Final = 4_096


@dataclass(slots=True)
class _Join:
    """The waiting of one unit of work for what one call of another brought, for all keys of it."""

    call: _Begun | None
    attributes: dict[str, Any]
    start: int
    end: int
    keys: int = 0


@dataclass(slots=True, eq=False)
class _Begun:
    """A span under way, and the context in which it is the current one.

    `joins` are told when it ends, each of them as one span.
    """

    span: trace.Span
    context: Context
    joins: dict[Any, _Join] = field(default_factory=dict)

    @property
    def link(self) -> trace.Link:
        """A link to it."""
        return trace.Link(self.span.get_span_context())


class OpenTelemetryTracer:
    """Makes a span of each build, stage, refresh, attempt of a call, and wait for another's call.

    A stage hangs below the span that is current where it was asked for. The span of an attempt is
    current in the source that it calls, so that spans of the source's client nest. A refresh in the
    background begins a trace of its own, linked to the stage that set it off.

    Args:
        tracer_provider: where spans go; the global provider by default.
        include_messages: whether the messages of errors are told, beside their types and places.
            They may name what a key is about: a URL with an account in it, say.
    """

    __slots__ = ("_messages", "_tracer")

    def __init__(
        self, tracer_provider: trace.TracerProvider | None = None, *, include_messages: bool = False
    ) -> None:
        if tracer_provider is not None:
            require_methods("tracer_provider", tracer_provider, "get_tracer")
        self._messages = flag("include_messages", include_messages)
        self._tracer = trace.get_tracer(_SCOPE, __version__, tracer_provider)

    def begin(
        self, kind: str, attributes: Mapping[str, Any], *, parent: Any = None, link: Any = None
    ) -> _Begun:
        """Return a new span; see `Tracer.begin`."""
        if kind == "refresh":
            context = Context()
        else:
            context = get_current() if parent is None else parent.context
        name = _STAGES.get(kind)
        if name is None:
            source_kind = attributes.get("source_kind", kind)
            source = readable(attributes.get("source", ""))
            name = f"{_CALLS.get(source_kind, source_kind)} {source}"
        told, links = _attributes(attributes.items()), () if link is None else (link.link,)
        span = self._tracer.start_span(name, context, attributes=told, links=links)
        return _Begun(span, trace.set_span_in_context(span, context))

    def enter(self, span: _Begun) -> Callable[[], None] | None:
        """Make a span current in the present context; see `Tracer.enter`."""
        own = span.span.get_span_context()
        if not own.is_valid or own == trace.get_current_span().get_span_context():
            return None  # without an SDK it would hide the span of the caller
        token = attach(span.context)

        def leave() -> None:
            if get_current() is span.context:  # else it is another context that is left here
                detach(token)

        return leave

    def end(
        self, span: _Begun, attributes: Mapping[str, Any], error: BaseException | None = None
    ) -> None:
        """End a span, and tell of those whose calls it waited for; see `Tracer.end`."""
        own = span.span
        try:
            for join in span.joins.values():
                self._tell(join, span)
            if own.is_recording():
                own.set_attributes(_attributes(attributes.items()))
                if error is not None and attributes.get("outcome") != "abandoned":
                    self._fail(own, error)
        finally:
            own.end()

    def joined(
        self, parent: _Begun, call: _Begun | None, seconds: float, attributes: Mapping[str, Any]
    ) -> None:
        """Note a wait for another's call; see `Tracer.joined`."""
        if not parent.span.is_recording():
            return
        end = time.time_ns()
        start = end - int(seconds * 1e9)
        joins = parent.joins
        group: Any = (call, *attributes.values())
        if group not in joins and len(joins) >= _MOST_JOINS:
            group, call, attributes = None, None, {}
        join = joins.get(group)
        if join is None:
            told = _attributes(attributes.items())
            if "snapshot_id" in attributes:
                told["coalestra.flight.snapshot_id"] = told.pop("coalestra.snapshot.id")
            join = joins[group] = _Join(call, told, start, end)
        join.start, join.end = min(join.start, start), end
        join.keys += 1

    def _tell(self, join: _Join, parent: _Begun) -> None:
        told = {
            **join.attributes,
            "coalestra.keys.requested": join.keys,
            "coalestra.flight.wait_time": (join.end - join.start) / 1e9,
        }
        links, began = () if join.call is None else (join.call.link,), join.start
        self._tracer.start_span(
            "join flight", parent.context, attributes=told, links=links, start_time=began
        ).end(join.end)

    def _fail(self, span: trace.Span, error: BaseException) -> None:
        """Say what a span failed with; what was called off has not failed."""
        if isinstance(error, asyncio.CancelledError):
            span.set_attribute("coalestra.outcome", "cancelled")
            return
        kind = qualified_type(error).removeprefix("builtins.")
        said, places, description = {"exception.type": kind}, _places(error), kind
        if places:
            said["exception.stacktrace"] = places
        if self._messages:
            message = message_of(error)
            writable = message[:_LONGEST_MESSAGE].encode("utf-8", "backslashreplace")
            said["exception.message"] = writable.decode()
            description = f"{kind}: {folded_message(message)}"
        span.set_attribute("error.type", kind)
        span.add_event("exception", said)
        span.set_status(trace.Status(trace.StatusCode.ERROR, description))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(include_messages={self._messages})"


def _places(error: BaseException) -> str:
    """Return a traceback without lines of source, which would have to be read from files."""
    frames = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__)]
    return "".join(
        f'File "{code.co_filename}", line {line}, in {code.co_name}\n'
        for code, line in frames[-_MOST_FRAMES:]
    )


# Metrics ------------------------------------------------------------------------------------------

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
_MOST_SERIES: Final = 2_000
_READING_SECONDS: Final = 1.0
_OVERFLOW: Final = (("otel.metric.overflow", True),)
"""As OpenTelemetry bounds and calls what finds no room."""


_Labels = tuple[tuple[str, Any], ...]

# What is counted in things adds up over builders and processes; the others do not.
_LEVELS: Final[Sequence[tuple[str, str, Fact]]] = (
    ("builder.flights", "{key}", FACTS["keys_in_flight"]),
    ("builder.refreshes", "{refresh}", FACTS["background_refreshes"]),
    ("capacity.limit", "{slot}", FACTS["capacity_limit"]),
    ("capacity.usage", "{slot}", FACTS["capacity_in_use"]),
    ("capacity.pending", "{call}", FACTS["capacity_waiting"]),
    ("source.circuits", "{circuit}", FACTS["source_circuits"]),
    ("cache.entries", "{entry}", FACTS["cache_entries"]),
    ("submissions.pending", "{submission}", FACTS["pending_submissions"]),
    ("source.success.age", "s", _telemetry.fact(
        "success_age", "Since a source last answered", "sources.seconds_since_success")),
    ("builder.severity", "1", FACTS["builder_severity"]),
)  # fmt: skip


class _Instruments:
    """The instruments on one provider, which all sinks on it share.

    A provider keeps the first instrument of a name, with its callbacks, and ignores others.
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[_Labels, Cell[int]]] = {metric: {} for metric in COUNTERS}
        self.watched = Watched()
        self.histograms: dict[str, metrics.Histogram] = {}
        self._reading: Reading = {}
        self._read_at = 0.0
        self._unread: set[str] = set()

    def create(self, meter: metrics.Meter) -> None:
        """Make them; once."""
        for metric, (name, unit, meaning, _) in COUNTERS.items():
            counted = partial(self._counted, self.counts[metric])
            meter.create_observable_counter(f"coalestra.{name}", [counted], unit, meaning)
        for name, unit, level in _LEVELS:
            additive, gauge = meter.create_observable_up_down_counter, meter.create_observable_gauge
            create: Callable[..., object] = gauge if unit in ("s", "1") else additive
            read = partial(self._levels, level)
            create(f"coalestra.{name}", [read], unit, level.description)
        for metric, (name, unit, meaning, _) in OBSERVATIONS.items():
            bounds = _SECONDS if unit == "s" else _SIZES
            self.histograms[metric] = meter.create_histogram(
                f"coalestra.{name}", unit, meaning, explicit_bucket_boundaries_advisory=bounds
            )

    def count(self, metric: str, labels: Mapping[str, str]) -> Cell[int]:
        """Return where a counter with these labels is kept; KeyError if there is no such metric."""
        counts = self.counts[metric]
        series: _Labels = tuple(sorted(labels.items()))
        if series not in counts and len(counts) >= _MOST_SERIES:
            series = _OVERFLOW
        return counts.setdefault(series, Cell(0))

    @staticmethod
    def _counted(
        counts: dict[_Labels, Cell[int]], _: metrics.CallbackOptions
    ) -> Iterator[metrics.Observation]:
        for labels, count in counts.copy().items():
            yield metrics.Observation(count.value, _attributes(labels))

    def _levels(self, level: Fact, _: metrics.CallbackOptions) -> Iterator[metrics.Observation]:
        for labels, figure in self._reading_for(level)[level.name]:
            told = zip(("builder", *level.labels), labels, strict=True)
            yield metrics.Observation(figure, _attributes(told))

    def _reading_for(self, level: Fact) -> Reading:
        """Return the reading of this collection, which asks once for each level.

        Where several readers collect at the same time, one may find what another has just read.
        """
        now = time.monotonic()
        if level.name not in self._unread or now - self._read_at > _READING_SECONDS:
            facts = {each.name: each for _, _, each in _LEVELS}
            self._reading, self._read_at = self.watched.read(facts.values()), now
            self._unread = set(facts)
        self._unread.discard(level.name)
        return self._reading


_shared: Final[weakref.WeakKeyDictionary[object, _Instruments]] = weakref.WeakKeyDictionary()
_sharing: Final = threading.Lock()


def _instruments_on(provider: metrics.MeterProvider | None) -> _Instruments:
    """Return the instruments on a provider; the global one may be replaced by that of an SDK."""
    current = metrics.get_meter_provider()
    key: object = provider
    if provider is None or provider is current:
        key, provider = metrics.get_meter_provider, current  # for whichever it is by then
    mine = _Instruments()
    with _sharing:
        kept = _shared.setdefault(key, _shared.get(provider, mine))
        if kept is mine:
            mine.create(provider.get_meter(_SCOPE, __version__))
    return kept


class OpenTelemetryMetrics:
    """Takes counts and observations to instruments with semantic names, and watches a builder.

    It waits for nothing, so a builder calls it directly: what is observed while a call is under way
    has a span of that trace for an exemplar. Counts are kept in memory until a reader asks. Sinks
    on one provider share their instruments.

    Args:
        meter_provider: where metrics go; the global provider by default.
        builder: stands in the attribute ``coalestra.builder.name``; another one for each builder
            of a process.
    """

    __slots__ = ("_counts", "_instruments", "builder")

    coalestra_non_blocking = True

    def __init__(
        self, meter_provider: metrics.MeterProvider | None = None, *, builder: str = "default"
    ) -> None:
        if meter_provider is not None:
            require_methods("meter_provider", meter_provider, "get_meter")
        self.builder: str = text("builder", builder)
        self._counts: dict[Any, Cell[int]] = {}
        self._instruments = _instruments_on(meter_provider)

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Count ``value`` more of something that the library counts."""
        series = (metric, *labels.items())
        count = self._counts.get(series)
        if count is None:
            count = self._instruments.count(metric, {"builder": self.builder, **labels})
            if len(self._counts) < _MOST_SERIES:
                self._counts[series] = count
        count.change(lambda counted: counted + value)

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Take one of the library's measurements, for the histogram that stands for it."""
        if metric.endswith("_ms"):
            value /= 1e3
        labels["builder"] = self.builder
        self._instruments.histograms[metric].record(value, _attributes(labels.items()))

    def watch(self, builder: Builder) -> None:
        """Measure the health of a builder whenever metrics are read, until it is closed.

        It is held weakly, and asked in the thread of the reader, which waits for no loop. The
        health of a `SyncSnapshotBuilder` has its backlog as well.

        Raises:
            ValueError: another builder that is open goes by the name of this sink.
        """
        require_methods("builder", builder, "health_snapshot_nowait")
        watched = self._instruments.watched
        if watched.open().get(self.builder, builder) is not builder:
            raise ValueError(
                f"builder must tell builders apart, got {self.builder!r} for another one that is "
                "open; give each a sink with a name of its own"
            )
        watched.add(self.builder, builder)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of builder {self.builder!r}>"
