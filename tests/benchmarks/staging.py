"""Lines with more around a read: a session in stages, and the blocking facade."""

from __future__ import annotations

import asyncio
import threading
import time

from coalestra import ResourceKey, SnapshotSession, SyncSnapshotBuilder
from tests.benchmarks import plain
from tests.benchmarks.stock import batch_source, builder_of, kept_builder, keys_of, price
from tests.benchmarks.subjects import FLOOR, OURS, Subjects
from tests.benchmarks.workshop import Workshop

_STAGES = (slice(0, 8), slice(8, 15), slice(15, 20))


def session(shop: Workshop) -> Subjects:
    """Read 20 cached keys in three stages, then fetch the 5 of the last stage anew."""
    keys = keys_of(20)
    builder = kept_builder(shop, batch_source(price))
    shop.run(builder.build(keys))
    entries = plain.filled(((key, price(key)) for key in keys), dict.copy)

    async def ours() -> None:
        current: SnapshotSession
        async with builder.session() as current:
            for stage in _STAGES:
                await current.resolve(keys[stage])
            await current.revalidate(keys[_STAGES[-1]], force_refresh=True)

    return {OURS: shop.timed(ours), FLOOR: shop.timed_blocking(lambda: in_stages(entries, keys))}


def in_stages(entries: plain.Entries, keys: list[ResourceKey]) -> dict[ResourceKey, plain.Record]:
    """Do the same plainly; as in a session, each stage returns copies of all before it too."""
    pinned: plain.Entries = {}
    shown: dict[ResourceKey, plain.Record] = {}
    for stage in _STAGES:
        pinned.update((key, entries[key]) for key in keys[stage])
        shown = plain.read_flat(pinned, pinned)
    for key in keys[_STAGES[-1]]:
        plain.keep(entries, key, price(key), dict.copy, time.time())
        pinned[key] = entries[key]
    return plain.read_flat(pinned, pinned) or shown


def facade(shop: Workshop) -> Subjects:
    """Read one cached key from a thread without an event loop.

    The floor hands a coroutine to an event loop in another thread and waits for its result.
    """
    keys = keys_of(1)
    blocking = SyncSnapshotBuilder(builder_of(batch_source(price)))
    shop.at_end(blocking.close)
    blocking.build(keys)
    entries = plain.filled(((key, price(key)) for key in keys), dict.copy)
    loop = _loop_in_a_thread(shop)

    async def read() -> dict[ResourceKey, plain.Record]:
        return plain.read_flat(entries, keys)

    def plainly() -> object:
        return asyncio.run_coroutine_threadsafe(read(), loop).result()

    return {
        OURS: shop.timed_blocking(lambda: blocking.build(keys), clock=time.perf_counter),
        FLOOR: shop.timed_blocking(plainly, clock=time.perf_counter),
    }


def _loop_in_a_thread(shop: Workshop) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="plain loop")
    thread.start()

    def stop() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    shop.at_end(stop)
    return loop
