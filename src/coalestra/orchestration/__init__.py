"""Building snapshots: the builder, its sessions, and the engine behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
    from coalestra.orchestration.builder import SnapshotBuilder
    from coalestra.orchestration.session import SnapshotSession
    from coalestra.orchestration.settings import BuilderSettings
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "builder": ("SnapshotBuilder",),
            "session": ("SnapshotSession",),
            "settings": ("BuilderSettings",),
        },
    )

__all__ = ["BuilderSettings", "SnapshotBuilder", "SnapshotSession"]
