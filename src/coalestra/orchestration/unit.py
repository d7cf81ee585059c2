"""One unit of work: what was asked for, what is pinned, what failed, and whether that will do.

Laws:

1. What speaks against a snapshot is decided once, as an error that is returned. Whether that is
   raised or put into a result is all that the two forms of a request differ in.
2. A result takes any `Exception`, of the policies too, but those that say that a builder is closed.
   Cancellation, what ends a program, and every other `BaseException` go on.
3. Of many requests none is begun before there is room, and none outlives the call.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, cast, overload

from coalestra.concurrency.copying import deepcopy_payload
from coalestra.concurrency.deadline import Deadline
from coalestra.concurrency.pace import Slices
from coalestra.core.acceptance import violations_of
from coalestra.core.errors import (
    BuilderClosedError,
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    SnapshotBuildError,
    SnapshotDeadlineExceededError,
    not_accepted,
    without_frames,
)
from coalestra.core.frozen import EMPTY, FrozenDict, filled, frozen
from coalestra.core.keys import ResourceKey
from coalestra.core.request import RequestResult, SnapshotRequest, inconsistency_of
from coalestra.core.snapshot import FetchContext, Snapshot, snapshot_of
from coalestra.core.validation import flag, instance, integer, number, shown, text, wrong_type
from coalestra.core.values import SnapshotValue, new_id
from coalestra.orchestration.deliveries import all_or_none
from coalestra.orchestration.flights import Gather, Work
from coalestra.orchestration.parts import Parts
from coalestra.orchestration.readings import Failure, Pins, Reading, hold
from coalestra.orchestration.singleflight import Crowd, Engine, Stage
from coalestra.orchestration.tracing import StageLog

Decided = tuple[Snapshot | None, Exception | None]
"""A snapshot, if there is one, and what speaks against it or kept it from being made."""

_ERRORS_BETWEEN_LOOKS = 32

_UNNOTED: AbstractContextManager[Any] = nullcontext(StageLog("", 0))
"""Stands for the notes of a stage that nobody wants; what is written into it is never read."""


def distinct(keys: Iterable[ResourceKey]) -> dict[ResourceKey, None]:
    """Return the keys without repetitions, in order; `TypeError` for anything but keys."""
    try:
        found = dict.fromkeys(keys)
    except TypeError:
        if isinstance(keys, ResourceKey):
            raise TypeError(
                "keys must be an iterable of ResourceKey, got a single one; put it in a list"
            ) from None
        instance("keys", keys, Iterable)
        raise
    for key in found:
        if type(key) is not ResourceKey:
            raise TypeError(f"keys must be ResourceKeys, got {type(key).__qualname__}")
    return found


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
    _undelivered: bool = False  # whether the deadline left no time to copy anything

    # Stages -----------------------------------------------------------------------------------

    async def resolve(
        self, keys: Mapping[ResourceKey, None], *, strict: bool, retry_errors: bool = False
    ) -> Snapshot:
        """Return a snapshot of all that was asked for so far; if `strict`, each key has a value."""

        async def objects(snapshot: Snapshot) -> SnapshotBuildError | None:
            failed = self._failed_of(keys, snapshot) if strict else EMPTY
            partly = None if self._undelivered else snapshot
            return SnapshotBuildError(failed, snapshot=partly) if failed else None

        return accepted(*await self._decided(keys, objects, strict, retry_errors))

    async def resolve_request(
        self, request: SnapshotRequest, *, retry_errors: bool = False
    ) -> Snapshot:
        """Return a snapshot of all that was asked for so far, if a request's rules let it pass."""
        return accepted(*await self._answer(request, retry_errors))

    async def try_request(
        self, request: SnapshotRequest, *, retry_errors: bool = False
    ) -> RequestResult:
        """Return what comes of a request."""
        return result_of(request, *await self._answer(request, retry_errors))

    def _answer(self, request: SnapshotRequest, retry_errors: bool) -> Coroutine[Any, Any, Decided]:
        parts = self.engine.parts

        async def objects(snapshot: Snapshot) -> Exception | None:
            parts.pace.begin()
            return await parts.pace.through(objection(parts, request, snapshot))

        return self._decided(dict.fromkeys(request.keys), objects, True, retry_errors)

    async def _decided(
        self,
        keys: Mapping[ResourceKey, None],
        objects: Callable[[Snapshot], Awaitable[Exception | None]],
        strict: bool,
        retry_errors: bool,
    ) -> Decided:
        """Settle further keys, and report how that went.

        Return the snapshot of all that was asked for so far, and what `objects` says against it or
        what kept it from being made.
        """
        report, clock = self.engine.parts.report, self.engine.parts.clock
        began = 0.0 if report is None else clock.monotonic()
        snapshot, succeeded = None, False
        try:
            with self.stage("resolve" if self.lasting else "build", len(keys)) as stage:
                snapshot = await self._settled(keys, retry_errors)
                failed = len(self._failed_of(keys, snapshot))
                stage.resolved, stage.failed = len(keys) - failed, failed
                try:
                    error = await objects(snapshot)
                    succeeded = error is None
                    if self.work.trace is not None:  # else the stage is everybody's, and stays
                        stage.error = error
                finally:
                    told = snapshot.snapshot_id
                    if report is not None and self.lasting:
                        report.session_resolved(
                            succeeded=succeeded,
                            latency_ms=(clock.monotonic() - began) * 1000.0,
                            snapshot_id=told,
                            requested=len(keys),
                            resolved=len(keys) - failed,
                            failed=failed,
                            total_resources=len(self.requested),
                            strict=strict,
                            retry_errors=retry_errors,
                        )
                    elif report is not None:
                        how = {"build_failed": not succeeded, "strict": strict}
                        report.snapshot_built(told, snapshot.diagnostics, **how)
        except Exception as raised:
            return snapshot, raised
        return snapshot, error

    def _failed_of(
        self, keys: Mapping[ResourceKey, None], snapshot: Snapshot
    ) -> Mapping[ResourceKey, Exception]:
        errors = snapshot.errors
        if not errors or len(keys) == len(self.requested):  # nothing else was ever asked for
            return errors
        return {key: error for key, error in errors.items() if key in keys}

    def stage(self, name: str, keys: int) -> AbstractContextManager[StageLog]:
        """Return what notes, if anybody wants it, that the block is a stage for so many keys."""
        trace = self.work.trace
        return _UNNOTED if trace is None else trace.stage(name, keys, self.work.variables)

    async def _settled(self, keys: Mapping[ResourceKey, None], retry_errors: bool) -> Snapshot:
        """Settle every key that is not settled yet; return all that was asked for so far."""
        engine, work, warm = self.engine, self.work, self.engine.warm_reads
        if not self.lasting and warm.likely(keys):
            values = await warm.values(work, keys)
            if values is not None:
                engine.require_open()
                self.requested.update(keys)
                return self.assembled(values, EMPTY)
        found: Mapping[ResourceKey, Reading] = EMPTY
        wanted, struck = keys, False
        if self.pins or self.failures:
            known = self.pins if retry_errors else {**self.pins, **self.failures}
            if len({**known, **keys}) < len(known) + len(keys):
                wanted = {key: None for key in keys if key not in known}
        self.requested.update(keys)
        if wanted and self.lasting:
            found = warm.readings(work, wanted)
        if wanted and not found:
            stage = Stage(work, wanted, self.pins, self._keep)
            stage.pins_beneath = self.lasting
            await engine.run(stage)
            struck = work.expired
        else:
            engine.require_open()
            self._pin(found, EMPTY)  # what is looked up at once is not derived
        snapshot, uncopied = await self.snapshot(None if struck else work.deadline)
        self._undelivered = not len(snapshot) and cut_short(uncopied)
        return snapshot

    def _keep(self, gather: Gather) -> None:
        """Take over what a gather has come to, in the very step in which it was complete."""
        self._pin(gather.readings, gather.below)
        self.failures.update(gather.failures)

    def _pin(
        self, readings: Mapping[ResourceKey, Reading], below: Mapping[ResourceKey, Reading] | None
    ) -> None:
        if self.lasting:
            hold(self.pins, readings, below)
        else:
            self.pins.update(readings)
        if self.failures:
            for key in readings:
                self.failures.pop(key, None)

    # Delivering -------------------------------------------------------------------------------

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
        if not pins and list(known) == list(self.requested):
            return list(known.values())
        asked = self.requested if known else ()
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
        self.engine.parts.pace.begin()
        with _UNNOTED if trace is None else trace.delivering(len(readings)):
            deliveries = self.engine.flights.deliveries
            copies = deliveries.at_hand(readings) or await deliveries.values(readings, deadline)
        values, uncopied = copies
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
        errors = {failure.key: failure.make() for failure in self.failed()}
        for key, reading in self.visible(self.pins).items():
            try:
                values[key] = self.engine.flights.deliveries.value_here(reading)
            except PayloadIsolationError as error:
                errors[key] = error
        return self.assembled(values, errors)

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


async def together(engine: Engine, crowd: Crowd, strict: bool) -> Snapshot:
    """Wait with others for the one key of a crowd; return a snapshot of one's own."""
    clock, told = engine.parts.clock, crowd.enter()
    try:
        began, created_at = clock.monotonic(), clock.now()
        await told
    finally:
        engine.leave(crowd, told)
    copies = crowd.copies(engine.flights.deliveries)
    values, errors = copies or await engine.flights.deliveries.values(crowd.readings, None)
    if crowd.failures:
        errors.update({failure.key: failure.make() for failure in crowd.failures.values()})
    once = dict.fromkeys(("cache_misses", "cache_batch_reads", "coalesced_requests"), 1)
    counted = {"duration_ms": (clock.monotonic() - began) * 1000, **once}
    snapshot = snapshot_of(new_id(), created_at, values, frozen(errors), counted)
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
            flag("trace", trace)
        return cls(engine, deadline, deadline_at, _own(metadata or EMPTY), trace)

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
        work = Work(context, deadline=deadline, trace=noted)
        return UnitOfWork(self.engine, work, lasting, parts.clock.monotonic())


def _own(metadata: Mapping[str, Any]) -> FrozenDict[str, Any]:
    return FrozenDict(deepcopy_payload(dict(metadata))) if metadata else EMPTY


# Whether a snapshot will do, and telling so: by raising, or by a result ---------------------------


def objection(
    parts: Parts, request: SnapshotRequest, snapshot: Snapshot
) -> Slices[Exception | None]:
    """Return what speaks against a snapshot: what it lacks, then consistency, then acceptance.

    Both policies are reported on, as far as they are asked.
    """
    report, required, optional = parts.report, request.required, request.optional
    failed = {key: e for key, e in snapshot.errors.items() if request.is_required(key)}
    if failed:
        return SnapshotBuildError(failed, snapshot=snapshot)
    if request.consistency_policy is not None:
        found = inconsistency_of(request.consistency_policy, required, optional, snapshot)
        if report is not None:
            report.consistency_judged(snapshot.snapshot_id, found)
        if found is not None:
            return found
    if request.acceptance_policy is not None:
        violations = yield from violations_of(
            request.acceptance_policy,
            required,
            optional,
            snapshot,
            parts.clock.now(),
            parts.policies,
        )
        if report is not None:
            report.acceptance_judged(snapshot.snapshot_id, violations)
        if violations:
            return (yield from not_accepted(violations, snapshot))
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


# Many at once ------------------------------------------------------------------------------------


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
    attempt: Callable[[SnapshotRequest], Awaitable[RequestResult]],
    max_concurrency: int | None,
) -> Results:
    """Attempt many requests; return their results by name if they have names, else in their order.

    No more are under way at once than `max_concurrency`.
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
    rest = iter(named.items())

    async def work() -> None:
        for name, request in rest:
            results[name] = await attempt(request)
            await parts.pace.keep()  # many that wait for nothing would hold the event loop

    await all_or_none(work() for _ in range(min(limit, len(named))))
    return FrozenDict(results) if isinstance(requests, Mapping) else tuple(results.values())
