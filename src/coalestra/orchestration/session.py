"""Sessions: one unit of work in several stages, which pins what it has read.

Laws of replacing pinned values, all or none:

1. Everything is acquired, copied and judged beside the pinned state. Only then, in one step, does
   it take that state's place. Whatever fails before, is cancelled or strikes leaves all as it was.
2. What was derived from a replaced value is replaced with it. What is pinned out of sight for the
   sake of replaced values alone is let go, so that they can rest on newer ones.
3. Errors are told of keys that somebody has asked for: of the session, or of this call.
4. No two replace values of one session at once. Stages may go on beside one: what these pin
   meanwhile is taken into account, or the whole is done anew.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from coalestra.concurrency.deadline import CutOff, CutOffExpired
from coalestra.concurrency.pace import Slices
from coalestra.core.acceptance import SnapshotAcceptancePolicy
from coalestra.core.errors import (
    DependencyCycleError,
    SessionClosedError,
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotDeadlineExceededError,
)
from coalestra.core.frozen import EMPTY
from coalestra.core.keys import ResourceKey
from coalestra.core.request import RequestResult, SnapshotConsistencyPolicy, SnapshotRequest
from coalestra.core.snapshot import FetchContext, Snapshot
from coalestra.core.validation import flag, instance
from coalestra.orchestration import readings
from coalestra.orchestration.flights import LOOK_SECONDS, Gather, call_served, circle_of
from coalestra.orchestration.singleflight import Stage
from coalestra.orchestration.unit import (
    Requests,
    Results,
    UnitOfWork,
    accepted,
    cut_short,
    distinct,
    in_same_form,
    objection,
    several,
)

T = TypeVar("T")


class Turn(asyncio.Lock):
    """Is had by one who replaces values after the other; `stage` is what he waits for."""

    stage: Stage | None = None


class SnapshotSession:
    """A unit of work that reads in stages under one id, one deadline and one set of values.

    A key, once resolved, keeps its value for the life of the session, and so does whatever it was
    derived from. Get one from `SnapshotBuilder.session`; use it with ``async with``. Calls may run
    side by side; those under way when it is closed still come to their end.

    Once it is closed every call raises `SessionClosedError`. What asks for values raises a
    `RuntimeError` if the builder is closed, or busy on another event loop, and a `TypeError` or
    `ValueError` for a wrong argument.
    """

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit
        self._turn: tuple[asyncio.AbstractEventLoop | None, Turn] = None, Turn()

    @property
    def snapshot_id(self) -> str:
        """The id that every snapshot of the session bears."""
        return self._unit.work.context.snapshot_id

    @property
    def created_at(self) -> float:
        """When the session began, in seconds since the epoch on the builder's clock."""
        return self._unit.work.context.requested_at

    @property
    def context(self) -> FetchContext:
        """What sources are told about the session."""
        return self._unit.work.context

    @property
    def closed(self) -> bool:
        """Whether the session takes no more calls."""
        return self._unit.work.closed

    async def resolve(
        self, keys: Iterable[ResourceKey], *, strict: bool = True, retry_errors: bool = False
    ) -> Snapshot:
        """Resolve further keys and return the snapshot of everything asked for so far.

        Args:
            keys: what is needed now. What is pinned already is not read again.
            strict: raise if any of `keys` has no value; else the snapshot says so in `errors`.
            retry_errors: try those of `keys` again that failed before.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the partial snapshot.
        """
        self._require_open()
        flag("strict", strict)
        flag("retry_errors", retry_errors)
        return await self._unit.resolve(distinct(keys), strict=strict, retry_errors=retry_errors)

    async def resolve_request(
        self, request: SnapshotRequest, *, retry_errors: bool = False
    ) -> Snapshot:
        """Resolve a request: its required keys must have values, and its policies must hold.

        Raises:
            SnapshotBuildError: a required key failed; it holds the partial snapshot.
            SnapshotConsistencyError: observations lie too far apart.
            SnapshotAcceptanceError: values are not acceptable.
        """
        self._require_open()
        instance("request", request, SnapshotRequest)
        flag("retry_errors", retry_errors)
        return await self._unit.resolve_request(request, retry_errors=retry_errors)

    async def try_request(
        self, request: SnapshotRequest, *, retry_errors: bool = False
    ) -> RequestResult:
        """Return what comes of a request, whatever that is, where `resolve_request` would raise.

        What it has read is pinned, also if the request is turned down. The snapshot has everything
        that the session was asked for so far; the outcome is about the request alone.
        """
        self._require_open()
        instance("request", request, SnapshotRequest)
        flag("retry_errors", retry_errors)
        self._unit.engine.enter()
        return await self._unit.try_request(request, retry_errors=retry_errors)

    @in_same_form
    async def try_requests(
        self, requests: Requests, *, retry_errors: bool = False, max_concurrency: int | None = None
    ) -> Results:
        """Return what comes of each of many requests that rest on one set of pinned values.

        See `SnapshotBuilder.try_requests`.
        """
        self._require_open()
        flag("retry_errors", retry_errors)
        engine = self._unit.engine
        engine.enter()
        attempt = partial(self._unit.try_request, retry_errors=retry_errors)
        return await several(engine.parts, requests, attempt, max_concurrency)

    async def revalidate(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        force_refresh: bool = False,
        consistency_policy: SnapshotConsistencyPolicy | None = None,
        acceptance_policy: SnapshotAcceptancePolicy | None = None,
    ) -> Snapshot:
        """Replace pinned values by newer ones, together with all that was derived from them.

        It is all or nothing: on any failure, a deadline or a cancellation the session stays as it
        was.

        Args:
            keys: keys that the session has a value of: it was asked for them, or derived something
                from them.
            strict: raise if a value could not be had; else the retained values are returned, with
                the errors of this call.
            force_refresh: read from the sources, past the cache, and accept no stale value.
            consistency_policy: must hold between the values of `keys` before they are pinned.
            acceptance_policy: must hold for the values of `keys` before they are pinned.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the retained snapshot.
            SnapshotConsistencyError, SnapshotAcceptanceError: a policy is violated, strict or not;
                they hold the snapshot that was turned down.
            ValueError: no keys, or one that the session has no value of, or a policy names
                another.
        """
        self._require_open()
        flag("strict", strict)
        flag("force_refresh", force_refresh)
        named = self._pinned(distinct(keys))
        request = SnapshotRequest(
            required=named,
            consistency_policy=consistency_policy,
            acceptance_policy=acceptance_policy,
        )
        loop = self._unit.engine.enter()
        if self._turn[0] is not loop:
            self._turn = loop, Turn()  # whoever had the other one has ended with its loop
        revalidation = Revalidation(self._unit, named, request, force_refresh, strict)
        return await revalidation.run(self._turn[1])

    def _pinned(self, named: dict[ResourceKey, None]) -> dict[ResourceKey, None]:
        if not named:
            raise ValueError("keys must name at least one resolved key of the session, got none")
        pins = self._unit.pins
        for key in named if len({**pins, **named}) > len(pins) else ():  # which asks for no hash
            if key not in pins:
                raise ValueError(
                    f"keys must be resolved in this session, got {key.display}; resolve it first"
                )
        return named

    # Snapshots and the end --------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the snapshot of everything asked for so far; copies at once, however large."""
        self._require_open()
        return self._unit.snapshot_now()

    async def snapshot_async(self) -> Snapshot:
        """Return the snapshot of everything asked for so far, within the deadline.

        Raises:
            SnapshotBuildError: copying did not fit the deadline; it holds what did.
        """
        self._require_open()
        unit = self._unit
        snapshot, uncopied = await unit.snapshot(unit.work.deadline)
        if cut_short(uncopied):
            raise SnapshotBuildError(snapshot.errors, snapshot=snapshot if len(snapshot) else None)
        return snapshot

    async def close(self) -> None:
        """Take no more calls. Snapshots that were returned stay good."""
        self._unit.work.close()

    def _require_open(self) -> None:
        if self.closed:
            raise SessionClosedError(
                f"session {self.snapshot_id} is closed; open another one with builder.session()"
            )

    async def __aenter__(self) -> SnapshotSession:
        self._require_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<SnapshotSession {self.snapshot_id} {state} keys={len(self._unit.requested)}>"


# Replacing pinned values -------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Revalidation:
    """Replaces the pinned values of what is `named`, and all derived from them; used once.

    With `forced`, all of these are read from the sources, past the cache, and none may be stale.
    """

    unit: UnitOfWork
    named: Mapping[ResourceKey, None]
    request: SnapshotRequest
    forced: bool
    strict: bool
    _affected: set[ResourceKey] = field(default_factory=set)
    _loose: set[ResourceKey] = field(default_factory=set)
    _readings: dict[ResourceKey, readings.Reading] = field(default_factory=dict)
    _failures: dict[ResourceKey, readings.Failure] = field(default_factory=dict)
    _next: dict[ResourceKey, readings.Reading] = field(default_factory=dict)
    _stamp: tuple[int, ...] = ()
    _committed: bool = False
    _failed: int = 0
    _violated: type[BaseException] | None = None
    _span: Any = None

    async def run(self, turn: Turn) -> Snapshot:
        """Wait for the turn, replace what is named, and report how it went."""
        counters = self.unit.engine.parts.counters
        counters.revalidation_attempt_count += 1
        try:
            with self.unit.stage("revalidate", len(self.named)) as stage:
                self._span = stage.span
                try:
                    return await self._in_turn(turn)
                finally:
                    stage.resolved = len(self.named) * self._committed
                    stage.failed = self._failed
        except (SnapshotConsistencyError, SnapshotAcceptanceError) as violation:
            self._violated = type(violation)
            raise
        finally:
            counters.revalidation_failure_count += not self._committed
            self._report()

    async def _in_turn(self, turn: Turn) -> Snapshot:
        errors = await self._wait_for(turn)
        if errors:
            return await self._retained(errors)
        try:
            return await self._replaced(turn)
        finally:
            turn.stage = None
            turn.release()

    async def _wait_for(self, turn: Turn) -> Mapping[ResourceKey, Exception]:
        """Wait until it is the turn of this one; return the errors if it never will be.

        If it is a source that waits so, all that is waited for needs no slot, nor a worker, which
        the source may have; and it must not wait for that source.
        """
        deadline, call = self.unit.work.deadline, call_served()
        end = math.inf if deadline is None else deadline.loop_time
        now = asyncio.get_running_loop().time
        asked: dict[Stage, None] = {}
        try:
            while True:
                if call is not None and turn.stage is not None:
                    circle = circle_of(call, turn.stage)
                    if circle:
                        path = tuple([flight.key for flight in (*circle, circle[0])])
                        return {key: DependencyCycleError(path) for key in self.named}
                    if turn.stage not in call.asked:
                        call.asked[turn.stage] = asked[turn.stage] = None
                    if call.keys_under_way and not turn.stage.urgent:
                        self.unit.engine.flights.hurry(turn.stage)
                until = end if call is None else min(end, now() + LOOK_SECONDS)
                try:
                    with CutOff(until if until < math.inf else None):
                        await turn.acquire()
                    return EMPTY
                except CutOffExpired:  # to look again, unless it is the end
                    if now() >= end:
                        break
        finally:
            if call is not None:
                for stage in asked:
                    call.asked.pop(stage, None)
        text = "the deadline passed while another revalidation of the session was under way"
        return {key: SnapshotDeadlineExceededError(text) for key in self.named}

    async def _replaced(self, turn: Turn) -> Snapshot:
        while True:
            await self._acquire(turn)
            if self._failures:
                return await self._retained(await self.unit.errors(self._failures.values()))
            if not await self._goes_with_all():
                continue  # nor may it be shown as what was turned down
            failed = self.unit.failed()
            shown = await self._through(self._shown())
            values, uncopied = await self.unit.copies(shown, self.unit.work.deadline)
            if uncopied:
                return await self._undelivered(uncopied)
            errors = await self.unit.errors(each for each in failed if each.key not in self._next)
            snapshot = self.unit.assembled(values, errors)
            judged = objection(self.unit.engine.parts, self.request, snapshot)
            accepted(snapshot, await self._through(judged))
            visible = self._visible(snapshot)
            if await self._goes_with_all():
                self._commit()
                return visible

    # The new state, beside the old one --------------------------------------------------------

    async def _acquire(self, turn: Turn) -> None:
        """Read anew what is affected, under the pins that are not; failures are kept as facts."""
        self._stamp = self._state()
        stage = await self._through(self._plan(dict(self.unit.pins)))
        stage.span = self._span
        turn.stage = stage
        await self.unit.engine.run(stage)

    def _plan(self, pins: Mapping[ResourceKey, readings.Reading]) -> Slices[Stage]:
        """Find out what goes with what is named, and what of it is to be read."""
        self._affected, self._loose = yield from readings.reach(
            pins, self.unit.requested.copy(), self.named
        )
        yield
        forced = frozenset(self._affected) if self.forced else frozenset()
        derived = (k for k, p in pins.items() if p.revision.dependency_versions and k in forced)
        demand = readings.Demand(forced, frozenset(derived if forced else ()))
        yield
        going = self._affected | self._loose
        kept = readings.Pins({key: pin for key, pin in pins.items() if key not in going}, demand)
        yield
        return Stage(self.unit.work, self._wanted(), kept, self._take, demand=demand)

    def _take(self, gather: Gather) -> None:
        self._readings = gather.readings
        self._failures = gather.failures

    def _wanted(self) -> dict[ResourceKey, None]:
        """Return the affected keys that somebody has asked for; the rest is read if needed."""
        asked = {**self.unit.requested, **self.named}
        spared = set(asked).difference(self._affected)  # which asks no key for its hash
        return {key: None for key in asked if key not in spared} if spared else asked

    def _shown(self) -> Slices[Mapping[ResourceKey, readings.Reading]]:
        """Return what the session shows after the commit, and what is named out of sight."""
        yield from self._succeed(dict(self.unit.pins))
        yield
        return {**self.unit.visible(self._next), **self._readings}

    def _succeed(self, pins: dict[ResourceKey, readings.Reading]) -> Slices[None]:
        """Lay out, in the place of `pins`, what is pinned after the commit."""
        for key in (self._affected | self._loose).difference(self._readings):
            pins.pop(key, None)
        yield
        pins.update(self._readings)
        readings.hold(pins, {}, (yield from readings.beneath(self._readings, pins)))
        self._next = pins

    def _visible(self, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot without what the session has not been asked for."""
        requested = self.unit.requested
        if len({**requested, **self.named}) == len(requested):
            return snapshot
        values = {key: value for key, value in snapshot.resources.items() if key in requested}
        return self.unit.assembled(values, snapshot.errors)

    async def _goes_with_all(self) -> bool:
        """Take in what has been pinned meanwhile; False if that does not go with what was read."""
        await self.unit.engine.parts.pace.keep()
        while (stamp := self._state()) != self._stamp:
            pins = dict(self.unit.pins)
            reached = readings.reach(pins, self.unit.requested.copy(), self.named)
            if await self._through(reached) != (self._affected, self._loose):
                return False
            going = self._affected | self._loose
            kept = {key: pin for key, pin in pins.items() if key not in going}
            if await self._through(readings.at_odds(self._readings, kept)):
                return False
            await self._through(self._succeed(pins))
            self._stamp = stamp
        return True

    async def _through(self, slices: Slices[T]) -> T:
        pace = self.unit.engine.parts.pace
        pace.begin()
        return await pace.through(slices)

    def _state(self) -> tuple[int, ...]:
        """Return what changes with everything that the session pins, replaces or makes visible."""
        return *self.unit.pins.stamp, len(self.unit.requested)

    def _commit(self) -> None:
        """Put the new state in the place of the old one, in one step."""
        pins, failures = self.unit.pins, self.unit.failures
        for key in [key for key in failures if key in self._affected or key in self._loose]:
            del failures[key]
        pins.clear()
        pins.update(self._next)
        pins.generation += 1
        self._committed = True

    # The old state, if it stays ---------------------------------------------------------------

    async def _undelivered(self, uncopied: Mapping[ResourceKey, Exception]) -> Snapshot:
        """Retain what there is, as values cannot be copied, or a deadline leaves no time for it."""
        late = [e for e in uncopied.values() if isinstance(e, SnapshotDeadlineExceededError)]
        if not late:
            return await self._retained(uncopied)
        errors = {key: SnapshotDeadlineExceededError(str(late[0])) for key in self._wanted()}
        if self.strict:
            self._failed = len(errors)
            raise SnapshotBuildError(errors)
        return await self._retained(errors)

    async def _retained(self, errors: Mapping[ResourceKey, Exception]) -> Snapshot:
        """Return the state that stays, with the errors of this call; raise them if strict."""
        self._failed = len(errors)
        retained, _ = await self.unit.snapshot(None, errors)
        if self.strict:
            raise SnapshotBuildError(errors, snapshot=retained)
        return retained

    def _report(self) -> None:
        report = self.unit.engine.parts.report
        if report is None:
            return
        pins = self.unit.pins if self._committed else self._readings
        report.session_revalidated(
            committed=self._committed,
            snapshot_id=self.unit.work.context.snapshot_id,
            requested=len(self.named),
            affected=len(self._affected),
            refreshed=sum(key in pins for key in self._affected),
            failed=self._failed,
            strict=self.strict,
            force_refresh=self.forced,
            consistency_failed=self._violated is SnapshotConsistencyError,
            acceptance_failed=self._violated is SnapshotAcceptanceError,
        )

    def __repr__(self) -> str:
        state = "committed" if self._committed else "open"
        return f"<Revalidation {state} named={len(self.named)} of {self.unit!r}>"
