"""Building snapshots: the builder, its sessions, and the engine behind them."""

from coalestra.core.policies import PolicyResolver
from coalestra.orchestration.builder import BuilderSettings, SnapshotBuilder
from coalestra.orchestration.session import SnapshotSession

__all__ = ["BuilderSettings", "PolicyResolver", "SnapshotBuilder", "SnapshotSession"]
