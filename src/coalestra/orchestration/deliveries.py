"""From sealed readings to what a reader may keep: one isolated copy for each."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from coalestra.cache.store import EntryStore
from coalestra.concurrency.copying import OFFLOADED, PayloadCopies
from coalestra.concurrency.deadline import Deadline
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.sealing import PORTION, Seal
from coalestra.core.errors import (
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    SnapshotDeadlineExceededError,
)
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import quiet_ages
from coalestra.core.values import Revision, SnapshotValue
from coalestra.orchestration.flights import Work
from coalestra.orchestration.parts import Equipment
from coalestra.orchestration.readings import Reading

# From sealed readings to what a reader may keep: one isolated copy for each ----------------------


_CONTEXT = "snapshot delivery"
_SHARED = Seal.SHARED


class Deliveries:
    """Makes the copies that readers get."""

    __slots__ = ("_copies", "_pace")

    def __init__(self, copies: PayloadCopies, pace: Pace) -> None:
        self._copies = copies
        self._pace = pace

    def value_now(self, reading: Reading, context: str) -> SnapshotValue[Any] | None:
        """Return a reader's copy made here and now, or None if it takes a thread."""
        revision = reading.revision
        payload = self._copies.open_now(revision.payload, revision.seal, context=context)
        if payload is OFFLOADED:
            return None
        return self._presented(reading, payload, context)

    def value_here(self, reading: Reading, context: str) -> SnapshotValue[Any]:
        """Return a reader's copy made here and now, however large the payload."""
        value = self.value_now(reading, context)
        if value is not None:
            return value
        revision = reading.revision
        payload = self._copies.open_here(revision.payload, revision.seal, context=context)
        return self._presented(reading, payload, context)

    async def value(
        self, reading: Reading, context: str, deadline: Deadline | None
    ) -> SnapshotValue[Any]:
        """Return a reader's copy, made in a thread if it is large."""
        value = self.value_now(reading, context)
        if value is not None:
            return value
        revision = reading.revision
        payload = await self._copies.open(
            revision.payload, revision.seal, context=context, deadline=deadline
        )
        return self._presented(reading, payload, context)

    async def values(
        self, readings: Mapping[ResourceKey, Reading], deadline: Deadline | None
    ) -> tuple[dict[ResourceKey, SnapshotValue[Any]], dict[ResourceKey, Exception]]:
        """Return copies of many readings, and the error for each that cannot be copied.

        Small ones are copied here, in slices; large ones side by side in threads, within
        `deadline`.
        """
        values: dict[ResourceKey, SnapshotValue[Any]] = {}
        errors: dict[ResourceKey, Exception] = {}
        large: dict[ResourceKey, Reading] = {}
        pace = self._pace
        pace.begin()
        left = PORTION
        for key, reading in readings.items():
            revision = reading.revision
            payload, seal = revision.payload, revision.seal
            try:
                if seal is not _SHARED:
                    payload = self._copies.open_now(payload, seal, context=_CONTEXT)
                if payload is OFFLOADED:
                    large[key] = reading
                elif revision.metadata or reading.notes:
                    values[key] = self._presented(reading, payload, _CONTEXT)
                else:
                    values[key] = revision.presented(
                        payload, EMPTY, reading.age, reading.stale, reading.from_cache
                    )
            except PayloadIsolationError as error:
                errors[key] = error
            left -= seal.weight
            if left <= 0:
                left = PORTION
                if await pace.keep():
                    _require_time(deadline)
        if large:
            await self._large(large, deadline, values, errors)
        return values, errors

    async def _large(
        self,
        readings: Mapping[ResourceKey, Reading],
        deadline: Deadline | None,
        values: dict[ResourceKey, SnapshotValue[Any]],
        errors: dict[ResourceKey, Exception],
    ) -> None:
        """Copy large payloads with as many workers as there are threads for it."""
        rest = iter(readings.items())

        async def work() -> None:
            for key, reading in rest:
                try:
                    values[key] = await self.value(reading, _CONTEXT, deadline)
                except PayloadIsolationError as error:
                    errors[key] = error

        workers = min(len(readings), self._copies.max_concurrency)
        await all_or_none(work() for _ in range(workers))

    def _presented(self, reading: Reading, payload: Any, context: str) -> SnapshotValue[Any]:
        revision = reading.revision
        metadata = revision.metadata
        if metadata:
            metadata = self._copies.open_metadata_now(metadata, context=context)
        if reading.notes:
            metadata = FrozenDict({**metadata, **reading.notes}) if metadata else reading.notes
        return revision.presented(payload, metadata, reading.age, reading.stale, reading.from_cache)


def _require_time(deadline: Deadline | None) -> None:
    if deadline is not None and deadline.expired:
        raise SnapshotDeadlineExceededError(
            f"the deadline of {deadline.budget_seconds:g} s passed while the snapshot was copied"
        )


async def all_or_none(coroutines: Iterable[Any]) -> None:
    """Run coroutines side by side; if one fails or the caller is cancelled, end all and wait."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# The short way to a snapshot: all of it is in the memory cache, fresh, and quickly copied --------
#
# Such a unit of work waits for nobody and pins nothing, so it needs neither flights nor readings.
# It
# takes two passes over the keys, one to find the revisions and one to copy them out. As soon as
# anything is not that plain, the general way is taken, as if nothing had been tried.


_KEYS_BETWEEN_LOOKS = 512

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
