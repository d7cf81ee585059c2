"""An event loop in a thread of its own, and how other threads put work on it.

Laws:

1. What was accepted begins, in the order in which it was accepted.
2. The last operation is accepted once; after it nothing is.
3. The thread ends only when every task on its loop has ended, and then closes the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
from concurrent.futures import CancelledError
from typing import Any, TypeVar

from coalestra.core.errors import BuilderClosedError
from coalestra.sync.loop_life import UNWIND_SECONDS, LoopLife
from coalestra.sync.operation import Operation, Work

T = TypeVar("T")


class LoopThread:
    """A daemon thread that runs one event loop for as long as it is needed.

    Args:
        name: the name of the thread.
        owner: what messages call the object that blocks on this thread.

    Raises:
        RuntimeError: if the system cannot start another thread.
    """

    __slots__ = (
        "_active",
        "_last",
        "_life",
        "_lock",
        "_loop",
        "_owner",
        "_process",
        "_thread",
    )

    def __init__(self, *, name: str, owner: str) -> None:
        self._owner = owner
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._last: Operation[Any] | None = None
        self._active: dict[Operation[Any], None] = {}
        self._loop = asyncio.new_event_loop()
        self._life = LoopLife(self._loop)
        self._thread = threading.Thread(target=self._life.live, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._loop.close()
            raise

    @property
    def closing(self) -> bool:
        """Whether the last operation has been accepted."""
        return self._last is not None

    @property
    def finished(self) -> bool:
        """Whether the last operation is over."""
        last = self._last
        return last is not None and last.future.done()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that has the thread."""
        return os.getpid() != self._process

    @property
    def alive(self) -> bool:
        """Whether the thread runs, in this process."""
        return not self.forked and self._thread.is_alive()

    def __repr__(self) -> str:
        return (
            f"<LoopThread {self._thread.name} alive={self.alive} closing={self.closing} "
            f"operations={len(self._active)}>"
        )

    # For other threads ------------------------------------------------------------------------

    def require_this_process(self) -> None:
        """Raise RuntimeError in a fork of the process that has the thread."""
        if self.forked:
            raise RuntimeError(
                f"{self._owner} must be used in the process that made it ({self._process}), got "
                f"process {os.getpid()}; its event loop thread does not survive a fork, so create "
                "a new builder in the forked process"
            )

    def require_usable(self) -> None:
        """Raise RuntimeError if nothing can be accepted: closed, or in a forked process."""
        self.require_this_process()
        if self.closing:
            raise BuilderClosedError(self._owner)

    def require_other_thread(self, call: str) -> None:
        """Raise RuntimeError in the loop's own thread, which would wait for itself for ever."""
        if threading.get_ident() == self._thread.ident and not self.forked:
            raise RuntimeError(
                f"{call} of {self._owner} must not be called on its own event loop thread, got "
                f"{self._thread.name!r}, which would wait for itself for ever; await the async "
                "builder there, or let a calling source run in a worker thread"
            )

    def operation(self, work: Work[T]) -> Operation[T]:
        """Return an operation that has yet to be started."""
        return Operation(self._loop, work)

    def start(self, operation: Operation[Any]) -> None:
        """Accept an operation, to run in a copy of the caller's context.

        Raises:
            RuntimeError: if nothing can be accepted any more; the operation is discarded.
        """
        try:
            self.require_usable()
            with self._lock:
                self.require_usable()
                self._enqueue(operation)
        except BaseException:  # an interrupt may come when it is on its way already
            operation.discard()
            raise

    def run(self, call: str, work: Work[T]) -> T:
        """Do `work` on the loop and wait for it; breaking the wait off cancels the work.

        Args:
            call: what messages call the method that waits, such as ``build()``.
            work: what to do.

        Raises:
            RuntimeError: if nothing can be accepted, in the loop's own thread, or when closing
                cut the work short.
            BaseException: whatever the work raised.
        """
        self.require_other_thread(call)
        operation = self.operation(work)
        try:
            self.start(operation)
            operation.future.exception()
        except CancelledError:
            if self.closing:
                raise BuilderClosedError(self._owner) from None
            raise
        except BaseException:  # this thread was interrupted, by Ctrl-C for instance
            operation.discard()
            raise
        return operation.future.result()

    def finish(self, work: Work[None]) -> Operation[None]:
        """Accept the last operation; return the one accepted first if this is not the first."""
        with self._lock:
            last = self._last
            if last is None:
                last = self._last = self.operation(work)
            # Once is enough, but an interrupt may have come between the two lines.
            if not last.future.done():
                with contextlib.suppress(RuntimeError):  # it has just ended, and the loop with it
                    self._enqueue(last)
            return last

    def join(self) -> bool:
        """Wait for the end of the thread once it was stopped.

        Returns:
            False if tasks remain that ignore their cancellation; the thread ends with them.
        """
        if not self._life.wait_for_end():
            return False
        self._thread.join()
        return True

    def _enqueue(self, operation: Operation[Any]) -> None:
        self._loop.call_soon_threadsafe(self._begin, operation, context=contextvars.copy_context())

    # On the loop ------------------------------------------------------------------------------

    def _begin(self, operation: Operation[Any]) -> None:
        if operation.begin():
            self._active[operation] = None
            operation.call_at_end(lambda: self._active.pop(operation))

    async def drain(self, timeout_seconds: float) -> None:
        """Wait for all operations but the last; cancel those that take longer."""
        working = {
            operation.task: operation
            for operation in self._active
            if operation is not self._last and operation.task is not None
        }
        if not working:
            return
        _, late = await asyncio.wait(working, timeout=timeout_seconds)
        for task in late:
            working[task].future.cancel()
        if late:
            await asyncio.wait(late, timeout=UNWIND_SECONDS)

    def stop(self) -> None:
        """End the thread as soon as every task has ended; those that have not are cancelled."""
        self._life.stop()
