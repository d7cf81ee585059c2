"""What the library reports, and the sinks that come with it: events, metrics and what is logged.

Laws:

1. Nothing that a sink raises leaves this module: failures are counted. What ends a program is
   passed on to it, after the step that reported is over.
2. A label never holds a subject, a qualifier or a rendered key: the number of time series must not
   grow with the number of resources. Events name the resource in full.
3. Every text in a label or an event is one line of bounded length, whatever an application put
   into a name. An event holds nothing but texts, numbers, and lists and dictionaries of such.
4. What nobody listens to costs one look at a flag: it is not put into words.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import queue
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar, Generic, TypeVar

from coalestra._endings import pass_on
from coalestra._lockfree import Cell, WorkerQueue
from coalestra.core import errors, validation
from coalestra.core.errors import SnapshotConsistencyError, SourceFailure
from coalestra.core.frozen import FrozenDict, record
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.request import SnapshotAcceptanceViolation
from coalestra.core.snapshot import Snapshot, SnapshotDiagnostics
from coalestra.core.validation import readable
from coalestra.core.values import Revision

__all__ = [
    "BufferOverflowPolicy", "BufferedEventSink", "BufferedMetricsSink", "BufferedSinkStats",
    "EventRecord", "InMemoryMetrics", "LoggingEventSink", "MetricRecord", "MetricsSnapshot",
    "NullEventSink", "NullMetrics", "ObservationSummary",
]  # fmt: skip

B = TypeVar("B", bound="BufferedSink[Any, Any]")
R = TypeVar("R")
S = TypeVar("S")

# What is logged of its own accord: that something begins to fail, and that it works again --------
#
# Laws:
#
# 1. A line is written when the state of a subject is another one than was last said of it. Of one
#    that changes all the time, ten lines are written at once, and then one a minute.
# 2. Lines are written in a thread, one after the other. A handler that blocks holds up more lines,
#    of which a hundred wait, and nothing else. What a handler raises goes no further.
# 3. No key is named. What went wrong, and where, is told by ``exc_info`` alone: an exception of the
#    same type and text, as whoever keeps records must not keep alive what failed.
# 4. Where no handler listens, nothing is done, and no thread started.

LOGGER = logging.getLogger("coalestra")

_AT_ONCE = 10
_PAUSE_SECONDS = 60.0
_MOST_LINES = 100


def subject_of(kind: str, sink: object) -> str:
    """Return what to call a sink."""
    return f"{kind} sink {type(sink).__name__}"


class Condition:
    """Whether one subject works or fails, as it was last said."""

    __slots__ = ("_said_until", "failing", "subject")

    def __init__(self, subject: str) -> None:
        self.subject: str = readable(subject)
        self.failing: bool = False
        self._said_until = -math.inf  # each line takes up one pause

    def is_news(self, failing: bool, now: float) -> bool:
        """Whether this has to be said, at ``now`` (monotonic seconds); then it counts as said."""
        if failing is self.failing:
            return False
        if not _listened(logging.WARNING if failing else logging.INFO):
            self.failing = self.failing and failing
            return False
        until = max(self._said_until, now) + _PAUSE_SECONDS
        if round(until - now, 3) > _AT_ONCE * _PAUSE_SECONDS:
            return False
        self._said_until, self.failing = until, failing
        return True

    def note(self, error: BaseException | None) -> None:
        """Write here and now that it begins to fail, or works again."""
        if self.is_news(error is not None, time.monotonic()):
            write((self.subject, None if error is None else SourceFailure.of(self.subject, error)))


def _listened(level: int) -> bool:
    """Whether a handler of the application's would get a record of this level."""
    if not LOGGER.isEnabledFor(level):
        return False
    logger: logging.Logger | None = LOGGER
    while logger is not None:
        for handler in logger.handlers:
            if handler.level <= level and not isinstance(handler, logging.NullHandler):
                return True
        logger = logger.parent if logger.propagate else None
    return False


def write(line: tuple[str, SourceFailure | None]) -> None:
    """Write that a subject fails, and why, or that it works again; raises no `Exception`."""
    with suppress(Exception):  # of a handler, a filter or a factory of records
        LOGGER.handle(_record_of(*line))


def _record_of(subject: str, failure: SourceFailure | None) -> logging.LogRecord:
    make = partial(LOGGER.makeRecord, LOGGER.name)
    if failure is None:
        return make(logging.INFO, __file__, 0, "%s works again", (subject,), None)
    said, text = (subject, failure.error_type), errors.folded_message(failure.message)
    twin = _twin(failure.exception, text)
    raised = type(twin), twin, None
    record = make(logging.WARNING, __file__, 0, "%s fails: %s", said, raised)
    places = failure.traceback
    head = f"Traceback (most recent call last):\n{places}" if places else ""
    record.exc_text = f"{head}{failure.error_type}: {text}"
    return record


def _twin(error: BaseException | None, text: str) -> BaseException:
    """Return an exception of the type of an error, if that allows it, that tells its text alone."""
    kind: type[BaseException] = Exception if error is None else type(error)
    twin = None
    with suppress(Exception):  # of its ``__new__``
        twin = kind.__new__(kind, text)
    return twin if isinstance(twin, kind) else Exception(text)


@dataclass(eq=False, repr=False)
class ChangeLog:
    """Says of each subject of a builder that it fails, and that it works again, once per change.

    The thread that writes is a daemon, and ends when there is nothing more to write.

    Attributes:
        silent: whether nothing is said at all.
        ticks: the monotonic clock.
        troubled: the subjects of which was last said that they fail.
    """

    silent: bool = False
    ticks: Callable[[], float] = time.monotonic
    troubled: dict[str, Condition] = field(default_factory=dict)
    _conditions: dict[str, Condition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lines: WorkerQueue[tuple[str, SourceFailure | None]] = WorkerQueue(
            write, _MOST_LINES, drop_oldest=False, name="coalestra-log", lingers=False
        )

    def failed(self, subject: str, error: BaseException | SourceFailure) -> None:
        """Say that a subject fails, and why, unless that was said last."""
        if self.silent or subject in self.troubled:
            return
        condition = self._conditions.setdefault(subject, Condition(subject))
        if condition.is_news(True, self.ticks()):
            self.troubled[subject] = condition
            if isinstance(error, BaseException):
                error = SourceFailure.of(subject, error)
            self._lines.put((condition.subject, error))

    def works(self, subject: str) -> None:
        """Say that a subject works again, if it was said that it fails."""
        condition = self.troubled.get(subject)
        if condition is None:
            return
        news = condition.is_news(False, self.ticks())
        if not condition.failing:
            self.troubled.pop(subject, None)  # another thread may have seen the same
        if news:
            self._lines.put((condition.subject, None))

    @property
    def pending(self) -> int:
        """How many lines are not written yet."""
        return self._lines.pending

    async def end(self, seconds: float | None, *, drain: bool) -> int:
        """Wait for so long until all lines are written; return how many are not.

        Without ``drain`` only the one that is being written is waited for.
        """
        if not drain:
            self._lines.drop()
        return await self._lines.until_empty(seconds)

    def __repr__(self) -> str:
        return f"<ChangeLog troubled={list(self.troubled)} pending={self.pending}>"


# The sinks ---------------------------------------------------------------------------------------

DEFAULT_MAX_PENDING = 10_000
"""How many records a buffer keeps waiting unless told otherwise."""


class BufferOverflowPolicy(str, enum.Enum):
    """What becomes of a record that finds the buffer full."""

    DROP_OLDEST = "drop_oldest"
    """It takes the place of the one that waited longest."""
    DROP_NEWEST = "drop_newest"
    """It is dropped itself."""
    RAISE = "raise"
    """It is dropped, and the caller gets ``queue.Full``."""


class NullEventSink:
    """Discards every event. With it, the library does not even put events together."""

    __slots__ = ()

    coalestra_non_blocking = True

    def emit(self, event_type: str, **payload: Any) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class NullMetrics:
    """Discards every count and observation. With it, the library builds no labels."""

    __slots__ = ()

    coalestra_non_blocking = True

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Do nothing."""

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@record
class EventRecord:
    """One event as it was emitted.

    Attributes:
        event_type: what happened, such as ``snapshot_built``.
        payload: the particulars, in a dictionary of the record's own.
    """

    event_type: str
    payload: dict[str, Any]


FAILURES = frozenset({
    "cache_failed", "payload_copy_deadline_exceeded", "resource_refresh_failed",
    "snapshot_acceptance_failed", "snapshot_consistency_failed", "source_circuit_open",
    "source_failed", "source_payload_rejected", "source_transport_budget_rejected",
    "source_transport_timeout_violated", "stale_fallback_used",
})  # fmt: skip
"""The events that are about a failure, whatever their payload says."""


class LoggingEventSink:
    """Writes each event to a logger: failures at level WARNING, everything else at INFO.

    The reference of events names the failures; a build or session call in which a key failed is
    one. ``levels`` says otherwise for single types of events. A log record has the attributes
    ``event_type`` and ``event_payload`` for structured formatters. Log handlers may write to files
    or networks, so a builder puts this sink behind a buffer unless told otherwise.

    Args:
        logger: where to write; the logger ``coalestra`` by default.
        levels: levels by type of event, as numbers or names that ``logging`` knows; None: not
            logged.
    """

    def __init__(
        self,
        logger: logging.Logger | None = None,
        *,
        levels: Mapping[str, int | str | None] | None = None,
    ) -> None:
        validation.instance("logger", logger, logging.Logger, optional=True)
        self.logger: logging.Logger = logging.getLogger("coalestra") if logger is None else logger
        given = {} if levels is None else validation.mapping("levels", levels)
        self.levels: Mapping[str, int | None] = FrozenDict(
            {validation.text("levels", name): _level(name, level) for name, level in given.items()}
        )

    def emit(self, event_type: str, **payload: Any) -> None:
        """Log one event."""
        failed = event_type in FAILURES or payload.get("failed") or payload.get("build_failed")
        usual = logging.WARNING if failed else logging.INFO
        level = self.levels.get(event_type, usual)
        if level is None:
            return
        extra = {"event_type": event_type, "event_payload": payload}
        self.logger.log(level, "%s %s", event_type, payload, extra=extra)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.logger!r})"


def _level(event_type: str, level: int | str | None) -> int | None:
    name = f"levels[{event_type!r}]"
    if not isinstance(level, str):
        return validation.integer(name, level, minimum=0, optional=True)
    known = logging.getLevelName(level.upper())
    if not isinstance(known, int):
        raise ValueError(validation.refusal(name, "a level that logging knows", level))
    return known


Labels = tuple[tuple[str, str], ...]
"""The labels of a series: pairs in the order of their names."""

Series = tuple[str, Labels]
"""What one number is kept for: the name of a metric, and its labels."""


@record
class MetricRecord:
    """One call to a metrics sink.

    Attributes:
        operation: the method called, ``increment`` or ``observe``.
        metric: the name of the metric.
        value: what it was increased by, or what was observed.
        labels: the labels, in a dictionary of the record's own.
    """

    operation: str
    metric: str
    value: int | float
    labels: dict[str, str]


@record
class ObservationSummary:
    """What all observations of one series come to, in the unit of the metric.

    Attributes:
        count: how many there were, at least one.
        total: their sum.
        minimum: the least of them.
        maximum: the greatest of them.
    """

    count: int
    total: float
    minimum: float
    maximum: float

    @property
    def average(self) -> float:
        """The arithmetic mean of the observations."""
        return self.total / self.count

    def including(self, value: float) -> ObservationSummary:
        """Return the summary with one more observation."""
        return ObservationSummary(
            self.count + 1, self.total + value, min(self.minimum, value), max(self.maximum, value)
        )


@record
class MetricsSnapshot:
    """Everything an ``InMemoryMetrics`` held at one moment.

    Attributes:
        counters: the value of each counter, by metric and labels.
        observations: the summary of each observed metric, by metric and labels.
    """

    counters: Mapping[Series, int]
    observations: Mapping[Series, ObservationSummary]


class InMemoryMetrics:
    """Keeps one number per counter and one summary per observed series.

    Safe from many threads, signal handlers, finalizers and forked children: nothing is locked, and
    no report is lost. Memory grows with the number of distinct label sets, not of calls.
    """

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self._counters: dict[Series, Cell[int]] = {}
        self._observations: dict[Series, Cell[ObservationSummary]] = {}

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Add ``value`` to the counter with exactly these labels."""
        series = series_of(metric, labels)
        counter = self._counters.get(series)
        if counter is None:
            counter = self._counters.setdefault(series, Cell(0))
        counter.change(lambda count: count + value)

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Add one observation to the summary with exactly these labels."""
        series = series_of(metric, labels)
        first = Cell(ObservationSummary(1, value, value, value))
        summary = self._observations.setdefault(series, first)
        if summary is not first:
            summary.change(lambda known: known.including(value))

    def counter(self, metric: str, **labels: str) -> int:
        """Return the counter with exactly these labels; 0 if it was never increased."""
        counter = self._counters.get(series_of(metric, labels))
        return 0 if counter is None else counter.value

    def summary(self, metric: str, **labels: str) -> ObservationSummary | None:
        """Return what was observed with exactly these labels; None if nothing was."""
        summary = self._observations.get(series_of(metric, labels))
        return None if summary is None else summary.value

    def snapshot(self) -> MetricsSnapshot:
        """Return a copy of all that is kept; what is reported meanwhile may be in it or not."""
        return MetricsSnapshot(
            {series: cell.value for series, cell in self._counters.copy().items()},
            {series: cell.value for series, cell in self._observations.copy().items()},
        )

    def __repr__(self) -> str:
        counters, observed = len(self._counters), len(self._observations)
        return f"<{type(self).__name__} counters={counters} observations={observed}>"


def series_of(metric: str, labels: Mapping[str, str]) -> Series:
    """Return the series that ``metric`` with these labels belongs to, whatever their order."""
    return metric, tuple(sorted(labels.items()))


# Buffers: what they get is handed to another sink in a thread, so that nobody waits for it --------
#
# Signal handlers, finalizers and forks may strike wherever they like; see `WorkerQueue`.


@dataclass(frozen=True)
class BufferedSinkStats:
    """The state of one buffer at one moment; counts are since it was made.

    Attributes:
        enqueued: records accepted.
        delivered: records that the downstream sink took.
        dropped: records lost to a full or closed buffer, or discarded as it closed.
        failures: deliveries that raised.
        pending: records accepted and not settled; the one in delivery does not count when that
            would make more than ``max_pending``.
        closed: whether new records are refused.
        max_pending: how many records may wait.
        peak_pending: the most that were ever pending.
        worker_alive: whether what is accepted will be delivered: the worker thread runs, or will
            start with the first record. False once it has ended.
        shutdown_timeout_count: calls of ``close`` that ran out of time.
    """

    enqueued: int
    delivered: int
    dropped: int
    failures: int
    pending: int
    closed: bool
    max_pending: int = 0
    peak_pending: int = 0
    worker_alive: bool = False
    shutdown_timeout_count: int = 0


class BufferedSink(Generic[S, R]):
    """A sink whose callers never wait for the sink behind it.

    As a context manager it closes on the way out, waiting for up to five seconds. One that is
    forgotten without being closed still delivers what it has, then its thread ends. Where no
    thread can be started, ``flush`` and ``close`` deliver themselves.

    Args:
        downstream: the sink that gets the records, in a thread, one at a time and in order.
        max_pending: how many records may wait (at least 1).
        overflow: what happens to one more; `BufferOverflowPolicy.RAISE` makes reports raise
            ``queue.Full``.
    """

    coalestra_non_blocking = True

    _kind: ClassVar[str]
    _methods: ClassVar[tuple[str, ...]]
    _replay: ClassVar[Any]
    """Gives a record to the sink behind this one."""

    def __init__(
        self,
        downstream: S,
        *,
        max_pending: int = DEFAULT_MAX_PENDING,
        overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        validation.require_methods("downstream", downstream, *self._methods, plain=True)
        validation.choice("overflow", overflow, BufferOverflowPolicy)
        self.downstream: S = downstream
        self._raises = overflow is BufferOverflowPolicy.RAISE
        self.queue: WorkerQueue[R] = WorkerQueue(
            partial(self._replay, downstream),
            validation.integer("max_pending", max_pending, minimum=1),
            drop_oldest=overflow is BufferOverflowPolicy.DROP_OLDEST,
            name=f"coalestra-{self._kind}-buffer",
            lingers=True,
            noted=Condition(subject_of(self._kind, downstream)).note,
        )
        # The worker holds on to the queue but not to this object, so this is reached.
        forgotten = weakref.finalize(self, self.queue.refuse)
        forgotten.atexit = False
        self.queue.call_at_end(forgotten.detach)  # or a sink that leads here would never be let go

    def _put(self, record: R) -> None:
        if not self.queue.put(record) and self._raises and not self.queue.closed:
            raise queue.Full(
                f"{self.queue.max_pending} records wait for delivery; raise max_pending, or choose "
                "an overflow policy that drops"
            )

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was accepted before this call has been dealt with.

        A delivery that raised counts as dealt with. Return whether all has been in ``timeout``
        seconds; None waits as long as it takes.
        """
        return self.queue.flush(validation.number("timeout", timeout, minimum=0, optional=True))

    def close(self, *, timeout: float | None = 5.0, drain: bool = True) -> bool:
        """Refuse new records (they count as dropped) and wait for the worker thread to end.

        May be called again, to wait longer or to give up draining.

        Args:
            timeout: the longest wait in seconds; None waits as long as it takes. The worker goes
                on with its work when it has passed.
            drain: deliver what is pending; otherwise discard all but the record in delivery.

        Returns:
            Whether the worker has ended.
        """
        validation.number("timeout", timeout, minimum=0, optional=True)
        self.queue.refuse(discard=not validation.flag("drain", drain))
        return self.queue.wait_ended(timeout)

    def stats(self) -> BufferedSinkStats:
        """Return what has happened so far and what is pending now."""
        return BufferedSinkStats(**self.queue.stats())

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        now = self.stats()
        state = "closed" if now.closed else "open"
        return (
            f"<{type(self).__name__} to {type(self.downstream).__name__} {state} "
            f"pending={now.pending}/{now.max_pending} delivered={now.delivered} "
            f"dropped={now.dropped} failures={now.failures}>"
        )


class BufferedEventSink(BufferedSink[EventSink, EventRecord]):
    """An event sink whose callers never wait for the sink behind it. See `BufferedSink`."""

    _kind, _methods = "event", ("emit",)

    @staticmethod
    def _replay(downstream: EventSink, record: EventRecord) -> None:
        downstream.emit(record.event_type, **record.payload)

    def emit(self, event_type: str, **payload: Any) -> None:
        """Take one event, to be delivered later with the payload it has now."""
        self._put(EventRecord(event_type, payload))


class BufferedMetricsSink(BufferedSink[MetricsSink, MetricRecord]):
    """A metrics sink whose callers never wait for the sink behind it. See `BufferedSink`."""

    _kind, _methods = "metrics", ("increment", "observe")

    @staticmethod
    def _replay(downstream: MetricsSink, record: MetricRecord) -> None:
        getattr(downstream, record.operation)(record.metric, record.value, **record.labels)

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Take one count, to be delivered later."""
        self._put(MetricRecord("increment", metric, value, labels))

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Take one observation, to be delivered later."""
        self._put(MetricRecord("observe", metric, value, labels))


# What is reported --------------------------------------------------------------------------------
#
# An event, a count or an observation that is the whole of a report is made by its name; a method of
# its own has what is told in more than one way, or worked out of something else.

Buffer = BufferedEventSink | BufferedMetricsSink
Reported = BaseException | SourceFailure
"""What went wrong: an exception, or the record that was made of one."""


COUNTED: Mapping[str, tuple[str, str]] = {
    "cache_hit": ("cache_access_total", "resource status=freshness"),
    "cache_bypassed": ("cache_access_total", "resource status=revalidation_bypass"),
    "cache_failed": ("cache_failure_total", "operation"),
    "resource_joined": ("singleflight_join_total", "resource"),
    "resource_resolved": ("source_fetch_total", "source status=success"),
    "resource_refresh_scheduled": ("resource_refresh_total", "resource status=scheduled"),
    "resource_refresh_completed": ("resource_refresh_total", "resource status=success"),
    "resource_refresh_failed": ("resource_refresh_total", "resource status=failure"),
    "resource_published": ("resource_publish_total", "resource source status=published"),
    "resource_publish_ignored": ("resource_publish_total", "resource source status"),
    "resource_invalidated": ("resource_invalidation_total", "resource"),
    "payload_copy_deadline_exceeded": ("payload_copy_deadline_total", "phase"),
}
"""The events that count, each with its counter and the labels of that.

A label has the fact of its name or of the one behind ``=``, or else that word. ``resource`` stands
for the two labels that say of which kind it is.
"""

_LABELS = {
    event_type: [
        (label, fact or label)
        for label, _, fact in (each.partition("=") for each in labels.split())
    ]
    for event_type, (_, labels) in COUNTED.items()
}

_DIAGNOSTICS = tuple(field.name for field in fields(SnapshotDiagnostics))


class ReportedDiagnostics(dict[str, Any]):
    """The diagnostics of a snapshot in the form of JSON; the fields are attributes all the same."""

    @classmethod
    def of(cls, diagnostics: SnapshotDiagnostics) -> ReportedDiagnostics:
        """Return the fields of ``diagnostics`` by name, mappings as dictionaries of their own."""
        fields = {name: getattr(diagnostics, name) for name in _DIAGNOSTICS}
        return cls({name: dict(v) if isinstance(v, Mapping) else v for name, v in fields.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r} in the diagnostics of a snapshot") from None

    def __eq__(self, other: object) -> bool:
        fields = self.of(other) if isinstance(other, SnapshotDiagnostics) else other
        return dict.__eq__(self, fields) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


class Reporter:
    """Hands counts, observations and events to the two sinks of one builder.

    Get one from ``reporter_for``.
    """

    __slots__ = ("_counting", "_events", "_failures", "_log", "_metrics", "_telling")

    def __init__(self, metrics: MetricsSink, events: EventSink, log: ChangeLog) -> None:
        self._log = log
        self._metrics = metrics
        self._events = events
        # Subclasses of the null sinks may listen after all.
        self._counting = type(_innermost(metrics)) is not NullMetrics
        self._telling = type(_innermost(events)) is not NullEventSink
        self._failures = Cell(0)

    @property
    def listens(self) -> bool:
        """Whether there is a sink that does not discard what it gets."""
        return self._counting or self._telling

    @property
    def failures(self) -> int:
        """How often a sink has raised since this reporter was made."""
        return self._failures.value

    def __repr__(self) -> str:
        metrics = type(self._metrics).__name__ if self._counting else "off"
        events = type(self._events).__name__ if self._telling else "off"
        return f"<{type(self).__name__} metrics={metrics} events={events} failures={self.failures}>"

    def count(
        self, metric: str, key: ResourceKey | None = None, times: int = 1, /, **labels: str
    ) -> None:
        """Count so many; of a key the labels say what kind of resource it is, and not which."""
        if self._counting:
            if key is not None:
                labels.update(resource_namespace=key.namespace, resource_name=key.name)
            self._hand("metrics", "increment", (metric, times), labels.items())

    def _count_status(self, metric: str, succeeded: bool, **labels: str) -> str:
        status = "success" if succeeded else "error"
        self.count(metric, status=status, **labels)
        return status

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Observe a value, in the unit that the name of the metric tells: to the microsecond."""
        if self._counting:
            self._hand("metrics", "observe", (metric, round(value, 3)), labels.items())

    def tell(self, event_type: str, **facts: Any) -> None:
        """Tell these facts of an event, and count it if it counts.

        Errors and resources are given as they are.
        """
        if self._counting and event_type in COUNTED:
            labels = {label: facts.get(fact, fact) for label, fact in _LABELS[event_type]}
            self.count(COUNTED[event_type][0], labels.pop("resource", None), **labels)
        if self._telling:
            self._hand("event", "emit", (event_type,), facts.items())

    def _hand(
        self, kind: str, method: str, said: tuple[Any, ...], facts: Iterable[tuple[str, Any]]
    ) -> None:
        """Hand something to a sink, each fact as it is shown by its name or type."""
        sink: object = self._events if kind == "event" else self._metrics
        shown: dict[str, Any] = {}
        try:
            for name, fact in facts:
                if type(fact) is str:
                    shown[name] = readable(fact)
                elif name in _FORMS:
                    shown[name] = _FORMS[name](fact)
                elif isinstance(fact, str):  # of a class of the application's, such as an enum
                    shown[name] = readable(str.__str__(fact))
                else:
                    shown[name] = fact
            getattr(sink, method)(*said, **shown)
        except BaseException as error:
            self._failures.change(lambda count: count + 1)
            self._log.failed(subject_of(kind, sink), error)
            pass_on(error)
        else:
            if self._log.troubled:
                self._log.works(subject_of(kind, sink))

    # What is told in more than one way, or worked out ------------------------------------------

    def resource_resolved(self, value: Revision, source_kind: str, snapshot_id: str) -> None:
        """Report a fresh value of a ``single``, ``batch`` or ``derived`` source."""
        self.tell(
            "resource_resolved",
            resource=value.key,
            source=value.source,
            latency_ms=value.latency_ms,
            attempts=value.attempts,
            source_kind=source_kind,
            authority_rank=value.authority_rank,
            snapshot_id=snapshot_id,
        )

    def source_failed(
        self,
        key: ResourceKey,
        source: str,
        error: Reported,
        snapshot_id: str,
        status: str = "failure",
    ) -> None:
        """Report that a source brought no fresh value for a key, whatever the reason.

        The status is ``failure``, ``stale``, ``invalid_timestamp`` (a payload that was rejected),
        ``circuit_open`` (no call at all) or ``absent`` (it answered that there is none, which is no
        failure); the last three have events of their own.
        """
        self.count("source_fetch_total", source=source, status=status)
        told: dict[str, Any] = {"error_type": error, "resource": key, "source": source}
        if status in _OTHER_FAILURES:
            del told["error_type"]
        if status != "absent":
            told["error"] = error
        self.tell(_OTHER_FAILURES.get(status, "source_failed"), **told, snapshot_id=snapshot_id)

    def warm_hits(
        self, keys: Collection[ResourceKey], snapshot_id: str
    ) -> Generator[None, None, None]:
        """Report fresh values served together, in slices: those of one kind are one count."""
        if self._counting:
            kinds: dict[tuple[str, str], int] = {}  # quicker than a Counter of few
            for key in keys:
                kind = key.namespace, key.name
                kinds[kind] = kinds.get(kind, 0) + 1
            for (namespace, name), times in kinds.items():
                kind_of = {"resource_namespace": namespace, "resource_name": name}
                self.count("cache_access_total", None, times, status="fresh", **kind_of)
        for key in keys if self._telling else ():
            facts = {"resource": key, "freshness": "fresh", "snapshot_id": snapshot_id}
            self._hand("event", "emit", ("cache_hit",), facts.items())
            yield

    def cache_failed(self, operation: str, error: Reported) -> None:
        """Report that a cache raised as it was to ``read`` or ``write``; it was done without."""
        self.tell("cache_failed", operation=operation, error_type=error, error=error)

    # Builds and sessions as a whole, and the policies they must meet ---------------------------

    def snapshot_built(self, snapshot: Snapshot, *, build_failed: bool, strict: bool) -> None:
        """Report a finished build; the counts of keys are those of its diagnostics."""
        diagnostics = snapshot.diagnostics
        status = self._count_status("snapshot_build_total", not build_failed)
        self.observe("snapshot_build_latency_ms", diagnostics.duration_ms, status=status)
        self.tell(
            "snapshot_built",
            snapshot_id=snapshot.snapshot_id,
            resources=diagnostics.requested_resources,
            resolved=diagnostics.resolved_resources,
            failed=diagnostics.failed_resources,
            build_failed=build_failed,
            strict=strict,
            diagnostics=diagnostics,
        )

    def session_resolved(self, *, succeeded: bool, latency_ms: float, **facts: Any) -> None:
        """Report a finished ``resolve``; ``succeeded`` unless it is about to raise.

        ``requested``, ``resolved`` and ``failed`` count keys of this call, ``total_resources``
        those of the snapshot that it returned.
        """
        status = self._count_status("snapshot_session_resolve_total", succeeded)
        self.observe("snapshot_session_resolve_latency_ms", latency_ms, status=status)
        self.tell("snapshot_session_resolved", **facts)

    def session_revalidated(self, *, committed: bool, **facts: Any) -> None:
        """Report a finished ``revalidate``; it has succeeded if its values were ``committed``.

        Else the previous ones were retained. ``requested`` counts keys of this call, ``affected``
        these and the pinned ones derived from them, ``refreshed`` and ``failed`` those of them with
        and without a new value.
        """
        self._count_status("snapshot_session_revalidate_total", committed)
        kept = {"committed": committed, "retained_previous": not committed}
        self.tell("snapshot_session_revalidated", **facts, **kept)

    def acceptance_judged(
        self, snapshot_id: str, violations: Collection[SnapshotAcceptanceViolation]
    ) -> None:
        """Report that an acceptance policy lets a snapshot through, or each reason against it."""
        self._count_status("snapshot_acceptance_total", not violations)
        reasons = [violation.reason.value for violation in violations]
        for reason, times in Counter(reasons).items():
            self.count("snapshot_acceptance_violation_total", None, times, reason=reason)
        if reasons:
            told = {"violations": len(reasons), "reasons": tuple(dict.fromkeys(reasons))}
            self.tell("snapshot_acceptance_failed", snapshot_id=snapshot_id, **told)

    def consistency_judged(self, snapshot_id: str, error: SnapshotConsistencyError | None) -> None:
        """Report whether the observations of a snapshot lie close enough together."""
        self._count_status("snapshot_consistency_total", error is None, rule="observation_skew")
        if error is not None:
            self.tell(
                "snapshot_consistency_failed",
                snapshot_id=snapshot_id,
                resources=len(error.keys),
                oldest_resource=error.oldest_key,
                newest_resource=error.newest_key,
                observation_skew_ms=error.observation_skew_seconds * 1e3,
                max_observation_skew_ms=error.max_observation_skew_seconds * 1e3,
            )


_OTHER_FAILURES = {
    "absent": "resource_absent",
    "circuit_open": "source_circuit_open",
    "invalid_timestamp": "source_payload_rejected",
}
"""The statuses of failures that have an event of their own."""


def _error_type_of(error: Reported) -> str:
    return errors.type_name(error) if isinstance(error, BaseException) else error.error_type


def _error_text_of(error: Reported) -> str:
    text = errors.message_of(error) if isinstance(error, BaseException) else error.message
    return errors.folded_message(text)


_FORMS: Mapping[str, Callable[[Any], object]] = {
    **dict.fromkeys(("resource", "oldest_resource", "newest_resource"), attrgetter("display")),
    "error": _error_text_of,
    "error_type": _error_type_of,
    "diagnostics": ReportedDiagnostics.of,
}
"""How the facts of these names are told."""


def reporter_for(
    metrics: MetricsSink, events: EventSink, log: ChangeLog | None = None
) -> Reporter | None:
    """Return the reporter to these sinks, or None if both are null sinks, inside a buffer or not.

    Sinks that raise are named in the ``log``.
    """
    report = Reporter(metrics, events, ChangeLog(silent=True) if log is None else log)
    return report if report.listens else None


def _innermost(sink: MetricsSink | EventSink) -> MetricsSink | EventSink:
    while isinstance(sink, (BufferedMetricsSink, BufferedEventSink)):
        sink = sink.downstream
    return sink


class ObservabilitySinks:
    """The sinks of one builder as it uses them: behind a buffer where they need one.

    Args:
        metrics, events: where these go; None discards them.
        buffer: True for every sink, False for none, None for those that do not say
            ``coalestra_non_blocking = True``. A buffered sink never gets a second buffer.
        max_pending: how many records may wait in each buffer (at least 1).
        overflow: what happens to one more.

    Attributes:
        log: says what begins to fail, and what works again; nothing if the event sink logs it all.
        sink_log: says that of sinks, which no event sink is told of.
        metrics, events: the sinks, buffered or not.
        buffers: every buffered sink by component, ``events`` and ``metrics``.
        owned: those of them that were put there on the builder's behalf, and are its to close.
    """

    __slots__ = ("buffers", "events", "log", "metrics", "owned", "sink_log")

    def __init__(
        self,
        metrics: MetricsSink | None,
        events: EventSink | None,
        *,
        buffer: bool | None = None,
        max_pending: int = DEFAULT_MAX_PENDING,
        overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        validation.flag("buffer_observability", buffer, optional=True)
        self.metrics: MetricsSink = NullMetrics() if metrics is None else metrics
        self.events: EventSink = NullEventSink() if events is None else events
        validation.require_methods("metrics", self.metrics, "increment", "observe", plain=True)
        validation.require_methods("events", self.events, "emit", plain=True)
        self.buffers: dict[str, Buffer] = {}
        self.owned: dict[str, Buffer] = {}
        self.log = self.sink_log = ChangeLog()
        if isinstance(_innermost(self.events), LoggingEventSink):
            self.log = ChangeLog(silent=True)
        limits: dict[str, Any] = {"max_pending": max_pending, "overflow": overflow}
        for name, kind in (("events", BufferedEventSink), ("metrics", BufferedMetricsSink)):
            sink = getattr(self, name)
            blocks = getattr(sink, "coalestra_non_blocking", False) is not True
            if not isinstance(sink, kind) and (blocks if buffer is None else buffer):
                sink = self.owned[name] = kind(sink, **limits)
                setattr(self, name, sink)
            if isinstance(sink, kind):
                self.buffers[name] = sink

    def reporter(self) -> Reporter | None:
        """Return what reports to these sinks, or None if both discard what they get."""
        return reporter_for(self.metrics, self.events, self.sink_log)

    def stats(self) -> dict[str, BufferedSinkStats]:
        """Return the state of every buffered sink, by component."""
        return {name: buffer.stats() for name, buffer in self.buffers.items()}

    async def aclose(
        self, *, timeout_seconds: float | None = 5.0, drain: bool = True
    ) -> dict[str, int]:
        """Close the owned buffers, on a loop, and wait for what is being logged.

        Args:
            timeout_seconds: for all of them together; None waits as long as it takes.
            drain: deliver what is pending instead of discarding it.

        Returns:
            The pending records of each component whose worker still runs; empty if all is done.
            Calling again waits for those.
        """
        for buffer in self.owned.values():
            buffer.queue.refuse(discard=not drain)
        now = asyncio.get_running_loop().time
        end = None if timeout_seconds is None else now() + timeout_seconds

        def left() -> float | None:
            return None if end is None else max(0.0, end - now())

        late = {}
        for name, buffer in self.owned.items():
            if not await buffer.queue.until_ended(left()):
                late[name] = buffer.queue.pending
        if lines := await self.sink_log.end(left(), drain=drain):
            late["log"] = lines
        return late

    def call_after_last_record(self, sink: object, callback: Callable[[], object]) -> bool:
        """Have ``callback`` called once no buffer will hand ``sink`` any more records.

        That happens in the thread of the last worker. Returns False, and forgets the callback, if
        none is at work for the sink now.
        """
        queues = [each.queue for each in self.owned.values() if each.downstream is sink]
        left = [each for each in queues if not each.ended]
        for each in left:  # at the end of one look for that of the next
            callback = partial(each.call_at_end, callback)
        if left:
            callback()
        return bool(left)
