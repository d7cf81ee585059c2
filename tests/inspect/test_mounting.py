"""The page within frameworks, and on another server than its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from coalestra import CallableSource, SnapshotBuilder
from coalestra.inspect import app
from coalestra.inspect.asgi import STREAM_SECONDS

pytestmark = pytest.mark.slow


async def fetch(key: Any, context: Any) -> int:
    return 1


def made() -> SnapshotBuilder:
    return SnapshotBuilder(
        [CallableSource(name="rates", priority=1, supports=lambda key: True, fetcher=fetch)]
    )


class Served:
    """An ASGI application on uvicorn, in a thread, as `uvicorn module:app` would run it."""

    def __init__(self, application: Any, **settings: Any) -> None:
        uvicorn = pytest.importorskip("uvicorn")
        config = uvicorn.Config(application, port=0, log_level="warning", **settings)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> Served:
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def mounted(**settings: Any) -> Any:
    applications = pytest.importorskip("starlette.applications")
    routing = pytest.importorskip("starlette.routing")

    @contextlib.asynccontextmanager
    async def lifespan(application: Any) -> AsyncIterator[None]:
        async with made() as builder:
            page = app(builder, interval_seconds=0.05, **settings)
            application.router.routes.append(routing.Mount("/ops/inspect", app=page))
            yield

    return applications.Starlette(lifespan=lifespan)


@pytest.fixture
def served() -> Iterator[Served]:
    with Served(mounted()) as served:
        yield served


@contextlib.contextmanager
def asked(port: int, path: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        with connection.getresponse() as answer:
            yield answer
    finally:
        connection.close()


def test_it_is_mounted_in_starlette_on_uvicorn(served: Served) -> None:
    with asked(served.port, "/ops/inspect/") as page:
        assert page.status == 200
        assert b"</html>" in page.read()
    with asked(served.port, "/ops/inspect") as page:
        assert page.status == 307
        assert page.headers["location"].endswith("/ops/inspect/")
    with asked(served.port, "/ops/inspect/state.json") as page:
        assert json.load(page)["sources"][0]["name"] == "rates"
    with asked(served.port, "/elsewhere") as page:
        assert page.status == 404


def test_events_reach_a_viewer_through_it_one_by_one(served: Served) -> None:
    with asked(served.port, "/ops/inspect/events") as events:
        states: list[float] = []
        while len(states) < 3:
            line = events.readline()
            if line.startswith(b"data: "):
                states.append(json.loads(line[6:])["at"])
    assert states == sorted(set(states))


def test_a_viewer_who_leaves_is_noticed_and_the_server_can_end() -> None:
    with Served(mounted()) as served:
        with asked(served.port, "/ops/inspect/events") as events:
            events.readline()
        left = time.monotonic()
    assert time.monotonic() - left < STREAM_SECONDS / 2


def test_a_page_left_open_barely_holds_up_the_servers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.inspect.asgi.STREAM_SECONDS", 0.5)
    with Served(mounted()) as served:
        with asked(served.port, "/ops/inspect/events") as events:
            events.readline()
            served.server.should_exit = True
            served.thread.join(10)
            assert not served.thread.is_alive()


def test_behind_a_proxy_that_leaves_its_path_away_it_is_found_too() -> None:
    with Served(app(made()), root_path="/behind/a/proxy") as served:
        with asked(served.port, "/state.json") as page:
            assert page.status == 200


def test_the_client_of_a_test_may_read_as_it_comes_from_no_network() -> None:
    try:
        from starlette.testclient import TestClient
    except (ImportError, RuntimeError) as missing:  # it needs one more package, and says which
        pytest.skip(str(missing))
    client = TestClient(app(made()))
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.real_loop
async def test_another_server_than_uvicorn_serves_it() -> None:
    hypercorn = pytest.importorskip("hypercorn")
    serving = pytest.importorskip("hypercorn.asyncio")
    config = hypercorn.Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    sockets = config.create_sockets()
    port = sockets.insecure_sockets[0].getsockname()[1]
    config.create_sockets = lambda: sockets
    ended = asyncio.Event()
    task = asyncio.create_task(
        serving.serve(app(made(), interval_seconds=0.05), config, shutdown_trigger=ended.wait)
    )

    def visit() -> int:
        with asked(port, "/events") as events:
            events.readline()
            return int(events.status)

    while True:
        try:
            assert await asyncio.to_thread(visit) == 200
            break
        except ConnectionRefusedError:
            await asyncio.sleep(0.05)
    ended.set()
    await asyncio.wait_for(task, 10)
