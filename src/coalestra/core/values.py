"""What sources return, what applications publish, and what snapshots hold."""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, TypeVar, final

from coalestra.core.drafts import become, draft_of, refuse_subclass
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import instance, mapping, number, text

T = TypeVar("T")

_process = ""
_serial = count(1).__next__


def _enter_process() -> None:
    # Eight characters: with these, ten million versions take no more than 64 bytes each.
    global _process  # noqa: PLW0603 - read for every revision there is
    _process = b2a_base64(os.urandom(6), newline=False).decode()


_enter_process()
if hasattr(os, "register_at_fork"):  # a forked child counts on from the same number
    os.register_at_fork(after_in_child=_enter_process)


def next_version() -> str:
    """Return a name for a new revision; no other one has it, in this process or any other."""
    return f"{_process}{_serial()}"


def _frozen(name: str, given: Mapping[Any, Any]) -> FrozenDict[Any, Any]:
    return given if type(given) is FrozenDict else FrozenDict(mapping(name, given))


def _nothing() -> FrozenDict[str, Any]:
    return EMPTY


@final
@dataclass(frozen=True, slots=True, init=False)
class SourcePayload(Generic[T]):
    """What a source returns when it has more to say than the bare value.

    Attributes:
        value: the value.
        observed_at: when it was true, in wall-clock seconds since the epoch; None for the moment
            at which it is fetched.
        metadata: anything worth knowing about it; read-only.

    Raises:
        TypeError: for another type of ``observed_at`` or ``metadata``.
        ValueError: for a time that is not finite.
    """

    value: T
    observed_at: float | None
    metadata: Mapping[str, Any]

    def __init__(
        self, value: T, observed_at: float | None = None, metadata: Mapping[str, Any] = EMPTY
    ) -> None:
        if observed_at is not None:
            number("observed_at", observed_at)
        draft: Any = self
        frozen = _frozen("metadata", metadata)
        become(draft, _PayloadDraft)
        draft.value = value
        draft.observed_at = observed_at
        draft.metadata = frozen
        draft.__class__ = SourcePayload

    def __init_subclass__(cls) -> None:
        refuse_subclass("SourcePayload")


@dataclass(frozen=True, slots=True)
class ResourceUpdate(Generic[T]):
    """A value that an application publishes, because it learnt of it without asking.

    Attributes:
        key: the resource.
        value: its new value.
        source: who says so; counts for authority.
        observed_at: when it was true, in wall-clock seconds since the epoch; None for now.
        metadata: anything worth knowing about it; read-only.

    Raises:
        TypeError: for another type of anything but ``value``.
        ValueError: for an empty source, or a time that is not finite.
    """

    key: ResourceKey
    value: T
    source: str
    observed_at: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        if type(self.key) is not ResourceKey:
            instance("key", self.key, ResourceKey)
        text("source", self.source)
        if self.observed_at is not None:
            number("observed_at", self.observed_at)
        if type(self.metadata) is not FrozenDict:
            object.__setattr__(self, "metadata", _frozen("metadata", self.metadata))


@final
@dataclass(frozen=True, slots=True, init=False)
class SnapshotValue(Generic[T]):
    """A value with its provenance.

    Attributes:
        key: the resource.
        value: its value, this reader's own.
        source: the name of the source it came from.
        observed_at: when it was true, in wall-clock seconds since the epoch.
        fetched_at: when it was got, in wall-clock seconds since the epoch.
        age_seconds: how long before its delivery it was observed; never negative.
        stale: whether that is longer than its time to live.
        from_cache: whether it was in the cache already.
        latency_ms: how long getting it from the source took.
        attempts: how many calls that took; 0 if it was published.
        metadata: what the source and the library say about it; read-only.
        authority_rank: how much its source counts when values compete. Not compared.
        version: an opaque name of this revision, the same in all its copies. Not compared.
        dependency_versions: the versions it was derived from, by key; empty unless it was
            derived. Not compared.
    """

    key: ResourceKey
    value: T
    source: str
    observed_at: float
    fetched_at: float
    age_seconds: float
    stale: bool
    from_cache: bool
    latency_ms: float
    attempts: int
    metadata: Mapping[str, Any]
    authority_rank: int = field(compare=False)
    version: str = field(compare=False)
    dependency_versions: Mapping[ResourceKey, str] = field(compare=False)

    def __init__(
        self,
        key: ResourceKey,
        value: T,
        source: str,
        observed_at: float,
        fetched_at: float,
        age_seconds: float,
        stale: bool,
        from_cache: bool,
        latency_ms: float,
        attempts: int = 1,
        metadata: Mapping[str, Any] = EMPTY,
        authority_rank: int = 0,
        version: str | None = None,
        dependency_versions: Mapping[ResourceKey, str] = EMPTY,
    ) -> None:
        if type(metadata) is not FrozenDict:
            metadata = _frozen("metadata", metadata)
        if type(dependency_versions) is not FrozenDict:
            dependency_versions = _frozen("dependency_versions", dependency_versions)
        if version is None:
            version = next_version()
        draft: Any = self
        become(draft, ValueDraft)
        draft.key = key
        draft.value = value
        draft.source = source
        draft.observed_at = observed_at
        draft.fetched_at = fetched_at
        draft.age_seconds = age_seconds
        draft.stale = stale
        draft.from_cache = from_cache
        draft.latency_ms = latency_ms
        draft.attempts = attempts
        draft.metadata = metadata
        draft.authority_rank = authority_rank
        draft.version = version
        draft.dependency_versions = dependency_versions
        draft.__class__ = SnapshotValue

    def __init_subclass__(cls) -> None:
        refuse_subclass("SnapshotValue")


_PayloadDraft = draft_of(SourcePayload)
ValueDraft = draft_of(SnapshotValue)
"""A `SnapshotValue` that whoever fills it in turns into one."""
