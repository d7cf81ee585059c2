"""The small server, by what goes over its sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coalestra.inspect import app, serve
from coalestra.inspect.asgi import from_this_machine
from tests.inspect.client import scope_of
from tests.orchestration.scripted import Single, builder
from tests.support.elsewhere import in_thread, outcome

pytestmark = pytest.mark.real_loop

LINE = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """Say what was asked for."""
    body = f"{scope['method']} {scope['path']} {scope['query_string'].decode()}".encode()
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def spoken(port: int, request: bytes, *, finish: bool = False) -> bytes:
    """Send bytes and return all that comes back."""
    async with opened(port) as (reader, writer):
        writer.write(request)
        if finish:
            writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            return await asyncio.wait_for(reader.read(), 10)
    return b""


@contextlib.asynccontextmanager
async def opened(
    port: int, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed at the end."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def reports() -> list[Any]:
    """What is reported to the event loop from now on."""
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    return reported


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def test_a_request_is_answered_and_the_connection_closed() -> None:
    async with serve(hello, port=0) as server:
        answer = await spoken(server.port, b"GET /a%20b/c?d=%20e HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"content-type: text/plain",
        b"connection: close",
    ]
    assert body == b"GET /a b/c d=%20e"


async def test_it_says_where_it_is_and_listens_to_this_machine_only() -> None:
    async with serve(hello, port=0) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/"
        assert server.port > 0
        assert "0 connections" in repr(server)
    assert "closed" in repr(server)


async def test_the_page_is_served() -> None:
    async with serve(app(builder(Single("k"))), port=0) as server:
        answer = await spoken(server.port, b"GET /state.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status(answer) == 200
        for refused in (b"1.1\r\nHost: evil.example", b"1.0\r\nHost: localhost"):
            answer = await spoken(server.port, b"GET / HTTP/" + refused + b"\r\n\r\n")
            assert status(answer) == 403


@pytest.mark.parametrize(
    "request_,expected",
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/2\r\nHost: x\r\n\r\n", 400),
        (b"GET http://x/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (LINE + b"no colon\r\n\r\n", 400),
        (LINE + b"a b: c\r\n\r\n", 400),
        (LINE + b" folded: c\r\n\r\n", 400),
        (LINE + b"a: b\nc: d\r\n\r\n", 400),
        (LINE + b"a: b\0\r\n\r\n", 400),
        (LINE + b"Content-Length: 5\r\n\r\nhello", 413),
        (LINE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (LINE + b"a: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (LINE + b"a:" + b" " * 16_000 + b"\0\r\n\r\n", 400),  # cheap to read all the same
        (b"\x16\x03\x01\x02\x00\x01\xfc\r\n\r\n", 400),  # somebody speaks TLS
        (LINE + b"Content-Length: 0\r\n\r\n", 200),
        (b"OPTIONS / HTTP/1.0\r\nhost:x\r\n\r\n", 200),
    ],
)
async def test_what_is_not_plain_http_is_refused(request_: bytes, expected: int) -> None:
    async with serve(hello, port=0) as server:
        assert status(await spoken(server.port, request_)) == expected
        assert status(await spoken(server.port, LINE + b"\r\n")) == 200, "others are served"


@pytest.mark.parametrize("request_", [b"", b"GET / HT", LINE])
async def test_half_a_request_is_no_trouble(request_: bytes) -> None:
    async with serve(hello, port=0) as server:
        assert await spoken(server.port, request_, finish=True) == b""
        assert status(await spoken(server.port, LINE + b"\r\n")) == 200


async def test_who_has_gone_before_he_was_seen_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[Any] = []

    async def told(scope: Any, receive: Any, send: Any) -> None:
        clients.append(scope["client"])
        await hello(scope, receive, send)

    monkeypatch.setattr(asyncio.StreamWriter, "get_extra_info", lambda *_: None)
    async with serve(told, port=0) as server:
        assert status(await spoken(server.port, LINE + b"\r\n")) == 200
    assert clients == [None]
    assert not from_this_machine(scope_of("/", client=None))


async def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.inspect.server._REQUEST_SECONDS", 0.05)
    async with serve(hello, port=0) as server:
        assert status(await spoken(server.port, b"GET / ")) == 408


async def test_too_many_connections_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.inspect.server._MOST_CONNECTIONS", 2)
    async with serve(hello, port=0) as server:
        async with opened(server.port), opened(server.port):
            assert status(await spoken(server.port, LINE + b"\r\n")) == 503


@pytest.mark.parametrize("error", [
    LookupError("oops"), ConnectionRefusedError("oops"), asyncio.TimeoutError("oops"),
], ids=repr)  # fmt: skip
async def test_an_application_that_fails_answers_500_and_is_reported(error: Exception) -> None:
    """Also if its error is that of a connection of its own: no client has left."""

    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise error

    reported = reports()
    async with serve(fails, port=0) as server:
        answer = await spoken(server.port, LINE + b"\r\n")
    assert (status(answer), b"oops" in answer) == (500, False)
    assert [context["exception"] for context in reported] == [error]


async def test_a_connection_that_closing_finds_unbegun_is_closed_too() -> None:
    server = serve(hello, port=0)
    accept, closing = server._connected, []

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accept(reader, writer)
        closing.append(asyncio.create_task(server.aclose()))
        for connection in server._connections:
            connection.cancel()

    server._connected = accepted  # type: ignore[method-assign]  # to be there first
    async with server:
        assert await spoken(server.port, LINE + b"\r\n") == b""
        await asyncio.wait(closing)


async def test_a_connection_that_closing_comes_before_is_not_served() -> None:
    server = serve(hello, port=0)
    accept, closing = server._connected, []

    async def closed_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.aclose()
        accept(reader, writer)

    server._connected = lambda *pair: closing.append(  # type: ignore[method-assign]  # as above
        asyncio.create_task(closed_first(*pair))
    )
    async with server:
        assert await spoken(server.port, LINE + b"\r\n") == b""
        await asyncio.wait(closing)


async def test_an_application_hears_that_its_client_has_gone() -> None:
    heard: list[str] = []
    told = asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])
        heard.append((await receive())["type"])
        told.set()

    async with serve(waits, port=0) as server:
        async with opened(server.port) as (_, writer):
            writer.write(LINE + b"\r\nGET /again HTTP/1.1\r\n")
            await writer.drain()
        await asyncio.wait_for(told.wait(), 10)
    assert heard == ["http.request", "http.disconnect"]


async def test_closing_ends_also_what_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.inspect.server._MOMENT_SECONDS", 0.02)

    async def floods(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})

    async with serve(floods, port=0) as server:
        async with opened(server.port) as (one, to_one), opened(server.port) as (two, to_two):
            for reader, writer in ((one, to_one), (two, to_two)):
                writer.write(LINE + b"\r\n")
                await reader.readexactly(10)
            await asyncio.wait_for(server.aclose(), 10)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "_serve" in repr(task)]


async def test_who_takes_nothing_of_an_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.inspect.server._TAKING_SECONDS", 0.05)
    monkeypatch.setattr("coalestra.inspect.server._MOMENT_SECONDS", 0.02)
    reported = reports()
    ended = asyncio.Event()

    async def tells_all(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            await send({"type": "http.response.body", "body": b"x" * 20_000_000})
        finally:
            ended.set()

    async with serve(tells_all, port=0) as server:
        async with opened(server.port) as (reader, writer):
            reader._transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's own
            writer.write(LINE + b"\r\n")
            await asyncio.wait_for(ended.wait(), 10)
            while server._connections:
                await asyncio.wait(server._connections)
    assert reported == []


async def test_a_large_answer_comes_whole() -> None:
    body = bytes(range(256)) * 2_000

    async def tells_all(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async with serve(tells_all, port=0) as server:
        answer = await spoken(server.port, LINE + b"\r\n")
    assert answer.partition(b"\r\n\r\n")[2] == body


async def test_streams_reach_the_client_part_by_part_and_end_with_the_server() -> None:
    async with serve(app(builder(Single("k")), interval_seconds=0.02), port=0) as server:
        async with opened(server.port) as (reader, writer):
            writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            for _ in range(3):
                await asyncio.wait_for(reader.readuntil(b'data: {"at"'), 10)
            await server.aclose()
            with contextlib.suppress(ConnectionResetError):
                await asyncio.wait_for(reader.read(), 10)


async def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    async with serve(hello, port=0) as server:
        with pytest.raises(OSError, match="address already in use"):
            await serve(hello, port=server.port).__aenter__()


@pytest.mark.parametrize("settings,error", [
    ({"port": -1}, ValueError), ({"port": 70_000}, ValueError), ({"port": "8089"}, TypeError),
    ({"port": True}, TypeError), ({"host": ""}, ValueError), ({"host": None}, TypeError),
])  # fmt: skip
def test_a_wrong_address_is_refused_by_name(settings: Any, error: type[Exception]) -> None:
    (name,) = settings
    with pytest.raises(error, match=name):
        serve(hello, **settings)
    with pytest.raises(TypeError, match="application"):
        serve("page")  # type: ignore[arg-type]  # the very mistake


async def test_an_address_of_version_six_is_written_with_brackets() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        async with serve(app(builder(Single("k"))), host="::1", port=0) as server:
            assert server.url.startswith("http://[::1]:")
            async with opened(server.port, "::1") as (reader, writer):
                writer.write(f"GET / HTTP/1.1\r\nHost: [::1]:{server.port}\r\n\r\n".encode())
                assert status(await reader.read()) == 200
    except OSError:
        pytest.skip("no IPv6 here")


def test_it_serves_from_the_loop_of_any_thread() -> None:
    async def work() -> bytes:
        async with serve(hello, port=0) as server:
            return await spoken(server.port, LINE + b"\r\n")

    assert status(outcome(in_thread(lambda: asyncio.run(work())))) == 200
