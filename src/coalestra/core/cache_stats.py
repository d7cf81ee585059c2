"""What a cache has counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The counts of a cache since it was made.

    Attributes:
        size: how many entries there are now.
        max_entries: how many there may be, or None for any number.
        hits, misses: answers with and without a value.
        fresh_hits, stale_hits: the hits, by freshness.
        sets: values stored.
        invalidations: entries removed on request, or for resting on something outdated.
        evictions: entries removed to make room.
        expirations: entries removed for their age.
    """

    size: int
    max_entries: int | None
    hits: int
    misses: int
    fresh_hits: int
    stale_hits: int
    sets: int
    invalidations: int
    evictions: int
    expirations: int
