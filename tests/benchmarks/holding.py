"""The line that asks how long others on the event loop have to wait."""

from __future__ import annotations

import asyncio
import gc
from time import perf_counter

from tests.benchmarks import plain
from tests.benchmarks.reading import warm
from tests.benchmarks.stock import keys_of, price
from tests.benchmarks.subjects import Role, Subject
from tests.benchmarks.workshop import Work, Workshop


class Heartbeat:
    """Asks for a turn of the event loop over and over, and remembers the longest wait for one."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._last = 0.0
        self._beating = False

    async def watch(self, work: Work) -> float:
        """Do the work; return the longest that it kept anybody else waiting, in seconds."""
        self.longest = 0.0
        self._beating = True
        self._last = perf_counter()
        self._beat()
        await asyncio.sleep(0)
        await work()
        self._note()
        self._beating = False
        return self.longest

    def _beat(self) -> None:
        if self._beating:
            self._note()
            asyncio.get_running_loop().call_soon(self._beat)

    def _note(self) -> None:
        now = perf_counter()
        self.longest = max(self.longest, now - self._last)
        self._last = now


def longest_hold(shop: Workshop) -> list[Subject]:
    """Read many cached keys while a heartbeat asks for every turn of the loop."""
    keys = keys_of(shop.scale.size(10_000))
    ours = warm(shop, keys, price)
    entries = plain.filled(((key, price(key)) for key in keys), dict.copy)

    async def plainly() -> None:
        plain.read_flat(entries, keys)

    def sample(work: Work) -> float:
        gc.collect()
        return shop.run(Heartbeat().watch(work))

    return [
        Subject("coalestra", Role.OURS, lambda: sample(ours)),
        Subject("plain loop", Role.FLOOR, lambda: sample(plainly)),
    ]
