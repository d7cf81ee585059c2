"""Fetched values on their way to the cache, where they may lose to newer knowledge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.orchestration.cache_writes import CacheWrites
from coalestra.orchestration.endings import after_write, instead_of_event
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.phases import Phase
from coalestra.orchestration.readings import Settlement


class Offers:
    """Offers the value of a flight to the cache, and settles the flight by what came of it.

    `held_back` says whether a value must wait for the end of a publication.
    """

    def __init__(
        self,
        equipment: Equipment,
        settle: Callable[[Acquisition, Settlement], None],
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self._equipment = equipment
        self._settle = settle
        self.writes: CacheWrites = CacheWrites(equipment, self._fit, self._written, tasks)
        self.held_back: Callable[[Acquisition], bool]

    def take(self, flight: Acquisition, revision: Revision, dated: bool) -> None:
        """Take a fresh value of a flight; `dated` if its source said when it was observed."""
        link = flight.link
        report = self._equipment.report
        if report is not None and link is not None:
            report.resource_resolved(revision, link.kind.value)
        flight.phase = Phase.WRITING
        flight.offered = (revision, dated)
        if not self.held_back(flight):
            self.make(flight)

    def make(self, flight: Acquisition) -> None:
        """Write a value to the cache, unless something newer is known of its key."""
        if not self._fit(flight) or flight.offered is None:
            return
        store = self._equipment.access.store
        if store is None:
            self.writes.add(flight)
        else:
            status, current, _ = store.put(flight.offered[0], replace_equal=flight.forced)
            self._written(flight, status, current)

    def _fit(self, flight: Acquisition) -> bool:
        """Whether the value of a flight may be written; if not, the flight ends without that."""
        if flight.offered is None or flight.phase is Phase.SETTLED:
            return False
        revision, dated = flight.offered
        if flight.cacheable and (flight.event is None or dated):
            return True
        self._settle(flight, instead_of_event(flight, revision, self._equipment))
        return False

    def _written(self, flight: Acquisition, status: CacheWriteStatus, current: Revision) -> None:
        if flight.phase is not Phase.SETTLED:
            self._settle(flight, after_write(flight, status, current, self._equipment))

    def __repr__(self) -> str:
        return f"<Offers {self.writes!r}>"
