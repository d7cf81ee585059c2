"""What is reported about refreshes in the background."""

from __future__ import annotations

from coalestra.core.keys import ResourceKey
from coalestra.observability.emitting import Emitter
from coalestra.observability.labels import Reported, error_text_of, error_type_of, labels_of


class RefreshReports(Emitter):
    """One report as a refresh is scheduled, and one as it ends."""

    __slots__ = ()

    def refresh_scheduled(self, key: ResourceKey, reason: str, snapshot_id: str) -> None:
        """Report a new refresh, why, and the snapshot that gave the occasion."""
        self._count_refresh(key, "scheduled")
        if self._telling:
            self._tell(
                "resource_refresh_scheduled",
                resource=str(key),
                reason=reason,
                snapshot_id=snapshot_id,
            )

    def refresh_completed(self, key: ResourceKey, reason: str, source: str) -> None:
        """Report a refresh that brought a fresh value, and from which source."""
        self._count_refresh(key, "success")
        if self._telling:
            self._tell(
                "resource_refresh_completed", resource=str(key), reason=reason, source=source
            )

    def refresh_failed(self, key: ResourceKey, reason: str, error: Reported) -> None:
        """Report a refresh that brought no fresh value, and what went wrong."""
        self._count_refresh(key, "failure")
        if self._telling:
            self._tell(
                "resource_refresh_failed",
                resource=str(key),
                reason=reason,
                error_type=error_type_of(error),
                error=error_text_of(error),
            )

    def refresh_cancelled(self, key: ResourceKey) -> None:
        """Report a refresh that was called off. There is a count for it, but no event."""
        self._count_refresh(key, "cancelled")

    def _count_refresh(self, key: ResourceKey, status: str) -> None:
        if self._counting:
            self._count("resource_refresh_total", **labels_of(key), status=status)
