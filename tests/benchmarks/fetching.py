"""Cold lines: nothing is cached, and the builder has never seen the keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from coalestra import ResourceKey, SourcePayload
from tests.benchmarks import plain
from tests.benchmarks.rivals import Rivals
from tests.benchmarks.stock import (
    FreshBuilder,
    Maker,
    base_of,
    batch_source,
    derived_source,
    keys_of,
    preparing,
    price,
    single_source,
)
from tests.benchmarks.subjects import FLOOR, OURS, Subjects
from tests.benchmarks.workshop import Work, Workshop


def cold(shop: Workshop, keys: Sequence[ResourceKey], *sources: Any) -> Callable[[], float]:
    """Return the building of a snapshot of keys by a builder that is new."""
    prepare = preparing(FreshBuilder(shop, *sources), lambda builder: builder.build(keys))
    return shop.timed_fresh(prepare, len(keys))


def floor(shop: Workshop, keys: Sequence[ResourceKey], fetch: Any) -> Callable[[], float]:
    """Return the same with a plain dictionary that is empty at first."""

    async def prepare() -> Work:
        entries: plain.Entries = {}
        return lambda: fetch(entries, keys)

    return shop.timed_fresh(prepare, len(keys))


async def plain_batch(
    entries: plain.Entries, keys: Sequence[ResourceKey]
) -> dict[ResourceKey, plain.Record]:
    """Ask a batch source for what is missing, and cache it."""
    missing = [key for key in keys if key not in entries]
    answer = await _answer(missing, price)
    now = time.time()
    return {key: plain.keep(entries, key, answer[key].value, dict.copy, now) for key in missing}


async def plain_single(
    entries: plain.Entries, keys: Sequence[ResourceKey]
) -> dict[ResourceKey, plain.Record]:
    """Ask a source for each key that is missing, and cache it."""
    records = {}
    for key in keys:
        if key not in entries:
            payload = SourcePayload(price(key))
            records[key] = plain.keep(entries, key, payload.value, dict.copy, time.time())
    return records


async def plain_derived(
    entries: plain.Entries, keys: Sequence[ResourceKey]
) -> dict[ResourceKey, plain.Record]:
    """Fetch the bases in a batch, derive each key from its own, and cache all."""
    bases = await plain_batch(entries, [base_of(key) for key in keys])
    records = {}
    for key in keys:
        value = {"mark": bases[base_of(key)].value["price"]}
        payload = SourcePayload(value)
        records[key] = plain.keep(entries, key, payload.value, dict.copy, time.time())
    return records


async def _answer(
    keys: Sequence[ResourceKey], make: Maker
) -> dict[ResourceKey, SourcePayload[Any]]:
    return {key: SourcePayload(make(key)) for key in keys}


def batch(shop: Workshop) -> Subjects:
    """Fetch many keys from a batch source."""
    keys = keys_of(shop.scale.size(1000))
    return {
        OURS: cold(shop, keys, lambda: batch_source(price)),
        FLOOR: floor(shop, keys, plain_batch),
        **Rivals(shop, keys, price).fetching_in_batches(),
    }


def single(shop: Workshop) -> Subjects:
    """Fetch keys from a source that answers one at a time, inline."""
    keys = keys_of(shop.scale.size(500))
    return {
        OURS: cold(shop, keys, lambda: single_source(price)),
        FLOOR: floor(shop, keys, plain_single),
        **Rivals(shop, keys, price).fetching_singly(),
    }


def derived(shop: Workshop) -> Subjects:
    """Derive keys, each from its own base, the bases coming from a batch source."""
    keys = keys_of(shop.scale.size(200), "mark")
    return {
        OURS: cold(shop, keys, derived_source, lambda: batch_source(price)),
        FLOOR: floor(shop, keys, plain_derived),
        **Rivals(shop, keys, price).deriving(),
    }
