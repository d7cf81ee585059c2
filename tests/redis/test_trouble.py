"""What a builder does while the server is gone, slow, empty, full, or silent about the news."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from coalestra import (
    BuilderHealthReason,
    CallableBatchSource,
    CallableDerivedSource,
    CircuitBreakerPolicy,
    FreshnessPolicy,
    ResourceKey,
    SnapshotBuilder,
    SyncSnapshotBuilder,
)
from coalestra.core.errors import CacheUnavailableError
from coalestra.redis import RedisCache, SharedCacheUnavailableError
from coalestra.redis.server import _Line
from tests.redis.servers import Server, running
from tests.redis.stock import PATIENT_SECONDS, A, B, opened, until
from tests.support import Gate, begun
from tests.support.elsewhere import needs_fork
from tests.support.workers import SOURCE

pytestmark = [pytest.mark.real_loop, pytest.mark.server]

POLICY = FreshnessPolicy(60.0, 120.0)
LIMIT_SECONDS = 0.25
"""The time limit of the library, where its end is waited for; elsewhere a machine may be busy."""


class Truth:
    """A source that counts its calls and gives a number that the test sets."""

    def __init__(self) -> None:
        self.value = 1
        self.calls = 0
        self.gate = Gate(opened=True)

    async def fetch(self, keys: Collection[ResourceKey], _context: object) -> dict[Any, Any]:
        self.calls += 1
        await self.gate.pass_()
        return dict.fromkeys(keys, self.value)

    @property
    def source(self) -> CallableBatchSource:
        return CallableBatchSource(
            name="truth", priority=1, supports=lambda _: True, fetcher=self.fetch
        )


@asynccontextmanager
async def a_process(
    server: Server, prefix: str, limit_seconds: float = PATIENT_SECONDS
) -> AsyncIterator[tuple[SnapshotBuilder, RedisCache, Truth]]:
    """A builder over a shared cache, as one process has them."""
    truth, client = Truth(), Redis.from_url(server.url)
    async with (
        opened(client, prefix, time_limit_seconds=limit_seconds) as cache,
        SnapshotBuilder([truth.source], cache=cache, default_policy=POLICY) as builder,
    ):
        yield builder, cache, truth


async def value(builder: SnapshotBuilder, key: ResourceKey = A) -> Any:
    return (await builder.build([key]))[key].value


def stored(server: Server, prefix: str) -> bool:
    """Whether the server has a value for A."""
    return server.command("HEXISTS", f"{prefix}:shared:thing:A", "d").startswith(b":1")


@contextmanager
def impatient(cache: RedisCache) -> Iterator[None]:
    """Let calls take no longer than is usual, for as long as the server is away."""
    cache._server.time_limit_seconds = LIMIT_SECONDS
    yield
    cache._server.time_limit_seconds = PATIENT_SECONDS


@pytest.fixture
def left_alone_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server be tried again so late that no test sees it."""
    policy = CircuitBreakerPolicy(failure_threshold=3, recovery_timeout_seconds=600)
    monkeypatch.setattr("coalestra.redis.server._CIRCUIT", policy)


# The server is gone ---------------------------------------------------------------------------


@pytest.mark.usefixtures("left_alone_for_long")
async def test_a_server_that_was_never_there_is_asked_a_few_times_only(prefix: str) -> None:
    server = Server()  # not started
    async with a_process(server, prefix, LIMIT_SECONDS) as (builder, cache, _):
        for _ in range(5):
            assert await value(builder) == 1
        health = cache.health()
        assert (health.state, health.news_connected) == ("open", False)
        assert health.failures == health.calls == 3
        assert await value(builder) == 1
        assert cache.health().calls == 3  # nothing is waited for
        with pytest.raises(SharedCacheUnavailableError):
            await builder.publisher.publish(A, 2, source="truth")
        with pytest.raises(CacheUnavailableError):
            await builder.publisher.invalidate(A)
        told = await builder.health_snapshot()
        assert told.cache_failure_count >= 3
        assert told.assess().reasons == (BuilderHealthReason.CACHE_LEFT_ALONE,)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "paused"])
async def test_while_the_server_is_away_builds_go_on_with_their_sources(
    own_server: Server, prefix: str, how: str
) -> None:
    async with a_process(own_server, prefix) as (builder, cache, truth):
        assert await value(builder) == 1
        own_server.stop() if how == "stopped" else own_server.pause()
        try:
            with impatient(cache):
                await until(lambda: not cache.health().news_connected)
                truth.value = 2
                for _ in range(6):
                    assert await asyncio.wait_for(value(builder), PATIENT_SECONDS) == 2
                assert cache.health().failures
                with pytest.raises(CacheUnavailableError):
                    await builder.publisher.publish(A, 3, source="truth")
        finally:
            own_server.start() if how == "stopped" else own_server.resume()
        await until(lambda: cache.health().news_connected)
        while cache.health().state != "closed" or not stored(own_server, prefix):
            await value(builder)  # the circuit tries again by itself
            await asyncio.sleep(0.05)
        calls = truth.calls
        for _ in range(20):
            await value(builder)
        assert truth.calls == calls


@pytest.mark.usefixtures("left_alone_for_long")
@pytest.mark.parametrize("since", ["the beginning", "a moment"])
async def test_while_the_server_is_away_readers_share_a_call_under_way(
    own_server: Server, prefix: str, since: str
) -> None:
    async with a_process(own_server, prefix) as (builder, cache, truth):
        if since == "a moment":
            await value(builder)
            await until(cache.caught_up)
            await value(builder)
        own_server.stop()
        with impatient(cache):
            while cache.health().state != "open":
                await value(builder)
            calls = truth.calls
            truth.gate.close()
            first = asyncio.create_task(value(builder))
            await truth.gate.wait_arrived(calls + 1)
            second = asyncio.create_task(value(builder))
            await until(lambda: builder.flights_under_way()[0].waiters == 2)
            truth.gate.open()
            assert [await first, await second] == [1, 1]
            assert truth.calls == calls + 1


async def test_a_warm_read_waits_for_no_server_that_stalls(own_server: Server, prefix: str) -> None:
    async with a_process(own_server, prefix) as (builder, cache, truth):
        calls = -1
        while calls != cache.health().calls:
            calls = cache.health().calls
            await value(builder)
            await asyncio.sleep(0.05)
        own_server.pause()
        try:
            assert await asyncio.wait_for(value(builder), PATIENT_SECONDS / 2) == 1
            assert truth.calls == 1
        finally:
            own_server.resume()


async def test_what_is_fetched_in_a_cut_replaces_no_newer(own_server: Server, prefix: str) -> None:
    """One process loses the server; another one publishes; the first comes back."""
    async with (
        a_process(own_server, prefix) as (cut, cut_cache, cut_truth),
        a_process(own_server, prefix) as (other, _, _),
    ):
        await value(cut)
        run = cut_cache._server.run

        async def unreachable(*_: Any) -> list[Any]:
            raise SharedCacheUnavailableError("cut off by the test")

        cut_cache._server.run = unreachable  # type: ignore[assignment, method-assign]  # the cable is pulled
        cut_cache._news._line.close()  # type: ignore[union-attr]  # there
        await asyncio.sleep(0)
        cut_truth.value = 5
        assert await value(cut) == 5
        await other.publisher.publish(A, 9, source="truth")
        cut_cache._server.run = run  # type: ignore[method-assign]  # plugged in again
        await until(cut_cache.caught_up)
        assert [await value(cut), await value(other)] == [9, 9]


async def test_a_server_without_memory_is_read_but_stores_nothing(prefix: str) -> None:
    with running("--maxmemory-policy", "noeviction") as server:
        async with a_process(server, prefix) as (builder, cache, truth):
            await value(builder)
            await until(lambda: stored(server, prefix))
            await until(lambda: not cache.health().leases)
            server.command("CONFIG", "SET", "maxmemory", "1")
            assert await value(builder, B) == 1
            with pytest.raises(CacheUnavailableError, match="OOM|memory"):
                await builder.publisher.publish(A, 2, source="truth")
            assert await value(builder) == 1  # the one that is stored
            assert truth.calls == 2
            assert cache.health().state == "closed"
            server.command("CONFIG", "SET", "maxmemory", "0")
            assert (await builder.publisher.publish(A, 2, source="truth")).published


async def test_scripts_the_server_forgot_are_sent_again(own_server: Server, prefix: str) -> None:
    async with a_process(own_server, prefix) as (builder, cache, _):
        await value(builder)
        own_server.command("SCRIPT", "FLUSH")
        await builder.publisher.publish(A, 2, source="truth")
        assert await value(builder) == 2
        assert cache.health().failures == 0


# The news are cut -----------------------------------------------------------------------------


async def test_while_news_are_cut_reads_go_to_the_server(own_server: Server, prefix: str) -> None:
    async with (
        a_process(own_server, prefix) as (one, cache, truth),
        a_process(own_server, prefix) as (other, _, _),
    ):
        await value(one)
        await value(other)
        for turn in range(2, 12):
            own_server.command("CLIENT", "KILL", "TYPE", "pubsub")
            await other.publisher.publish(A, turn, source="truth")
            assert await value(one) == turn
        assert truth.calls == 1
        await until(cache.caught_up)
        assert cache.health().news_lost
        calls = cache.health().calls
        await value(one)
        await value(one)
        assert cache.health().calls <= calls + 1


async def test_while_news_are_cut_readers_still_share_a_call(server: Server, prefix: str) -> None:
    async with a_process(server, prefix) as (builder, cache, truth):
        await value(builder)
        cache._news.catch_up = lambda: False  # type: ignore[method-assign]  # cut by the test
        assert set(await asyncio.gather(*(value(builder, B) for _ in range(50)))) == {1}
        assert truth.calls == 2


async def test_what_is_derived_in_a_cut_is_so_once_and_kept(server: Server, prefix: str) -> None:
    """Each newcomer asks the server, and waits there for the one who has the lease."""
    gate = Gate()

    async def derive(_key: ResourceKey, snapshot: Any, _context: object) -> Any:
        await gate.pass_()
        return snapshot[A].value

    derived = CallableDerivedSource(
        name="derived", priority=2, supports=lambda key: key == B, dependencies=lambda _: [A],
        deriver=derive,
    )  # fmt: skip
    async with (
        a_process(server, prefix) as (_, cache, truth),
        SnapshotBuilder([truth.source, derived], cache=cache, default_policy=POLICY) as builder,
    ):
        cache._news.catch_up = lambda: False  # type: ignore[method-assign]  # cut by the test
        first = await begun(value(builder, B), gate)
        second = asyncio.create_task(value(builder, B))
        await until(lambda: cache.health().waiting or gate.arrived > 1)
        gate.open()
        assert [await first, await second, await value(builder, B)] == [1, 1, 1]
        assert gate.arrived == 1


@pytest.mark.parametrize("channel", [b"c:#news", b"-:#news", b":1:#news"])
async def test_news_are_heard_however_the_stream_is_cut(
    channel: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bulk(*parts: bytes) -> bytes:
        told = b"".join(b"$%d\r\n%b\r\n" % (len(each), each) for each in parts)
        return b"*%d\r\n%b" % (len(parts), told)

    confirmed = b"*3\r\n" + bulk(b"subscribe", channel)[4:] + b":1\r\n"
    monkeypatch.setattr("coalestra.redis.server.SLICE_SECONDS", 60.0)
    texts = [b"one", b"", b"\r\n*3\r\n$7\r\nmessage\r\n", b"last"]
    stream = confirmed + b"".join(
        bulk(b"message", channel, text) + bulk(b"pong", b"") for text in texts
    )
    for size in range(1, len(stream)):
        heard: list[bytes] = []
        line = _Line(channel, heard.append)
        for start in range(0, len(stream), size):
            line.data_received(stream[start : start + size])
            assert line.subscribed.done() is (start + size >= len(confirmed))
        assert (heard, line.refusal, line.catch_up()) == (texts, None, True)
    refused = _Line(channel, heard.append)
    refused.data_received(b"-NOPERM not you\r\n")
    assert (refused.subscribed.done(), refused.refusal) == (True, "NOPERM not you")


async def test_news_of_very_many_keys_are_heard_in_several_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing more is read meanwhile, and who needs to know it all does not wait."""

    class Transport:
        def __getattr__(self, name: str) -> Any:
            return lambda: asked.append(name)

    def news(*numbers: int) -> bytes:
        return b"".join(b"*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\n%d\r\n" % n for n in numbers)

    monkeypatch.setattr("coalestra.redis.server.SLICE_SECONDS", 0.0)
    heard: list[bytes] = []
    asked: list[str] = []
    line = _Line(b"c", heard.append)
    line._transport = Transport()
    line.data_received(news(1, 2, 3, 4, 5))
    assert (heard, asked) == ([b"1"], ["pause_reading"])
    await asyncio.sleep(0)
    line.data_received(news(6))
    assert heard == [b"1", b"2"]
    assert line.catch_up()
    assert heard == [b"1", b"2", b"3", b"4", b"5", b"6"]
    await asyncio.sleep(0)
    assert asked == ["pause_reading", "resume_reading"]
    line.data_received(news(7, 8, 9))
    line.close()
    await asyncio.sleep(0)
    assert heard[6:] == [b"7"], "those who hear it are told that they have missed some"


async def test_a_subscription_the_server_refuses_is_none(own_server: Server, prefix: str) -> None:
    own_server.command("ACL", "SETUSER", "default", "-subscribe")
    async with (
        a_process(own_server, prefix) as (one, cache, _),
        a_process(own_server, prefix) as (other, _, _),
    ):
        await asyncio.wait_for(value(one), PATIENT_SECONDS / 2)  # not for a subscription
        for turn in range(2, 5):
            await other.publisher.publish(A, turn, source="truth")
            assert await value(one) == turn
        await until(lambda: cache.health().last_error)
        assert "refused the subscription: NOPERM" in (cache.health().last_error or "")
        assert not cache.health().news_connected


async def test_waiting_for_others_survives_a_loss_of_news(own_server: Server, prefix: str) -> None:
    async with (
        a_process(own_server, prefix) as (one, one_cache, truth),
        a_process(own_server, prefix) as (other, other_cache, other_truth),
    ):
        truth.gate.close()
        first = asyncio.create_task(value(one))
        await until(lambda: one_cache.health().leases)
        second = asyncio.create_task(value(other))
        await until(lambda: other_cache.health().waiting)
        own_server.command("CLIENT", "KILL", "TYPE", "pubsub")
        truth.gate.open()
        assert [await first, await second] == [1, 1]
        assert other_truth.calls == 0


# One's own processes --------------------------------------------------------------------------


def test_a_threaded_builder_works_as_well(server: Server, prefix: str) -> None:
    truth = Truth()

    def threaded() -> SyncSnapshotBuilder:
        cache = RedisCache(server.url, prefix=prefix, time_limit_seconds=3.0)
        return SyncSnapshotBuilder(
            SnapshotBuilder(
                [truth.source], cache=cache, default_policy=POLICY, manage_lifecycle=True
            )
        )

    with threaded() as one, threaded() as other:
        assert one.build([A])[A].value == 1
        assert one.build([A])[A].from_cache
        assert other.build([A])[A].value == 1
        one.publisher.publish(A, 2, source="truth")
        assert [each.build([A])[A].value for each in (one, other)] == [2, 2]
    assert truth.calls == 1


FORKED = """
import asyncio, os, sys
from coalestra import CallableSource, ResourceKey, SnapshotBuilder
from coalestra.redis import RedisCache

async def fetch(key, context):
    return 1

cache = RedisCache(sys.argv[1])
source = CallableSource(name="s", priority=1, supports=lambda key: True, fetcher=fetch)
builder = SnapshotBuilder([source], cache=cache)
child = os.fork()
try:
    asyncio.run(builder.build([ResourceKey("a", "b")]))
    print("served" if child else "served in the child", flush=True)
except RuntimeError as error:
    print(error, flush=True)
if child:
    os.waitpid(child, 0)
os._exit(0)
"""


@needs_fork
def test_the_child_of_a_fork_is_told_to_make_its_own(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, server.url], env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    served, refused = sorted(done.stdout.splitlines())
    assert served == "served"
    assert refused.startswith("this RedisCache, or its client, was made before the process was")
    assert "post_fork" in refused
