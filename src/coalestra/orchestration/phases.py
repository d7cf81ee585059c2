"""Where a flight stands."""

from __future__ import annotations

import enum


class Phase(enum.Enum):
    """Where a flight stands. `SETTLED` is the only phase that it never leaves."""

    CHOOSING = "choosing the next source"
    GATHERING = "waiting for dependencies"
    READY = "ready for a source"
    CALLING = "being fetched"
    WRITING = "being written to the cache"
    SETTLED = "settled"
