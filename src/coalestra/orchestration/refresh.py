"""Refreshes in the background: one per key at a time, on nobody's deadline."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from coalestra.core import errors
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext
from coalestra.core.values import Revision, new_id
from coalestra.orchestration import flights
from coalestra.orchestration.flights import Gather, Work
from coalestra.orchestration.parts import Parts
from coalestra.orchestration.readings import Demand, Pins

if TYPE_CHECKING:
    from coalestra.orchestration.calls import Call

_MOST_FAILING = 1_000
"""Of how many keys it is remembered that their last refresh has failed."""
_ANEW = Demand(refresh=True)


@dataclass(slots=True, eq=False)
class Refresh:
    """One revision on its way to be renewed, set off by one unit of work, its `parent`.

    Who waits for its end waits for `ended`.
    """

    key: ResourceKey
    version: str
    reason: str
    parent: Work
    gather: Gather | None = None
    urgent: bool = False
    ended: asyncio.Future[None] | None = None


@dataclass(eq=False, repr=False)
class Refresher:
    """Schedules refreshes, which share flights, capacity and retries with everybody else.

    Refreshes that one unit of work asks for in one step, for one reason, travel together. They run
    with the context variables of the builder's making and without the metadata of the request that
    set them off. What a refresh of a key keeps away is another one, until the key is invalidated:
    then the one under way brings what nobody wants, however long it takes.

    `failing` are the keys whose last refresh has failed, each with the version that it was to
    renew and what to say of it, until a source has given a value.
    """

    parts: Parts
    variables: contextvars.Context
    look: Callable[[Gather], None]
    abandon: Callable[[Gather], None]
    hurry: Callable[[Gather], None]
    failing: dict[ResourceKey, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    closed: bool = False
    _running: dict[Refresh, None] = field(default_factory=dict)
    _current: dict[ResourceKey, Refresh] = field(default_factory=dict)
    _next: dict[tuple[Work, str], list[Refresh]] = field(default_factory=dict)

    @property
    def keys(self) -> Collection[ResourceKey]:
        """The keys of which a refresh under way keeps further ones away."""
        return self._current.keys()

    @property
    def active(self) -> int:
        """How many refreshes are under way."""
        return len(self._running)

    def notes(self, revision: Revision) -> Mapping[str, Any]:
        """Return what there is to say to who gets a revision whose last refresh has failed."""
        version, said = self.failing.get(revision.key, ("", {}))
        return said if version == revision.version else {}

    def schedule(self, revision: Revision, reason: str, parent: Work) -> bool:
        """Refresh a revision soon; False if that is under way already."""
        key = revision.key
        if self.closed or key in self._current:
            return False
        refresh = self._current[key] = Refresh(key, revision.version, reason, parent)
        self._running[refresh] = None
        if (parent, reason) not in self._next:
            self._next[parent, reason] = []
            asyncio.get_running_loop().call_soon(self._start, parent, reason)
        self._next[parent, reason].append(refresh)
        parent.record.refresh_scheduled += 1
        if self.parts.report is not None:
            facts = {"reason": reason, "snapshot_id": parent.context.snapshot_id}
            self.parts.report.tell("resource_refresh_scheduled", resource=key, **facts)
        return True

    def outdate(self, keys: Collection[ResourceKey]) -> None:
        """Let keys be refreshed anew: what is under way has read what was before."""
        if self._current or self.failing:
            for key in keys:
                self._current.pop(key, None)
                self.failing.pop(key, None)

    def _start(self, parent: Work, reason: str) -> None:
        group = [each for each in self._next.pop((parent, reason), ()) if each in self._running]
        try:
            if group:
                self._begin(group, parent, reason)
        except BaseException:
            for refresh in group:  # or it would keep all others away
                self._end(refresh)
            raise

    def _begin(self, group: Collection[Refresh], parent: Work, reason: str) -> None:
        context = FetchContext(
            requested_at=self.parts.clock.now(),
            metadata={
                "background_refresh": True,
                "refresh_reason": reason,
                "parent_snapshot_id": parent.context.snapshot_id,
            },
            snapshot_id=new_id(),
        )
        trace = self.parts.tracing.begin("refresh", context, None, parent.trace)
        variables = self.variables if trace is None else self.variables.copy()
        work = Work(context, variables=variables, trace=trace)
        if self.parts.report is not None:
            told = {"kind": "refresh", "snapshot_id": context.snapshot_id}
            self.parts.report.tell("snapshot_started", **told)
        if trace is not None:
            link = None if parent.trace is None else parent.trace.span
            trace.begin_stage("refresh", len(group), variables, link, reason=reason)
        for refresh in group:
            done = partial(self._done, refresh)
            refresh.gather = Gather(work, (refresh.key,), Pins(), done, demand=_ANEW)
            refresh.gather.urgent = refresh.urgent
        for refresh in group:
            if refresh.gather is not None:
                self.look(refresh.gather)

    def _done(self, refresh: Refresh, gather: Gather) -> None:
        key, record = refresh.key, refresh.parent.record
        report = self.parts.report
        self._end(refresh)
        reading, version = gather.readings.get(key), refresh.version
        absent = reading is None and gather.failures[key].absent
        error = None if reading is not None or absent else gather.failures[key].make()
        grounds = None if reading is None else reading.revision.grounds
        why = ""
        if reading and reading.stale:
            why = f"what {reading.revision.source!r} has said of it outranks what is fresh"
        elif reading and grounds and grounds.fresh_until < self.parts.clock.now():
            why = f"{grounds.perishing.display} is"
        if reading and why:
            version = reading.revision.version
            reading = None
            error = errors.SourceUnavailableError(f"{key.display} is still stale, as {why}")
        if gather.work.trace is not None:
            gather.work.trace.refreshed(reading is not None or absent)
        record.refresh_completed += reading is not None or absent
        record.refresh_failed += reading is None and not absent
        self.failing.pop(key, None)
        if error is not None:
            said = {"refresh_error_type": errors.type_name(error)}
            said["refresh_error"] = errors.folded_message(errors.message_of(error))
            self.failing[key] = version, said
            if len(self.failing) > _MOST_FAILING:
                del self.failing[next(iter(self.failing))]
            last = error.failures[-1:] if isinstance(error, errors.ResourceResolutionError) else ()
            self.parts.log.failed("background refresh", *(last or (error,)))
        elif self.parts.log.troubled:
            self.parts.log.works("background refresh")
        if report is None:
            return
        facts: dict[str, Any] = {"resource": key, "reason": refresh.reason}
        ids = {
            "snapshot_id": gather.work.context.snapshot_id,
            "parent_snapshot_id": refresh.parent.context.snapshot_id,
        }
        if reading is not None:
            source = reading.revision.source
            report.tell("resource_refresh_completed", **facts, source=source, **ids)
        elif error is None:
            report.count("resource_refresh_total", key, status="absent")
        else:
            report.tell("resource_refresh_failed", **facts, error_type=error, error=error, **ids)

    def _end(self, refresh: Refresh) -> None:
        refresh.gather = None
        self._running.pop(refresh, None)
        if self._current.get(refresh.key) is refresh:
            del self._current[refresh.key]
        if refresh.ended is not None and not refresh.ended.done():
            refresh.ended.set_result(None)

    async def wait(self) -> None:
        """Wait for the refreshes that are under way or scheduled at this moment.

        A source that asks for this does not wait for what waits for it, and what it waits for
        needs no slot.
        """
        call, awaited = flights.call_served(), [*self._running]
        asked: dict[Gather, None] = {}
        try:
            while awaited := [each for each in awaited if self._keeps(call, each)]:
                if call is not None:
                    asked |= {each.gather: None for each in awaited if each.gather is not None}
                    call.asked.update(asked)
                ended = [self._end_of(each, call) for each in awaited]
                await asyncio.wait(ended, timeout=None if call is None else flights.LOOK_SECONDS)
        finally:
            if call is not None:
                for gather in asked:
                    call.asked.pop(gather, None)

    def _keeps(self, call: Call | None, refresh: Refresh) -> bool:
        """Whether a refresh is under way, and does not wait, by now, for a call that waits."""
        gather = refresh.gather
        waits = call is not None and gather is not None and flights.circle_of(call, gather)
        return refresh in self._running and not waits

    def _end_of(self, refresh: Refresh, call: Call | None) -> asyncio.Future[None]:
        """Return what tells the end of a refresh, which a call under way may be waiting for."""
        if call is not None and call.keeps_others_waiting and not refresh.urgent:
            refresh.urgent = True
            if refresh.gather is not None:
                self.hurry(refresh.gather)
        refresh.ended = refresh.ended or asyncio.get_running_loop().create_future()
        return refresh.ended

    def cancel(self) -> None:
        """Give up every refresh."""
        self._next.clear()
        for refresh in tuple(self._running):
            if refresh.gather is not None:
                self.abandon(refresh.gather)
                if refresh.gather.work.trace is not None:
                    refresh.gather.work.trace.refreshed(False)
            if self.parts.report is not None:
                count = self.parts.report.count
                count("resource_refresh_total", refresh.key, status="cancelled")
            self._end(refresh)

    def __repr__(self) -> str:
        return f"<Refresher active={len(self._running)} closed={self.closed}>"
