"""Events and metrics: the sinks that come with the library, and buffers for any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
    from coalestra.observability.backlog import BufferedSinkStats
    from coalestra.observability.buffered import BufferedEventSink, BufferedMetricsSink
    from coalestra.observability.events import EventRecord, LoggingEventSink
    from coalestra.observability.metrics import (
        InMemoryMetrics,
        MetricRecord,
        MetricsSnapshot,
        ObservationSummary,
    )
    from coalestra.observability.overflow import BufferOverflowPolicy
    from coalestra.observability.silence import NullEventSink, NullMetrics
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "backlog": ("BufferedSinkStats",),
            "buffered": ("BufferedEventSink", "BufferedMetricsSink"),
            "events": ("EventRecord", "LoggingEventSink"),
            "metrics": (
                "InMemoryMetrics",
                "MetricRecord",
                "MetricsSnapshot",
                "ObservationSummary",
            ),
            "overflow": ("BufferOverflowPolicy",),
            "silence": ("NullEventSink", "NullMetrics"),
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
