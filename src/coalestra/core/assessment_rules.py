"""The rules by which a builder's health is judged, as one table.

Laws:
    A rule only reads: no clock, no I/O, no state. The same facts give the same findings.
    Findings come in the order of ``RULES``; within a rule, in the order of the components.
    What a finding observed is never below its threshold, and is of the same unit.
    Counters are only judged by their growth: one timeout long ago is not an illness for ever.

Limiters, circuits and buffers are read by attribute: their types belong to other layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from coalestra.core.assessment import (
    BuilderHealthAssessment,
    BuilderHealthAssessmentPolicy,
    BuilderHealthFinding,
    BuilderHealthReason,
    BuilderHealthSeverity,
)
from coalestra.core.health_facts import HealthFacts

Reason = BuilderHealthReason
_DEGRADED = BuilderHealthSeverity.DEGRADED
_CRITICAL = BuilderHealthSeverity.CRITICAL


@dataclass(frozen=True, slots=True)
class Examination:
    """What the rules look at: facts, possibly earlier ones to compare with, and thresholds."""

    facts: HealthFacts
    previous: HealthFacts | None
    policy: BuilderHealthAssessmentPolicy


Findings = Iterator[BuilderHealthFinding]
Rule = Callable[[Examination], Findings]
Load = tuple[str, int, int]
"""A limiter's or backlog's name, how many wait there, and its limit."""


@dataclass(frozen=True, slots=True)
class Flag:
    """Critical while a fact is true."""

    reason: BuilderHealthReason
    metric: str

    def __call__(self, given: Examination) -> Findings:
        """Yield at most one finding."""
        if getattr(given.facts, self.metric):
            yield BuilderHealthFinding(self.reason, _CRITICAL, self.metric, True, True)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Degraded from a number of waiters on; critical once one limiter has many for its limit."""

    reason: BuilderHealthReason
    metric: str
    thresholds: str
    loads: Callable[[HealthFacts], Iterable[Load]]

    def __call__(self, given: Examination) -> Findings:
        """Yield at most one finding, naming the limiter with the most waiters for its limit."""
        observed: int = getattr(given.facts, self.metric)
        degraded: int = getattr(given.policy, f"{self.thresholds}_degraded")
        critical: float = getattr(given.policy, f"{self.thresholds}_critical_ratio")
        if observed < degraded:
            return
        ratio, component = max(
            (_ratios(self.loads(given.facts))), key=lambda load: load[0], default=(0.0, "")
        )
        if ratio >= critical:
            yield BuilderHealthFinding(
                self.reason, _CRITICAL, f"{self.metric}_ratio", ratio, critical, component
            )
        else:
            yield BuilderHealthFinding(
                self.reason, _DEGRADED, self.metric, observed, degraded, component
            )


@dataclass(frozen=True, slots=True)
class Backlog:
    """Degraded, then critical, from shares of a backlog's limit on."""

    reason: BuilderHealthReason
    metric: str
    thresholds: str
    loads: Callable[[HealthFacts], Iterable[Load]]

    def __call__(self, given: Examination) -> Findings:
        """Yield a finding for each backlog that is too long."""
        degraded: float = getattr(given.policy, f"{self.thresholds}_degraded_ratio")
        critical: float = getattr(given.policy, f"{self.thresholds}_critical_ratio")
        for ratio, component in _ratios(self.loads(given.facts)):
            if ratio >= degraded:
                severe = ratio >= critical
                yield BuilderHealthFinding(
                    self.reason,
                    _CRITICAL if severe else _DEGRADED,
                    self.metric,
                    ratio,
                    critical if severe else degraded,
                    component,
                )


@dataclass(frozen=True, slots=True)
class Circuits:
    """Degraded while any circuit is in a state; the component is the sources, joined."""

    reason: BuilderHealthReason
    state: str

    def __call__(self, given: Examination) -> Findings:
        """Yield at most one finding."""
        found = [
            identity
            for identity, circuit in given.facts.circuits.items()
            if getattr(circuit.state, "value", circuit.state) == self.state
        ]
        if found:
            sources = {str(getattr(identity, "source", identity)) for identity in found}
            yield BuilderHealthFinding(
                self.reason,
                _DEGRADED,
                f"circuits_{self.state}",
                len(found),
                1,
                ", ".join(sorted(sources)),
            )


@dataclass(frozen=True, slots=True)
class Growth:
    """Degraded, then critical, by how much a counter has grown since the earlier snapshot."""

    reason: BuilderHealthReason
    metric: str

    def __call__(self, given: Examination) -> Findings:
        """Yield at most one finding; none without an earlier snapshot."""
        if given.previous is None:
            return
        delta: int = getattr(given.facts, self.metric) - getattr(given.previous, self.metric)
        policy = given.policy
        if delta >= policy.counter_delta_critical:
            yield BuilderHealthFinding(
                self.reason, _CRITICAL, self.metric, delta, policy.counter_delta_critical
            )
        elif delta >= policy.counter_delta_degraded:
            yield BuilderHealthFinding(
                self.reason, _DEGRADED, self.metric, delta, policy.counter_delta_degraded
            )


def unsafe_sources(given: Examination) -> Findings:
    """Critical while a source blocks without protection; the component is the names, joined."""
    count = given.facts.unsafe_blocking_source_count
    if count:
        guarantees = given.facts.source_timeout_guarantees
        names = sorted(name for name, guarantee in guarantees.items() if guarantee.unsafe)
        yield BuilderHealthFinding(
            Reason.UNSAFE_BLOCKING_SOURCE,
            _CRITICAL,
            "unsafe_blocking_source_count",
            count,
            1,
            ", ".join(names),
        )


def stopped_workers(given: Examination) -> Findings:
    """Critical for each buffer that is open and has nobody to empty it."""
    for name, buffer in given.facts.observability_buffers.items():
        if not buffer.closed and not buffer.worker_alive:
            yield BuilderHealthFinding(
                Reason.OBSERVABILITY_WORKER_STOPPED, _CRITICAL, "worker_alive", False, None, name
            )


def _ratios(loads: Iterable[Load]) -> Iterator[tuple[float, str]]:
    return ((waiting / limit, name) for name, waiting, limit in loads if limit > 0)


def _limiters(facts: HealthFacts) -> Iterator[Load]:
    return ((name, item.waiting, item.limit) for name, item in facts.capacity.items())


def _copiers(facts: HealthFacts) -> Iterator[Load]:
    components = facts.payload_copy_components.items()
    return ((name, item.waiting_for_capacity, item.max_concurrency) for name, item in components)


def _submissions(facts: HealthFacts) -> Iterator[Load]:
    yield "", facts.pending_submissions, facts.max_pending_submissions or 0


def _buffers(facts: HealthFacts) -> Iterator[Load]:
    buffers: Iterable[tuple[str, Any]] = facts.observability_buffers.items()
    return ((name, item.pending, item.max_pending) for name, item in buffers)


RULES: tuple[Rule, ...] = (
    Flag(Reason.BUILDER_CLOSED, "closed"),
    unsafe_sources,
    stopped_workers,
    Flag(Reason.PAYLOAD_COPY_SHUTDOWN_INCOMPLETE, "payload_copy_shutdown_incomplete"),
    Flag(Reason.OBSERVABILITY_SHUTDOWN_INCOMPLETE, "observability_shutdown_incomplete"),
    Waiting(Reason.SOURCE_CAPACITY_WAITING, "waiting_for_capacity", "capacity_waiting", _limiters),
    Waiting(
        Reason.PAYLOAD_COPY_CAPACITY_WAITING, "waiting_for_copy_capacity", "copy_waiting", _copiers
    ),
    Backlog(
        Reason.SUBMISSION_BACKLOG_HIGH,
        "pending_submissions_ratio",
        "submission_backlog",
        _submissions,
    ),
    Backlog(
        Reason.OBSERVABILITY_BACKLOG_HIGH,
        "observability_pending_ratio",
        "observability_backlog",
        _buffers,
    ),
    Circuits(Reason.CIRCUIT_OPEN, "open"),
    Circuits(Reason.CIRCUIT_HALF_OPEN, "half_open"),
    Growth(Reason.QUEUE_TIMEOUTS_INCREASED, "queue_timeout_count"),
    Growth(Reason.SOURCE_TIMEOUTS_INCREASED, "source_timeout_count"),
    Growth(
        Reason.SOURCE_TRANSPORT_TIMEOUT_VIOLATIONS_INCREASED,
        "source_transport_timeout_violation_count",
    ),
    Growth(Reason.DEADLINES_EXCEEDED_INCREASED, "deadline_exceeded_count"),
    Growth(Reason.REVALIDATION_FAILURES_INCREASED, "revalidation_failure_count"),
    Growth(Reason.PAYLOAD_COPY_FAILURES_INCREASED, "payload_copy_failure_count"),
    Growth(Reason.PAYLOAD_COPY_TIMEOUTS_INCREASED, "payload_copy_timeout_count"),
    Growth(Reason.PAYLOAD_COPY_SHUTDOWN_TIMEOUTS_INCREASED, "payload_copy_shutdown_timeout_count"),
    Growth(Reason.OBSERVABILITY_DROPS_INCREASED, "observability_dropped_count"),
    Growth(
        Reason.OBSERVABILITY_SHUTDOWN_TIMEOUTS_INCREASED, "observability_shutdown_timeout_count"
    ),
    Growth(Reason.OBSERVABILITY_FAILURES_INCREASED, "observability_failure_count"),
)
"""Every rule, in the order in which findings are reported."""


def assess(
    facts: HealthFacts,
    *,
    previous: HealthFacts | None = None,
    policy: BuilderHealthAssessmentPolicy | None = None,
) -> BuilderHealthAssessment:
    """Judge ``facts``, counters by their growth since ``previous`` if that is given."""
    given = Examination(facts, previous, policy or BuilderHealthAssessmentPolicy())
    findings = (finding for rule in RULES for finding in rule(given))
    return BuilderHealthAssessment.of(findings, baseline_used=previous is not None)
