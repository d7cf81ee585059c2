"""Events and metrics: the sinks that come with the library, and buffers for any other."""

from coalestra.observability.buffered import (
    BufferedEventSink,
    BufferedMetricsSink,
    BufferedSinkStats,
)
from coalestra.observability.sinks import (
    BufferOverflowPolicy,
    EventRecord,
    InMemoryMetrics,
    LoggingEventSink,
    MetricRecord,
    MetricsSnapshot,
    NullEventSink,
    NullMetrics,
    ObservationSummary,
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
