"""A process of its own over a shared cache; it does what it is told, line by line.

Each line of input is an order, as JSON; each line of output its answer. To ``begin`` is to
be one builder over one cache, with a URL, a prefix, an offset of the clock and settings, until told
to ``end``. The source's truth is kept on the same server, apart from the cache: a number under
``PREFIX-truth:NAME``, and the count of calls under ``PREFIX-calls``.
Told to be ``held``, each call takes one from the list ``PREFIX-gate`` before it answers.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Collection
from typing import Any

from redis.asyncio import Redis

from coalestra import (
    CallableBatchSource,
    CallableDerivedSource,
    FreshnessPolicy,
    ResourceKey,
    SnapshotBuilder,
)
from coalestra.core.protocols import SystemClock
from coalestra.redis import RedisCache
from tests.support.workers import say

POLICY = FreshnessPolicy(ttl_seconds=300, max_stale_seconds=600)


class ShiftedClock(SystemClock):
    """The machine's clock, wrong by some seconds."""

    __slots__ = ("_offset",)

    def __init__(self, offset: float) -> None:
        self._offset = offset

    def now(self) -> float:
        return time.time() + self._offset


def key_of(name: str) -> ResourceKey:
    return ResourceKey("truth", "number", name)


class Worker:
    """One builder over one shared cache, and the truth behind its source."""

    def __init__(self, url: str, prefix: str, offset: float, settings: dict[str, Any]) -> None:
        self.prefix = prefix
        self.plain = Redis.from_url(url, decode_responses=True)
        self.client = Redis.from_url(url)
        self.cache = RedisCache(self.client, prefix=prefix, **settings)
        self.delay = 0.0
        self.held = False
        self.fails = False
        self.heard = True
        sources: list[Any] = [
            CallableBatchSource(name="truth", priority=1, supports=lambda key: key.name == "number",
                fetcher=self.fetch),
            CallableDerivedSource(name="sum", priority=1, supports=lambda key: key.name == "sum",
                dependencies=lambda key: [key_of(name) for name in key.subject.split("+")],
                deriver=self.add),
        ]  # fmt: skip
        self.builder = SnapshotBuilder(
            sources, cache=self.cache, default_policy=POLICY, clock=ShiftedClock(offset)
        )

    async def fetch(self, keys: Collection[ResourceKey], _context: object) -> dict[Any, Any]:
        await self.plain.incr(f"{self.prefix}-calls")
        values = {}
        for key in keys:
            values[key] = int(await self.plain.get(f"{self.prefix}-truth:{key.subject}") or 0)
        await asyncio.sleep(self.delay)
        while self.held and not await self.plain.lpop(f"{self.prefix}-gate"):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        if self.fails:
            raise ConnectionError("the source is down")
        return values

    async def add(self, key: ResourceKey, snapshot: Any, _context: object) -> int:
        await self.plain.incr(f"{self.prefix}-derivations")
        return sum(snapshot[key_of(name)].value for name in key.subject.split("+"))

    async def read(
        self, names: list[str], readers: int = 1, deadline: float | None = None
    ) -> dict[str, Any]:
        """Build one snapshot of the keys for each of many readers."""
        keys = [key_of(name) for name in names if "+" not in name]
        keys += [ResourceKey("truth", "sum", name) for name in names if "+" in name]
        began = time.monotonic()
        terms: dict[str, Any] = {} if deadline is None else {"deadline_seconds": deadline}
        snapshots = await asyncio.gather(
            *(self.builder.build(keys, **terms) for _ in range(readers)), return_exceptions=True
        )
        ended = time.monotonic()
        errors = [
            f"{type(each).__name__}: {each}" for each in snapshots if isinstance(each, Exception)
        ]
        values = [
            [each[key].value for key in keys]
            for each in snapshots
            if not isinstance(each, BaseException)
        ]
        return {"values": values, "errors": errors, "began": began, "ended": ended}

    async def change(self, name: str, how: str) -> dict[str, Any]:
        """Let the truth become another one, and tell; one process after the other."""
        lock = f"{self.prefix}-lock:{name}"
        while not await self.plain.set(lock, 1, nx=True):  # noqa: ASYNC110 - held by others
            await asyncio.sleep(0.001)
        began = time.monotonic()
        value = await self.plain.incr(f"{self.prefix}-truth:{name}")
        error = None
        try:
            if how == "publish":
                await self.builder.publisher.publish(key_of(name), value, source="truth")
            else:
                await self.builder.publisher.invalidate(key_of(name))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        ended = time.monotonic()
        await self.plain.delete(lock)
        return {"value": value, "error": error, "began": began, "ended": ended}

    async def history(self, seed: int, length: int, names: list[str]) -> dict[str, Any]:
        """Read and change at random, four at once; return all that happened."""
        events: list[dict[str, Any]] = []

        async def act(number: int) -> None:
            dice = random.Random(seed * 100 + number)
            for _ in range(length):
                name = dice.choice(names)
                chance = dice.random()
                if chance < 0.1 and "+" not in name:
                    how = dice.choice(["publish", "invalidate"])
                    events.append({"event": how, "name": name, **await self.change(name, how)})
                else:
                    events.append({"event": "read", "name": name, **await self.read([name])})
                await asyncio.sleep(dice.choice([0.0, 0.0, 0.002, 0.01]))

        await asyncio.gather(*(act(number) for number in range(4)))
        await self.plain.incr(f"{self.prefix}-ended")
        return {"events": events}

    async def do(self, what: str, order: dict[str, Any]) -> dict[str, Any]:
        if what == "set":
            for name, value in order.items():
                setattr(self, name, value)
            return {}
        answer: dict[str, Any] = await getattr(self, what)(**order)
        return answer

    async def end(self) -> dict[str, Any]:
        """Close what it has."""
        await self.builder.aclose()
        await self.cache.aclose()
        await self.client.aclose()
        await self.plain.aclose()
        return {}


async def serve() -> None:
    """Take orders until there is no one left to give them."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    worker = None
    while line := await lines.readline():
        what, _, order = json.loads(line)
        if worker is None or what == "begin":
            worker = Worker(**order)
            say({})
        else:
            say(await worker.do(what, order))


if __name__ == "__main__":
    asyncio.run(serve())
