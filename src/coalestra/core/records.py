"""What caches answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from coalestra.core.values import SnapshotValue


class CacheWriteStatus(str, enum.Enum):
    """What became of a value offered to a cache."""

    STORED = "stored"
    IGNORED_OLDER = "ignored_older"
    IGNORED_DUPLICATE = "ignored_duplicate"
    IGNORED_LOWER_AUTHORITY = "ignored_lower_authority"


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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
