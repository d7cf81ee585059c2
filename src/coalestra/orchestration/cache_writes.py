"""Writes to a cache that has to be awaited, grouped by the step in which their values arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.interest import Interest


class CacheWrites:
    """Carries settled values to the cache in groups, and each group's outcome back.

    A cache that fails to write costs the value its place in the cache, not its readers the value.
    """

    def __init__(
        self,
        equipment: Equipment,
        fit: Callable[[Acquisition], bool],
        written: Callable[[Acquisition, CacheWriteStatus, Revision], None],
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self._equipment = equipment
        self._fit = fit
        self._written = written
        self._tasks = tasks
        self._next: dict[Acquisition, None] = {}
        self._under_way: dict[Acquisition, tuple[asyncio.Task[Any], Interest]] = {}

    def add(self, flight: Acquisition) -> None:
        """Write the value that a flight offers, together with the others of this step."""
        if not self._next:
            asyncio.get_running_loop().call_soon(self._send)
        self._next[flight] = None

    def unwanted(self, flight: Acquisition) -> bool:
        """Give up a write if none of its group is waited for; return whether one is under way."""
        under_way = self._under_way.get(flight)
        if under_way is None:
            return flight in self._next
        task, interest = under_way
        if not interest.alive:
            task.cancel()
        return True

    def forget(self) -> None:
        """Drop everything: the event loop it belonged to has ended."""
        self._next = {}
        self._under_way.clear()

    def _send(self) -> None:
        group = [flight for flight in self._next if self._fit(flight)]
        self._next = {}
        for forced in (False, True):
            flights = [flight for flight in group if flight.forced is forced]
            if flights:
                task = asyncio.get_running_loop().create_task(
                    self._write(flights, forced), name="coalestra cache write"
                )
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(partial(self._ended, flights))
                self._under_way.update(dict.fromkeys(flights, (task, Interest(flights))))

    def _ended(self, flights: list[Acquisition], task: asyncio.Task[Any]) -> None:
        """Settle the flights of a write that was given up: who still waits gets the value."""
        for flight in flights:
            self._under_way.pop(flight, None)
            if flight.offered is not None:
                self._written(flight, CacheWriteStatus.STORED, flight.offered)

    async def _write(self, flights: list[Acquisition], forced: bool) -> None:
        # Looked at in the very step that queues for the keys: there may have been news since.
        fit = [flight for flight in flights if self._fit(flight)]
        offers = {flight: flight.offered for flight in fit if flight.offered is not None}
        if not offers:
            return
        for work in {flight.sponsor for flight in flights}:
            work.record.cache_batch_writes += 1
        try:
            outcome = await self._equipment.access.write(
                tuple(offers.values()), replace_equal=forced
            )
        except Exception as error:
            outcome = {}
            if self._equipment.report is not None:
                self._equipment.report.cache_failed("write", error)
        for flight, revision in offers.items():
            written = outcome.get(flight.key)
            if written is None:
                self._written(flight, CacheWriteStatus.STORED, revision)
            else:
                self._written(flight, written.status, written.current)

    def __repr__(self) -> str:
        return f"<CacheWrites waiting={len(self._next)} under_way={len(self._under_way)}>"
