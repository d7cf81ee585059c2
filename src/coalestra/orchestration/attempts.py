"""One call to one source for one or many keys: circuits, tries, and what becomes of each key."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol

from coalestra.core.errors import (
    SnapshotDeadlineExceededError,
    SourceQueueTimeoutError,
    SourceUnavailableError,
)
from coalestra.core.snapshot import Snapshot
from coalestra.orchestration.admission import Admission
from coalestra.orchestration.answers import CallFacts, values_of
from coalestra.orchestration.budget import Budgeted
from coalestra.orchestration.calls import Shift, Try
from coalestra.orchestration.chains import Link, SourceKind
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.harvest import Harvest, Receiver
from coalestra.orchestration.interest import Interest
from coalestra.orchestration.tally import Tally
from coalestra.orchestration.work import Work
from coalestra.resilience.backoff import retryable
from coalestra.resilience.policies import SourceResiliencePolicy

_NOBODY: frozenset[Acquisition] = frozenset()


class Seat(Protocol):
    """What an attempt needs of the lane that it stands in."""

    link: Link
    work: Work
    tally: Tally

    def again(self, attempt: Any) -> None:
        """Queue the attempt for another try."""

    def write_off(self, shift: Shift) -> None:
        """Stop counting on the worker of a call that was cut off."""


class Desk(Receiver, Protocol):
    """Where an attempt reports what has become of its keys."""

    equipment: Equipment

    def refused(self, flight: Acquisition, error: Exception, status: str, attempts: int) -> None:
        """Take note that the source failed for a key."""

    def inputs(self, flight: Acquisition) -> Awaitable[Snapshot]:
        """Return the dependency snapshot of a derived key."""

    def inputs_now(self, flight: Acquisition) -> Snapshot | None:
        """Return it without waiting, or None if that cannot be."""


class Attempt(Budgeted):
    """A call that carries one key, or a batch of keys, to one source, retries included."""

    __slots__ = (
        "_admission",
        "_desk",
        "_interest",
        "_retry",
        "_seat",
        "_tally",
        "_try",
        "equipment",
        "flights",
        "link",
        "policy",
        "tries",
        "work",
    )

    def __init__(self, desk: Desk, seat: Seat, flights: Sequence[Acquisition]) -> None:
        self._desk = desk
        self._seat = seat
        self.link: Link = seat.link
        self.work: Work = seat.work
        self.equipment: Equipment = desk.equipment
        self.flights: dict[Acquisition, None] = dict.fromkeys(flights)
        self._interest = Interest(self.flights)
        self.policy: SourceResiliencePolicy = desk.equipment.resilience.resolve(
            self.link.name, declared=self.link.declared_resilience
        )
        self._admission = Admission(desk.equipment.breaker, self.link.name, self.policy.circuit)
        self._tally = seat.tally
        self._retry: asyncio.TimerHandle | None = None
        self._try: Try | None = None
        self.tries: int = 0
        for flight in self.flights:
            flight.attempt = self

    # What flights tell the call ---------------------------------------------------------------

    def extend(self) -> None:
        """Give the call more time: a flight of it is now wanted for longer."""
        if self._try is not None:
            self._try.extend()

    def unwanted(self) -> None:
        """End the call if nobody waits for any of its keys and nothing else bounds it.

        A running call that has a bound goes on to it: its value is worth caching, and may still
        find a taker.
        """
        if self._interest.alive:
            return
        if self._try is not None and self._try.bounded:
            return
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        this, self._try = self._try, None
        late = None if this is None else this.abandon()
        self._admission.abandon()
        left = f"nobody waits for source {self.link.name!r} any more"
        self._end(late or SourceUnavailableError(left))

    # One try after the other ------------------------------------------------------------------

    async def run(self, shift: Shift) -> None:
        """Make one try and report on it; return when the source has really ended."""
        self._retry = None
        if not self.flights:
            return
        this = self._try = Try(self, shift)
        try:
            if not self.tries and not self._pass_open_circuits():
                return
            if self.link.kind is SourceKind.DERIVED and not await self._prepare(this):
                return
            answer = await this.answer()
            if answer is not None:
                await self._take(answer[0], this.elapsed_seconds * 1000)
        except asyncio.CancelledError:
            if not this.over:
                this.over = True
                self._admission.abandon()
                self._end(
                    SourceUnavailableError(f"source {self.link.name!r} was cancelled from outside")
                )
                raise
            _absorb_cancellation()
        except Exception as error:
            if not this.over:
                self.skipped(error)
        finally:
            if self._try is this:
                self._try = None

    async def _prepare(self, this: Try) -> bool:
        """Give a derivation its inputs; False if they cannot be had."""
        flight = next(iter(self.flights))
        try:
            inputs = self._desk.inputs_now(flight) or await self._desk.inputs(flight)
        except Exception as error:
            self.skipped(error)
            return False
        this.inputs = (inputs,)
        return True

    def begin(self) -> bool:
        """Take part in the circuits and count the try; False if no key may be called for."""
        if not self.tries:
            for flight in self._admission.enter(tuple(self.flights)):
                self.refuse(flight, self._admission.refusal(flight), "circuit_open")
            if not self.flights:
                return False
            self._tally.called(len(self.flights))
        self.tries += 1
        for flight in self.flights:
            flight.began = True
        return True

    def _pass_open_circuits(self) -> bool:
        """Refuse the keys whose circuit is open now, so that they need not wait for capacity."""
        for flight in self._admission.open_now(tuple(self.flights)):
            self.refuse(flight, self._admission.refusal(flight), "circuit_open")
        return bool(self.flights)

    # How it ends ------------------------------------------------------------------------------

    def written_off(self, shift: Shift) -> None:
        """Let the lane take on another worker in place of this one."""
        self._seat.write_off(shift)

    def failed(self, this: Try, error: Exception) -> None:
        """Decide whether a failed try is followed by another, and arrange for it."""
        if self._try is this:
            self._try = None
        loop = asyncio.get_running_loop()
        self._tally.took((loop.time() - this.began) * 1000)
        retry = self.policy.retry
        if self._interest.alive and self.tries < retry.max_attempts and retryable(error):
            delay = retry.delay_for_attempt(self.tries)
            if delay < self.remaining():
                self.work.record.retries += 1
                self._retry = loop.call_later(delay, self._seat.again, self)
                return
        if isinstance(error, SnapshotDeadlineExceededError):
            self._admission.abandon()
        else:
            self._admission.close(_NOBODY)
        self._end(error)

    def skipped(self, error: Exception) -> None:
        """End the call because the source could not be called, now or again.

        Circuits hear of tries that were made; before the first one they have not been entered.
        """
        self._admission.close(_NOBODY)
        self._end(error)

    def _end(self, error: Exception) -> None:
        """Report one failure for every key of the call."""
        status = "failure"
        if isinstance(error, SnapshotDeadlineExceededError):
            now = asyncio.get_running_loop().time()
            ahead = any(flight.cutoff > now for flight in self.flights)
            self.equipment.counters.deadlines_exceeded += ahead  # if not, the waiters have counted
            status = "deadline_exceeded"
        elif isinstance(error, SourceQueueTimeoutError):
            status = "queue_timeout"
        self._tally.batch_ended(status)
        for flight in tuple(self.flights):
            self.refuse(flight, error, "failure")

    def refuse(self, flight: Acquisition, error: Exception, status: str) -> None:
        """Report that the source has failed for a key."""
        self.flights.pop(flight, None)
        if flight.attempt is self:
            flight.attempt = None
            self._desk.refused(flight, error, status, self.tries)

    async def _take(self, answer: Any, latency_ms: float) -> None:
        self._tally.took(latency_ms)
        flights = tuple(self.flights)
        try:
            values = values_of(self.link, flights, answer)
        except Exception as error:
            self._admission.close(_NOBODY)
            self._end(error)
            return
        self._tally.batch_ended("success")
        facts = CallFacts(self.equipment, self.link, self.tries, latency_ms)
        harvest = Harvest(self, self._desk, facts)
        if len(values) > 1 or not harvest.bring_in_now(flights[0], values[0]):
            await harvest.bring_in(flights, values)
        self._admission.close(harvest.fresh)

    def __repr__(self) -> str:
        return f"<Attempt {self.link.name} keys={len(self.flights)} tries={self.tries}>"


def _absorb_cancellation() -> None:
    """Forget a cancellation that the engine itself asked for, so that the worker can go on."""
    uncancel = getattr(asyncio.current_task(), "uncancel", None)
    if uncancel is not None:
        uncancel()
