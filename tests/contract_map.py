"""Where each numbered section of the behaviour contract is tested.

The titles are this project's own words for the sections. `tests/test_contract_map.py` keeps the
table whole: no section without files, no file that does not exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Section(NamedTuple):
    """What one section of the contract is about, and the test files that pin it down."""

    about: str
    files: tuple[str, ...]


SECTIONS: Mapping[int, Section] = {
    1: Section("keys: parts, order, equality, text form and normalizers", ("core/test_keys.py",)),
    2: Section("freshness policies, payloads, values with provenance, snapshots, clock skew", (
        "core/test_freshness.py", "core/test_values.py", "core/test_snapshot.py",
        "core/test_frozen.py", "core/test_clock.py", "orchestration/test_provenance.py",
    )),
    3: Section("sources: single, batch and derived, callable adapters, declared timeouts", (
        "core/test_protocols.py", "core/test_timeouts.py", "adapters/test_calls.py",
        "adapters/test_settings.py", "orchestration/test_sources.py",
        "orchestration/test_scheduling.py", "orchestration/test_settings.py",
    )),
    4: Section("how a key is resolved: cache, sources in turn, stale values, refreshes, flights", (
        "orchestration/test_resolving.py", "orchestration/test_absence.py",
        "orchestration/test_scheduling.py", "orchestration/test_warm_reads.py",
        "orchestration/test_coalescing.py", "orchestration/test_cache_truth.py",
        "orchestration/test_news.py", "orchestration/test_custom_caches.py", "cache/test_near.py",
    )),
    5: Section("sessions, requests, and revalidation of all or nothing", (
        "core/test_request.py", "orchestration/test_sessions.py", "orchestration/test_requests.py",
        "orchestration/test_revalidation.py",
    )),
    6: Section("consistency between observations, and acceptance of values", (
        "core/test_consistency.py", "core/test_acceptance.py", "orchestration/test_requests.py",
        "orchestration/test_revalidation.py",
    )),
    7: Section("caches: protocols, capabilities, write order, the memory cache", (
        "cache/test_memory.py", "cache/test_entries.py", "cache/test_write_order.py",
        "contracts/test_access_contract.py", "orchestration/test_custom_caches.py",
        "orchestration/test_cache_troubles.py",
    )),
    8: Section("publishing and invalidating, and whose word counts for more", (
        "core/test_authority.py", "cache/test_publisher.py",
        "contracts/test_publisher_contract.py", "orchestration/test_cache_truth.py",
    )),
    9: Section("capacity: limits over all and by source, leases, queue timeouts, workers", (
        "concurrency/test_capacity.py", "orchestration/test_capacity_in_builds.py",
        "orchestration/test_scheduling.py",
    )),
    10: Section("resilience: retries, circuits, and which policy goes first", (
        "resilience/test_backoff.py", "resilience/test_circuit.py",
        "resilience/test_circuit_breaker.py", "resilience/test_policies.py",
        "orchestration/test_resilience_in_builds.py", "orchestration/test_settlement.py",
        "orchestration/test_every_plug_may_fail.py", "orchestration/test_nested_use.py",
        "orchestration/test_leading.py", "orchestration/test_terms_and_ages.py",
    )),
    11: Section("deadlines: one instant that bounds every wait", (
        "concurrency/test_deadline.py", "concurrency/test_cut_off.py",
        "orchestration/test_deadlines_in_builds.py", "orchestration/test_finishing_late.py",
        "orchestration/test_leaving.py", "orchestration/test_sessions.py",
        "orchestration/test_revalidation.py", "orchestration/test_isolation_in_builds.py",
    )),
    12: Section("payload isolation: no two readers share what can be changed", (
        "concurrency/test_copying.py", "concurrency/test_copying_threads.py",
        "properties/test_copying_exactness.py", "orchestration/test_isolation_in_builds.py",
    )),
    13: Section("counters, observations, events, buffers in front of sinks, diagnostics", (
        "core/test_diagnostics.py", "core/test_trace.py", "core/test_trace_in_a_browser.py",
        "properties/test_traces.py", "orchestration/test_observability_in_builds.py",
        "orchestration/test_tracing.py", "orchestration/test_texts.py",
        "orchestration/test_bounds.py", "observability/test_reporter.py",
        "observability/test_buffered_sinks.py", "observability/test_buffering.py",
        "concurrency/test_lockfree.py", "observability/test_metrics.py",
        "observability/test_events.py", "observability/test_changes.py",
        "orchestration/test_logged_changes.py",
    )),
    14: Section("errors: the tree, their texts, and their form as data", (
        "core/test_errors.py", "core/test_failures.py",
    )),
    15: Section("health, its form as data, and its assessment", (
        "core/test_health.py", "core/test_assessment.py", "core/test_serialization.py",
        "orchestration/test_health_in_builds.py",
    )),
    16: Section("the blocking facade over a loop in a thread", (
        "sync/test_builder.py", "sync/test_publisher.py", "sync/test_backlog.py",
        "sync/test_closing.py", "sync/test_loop_thread.py", "sync/test_strikes.py",
    )),
    17: Section("capabilities that applications can ask for", ("core/test_capabilities.py",)),
    18: Section("closing a builder and what it manages", (
        "orchestration/test_lifecycle.py", "orchestration/test_closing.py",
        "orchestration/test_leaving.py",
    )),
    19: Section("attributes that applications read", ("orchestration/test_settings.py",)),
}  # fmt: skip
