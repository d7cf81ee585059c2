"""Between what applications hold and what the library keeps: `SnapshotValue` and `Revision`.

Sealing copies a value in, once; opening copies it out, once per reader. A value that is small or
immutable is copied here and now; a large one is awaited, because it is copied in a thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coalestra.concurrency.copying import OFFLOADED, PayloadCopies, Seal
from coalestra.concurrency.pace import Pace
from coalestra.core.freshness import FreshnessPolicy
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.records import CacheLookup, CacheWriteResult, CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.core.values import SnapshotValue


class Sealing:
    """Converts in both directions with one component's copies."""

    __slots__ = ("copies",)

    def __init__(self, copies: PayloadCopies) -> None:
        self.copies: PayloadCopies = copies

    def __repr__(self) -> str:
        return f"Sealing({self.copies!r})"

    async def seal(self, value: SnapshotValue[Any], *, context: str) -> Revision:
        """Copy a value in. Raises `PayloadIsolationError` if it cannot be copied."""
        sealed = self.copies.seal_now(value.value, context=context)
        if sealed is None:
            sealed = await self.copies.seal(value.value, context=context)
        metadata = self.copies.seal_metadata_now(value.metadata, context=context)
        return _revision(value, *sealed, metadata)

    async def seal_many(
        self, values: Mapping[ResourceKey, SnapshotValue[Any]], *, context: str
    ) -> dict[ResourceKey, Revision]:
        """Copy values in, and join derived ones to those they rest on where all are there."""
        revisions = {}
        pace = Pace()
        for key, value in values.items():
            revisions[key] = await self.seal(value, context=context)
            if pace.due:
                await pace.rest()
        for revision in revisions.values():
            if revision.dependency_versions:
                revision.dependencies = resting_on(revision, revisions)
        return revisions

    async def open(
        self, revision: Revision, *, context: str, age: float, stale: bool, from_cache: bool
    ) -> SnapshotValue[Any]:
        """Copy a revision out as the value that one reader receives; ``age`` in seconds."""
        copies = self.copies
        payload = copies.open_now(revision.payload, revision.seal, context=context)
        if payload is OFFLOADED:
            payload = await copies.open(revision.payload, revision.seal, context=context)
        metadata = copies.open_metadata_now(revision.metadata, context=context)
        return revision.presented(payload, metadata, age, stale, from_cache)

    async def open_lookup(
        self, revision: Revision, now: float, policy: FreshnessPolicy, *, context: str
    ) -> CacheLookup:
        """Copy a revision out for a reader of the cache at ``now`` (wall seconds)."""
        age = max(0.0, now - revision.observed_at)
        fresh = age <= policy.ttl_seconds
        value = await self.open(
            revision, context=context, age=age, stale=not fresh, from_cache=True
        )
        return CacheLookup(value, fresh, age <= policy.max_stale_seconds, age)

    async def open_result(
        self,
        status: CacheWriteStatus,
        current: Revision,
        previous: Revision | None,
        *,
        context: str,
    ) -> CacheWriteResult:
        """Copy the outcome of a write out."""
        before = None
        if previous is not None:
            before = await self.open_as_fetched(previous, context=context)
        after = await self.open_as_fetched(current, context=context)
        return CacheWriteResult(status, after, before)

    async def open_as_fetched(self, revision: Revision, *, context: str) -> SnapshotValue[Any]:
        """Copy a revision out as it was when it was fetched."""
        age = max(0.0, revision.fetched_at - revision.observed_at)
        return await self.open(revision, context=context, age=age, stale=False, from_cache=False)

    async def open_many(
        self, revisions: Mapping[ResourceKey, Revision], *, context: str
    ) -> dict[ResourceKey, SnapshotValue[Any]]:
        """Copy revisions out as they were when they were fetched."""
        values = {}
        pace = Pace()
        for key, revision in revisions.items():
            values[key] = await self.open_as_fetched(revision, context=context)
            if pace.due:
                await pace.rest()
        return values


def resting_on(revision: Revision, known: Mapping[ResourceKey, Revision]) -> tuple[Revision, ...]:
    """Return the very revisions that a derived one was made from, or nothing if one is missing."""
    found = []
    for key, version in revision.dependency_versions.items():
        dependency = known.get(key)
        if dependency is None or dependency.version != version:
            return ()
        found.append(dependency)
    return tuple(found)


def _revision(
    value: SnapshotValue[Any], payload: Any, seal: Seal, metadata: FrozenDict[str, Any]
) -> Revision:
    return Revision(
        key=value.key,
        payload=payload,
        seal=seal,
        source=value.source,
        observed_at=value.observed_at,
        fetched_at=value.fetched_at,
        latency_ms=value.latency_ms,
        attempts=value.attempts,
        metadata=metadata,
        authority_rank=value.authority_rank,
        version=value.version,
        dependency_versions=value.dependency_versions,
    )
