"""A builder's health: the facts, their JSON form and their verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from coalestra.core.frozen import FrozenDict, record
from coalestra.core.keys import ResourceKey
from coalestra.core.serialization import json_safe
from coalestra.core.validation import check_fields, flag, instance, integer, number, ruled

__all__ = [
    "BUILDER_HEALTH_ASSESSMENT_SCHEMA", "BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION",
    "BUILDER_HEALTH_SCHEMA", "BUILDER_HEALTH_SCHEMA_VERSION", "BuilderHealth",
    "BuilderHealthAssessment", "BuilderHealthAssessmentPolicy", "BuilderHealthFinding",
    "BuilderHealthReason", "BuilderHealthSeverity", "FlightSnapshot", "PayloadCopyHealth",
    "SourceTimeoutGuarantee", "SourceTimeoutGuaranteeStatus", "inspect_source_timeout_guarantee",
]  # fmt: skip

# What a source declares about blocking, and whether that keeps its calls within their time --------
#
# A thread that blocks cannot be stopped. A source that blocks is therefore only safe if its calls
# run in a thread and its own transport gives up before the library does.

_ABSENT = object()


class SourceTimeoutGuaranteeStatus(str, Enum):
    """How far a source's declaration goes."""

    UNDECLARED = "undeclared"
    """It has no ``blocking_io`` attribute."""
    NON_BLOCKING = "non_blocking"
    """It never blocks the thread that calls it."""
    PROTECTED = "protected"
    """It blocks, in a thread, and its transport gives up before the source timeout."""
    UNSAFE_NOT_OFFLOADED = "unsafe_not_offloaded"
    """It blocks the event loop."""
    UNSAFE_TIMEOUT_MISSING = "unsafe_timeout_missing"
    """It blocks, and its transport may do so for ever."""
    UNSAFE_TIMEOUT_NOT_WITHIN_SOURCE = "unsafe_timeout_not_within_source"
    """It blocks, and its transport may do so for as long as the source timeout, or longer."""


_Status = SourceTimeoutGuaranteeStatus


@record
class SourceTimeoutGuarantee:
    """What one source declares about blocking, and what follows from it.

    Attributes:
        source: the name of the source.
        status: the verdict.
        declaration_present: whether the source says if it blocks.
        blocking_io: whether it says that it does.
        blocking_io_offloaded: whether it says that this happens in a thread.
        transport_timeout_seconds: after how long its transport gives up, or None.
        source_timeout_seconds: how long the library lets a call take, or None for any time.
    """

    source: str
    status: SourceTimeoutGuaranteeStatus
    declaration_present: bool
    blocking_io: bool
    blocking_io_offloaded: bool
    transport_timeout_seconds: float | None
    source_timeout_seconds: float | None

    @property
    def protected(self) -> bool:
        """Whether the source blocks and is guarded against blocking for too long."""
        return self.status is _Status.PROTECTED

    @property
    def safe(self) -> bool:
        """Whether the source is known to keep to its time: it never blocks, or is protected."""
        return self.status in (_Status.NON_BLOCKING, _Status.PROTECTED)

    @property
    def unsafe(self) -> bool:
        """Whether the source says that it blocks, without being protected."""
        return self.blocking_io and not self.protected


def inspect_source_timeout_guarantee(source: Any) -> SourceTimeoutGuarantee:
    """Read and judge what ``source`` declares about blocking; nothing is called.

    Reads ``blocking_io``, ``blocking_io_offloaded`` (False if absent),
    ``transport_timeout_seconds`` and ``timeout_seconds`` (None if absent), both in seconds.

    Raises:
        ValueError: for a timeout that is not above 0, and for a transport timeout of a source
            that does not declare ``blocking_io=True``.
    """
    name = str(getattr(source, "name", type(source).__name__))
    where = f"of source {name!r}"
    declared: Any = getattr(source, "blocking_io", _ABSENT)
    blocking = False if declared is _ABSENT else flag(f"blocking_io {where}", declared)
    offloaded = flag(
        f"blocking_io_offloaded {where}", getattr(source, "blocking_io_offloaded", False)
    )
    transport, timeout = (
        number(f"{setting} {where}", getattr(source, setting, None), above=0, optional=True)
        for setting in ("transport_timeout_seconds", "timeout_seconds")
    )
    if transport is not None and not blocking:
        raise ValueError(
            f"transport_timeout_seconds {where} must be None unless blocking_io is True, got "
            f"{transport!r}; declare blocking_io=True or leave the transport timeout out"
        )
    status = _Status.PROTECTED
    if declared is _ABSENT:
        status = _Status.UNDECLARED
    elif not blocking:
        status = _Status.NON_BLOCKING
    elif not offloaded:
        status = _Status.UNSAFE_NOT_OFFLOADED
    elif transport is None:
        status = _Status.UNSAFE_TIMEOUT_MISSING
    elif timeout is not None and transport >= timeout:
        status = _Status.UNSAFE_TIMEOUT_NOT_WITHIN_SOURCE
    return SourceTimeoutGuarantee(
        name, status, declared is not _ABSENT, blocking, offloaded, transport, timeout
    )


# The facts of a builder, some of them by part ----------------------------------------------------

BUILDER_HEALTH_SCHEMA = "coalestra.builder-health"
"""The name of the JSON schema of ``BuilderHealth.to_dict``."""

BUILDER_HEALTH_SCHEMA_VERSION = 1
"""The version of that schema."""

BUILDER_HEALTH_ASSESSMENT_SCHEMA = "coalestra.builder-health-assessment"
"""The name of the JSON schema of ``BuilderHealthAssessment.to_dict``."""

BUILDER_HEALTH_ASSESSMENT_SCHEMA_VERSION = 1
"""The version of that schema."""


@record
class PayloadCopyHealth:
    """The state of one component's payload copies at one moment.

    Counters run since the component was made. A copy whose waiter gave up counts as timed out,
    and later as completed or failed too, because its thread cannot be stopped.

    Attributes:
        run_in_thread: whether copies may be made in threads.
        max_concurrency: how many threads may copy at once.
        active_copies, peak_active_copies: copies under way now, and at most so far.
        waiting_for_capacity, peak_waiting_for_capacity: copies waiting for a thread.
        started_count, completed_count, failure_count: copies begun, done, and failed.
        timeout_count: waiters whose time ran out during a copy.
        capacity_timeout_count: waiters whose time ran out before one began.
        capacity_wait_count: copies that had to wait for a thread.
        average_wait_ms, max_wait_ms: how long they waited, in milliseconds.
        average_duration_ms, max_duration_ms: how long copies took, in milliseconds.
        accepting_copies: False once closing has begun.
        shutdown_started, shutdown_complete: whether closing has begun, and whether it is over.
        shutdown_incomplete: closing gave up waiting, and copies are still active.
        shutdown_timeout_count: how often closing gave up waiting.
        active_at_last_shutdown_timeout: how many copies it left behind the last time.
    """

    run_in_thread: bool
    max_concurrency: int
    active_copies: int = 0
    waiting_for_capacity: int = 0
    peak_active_copies: int = 0
    peak_waiting_for_capacity: int = 0
    started_count: int = 0
    completed_count: int = 0
    failure_count: int = 0
    timeout_count: int = 0
    capacity_timeout_count: int = 0
    capacity_wait_count: int = 0
    average_wait_ms: float = 0.0
    max_wait_ms: float = 0.0
    average_duration_ms: float = 0.0
    max_duration_ms: float = 0.0
    accepting_copies: bool = True
    shutdown_started: bool = False
    shutdown_complete: bool = False
    shutdown_incomplete: bool = False
    shutdown_timeout_count: int = 0
    active_at_last_shutdown_timeout: int = 0


@record
class FlightSnapshot:
    """The acquisition of one key at one moment, which whoever needs the key waits for.

    Attributes:
        key: what is acquired.
        state: where it stands, in a few words.
        source: whose call carries it; None while none does.
        waiters: how many wait for it: readers, and keys that are derived from it.
        refresh: whether they are background refreshes only, so that no reader waits.
        attempts: how often that source has been called for it, by this call.
        running_seconds: for how long the source has been running now; None if it is not.
    """

    key: ResourceKey
    state: str
    source: str | None
    waiters: int
    refresh: bool
    attempts: int
    running_seconds: float | None


# The words in which health is told ---------------------------------------------------------------


class BuilderHealthSeverity(str, Enum):
    """How bad it is, from harmless to worst."""

    HEALTHY = "healthy"
    """Nothing was found."""
    DEGRADED = "degraded"
    """It works, with delays or losses."""
    CRITICAL = "critical"
    """It does not work, or will not for long."""


class BuilderHealthReason(str, Enum):
    """What was found; the guide to health says what each means, and what to do."""

    BUILDER_CLOSED = "builder_closed"
    CACHE_FAILURES_INCREASED = "cache_failures_increased"
    CACHE_LEFT_ALONE = "cache_left_alone"
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
    SOURCE_SLOWER_THAN_DEADLINES = "source_slower_than_deadlines"
    SOURCE_TIMEOUTS_INCREASED = "source_timeouts_increased"
    SOURCE_TRANSPORT_TIMEOUT_VIOLATIONS_INCREASED = "source_transport_timeout_violations_increased"
    SUBMISSION_BACKLOG_HIGH = "submission_backlog_high"
    UNSAFE_BLOCKING_SOURCE = "unsafe_blocking_source"


@record
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
        return {**json_safe(self)}


@record
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
        present = {BuilderHealthSeverity.HEALTHY, *(finding.severity for finding in found)}
        worst = [severity for severity in BuilderHealthSeverity if severity in present][-1]
        return cls(worst, found, baseline_used)

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


@record
class BuilderHealthAssessmentPolicy:
    """From which figures on health is degraded or critical.

    A ratio is a share of a limit: 1.0 is as many as the limit allows.

    Attributes:
        capacity_waiting_degraded: source calls waiting for a slot.
        capacity_waiting_critical_ratio: those waiting at one limiter, to its limit.
        copy_waiting_degraded: copies waiting for a thread.
        copy_waiting_critical_ratio: those waiting in one component, to its limit.
        deadline_cuts_degraded: calls of one source in a row that their readers' deadlines cut off.
        submission_backlog_degraded_ratio, submission_backlog_critical_ratio: pending submissions,
            to their limit.
        observability_backlog_degraded_ratio, observability_backlog_critical_ratio: records pending
            in one buffer, to its limit.
        counter_delta_degraded, counter_delta_critical: by how much a counter of failures has grown
            since the snapshot compared with.

    Raises:
        ValueError: for a count below 1, a ratio that is not above 0 (above 1 for a backlog), and a
            critical threshold below the degraded one.
    """

    capacity_waiting_degraded: int = ruled(1, integer, minimum=1)
    capacity_waiting_critical_ratio: float = ruled(1.0, number, above=0)
    copy_waiting_degraded: int = ruled(1, integer, minimum=1)
    copy_waiting_critical_ratio: float = ruled(1.0, number, above=0)
    submission_backlog_degraded_ratio: float = ruled(0.5, number, above=0, maximum=1)
    submission_backlog_critical_ratio: float = ruled(0.9, number, above=0, maximum=1)
    observability_backlog_degraded_ratio: float = ruled(0.5, number, above=0, maximum=1)
    observability_backlog_critical_ratio: float = ruled(0.9, number, above=0, maximum=1)
    counter_delta_degraded: int = ruled(1, integer, minimum=1)
    counter_delta_critical: int = ruled(5, integer, minimum=1)
    deadline_cuts_degraded: int = ruled(3, integer, minimum=1)

    def __post_init__(self) -> None:
        check_fields(self)
        for degraded, critical in _SCALES:
            lower, upper = getattr(self, degraded), getattr(self, critical)
            if upper < lower:
                raise ValueError(
                    f"{critical} must not be below {degraded} ({lower!r}), got {upper!r}"
                )


_SCALES = (
    ("submission_backlog_degraded_ratio", "submission_backlog_critical_ratio"),
    ("observability_backlog_degraded_ratio", "observability_backlog_critical_ratio"),
    ("counter_delta_degraded", "counter_delta_critical"),
)


@dataclass(frozen=True)
class BuilderHealth:
    """The state of a builder at one moment, and its counters since it was made.

    No resource is named: what is kept by name is kept by source, limiter, circuit or component.

    Attributes:
        closed: whether the builder is closed.
        background_refreshes: refreshes under way.
        failing_refreshes: keys whose last refresh has failed; of a thousand at most that is known.
        singleflight_in_flight: acquisitions that others may join.
        source_support_cache_entries: remembered answers of ``supports``.
        capacity: each limiter's ``limit``, ``in_use`` and ``waiting``, by source or ``__global__``.
        cache: the statistics of the cache, if it has any.
        circuits: the circuits that are not at rest, counted by source and scope: no key is named.
        active_dispatch_workers: workers that hand keys to sources.
        waiting_for_capacity: source calls waiting for a slot.
        queue_timeout_count: waits for a slot that took too long.
        source_timeout_count: calls that took too long.
        deadline_exceeded_count: builds and stages that ran out of time, however many keys that
            cost, and calls that were not begun as too little was left.
        revalidation_attempt_count, revalidation_failure_count: revalidations of sessions.
        source_timeout_guarantees: what each source declares about blocking, by its name.
        blocking_source_count: sources that declare that they block.
        protected_blocking_source_count: those of them whose calls end in time.
        unsafe_blocking_source_count: those whose calls may not.
        undeclared_source_timeout_count: sources that declare nothing.
        source_transport_timeout_violation_count: calls that outlasted their declared transport
            timeout.
        source_transport_timeout_violations: the same by name of source.
        pending_submissions, max_pending_submissions: the backlog of the synchronous publisher and
            its limit; None where there is no such publisher.
        payload_copy_components: the copies of each component.
        active_payload_copies, waiting_for_copy_capacity: copies under way, or waiting for a
            thread; these and the next ones are the sums over the components.
        payload_copy_started_count, payload_copy_completed_count: copies begun and ended.
        payload_copy_failure_count: copies that raised.
        payload_copy_timeout_count, payload_copy_capacity_timeout_count: deadlines that struck
            during a copy, or while it waited for a thread.
        payload_copy_shutdown_incomplete: whether copies were left over by the closing.
        payload_copy_shutdown_timeout_count, payload_copy_active_at_last_shutdown_timeout: closings
            that left copies over, and how many the last one left.
        observability_buffers: the statistics of each buffered sink, by component.
        observability_pending, observability_peak_pending: records that wait, now and at most;
            these and the next ones are the sums over the buffers.
        observability_dropped_count, observability_failure_count: records lost, for want of room or
            as the sink raised.
        observability_shutdown_incomplete: whether records were left over by the closing.
        observability_shutdown_timeout_count: closings that left records over.
        unfinished_source_calls: calls that outlived the closing of the builder, by source; those to
            a cache as ``cache call``.
        sources: when each source last answered and last failed, and with what type of error.
        cache_left_alone: whether a cache that has to be awaited has failed so often in a row that
            it is not asked for a while.
        cache_call_count, cache_failure_count, cache_timeout_count: calls to such a cache, those
            that failed, and of these the ones that took too long.
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
    sources: Mapping[str, Any] = field(default_factory=FrozenDict)
    cache_left_alone: bool = False
    cache_call_count: int = 0
    cache_failure_count: int = 0
    cache_timeout_count: int = 0
    failing_refreshes: int = 0

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.default_factory is FrozenDict:
                object.__setattr__(self, each.name, FrozenDict(getattr(self, each.name)))

    def assess(
        self,
        *,
        previous: BuilderHealth | None = None,
        policy: BuilderHealthAssessmentPolicy | None = None,
    ) -> BuilderHealthAssessment:
        """Judge this snapshot, by default thresholds if there is no policy.

        With an earlier snapshot of the same builder the growth of the failure counters is judged
        too.
        """
        instance("previous", previous, BuilderHealth, optional=True)
        instance("policy", policy, BuilderHealthAssessmentPolicy, optional=True)
        found = _findings(self, previous, policy or BuilderHealthAssessmentPolicy())
        return BuilderHealthAssessment.of(found, baseline_used=previous is not None)

    def to_dict(
        self,
        *,
        include_assessment: bool = True,
        previous: BuilderHealth | None = None,
        assessment_policy: BuilderHealthAssessmentPolicy | None = None,
    ) -> dict[str, Any]:
        """Return every attribute, and the verdict of ``assess`` if wanted, as JSON-safe data."""
        wanted = flag("include_assessment", include_assessment)
        verdict = self.assess(previous=previous, policy=assessment_policy) if wanted else None
        return {
            "schema": BUILDER_HEALTH_SCHEMA,
            "schema_version": BUILDER_HEALTH_SCHEMA_VERSION,
            **json_safe(self),
            "assessment": None if verdict is None else verdict.to_dict(),
        }


# The rules by which a builder's health is judged -------------------------------------------------
#
# Laws:
#     A rule only reads: no clock, no I/O, no state. The same facts give the same findings.
#     Findings come in the order of ``_findings``; within a rule, in the order of the components.
#     What a finding observed is never below its threshold, and is of the same unit.
#     Counters are only judged by their growth: one timeout long ago is not an illness for ever.
#
# Limiters, circuits and buffers are read by attribute: their types belong to other layers.

_Findings = Iterator[BuilderHealthFinding]
_Loads = Iterable[tuple[str, int, int]]
"""Names of limiters or backlogs, how many wait there, and how many may."""

_Reason = BuilderHealthReason
_DEGRADED = BuilderHealthSeverity.DEGRADED
_CRITICAL = BuilderHealthSeverity.CRITICAL

_FAILURE_COUNTERS = (
    (_Reason.QUEUE_TIMEOUTS_INCREASED, "queue_timeout_count"),
    (_Reason.SOURCE_TIMEOUTS_INCREASED, "source_timeout_count"),
    (
        _Reason.SOURCE_TRANSPORT_TIMEOUT_VIOLATIONS_INCREASED,
        "source_transport_timeout_violation_count",
    ),
    (_Reason.DEADLINES_EXCEEDED_INCREASED, "deadline_exceeded_count"),
    (_Reason.REVALIDATION_FAILURES_INCREASED, "revalidation_failure_count"),
    (_Reason.PAYLOAD_COPY_FAILURES_INCREASED, "payload_copy_failure_count"),
    (_Reason.PAYLOAD_COPY_TIMEOUTS_INCREASED, "payload_copy_timeout_count"),
    (_Reason.PAYLOAD_COPY_SHUTDOWN_TIMEOUTS_INCREASED, "payload_copy_shutdown_timeout_count"),
    (_Reason.OBSERVABILITY_DROPS_INCREASED, "observability_dropped_count"),
    (_Reason.OBSERVABILITY_SHUTDOWN_TIMEOUTS_INCREASED, "observability_shutdown_timeout_count"),
    (_Reason.OBSERVABILITY_FAILURES_INCREASED, "observability_failure_count"),
    (_Reason.CACHE_FAILURES_INCREASED, "cache_failure_count"),
)


def _findings(
    health: BuilderHealth, previous: BuilderHealth | None, policy: BuilderHealthAssessmentPolicy
) -> _Findings:
    yield from _graded(_Reason.BUILDER_CLOSED, "closed", health.closed, None, True)
    metric, guarantees = "unsafe_blocking_source_count", health.source_timeout_guarantees
    unsafe = ", ".join(sorted(name for name, guarantee in guarantees.items() if guarantee.unsafe))
    count = health.unsafe_blocking_source_count
    yield from _graded(_Reason.UNSAFE_BLOCKING_SOURCE, metric, count, None, 1, unsafe)
    for name, buffer in health.observability_buffers.items():
        if not buffer.closed and not buffer.worker_alive:  # nobody empties it
            yield BuilderHealthFinding(
                _Reason.OBSERVABILITY_WORKER_STOPPED, _CRITICAL, "worker_alive", False, None, name
            )
    for reason in (
        _Reason.PAYLOAD_COPY_SHUTDOWN_INCOMPLETE,
        _Reason.OBSERVABILITY_SHUTDOWN_INCOMPLETE,
    ):
        yield from _graded(reason, reason.value, getattr(health, reason.value), None, True)
    yield from _crowds(health, policy)
    yield from _circuits(health)
    for name, source in health.sources.items():
        metric, degraded = "deadline_cuts_in_a_row", policy.deadline_cuts_degraded
        cuts = getattr(source, metric, 0)
        yield from _graded(_Reason.SOURCE_SLOWER_THAN_DEADLINES, metric, cuts, degraded, None, name)
    alone = health.cache_left_alone
    yield from _graded(_Reason.CACHE_LEFT_ALONE, "cache_left_alone", alone, True, None)
    if previous is not None:
        steps = policy.counter_delta_degraded, policy.counter_delta_critical
        for reason, counter in _FAILURE_COUNTERS:
            grown = getattr(health, counter) - getattr(previous, counter)
            yield from _graded(reason, counter, grown, *steps)


def _graded(
    reason: BuilderHealthReason,
    metric: str,
    observed: int | float | bool,
    degraded: int | float | bool | None,
    critical: int | float | bool | None,
    component: str = "",
) -> _Findings:
    """Critical or else degraded from these figures on; None: never."""
    for severity, threshold in ((_CRITICAL, critical), (_DEGRADED, degraded)):
        if threshold is not None and observed >= threshold:
            yield BuilderHealthFinding(reason, severity, metric, observed, threshold, component)
            return


def _crowds(health: BuilderHealth, policy: BuilderHealthAssessmentPolicy) -> _Findings:
    reason, metric = _Reason.SOURCE_CAPACITY_WAITING, "waiting_for_capacity"
    loads = [(name, each.waiting, each.limit) for name, each in health.capacity.items()]
    most, ratio = policy.capacity_waiting_degraded, policy.capacity_waiting_critical_ratio
    yield from _waiting(reason, metric, health.waiting_for_capacity, loads, most, ratio)
    reason, metric = _Reason.PAYLOAD_COPY_CAPACITY_WAITING, "waiting_for_copy_capacity"
    copies = health.payload_copy_components.items()
    loads = [(name, each.waiting_for_capacity, each.max_concurrency) for name, each in copies]
    most, ratio = policy.copy_waiting_degraded, policy.copy_waiting_critical_ratio
    yield from _waiting(reason, metric, health.waiting_for_copy_capacity, loads, most, ratio)
    reason, metric = _Reason.SUBMISSION_BACKLOG_HIGH, "pending_submissions_ratio"
    low, high = policy.submission_backlog_degraded_ratio, policy.submission_backlog_critical_ratio
    loads = [("", health.pending_submissions, health.max_pending_submissions or 0)]
    for component, ratio in _ratios(loads):
        yield from _graded(reason, metric, ratio, low, high, component)
    reason, metric = _Reason.OBSERVABILITY_BACKLOG_HIGH, "observability_pending_ratio"
    low = policy.observability_backlog_degraded_ratio
    high = policy.observability_backlog_critical_ratio
    buffers = health.observability_buffers.items()
    for component, ratio in _ratios((name, b.pending, b.max_pending) for name, b in buffers):
        yield from _graded(reason, metric, ratio, low, high, component)


def _waiting(
    reason: _Reason, metric: str, waiting: int, loads: _Loads, degraded: int, critical: float
) -> _Findings:
    """Degraded from a number of waiters on; critical once one limiter has many for its limit.

    The component is the limiter with the most waiters for its limit.
    """
    if waiting >= degraded:
        component, ratio = max(_ratios(loads), key=lambda load: load[1], default=("", 0.0))
        if ratio >= critical:
            yield from _graded(reason, f"{metric}_ratio", ratio, None, critical, component)
        else:
            yield from _graded(reason, metric, waiting, degraded, None, component)


def _ratios(loads: _Loads) -> Iterator[tuple[str, float]]:
    return ((name, waiting / limit) for name, waiting, limit in loads if limit > 0)


def _circuits(health: BuilderHealth) -> _Findings:
    """Degraded while any circuit is open, or half-open; the component is the sources, joined."""
    for reason, metric, state in (
        (_Reason.CIRCUIT_OPEN, "circuits_open", "open"),
        (_Reason.CIRCUIT_HALF_OPEN, "circuits_half_open", "half_open"),
    ):
        counts: Counter[str] = Counter()
        for identity, circuit in health.circuits.items():
            own = int(getattr(circuit, "state", None) == state)  # of a single one; a group counts
            counts[str(getattr(identity, "source", identity))] += getattr(circuit, state, own)
        sources = ", ".join(sorted(+counts))
        yield from _graded(reason, metric, counts.total(), 1, None, sources)
