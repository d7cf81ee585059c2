"""Refreshes in the background: one per key at a time, on nobody's deadline."""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import Callable
from functools import partial

from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext
from coalestra.orchestration.flights import Gather, Work
from coalestra.orchestration.parts import Equipment
from coalestra.orchestration.readings import Demand, Pins


class Refresher:
    """Schedules refreshes, which share flights, capacity and retries with everybody else.

    Refreshes that one unit of work asks for in one step, for one reason, travel together. They run
    with the context variables of the builder's making, never with those of a passing request.
    """

    def __init__(
        self,
        equipment: Equipment,
        variables: contextvars.Context,
        open_gather: Callable[[Gather], None],
        abandon: Callable[[Gather], None],
    ) -> None:
        self._equipment = equipment
        self._variables = variables
        self._open = open_gather
        self._abandon = abandon
        self._active: dict[ResourceKey, Gather | None] = {}
        self._next: dict[tuple[int, str], tuple[Work, list[ResourceKey]]] = {}
        self._waiters: list[tuple[set[ResourceKey], asyncio.Future[None]]] = []
        self.closed = False

    @property
    def active(self) -> int:
        """How many keys are being refreshed."""
        return len(self._active)

    def schedule(self, key: ResourceKey, reason: str, parent: Work) -> bool:
        """Refresh `key` soon; False if that is under way already."""
        if self.closed or key in self._active:
            return False
        self._active[key] = None
        group = self._next.get((id(parent), reason))
        if group is None:
            group = self._next[id(parent), reason] = (parent, [])
            asyncio.get_running_loop().call_soon(self._start, id(parent), reason)
        group[1].append(key)
        parent.record.refresh_scheduled += 1
        if self._equipment.report is not None:
            self._equipment.report.refresh_scheduled(key, reason, parent.context.snapshot_id)
        return True

    def _start(self, parent_id: int, reason: str) -> None:
        parent, keys = self._next.pop((parent_id, reason), (None, []))
        if parent is None:
            return
        metadata = {
            **parent.context.metadata,
            "background_refresh": True,
            "refresh_reason": reason,
            "parent_snapshot_id": parent.context.snapshot_id,
        }
        context = FetchContext(
            requested_at=self._equipment.clock.now(),
            metadata=metadata,
            snapshot_id=os.urandom(16).hex(),
        )
        work = Work(context, variables=self._variables)
        for key in keys:
            if key in self._active:
                gather = Gather(work, (key,), Pins(), demand=Demand(refresh=True))
                gather.done = partial(self._done, key, reason, parent)
                self._active[key] = gather
        for key in keys:
            begun = self._active.get(key)
            if begun is not None:
                self._open(begun)

    def _done(self, key: ResourceKey, reason: str, parent: Work, gather: Gather) -> None:
        report = self._equipment.report
        reading = gather.readings.get(key)
        if reading is not None:
            parent.record.refresh_completed += 1
            if report is not None:
                report.refresh_completed(key, reason, reading.revision.source)
        else:
            parent.record.refresh_failed += 1
            if report is not None:
                report.refresh_failed(key, reason, gather.failures[key].make())
        self._ended(key)

    def _ended(self, key: ResourceKey) -> None:
        self._active.pop(key, None)
        for keys, waiter in tuple(self._waiters):
            keys.discard(key)
            if not keys:
                self._waiters.remove((keys, waiter))
                if not waiter.done():
                    waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for the refreshes that are scheduled at this moment."""
        if not self._active:
            return
        entry = (set(self._active), asyncio.get_running_loop().create_future())
        self._waiters.append(entry)
        try:
            await entry[1]
        finally:
            if entry in self._waiters:
                self._waiters.remove(entry)

    def cancel(self) -> None:
        """Give up every refresh."""
        self._next.clear()
        for key, gather in tuple(self._active.items()):
            if gather is not None:
                self._abandon(gather)
            if self._equipment.report is not None:
                self._equipment.report.refresh_cancelled(key)
            self._ended(key)

    def forget(self) -> None:
        """Drop everything: the event loop it belonged to has ended."""
        self._next.clear()
        self._active.clear()
        self._waiters.clear()

    def __repr__(self) -> str:
        return f"<Refresher active={len(self._active)} closed={self.closed}>"
