"""The short way to a snapshot: all of it is in the memory cache, fresh, and quickly copied.

Such a unit of work waits for nobody and pins nothing, so it needs neither flights nor readings. It
takes two passes over the keys, one to find the revisions and one to copy them out. As soon as
anything is not that plain, the general way is taken, as if nothing had been tried.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any

from coalestra.cache.entries import EntryStore
from coalestra.concurrency.copying import OFFLOADED
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.seals import PORTION, Seal
from coalestra.core.errors import PayloadCopySubsystemClosedError, PayloadIsolationError
from coalestra.core.freshness import quiet_ages
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.core.values import SnapshotValue
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.readings import Reading
from coalestra.orchestration.work import Work

_KEYS_BETWEEN_LOOKS = 512
_CONTEXT = "snapshot delivery"
_SHARED = Seal.SHARED

Values = FrozenDict[ResourceKey, SnapshotValue[Any]]


class WarmReads:
    """Serves keys from the memory cache alone, all of them or none."""

    __slots__ = ("_equipment",)

    def __init__(self, equipment: Equipment) -> None:
        self._equipment = equipment

    def readings(self, work: Work, keys: Collection[ResourceKey]) -> dict[ResourceKey, Reading]:
        """Return readings of all of a few `keys`, or none if that takes more than looking."""
        store = self._equipment.access.store
        if store is None or len(keys) > _KEYS_BETWEEN_LOOKS or work.expired:
            return {}
        ages = quiet_ages(self._equipment.policies, keys)
        now = self._equipment.clock.now()
        revisions = None if ages is None else store.quiet.find(keys, now, ages)
        if revisions is None:
            return {}
        self._count(store, work, keys)
        return {
            revision.key: Reading(revision, max(0.0, now - revision.observed_at), from_cache=True)
            for revision in revisions
        }

    def likely(self, keys: Iterable[ResourceKey]) -> bool:
        """Whether it is worth a try: whether the first key is cached at all."""
        store = self._equipment.access.store
        return store is not None and next(iter(keys)) in store

    async def values(self, work: Work, keys: Collection[ResourceKey]) -> Values | None:
        """Return a reader's copies of all `keys`, or None if that takes more than looking."""
        store = self._equipment.access.store
        if store is None or work.expired:
            return None
        pace = self._equipment.pace
        pace.begin()
        revisions = await self._find(store, keys, pace)
        if revisions is None:
            return None
        try:
            values = await self._copied(revisions, pace)
        except (PayloadIsolationError, PayloadCopySubsystemClosedError):
            return None
        if values is not None and len(values) > _KEYS_BETWEEN_LOOKS:
            await pace.rest()  # putting them together takes a while, too
        if values is None or work.expired:
            return None
        self._count(store, work, keys)
        return FrozenDict(zip(keys, values, strict=True))

    async def _find(
        self, store: EntryStore, keys: Collection[ResourceKey], pace: Pace
    ) -> list[Revision] | None:
        """Return the revisions of all keys, if each is there, fresh, and due for nothing."""
        clock, policies = self._equipment.clock, self._equipment.policies
        if len(keys) <= _KEYS_BETWEEN_LOOKS:
            ages = quiet_ages(policies, keys)
            return None if ages is None else store.quiet.find(keys, clock.now(), ages)
        found: list[Revision] = []
        rest = iter(keys)
        while part := tuple(islice(rest, _KEYS_BETWEEN_LOOKS)):
            ages = quiet_ages(policies, part)
            some = None if ages is None else store.quiet.find(part, clock.now(), ages)
            if some is None:
                return None
            found += some
            await pace.keep()
        return found

    async def _copied(
        self, revisions: Sequence[Revision], pace: Pace
    ) -> list[SnapshotValue[Any]] | None:
        """Return copies for one reader, or None if one of them takes a thread."""
        copies = self._equipment.copies
        values: list[SnapshotValue[Any]] = []
        left = PORTION
        now = self._equipment.clock.now()
        for revision in revisions:
            payload, seal, metadata = revision.payload, revision.seal, revision.metadata
            if seal is not _SHARED:
                payload = copies.open_now(payload, seal, context=_CONTEXT)
                if payload is OFFLOADED:
                    return None
            if metadata:
                metadata = copies.open_metadata_now(metadata, context=_CONTEXT)
            age = now - revision.observed_at
            values.append(
                revision.presented(payload, metadata, age if age > 0 else 0.0, False, True)
            )
            left -= seal.weight
            if left <= 0:
                left = PORTION
                await pace.keep()
        return values

    def _count(self, store: EntryStore, work: Work, keys: Collection[ResourceKey]) -> None:
        store.quiet.count(keys)
        work.record.cache_hits += len(keys)
        work.record.cache_batch_reads += 1
        report = self._equipment.report
        if report is not None:
            for key in keys:
                report.cache_hit(key, "fresh")

    def __repr__(self) -> str:
        return f"<WarmReads of {self._equipment.access!r}>"
