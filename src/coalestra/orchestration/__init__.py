"""Building snapshots: the builder, its sessions, and the engine behind them."""

from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.parts import BuilderSettings
from coalestra.orchestration.session import SnapshotSession

__all__ = ["BuilderSettings", "SnapshotBuilder", "SnapshotSession"]
