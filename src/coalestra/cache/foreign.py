"""Driving many single-key operations with few tasks."""

from __future__ import annotations

import asyncio
import weakref
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from coalestra.cache.memory import Sealing
from coalestra.cache.store import CacheListener, Listeners, Ranked, Written, best_per_key, decide
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.protocols import (
    AsyncCache,
    AtomicAsyncCache,
    BatchAsyncCache,
    BatchAtomicAsyncCache,
)
from coalestra.core.results import CacheLookup, CacheWriteResult, CacheWriteStatus
from coalestra.core.values import Revision, SnapshotValue

# Driving many single-key operations with few tasks -----------------------------------------------


_T = TypeVar("_T")


async def for_each(
    items: Collection[_T], operation: Callable[[_T], Awaitable[None]], limit: int
) -> None:
    """Apply ``operation`` to every item with at most ``limit`` tasks, started in order.

    The first failure stops the rest and is raised. No task is left behind, whatever happens.
    """
    remaining = iter(items)

    async def work() -> None:
        for item in remaining:
            await operation(item)

    workers = min(limit, len(items))
    if workers <= 1:
        await work()
        return
    tasks = [asyncio.ensure_future(work()) for _ in range(workers)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Turns per key: operations on the same key run one after the other, in the order they asked ------
#
# An operation queues for all its keys in one step and runs when it is the first for each of them,
# so
# operations over several keys cannot block each other in a circle. Nothing is kept for an idle key.


class KeyLanes:
    """First-in, first-out turns for any number of keys."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[ResourceKey, Turn] = {}

    def __repr__(self) -> str:
        return f"KeyLanes({len(self._last)} busy)"

    def __len__(self) -> int:
        return len(self._last)

    def turn(self, keys: Iterable[ResourceKey]) -> Turn:
        """Queue for ``keys`` at once; enter the turn with ``async with``, without delay."""
        queued = Turn(self, tuple(keys))
        ahead = {self._last[key] for key in queued.keys if key in self._last}
        for other in ahead:
            other.followers.append(queued)
        queued.waits_for = len(ahead)
        self._last.update(dict.fromkeys(queued.keys, queued))
        return queued

    def end(self, turn: Turn) -> None:
        """Let those behind ``turn`` move up."""
        ended = [turn]
        while ended:
            done = ended.pop()
            for key in done.keys:
                if self._last.get(key) is done:
                    del self._last[key]
            for follower in done.followers:
                follower.waits_for -= 1
                if not follower.waits_for and follower.begin():
                    ended.append(follower)


class Turn:
    """One operation's place in the lanes of its keys."""

    __slots__ = ("_abandoned", "_lanes", "_start", "followers", "keys", "waits_for")

    def __init__(self, lanes: KeyLanes, keys: tuple[ResourceKey, ...]) -> None:
        self.keys: tuple[ResourceKey, ...] = keys
        self.waits_for: int = 0
        self.followers: list[Turn] = []
        self._lanes = lanes
        self._start: asyncio.Future[None] | None = None
        self._abandoned = False

    def __repr__(self) -> str:
        return f"Turn({len(self.keys)} keys, behind {self.waits_for})"

    def begin(self) -> bool:
        """Start whoever waits for the turn; return True if nobody does any more."""
        if self._start is not None and not self._start.done():
            self._start.set_result(None)
        return self._abandoned

    async def __aenter__(self) -> None:
        if not self.waits_for:
            return
        self._start = asyncio.get_running_loop().create_future()
        try:
            await self._start
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lanes.end(self)

    def _abandon(self) -> None:
        if self.waits_for:
            self._abandoned = True
        else:
            self._lanes.end(self)


# What the users of one foreign cache object share: turns per key, and the news -------------------


class Channel:
    """The lanes and listeners of one cache on one event loop.

    A publisher made by the application and a builder over the same cache object meet here, so the
    builder hears of what the publisher does. It holds cache and loop, so neither identity can be
    taken by another object while the channel lives.
    """

    __slots__ = ("__weakref__", "cache", "lanes", "listeners", "loop")

    def __init__(self, cache: AsyncCache, loop: asyncio.AbstractEventLoop) -> None:
        self.cache: AsyncCache = cache
        self.loop: asyncio.AbstractEventLoop = loop
        self.lanes: KeyLanes = KeyLanes()
        self.listeners: Listeners = Listeners()

    def __repr__(self) -> str:
        return f"Channel({type(self.cache).__name__}, {self.lanes!r}, {self.listeners!r})"


_channels: weakref.WeakValueDictionary[tuple[int, int], Channel] = weakref.WeakValueDictionary()


def channel_of(cache: AsyncCache) -> Channel:
    """Return the channel of ``cache`` on the running loop; it lives while somebody uses it."""
    loop = asyncio.get_running_loop()
    identity = (id(cache), id(loop))
    channel = _channels.get(identity)
    if channel is None:
        channel = _channels[identity] = Channel(cache, loop)
    return channel


# The calls a cache offers, found by structure and used as widely as it allows --------------------


ANY_AGE: Final = FreshnessPolicy(float("inf"), float("inf"))

Values = Mapping[ResourceKey, SnapshotValue[Any]]


class CacheCalls:
    """Reads, offers and invalidations over one cache, for any number of keys.

    Nothing here keeps writers apart: comparing and setting without an atomic method is safe only
    while the caller holds the keys' lanes.
    """

    __slots__ = ("_atomic", "_batch", "_batch_atomic", "_limit", "cache", "validates_dependencies")

    def __init__(self, cache: AsyncCache, limit: int) -> None:
        self.cache: AsyncCache = cache
        self.validates_dependencies: bool = (
            getattr(cache, "validates_dependency_versions", False) is True
        )
        self._batch = cache if isinstance(cache, BatchAsyncCache) else None
        self._batch_atomic = cache if isinstance(cache, BatchAtomicAsyncCache) else None
        self._atomic = cache if isinstance(cache, AtomicAsyncCache) else None
        self._limit = limit

    def __repr__(self) -> str:
        abilities = {
            "batch": self._batch,
            "atomic": self._atomic,
            "batch atomic": self._batch_atomic,
        }
        named = [name for name, able in abilities.items() if able is not None]
        return f"CacheCalls({type(self.cache).__name__}: {', '.join(named) or 'single keys'})"

    async def get(
        self,
        keys: Collection[ResourceKey],
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> dict[ResourceKey, SnapshotValue[Any]]:
        """Return the values that the cache holds and calls usable, in the order of ``keys``."""
        if not keys:
            return {}
        found: Mapping[ResourceKey, CacheLookup | None]
        if self._batch is not None:
            found = await self._batch.get_many(keys, now=now, policies=policies)
        else:
            found = await self._get_each(keys, now, policies)
        values = {}
        for key in keys:
            value = _usable(found.get(key))
            if value is not None:
                values[key] = _of_key(value, key)
        return values

    async def get_any_age(
        self, keys: Collection[ResourceKey], now: float
    ) -> dict[ResourceKey, SnapshotValue[Any]]:
        """Return what the cache holds for ``keys``, however old."""
        return await self.get(keys, now, dict.fromkeys(keys, ANY_AGE))

    async def offer(
        self,
        values: Values,
        results: dict[ResourceKey, CacheWriteResult],
        *,
        force: bool,
        replace_equal: bool,
    ) -> None:
        """Write ``values`` by the write order, entering each outcome in ``results`` as it comes."""
        if self._batch_atomic is not None:
            outcome = await self._batch_atomic.set_many_if_newer(
                tuple(values.values()), force=force, replace_equal=replace_equal
            )
            results.update({key: outcome[key] for key in values})
        elif self._atomic is not None:
            atomic = self._atomic

            async def offer_one(value: SnapshotValue[Any]) -> None:
                results[value.key] = await atomic.set_if_newer(
                    value, force=force, replace_equal=replace_equal
                )

            await for_each(values.values(), offer_one, self._limit)
        else:
            await self._compare_and_set(values, results, force, replace_equal)

    async def invalidate(self, keys: Collection[ResourceKey]) -> None:
        """Remove ``keys`` from the cache."""
        if not keys:
            return
        if self._batch is not None:
            await self._batch.invalidate_many(keys)
        else:
            await for_each(keys, self.cache.invalidate, self._limit)

    async def _get_each(
        self,
        keys: Collection[ResourceKey],
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> dict[ResourceKey, CacheLookup]:
        found: dict[ResourceKey, CacheLookup] = {}

        async def get_one(key: ResourceKey) -> None:
            found[key] = await self.cache.get(key, now=now, policy=policies[key])

        await for_each(keys, get_one, self._limit)
        return found

    async def _compare_and_set(
        self,
        values: Values,
        results: dict[ResourceKey, CacheWriteResult],
        force: bool,
        replace_equal: bool,
    ) -> None:
        now = max((value.fetched_at for value in values.values()), default=0.0)
        held = await self.get_any_age(tuple(values), now)
        stored = {}
        for key, value in values.items():
            current = held.get(key)
            status = decide(value, current, force=force, replace_equal=replace_equal)
            if current is None or status is CacheWriteStatus.STORED:
                stored[key] = CacheWriteResult(status, value, current)
            else:
                results[key] = CacheWriteResult(status, current, current)
        await self._set(stored, results)

    async def _set(
        self,
        stored: Mapping[ResourceKey, CacheWriteResult],
        results: dict[ResourceKey, CacheWriteResult],
    ) -> None:
        if not stored:
            return
        if self._batch is not None:
            await self._batch.set_many(tuple(result.value for result in stored.values()))
            results.update(stored)
            return

        async def set_one(result: CacheWriteResult) -> None:
            await self.cache.set(result.value)
            results[result.value.key] = result

        await for_each(stored.values(), set_one, self._limit)


def _usable(lookup: CacheLookup | None) -> SnapshotValue[Any] | None:
    if lookup is None or not (lookup.fresh or lookup.usable_stale):
        return None
    return lookup.value


def _of_key(value: SnapshotValue[Any], key: ResourceKey) -> SnapshotValue[Any]:
    if value.key != key:
        raise ValueError(
            f"the cache answered {key} with a value of {value.key}; a cache must store and "
            "return values under their own key"
        )
    return value


# Which derived values of a foreign cache rest on dependencies that are no longer current ---------


async def read_dependencies(
    calls: CacheCalls, values: Values, absent: Collection[ResourceKey], now: float
) -> dict[ResourceKey, SnapshotValue[Any]]:
    """Return ``values`` and everything in the cache that they rest on, directly or not.

    One read per level of derivation. ``absent`` keys are known not to be there.
    """
    known = dict(values)
    asked = {*values, *absent}
    level: Iterable[SnapshotValue[Any]] = values.values()
    while True:
        wanted = dict.fromkeys(
            key for value in level for key in value.dependency_versions if key not in asked
        )
        if not wanted:
            return known
        asked.update(wanted)
        found = await calls.get_any_age(tuple(wanted), now)
        known.update(found)
        level = found.values()


def outdated_among(known: Values) -> set[ResourceKey]:
    """Return the keys of ``known`` with a dependency, direct or not, of another version.

    ``known`` must hold every dependency that exists. Linear in entries and dependencies.
    """
    dependents: dict[ResourceKey, list[ResourceKey]] = defaultdict(list)
    outdated: list[ResourceKey] = []
    for key, value in known.items():
        for dependency, version in value.dependency_versions.items():
            dependents[dependency].append(key)
            current = known.get(dependency)
            if current is None or current.version != version:
                outdated.append(key)
    reached = set(outdated)
    while outdated:
        for dependent in dependents.get(outdated.pop(), ()):
            if dependent not in reached:
                reached.add(dependent)
                outdated.append(dependent)
    return reached


# The view over a cache that is not the library's own: an edge, where values are copied -----------


_STORED = CacheWriteStatus.STORED
_READ = "cache read"
_WRITE = "cache write"

Found = dict[ResourceKey, SnapshotValue[Any]]
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
        self, values: Found, results: Results, force: bool, replace_equal: bool
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

    async def _drop_outdated(self, outdated: Found, now: float) -> None:
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
        before: Found = {}
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
