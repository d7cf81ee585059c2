"""What the engine and the publisher use of a cache, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from coalestra.cache.calls import CacheCalls
from coalestra.cache.foreign import ForeignCache
from coalestra.cache.memory import AsyncMemoryCache, let_go
from coalestra.cache.store import EntryStore, Listeners
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import ObservationPolicy
from coalestra.core.protocols import AsyncCache
from coalestra.observability.changes import ChangeLog


class CacheAccess:
    """One cache, as the library uses it: without awaiting, or as one that has to be awaited.

    A subclass of `AsyncMemoryCache` has to be awaited, because it may have changed any method.

    Args:
        cache: the cache.
        copies: seal and open values at the edge of a cache that has to be awaited.
        max_pending_tasks: bounds the calls at a time to one with single-key methods only.
        observation: how far ahead of the clock what is held may be dated.
        failed: told of each failure that the library goes on without: the operation, the error.
        log: says when it begins to fail, and when it works again.

    Attributes:
        cache: the cache.
        store: the entry store of the library's own memory cache, else None.
        foreign: the view over any other cache; there is none where there is a ``store``.
        subscribers: who hears of changes through this view, on any event loop; held weakly.
    """

    __slots__ = ("cache", "foreign", "store", "subscribers")

    def __init__(
        self,
        cache: AsyncCache,
        copies: PayloadCopies,
        max_pending_tasks: int,
        observation: ObservationPolicy,
        failed: Callable[[str, Exception], None] | None = None,
        log: ChangeLog | None = None,
    ) -> None:
        self.cache: AsyncCache = cache
        self.store: EntryStore | None = None
        if type(cache) is AsyncMemoryCache:
            self.store = cache.store
            self.store.tolerate(observation)
            self.subscribers: Listeners = self.store.listeners
        else:
            calls = CacheCalls(cache, max_pending_tasks, failed, log)
            self.foreign: ForeignCache = ForeignCache(calls, copies, observation)
            self.subscribers = self.foreign.subscribers

    def __repr__(self) -> str:
        return f"CacheAccess({self.foreign if self.store is None else self.store!r})"

    @property
    def near(self) -> EntryStore | None:
        """The entries that can be used without awaiting at this moment, if there are any."""
        return self.foreign.near() if self.store is None else self.store

    @property
    def leases(self) -> bool:
        """Whether the cache says who is to acquire a key, and stores for him alone."""
        return self.store is None and self.foreign.leasing is not None

    @property
    def left_alone(self) -> bool:
        """Whether the cache has failed so often in a row that it is not asked just now."""
        return self.store is None and self.foreign.calls.is_left_alone

    @property
    def call_counts(self) -> Mapping[str, int]:
        """How many ``calls`` to the cache were made, and of these ``failures`` and ``timeouts``."""
        if self.store is not None:
            return dict.fromkeys(("calls", "failures", "timeouts"), 0)
        own = getattr(self.cache, "call_counts", None)
        return own if isinstance(own, Mapping) else self.foreign.calls.counts

    def attach(self) -> None:
        """Be used on the running event loop; raises `RuntimeError` if the cache must not be."""
        if self.store is None:
            self.foreign.attach()

    @property
    def listeners(self) -> Listeners:
        """Who hears of changes to the cache on the running event loop, which must be there."""
        return self.foreign.channel().listeners if self.store is None else self.subscribers

    async def stats(self) -> Any | None:
        """Return what the cache says of itself; None if it says nothing, or fails to."""
        return await self.foreign.calls.stats() if self.store is None else self.store.stats()

    async def invalidate(self, keys: Collection[ResourceKey]) -> None:
        """Remove ``keys``; listeners hear of it before the first await.

        Raises:
            CacheUnavailableError: the cache did not do it; or what the cache raised.
        """
        if self.store is None:
            await self.foreign.invalidate(keys)
        else:
            await let_go(self.store.drop(keys))
