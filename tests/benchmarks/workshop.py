"""Where the subjects of a line are made: an event loop, a clock, and what to close at the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from time import process_time
from typing import Any, TypeVar

from tests.benchmarks.scale import Scale

T = TypeVar("T")
Work = Callable[[], Awaitable[object]]


class Workshop:
    """Runs and times work on one event loop.

    A sample starts on a collected heap, and the collector stays on while it is taken. What is timed
    is the time of the processor, all threads together, so that other programs on a busy machine do
    not count; only what waits for another thread is timed by the clock on the wall.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._loop = asyncio.new_event_loop()
        self._at_end: list[Callable[[], object]] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end."""
        return self._loop.run_until_complete(work)

    def at_end(self, step: Callable[[], object]) -> None:
        """Call ``step`` when the line has been measured; the last one first."""
        self._at_end.append(step)

    def timed(self, work: Work, units: int = 1) -> Callable[[], float]:
        """Return a sampler of the seconds per unit of work that can be done again and again."""
        repeats = 0

        def sample() -> float:
            nonlocal repeats
            repeats = repeats or self._repeats(lambda times: self.run(_clocked(work, times)))
            gc.collect()
            return self.run(_clocked(work, repeats)) / (repeats * units)

        return sample

    def timed_fresh(
        self, prepare: Callable[[], Awaitable[Work]], units: int
    ) -> Callable[[], float]:
        """Return a sampler of the seconds per unit of work that needs a new start each time.

        ``prepare`` returns the work; it is not timed itself.
        """

        async def once() -> float:
            work = await prepare()
            gc.collect()
            return await _clocked(work, 1)

        return lambda: self.run(once()) / units

    def timed_blocking(
        self, work: Callable[[], object], units: int = 1, clock: Callable[[], float] = process_time
    ) -> Callable[[], float]:
        """Return a sampler of the seconds per unit of plain work, done outside of any loop."""
        repeats = 0

        def clocked(times: int) -> float:
            began = clock()
            for _ in range(times):
                work()
            return clock() - began

        def sample() -> float:
            nonlocal repeats
            repeats = repeats or self._repeats(clocked)
            gc.collect()
            return clocked(repeats) / (repeats * units)

        return sample

    def _repeats(self, clocked: Callable[[int], float]) -> int:
        """Return how often work has to be repeated for a sample to be long enough."""
        times = 1
        while (took := clocked(times)) < self.scale.sample_seconds:
            wanted = self.scale.sample_seconds / max(took, 1e-9)
            times = max(times + 1, int(times * min(wanted, 10.0)))
        return times

    def close(self) -> None:
        """Undo what the subjects set up."""
        while self._at_end:
            self._at_end.pop()()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                self._loop.run_until_complete(task)
        self._loop.close()


async def _clocked(work: Work, times: int) -> float:
    began = process_time()
    for _ in range(times):
        await work()
    return process_time() - began


@contextlib.contextmanager
def workshop(scale: Scale) -> Iterator[Workshop]:
    """Open a workshop for one line."""
    opened = Workshop(scale)
    try:
        yield opened
    finally:
        opened.close()
