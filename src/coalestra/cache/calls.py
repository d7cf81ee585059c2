"""The calls a cache offers, found by structure and used as widely as it allows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from coalestra.cache.fan_out import for_each
from coalestra.cache.write_order import decide
from coalestra.core.freshness import FreshnessPolicy
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import (
    AsyncCache,
    AtomicAsyncCache,
    BatchAsyncCache,
    BatchAtomicAsyncCache,
)
from coalestra.core.records import CacheLookup, CacheWriteResult, CacheWriteStatus
from coalestra.core.values import SnapshotValue

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
