"""One view over any cache: sealed revisions in and out, whatever the cache can do by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from coalestra.cache.foreign import RemoteAccess
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.store import CacheListener, EntryStore, Ranked, Written, best_per_key
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.protocols import AsyncCache
from coalestra.core.values import Revision


class CacheAccess(Protocol):
    """What the engine and the publisher need of a cache.

    Where ``store`` is not None, callers may use it directly and without awaiting; the methods here
    do the same work. Failures of the cache are raised as they are.
    """

    @property
    def cache(self) -> AsyncCache:
        """The cache behind this view."""

    @property
    def store(self) -> EntryStore | None:
        """The entry store of the library's own memory cache; None for any other cache."""

    async def read(
        self,
        keys: Collection[ResourceKey],
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> dict[ResourceKey, Revision]:
        """Return the usable entries among ``keys``, derived ones with current dependencies only."""

    async def write(
        self,
        revisions: Collection[Revision],
        *,
        force: bool = False,
        replace_equal: bool = False,
        want_previous: bool = False,
    ) -> dict[ResourceKey, Written]:
        """Offer revisions by the write order, the best per key; return what became of them."""

    async def invalidate(self, keys: Collection[ResourceKey]) -> None:
        """Remove ``keys``. Listeners hear of it before the first await."""

    def subscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` of changes from now on; it is held weakly."""

    def unsubscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` nothing more."""

    def announce(self, publications: Sequence[Ranked]) -> None:
        """Tell listeners that publications begin; always followed by ``conclude``."""

    def conclude(self, publications: Sequence[Ranked]) -> None:
        """Tell listeners that announced publications have ended."""


class MemoryAccess:
    """The view over the library's own memory cache: its store, used without copies or awaits."""

    __slots__ = ("_cache", "_store")

    def __init__(self, cache: AsyncMemoryCache) -> None:
        self._cache = cache
        self._store = cache.store

    def __repr__(self) -> str:
        return f"MemoryAccess({self._store!r})"

    @property
    def cache(self) -> AsyncCache:
        """The cache behind this view."""
        return self._cache

    @property
    def store(self) -> EntryStore:
        """The cache's entry store."""
        return self._store

    async def read(
        self,
        keys: Collection[ResourceKey],
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> dict[ResourceKey, Revision]:
        """Return the usable entries among ``keys``; see `EntryStore.find`."""
        find = self._store.find
        return {
            key: revision for key in keys if (revision := find(key, now, policies[key])) is not None
        }

    async def write(
        self,
        revisions: Collection[Revision],
        *,
        force: bool = False,
        replace_equal: bool = False,
        want_previous: bool = False,
    ) -> dict[ResourceKey, Written]:
        """Put the best revision per key into the store; ``previous`` is always known."""
        return {
            key: Written(*self._store.put(revision, force=force, replace_equal=replace_equal))
            for key, revision in best_per_key(revisions).items()
        }

    async def invalidate(self, keys: Collection[ResourceKey]) -> None:
        """Drop ``keys`` from the store."""
        self._store.drop(keys)

    def subscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` of changes to the store from now on; it is held weakly."""
        self._store.subscribe(listener)

    def unsubscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` nothing more."""
        self._store.unsubscribe(listener)

    def announce(self, publications: Sequence[Ranked]) -> None:
        """Tell the store's listeners that publications begin."""
        self._store.listeners.announced(publications)

    def conclude(self, publications: Sequence[Ranked]) -> None:
        """Tell the store's listeners that announced publications have ended."""
        self._store.listeners.concluded(publications)


def access_to(cache: AsyncCache, copies: PayloadCopies, max_pending_tasks: int) -> CacheAccess:
    """Return the view over ``cache``.

    ``copies`` seals and opens values at the edge of a cache that is not the library's own, and
    ``max_pending_tasks`` bounds the tasks that drive one with single-key methods only. A subclass
    of `AsyncMemoryCache` counts as foreign, because it may have changed any method.
    """
    if type(cache) is AsyncMemoryCache:
        return MemoryAccess(cache)

    return RemoteAccess(cache, copies, max_pending_tasks)
