"""Sinks that hand what they get to another sink in a worker thread, so that nobody waits for it.

Laws:

1. Accepting a record waits for nothing and holds no lock: signal handlers, finalizers and forked
   children may report wherever they strike.
2. Records leave in the order in which they came, one at a time. Each one ends in exactly one of
   ``delivered``, ``failures`` and ``dropped``, and so does each one that found no room.
3. One at a time is the worker: a thread of the queue's own, or, where no thread can be started,
   whoever flushes or closes. What a delivery raises is counted and goes no further.
4. A record leaves the line only while a turn of the worker is under way, so that whoever looks at
   both misses none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from coalestra._lockfree import Bell, Cell, Changes
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


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """A record in the line, or a turn of the worker: something that can be waited for."""

    record: Any = None
    settled: bool = False


class _Queue(Generic[R]):
    """Takes records from any thread and hands them to ``deliver`` in a thread of its own.

    The thread is a daemon, starts with the first record and ends once the queue is closed and
    empty. In a forked child the queue starts afresh: what was pending is the parent's to deliver.

    Args:
        deliver: takes one record; it may block, and it may raise.
        max_pending: how many records may wait (at least 1); the one in delivery does not. Threads
            that report at the very same time may add one each.
        overflow: what happens to one more.
        name: of the worker thread.
        subject: what the log calls it when deliveries begin to fail.
    """

    def __init__(
        self,
        deliver: Callable[[R], object],
        max_pending: int,
        overflow: BufferOverflowPolicy,
        name: str,
        subject: str,
    ) -> None:
        self._condition = Condition(subject)
        self._max_pending: int = integer("max_pending", max_pending, minimum=1)
        self._overflow: BufferOverflowPolicy = choice("overflow", overflow, BufferOverflowPolicy)
        self._deliver = deliver
        self._name = name
        self._waiting: deque[_Entry] = deque()
        self._refused, self._discarded = Cell(0), Cell(0)
        self._delivered = self._failures = self._disowned = 0
        self._peak = self._shutdown_timeouts = 0
        self._closed = self.ended = self._gone = False
        self._at_end: deque[Callable[[], object]] = deque()
        self.begin_afresh()
        _queues.add(self)

    def begin_afresh(self) -> None:
        """Be without a worker and without pending records, as at first and after a fork."""
        self._disowned += len(self._waiting)
        self._waiting.clear()
        self._turn: _Entry | None = None
        self._thread: threading.Thread | None = None
        # Whoever is the worker stands here, under the one name that the first one takes.
        self._role: dict[str, threading.Thread] = {}
        self._bell = Bell()
        self._changes = Changes()

    # Accepting --------------------------------------------------------------------------------

    def put(self, record: R) -> None:
        """Accept a record, or drop it.

        Raises:
            queue.Full: there is no room, and the policy is to raise.
        """
        full = len(self._waiting) >= self._max_pending
        if self._closed or (full and self._overflow is not BufferOverflowPolicy.DROP_OLDEST):
            self._refused.change(_one_more)
            if not self._closed and self._overflow is BufferOverflowPolicy.RAISE:
                raise queue.Full(
                    f"{self._max_pending} records wait for delivery; raise max_pending, or choose "
                    "an overflow policy that drops"
                )
            return
        self._waiting.append(_Entry(record))
        if full:
            self._drop(down_to=self._max_pending)
        self._peak = max(self._peak, self._pending)
        if "worker" in self._role:
            self._bell.ring()
        else:
            self._start()
        if self.ended:  # closed meanwhile, and the worker has gone
            self._drop(down_to=0)

    def _drop(self, *, down_to: int) -> None:
        """Drop what waited longest until no more than so many records wait."""
        while len(self._waiting) > down_to:
            with contextlib.suppress(IndexError):  # the worker took it
                entry = self._waiting.popleft()
                self._discarded.change(_one_more)
                entry.settled = True
        self._changes.tell()

    def _start(self) -> None:
        """Start a worker thread unless one is on its way, or none can be had."""
        if sys.is_finalizing() or (self._thread is not None and self._thread.is_alive()):
            return
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # records wait for the next try, or for a flush
            self._thread = None

    # Delivering -------------------------------------------------------------------------------

    def _work(self, end: float | None = None, *, stay: bool = True) -> None:
        """Be the worker, unless somebody is: to the end of the queue, or of what is waiting.

        Args:
            end: when to stop, on the monotonic clock.
            stay: whether to wait for more records until the queue is closed.
        """
        role, me = self._role, threading.current_thread()
        if role.setdefault("worker", me) is not me:
            if self._thread is me:  # whoever is the worker starts another one if need be
                self._thread = None
            return
        try:
            while not (self._waiting and end is not None and time.monotonic() >= end):
                if self._deliver_next(is_own_thread=stay):
                    continue
                self.ended = self._closed
                if self.ended and not self._waiting:
                    break
                if not self.ended:
                    if not stay:
                        break
                    self._bell.wait()
        finally:
            if not self.ended:
                role.pop("worker", None)
        if self.ended:
            self._run_callbacks()
            self._gone = True
        elif self._waiting:  # came when this was still the worker
            self._start()
        self._changes.tell()

    def _deliver_next(self, *, is_own_thread: bool) -> bool:
        """Deliver the record that waited longest; return False if there is none."""
        turn = self._turn = _Entry()
        entry = None
        try:
            entry = self._waiting.popleft()
            self._deliver(entry.record)
            self._delivered += 1
            if self._condition.failing:
                self._note(None, is_own_thread)
        except BaseException as error:
            if entry is None:  # the line is empty
                return False
            self._failures += 1
            self._note(error, is_own_thread)
            # In the queue's own thread not even an exit has anybody else to tell.
            if not is_own_thread and isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
        finally:
            for each in (turn, entry):
                if each is not None:
                    each.settled = True
            self._turn = None
            self._changes.tell()
        return True

    def _note(self, error: BaseException | None, is_own_thread: bool) -> None:
        """Log that deliveries begin to fail, or work again."""
        with contextlib.suppress(BaseException if is_own_thread else Exception):
            if self._condition.is_news(error is not None, time.monotonic()):
                subject = self._condition.subject
                write(subject, None if error is None else SourceFailure.of(subject, error))

    def _do_without_thread(self, seconds: float | None) -> None:
        """Deliver in this thread if no other one does or can."""
        if self._thread is None and self._waiting:
            self._start()
        # No other thread runs while the interpreter ends. One that was in the midst of a delivery
        # may hold locks of the sink, so that delivering more could wait for ever.
        gone = sys.is_finalizing() and self._turn is None
        if gone:
            self._role = {}
        if gone or not (self._thread is not None and self._thread.is_alive()):
            self._work(None if seconds is None else time.monotonic() + seconds, stay=False)

    # Waiting and closing ----------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """See `BufferedSink.flush`; the worker, which cannot wait for itself, returns at once."""
        number("timeout", timeout, minimum=0, optional=True)
        unsettled = [each for each in (self._last_waiting(), self._turn) if each is not None]
        if self._is_worker():
            timeout = 0
        else:
            self._do_without_thread(timeout)
        return self._changes.wait_for(lambda: all(each.settled for each in unsettled), timeout)

    def close(self, *, timeout: float | None = 5.0, drain: bool = True) -> bool:
        """See `BufferedSink.close`; always False in the worker thread itself."""
        number("timeout", timeout, minimum=0, optional=True)
        self.refuse(discard=not flag("drain", drain))
        if self._is_worker():
            return False
        self._do_without_thread(timeout)
        return self._note_end(self._changes.wait_for(lambda: self._gone, timeout))

    async def until_ended(self, timeout: float | None) -> bool:
        """See `BufferedSink.until_ended`."""
        self._do_without_thread(timeout)
        return self._note_end(await self._changes.until(lambda: self._gone, timeout))

    def refuse(self, *, discard: bool = False) -> None:
        """Accept no more records, and do not wait; ``discard`` drops what is pending."""
        self._closed = True
        if discard:
            self._drop(down_to=0)
        self._bell.ring()

    def call_at_end(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called after the last record of a closed queue, by its worker."""
        self._at_end.append(callback)
        if self.ended:
            self._run_callbacks()

    def _run_callbacks(self) -> None:
        while self._at_end:
            with contextlib.suppress(BaseException):  # nobody is left to tell
                self._at_end.popleft()()

    def _note_end(self, ended: bool) -> bool:
        if not ended:
            self._shutdown_timeouts += 1
        elif not sys.is_finalizing():
            worker = self._role.get("worker")
            if worker is not None and worker is not threading.current_thread():
                worker.join(1.0)  # it has a few steps left
        return ended

    def _is_worker(self) -> bool:
        return not self.ended and self._role.get("worker") is threading.current_thread()

    def _last_waiting(self) -> _Entry | None:
        try:
            return self._waiting[-1]
        except IndexError:
            return None

    # Looking in -------------------------------------------------------------------------------

    @property
    def _pending(self) -> int:
        return min(len(self._waiting) + (self._turn is not None), self._max_pending)

    def stats(self) -> BufferedSinkStats:
        """Return the counts and the state."""
        while True:  # until nothing moved while they were read
            settled = self._delivered, self._failures, self._discarded.value
            turn, waiting, pending = self._turn, len(self._waiting), self._pending
            if settled == (self._delivered, self._failures, self._discarded.value):
                break
        delivered, failures, discarded = settled
        return BufferedSinkStats(
            enqueued=sum(settled) + self._disowned + waiting + (turn is not None),
            delivered=delivered,
            dropped=discarded + self._refused.value,
            failures=failures,
            pending=pending,
            closed=self._closed,
            max_pending=self._max_pending,
            peak_pending=self._peak,
            worker_alive=not self.ended and not (self._closed and self._thread is None),
            shutdown_timeout_count=self._shutdown_timeouts,
        )


def _one_more(count: int) -> int:
    return count + 1


_queues: weakref.WeakSet[_Queue[Any]] = weakref.WeakSet()


def _begin_all_afresh() -> None:
    for each in list(_queues):
        each.begin_afresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_all_afresh)


B = TypeVar("B", bound="BufferedSink[Any, Any]")
S = TypeVar("S")


class BufferedSink(Generic[S, R]):
    """What the two buffered sinks have in common: a queue of records, and how to close it.

    As a context manager it closes on the way out, waiting for up to five seconds. One that is
    forgotten without being closed still delivers what it has, then its thread ends. Where no
    thread can be started, ``flush`` and ``close`` deliver themselves.
    """

    coalestra_non_blocking = True

    def __init__(
        self,
        kind: str,
        downstream: S,
        deliver: Callable[[R], object],
        max_pending: int,
        overflow: BufferOverflowPolicy,
    ) -> None:
        self.downstream: S = downstream
        name, subject = f"coalestra-{kind}-buffer", subject_of(kind, downstream)
        self._queue: _Queue[R] = _Queue(deliver, max_pending, overflow, name, subject)
        # The worker holds on to the queue but not to this object, so this is reached.
        weakref.finalize(self, self._queue.refuse).atexit = False

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

    async def until_ended(self, timeout: float | None) -> bool:
        """Wait for the worker's end, once records are refused, without blocking the loop.

        Where no thread can be started, what is pending is delivered here.

        Returns:
            Whether it has ended within ``timeout`` seconds (None: however long it takes).
        """
        return await self._queue.until_ended(timeout)

    @property
    def ended(self) -> bool:
        """Whether the sink is closed and nothing will be delivered any more."""
        return self._queue.ended

    def call_at_end(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called after the last record, in the worker's thread (or at once)."""
        self._queue.call_at_end(callback)

    def stats(self) -> BufferedSinkStats:
        """Return what has happened so far and what is pending now."""
        return self._queue.stats()

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
    """An event sink whose callers never wait for the sink behind it.

    Args:
        downstream: the sink that gets the events, in a thread, one at a time and in order.
        max_pending: how many events may wait (at least 1).
        overflow: what happens to one more.
    """

    def __init__(
        self,
        downstream: EventSink,
        *,
        max_pending: int = DEFAULT_MAX_PENDING,
        overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        require_methods("downstream", downstream, "emit")

        def replay(record: EventRecord) -> None:
            downstream.emit(record.event_type, **record.payload)

        super().__init__("event", downstream, replay, max_pending, overflow)

    def emit(self, event_type: str, **payload: Any) -> None:
        """Take one event, to be delivered later with the payload it has now.

        Raises:
            queue.Full: there is no room, and the overflow policy is to raise.
        """
        self._queue.put(EventRecord(event_type, payload))


class BufferedMetricsSink(BufferedSink[MetricsSink, MetricRecord]):
    """A metrics sink whose callers never wait for the sink behind it.

    Args:
        downstream: the sink that gets the calls, in a thread, one at a time and in order.
        max_pending: how many calls may wait (at least 1).
        overflow: what happens to one more.
    """

    def __init__(
        self,
        downstream: MetricsSink,
        *,
        max_pending: int = DEFAULT_MAX_PENDING,
        overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        require_methods("downstream", downstream, "increment", "observe")

        def replay(record: MetricRecord) -> None:
            getattr(downstream, record.operation)(record.metric, record.value, **record.labels)

        super().__init__("metrics", downstream, replay, max_pending, overflow)

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
