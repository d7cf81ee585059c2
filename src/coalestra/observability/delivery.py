"""A bounded queue from many threads to one worker thread that delivers, in order.

Laws:
    Accepting a record never waits for delivery. Records are delivered one at a time. What a
    delivery raises is counted and goes no further.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from coalestra.core.validation import flag, number
from coalestra.observability.backlog import Backlog, BufferedSinkStats
from coalestra.observability.overflow import BufferOverflowPolicy

R = TypeVar("R")


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
        number("timeout", timeout, minimum=0, optional=True)
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
        number("timeout", timeout, minimum=0, optional=True)
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
