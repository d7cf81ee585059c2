"""The state of one unit of work: what was asked for, what is pinned, and what failed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from coalestra.concurrency.copying import deepcopy_payload
from coalestra.concurrency.deadline import Deadline
from coalestra.core.acceptance import SnapshotAcceptancePolicy, violations_of
from coalestra.core.errors import (
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotDeadlineExceededError,
)
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotConsistencyPolicy, SnapshotRequest, check_consistency
from coalestra.core.snapshot import Snapshot, SnapshotDiagnostics, context_of, snapshot_of
from coalestra.core.validation import instance, number, text
from coalestra.core.values import SnapshotValue
from coalestra.observability.reports import SessionResolution
from coalestra.orchestration.flights import Gather, Work
from coalestra.orchestration.parts import Equipment
from coalestra.orchestration.readings import Failure, Pins, Reading, hold
from coalestra.orchestration.singleflight import Engine

# The state of one unit of work: what was asked for, what is pinned, and what failed --------------


_ERRORS_BETWEEN_LOOKS = 32


def distinct(keys: Iterable[ResourceKey]) -> dict[ResourceKey, None]:
    """Return the keys without repetitions, in order; `TypeError` for anything but keys."""
    if isinstance(keys, ResourceKey):
        raise TypeError(
            "keys must be an iterable of ResourceKey, got a single one; put it in a list"
        )
    found = dict.fromkeys(keys)
    for key in found:
        if type(key) is not ResourceKey:
            raise TypeError(f"keys must be ResourceKeys, got {type(key).__qualname__}")
    return found


class Unit:
    """Acquires keys for one unit of work, stage by stage, and makes its snapshots.

    With `lasting`, stages to come are kept in agreement with those before: what derived values
    rest on is pinned too, out of sight.
    """

    __slots__ = (
        "created_at",
        "cut_short",
        "engine",
        "failures",
        "lasting",
        "pins",
        "requested",
        "undelivered",
        "work",
        "_began",
    )

    def __init__(self, engine: Engine, work: Work, *, lasting: bool) -> None:
        self.engine: Engine = engine
        self.work: Work = work
        self.lasting: bool = lasting
        self.created_at: float = work.context.requested_at
        self.requested: dict[ResourceKey, None] = {}
        self.pins: Pins = Pins()
        self.failures: dict[ResourceKey, Failure] = {}
        self.cut_short: bool = False
        self.undelivered: bool = False
        self._began = engine.equipment.clock.monotonic()

    async def single_stage(self, keys: Mapping[ResourceKey, None]) -> Snapshot:
        """Settle the keys and return the snapshot of a unit that has no other stage."""
        warm = self.engine.warm_reads
        values = await warm.values(self.work, keys) if warm.likely(keys) else None
        if values is None:
            struck = await self.acquire(keys, at_hand=False)
            return await self.snapshot(bound=not struck)
        self.engine.require_open()
        self.requested.update(keys)
        return self._assembled(values, EMPTY)

    async def acquire(
        self,
        keys: Mapping[ResourceKey, None],
        *,
        retry_errors: bool = False,
        at_hand: bool = True,
    ) -> bool:
        """Settle every key that is not settled yet; return whether the deadline struck.

        `at_hand` is whether it may be that nothing has to be waited for.
        """
        self.engine.require_open()
        known = self.pins if retry_errors else {**self.pins, **self.failures}
        wanted = {key: None for key in keys if key not in known} if known else keys
        self.requested.update(keys)
        if not wanted:
            return False
        found = self.engine.warm_reads.readings(self.work, wanted) if at_hand else None
        if found:
            self._pin(found)
            return False
        gather = Gather(self.work, wanted, self.pins)
        await self.engine.run(gather, self._keep)
        return self.work.expired

    def _keep(self, gather: Gather) -> None:
        """Take over what a stage has come to, in the very step in which it was complete."""
        self._pin(gather.readings)
        self.failures.update(gather.failures)

    def _pin(self, readings: Mapping[ResourceKey, Reading]) -> None:
        if self.lasting:
            hold(self.pins, readings)
        else:
            self.pins.update(readings)
        if self.failures:
            for key in readings:
                self.failures.pop(key, None)

    def visible(self) -> dict[ResourceKey, Reading]:
        """Return the readings of what was asked for, in the order of asking."""
        if not self.lasting and list(self.requested) == list(self.pins):
            return self.pins
        get = self.pins.get
        return {key: reading for key in self.requested if (reading := get(key)) is not None}

    def failed(self) -> list[Failure]:
        """Return the failure of every key that was asked for and has nothing else."""
        if not self.failures:
            return []
        failed = (key for key in self.requested if key in self.failures and key not in self.pins)
        return [self.failures[key] for key in failed]

    async def errors(self) -> dict[ResourceKey, Exception]:
        """Return a fresh error for each of the failures; made in slices, as they take a while."""
        errors: dict[ResourceKey, Exception] = {}
        pace = self.engine.equipment.pace
        pace.begin()
        for failure in self.failed():
            errors[failure.key] = failure.make()
            if not len(errors) % _ERRORS_BETWEEN_LOOKS:
                await pace.keep()
        return errors

    async def snapshot(
        self,
        *,
        bound: bool = True,
        readings: Mapping[ResourceKey, Reading] | None = None,
        errors: Mapping[ResourceKey, Exception] | None = None,
    ) -> Snapshot:
        """Return an isolated snapshot, within the deadline if `bound`.

        What is not copied when the deadline strikes is among the errors; `cut_short` says that
        there is such, `undelivered` that nothing was copied.
        """
        readings = self.visible() if readings is None else readings
        values, uncopied = await self.engine.deliveries.values(
            readings, self.work.deadline if bound else None
        )
        late = any(isinstance(e, SnapshotDeadlineExceededError) for e in uncopied.values())
        if late:
            report = self.engine.equipment.report
            self.engine.equipment.counters.deadlines_exceeded += 1
            if report is not None:
                report.copy_deadline_exceeded(self.work.context.snapshot_id, "snapshot_delivery")
        self.cut_short = late
        self.undelivered = late and not values
        failed = await self.errors() if errors is None else errors
        return self._assembled(values, {**failed, **uncopied} if uncopied else failed)

    def snapshot_now(self) -> Snapshot:
        """Return an isolated snapshot without waiting, however long the copying takes."""
        values: dict[ResourceKey, SnapshotValue[object]] = {}
        errors = {failure.key: failure.make() for failure in self.failed()}
        for key, reading in self.visible().items():
            values[key] = self.engine.deliveries.value_here(reading, "snapshot delivery")
        return self._assembled(values, errors)

    def _assembled(
        self,
        values: Mapping[ResourceKey, SnapshotValue[object]],
        errors: Mapping[ResourceKey, Exception],
    ) -> Snapshot:
        return snapshot_of(
            self.work.context.snapshot_id,
            self.created_at,
            values if type(values) is FrozenDict else FrozenDict(values),
            FrozenDict(errors) if errors else EMPTY,
            self._diagnostics(values, len(errors)),
        )

    def _diagnostics(
        self, values: Mapping[ResourceKey, SnapshotValue[object]], failed: int
    ) -> SnapshotDiagnostics:
        observed = [value.observed_at for value in values.values()]
        elapsed = self.engine.equipment.clock.monotonic() - self._began
        record = self.work.record
        record.duration_ms = elapsed * 1000
        record.requested_resources = len(self.requested)
        record.resolved_resources = len(values)
        record.failed_resources = failed
        record.stale_values = [value.stale for value in values.values()].count(True)
        record.observation_skew_ms = (max(observed) - min(observed)) * 1000 if observed else 0.0
        return record.freeze()

    def __repr__(self) -> str:
        return f"<Unit {self.work.context.snapshot_id} pins={len(self.pins)}>"


def open_unit(
    engine: Engine,
    deadline_seconds: float | None,
    metadata: Mapping[str, Any] | None,
    snapshot_id: str | None,
    *,
    lasting: bool,
) -> Unit:
    """Begin a unit of work; `TypeError` or `ValueError` names the argument that is wrong."""
    engine.require_open()
    clock = engine.equipment.clock
    deadline = None
    if deadline_seconds is not None:
        number("deadline_seconds", deadline_seconds, above=0)
        deadline = Deadline.after(clock, deadline_seconds)
    if metadata is not None:
        instance("metadata", metadata, Mapping)
    if snapshot_id is not None:
        text("snapshot_id", snapshot_id)
    now = clock.now()
    context = context_of(
        now,
        None if deadline_seconds is None else now + deadline_seconds,
        None if deadline is None else deadline.monotonic_at,
        FrozenDict(deepcopy_payload(dict(metadata))) if metadata else EMPTY,
        os.urandom(16).hex() if snapshot_id is None else snapshot_id,
    )
    return Unit(engine, Work(context, deadline=deadline), lasting=lasting)


# Whether a snapshot meets the policies of its request, and the report on it ----------------------


class Judge:
    """Holds snapshots against policies; the required keys take part, and optional ones if asked."""

    def __init__(
        self,
        equipment: Equipment,
        consistency: SnapshotConsistencyPolicy | None,
        acceptance: SnapshotAcceptancePolicy | None,
    ) -> None:
        self._equipment = equipment
        self._consistency = consistency
        self._acceptance = acceptance

    def judge(
        self,
        snapshot: Snapshot,
        required: Collection[ResourceKey],
        optional: Collection[ResourceKey] = (),
    ) -> None:
        """Check consistency, then acceptance.

        Raises:
            SnapshotConsistencyError: observations lie too far apart.
            SnapshotAcceptanceError: values are too old, stale, of too low authority, or too few.
        """
        if self._consistency is not None:
            self._judge_consistency(self._consistency, snapshot, required, optional)
        if self._acceptance is not None:
            self._judge_acceptance(self._acceptance, snapshot, required, optional)

    def _judge_consistency(
        self,
        policy: SnapshotConsistencyPolicy,
        snapshot: Snapshot,
        required: Collection[ResourceKey],
        optional: Collection[ResourceKey],
    ) -> None:
        report = self._equipment.report
        try:
            check_consistency(policy, required, optional, snapshot)
        except SnapshotConsistencyError as error:
            if report is not None:
                report.consistency_failed(snapshot.snapshot_id, error)
            raise
        if report is not None:
            report.consistency_passed()

    def _judge_acceptance(
        self,
        policy: SnapshotAcceptancePolicy,
        snapshot: Snapshot,
        required: Collection[ResourceKey],
        optional: Collection[ResourceKey],
    ) -> None:
        report = self._equipment.report
        now = self._equipment.clock.now()
        policies = self._equipment.policies
        violations = violations_of(policy, required, optional, snapshot, now, policies)
        if violations:
            if report is not None:
                report.acceptance_failed(snapshot.snapshot_id, violations)
            raise SnapshotAcceptanceError(violations=violations, snapshot=snapshot)
        if report is not None:
            report.acceptance_passed()


# One stage of a session: resolving keys or a request, judging the outcome, reporting it ----------


class Stage:
    """Resolves some keys within a unit of work, and says whether that will do."""

    __slots__ = ("_retry_errors", "_unit", "_wanted")

    def __init__(
        self, unit: Unit, keys: Iterable[ResourceKey], *, retry_errors: bool = False
    ) -> None:
        self._unit = unit
        self._wanted = distinct(keys)
        self._retry_errors = retry_errors

    async def run(self, *, strict: bool) -> Snapshot:
        """Return the snapshot; if `strict`, every key of the stage must have a value."""
        snapshot = await self._snapshot()
        failed = {key: error for key, error in snapshot.errors.items() if key in self._wanted}
        self._report(snapshot, strict=strict, succeeded=not (strict and failed))
        if strict and failed:
            raise SnapshotBuildError(failed, snapshot=snapshot)
        return snapshot

    async def run_request(self, request: SnapshotRequest, judge: Judge) -> Snapshot:
        """Return the snapshot; the required keys must have values, and the policies must hold."""
        snapshot = await self._snapshot()
        failed = {k: e for k, e in snapshot.errors.items() if request.is_required(k)}
        succeeded = False
        try:
            if failed:
                raise SnapshotBuildError(failed, snapshot=snapshot)
            judge.judge(snapshot, request.required, request.optional)
            succeeded = True
        finally:
            self._report(snapshot, strict=True, succeeded=succeeded)
        return snapshot

    async def _snapshot(self) -> Snapshot:
        struck = await self._unit.acquire(self._wanted, retry_errors=self._retry_errors)
        return await self._unit.snapshot(bound=not struck)

    def _report(self, snapshot: Snapshot, *, strict: bool, succeeded: bool) -> None:
        unit = self._unit
        report = unit.engine.equipment.report
        if report is None:
            return

        failed = sum(key in snapshot.errors for key in self._wanted)
        report.session_resolved(
            SessionResolution(
                snapshot_id=unit.work.context.snapshot_id,
                requested=len(self._wanted),
                resolved=len(self._wanted) - failed,
                failed=failed,
                total_resources=len(unit.requested),
                strict=strict,
                retry_errors=self._retry_errors,
            ),
            succeeded=succeeded,
        )

    def __repr__(self) -> str:
        return f"<Stage of {self._unit!r} keys={len(self._wanted)}>"
