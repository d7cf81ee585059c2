"""What it costs to be watched: the work of other lines with a watcher, and as their floor without.

A line of these is made by `watched_warm` and `watched_cold` of what there is to add to a builder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coalestra import ResourceKey
from tests.benchmarks.stock import (
    FreshBuilder,
    batch_source,
    kept_builder,
    keys_of,
    preparing,
    price,
)
from tests.benchmarks.subjects import UNWATCHED, Role, Subject
from tests.benchmarks.workshop import Workshop

Watcher = Callable[[], dict[str, Any]]
"""Makes the settings of a builder that is watched."""


def traced() -> dict[str, Any]:
    """Keep a trace of every build."""
    return {"trace": True}


def watched_warm(watcher: Watcher) -> Callable[[Workshop], list[Subject]]:
    """Return the subjects of a line that reads 1,000 cached keys."""

    def subjects(shop: Workshop) -> list[Subject]:
        keys = keys_of(shop.scale.size(1000))
        return [
            Subject(name, role, _warm(shop, keys, settings))
            for name, role, settings in _both(watcher)
        ]

    return subjects


def watched_cold(watcher: Watcher) -> Callable[[Workshop], list[Subject]]:
    """Return the subjects of a line that fetches 1,000 keys in a batch."""

    def subjects(shop: Workshop) -> list[Subject]:
        keys = keys_of(shop.scale.size(1000))
        return [
            Subject(name, role, _cold(shop, keys, settings))
            for name, role, settings in _both(watcher)
        ]

    return subjects


def _both(watcher: Watcher) -> list[tuple[str, Role, Watcher]]:
    return [("coalestra", Role.OURS, watcher), (UNWATCHED, Role.FLOOR, dict)]


def _warm(shop: Workshop, keys: Sequence[ResourceKey], settings: Watcher) -> Callable[[], float]:
    builder = kept_builder(shop, batch_source(price), **settings())
    shop.run(builder.build(keys))
    return shop.timed(lambda: builder.build(keys), len(keys))


def _cold(shop: Workshop, keys: Sequence[ResourceKey], settings: Watcher) -> Callable[[], float]:
    fresh = FreshBuilder(shop, lambda: batch_source(price), settings=settings)
    prepare = preparing(fresh, lambda builder: builder.build(keys))
    return shop.timed_fresh(prepare, len(keys))
