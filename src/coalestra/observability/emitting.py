"""The one place where the library calls the sinks, and where their failures end."""

from __future__ import annotations

import threading
from typing import Any

from coalestra.core.protocols import EventSink, MetricsSink


class Emitter:
    """Hands counts, observations and events to the two sinks of one builder.

    Law: nothing that a sink raises leaves this class, except what is not an ``Exception``
    (cancellation, interrupts). Failures are counted instead.

    Subclasses look at ``_counting`` and ``_telling`` before they build labels or payloads, so
    that a side without a listener costs one attribute look-up.
    """

    __slots__ = ("_counting", "_events", "_failures", "_lock", "_metrics", "_telling")

    def __init__(
        self, metrics: MetricsSink, events: EventSink, *, counting: bool, telling: bool
    ) -> None:
        self._metrics = metrics
        self._events = events
        self._counting = counting
        self._telling = telling
        self._failures = 0
        self._lock = threading.Lock()

    @property
    def failures(self) -> int:
        """How often a sink has raised since this reporter was made."""
        return self._failures

    def _count(self, metric: str, **labels: str) -> None:
        try:
            self._metrics.increment(metric, 1, **labels)
        except Exception:
            self._note_failure()

    def _observe(self, metric: str, value: float, **labels: str) -> None:
        try:
            self._metrics.observe(metric, value, **labels)
        except Exception:
            self._note_failure()

    def _tell(self, event_type: str, **payload: Any) -> None:
        try:
            self._events.emit(event_type, **payload)
        except Exception:
            self._note_failure()

    def _note_failure(self) -> None:
        with self._lock:
            self._failures += 1

    def __repr__(self) -> str:
        metrics = type(self._metrics).__name__ if self._counting else "off"
        events = type(self._events).__name__ if self._telling else "off"
        return f"<{type(self).__name__} metrics={metrics} events={events} failures={self.failures}>"
