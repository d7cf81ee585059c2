"""Sinks that keep what they get, and sinks that misbehave on purpose."""

from __future__ import annotations

import threading
from typing import Any

from coalestra.core.keys import ResourceKey
from coalestra.core.values import Revision
from coalestra.observability import EventRecord, MetricRecord

PATIENCE = 20.0
"""Real seconds after which a test that waits for a thread has failed; never used up otherwise."""


def revision_of(
    key: ResourceKey, *, observed_at: float = 100.0, authority_rank: int = 7
) -> Revision:
    """A revision with its provenance, as reports look at it."""
    return Revision(
        key,
        None,
        None,
        "exchange",
        observed_at,
        100.0,
        "v1",
        latency_ms=12.5,
        attempts=2,
        authority_rank=authority_rank,
    )


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
