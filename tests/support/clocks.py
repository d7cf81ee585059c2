"""Clocks for tests: one moved by hand, one that follows the event loop."""

from __future__ import annotations

import asyncio

EPOCH = 1_700_000_000.0
"""The wall time at which every test clock starts, in seconds since 1970."""


class ManualClock:
    """A clock that stands still until the test moves it."""

    __slots__ = ("_monotonic", "_now")

    def __init__(self, now: float = EPOCH, monotonic: float = 5_000.0) -> None:
        self._now = now
        self._monotonic = monotonic

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        """Let both readings move on together."""
        self._now += seconds
        self._monotonic += seconds

    def set_wall(self, now: float) -> None:
        """Correct the wall clock alone, as a time server would."""
        self._now = now

    def __repr__(self) -> str:
        return f"ManualClock(now={self._now!r}, monotonic={self._monotonic!r})"


class LoopClock:
    """A clock whose seconds are those of the event loop the test runs on.

    Threads may read it too, once it has been read (or made) inside the loop.
    """

    __slots__ = ("_loop", "_start", "_wall")

    def __init__(self, now: float = EPOCH) -> None:
        self._wall = now
        self._loop: asyncio.AbstractEventLoop | None = None
        self._start = 0.0
        self._attach()

    def _attach(self) -> asyncio.AbstractEventLoop | None:
        if self._loop is None:
            try:
                self._loop = asyncio.get_running_loop()
            except RuntimeError:
                return None
            self._start = self._loop.time()
        return self._loop

    def now(self) -> float:
        loop = self._attach()
        return self._wall + (0.0 if loop is None else loop.time() - self._start)

    def monotonic(self) -> float:
        loop = self._attach()
        return 0.0 if loop is None else loop.time()

    def __repr__(self) -> str:
        return f"LoopClock(now={self.now()!r})"
