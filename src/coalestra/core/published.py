"""What publishers answer."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from coalestra.core.values import SnapshotValue


class PublishStatus(str, enum.Enum):
    """What became of a published value."""

    PUBLISHED = "published"
    IGNORED_OLDER = "ignored_older"
    IGNORED_DUPLICATE = "ignored_duplicate"
    IGNORED_LOWER_AUTHORITY = "ignored_lower_authority"


@dataclass(frozen=True, slots=True, init=False)
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

    def __init__(
        self,
        status: PublishStatus,
        value: SnapshotValue[Any],
        previous: SnapshotValue[Any] | None = None,
    ) -> None:
        # One is made for every key: its slots are written directly, past the frozen __setattr__.
        _write_status(self, status)
        _write_value(self, value)
        _write_previous(self, previous)

    @property
    def published(self) -> bool:
        """Whether the value was published."""
        return self.status is PublishStatus.PUBLISHED


_slots: Any = PublishResult
_write_status = _slots.status.__set__
_write_value = _slots.value.__set__
_write_previous = _slots.previous.__set__
