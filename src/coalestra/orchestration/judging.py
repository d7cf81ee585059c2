"""Whether a snapshot meets the policies of its request, and the report on it."""

from __future__ import annotations

from collections.abc import Collection

from coalestra.core.acceptance import SnapshotAcceptancePolicy
from coalestra.core.consistency import SnapshotConsistencyPolicy, check_consistency
from coalestra.core.errors import SnapshotAcceptanceError, SnapshotConsistencyError
from coalestra.core.judgement import violations_of
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import Snapshot
from coalestra.orchestration.equipment import Equipment


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
