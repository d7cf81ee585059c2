"""Keys, values and revisions for tests of caches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from coalestra.cache.publisher import ResourcePublisher
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, PolicyResolver
from coalestra.core.protocols import AsyncCache
from coalestra.core.values import Revision, SnapshotValue, next_version
from coalestra.observability import NullEventSink, NullMetrics
from tests.support import ManualClock, ThreadGate

NOW = 1_700_000_000.0
POLICY = FreshnessPolicy(5.0, 30.0)
A, B, C = (ResourceKey("market", "price", subject) for subject in "ABC")


def value_of(
    key: ResourceKey = A,
    payload: Any = 1.0,
    *,
    observed_at: float = NOW,
    rank: int = 0,
    metadata: Mapping[str, Any] | None = None,
    rests_on: Collection[SnapshotValue[Any]] = (),
) -> SnapshotValue[Any]:
    return SnapshotValue(
        key=key, value=payload, source="test", observed_at=observed_at, fetched_at=NOW,
        age_seconds=max(0.0, NOW - observed_at), stale=False, from_cache=False, latency_ms=1.5,
        metadata=metadata or {}, authority_rank=rank,
        dependency_versions={each.key: each.version for each in rests_on},
    )  # fmt: skip


def revision_of(
    key: ResourceKey = A,
    payload: Any = 1.0,
    *,
    observed_at: float = NOW,
    rank: int = 0,
    metadata: Mapping[str, Any] | None = None,
    rests_on: Sequence[Revision] = (),
    copies: PayloadCopies | None = None,
    **others: Any,
) -> Revision:
    sealed = (copies or PayloadCopies("test")).seal_now(payload, context="test")
    assert sealed is not None
    fields: dict[str, Any] = {
        "fetched_at": NOW, "latency_ms": 1.5, "attempts": 1, "version": next_version(), **others,
    }  # fmt: skip
    return Revision(
        key=key, payload=sealed[0], seal=sealed[1], source="test", observed_at=observed_at,
        metadata=FrozenDict(metadata or {}), authority_rank=rank,
        dependency_versions=FrozenDict({each.key: each.version for each in rests_on}),
        dependencies=tuple(rests_on), **fields,
    )  # fmt: skip


def publisher_to(cache: AsyncCache, **settings: Any) -> ResourcePublisher:
    """A publisher on its own, whose clock stands at `NOW`."""
    defaults: dict[str, Any] = {
        "clock": ManualClock(NOW), "policy_resolver": PolicyResolver(POLICY),
        "metrics": NullMetrics(), "events": NullEventSink(),
    }  # fmt: skip
    return ResourcePublisher(cache=cache, **{**defaults, **settings})


class Slow:
    """Its copy takes as long as the test wants."""

    release = ThreadGate()

    def __deepcopy__(self, memo: Any) -> Slow:
        self.release.pass_()
        return self


class Witness:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def revised(self, changes: Mapping[ResourceKey, Revision | None]) -> None:
        for key, revision in changes.items():
            self.heard.append(("revised", key, revision and revision.version))

    def announced(self, keys: Collection[ResourceKey]) -> None:
        self.heard.append(("announced", tuple(keys)))

    def concluded(self, keys: Collection[ResourceKey]) -> None:
        self.heard.append(("concluded", tuple(keys)))

    def invalidating(self, versions: Mapping[ResourceKey, str | None]) -> None:
        elsewhere = [version for version in versions.values() if version is not None]
        self.heard.append(("invalidating", tuple(versions), *elsewhere))

    def invalidating_where(self, matches: Callable[[ResourceKey], bool]) -> None:
        self.heard.append(("invalidating_where", tuple(key for key in (A, B, C) if matches(key))))
