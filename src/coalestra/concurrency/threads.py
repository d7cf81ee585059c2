"""Worker threads for blocking work, started as needed and kept for a while.

The threads are daemons: one that hangs does not keep the interpreter from ending. How many work
at once is bounded by the slots of the callers, not here.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import os
import queue
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from coalestra.core.validation import number

# One worker thread, and one call on its way through it and back ----------------------------------


_numbers = itertools.count(1)


class Job:
    """One call on its way through a thread and back to its loop."""

    __slots__ = ("_call", "_loop", "_on_end", "done", "error", "result")

    def __init__(
        self,
        call: Callable[[], Any],
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[], None],
    ) -> None:
        self._call: Callable[[], Any] | None = call
        self._loop = loop
        self._on_end = on_end
        self.done: asyncio.Future[None] = loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Make the call; in the thread."""
        call, self._call = self._call, None
        assert call is not None
        try:
            self.result = call()
        except BaseException as error:
            self.error = error

    def report(self) -> None:
        """Tell the loop that the call has ended; in the thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrive)
        except RuntimeError:  # the loop is closed, nobody waits any more
            self._on_end()

    def _arrive(self) -> None:
        self._on_end()
        if not self.done.done():
            self.done.set_result(None)

    def take_error(self) -> BaseException:
        """Hand the error over without keeping it: its traceback would lead back here."""
        error, self.error = self.error, None
        assert error is not None
        return error


class Worker:
    """One thread and its letter box; None in the box ends it."""

    __slots__ = ("_idle_seconds", "_rest", "_retire", "jobs", "thread")

    def __init__(
        self,
        rest: Callable[[Worker], bool],
        retire: Callable[[Worker], bool],
        idle_seconds: float,
    ) -> None:
        self._rest = rest
        self._retire = retire
        self._idle_seconds = idle_seconds
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.thread: threading.Thread = threading.Thread(
            target=self._serve, name=f"coalestra-worker-{next(_numbers)}", daemon=True
        )

    def start(self, job: Job) -> None:
        """Start the thread with its first job."""
        self.jobs.put(job)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                job = self.jobs.get(timeout=self._idle_seconds)
            except queue.Empty:
                if self._retire(self):
                    return
                continue
            if job is None:
                return
            job.run()
            # At rest first: who awaits the result and calls again finds this thread free.
            stays = self._rest(self)
            job.report()
            del job
            if not stays:
                return


# Worker threads for blocking work, started as needed and kept for a while ------------------------


R = TypeVar("R")

_instances: weakref.WeakSet[WorkerThreads] = weakref.WeakSet()


class WorkerThreads:
    """A cache of daemon threads that run blocking functions for coroutines.

    Args:
        idle_seconds: how long a thread without work waits for more before it ends.

    Raises:
        TypeError, ValueError: if `idle_seconds` is not a finite number of at least 0.
    """

    __slots__ = ("__weakref__", "_busy", "_closed", "_idle", "_lock", "idle_seconds")

    def __init__(self, *, idle_seconds: float = 10.0) -> None:
        self.idle_seconds: float = number("idle_seconds", idle_seconds, minimum=0)
        self._closed = False
        self.forget()
        _instances.add(self)

    def forget(self) -> None:
        """Start over without threads, as a forked process must: it has inherited none."""
        self._lock = threading.Lock()
        self._idle: dict[Worker, None] = {}
        self._busy: Counter[str] = Counter()

    @property
    def busy(self) -> Mapping[str, int]:
        """How many calls are at work, by label; a call counts until its caller's loop knows."""
        with self._lock:
            return MappingProxyType(dict(self._busy))

    @property
    def idle(self) -> int:
        """How many threads wait for work."""
        with self._lock:
            return len(self._idle)

    @property
    def closed(self) -> bool:
        """Whether new work is refused."""
        return self._closed

    def __repr__(self) -> str:
        return f"<WorkerThreads busy={dict(self.busy)} idle={self.idle} closed={self._closed}>"

    async def run(self, function: Callable[..., R], *arguments: Any, label: str = "") -> R:
        """Run a function in a thread, in a copy of the caller's context, and return its result.

        A thread cannot be stopped. A caller cancelled meanwhile therefore stays here until the
        function has ended, and only then raises `CancelledError`: whatever it holds around this
        call it holds for as long as the thread is at work.

        Args:
            function: what to run.
            *arguments: what to call it with.
            label: the name under which `busy` counts it; by default the function's own.

        Raises:
            RuntimeError: if the threads are closed, or the system cannot start another one.
            BaseException: whatever the function raised.
        """
        label = label or getattr(function, "__qualname__", type(function).__qualname__)
        call = partial(contextvars.copy_context().run, function, *arguments)
        job = Job(call, asyncio.get_running_loop(), partial(self._ended, label))
        self._assign(job, label)
        await _until_done(job.done)
        if job.error is not None:
            raise job.take_error()
        result: R = job.result
        return result

    def end_idle(self) -> None:
        """End the threads without work, and wait for their last few instructions."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for worker in idle:
            worker.jobs.put(None)
        for worker in idle:
            if worker.thread is not threading.current_thread():
                worker.thread.join()

    def close(self) -> None:
        """Refuse new work and end the threads without any; the others end with their work."""
        self._closed = True
        self.end_idle()

    def _assign(self, job: Job, label: str) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError("these worker threads are closed; no more work is accepted")
            self._busy[label] += 1
            worker = self._idle.popitem()[0] if self._idle else None
        if worker is not None:
            worker.jobs.put(job)
            return

        try:
            Worker(self._rest, self._retire, self.idle_seconds).start(job)
        except BaseException:
            self._ended(label)
            raise

    def _ended(self, label: str) -> None:
        with self._lock:
            self._busy[label] -= 1
            if not self._busy[label]:
                del self._busy[label]

    def _rest(self, worker: Worker) -> bool:
        """Take a worker back; False tells it to end."""
        with self._lock:
            if self._closed:
                return False
            self._idle[worker] = None
            return True

    def _retire(self, worker: Worker) -> bool:
        """Let a worker that waited long enough end, unless work is on its way to it."""
        with self._lock:
            if worker not in self._idle:
                return False
            del self._idle[worker]
            return True


async def _until_done(done: asyncio.Future[None]) -> None:
    """Wait for a future that nobody cancels; a cancellation of the caller has to wait as well."""
    cancellation: asyncio.CancelledError | None = None
    while not done.done():
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError as error:
            cancellation = error
    if cancellation is not None:
        try:
            raise cancellation
        finally:
            cancellation = None


def jobs_in_flight() -> int:
    """Count the calls at work in all worker threads of the process."""
    return sum(sum(threads.busy.values()) for threads in tuple(_instances))


def _forget_all() -> None:
    for threads in tuple(_instances):
        threads.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

_shared = WorkerThreads()

current_threads: contextvars.ContextVar[WorkerThreads | None] = contextvars.ContextVar(
    "coalestra_current_threads", default=None
)
"""The worker threads of whoever calls a source; None for those that the process shares."""


def threads_of_context() -> WorkerThreads:
    """Return the worker threads that blocking work started here shall use."""
    return current_threads.get() or _shared
