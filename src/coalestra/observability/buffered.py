"""Sinks that hand what they get to another sink in a worker thread, so that nobody waits for it."""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.validation import choice, flag, integer, patience, require_methods
from coalestra.observability.sinks import (
    DEFAULT_MAX_PENDING,
    BufferOverflowPolicy,
    EventRecord,
    MetricRecord,
)

# The records that a buffer has accepted, and what became of them: no thread, lock or clock -------
#
# Laws:
#     Records leave in the order in which they came. Each one that came ends in exactly one of
#     ``delivered``, ``failures`` and ``dropped``, and so does each one that found no room.


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


class Backlog(Generic[R]):
    """A bounded line of records, at most one of them in delivery, with its counts.

    Args:
        max_pending: how many records may wait (at least 1); the one in delivery does not.
        overflow: what happens to one more.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``max_pending`` is below 1.
    """

    __slots__ = (
        "_delivered",
        "_dropped",
        "_enqueued",
        "_failures",
        "_in_delivery",
        "_peak",
        "_waiting",
        "max_pending",
        "overflow",
    )

    def __init__(self, max_pending: int, overflow: BufferOverflowPolicy) -> None:
        self.max_pending: int = integer("max_pending", max_pending, minimum=1)
        self.overflow: BufferOverflowPolicy = choice("overflow", overflow, BufferOverflowPolicy)
        self._waiting: deque[R] = deque()
        # Records are numbered from 1 as they are accepted; 0 stands for none.
        self._in_delivery = 0
        self._enqueued = self._delivered = self._dropped = self._failures = self._peak = 0

    def accept(self, record: R) -> bool:
        """Let a record wait, making room for it if the policy says so.

        Returns:
            Whether it was accepted.

        Raises:
            queue.Full: there is no room, and the policy is to raise.
        """
        if len(self._waiting) >= self.max_pending and not self._make_room():
            return False
        self._waiting.append(record)
        self._enqueued += 1
        self._peak = max(self._peak, self.pending)
        return True

    def _make_room(self) -> bool:
        self._dropped += 1
        if self.overflow is BufferOverflowPolicy.RAISE:
            raise queue.Full(
                f"{self.max_pending} records wait for delivery; raise max_pending, or choose an "
                "overflow policy that drops"
            )
        if self.overflow is BufferOverflowPolicy.DROP_NEWEST:
            return False
        self._waiting.popleft()
        return True

    def turn_away(self) -> None:
        """Count a record that came when none is accepted any more."""
        self._dropped += 1

    def take(self) -> R:
        """Return the record that waited longest; it is in delivery until it is settled."""
        self._in_delivery = self._first_waiting
        return self._waiting.popleft()

    def settle(self, *, failed: bool) -> None:
        """Count what became of the record in delivery."""
        self._in_delivery = 0
        self._failures += failed
        self._delivered += not failed

    def discard(self) -> None:
        """Drop everything that waits."""
        self._dropped += len(self._waiting)
        self._waiting.clear()

    def disown(self) -> None:
        """Forget everything that is pending without counting it: somebody else delivers it."""
        self._waiting.clear()
        self._in_delivery = 0

    @property
    def empty(self) -> bool:
        """Whether no record waits; one may be in delivery."""
        return not self._waiting

    @property
    def newest(self) -> int:
        """The number of the record accepted last."""
        return self._enqueued

    @property
    def oldest_unsettled(self) -> int:
        """The number of the oldest pending record; if there is none, of the next to come."""
        return self._in_delivery or self._first_waiting

    @property
    def pending(self) -> int:
        """How many records take room: those that wait, and the one in delivery while it can."""
        return min(len(self._waiting) + (self._in_delivery > 0), self.max_pending)

    @property
    def _first_waiting(self) -> int:
        return self._enqueued - len(self._waiting) + 1

    def stats(
        self, *, closed: bool, worker_alive: bool, shutdown_timeout_count: int
    ) -> BufferedSinkStats:
        """Return the counts, together with what only the owner of the line knows."""
        return BufferedSinkStats(
            enqueued=self._enqueued,
            delivered=self._delivered,
            dropped=self._dropped,
            failures=self._failures,
            pending=self.pending,
            closed=closed,
            max_pending=self.max_pending,
            peak_pending=self._peak,
            worker_alive=worker_alive,
            shutdown_timeout_count=shutdown_timeout_count,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pending}/{self.max_pending} {self.overflow.value}>"


# A bounded queue from many threads to one worker thread that delivers, in order ------------------
#
# Laws:
#     Accepting a record never waits for delivery. Records are delivered one at a time. What a
#     delivery raises is counted and goes no further.


class DeliveryQueue(Generic[R]):
    """Takes records from any thread and hands them to ``deliver`` in a thread of its own.

    The thread is a daemon, starts with the first record and ends once the queue is closed and
    empty. In a forked child the queue starts afresh: what was pending is the parent's to deliver.

    Args:
        deliver: takes one record; it may block, and it may raise.
        max_pending: how many records may wait (at least 1).
        overflow: what happens to one more.
        name: of the worker thread.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``max_pending`` is below 1.
    """

    def __init__(
        self,
        deliver: Callable[[R], object],
        *,
        max_pending: int,
        overflow: BufferOverflowPolicy,
        name: str,
    ) -> None:
        self._backlog: Backlog[R] = Backlog(max_pending, overflow)
        self._deliver = deliver
        self._name = name
        self._closed = False
        self._shutdown_timeouts = 0
        self.begin_afresh()
        _queues.add(self)

    def begin_afresh(self) -> None:
        """Be without a worker and without pending records, as at first and after a fork."""
        # Reentrant, as the garbage collector may close a queue while its lock is held.
        lock = threading.RLock()
        self._arrived = threading.Condition(lock)
        self._moved = threading.Condition(lock)
        self._worker: threading.Thread | None = None
        self._backlog.disown()

    # Accepting --------------------------------------------------------------------------------

    def put(self, record: R) -> None:
        """Accept a record, or drop it.

        Raises:
            queue.Full: there is no room, and the policy is to raise.
        """
        with self._arrived:
            if self._closed or not self._has_worker():
                self._backlog.turn_away()
            elif self._backlog.accept(record):
                self._arrived.notify()

    def _has_worker(self) -> bool:
        """Start the worker if there is none; return False where no thread can be started."""
        if self._worker is None:
            worker = threading.Thread(target=self._work, name=self._name, daemon=True)
            try:
                worker.start()
            except RuntimeError:
                return False
            self._worker = worker
        return True

    # Delivering, in the worker ------------------------------------------------------------------

    def _work(self) -> None:
        while (record := self._next()) is not None:
            try:
                self._deliver(record)
            # Not even an exit or a cancellation has anybody else in this thread to tell.
            except BaseException:
                self._settle(failed=True)
            else:
                self._settle(failed=False)
            # Do not keep it alive while waiting for the next.
            del record

    def _next(self) -> R | None:
        """Wait for a record; None once the queue is closed and empty."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._closed or not self._backlog.empty)
            return None if self._backlog.empty else self._backlog.take()

    def _settle(self, *, failed: bool) -> None:
        with self._moved:
            self._backlog.settle(failed=failed)
            self._moved.notify_all()

    # Waiting and closing ------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was accepted before this call is settled.

        Args:
            timeout: the longest wait in seconds; None waits as long as it takes.

        Returns:
            Whether it is. In the worker thread, which cannot wait for itself, it returns at once.
        """
        timeout = patience("timeout", timeout)
        with self._moved:
            newest = self._backlog.newest
            if threading.current_thread() is self._worker:
                timeout = 0
            return self._moved.wait_for(lambda: self._backlog.oldest_unsettled > newest, timeout)

    def close(self, *, timeout: float | None = 5.0, drain: bool = True) -> bool:
        """Refuse new records and wait for the worker to end.

        May be called again, to wait longer or to give up draining.

        Args:
            timeout: the longest wait in seconds; None waits as long as it takes. The worker goes
                on when it has passed.
            drain: deliver what is pending; otherwise discard all but the record in delivery.

        Returns:
            Whether the worker has ended; always False in the worker thread itself.
        """
        timeout = patience("timeout", timeout)
        flag("drain", drain)
        worker = self.refuse(discard=not drain)
        if worker is None:
            return True
        if worker is threading.current_thread():
            return False
        worker.join(timeout)
        if not worker.is_alive():
            return True
        with self._moved:
            self._shutdown_timeouts += 1
        return False

    def refuse(self, *, discard: bool = False) -> threading.Thread | None:
        """Accept no more records, and do not wait; return the worker, if there ever was one."""
        with self._arrived:
            self._closed = True
            if discard:
                self._backlog.discard()
                self._moved.notify_all()
            self._arrived.notify_all()
            return self._worker

    def stats(self) -> BufferedSinkStats:
        """Return the counts and the state, all of one moment."""
        with self._moved:
            worker = self._worker
            return self._backlog.stats(
                closed=self._closed,
                worker_alive=not self._closed if worker is None else worker.is_alive(),
                shutdown_timeout_count=self._shutdown_timeouts,
            )

    def __repr__(self) -> str:
        now = self.stats()
        state = "closed" if now.closed else "open"
        return f"<{type(self).__name__} {self._name!r} {state} {now.pending}/{now.max_pending}>"


_queues: weakref.WeakSet[DeliveryQueue[Any]] = weakref.WeakSet()


def _begin_all_afresh() -> None:
    for each in list(_queues):
        each.begin_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all_afresh)


# Sinks that hand what they get to another sink in a worker thread, so that nobody waits for it ----


__all__ = [
    "BufferOverflowPolicy",
    "BufferedEventSink",
    "BufferedMetricsSink",
    "BufferedSink",
    "BufferedSinkStats",
]

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
