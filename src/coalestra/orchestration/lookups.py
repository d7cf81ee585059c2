"""Where a key is looked for first: what is pinned, then the cache, then a flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from coalestra.core.freshness import FreshnessPolicy, RefreshMode
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.orchestration.cache_reads import CacheReads
from coalestra.orchestration.conclusions import Conclusions, always
from coalestra.orchestration.flights import Acquisition, Gather, Read
from coalestra.orchestration.pins import rests_on
from coalestra.orchestration.readings import Failure, Reading
from coalestra.orchestration.scheduler import Scheduler
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
        self._refresh = refresh
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
        now = self._equipment.clock.now()
        for _ in range(_KEYS_PER_STEP):
            key = next(rest, None)
            if key is None or not gather.open:
                if gather.open:
                    gather.open = False
                    self.conclusions.check(gather)
                self._scheduler.release(gather.work)
                return
            self._look_for(gather, key, now)
        self._scheduler.agenda.add(self._continue, gather, rest)

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
            if revision is None or not self._serve(
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
        read = None if self._equipment.access.store is not None else self.reads.find(key)
        if read is not None:
            read.flight = self._scheduler.board.flights.get(key)

    # The cache --------------------------------------------------------------------------------

    def at_hand(self, work: Work, keys: Sequence[ResourceKey]) -> dict[ResourceKey, Reading]:
        """Return the readings of `keys`, up to the first that the memory cache cannot serve fresh.

        For a few keys this spares everything that waiting would take.
        """
        readings: dict[ResourceKey, Reading] = {}
        store = self._equipment.access.store
        if store is None or len(keys) > _KEYS_PER_STEP:
            return readings
        now = self._equipment.clock.now()
        for key in keys:
            known = store.peek(key)
            if known is None:
                break
            try:
                policy = self._equipment.policies.resolve(key)
            except Exception:
                break
            if now - known.observed_at > policy.ttl_seconds:
                break
            revision = store.find(key, now, policy)
            if revision is None or not self._serve(work, readings, policy, revision, now):
                break
        work.record.cache_batch_reads += len(readings) == len(keys)
        return readings

    def _serve(
        self,
        work: Work,
        readings: dict[ResourceKey, Reading],
        policy: FreshnessPolicy,
        revision: Revision,
        now: float,
    ) -> bool:
        """Take a cached revision if the policy lets a reader have it; schedule a refresh if due."""
        key = revision.key
        age = max(0.0, now - revision.observed_at)
        stale = age > policy.ttl_seconds
        mode = policy.refresh_mode
        notes: dict[str, Any] | None = None
        if stale:
            if mode is not RefreshMode.STALE_WHILE_REVALIDATE or age > policy.max_stale_seconds:
                return False
            notes = {
                "refresh_mode": mode.value,
                "refresh_scheduled": self._refresh(key, mode.value, work),
            }
        elif mode is RefreshMode.REFRESH_AHEAD and policy.should_refresh_ahead(age):
            notes = {"refresh_scheduled": self._refresh(key, mode.value, work)}
        work.record.cache_hits += 1
        if self._equipment.report is not None:
            freshness = mode.value if stale else "fresh"
            self._equipment.report.cache_hit(key, freshness)
        readings[key] = Reading(revision, age, stale=stale, from_cache=True, notes=notes)
        return True

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
            elif revision is not None and self._serve(
                gather.work, gather.readings, read.policy, revision, now
            ):
                self.conclusions.check(gather)
            elif read.flight is not None and _has_value(read.flight):
                settlement = read.flight.settlement
                if settlement is not None:
                    self._scheduler.hand(gather, read.key, settlement, joined=True)
            else:
                self._missed(gather, read.key, read.policy, revision)
                flight = self._scheduler.board.flights.get(read.key)
                if flight is not None:
                    flight.missed = True
                self.conclusions.check(gather)

    def __repr__(self) -> str:
        return f"<Lookups {self.reads!r}>"


def _has_value(flight: Acquisition) -> bool:
    settlement = flight.settlement
    return settlement is not None and settlement.reading is not None


def _is_outdated(gather: Gather, read: Read, revision: Revision | None) -> bool:
    """Whether a derivation would take in what there has been news of since it asked.

    Others may have joined it after the news.
    """
    changed = read.group.changed
    if not changed or gather.owner is None:
        return False
    if revision is None and read.flight is not None and read.flight.settlement is not None:
        reading = read.flight.settlement.reading
        revision = None if reading is None else reading.revision
    return revision is not None and rests_on((revision,), lambda each: each.key in changed)
