"""The reporter against the tables of counters, observations and events, row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from coalestra.core.acceptance import SnapshotAcceptanceReason, SnapshotAcceptanceViolation
from coalestra.core.errors import SnapshotConsistencyError
from coalestra.core.keys import ResourceKey
from coalestra.core.results import PublishStatus
from coalestra.core.snapshot import SnapshotDiagnostics
from coalestra.observability import NullEventSink, NullMetrics
from coalestra.observability.reports import Reporter, reporter_for
from coalestra.observability.sinks import FAILURES
from tests.observability.recording import Recorder, revision_of


def names(text: str) -> set[str]:
    return set(text.split())


RESOURCE = {"resource_namespace", "resource_name"}

COUNTERS: dict[str, set[str]] = {
    "snapshot_build_total": {"status"},
    "snapshot_session_resolve_total": {"status"},
    "snapshot_session_revalidate_total": {"status"},
    "snapshot_acceptance_total": {"status"},
    "snapshot_acceptance_violation_total": {"reason"},
    "snapshot_consistency_total": {"status", "rule"},
    "cache_access_total": RESOURCE | {"status"},
    "singleflight_join_total": RESOURCE,
    "source_fetch_total": {"source", "status"},
    "source_batch_call_total": {"source", "status"},
    "source_capacity_timeout_total": {"source", "reason"},
    "source_transport_budget_rejection_total": {"source", "reason"},
    "source_transport_timeout_violation_total": {"source", "outcome"},
    "resource_publish_total": RESOURCE | {"source", "status"},
    "resource_invalidation_total": RESOURCE,
    "resource_refresh_total": RESOURCE | {"status"},
    "payload_copy_deadline_total": {"phase"},
    "cache_failure_total": {"operation"},
}

OBSERVATIONS: dict[str, set[str]] = {
    "snapshot_build_latency_ms": {"status"},
    "snapshot_session_resolve_latency_ms": {"status"},
    "source_fetch_latency_ms": {"source"},
    "source_capacity_wait_ms": {"source"},
    "source_batch_size": {"source"},
}

EVENTS: dict[str, set[str]] = {
    "snapshot_built": names(
        "snapshot_id resources resolved failed build_failed strict diagnostics"
    ),
    "snapshot_session_resolved": names(
        "snapshot_id requested resolved failed total_resources strict retry_errors"
    ),
    "snapshot_session_revalidated": names(
        "snapshot_id requested affected refreshed failed committed retained_previous strict "
        "force_refresh consistency_failed acceptance_failed"
    ),
    "snapshot_acceptance_failed": {"snapshot_id", "violations", "reasons"},
    "snapshot_consistency_failed": names(
        "snapshot_id resources oldest_resource newest_resource observation_skew_ms "
        "max_observation_skew_ms"
    ),
    "cache_hit": {"resource", "freshness", "snapshot_id"},
    "cache_bypassed": {"resource", "reason", "snapshot_id"},
    "stale_fallback_used": {"resource", "error_type", "snapshot_id"},
    "resource_resolved": names(
        "resource source latency_ms attempts source_kind authority_rank snapshot_id"
    ),
    "source_failed": {"resource", "source", "error_type", "error", "snapshot_id"},
    "source_payload_rejected": {"resource", "source", "error", "snapshot_id"},
    "source_circuit_open": {"source", "resource", "error", "snapshot_id"},
    "resource_absent": {"resource", "source", "snapshot_id"},
    "source_transport_timeout_violated": names(
        "source resource outcome declared_transport_timeout_seconds observed_elapsed_seconds "
        "grace_seconds snapshot_id"
    ),
    "source_transport_budget_rejected": names(
        "source resource transport_timeout_seconds available_budget_seconds snapshot_id"
    ),
    "resource_published": names("resource source observed_at replaced forced authority_rank"),
    "resource_publish_ignored": names(
        "resource source status observed_at cached_observed_at candidate_authority_rank "
        "cached_authority_rank"
    ),
    "resource_invalidated": {"resource", "reason"},
    "resource_refresh_scheduled": {"resource", "reason", "snapshot_id"},
    "resource_refresh_completed": names("resource reason source snapshot_id parent_snapshot_id"),
    "resource_refresh_failed": names(
        "resource reason error_type error snapshot_id parent_snapshot_id"
    ),
    "payload_copy_deadline_exceeded": {"snapshot_id", "phase"},
    "snapshot_started": {"kind", "snapshot_id"},
    "resource_joined": {"resource", "snapshot_id", "joined_snapshot_id"},
    "source_call_queued": {"source", "keys", "snapshot_id"},
    "source_call_started": {"source", "keys", "attempt", "snapshot_id"},
    "source_call_retried": names("source attempt delay_seconds error_type error snapshot_id"),
    "cache_failed": {"operation", "error_type", "error"},
}

PRICE = ResourceKey("market", "price", "BTC-SECRET")
DEPTH = ResourceKey("market", "depth", "BTC-SECRET")
OUTAGE = ConnectionError("the line is down")

DIAGNOSTICS = SnapshotDiagnostics(requested_resources=3, resolved_resources=2, failed_resources=1)
RESOLUTION = {
    "snapshot_id": "s1",
    "requested": 3,
    "resolved": 2,
    "failed": 1,
    "total_resources": 5,
    "strict": False,
    "retry_errors": True,
}
REVALIDATION = {
    "snapshot_id": "s1",
    "requested": 2,
    "affected": 4,
    "refreshed": 3,
    "failed": 1,
    "strict": True,
    "force_refresh": True,
    "consistency_failed": True,
    "acceptance_failed": False,
}
VIOLATIONS = (
    SnapshotAcceptanceViolation(SnapshotAcceptanceReason.STALE, (PRICE,), "is stale"),
    SnapshotAcceptanceViolation(SnapshotAcceptanceReason.TOO_OLD, (PRICE,), "is too old"),
    SnapshotAcceptanceViolation(SnapshotAcceptanceReason.STALE, (DEPTH,), "is stale"),
)
SKEW = SnapshotConsistencyError(
    keys=(PRICE, DEPTH),
    oldest_key=PRICE,
    oldest_observed_at=100.0,
    newest_key=DEPTH,
    newest_observed_at=102.5,
    observation_skew_seconds=2.5,
    max_observation_skew_seconds=1.0,
)

Call = Callable[[Reporter], None]


def ignored(report: Reporter, status: PublishStatus) -> None:
    candidate = revision_of(PRICE, observed_at=90.0, authority_rank=1)
    report.resource_publish_ignored(candidate, revision_of(PRICE), status)


OTHER_EVENTS_OF_SOURCE_FAILED = {
    "source_payload_rejected",
    "source_circuit_open",
    "resource_absent",
}

CALLS: dict[str, list[Call]] = {
    "cache_access": [
        lambda r: r.cache_access(PRICE, "fresh"),
        lambda r: r.cache_access(PRICE, "miss"),
        lambda r: r.cache_access(PRICE, "absent"),
    ],
    "cache_hit": [
        lambda r: r.cache_hit(PRICE, "fresh", "s1"),
        lambda r: r.cache_hit(PRICE, "stale_while_revalidate", "s1"),
    ],
    "warm_hits": [lambda r: r.warm_hits([PRICE], "s1")],
    "cache_bypassed": [lambda r: r.cache_bypassed(PRICE, "force_refresh", "s1")],
    "stale_fallback_used": [lambda r: r.stale_fallback_used(PRICE, OUTAGE, "s1")],
    "cache_failed": [lambda r: r.cache_failed("read", OUTAGE)],
    "flight_joined": [lambda r: r.flight_joined(PRICE, "s1", "s0")],
    "resource_resolved": [lambda r: r.resource_resolved(revision_of(PRICE), "batch", "s1")],
    "source_failed": [
        lambda r: r.source_failed(PRICE, "exchange", OUTAGE, "s1"),
        lambda r: r.source_failed(PRICE, "exchange", OUTAGE, "s1", "stale"),
    ],
    "source_payload_rejected": [
        lambda r: r.source_failed(PRICE, "exchange", OUTAGE, "s1", "invalid_timestamp")
    ],
    "source_circuit_open": [
        lambda r: r.source_failed(PRICE, "exchange", OUTAGE, "s1", "circuit_open")
    ],
    "resource_absent": [lambda r: r.source_failed(PRICE, "exchange", OUTAGE, "s1", "absent")],
    "fetch_latency": [lambda r: r.fetch_latency("exchange", 12.5)],
    "batch_call": [
        lambda r: r.batch_call("exchange", "success"),
        lambda r: r.batch_call("exchange", "failure"),
        lambda r: r.batch_call("exchange", "deadline_exceeded"),
        lambda r: r.batch_call("exchange", "queue_timeout"),
    ],
    "work_begun": [lambda r: r.work_begun("build", "s1")],
    "call_queued": [lambda r: r.call_queued("exchange", 3, "s1")],
    "call_started": [lambda r: r.call_started("exchange", 3, 2, "s1")],
    "call_retried": [lambda r: r.call_retried("exchange", 1, 0.5, OUTAGE, "s1")],
    "batch_size": [lambda r: r.batch_size("exchange", 25)],
    "capacity_wait": [lambda r: r.capacity_wait("exchange", 3.5)],
    "capacity_timeout": [
        lambda r: r.capacity_timeout("exchange", "queue_timeout"),
        lambda r: r.capacity_timeout("exchange", "snapshot_deadline"),
    ],
    "transport_violated": [
        lambda r: r.transport_violated(
            [PRICE, DEPTH],
            "exchange",
            "completed_late",
            "s1",
            declared_transport_timeout_seconds=1.0,
            observed_elapsed_seconds=1.5,
            grace_seconds=0.05,
        )
    ],
    "transport_budget_rejected": [
        lambda r: r.transport_budget_rejected(
            [PRICE, DEPTH], "exchange", "snapshot_deadline", 1.0, 0.5, "s1"
        )
    ],
    "snapshot_built": [
        lambda r: r.snapshot_built("s1", DIAGNOSTICS, build_failed=False, strict=True),
        lambda r: r.snapshot_built("s1", DIAGNOSTICS, build_failed=True, strict=True),
    ],
    "session_resolved": [
        lambda r: r.session_resolved(succeeded=True, latency_ms=1.0, **RESOLUTION),
        lambda r: r.session_resolved(succeeded=False, latency_ms=1.0, **RESOLUTION),
    ],
    "session_revalidated": [
        lambda r: r.session_revalidated(committed=True, **REVALIDATION),
        lambda r: r.session_revalidated(committed=False, **REVALIDATION),
    ],
    "acceptance_judged": [
        lambda r: r.acceptance_judged("s1", ()),
        lambda r: r.acceptance_judged("s1", VIOLATIONS),
    ],
    "consistency_judged": [
        lambda r: r.consistency_judged("s1", None),
        lambda r: r.consistency_judged("s1", SKEW),
    ],
    "copy_deadline_exceeded": [lambda r: r.copy_deadline_exceeded("s1", "delivery")],
    "resource_published": [
        lambda r: r.resource_published(revision_of(PRICE), replaced=True, forced=False)
    ],
    "resource_publish_ignored": [
        partial(ignored, status=PublishStatus.IGNORED_DUPLICATE),
        partial(ignored, status=PublishStatus.IGNORED_LOWER_AUTHORITY),
        partial(ignored, status=PublishStatus.IGNORED_OLDER),
    ],
    "resource_invalidated": [lambda r: r.resource_invalidated(PRICE, "sold out")],
    "refresh_scheduled": [lambda r: r.refresh_scheduled(PRICE, "refresh_ahead", "s1")],
    "refresh_completed": [
        lambda r: r.refresh_completed(PRICE, "refresh_ahead", "exchange", "s1", "s0")
    ],
    "refresh_failed": [lambda r: r.refresh_failed(PRICE, "refresh_ahead", OUTAGE, "s1", "s0")],
    "refresh_came_to": [
        lambda r: r.refresh_came_to(PRICE, "cancelled"),
        lambda r: r.refresh_came_to(PRICE, "absent"),
    ],
}


def reported(*names: str) -> Recorder:
    """Make the calls of these methods (all of them if none is named) and keep what comes out."""
    sink = Recorder()
    report = reporter_for(sink, sink)
    assert report is not None
    call_everything(report, *names)
    return sink


def call_everything(report: Reporter, *names: str) -> None:
    for name in names or CALLS:
        for call in CALLS[name]:
            call(report)
    assert report.failures == 0


@pytest.mark.parametrize("metric", COUNTERS)
def test_each_counter_is_counted_with_exactly_its_labels(metric: str) -> None:
    records = [record for record in reported().metrics if record.metric == metric]

    assert {record.operation for record in records} == {"increment"}
    assert {record.value for record in records} == {1}
    assert {frozenset(record.labels) for record in records} == {frozenset(COUNTERS[metric])}


@pytest.mark.parametrize("metric", OBSERVATIONS)
def test_each_observation_is_made_with_exactly_its_labels(metric: str) -> None:
    records = [record for record in reported().metrics if record.metric == metric]

    assert {record.operation for record in records} == {"observe"}
    assert {frozenset(record.labels) for record in records} == {frozenset(OBSERVATIONS[metric])}


@pytest.mark.parametrize("event_type", EVENTS)
def test_each_event_carries_exactly_its_fields(event_type: str) -> None:
    events = [event for event in reported().events if event.event_type == event_type]

    assert {frozenset(event.payload) for event in events} == {frozenset(EVENTS[event_type])}


def test_nothing_is_reported_that_the_tables_do_not_name() -> None:
    sink = reported()

    assert {record.metric for record in sink.metrics} == {*COUNTERS, *OBSERVATIONS}
    assert set(sink.emitted) == set(EVENTS)


def test_every_method_of_the_reporter_is_held_against_the_tables() -> None:
    own = {"failures", "listens"}
    methods = {name for name in dir(Reporter) if not name.startswith("_")} - own

    assert methods == set(CALLS) - OTHER_EVENTS_OF_SOURCE_FAILED


STATUSES = {
    "snapshot_build_total": {"success", "error"},
    "snapshot_build_latency_ms": {"success", "error"},
    "snapshot_session_resolve_latency_ms": {"success", "error"},
    "snapshot_session_resolve_total": {"success", "error"},
    "snapshot_session_revalidate_total": {"success", "error"},
    "snapshot_acceptance_total": {"success", "error"},
    "snapshot_consistency_total": {"success", "error"},
    "cache_access_total": {
        "fresh",
        "stale_while_revalidate",
        "miss",
        "stale_fallback",
        "revalidation_bypass",
        "absent",
    },
    "source_fetch_total": {
        "success",
        "failure",
        "stale",
        "invalid_timestamp",
        "circuit_open",
        "absent",
    },
    "resource_publish_total": {status.value for status in PublishStatus},
    "resource_refresh_total": {"scheduled", "success", "failure", "cancelled", "absent"},
}


@pytest.mark.parametrize("metric", STATUSES)
def test_the_status_of_a_metric_takes_each_of_its_values_and_no_other(metric: str) -> None:
    seen = {record.labels["status"] for record in reported().metrics if record.metric == metric}

    assert seen == STATUSES[metric]


def test_labels_are_plain_strings_and_never_tell_which_resource_it_was() -> None:
    for record in reported().metrics:
        for value in record.labels.values():
            assert type(value) is str
            assert "SECRET" not in value


def test_payloads_hold_plain_values_only() -> None:
    for event in reported().events:
        for name, value in event.payload.items():
            if name == "diagnostics":
                assert value == DIAGNOSTICS
            elif name == "reasons":
                assert {type(reason) for reason in value} == {str}
            else:
                assert type(value) in (str, int, float, bool), (event.event_type, name)


def test_events_name_the_resource_in_full() -> None:
    resources = {event.payload.get("resource") for event in reported("cache_hit").events}

    assert resources == {str(PRICE)}


PAYLOADS: dict[str, dict[str, object]] = {
    "snapshot_built": {
        "snapshot_id": "s1",
        "resources": 3,
        "resolved": 2,
        "failed": 1,
        "build_failed": True,
        "strict": True,
        "diagnostics": DIAGNOSTICS,
    },
    "acceptance_judged": {
        "snapshot_id": "s1",
        "violations": 3,
        "reasons": ("stale", "too_old"),
    },
    "consistency_judged": {
        "snapshot_id": "s1",
        "resources": 2,
        "oldest_resource": str(PRICE),
        "newest_resource": str(DEPTH),
        "observation_skew_ms": 2500.0,
        "max_observation_skew_ms": 1000.0,
    },
    "session_resolved": {
        "snapshot_id": "s1",
        "requested": 3,
        "resolved": 2,
        "failed": 1,
        "total_resources": 5,
        "strict": False,
        "retry_errors": True,
    },
    "session_revalidated": {
        "snapshot_id": "s1",
        "requested": 2,
        "affected": 4,
        "refreshed": 3,
        "failed": 1,
        "committed": False,
        "retained_previous": True,
        "strict": True,
        "force_refresh": True,
        "consistency_failed": True,
        "acceptance_failed": False,
    },
    "stale_fallback_used": {
        "resource": str(PRICE),
        "error_type": "ConnectionError",
        "snapshot_id": "s1",
    },
    "resource_resolved": {
        "resource": str(PRICE),
        "source": "exchange",
        "latency_ms": 12.5,
        "attempts": 2,
        "source_kind": "batch",
        "authority_rank": 7,
        "snapshot_id": "s1",
    },
    "source_failed": {
        "resource": str(PRICE),
        "source": "exchange",
        "error_type": "ConnectionError",
        "error": "the line is down",
        "snapshot_id": "s1",
    },
    "transport_violated": {
        "source": "exchange",
        "resource": str(DEPTH),
        "outcome": "completed_late",
        "declared_transport_timeout_seconds": 1.0,
        "observed_elapsed_seconds": 1.5,
        "grace_seconds": 0.05,
        "snapshot_id": "s1",
    },
    "transport_budget_rejected": {
        "source": "exchange",
        "resource": str(DEPTH),
        "transport_timeout_seconds": 1.0,
        "available_budget_seconds": 0.5,
        "snapshot_id": "s1",
    },
    "resource_published": {
        "resource": str(PRICE),
        "source": "exchange",
        "observed_at": 100.0,
        "replaced": True,
        "forced": False,
        "authority_rank": 7,
    },
    "resource_publish_ignored": {
        "resource": str(PRICE),
        "source": "exchange",
        "status": "ignored_older",
        "observed_at": 90.0,
        "cached_observed_at": 100.0,
        "candidate_authority_rank": 1,
        "cached_authority_rank": 7,
    },
    "refresh_failed": {
        "resource": str(PRICE),
        "reason": "refresh_ahead",
        "error_type": "ConnectionError",
        "error": "the line is down",
        "snapshot_id": "s1",
        "parent_snapshot_id": "s0",
    },
}


OF_NO_BUILD = {"cache_failed", "resource_published", "resource_publish_ignored"}


def test_every_event_says_which_build_it_belongs_to_unless_it_belongs_to_none() -> None:
    without = {name for name, fields in EVENTS.items() if "snapshot_id" not in fields}

    assert without == OF_NO_BUILD | {"resource_invalidated"}


@pytest.mark.parametrize("method", PAYLOADS)
def test_each_field_of_an_event_holds_the_fact_it_is_named_after(method: str) -> None:
    payload = reported(method).events[-1].payload

    assert payload == PAYLOADS[method]


def test_each_violation_of_an_acceptance_policy_is_counted_under_its_reason() -> None:
    metrics = reported("acceptance_judged").metrics

    reasons = [record.labels["reason"] for record in metrics if "reason" in record.labels]
    assert reasons == ["stale", "too_old", "stale"]


@pytest.mark.parametrize("method", ["transport_violated", "transport_budget_rejected"])
def test_a_call_for_many_keys_counts_once_and_has_an_event_per_key(method: str) -> None:
    sink = reported(method)

    assert len(sink.metrics) == 1
    assert [event.payload["resource"] for event in sink.events] == [str(PRICE), str(DEPTH)]


def test_a_stale_value_that_a_source_brought_is_no_cache_access() -> None:
    sink = Recorder()
    report = reporter_for(sink, sink)
    assert report is not None

    report.stale_fallback_used(PRICE, OUTAGE, "s1", from_cache=False)

    assert sink.metrics == []
    assert sink.emitted == ["stale_fallback_used"]


def test_with_events_alone_the_same_events_come_and_no_metric_is_counted() -> None:
    sink = Recorder()
    report = reporter_for(NullMetrics(), sink)
    assert report is not None

    call_everything(report)

    assert sink.metrics == []
    assert sink.events == reported().events


def test_with_metrics_alone_the_same_metrics_come_and_no_event_is_emitted() -> None:
    sink = Recorder()
    report = reporter_for(sink, NullEventSink())
    assert report is not None

    call_everything(report)

    assert sink.events == []
    assert sink.metrics == reported().metrics


def test_every_event_about_a_failure_is_logged_as_one() -> None:
    assert set(EVENTS) >= FAILURES
    about_failures = {name for name in EVENTS if "fail" in name or "reject" in name}
    assert about_failures <= FAILURES
