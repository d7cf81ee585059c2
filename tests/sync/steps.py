"""Small pieces that the tests of the sync faces share."""

from __future__ import annotations

import asyncio
import threading

from coalestra.core.keys import ResourceKey
from coalestra.sync import THREAD_NAME
from tests.support.elsewhere import PATIENCE

PRICE = ResourceKey("market", "price", "BTC")
VOLUME = ResourceKey("market", "volume", "BTC")


class Door:
    """Holds coroutines of any loop until some thread opens it, and tells when they have come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.entered = 0
        self._open = False
        self._lock = threading.Lock()
        self._held: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def pass_(self) -> None:
        event = asyncio.Event()
        with self._lock:
            self.entered += 1
            if not self._open:
                self._held.append((asyncio.get_running_loop(), event))
            else:
                event.set()
        self.reached.set()
        await event.wait()

    def wait_reached(self) -> None:
        assert self.reached.wait(PATIENCE)

    def open(self) -> None:
        with self._lock:
            self._open = True
            held, self._held = self._held, []
        for loop, event in held:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)


def loop_threads() -> list[threading.Thread]:
    """Every thread that runs the loop of a sync facade."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]
