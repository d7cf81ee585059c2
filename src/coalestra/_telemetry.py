"""What exporters of metrics share: what the library counts, and builders that are watched.

A watched builder is not kept alive, nor does one that fails to tell its health take others with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, TypeVar

from coalestra.core.health import BuilderHealth, BuilderHealthSeverity
from coalestra.core.results import CacheStats
from coalestra.observability.changes import ChangeLog
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.sync import SyncSnapshotBuilder

Builder = SnapshotBuilder | SyncSnapshotBuilder
T = TypeVar("T")

# What the library counts and observes ------------------------------------------------------------

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
        "session.resolutions", "{stage}", "Stages of sessions", _SUCCESS,
    ),
    "snapshot_session_revalidate_total": (
        "session.revalidations", "{revalidation}", "Revalidations of sessions", _SUCCESS,
    ),
    "snapshot_acceptance_total": (
        "acceptance.checks", "{snapshot}", "Snapshots judged by an acceptance policy", _SUCCESS,
    ),
    "snapshot_acceptance_violation_total": (
        "acceptance.violations", "{violation}", "Violations of acceptance policies",
        {"reason": "too_old stale insufficient_authority requirement_unsatisfied"},
    ),
    "snapshot_consistency_total": (
        "consistency.checks", "{snapshot}", "Snapshots judged by a consistency policy",
        {**_SUCCESS, "rule": "observation_skew"},
    ),
    "cache_access_total": (
        "cache.lookups", "{key}", "Looks into the cache",
        {
            **_KIND,
            "status": "fresh stale_while_revalidate miss stale_fallback revalidation_bypass absent",
        },
    ),
    "cache_failure_total": (
        "cache.failures", "{failure}", "Errors of a cache", {"operation": "read write"},
    ),
    "singleflight_join_total": (
        "flight.joins", "{key}", "Readers who joined a call under way", _KIND,
    ),
    "source_fetch_total": (
        "source.keys", "{key}", "Keys asked of a source",
        {**_SOURCE, "status": "success failure stale invalid_timestamp circuit_open absent"},
    ),
    "source_batch_call_total": (
        "source.batch.calls", "{call}", "Batch calls",
        {**_SOURCE, "status": "success failure deadline_exceeded queue_timeout"},
    ),
    "source_capacity_timeout_total": (
        "source.capacity.timeouts", "{call}", "Calls that got no slot",
        {**_SOURCE, "reason": "queue_timeout snapshot_deadline"},
    ),
    "source_transport_budget_rejection_total": (
        "source.transport.rejections", "{call}",
        "Blocking calls not begun, as too little time was left",
        {**_SOURCE, "reason": "snapshot_deadline source_timeout"},
    ),
    "source_transport_timeout_violation_total": (
        "source.transport.violations", "{call}", "Blocking calls that outlasted their declaration",
        {**_SOURCE, "outcome": "completed_late failed_late coalestra_timeout"},
    ),
    "resource_publish_total": (
        "resource.publications", "{value}", "Published values",
        {
            **_KIND, **_SOURCE,
            "status": "published ignored_older ignored_duplicate ignored_lower_authority",
        },
    ),
    "resource_invalidation_total": (
        "resource.invalidations", "{key}", "Invalidated keys", _KIND,
    ),
    "resource_refresh_total": (
        "resource.refreshes", "{refresh}", "Refreshes in the background",
        {**_KIND, "status": "scheduled success failure cancelled absent"},
    ),
    "payload_copy_deadline_total": (
        "payload.copy.timeouts", "{copy}", "Deadlines that struck during a copy", {"phase": ""},
    ),
}  # fmt: skip
OBSERVATIONS: Final[Metrics] = {
    "snapshot_build_latency_ms": (
        "snapshot.build.duration", "s", "How long builds took, in seconds", _SUCCESS,
    ),
    "snapshot_session_resolve_latency_ms": (
        "session.resolution.duration", "s", "How long stages of sessions took, in seconds",
        _SUCCESS,
    ),
    "source_fetch_latency_ms": (
        "source.fetch.duration", "s",
        "How long calls to sources took, each retry anew, in seconds", _SOURCE,
    ),
    "source_capacity_wait_ms": (
        "source.capacity.wait_time", "s", "Waits of calls for a slot, in seconds", _SOURCE,
    ),
    "source_batch_size": ("source.batch.size", "{key}", "Keys in one batch call", _SOURCE),
}  # fmt: skip


# Builders, and what is read of their health ------------------------------------------------------


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

    def read(self, told: Callable[[BuilderHealth], T]) -> Iterator[tuple[str, T | None]]:
        """Return what each of them tells; None for one that fails to, which is logged."""
        for name, builder in self.open().items():
            subject = f"reading the health of builder {name!r}"
            try:
                facts = told(builder.health_snapshot_nowait())
            except Exception as error:
                self.changes.failed(subject, error)
                yield name, None
            else:
                self.changes.works(subject)
                yield name, facts


Figures = Iterable[tuple[tuple[str, ...], float | None]]
"""The figure of each series by the values of its labels; None for what is not known."""
Read = Callable[[BuilderHealth], Figures]


def one(attribute: str) -> Read:
    """Return how to read a figure of the builder."""
    return lambda health: [((), getattr(health, attribute))]


def each(mapping: str, attribute: str) -> Read:
    """Return how to read a figure of each source, limiter or the like, by its name."""
    return lambda health: [
        ((name,), getattr(found, attribute)) for name, found in getattr(health, mapping).items()
    ]


def of_cache(**attributes: str) -> Read:
    """Return how to read figures of the memory cache: by label, or by none, the attribute."""
    return lambda health: [
        ((label,) if label else (), getattr(health.cache, name))
        for label, name in attributes.items()
        if isinstance(health.cache, CacheStats)
    ]


def severity(health: BuilderHealth) -> Figures:
    """Return what health comes to: 0 healthy, 1 degraded, 2 critical."""
    return [((), list(BuilderHealthSeverity).index(health.assess().severity))]


def backlog(health: BuilderHealth) -> Figures:
    """Return the submissions under way; None of a builder that takes none."""
    return [((), None if health.max_pending_submissions is None else health.pending_submissions)]


def troubled_circuits(health: BuilderHealth) -> Figures:
    """Return how many circuits of each source are open and half-open, by source and state."""
    counts = {(source, state): 0 for source in health.sources for state in ("half_open", "open")}
    for identity, circuit in health.circuits.items():
        if (series := (identity.source, circuit.state.value)) in counts:
            counts[series] += circuit.count
    return counts.items()
