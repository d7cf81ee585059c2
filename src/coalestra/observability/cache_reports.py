"""What is reported about reading the cache and about sharing work in flight."""

from __future__ import annotations

from coalestra.core.keys import ResourceKey
from coalestra.observability.emitting import Emitter
from coalestra.observability.labels import Reported, error_text_of, error_type_of, labels_of


class CacheReports(Emitter):
    """One method for each thing that can become of a key before a source is asked."""

    __slots__ = ()

    def cache_access(self, key: ResourceKey, status: str) -> None:
        """Count one look into the cache.

        Args:
            key: what was looked for.
            status: ``fresh``, ``stale_while_revalidate``, ``miss``, ``stale_fallback`` or
                ``revalidation_bypass``.
        """
        if self._counting:
            self._count("cache_access_total", **labels_of(key), status=status)

    def cache_hit(self, key: ResourceKey, freshness: str) -> None:
        """Report a value served from the cache.

        Args:
            key: what was looked for.
            freshness: ``fresh`` or ``stale_while_revalidate``; also the status that is counted.
        """
        self.cache_access(key, freshness)
        if self._telling:
            self._tell("cache_hit", resource=str(key), freshness=freshness)

    def cache_missed(self, key: ResourceKey) -> None:
        """Report that the cache had nothing usable. There is a count for it, but no event."""
        self.cache_access(key, "miss")

    def cache_bypassed(self, key: ResourceKey, reason: str) -> None:
        """Report that the cache was passed over on purpose, and why."""
        self.cache_access(key, "revalidation_bypass")
        if self._telling:
            self._tell("cache_bypassed", resource=str(key), reason=reason)

    def stale_fallback_used(
        self, key: ResourceKey, error: Reported, *, from_cache: bool = True
    ) -> None:
        """Report that a stale value stands in, as every source has failed.

        Args:
            key: what was looked for.
            error: why there is no fresh value.
            from_cache: whether the cache had the value; one from a source is no cache access.
        """
        if from_cache:
            self.cache_access(key, "stale_fallback")
        if self._telling:
            self._tell("stale_fallback_used", resource=str(key), error_type=error_type_of(error))

    def cache_failed(self, operation: str, error: Reported) -> None:
        """Report that a cache raised, and that the library went on without it.

        Args:
            operation: what the cache was asked for, ``read`` or ``write``.
            error: what it raised.
        """
        if self._counting:
            self._count("cache_failure_total", operation=operation)
        if self._telling:
            self._tell(
                "cache_failed",
                operation=operation,
                error_type=error_type_of(error),
                error=error_text_of(error),
            )

    def flight_joined(self, key: ResourceKey) -> None:
        """Count a caller who shares an acquisition that was already under way."""
        if self._counting:
            self._count("singleflight_join_total", **labels_of(key))
