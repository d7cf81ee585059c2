"""The library for threads that have no event loop: one loop in a thread, and blocking faces.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from __future__ import annotations

from coalestra.sync.builder import SyncSnapshotBuilder
from coalestra.sync.publisher import SyncResourcePublisher
from coalestra.sync.session import SyncSnapshotSession

__all__ = ["SyncResourcePublisher", "SyncSnapshotBuilder", "SyncSnapshotSession"]
