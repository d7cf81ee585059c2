"""The memory cache: an entry store behind the asynchronous cache protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from coalestra.cache.closing import close_copies
from coalestra.cache.entries import EntryStore
from coalestra.cache.sealing import Sealing
from coalestra.cache.write_order import best_per_key
from coalestra.concurrency.copying import PayloadCopier, PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.core import validation
from coalestra.core.freshness import FreshnessPolicy, FreshnessPolicyProvider
from coalestra.core.keys import ResourceKey
from coalestra.core.records import CacheLookup, CacheWriteResult
from coalestra.core.revision import Revision
from coalestra.core.values import SnapshotValue

if TYPE_CHECKING:
    from coalestra.core.cache_stats import CacheStats
    from coalestra.core.copy_health import PayloadCopyHealth

_READ = "cache read"
_WRITE = "cache write"
_PORTION = 500
_MISS = CacheLookup(None, fresh=False, usable_stale=False)


class AsyncMemoryCache:
    """A bounded least-recently-used cache in memory, for one event loop.

    Values and metadata are copied on the way in and out: nobody shares a mutable object with it.
    Methods wait only while a large payload is copied; between waits changes are atomic.
    ``max_entries`` None keeps everything. ``run_payload_copies_in_thread`` None decides by payload
    (inline with a ``payload_copier`` of your own); ``max_copy_concurrency`` bounds copy threads.
    """

    validates_dependency_versions = True
    validates_source_authority = True

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
        self._sealing = Sealing(self._copies)

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
        validation.number("now", now)
        revision = self._store.find(key, now, policy)
        if revision is None:
            return _MISS
        return await self._sealing.open_lookup(revision, now, policy, context=_READ)

    async def get_many(
        self,
        keys: Collection[ResourceKey],
        *,
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> Mapping[ResourceKey, CacheLookup]:
        """Look up every key as of one instant. Raises KeyError for a key without a policy."""
        validation.number("now", now)
        wanted = {key: policies[key] for key in keys}
        find = self._store.find
        found = {key: find(key, now, policy) for key, policy in wanted.items()}
        lookups = dict.fromkeys(found, _MISS)
        pace = Pace()
        for key, revision in found.items():
            if revision is not None:
                lookups[key] = await self._sealing.open_lookup(
                    revision, now, wanted[key], context=_READ
                )
                if pace.due:
                    await pace.rest()
        return lookups

    async def set(self, value: SnapshotValue[Any]) -> None:
        """Store a value whatever is there."""
        self._store.put(await self._sealed(value), force=True)

    async def set_many(self, values: Collection[SnapshotValue[Any]]) -> None:
        """Store values whatever is there; of several for one key, the best by the write order."""
        pace = Pace()
        for revision in (await self._sealed_best(values)).values():
            self._store.put(revision, force=True)
            if pace.due:
                await pace.rest()

    async def set_if_newer(
        self, value: SnapshotValue[Any], *, force: bool = False, replace_equal: bool = False
    ) -> CacheWriteResult:
        """Store a value if the write order lets it replace what is there."""
        return await self._offer(await self._sealed(value), force, replace_equal)

    async def set_many_if_newer(
        self,
        values: Collection[SnapshotValue[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, CacheWriteResult]:
        """Offer values by the write order; of several for one key, the best is offered."""
        results = {}
        pace = Pace()
        for key, revision in (await self._sealed_best(values)).items():
            results[key] = await self._offer(revision, force, replace_equal)
            if pace.due:
                await pace.rest()
        return results

    async def invalidate(self, key: ResourceKey) -> None:
        """Forget ``key``."""
        self._store.drop((key,))

    async def invalidate_many(self, keys: Collection[ResourceKey]) -> None:
        """Forget ``keys``."""
        self._store.drop(tuple(keys))

    async def invalidate_matching(
        self, predicate: Callable[[ResourceKey], bool]
    ) -> tuple[ResourceKey, ...]:
        """Forget every key for which ``predicate`` is true; return those that were stored.

        The predicate may also be asked about keys that are being fetched at the moment.
        """
        return self._store.drop_where(validation.callable_("predicate", predicate))

    async def invalidate_namespace(
        self, namespace: str, *, name: str | None = None, subject: str | None = None
    ) -> tuple[ResourceKey, ...]:
        """Forget a namespace, or the part of it with this name and subject; return the keys."""
        return self._store.drop_where(_belonging_to(namespace, name, subject))

    async def prune(
        self, *, now: float, policy_resolver: FreshnessPolicyProvider
    ) -> tuple[ResourceKey, ...]:
        """Drop all that nobody can use at ``now`` (wall seconds) any more; return the keys."""
        moment = validation.number("now", now)
        store = self._store
        dropped: list[ResourceKey] = []
        for keys in _portions(store):
            dropped += store.drop_expired(keys, moment, policy_resolver)
            await asyncio.sleep(0)
        for keys in _portions(store):
            dropped += store.drop_outdated(keys)
            await asyncio.sleep(0)
        return tuple(dropped)

    async def clear(self) -> None:
        """Forget everything."""
        self._store.clear()

    async def size(self) -> int:
        """How many entries are stored."""
        return len(self._store)

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
        await close_copies(self._copies, timeout_seconds)

    async def aclose(self) -> None:
        """Close the copying, waiting up to five seconds. The entries stay."""
        await self.aclose_payload_copies()

    async def _sealed(self, value: SnapshotValue[Any]) -> Revision:
        validation.instance("value", value, SnapshotValue)
        return await self._sealing.seal(value, context=_WRITE)

    async def _sealed_best(
        self, values: Collection[SnapshotValue[Any]]
    ) -> dict[ResourceKey, Revision]:
        for value in values:
            validation.instance("values", value, SnapshotValue)
        return await self._sealing.seal_many(best_per_key(values), context=_WRITE)

    async def _offer(
        self, revision: Revision, force: bool, replace_equal: bool
    ) -> CacheWriteResult:
        put = self._store.put(revision, force=force, replace_equal=replace_equal)
        return await self._sealing.open_result(*put, context=_READ)


def _portions(keys: Iterable[ResourceKey]) -> list[tuple[ResourceKey, ...]]:
    held = tuple(keys)
    return [held[start : start + _PORTION] for start in range(0, len(held), _PORTION)]


def _belonging_to(
    namespace: str, name: str | None, subject: str | None
) -> Callable[[ResourceKey], bool]:
    def belongs(key: ResourceKey) -> bool:
        return (
            key.namespace == namespace
            and (name is None or key.name == name)
            and (subject is None or key.subject == subject)
        )

    return belongs
