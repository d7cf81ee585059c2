"""Counting what happens to cached entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coalestra.core.cache_stats import CacheStats


class Tally:
    """Plain counters, incremented where things happen."""

    __slots__ = (
        "evictions",
        "expirations",
        "fresh_hits",
        "invalidations",
        "misses",
        "sets",
        "stale_hits",
    )

    def __init__(self) -> None:
        self.misses: int = 0
        self.fresh_hits: int = 0
        self.stale_hits: int = 0
        self.sets: int = 0
        self.invalidations: int = 0
        self.evictions: int = 0
        self.expirations: int = 0

    def __repr__(self) -> str:
        return f"Tally(hits={self.fresh_hits + self.stale_hits}, misses={self.misses})"

    def stats(self, size: int, max_entries: int | None) -> CacheStats:
        """Return the counts together with the size now."""
        from coalestra.core.cache_stats import CacheStats

        return CacheStats(
            size=size,
            max_entries=max_entries,
            hits=self.fresh_hits + self.stale_hits,
            misses=self.misses,
            fresh_hits=self.fresh_hits,
            stale_hits=self.stale_hits,
            sets=self.sets,
            invalidations=self.invalidations,
            evictions=self.evictions,
            expirations=self.expirations,
        )
