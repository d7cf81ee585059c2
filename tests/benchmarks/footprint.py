"""Lines that weigh: memory per cached float, and of a snapshot per key."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence

from coalestra import ResourceKey, SnapshotBuilder
from tests.benchmarks import plain
from tests.benchmarks.rivals import installed
from tests.benchmarks.stock import batch_source, builder_of, keys_of, number
from tests.benchmarks.subjects import Role, Subject
from tests.benchmarks.workshop import Workshop

Fill = Callable[[], Awaitable[object]]


async def weight(fill: Fill) -> float:
    """Return how many bytes more are in use while what ``fill`` returns is alive."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = await fill()
        await asyncio.sleep(0.05)  # what is over is let go of in slices
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    del kept
    return float(after - before)


def cached_floats(shop: Workshop) -> list[Subject]:
    """Cache many floats; the keys belong to the caller and are not weighed, the floats are."""
    keys = keys_of(shop.scale.size(10_000))

    def subject(name: str, role: Role, fill: Fill) -> Subject:
        return Subject(name, role, lambda: shop.run(weight(fill)) / len(keys))

    return [
        subject("coalestra", Role.OURS, _Filling(keys, shop).fill),
        subject("plain loop", Role.FLOOR, lambda: _plainly(keys)),
        *(subject(name, Role.RIVAL, fill) for name, fill in _rivals(keys)),
    ]


class _Filling:
    """Fills a new builder's cache by building a snapshot, and lets the snapshot go."""

    def __init__(self, keys: Sequence[ResourceKey], shop: Workshop) -> None:
        self._keys = keys
        self._builder: SnapshotBuilder | None = None
        shop.at_end(lambda: shop.run(self._close()))

    async def fill(self) -> object:
        await self._close()
        self._builder = builder_of(batch_source(number))
        await self._builder.build(self._keys)
        return self._builder

    async def _close(self) -> None:
        if self._builder is not None:
            await self._builder.aclose()
            self._builder = None


async def _plainly(keys: Sequence[ResourceKey]) -> plain.Entries:
    return plain.filled(((key, number(key)) for key in keys), plain.same)


def _rivals(keys: Sequence[ResourceKey]) -> list[tuple[str, Fill]]:
    texts = [str(key) for key in keys]
    found: list[tuple[str, Fill]] = []
    if aiocache := installed("aiocache"):

        async def fill_aiocache() -> object:
            store = aiocache.SimpleMemoryCache()
            await store.multi_set([(text, number(text)) for text in texts])
            return store

        found.append(("aiocache", fill_aiocache))
    if async_lru := installed("async_lru"):

        async def fill_async_lru() -> object:
            async def fetch(key: ResourceKey) -> float:
                return number(key)

            cached = async_lru.alru_cache(maxsize=None)(fetch)
            for key in keys:
                await cached(key)
            return cached

        found.append(("async-lru", fill_async_lru))
    return found
