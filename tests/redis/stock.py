"""Keys, values, policies and small steps that the tests of the shared cache have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from redis.asyncio import Redis

from coalestra import FreshnessPolicy, ResourceKey, SnapshotValue
from coalestra.core.protocols import Lease, LeasedLookup
from coalestra.redis import RedisCache
from tests.redis.servers import Server

POLICY = FreshnessPolicy(60, 120)
A, B, C = (ResourceKey("shared", "thing", name) for name in "ABC")
PATIENT_SECONDS = 20.0
"""A time limit that a busy machine keeps."""

Caches = Callable[..., AbstractAsyncContextManager[list[RedisCache]]]


def value_of(
    key: ResourceKey = A,
    payload: Any = 1,
    *,
    observed_at: float | None = None,
    rank: int = 0,
    rests_on: Mapping[ResourceKey, str] | None = None,
    now: float | None = None,
) -> SnapshotValue[Any]:
    """A value; without a time of observation it has no date of its own."""
    fetched_at = time.time() if now is None else now
    observed = fetched_at if observed_at is None else observed_at
    return SnapshotValue(
        key, payload, "test", observed, fetched_at, 0.0, False, False, 1.0, authority_rank=rank,
        dependency_versions={} if rests_on is None else rests_on,
    )  # fmt: skip


@asynccontextmanager
async def opened(client: Any, prefix: str, **settings: Any) -> AsyncIterator[RedisCache]:
    """A cache over a client of the test's own making, which is closed as well."""
    settings = {"time_limit_seconds": PATIENT_SECONDS, **settings}
    cache = RedisCache(client, prefix=prefix, **settings)
    try:
        yield cache
    finally:
        await cache.aclose()
        if not isinstance(client, str):
            await client.aclose()


@asynccontextmanager
async def caches_of(
    server: Server, prefix: str, number: int = 1, **settings: Any
) -> AsyncIterator[list[RedisCache]]:
    """Caches that know nothing of each other, as in different processes."""
    async with AsyncExitStack() as made:
        clients = [Redis.from_url(server.url) for _ in range(number)]
        several = [opened(client, prefix, **settings) for client in clients]
        yield [await made.enter_async_context(each) for each in several]


async def read(cache: RedisCache, key: ResourceKey = A, policy: FreshnessPolicy = POLICY) -> Any:
    """What the cache has for a key, or None."""
    found = (await cache.get(key, now=time.time(), policy=policy)).value
    return None if found is None else found.value


async def leased(
    cache: RedisCache,
    keys: Collection[ResourceKey] = (A,),
    policy: FreshnessPolicy = POLICY,
    **terms: Any,
) -> dict[ResourceKey, LeasedLookup]:
    """All that comes of asking for values or leases."""
    told: dict[ResourceKey, LeasedLookup] = {}
    now = terms.pop("now", None)
    async for part in cache.lease_many(
        keys, now=time.time() if now is None else now, policies=dict.fromkeys(keys, policy), **terms
    ):
        told.update(part)
    return told


async def lease(cache: RedisCache, key: ResourceKey = A, **terms: Any) -> Lease:
    """The lease on a key that is missing, or asked for by force."""
    found = (await leased(cache, (key,), **terms))[key].lease
    assert found is not None
    return found


async def waits(cache: RedisCache, **terms: Any) -> asyncio.Task[dict[ResourceKey, LeasedLookup]]:
    """Ask for A in vain, and wait for who has the lease on it."""
    waiting = asyncio.create_task(leased(cache, **terms))
    await until(lambda: cache.health().waiting)
    return waiting


async def fulfil(cache: RedisCache, held: Lease, payload: Any = 1, **terms: Any) -> Any:
    """Store a value under a lease; return what became of it."""
    value = value_of(held.key, payload, **terms)
    outcome = await cache.fulfil_many({held: value}, policies={held.key: POLICY})
    return outcome[held.key]


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that others bring about."""
    end = time.monotonic() + PATIENT_SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{condition} did not come true within {PATIENT_SECONDS:g} s")
        await asyncio.sleep(0.005)


class Told:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.changes: list[tuple[ResourceKey, str | None]] = []
        self.gaps = 0

    def changed(self, key: ResourceKey, version: str | None) -> None:
        self.changes.append((key, version))

    def missed(self) -> None:
        self.gaps += 1
