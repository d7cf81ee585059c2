"""The result of a build or a session: values by key, and errors by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, overload

from coalestra.core.frozen import EMPTY, FrozenDict, become, draft_of, immutable
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import a_kind_of, concealed, mapping, number, text
from coalestra.core.values import SnapshotValue

# What one build, session or refresh did, counted -------------------------------------------------


@immutable
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


# What a source is told about the work it is asked for --------------------------------------------


@immutable
@dataclass(frozen=True, slots=True, repr=False)
class FetchContext:
    """The circumstances of one build, session or refresh, for the sources it calls.

    Attributes:
        requested_at: when it began, in wall-clock seconds since the epoch.
        deadline_at: when it must end, in wall-clock seconds since the epoch; None for no deadline.
        deadline_monotonic: the same moment on the clock's monotonic reading, in seconds.
        metadata: what the caller wants sources to know; read-only.
        snapshot_id: the id of the snapshot being made.

    Raises:
        TypeError: for another type.
        ValueError: for a time that is not finite.
    """

    requested_at: float
    deadline_at: float | None = None
    deadline_monotonic: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=FrozenDict)
    snapshot_id: str = ""

    def __post_init__(self) -> None:
        number("requested_at", self.requested_at)
        number("deadline_at", self.deadline_at, optional=True)
        number("deadline_monotonic", self.deadline_monotonic, optional=True)
        text("snapshot_id", self.snapshot_id, empty=True)
        if not isinstance(self.metadata, FrozenDict):
            frozen = FrozenDict(mapping("metadata", self.metadata))
            object.__setattr__(self, "metadata", frozen)

    def __repr__(self) -> str:
        return concealed(self, "metadata")


_ContextDraft = draft_of(FetchContext)


def context_of(
    requested_at: float,
    deadline_at: float | None,
    deadline_monotonic: float | None,
    metadata: FrozenDict[str, Any],
    snapshot_id: str,
) -> FetchContext:
    """Return a `FetchContext` of arguments that are known to be good, without judging them."""
    draft: Any = _ContextDraft()
    draft.requested_at = requested_at
    draft.deadline_at = deadline_at
    draft.deadline_monotonic = deadline_monotonic
    draft.metadata = metadata
    draft.snapshot_id = snapshot_id
    draft.__class__ = FetchContext
    context: FetchContext = draft
    return context


# The result of a build or a session: values by key, and errors by key ----------------------------


T = TypeVar("T")


@immutable
@dataclass(frozen=True, slots=True, repr=False)
class Snapshot(Mapping[ResourceKey, SnapshotValue[Any]]):
    """An immutable mapping from keys to values, in the order in which they were asked for.

    Attributes:
        snapshot_id: the id of the build or session.
        created_at: when that began, in wall-clock seconds since the epoch.
        resources: the values; read-only.
        errors: why the keys without a value have none; read-only.
        diagnostics: what it took.
    """

    snapshot_id: str
    created_at: float
    resources: Mapping[ResourceKey, SnapshotValue[Any]]
    errors: Mapping[ResourceKey, Exception] = field(default_factory=FrozenDict)
    diagnostics: SnapshotDiagnostics = field(default_factory=lambda: NOTHING_COUNTED)

    def __post_init__(self) -> None:
        number("created_at", self.created_at)
        for name in ("resources", "errors"):
            mapping = getattr(self, name)
            if type(mapping) is not FrozenDict:
                object.__setattr__(self, name, FrozenDict(mapping))

    def __getitem__(self, key: ResourceKey) -> SnapshotValue[Any]:
        return self.resources[key]

    def __iter__(self) -> Iterator[ResourceKey]:
        return iter(self.resources)

    def __len__(self) -> int:
        return len(self.resources)

    def __contains__(self, key: object) -> bool:
        return key in self.resources

    @overload
    def value(self, key: ResourceKey) -> Any: ...

    @overload
    def value(self, key: ResourceKey, expected_type: type[T]) -> T: ...

    @overload
    def value(self, key: ResourceKey, expected_type: None) -> Any: ...

    def value(self, key: ResourceKey, expected_type: type[T] | None = None) -> T | Any:
        """Return the bare value of ``key``.

        Raises:
            KeyError: if it has none.
            TypeError: if it is not of the expected type.
        """
        found = self.resources[key].value
        if expected_type is not None and not isinstance(found, expected_type):
            raise TypeError(  # the payload itself is nobody's business
                f"value of {key.display} must be {a_kind_of(expected_type)}, got one of type "
                f"{type(found).__name__}"
            )
        return found

    @overload
    def maybe_value(self, key: ResourceKey) -> Any: ...

    @overload
    def maybe_value(self, key: ResourceKey, expected_type: type[T]) -> T | None: ...

    @overload
    def maybe_value(self, key: ResourceKey, expected_type: None) -> Any: ...

    def maybe_value(self, key: ResourceKey, expected_type: type[T] | None = None) -> T | Any:
        """Return the bare value of ``key``, or None if it has none.

        Raises:
            TypeError: if it has one that is not of the expected type.
        """
        return self.value(key, expected_type) if key in self.resources else None

    def error_for(self, key: ResourceKey) -> Exception | None:
        """Return why ``key`` has no value, or None."""
        return self.errors.get(key)

    @property
    def stale_keys(self) -> tuple[ResourceKey, ...]:
        """The keys whose values were older than their time to live when they were delivered."""
        return tuple(key for key, value in self.resources.items() if value.stale)

    @property
    def complete(self) -> bool:
        """Whether nothing that was asked for has failed."""
        return not self.errors

    def __repr__(self) -> str:
        counts = f"resources={len(self.resources)}, errors={len(self.errors)}"
        stale = len(self.stale_keys)
        return f"Snapshot(snapshot_id={self.snapshot_id!r}, {counts}, stale={stale})"


_SnapshotDraft = draft_of(Snapshot)


def snapshot_of(
    snapshot_id: str,
    created_at: float,
    resources: FrozenDict[ResourceKey, SnapshotValue[Any]],
    errors: FrozenDict[ResourceKey, Exception] = EMPTY,
    diagnostics: SnapshotDiagnostics = NOTHING_COUNTED,
) -> Snapshot:
    """Return a `Snapshot` of mappings that are frozen already, faster than its constructor does."""
    snapshot = object.__new__(Snapshot)
    draft: Any = snapshot
    become(draft, _SnapshotDraft)
    draft.snapshot_id = snapshot_id
    draft.created_at = created_at
    draft.resources = resources
    draft.errors = errors
    draft.diagnostics = diagnostics
    draft.__class__ = Snapshot
    return snapshot
