"""What one build, session or refresh did, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coalestra.core.drafts import become, draft_of
from coalestra.core.frozen import EMPTY, FrozenDict


@dataclass(frozen=True, slots=True)
class SnapshotDiagnostics:
    """How a snapshot came about: the counts of its own build or session, not of the builder.

    Attributes:
        duration_ms: how long it took, in milliseconds.
        requested_resources: how many different keys were asked for.
        resolved_resources, failed_resources: how many of them have a value, or an error.
        cache_hits, cache_misses: answers of the cache.
        cache_batch_reads, cache_batch_writes: calls that carried several keys to the cache.
        stale_values: delivered values older than their time to live.
        coalesced_requests: keys that joined an acquisition already under way.
        source_calls: calls of sources, retries not counted.
        batch_calls, derived_calls: how many of them were to batch and to derived sources.
        refresh_scheduled, refresh_completed, refresh_failed: background refreshes.
        support_cache_hits, support_cache_misses: remembered and new answers of ``supports``.
        retries: calls that were made again.
        batch_chunks: calls that batches were split into.
        future_timestamp_rejections: observations refused for lying in the future.
        observation_skew_ms: newest minus oldest observation, in milliseconds.
        source_calls_by_source: calls by name of source.
        source_latency_ms_by_source: the time spent in them, in milliseconds.
    """

    duration_ms: float = 0.0
    requested_resources: int = 0
    resolved_resources: int = 0
    failed_resources: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_batch_reads: int = 0
    cache_batch_writes: int = 0
    stale_values: int = 0
    coalesced_requests: int = 0
    source_calls: int = 0
    batch_calls: int = 0
    derived_calls: int = 0
    refresh_scheduled: int = 0
    refresh_completed: int = 0
    refresh_failed: int = 0
    support_cache_hits: int = 0
    support_cache_misses: int = 0
    retries: int = 0
    batch_chunks: int = 0
    future_timestamp_rejections: int = 0
    observation_skew_ms: float = 0.0
    source_calls_by_source: Mapping[str, int] = field(default_factory=FrozenDict)
    source_latency_ms_by_source: Mapping[str, float] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        for name in ("source_calls_by_source", "source_latency_ms_by_source"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))


class DiagnosticsRecorder:
    """The counters of ``SnapshotDiagnostics`` while they are still being counted.

    Whoever does the counting adds to the attributes; ``freeze`` reads them off, any number of
    times. What is not counted stays the class's own zero, so a new recorder costs next to nothing.
    """

    duration_ms: float = 0.0
    requested_resources: int = 0
    resolved_resources: int = 0
    failed_resources: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_batch_reads: int = 0
    cache_batch_writes: int = 0
    stale_values: int = 0
    coalesced_requests: int = 0
    source_calls: int = 0
    batch_calls: int = 0
    derived_calls: int = 0
    refresh_scheduled: int = 0
    refresh_completed: int = 0
    refresh_failed: int = 0
    support_cache_hits: int = 0
    support_cache_misses: int = 0
    retries: int = 0
    batch_chunks: int = 0
    future_timestamp_rejections: int = 0
    observation_skew_ms: float = 0.0

    def __init__(self) -> None:
        self.source_calls_by_source: dict[str, int] = {}
        self.source_latency_ms_by_source: dict[str, float] = {}

    def freeze(self, **overrides: Any) -> SnapshotDiagnostics:
        """Return what has been counted so far; ``overrides`` replace single counters.

        Raises:
            TypeError: if an override names no counter.
        """
        if overrides:
            return replace(self.freeze(), **overrides)
        frozen = object.__new__(SnapshotDiagnostics)
        draft: Any = frozen
        become(draft, _DiagnosticsDraft)
        draft.duration_ms = self.duration_ms
        draft.requested_resources = self.requested_resources
        draft.resolved_resources = self.resolved_resources
        draft.failed_resources = self.failed_resources
        draft.cache_hits = self.cache_hits
        draft.cache_misses = self.cache_misses
        draft.cache_batch_reads = self.cache_batch_reads
        draft.cache_batch_writes = self.cache_batch_writes
        draft.stale_values = self.stale_values
        draft.coalesced_requests = self.coalesced_requests
        draft.source_calls = self.source_calls
        draft.batch_calls = self.batch_calls
        draft.derived_calls = self.derived_calls
        draft.refresh_scheduled = self.refresh_scheduled
        draft.refresh_completed = self.refresh_completed
        draft.refresh_failed = self.refresh_failed
        draft.support_cache_hits = self.support_cache_hits
        draft.support_cache_misses = self.support_cache_misses
        draft.retries = self.retries
        draft.batch_chunks = self.batch_chunks
        draft.future_timestamp_rejections = self.future_timestamp_rejections
        draft.observation_skew_ms = self.observation_skew_ms
        calls, latencies = self.source_calls_by_source, self.source_latency_ms_by_source
        draft.source_calls_by_source = FrozenDict(calls) if calls else EMPTY
        draft.source_latency_ms_by_source = FrozenDict(latencies) if latencies else EMPTY
        draft.__class__ = SnapshotDiagnostics
        return frozen


_DiagnosticsDraft = draft_of(SnapshotDiagnostics)
NOTHING_COUNTED = SnapshotDiagnostics()
"""What there is to say of a snapshot that nobody has counted anything for."""
