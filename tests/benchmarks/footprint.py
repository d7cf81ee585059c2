"""Lines that weigh: memory per cached float, and of a snapshot per key."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Sequence

from coalestra import ResourceKey
from tests.benchmarks import plain
from tests.benchmarks.rivals import installed
from tests.benchmarks.stock import FreshBuilder, batch_source, keys_of, number
from tests.benchmarks.subjects import FLOOR, OURS, Subjects
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


def cached_floats(shop: Workshop) -> Subjects:
    """Cache many floats; the keys belong to the caller and are not weighed, the floats are."""
    keys = keys_of(shop.scale.size(10_000))
    builder = FreshBuilder(shop, lambda: batch_source(number))

    async def fill() -> object:
        """Fill a new builder's cache by building a snapshot, and let the snapshot go."""
        filled = await builder.renew()
        await filled.build(keys)
        return filled

    async def plainly() -> plain.Entries:
        return plain.filled(((key, number(key)) for key in keys), plain.same)

    def weighed(fill: Fill) -> Callable[[], float]:
        return lambda: shop.run(weight(fill)) / len(keys)

    fills: dict[str, Fill] = {OURS: fill, FLOOR: plainly, **dict(_rivals(keys))}
    return {name: weighed(each) for name, each in fills.items()}


def _rivals(keys: Sequence[ResourceKey]) -> Iterator[tuple[str, Fill]]:
    texts = [str(key) for key in keys]
    if aiocache := installed("aiocache"):

        async def fill_aiocache() -> object:
            store = aiocache.SimpleMemoryCache()
            await store.multi_set([(text, number(text)) for text in texts])
            return store

        yield "aiocache", fill_aiocache
    if async_lru := installed("async_lru"):

        async def fill_async_lru() -> object:
            async def fetch(key: ResourceKey) -> float:
                return number(key)

            cached = async_lru.alru_cache(maxsize=None)(fetch)
            for key in keys:
                await cached(key)
            return cached

        yield "async-lru", fill_async_lru
