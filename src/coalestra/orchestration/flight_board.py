"""The board of flights: who has started one, who waits for it, and who waits for whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from coalestra.concurrency.waits_for import WaitsFor
from coalestra.core.keys import ResourceKey
from coalestra.orchestration.flights import Acquisition, Gather
from coalestra.orchestration.readings import Failure

if TYPE_CHECKING:
    from coalestra.observability.reporting import Reporter


class FlightBoard:
    """Keeps at most one flight per key for newcomers to join, and never lets a cycle in.

    `flights` are those that may be joined; `deriving` those that have dependencies of their own.
    Only these can be part of a cycle, so only who waits for one of them is entered in the relation.
    Flights out of sight, hidden or private, are kept aside: news of their key concerns them too.
    """

    def __init__(self, report: Reporter | None) -> None:
        self._report = report
        self.flights: dict[ResourceKey, Acquisition] = {}
        self.deriving: dict[Acquisition, None] = {}
        self._aside: dict[ResourceKey, dict[Acquisition, None]] = {}
        self._waits: WaitsFor[Acquisition] = WaitsFor()

    def start(self, gather: Gather, flight: Acquisition) -> None:
        """Put up a new flight, and let `gather`, which brought it about, wait for it."""
        key = flight.key
        self.flights[key] = flight
        flight.joinable = True
        flight.waiters[gather] = False
        gather.pending[key] = flight
        unlimited = gather.owner is None and gather.work.deadline is None
        flight.cutoff = math.inf if unlimited else gather.cutoff

    def join(self, gather: Gather, flight: Acquisition) -> None:
        """Let `gather` wait for `flight`; a wait that would close a cycle fails instead."""
        owner = gather.owner
        if owner is not None and flight in self.deriving:
            cycle = self._link(owner, flight)
            if cycle is not None:
                path = tuple(member.key for member in cycle)
                gather.failures[flight.key] = Failure.of_cycle(flight.key, path)
                return
        joined = flight.sponsor is not gather.work
        if joined:
            gather.work.record.coalesced_requests += 1
            if self._report is not None:
                self._report.flight_joined(flight.key)
        flight.waiters[gather] = joined
        gather.pending[flight.key] = flight
        if flight.cutoff != math.inf:
            self.extend(flight, gather.cutoff)

    def derive(self, flight: Acquisition) -> None:
        """Let a flight begin to have dependencies: from now on a cycle can go through it.

        None can yet, as it waits for nobody.
        """
        self.deriving[flight] = None
        for gather in flight.waiters:
            if gather.owner is not None:
                self._link(gather.owner, flight)

    def _link(self, owner: Acquisition, flight: Acquisition) -> tuple[Acquisition, ...] | None:
        owner.linked = flight.linked = True
        return self._waits.add(owner, flight)

    def extend(self, flight: Acquisition, cutoff: float) -> None:
        """Keep a flight, and what it waits for, wanted until `cutoff`."""
        stack = [flight]
        while stack:
            each = stack.pop()
            if cutoff <= each.cutoff:
                continue
            each.cutoff = cutoff
            if each.attempt is not None:
                each.attempt.extend()
            if each.gather is not None:
                stack += [
                    one for one in each.gather.pending.values() if isinstance(one, Acquisition)
                ]

    def leave(self, gather: Gather, flight: Acquisition) -> None:
        """Let `gather` wait no longer."""
        gather.pending.pop(flight.key, None)
        flight.waiters.pop(gather, None)
        if gather.owner is not None and flight.linked:
            self._waits.remove(gather.owner, flight)

    def hide(self, flight: Acquisition, *, cacheable: bool) -> None:
        """Keep newcomers from joining a flight, and from those that wait for its value."""
        stack = [flight]
        seen: set[int] = set()
        while stack:
            each = stack.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if each.joinable:
                each.joinable = False
                del self.flights[each.key]
                self.set_aside(each)
            if not cacheable:
                each.cacheable = False
            stack += [waiter.owner for waiter in each.waiters if waiter.owner is not None]

    def set_aside(self, flight: Acquisition) -> None:
        """Keep a flight that newcomers cannot join, until it ends."""
        self._aside.setdefault(flight.key, {})[flight] = None

    def under_way(self, key: ResourceKey) -> list[Acquisition]:
        """Return every flight of `key`, whether it may be joined or not."""
        flights = list(self._aside.get(key, ())) if self._aside else []
        joinable = self.flights.get(key)
        if joinable is not None:
            flights.append(joinable)
        return flights

    def matching(self, matches: Callable[[ResourceKey], bool]) -> list[ResourceKey]:
        """Return every key with a flight under way for which `matches` is true."""
        return [key for key in {**self.flights, **self._aside} if matches(key)]

    def take_off(self, flight: Acquisition) -> dict[Gather, bool]:
        """Remove a flight that has ended; return who waited for it, and whether they had joined.

        It removes only itself, never a successor under the same key.
        """
        if flight.joinable:
            flight.joinable = False
            del self.flights[flight.key]
        elif flight.key in self._aside:
            self._forget_aside(flight)
        if flight.pins is not None and flight.pins.private.get(flight.key) is flight:
            del flight.pins.private[flight.key]
        if flight.linked:
            self._waits.discard(flight)
        self.deriving.pop(flight, None)
        waiters, flight.waiters = flight.waiters, {}
        return waiters

    def clear(self) -> None:
        """Let go of the flights: should one of them still end, it finds itself taken off."""
        for flight in self.flights.values():
            flight.joinable = False
        self.flights.clear()

    def _forget_aside(self, flight: Acquisition) -> None:
        aside = self._aside[flight.key]
        aside.pop(flight, None)
        if not aside:
            del self._aside[flight.key]

    def __repr__(self) -> str:
        return f"<FlightBoard flights={len(self.flights)} waiting={len(self._waits)}>"
