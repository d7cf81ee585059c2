"""Fetched values on their way to the cache, where they may lose to newer knowledge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from coalestra.cache.entries import EntryStore
from coalestra.cache.listening import CacheListener
from coalestra.cache.write_order import decide
from coalestra.core.keys import ResourceKey
from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.orchestration.cache_writes import CacheWrites
from coalestra.orchestration.endings import after_write, instead_of_event
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.phases import Phase
from coalestra.orchestration.readings import Settlement

_WRITING = Phase.WRITING
_SETTLED = Phase.SETTLED


class Censor(CacheListener, Protocol):
    """Whoever knows of the publications under way, which are `open`."""

    open: dict[ResourceKey, int]

    def hold_back(self, flight: Acquisition) -> bool:
        """Keep the value of a flight until its time has come; return whether that is so."""


class Offers:
    """Offers the value of a flight to the cache, and settles the flight by what came of it.

    `news` says whether a value must wait for the end of a publication; it need not be told of what
    is written here.
    """

    def __init__(
        self,
        equipment: Equipment,
        settle: Callable[[Acquisition, Settlement], None],
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self._equipment = equipment
        self._settle = settle
        self._store = equipment.access.store
        self.writes: CacheWrites = CacheWrites(equipment, self._fit, self._written, tasks)
        self.news: Censor

    def take(self, flight: Acquisition, revision: Revision, dated: bool) -> None:
        """Take a fresh value of a flight; `dated` if its source said when it was observed."""
        link = flight.link
        report = self._equipment.report
        if report is not None and link is not None:
            report.resource_resolved(revision, link.kind.value)
        flight.phase = _WRITING
        flight.offered = revision
        flight.dated = dated
        if self.news.open and self.news.hold_back(flight):
            return
        store = self._store
        if store is not None and flight.cacheable and flight.event is None:
            self._put(store, flight, revision)
        else:
            self.make(flight)

    def make(self, flight: Acquisition) -> None:
        """Write a value to the cache, unless something newer is known of its key."""
        if not self._fit(flight) or flight.offered is None:
            return
        if self._store is None:
            self.writes.add(flight)
        else:
            self._put(self._store, flight, flight.offered)

    def _put(self, store: EntryStore, flight: Acquisition, revision: Revision) -> None:
        status, current, _ = store.put(revision, replace_equal=flight.forced, teller=self.news)
        self._settle(flight, after_write(flight, status, current, self._equipment))

    def _fit(self, flight: Acquisition) -> bool:
        """Whether the value of a flight may be written; if not, the flight ends without that."""
        if flight.offered is None or flight.phase is _SETTLED:
            return False
        event = flight.event
        if not flight.cacheable or (event is not None and not flight.dated):
            self._settle(flight, instead_of_event(flight, flight.offered, self._equipment))
            return False
        if event is None:
            return True
        # The event counts even if the cache has had to make room and holds it no longer.
        status = decide(flight.offered, event, replace_equal=flight.forced)
        if status is CacheWriteStatus.STORED:
            return True
        held = None if self._store is None else self._store.peek(flight.key)
        self._written(flight, status, held or event)
        return False

    def _written(self, flight: Acquisition, status: CacheWriteStatus, current: Revision) -> None:
        if flight.phase is not _SETTLED:
            self._settle(flight, after_write(flight, status, current, self._equipment))

    def __repr__(self) -> str:
        return f"<Offers {self.writes!r}>"
