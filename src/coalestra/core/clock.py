"""What time it is, for the calendar and for measuring."""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """The two readings of time that the library uses.

    Ages and observation times are wall-clock time, which may be corrected at any moment. Deadlines
    and latencies are monotonic time, which only ever runs forward.
    """

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment; they never run backwards."""


class SystemClock:
    """The clock of the machine."""

    __slots__ = ()

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds since some fixed moment; they never run backwards."""
        return time.monotonic()

    def __repr__(self) -> str:
        return "SystemClock()"
