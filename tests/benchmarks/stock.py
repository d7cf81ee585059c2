"""What all lines work with: keys, payloads, sources and builders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from coalestra import (
    AsyncMemoryCache,
    CallableBatchSource,
    CallableDerivedSource,
    CallableSource,
    FetchContext,
    FreshnessPolicy,
    ResourceKey,
    Snapshot,
    SnapshotBuilder,
    SourcePayload,
)
from tests.benchmarks.plain import LIFETIME_SECONDS
from tests.benchmarks.workshop import Workshop

Maker = Callable[[Any], Any]
POLICY = FreshnessPolicy(ttl_seconds=LIFETIME_SECONDS, max_stale_seconds=LIFETIME_SECONDS)


def keys_of(count: int, name: str = "price") -> list[ResourceKey]:
    """Return so many keys."""
    return [ResourceKey("market", name, f"subject-{index}") for index in range(count)]


def price(_key: object) -> dict[str, str]:
    """Make a small flat payload."""
    return {"price": "65000.00"}


def number(_key: object) -> float:
    """Make a float that no other value shares."""
    return float("65000.25")


def book(_key: object) -> dict[str, dict[str, Any]]:
    """Make a nested payload: 200 entries, each a dictionary of its own."""
    return {f"level {index}": {"price": 65000.0 + index, "size": "0.5"} for index in range(200)}


def batch_source(make: Maker, name: str = "price") -> CallableBatchSource:
    """Return a source that answers many keys at once, without waiting for anything."""

    async def fetch(
        keys: Collection[ResourceKey], _context: FetchContext
    ) -> dict[ResourceKey, SourcePayload[Any]]:
        return {key: SourcePayload(make(key)) for key in keys}

    return CallableBatchSource(
        name=f"{name} batch", priority=1, supports=lambda key: key.name == name, fetcher=fetch
    )


def single_source(make: Maker) -> CallableSource:
    """Return a source that answers one key at a time, on the event loop, without waiting."""

    def fetch(key: ResourceKey, _context: FetchContext) -> SourcePayload[Any]:
        return SourcePayload(make(key))

    return CallableSource(
        name="single", priority=1, supports=_everything, fetcher=fetch, run_sync_in_thread=False
    )


def slow_source(make: Maker, pause: Callable[[], Any]) -> CallableSource:
    """Return a source that gives the loop back once before it answers."""

    async def fetch(key: ResourceKey, _context: FetchContext) -> SourcePayload[Any]:
        await pause()
        return SourcePayload(make(key))

    return CallableSource(name="slow", priority=1, supports=_everything, fetcher=fetch)


def base_of(key: ResourceKey) -> ResourceKey:
    """Return the key that a derived one is made from."""
    return ResourceKey(key.namespace, "price", key.subject)


def derived_source() -> CallableDerivedSource:
    """Return a source that makes one ``mark`` from one ``price``, on the event loop."""

    def derive(
        _key: ResourceKey, inputs: Snapshot, _context: FetchContext
    ) -> SourcePayload[dict[str, Any]]:
        (value,) = inputs.values()
        return SourcePayload({"mark": value.value["price"]})

    return CallableDerivedSource(
        name="mark", priority=2, supports=lambda key: key.name == "mark",
        dependencies=lambda key: (base_of(key),), deriver=derive, run_sync_in_thread=False,
    )  # fmt: skip


def builder_of(*sources: Any, **settings: Any) -> SnapshotBuilder:
    """Return a builder with default settings, a long lifetime and an unbounded cache."""
    cache = AsyncMemoryCache(max_entries=None)
    return SnapshotBuilder(sources, default_policy=POLICY, cache=cache, **settings)


def kept_builder(shop: Workshop, *sources: Any, **settings: Any) -> SnapshotBuilder:
    """Return a builder that is closed when the line has been measured."""

    async def make() -> SnapshotBuilder:
        return builder_of(*sources, **settings)

    builder = shop.run(make())
    shop.at_end(lambda: shop.run(builder.aclose()))
    return builder


class FreshBuilder:
    """Replaces its builder by a new, empty one before every sample."""

    def __init__(
        self,
        shop: Workshop,
        *sources: Callable[[], Any],
        settings: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self._sources = sources
        self._settings = settings
        self._builder: SnapshotBuilder | None = None
        shop.at_end(lambda: shop.run(self.close()))

    async def renew(self) -> SnapshotBuilder:
        """Close the old one and return a new one."""
        await self.close()
        self._builder = builder_of(*(make() for make in self._sources), **self._settings())
        return self._builder

    async def close(self) -> None:
        """Close the builder, if there is one."""
        if self._builder is not None:
            await self._builder.aclose()
            self._builder = None


def preparing(fresh: FreshBuilder, act: Callable[[SnapshotBuilder], Any]) -> Callable[[], Any]:
    """Return a preparation for work that ``act`` does with an empty builder."""

    async def prepare() -> Callable[[], Any]:
        return functools.partial(act, await fresh.renew())

    return prepare


def _everything(_key: ResourceKey) -> bool:
    return True
