"""Events and metrics: the sinks that come with the library, and buffers for any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
    from coalestra.observability.backlog import BufferedSinkStats, BufferOverflowPolicy
    from coalestra.observability.buffered import BufferedEventSink, BufferedMetricsSink
    from coalestra.observability.events import EventRecord, LoggingEventSink, NullEventSink
    from coalestra.observability.metrics import (
        InMemoryMetrics,
        MetricRecord,
        MetricsSnapshot,
        NullMetrics,
        ObservationSummary,
    )
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "backlog": ("BufferOverflowPolicy", "BufferedSinkStats"),
            "buffered": ("BufferedEventSink", "BufferedMetricsSink"),
            "events": ("EventRecord", "LoggingEventSink", "NullEventSink"),
            "metrics": (
                "InMemoryMetrics",
                "MetricRecord",
                "MetricsSnapshot",
                "NullMetrics",
                "ObservationSummary",
            ),
        },
    )

__all__ = [
    "BufferOverflowPolicy",
    "BufferedEventSink",
    "BufferedMetricsSink",
    "BufferedSinkStats",
    "EventRecord",
    "InMemoryMetrics",
    "LoggingEventSink",
    "MetricRecord",
    "MetricsSnapshot",
    "NullEventSink",
    "NullMetrics",
    "ObservationSummary",
]
