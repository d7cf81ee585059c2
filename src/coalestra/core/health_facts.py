"""The facts of a builder's health, before anybody judges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coalestra.core.copy_health import PayloadCopyHealth
from coalestra.core.frozen import FrozenDict
from coalestra.core.timeouts import SourceTimeoutGuarantee

_MAPPINGS = (
    "capacity",
    "circuits",
    "source_timeout_guarantees",
    "source_transport_timeout_violations",
    "payload_copy_components",
    "observability_buffers",
    "unfinished_source_calls",
)


@dataclass(frozen=True)
class HealthFacts:
    """The state of a builder at one moment, and its counters since it was made.

    No resource is named: what is kept by name is kept by source, limiter, circuit or component.

    Attributes:
        closed: whether the builder is closed.
        background_refreshes: refreshes under way.
        singleflight_in_flight: acquisitions that others may join.
        source_support_cache_entries: remembered answers of ``supports``.
        capacity: each limiter's ``limit``, ``in_use`` and ``waiting``, by source or ``__global__``.
        cache: the statistics of the cache, if it has any.
        circuits: the state of each circuit that is not at rest, by its identity.
        active_dispatch_workers: workers that hand keys to sources.
        waiting_for_capacity: source calls waiting for a slot.
        queue_timeout_count: waits for a slot that took too long.
        source_timeout_count: calls that took too long.
        deadline_exceeded_count: keys that failed by a deadline.
        revalidation_attempt_count, revalidation_failure_count: revalidations of sessions.
        source_timeout_guarantees: what each source declares about blocking, by its name.
        blocking_source_count, protected_blocking_source_count, unsafe_blocking_source_count,
        undeclared_source_timeout_count: how many sources declare what.
        source_transport_timeout_violation_count: calls that outlasted their declared transport
            timeout.
        source_transport_timeout_violations: the same by name of source.
        pending_submissions, max_pending_submissions: the backlog of the synchronous publisher and
            its limit; None where there is no such publisher.
        payload_copy_components: the copies of each component.
        active_payload_copies, waiting_for_copy_capacity, payload_copy_started_count,
        payload_copy_completed_count, payload_copy_failure_count, payload_copy_timeout_count,
        payload_copy_capacity_timeout_count, payload_copy_shutdown_incomplete,
        payload_copy_shutdown_timeout_count, payload_copy_active_at_last_shutdown_timeout: the sums
            over these components.
        observability_buffers: the statistics of each buffered sink, by component.
        observability_pending, observability_peak_pending, observability_dropped_count,
        observability_failure_count, observability_shutdown_incomplete,
        observability_shutdown_timeout_count: the sums over these buffers.
        unfinished_source_calls: calls that outlived the closing of the builder, by source.
    """

    closed: bool
    background_refreshes: int
    singleflight_in_flight: int
    source_support_cache_entries: int
    capacity: Mapping[str, Any] = field(default_factory=FrozenDict)
    cache: Any | None = None
    circuits: Mapping[Any, Any] = field(default_factory=FrozenDict)
    active_dispatch_workers: int = 0
    waiting_for_capacity: int = 0
    queue_timeout_count: int = 0
    source_timeout_count: int = 0
    deadline_exceeded_count: int = 0
    revalidation_attempt_count: int = 0
    revalidation_failure_count: int = 0
    source_timeout_guarantees: Mapping[str, SourceTimeoutGuarantee] = field(
        default_factory=FrozenDict
    )
    blocking_source_count: int = 0
    protected_blocking_source_count: int = 0
    unsafe_blocking_source_count: int = 0
    undeclared_source_timeout_count: int = 0
    source_transport_timeout_violation_count: int = 0
    source_transport_timeout_violations: Mapping[str, int] = field(default_factory=FrozenDict)
    pending_submissions: int = 0
    max_pending_submissions: int | None = None
    payload_copy_components: Mapping[str, PayloadCopyHealth] = field(default_factory=FrozenDict)
    active_payload_copies: int = 0
    waiting_for_copy_capacity: int = 0
    payload_copy_started_count: int = 0
    payload_copy_completed_count: int = 0
    payload_copy_failure_count: int = 0
    payload_copy_timeout_count: int = 0
    payload_copy_capacity_timeout_count: int = 0
    payload_copy_shutdown_incomplete: bool = False
    payload_copy_shutdown_timeout_count: int = 0
    payload_copy_active_at_last_shutdown_timeout: int = 0
    observability_buffers: Mapping[str, Any] = field(default_factory=FrozenDict)
    observability_pending: int = 0
    observability_peak_pending: int = 0
    observability_dropped_count: int = 0
    observability_failure_count: int = 0
    observability_shutdown_incomplete: bool = False
    observability_shutdown_timeout_count: int = 0
    unfinished_source_calls: Mapping[str, int] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        for name in _MAPPINGS:
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
