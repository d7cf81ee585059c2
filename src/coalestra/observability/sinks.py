"""The sinks that come with the library: null, in memory, to a logger, and buffers for any other."""

from __future__ import annotations

import enum
import logging
import queue
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from coalestra._lockfree import Cell, WorkerQueue
from coalestra.core import validation
from coalestra.core.errors import SourceFailure
from coalestra.core.frozen import FrozenDict, record
from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.observability.changes import Condition, subject_of, write

__all__ = [
    "BufferOverflowPolicy", "BufferedEventSink", "BufferedMetricsSink", "BufferedSinkStats",
    "EventRecord", "InMemoryMetrics", "LoggingEventSink", "MetricRecord", "MetricsSnapshot",
    "NullEventSink", "NullMetrics", "ObservationSummary",
]  # fmt: skip

B = TypeVar("B", bound="BufferedSink[Any, Any]")
R = TypeVar("R")
S = TypeVar("S")

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

    A failure is an event of ``FAILURES``, and a build or session call in which a key failed or
    that changed nothing. ``levels`` says otherwise for single types of events. A log record has the
    attributes ``event_type`` and ``event_payload`` for structured formatters. Log handlers may
    write to files or networks, so a builder puts this sink behind a buffer unless told otherwise.

    Args:
        logger: where to write; the logger ``coalestra`` by default.
        levels: levels by type of event, as numbers or names that ``logging`` knows; None: not
            logged.
    """

    __slots__ = ("levels", "logger")

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

    __slots__ = ("_counters", "_observations")

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
        kept = self.snapshot()
        counters, observed = len(kept.counters), len(kept.observations)
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


def _note(condition: Condition, error: BaseException | None) -> None:
    """Log that deliveries begin to fail, or work again."""
    if condition.is_news(error is not None, time.monotonic()):
        subject = condition.subject
        write((subject, None if error is None else SourceFailure.of(subject, error)))


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

    @staticmethod
    def _replay(downstream: Any, record: Any) -> None:
        """Give a record to the sink behind this one."""
        raise NotImplementedError

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
            noted=partial(_note, Condition(subject_of(self._kind, downstream))),
        )
        # The worker holds on to the queue but not to this object, so this is reached.
        weakref.finalize(self, self.queue.refuse).atexit = False

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
    """An event sink whose callers never wait for the sink behind it; see `BufferedSink`."""

    _kind, _methods = "event", ("emit",)

    @staticmethod
    def _replay(downstream: EventSink, record: EventRecord) -> None:
        downstream.emit(record.event_type, **record.payload)

    def emit(self, event_type: str, **payload: Any) -> None:
        """Take one event, to be delivered later with the payload it has now."""
        self._put(EventRecord(event_type, payload))


class BufferedMetricsSink(BufferedSink[MetricsSink, MetricRecord]):
    """A metrics sink whose callers never wait for the sink behind it; see `BufferedSink`."""

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
