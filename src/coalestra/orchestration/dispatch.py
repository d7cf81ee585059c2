"""Dispatch: ready keys are grouped by source and handed to the lanes of their unit of work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from coalestra.concurrency.threads import current_threads
from coalestra.orchestration.attempts import Attempt, Desk
from coalestra.orchestration.chains import SourceKind
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.lanes import Lane
from coalestra.orchestration.phases import Phase
from coalestra.orchestration.work import Intake, Work

_READY = Phase.READY
_CALLING = Phase.CALLING


class Dispatch:
    """Makes the keys that become ready for one source in one step travel together.

    While a unit of work is on hold, more of its keys are on their way, and none is sent.
    """

    def __init__(self, desk: Desk, refused: Callable[[Acquisition, Exception], None]) -> None:
        self._desk = desk
        self._refused = refused
        self.workers: set[asyncio.Task[Any]] = set()

    def hold(self, work: Work) -> None:
        """Hold back the calls of a unit of work: more keys for them are on their way."""
        work.planning += 1

    def release(self, work: Work) -> None:
        """Take back one `hold`; after the last one the calls are made, at the end of this step."""
        work.planning -= 1
        if not work.planning and work.ready:
            self._flush_soon(work)

    def ready(self, flight: Acquisition) -> None:
        """Group a flight with the others that are ready for the same source in this step."""
        work = flight.sponsor
        if work.closed or work.struck:
            work = flight.living_sponsor()
        link = flight.link
        if link is None:
            return
        flight.phase = _READY
        group = work.ready.get(link.index)
        if group is None:
            group = work.ready[link.index] = []
        group.append(flight)
        if not work.flushing:
            self._flush_soon(work)

    def _flush_soon(self, work: Work) -> None:
        if not work.flushing:
            work.flushing = True
            asyncio.get_running_loop().call_soon(self._flush, work)

    def _flush(self, work: Work) -> None:
        """Hand the groups to their lanes, unless more keys for them are on their way."""
        work.flushing = False
        if work.planning:
            return
        ready, work.ready = work.ready, {}
        for index, flights in ready.items():
            waiting = [flight for flight in flights if flight.phase is _READY]
            for flight in waiting:
                flight.phase = _CALLING
            try:
                self._lane(work, index).add(waiting)
            except Exception as error:
                for flight in waiting:
                    self._refused(flight, error)

    def _lane(self, work: Work, index: int) -> Intake:
        lane = work.lanes.get(index)
        if lane is None:
            equipment = self._desk.equipment
            link = equipment.chains.links[index]
            limit = equipment.max_pending_tasks
            if link.kind is SourceKind.BATCH:
                limit = equipment.max_concurrency
            work.variables.run(current_threads.set, equipment.threads)
            lane = work.lanes[index] = Lane(
                work, link, limit, self._attempt, equipment, self.workers
            )
        return lane

    def _attempt(self, lane: Lane, flights: Sequence[Acquisition]) -> Attempt:
        return Attempt(self._desk, lane, flights)

    def __repr__(self) -> str:
        return f"<Dispatch workers={len(self.workers)}>"
