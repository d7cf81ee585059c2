"""Builds and sessions, units of work: what is asked for, pinned and failed, and whether it will do.

Laws:

1. What speaks against a snapshot is decided once, as an error that is returned. Whether that is
   raised or put into a result is all that the two forms of a request differ in.
2. A result takes any `Exception`, of the policies too, but those that say that a builder is closed.
   Cancellation, what ends a program, and every other `BaseException` go on.
3. Of many requests none is begun before there is room, and none outlives the call.

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
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, cast, overload

from coalestra.concurrency.copying import deepcopy_payload
from coalestra.concurrency.deadline import CutOff, CutOffExpired, Deadline
from coalestra.concurrency.pace import Slices, all_or_none
from coalestra.core.errors import (
    BuilderClosedError,
    DependencyCycleError,
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    SessionClosedError,
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotDeadlineExceededError,
    message_of,
    not_accepted,
    without_frames,
)
from coalestra.core.frozen import EMPTY, FrozenDict, empty, filled, frozen
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.request import (
    RequestResult,
    SnapshotAcceptancePolicy,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
    inconsistency_of,
    violations_of,
)
from coalestra.core.snapshot import FetchContext, Snapshot, snapshot_of
from coalestra.core.validation import flag, instance, integer, number, shown, text, wrong_type
from coalestra.core.values import SnapshotValue, new_id, next_number
from coalestra.orchestration import readings
from coalestra.orchestration.flights import (
    LOOK_SECONDS,
    Gather,
    Parts,
    Work,
    call_served,
    circle_of,
)
from coalestra.orchestration.readings import Failure, Pins, Reading, pin_all
from coalestra.orchestration.singleflight import Crowd, Engine, Stage
from coalestra.orchestration.tracing import StageLog

Decided = tuple[Snapshot | None, Exception | None]
"""A snapshot, if there is one, and what speaks against it or kept it from being made."""

_ERRORS_BETWEEN_LOOKS = 32

_UNNOTED: AbstractContextManager[Any] = nullcontext(StageLog("", 0))
"""Stands for the notes of a stage that nobody wants; what is written into it is never read."""


@dataclass(slots=True, eq=False, repr=False)
class UnitOfWork:
    """What one build or session has asked for, what it has pinned, and what failed.

    With `lasting`, what is read later is kept in agreement with what was read before: what derived
    values rest on is pinned too, out of sight.
    """

    engine: Engine
    work: Work
    lasting: bool
    began: float
    requested: dict[ResourceKey, None] = field(default_factory=dict)
    pins: Pins = field(default_factory=Pins)
    failures: dict[ResourceKey, Failure] = field(default_factory=dict)

    async def answer(
        self,
        asked: Mapping[ResourceKey, None] | SnapshotRequest,
        *,
        strict: bool = True,
        retry_errors: bool = False,
    ) -> Decided:
        """Settle further keys, or those of a request, and report how that went.

        Return the snapshot of all that was asked for so far, and what speaks against it, by the
        rules of a request if it is for one, or what kept it from being made.
        """
        request = asked if isinstance(asked, SnapshotRequest) else None
        keys = dict.fromkeys(asked.keys) if isinstance(asked, SnapshotRequest) else asked
        parts = self.engine.parts
        report, clock = parts.report, parts.clock
        began = 0.0 if report is None else clock.monotonic()
        snapshot, error, failing = None, None, True
        try:
            with self.stage("resolve" if self.lasting else "build", len(keys)) as stage:
                snapshot, uncopied = await self._settled(keys, retry_errors)
                errors = snapshot.errors
                if errors and len(keys) < len(self.requested):
                    errors = {key: each for key, each in errors.items() if key in keys}
                failed = len(errors)
                resolved = len(keys) - failed
                stage.resolved, stage.failed = resolved, failed
                try:
                    if request is not None:
                        error = await objection(parts, request, snapshot)
                    elif strict and errors:
                        late = not len(snapshot) and cut_short(uncopied)
                        error = SnapshotBuildError(errors, snapshot=None if late else snapshot)
                    failing = error is not None
                    if self.work.trace is not None:  # else the stage is everybody's, and stays
                        stage.error = error
                finally:
                    if report is not None and self.lasting:
                        report.session_resolved(
                            succeeded=not failing,
                            latency_ms=(clock.monotonic() - began) * 1000.0,
                            snapshot_id=snapshot.snapshot_id,
                            requested=len(keys),
                            resolved=resolved,
                            failed=failed,
                            total_resources=len(self.requested),
                            strict=strict,
                            retry_errors=retry_errors,
                        )
                    elif report is not None:
                        report.snapshot_built(snapshot, build_failed=failing, strict=strict)
        except Exception as raised:
            return snapshot, raised
        return snapshot, error

    def stage(self, name: str, keys: int) -> AbstractContextManager[StageLog]:
        """Return what notes, if anybody wants it, that the block is a stage for so many keys."""
        trace = self.work.trace
        return _UNNOTED if trace is None else trace.stage(name, keys, self.work.variables)

    async def _settled(
        self, keys: Mapping[ResourceKey, None], retry_errors: bool
    ) -> tuple[Snapshot, Mapping[ResourceKey, Exception]]:
        """Settle every key that is not settled yet; return what `snapshot` does."""
        engine, work, warm = self.engine, self.work, self.engine.warm_reads
        if not self.lasting and warm.likely(keys):
            values = await warm.values(work, keys)
            if values is not None:
                engine.require_open()
                self.requested.update(keys)
                return self.assembled(values, EMPTY), EMPTY
        found: Mapping[ResourceKey, Reading] = EMPTY
        wanted, struck = keys, False
        if self.pins or self.failures:
            failed = EMPTY if retry_errors else self.failures
            known = {**self.pins, **failed} if failed else self.pins
            if len({**known, **keys}) < len(known) + len(keys):
                wanted = {key: None for key in keys if key not in known}
        self.requested.update(keys)
        if wanted and self.lasting:
            found = warm.readings(work, wanted)
        if wanted and not found:
            stage = Stage(work, wanted, self.pins, self._keep)
            stage.pins_beneath = self.lasting
            work.closed |= not self.lasting  # this is its only stage
            try:
                await engine.run(stage)
            except BaseException:
                self._take_back(wanted)
                raise
            struck = work.expired
        else:
            engine.require_open()
            self._pin(found, EMPTY)  # what is looked up at once is not derived
        return await self.snapshot(None if struck else work.deadline)

    def _take_back(self, keys: Iterable[ResourceKey]) -> None:
        """Count keys as not asked for that came to nothing, unless others are still asking."""
        asked = [stage.keys for stage in self.work.stages]
        for key in set(keys).difference(self.pins, self.failures, *asked):
            self.requested.pop(key, None)

    def _keep(self, gather: Gather) -> None:
        """Take over what a gather has come to, in the very step in which it was complete."""
        self._pin(gather.readings, gather.below)
        self.failures.update(gather.failures)

    def _pin(
        self, readings: Mapping[ResourceKey, Reading], below: Mapping[ResourceKey, Reading] | None
    ) -> None:
        if self.lasting:
            pin_all(self.pins, readings, below, self.work.since)
        else:
            self.pins.update(readings)
        if self.failures:
            for key in readings:
                self.failures.pop(key, None)

    def visible(self, pins: Mapping[ResourceKey, Reading]) -> Mapping[ResourceKey, Reading]:
        """Return those of `pins` that were asked for, in the order of asking."""
        if not pins or list(self.requested) == list(pins):
            return dict(pins)
        get = pins.get
        return {key: reading for key in self.requested if (reading := get(key)) is not None}

    def failed(self) -> list[Failure]:
        """Return the failures of the keys that were asked for and have nothing else, by now.

        What is shown with them is to be taken in the same step, or a key may be in neither.
        """
        known, pins, get = self.failures, self.pins, self.failures.get
        if not known or (not pins and list(known) == list(self.requested)):
            return list(known.values())
        asked = self.requested
        return [each for key in asked if (each := get(key)) is not None and key not in pins]

    async def errors(self, failures: Iterable[Failure]) -> dict[ResourceKey, Exception]:
        """Return a fresh error for each failure; made in slices, as they take a while."""
        errors: dict[ResourceKey, Exception] = {}
        pace = self.engine.parts.pace
        pace.begin()
        for made, failure in enumerate(failures):
            errors[failure.key] = failure.make()
            if not made % _ERRORS_BETWEEN_LOOKS:
                await pace.keep()
        return errors

    async def snapshot(
        self, deadline: Deadline | None, news: Mapping[ResourceKey, Exception] = EMPTY
    ) -> tuple[Snapshot, Mapping[ResourceKey, Exception]]:
        """Return an isolated snapshot with `news` among its errors, and what was not copied.

        What is not copied by the deadline has that for its error.
        """
        failed = self.failed()
        values, uncopied = await self.copies(self.visible(self.pins), deadline)
        errors: Mapping[ResourceKey, Exception] = EMPTY
        if failed or uncopied or news:
            errors = {**await self.errors(failed), **uncopied, **news}
        return self.assembled(values, errors), uncopied

    async def copies(
        self, readings: Mapping[ResourceKey, Reading], deadline: Deadline | None
    ) -> tuple[Mapping[ResourceKey, SnapshotValue[Any]], Mapping[ResourceKey, Exception]]:
        """Return a reader's copies, and the error for each that there is none of."""
        trace = self.work.trace
        with _UNNOTED if trace is None else trace.delivering(len(readings)):
            deliveries = self.engine.flights.deliveries
            values, uncopied = await deliveries.values(readings, deadline)
        if uncopied and cut_short(uncopied):
            parts = self.engine.parts
            parts.counters.deadline_exceeded_count += 1
            if parts.report is not None:
                snapshot_id = self.work.context.snapshot_id
                facts = {"snapshot_id": snapshot_id, "phase": "snapshot_delivery"}
                parts.report.tell("payload_copy_deadline_exceeded", **facts)
        return values, uncopied

    def snapshot_now(self) -> Snapshot:
        """Return an isolated snapshot without waiting, however long the copying takes."""
        values: dict[ResourceKey, SnapshotValue[Any]] = {}
        failed = {failure.key: failure.make() for failure in self.failed()}
        for key, reading in self.visible(self.pins).items():
            try:
                values[key] = self.engine.flights.deliveries.value_here(reading)
            except PayloadIsolationError as error:
                failed[key] = error
        return self.assembled(values, failed)

    def assembled(
        self,
        values: Mapping[ResourceKey, SnapshotValue[Any]],
        errors: Mapping[ResourceKey, Exception],
    ) -> Snapshot:
        """Return a snapshot of values and errors that are its own."""
        counted = self.work.record.counted(
            duration_ms=(self.engine.parts.clock.monotonic() - self.began) * 1000,
            requested_resources=len(self.requested),
        )
        trace = self.work.trace
        if trace is not None and self.lasting:
            trace.shown(values, self.pins)
        return snapshot_of(
            self.work.context.snapshot_id,
            self.work.context.requested_at,
            frozen(values),
            frozen(errors),
            counted,
            None if trace is None else trace.recorded(values, errors),
        )

    def __repr__(self) -> str:
        return f"<UnitOfWork {self.work.context.snapshot_id} pins={len(self.pins)}>"


_JOINED = dict.fromkeys(("cache_misses", "cache_batch_reads", "coalesced_requests"), 1)
"""What each of those who wait together counts."""


async def together(engine: Engine, crowd: Crowd, strict: bool) -> Snapshot:
    """Wait with others for the one key of a crowd; return a snapshot of one's own."""
    clock, told = engine.parts.clock, crowd.enter()
    try:
        began, created_at = clock.monotonic(), clock.now()
        await told
    finally:
        engine.leave(crowd, told)
    values, errors = await crowd.copies(engine.flights.deliveries)
    if crowd.failures:
        errors.update({failure.key: failure.make() for failure in crowd.failures.values()})
    counted = {"duration_ms": (clock.monotonic() - began) * 1000, **_JOINED}
    kept = frozen(errors) if errors else EMPTY
    snapshot = snapshot_of(new_id(), created_at, values, kept, counted)
    if errors and strict:
        raise SnapshotBuildError(errors, snapshot=snapshot)
    return snapshot


def cut_short(errors: Mapping[ResourceKey, Exception]) -> bool:
    """Whether a deadline has left no time to copy some of the values."""
    return any(isinstance(error, SnapshotDeadlineExceededError) for error in errors.values())


class Terms(NamedTuple):
    """What a caller says of a unit of work, or of several that are to end by one deadline."""

    engine: Engine
    deadline: Deadline | None
    deadline_at: float | None
    metadata: FrozenDict[str, Any]
    trace: bool | None

    @classmethod
    def of(
        cls,
        engine: Engine,
        deadline_seconds: float | None,
        metadata: Mapping[str, Any] | None,
        trace: bool | None,
    ) -> Terms:
        """Return them checked; `TypeError` or `ValueError` names the argument that is wrong."""
        engine.require_open()
        deadline, deadline_at = None, None
        if deadline_seconds is not None:
            number("deadline_seconds", deadline_seconds, above=0)
            clock = engine.parts.clock
            deadline = Deadline(clock, deadline_seconds)
            deadline_at = clock.now() + deadline_seconds
        if metadata is not None:
            instance("metadata", metadata, Mapping)
        if trace is not None:
            flag("trace", trace, optional=True)
        return cls(engine, deadline, deadline_at, _own(metadata or EMPTY), trace)

    def at_hand(
        self, keys: Collection[ResourceKey], snapshot_id: str | None, *, strict: bool | None
    ) -> Snapshot | None:
        """Return what `WarmReads.snapshot` does, if that is in time and nobody wants a trace."""
        self.engine.require_open()
        if snapshot_id is not None:
            text("snapshot_id", snapshot_id)
        if self.trace or (self.deadline is not None and self.deadline.expired):
            return None
        return self.engine.warm_reads.snapshot(keys, snapshot_id, strict=strict)

    async def answer(self, request: SnapshotRequest, snapshot_id: str | None = None) -> Decided:
        """Return what comes of a request that is a unit of work of its own."""
        known = await self.known(request, snapshot_id)
        return known or await self.open(snapshot_id).answer(request)

    async def known(
        self, request: SnapshotRequest, snapshot_id: str | None = None
    ) -> Decided | None:
        """Return what comes of a request for which nothing has to be read; else None."""
        snapshot = None
        with suppress(Exception):  # of a clock, say: who reads tells of it
            snapshot = self.at_hand(request.keys, snapshot_id, strict=None)
        if snapshot is None:
            return None
        parts, failing = self.engine.parts, True
        try:
            error = await objection(parts, request, snapshot)
            failing = error is not None
        finally:
            if parts.report is not None:
                parts.report.snapshot_built(snapshot, build_failed=failing, strict=True)
        return snapshot, error

    def for_another(self) -> Terms:
        """Return the same with metadata that no other unit of work has a part in."""
        return self._replace(metadata=_own(self.metadata))

    def open(self, snapshot_id: str | None = None, *, lasting: bool = False) -> UnitOfWork:
        """Begin a unit of work; `TypeError` or `ValueError` for a wrong id."""
        parts, deadline = self.engine.parts, self.deadline
        facts = {  # known to be good
            "requested_at": parts.clock.now(),
            "deadline_at": self.deadline_at,
            "deadline_monotonic": None if deadline is None else deadline.monotonic_at,
            "metadata": self.metadata,
            "snapshot_id": new_id() if snapshot_id is None else text("snapshot_id", snapshot_id),
        }
        context = filled(FetchContext, facts)
        kind = "session" if lasting else "build"
        noted = parts.tracing.begin(kind, context, self.trace)
        if parts.report is not None:
            told = {"kind": kind, "snapshot_id": context.snapshot_id}
            parts.report.tell("snapshot_started", **told)
        work = Work(context, deadline, noted)
        work.since = next_number() if lasting else 0
        return UnitOfWork(self.engine, work, lasting, parts.clock.monotonic())


def _own(metadata: Mapping[str, Any]) -> FrozenDict[str, Any]:
    try:
        return FrozenDict(deepcopy_payload(dict(metadata))) if metadata else EMPTY
    except Exception as error:
        raise TypeError(
            f"metadata must be copyable, got one that is not ({message_of(error)}); hand over what "
            "cannot be copied in a context variable"
        ) from error


async def objection(parts: Parts, request: SnapshotRequest, snapshot: Snapshot) -> Exception | None:
    """Return what speaks against a snapshot: what it lacks, then consistency, then acceptance.

    Both policies are reported on, as far as they are asked; what one of them raises counts as well.
    """
    report, required, optional = parts.report, request.required, request.optional
    failed = {key: e for key, e in snapshot.errors.items() if request.is_required(key)}
    if failed:
        return SnapshotBuildError(failed, snapshot=snapshot)
    try:
        if request.consistency_policy is not None:
            found = inconsistency_of(request.consistency_policy, required, optional, snapshot)
            if report is not None:
                report.consistency_judged(snapshot.snapshot_id, found)
            if found is not None:
                return found
        if request.acceptance_policy is not None:
            policy, now = request.acceptance_policy, parts.clock.now()
            judged = violations_of(policy, required, optional, snapshot, now, parts.policies)
            violations = await parts.pace.through(judged)
            if report is not None:
                report.acceptance_judged(snapshot.snapshot_id, violations)
            if violations:
                return await parts.pace.through(not_accepted(violations, snapshot))
    except Exception as raised:
        return raised
    return None


def accepted(snapshot: Snapshot | None, error: Exception | None) -> Snapshot:
    """Return the snapshot, or raise the error."""
    if error is None:
        assert snapshot is not None
        return snapshot
    try:
        raise error
    finally:
        del error  # whose traceback leads here


def result_of(
    request: SnapshotRequest, snapshot: Snapshot | None, error: Exception | None
) -> RequestResult:
    """Return what came of a request; the error loses its traceback, which keeps all alive."""
    if isinstance(error, (BuilderClosedError, PayloadCopySubsystemClosedError)):
        accepted(snapshot, error)
    if error is not None:
        without_frames(error, spared=sys.exc_info()[1])  # the caller's own trouble, if any
    return RequestResult(request, snapshot, error)


K = TypeVar("K")
P = ParamSpec("P")

Requests = Mapping[Any, SnapshotRequest] | Iterable[SnapshotRequest]
Results = Mapping[Any, RequestResult] | tuple[RequestResult, ...]


class Several(Protocol[P]):
    """What takes requests by name, or in order, and returns the results in the same form."""

    @overload
    async def __call__(  # type: ignore[overload-overlap]  # a mapping is taken for one
        self, requests: Mapping[K, SnapshotRequest], *args: P.args, **kwargs: P.kwargs
    ) -> Mapping[K, RequestResult]: ...

    @overload
    async def __call__(
        self, requests: Iterable[SnapshotRequest], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[RequestResult, ...]: ...


def in_same_form(method: Callable[Concatenate[Any, Requests, P], Awaitable[Results]]) -> Several[P]:
    """Tell type checkers that the results of a method have the form of the requests."""
    return cast("Several[P]", method)


async def several(
    parts: Parts,
    requests: Requests,
    attempt: Callable[[SnapshotRequest], Awaitable[Decided]],
    max_concurrency: int | None,
    known: Callable[[SnapshotRequest], Awaitable[Decided | None]] | None = None,
) -> Results:
    """Attempt many requests; return their results by name if they have names, else in their order.

    No more are under way at once than `max_concurrency`. What is `known` of some needs no attempt.
    """
    if not isinstance(requests, Iterable):
        rule = "an iterable of SnapshotRequests, or a mapping to them"
        raise wrong_type("requests", rule, requests, "put a single one in a list")
    named = FrozenDict(requests if isinstance(requests, Mapping) else enumerate(requests))
    for name, request in named.items():
        if not isinstance(request, SnapshotRequest):
            instance(f"requests[{shown(name)}]", request, SnapshotRequest)
    integer("max_concurrency", max_concurrency, minimum=1, optional=True)
    limit = parts.max_pending_tasks if max_concurrency is None else max_concurrency
    results: dict[Any, Any] = dict.fromkeys(named)

    async def work(
        way: Callable[[SnapshotRequest], Awaitable[Decided | None]],
        rest: Iterable[tuple[Any, SnapshotRequest]],
    ) -> None:
        for name, request in rest:
            decided = await way(request)
            if decided is not None:
                results[name] = result_of(request, *decided)
            await parts.pace.keep()  # many that wait for nothing would hold the event loop

    if known is not None:
        await work(known, named.items())
    left = [name for name, result in results.items() if result is None]
    rest = iter([(name, named[name]) for name in left])
    await all_or_none(work(attempt, rest) for _ in range(min(limit, len(left))))
    return FrozenDict(results) if isinstance(requests, Mapping) else tuple(results.values())


class Turn(asyncio.Lock):
    """Is had, on a loop, by one who replaces values after the other; `stage` is his, if any."""

    stage: Stage | None = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.loop: asyncio.AbstractEventLoop = loop


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
        self._turn: Turn | None = None

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
        named = distinct_keys("keys", keys)
        return accepted(*await self._unit.answer(named, strict=strict, retry_errors=retry_errors))

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
        return accepted(*await self._unit.answer(request, retry_errors=retry_errors))

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
        return result_of(request, *await self._unit.answer(request, retry_errors=retry_errors))

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
        return await several(
            engine.parts,
            requests,
            lambda request: self._unit.answer(request, retry_errors=retry_errors),
            max_concurrency,
        )

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
        named, pins = distinct_keys("keys", keys), self._unit.pins
        if not named:
            raise ValueError("keys must name at least one resolved key of the session, got none")
        for key in named if len({**pins, **named}) > len(pins) else ():  # which asks for no hash
            if key not in pins:
                raise ValueError(
                    f"keys must be resolved in this session, got {key.display}; resolve it first"
                )
        request = None
        if consistency_policy is not None or acceptance_policy is not None:
            request = SnapshotRequest(
                required=named,
                consistency_policy=consistency_policy,
                acceptance_policy=acceptance_policy,
            )
        loop = self._unit.engine.enter()
        if self._turn is None or self._turn.loop is not loop:
            self._turn = Turn(loop)  # whoever had the other one has ended with its loop
        revalidation = Revalidation(self._unit, named, request, force_refresh, strict)
        return await revalidation.run(self._turn)

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


@dataclass(eq=False, repr=False)
class Revalidation:
    """Replaces the pinned values of what is `named`, and all derived from them; used once.

    With `forced`, all of these are read from the sources, past the cache, and none may be stale.
    The policies of a `request` must hold for the new values.
    """

    unit: UnitOfWork
    named: Mapping[ResourceKey, None]
    request: SnapshotRequest | None
    forced: bool
    strict: bool
    _affected: Mapping[ResourceKey, None] = field(default_factory=empty)
    _loose: Mapping[ResourceKey, None] = field(default_factory=empty)
    _readings: dict[ResourceKey, Reading] = field(default_factory=dict)
    _next: dict[ResourceKey, Reading] = field(default_factory=dict)
    _stamp: tuple[int, ...] = ()
    _committed: bool = False
    _failed: int = 0
    _violated: type[BaseException] | None = None

    async def run(self, turn: Turn) -> Snapshot:
        """Wait for the turn, replace what is named, and report how it went."""
        counters = self.unit.engine.parts.counters
        counters.revalidation_attempt_count += 1
        try:
            with self.unit.stage("revalidate", len(self.named)) as stage:
                try:
                    return await self._in_turn(turn, stage.span)
                finally:
                    stage.resolved = len(self.named) * self._committed
                    stage.failed = self._failed
        except (SnapshotConsistencyError, SnapshotAcceptanceError) as violation:
            self._violated = type(violation)
            raise
        finally:
            counters.revalidation_failure_count += not self._committed
            self._report()

    async def _in_turn(self, turn: Turn, span: Any) -> Snapshot:
        errors = await self._wait_for(turn)
        if errors:
            return await self._retained(errors)
        try:
            return await self._replaced(turn, span)
        finally:
            turn.stage = None
            turn.release()

    async def _wait_for(self, turn: Turn) -> Mapping[ResourceKey, Exception]:
        """Wait until it is the turn of this one; return the errors if it never will be.

        If it is a source that waits so, all that is waited for needs no slot, nor a worker, which
        the source may have; and it must not wait for that source.
        """
        deadline, call = self.unit.work.deadline, call_served()
        if deadline is None and call is None:
            await turn.acquire()
            return EMPTY
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
                        asked[turn.stage] = None
                        call.ask(turn.stage)
                    if call.keeps_others_waiting and not turn.stage.urgent:
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

    async def _replaced(self, turn: Turn, span: Any) -> Snapshot:
        through = self.unit.engine.parts.pace.through
        while True:
            self._stamp = self._state()
            stage = turn.stage = await through(self._plan(dict(self.unit.pins)))
            stage.span = span
            await self.unit.engine.run(stage)
            self._readings = stage.readings
            if stage.failures:
                return await self._retained(await self.unit.errors(stage.failed()))
            if not await self._goes_with_all():
                continue  # nor may it be shown as what was turned down
            failed = self.unit.failed()
            shown = await through(self._shown())
            values, uncopied = await self.unit.copies(shown, self.unit.work.deadline)
            if uncopied:
                return await self._undelivered(uncopied)
            failed = [each for each in failed if each.key not in self._next]
            snapshot = self.unit.assembled(values, await self.unit.errors(failed))
            if self.request is not None:
                accepted(snapshot, await objection(self.unit.engine.parts, self.request, snapshot))
            visible = self._visible(snapshot)
            if await self._goes_with_all():
                self._commit()
                return visible

    # The new state, beside the old one --------------------------------------------------------

    def _plan(self, pins: Mapping[ResourceKey, Reading]) -> Slices[Stage]:
        """Find out what goes with what is named, and what of it is read anew, under the rest."""
        self._affected, self._loose = yield from readings.reach(
            pins, self.unit.requested.copy(), self.named
        )
        yield
        forced = frozenset(self._affected if self.forced else ())
        pinned = ((key, pins.get(key)) for key in forced)
        derived = frozenset(key for key, pin in pinned if pin and pin.revision.dependency_versions)
        demand = readings.Demand(forced, derived)
        yield
        kept = Pins(self._left(pins), demand)
        yield
        return Stage(self.unit.work, self._wanted(), kept, lambda _: None, demand)

    def _left(self, pins: Mapping[ResourceKey, Reading]) -> dict[ResourceKey, Reading]:
        """Return `pins` without all that goes."""
        left = dict(pins)
        for key in (*self._affected, *self._loose):
            left.pop(key, None)
        return left

    def _wanted(self) -> Mapping[ResourceKey, None]:
        """Return the affected keys that somebody has asked for; the rest is read if needed."""
        affected = self._affected
        unasked = set(affected).difference(self.unit.requested, self.named)  # asks for no hash
        return {key: None for key in affected if key not in unasked} if unasked else affected

    def _shown(self) -> Slices[Mapping[ResourceKey, Reading]]:
        """Return what the session shows after the commit, and what is named out of sight."""
        yield from self._succeed(dict(self.unit.pins))
        yield
        return {**self.unit.visible(self._next), **self._readings}

    def _succeed(self, pins: dict[ResourceKey, Reading]) -> Slices[None]:
        """Lay out, in the place of `pins`, what is pinned after the commit."""
        for key in {*self._affected, *self._loose}.difference(self._readings):
            pins.pop(key, None)
        yield
        pins.update(self._readings)
        below = yield from readings.beneath(self._readings, pins, self.unit.work.since)
        pin_all(pins, {}, below)
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
        pace = self.unit.engine.parts.pace
        await pace.keep()
        while (stamp := self._state()) != self._stamp:
            pins = dict(self.unit.pins)
            reached = readings.reach(pins, self.unit.requested.copy(), self.named)
            if await pace.through(reached) != (self._affected, self._loose):
                return False
            if await pace.through(readings.at_odds(self._readings, self._left(pins))):
                return False
            await pace.through(self._succeed(pins))
            self._stamp = stamp
        return True

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
