"""The view over a cache that is not the library's own: an edge, where values are copied."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from coalestra.cache.calls import CacheCalls
from coalestra.cache.channel import Channel, channel_of
from coalestra.cache.listening import CacheListener, Listeners
from coalestra.cache.remote_validity import outdated_among, read_dependencies
from coalestra.cache.sealing import Sealing
from coalestra.cache.write_order import Ranked, best_per_key
from coalestra.cache.written import Written
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.freshness import FreshnessPolicy
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import AsyncCache
from coalestra.core.records import CacheWriteResult, CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.core.values import SnapshotValue

_STORED = CacheWriteStatus.STORED
_READ = "cache read"
_WRITE = "cache write"

Values = dict[ResourceKey, SnapshotValue[Any]]
Results = dict[ResourceKey, CacheWriteResult]


class RemoteAccess:
    """Reads and writes sealed revisions through any cache.

    Writes and invalidations of one key run one after the other, in the order they were asked for,
    among all users of the same cache object on one event loop.
    """

    __slots__ = ("_calls", "_channel", "_listeners", "_sealing")

    def __init__(self, cache: AsyncCache, copies: PayloadCopies, max_pending_tasks: int) -> None:
        self._calls = CacheCalls(cache, max_pending_tasks)
        self._sealing = Sealing(copies)
        self._listeners = Listeners()
        self._channel: Channel | None = None

    def __repr__(self) -> str:
        return f"RemoteAccess({self._calls!r})"

    @property
    def cache(self) -> AsyncCache:
        """The cache behind this view."""
        return self._calls.cache

    @property
    def store(self) -> None:
        """None: there is no entry store to use directly."""
        return None

    async def read(
        self,
        keys: Collection[ResourceKey],
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> dict[ResourceKey, Revision]:
        """Return the usable entries among ``keys``, in their order.

        Unless the cache judges derived entries itself, those whose dependencies are no longer
        current are left out, and invalidated.
        """
        self._bound()
        values = await self._calls.get(keys, now, policies)
        known = values
        if not self._calls.validates_dependencies and _derived(values.values()):
            absent = [key for key in keys if key not in values]
            known = await read_dependencies(self._calls, values, absent, now)
            outdated = outdated_among(known)
            if outdated:
                await self._drop_outdated({key: known.pop(key) for key in outdated}, now)
        sealed = await self._sealing.seal_many(known, context=_READ)
        return {key: sealed[key] for key in values if key in sealed}

    async def write(
        self,
        revisions: Collection[Revision],
        *,
        force: bool = False,
        replace_equal: bool = False,
        want_previous: bool = False,
    ) -> dict[ResourceKey, Written]:
        """Offer the best revision per key; return what became of each.

        ``previous`` is filled in only with ``want_previous``, because it costs a copy.
        """
        best = best_per_key(revisions)
        channel = self._bound()
        results: Results = {}
        async with channel.lanes.turn(best):
            try:
                values = await self._sealing.open_many(best, context=_WRITE)
                await self._offer(values, results, force, replace_equal)
            finally:
                for key, result in results.items():
                    if result.status is _STORED:
                        channel.listeners.revised(key, best[key])
        return await self._outcomes(best, results, want_previous)

    async def invalidate(self, keys: Collection[ResourceKey]) -> None:
        """Remove ``keys``. Listeners hear of it before the first await, and again afterwards."""
        unique = tuple(dict.fromkeys(keys))
        channel = self._bound()
        channel.listeners.invalidating(unique)
        async with channel.lanes.turn(unique):
            await self._calls.invalidate(unique)
            for key in unique:
                channel.listeners.revised(key, None)

    def subscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` of changes from now on; it is held weakly."""
        self._listeners.subscribe(listener)

    def unsubscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` nothing more."""
        self._listeners.unsubscribe(listener)

    def announce(self, publications: Sequence[Ranked]) -> None:
        """Tell listeners that publications begin. Needs a running event loop."""
        self._bound().listeners.announced(publications)

    def conclude(self, publications: Sequence[Ranked]) -> None:
        """Tell listeners that announced publications have ended. Needs a running event loop."""
        self._bound().listeners.concluded(publications)

    def _bound(self) -> Channel:
        channel = self._channel
        if channel is None or channel.loop is not asyncio.get_running_loop():
            if channel is not None:
                channel.listeners.unsubscribe(self._listeners)
            channel = self._channel = channel_of(self.cache)
            channel.listeners.subscribe(self._listeners)
        return channel

    async def _offer(
        self, values: Values, results: Results, force: bool, replace_equal: bool
    ) -> None:
        await self._calls.offer(values, results, force=force, replace_equal=replace_equal)
        outdated = await self._outdated_winners(results)
        if outdated:
            await self._calls.invalidate(outdated)
            again = {key: values[key] for key in outdated}
            await self._calls.offer(again, results, force=force, replace_equal=replace_equal)

    async def _outdated_winners(self, results: Results) -> tuple[ResourceKey, ...]:
        """An entry on outdated dependencies must not keep a newer revision out."""
        winners = {
            key: result.value for key, result in results.items() if result.status is not _STORED
        }
        if self._calls.validates_dependencies or not _derived(winners.values()):
            return ()
        now = max(value.fetched_at for value in winners.values())
        known = await read_dependencies(self._calls, winners, (), now)
        outdated = outdated_among(known)
        return tuple(key for key in winners if key in outdated)

    async def _drop_outdated(self, outdated: Values, now: float) -> None:
        """Invalidate entries found outdated, unless they have been replaced in the meantime."""
        async with self._bound().lanes.turn(outdated):
            held = await self._calls.get_any_age(tuple(outdated), now)
            same = [key for key, value in held.items() if value.version == outdated[key].version]
            await self._calls.invalidate(same)

    async def _outcomes(
        self, best: Mapping[ResourceKey, Revision], results: Results, want_previous: bool
    ) -> dict[ResourceKey, Written]:
        winners = {k: r.value for k, r in results.items() if r.status is not _STORED}
        current = await self._sealing.seal_many(winners, context=_READ)
        before: Values = {}
        if want_previous:
            replaced = {k: r.previous for k, r in results.items() if k not in winners}
            before = {key: value for key, value in replaced.items() if value is not None}
        previous = await self._sealing.seal_many(before, context=_READ)
        return {
            key: Written(
                results[key].status,
                current.get(key, revision),
                current.get(key) or previous.get(key),
            )
            for key, revision in best.items()
        }


def _derived(values: Iterable[SnapshotValue[Any]]) -> bool:
    return any(value.dependency_versions for value in values)
