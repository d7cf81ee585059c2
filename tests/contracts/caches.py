"""Small third-party caches of every capability, each with an await inside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from typing import Any

from coalestra.cache.memory import AsyncMemoryCache
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, RefreshMode
from coalestra.core.protocols import AsyncCache, Lease, LeasedLookup
from coalestra.core.values import CacheLookup, CacheWriteResult, CacheWriteStatus, SnapshotValue

Value = SnapshotValue[Any]


class SingleKeyCache:
    """A dictionary with the four single-key methods."""

    def __init__(self) -> None:
        self.held: dict[ResourceKey, Value] = {}
        self.calls: list[str] = []
        self.running = 0
        self.peak_running = 0

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        await self._travel("get")
        return self._lookup(key, now, policy)

    async def set(self, value: Value) -> None:
        await self._travel("set")
        self.held[value.key] = value

    async def invalidate(self, key: ResourceKey) -> None:
        await self._travel("invalidate")
        self.held.pop(key, None)

    async def clear(self) -> None:
        await self._travel("clear")
        self.held.clear()

    def _lookup(self, key: ResourceKey, now: float, policy: FreshnessPolicy) -> CacheLookup:
        value = self.held.get(key)
        if value is None:
            return CacheLookup(None, False, False)
        age = max(0.0, now - value.observed_at)
        return CacheLookup(value, age <= policy.ttl_seconds, age <= policy.max_stale_seconds, age)

    def _offer(self, value: Value, force: bool, replace_equal: bool) -> CacheWriteResult:
        current = self.held.get(value.key)
        status = _compared(value, current, force, replace_equal)
        if current is None or status is CacheWriteStatus.STORED:
            self.held[value.key] = value
            return CacheWriteResult(status, value, current)
        return CacheWriteResult(status, current, current)

    async def _travel(self, call: str) -> None:
        self.calls.append(call)
        self.running += 1
        self.peak_running = max(self.running, self.peak_running)
        try:
            await asyncio.sleep(0.0001)
        finally:
            self.running -= 1


class BatchCache(SingleKeyCache):
    """The same with batch methods."""

    async def get_many(
        self,
        keys: Collection[ResourceKey],
        *,
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> Mapping[ResourceKey, CacheLookup]:
        await self._travel("get_many")
        return {key: self._lookup(key, now, policies[key]) for key in keys}

    async def set_many(self, values: Collection[Value]) -> None:
        await self._travel("set_many")
        self.held.update({value.key: value for value in values})

    async def invalidate_many(self, keys: Collection[ResourceKey]) -> None:
        await self._travel("invalidate_many")
        for key in keys:
            self.held.pop(key, None)


class AtomicCache(SingleKeyCache):
    """Single keys, with a write that compares."""

    async def set_if_newer(
        self, value: Value, *, force: bool = False, replace_equal: bool = False
    ) -> CacheWriteResult:
        await self._travel("set_if_newer")
        return self._offer(value, force, replace_equal)


class BatchAtomicCache(BatchCache, AtomicCache):
    """Everything there is."""

    async def set_many_if_newer(
        self, values: Collection[Value], *, force: bool = False, replace_equal: bool = False
    ) -> Mapping[ResourceKey, CacheWriteResult]:
        await self._travel("set_many_if_newer")
        best: dict[ResourceKey, Value] = {}
        for value in values:
            known = best.get(value.key)
            if _compared(value, known, False, True) is CacheWriteStatus.STORED:
                best[value.key] = value
        return {key: self._offer(value, force, replace_equal) for key, value in best.items()}


class LeasingCache(BatchAtomicCache):
    """Gives leases, and knows which have not come back."""

    def __init__(self) -> None:
        super().__init__()
        self.leased: dict[ResourceKey, Lease] = {}

    async def lease_many(
        self,
        keys: Collection[ResourceKey],
        *,
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
        force: bool = False,
        unlike: Mapping[ResourceKey, str] | None = None,
    ) -> AsyncGenerator[Mapping[ResourceKey, LeasedLookup], None]:
        await self._travel("lease_many")
        found: dict[ResourceKey, LeasedLookup] = {}
        for key in keys:
            lookup, lease, policy = self._lookup(key, now, policies[key]), None, policies[key]
            behind = policy.refresh_mode is RefreshMode.STALE_WHILE_REVALIDATE
            fit = lookup.usable_stale if behind else lookup.fresh
            if lookup.value is None or not self._is_current(lookup.value):
                lookup, fit = CacheLookup(None, False, False), False
            elif lookup.value.version == (unlike or {}).get(key):
                fit = False
            if force or not fit:
                lease = self.leased[key] = Lease(key, f"lease {len(self.calls)}")
            found[key] = LeasedLookup(lookup, lease)
        stack = list(keys)
        while stack:  # what they rest on comes along
            value = self.held.get(stack.pop())
            for below in () if value is None else value.dependency_versions:
                if below not in found and below in self.held:
                    found[below] = LeasedLookup(CacheLookup(self.held[below], False, False))
                    stack.append(below)
        yield found

    def _is_current(self, value: Value) -> bool:
        below = [
            (self.held.get(key), version) for key, version in value.dependency_versions.items()
        ]
        return all(
            each is not None and each.version == version and self._is_current(each)
            for each, version in below
        )

    async def fulfil_many(
        self,
        values: Mapping[Lease, Value],
        *,
        policies: Mapping[ResourceKey, FreshnessPolicy],
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, CacheWriteResult | Exception]:
        await self._travel("fulfil_many")
        self._take_back(values)
        results: dict[ResourceKey, CacheWriteResult | Exception] = {}
        for lease, value in values.items():
            held = self.held.get(value.key)
            gives_way = held is not None and held.version == lease.replaces
            results[value.key] = self._offer(value, gives_way, replace_equal)
        return results

    async def release_many(self, leases: Collection[Lease], *, failed: bool = False) -> None:
        await self._travel("release_many")
        self._take_back(leases)

    def _take_back(self, leases: Collection[Lease]) -> None:
        for lease in leases:
            if self.leased.get(lease.key) is lease:
                del self.leased[lease.key]


def _compared(
    value: Value, held: Value | None, force: bool, replace_equal: bool
) -> CacheWriteStatus:
    """Compare as an application does: by rank, then by time of observation."""
    if held is None or force:
        return CacheWriteStatus.STORED
    if value.authority_rank != held.authority_rank:
        higher = value.authority_rank > held.authority_rank
        return CacheWriteStatus.STORED if higher else CacheWriteStatus.IGNORED_LOWER_AUTHORITY
    if value.observed_at == held.observed_at:
        return CacheWriteStatus.STORED if replace_equal else CacheWriteStatus.IGNORED_DUPLICATE
    later = value.observed_at > held.observed_at
    return CacheWriteStatus.STORED if later else CacheWriteStatus.IGNORED_OLDER


class WrappedMemoryCache(AsyncMemoryCache):
    """The memory cache as somebody's own class, so that it is used through its public methods."""


FOREIGN: tuple[Callable[[], SingleKeyCache], ...] = (
    SingleKeyCache,
    BatchCache,
    AtomicCache,
    BatchAtomicCache,
)
MEMORY: tuple[Callable[[], AsyncCache], ...] = (AsyncMemoryCache, WrappedMemoryCache)
ALL: tuple[Callable[[], AsyncCache], ...] = (*FOREIGN, *MEMORY)
