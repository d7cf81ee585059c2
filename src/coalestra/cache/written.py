"""What became of one offered revision."""

from __future__ import annotations

from typing import NamedTuple

from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision


class Written(NamedTuple):
    """The outcome of a write: its status, what is current now, and what was before.

    A cache that is not the library's own reports ``previous`` only when it was asked for.
    """

    status: CacheWriteStatus
    current: Revision
    previous: Revision | None
