"""The scheduler: moves every flight of a builder, and never blocks.

Laws:

1. A key has at most one flight to join. A publication or an invalidation of the key, or a demand
   for a value read from now on, takes the flight out of sight; it then ends for its own waiters.
2. A flight waits for nothing but its own dependencies, and for them without a task, slot or frame.
3. A settled key reaches its waiters in the same step.
4. What a waiter's deadline or cancellation ends is that waiter's waiting, nothing else.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

from coalestra.core.errors import SourceFailure, SourceUnavailableError
from coalestra.core.freshness import FreshnessPolicy
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.core.snapshot import Snapshot
from coalestra.orchestration.agenda import Agenda
from coalestra.orchestration.chains import Link, SourceKind
from coalestra.orchestration.dispatch import Dispatch
from coalestra.orchestration.endings import after_failures
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flight_board import FlightBoard
from coalestra.orchestration.flights import Acquisition, Gather
from coalestra.orchestration.offers import Offers
from coalestra.orchestration.phases import Phase
from coalestra.orchestration.readings import Failed, Failure, Reading, Settlement
from coalestra.orchestration.work import Work

_SETTLED = Phase.SETTLED
_CHOOSING = Phase.CHOOSING
_GATHERING = Phase.GATHERING
_WRITING = Phase.WRITING


class Scheduler:
    """Starts, joins, advances and settles flights.

    `derive` is asked to see to the dependencies of a derived key, `inputs` to make their snapshot,
    `completed` is told of gathers that wait for nothing more, and `abandon` of those that nobody
    wants any longer.
    """

    def __init__(self, equipment: Equipment) -> None:
        self.equipment = equipment
        self.agenda: Agenda = Agenda()
        self.board: FlightBoard = FlightBoard(equipment.report)
        self.dispatch: Dispatch = Dispatch(self, self._not_dispatched)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.offers: Offers = Offers(equipment, self.settle, self.tasks)
        self.hold: Callable[[Work], None] = self.dispatch.hold
        self.release: Callable[[Work], None] = self.dispatch.release
        self.delivered: Callable[[Acquisition, Revision, bool], None] = self.offers.take
        self.derive: Callable[[Acquisition, Link], None]
        self.inputs: Callable[[Acquisition], Awaitable[Snapshot]]
        self.inputs_now: Callable[[Acquisition], Snapshot | None]
        self.completed: Callable[[Gather], None]
        self.abandon: Callable[[Gather], None]

    # Join and leave ---------------------------------------------------------------------------

    def acquire(
        self,
        gather: Gather,
        key: ResourceKey,
        policy: FreshnessPolicy,
        cached: Revision | None = None,
    ) -> None:
        """Let `gather` wait for the flight of `key`; start one if there is none to join."""
        forced = bool(gather.forced) and key in gather.forced
        flight = self.board.flights.get(key)
        if flight is not None and forced and not _serves_forced(flight, gather):
            self.board.hide(flight, cacheable=False)
            flight = None
        if flight is not None:
            if cached is not None:
                flight.cached = cached
            self.board.join(gather, flight)
            return
        flight = Acquisition(key, policy, gather.work, forced=forced)
        flight.cached = cached
        self.board.start(gather, flight)
        self._proceed(flight)

    def acquire_privately(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> None:
        """Let `gather` wait for a derivation of `key` that agrees with its pins."""
        known = gather.pins.private.get(key)
        if known is not None:
            self.board.join(gather, known)
            return
        forced = key in gather.forced
        flight = Acquisition(key, policy, gather.work, forced=forced, pins=gather.pins)
        flight.cacheable = forced
        gather.pins.private[key] = flight
        self.board.set_aside(flight)
        self.board.join(gather, flight)
        self._later(flight)

    def leave(self, gather: Gather, flight: Acquisition) -> None:
        """Let `gather` wait no longer. What nobody waits for is given up, or runs to its bound."""
        self.board.leave(gather, flight)
        if not flight.waiters:
            self.agenda.add(self._unwanted, flight)

    def _unwanted(self, flight: Acquisition) -> None:
        if flight.phase is _SETTLED or flight.waiters:
            return
        if flight.attempt is not None:
            flight.attempt.unwanted()
        elif flight.phase is _WRITING and self.offers.writes.unwanted(flight):
            return
        else:
            self._drop(flight)

    def _drop(self, flight: Acquisition) -> None:
        gather = flight.gather
        error = SourceUnavailableError(f"{flight.key} was given up: nobody waits for it")
        self.settle(flight, Failed(Failure(flight.key, lambda: error)))
        if gather is not None:
            self.abandon(gather)

    # Advance ----------------------------------------------------------------------------------

    def _later(self, flight: Acquisition) -> None:
        """Advance a flight in a step of its own, and hold its work's calls back until then."""
        work = flight.living_sponsor()
        self.dispatch.hold(work)
        self.agenda.add(self._advance, flight, work)

    def _advance(self, flight: Acquisition, work: Work) -> None:
        self._choose(flight)
        self.dispatch.release(work)

    def _choose(self, flight: Acquisition) -> None:
        if flight.phase is _SETTLED:
            return
        if not flight.waiters:
            self._drop(flight)
            return
        flight.phase = _CHOOSING
        flight.gather = None
        self.board.deriving.pop(flight, None)
        self._proceed(flight)

    def _proceed(self, flight: Acquisition) -> None:
        """Send a flight on to the next source of its chain; settle it if there is none."""
        link = self._next_link(flight)
        if link is None or (
            flight.cutoff != math.inf and flight.cutoff <= asyncio.get_running_loop().time()
        ):
            self.settle(flight, after_failures(flight, self.equipment))
        elif link.kind is SourceKind.DERIVED:
            flight.phase = _GATHERING
            self.board.derive(flight)
            self.derive(flight, link)
        else:
            self.dispatch.ready(flight)

    def _next_link(self, flight: Acquisition) -> Link | None:
        chains = self.equipment.chains
        record = flight.sponsor.record
        while flight.position < len(chains.links):
            link = chains.links[flight.position]
            flight.position += 1
            try:
                if chains.supports(link, flight.key, record):
                    flight.link = link
                    return link
            except Exception as error:
                self._note(flight, link, error, "failure", attempts=0)
        return None

    def _not_dispatched(self, flight: Acquisition, error: Exception) -> None:
        self.refused(flight, error, "failure", 0)

    # What attempts report ---------------------------------------------------------------------

    def refused(self, flight: Acquisition, error: Exception, status: str, attempts: int) -> None:
        """Take note that a source failed for a key, and let the key go on to the next one."""
        if flight.link is not None:
            self._note(flight, flight.link, error, status, attempts)
        self._later(flight)

    def _note(
        self, flight: Acquisition, link: Link, error: Exception, status: str, attempts: int
    ) -> None:
        flight.failures += (SourceFailure.of(link.name, error, attempts),)
        if self.equipment.report is not None:
            self.equipment.report.source_failed(flight.key, link.name, error, status)

    def outdated(self, flight: Acquisition, revision: Revision) -> None:
        """Keep a stale value as a candidate, the newest one."""
        known = flight.candidate
        if known is None or known.observed_at < revision.observed_at:
            flight.candidate = revision

    # Settle -----------------------------------------------------------------------------------

    def settle(self, flight: Acquisition, settlement: Settlement) -> None:
        """End a flight, and tell everyone who waits for it."""
        flight.phase = _SETTLED
        flight.settlement = settlement
        flight.gather = flight.attempt = None
        if flight.pins is not None and type(settlement) is Reading:
            flight.pins.setdefault(flight.key, settlement)
        for gather, joined in self.board.take_off(flight).items():
            gather.pending.pop(flight.key, None)
            self.hand(gather, flight.key, settlement, joined)

    def hand(self, gather: Gather, key: ResourceKey, settlement: Settlement, joined: bool) -> None:
        """Give a gather what a flight ended with, and whether it had joined that flight."""
        gather.receive(key, settlement, joined)
        report = self.equipment.report
        if report is not None and key in gather.readings:
            reading = gather.readings[key]
            if reading.fallback is not None:
                report.stale_fallback_used(key, reading.fallback, from_cache=reading.from_cache)
        if not gather.pending and not gather.open:
            self.agenda.add(self.completed, gather)

    def forget(self) -> None:
        """Drop all flights: the event loop that they flew in has ended."""
        self.agenda.clear()
        self.board.clear()
        self.board = FlightBoard(self.equipment.report)
        self.dispatch.workers.clear()
        self.tasks.clear()
        self.offers.writes.forget()

    def __repr__(self) -> str:
        return f"<Scheduler flights={len(self.board.flights)} tasks={len(self.tasks)}>"


def _serves_forced(flight: Acquisition, gather: Gather) -> bool:
    """Whether the value of a flight is sure to be read after this moment, or on the same errand."""
    if flight.event is not None:
        return False
    return not flight.began or (flight.forced and flight.sponsor is gather.work)
