"""Which sinks of a builder get a buffer, and how these buffers are looked into and closed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.validation import flag, require_methods
from coalestra.observability.buffered import (
    DEFAULT_MAX_PENDING,
    BufferedEventSink,
    BufferedMetricsSink,
    BufferedSinkStats,
    BufferOverflowPolicy,
)
from coalestra.observability.events import NullEventSink
from coalestra.observability.metrics import NullMetrics

Buffer = BufferedEventSink | BufferedMetricsSink


@dataclasses.dataclass(frozen=True, slots=True)
class ObservabilitySinks:
    """The sinks of one builder as it uses them.

    Attributes:
        metrics: the metrics sink, buffered or not.
        events: the event sink, buffered or not.
        buffers: every buffered sink by component, ``events`` and ``metrics``.
        owned: those of them that were put there on the builder's behalf, and are its to close.
    """

    metrics: MetricsSink
    events: EventSink
    buffers: Mapping[str, Buffer]
    owned: Mapping[str, Buffer]

    def stats(self) -> dict[str, BufferedSinkStats]:
        """Return the state of every buffered sink, by component."""
        return {name: buffer.stats() for name, buffer in self.buffers.items()}

    def close(self, *, timeout_seconds: float | None = 5.0, drain: bool = True) -> dict[str, int]:
        """Close the owned buffers; this blocks the calling thread, so not on an event loop.

        Args:
            timeout_seconds: for all of them together; None waits as long as it takes.
            drain: deliver what is pending instead of discarding it.

        Returns:
            The pending records of each component whose worker still runs; empty if all is done.
            Calling again waits for those.
        """
        for buffer in self.owned.values():
            buffer.refuse(discard=not drain)
        end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        late = {}
        for name, buffer in self.owned.items():
            left = None if end is None else max(0.0, end - time.monotonic())
            if not buffer.close(timeout=left):
                late[name] = buffer.stats().pending
        return late


def buffer_sinks(
    metrics: MetricsSink | None,
    events: EventSink | None,
    *,
    buffer: bool | None = None,
    max_pending: int = DEFAULT_MAX_PENDING,
    overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
) -> ObservabilitySinks:
    """Put buffers before the sinks that need one. A buffered sink never gets a second buffer.

    Args:
        metrics: where counts and observations go; None discards them.
        events: where events go; None discards them.
        buffer: True for every sink, False for none, None for those that do not say
            ``coalestra_non_blocking = True``.
        max_pending: how many records may wait in each buffer (at least 1).
        overflow: what happens to one more.

    Raises:
        TypeError: an argument has the wrong type, or a sink lacks a method.
        ValueError: ``max_pending`` is below 1.
    """
    if buffer is not None:
        flag("buffer_observability", buffer)
    used_metrics = NullMetrics() if metrics is None else metrics
    used_events = NullEventSink() if events is None else events
    require_methods("metrics", used_metrics, "increment", "observe")
    require_methods("events", used_events, "emit")
    owned: dict[str, Buffer] = {}
    if _wants_buffer(used_events, buffer):
        used_events = owned["events"] = BufferedEventSink(
            used_events, max_pending=max_pending, overflow=overflow
        )
    if _wants_buffer(used_metrics, buffer):
        used_metrics = owned["metrics"] = BufferedMetricsSink(
            used_metrics, max_pending=max_pending, overflow=overflow
        )
    buffers = _buffered(used_metrics, used_events)
    return ObservabilitySinks(used_metrics, used_events, buffers, owned)


def _wants_buffer(sink: object, buffer: bool | None) -> bool:
    if isinstance(sink, (BufferedEventSink, BufferedMetricsSink)):
        return False
    if buffer is None:
        return getattr(sink, "coalestra_non_blocking", False) is not True
    return buffer


def _buffered(metrics: MetricsSink, events: EventSink) -> dict[str, Buffer]:
    buffers: dict[str, Buffer] = {}
    if isinstance(events, BufferedEventSink):
        buffers["events"] = events
    if isinstance(metrics, BufferedMetricsSink):
        buffers["metrics"] = metrics
    return buffers
