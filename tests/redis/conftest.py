"""Servers and caches for the tests of the shared cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest

pytest.importorskip("redis")
pytest.importorskip("msgspec")

from tests.redis.processes import dismiss
from tests.redis.servers import Server, running
from tests.redis.stock import Caches, caches_of


@pytest.fixture(scope="session", autouse=True)
def _no_worker_left() -> Iterator[None]:
    yield
    dismiss()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[Server]:
    """A server for all tests that leave it as it is."""
    with running() as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The server for all, emptied."""
    shared_server.command("FLUSHALL")
    return shared_server


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server for this test alone, to be stopped, paused or filled."""
    with running() as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test uses."""
    return f"test-{os.urandom(4).hex()}"


@pytest.fixture
def caches(server: Server, prefix: str) -> Caches:
    """Make so many caches over the server for all, with these settings."""
    return partial(caches_of, server, prefix)
