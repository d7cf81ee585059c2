"""What flights learn of publications and invalidations that happen while they are under way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from coalestra.cache.write_order import Ranked
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.orchestration.cache_reads import CacheReads
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.pins import rests_on
from coalestra.orchestration.scheduler import Scheduler


class News:
    """Listens to the cache for the scheduler, so that a read never undoes newer knowledge.

    `open` counts, by key, the publications whose outcome is not known yet.
    """

    def __init__(self, scheduler: Scheduler, reads: CacheReads) -> None:
        self._scheduler = scheduler
        self._reads = reads
        self.open: dict[ResourceKey, int] = {}
        self._held: dict[ResourceKey, list[Acquisition]] = {}
        scheduler.offers.news = self

    def revised(self, key: ResourceKey, revision: Revision | None) -> None:
        """Learn of a key's new current revision; one that a flight has written is no news."""
        if revision is not None and self._tell_flights(key, revision):
            return
        self._reads.hide((key,))
        if self._scheduler.board.deriving:
            version = None if revision is None else revision.version
            self._outdate(lambda taken: taken.key == key and taken.version != version)

    def _tell_flights(self, key: ResourceKey, revision: Revision) -> bool:
        """Tell the flights of a key of an event; return whether it is none, but one's own value."""
        board = self._scheduler.board
        flights = board.under_way(key)
        if not flights:
            return False
        if any(each.offered is revision for each in flights):
            return True
        for flight in flights:
            flight.event = revision
            board.hide(flight, cacheable=True)
        return False

    def announced(self, publications: Sequence[Ranked]) -> None:
        """Learn that publications begin: what was fetched meanwhile waits for their outcome."""
        for publication in publications:
            self.open[publication.key] = self.open.get(publication.key, 0) + 1

    def concluded(self, publications: Sequence[Ranked]) -> None:
        """Learn that publications have ended: values held back go to the cache, or give way."""
        for publication in publications:
            key = publication.key
            left = self.open.pop(key, 1) - 1
            if left:
                self.open[key] = left
                continue
            for flight in self._held.pop(key, ()):
                self._scheduler.agenda.add(self._scheduler.offers.make, flight)

    def hold_back(self, flight: Acquisition) -> bool:
        """Keep a fetched value from the cache while a publication of its key is open."""
        if flight.key not in self.open:
            return False
        self._held.setdefault(flight.key, []).append(flight)
        return True

    def invalidating(self, keys: Collection[ResourceKey]) -> None:
        """Learn that keys are invalidated: what was read before is not cached nor joined."""
        for key in keys:
            for flight in self._scheduler.board.under_way(key):
                self._scheduler.board.hide(flight, cacheable=False)
        self._reads.hide(keys)
        gone = frozenset(keys)
        self._outdate(lambda taken: taken.key in gone)

    def invalidating_where(self, matches: Callable[[ResourceKey], bool]) -> None:
        """Learn that all matching keys are invalidated."""
        self.invalidating(self._scheduler.board.matching(matches))
        self._outdate(lambda revision: matches(revision.key))

    def _outdate(self, changed: Callable[[Revision], bool]) -> None:
        """Hide the derivations that have taken in a revision which is no longer current."""
        for flight in tuple(self._scheduler.board.deriving):
            gather = flight.gather
            if gather is not None and gather.readings:
                taken = [reading.revision for reading in gather.readings.values()]
                if rests_on(taken, changed):
                    self._scheduler.board.hide(flight, cacheable=False)

    def __repr__(self) -> str:
        return f"<News open={len(self.open)} held={len(self._held)}>"
