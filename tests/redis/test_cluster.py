"""The same over a cluster of three nodes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import RedisCluster

from coalestra import CallableBatchSource, ResourceKey, SnapshotBuilder
from coalestra.redis import RedisCache
from tests.redis.servers import Server, cluster
from tests.redis.stock import POLICY, A, Told, fulfil, lease, leased, opened, read, until, value_of

pytestmark = [pytest.mark.real_loop, pytest.mark.server, pytest.mark.slow]

KEYS = [ResourceKey("many", "n", str(number)) for number in range(60)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Server]]:
    with cluster() as servers:
        yield servers


@asynccontextmanager
async def caches(
    nodes: list[Server], prefix: str, number: int = 2
) -> AsyncIterator[list[RedisCache]]:
    async with AsyncExitStack() as made:
        ports = [nodes[index % len(nodes)].port for index in range(number)]
        clients = [RedisCluster(host="127.0.0.1", port=port) for port in ports]
        several = [opened(client, prefix, time_limit_seconds=5.0) for client in clients]
        yield [await made.enter_async_context(each) for each in several]


async def test_values_travel_between_processes_and_nodes(nodes: list[Server], prefix: str) -> None:
    async with caches(nodes, prefix) as [one, other]:
        await one.set_many([value_of(key, number) for number, key in enumerate(KEYS)])
        found = await other.get_many(KEYS, now=time.time(), policies=dict.fromkeys(KEYS, POLICY))
        values = [found[key].value for key in KEYS]
        assert [each and each.value for each in values] == list(range(60))
        await other.clear()
        assert await read(one, KEYS[0]) is None


async def test_leases_and_fences_hold(nodes: list[Server], prefix: str) -> None:
    async with caches(nodes, prefix) as [one, other]:
        told = await leased(one, KEYS)
        assert all(told[key].lease for key in KEYS)
        held = told[KEYS[0]].lease
        assert held is not None
        await other.invalidate(KEYS[0])
        assert not (await fulfil(one, held)).stored
        mine = told[KEYS[1]].lease
        assert mine is not None
        assert (await fulfil(one, mine, "made")).stored
        assert await read(other, KEYS[1]) == "made"


async def test_news_reach_who_listens_at_another_node(nodes: list[Server], prefix: str) -> None:
    async with caches(nodes, prefix, 3) as [one, *others]:
        told = [Told() for _ in others]
        for each, listener in zip(others, told, strict=True):
            each.subscribe(listener)
            await read(each)
        for key in KEYS[:10]:
            value = value_of(key)
            await one.set_if_newer(value)
            for listener in told:
                await until(lambda: (key, value.version) in listener.changes)  # noqa: B023


async def test_one_builder_fetches_for_all(nodes: list[Server], prefix: str) -> None:
    calls: list[int] = []

    async def fetch(keys: Any, _context: object) -> Any:
        calls.append(len(keys))
        return dict.fromkeys(keys, 1)

    async with caches(nodes, prefix) as both:
        builders = [SnapshotBuilder(
            [CallableBatchSource(name="s", priority=1, supports=lambda _: True, fetcher=fetch)],
            cache=cache, default_policy=POLICY,
        ) for cache in both]  # fmt: skip
        for builder in builders:
            assert len(await builder.build(KEYS)) == 60
        assert sum(calls) == 60
        for builder in builders:
            await builder.aclose()


async def test_a_lease_passes_on_when_it_is_given_back(nodes: list[Server], prefix: str) -> None:
    async with caches(nodes, prefix) as [one, other]:
        held = await lease(one)
        await one.release_many([held])
        assert (await leased(other))[A].lease is not None
