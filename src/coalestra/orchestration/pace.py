"""Working through many things without holding the event loop."""

from __future__ import annotations

import asyncio
import time

SLICE_SECONDS = 0.002
"""How long the library works before the event loop gets a turn."""


class Pace:
    """Gives the event loop a turn whenever a slice of time is used up."""

    __slots__ = ("_pause_at",)

    def __init__(self) -> None:
        self._pause_at = time.perf_counter() + SLICE_SECONDS

    @property
    def due(self) -> bool:
        """Whether it is time to pause."""
        return time.perf_counter() > self._pause_at

    async def keep(self) -> bool:
        """Pause if it is time to; return whether the loop had a turn."""
        if not self.due:
            return False
        await asyncio.sleep(0)
        self._pause_at = time.perf_counter() + SLICE_SECONDS
        return True
