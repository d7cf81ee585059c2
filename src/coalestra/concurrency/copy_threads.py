"""One component's copies in threads: how many at once, who waits, how it ends, what it counted.

Laws:

1. At most ``limit`` copies are in threads at a time; the others wait, first come first served.
2. Whoever stops waiting for a copy leaves at once; the slot stays taken until the thread has ended,
   since a thread cannot be stopped.
3. After ``close`` nothing starts; waiters are told so, and ``drain`` waits for what is running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from coalestra.concurrency.deadline import CutOff, CutOffExpired, Deadline
from coalestra.concurrency.threads import WorkerThreads, threads_of_context
from coalestra.concurrency.waiting import WaitQueue
from coalestra.core.errors import PayloadCopySubsystemClosedError, SnapshotDeadlineExceededError

if TYPE_CHECKING:
    from coalestra.core.copy_health import PayloadCopyHealth

T = TypeVar("T")


class Spell:
    """How often something lasted how long, in milliseconds."""

    __slots__ = ("count", "longest_ms", "total_ms")

    def __init__(self) -> None:
        self.count: int = 0
        self.total_ms: float = 0.0
        self.longest_ms: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more, of so many seconds."""
        milliseconds = seconds * 1000.0
        self.count += 1
        self.total_ms += milliseconds
        self.longest_ms = max(self.longest_ms, milliseconds)

    @property
    def average_ms(self) -> float:
        """The mean; 0.0 while there is none."""
        return self.total_ms / self.count if self.count else 0.0


class CopyThreads:
    """Bounded copying in threads, with counters and an orderly end."""

    def __init__(self, component: str, limit: int, threads: WorkerThreads | None = None) -> None:
        """Belong to ``component`` (a name for errors) and run ``limit`` copies at most.

        Without ``threads`` of the component's own, use those of whoever asks for a copy.
        """
        self.component = component
        self.limit = limit
        self._threads = threads
        self.active: int = 0
        self.closed: bool = False
        self._slots = WaitQueue()
        self._drainers = WaitQueue()
        self._running: set[asyncio.Task[None]] = set()
        self._waits = Spell()
        self._durations = Spell()
        self._started = 0
        self._failed = 0
        self._timeouts = 0
        self._capacity_timeouts = 0
        self._peak_active = 0
        self._peak_waiting = 0
        self._shutdown_timeouts = 0
        self._active_at_timeout = 0

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return (
            f"<CopyThreads {self.component!r} {state} active={self.active}/{self.limit} "
            f"waiting={len(self._slots)}>"
        )

    async def run(self, work: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Return what ``work`` returns in a thread.

        Raises:
            PayloadCopySubsystemClosedError: if closed, also while waiting for a slot.
            SnapshotDeadlineExceededError: if the deadline came first, whether in the queue or in
                the thread.
            BaseException: whatever ``work`` raised.
        """
        self.require_open()
        if deadline is None:
            await self._take_slot()
            return await self._start(work)
        has_slot = False
        try:
            if deadline.expired:
                raise CutOffExpired(deadline.loop_time)
            with deadline.cut_off():
                await self._take_slot()
                has_slot = True
                return await self._start(work)
        except CutOffExpired:
            self._timeouts += 1
            self._capacity_timeouts += not has_slot
            raise self._late(deadline, has_slot) from None

    def require_open(self) -> None:
        """Raise ``PayloadCopySubsystemClosedError`` once closed."""
        if self.closed:
            raise PayloadCopySubsystemClosedError(component=self.component)

    def close(self) -> None:
        """Refuse new copies and everybody who waits for a slot; running copies go on."""
        self.closed = True
        self._slots.refuse_all(lambda: PayloadCopySubsystemClosedError(component=self.component))

    async def drain(self, timeout_seconds: float | None) -> int:
        """Wait until no copy runs, ``timeout_seconds`` at most; return how many still do."""
        if self.active:
            loop = asyncio.get_running_loop()
            when = None if timeout_seconds is None else loop.time() + timeout_seconds
            try:
                with CutOff(when):
                    while self.active:
                        await self._drainers.wait(_nothing)
            except CutOffExpired:
                self._note_late_shutdown()
        return self.active

    def health(self, *, run_in_thread: bool, inline: int, inline_failed: int) -> PayloadCopyHealth:
        """Return the state, together with the copies made, and failed, without a thread."""
        from coalestra.core.copy_health import PayloadCopyHealth

        return PayloadCopyHealth(
            run_in_thread=run_in_thread,
            max_concurrency=self.limit,
            active_copies=self.active,
            waiting_for_capacity=len(self._slots),
            peak_active_copies=self._peak_active,
            peak_waiting_for_capacity=self._peak_waiting,
            started_count=self._started + inline + inline_failed,
            completed_count=self._durations.count + inline,
            failure_count=self._failed + inline_failed,
            timeout_count=self._timeouts,
            capacity_timeout_count=self._capacity_timeouts,
            capacity_wait_count=self._waits.count,
            average_wait_ms=self._waits.average_ms,
            max_wait_ms=self._waits.longest_ms,
            average_duration_ms=self._durations.average_ms,
            max_duration_ms=self._durations.longest_ms,
            accepting_copies=not self.closed,
            shutdown_started=self.closed,
            shutdown_complete=self.closed and not self.active,
            shutdown_incomplete=bool(self.closed and self.active and self._shutdown_timeouts),
            shutdown_timeout_count=self._shutdown_timeouts,
            active_at_last_shutdown_timeout=self._active_at_timeout,
        )

    async def _take_slot(self) -> None:
        if self.active < self.limit:
            self.active += 1
        else:
            await self._wait_for_slot()
            if self.closed:
                self._release()
                self.require_open()
        self._peak_active = max(self._peak_active, self.active)

    async def _wait_for_slot(self) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        self._peak_waiting = max(self._peak_waiting, len(self._slots) + 1)
        try:
            await self._slots.wait(self._release)
        finally:
            self._waits.add(clock() - began)

    def _release(self) -> None:
        """Hand the slot on, or put it back and tell those who wait for the end."""
        if not self._slots.wake_next():
            self.active -= 1
            if not self.active:
                self._drainers.wake_all()

    async def _start(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._started += 1
        task = loop.create_task(self._carry(work, result), name=f"coalestra-copy-{self.component}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await result

    async def _carry(self, work: Callable[[], T], result: asyncio.Future[T]) -> None:
        """Stay with one copy until its thread has ended, whether anybody still waits or not."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            threads = threads_of_context() if self._threads is None else self._threads
            value = await threads.run(work, label=f"copy:{self.component}")
        except asyncio.CancelledError:
            self._failed += 1
            result.cancel()
            raise
        except BaseException as error:
            self._failed += 1
            if not result.done():
                result.set_exception(error)
        else:
            self._durations.add(clock() - began)
            if not result.done():
                result.set_result(value)
        finally:
            self._release()

    def _note_late_shutdown(self) -> None:
        if self.active:
            self._shutdown_timeouts += 1
            self._active_at_timeout = self.active

    def _late(self, deadline: Deadline, has_slot: bool) -> SnapshotDeadlineExceededError:
        phase = "was being copied" if has_slot else "waited for a copy thread"
        return SnapshotDeadlineExceededError(
            f"the deadline of {deadline.budget_seconds:g} seconds passed while a payload of "
            f"component {self.component!r} {phase}"
        )


def _nothing() -> None:
    """Nothing is handed over to those who only wait for the end."""
