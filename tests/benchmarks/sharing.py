"""The line in which many callers want the same key at the same moment."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from coalestra import ResourceKey
from tests.benchmarks import plain
from tests.benchmarks.rivals import Rivals
from tests.benchmarks.stock import FreshBuilder, keys_of, preparing, price, slow_source
from tests.benchmarks.subjects import FLOOR, OURS, Subjects
from tests.benchmarks.workshop import Work, Workshop


def pause() -> Any:
    """Let the event loop turn once."""
    return asyncio.sleep(0)


def crowd(count: int, work: Work) -> Work:
    """Return work that is done by so many tasks at once."""

    async def one() -> object:
        return await work()

    return lambda: asyncio.gather(*(one() for _ in range(count)))


class PlainFlights:
    """The plain way to share one fetch: a dictionary of futures."""

    def __init__(self) -> None:
        self._entries: plain.Entries = {}
        self._flights: dict[ResourceKey, asyncio.Future[None]] = {}

    async def read(self, key: ResourceKey) -> plain.Record:
        """Return a record of a key, fetching it if nobody has or does."""
        if key not in self._entries:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = asyncio.ensure_future(self._fetch(key))
            await flight
        return plain.read_flat(self._entries, (key,))[key]

    async def _fetch(self, key: ResourceKey) -> None:
        await pause()
        plain.keep(self._entries, key, price(key), dict.copy, time.time())
        del self._flights[key]


def callers(shop: Workshop) -> Subjects:
    """Let many callers ask for one cold key."""
    count = shop.scale.size(500)
    keys = keys_of(1)
    prepare = preparing(
        FreshBuilder(shop, lambda: slow_source(price, pause)),
        lambda builder: crowd(count, lambda: builder.build(keys))(),
    )

    async def prepare_plain() -> Work:
        flights = PlainFlights()
        return crowd(count, lambda: flights.read(keys[0]))

    rivals = Rivals(shop, keys, price, units=count)
    return {
        OURS: shop.timed_fresh(prepare, count),
        FLOOR: shop.timed_fresh(prepare_plain, count),
        **rivals.coalescing(lambda work: crowd(count, work), pause),
    }
