"""The result of a build or a session: values by key, and errors by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, overload

from coalestra.core import validation
from coalestra.core.errors import described_error
from coalestra.core.frozen import EMPTY, FrozenDict, filled, frozen
from coalestra.core.keys import ResourceKey
from coalestra.core.serialization import json_safe, utc_text
from coalestra.core.trace import Obtained, Trace, told_error, told_state, told_value
from coalestra.core.validation import a_kind_of, concealed, flag, instance, mapping, number, text
from coalestra.core.values import SnapshotValue

__all__ = ["FetchContext", "Snapshot", "SnapshotDiagnostics"]


_BY_SOURCE = ("source_calls_by_source", "source_latency_ms_by_source")


@dataclass(frozen=True)
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
        absent_answers: answers of sources that there is none, which are no failures.
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
    absent_answers: int = 0
    observation_skew_ms: float = 0.0
    source_calls_by_source: Mapping[str, int] = field(default_factory=FrozenDict)
    source_latency_ms_by_source: Mapping[str, float] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        for name in _BY_SOURCE:
            object.__setattr__(self, name, frozen(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return every attribute under its name, as JSON-safe data."""
        return {**json_safe(self)}


class DiagnosticsRecorder:
    """The counters of ``SnapshotDiagnostics`` while they are still being counted.

    Whoever does the counting adds to the attributes, which are those of that class; ``counted``
    reads them off, any number of times.
    """

    def __init__(self) -> None:
        self.source_calls_by_source: dict[str, int] = {}
        self.source_latency_ms_by_source: dict[str, float] = {}

    if TYPE_CHECKING:  # the rest are zeros of the class, until somebody counts them

        def __getattr__(self, counter: str) -> Any: ...
        def __setattr__(self, counter: str, count: Any) -> None: ...

    def counted(self, **facts: Any) -> dict[str, Any]:
        """Return what has been counted so far, and more ``facts``, by name."""
        counted = {**vars(self), **facts}
        for name in _BY_SOURCE:
            counted[name] = counted[name].copy()
        return counted


for _each in fields(SnapshotDiagnostics)[:-2]:
    setattr(DiagnosticsRecorder, _each.name, _each.default)

_NOTHING_COUNTED: Mapping[str, Any] = FrozenDict(DiagnosticsRecorder().counted())


@dataclass(frozen=True, repr=False)
class FetchContext:
    """The circumstances of one build, session or refresh, for the sources it calls.

    Attributes:
        requested_at: when it began, in wall-clock seconds since the epoch.
        deadline_at: when it must end, in wall-clock seconds since the epoch; None for no deadline.
        deadline_monotonic: the same moment on the clock's monotonic reading, in seconds.
        metadata: what the caller wants sources to know; read-only.
        snapshot_id: the id of the snapshot being made.
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
        object.__setattr__(self, "metadata", frozen(mapping("metadata", self.metadata)))

    def __repr__(self) -> str:
        return concealed(self, "metadata")


T = TypeVar("T")

_SCHEMA = {"schema": "coalestra.snapshot", "schema_version": 1}


@dataclass(frozen=True, repr=False)
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
    diagnostics: SnapshotDiagnostics = field(default_factory=SnapshotDiagnostics)

    def __post_init__(self) -> None:
        number("created_at", self.created_at)
        for name in ("resources", "errors"):
            object.__setattr__(self, name, frozen(mapping(name, getattr(self, name))))

    def __getitem__(self, key: ResourceKey) -> SnapshotValue[Any]:
        try:
            return self.resources[key]
        except KeyError:
            raise KeyError(key) from self.errors.get(key)

    def __iter__(self) -> Iterator[ResourceKey]:
        return iter(self.resources)

    def __len__(self) -> int:
        return len(self.resources)

    def __contains__(self, key: object) -> bool:
        return key in self.resources

    @overload
    def value(self, key: ResourceKey, expected_type: type[T]) -> T: ...

    @overload
    def value(self, key: ResourceKey, expected_type: None = None) -> Any: ...

    def value(self, key: ResourceKey, expected_type: type[T] | None = None) -> T | Any:
        """Return the bare value of ``key``.

        Raises:
            KeyError: if it has none; its cause is why.
            TypeError: if it is not of the expected type, or that is none.
        """
        found = self[key].value
        try:
            fits = expected_type is None or isinstance(found, expected_type)
        except TypeError as error:
            rule, remedy = "a type, or several of them", "leave out what a type is parametrized by"
            raise validation.wrong_type("expected_type", rule, expected_type, remedy) from error
        if not fits:
            raise TypeError(  # the payload itself is nobody's business
                f"value of {key.display} must be {a_kind_of(expected_type)}, got one of type "
                f"{type(found).__name__}"
            )
        return found

    @overload
    def maybe_value(self, key: ResourceKey, expected_type: type[T]) -> T | None: ...

    @overload
    def maybe_value(self, key: ResourceKey, expected_type: None = None) -> Any: ...

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
    def trace(self) -> Trace | None:
        """How the values were come by, if that was traced."""
        found: Trace | None = vars(self).get("_trace")
        if found is not None:
            len(found.keys)  # until they are made it holds on to the values
        return found

    @property
    def complete(self) -> bool:
        """Whether nothing that was asked for has failed."""
        return not self.errors

    def to_dict(self, *, include_values: bool = False) -> dict[str, Any]:
        """Return the snapshot as JSON-safe data; see the reference of data for its keys.

        Args:
            include_values: whether the payloads and their metadata are in it.
        """
        flag("include_values", include_values)
        values = self.resources.items()
        return {
            **_SCHEMA,
            "snapshot_id": self.snapshot_id,
            "created_at": utc_text(self.created_at),
            "complete": self.complete,
            "resources": {k.canonical: v.to_dict(include_value=include_values) for k, v in values},
            "errors": {k.canonical: described_error(k, e) for k, e in self.errors.items()},
            "diagnostics": self.diagnostics.to_dict(),
        }

    def explain(self, key: ResourceKey) -> str:
        """Return in sentences how ``key`` came by its value, or why it has none.

        With a trace they tell what was tried and waited for, else what the value or the error
        itself knows.

        Raises:
            KeyError: if it was not asked for.
        """
        instance("key", key, ResourceKey)
        trace, value = self.trace, self.resources.get(key)
        if trace is not None and key in trace.keys:
            told = trace.explain(key)
            if value is not None:
                return f"{told} {told_state(value)}"
            undelivered = trace.keys[key].obtained is not Obtained.FAILED and key in self.errors
            return f"{told} {told_error(key, self.errors[key])}" if undelivered else told
        if value is None and key not in self.errors:
            raise KeyError(f"{key.display} was not asked for")
        told = told_error(key, self.errors[key]) if value is None else told_value(value)
        more = "Built with trace=True, it tells more."
        return f"{told} {'The trace had no room for more.' if trace else more}"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Put the diagnostics together when somebody asks for them: few readers do."""
            counted = vars(self).get("_counted")
            if name != "diagnostics" or counted is None:
                raise AttributeError(f"a snapshot has no attribute {name!r}", name=name, obj=self)
            diagnostics = vars(self)[name] = _diagnosed(self, counted)
            return diagnostics

    def __repr__(self) -> str:
        counts = f"resources={len(self.resources)}, errors={len(self.errors)}"
        stale = len(self.stale_keys)
        return f"Snapshot(snapshot_id={self.snapshot_id!r}, {counts}, stale={stale})"


def _diagnosed(snapshot: Snapshot, counted: Mapping[str, Any]) -> SnapshotDiagnostics:
    resolved, failed = len(snapshot.resources), len(snapshot.errors)
    observed = [value.observed_at for value in snapshot.resources.values()]
    skew = max(observed) - min(observed) if observed else 0.0
    facts = {
        **_NOTHING_COUNTED,
        "requested_resources": resolved + failed,
        "resolved_resources": resolved,
        "failed_resources": failed,
        **counted,
        "stale_values": len(snapshot.stale_keys),
        "observation_skew_ms": skew * 1000,
    }
    facts.update((name, frozen(facts[name])) for name in _BY_SOURCE)
    return filled(SnapshotDiagnostics, facts)


def snapshot_of(
    snapshot_id: str,
    created_at: float,
    resources: FrozenDict[ResourceKey, SnapshotValue[Any]],
    errors: FrozenDict[ResourceKey, Exception] = EMPTY,
    counted: Mapping[str, Any] = EMPTY,
    trace: Trace | None = None,
) -> Snapshot:
    """Return a `Snapshot` of facts that are known to be good, and frozen, without judging them.

    ``counted`` are those of its diagnostics that the values themselves do not tell.
    """
    made = object.__new__(Snapshot)
    facts = made.__dict__
    facts["snapshot_id"] = snapshot_id
    facts["created_at"] = created_at
    facts["resources"] = resources
    facts["errors"] = errors
    facts["_counted"] = counted
    if trace is not None:
        facts["_trace"] = trace
    return made
