"""Consistent, immutable snapshots of many resources, for one unit of work at a time."""

from __future__ import annotations

from coalestra._version import __version__
from coalestra.adapters.batch import CallableBatchSource
from coalestra.adapters.derived import CallableDerivedSource
from coalestra.adapters.single import CallableSource
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.publisher import ResourcePublisher
from coalestra.concurrency.capacity import CapacityController, CapacityLimiter, CapacitySnapshot
from coalestra.concurrency.isolation import PayloadCopier, PayloadIsolator, deepcopy_payload
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
from coalestra.core.consistency import SnapshotConsistencyPolicy
from coalestra.core.context import FetchContext
from coalestra.core.copy_health import PayloadCopyHealth
from coalestra.core.diagnostics import SnapshotDiagnostics
from coalestra.core.errors_operation import (
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
from coalestra.core.freshness import (
    FreshnessPolicy,
    FreshnessPolicyProvider,
    ObservationPolicy,
    PolicyResolver,
    RefreshMode,
)
from coalestra.core.health import (
    BUILDER_HEALTH_SCHEMA,
    BUILDER_HEALTH_SCHEMA_VERSION,
    BuilderHealth,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.normalizers import (
    CASE_INSENSITIVE_KEY_NORMALIZER,
    LEGACY_KEY_NORMALIZER,
    PRESERVE_KEY_NORMALIZER,
    KeyNormalizer,
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
    ResilienceConfiguredSource,
    SnapshotSource,
)
from coalestra.core.records import (
    CacheLookup,
    CacheStats,
    CacheWriteResult,
    CacheWriteStatus,
    PublishResult,
    PublishStatus,
)
from coalestra.core.request import SnapshotRequest
from coalestra.core.snapshot import Snapshot
from coalestra.core.timeouts import (
    SourceTimeoutGuarantee,
    SourceTimeoutGuaranteeStatus,
    inspect_source_timeout_guarantee,
)
from coalestra.core.values import ResourceUpdate, SnapshotValue, SourcePayload
from coalestra.observability.backlog import BufferedSinkStats, BufferOverflowPolicy
from coalestra.observability.buffered import BufferedEventSink, BufferedMetricsSink
from coalestra.observability.events import EventRecord, LoggingEventSink, NullEventSink
from coalestra.observability.metrics import InMemoryMetrics, MetricRecord, NullMetrics
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.session import SnapshotSession
from coalestra.resilience.backoff import RetryPolicy
from coalestra.resilience.circuit import (
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    CircuitSnapshot,
    CircuitState,
)
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver, SourceResiliencePolicy
from coalestra.sync.builder import SyncSnapshotBuilder
from coalestra.sync.publisher import SyncResourcePublisher
from coalestra.sync.session import SyncSnapshotSession

__all__ = [
    "AsyncCache",
    "AsyncMemoryCache",
    "AtomicAsyncCache",
    "AuthorityAwareCache",
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
    "__version__",
    "capabilities",
    "deepcopy_payload",
    "inspect_source_timeout_guarantee",
    "require_capabilities",
]
