"""What is reported about builds and sessions as a whole, and about the policies they must meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from coalestra.core.acceptance import SnapshotAcceptanceViolation
from coalestra.core.diagnostics import SnapshotDiagnostics
from coalestra.core.errors import SnapshotConsistencyError
from coalestra.observability.emitting import Emitter


@dataclasses.dataclass(frozen=True, slots=True)
class SessionResolution:
    """The outcome of one ``resolve`` of a session; counts are of keys.

    Attributes:
        snapshot_id: the session's id.
        requested: keys of this call.
        resolved: those of them that have a value.
        failed: those of them that have none.
        total_resources: keys in the snapshot that the call returned.
        strict: whether a failure was to raise.
        retry_errors: whether earlier failures were to be tried again.
    """

    snapshot_id: str
    requested: int
    resolved: int
    failed: int
    total_resources: int
    strict: bool
    retry_errors: bool


@dataclasses.dataclass(frozen=True, slots=True)
class SessionRevalidation:
    """The outcome of one ``revalidate`` of a session; counts are of keys.

    Attributes:
        snapshot_id: the session's id.
        requested: keys of this call.
        affected: these and the pinned ones derived from them.
        refreshed: affected keys for which there is a new value.
        failed: affected keys for which there is none.
        committed: whether the new values were pinned.
        retained_previous: whether the old ones stay.
        strict: whether a failure was to raise.
        force_refresh: whether the cache was to be passed over.
        consistency_failed: whether the new state broke the consistency policy.
        acceptance_failed: whether it broke the acceptance policy.
    """

    snapshot_id: str
    requested: int
    affected: int
    refreshed: int
    failed: int
    committed: bool
    retained_previous: bool
    strict: bool
    force_refresh: bool
    consistency_failed: bool = False
    acceptance_failed: bool = False


class SnapshotReports(Emitter):
    """One report per finished build, session call, or judgement by a policy."""

    __slots__ = ()

    def snapshot_built(
        self,
        snapshot_id: str,
        diagnostics: SnapshotDiagnostics,
        *,
        build_failed: bool,
        strict: bool,
    ) -> None:
        """Report a finished build; the counts of keys are those of its diagnostics."""
        self._count_status("snapshot_build_total", not build_failed)
        if self._telling:
            self._tell(
                "snapshot_built",
                snapshot_id=snapshot_id,
                resources=diagnostics.requested_resources,
                resolved=diagnostics.resolved_resources,
                failed=diagnostics.failed_resources,
                build_failed=build_failed,
                strict=strict,
                diagnostics=diagnostics,
            )

    def session_resolved(self, outcome: SessionResolution, *, succeeded: bool) -> None:
        """Report a finished ``resolve``; ``succeeded`` unless it is about to raise."""
        self._count_status("snapshot_session_resolve_total", succeeded)
        if self._telling:
            self._tell("snapshot_session_resolved", **fields_of(outcome))

    def session_revalidated(self, outcome: SessionRevalidation) -> None:
        """Report a finished ``revalidate``; it has succeeded if its values were committed."""
        self._count_status("snapshot_session_revalidate_total", outcome.committed)
        if self._telling:
            self._tell("snapshot_session_revalidated", **fields_of(outcome))

    def acceptance_passed(self) -> None:
        """Count a snapshot that its acceptance policy lets through."""
        self._count_status("snapshot_acceptance_total", True)

    def acceptance_failed(
        self, snapshot_id: str, violations: Collection[SnapshotAcceptanceViolation]
    ) -> None:
        """Report a snapshot that its acceptance policy turns down, and each reason for it."""
        self._count_status("snapshot_acceptance_total", False)
        reasons = [violation.reason.value for violation in violations]
        if self._counting:
            for reason in reasons:
                self._count("snapshot_acceptance_violation_total", reason=reason)
        if self._telling:
            self._tell(
                "snapshot_acceptance_failed",
                snapshot_id=snapshot_id,
                violations=len(reasons),
                reasons=tuple(dict.fromkeys(reasons)),
            )

    def consistency_passed(self) -> None:
        """Count a snapshot whose observations lie close enough together."""
        self._count_consistency("success")

    def consistency_failed(self, snapshot_id: str, error: SnapshotConsistencyError) -> None:
        """Report a snapshot whose observations lie too far apart."""
        self._count_consistency("error")
        if self._telling:
            self._tell(
                "snapshot_consistency_failed",
                snapshot_id=snapshot_id,
                resources=len(error.keys),
                oldest_resource=str(error.oldest_key),
                newest_resource=str(error.newest_key),
                observation_skew_ms=error.observation_skew_seconds * 1000.0,
                max_observation_skew_ms=error.max_observation_skew_seconds * 1000.0,
            )

    def copy_deadline_exceeded(self, snapshot_id: str, phase: str) -> None:
        """Report that a deadline struck while a payload was being copied, and in which phase."""
        if self._counting:
            self._count("payload_copy_deadline_total", phase=phase)
        if self._telling:
            self._tell("payload_copy_deadline_exceeded", snapshot_id=snapshot_id, phase=phase)

    def _count_status(self, metric: str, succeeded: bool) -> None:
        if self._counting:
            self._count(metric, status="success" if succeeded else "error")

    def _count_consistency(self, status: str) -> None:
        if self._counting:
            self._count("snapshot_consistency_total", status=status, rule="observation_skew")


def fields_of(outcome: SessionResolution | SessionRevalidation) -> dict[str, str | int]:
    """Return the fields of an outcome by name, for the payload of its event."""
    return {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
