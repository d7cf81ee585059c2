"""Revalidation: replacing pinned values, all or none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from coalestra.concurrency.deadline import CutOff, CutOffExpired
from coalestra.core.errors import (
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotDeadlineExceededError,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import Snapshot
from coalestra.observability.reports import SessionRevalidation
from coalestra.orchestration.flights import Gather
from coalestra.orchestration.readings import Demand, Failure, Pins, Reading, dependents, hold, loose
from coalestra.orchestration.unit import Judge, Unit

# Revalidation: replacing pinned values, all or none ----------------------------------------------


class Revalidation:
    """One attempt to replace the named pinned values, and every pinned value derived from them.

    What is pinned out of sight for their sake alone is let go, so that they can rest on newer
    values.
    Everything is acquired, judged and copied beside the pinned state. Only then, in one step,
    does it take that state's place. Whatever fails before leaves everything as it was.
    """

    __slots__ = (
        "_stamp",
        "_loose",
        "_readings",
        "_unit",
        "affected",
        "failures",
        "forced",
        "named",
        "undelivered",
    )

    def __init__(self, unit: Unit, named: Mapping[ResourceKey, None], *, forced: bool) -> None:
        self._unit = unit
        self.named: Mapping[ResourceKey, None] = named
        self.forced: bool = forced
        self.affected: set[ResourceKey] = set()
        self._loose: set[ResourceKey] = set()
        self.failures: dict[ResourceKey, Failure] = {}
        self._readings: dict[ResourceKey, Reading] = {}
        self.undelivered: bool = False
        self._stamp = self._state()

    async def acquire(self) -> None:
        """Read anew what is affected, under the pins that are not; failures are kept as facts."""
        unit = self._unit
        self.affected = dependents(unit.pins, self.named)
        self._loose = loose(unit.pins, unit.requested, self.affected)
        self._stamp = self._state()
        derived = [k for k in self.affected if unit.pins[k].revision.dependency_versions]
        forced = frozenset(self.affected) if self.forced else frozenset()
        demand = Demand(forced, frozenset(derived) & forced)
        going = self.affected | self._loose
        kept = Pins({k: r for k, r in unit.pins.items() if k not in going}, demand)
        order = [key for key in unit.pins if key in self.affected]
        gather = Gather(unit.work, order, kept, demand=demand)
        await unit.engine.run(gather, self._take)

    def _take(self, gather: Gather) -> None:
        self._readings = gather.readings
        self.failures = gather.failures

    def candidate(self) -> dict[ResourceKey, Reading]:
        """Return what the session would show after the commit."""
        pinned = self._unit.visible()
        return {key: self._readings.get(key, reading) for key, reading in pinned.items()}

    async def proposed(self) -> Snapshot:
        """Return the snapshot that a commit would deliver; what cannot be copied is a failure."""
        unit = self._unit
        known = await unit.errors()
        errors = {key: error for key, error in known.items() if key not in self._readings}
        snapshot = await unit.snapshot(readings=self.candidate(), errors=errors)
        new = {key: error for key, error in snapshot.errors.items() if key not in errors}
        late = [e for e in new.values() if isinstance(e, SnapshotDeadlineExceededError)]
        if late:
            self.undelivered = True
            new = {key: new.get(key, late[0]) for key in self.affected}
        for key, error in new.items():
            self.failures[key] = Failure(key, partial(_itself, error))
        return snapshot

    @property
    def outdated(self) -> bool:
        """Whether the session has meanwhile pinned more that is derived from what is replaced."""
        pins = self._unit.pins
        if self._state() == self._stamp:
            return False
        return (
            pins.generation != self._stamp[0]
            or dependents(pins, self.named) != self.affected
            or loose(pins, self._unit.requested, self.affected) != self._loose
        )

    def _state(self) -> tuple[int, int, int]:
        """Return what changes with everything that the session pins, replaces or makes visible."""
        return *self._unit.pins.stamp, len(self._unit.requested)

    def commit(self) -> None:
        """Put the new readings in the place of the old ones."""
        pins = self._unit.pins
        for key in self.affected | self._loose:
            pins.pop(key, None)
            self._unit.failures.pop(key, None)
        hold(pins, self._readings)
        pins.generation += 1

    def outcome(self, **more: Any) -> dict[str, Any]:
        """Return the facts of this attempt for its report."""
        return {
            "requested": len(self.named),
            "affected": len(self.affected),
            "refreshed": len(self._readings),
            "failed": len(self.failures),
            "force_refresh": self.forced,
            **more,
        }


# The revalidations of one session: one after the other, each reported ----------------------------


class Revalidations:
    """Runs revalidations in turn, so that no two replace the same pinned state.

    Stages of the session may go on beside them: what those pin meanwhile is taken into account.
    """

    __slots__ = ("_turn", "_unit")

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._turn = asyncio.Lock()

    async def run(
        self, attempt: Revalidation, judge: Judge, *, strict: bool, check: Callable[[], None]
    ) -> Snapshot:
        """Run one revalidation, count it and report it; `check` must still pass at its commit."""
        counters = self._unit.engine.equipment.counters
        counters.revalidation_attempts += 1
        ended: dict[str, Any] = {"strict": strict, "committed": False, "retained_previous": True}
        try:
            snapshot, committed = await self._in_turn(attempt, judge, strict, check)
            ended.update(committed=committed, retained_previous=not committed)
        except SnapshotConsistencyError:
            ended["consistency_failed"] = True
            raise
        except SnapshotAcceptanceError:
            ended["acceptance_failed"] = True
            raise
        finally:
            counters.revalidation_failures += not ended["committed"]
            self._report(attempt, ended)
        return snapshot

    def _report(self, attempt: Revalidation, ended: Mapping[str, Any]) -> None:
        report = self._unit.engine.equipment.report
        if report is not None:
            snapshot_id = self._unit.work.context.snapshot_id
            facts = attempt.outcome(snapshot_id=snapshot_id, **ended)
            report.session_revalidated(SessionRevalidation(**facts))

    async def _in_turn(
        self, attempt: Revalidation, judge: Judge, strict: bool, check: Callable[[], None]
    ) -> tuple[Snapshot, bool]:
        deadline = self._unit.work.deadline
        try:
            with CutOff(None if deadline is None else deadline.loop_time):
                await self._turn.acquire()
        except CutOffExpired:
            late = SnapshotDeadlineExceededError(
                "the deadline passed while another revalidation of the session was under way"
            )
            return await self._retained(dict.fromkeys(attempt.named, late), strict), False
        try:
            return await self._replaced(attempt, judge, strict, check)
        finally:
            self._turn.release()

    async def _replaced(
        self, attempt: Revalidation, judge: Judge, strict: bool, check: Callable[[], None]
    ) -> tuple[Snapshot, bool]:
        while True:
            await attempt.acquire()
            if not attempt.failures:
                snapshot = await attempt.proposed()
            if attempt.failures:
                errors = {key: each.make() for key, each in attempt.failures.items()}
                if attempt.undelivered and strict:
                    raise SnapshotBuildError(errors)
                return await self._retained(errors, strict), False
            judge.judge(snapshot, tuple(attempt.named))
            check()
            if not attempt.outdated:
                attempt.commit()
                return snapshot, True

    async def _retained(self, errors: Mapping[ResourceKey, Exception], strict: bool) -> Snapshot:
        """Return the state that stays, with the errors of this call; raise them if `strict`."""
        known = await self._unit.errors()
        retained = await self._unit.snapshot(bound=False, errors={**known, **errors})
        if strict:
            raise SnapshotBuildError(errors, snapshot=retained)
        return retained

    def __repr__(self) -> str:
        return f"<Revalidations of {self._unit!r} locked={self._turn.locked()}>"


def _itself(error: Exception) -> Exception:
    return error
