"""Collecting a builder's health: state only, without asking any source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from coalestra.core.copy_health import PayloadCopyHealth
from coalestra.core.health import BuilderHealth
from coalestra.observability.buffering import ObservabilitySinks
from coalestra.orchestration.chains import timeout_guarantees
from coalestra.orchestration.engine import Engine


async def collect_health(
    engine: Engine,
    sinks: ObservabilitySinks,
    copies: Mapping[str, PayloadCopyHealth],
    unfinished: Mapping[str, int],
) -> BuilderHealth:
    """Return the health of the builder that `engine` belongs to."""
    equipment = engine.equipment
    capacity = await equipment.capacity.snapshot()
    guarantees = timeout_guarantees(equipment.chains.links)
    counters = equipment.counters
    violations = dict(counters.transport_violations)
    return BuilderHealth(
        closed=engine.closed,
        background_refreshes=engine.refresher.active,
        singleflight_in_flight=len(engine.scheduler.board.flights),
        source_support_cache_entries=equipment.chains.entries,
        capacity=capacity,
        cache=await _cache_stats(equipment.access.cache),
        circuits=await equipment.breaker.snapshot(),
        active_dispatch_workers=sum(not task.done() for task in engine.scheduler.dispatch.workers),
        waiting_for_capacity=sum(each.waiting for each in capacity.values()),
        queue_timeout_count=counters.queue_timeouts,
        source_timeout_count=counters.source_timeouts,
        deadline_exceeded_count=counters.deadlines_exceeded,
        revalidation_attempt_count=counters.revalidation_attempts,
        revalidation_failure_count=counters.revalidation_failures,
        source_timeout_guarantees=guarantees,
        blocking_source_count=sum(each.blocking_io for each in guarantees.values()),
        protected_blocking_source_count=sum(each.protected for each in guarantees.values()),
        unsafe_blocking_source_count=sum(each.unsafe for each in guarantees.values()),
        undeclared_source_timeout_count=sum(
            not each.declaration_present for each in guarantees.values()
        ),
        source_transport_timeout_violation_count=sum(violations.values()),
        source_transport_timeout_violations=violations,
        **_copy_facts(copies),
        unfinished_source_calls=unfinished,
        **_observability_facts(sinks, 0 if equipment.report is None else equipment.report.failures),
    )


async def _cache_stats(cache: Any) -> Any | None:
    """Return what the cache says of itself, or None if it says nothing."""
    stats = getattr(cache, "stats", None)
    if not inspect.iscoroutinefunction(stats):
        return None
    try:
        return await stats()
    except Exception:
        return None


def _copy_facts(components: Mapping[str, PayloadCopyHealth]) -> dict[str, Any]:
    each = components.values()
    return {
        "payload_copy_components": components,
        "active_payload_copies": sum(one.active_copies for one in each),
        "waiting_for_copy_capacity": sum(one.waiting_for_capacity for one in each),
        "payload_copy_started_count": sum(one.started_count for one in each),
        "payload_copy_completed_count": sum(one.completed_count for one in each),
        "payload_copy_failure_count": sum(one.failure_count for one in each),
        "payload_copy_timeout_count": sum(one.timeout_count for one in each),
        "payload_copy_capacity_timeout_count": sum(one.capacity_timeout_count for one in each),
        "payload_copy_shutdown_incomplete": any(one.shutdown_incomplete for one in each),
        "payload_copy_shutdown_timeout_count": sum(one.shutdown_timeout_count for one in each),
        "payload_copy_active_at_last_shutdown_timeout": sum(
            one.active_at_last_shutdown_timeout for one in each
        ),
    }


def _observability_facts(sinks: ObservabilitySinks, unbuffered: int) -> dict[str, Any]:
    buffers = sinks.stats()
    each = buffers.values()
    return {
        "observability_buffers": buffers,
        "observability_pending": sum(one.pending for one in each),
        "observability_peak_pending": sum(one.peak_pending for one in each),
        "observability_dropped_count": sum(one.dropped for one in each),
        "observability_failure_count": sum(one.failures for one in each) + unbuffered,
        "observability_shutdown_incomplete": any(
            one.closed and one.worker_alive and one.shutdown_timeout_count for one in each
        ),
        "observability_shutdown_timeout_count": sum(one.shutdown_timeout_count for one in each),
    }
