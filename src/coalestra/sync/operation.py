"""One piece of work on an event loop, and the future that stands for it in other threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")

Work = Callable[[], Awaitable[T]]
"""An async function that takes nothing, called on the loop."""


class Operation(Generic[T]):
    """Runs `work` as a task once it is told to begin.

    Attributes:
        future: the outcome, for any thread. Cancelling it cancels the task, as long as the task
            has not ended; the future tells its waiters at once, without waiting for the task.
    """

    __slots__ = ("_loop", "_on_end", "_task", "_unclaimed", "_work", "future")

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Work[T]) -> None:
        self.future: Future[T] = Future()
        self._loop = loop
        self._work = work
        self._on_end: list[Callable[[], object]] = []
        # Taken once, in one step, by whoever decides what becomes of the operation.
        self._unclaimed = [True]
        self._task: asyncio.Task[T] | None = None

    @property
    def task(self) -> asyncio.Task[T] | None:
        """The task, once it has begun; for the loop's thread."""
        return self._task

    def call_at_end(self, callback: Callable[[], object]) -> None:
        """Have `callback` called on the loop when the work is over, before the future knows."""
        self._on_end.append(callback)

    def begin(self) -> bool:
        """Start the task, on the loop, once; return False if it was given up before."""
        if not self._claim():
            return False
        self._task = self._loop.create_task(self._perform())
        self._task.add_done_callback(self._task_ended)
        if self.future.cancelled():
            self._task.cancel()  # at once, so that the work never begins
        self.future.add_done_callback(self._future_ended)
        return True

    def discard(self) -> None:
        """Cancel it, from any thread, whether it has begun, is about to begin, or never will."""
        self.future.cancel()
        if self._claim():
            self._tell_end()
            self.future.set_running_or_notify_cancel()

    def _claim(self) -> bool:
        try:
            return self._unclaimed.pop()
        except IndexError:
            return False

    async def _perform(self) -> T:
        if self.future.cancelled():  # while the loop was busy with something else
            raise asyncio.CancelledError
        return await self._work()

    def _future_ended(self, future: Future[T]) -> None:
        """Pass a cancellation on to the task, from whatever thread it comes."""
        task = self._task
        if task is None or not future.cancelled():
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the task has ended
            self._loop.call_soon_threadsafe(task.cancel)

    def _task_ended(self, task: asyncio.Task[T]) -> None:
        self._tell_end()
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            self.future.cancel()
        if not self.future.set_running_or_notify_cancel():
            return
        if error is None:
            self.future.set_result(task.result())
        else:
            self.future.set_exception(error)

    def _tell_end(self) -> None:
        for callback in self._on_end:
            callback()
        self._on_end.clear()

    def __repr__(self) -> str:
        begun = self._task is not None
        return f"<Operation begun={begun} done={self.future.done()}>"
