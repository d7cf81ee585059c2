"""One stage of a session: resolving keys or a request, judging the outcome, reporting it."""

from __future__ import annotations

from collections.abc import Iterable

from coalestra.core.errors import SnapshotBuildError
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotRequest
from coalestra.core.snapshot import Snapshot
from coalestra.orchestration.judging import Judge
from coalestra.orchestration.unit import Unit, distinct


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
        from coalestra.observability.snapshot_reports import SessionResolution

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
