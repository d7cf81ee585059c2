"""Giving the event loop back while working through a long list."""

from __future__ import annotations

import asyncio
import time
from typing import Final

SLICE_SECONDS: Final = 0.002


class Pace:
    """Knows when a loop over many items has held the event loop long enough.

    Use as ``if pace.due(): await pace.rest()`` once per item. Real time is meant here, because
    it is the thread that must not be held, whatever clock the application lives by.
    """

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until = time.perf_counter() + SLICE_SECONDS

    def __repr__(self) -> str:
        return f"Pace({self._until - time.perf_counter():+.4f}s left)"

    def due(self) -> bool:
        """Say whether the slice of time is used up."""
        return time.perf_counter() >= self._until

    async def rest(self) -> None:
        """Let others run once, then start a new slice."""
        await asyncio.sleep(0)
        self._until = time.perf_counter() + SLICE_SECONDS
