"""The calls of one unit of work to one source: a queue, and a bounded number of workers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from coalestra.orchestration.attempts import Attempt
from coalestra.orchestration.calls import Shift
from coalestra.orchestration.chains import Link, SourceKind
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.tally import Tally
from coalestra.orchestration.work import Work

_CALLS_BETWEEN_LOOKS = 8
"""Calls that never wait would otherwise all be made in one step of the event loop."""


class Lane:
    """Turns ready flights into attempts and works them off, at most `limit` side by side.

    A worker is a task in the context of the work, so that a source sees the context variables of
    the build that called it. A worker whose call was cut off but does not end is written off:
    another takes its place, while the old one keeps its slot until it really ends.
    """

    __slots__ = (
        "_busy",
        "_make",
        "_pace",
        "_queue",
        "_tasks",
        "_workers",
        "limit",
        "link",
        "tally",
        "work",
    )

    def __init__(
        self,
        work: Work,
        link: Link,
        limit: int,
        make: Callable[[Lane, Sequence[Acquisition]], Attempt],
        equipment: Equipment,
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self.work: Work = work
        self.link: Link = link
        self.limit: int = limit
        self.tally: Tally = Tally(link, work.record, equipment.report)
        self._pace = equipment.pace
        self._make = make
        self._tasks = tasks
        self._queue: deque[Attempt] = deque()
        self._workers = 0
        self._busy = 0

    def add(self, flights: Sequence[Acquisition]) -> None:
        """Queue calls for the flights: for a batch source in chunks of its size, else one each."""
        size = 1
        if self.link.kind is SourceKind.BATCH:
            size = self.link.max_batch_size or len(flights)
            if len(flights) > size:
                self.work.record.batch_chunks += -(-len(flights) // size)
        parts = [flights[start : start + size] for start in range(0, len(flights), size)]
        self._queue.extend([self._make(self, part) for part in parts])
        self._staff()

    def again(self, attempt: Attempt) -> None:
        """Queue a call once more, for its next try."""
        self._queue.append(attempt)
        self._staff()

    def write_off(self, shift: Shift) -> None:
        """Count a worker as gone: its call was cut off and may take its time to end."""
        if not shift.gone:
            shift.gone = True
            self._busy -= 1
            self._workers -= 1
            self._staff()

    def _staff(self) -> None:
        # Looked at anew each time: an eager task may have worked the queue off by now.
        while self._workers < min(self.limit, self._busy + len(self._queue)):
            self._workers += 1
            # A copy, as a context cannot be entered twice, and an eager task may come back here.
            task = self.work.variables.copy().run(self._start)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _start(self) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        return loop.create_task(self._serve(), name=f"coalestra {self.link.name}")

    async def _serve(self) -> None:
        shift = Shift()
        pace = self._pace
        pace.begin()
        left = _CALLS_BETWEEN_LOOKS
        try:
            while self._queue and not shift.gone:
                shift.busy = True
                self._busy += 1
                await self._queue.popleft().run(shift)
                if not shift.gone:
                    shift.busy = False
                    self._busy -= 1
                    left -= 1
                    if not left:
                        left = _CALLS_BETWEEN_LOOKS
                        await pace.keep()
        finally:
            if not shift.gone:
                shift.gone = True
                self._busy -= shift.busy
                self._workers -= 1
                if self._queue:
                    self._staff()

    def __repr__(self) -> str:
        return f"<Lane {self.link.name} queued={len(self._queue)} workers={self._workers}>"
