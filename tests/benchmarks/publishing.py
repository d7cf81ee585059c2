"""Lines that publish: every event is newer than the one before and replaces it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from coalestra import ResourceKey, ResourceUpdate
from tests.benchmarks import plain
from tests.benchmarks.rivals import Rivals
from tests.benchmarks.stock import batch_source, kept_builder, keys_of, price
from tests.benchmarks.subjects import FLOOR, OURS, Subjects
from tests.benchmarks.workshop import Work, Workshop

_STEP_SECONDS = 1e-5


def rising_times() -> Callable[[], float]:
    """Return a maker of times, each a little later than the one before, all in the past."""
    return itertools.count(time.time() - 3000.0, _STEP_SECONDS).__next__


def one(shop: Workshop) -> Subjects:
    """Publish one small dictionary."""
    (key,) = keys = keys_of(1)
    publisher = kept_builder(shop, batch_source(price)).publisher
    entries: plain.Entries = {}
    ours, plainly = rising_times(), rising_times()
    return {
        OURS: shop.timed(
            lambda: publisher.publish(key, price(key), source="feed", observed_at=ours())
        ),
        FLOOR: shop.timed_blocking(
            lambda: plain.publish(entries, key, price(key), plainly(), dict.copy)
        ),
        **Rivals(shop, keys, price).writing_one(),
    }


def many(shop: Workshop) -> Subjects:
    """Publish many small dictionaries in one call; the updates are made beforehand."""
    keys = keys_of(shop.scale.size(1000))
    publisher = kept_builder(shop, batch_source(price)).publisher
    entries: plain.Entries = {}
    ours, plainly = rising_times(), rising_times()

    async def prepare_ours() -> Work:
        updates = updates_of(keys, ours())
        return lambda: publisher.publish_many(updates)

    async def prepare_plain() -> Work:
        updates = updates_of(keys, plainly())

        async def work() -> None:
            for update in updates:
                moment = update.observed_at or 0.0
                plain.publish(entries, update.key, update.value, moment, dict.copy)

        return work

    return {
        OURS: shop.timed_fresh(prepare_ours, len(keys)),
        FLOOR: shop.timed_fresh(prepare_plain, len(keys)),
        **Rivals(shop, keys, price).writing(),
    }


def updates_of(keys: list[ResourceKey], observed_at: float) -> list[ResourceUpdate[dict[str, str]]]:
    """Return an update for every key."""
    return [ResourceUpdate(key, price(key), "feed", observed_at) for key in keys]
