"""The words in which a builder's health is judged: severities, reasons, findings, thresholds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from coalestra.core.serialization import json_safe
from coalestra.core.validation import integer, number

BUILDER_HEALTH_ASSESSMENT_SCHEMA = "coalestra.builder-health-assessment"
"""The name of the JSON schema of ``BuilderHealthAssessment.to_dict``."""

BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION = 1
"""The version of that schema."""


class BuilderHealthSeverity(str, Enum):
    """How bad it is, from harmless to worst."""

    HEALTHY = "healthy"
    """Nothing was found."""
    DEGRADED = "degraded"
    """It works, with delays or losses."""
    CRITICAL = "critical"
    """It does not work, or will not for long."""


class BuilderHealthReason(str, Enum):
    """What was found; see ``coalestra.core.assessment_rules`` for when."""

    BUILDER_CLOSED = "builder_closed"
    CIRCUIT_HALF_OPEN = "circuit_half_open"
    CIRCUIT_OPEN = "circuit_open"
    DEADLINES_EXCEEDED_INCREASED = "deadlines_exceeded_increased"
    OBSERVABILITY_BACKLOG_HIGH = "observability_backlog_high"
    OBSERVABILITY_DROPS_INCREASED = "observability_drops_increased"
    OBSERVABILITY_FAILURES_INCREASED = "observability_failures_increased"
    OBSERVABILITY_SHUTDOWN_INCOMPLETE = "observability_shutdown_incomplete"
    OBSERVABILITY_SHUTDOWN_TIMEOUTS_INCREASED = "observability_shutdown_timeouts_increased"
    OBSERVABILITY_WORKER_STOPPED = "observability_worker_stopped"
    PAYLOAD_COPY_CAPACITY_WAITING = "payload_copy_capacity_waiting"
    PAYLOAD_COPY_FAILURES_INCREASED = "payload_copy_failures_increased"
    PAYLOAD_COPY_SHUTDOWN_INCOMPLETE = "payload_copy_shutdown_incomplete"
    PAYLOAD_COPY_SHUTDOWN_TIMEOUTS_INCREASED = "payload_copy_shutdown_timeouts_increased"
    PAYLOAD_COPY_TIMEOUTS_INCREASED = "payload_copy_timeouts_increased"
    QUEUE_TIMEOUTS_INCREASED = "queue_timeouts_increased"
    REVALIDATION_FAILURES_INCREASED = "revalidation_failures_increased"
    SOURCE_CAPACITY_WAITING = "source_capacity_waiting"
    SOURCE_TIMEOUTS_INCREASED = "source_timeouts_increased"
    SOURCE_TRANSPORT_TIMEOUT_VIOLATIONS_INCREASED = "source_transport_timeout_violations_increased"
    SUBMISSION_BACKLOG_HIGH = "submission_backlog_high"
    UNSAFE_BLOCKING_SOURCE = "unsafe_blocking_source"


@dataclass(frozen=True, slots=True)
class BuilderHealthFinding:
    """One thing that was found.

    Attributes:
        reason: what it is.
        severity: how bad it is.
        metric: which figure shows it.
        observed: the figure; never below ``threshold``.
        threshold: the lowest figure that is this bad, or None where there is no scale.
        component: the source, limiter, buffer or component concerned, or empty.
    """

    reason: BuilderHealthReason
    severity: BuilderHealthSeverity
    metric: str
    observed: int | float | bool
    threshold: int | float | bool | None = None
    component: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON-safe data."""
        found: dict[str, Any] = json_safe(self)
        return found


@dataclass(frozen=True, slots=True)
class BuilderHealthAssessment:
    """The verdict on one health snapshot.

    Attributes:
        severity: the worst of the findings, healthy without any.
        findings: what was found, in an order that does not change from one time to the next.
        baseline_used: whether an earlier snapshot was there to compare counters with.
    """

    severity: BuilderHealthSeverity
    findings: tuple[BuilderHealthFinding, ...] = ()
    baseline_used: bool = False

    @classmethod
    def of(
        cls, findings: Iterable[BuilderHealthFinding], *, baseline_used: bool
    ) -> BuilderHealthAssessment:
        """Return the verdict that follows from ``findings``."""
        found = tuple(findings)
        present = {finding.severity for finding in found}
        worst = [severity for severity in BuilderHealthSeverity if severity in present]
        return cls(worst[-1] if worst else BuilderHealthSeverity.HEALTHY, found, baseline_used)

    @property
    def reasons(self) -> tuple[BuilderHealthReason, ...]:
        """Every reason that was found, once, in the order of the findings."""
        return tuple(dict.fromkeys(finding.reason for finding in self.findings))

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict and its findings as JSON-safe data."""
        return {
            "schema": BUILDER_HEALTH_ASSESSMENT_SCHEMA,
            "schema_version": BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION,
            "severity": self.severity.value,
            "baseline_used": self.baseline_used,
            "reasons": json_safe(self.reasons),
            "findings": json_safe(self.findings),
        }


@dataclass(frozen=True, slots=True)
class BuilderHealthAssessmentPolicy:
    """From which figures on health is degraded or critical.

    A ratio is a share of a limit: 1.0 is as many as the limit allows.

    Attributes:
        capacity_waiting_degraded: source calls waiting for a slot.
        capacity_waiting_critical_ratio: those waiting at one limiter, to its limit.
        copy_waiting_degraded: copies waiting for a thread.
        copy_waiting_critical_ratio: those waiting in one component, to its limit.
        submission_backlog_degraded_ratio, submission_backlog_critical_ratio: pending submissions,
            to their limit.
        observability_backlog_degraded_ratio, observability_backlog_critical_ratio: records pending
            in one buffer, to its limit.
        counter_delta_degraded, counter_delta_critical: by how much a counter of failures has grown
            since the snapshot compared with.

    Raises:
        TypeError: for a threshold of the wrong type.
        ValueError: for a count below 1, a ratio that is not above 0 (above 1 for a backlog), and a
            critical threshold below the degraded one.
    """

    capacity_waiting_degraded: int = 1
    capacity_waiting_critical_ratio: float = 1.0
    copy_waiting_degraded: int = 1
    copy_waiting_critical_ratio: float = 1.0
    submission_backlog_degraded_ratio: float = 0.5
    submission_backlog_critical_ratio: float = 0.9
    observability_backlog_degraded_ratio: float = 0.5
    observability_backlog_critical_ratio: float = 0.9
    counter_delta_degraded: int = 1
    counter_delta_critical: int = 5

    def __post_init__(self) -> None:
        for name in ("capacity_waiting", "copy_waiting"):
            integer(f"{name}_degraded", getattr(self, f"{name}_degraded"), minimum=1)
            number(f"{name}_critical_ratio", getattr(self, f"{name}_critical_ratio"), above=0)
        for name in ("submission_backlog", "observability_backlog"):
            for grade in ("degraded_ratio", "critical_ratio"):
                number(f"{name}_{grade}", getattr(self, f"{name}_{grade}"), above=0, maximum=1)
            self._check_order(f"{name}_degraded_ratio", f"{name}_critical_ratio")
        integer("counter_delta_degraded", self.counter_delta_degraded, minimum=1)
        integer("counter_delta_critical", self.counter_delta_critical, minimum=1)
        self._check_order("counter_delta_degraded", "counter_delta_critical")

    def _check_order(self, degraded: str, critical: str) -> None:
        lower, upper = getattr(self, degraded), getattr(self, critical)
        if upper < lower:
            raise ValueError(f"{critical} must not be below {degraded} ({lower!r}), got {upper!r}")
