"""What a cache has counted."""

from __future__ import annotations

import enum
from typing import Any

from coalestra.core.frozen import record
from coalestra.core.validation import number
from coalestra.core.values import SnapshotValue

__all__ = [
    "CacheLookup", "CacheStats", "CacheWriteResult", "CacheWriteStatus", "PublishResult",
    "PublishStatus",
]  # fmt: skip


@record
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


# What caches answer ------------------------------------------------------------------------------


class CacheWriteStatus(str, enum.Enum):
    """What became of a value offered to a cache."""

    STORED = "stored"
    IGNORED_OLDER = "ignored_older"
    IGNORED_DUPLICATE = "ignored_duplicate"
    IGNORED_LOWER_AUTHORITY = "ignored_lower_authority"


@record
class CacheLookup:
    """What a cache has for a key.

    Attributes:
        value: the cached value, or None.
        fresh: whether it is within its time to live.
        usable_stale: whether it is older, but may still be used in need.
        age_seconds: its age since it was observed, or None without a value.
    """

    value: SnapshotValue[Any] | None
    fresh: bool
    usable_stale: bool
    age_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.age_seconds is not None:
            number("age_seconds", self.age_seconds)


@record
class CacheWriteResult:
    """What a cache did with a value.

    Attributes:
        status: what became of it.
        value: what the cache holds now: the value if it was stored, else the one that stayed.
        previous: what it held before, or None.
    """

    status: CacheWriteStatus
    value: SnapshotValue[Any]
    previous: SnapshotValue[Any] | None = None

    @property
    def stored(self) -> bool:
        """Whether the value was stored."""
        return self.status is CacheWriteStatus.STORED


# What publishers answer --------------------------------------------------------------------------


class PublishStatus(str, enum.Enum):
    """What became of a published value."""

    PUBLISHED = "published"
    IGNORED_OLDER = "ignored_older"
    IGNORED_DUPLICATE = "ignored_duplicate"
    IGNORED_LOWER_AUTHORITY = "ignored_lower_authority"


@record
class PublishResult:
    """What became of a published value.

    Attributes:
        status: whether it was published, or why not.
        value: what readers get now: the value if it was published, else the one that stayed.
        previous: what they would have got before, or None.
    """

    status: PublishStatus
    value: SnapshotValue[Any]
    previous: SnapshotValue[Any] | None = None

    @property
    def published(self) -> bool:
        """Whether the value was published."""
        return self.status is PublishStatus.PUBLISHED
