"""What is reported about calls to sources: the wait before, the call, and what came of it."""

from __future__ import annotations

from collections.abc import Collection

from coalestra.core.keys import ResourceKey
from coalestra.observability.emitting import Emitter
from coalestra.observability.labels import Reported, error_text_of, error_type_of
from coalestra.observability.provenance import Provenance


class SourceReports(Emitter):
    """Reports per call (labelled by source) and per key that a call was made for."""

    __slots__ = ()

    # Per key ----------------------------------------------------------------------------------

    def resource_resolved(self, value: Provenance, source_kind: str) -> None:
        """Report a fresh value.

        Args:
            value: the revision, with its source, latency, attempts and authority rank.
            source_kind: ``single``, ``batch`` or ``derived``.
        """
        self._count_fetch(value.source, "success")
        if self._telling:
            self._tell(
                "resource_resolved",
                resource=str(value.key),
                source=value.source,
                latency_ms=value.latency_ms,
                attempts=value.attempts,
                source_kind=source_kind,
                authority_rank=value.authority_rank,
            )

    def source_failed(
        self, key: ResourceKey, source: str, error: Reported, status: str = "failure"
    ) -> None:
        """Report that a source brought no fresh value for a key, whatever the reason.

        Args:
            key: what was asked for.
            source: the source's name.
            error: what went wrong.
            status: ``failure``, ``stale``, ``invalid_timestamp`` or ``circuit_open``. The last two
                have events of their own.
        """
        self._count_fetch(source, status)
        if not self._telling:
            return
        resource, text = str(key), error_text_of(error)
        if status == "circuit_open":
            self._tell("source_circuit_open", source=source, resource=resource, error=text)
        elif status == "invalid_timestamp":
            self._tell("source_payload_rejected", resource=resource, source=source, error=text)
        else:
            kind = error_type_of(error)
            self._tell(
                "source_failed", resource=resource, source=source, error_type=kind, error=text
            )

    def source_payload_rejected(self, key: ResourceKey, source: str, error: Reported) -> None:
        """Report a payload whose observation time cannot be right."""
        self.source_failed(key, source, error, "invalid_timestamp")

    def source_circuit_open(self, key: ResourceKey, source: str, error: Reported) -> None:
        """Report that a key was not asked for, as its circuit is open."""
        self.source_failed(key, source, error, "circuit_open")

    def _count_fetch(self, source: str, status: str) -> None:
        if self._counting:
            self._count("source_fetch_total", source=source, status=status)

    # Per call ---------------------------------------------------------------------------------

    def fetch_latency(self, source: str, latency_ms: float) -> None:
        """Observe how long one call took, in milliseconds."""
        if self._counting:
            self._observe("source_fetch_latency_ms", latency_ms, source=source)

    def batch_call(self, source: str, status: str) -> None:
        """Count a batch call as success, failure, deadline_exceeded or queue_timeout."""
        if self._counting:
            self._count("source_batch_call_total", source=source, status=status)

    def batch_size(self, source: str, size: int) -> None:
        """Observe how many keys one batch call is made for."""
        if self._counting:
            self._observe("source_batch_size", size, source=source)

    def capacity_wait(self, source: str, waited_ms: float) -> None:
        """Observe how long one call waited for its slots, in milliseconds."""
        if self._counting:
            self._observe("source_capacity_wait_ms", waited_ms, source=source)

    def capacity_timeout(self, source: str, reason: str) -> None:
        """Count a call that got no slot: ``queue_timeout`` or ``snapshot_deadline``."""
        if self._counting:
            self._count("source_capacity_timeout_total", source=source, reason=reason)

    def transport_violated(
        self,
        keys: Collection[ResourceKey],
        source: str,
        outcome: str,
        declared: float,
        elapsed: float,
        grace: float,
    ) -> None:
        """Report one call that ran longer than its transport timeout allows (all in seconds).

        Args:
            keys: what the call was for; it counts once, and each key has an event.
            source: the source's name.
            outcome: ``completed_late``, ``failed_late`` or ``coalestra_timeout``.
            declared: the transport timeout that the source declares.
            elapsed: how long the call was seen to run.
            grace: what was allowed on top of the declaration.
        """
        if self._counting:
            self._count("source_transport_timeout_violation_total", source=source, outcome=outcome)
        if self._telling:
            for key in keys:
                self._tell(
                    "source_transport_timeout_violated",
                    source=source,
                    resource=str(key),
                    outcome=outcome,
                    declared_transport_timeout_seconds=declared,
                    observed_elapsed_seconds=elapsed,
                    grace_seconds=grace,
                )

    def transport_budget_rejected(
        self,
        keys: Collection[ResourceKey],
        source: str,
        reason: str,
        declared: float,
        available: float,
    ) -> None:
        """Report one call that was not made, as it could have outlived its budget (in seconds).

        Args:
            keys: what the call was for; it counts once, and each key has an event.
            source: the source's name.
            reason: what sets the budget: ``snapshot_deadline`` or ``source_timeout``.
            declared: the transport timeout that the source declares.
            available: the budget that was left.
        """
        if self._counting:
            self._count("source_transport_budget_rejection_total", source=source, reason=reason)
        if self._telling:
            for key in keys:
                self._tell(
                    "source_transport_budget_rejected",
                    source=source,
                    resource=str(key),
                    transport_timeout_seconds=declared,
                    available_budget_seconds=available,
                )
