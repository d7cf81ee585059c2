"""The server as it is run in production: encrypted, with few rights, few connections, replicas."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NotConnected

from coalestra import ResourceKey, SnapshotBuilder
from coalestra.redis import MessagePackCodec, RedisCache, SharedCacheUnavailableError
from coalestra.redis.scripts import name_of
from tests.redis.servers import Server, free_port, running
from tests.redis.stock import (
    PATIENT_SECONDS,
    POLICY,
    A,
    B,
    Caches,
    Told,
    fulfil,
    lease,
    leased,
    opened,
    read,
    until,
    value_of,
    waits,
)
from tests.redis.test_page import PAGE
from tests.redis.test_trouble import Truth, stored, value

pytestmark = [pytest.mark.real_loop, pytest.mark.server]


# Encrypted ------------------------------------------------------------------------------------


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[str]:
    """The URL of a server that wants TLS and a password."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH to make a certificate with")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost"
    names = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate)
    subprocess.run(["openssl", *made.split(), *names], check=True, capture_output=True)
    port = free_port()
    files = ("--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no")
    server = Server("--tls-port", str(port), "--tls-ca-cert-file", certificate, *files)
    try:
        server.start()
    except ChildProcessError:
        pytest.skip("the server was built without TLS")
    server.command("CONFIG", "SET", "requirepass", "secret")
    yield f"rediss://:secret@127.0.0.1:{port}/3?ssl_ca_certs={certificate}"
    server.stop()


async def test_all_of_it_goes_over_tls_the_news_as_well(encrypted: str, prefix: str) -> None:
    url = f"{encrypted}&protocol=3&decode_responses=True"
    async with opened(url, prefix) as one, opened(url, prefix) as other:
        told = Told()
        other.subscribe(told)
        await read(other)
        await until(other.caught_up)
        sent = value_of()
        await one.set_if_newer(sent)
        await until(lambda: (A, sent.version) in told.changes)
        assert await read(other) == 1
    once = Retry(NoBackoff(), 0)
    async with opened(Redis.from_url(encrypted.split("?")[0], retry=once), prefix) as stranger:
        with pytest.raises(SharedCacheUnavailableError, match="certificate verify failed"):
            await read(stranger)


# With few rights ------------------------------------------------------------------------------


def rights() -> list[str]:
    """What the page says that the user needs, for the prefix of this test's choice."""
    shown = re.search(r"^ACL SETUSER shop (.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    assert shown is not None
    return (
        shown[1].replace("~coalestra:", "~few/rights:").replace("coalestra:", "few:rights:").split()
    )


@contextlib.contextmanager
def allowed(server: Server, *changes: str) -> Iterator[str]:
    """A user with the rights of the page and these changes; its URL."""
    assert server.command("ACL", "SETUSER", "shop", *rights(), *changes).startswith(b"+OK")
    try:
        yield server.url.replace("//", "//shop:password@")
    finally:
        server.command("ACL", "DELUSER", "shop")


async def test_a_user_needs_no_more_rights_than_the_page_says(server: Server) -> None:
    server.command("SCRIPT", "FLUSH")
    with allowed(server, "+scan", "+unlink") as url:
        async with opened(url, "few:rights") as one, opened(url, "few:rights") as other:
            told = Told()
            other.subscribe(told)
            held = await lease(one)
            waiting = await waits(other)
            one._renew()
            await one.release_many([held])
            mine = (await waiting)[A].lease
            assert mine is not None
            assert (await fulfil(other, mine)).stored
            sent = value_of(B)
            await one.set_if_newer(sent)
            await until(lambda: (B, sent.version) in told.changes)
            await one.invalidate(A)
            await one.clear()
            assert [await read(other), await read(other, B)] == [None, None]
            for health in (one.health(), other.health()):
                assert (health.failures, health.last_error) == (0, None)


@pytest.mark.parametrize("lacking", ["-publish", "-pexpire", "-del", "-hdel", "resetchannels"])
async def test_what_the_server_refuses_in_part_is_not_called_done(
    server: Server, lacking: str
) -> None:
    """The publisher offers a second time what has failed; it finds no half of it there."""
    with allowed(server, lacking) as url:
        async with opened(url, "few:rights") as cache:
            builder = SnapshotBuilder([Truth().source], cache=cache, default_policy=POLICY)
            with pytest.raises(SharedCacheUnavailableError, match="allow the client's user"):
                if lacking == "-del":
                    await builder.publisher.invalidate(A)
                else:
                    await builder.publisher.publish(A, 2, source="truth")
            assert "allow the client's user" in str(cache.health().last_error)
            if lacking in ("-publish", "resetchannels"):  # nothing changes that cannot be told
                assert not stored(server, "few/rights")
            await builder.aclose()


@pytest.mark.parametrize("lacking", ["-scan", "-ping"])
async def test_what_the_server_refuses_is_an_error_of_the_cache(
    server: Server, lacking: str
) -> None:
    with allowed(server, "+scan", "+unlink", lacking) as url:
        async with opened(url, "few:rights") as cache:
            with pytest.raises(SharedCacheUnavailableError, match="refuses: .* has no permissions"):
                await cache.clear()


# With few connections -------------------------------------------------------------------------


async def test_a_burst_waits_for_the_connections_that_there_are(
    server: Server, prefix: str
) -> None:
    async with opened(Redis.from_url(server.url, max_connections=2), prefix) as cache:
        keys = [ResourceKey("many", "n", str(number)) for number in range(20)]
        results = await asyncio.gather(*(cache.set_if_newer(value_of(key)) for key in keys))
        assert all(each.stored for each in results)
        assert cache.health().failures == 0


async def test_a_burst_opens_few_connections_and_one_after_the_other(
    server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TLS each may hold up the loop for so long that all calls beside it come too late."""
    async with opened(Redis.from_url(server.url), prefix) as cache:
        send, begun, ended = cache._server._send, 0, 0

        async def counted(*terms: Any) -> Any:
            nonlocal begun, ended
            begun += 1
            opened = next(n for n in range(1, 9) if n == 8 or ended < n * (n + 1) // 2)
            assert begun - ended <= opened
            answers = await send(*terms)
            ended += 1
            return answers

        monkeypatch.setattr(cache._server, "_send", counted)
        keys = [ResourceKey("many", "n", str(number)) for number in range(50)]
        await asyncio.gather(*(read(cache, key) for key in keys))
        assert begun == 50


def all_taken(cache: RedisCache) -> tuple[Any, int]:
    """Take every connection that there may be; return who gives them, and how many these are."""
    connections, taken = cache._server._connections, 0
    while connections.try_acquire():
        taken += 1
    return connections, taken


async def test_the_time_limit_of_a_call_begins_with_its_turn(caches: Caches) -> None:
    """Also the one that the server is told, after which it stores nothing."""
    async with caches() as [cache]:
        await read(cache)
        connections, taken = all_taken(cache)
        cache._server._offset = -3600.0, 0.0, time.monotonic()  # what is sent now would be late
        storing = asyncio.ensure_future(cache.set(value_of()))
        await until(lambda: connections.view().waiting)
        cache._server._offset = 0.0, 1.0, time.monotonic()
        for _ in range(taken):
            connections.release()
        await storing
        assert await read(cache) == 1


async def test_who_gives_up_waiting_for_a_connection_takes_none(caches: Caches) -> None:
    async with caches() as [cache]:
        await read(cache)
        connections, taken = all_taken(cache)
        reading = asyncio.ensure_future(read(cache))
        await until(lambda: connections.view().waiting)
        reading.cancel()
        await asyncio.wait({reading})
        for _ in range(taken):
            connections.release()
        assert await read(cache) is None
        await until(lambda: connections.view().in_use == cache._server._unopened)


async def test_calls_that_do_not_end_keep_others_waiting_for_a_while_only(
    server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go, client = asyncio.Event(), Redis.from_url(server.url)
    cache = RedisCache(client, prefix=prefix, time_limit_seconds=0.02)

    async def cling(*_: Any) -> list[Any]:
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()
        return []

    monkeypatch.setattr(cache._server, "_send", cling)
    reads = [asyncio.ensure_future(read(cache)) for _ in range(20)]
    _, waiting = await asyncio.wait(reads, timeout=PATIENT_SECONDS)
    let_go.set()
    await cache.aclose()
    await client.aclose()
    assert not waiting
    assert all(isinstance(each.exception(), SharedCacheUnavailableError) for each in reads)
    assert cache.health().refused
    assert cache._server._connections.view().in_use == cache._server._unopened


async def test_a_question_that_arrives_late_is_granted_no_lease(
    caches: Caches, server: Server
) -> None:
    """It would reach nobody, and all others would wait for its end."""
    async with caches(2) as [cache, other]:
        await read(cache)
        cache._server._offset = -3600.0, 0.0, time.monotonic()
        assert (await leased(cache))[A].lease is None
        assert server.command("DBSIZE").startswith(b":0")
        assert (await leased(other))[A].lease is not None
        assert (await leased(cache, (B,)))[B].lease is not None  # as the clock is known again


# With connections that break ------------------------------------------------------------------


@pytest.mark.parametrize("change", ["publish", "fulfil", "invalidate"])
async def test_a_change_whose_answer_was_lost_is_made_once_and_told(
    caches: Caches, server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """It is sent again; what others began meanwhile goes on."""
    async with caches(2) as [one, other]:
        told = Told()
        other.subscribe(told)
        await read(other)
        await until(other.caught_up)
        await other.set(value_of(B))
        await other.invalidate(B)  # so that the server knows both scripts
        held, sent = await lease(one), value_of()
        pipelined, taken = one._server._pipelined, list[Any]()

        async def cut_off(*terms: Any) -> Any:
            answers = await pipelined(*terms)
            if not taken:
                taken.append(await lease(other, force=True))
                raise NotConnected("cut off by the test")
            return answers

        monkeypatch.setattr(one._server, "_pipelined", cut_off)
        if change == "invalidate":
            await one.invalidate(A)
            await until(lambda: (A, None) in told.changes)
            assert await read(other) is None
        else:
            if change == "publish":
                assert (await one.set_if_newer(sent)).stored
            else:
                outcome = await one.fulfil_many({held: sent}, policies={A: POLICY})
                assert outcome[A].stored  # type: ignore[union-attr]  # no error
            await until(lambda: (A, sent.version) in told.changes)
            assert await read(other) == 1
            assert not server.command("PTTL", name_of(prefix, A)).startswith(b":-")
        assert (await fulfil(other, taken[0], 2)).stored is (change == "fulfil")


# Replicas -------------------------------------------------------------------------------------


class Name:
    """An address that leads to a server, and later to another one, as names and balancers do."""

    def __init__(self, server: Server) -> None:
        self.leads_to = server
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def resolved(self) -> AsyncIterator[str]:
        gate = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        try:
            yield f"redis://127.0.0.1:{gate.sockets[0].getsockname()[1]}"
        finally:
            gate.close()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", self.leads_to.port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            try:
                with contextlib.suppress(OSError):
                    while data := await source.read(65536):
                        target.write(data)
            finally:
                target.transport.abort()

        for ends in ((reader, there[1]), (there[0], writer)):
            task = asyncio.ensure_future(copy(*ends))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def test_a_replica_is_not_believed_and_left_for_where_its_name_leads(
    server: Server, own_server: Server, prefix: str
) -> None:
    name = Name(own_server)
    async with name.resolved() as url:
        async with opened(Redis.from_url(url), prefix) as cache:
            truth = Truth()
            builder = SnapshotBuilder([truth.source], cache=cache, default_policy=POLICY)
            assert await value(builder) == 1
            await until(lambda: stored(own_server, prefix))
            await until(cache.caught_up)
            own_server.command("REPLICAOF", "127.0.0.1", "1")  # which has left it behind
            told = Told()
            cache.subscribe(told)
            with pytest.raises(SharedCacheUnavailableError, match="connect to the primary"):
                await read(cache)
            assert cache.health().failures == 1
            name.leads_to = server
            await until(lambda: told.gaps)  # nor is the memory
            await until(cache.caught_up)
            truth.value = 2
            assert await value(builder) == 2
            await until(lambda: stored(server, prefix))
            await builder.publisher.publish(A, 3, source="truth")
            assert await value(builder) == 3
            await builder.aclose()


async def test_who_only_writes_leaves_a_replica_as_well(own_server: Server, prefix: str) -> None:
    async with opened(Redis.from_url(own_server.url), prefix) as cache:
        await cache.set(value_of())
        await until(cache.caught_up)
        own_server.command("REPLICAOF", "127.0.0.1", "1")
        for change in (cache.set(value_of()), cache.invalidate(A)):
            lost = cache.health().news_lost
            with pytest.raises(SharedCacheUnavailableError, match="connect to the primary"):
                await change
            await until(lambda: cache.health().news_lost > lost)  # noqa: B023
            await until(cache.caught_up)
        own_server.command("REPLICAOF", "NO", "ONE")
        await cache.set(value_of(A, 2))
        assert await read(cache) == 2


class Guard(Sentinel):
    """Names the primary that the test says, or does not answer."""

    primary: Server | None = None
    in_vain = 0

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        if self.primary is None:
            self.in_vain += 1
            raise NotConnected("no sentinel answers")
        return "127.0.0.1", self.primary.port


@pytest.fixture
def quick_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.redis.server._HEARTBEAT_SECONDS", 0.05)


@pytest.mark.usefixtures("quick_heartbeats")
async def test_a_primary_that_sentinel_replaced_is_left_while_it_still_answers(
    server: Server, own_server: Server, prefix: str
) -> None:
    guard = Guard([])  # type: ignore[no-untyped-call]  # theirs
    guard.primary = own_server
    client = guard.master_for("shop")
    async with opened(client, prefix) as cache:
        await cache.set(value_of())
        await until(cache.caught_up)
        guard.primary = None
        await until(lambda: guard.in_vain > 1)
        assert cache.caught_up()
        guard.primary = server
        told = Told()
        cache.subscribe(told)
        await until(lambda: told.gaps)
        await until(cache.caught_up)
        assert await read(cache) is None
        await cache.set(value_of(A, 2))
        assert stored(server, prefix)
        assert cache.health().news_lost == 1


@pytest.mark.slow
async def test_a_failover_by_sentinel_is_over_in_seconds(tmp_path: Path, prefix: str) -> None:
    """One sentinel, one primary, one replica; the primary is killed."""
    with running("--repl-diskless-sync-delay", "0") as first:
        to_first = ("--replicaof", f"127.0.0.1 {first.port}")
        with running(*to_first) as second, sentinel_of(first, tmp_path) as port:
            primary = f"slave0:ip=127.0.0.1,port={second.port}".encode()
            await until(lambda: primary in first.command("INFO", "replication"))
            guard = Sentinel([("127.0.0.1", port)])  # type: ignore[no-untyped-call]  # theirs
            await until(lambda: "+slave" in (tmp_path / "log").read_text())
            client = guard.master_for("shop")
            truth = Truth()
            async with opened(client, prefix) as cache:
                builder = SnapshotBuilder([truth.source], cache=cache, default_policy=POLICY)
                await builder.publisher.publish(A, 2, source="truth")
                await until(lambda: stored(second, prefix))
                await until(cache.caught_up)
                cache._server.time_limit_seconds = 0.25
                first.stop()
                await until(lambda: not cache.health().news_connected)
                assert await value(builder) == 1  # by its source, which was not told
                with pytest.raises(SharedCacheUnavailableError):
                    await builder.publisher.publish(A, 3, source="truth")
                cache._server.time_limit_seconds = PATIENT_SECONDS
                await until(lambda: cache.health().news_connected)
                while cache.health().state != "closed":
                    await value(builder)
                    await asyncio.sleep(0.05)
                assert await value(builder) == 2
                await builder.publisher.publish(A, 4, source="truth")
                assert await value(builder) == 4
                assert (await leased(cache, (B,)))[B].lease is not None
                await builder.aclose()
            for each in guard.sentinels:
                await each.aclose()


@contextlib.contextmanager
def sentinel_of(server: Server, directory: Path) -> Iterator[int]:
    port, settings = free_port(), directory / "sentinel.conf"
    settings.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {directory}\nlogfile {directory / 'log'}\n"
        f"sentinel monitor shop 127.0.0.1 {server.port} 1\n"
        "sentinel down-after-milliseconds shop 500\nsentinel failover-timeout shop 3000\n"
    )
    (directory / "log").touch()
    assert server.process is not None
    binary = str(server.process.args[0])  # type: ignore[index]  # a list, as it was started
    process = subprocess.Popen([binary, str(settings), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


# Processes that differ ------------------------------------------------------------------------


class Plain:
    """A codec whose bytes another one takes for something else."""

    def encode(self, value: Any) -> bytes:
        return str(value).encode()

    def decode(self, data: bytes) -> Any:
        return int(data)


async def test_what_another_codec_wrote_is_missing_and_not_misread(
    server: Server, prefix: str
) -> None:
    assert MessagePackCodec().decode(Plain().encode(7)) == ord("7")  # a wrong value
    async with (
        opened(Redis.from_url(server.url), prefix) as one,
        opened(Redis.from_url(server.url), prefix, codec=Plain()) as other,
    ):
        await other.set(value_of(A, 7))
        assert [await read(one), await read(other)] == [None, 7]
        assert one.health().unreadable
        await one.set(value_of(A, 8))
        assert [await read(one), await read(other)] == [8, None]
