"""Sinks that keep what they get, and sinks that misbehave on purpose."""

from __future__ import annotations

import threading
from typing import Any

from coalestra.observability import EventRecord, MetricRecord
from tests.support.elsewhere import PATIENCE

EVENTS: dict[str, str] = {
    "snapshot_built": "snapshot_id resources resolved failed build_failed strict diagnostics",
    "snapshot_session_resolved": (
        "snapshot_id requested resolved failed total_resources strict retry_errors"
    ),
    "snapshot_session_revalidated": (
        "snapshot_id requested affected refreshed failed committed retained_previous strict "
        "force_refresh consistency_failed acceptance_failed"
    ),
    "snapshot_acceptance_failed": "snapshot_id violations reasons",
    "snapshot_consistency_failed": (
        "snapshot_id resources oldest_resource newest_resource observation_skew_ms "
        "max_observation_skew_ms"
    ),
    "cache_hit": "resource freshness snapshot_id",
    "cache_bypassed": "resource reason snapshot_id",
    "stale_fallback_used": "resource error_type snapshot_id",
    "resource_resolved": (
        "resource source latency_ms attempts source_kind authority_rank snapshot_id"
    ),
    "snapshot_started": "kind snapshot_id",
    "resource_joined": "resource snapshot_id joined_snapshot_id",
    "source_call_queued": "source keys snapshot_id",
    "source_call_started": "source keys attempt snapshot_id",
    "source_call_retried": "source attempt delay_seconds error_type error snapshot_id",
    "source_failed": "resource source error_type error snapshot_id",
    "source_payload_rejected": "resource source error snapshot_id",
    "source_circuit_open": "source resource error snapshot_id",
    "resource_published": "resource source observed_at replaced forced authority_rank",
    "resource_publish_ignored": (
        "resource source status observed_at cached_observed_at candidate_authority_rank "
        "cached_authority_rank"
    ),
    "resource_invalidated": "resource reason",
    "resource_refresh_scheduled": "resource reason snapshot_id",
    "resource_refresh_completed": "resource reason source snapshot_id parent_snapshot_id",
    "resource_refresh_failed": ("resource reason error_type error snapshot_id parent_snapshot_id"),
    "resource_absent": "resource source snapshot_id",
    "cache_failed": "operation error_type error",
    "source_transport_timeout_violated": (
        "source resource outcome declared_transport_timeout_seconds observed_elapsed_seconds "
        "grace_seconds snapshot_id"
    ),
    "source_transport_budget_rejected": (
        "source resource transport_timeout_seconds available_budget_seconds snapshot_id"
    ),
    "payload_copy_deadline_exceeded": "snapshot_id phase",
}
"""Every event, and the facts that it tells."""


class Recorder:
    """Both sinks in one: keeps what it gets, in order."""

    def __init__(self) -> None:
        self.metrics: list[MetricRecord] = []
        self.events: list[EventRecord] = []

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        self.metrics.append(MetricRecord("increment", metric, value, labels))

    def observe(self, metric: str, value: float, **labels: str) -> None:
        self.metrics.append(MetricRecord("observe", metric, value, labels))

    def emit(self, event_type: str, **payload: Any) -> None:
        self.events.append(EventRecord(event_type, payload))

    @property
    def emitted(self) -> list[str]:
        return [event.event_type for event in self.events]


class Raising:
    """Both sinks in one: raises whatever it is told to, and counts the calls."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def _raise(self) -> None:
        self.calls += 1
        raise self.error

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        self._raise()

    def observe(self, metric: str, value: float, **labels: str) -> None:
        self._raise()

    def emit(self, event_type: str, **payload: Any) -> None:
        self._raise()


class Held(Recorder):
    """Holds each delivery until the test lets everything through."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Event()
        self._through = threading.Event()

    def let_through(self) -> None:
        self._through.set()

    def wait_arrived(self) -> None:
        """Wait until the first delivery has begun."""
        assert self.arrived.wait(PATIENCE)

    def _hold(self) -> None:
        self.arrived.set()
        assert self._through.wait(PATIENCE)

    def emit(self, event_type: str, **payload: Any) -> None:
        self._hold()
        super().emit(event_type, **payload)

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        self._hold()
        super().increment(metric, value, **labels)
