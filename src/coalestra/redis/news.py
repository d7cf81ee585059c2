"""The connection on which the server tells of changes, read the moment they arrive.

It is opened by redis-py, so that address, authentication and encryption are the client's; then
its bytes come here, within the event loop's own step, not through a task: nobody can read in
between.

Laws:

1. ``heard`` is called for each message in order, ``missed`` before the first one and after the last
   one of a connection, as between two connections messages may be missing.
2. A connection that is silent for longer than two heartbeats is given up.
3. `catch_up` takes in what has arrived on this machine; if it returns True there is nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from redis.asyncio import RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from coalestra.core.errors import message_of
from coalestra.redis.server import Client

_HEARTBEAT_SECONDS: Final = 0.5
_CONNECT_SECONDS: Final = 2.0
_PAUSES: Final = (0.05, 0.1, 0.2, 0.5, 1.0)
_MOST_AT_ONCE: Final = 1 << 18
_PING: Final = b"*1\r\n$4\r\nPING\r\n"

Incomplete: Final = object()


def parsed(data: bytearray, start: int) -> tuple[Any, int]:
    """Return the reply that begins at `start` and where it ends; `Incomplete` if it does not."""
    end = data.find(b"\r\n", start)
    if end < 0:
        return Incomplete, start
    kind, told, after = data[start : start + 1], bytes(data[start + 1 : end]), end + 2
    if kind == b"$":
        size = int(told)
        if size < 0:
            return None, after
        if len(data) < after + size + 2:
            return Incomplete, start
        return bytes(data[after : after + size]), after + size + 2
    if kind == b"*":
        items = []
        for _ in range(int(told)):
            item, after = parsed(data, after)
            if item is Incomplete:
                return Incomplete, start
            items.append(item)
        return items, after
    return (int(told) if kind == b":" else told), after


class _Line(asyncio.Protocol):
    """One connection, from the subscription on; `refusal` is why there is none."""

    def __init__(self, channel: bytes, heard: Callable[[bytes], None]) -> None:
        self.subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.refusal: str | None = None
        self.quiet: bool = False
        self._heard = heard
        self._channel = channel
        self._data = bytearray()
        self._transport: Any = None
        self._writer: Any = None
        self._poll: Any = None
        self._direct = False

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
        size = str(len(self._channel)).encode()
        transport.write(b"*2\r\n$9\r\nSUBSCRIBE\r\n$" + size + b"\r\n" + self._channel + b"\r\n")

    def data_received(self, data: bytes) -> None:
        """Pass on every message that is complete."""
        self.quiet = False
        self._data += data
        start = 0
        while True:
            reply, start = parsed(self._data, start)
            if reply is Incomplete:
                break
            if isinstance(reply, list) and reply[0] == b"message":
                self._heard(reply[2])
            elif not self.subscribed.done():
                if not isinstance(reply, list):
                    self.refusal = reply.decode(errors="replace")
                self.subscribed.set_result(None)
        del self._data[:start]

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
            self.data_received(data)
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
        """Begin, and wait for the first subscription, but not for longer than that in all."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._first = loop.create_future()
            self._patient_until = loop.time() + patience_seconds
            self._task = loop.create_task(self._keep(), name="coalestra news")
        patience = self._patient_until - loop.time()
        if self._first is not None and not self._first.done() and patience > 0:
            await asyncio.wait({self._first}, timeout=patience)

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
            try:
                await self._listen()
                failed = 0
            except Exception as error:
                self.last_error = f"{type(error).__name__}: {message_of(error)}"
                failed += 1
            finally:
                self._end_line()
            await asyncio.sleep(_PAUSES[min(failed, len(_PAUSES) - 1)])

    async def _listen(self) -> None:
        line = self._line = _Line(self.channel.encode(), self.heard)
        opening = asyncio.ensure_future(self._open(line))
        try:
            done, _ = await asyncio.wait({opening}, timeout=_CONNECT_SECONDS)
        finally:
            opening.cancel()
            await asyncio.wait({opening})
        if not done:
            raise TimeoutError(f"no subscription within {_CONNECT_SECONDS:g} s")
        opening.result()
        self.connected = True
        self.missed()
        if self._first is not None and not self._first.done():
            self._first.set_result(None)
        while not line.lost.done():
            await asyncio.wait({line.lost}, timeout=_HEARTBEAT_SECONDS)
            if not line.lost.done() and not line.ping():
                raise TimeoutError(f"silent for {2 * _HEARTBEAT_SECONDS:g} s")

    async def _open(self, line: _Line) -> None:
        connection = await _connection_of(self.client)
        try:
            await connection.connect()
            line.take_over(connection.hand_over())
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        await asyncio.wait({line.subscribed, line.lost}, return_when=asyncio.FIRST_COMPLETED)
        if not line.subscribed.done():
            raise ConnectionError("the connection ended before the subscription was confirmed")
        if line.refusal is not None:
            raise ConnectionError(f"the server refused the subscription: {line.refusal}")

    def _end_line(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()
        if self.connected:
            self.connected = False
            self.lost += self._task is not None
            self.missed()


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
