"""Sinks that hand what they get to another sink in a worker thread, so that nobody waits for it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.validation import require_methods
from coalestra.observability.backlog import BufferedSinkStats
from coalestra.observability.delivery import DeliveryQueue
from coalestra.observability.events import EventRecord
from coalestra.observability.metrics import MetricRecord
from coalestra.observability.overflow import DEFAULT_MAX_PENDING, BufferOverflowPolicy

__all__ = [
    "BufferOverflowPolicy",
    "BufferedEventSink",
    "BufferedMetricsSink",
    "BufferedSink",
    "BufferedSinkStats",
]

R = TypeVar("R")
B = TypeVar("B", bound="BufferedSink[Any]")


class BufferedSink(Generic[R]):
    """What the two buffered sinks have in common: a queue of records, and how to close it.

    As a context manager it closes on the way out, waiting for up to five seconds. One that is
    forgotten without being closed still delivers what it has, then its thread ends.
    """

    coalestra_non_blocking = True

    def __init__(self, queue: DeliveryQueue[R]) -> None:
        self._queue = queue
        # The worker holds on to the queue but not to this object, so this is reached.
        weakref.finalize(self, queue.refuse).atexit = False

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
        return self._queue.flush(timeout)

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
        return self._queue.close(timeout=timeout, drain=drain)

    def refuse(self, *, discard: bool = False) -> None:
        """Begin closing without waiting; ``discard`` drops what is pending."""
        self._queue.refuse(discard=discard)

    def stats(self) -> BufferedSinkStats:
        """Return what has happened so far and what is pending now."""
        return self._queue.stats()

    def __enter__(self: B) -> B:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _described(self, downstream: object) -> str:
        now = self.stats()
        state = "closed" if now.closed else "open"
        return (
            f"<{type(self).__name__} to {type(downstream).__name__} {state} "
            f"pending={now.pending}/{now.max_pending} delivered={now.delivered} "
            f"dropped={now.dropped} failures={now.failures}>"
        )


class BufferedEventSink(BufferedSink[EventRecord]):
    """An event sink whose callers never wait for the sink behind it.

    Args:
        downstream: the sink that gets the events, in a thread, one at a time and in order.
        max_pending: how many events may wait (at least 1).
        overflow: what happens to one more.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``max_pending`` is below 1.
    """

    def __init__(
        self,
        downstream: EventSink,
        *,
        max_pending: int = DEFAULT_MAX_PENDING,
        overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        require_methods("downstream", downstream, "emit")
        self.downstream = downstream
        super().__init__(
            DeliveryQueue(
                functools.partial(_replay_event, downstream),
                max_pending=max_pending,
                overflow=overflow,
                name="coalestra-event-buffer",
            )
        )

    def emit(self, event_type: str, **payload: Any) -> None:
        """Take one event, to be delivered later with the payload it has now.

        Raises:
            queue.Full: there is no room, and the overflow policy is to raise.
        """
        self._queue.put(EventRecord(event_type, payload))

    def __repr__(self) -> str:
        return self._described(self.downstream)


class BufferedMetricsSink(BufferedSink[MetricRecord]):
    """A metrics sink whose callers never wait for the sink behind it.

    Args:
        downstream: the sink that gets the calls, in a thread, one at a time and in order.
        max_pending: how many calls may wait (at least 1).
        overflow: what happens to one more.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``max_pending`` is below 1.
    """

    def __init__(
        self,
        downstream: MetricsSink,
        *,
        max_pending: int = DEFAULT_MAX_PENDING,
        overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        require_methods("downstream", downstream, "increment", "observe")
        self.downstream = downstream
        super().__init__(
            DeliveryQueue(
                functools.partial(_replay_metric, downstream),
                max_pending=max_pending,
                overflow=overflow,
                name="coalestra-metrics-buffer",
            )
        )

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Take one count, to be delivered later.

        Raises:
            queue.Full: there is no room, and the overflow policy is to raise.
        """
        self._queue.put(MetricRecord("increment", metric, value, labels))

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Take one observation, to be delivered later.

        Raises:
            queue.Full: there is no room, and the overflow policy is to raise.
        """
        self._queue.put(MetricRecord("observe", metric, value, labels))

    def __repr__(self) -> str:
        return self._described(self.downstream)


def _replay_event(downstream: EventSink, record: EventRecord) -> None:
    downstream.emit(record.event_type, **record.payload)


def _replay_metric(downstream: MetricsSink, record: MetricRecord) -> None:
    is_count = record.operation == "increment"
    call: Callable[..., None] = downstream.increment if is_count else downstream.observe
    call(record.metric, record.value, **record.labels)
