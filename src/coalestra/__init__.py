"""Consistent, immutable snapshots of many resources, for one unit of work at a time.

Names are brought in from the parts of the package when somebody first asks for them, so that
``import coalestra`` alone costs next to nothing. Type checkers look into all of the parts.
"""

# ruff: noqa: F403, F405 - what is imported is told by __all__

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from coalestra._version import __version__

if TYPE_CHECKING:
    from coalestra.adapters import *
    from coalestra.cache import *
    from coalestra.concurrency import *
    from coalestra.core import *
    from coalestra.observability import *
    from coalestra.orchestration import *
    from coalestra.resilience import *
    from coalestra.sync import *

__all__ = [
    "AsyncCache",
    "AsyncMemoryCache",
    "AtomicAsyncCache",
    "AuthorityAwareCache",
    "CacheNewsListener",
    "Lease",
    "LeasedLookup",
    "LeasingCache",
    "NearCache",
    "OrderAwareCache",
    "PolicyAwareCache",
    "AuthorityPolicyProvider",
    "AuthorityPolicyResolver",
    "AuthorityResolver",
    "BUILDER_HEALTH_ASSESSMENT_SCHEMA",
    "BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION",
    "BUILDER_HEALTH_SCHEMA",
    "BUILDER_HEALTH_SCHEMA_VERSION",
    "BatchAsyncCache",
    "BatchAtomicAsyncCache",
    "BatchSizedSource",
    "BatchSnapshotSource",
    "BlockingSourceTimeoutConfigured",
    "BufferOverflowPolicy",
    "BufferedEventSink",
    "BufferedMetricsSink",
    "BufferedSinkStats",
    "BuilderHealth",
    "BuilderHealthAssessment",
    "BuilderHealthAssessmentPolicy",
    "BuilderHealthFinding",
    "BuilderHealthReason",
    "BuilderHealthSeverity",
    "CASE_INSENSITIVE_KEY_NORMALIZER",
    "COALESTRA_API_STABILITY",
    "COALESTRA_CAPABILITIES_SCHEMA",
    "COALESTRA_CAPABILITIES_SCHEMA_VERSION",
    "CacheLookup",
    "CacheStats",
    "CacheWriteResult",
    "CacheWriteStatus",
    "CallableBatchSource",
    "CallableDerivedSource",
    "CallableSource",
    "CacheCircuitOpenError",
    "CacheTimeoutError",
    "CacheUnavailableError",
    "CapabilityRequirementError",
    "CapacityController",
    "CapacityLimiter",
    "CapacitySnapshot",
    "CircuitBreaker",
    "CircuitBreakerPolicy",
    "CircuitIdentity",
    "CircuitOpenError",
    "CircuitScope",
    "CircuitSnapshot",
    "CircuitState",
    "CoalestraCapabilities",
    "CoalestraError",
    "ConcurrencyLimitedSource",
    "DependencyCycleError",
    "DependencyResolutionError",
    "DerivedSource",
    "ERROR_DIAGNOSTICS_SCHEMA",
    "ERROR_DIAGNOSTICS_SCHEMA_VERSION",
    "EventRecord",
    "FetchContext",
    "FreshnessPolicy",
    "FreshnessPolicyProvider",
    "InMemoryMetrics",
    "KeyNormalizer",
    "LEGACY_KEY_NORMALIZER",
    "LoggingEventSink",
    "MetricRecord",
    "NullEventSink",
    "NullMetrics",
    "ObservabilityShutdownTimeoutError",
    "ObservationPolicy",
    "PRESERVE_KEY_NORMALIZER",
    "PayloadCopier",
    "PayloadCopyHealth",
    "PayloadCopyShutdownTimeoutError",
    "PayloadCopySubsystemClosedError",
    "PayloadIsolationError",
    "PayloadIsolator",
    "PolicyResolver",
    "PublishResult",
    "PublishStatus",
    "RefreshMode",
    "ResilienceConfiguredSource",
    "ResiliencePolicyResolver",
    "ResourceAcceptanceError",
    "ResourceAcceptanceRule",
    "ResourceKey",
    "ResourcePublisher",
    "ResourceResolutionError",
    "ResourceUpdate",
    "RetryPolicy",
    "SerializedResourceError",
    "SerializedSnapshotBuildError",
    "SerializedSourceFailure",
    "SessionClosedError",
    "Snapshot",
    "SnapshotAcceptanceError",
    "SnapshotAcceptancePolicy",
    "SnapshotAcceptanceReason",
    "SnapshotAcceptanceViolation",
    "SnapshotBuildError",
    "SnapshotBuilder",
    "SnapshotConsistencyError",
    "SnapshotConsistencyPolicy",
    "SnapshotDeadlineExceededError",
    "SnapshotDiagnostics",
    "SnapshotRequest",
    "SnapshotRequirement",
    "SnapshotSession",
    "SnapshotSource",
    "SnapshotValue",
    "SourceAuthorityPolicy",
    "SourceFailure",
    "SourcePayload",
    "SourceProtocolError",
    "SourceQueueTimeoutError",
    "SourceResiliencePolicy",
    "SourceTimeoutError",
    "SourceTimeoutGuarantee",
    "SourceTimeoutGuaranteeStatus",
    "SourceUnavailableError",
    "SubmissionBacklogFullError",
    "SyncResourcePublisher",
    "SyncSnapshotBuilder",
    "SyncSnapshotSession",
    "TRANSIENT_ERRORS",
    "__version__",
    "capabilities",
    "deepcopy_payload",
    "inspect_source_timeout_guarantee",
    "require_capabilities",
    "TellingCache",
]

_PARTS = (
    "core",
    "concurrency",
    "observability",
    "resilience",
    "cache",
    "orchestration",
    "adapters",
    "sync",
)


def __getattr__(name: str) -> object:
    """Bring in a public name, or a part of the package, and keep it."""
    value: object
    if name in __all__:
        parts = (_import_module(f"{__name__}.{part}") for part in _PARTS)
        value = next(getattr(part, name) for part in parts if name in part.__all__)
    elif name in _PARTS:
        value = _import_module(f"{__name__}.{name}")
    else:
        text = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(text, name=name, obj=_sys.modules[__name__])
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
