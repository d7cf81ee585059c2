"""Data and pure rules: nothing in here waits, locks, or asks what time it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
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
    from coalestra.core.cache_stats import CacheStats
    from coalestra.core.capability import (
        COALESTRA_API_STABILITY,
        COALESTRA_CAPABILITIES_SCHEMA,
        COALESTRA_CAPABILITIES_SCHEMA_VERSION,
        CoalestraCapabilities,
        capabilities,
        require_capabilities,
    )
    from coalestra.core.clock import Clock, SystemClock
    from coalestra.core.consistency import SnapshotConsistencyPolicy
    from coalestra.core.context import FetchContext
    from coalestra.core.copy_health import PayloadCopyHealth
    from coalestra.core.diagnostics import SnapshotDiagnostics
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
    from coalestra.core.keys import QualifierInput, ResourceKey
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
        EventSink,
        MetricsSink,
        ResilienceConfiguredSource,
        SnapshotSource,
        Source,
        SourceBase,
    )
    from coalestra.core.published import PublishResult, PublishStatus
    from coalestra.core.records import (
        CacheLookup,
        CacheWriteResult,
        CacheWriteStatus,
    )
    from coalestra.core.request import SnapshotRequest
    from coalestra.core.snapshot import Snapshot
    from coalestra.core.timeouts import (
        SourceTimeoutGuarantee,
        SourceTimeoutGuaranteeStatus,
        inspect_source_timeout_guarantee,
    )
    from coalestra.core.values import ResourceUpdate, SnapshotValue, SourcePayload
else:
    _HOMES = {
        "acceptance": (
            "ResourceAcceptanceRule", "SnapshotAcceptancePolicy", "SnapshotAcceptanceReason",
            "SnapshotAcceptanceViolation", "SnapshotRequirement",
        ),
        "assessment": (
            "BuilderHealthAssessment", "BuilderHealthAssessmentPolicy", "BuilderHealthFinding",
            "BuilderHealthReason", "BuilderHealthSeverity", "BUILDER_HEALTH_ASSESSMENT_SCHEMA",
            "BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION",
        ),
        "authority": (
            "AuthorityPolicyProvider", "AuthorityPolicyResolver", "AuthorityResolver",
            "SourceAuthorityPolicy",
        ),
        "cache_stats": ("CacheStats",),
        "capability": (
            "CoalestraCapabilities", "capabilities", "require_capabilities",
            "COALESTRA_API_STABILITY", "COALESTRA_CAPABILITIES_SCHEMA",
            "COALESTRA_CAPABILITIES_SCHEMA_VERSION",
        ),
        "clock": ("Clock", "SystemClock"),
        "consistency": ("SnapshotConsistencyPolicy",),
        "context": ("FetchContext",),
        "copy_health": ("PayloadCopyHealth",),
        "diagnostics": ("SnapshotDiagnostics",),
        "errors_operation": (
            "SessionClosedError", "BuilderClosedError", "PayloadIsolationError",
            "PayloadCopySubsystemClosedError", "PayloadCopyShutdownTimeoutError",
            "ObservabilityShutdownTimeoutError", "SubmissionBacklogFullError",
            "CapabilityRequirementError",
        ),
        "errors_root": ("CoalestraError",),
        "errors_snapshot": (
            "SnapshotBuildError", "SnapshotConsistencyError", "SnapshotAcceptanceError",
            "ResourceAcceptanceError",
        ),
        "errors_source": (
            "SourceUnavailableError", "SourceTimeoutError", "SnapshotDeadlineExceededError",
            "SourceQueueTimeoutError", "CircuitOpenError", "SourceProtocolError",
            "ResourceResolutionError", "DependencyCycleError", "DependencyResolutionError",
        ),
        "failures": (
            "ERROR_DIAGNOSTICS_SCHEMA", "ERROR_DIAGNOSTICS_SCHEMA_VERSION", "SourceFailure",
            "SerializedSourceFailure", "SerializedResourceError", "SerializedSnapshotBuildError",
        ),
        "freshness": (
            "FreshnessPolicy", "FreshnessPolicyProvider", "FreshnessResolver",
            "ObservationPolicy", "PolicyResolver", "RefreshMode",
        ),
        "health": ("BuilderHealth", "BUILDER_HEALTH_SCHEMA", "BUILDER_HEALTH_SCHEMA_VERSION"),
        "keys": ("ResourceKey", "QualifierInput"),
        "normalizers": (
            "KeyNormalizer", "PRESERVE_KEY_NORMALIZER", "LEGACY_KEY_NORMALIZER",
            "CASE_INSENSITIVE_KEY_NORMALIZER",
        ),
        "protocols": (
            "AsyncCache", "AtomicAsyncCache", "AuthorityAwareCache", "BatchAsyncCache",
            "BatchAtomicAsyncCache", "BatchSizedSource", "BatchSnapshotSource",
            "BlockingSourceTimeoutConfigured", "ConcurrencyLimitedSource", "DerivedSource",
            "EventSink", "MetricsSink", "ResilienceConfiguredSource", "SnapshotSource", "Source",
            "SourceBase",
        ),
        "published": ("PublishResult", "PublishStatus"),
        "records": (
            "CacheLookup", "CacheWriteResult", "CacheWriteStatus",
        ),
        "request": ("SnapshotRequest",),
        "snapshot": ("Snapshot",),
        "timeouts": (
            "SourceTimeoutGuarantee", "SourceTimeoutGuaranteeStatus",
            "inspect_source_timeout_guarantee",
        ),
        "values": ("SourcePayload", "ResourceUpdate", "SnapshotValue"),
    }  # fmt: skip
    __getattr__, __dir__ = _names(__name__, _HOMES)

__all__ = [
    # keys
    "ResourceKey", "KeyNormalizer", "QualifierInput", "PRESERVE_KEY_NORMALIZER",
    "LEGACY_KEY_NORMALIZER", "CASE_INSENSITIVE_KEY_NORMALIZER",
    # values and snapshots
    "SourcePayload", "ResourceUpdate", "SnapshotValue", "Snapshot", "SnapshotDiagnostics",
    "FetchContext",
    # time and freshness
    "Clock", "SystemClock", "FreshnessPolicy", "FreshnessPolicyProvider", "FreshnessResolver",
    "ObservationPolicy", "PolicyResolver", "RefreshMode",
    # authority
    "AuthorityPolicyProvider", "AuthorityPolicyResolver", "AuthorityResolver",
    "SourceAuthorityPolicy",
    # requests and their policies
    "SnapshotRequest", "SnapshotConsistencyPolicy", "ResourceAcceptanceRule",
    "SnapshotAcceptancePolicy", "SnapshotAcceptanceReason", "SnapshotAcceptanceViolation",
    "SnapshotRequirement",
    # what caches and publishers answer
    "CacheLookup", "CacheStats", "CacheWriteResult", "CacheWriteStatus", "PublishResult",
    "PublishStatus",
    # protocols
    "AsyncCache", "AtomicAsyncCache", "AuthorityAwareCache", "BatchAsyncCache",
    "BatchAtomicAsyncCache", "BatchSizedSource", "BatchSnapshotSource",
    "BlockingSourceTimeoutConfigured", "ConcurrencyLimitedSource", "DerivedSource", "EventSink",
    "MetricsSink", "ResilienceConfiguredSource", "SnapshotSource", "Source", "SourceBase",
    # timeout declarations
    "SourceTimeoutGuarantee", "SourceTimeoutGuaranteeStatus", "inspect_source_timeout_guarantee",
    # errors and their reports
    "CoalestraError", "SourceUnavailableError", "SourceTimeoutError",
    "SnapshotDeadlineExceededError", "SourceQueueTimeoutError", "CircuitOpenError",
    "SourceProtocolError", "ResourceResolutionError", "DependencyCycleError",
    "DependencyResolutionError", "SnapshotBuildError", "SnapshotConsistencyError",
    "SnapshotAcceptanceError", "ResourceAcceptanceError", "SessionClosedError",
    "BuilderClosedError", "PayloadIsolationError", "PayloadCopySubsystemClosedError",
    "PayloadCopyShutdownTimeoutError", "ObservabilityShutdownTimeoutError",
    "SubmissionBacklogFullError", "CapabilityRequirementError", "ERROR_DIAGNOSTICS_SCHEMA",
    "ERROR_DIAGNOSTICS_SCHEMA_VERSION", "SourceFailure", "SerializedSourceFailure",
    "SerializedResourceError", "SerializedSnapshotBuildError",
    # health
    "BuilderHealth", "BUILDER_HEALTH_SCHEMA", "BUILDER_HEALTH_SCHEMA_VERSION",
    "BuilderHealthAssessment", "BuilderHealthAssessmentPolicy", "BuilderHealthFinding",
    "BuilderHealthReason", "BuilderHealthSeverity", "BUILDER_HEALTH_ASSESSMENT_SCHEMA",
    "BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION", "PayloadCopyHealth",
    # capabilities
    "CoalestraCapabilities", "capabilities", "require_capabilities", "COALESTRA_API_STABILITY",
    "COALESTRA_CAPABILITIES_SCHEMA", "COALESTRA_CAPABILITIES_SCHEMA_VERSION",
]  # fmt: skip
