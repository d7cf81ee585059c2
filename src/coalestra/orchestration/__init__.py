"""Building snapshots: the builder, its sessions, and the engine behind them."""

from __future__ import annotations

from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.session import SnapshotSession
from coalestra.orchestration.settings import BuilderSettings

__all__ = ["BuilderSettings", "SnapshotBuilder", "SnapshotSession"]
