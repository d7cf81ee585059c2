"""The engine of one builder: its parts put together, its stages, its event loop and its end."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Mapping
from functools import partial

from coalestra.core.errors import BuilderClosedError
from coalestra.core.keys import ResourceKey
from coalestra.orchestration.deliveries import Deliveries
from coalestra.orchestration.derivations import Derivations
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Gather, nothing
from coalestra.orchestration.lookups import Lookups
from coalestra.orchestration.news import News
from coalestra.orchestration.refresh import Refresher
from coalestra.orchestration.scheduler import Scheduler
from coalestra.orchestration.warm_reads import WarmReads
from coalestra.orchestration.work import Work


class Engine:
    """Runs the stages of units of work: brings each gather its readings, or ends it in time."""

    def __init__(self, equipment: Equipment, variables: contextvars.Context) -> None:
        self.equipment = equipment
        self.scheduler: Scheduler = Scheduler(equipment)
        self.deliveries: Deliveries = Deliveries(equipment.copies, equipment.pace)
        self.lookups: Lookups = Lookups(self.scheduler, self._refresh)
        self.warm_reads: WarmReads = WarmReads(equipment)
        self._derivations = Derivations(self.scheduler, self.lookups, self.deliveries)
        self.refresher: Refresher = Refresher(
            equipment, variables, self.lookups.open, self.lookups.conclusions.abandon
        )
        self._news = News(self.scheduler, self.lookups.reads)
        equipment.access.subscribe(self._news)
        self._stages: dict[Gather, asyncio.Future[None] | None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed: bool = False

    def _refresh(self, key: ResourceKey, reason: str, parent: Work) -> bool:
        return self.refresher.schedule(key, reason, parent)

    # Stages -----------------------------------------------------------------------------------

    async def run(self, gather: Gather, keep: Callable[[Gather], None]) -> None:
        """Wait until every key of a stage has a reading or a failure, or its deadline strikes.

        `keep` is called in the very step in which that is so.

        Raises:
            RuntimeError: if the builder is closed, before or meanwhile.
        """
        loop = self.enter()
        ended = False

        def done(_gather: Gather) -> None:
            nonlocal ended
            ended = True
            keep(gather)
            future = self._stages.get(gather)
            if future is not None and not future.done():
                future.set_result(None)

        gather.done = done
        gather.strike = partial(self.lookups.conclusions.strike, gather)
        self._stages[gather] = None
        try:
            if gather.work.expired:
                self.lookups.conclusions.strike(gather)
            else:
                gather.work.enter(gather)
                self.lookups.open(gather)
            if not ended:
                future = self._stages[gather] = loop.create_future()
                await future
        finally:
            self._stages.pop(gather, None)
            gather.work.leave(gather)
            gather.strike = nothing
            if not ended and not loop.is_closed():
                self.lookups.conclusions.abandon(gather)

    # The event loop ---------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        scheduler = self.scheduler
        return bool(
            self._stages or scheduler.dispatch.workers or scheduler.tasks or self.refresher.active
        )

    def enter(self) -> asyncio.AbstractEventLoop:
        """Begin something on the running event loop, make that loop the engine's own, return it.

        Raises:
            RuntimeError: if the builder is closed, or has work under way on another loop.
        """
        if self.closed:
            raise BuilderClosedError
        return self.attach()

    def attach(self) -> asyncio.AbstractEventLoop:
        """Make the running event loop the engine's own, and return it.

        Raises:
            RuntimeError: if another loop still has work of this builder under way.
        """
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return loop
        if self._loop is not None:
            if self._loop.is_closed():
                self.equipment.capacity.forget()
            elif self.busy:
                raise RuntimeError(
                    "this builder has work under way on another event loop; use one builder per "
                    "loop, or a SyncSnapshotBuilder to share one between threads"
                )
            self.forget()
        self._loop = loop
        return loop

    def forget(self) -> None:
        """Drop everything that belonged to an event loop which has ended."""
        self.scheduler.forget()
        self.lookups.reads.forget()
        self.refresher.forget()
        self._stages.clear()

    # The end ----------------------------------------------------------------------------------

    def require_open(self) -> None:
        """Raise `RuntimeError` once the builder is closed."""
        if self.closed:
            raise BuilderClosedError

    def close(self) -> None:
        """Refuse new stages, and end those under way with an error."""
        self.closed = True
        self.refresher.closed = True
        for gather, future in tuple(self._stages.items()):
            self.lookups.conclusions.abandon(gather)
            if future is not None and not future.done():
                future.set_exception(BuilderClosedError())

    async def stop(self, timeout_seconds: float) -> Mapping[str, int]:
        """End every task; return how many calls of each source are still running after that long.

        A source that runs in a thread, or ignores its cancellation, cannot be ended from outside.
        """
        self.refresher.cancel()
        self.equipment.access.unsubscribe(self._news)
        scheduler = self.scheduler
        for task in (*scheduler.dispatch.workers, *scheduler.tasks):
            task.cancel()
        running = {*scheduler.dispatch.workers, *scheduler.tasks}
        if running:
            _, running = await asyncio.wait(running, timeout=timeout_seconds)
        left: dict[str, int] = {}
        for task in running:
            name = task.get_name().removeprefix("coalestra ")
            left[name] = left.get(name, 0) + 1
        return left

    def __repr__(self) -> str:
        return f"<Engine stages={len(self._stages)} {self.scheduler!r} closed={self.closed}>"
