"""One try of a call: capacity, budget, the call itself, and the instant that cuts it off.

What a try comes to is decided synchronously, in the callback or the line that learns of it; the
worker that awaits the source only acts. So a source that ignores its cancellation delays nobody:
when its time is up its keys go on at once, and only its slot stays taken until it really ends.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, Protocol

from coalestra.concurrency.capacity import CapacityLease
from coalestra.concurrency.deadline import CutOff, CutOffExpired
from coalestra.core.errors import (
    SnapshotDeadlineExceededError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
)
from coalestra.orchestration.answers import Watched
from coalestra.orchestration.chains import Link, SourceKind
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.work import Work

_BATCH, _DERIVED = SourceKind.BATCH, SourceKind.DERIVED


class Shift:
    """A worker's time at a lane, and its task. `gone`: the lane has stopped counting on it."""

    __slots__ = ("busy", "gone", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.busy: bool = False
        self.gone: bool = False


class Caller(Protocol):
    """The attempt that a try belongs to."""

    link: Link
    work: Work
    equipment: Equipment
    flights: dict[Acquisition, None]

    def cutoff(self) -> float:
        """Return the latest instant, on the loop's clock, at which anyone wants an answer."""

    def limit(self, began: float) -> float | None:
        """Return when to cut a call off that `began` then, on the loop's clock."""

    def deadline_comes_first(self, began: float, timeout: float | None) -> bool:
        """Whether a wait that `began` then ends by a deadline rather than by its own timeout."""

    def of_deadline(self) -> str:
        """Return how long the deadline gave, for messages."""

    def refusal(self) -> Exception | None:
        """Return why a blocking call must not be started, as it could outlive its budget."""

    def watch_transport(self, elapsed: float, outcome: str) -> None:
        """Count a blocking call that outlived the transport timeout it declares."""

    def begin(self) -> bool:
        """Take part in the circuits and count the try; False if no key may be called for."""

    def failed(self, this: Try, error: Exception) -> None:
        """Learn that the source was called and failed."""

    def skipped(self, error: Exception) -> None:
        """Learn that the source could not be called."""

    def written_off(self, shift: Shift) -> None:
        """Learn that the worker may take its time to end."""


class Try:
    """One try to call a source for the flights of an attempt.

    `over` is set the moment the outcome is known, which may be before the source has ended.
    """

    __slots__ = (
        "_caller",
        "_cut",
        "_patience",
        "_shift",
        "began",
        "calling",
        "inputs",
        "over",
        "ticks",
    )

    def __init__(self, caller: Caller, shift: Shift) -> None:
        self._caller = caller
        self._shift = shift
        self._cut: CutOff | None = None
        self._patience = math.inf
        self.inputs: tuple[Any, ...] = ()
        self.over: bool = False
        self.calling: bool = False
        self.began: float = math.nan
        self.ticks: float = math.nan

    @property
    def bounded(self) -> bool:
        """Whether the running call ends by itself at some instant."""
        return self.calling and self._caller.limit(self.began) is not None

    @property
    def elapsed_seconds(self) -> float:
        """How long the call has been running, on the builder's clock."""
        return self._caller.equipment.clock.monotonic() - self.ticks

    def extend(self) -> None:
        """Move the instant that cuts the call off: some key is wanted for longer."""
        if self._cut is not None:
            self._cut.move(self._caller.limit(self.began) if self.calling else self._queue_end())

    def abandon(self) -> Exception | None:
        """End the try, as nobody wants its answer; return the error if it waited too long."""
        self.over = True
        queued = self._cut is not None and not self.calling
        if self._shift.task is not None and self._shift.task is not asyncio.current_task():
            self._shift.task.cancel()
        if queued and self._caller.cutoff() <= asyncio.get_running_loop().time():
            return self._late_in_queue()
        return None

    async def answer(self) -> tuple[Any] | None:
        """Return what the source answered, or None if the caller has been told of a failure."""
        caller = self._caller
        lease = caller.equipment.capacity.try_acquire(caller.link.name) or await self._slot()
        if lease is None:
            return None
        try:
            refusal = caller.refusal()
            if refusal is not None:
                caller.skipped(refusal)
            elif caller.begin():
                return await self._call()
            return None
        finally:
            lease.release()

    # Capacity ---------------------------------------------------------------------------------

    async def _slot(self) -> CapacityLease | None:
        """Wait for a lease on the capacity of the source; return None when that took too long."""
        capacity = self._caller.equipment.capacity
        name = self._caller.link.name
        began = asyncio.get_running_loop().time()
        timeout = self._caller.link.queue_timeout_seconds
        self._patience = math.inf if timeout is None else began + timeout
        try:
            with CutOff(self._queue_end()) as self._cut:
                return await capacity.acquire(name)
        except CutOffExpired:
            late = self._caller.cutoff() < self._patience
            self._caller.skipped(self._late_in_queue() if late else self._impatient(timeout))
            return None
        finally:
            self._cut = None
            self._report_wait(began)

    def _queue_end(self) -> float | None:
        end = min(self._patience, self._caller.cutoff())
        return None if end == math.inf else end

    def _report_wait(self, began: float) -> None:
        report = self._caller.equipment.report
        if report is not None:
            waited = asyncio.get_running_loop().time() - began
            report.capacity_wait(self._caller.link.name, waited * 1000)

    def _late_in_queue(self) -> Exception:
        self._report_timeout("snapshot_deadline")
        return SnapshotDeadlineExceededError(
            f"the deadline{self._caller.of_deadline()} passed while waiting for capacity of "
            f"source {self._caller.link.name!r}; raise max_concurrency or the deadline"
        )

    def _impatient(self, timeout: float | None) -> Exception:
        self._caller.equipment.counters.queue_timeouts += 1
        self._report_timeout("queue_timeout")
        return SourceQueueTimeoutError(
            f"waited {timeout:g} s for capacity of source {self._caller.link.name!r}; raise its "
            "max_concurrency, the builder's max_concurrency, or queue_timeout_seconds"
        )

    def _report_timeout(self, reason: str) -> None:
        report = self._caller.equipment.report
        if report is not None:
            report.capacity_timeout(self._caller.link.name, reason)

    # The call ---------------------------------------------------------------------------------

    async def _call(self) -> tuple[Any] | None:
        caller = self._caller
        self.began = asyncio.get_running_loop().time()
        self.ticks = caller.equipment.clock.monotonic()
        self.calling = True
        watched: Watched | None = None
        end = self._caller.limit(self.began)
        try:
            if end is None:
                watched = Watched(caller.link, self._invoke())
                answer = await watched
            else:
                with CutOff(end, self._expire) as self._cut:
                    watched = Watched(caller.link, self._invoke())
                    answer = await watched
        except CutOffExpired:
            return None
        except asyncio.CancelledError:
            if self.over or (watched is not None and watched.interrupted):
                raise
            self._fail(SourceUnavailableError(f"source {caller.link.name!r} cancelled itself"))
            return None
        except Exception as error:
            self._fail(error)
            return None
        finally:
            self.calling = False
            self._cut = None
        if self.over:
            return None
        if caller.link.guarantee.protected:
            caller.watch_transport(self.elapsed_seconds, "completed_late")
        return (answer,)

    def _invoke(self) -> Any:
        caller = self._caller
        link, context = caller.link, caller.work.context
        if link.kind is _BATCH:
            keys = tuple([flight.key for flight in caller.flights])
            return link.source.fetch_many(keys, context)
        key = next(iter(caller.flights)).key
        if link.kind is _DERIVED:
            return link.source.derive(key, *self.inputs, context)
        return link.source.fetch(key, context)

    def _fail(self, error: Exception) -> None:
        if not self.over:
            self.over = True
            self._caller.watch_transport(self.elapsed_seconds, "failed_late")
            self._caller.failed(self, error)

    def _expire(self) -> None:
        """Decide at once what a call that ran out of time comes to; its worker may take longer."""
        if self.over:
            return
        self.over = True
        caller = self._caller
        timeout = caller.link.timeout_seconds
        by_deadline = self._caller.deadline_comes_first(self.began, timeout)
        self._caller.watch_transport(self.elapsed_seconds, "coalestra_timeout")
        caller.written_off(self._shift)
        name = caller.link.name
        if by_deadline:
            error: Exception = SnapshotDeadlineExceededError(
                f"the deadline{self._caller.of_deadline()} passed while source {name!r} was "
                "running; raise the deadline or lower the source timeout"
            )
        else:
            caller.equipment.counters.source_timeouts += 1
            text = f"source {name!r} did not answer within {caller.link.timeout_seconds:g} s"
            error = SourceTimeoutError(text)
        caller.failed(self, error)

    def __repr__(self) -> str:
        return f"<Try {self._caller.link.name} calling={self.calling} over={self.over}>"
