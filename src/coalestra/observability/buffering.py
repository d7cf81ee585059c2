"""Which sinks of a builder get a buffer, and how these buffers are looked into and closed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.validation import flag, require_methods
from coalestra.observability.overflow import DEFAULT_MAX_PENDING, BufferOverflowPolicy
from coalestra.observability.silence import NullEventSink, NullMetrics

if TYPE_CHECKING:
    from coalestra.observability.backlog import BufferedSinkStats
    from coalestra.observability.buffered import BufferedEventSink, BufferedMetricsSink
    from coalestra.observability.reporting import Reporter

    Buffer = BufferedEventSink | BufferedMetricsSink


class ObservabilitySinks:
    """The sinks of one builder as it uses them.

    Attributes:
        metrics: the metrics sink, buffered or not.
        events: the event sink, buffered or not.
        buffers: every buffered sink by component, ``events`` and ``metrics``.
        owned: those of them that were put there on the builder's behalf, and are its to close.
    """

    __slots__ = ("buffers", "events", "metrics", "owned")

    def __init__(
        self,
        metrics: MetricsSink,
        events: EventSink,
        buffers: Mapping[str, Buffer],
        owned: Mapping[str, Buffer],
    ) -> None:
        self.metrics = metrics
        self.events = events
        self.buffers = buffers
        self.owned = owned

    def reporter(self) -> Reporter | None:
        """Return what reports to these sinks, or None if both discard what they get."""
        if type(self.metrics) is NullMetrics and type(self.events) is NullEventSink:
            return None
        from coalestra.observability.reporting import reporter_for

        return reporter_for(self.metrics, self.events)

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
    sinks = ObservabilitySinks(used_metrics, used_events, {}, {})
    if metrics is None and events is None and not buffer:
        return sinks
    return _in_buffers(sinks, buffer, max_pending, overflow)


def _in_buffers(
    sinks: ObservabilitySinks,
    buffer: bool | None,
    max_pending: int,
    overflow: BufferOverflowPolicy,
) -> ObservabilitySinks:
    from coalestra.observability.buffered import BufferedEventSink, BufferedMetricsSink

    metrics, events = sinks.metrics, sinks.events
    owned: dict[str, Buffer] = {}
    if not isinstance(events, BufferedEventSink) and _wants_buffer(events, buffer):
        events = owned["events"] = BufferedEventSink(
            events, max_pending=max_pending, overflow=overflow
        )
    if not isinstance(metrics, BufferedMetricsSink) and _wants_buffer(metrics, buffer):
        metrics = owned["metrics"] = BufferedMetricsSink(
            metrics, max_pending=max_pending, overflow=overflow
        )
    buffers: dict[str, Buffer] = {}
    if isinstance(events, BufferedEventSink):
        buffers["events"] = events
    if isinstance(metrics, BufferedMetricsSink):
        buffers["metrics"] = metrics
    return ObservabilitySinks(metrics, events, buffers, owned)


def _wants_buffer(sink: object, buffer: bool | None) -> bool:
    if buffer is None:
        return getattr(sink, "coalestra_non_blocking", False) is not True
    return buffer
