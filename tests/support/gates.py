"""Gates decide who goes first: for coroutines, and for functions in worker threads."""

from __future__ import annotations

import asyncio
import threading

from tests.support.thread_watch import parked_here, parked_threads, unpark


class Gate:
    """Holds coroutines until the test opens it, and tells when they have come.

    ``await gate.pass_()`` in the code under control, ``await gate.wait_arrived(n)`` and
    ``gate.open()`` in the test. ``close()`` holds later arrivals again.
    """

    __slots__ = ("_held", "_watchers", "arrived", "name", "opened")

    def __init__(self, name: str = "gate", *, opened: bool = False) -> None:
        self.name = name
        self.opened = opened
        self.arrived = 0
        self._held: list[asyncio.Future[None]] = []
        self._watchers: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def waiting(self) -> int:
        """How many are held at this moment."""
        return sum(not future.done() for future in self._held)

    async def pass_(self) -> None:
        """Arrive, then wait until the gate is open."""
        self.arrived += 1
        for wanted, watcher in self._watchers:
            if wanted <= self.arrived and not watcher.done():
                watcher.set_result(None)
        if self.opened:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held.append(future)
        try:
            await future
        finally:
            if future in self._held:
                self._held.remove(future)

    async def wait_arrived(self, n: int = 1) -> None:
        """Wait until ``n`` have arrived since the gate was made."""
        if self.arrived >= n:
            return
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (n, watcher)
        self._watchers.append(entry)
        try:
            await watcher
        finally:
            self._watchers.remove(entry)

    def open(self) -> None:
        """Let everybody through, now and from now on."""
        self.opened = True
        self.let_through(len(self._held))

    def close(self) -> None:
        """Hold those who arrive from now on."""
        self.opened = False

    def let_through(self, n: int = 1) -> None:
        """Let the ``n`` longest waiting through; the gate stays as it is for the others."""
        for future in self._held[:n]:
            if not future.done():
                future.set_result(None)
        del self._held[:n]

    def __repr__(self) -> str:
        state = "open" if self.opened else "closed"
        return f"<Gate {self.name!r} {state}, {self.arrived} arrived, {self.waiting} held>"


class ThreadGate:
    """The same for a function in a worker thread: ``gate.pass_()`` blocks that thread.

    The virtual loop knows that a thread in here will not go on by itself, so time may move.
    """

    __slots__ = ("_arrived", "_changed", "_opened", "name")

    def __init__(self, name: str = "thread gate") -> None:
        self.name = name
        self._changed = threading.Condition()
        self._opened = False
        self._arrived = 0

    @property
    def arrived(self) -> int:
        """How many threads have come so far."""
        with self._changed:
            return self._arrived

    def pass_(self) -> None:
        """Arrive, then block the calling thread (30 real seconds at most) until the gate opens."""
        with self._changed:
            self._arrived += 1
            self._changed.notify_all()
            if self._opened:
                return
            with parked_here(self):
                if not self._changed.wait_for(lambda: self._opened, timeout=30):
                    raise TimeoutError(f"{self.name} stayed closed for 30 seconds")

    def wait_arrived(self, n: int = 1) -> None:
        """Block the calling thread until ``n`` threads have come (30 real seconds at most)."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._arrived >= n, timeout=30):
                raise TimeoutError(f"{self._arrived} of {n} threads came to {self.name}")

    def open(self) -> None:
        """Let every thread through, now and from now on."""
        with self._changed:
            self._opened = True
            unpark(self)
            self._changed.notify_all()

    def __repr__(self) -> str:
        state = "open" if self._opened else "closed"
        return f"<ThreadGate {self.name!r} {state}, {self._arrived} arrived>"


def release_threads() -> None:
    """Open every thread gate at which somebody is held."""
    for place in parked_threads().values():
        if isinstance(place, ThreadGate):
            place.open()
