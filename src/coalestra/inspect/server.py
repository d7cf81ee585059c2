"""A small HTTP/1.1 server for the page, for programs that have no web server of their own.

It answers one request on each connection and closes it, so that there is nothing to keep in step.
What is too long, too slow or not HTTP is refused; bodies are not taken, and a client that takes
nothing of its answer is given up. It runs on the event loop of whoever starts it, and does not
listen to signals.
"""

from __future__ import annotations

import asyncio
import http
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from coalestra.concurrency.deadline import CutOff, CutOffExpired
from coalestra.core.validation import callable_, integer, number, text

_REQUEST_BYTES = 16_384
_REQUEST_SECONDS = 10.0
_TAKING_SECONDS = 10.0
_PART_BYTES = 65_536
_MOMENT_SECONDS = 1.0
_MOST_CONNECTIONS = 64
_LINE = re.compile(r"([A-Z]+) (/[^ #?]*)(?:\?([^ #]*))? HTTP/(1\.[01])")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\x00]*)")

Application = Callable[[Any, Any, Any], Awaitable[None]]


class _Refused(Exception):
    """A request that is answered by a status alone."""

    def __init__(self, status: int) -> None:
        self.status = status


class Server:
    """Serves a page from a program that has no web server of its own.

    It listens from the beginning of an ``async with`` to its end::

        async with inspect.serve(inspect.app(builder)) as server:
            print(server.url)
            ...

    Args:
        application: what `app` returned, or any other ASGI application that takes no bodies.
        host: the address to listen on. Other machines than this one reach another address than the
            default only if the page is made with ``authorize``, too.
        port: the port; 0 for any that is free.

    Attributes:
        host, port: where it listens; the port that was chosen, if any one was asked for.

    Raises:
        TypeError, ValueError: for a bad argument, naming it.
    """

    def __init__(
        self, application: Application, *, host: str = "127.0.0.1", port: int = 8089
    ) -> None:
        self._application: Application = callable_("application", application)
        self.host: str = text("host", host)
        self.port: int = int(number("port", integer("port", port), minimum=0, maximum=65_535))
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        state = "closed" if self._server is None else f"{len(self._connections)} connections"
        return f"<Server {self.url} {state}>"

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/"

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(
            self._connected, self.host, self.port, limit=_REQUEST_BYTES
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop listening, and end every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        while self._connections:
            for connection in self._connections:
                connection.cancel()
            await asyncio.wait(tuple(self._connections))

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # closed since it was accepted
            writer.transport.abort()
            return
        connection = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        # Also if it is cancelled before it has begun, or the client does not take what is left.
        connection.add_done_callback(lambda _: writer.transport.abort())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answer = _Answer(writer)
        try:
            if len(self._connections) > _MOST_CONNECTIONS:
                raise _Refused(503)
            try:
                scope = await asyncio.wait_for(_request(reader), _REQUEST_SECONDS)
            except asyncio.TimeoutError:
                raise _Refused(408) from None
            except (OSError, asyncio.IncompleteReadError):
                return  # the other side has gone
            peer = writer.get_extra_info("peername")
            scope["client"] = peer and tuple(peer[:2])  # None of one that has gone already
            scope["server"] = (self.host, self.port)
            await self._application(scope, _receiving(reader), answer.send)
        except _Refused as refused:
            await answer.refuse(refused.status, reader)
        except Exception as error:
            if not (isinstance(error, OSError) and writer.transport.is_closing()):
                context = {"message": "coalestra.inspect: a request failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
            await answer.refuse(500, reader)
        finally:
            await answer.close()


async def _request(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Read a request up to its body and return its scope; raise `_Refused` if it is no good."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.LimitOverrunError:
        raise _Refused(431) from None
    first, *lines = head[:-4].split("\r\n")
    line = _LINE.fullmatch(first)
    headers = [_HEADER.fullmatch(each) for each in lines]
    if line is None or None in headers:
        raise _Refused(400)
    given = [(each[1].lower(), each[2].strip(" \t")) for each in headers if each]
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in given]
    names = [name for name, _ in pairs]
    if names.count(b"host") != 1:
        raise _Refused(400)
    if b"transfer-encoding" in names or dict(pairs).get(b"content-length", b"0") != b"0":
        raise _Refused(413)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": line[4],
        "method": line[1],
        "scheme": "http",
        "path": unquote(line[2]),
        "raw_path": line[2].encode("latin-1"),
        "query_string": (line[3] or "").encode("latin-1"),
        "root_path": "",
        "headers": pairs,
    }


async def _rest(reader: asyncio.StreamReader) -> None:
    while await reader.read(_REQUEST_BYTES):
        pass


def _receiving(reader: asyncio.StreamReader) -> Callable[[], Awaitable[dict[str, Any]]]:
    """Return what tells an application that there is no body, and then that the client has gone."""
    told = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        if told:
            return told.pop()
        await _rest(reader)  # more than one request on a connection is not answered
        return {"type": "http.disconnect"}

    return receive


class _Answer:
    """Writes what an application sends."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._begun = False

    async def send(self, message: Any) -> None:
        """Write one message, no faster than the client reads.

        Raises:
            ConnectionAbortedError: if it has taken nothing for a while.
        """
        if message["type"] == "http.response.start":
            status, headers = message["status"], message["headers"]
            lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}".encode()]
            lines += [name + b": " + value for name, value in headers]
            content = b"\r\n".join([*lines, b"connection: close", b"", b""])
            self._begun = True
        else:
            content = message.get("body", b"")
        for start in range(0, len(content), _PART_BYTES):
            self._writer.write(content[start : start + _PART_BYTES])
            try:
                with CutOff(asyncio.get_running_loop().time() + _TAKING_SECONDS):
                    await self._writer.drain()
            except CutOffExpired:
                self._writer.transport.abort()
                raise ConnectionAbortedError("the client takes nothing") from None

    async def refuse(self, status: int, reader: asyncio.StreamReader) -> None:
        """Answer with a status alone, unless something was answered already."""
        if self._begun:
            return
        start = {"type": "http.response.start", "status": status}
        with suppress(OSError, asyncio.TimeoutError):
            await self.send({**start, "headers": [(b"content-length", b"0")]})
            self._writer.write_eof()
            # What the client still sends is read: to close in its face would destroy the answer.
            await asyncio.wait_for(_rest(reader), _MOMENT_SECONDS)

    async def close(self) -> None:
        """Close the connection when the client has taken what is left, or does not soon."""
        self._writer.close()
        with suppress(OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), _MOMENT_SECONDS)
