"""Health is judged by a table: each rule has its figure, its thresholds and its place."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass
from typing import Any

import pytest

from coalestra.core.health import (
    BuilderHealth,
    BuilderHealthAssessment,
    BuilderHealthAssessmentPolicy,
    BuilderHealthFinding,
    BuilderHealthReason,
    BuilderHealthSeverity,
    PayloadCopyHealth,
)

HEALTHY = BuilderHealthSeverity.HEALTHY
DEGRADED = BuilderHealthSeverity.DEGRADED
CRITICAL = BuilderHealthSeverity.CRITICAL
Reason = BuilderHealthReason


class State(str, enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True)
class Identity:
    source: str
    part: str = ""


@dataclass(frozen=True)
class Circuit:
    state: State


@dataclass(frozen=True)
class Limiter:
    limit: int
    waiting: int
    in_use: int = 0


@dataclass(frozen=True)
class Buffer:
    pending: int = 0
    max_pending: int = 10
    closed: bool = False
    worker_alive: bool = True


def health(**facts: Any) -> BuilderHealth:
    return BuilderHealth(**{
        "closed": False, "background_refreshes": 0, "singleflight_in_flight": 0,
        "source_support_cache_entries": 0, **facts,
    })  # fmt: skip


def found(facts: BuilderHealth, **options: Any) -> list[tuple[Any, ...]]:
    """Each finding as (reason, severity, observed, threshold, component)."""
    return [
        (item.reason, item.severity, item.observed, item.threshold, item.component)
        for item in facts.assess(**options).findings
    ]


def test_a_builder_at_rest_is_healthy() -> None:
    verdict = health().assess()
    assert verdict == BuilderHealthAssessment(HEALTHY, (), False)
    assert verdict.reasons == ()


@pytest.mark.parametrize("fact, reason", [
    ("closed", Reason.BUILDER_CLOSED),
    ("payload_copy_shutdown_incomplete", Reason.PAYLOAD_COPY_SHUTDOWN_INCOMPLETE),
    ("observability_shutdown_incomplete", Reason.OBSERVABILITY_SHUTDOWN_INCOMPLETE),
])  # fmt: skip
def test_what_is_closed_or_cannot_close_is_critical(fact: str, reason: BuilderHealthReason) -> None:
    verdict = health(**{fact: True}).assess()
    assert verdict.severity is CRITICAL
    assert verdict.findings == (BuilderHealthFinding(reason, CRITICAL, fact, True, True),)


@pytest.mark.parametrize("buffer, stopped", [
    (Buffer(), False), (Buffer(worker_alive=False), True),
    (Buffer(worker_alive=False, closed=True), False),
])  # fmt: skip
def test_an_open_buffer_that_nobody_empties_is_critical(buffer: Buffer, stopped: bool) -> None:
    expected = [(Reason.OBSERVABILITY_WORKER_STOPPED, CRITICAL, False, None, "events")]
    assert found(health(observability_buffers={"events": buffer})) == expected * stopped


@pytest.mark.parametrize("waiting, limiters, expected", [
    (0, {"rest": Limiter(4, 0)}, []), (1, {"rest": Limiter(4, 1)}, [(DEGRADED, 1, 1, "rest")]),
    (3, {"rest": Limiter(4, 3)}, [(DEGRADED, 3, 1, "rest")]),
    (4, {"rest": Limiter(4, 4)}, [(CRITICAL, 1.0, 1.0, "rest")]),
    (5, {"__global__": Limiter(8, 2), "rest": Limiter(2, 3), "web": Limiter(4, 0)},
        [(CRITICAL, 1.5, 1.0, "rest")]),
    (2, {}, [(DEGRADED, 2, 1, "")]),
])  # fmt: skip
def test_waiting_for_capacity_is_judged_by_the_limiter_with_most_waiters_for_its_limit(
    waiting: int, limiters: dict[str, Limiter], expected: list[tuple[Any, ...]]
) -> None:
    facts = health(waiting_for_capacity=waiting, capacity=limiters)
    assert found(facts) == [(Reason.SOURCE_CAPACITY_WAITING, *rest) for rest in expected]


@pytest.mark.parametrize(
    "waiting, expected",
    [(0, []), (1, [(DEGRADED, 1, 1, "cache")]), (4, [(CRITICAL, 1.0, 1.0, "cache")])],
)
def test_waiting_is_judged_by_component(waiting: int, expected: list[tuple[Any, ...]]) -> None:
    facts = health(
        waiting_for_copy_capacity=waiting,
        payload_copy_components={
            "builder": PayloadCopyHealth(True, 4),
            "cache": PayloadCopyHealth(True, 4, waiting_for_capacity=waiting),
        },
    )
    assert found(facts) == [(Reason.PAYLOAD_COPY_CAPACITY_WAITING, *rest) for rest in expected]


@pytest.mark.parametrize("pending, limit, expected", [
    (49, 100, []), (50, 100, [(DEGRADED, 0.5, 0.5, "")]), (89, 100, [(DEGRADED, 0.89, 0.5, "")]),
    (90, 100, [(CRITICAL, 0.9, 0.9, "")]), (5, None, []),
])  # fmt: skip
def test_a_submission_backlog_is_judged_by_its_share_of_the_limit(
    pending: int, limit: int | None, expected: list[tuple[Any, ...]]
) -> None:
    facts = health(pending_submissions=pending, max_pending_submissions=limit)
    assert found(facts) == [(Reason.SUBMISSION_BACKLOG_HIGH, *rest) for rest in expected]


def test_each_observability_buffer_is_judged_on_its_own() -> None:
    facts = health(
        observability_buffers={"events": Buffer(9), "metrics": Buffer(5), "other": Buffer(4)}
    )
    assert found(facts) == [
        (Reason.OBSERVABILITY_BACKLOG_HIGH, CRITICAL, 0.9, 0.9, "events"),
        (Reason.OBSERVABILITY_BACKLOG_HIGH, DEGRADED, 0.5, 0.5, "metrics"),
    ]


def test_a_buffer_of_unknown_size_has_no_backlog() -> None:
    assert found(health(observability_buffers={"events": Buffer(9, max_pending=0)})) == []


def test_circuits_that_are_not_closed_are_counted_by_state() -> None:
    facts = health(circuits={
        Identity("rest", "a"): Circuit(State.OPEN), Identity("rest", "b"): Circuit(State.OPEN),
        Identity("db"): Circuit(State.OPEN), Identity("feed"): Circuit(State.HALF_OPEN),
        Identity("fine"): Circuit(State.CLOSED),
    })  # fmt: skip
    assert found(facts) == [
        (Reason.CIRCUIT_OPEN, DEGRADED, 3, 1, "db, rest"),
        (Reason.CIRCUIT_HALF_OPEN, DEGRADED, 1, 1, "feed"),
    ]


@dataclasses.dataclass(frozen=True)
class Group:
    """Many circuits put together, as a builder tells of them."""

    state: State
    open: int = 0
    half_open: int = 0


def test_circuits_that_are_put_together_are_counted_one_by_one() -> None:
    facts = health(
        circuits={
            Identity("rest", "by key"): Group(State.OPEN, open=3, half_open=2),
            Identity("rest", "by subject"): Group(State.HALF_OPEN, half_open=1),
            Identity("fine"): Group(State.CLOSED),
        }
    )
    assert found(facts) == [
        (Reason.CIRCUIT_OPEN, DEGRADED, 3, 1, "rest"),
        (Reason.CIRCUIT_HALF_OPEN, DEGRADED, 3, 1, "rest"),
    ]


@dataclass(frozen=True)
class Slow:
    """A source that has answered nobody in time for so many calls."""

    deadline_cuts_in_a_row: int


def test_sources_that_are_slower_than_the_deadlines_of_their_readers_are_named() -> None:
    facts = health(sources={"a": Slow(3), "b": Slow(2), "c": Slow(7), "d": object()})
    assert found(facts) == [
        (Reason.SOURCE_SLOWER_THAN_DEADLINES, DEGRADED, 3, 3, "a"),
        (Reason.SOURCE_SLOWER_THAN_DEADLINES, DEGRADED, 7, 3, "c"),
    ]


GROWTH = [
    ("queue_timeout_count", Reason.QUEUE_TIMEOUTS_INCREASED),
    ("source_timeout_count", Reason.SOURCE_TIMEOUTS_INCREASED),
    ("source_transport_timeout_violation_count",
        Reason.SOURCE_TRANSPORT_TIMEOUT_VIOLATIONS_INCREASED),
    ("deadline_exceeded_count", Reason.DEADLINES_EXCEEDED_INCREASED),
    ("revalidation_failure_count", Reason.REVALIDATION_FAILURES_INCREASED),
    ("payload_copy_failure_count", Reason.PAYLOAD_COPY_FAILURES_INCREASED),
    ("payload_copy_timeout_count", Reason.PAYLOAD_COPY_TIMEOUTS_INCREASED),
    ("payload_copy_shutdown_timeout_count", Reason.PAYLOAD_COPY_SHUTDOWN_TIMEOUTS_INCREASED),
    ("observability_dropped_count", Reason.OBSERVABILITY_DROPS_INCREASED),
    ("observability_shutdown_timeout_count", Reason.OBSERVABILITY_SHUTDOWN_TIMEOUTS_INCREASED),
    ("observability_failure_count", Reason.OBSERVABILITY_FAILURES_INCREASED),
    ("cache_failure_count", Reason.CACHE_FAILURES_INCREASED),
]  # fmt: skip


@pytest.mark.parametrize("counter, reason", GROWTH)
@pytest.mark.parametrize("grown, expected", [
    (-3, []), (0, []), (1, [(DEGRADED, 1, 1, "")]), (4, [(DEGRADED, 4, 1, "")]),
    (5, [(CRITICAL, 5, 5, "")]), (9, [(CRITICAL, 9, 5, "")]),
])  # fmt: skip
def test_a_counter_is_judged_by_its_growth(
    counter: str, reason: BuilderHealthReason, grown: int, expected: list[tuple[Any, ...]]
) -> None:
    now = health(**{counter: 10 + grown})
    assert found(now, previous=health(**{counter: 10})) == [(reason, *rest) for rest in expected]


def test_without_an_earlier_snapshot_no_counter_is_judged() -> None:
    verdict = health(**{counter: 1000 for counter, _ in GROWTH}).assess()
    assert (verdict.severity, verdict.baseline_used) == (HEALTHY, False)


def test_findings_come_in_one_order_and_every_reason_has_its_place() -> None:
    everything_at_once = health(
        closed=True, unsafe_blocking_source_count=1,
        observability_buffers={"events": Buffer(10, worker_alive=False)},
        payload_copy_shutdown_incomplete=True, observability_shutdown_incomplete=True,
        waiting_for_capacity=1, waiting_for_copy_capacity=1, pending_submissions=10,
        max_pending_submissions=10,
        circuits={Identity("b"): Circuit(State.HALF_OPEN), Identity("a"): Circuit(State.OPEN)},
        sources={"c": Slow(3)}, cache_left_alone=True, **{counter: 5 for counter, _ in GROWTH},
    )  # fmt: skip
    verdict = everything_at_once.assess(previous=health())
    assert verdict.reasons == (
        Reason.BUILDER_CLOSED, Reason.UNSAFE_BLOCKING_SOURCE, Reason.OBSERVABILITY_WORKER_STOPPED,
        Reason.PAYLOAD_COPY_SHUTDOWN_INCOMPLETE, Reason.OBSERVABILITY_SHUTDOWN_INCOMPLETE,
        Reason.SOURCE_CAPACITY_WAITING, Reason.PAYLOAD_COPY_CAPACITY_WAITING,
        Reason.SUBMISSION_BACKLOG_HIGH, Reason.OBSERVABILITY_BACKLOG_HIGH, Reason.CIRCUIT_OPEN,
        Reason.CIRCUIT_HALF_OPEN, Reason.SOURCE_SLOWER_THAN_DEADLINES, Reason.CACHE_LEFT_ALONE,
        *(reason for _, reason in GROWTH),
    )  # fmt: skip
    assert set(verdict.reasons) == set(BuilderHealthReason)
    assert (verdict.severity, verdict.baseline_used) == (CRITICAL, True)


def test_the_worst_finding_decides() -> None:
    assert health(waiting_for_capacity=1).assess().severity is DEGRADED
    assert health(waiting_for_capacity=1, closed=True).assess().severity is CRITICAL


def test_a_reason_found_twice_is_given_once() -> None:
    facts = health(observability_buffers={"events": Buffer(9), "metrics": Buffer(9)})
    verdict = facts.assess()
    assert len(verdict.findings) == 2
    assert verdict.reasons == (Reason.OBSERVABILITY_BACKLOG_HIGH,)


QUEUED = {"waiting_for_capacity": 4, "capacity": {"rest": Limiter(2, 4)}}
WAITING = PayloadCopyHealth(True, 4, waiting_for_capacity=1)
COPYING = {"waiting_for_copy_capacity": 1, "payload_copy_components": {"cache": WAITING}}


def backlog(pending: int) -> dict[str, Any]:
    return {"pending_submissions": pending, "max_pending_submissions": 10}


def buffered(pending: int) -> dict[str, Any]:
    return {"observability_buffers": {"events": Buffer(pending)}}


@pytest.mark.parametrize("policy, facts, expected", [
    ({"capacity_waiting_degraded": 3}, {"waiting_for_capacity": 2}, HEALTHY),
    ({"capacity_waiting_critical_ratio": 2.5}, QUEUED, DEGRADED),
    ({"copy_waiting_degraded": 3}, {"waiting_for_copy_capacity": 2}, HEALTHY),
    ({"copy_waiting_critical_ratio": 0.25}, COPYING, CRITICAL),
    ({"submission_backlog_degraded_ratio": 0.2}, backlog(2), DEGRADED),
    ({"submission_backlog_critical_ratio": 1.0}, backlog(9), DEGRADED),
    ({"observability_backlog_degraded_ratio": 0.2}, buffered(2), DEGRADED),
    ({"observability_backlog_critical_ratio": 0.6}, buffered(6), CRITICAL),
    ({"counter_delta_degraded": 2}, {"queue_timeout_count": 1}, HEALTHY),
    ({"deadline_cuts_degraded": 4}, {"sources": {"a": Slow(3)}}, HEALTHY),
    ({"deadline_cuts_degraded": 1}, {"sources": {"a": Slow(1)}}, DEGRADED),
    ({"counter_delta_critical": 2}, {"queue_timeout_count": 2}, CRITICAL),
])  # fmt: skip
def test_every_threshold_can_be_set(
    policy: dict[str, Any], facts: dict[str, Any], expected: BuilderHealthSeverity
) -> None:
    thresholds = BuilderHealthAssessmentPolicy(**policy)
    assert health(**facts).assess(previous=health(), policy=thresholds).severity is expected


@pytest.mark.parametrize("name, value, kind", [
    ("capacity_waiting_degraded", 0, ValueError), ("capacity_waiting_degraded", 1.0, TypeError),
    ("capacity_waiting_critical_ratio", 0, ValueError),
    ("capacity_waiting_critical_ratio", float("inf"), ValueError),
    ("copy_waiting_degraded", True, TypeError), ("copy_waiting_critical_ratio", "1", TypeError),
    ("submission_backlog_degraded_ratio", 0.0, ValueError),
    ("submission_backlog_degraded_ratio", float("nan"), ValueError),
    ("submission_backlog_critical_ratio", 1.1, ValueError),
    ("submission_backlog_critical_ratio", 0.4, ValueError),
    ("observability_backlog_degraded_ratio", -1, ValueError),
    ("observability_backlog_critical_ratio", 0.4, ValueError),
    ("deadline_cuts_degraded", 0, ValueError), ("counter_delta_degraded", 0, ValueError),
    ("counter_delta_critical", None, TypeError),
])  # fmt: skip
def test_a_threshold_must_make_sense(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=name):
        BuilderHealthAssessmentPolicy(**{name: value})


def test_critical_must_not_come_before_degraded() -> None:
    with pytest.raises(ValueError) as caught:
        BuilderHealthAssessmentPolicy(counter_delta_degraded=6)
    assert str(caught.value) == (
        "counter_delta_critical must not be below counter_delta_degraded (6), got 5"
    )


def test_a_verdict_is_reported_as_versioned_json() -> None:
    report = health(closed=True, waiting_for_capacity=2).assess(previous=health()).to_dict()
    assert report == {
        "schema": "coalestra.builder-health-assessment", "schema_version": 1,
        "severity": "critical", "baseline_used": True,
        "reasons": ["builder_closed", "source_capacity_waiting"],
        "findings": [
            {"reason": "builder_closed", "severity": "critical", "metric": "closed",
                "observed": True, "threshold": True, "component": ""},
            {"reason": "source_capacity_waiting", "severity": "degraded",
                "metric": "waiting_for_capacity", "observed": 2, "threshold": 1, "component": ""},
        ],
    }  # fmt: skip
    assert json.loads(json.dumps(report)) == report
    assert [report["findings"][0]] == [health(closed=True).assess().findings[0].to_dict()]


def test_a_verdict_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        health().assess().severity = CRITICAL  # type: ignore[misc]
