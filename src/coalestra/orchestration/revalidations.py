"""The revalidations of one session: one after the other, each reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
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
from coalestra.orchestration.judging import Judge
from coalestra.orchestration.revalidation import Revalidation
from coalestra.orchestration.unit import Unit


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
            from coalestra.observability.snapshot_reports import SessionRevalidation

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
                try:
                    snapshot = await attempt.proposed()
                except SnapshotBuildError as late:
                    if strict:
                        raise
                    return await self._retained(attempt.blamed(late.errors), strict), False
            if attempt.failures:
                errors = {key: each.make() for key, each in attempt.failures.items()}
                return await self._retained(errors, strict), False
            judge.judge(snapshot, tuple(attempt.named))
            check()
            if not attempt.outdated:
                attempt.commit()
                return snapshot, True

    async def _retained(self, errors: Mapping[ResourceKey, Exception], strict: bool) -> Snapshot:
        """Return the state that stays, with the errors of this call; raise them if `strict`."""
        known = self._unit.errors()
        retained = await self._unit.snapshot(bound=False, errors={**known, **errors})
        if strict:
            raise SnapshotBuildError(errors, snapshot=retained)
        return retained

    def __repr__(self) -> str:
        return f"<Revalidations of {self._unit!r} locked={self._turn.locked()}>"
