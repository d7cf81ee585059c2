"""The scheduler's list of synchronous steps: run in order, never nested, never for long."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from coalestra.concurrency.pace import SLICE_SECONDS

_STEPS_BETWEEN_LOOKS = 4


class Agenda:
    """Runs small synchronous steps without recursion and without holding the event loop.

    A step may add further steps. They run after it, in order, so a chain of ten thousand
    settling keys needs no stack. When a run has taken `SLICE_SECONDS` the rest continues in a
    later step of the event loop.
    """

    __slots__ = ("_handle", "_running", "_steps", "_watch")

    def __init__(self, watch: Callable[[], float] = time.perf_counter) -> None:
        self._steps: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._running = False
        self._handle: asyncio.Handle | None = None
        self._watch = watch

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        return f"<Agenda steps={len(self._steps)} running={self._running}>"

    def add(self, step: Callable[..., None], *arguments: Any) -> None:
        """Put a step at the end, and run the list now unless it is being run already."""
        self._steps.append((step, arguments))
        if not self._running and self._handle is None:
            self.run()

    def run(self) -> None:
        """Run steps until none is left or the slice of time is used up."""
        if self._running:
            return
        self._running = True
        self._handle = None
        steps = self._steps
        until = self._watch() + SLICE_SECONDS
        looks = _STEPS_BETWEEN_LOOKS
        try:
            while steps:
                step, arguments = steps.popleft()
                try:
                    step(*arguments)
                except Exception as error:
                    _tell_loop(step, error)
                looks -= 1
                if not looks:
                    looks = _STEPS_BETWEEN_LOOKS
                    if self._watch() > until:
                        break
        finally:
            self._running = False
            if steps:
                self._handle = asyncio.get_running_loop().call_soon(self.run)

    def clear(self) -> None:
        """Forget every step: the loop they belonged to is gone."""
        self._steps.clear()
        self._handle = None


def _tell_loop(step: Callable[..., None], error: Exception) -> None:
    """A step must not fail; one that does shall neither stop the others nor pass unseen."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": f"coalestra: {step.__qualname__} failed", "exception": error}
    )
