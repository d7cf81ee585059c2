"""What one build, session or refresh did, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

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


@dataclass(slots=True, eq=False)
class DiagnosticsRecorder:
    """The counters of ``SnapshotDiagnostics`` while they are still being counted.

    Whoever does the counting adds to the attributes; ``freeze`` reads them off, any number of
    times.
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
    source_calls_by_source: dict[str, int] = field(default_factory=dict)
    source_latency_ms_by_source: dict[str, float] = field(default_factory=dict)

    def freeze(self, **overrides: Any) -> SnapshotDiagnostics:
        """Return what has been counted so far; ``overrides`` replace single counters.

        Raises:
            TypeError: if an override names no counter.
        """
        unknown = overrides.keys() - _SETTERS.keys()
        if unknown:
            raise TypeError(f"no such counters: {', '.join(sorted(unknown))}")
        frozen = object.__new__(SnapshotDiagnostics)
        for fill, counted in zip(_SETTERS.values(), _read(self), strict=True):
            fill(frozen, counted)
        for name in _MAPPINGS:
            counts = overrides.pop(name, None) or getattr(self, name)
            _SETTERS[name](frozen, FrozenDict(counts) if counts else EMPTY)
        for name, counted in overrides.items():
            _SETTERS[name](frozen, counted)
        return frozen


_MAPPINGS = ("source_calls_by_source", "source_latency_ms_by_source")
_SETTERS: dict[str, Callable[[SnapshotDiagnostics, Any], None]] = {
    counter.name: vars(SnapshotDiagnostics)[counter.name].__set__
    for counter in fields(SnapshotDiagnostics)
}
_read = attrgetter(*_SETTERS)
