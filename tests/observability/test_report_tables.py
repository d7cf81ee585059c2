"""What each report comes to: which counters and observations, and which events with which facts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coalestra._telemetry import COUNTERS
from coalestra.core.acceptance import SnapshotAcceptanceReason, SnapshotAcceptanceViolation
from coalestra.core.errors import SnapshotConsistencyError
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import SnapshotDiagnostics
from coalestra.observability import MetricRecord, NullEventSink, NullMetrics
from coalestra.observability.reports import COUNTED, Reporter, reporter_for
from coalestra.observability.sinks import FAILURES
from tests.observability.recording import EVENTS, Recorder, revision_of

PRICE = ResourceKey("market", "price", "BTC-SECRET")
DEPTH = ResourceKey("market", "depth", "BTC-SECRET")
OUTAGE = ConnectionError("the line is down")
DIAGNOSTICS = SnapshotDiagnostics(
    requested_resources=3, resolved_resources=2, failed_resources=1, duration_ms=4.5
)

Said = tuple[Callable[[Reporter], object], list[MetricRecord], list[tuple[str, dict[str, Any]]]]


def count(metric: str, **labels: str) -> MetricRecord:
    return MetricRecord("increment", metric, 1, labels)


def observed(metric: str, value: float, **labels: str) -> MetricRecord:
    return MetricRecord("observe", metric, value, labels)


def of_price(metric: str, **labels: str) -> MetricRecord:
    return count(metric, **labels, resource_namespace="market", resource_name="price")


def event(name: str, counted: MetricRecord | None = None, **facts: Any) -> Said:
    """An event that is told by its name; a resource and an error are told as texts."""
    forms = {"resource": str(PRICE), "error_type": "ConnectionError", "error": "the line is down"}
    given = {"resource": PRICE, "error_type": OUTAGE, "error": OUTAGE}
    named = {fact: given[fact] for fact in EVENTS[name].split() if fact in given}
    shown = {**facts, **{fact: forms[fact] for fact in named}}
    metrics = [] if counted is None else [counted]
    return lambda report: report.tell(name, **named, **facts), metrics, [(name, shown)]


def failed(status: str, name: str, **more: str) -> Said:
    """A source that brought nothing, for a reason."""
    told = {"resource": str(PRICE), "source": "exchange", "snapshot_id": "s1", **more}
    return (
        lambda report: report.source_failed(PRICE, "exchange", OUTAGE, "s1", status),
        [count("source_fetch_total", source="exchange", status=status)],
        [(name, told)],
    )


def built(failed: bool) -> Said:
    status = "error" if failed else "success"
    told = {"resources": 3, "resolved": 2, "failed": 1, "diagnostics": DIAGNOSTICS}
    return (
        lambda report: report.snapshot_built("s1", DIAGNOSTICS, build_failed=failed, strict=True),
        [
            count("snapshot_build_total", status=status),
            observed("snapshot_build_latency_ms", 4.5, status=status),
        ],
        [("snapshot_built", {**told, "snapshot_id": "s1", "build_failed": failed, "strict": True})],
    )


def resolved(succeeded: bool) -> Said:
    status, told = "success" if succeeded else "error", {"snapshot_id": "s1", "requested": 3}
    return (
        lambda report: report.session_resolved(succeeded=succeeded, latency_ms=1.0, **told),
        [
            count("snapshot_session_resolve_total", status=status),
            observed("snapshot_session_resolve_latency_ms", 1.0, status=status),
        ],
        [("snapshot_session_resolved", told)],
    )


def revalidated(committed: bool) -> Said:
    told = {"snapshot_id": "s1", "requested": 2, "affected": 4}
    kept = {"committed": committed, "retained_previous": not committed}
    status = "success" if committed else "error"
    return (
        lambda report: report.session_revalidated(committed=committed, **told),
        [count("snapshot_session_revalidate_total", status=status)],
        [("snapshot_session_revalidated", {**told, **kept})],
    )


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
IDS = {"snapshot_id": "s1", "parent_snapshot_id": "s0"}
RANKS = {"candidate_authority_rank": 1, "cached_authority_rank": 7}
REPORTS: dict[str, Said] = {
    "hit": event(
        "cache_hit",
        of_price("cache_access_total", status="fresh"),
        freshness="fresh",
        snapshot_id="s1",
    ),
    "bypass": event(
        "cache_bypassed",
        of_price("cache_access_total", status="revalidation_bypass"),
        reason="force_refresh",
        snapshot_id="s1",
    ),
    "cache": event(
        "cache_failed", count("cache_failure_total", operation="read"), operation="read"
    ),
    "joined": event(
        "resource_joined",
        of_price("singleflight_join_total"),
        snapshot_id="s1",
        joined_snapshot_id="s0",
    ),
    "scheduled": event(
        "resource_refresh_scheduled",
        of_price("resource_refresh_total", status="scheduled"),
        reason="refresh_ahead",
        snapshot_id="s1",
    ),
    "refreshed": event(
        "resource_refresh_completed",
        of_price("resource_refresh_total", status="success"),
        reason="refresh_ahead",
        source="exchange",
        **IDS,
    ),
    "refresh failed": event(
        "resource_refresh_failed",
        of_price("resource_refresh_total", status="failure"),
        reason="refresh_ahead",
        **IDS,
    ),
    "published": event(
        "resource_published",
        of_price("resource_publish_total", source="exchange", status="published"),
        source="exchange",
        observed_at=100.0,
        replaced=True,
        forced=False,
        authority_rank=7,
    ),
    "ignored": event(
        "resource_publish_ignored",
        of_price("resource_publish_total", source="exchange", status="ignored_older"),
        source="exchange",
        status="ignored_older",
        observed_at=90.0,
        cached_observed_at=100.0,
        **RANKS,
    ),
    "invalidated": event(
        "resource_invalidated", of_price("resource_invalidation_total"), reason="sold out"
    ),
    "copy": event(
        "payload_copy_deadline_exceeded",
        count("payload_copy_deadline_total", phase="delivery"),
        snapshot_id="s1",
        phase="delivery",
    ),
    "uncounted": event("snapshot_started", kind="build", snapshot_id="s1"),
    "failure": failed(
        "failure", "source_failed", error_type="ConnectionError", error="the line is down"
    ),
    "stale": failed(
        "stale", "source_failed", error_type="ConnectionError", error="the line is down"
    ),
    "rejected": failed("invalid_timestamp", "source_payload_rejected", error="the line is down"),
    "circuit": failed("circuit_open", "source_circuit_open", error="the line is down"),
    "absent": failed("absent", "resource_absent"),
    "resolved": (
        lambda report: report.resource_resolved(revision_of(PRICE), "batch", "s1"),
        [count("source_fetch_total", source="exchange", status="success")],
        [
            (
                "resource_resolved",
                {
                    "resource": str(PRICE),
                    "source": "exchange",
                    "latency_ms": 12.5,
                    "attempts": 2,
                    "source_kind": "batch",
                    "authority_rank": 7,
                    "snapshot_id": "s1",
                },
            )
        ],
    ),
    "built": built(failed=False),
    "build failed": built(failed=True),
    "stage": resolved(succeeded=True),
    "stage failed": resolved(succeeded=False),
    "committed": revalidated(committed=True),
    "retained": revalidated(committed=False),
    "accepted": (
        lambda report: report.acceptance_judged("s1", ()),
        [count("snapshot_acceptance_total", status="success")],
        [],
    ),
    "not accepted": (
        lambda report: report.acceptance_judged("s1", VIOLATIONS),
        [
            count("snapshot_acceptance_total", status="error"),
            *(
                count("snapshot_acceptance_violation_total", reason=reason)
                for reason in ("stale", "too_old", "stale")
            ),
        ],
        [
            (
                "snapshot_acceptance_failed",
                {"snapshot_id": "s1", "violations": 3, "reasons": ("stale", "too_old")},
            )
        ],
    ),
    "consistent": (
        lambda report: report.consistency_judged("s1", None),
        [count("snapshot_consistency_total", status="success", rule="observation_skew")],
        [],
    ),
    "inconsistent": (
        lambda report: report.consistency_judged("s1", SKEW),
        [count("snapshot_consistency_total", status="error", rule="observation_skew")],
        [
            (
                "snapshot_consistency_failed",
                {
                    "snapshot_id": "s1",
                    "resources": 2,
                    "oldest_resource": str(PRICE),
                    "newest_resource": str(DEPTH),
                    "observation_skew_ms": 2500.0,
                    "max_observation_skew_ms": 1000.0,
                },
            )
        ],
    ),
}


def told(report: Reporter | None, name: str) -> None:
    assert report is not None
    REPORTS[name][0](report)
    assert report.failures == 0


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_comes_to_these_metrics_and_these_events(name: str) -> None:
    both, metrics, events = Recorder(), Recorder(), Recorder()
    told(reporter_for(both, both), name)
    told(reporter_for(metrics, NullEventSink()), name)
    told(reporter_for(NullMetrics(), events), name)

    _, counted, said = REPORTS[name]
    assert both.metrics == metrics.metrics == counted
    assert [(each.event_type, each.payload) for each in both.events] == said
    assert both.events == events.events
    assert (metrics.events, events.metrics) == ([], [])


def test_every_event_that_counts_is_in_that_table_and_in_the_one_of_metrics() -> None:
    assert COUNTED.keys() <= {name for _, _, said in REPORTS.values() for name, _ in said}
    for metric, labels in COUNTED.values():
        named = {label.partition("=")[0] for label in labels.split()}
        resource = {"resource_namespace", "resource_name"} if "resource" in named else set()
        assert named - {"resource"} | resource == COUNTERS[metric][-1].keys()


def test_payloads_hold_plain_values_and_labels_never_tell_which_resource_it_was() -> None:
    for _, counted, said in REPORTS.values():
        assert "SECRET" not in str(counted)
        for _, payload in said:
            for name in payload.keys() - {"diagnostics", "reasons"}:
                assert type(payload[name]) in (str, int, float, bool)


def test_every_event_says_which_build_it_belongs_to_unless_it_belongs_to_none() -> None:
    of_no_build = {
        "cache_failed", "resource_published", "resource_publish_ignored", "resource_invalidated",
    }  # fmt: skip
    assert {name for name, facts in EVENTS.items() if "snapshot_id" not in facts} == of_no_build


def test_every_event_about_a_failure_is_logged_as_one() -> None:
    assert set(EVENTS) >= FAILURES
    about_failures = {name for name in EVENTS if "fail" in name or "reject" in name}
    assert about_failures <= FAILURES
