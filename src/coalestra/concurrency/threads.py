"""Worker threads for blocking work, started as needed and kept for a while.

Laws:

1. The threads are daemons: one that hangs does not keep the interpreter from ending. How many work
   at once is bounded by the slots of the callers, not here.
2. Nothing here takes a lock, as signal handlers, finalizers and forks may come between any two
   lines. What has to be atomic is one operation of a dictionary: whoever gets a thread out of
   ``_idle`` may give it work or end it, and nobody else.
3. A call counts as running from before a thread has it until its loop knows that it has ended. It
   ends once, whatever it raises, also if its loop was closed or a fork has lost its thread. If its
   loop was closed before it could hear of the end, whoever looks does so (`hear`).
4. Where no thread can be had, as the system has no more or the interpreter is ending, work that
   must not be lost is done in the thread that asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import itertools
import queue
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Generic, TypeVar

from coalestra._endings import pass_on
from coalestra._lockfree import LONGEST_WAIT_SECONDS, after_fork
from coalestra.core.validation import number

R = TypeVar("R")

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False, repr=False)
class Job(Generic[R]):
    """One call on its way through a thread and back to its loop.

    Attributes:
        label: the name that it is counted under.
        ended: a future that is done once the call has ended.
        error: what the call raised, until it is taken.
    """

    _call: Callable[[], R] | None
    label: str
    _on_end: Callable[[Job[R]], object] | None
    _running: dict[Job[Any], None]
    ended: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    error: BaseException | None = None
    _result: R | None = None
    _reported: bool = False

    def make(self) -> None:
        """Make the call; in the thread."""
        call, self._call = self._call, None
        assert call is not None
        try:
            self._result = call()
        except BaseException as error:
            self.error = error
            del self  # the error leads to this frame, and would keep itself alive through it

    def report(self) -> None:
        """Tell the loop that the call has ended; in the thread."""
        self._reported = True
        try:
            self.ended.get_loop().call_soon_threadsafe(self.end)
        except RuntimeError:
            self.hear()

    def hear(self) -> None:
        """Count the call as ended if it has, but its loop was closed before it could know."""
        if self._reported and self.ended.get_loop().is_closed():
            with contextlib.suppress(BaseException):  # it is nobody's any more
                self.end()

    def end(self) -> None:
        """Count the call as ended, once; on the loop, or anywhere if the loop has been closed."""
        if self._running.pop(self, self) is self:
            return
        try:
            if not self.ended.done() and not self.ended.get_loop().is_closed():
                self.ended.set_result(None)
        finally:
            if self._on_end is not None:
                self._on_end(self)

    def lose(self) -> None:
        """End a call whose thread does not exist in this process."""
        self.error = RuntimeError(f"the thread of {self.label!r} did not survive a fork")
        with contextlib.suppress(RuntimeError):  # its loop may belong to another thread, or to none
            self.end()

    def outcome(self) -> R:
        """Return the result or raise the error, once."""
        error, self.error = self.error, None
        if error is None:
            result, self._result = self._result, None
            return result  # type: ignore[return-value]  # it has been set, if only to None
        try:
            raise error
        finally:
            error = None

    def drop(self) -> None:
        """Let go of an outcome that nobody takes: of no error that ends the program, though."""
        if inspect.iscoroutine(self._result):
            self._result.close()
        if self.error is not None:
            pass_on(self.error)


class _Worker:
    """One thread and its letter box; None in the box ends it."""

    __slots__ = ("_pool", "jobs", "thread")

    def __init__(self, pool: WorkerThreads) -> None:
        self._pool = pool
        self.jobs: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(
            target=self._serve, name=f"coalestra-worker-{next(_numbers)}", daemon=True
        )

    def _serve(self) -> None:
        while True:
            try:
                job = self.jobs.get(timeout=self._pool.wait_seconds)
            except queue.Empty:
                if self._pool.claim(self):
                    return
                continue  # work is on its way
            if job is None:
                return
            job.make()
            # At rest first: who awaits the result and calls again finds this thread free.
            stays = self._pool.rest(self)
            job.report()
            del job
            if not stays:
                return


class WorkerThreads:
    """A cache of daemon threads that run blocking functions for coroutines.

    One without work waits for more for ``idle_seconds``, and ends.
    """

    def __init__(self, *, idle_seconds: float = 10.0) -> None:
        number("idle_seconds", idle_seconds, minimum=0)
        self.wait_seconds: float = min(idle_seconds, LONGEST_WAIT_SECONDS)
        self.closed: bool = False
        self._let_go = False
        self._idle: dict[_Worker, None] = {}
        self._running: dict[Job[Any], None] = {}
        _instances.add(self)

    def forget(self) -> None:
        """Start over without threads, as a forked process must: it has inherited none."""
        running, self._running, self._idle = self._running, {}, {}
        for job in running.copy():
            job.lose()

    @property
    def busy(self) -> Mapping[str, int]:
        """How many calls are at work, by label; a call counts until its caller's loop knows."""
        self.hear()
        return Counter(job.label for job in self._running.copy())

    @property
    def idle(self) -> int:
        """How many threads wait for work."""
        return len(self._idle)

    def __repr__(self) -> str:
        return f"<WorkerThreads busy={dict(self.busy)} idle={self.idle} closed={self.closed}>"

    def hear(self) -> None:
        """Count calls as ended that ended as their loops were being closed."""
        for job in self._running.copy():
            job.hear()

    async def run(
        self, function: Callable[..., R], *arguments: Any, label: str = "", or_here: bool = False
    ) -> R:
        """Run a function in a thread, in a copy of the caller's context, and return its result.

        A thread cannot be stopped. A caller cancelled meanwhile therefore stays here until the
        function has ended, and only then raises `CancelledError`: whatever it holds around this
        call it holds for as long as the thread is at work.

        ``label`` is the name under which `busy` counts it, by default the function's own;
        ``or_here`` lets the function be called here where no thread can be had. Raises RuntimeError
        if the threads are closed, or no thread can be had, or whatever the function raised. What
        ends the program is passed on to it if the caller was cancelled.
        """
        label = label or getattr(function, "__qualname__", type(function).__qualname__)
        job = self.start(partial(function, *arguments), label, or_here=or_here)
        cancellation: asyncio.CancelledError | None = None
        while not job.ended.done():
            try:
                await asyncio.shield(job.ended)
            except asyncio.CancelledError as error:
                # Who ends a program cancels all that there is, and lets callers go: they would wait
                # for ever for a thread that never ends.
                if self._let_go or _loop_is_wound_up():
                    raise
                cancellation = error
        if cancellation is not None:
            try:
                job.drop()
                raise cancellation
            finally:
                cancellation = None
        return job.outcome()

    def start(
        self,
        call: Callable[[], R],
        label: str,
        on_end: Callable[[Job[R]], object] | None = None,
        *,
        or_here: bool = False,
    ) -> Job[R]:
        """Have a call made in a thread, in a copy of the caller's context, and return at once.

        `on_end` is called once, when the call has ended. Raises RuntimeError as `run`; then
        `on_end` is not called.
        """
        if self.closed:
            raise RuntimeError("these worker threads are closed; no more work is accepted")
        job = Job(partial(contextvars.copy_context().run, call), label, on_end, self._running)
        try:
            self._running[job] = None
            self._hand_over(job)
        except BaseException as error:
            if not or_here or not isinstance(error, RuntimeError):
                self._running.pop(job, None)
                raise
            job.make()
            job.end()
        return job

    def _hand_over(self, job: Job[Any]) -> None:
        if sys.is_finalizing():
            raise RuntimeError(f"no thread works for {job.label!r} as the interpreter is ending")
        try:
            worker, _ = self._idle.popitem()
        except KeyError:
            worker = _Worker(self)
            worker.jobs.put(job)
            worker.thread.start()
        else:
            worker.jobs.put(job)

    def end_idle(self) -> None:
        """End the threads without work, and wait for their last few instructions."""
        ended = []
        with contextlib.suppress(KeyError):
            while True:
                worker, _ = self._idle.popitem()
                worker.jobs.put(None)
                ended.append(worker.thread)
        for thread in ended:
            if thread is not threading.current_thread() and not sys.is_finalizing():
                thread.join()

    def let_go(self) -> None:
        """Let callers leave when they are cancelled, though their threads have not ended."""
        self._let_go = True

    def close(self) -> None:
        """Refuse new work and end the threads without any; the others end with their work."""
        self.closed = True
        self.end_idle()

    def rest(self, worker: _Worker) -> bool:
        """Take a worker back; False tells it to end."""
        self._idle[worker] = None
        # Looked at afterwards: closing shuts first and then ends whoever is at rest.
        return not (self.closed and self.claim(worker))

    def claim(self, worker: _Worker) -> bool:
        """Take a worker out of those at rest; False if somebody else was quicker."""
        return self._idle.pop(worker, self) is None


def _loop_is_wound_up() -> bool:
    """Whether the running loop only runs until what ``asyncio.run`` has cancelled on it is over.

    It does so in a function that those have copied who run loops in its manner.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_cancel_all_tasks":
        frame = frame.f_back
    return frame is not None


_instances: weakref.WeakSet[WorkerThreads] = after_fork(WorkerThreads.forget)
_shared = WorkerThreads()

current_threads: contextvars.ContextVar[WorkerThreads | None] = contextvars.ContextVar(
    "coalestra_current_threads", default=None
)
"""The worker threads of whoever calls a source; None for those that the process shares."""


def threads_of_context() -> WorkerThreads:
    """Return the worker threads that blocking work started here shall use."""
    threads = current_threads.get()  # they may have ended before a task that a source has begun
    return _shared if threads is None or threads.closed else threads
