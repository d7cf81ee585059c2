"""What a shared cache costs, beside others over the same server, and with several processes.

Usage: ``python -m tests.benchmarks.shared [--quick]``. It starts a server of its own, and says that
it is left out where there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable, Collection
from time import perf_counter
from typing import Any

from coalestra import (
    CallableBatchSource,
    FreshnessPolicy,
    ResourceKey,
    ResourceUpdate,
    SnapshotBuilder,
)
from tests.benchmarks.rivals import installed
from tests.redis.servers import Server, binary, running

KEYS = [ResourceKey("bench", "price", str(number)) for number in range(100)]
NAMES = [str(key) for key in KEYS]
PAYLOAD = {"price": "65000.00", "size": 3, "side": "buy"}
LIFETIME = 600.0
Work = Callable[[], Awaitable[object]]
LINES = {
    "warm-near": "warm snapshot of 100 keys from memory, us/key",
    "warm-one": "warm snapshot of 1 key from memory, us",
    "read-100": "100 keys from the server in one round trip, us/key",
    "cold-100": "cold batch of 100 keys, with leases, us/key",
    "publish": "publish one, us",
}
UNITS = {"warm-near": 100, "read-100": 100, "cold-100": 100}


async def fetched(keys: Collection[ResourceKey], _context: object) -> dict[Any, Any]:
    return {key: dict(PAYLOAD) for key in keys}


def builder_over(cache: Any, fetcher: Any = fetched) -> SnapshotBuilder:
    source = CallableBatchSource(name="bench", priority=1, supports=lambda _: True, fetcher=fetcher)
    return SnapshotBuilder(
        [source], cache=cache, default_policy=FreshnessPolicy(LIFETIME, LIFETIME)
    )


async def ours(server: Server | None) -> dict[str, Work]:
    """The work of each line with a builder: over the shared cache, or over the memory cache."""
    from coalestra.redis import RedisCache

    terms: dict[str, Any] = {"prefix": "near", "time_limit_seconds": 5.0}
    builder = builder_over(server and RedisCache(server.url, **terms))
    await builder.build(KEYS)
    works: dict[str, Work] = {
        "warm-near": lambda: builder.build(KEYS),
        "warm-one": lambda: builder.build(KEYS[:1]),
        "publish": lambda: builder.publisher.publish(KEYS[0], PAYLOAD, source="bench"),
    }
    if server is None:
        return works
    plain = builder_over(RedisCache(server.url, near_entries=0, **terms))
    await asyncio.sleep(0.2)
    await builder.build(KEYS)
    serial = iter(range(1_000_000))

    async def cold() -> None:
        batch = next(serial)
        await builder.build([ResourceKey("bench", "cold", f"{batch}-{n}") for n in range(100)])

    return {**works, "read-100": lambda: plain.build(KEYS), "cold-100": cold}


async def by_aiocache(server: Server) -> dict[str, Work]:
    aiocache = installed("aiocache")
    serializers = installed("aiocache.serializers")
    if aiocache is None:
        return {}
    cache = aiocache.RedisCache(
        endpoint="127.0.0.1", port=server.port, serializer=serializers.JsonSerializer()
    )
    await cache.multi_set([(name, PAYLOAD) for name in NAMES], ttl=LIFETIME)
    serial = iter(range(1_000_000))

    async def cold() -> None:
        names = [f"cold:{next(serial)}" for _ in range(100)]
        found = await cache.multi_get(names)
        missing = [name for name, value in zip(names, found, strict=True) if value is None]
        await cache.multi_set([(name, dict(PAYLOAD)) for name in missing], ttl=LIFETIME)

    return {
        "read-100": lambda: cache.multi_get(NAMES),
        "cold-100": cold,
        "publish": lambda: cache.set(NAMES[0], PAYLOAD, ttl=LIFETIME),
    }


async def by_cashews(server: Server) -> dict[str, Work]:
    cashews = installed("cashews")
    if cashews is None:
        return {}
    cache, near = cashews.Cache(), cashews.Cache()
    cache.setup(server.url, pickle_type="json")
    near.setup(server.url, client_side=True, pickle_type="json")
    for each in (cache, near):
        await each.init()
        await each.set_many({f"c:{name}": PAYLOAD for name in NAMES}, expire=LIFETIME)
    names = [f"c:{name}" for name in NAMES]
    serial = iter(range(1_000_000))

    async def cold() -> None:
        wanted = [f"cc:{next(serial)}" for _ in range(100)]
        found = await cache.get_many(*wanted)
        missing = [name for name, value in zip(wanted, found, strict=True) if value is None]
        await cache.set_many({name: dict(PAYLOAD) for name in missing}, expire=LIFETIME)

    await near.get_many(*names)
    return {
        "warm-near": lambda: near.get_many(*names),
        "warm-one": lambda: near.get(names[0]),
        "read-100": lambda: cache.get_many(*names),
        "cold-100": cold,
        "publish": lambda: cache.set(names[0], PAYLOAD, expire=LIFETIME),
    }


async def timed(work: Work, seconds: float, rounds: int) -> float:
    """The median over some rounds of the seconds that a piece of work takes."""
    await work()
    samples = []
    for _ in range(rounds):
        gc.collect()
        times, began = 0, perf_counter()
        while perf_counter() - began < seconds:
            await work()
            times += 1
        samples.append((perf_counter() - began) / times)
    return statistics.median(samples)


async def table(server: Server, seconds: float, rounds: int) -> str:
    subjects = {
        "coalestra, shared": await ours(server),
        "coalestra, memory": await ours(None),
        "aiocache": await by_aiocache(server),
        "cashews": await by_cashews(server),
    }
    rows = [f"| work | {' | '.join(subjects)} |", "| --- " + "| ---: " * len(subjects) + "|"]
    for line, what in LINES.items():
        cells = []
        for works in subjects.values():
            work = works.get(line)
            took = None if work is None else await timed(work, seconds, rounds)
            cells.append("" if took is None else f"{took * 1e6 / UNITS.get(line, 1):.3g}")
        rows.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(rows)


# Several processes at once --------------------------------------------------------------------


async def reader(url: str, seconds: float) -> None:
    """One of several processes: reads all keys again and again, for some time; tells how often."""
    from coalestra.redis import RedisCache

    calls = 0

    async def slow(keys: Collection[ResourceKey], context: object) -> dict[Any, Any]:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.05)
        return await fetched(keys, context)

    cache = RedisCache(url, prefix="many", time_limit_seconds=5.0)
    async with builder_over(cache, slow) as builder:
        say("ready")
        sys.stdin.readline()
        reads, began = 0, perf_counter()
        publishing = asyncio.create_task(publish_now_and_then(builder))
        while perf_counter() - began < seconds:
            await builder.build(KEYS)
            reads += 1
        publishing.cancel()
        say(json.dumps({"calls": calls, "reads": reads / seconds}))
    await cache.aclose()


async def publish_now_and_then(builder: SnapshotBuilder) -> None:
    while True:
        await asyncio.sleep(0.1)
        updates = [ResourceUpdate(key, PAYLOAD, "b") for key in KEYS[:3]]
        await builder.publisher.publish_many(updates)


def together(server: Server, count: int, seconds: float) -> str:
    server.command("FLUSHALL")
    command = [sys.executable, "-m", "tests.benchmarks.shared", "--reader", server.url]
    processes = [subprocess.Popen(
        [*command, "--seconds", str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) for _ in range(count)]  # fmt: skip
    for each in processes:
        assert each.stdout is not None
        each.stdout.readline()
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    told = [json.loads(each.communicate()[0]) for each in processes]
    calls, reads = sum(each["calls"] for each in told), sum(each["reads"] for each in told)
    return f"| {count} | {calls} | {reads:,.0f} |"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m tests.benchmarks.shared")
    asked.add_argument("--quick", action="store_true")
    asked.add_argument("--reader", metavar="URL", help=argparse.SUPPRESS)
    asked.add_argument("--seconds", type=float, default=3.0, help=argparse.SUPPRESS)
    options = asked.parse_args()
    if options.reader:
        asyncio.run(reader(options.reader, options.seconds))
        return
    if binary() is None or installed("redis") is None:
        say("the shared cache is left out: it needs coalestra[redis] and a server")
        return
    seconds, rounds = (0.05, 3) if options.quick else (0.5, 7)
    with running() as server:
        say(asyncio.run(table(server, seconds, rounds)))
        say("\n| processes | source calls | snapshots of 100 keys a second, together |")
        say("| ---: | ---: | ---: |")
        for count in (1, 2, 4):
            say(together(server, count, 0.5 if options.quick else 3.0))


if __name__ == "__main__":
    main()
