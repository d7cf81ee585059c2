"""One revision of a resource as the library keeps it: sealed, shared, never handed out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.values import SnapshotValue, ValueDraft


class Revision:
    """A sealed value with its provenance; equal to nothing but itself.

    Attributes:
        key: the resource.
        payload: the value in its sealed form; only ``seal`` knows how to open it.
        seal: how to open it.
        source: the name of the source it came from.
        observed_at, fetched_at: when it was true and when it was got, in wall-clock seconds.
        latency_ms: how long getting it took.
        attempts: how many calls that took; 0 if it was published.
        metadata: sealed too.
        authority_rank: how much its source counts in the write order.
        version: what tells this revision from every other one.
        dependency_versions: the versions it was derived from, by key.
        dependencies: the very revisions it was derived from, where they are known.
        checked: the epoch of the store at which it was last seen to rest on current revisions,
            or -1. The one attribute that may be written.
    """

    __slots__ = (
        "attempts",
        "authority_rank",
        "checked",
        "dependencies",
        "dependency_versions",
        "fetched_at",
        "key",
        "latency_ms",
        "metadata",
        "observed_at",
        "payload",
        "seal",
        "source",
        "version",
    )

    def __init__(
        self,
        key: ResourceKey,
        payload: Any,
        seal: Any,
        source: str,
        observed_at: float,
        fetched_at: float,
        version: str,
        latency_ms: float = 0.0,
        attempts: int = 1,
        metadata: FrozenDict[str, Any] = EMPTY,
        authority_rank: int = 0,
        dependency_versions: Mapping[ResourceKey, str] = EMPTY,
        dependencies: tuple[Revision, ...] = (),
    ) -> None:
        self.key: ResourceKey = key
        self.payload: Any = payload
        self.seal: Any = seal
        self.source: str = source
        self.observed_at: float = observed_at
        self.fetched_at: float = fetched_at
        self.version: str = version
        self.latency_ms: float = latency_ms
        self.attempts: int = attempts
        self.metadata: FrozenDict[str, Any] = metadata
        self.authority_rank: int = authority_rank
        self.dependency_versions: FrozenDict[ResourceKey, str] = (
            dependency_versions
            if isinstance(dependency_versions, FrozenDict)
            else FrozenDict(dependency_versions)
        )
        self.dependencies: tuple[Revision, ...] = dependencies
        self.checked: int = -1

    def presented(
        self,
        payload: Any,
        metadata: FrozenDict[str, Any],
        age_seconds: float,
        stale: bool,
        from_cache: bool,
    ) -> SnapshotValue[Any]:
        """Return the value that one reader gets, around a payload and metadata of his own."""
        draft: Any = ValueDraft()
        draft.key = self.key
        draft.value = payload
        draft.source = self.source
        draft.observed_at = self.observed_at
        draft.fetched_at = self.fetched_at
        draft.age_seconds = age_seconds
        draft.stale = stale
        draft.from_cache = from_cache
        draft.latency_ms = self.latency_ms
        draft.attempts = self.attempts
        draft.metadata = metadata
        draft.authority_rank = self.authority_rank
        draft.version = self.version
        draft.dependency_versions = self.dependency_versions
        draft.__class__ = SnapshotValue
        value: SnapshotValue[Any] = draft
        return value

    def __repr__(self) -> str:
        rests_on = len(self.dependency_versions)
        derived = f", derived from {rests_on}" if rests_on else ""
        return f"<Revision {self.key} {self.version} from {self.source}{derived}>"
