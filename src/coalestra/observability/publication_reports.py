"""What is reported about events written into the cache, and entries taken out of it."""

from __future__ import annotations

from coalestra.core.keys import ResourceKey
from coalestra.core.published import PublishStatus
from coalestra.observability.emitting import Emitter
from coalestra.observability.labels import labels_of
from coalestra.observability.provenance import Provenance


class PublicationReports(Emitter):
    """One report per key that was published or invalidated."""

    __slots__ = ()

    def resource_published(self, value: Provenance, *, replaced: bool, forced: bool) -> None:
        """Report a published value that is now in the cache.

        Args:
            value: what was written.
            replaced: whether there was a value for the key before.
            forced: whether it was written whatever was there.
        """
        self._count_publish(value, PublishStatus.PUBLISHED)
        if self._telling:
            self._tell(
                "resource_published",
                resource=str(value.key),
                source=value.source,
                observed_at=value.observed_at,
                replaced=replaced,
                forced=forced,
                authority_rank=value.authority_rank,
            )

    def resource_publish_ignored(
        self, candidate: Provenance, cached: Provenance, status: PublishStatus
    ) -> None:
        """Report a published value that lost to the one in the cache, and by which rule."""
        self._count_publish(candidate, status)
        if self._telling:
            self._tell(
                "resource_publish_ignored",
                resource=str(candidate.key),
                source=candidate.source,
                status=status.value,
                observed_at=candidate.observed_at,
                cached_observed_at=cached.observed_at,
                candidate_authority_rank=candidate.authority_rank,
                cached_authority_rank=cached.authority_rank,
            )

    def resource_invalidated(self, key: ResourceKey, reason: str) -> None:
        """Report an entry taken out of the cache by request, for ``reason`` (may be empty)."""
        if self._counting:
            self._count("resource_invalidation_total", **labels_of(key))
        if self._telling:
            self._tell("resource_invalidated", resource=str(key), reason=reason)

    def _count_publish(self, value: Provenance, status: PublishStatus) -> None:
        if self._counting:
            self._count(
                "resource_publish_total",
                **labels_of(value.key),
                source=value.source,
                status=status.value,
            )
