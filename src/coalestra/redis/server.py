"""The server: every call to it, limited in time and counted, and what it tells of changes.

Laws of calls:

1. A call takes no longer than the time limit, whatever the server, the network or the client does,
   from its turn on. A burst waits for connections, of which one more is opened whenever those that
   there are have had a call each. What does not end, as redis-py may swallow a cancellation, or
   takes its time, as a scan does, keeps one from others for two time limits at most.
2. After a few failures in a row calls are refused at once; one probe at a time finds out whether
   the server is back.
3. What fails raises `SharedCacheUnavailableError`; what a script is refused is among its answers.
4. A connection that turns out to be closed, as all are after a restart of the server, gives
   way to another one: every script may run twice.

Laws of news, which come on a connection that redis-py opens, so that address, authentication and
encryption are the client's, and are read within the event loop's own step, not through a task:

1. ``heard`` is called for each message in order, ``missed`` before the first one and after the last
   one of a connection, as between two connections messages may be missing. Of very many some are
   heard in each turn of the loop.
2. A connection that is silent for longer than two heartbeats is given up.
3. `catch_up` takes in what has arrived on this machine; if it returns True there is nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import select
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Final, NamedTuple, TypeVar, cast

from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE

from coalestra._endings import look_after
from coalestra.concurrency.capacity import CapacityLimiter
from coalestra.concurrency.deadline import ended_within
from coalestra.concurrency.pace import SLICE_SECONDS
from coalestra.core.errors import CacheCircuitOpenError, CacheUnavailableError, message_of
from coalestra.redis.scripts import whole
from coalestra.resilience import Circuit, CircuitBreakerPolicy, CircuitState, Outcome

Client = Redis | RedisCluster
_T = TypeVar("_T")

_UNREACHABLE: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ClusterDownError,
    exceptions.RedisClusterException,
    exceptions.ReadOnlyError,
    OSError,
)
_REMEDIES: Final = {
    "NOPERM|permission|user executing the script can't": "allow the client's user what "
    "docs/how-to/share-between-processes.md lists",
    "(?i)read.?only": "connect to the primary, by its address or through Sentinel",
    "maxmemory": "raise it, or set maxmemory-policy to allkeys-lru",
    "Too many connections": "raise max_connections of the client, or give it a "
    "BlockingConnectionPool",
    "unknown command": "the server must be Redis 7 or Valkey 7.2 or later, with no command renamed",
}
_CIRCUIT: Final = CircuitBreakerPolicy(failure_threshold=3, recovery_timeout_seconds=1.0)
_BYTES: Final[dict[str, Any]] = {NEVER_DECODE: True}
_MEASUREMENT_HOLDS_SECONDS: Final = 60.0
_CLOSED_CONNECTIONS: Final = 3
_MOST_CALLS: Final = 8
"""So many connections keep an event loop busy; to open one with TLS holds it up for 20 ms."""
_SCAN_SECONDS: Final = 30.0


class SharedCacheUnavailableError(CacheUnavailableError, ConnectionError):
    """The server of the shared cache did not answer, not in time, or refused.

    The fault is the server's, the network's, the limit's, or that of rights. Reads go on with the
    sources; a publication or an invalidation has to be made again, as it may not have happened.
    """


class SharedCacheLeftAloneError(SharedCacheUnavailableError, CacheCircuitOpenError):
    """The server of the shared cache has failed repeatedly, and was not asked at all."""


class Call(NamedTuple):
    """One run of a script: the names it works on, and its other arguments."""

    names: Sequence[str]
    arguments: Sequence[Any]


class Server:
    """One server, or cluster of servers, as one client of redis-py reaches it."""

    def __init__(
        self, client: Client, time_limit_seconds: float, demoted: Callable[[], None]
    ) -> None:
        self.client: Client = client
        self._demoted = demoted
        self.is_cluster: bool = isinstance(client, RedisCluster)
        self.time_limit_seconds: float = time_limit_seconds
        self.counts: dict[str, int] = dict.fromkeys(("calls", "failures", "timeouts", "refused"), 0)
        self.last_error: str | None = None
        self._circuit = Circuit()
        self._turns = count(1).__next__
        self._offset: tuple[float, float, float] | None = None
        self.begin()

    def begin(self) -> None:
        """Let go of the calls under way, as those of an event loop that has ended."""
        client: Any = self.client
        settings = client.connection_kwargs if self.is_cluster else vars(client.connection_pool)
        most = settings.get("max_connections", _MOST_CALLS)
        self._connections = CapacityLimiter(min(most, _MOST_CALLS))
        self._unopened, self._ended = self._connections.limit - 1, 0
        for _ in range(self._unopened):
            self._connections.try_acquire()
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        failures, calls = self.counts["failures"], self.counts["calls"]
        return f"<Server {self.state.value}, {failures} of {calls} calls failed>"

    @property
    def state(self) -> CircuitState:
        """Whether calls are made (closed), refused (open), or one is to find out (half open)."""
        return self._circuit.state(time.monotonic())

    @property
    def clock_offset_seconds(self) -> float | None:
        """How far the server's clock is ahead of this machine's; None before the first answer."""
        return None if self._offset is None else self._offset[0]

    async def run(
        self, script: str, calls: Sequence[Call], *shared: Any, timed: bool = False
    ) -> list[Any]:
        """Run a script for each call, in one round trip; return the answers, errors among them.

        Before its own arguments each call is given those that are ``shared``. One that is ``timed``
        is told before these until when it is waited for, and answers first with its time, both by
        the server's clock.
        """
        answers = await self._limited(lambda: self._send(script, calls, shared, timed))
        for each in answers:
            if isinstance(each, Exception):
                self.last_error = explained(each)
        return cast(list[Any], answers)

    async def barrier(self) -> None:
        """Return when the server has sent out all news of what it did before.

        It sends what is to be sent before it looks for the next command. So whoever is connected
        to this server has such news in his own machine when the answer is here.
        """
        if not self.is_cluster:
            await self.command("PING")

    async def names_of(self, pattern: str) -> list[str]:
        """Return every name that matches, on every server; has a while for that."""
        client: Any = self.client

        async def scanned() -> list[str]:
            found = client.scan_iter(match=pattern, count=500)
            return [name.decode() if isinstance(name, bytes) else name async for name in found]

        return cast(list[str], await self._limited(scanned, _SCAN_SECONDS))

    async def command(self, *arguments: Any) -> Any:
        """Run one command."""
        return await self._limited(lambda: self.client.execute_command(*arguments, **_BYTES))

    def _note_clock(self, server_time: float, sent: float, answered: float) -> None:
        """Learn from an answer how far the clocks are apart.

        The quickest answer tells best, until one shows that a clock has been set since.
        """
        error = max(0.0, answered - sent) / 2
        offset, now = server_time - (sent + answered) / 2, time.monotonic()
        known, known_error, known_at = self._offset or (offset, error, now)
        is_old = now - known_at > _MEASUREMENT_HOLDS_SECONDS
        if error <= known_error or is_old or abs(offset - known) > error + known_error:
            self._offset = offset, error, now

    def _latest(self) -> str:
        """Return until when, by the server's clock, anybody waits for what is sent to it now.

        What has been done since must not be undone. The servers of a cluster may each have a clock
        of their own.
        """
        if self._offset is None or self.is_cluster:
            return "1e300"  # which every server can read
        offset, error, _ = self._offset
        return repr(time.time() + offset + error + self.time_limit_seconds)

    async def _send(
        self, script: str, calls: Sequence[Call], shared: tuple[Any, ...], timed: bool
    ) -> list[Any]:
        text, digest = whole(script)
        sent = time.time()
        if timed:
            shared = (self._latest(), *shared)
        for left in reversed(range(_CLOSED_CONNECTIONS)):
            try:
                answers = await self._pipelined("EVALSHA", digest, calls, shared)
                break
            except exceptions.ConnectionError as error:
                if not left or isinstance(error, exceptions.AuthenticationError):
                    raise
        unknown = [n for n, e in enumerate(answers) if isinstance(e, exceptions.NoScriptError)]
        if unknown:
            # A server that is new, or was started again: nothing has been run yet.
            again = await self._pipelined("EVAL", text, [calls[n] for n in unknown], shared)
            for n, answer in zip(unknown, again, strict=True):
                answers[n] = answer
        client: Any = self.client
        if not self.is_cluster and any(isinstance(e, exceptions.ReadOnlyError) for e in answers):
            # Its name may by now be that of another server, to which a new connection leads.
            await client.connection_pool.disconnect(inuse_connections=False)
            self._demoted()
        clocks = [each[0] for each in answers if timed and not isinstance(each, Exception)]
        if clocks:
            self._note_clock(float(clocks[0]), sent, time.time())
        return answers

    async def _pipelined(
        self, command: str, script: str, calls: Sequence[Call], shared: tuple[Any, ...]
    ) -> list[Any]:
        commands = [(command, script, len(names), *names, *shared, *own) for names, own in calls]
        if len(commands) == 1:
            try:
                return [await self.client.execute_command(*commands[0], **_BYTES)]
            except exceptions.ResponseError as error:
                return [error]
        client: Any = self.client
        pipeline = client.pipeline(**({} if self.is_cluster else {"transaction": False}))
        for each in commands:
            pipeline.execute_command(*each, **_BYTES)
        return cast(list[Any], await pipeline.execute(raise_on_error=False))

    async def _limited(
        self, call: Callable[[], Coroutine[Any, Any, Any]], seconds: float | None = None
    ) -> Any:
        """Await a call to the server by the rules at the head of this module."""
        circuit, connections = self._circuit, self._connections
        await connections.acquire()
        if circuit.refuses(time.monotonic()):
            connections.release()
            self.counts["refused"] += 1
            raise SharedCacheLeftAloneError(
                f"the server of the shared cache is left alone for a moment: {self.last_error}"
            )
        circuit.admit(time.monotonic(), self._turns())
        turn, outcome = circuit.turn, Outcome.ABANDONED
        self.counts["calls"] += 1
        try:
            # In a task of its own: redis-py may swallow a cancellation, and must not keep anybody.
            task = asyncio.ensure_future(call())
            look_after(task, self._tasks)  # what it raises is raised where it is waited for
            self._lend(connections, task)
            answer = await self._answer(task, seconds or self.time_limit_seconds)
            outcome = Outcome.SUCCESS
        except SharedCacheUnavailableError as error:
            outcome = Outcome.FAILURE
            self.counts["failures"] += 1
            self.last_error = str(error)
            raise
        except exceptions.RedisError as error:
            outcome = Outcome.SUCCESS  # an answer, if not the one that was hoped for
            self.last_error = f"the server of the shared cache refuses: {explained(error)}"
            raise SharedCacheUnavailableError(self.last_error) from error
        finally:
            if circuit.turn == turn:
                circuit.report(outcome, time.monotonic(), self._turns(), _CIRCUIT)
        return answer

    def _lend(self, connections: CapacityLimiter, task: asyncio.Future[Any]) -> None:
        """Have a connection given back as the call ends, or when others have waited long enough."""
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        over.add_done_callback(lambda _: self._give_back(connections))
        late = loop.call_later(2 * self.time_limit_seconds, over.cancel)
        task.add_done_callback(lambda _: over.cancel())
        task.add_done_callback(lambda _: late.cancel())

    def _give_back(self, connections: CapacityLimiter) -> None:
        connections.release()
        if connections is not self._connections:
            return  # they were those of another event loop
        self._ended += 1
        if self._unopened and self._ended >= connections.limit - self._unopened:
            self._ended = 0
            self._unopened -= 1
            connections.release()

    async def _answer(self, task: asyncio.Future[Any], seconds: float) -> Any:
        try:
            await ended_within(task, seconds)
        finally:
            task.cancel()
        if not task.done():
            self.counts["timeouts"] += 1
            raise SharedCacheUnavailableError(
                f"the server of the shared cache did not answer within {seconds * 1000:g} ms"
            )
        try:
            answer = task.result()
        except (*_UNREACHABLE, asyncio.CancelledError) as error:
            raise _out_of_reach(error) from error
        for each in answer if isinstance(answer, list) else ():
            if isinstance(each, _UNREACHABLE):
                raise _out_of_reach(each) from each
        return answer

    async def close(self) -> None:
        """End the calls under way."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.time_limit_seconds)


def _out_of_reach(error: BaseException) -> SharedCacheUnavailableError:
    text = f"{type(error).__name__}: {explained(error)}"
    return SharedCacheUnavailableError(f"the server of the shared cache is out of reach: {text}")


def explained(error: BaseException) -> str:
    """Return what an error says, and what is to be done if that is known."""
    text = message_of(error)
    remedies = (remedy for sign, remedy in _REMEDIES.items() if re.search(sign, text))
    return "; ".join((text, *islice(remedies, 1)))


_HEARTBEAT_SECONDS: Final = 0.5
_CONNECT_SECONDS: Final = 2.0
_PAUSES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
_MOST_AT_ONCE: Final = 1 << 18
_PING: Final = b"*1\r\n$4\r\nPING\r\n"


class _Line(asyncio.Protocol):
    """One connection, from the subscription on; `refusal` is why there is none."""

    def __init__(self, channel: bytes, heard: Callable[[bytes], None]) -> None:
        self.subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refusal: str | None = None
        self.quiet: bool = False
        self.address: tuple[str, int] = ("", 0)
        self._heard = heard
        self._channel = channel
        self._head = b"*3\r\n$7\r\nmessage\r\n$%d\r\n%b\r\n$" % (len(channel), channel)
        self._data = bytearray()
        self._transport: Any = None
        self._writer: Any = None
        self._poll: Any = None
        self._direct = False
        self._behind = False

    def take_over(self, writer: Any) -> None:
        """Receive what the writer's connection brings from now on, and subscribe."""
        self._writer = writer  # closes the connection when it is collected, so it is kept
        self._transport = transport = writer.transport
        transport.set_protocol(self)
        self._direct = transport.get_extra_info("sslcontext") is None
        found = transport.get_extra_info("socket")
        if found is not None and hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(found.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
            if found.family != getattr(socket, "AF_UNIX", None):
                with contextlib.suppress(OSError):
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        channel = self._channel
        transport.write(b"*2\r\n$9\r\nSUBSCRIBE\r\n$%d\r\n%b\r\n" % (len(channel), channel))

    def data_received(self, data: bytes) -> None:
        """Pass on messages, for a while in each turn of the loop."""
        self._data += data
        if not self._behind:
            self._go_on()

    def _go_on(self) -> None:
        if self.lost.done():
            return
        more = self._pass_on(time.perf_counter() + SLICE_SECONDS)
        if more:
            asyncio.get_running_loop().call_soon(self._go_on)
        if more is not self._behind:
            self._behind, transport = more, self._transport
            (transport.pause_reading if more else transport.resume_reading)()

    def _pass_on(self, until: float = math.inf) -> bool:
        """Pass on every message that is complete, until then; return whether there may be more."""
        self.quiet = False
        data, head, start, more = self._data, self._head, 0, True
        while more:
            is_message = data.startswith(head, start)
            first = start + len(head) if is_message else start
            last = data.find(b"\r\n", first)
            if last < 0 or (not is_message and head.startswith(data[start : start + len(head)])):
                more = False
            elif is_message:
                end = last + 2 + int(data[first:last])
                more = len(data) >= end + 2
                if more:
                    start = end + 2
                    self._heard(bytes(data[last + 2 : end]))
            else:
                start = last + 2
                self._answered(bytes(data[first:last]))
            if time.perf_counter() >= until:
                break
        del self._data[:start]
        return more

    def _answered(self, line: bytes) -> None:
        """Look in a line that belongs to no message for the answer to the subscription."""
        refused = line.startswith(b"-") and line != self._channel
        if not self.subscribed.done() and (refused or re.fullmatch(rb":\d+", line)):
            self.refusal = line[1:].decode(errors="replace") if refused else None
            self.subscribed.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Learn that this was all."""
        self._poll = None
        if not self.lost.done():
            self.lost.set_result(None)

    def ping(self) -> bool:
        """Ask for a sign of life; return whether there was one since the last time."""
        alive = not self.quiet
        self.quiet = True
        self._transport.write(_PING)
        return alive

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()
        self.connection_lost(None)

    def catch_up(self) -> bool:
        """Take in all that has arrived; return False if there may be more than could be read."""
        poll = self._poll
        if self._data:
            self._pass_on()
        if poll is None:
            return not self.lost.done()
        while poll.poll(0):
            if not self._direct:
                return False
            found = self._transport.get_extra_info("socket")
            try:
                data = os.read(found.fileno(), _MOST_AT_ONCE)
            except BlockingIOError:
                return not self._data
            except OSError:
                return False
            if not data:
                return False
            self._data += data
            self._pass_on()
        return not self._data  # the rest of a message may be on its way


@dataclass(eq=False, repr=False)
class News:
    """Keeps a subscription for as long as it is open, and tells when there is none.

    The news are those of the client's server, or of any server of its cluster.
    """

    client: Client
    channel: str
    heard: Callable[[bytes], None]
    missed: Callable[[], None]
    connected: bool = False
    lost: int = 0
    last_error: str | None = None
    _line: _Line | None = None
    _task: asyncio.Task[None] | None = None
    _first: asyncio.Future[None] | None = None
    _patient_until: float = 0.0

    def __repr__(self) -> str:
        return f"<News {'connected' if self.connected else 'cut off'}, lost {self.lost} times>"

    async def start(self, patience_seconds: float) -> None:
        """Begin, and wait for the first attempt, but not for longer than that in all."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._first = loop.create_future()
            self._patient_until = loop.time() + patience_seconds
            self._task = loop.create_task(self._keep(), name="coalestra news")
        patience = self._patient_until - loop.time()
        if self._first is not None and not self._first.done() and patience > 0:
            await asyncio.wait({self._first}, timeout=patience)

    def leave(self) -> None:
        """Give up this connection for a new one."""
        if self._line is not None:
            self._line.close()

    async def close(self) -> None:
        """End the subscription."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def catch_up(self) -> bool:
        """Take in what has arrived; return whether nothing told so far is missing."""
        if not self.connected or self._line is None:
            return False
        return self._line.catch_up() and self.connected

    async def _keep(self) -> None:
        failed = 0
        while True:
            line = self._line = _Line(self.channel.encode(), self.heard)
            try:
                await self._listen(line)
                failed = 0
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {explained(error)}"
                failed += 1
                self._settle_first()
            finally:
                self._line = None
                line.close()
                if self.connected:
                    self.connected = False
                    self.lost += self._task is not None
                    self.missed()
            await asyncio.sleep(_PAUSES[min(failed, len(_PAUSES) - 1)])

    async def _listen(self, line: _Line) -> None:
        await _within(_CONNECT_SECONDS, self._open(line), "no subscription")
        self.connected = True
        self.missed()
        self._settle_first()
        while not line.lost.done():
            await asyncio.wait({line.lost}, timeout=_HEARTBEAT_SECONDS)
            if not line.lost.done() and not line.ping():
                raise TimeoutError(f"silent for {2 * _HEARTBEAT_SECONDS:g} s")
            if await self._is_elsewhere(line):
                raise ConnectionError("Sentinel names another server as the primary")

    async def _is_elsewhere(self, line: _Line) -> bool:
        """Whether the primary is another server by now, while the former one is still there."""
        pool = getattr(self.client, "connection_pool", None)
        if not isinstance(pool, SentinelConnectionPool) or not pool.is_master:
            return False
        try:  # where idle connections to another one are let go
            asking: Any = pool.get_master_address()  # type: ignore[no-untyped-call]  # theirs
            address = await _within(_HEARTBEAT_SECONDS, asking, "no sentinel")
        except Exception:  # nobody knows
            return False
        return bool(address != line.address)

    async def _open(self, line: _Line) -> None:
        connection = await _connection_of(self.client)
        try:
            await connection.connect()
            line.address = getattr(connection, "host", ""), getattr(connection, "port", 0)
            line.take_over(connection.hand_over())
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        await asyncio.wait({line.subscribed, line.lost}, return_when=asyncio.FIRST_COMPLETED)
        if not line.subscribed.done():
            raise ConnectionError("the connection ended before the subscription was confirmed")
        if line.refusal is not None:
            raise ConnectionError(f"the server refused the subscription: {line.refusal}")

    def _settle_first(self) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_result(None)


async def _within(seconds: float, work: Coroutine[Any, Any, _T], missing: str) -> _T:
    """Return what comes of `work`; raises TimeoutError about what is `missing` after a while."""
    task = asyncio.ensure_future(work)
    try:
        ended = await ended_within(task, seconds)
    finally:
        task.cancel()
        await asyncio.wait({task})
    if not ended:
        raise TimeoutError(f"{missing} within {seconds:g} s")
    return task.result()


class _HandedOver:
    """Makes a connection class of redis-py give its stream away after the handshake."""

    _reader: Any
    _writer: Any

    def hand_over(self) -> Any:
        """Return the writer, and forget it."""
        writer = self._writer
        self._reader = self._writer = None
        return writer


async def _connection_of(client: Client) -> Any:
    """Return a new connection like those of the client, not opened yet."""
    if isinstance(client, RedisCluster):
        await client.initialize()
        node: Any = client.get_random_node()
        kind, settings = node.connection_class, dict(node.connection_kwargs)
        settings.update(host=node.host, port=node.port)
    else:
        pool: Any = client.connection_pool
        kind, settings = pool.connection_class, dict(pool.connection_kwargs)
    settings = {name: value for name, value in settings.items() if not name.startswith("maint")}
    settings.update(
        protocol=2, retry=Retry(NoBackoff(), 0), health_check_interval=0, decode_responses=False
    )
    return type("NewsConnection", (_HandedOver, kind), {})(**settings)
