"""What exporters of metrics share: what the library counts, and builders that are watched.

A watched builder is not kept alive, nor does one that fails to tell its health take others with it.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from coalestra._endings import pass_on
from coalestra.core.health import BuilderHealth, BuilderHealthSeverity
from coalestra.core.request import SnapshotAcceptanceReason
from coalestra.core.validation import readable
from coalestra.core.values import CacheStats, PublishStatus
from coalestra.observability import ChangeLog
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.resilience import CircuitSnapshot
from coalestra.sync import SyncSnapshotBuilder

Builder = SnapshotBuilder | SyncSnapshotBuilder

Labels = Mapping[str, str]
"""The labels of a metric, each with the values it has; none where an application chooses them."""

Metrics = Mapping[str, tuple[str, str, str, Labels]]
"""By the library's name of a metric its semantic name, its unit, what it tells, and its labels."""

_KIND: Labels = {"resource_namespace": "", "resource_name": ""}
_SUCCESS: Labels = {"status": "success error"}
_SOURCE: Labels = {"source": ""}
COUNTERS: Final[Metrics] = {
    "snapshot_build_total": ("snapshot.builds", "{build}", "Builds", _SUCCESS),
    "snapshot_session_resolve_total": (
        "session.resolutions", "{stage}", "Stages of sessions", _SUCCESS),
    "snapshot_session_revalidate_total": (
        "session.revalidations", "{revalidation}", "Revalidations of sessions", _SUCCESS),
    "snapshot_acceptance_total": (
        "acceptance.checks", "{snapshot}", "Snapshots judged by an acceptance policy", _SUCCESS),
    "snapshot_acceptance_violation_total": (
        "acceptance.violations", "{violation}", "Violations of acceptance policies",
        {"reason": " ".join(SnapshotAcceptanceReason)}),
    "snapshot_consistency_total": (
        "consistency.checks", "{snapshot}", "Snapshots judged by a consistency policy",
        {**_SUCCESS, "rule": "observation_skew"}),
    "cache_access_total": (
        "cache.lookups", "{key}", "Looks into the cache",
        {**_KIND, "status":
         "fresh stale_while_revalidate miss stale_fallback revalidation_bypass absent"}),
    "cache_failure_total": (
        "cache.failures", "{failure}", "Errors of a cache", {"operation": "read write"}),
    "singleflight_join_total": (
        "flight.joins", "{key}", "Readers who joined a call under way", _KIND),
    "source_fetch_total": (
        "source.keys", "{key}", "Keys asked of a source",
        {**_SOURCE, "status": "success failure stale invalid_timestamp circuit_open absent"}),
    "source_batch_call_total": (
        "source.batch.calls", "{call}", "Batch calls",
        {**_SOURCE, "status": "success failure deadline_exceeded queue_timeout"}),
    "source_capacity_timeout_total": (
        "source.capacity.timeouts", "{call}", "Calls that got no slot",
        {**_SOURCE, "reason": "queue_timeout snapshot_deadline"}),
    "source_transport_budget_rejection_total": (
        "source.transport.rejections", "{call}",
        "Blocking calls not begun, as too little time was left",
        {**_SOURCE, "reason": "snapshot_deadline source_timeout"}),
    "source_transport_timeout_violation_total": (
        "source.transport.violations", "{call}", "Blocking calls that outlasted their declaration",
        {**_SOURCE, "outcome": "completed_late failed_late coalestra_timeout"}),
    "resource_publish_total": (
        "resource.publications", "{value}", "Published values",
        {**_KIND, **_SOURCE, "status": " ".join(PublishStatus)}),
    "resource_invalidation_total": (
        "resource.invalidations", "{key}", "Invalidated keys", _KIND),
    "resource_refresh_total": (
        "resource.refreshes", "{refresh}", "Refreshes in the background",
        {**_KIND, "status": "scheduled success failure cancelled absent"}),
    "payload_copy_deadline_total": (
        "payload.copy.timeouts", "{copy}", "Deadlines that struck during a copy", {"phase": ""}),
}  # fmt: skip
OBSERVATIONS: Final[Metrics] = {
    "snapshot_build_latency_ms": (
        "snapshot.build.duration", "s", "How long builds took, in seconds", _SUCCESS),
    "snapshot_session_resolve_latency_ms": (
        "session.resolution.duration", "s", "How long stages of sessions took, in seconds",
        _SUCCESS),
    "source_fetch_latency_ms": (
        "source.fetch.duration", "s",
        "How long calls to sources took, each retry anew, in seconds", _SOURCE),
    "source_capacity_wait_ms": (
        "source.capacity.wait_time", "s", "Waits of calls for a slot, in seconds", _SOURCE),
    "source_batch_size": ("source.batch.size", "{key}", "Keys in one batch call", _SOURCE),
}  # fmt: skip


# Builders, and what is read of their health ------------------------------------------------------

Figures = Iterable[tuple[tuple[str, ...], float | None]]
"""The figure of each series by the values of its labels; None for what is not known."""
Read = Callable[[BuilderHealth], Figures]


Merged = Literal["livesum", "livemax", "max"]


class Fact(NamedTuple):
    """One figure of health; a counter if its name ends in ``_total``.

    ``merged`` says which figure of several processes is shown of a gauge: the sum over those that
    live (``livesum``), their greatest (``livemax``), or the greatest there ever was (``max``).
    """

    name: str
    description: str
    read: Read
    labels: tuple[str, ...]
    merged: Merged

    @property
    def counts(self) -> bool:
        """Whether this is a counter."""
        return self.name.endswith("_total")


Reading = Mapping[str, Sequence[tuple[tuple[str, ...], float]]]
"""The figures of each fact by the values of its labels, the builder's name first."""


class Watched:
    """Builders by name, held weakly; one that is closed or gone drops out.

    Attributes:
        changes: logs what begins to fail, and that it works again.
    """

    def __init__(self) -> None:
        self._held: dict[str, weakref.ref[Builder]] = {}
        self.changes: ChangeLog = ChangeLog()

    def add(self, name: str, builder: Builder) -> None:
        """Watch one more, in the place of an earlier one of this name."""
        self._held[name] = weakref.ref(builder)

    def open(self) -> dict[str, Builder]:
        """Return those that are open, and forget the others."""
        found = {}
        for name, reference in self._held.copy().items():
            builder = reference()
            if builder is not None and not builder.closed:
                found[name] = builder
            elif self._held.get(name) is reference:
                del self._held[name]
        return found

    def read(self, facts: Collection[Fact]) -> Reading:
        """Return what they tell of some facts; of one that fails to only that it is not up."""
        reading: dict[str, list[tuple[tuple[str, ...], float]]] = {each.name: [] for each in facts}
        for name, builder in self.open().items():
            subject = f"reading the health of builder {name!r}"
            try:
                health = builder.health_snapshot_nowait()
                found = [(fact.name, [*fact.read(health)]) for fact in facts]
            except BaseException as error:
                self.changes.failed(subject, error)
                found = [(UP.name, [((), 0)])] if UP in facts else []
                if threading.current_thread() is threading.main_thread():
                    pass_on(error)  # to an exporter's thread it would be the end
            else:
                self.changes.works(subject)
            for about, figures in found:
                known = [(labels, figure) for labels, figure in figures if figure is not None]
                reading[about] += [((name, *map(readable, each)), figure) for each, figure in known]
        return reading


_NAMED_BY: Final = {
    "capacity": "limiter",
    "sources": "source",
    "payload_copy_components": "component",
    "observability_buffers": "sink",
}
"""What the health of a builder keeps by name, and by the name of what."""


def fact(
    name: str, description: str, figure: str | Read, *labels: str, merged: Merged = "livesum"
) -> Fact:
    """Return a fact of a figure of the builder, or of each of what it keeps by name."""
    if not isinstance(figure, str):
        return Fact(name, description, figure, labels, merged)
    mapping, _, attribute = figure.rpartition(".")
    if mapping:
        return Fact(name, description, _each(mapping, attribute), (_NAMED_BY[mapping],), merged)
    return Fact(name, description, lambda h: [((), getattr(h, attribute))], (), merged)


def _each(mapping: str, attribute: str) -> Read:
    return lambda health: [
        ((name,), getattr(found, attribute)) for name, found in getattr(health, mapping).items()
    ]


def _of_cache(**attributes: str) -> Read:
    """Return how to read figures of the memory cache: by label, or by none, the attribute."""
    return lambda health: [
        ((label,) if label else (), getattr(health.cache, name))
        for label, name in attributes.items()
        if isinstance(health.cache, CacheStats)
    ]


def _backlog(health: BuilderHealth) -> Figures:
    """Return the submissions under way; None of a builder that takes none."""
    return [((), None if health.max_pending_submissions is None else health.pending_submissions)]


def _troubled_circuits(health: BuilderHealth) -> Figures:
    counts = {(source, state): 0 for source in health.sources for state in ("half_open", "open")}
    for identity, circuit in health.circuits.items():
        if (series := (identity.source, circuit.state.value)) in counts:
            counts[series] += circuit.count
    return counts.items()


def _worst_circuit(figure: Callable[[CircuitSnapshot], int]) -> Read:
    """Return how to read the greatest figure of a circuit of each source; 0 at rest."""

    def read(health: BuilderHealth) -> Figures:
        greatest = dict.fromkeys(health.sources, 0)
        for identity, circuit in health.circuits.items():
            known = greatest.get(identity.source, 0)
            greatest[identity.source] = max(known, figure(circuit))
        return [((source,), most) for source, most in greatest.items()]

    return read


def _moment(attribute: str) -> Read:
    """Return how to read when something last happened to each source, in wall seconds."""
    return lambda health: [
        (labels, None if ago is None else round(time.time() - ago, 3))
        for labels, ago in _each("sources", attribute)(health)
    ]


_STATES = ("closed", "half_open", "open")
UP: Final = fact(
    "builder_up", "1 for a builder that is open; 0 if its health fails", lambda _: [((), 1)]
)
FACTS: Final[Mapping[str, Fact]] = {each.name: each for each in (
    UP,
    fact("builder_severity", "What its health comes to now: 0 healthy, 1 degraded, 2 critical",
         lambda health: [((), list(BuilderHealthSeverity).index(health.assess().severity))],
         merged="livemax"),
    fact("keys_in_flight", "Keys being acquired", "singleflight_in_flight"),
    fact("background_refreshes", "Background refreshes under way", "background_refreshes"),
    fact("failing_refreshes", "Keys whose last background refresh failed", "failing_refreshes"),
    fact("dispatch_workers", "Workers that call sources", "active_dispatch_workers"),
    fact("capacity_limit", "Slots of a source, or of all together (__global__)", "capacity.limit"),
    fact("capacity_in_use", "Slots that are taken", "capacity.in_use"),
    fact("capacity_waiting", "Calls waiting for a slot", "capacity.waiting"),
    fact("queue_timeouts_total", "Waits for a slot that were too long", "queue_timeout_count"),
    fact("source_timeouts_total", "Calls that took too long", "source_timeout_count"),
    fact("deadlines_exceeded_total", "Builds, stages and calls that ran out of time",
         "deadline_exceeded_count"),
    fact("cache_entries", "Entries of the memory cache", _of_cache(**{"": "size"})),
    fact("cache_max_entries", "Entries that the memory cache may have",
         _of_cache(**{"": "max_entries"})),
    fact("cache_lookups_total", "Answers of the memory cache",
         _of_cache(fresh="fresh_hits", stale="stale_hits", miss="misses"), "result"),
    fact("cache_changes_total", "Changes of the memory cache",
         _of_cache(set="sets", invalidation="invalidations", eviction="evictions",
                   expiration="expirations"), "change"),
    fact("cache_left_alone", "1 if a cache failed too often to be asked", "cache_left_alone"),
    fact("cache_calls_total", "Calls to a cache that is awaited", "cache_call_count"),
    fact("cache_call_failures_total", "Calls to such a cache that failed", "cache_failure_count"),
    fact("cache_call_timeouts_total", "Calls to it that took too long", "cache_timeout_count"),
    fact("source_circuit_state",
         "The worst state of circuits of a source: 0 closed, 1 half-open, 2 open",
         _worst_circuit(lambda circuit: _STATES.index(circuit.state.value)), "source",
         merged="livemax"),
    fact("source_circuits", "Circuits of a source by state", _troubled_circuits,
         "source", "state"),
    fact("source_consecutive_failures", "Failures of a source in a row, the most of its circuits",
         _worst_circuit(lambda circuit: circuit.failures), "source", merged="livemax"),
    fact("source_consecutive_deadline_cuts",
         "Calls to a source in a row that readers' deadlines made useless",
         "sources.deadline_cuts_in_a_row", merged="livemax"),
    fact("source_attempts_total", "Calls to a source that are over, retries included",
         "sources.attempt_count"),
    fact("source_failed_attempts_total", "Calls to a source that failed, retries included",
         "sources.failed_attempt_count"),
    fact("source_last_success_timestamp_seconds", "When a source last answered",
         _moment("seconds_since_success"), "source", merged="max"),
    fact("source_last_error_timestamp_seconds", "When a call to a source last failed",
         _moment("seconds_since_error"), "source", merged="max"),
    fact("payload_copies_in_progress", "Payloads being copied in threads",
         "payload_copy_components.active_copies"),
    fact("payload_copies_waiting", "Payloads waiting for a thread",
         "payload_copy_components.waiting_for_capacity"),
    fact("payload_copy_failures_total", "Copies that failed",
         "payload_copy_components.failure_count"),
    fact("pending_submissions", "Submissions of a threaded builder that are not settled", _backlog),
    fact("max_pending_submissions", "Submissions that may wait", "max_pending_submissions"),
    fact("observability_pending", "Records waiting for a sink", "observability_buffers.pending"),
    fact("observability_max_pending", "Records that may wait for a sink",
         "observability_buffers.max_pending"),
    fact("observability_dropped_total", "Records for a sink that found no room",
         "observability_buffers.dropped"),
    fact("observability_failures_total", "Reports that a sink failed to take",
         "observability_failure_count"),
)}  # fmt: skip
"""What exporters show of the health of a builder, by name."""
