"""Every exception of the library, and the records and JSON shapes that they report with.

The tree is read best from here: ``CoalestraError`` is the root; below it are the errors of
sources and single resources, those of whole snapshots, and those of running the library.
"""

from __future__ import annotations

from coalestra.core.errors_operation import (
    BuilderClosedError,
    CapabilityRequirementError,
    ObservabilityShutdownTimeoutError,
    PayloadCopyShutdownTimeoutError,
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    SessionClosedError,
    SubmissionBacklogFullError,
)
from coalestra.core.errors_root import CoalestraError
from coalestra.core.errors_snapshot import (
    ResourceAcceptanceError,
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
)
from coalestra.core.errors_source import (
    CircuitOpenError,
    DependencyCycleError,
    DependencyResolutionError,
    ResourceResolutionError,
    SnapshotDeadlineExceededError,
    SourceProtocolError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
)
from coalestra.core.failures import (
    ERROR_DIAGNOSTICS_SCHEMA,
    ERROR_DIAGNOSTICS_SCHEMA_VERSION,
    SerializedResourceError,
    SerializedSnapshotBuildError,
    SerializedSourceFailure,
    SourceFailure,
)

__all__ = [
    # the root
    "CoalestraError",
    # sources and single resources
    "SourceUnavailableError",
    "SourceTimeoutError",
    "SnapshotDeadlineExceededError",
    "SourceQueueTimeoutError",
    "CircuitOpenError",
    "SourceProtocolError",
    "ResourceResolutionError",
    "DependencyCycleError",
    "DependencyResolutionError",
    # whole snapshots
    "SnapshotBuildError",
    "SnapshotConsistencyError",
    "SnapshotAcceptanceError",
    "ResourceAcceptanceError",
    # running the library
    "SessionClosedError",
    "BuilderClosedError",
    "PayloadIsolationError",
    "PayloadCopySubsystemClosedError",
    "PayloadCopyShutdownTimeoutError",
    "ObservabilityShutdownTimeoutError",
    "SubmissionBacklogFullError",
    "CapabilityRequirementError",
    # reports
    "ERROR_DIAGNOSTICS_SCHEMA",
    "ERROR_DIAGNOSTICS_SCHEMA_VERSION",
    "SourceFailure",
    "SerializedSourceFailure",
    "SerializedResourceError",
    "SerializedSnapshotBuildError",
]
