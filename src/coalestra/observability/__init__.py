"""Events and metrics: the sinks that come with the library, and buffers for any other."""

from coalestra.observability.buffered import (
    BufferedEventSink,
    BufferedMetricsSink,
    BufferedSinkStats,
    BufferOverflowPolicy,
)
from coalestra.observability.events import EventRecord, LoggingEventSink, NullEventSink
from coalestra.observability.metrics import (
    InMemoryMetrics,
    MetricRecord,
    MetricsSnapshot,
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
