"""The memory cache: an entry store behind the asynchronous cache protocols."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from coalestra.cache.store import EntryStore, best_per_key
from coalestra.concurrency.copying import OFFLOADED, PayloadCopier, PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.core import validation
from coalestra.core.frozen import EMPTY, FrozenDict, frozen
from coalestra.core.health import PayloadCopyHealth
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.policies import FreshnessPolicy, FreshnessPolicyProvider
from coalestra.core.values import (
    CacheLookup,
    CacheStats,
    CacheWriteResult,
    Revision,
    SnapshotValue,
    number_of,
)

# Between what applications hold and what the library keeps: `SnapshotValue` and `Revision` -------
#
# Sealing copies a value in, once; opening copies it out, once per reader. A value that is small or
# immutable is copied here and now; a large one is awaited, because it is copied in a thread.


async def seal_value(copies: PayloadCopies, value: SnapshotValue[Any], context: str) -> Revision:
    """Copy a value in. Raises `PayloadIsolationError` if it cannot be copied."""
    sealed = copies.seal_now(value.value, context=context)
    if sealed is None:
        sealed = await copies.seal(value.value, context=context)
    return revision_of(value, *sealed, copies.seal_metadata_now(value.metadata, context=context))


def revision_of(
    value: SnapshotValue[Any],
    payload: Any = None,
    seal: Any = None,
    metadata: FrozenDict[str, Any] = EMPTY,
) -> Revision:
    """Return the revision that a value shows; without a payload it can only be compared."""
    dated = value.dated
    return Revision(
        key=value.key,
        payload=payload,
        seal=seal,
        source=value.source,
        observed_at=value.observed_at if dated else value.fetched_at,
        fetched_at=value.fetched_at,
        latency_ms=value.latency_ms,
        attempts=value.attempts,
        metadata=metadata,
        authority_rank=value.authority_rank,
        version=value.version,
        dependency_versions=frozen(value.dependency_versions),
        dated=dated,
        began=0 if dated or value.attempts else number_of(value.version),
    )


async def open_value(
    copies: PayloadCopies,
    revision: Revision,
    context: str,
    now: float | None = None,
    policy: FreshnessPolicy | None = None,
    from_cache: bool = False,
) -> SnapshotValue[Any]:
    """Copy a revision out for one reader, as of ``now``; without that, as it was fetched."""
    payload = copies.open_now(revision.payload, revision.seal, context=context)
    if payload is OFFLOADED:
        payload = await copies.open(revision.payload, revision.seal, context=context)
    metadata = copies.open_metadata_now(revision.metadata, context=context)
    return show_value(revision, payload, metadata, now, policy, from_cache)


def show_value(
    revision: Revision,
    payload: Any,
    metadata: FrozenDict[str, Any],
    now: float | None,
    policy: FreshnessPolicy | None,
    from_cache: bool,
) -> SnapshotValue[Any]:
    """Return what one reader gets around his copies of payload and metadata; see ``open_value``."""
    age = (revision.fetched_at if now is None else now) - revision.observed_at
    stale = policy is not None and age > policy.ttl_seconds
    return revision.presented(payload, metadata, age if age > 0 else 0.0, stale, from_cache)


def lookup_of(value: SnapshotValue[Any] | None, now: float, policy: FreshnessPolicy) -> CacheLookup:
    """Return the lookup of what a cache holds, judged at ``now``."""
    if value is None:
        return MISS
    age = max(0.0, now - value.observed_at)
    return CacheLookup(value, age <= policy.ttl_seconds, age <= policy.max_stale_seconds, age)


MISS = CacheLookup(None, fresh=False, usable_stale=False)

_READ = "cache read"
_WRITE = "cache write"
_PORTION = 500


class AsyncMemoryCache:
    """A bounded least-recently-used cache in memory, for one event loop.

    Values and metadata are copied on the way in and out: nobody shares a mutable object with it.
    Methods wait only while a large payload is copied; between waits changes are atomic.
    ``max_entries`` None keeps everything. ``run_payload_copies_in_thread`` None decides by payload
    (inline with a ``payload_copier`` of your own); ``max_copy_concurrency`` bounds copy threads.
    """

    validates_dependency_versions = True
    validates_source_authority = True
    validates_write_order = True

    def __init__(
        self,
        *,
        max_entries: int | None = 10_000,
        payload_copier: PayloadCopier | None = None,
        run_payload_copies_in_thread: bool | None = None,
        max_copy_concurrency: int = 4,
    ) -> None:
        limit = validation.integer("max_entries", max_entries, minimum=1, optional=True)
        self._store = EntryStore(limit)
        self._copies = PayloadCopies(
            "cache",
            copier=payload_copier,
            run_in_thread=run_payload_copies_in_thread,
            max_concurrency=max_copy_concurrency,
        )
        self._told_now = -math.inf

    def __repr__(self) -> str:
        return f"AsyncMemoryCache({self._store!r}, {self._copies!r})"

    @property
    def store(self) -> EntryStore:
        """The entries themselves. Meant for the library: what is in it must never be changed."""
        return self._store

    @property
    def max_entries(self) -> int | None:
        """How many entries are kept; None for any number."""
        return self._store.max_entries

    @property
    def run_payload_copies_in_thread(self) -> bool:
        """Whether large payloads are copied in threads."""
        return self._copies.run_in_thread

    @property
    def max_copy_concurrency(self) -> int:
        """How many copies may run in threads at a time."""
        return self._copies.max_concurrency

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        """Look ``key`` up at ``now`` (wall seconds); the lookup is empty if nothing is usable."""
        self._told_now = validation.number("now", now)
        validation.instance("key", key, ResourceKey)
        validation.instance("policy", policy, FreshnessPolicy)
        revision = self._store.find(key, now, policy)
        return MISS if revision is None else await self._lookup(revision, now, policy)

    async def get_many(
        self,
        keys: Collection[ResourceKey],
        *,
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> Mapping[ResourceKey, CacheLookup]:
        """Look up every key as of one instant. Raises KeyError for a key without a policy."""
        self._told_now = validation.number("now", now)
        told = validation.mapping("policies", policies)
        wanted = {key: told[key] for key in distinct_keys("keys", keys)}
        for policy in wanted.values():
            validation.instance("policies", policy, FreshnessPolicy)
        find = self._store.find
        held = [find(key, now, policy) for key, policy in wanted.items()]
        lookups = dict.fromkeys(wanted, MISS)

        async def look(revision: Revision) -> None:
            lookups[revision.key] = await self._lookup(revision, now, wanted[revision.key])

        await self._copies.each([each for each in held if each is not None], look, Pace())
        return lookups

    async def set(self, value: SnapshotValue[Any]) -> None:
        """Store a value whatever is there."""
        await self.set_many((value,))

    async def set_many(self, values: Collection[SnapshotValue[Any]]) -> None:
        """Store values in one step, whatever is there; of several for one key, the best one."""
        await let_go(self._store.put_many(await self._sealed(values), force=True))

    async def set_if_newer(
        self, value: SnapshotValue[Any], *, force: bool = False, replace_equal: bool = False
    ) -> CacheWriteResult:
        """Store a value if the write order lets it replace what is there."""
        results = await self.set_many_if_newer((value,), force=force, replace_equal=replace_equal)
        return results[value.key]

    async def set_many_if_newer(
        self,
        values: Collection[SnapshotValue[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, CacheWriteResult]:
        """Offer values by the write order, in one step; of several for one key, the best one."""
        validation.flag("force", force)
        validation.flag("replace_equal", replace_equal)
        revisions = await self._sealed(values)
        now = max((each.fetched_at for each in revisions.values()), default=0.0)
        outcomes = self._store.put_many(
            revisions, now=max(now, self._told_now), force=force, replace_equal=replace_equal
        )
        results = {}
        pace = Pace()
        outcomes.reverse()
        while outcomes:  # what was replaced is let go one by one
            status, current, previous = outcomes.pop()
            await pace.keep()
            before = None if previous is None else await open_value(self._copies, previous, _READ)
            after = await open_value(self._copies, current, _READ)
            results[current.key] = CacheWriteResult(status, after, before)
        return results

    async def invalidate(self, key: ResourceKey) -> None:
        """Forget ``key``."""
        await self.invalidate_many((key,))

    async def invalidate_many(self, keys: Collection[ResourceKey]) -> None:
        """Forget ``keys``, in one step."""
        await let_go(self._store.drop(distinct_keys("keys", keys)))

    async def invalidate_matching(
        self, predicate: Callable[[ResourceKey], bool]
    ) -> tuple[ResourceKey, ...]:
        """Forget every key for which ``predicate`` is true; return those that were stored.

        The predicate may also be asked about keys that are being fetched at the moment.
        """
        says = validation.plain_function("predicate", predicate)

        def matches(key: ResourceKey) -> bool:
            return bool(validation.at_once("predicate", says(key)))

        return await _gone(self._store.drop_where(matches))

    async def invalidate_namespace(
        self, namespace: str, *, name: str | None = None, subject: str | None = None
    ) -> tuple[ResourceKey, ...]:
        """Forget a namespace, or the part of it with this name and subject; return the keys."""
        validation.text("namespace", namespace)
        for part, value in (("name", name), ("subject", subject)):
            if value is not None:
                validation.text(part, value, empty=True)

        def within(key: ResourceKey) -> bool:
            named = name in (None, key.name) and subject in (None, key.subject)
            return named and key.namespace == namespace

        return await _gone(self._store.drop_where(within))

    async def prune(
        self, *, now: float, policy_resolver: FreshnessPolicyProvider
    ) -> tuple[ResourceKey, ...]:
        """Drop all that nobody can use at ``now`` (wall seconds) any more; return the keys."""
        moment = validation.number("now", now)
        validation.require_methods("policy_resolver", policy_resolver, "resolve", plain=True)
        store = self._store
        dropped: list[ResourceKey] = []
        held = tuple(store)
        # Twice, as what rests on something dropped may have come before it.
        for start in (*range(0, len(held), _PORTION), *range(0, len(held), _PORTION)):
            keys = held[start : start + _PORTION]
            dropped += [each.key for each in store.drop_useless(keys, moment, policy_resolver)]
            await asyncio.sleep(0)
        return tuple(dropped)

    async def clear(self) -> None:
        """Forget everything."""
        await let_go(self._store.clear())

    async def size(self) -> int:
        """How many entries are stored."""
        return len(self._store)

    async def newest(self, limit: int = 50) -> tuple[SnapshotValue[Any], ...]:
        """Return up to ``limit`` entries as they were fetched, those used last first.

        Of a cache without a bound, those written last: it does not know which were used.
        To look into the cache: nothing is counted, and to look does not count as use.
        """
        revisions = self._store.newest(validation.integer("limit", limit, minimum=1))
        return tuple(
            [await open_value(self._copies, each, _READ, from_cache=True) for each in revisions]
        )

    async def stats(self) -> CacheStats:
        """Counts of what happened since creation, and the size now."""
        return self._store.stats()

    def copy_health_snapshot(self) -> PayloadCopyHealth:
        """How the copying in and out is doing."""
        return self._copies.health()

    async def aclose_payload_copies(self, *, timeout_seconds: float | None = 5.0) -> None:
        """Refuse new copies and wait for running ones.

        Raises `PayloadCopyShutdownTimeoutError` if some still run after ``timeout_seconds``
        (None: wait for as long as it takes). They end by themselves later.
        """
        await self._copies.aclose(timeout_seconds)

    async def aclose(self) -> None:
        """Close the copying, waiting up to five seconds. The entries stay."""
        await self.aclose_payload_copies()

    async def _lookup(self, revision: Revision, now: float, policy: FreshnessPolicy) -> CacheLookup:
        value = await open_value(self._copies, revision, _READ, now, policy, from_cache=True)
        return lookup_of(value, now, policy)

    async def _sealed(self, values: Collection[SnapshotValue[Any]]) -> dict[ResourceKey, Revision]:
        captured = tuple(validation.instance("values", values, Iterable))
        for value in captured:
            validation.instance("values", value, SnapshotValue)
        sealed: dict[int, Revision] = {}

        async def seal(number: int) -> None:
            sealed[number] = await seal_value(self._copies, captured[number], _WRITE)

        await self._copies.each(range(len(captured)), seal, Pace())
        return best_per_key([sealed[number] for number in range(len(captured))])


async def let_go(removed: list[Any]) -> None:
    """Free what was removed bit by bit: all at once would hold the loop."""
    pace = Pace()
    while removed:
        del removed[-_PORTION:]
        await pace.keep()


async def _gone(removed: list[Revision]) -> tuple[ResourceKey, ...]:
    keys = tuple([revision.key for revision in removed])
    await let_go(removed)
    return keys
