"""Where a key is looked for first: what is pinned, then the cache, then a flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from coalestra.core.freshness import FreshnessPolicy
from coalestra.core.keyed_policies import policy_of_all
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.orchestration.cache_reads import CacheReads
from coalestra.orchestration.conclusions import Conclusions, always
from coalestra.orchestration.flights import Acquisition, Gather, Read
from coalestra.orchestration.pins import rests_on
from coalestra.orchestration.readings import Failure, Reading
from coalestra.orchestration.scheduler import Scheduler
from coalestra.orchestration.serving import Serving
from coalestra.orchestration.work import Work

_KEYS_PER_STEP = 64

_MOST_READS = 8
"""How often a derivation asks an awaited cache for one key while news of it keeps coming."""


class Lookups:
    """Opens gathers, and brings them the readings that need no source.

    `refresh` schedules a background refresh of a key for a reason, and says whether it is a new
    one.
    """

    def __init__(
        self, scheduler: Scheduler, refresh: Callable[[ResourceKey, str, Work], bool]
    ) -> None:
        self._scheduler = scheduler
        self._equipment = scheduler.equipment
        self.serving: Serving = Serving(scheduler.equipment, refresh)
        self._served = self.serving.serve
        self.reads: CacheReads = CacheReads(self._equipment, self._answered, scheduler.tasks)
        self.conclusions: Conclusions = Conclusions(scheduler, self.reads)

    # Open -------------------------------------------------------------------------------------

    def open(self, gather: Gather) -> None:
        """Begin to look for every key of a gather; its `done` is called when all are settled."""
        gather.open = True
        self._scheduler.hold(gather.work)
        keys = gather.keys
        if gather.readings:
            keys = {key: None for key in keys if key not in gather.readings}
        past_cache = gather.forced or gather.refresh
        if keys and self._equipment.access.store is not None and not past_cache:
            gather.work.record.cache_batch_reads += 1
        self._scheduler.agenda.add(self._continue, gather, iter(keys))

    def _continue(self, gather: Gather, rest: Iterator[ResourceKey]) -> None:
        part = tuple(islice(rest, _KEYS_PER_STEP)) if gather.open else ()
        now = self._equipment.clock.now()
        if self._is_plain(gather):
            self._look_in_store(gather, part, now)
        else:
            for key in part:
                self._look_for(gather, key, now)
        if len(part) == _KEYS_PER_STEP:
            self._scheduler.agenda.add(self._continue, gather, rest)
            return
        if gather.open:
            gather.open = False
            self.conclusions.check(gather)
        self._scheduler.release(gather.work)

    def _is_plain(self, gather: Gather) -> bool:
        """Whether the memory cache comes first for every key, and nothing is pinned."""
        if gather.pins or gather.pins.private or gather.forced or gather.refresh:
            return False
        return self._equipment.access.store is not None

    def _look_in_store(self, gather: Gather, keys: Iterable[ResourceKey], now: float) -> None:
        """Do as `_look_for`, in one go, for keys of which nothing can be known yet."""
        policies, store = self._equipment.policies, self._equipment.access.store
        common: FreshnessPolicy | None = policy_of_all(policies)
        acquire, record, report = (
            self._scheduler.acquire,
            gather.work.record,
            self._equipment.report,
        )
        for key in keys:
            try:
                policy = policies.resolve(key) if common is None else common
            except Exception as error:
                gather.failures[key] = Failure(key, always(error))
                continue
            revision = None if store is None else store.find(key, now, policy)
            if revision is None or not self._served(
                gather.work, gather.readings, policy, revision, now
            ):
                record.cache_misses += 1
                if report is not None:
                    report.cache_missed(key)
                acquire(gather, key, policy, revision)

    def _look_for(self, gather: Gather, key: ResourceKey, now: float) -> None:
        if gather.pins:
            pin = gather.pins.get(key)
            if pin is not None:
                gather.readings[key] = pin
                return
        try:
            policy = self._equipment.policies.resolve(key)
        except Exception as error:
            gather.failures[key] = Failure(key, always(error))
            return
        store = self._equipment.access.store
        if key in gather.pins.private:
            self._scheduler.acquire_privately(gather, key, policy)
        elif gather.forced and key in gather.forced:
            if self._equipment.report is not None:
                self._equipment.report.cache_bypassed(key, "force_refresh")
            self._acquire_forced(gather, key, policy)
        elif gather.refresh:
            self._acquire(gather, key, policy)
        elif store is None:
            self._ask_cache(gather, key, policy)
        else:
            revision = store.find(key, now, policy)
            if revision is None or not self._served(
                gather.work, gather.readings, policy, revision, now
            ):
                self._missed(gather, key, policy, revision)

    def _acquire_forced(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> None:
        """Derive privately what must agree with pins; share what only has to be new."""
        if key in gather.private:
            self._scheduler.acquire_privately(gather, key, policy)
        else:
            self._acquire(gather, key, policy)

    def _acquire(
        self,
        gather: Gather,
        key: ResourceKey,
        policy: FreshnessPolicy,
        cached: Revision | None = None,
    ) -> None:
        self._scheduler.acquire(gather, key, policy, cached)
        if self._equipment.access.store is not None:
            return
        read = self.reads.find(key)
        if read is not None:
            read.flight = self._scheduler.board.flights.get(key)

    # The cache ------------------------------------------------------------------------------------

    def _missed(
        self,
        gather: Gather,
        key: ResourceKey,
        policy: FreshnessPolicy,
        cached: Revision | None,
    ) -> None:
        gather.work.record.cache_misses += 1
        if self._equipment.report is not None:
            self._equipment.report.cache_missed(key)
        self._acquire(gather, key, policy, cached)

    def _ask_cache(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> None:
        """Read a cache that has to be awaited, unless a flight has done so in vain."""
        flight = self._scheduler.board.flights.get(key)
        if flight is not None and flight.missed:
            self._missed(gather, key, policy, None)
            return
        read = self.reads.ask(gather, key, policy)
        if flight is not None:
            read.flight = flight

    def _answered(self, read: Read, revision: Revision | None) -> None:
        """Pass on what the cache held: a reading, or the way to the sources."""
        now = self._equipment.clock.now()
        waiters, read.waiters = read.waiters, {}
        for gather in waiters:
            gather.pending.pop(read.key, None)
            if read.rounds < _MOST_READS and _is_outdated(gather, read, revision):
                self.reads.ask(gather, read.key, read.policy).rounds = read.rounds + 1
            elif revision is not None and self._served(
                gather.work, gather.readings, read.policy, revision, now
            ):
                self.conclusions.check(gather)
            elif read.flight is not None and _has_value(read.flight):
                settlement = read.flight.settlement
                if settlement is not None:
                    self._scheduler.hand(gather, read.key, settlement, True)
            else:
                self._missed(gather, read.key, read.policy, revision)
                flight = self._scheduler.board.flights.get(read.key)
                if flight is not None:
                    flight.missed = True
                self.conclusions.check(gather)

    def __repr__(self) -> str:
        return f"<Lookups {self.reads!r}>"


def _has_value(flight: Acquisition) -> bool:
    return isinstance(flight.settlement, Reading)


def _is_outdated(gather: Gather, read: Read, revision: Revision | None) -> bool:
    """Whether a derivation would take in what there has been news of since it asked.

    Others may have joined it after the news.
    """
    changed = read.group.changed
    if not changed or gather.owner is None:
        return False
    if revision is None and read.flight is not None:
        settlement = read.flight.settlement
        revision = settlement.revision if isinstance(settlement, Reading) else None
    return revision is not None and rests_on((revision,), lambda each: each.key in changed)
