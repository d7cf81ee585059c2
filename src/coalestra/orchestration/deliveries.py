"""From sealed readings to what a reader may keep: one isolated copy for each."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from coalestra.cache.store import EntryStore
from coalestra.concurrency.copying import OFFLOADED
from coalestra.concurrency.deadline import Deadline
from coalestra.concurrency.pace import Pace, Slices, at_once, portions, side_by_side
from coalestra.concurrency.sealing import PORTION, Seal
from coalestra.core.errors import (
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    SnapshotDeadlineExceededError,
)
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import gone_stale, policy_of_all, ttl_of
from coalestra.core.snapshot import FetchContext, Snapshot, snapshot_of
from coalestra.core.values import (
    Dependencies,
    Grounds,
    Revision,
    SnapshotValue,
    dependencies_on,
    new_id,
    redated,
)
from coalestra.orchestration.flights import Parts, Work
from coalestra.orchestration.readings import Reading

_CONTEXT = "snapshot delivery"
DEPENDENCY = "derived dependency"
_SHARED = Seal.SHARED
_FAILED: Any = object()
"""Stands for the copy of what could not be copied."""

Values = FrozenDict[ResourceKey, SnapshotValue[Any]]
Copies = tuple[Values, dict[ResourceKey, Exception]]
"""A reader's copies, and the error for each that there is none of."""

Inputs = tuple[Snapshot, FrozenDict[ResourceKey, str]]
"""What a value is derived from, and the versions of that."""


class Deliveries:
    """Makes the copies that readers get, and tells each how old they are at that moment."""

    __slots__ = ("_clock", "_copies", "_inheriting", "_pace", "_policies")

    def __init__(self, parts: Parts) -> None:
        self._copies = parts.copies
        self._pace = parts.pace
        self._clock = parts.clock
        self._policies = parts.policies
        self._inheriting = parts.chains.inheriting

    def _rests_on(
        self, readings: Iterable[Reading], inherits: bool
    ) -> Slices[FrozenDict[ResourceKey, str]]:
        """Return what a value rests on that is derived from `readings`."""
        until, never = self._until, -math.inf
        inputs = (
            (each.revision, never if each.stale else until(each.revision, each.ttl_seconds))
            for each in readings
        )
        return dependencies_on(inputs, inherits=inherits)

    def _until(self, revision: Revision, ttl: float | None) -> float:
        """Return until when a revision is fresh by itself; see `gone_stale`."""
        if ttl is None:
            ttl = ttl_of(self._policies, revision.key)
        return revision.observed_at + ttl if ttl else math.inf

    def grounds_of(self, revision: Revision) -> Grounds | None:
        """Return what lies below a derived revision; None if it is not known what it rests on.

        One from a cache of one's own does not tell, but is joined to the revisions it rests on.
        """
        stack = [revision] if revision.grounds is None and revision.dependencies else []
        while stack:
            each = stack[-1]
            unknown = [one for one in each.dependencies if one.dependencies and not one.grounds]
            if unknown:
                stack += unknown
                continue
            del stack[-1]
            inputs = [(one, self._until(one, None)) for one in each.dependencies]
            inherits = each.source in self._inheriting
            each.dependency_versions = at_once(dependencies_on(inputs, inherits=inherits))
        return revision.grounds

    def fresh_until(self, revision: Revision) -> float:
        """Return until when all is fresh that a revision inherits its freshness from, if any."""
        if not (self._inheriting and revision.dependency_versions):
            return math.inf
        grounds = self.grounds_of(revision)
        return math.inf if grounds is None else grounds.fresh_until

    def value_here(self, reading: Reading) -> SnapshotValue[Any]:
        """Return a reader's copy made here and now, however large the payload."""
        revision = reading.revision
        payload = self._copies.open_here(revision.payload, revision.seal, context=_CONTEXT)
        return self._presented(reading, payload, _CONTEXT, self._clock.now())

    def at_hand(
        self, readings: Mapping[ResourceKey, Reading], context: str = _CONTEXT
    ) -> Copies | None:
        """Return what `values` would of one reading, or of a few trifles, if it is done at once.

        None if it takes more.
        """
        if len(readings) > PORTION:
            return None
        values: dict[ResourceKey, SnapshotValue[Any]] = {}
        errors: dict[ResourceKey, Exception] = {}
        copies, now = self._copies, None
        for key, reading in readings.items():
            revision = reading.revision
            payload, seal = revision.payload, revision.seal
            try:
                if seal is not _SHARED:
                    if seal.weight < PORTION and copies.is_direct:
                        payload = seal.opener(payload)
                        copies.completed += 1
                    elif len(readings) > 1:
                        return None
                    else:
                        payload = copies.open_now(payload, seal, context=context)
                        if payload is OFFLOADED:
                            return None
                if now is None:
                    now = self._clock.now()
                values[key] = self._presented(reading, payload, context, now)
            except PayloadIsolationError as error:
                errors[key] = error
        return FrozenDict(values), errors

    def alike(self, reading: Reading, number: int) -> list[SnapshotValue[Any]]:
        """Return copies of one trifle for so many readers of this moment; none if it is not one."""
        revision, copies = reading.revision, self._copies
        payload, seal = revision.payload, revision.seal
        if seal.weight >= PORTION or revision.dependency_versions or not copies.is_direct:
            return []
        if type(revision.metadata) is not FrozenDict:
            return []
        opened = [seal.opener(payload) for _ in range(number)]
        copies.completed += 0 if seal is _SHARED else number
        told: Any = self._presented(reading, opened[0], _CONTEXT, self._clock.now())
        facts = told.metadata, told.age_seconds, told.stale, told.from_cache
        return [revision.presented(each, *facts) for each in opened]

    def inputs_at_hand(
        self, context: FetchContext, readings: Mapping[ResourceKey, Reading], *, inherits: bool
    ) -> Inputs | None:
        """Return what `inputs` would, at once; None if it takes more."""
        values, errors = self.at_hand(readings, DEPENDENCY) or (None, None)
        if values is None or errors:
            return None
        inputs = snapshot_of(context.snapshot_id, context.requested_at, values)
        return inputs, at_once(self._rests_on(readings.values(), inherits))

    async def inputs(
        self, context: FetchContext, readings: Mapping[ResourceKey, Reading], *, inherits: bool
    ) -> Inputs:
        """Return the dependencies of a derivation, copied for it alone, and what it rests on.

        Raises:
            PayloadIsolationError: one of them cannot be copied.
        """
        values, errors = await self.values(readings, None, DEPENDENCY)
        if errors:
            raise next(iter(errors.values()))
        inputs = snapshot_of(context.snapshot_id, context.requested_at, values)
        return inputs, await self._pace.through(self._rests_on(readings.values(), inherits))

    async def values(
        self,
        readings: Mapping[ResourceKey, Reading],
        deadline: Deadline | None,
        context: str = _CONTEXT,
    ) -> Copies:
        """Return copies of many readings in their order, and the error for each that has none.

        Small ones are copied here, in slices; large ones side by side in threads. What is not
        copied when `deadline` strikes has that for its error. Ages are those of the moment when
        all has been copied.
        """
        if (copies := self.at_hand(readings, context)) is not None:
            return copies
        opened: list[Any] = []
        errors: dict[ResourceKey, Exception] = {}
        large: list[tuple[int, ResourceKey, Revision]] = []
        open_now, pace, left = self._copies.open_now, self._pace, PORTION
        late: str | None = None
        pace.begin()
        for key, reading in readings.items():
            if late is not None:
                errors[key] = SnapshotDeadlineExceededError(late)
                opened.append(_FAILED)
                continue
            revision = reading.revision
            payload, seal = revision.payload, revision.seal
            if seal is not _SHARED:
                try:
                    payload = open_now(payload, seal, context=context)
                except PayloadIsolationError as error:
                    errors[key], payload = error, _FAILED
                if payload is OFFLOADED:
                    large.append((len(opened), key, revision))
            opened.append(payload)
            left -= seal.weight
            if left <= 0:
                left = PORTION
                if await pace.keep() and deadline is not None and deadline.expired:
                    budget = f"{deadline.budget_seconds:g} s"
                    late = f"the deadline of {budget} passed while the snapshot was copied"
        if large:
            await self._large(large, deadline, context, opened, errors)
        values: dict[ResourceKey, SnapshotValue[Any]] = {}
        now, left = self._clock.now(), PORTION
        for (key, reading), payload in zip(readings.items(), opened, strict=True):
            if payload is _FAILED:
                continue
            try:
                values[key] = self._presented(reading, payload, context, now)
            except PayloadIsolationError as error:
                errors[key] = error
            left -= 1
            if not left:
                left = PORTION
                if await pace.keep():
                    now = self._clock.now()
        return FrozenDict(values), errors

    async def _large(
        self,
        large: Sequence[tuple[int, ResourceKey, Revision]],
        deadline: Deadline | None,
        context: str,
        opened: list[Any],
        errors: dict[ResourceKey, Exception],
    ) -> None:
        """Copy large payloads with as many workers as there are threads for it."""

        async def copy(one: tuple[int, ResourceKey, Revision]) -> None:
            index, key, revision = one
            opened[index] = _FAILED
            try:
                opened[index] = await self._copies.open(
                    revision.payload, revision.seal, context=context, deadline=deadline
                )
            except (PayloadIsolationError, SnapshotDeadlineExceededError) as error:
                errors[key] = error

        await side_by_side(large, copy, self._copies.max_concurrency)

    def _presented(
        self, reading: Reading, payload: Any, context: str, now: float
    ) -> SnapshotValue[Any]:
        """Return what a reader gets, with the age and staleness of this moment."""
        revision, notes = reading.revision, reading.notes
        metadata, versions = revision.metadata, revision.dependency_versions
        if type(metadata) is not FrozenDict:
            metadata = self._copies.open_metadata_now(metadata, context=context)
        if notes:
            metadata = FrozenDict({**metadata, **notes} if metadata else notes)
        age, ttl, stale = now - revision.observed_at, reading.ttl_seconds, reading.stale
        if not stale and (ttl is None or age > ttl):
            stale = gone_stale(age, ttl_of(self._policies, revision.key) if ttl is None else ttl)
        if versions:
            if type(versions) is Dependencies:
                grounds: Grounds | None = versions.grounds
            else:
                grounds = self.grounds_of(revision)
            if grounds is not None and grounds.inherited_at is not None:
                at = min(revision.observed_at, grounds.inherited_at)
                age, stale = max(now - at, 0.0), stale or now > grounds.fresh_until
                value = revision.presented(payload, metadata, age, stale, reading.from_cache)
                return redated(value, at)
        age = age if age > 0.0 else 0.0
        return revision.presented(payload, metadata, age, stale, reading.from_cache)


_KEYS_BETWEEN_LOOKS = 512
_KEYS_AT_ONCE = 4_096
"""What is looked up in one go; more of it too, if it is written to meanwhile."""


class WarmReads:
    """Serves keys from the memory cache alone, all of them or none.

    Such a unit of work waits for nobody and pins nothing, so it needs neither flights nor readings;
    for a few keys there is none at all. As soon as anything is not that plain, the general way is
    taken, as if nothing had been tried.
    """

    __slots__ = ("_parts",)

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def snapshot(
        self, keys: Collection[ResourceKey], snapshot_id: str | None = None, *, strict: bool | None
    ) -> Snapshot | None:
        """Return a snapshot of a few keys at once, or None if that takes more than looking.

        So it does if anybody follows what is done. Its end is reported as that of a `strict` build
        or another; None: it is yet to be judged.
        """
        parts = self._parts
        copies, clock, store = parts.copies, parts.clock, parts.access.store
        if store is None:
            store = parts.access.near
        if store is None or len(keys) > PORTION or not copies.is_direct or not parts.tracing.off:
            return None
        began, now = clock.monotonic(), clock.now()
        revisions = store.find_all_fresh(keys, now, parts.policies)
        if revisions is None:
            return None
        values = {}
        for key, revision in zip(keys, revisions):  # noqa: B905
            payload, seal, metadata = revision.payload, revision.seal, revision.metadata
            if type(metadata) is not FrozenDict:
                return None
            if seal is not _SHARED:
                if seal.weight < PORTION:
                    payload = seal.opener(payload)
                    copies.completed += 1
                elif len(keys) > 1:
                    return None
                else:
                    try:
                        payload = copies.open_now(payload, seal, context=_CONTEXT)
                    except PayloadIsolationError:
                        return None
                    if payload is OFFLOADED:
                        return None
            age = now - revision.observed_at
            values[key] = revision.presented(
                payload, metadata, age if age > 0 else 0.0, False, True
            )
        store.count_fresh(revisions)
        counted = {
            "duration_ms": (clock.monotonic() - began) * 1000,
            "cache_hits": len(values),
            "cache_batch_reads": 1,
        }
        made = snapshot_of(snapshot_id or new_id(), now, FrozenDict(values), EMPTY, counted)
        report = parts.report
        if report is not None:
            report.tell("snapshot_started", kind="build", snapshot_id=made.snapshot_id)
            at_once(report.warm_hits(keys, made.snapshot_id))
            if strict is not None:
                report.snapshot_built(made, build_failed=False, strict=strict)
        return made

    def readings(self, work: Work, keys: Collection[ResourceKey]) -> dict[ResourceKey, Reading]:
        """Return readings of all of a few `keys`, or none if that takes more than looking."""
        store = self._parts.access.near
        if store is None or len(keys) > _KEYS_BETWEEN_LOOKS or work.expired:
            return {}
        policies = self._parts.policies
        revisions = store.find_all_fresh(keys, self._parts.clock.now(), policies)
        if revisions is None:
            return {}
        at_once(self._counted(store, work, keys, revisions))
        common = policy_of_all(policies)
        ttl = None if common is None else common.ttl_seconds
        return {revision.key: Reading(revision, ttl, True) for revision in revisions}

    def likely(self, keys: Iterable[ResourceKey]) -> bool:
        """Whether it is worth a try: not if the first key is missing, or copies may be slow."""
        store = self._parts.access.store
        if not self._parts.copies.uses_default_copier:
            return False
        return store is None or next(iter(keys)) in store

    async def values(self, work: Work, keys: Collection[ResourceKey]) -> Values | None:
        """Return a reader's copies of all `keys`, or None if that takes more than looking."""
        store = self._parts.access.near
        if store is None or work.expired:
            return None
        pace, clock, policies = self._parts.pace, self._parts.clock, self._parts.policies
        pace.begin()
        revisions: list[Revision] = []
        size, state = _KEYS_AT_ONCE, None
        while state != store.state:  # else somebody has written in between
            revisions, state = [], store.state
            for part in portions(keys, size):
                if revisions:
                    await pace.keep()
                found = store.find_all_fresh(part, clock.now(), policies)
                if found is None:
                    return None
                revisions += found
            size = len(keys)
        await pace.keep()
        try:
            values = await self._copied(revisions, pace)
        except (PayloadIsolationError, PayloadCopySubsystemClosedError):
            return None
        if values is not None and len(values) > _KEYS_BETWEEN_LOOKS:
            await pace.rest()  # putting them together takes a while, too
        if values is None or work.expired:
            return None
        await pace.through(self._counted(store, work, keys, revisions))
        return FrozenDict(zip(keys, values, strict=True))

    async def _copied(
        self, revisions: Sequence[Revision], pace: Pace
    ) -> list[SnapshotValue[Any]] | None:
        """Return copies for one reader, or None if one of them takes a thread."""
        copies = self._parts.copies
        values: list[SnapshotValue[Any]] = []
        left = PORTION
        now = self._parts.clock.now()
        for revision in revisions:
            payload, seal, metadata = revision.payload, revision.seal, revision.metadata
            if seal is not _SHARED:
                if seal.weight < PORTION and copies.is_direct:
                    payload = seal.opener(payload)
                    copies.completed += 1
                else:
                    payload = copies.open_now(payload, seal, context=_CONTEXT)
                    if payload is OFFLOADED:
                        return None
            if type(metadata) is not FrozenDict:
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

    def _counted(
        self,
        store: EntryStore,
        work: Work,
        keys: Collection[ResourceKey],
        revisions: Collection[Revision],
    ) -> Slices[None]:
        store.count_fresh(revisions)
        if work.trace is not None:
            work.trace.warm(revisions, near=self._parts.access.store is not store)
        work.record.cache_hits += len(keys)
        work.record.cache_batch_reads += 1
        if self._parts.report is not None:
            yield from self._parts.report.warm_hits(keys, work.context.snapshot_id)
