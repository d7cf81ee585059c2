"""Data and pure rules: nothing in here waits, locks, or asks what time it is."""

from __future__ import annotations

from coalestra.core.acceptance import (
    ResourceAcceptanceRule,
    SnapshotAcceptancePolicy,
    SnapshotAcceptanceReason,
    SnapshotAcceptanceViolation,
    SnapshotRequirement,
)
from coalestra.core.assessment import (
    BUILDER_HEALTH_ASSESSMENT_SCHEMA,
    BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION,
    BuilderHealthAssessment,
    BuilderHealthAssessmentPolicy,
    BuilderHealthFinding,
    BuilderHealthReason,
    BuilderHealthSeverity,
)
from coalestra.core.authority import (
    AuthorityPolicyProvider,
    AuthorityPolicyResolver,
    AuthorityResolver,
    SourceAuthorityPolicy,
)
from coalestra.core.capabilities import (
    COALESTRA_API_STABILITY,
    COALESTRA_CAPABILITIES_SCHEMA,
    COALESTRA_CAPABILITIES_SCHEMA_VERSION,
    CoalestraCapabilities,
    capabilities,
    require_capabilities,
)
from coalestra.core.clock import (
    Clock,
    SystemClock,
)
from coalestra.core.consistency import (
    SnapshotConsistencyPolicy,
)
from coalestra.core.context import (
    FetchContext,
)
from coalestra.core.copy_health import (
    PayloadCopyHealth,
)
from coalestra.core.diagnostics import (
    SnapshotDiagnostics,
)
from coalestra.core.errors import (
    ERROR_DIAGNOSTICS_SCHEMA,
    ERROR_DIAGNOSTICS_SCHEMA_VERSION,
    BuilderClosedError,
    CapabilityRequirementError,
    CircuitOpenError,
    CoalestraError,
    DependencyCycleError,
    DependencyResolutionError,
    ObservabilityShutdownTimeoutError,
    PayloadCopyShutdownTimeoutError,
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    ResourceAcceptanceError,
    ResourceResolutionError,
    SerializedResourceError,
    SerializedSnapshotBuildError,
    SerializedSourceFailure,
    SessionClosedError,
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotDeadlineExceededError,
    SourceFailure,
    SourceProtocolError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
    SubmissionBacklogFullError,
)
from coalestra.core.freshness import (
    FreshnessPolicy,
    FreshnessPolicyProvider,
    FreshnessResolver,
    ObservationPolicy,
    PolicyResolver,
    RefreshMode,
)
from coalestra.core.health import (
    BUILDER_HEALTH_SCHEMA,
    BUILDER_HEALTH_SCHEMA_VERSION,
    BuilderHealth,
)
from coalestra.core.keys import (
    CASE_INSENSITIVE_KEY_NORMALIZER,
    LEGACY_KEY_NORMALIZER,
    PRESERVE_KEY_NORMALIZER,
    KeyNormalizer,
    QualifierInput,
    ResourceKey,
)
from coalestra.core.protocols import (
    AsyncCache,
    AtomicAsyncCache,
    AuthorityAwareCache,
    BatchAsyncCache,
    BatchAtomicAsyncCache,
    BatchSizedSource,
    BatchSnapshotSource,
    BlockingSourceTimeoutConfigured,
    ConcurrencyLimitedSource,
    DerivedSource,
    EventSink,
    MetricsSink,
    ResilienceConfiguredSource,
    SnapshotSource,
    Source,
    SourceBase,
)
from coalestra.core.records import (
    CacheLookup,
    CacheStats,
    CacheWriteResult,
    CacheWriteStatus,
    PublishResult,
    PublishStatus,
)
from coalestra.core.request import (
    SnapshotRequest,
)
from coalestra.core.snapshot import (
    Snapshot,
)
from coalestra.core.timeouts import (
    SourceTimeoutGuarantee,
    SourceTimeoutGuaranteeStatus,
    inspect_source_timeout_guarantee,
)
from coalestra.core.values import (
    ResourceUpdate,
    SnapshotValue,
    SourcePayload,
)

__all__ = [
    # keys
    "ResourceKey",
    "KeyNormalizer",
    "QualifierInput",
    "PRESERVE_KEY_NORMALIZER",
    "LEGACY_KEY_NORMALIZER",
    "CASE_INSENSITIVE_KEY_NORMALIZER",
    # values and snapshots
    "SourcePayload",
    "ResourceUpdate",
    "SnapshotValue",
    "Snapshot",
    "SnapshotDiagnostics",
    "FetchContext",
    # time and freshness
    "Clock",
    "SystemClock",
    "FreshnessPolicy",
    "FreshnessPolicyProvider",
    "FreshnessResolver",
    "ObservationPolicy",
    "PolicyResolver",
    "RefreshMode",
    # authority
    "AuthorityPolicyProvider",
    "AuthorityPolicyResolver",
    "AuthorityResolver",
    "SourceAuthorityPolicy",
    # requests and their policies
    "SnapshotRequest",
    "SnapshotConsistencyPolicy",
    "ResourceAcceptanceRule",
    "SnapshotAcceptancePolicy",
    "SnapshotAcceptanceReason",
    "SnapshotAcceptanceViolation",
    "SnapshotRequirement",
    # what caches and publishers answer
    "CacheLookup",
    "CacheStats",
    "CacheWriteResult",
    "CacheWriteStatus",
    "PublishResult",
    "PublishStatus",
    # protocols
    "AsyncCache",
    "AtomicAsyncCache",
    "AuthorityAwareCache",
    "BatchAsyncCache",
    "BatchAtomicAsyncCache",
    "BatchSizedSource",
    "BatchSnapshotSource",
    "BlockingSourceTimeoutConfigured",
    "ConcurrencyLimitedSource",
    "DerivedSource",
    "EventSink",
    "MetricsSink",
    "ResilienceConfiguredSource",
    "SnapshotSource",
    "Source",
    "SourceBase",
    # timeout declarations
    "SourceTimeoutGuarantee",
    "SourceTimeoutGuaranteeStatus",
    "inspect_source_timeout_guarantee",
    # errors and their reports
    "CoalestraError",
    "SourceUnavailableError",
    "SourceTimeoutError",
    "SnapshotDeadlineExceededError",
    "SourceQueueTimeoutError",
    "CircuitOpenError",
    "SourceProtocolError",
    "ResourceResolutionError",
    "DependencyCycleError",
    "DependencyResolutionError",
    "SnapshotBuildError",
    "SnapshotConsistencyError",
    "SnapshotAcceptanceError",
    "ResourceAcceptanceError",
    "SessionClosedError",
    "BuilderClosedError",
    "PayloadIsolationError",
    "PayloadCopySubsystemClosedError",
    "PayloadCopyShutdownTimeoutError",
    "ObservabilityShutdownTimeoutError",
    "SubmissionBacklogFullError",
    "CapabilityRequirementError",
    "ERROR_DIAGNOSTICS_SCHEMA",
    "ERROR_DIAGNOSTICS_SCHEMA_VERSION",
    "SourceFailure",
    "SerializedSourceFailure",
    "SerializedResourceError",
    "SerializedSnapshotBuildError",
    # health
    "BuilderHealth",
    "BUILDER_HEALTH_SCHEMA",
    "BUILDER_HEALTH_SCHEMA_VERSION",
    "BuilderHealthAssessment",
    "BuilderHealthAssessmentPolicy",
    "BuilderHealthFinding",
    "BuilderHealthReason",
    "BuilderHealthSeverity",
    "BUILDER_HEALTH_ASSESSMENT_SCHEMA",
    "BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION",
    "PayloadCopyHealth",
    # capabilities
    "CoalestraCapabilities",
    "capabilities",
    "require_capabilities",
    "COALESTRA_API_STABILITY",
    "COALESTRA_CAPABILITIES_SCHEMA",
    "COALESTRA_CAPABILITIES_SCHEMA_VERSION",
]
