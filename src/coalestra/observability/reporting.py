"""Everything the library reports, as one object that the engine calls by what has happened."""

from __future__ import annotations

from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.observability.buffered import BufferedEventSink, BufferedMetricsSink
from coalestra.observability.cache_reports import CacheReports
from coalestra.observability.publication_reports import PublicationReports
from coalestra.observability.refresh_reports import RefreshReports
from coalestra.observability.silence import NullEventSink, NullMetrics
from coalestra.observability.snapshot_reports import SnapshotReports
from coalestra.observability.source_reports import SourceReports


class Reporter(CacheReports, SourceReports, SnapshotReports, PublicationReports, RefreshReports):
    """One method per fact: it counts what the fact counts for, and emits its event if it has one.

    No method raises an ``Exception``. Get one from ``reporter_for``.
    """

    __slots__ = ()


def reporter_for(metrics: MetricsSink, events: EventSink) -> Reporter | None:
    """Return the reporter to these sinks, or None if both discard what they get.

    A null sink counts as one inside a buffer too. Subclasses of the null sinks do not: they may
    listen after all.
    """
    counting = type(_innermost(metrics)) is not NullMetrics
    telling = type(_innermost(events)) is not NullEventSink
    if not counting and not telling:
        return None
    return Reporter(metrics, events, counting=counting, telling=telling)


def _innermost(sink: MetricsSink | EventSink) -> MetricsSink | EventSink:
    while isinstance(sink, (BufferedMetricsSink, BufferedEventSink)):
        sink = sink.downstream
    return sink
