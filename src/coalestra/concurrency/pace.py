"""Working through many things without holding the event loop."""

from __future__ import annotations

import asyncio
import time

SLICE_SECONDS = 0.002
"""How long the library works before the event loop gets a turn."""


class Pace:
    """Gives the event loop a turn whenever a slice of time is used up.

    Real time is meant, whatever clock the application lives by: it is the thread that must not be
    held. A look at it costs about as much as copying a small value, so loops look at intervals.
    """

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until = time.perf_counter() + SLICE_SECONDS

    @property
    def due(self) -> bool:
        """Whether the slice is used up."""
        return time.perf_counter() >= self._until

    async def rest(self) -> None:
        """Let others run once, then start a new slice."""
        await asyncio.sleep(0)
        self._until = time.perf_counter() + SLICE_SECONDS

    async def keep(self) -> bool:
        """Rest if it is time to; return whether others had a turn."""
        if not self.due:
            return False
        await self.rest()
        return True

    def __repr__(self) -> str:
        return f"<Pace {self._until - time.perf_counter():+.4f} s left>"
