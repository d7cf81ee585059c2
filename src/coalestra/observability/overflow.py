"""How much a buffer holds, and what it does when it is full."""

from __future__ import annotations

import enum

DEFAULT_MAX_PENDING = 10_000
"""How many records a buffer keeps waiting unless told otherwise."""


class BufferOverflowPolicy(str, enum.Enum):
    """What becomes of a record that finds the buffer full."""

    DROP_OLDEST = "drop_oldest"
    """It takes the place of the one that waited longest."""

    DROP_NEWEST = "drop_newest"
    """It is dropped itself."""

    RAISE = "raise"
    """It is dropped, and the caller gets ``queue.Full``."""
