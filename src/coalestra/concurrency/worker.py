"""One worker thread, and one call on its way through it and back."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable
from typing import Any

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
