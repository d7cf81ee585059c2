"""Sinks that hand what they get to another sink in a worker thread, so that nobody waits for it.

Signal handlers, finalizers and forked children may report wherever they strike; see `WorkerQueue`.
"""

from __future__ import annotations

import dataclasses
import queue
import time
import weakref
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from coalestra._lockfree import WorkerQueue
from coalestra.core.errors import SourceFailure
from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.validation import choice, flag, integer, number, require_methods
from coalestra.observability.changes import Condition, subject_of, write
from coalestra.observability.sinks import (
    DEFAULT_MAX_PENDING,
    BufferOverflowPolicy,
    EventRecord,
    MetricRecord,
)

__all__ = ["BufferedEventSink", "BufferedMetricsSink", "BufferedSinkStats"]


R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
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


B = TypeVar("B", bound="BufferedSink[Any, Any]")
S = TypeVar("S")

_RAISE = BufferOverflowPolicy.RAISE


def _note(condition: Condition, error: BaseException | None) -> None:
    """Log that deliveries begin to fail, or work again."""
    if condition.is_news(error is not None, time.monotonic()):
        subject = condition.subject
        write(subject, None if error is None else SourceFailure.of(subject, error))


class BufferedSink(Generic[S, R]):
    """A sink whose callers never wait for the sink behind it.

    As a context manager it closes on the way out, waiting for up to five seconds. One that is
    forgotten without being closed still delivers what it has, then its thread ends. Where no
    thread can be started, ``flush`` and ``close`` deliver themselves.

    Args:
        downstream: the sink that gets the records, in a thread, one at a time and in order.
        max_pending: how many records may wait (at least 1).
        overflow: what happens to one more.

    Attributes:
        downstream: the sink that gets the records.
        queue: where they wait.
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
        require_methods("downstream", downstream, *self._methods, plain=True)
        self.downstream: S = downstream
        self._raises = choice("overflow", overflow, BufferOverflowPolicy) is _RAISE
        self.queue: WorkerQueue[R] = WorkerQueue(
            partial(self._replay, downstream),
            integer("max_pending", max_pending, minimum=1),
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

        Args:
            timeout: the longest wait in seconds; None waits as long as it takes.

        Returns:
            Whether it has been; a delivery that raised counts as dealt with.

        Raises:
            TypeError: ``timeout`` is not a number.
            ValueError: ``timeout`` is negative or not finite.
        """
        return self.queue.flush(number("timeout", timeout, minimum=0, optional=True))

    def close(self, *, timeout: float | None = 5.0, drain: bool = True) -> bool:
        """Refuse new records (they count as dropped) and wait for the worker thread to end.

        May be called again, to wait longer or to give up draining.

        Args:
            timeout: the longest wait in seconds; None waits as long as it takes. The worker goes
                on with its work when it has passed.
            drain: deliver what is pending; otherwise discard all but the record in delivery.

        Returns:
            Whether the worker has ended.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: ``timeout`` is negative or not finite.
        """
        number("timeout", timeout, minimum=0, optional=True)
        self.queue.refuse(discard=not flag("drain", drain))
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
        """Take one event, to be delivered later with the payload it has now.

        Raises:
            queue.Full: there is no room, and the overflow policy is to raise.
        """
        self._put(EventRecord(event_type, payload))


class BufferedMetricsSink(BufferedSink[MetricsSink, MetricRecord]):
    """A metrics sink whose callers never wait for the sink behind it; see `BufferedSink`."""

    _kind, _methods = "metrics", ("increment", "observe")

    @staticmethod
    def _replay(downstream: MetricsSink, record: MetricRecord) -> None:
        getattr(downstream, record.operation)(record.metric, record.value, **record.labels)

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Take one count, to be delivered later.

        Raises:
            queue.Full: there is no room, and the overflow policy is to raise.
        """
        self._put(MetricRecord("increment", metric, value, labels))

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Take one observation, to be delivered later.

        Raises:
            queue.Full: there is no room, and the overflow policy is to raise.
        """
        self._put(MetricRecord("observe", metric, value, labels))
