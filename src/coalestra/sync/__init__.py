"""The library for threads that have no event loop: one loop in a thread, and blocking faces.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
    from coalestra.sync.builder import SyncSnapshotBuilder
    from coalestra.sync.publisher import SyncResourcePublisher
    from coalestra.sync.session import SyncSnapshotSession
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "builder": ("SyncSnapshotBuilder",),
            "publisher": ("SyncResourcePublisher",),
            "session": ("SyncSnapshotSession",),
        },
    )

__all__ = ["SyncResourcePublisher", "SyncSnapshotBuilder", "SyncSnapshotSession"]
