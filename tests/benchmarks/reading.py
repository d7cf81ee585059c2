"""Warm lines: everything that is asked for is cached and fresh."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from coalestra import ResourceKey
from tests.benchmarks import plain
from tests.benchmarks.rivals import Rivals
from tests.benchmarks.stock import Maker, batch_source, book, kept_builder, keys_of, number, price
from tests.benchmarks.subjects import FLOOR, OURS, YARDSTICK, Subjects
from tests.benchmarks.workshop import Work, Workshop


def warm(shop: Workshop, keys: Sequence[ResourceKey], make: Maker) -> Work:
    """Return the building of a snapshot of keys that are cached."""
    builder = kept_builder(shop, batch_source(make))
    shop.run(builder.build(keys))
    return lambda: builder.build(keys)


def subjects_of(shop: Workshop, keys: Sequence[ResourceKey], make: Maker, floor: Any) -> Subjects:
    """Return the library and its floor for a warm snapshot."""
    return {
        OURS: shop.timed(warm(shop, keys, make), len(keys)),
        FLOOR: shop.timed_blocking(floor, len(keys)),
    }


def flat_payloads(shop: Workshop) -> Subjects:
    """Read many small dictionaries."""
    keys = keys_of(shop.scale.size(1000))
    return {**_dictionaries(shop, keys), **Rivals(shop, keys, price).reading()}


def one_key(shop: Workshop) -> Subjects:
    """Read one small dictionary."""
    keys = keys_of(1)
    return {**_dictionaries(shop, keys), **Rivals(shop, keys, price).reading_one()}


def _dictionaries(shop: Workshop, keys: Sequence[ResourceKey]) -> Subjects:
    entries = plain.filled(((key, price(key)) for key in keys), dict.copy)
    return subjects_of(shop, keys, price, lambda: plain.read_flat(entries, keys))


def floats(shop: Workshop) -> Subjects:
    """Read many floats."""
    keys = keys_of(shop.scale.size(1000))
    entries = plain.filled(((key, number(key)) for key in keys), plain.same)
    return {
        **subjects_of(shop, keys, number, lambda: plain.read_shared(entries, keys)),
        **Rivals(shop, keys, number).reading(),
    }


def nested_payloads(shop: Workshop) -> Subjects:
    """Read a few large nested dictionaries; beside it, what ``copy.deepcopy`` alone takes."""
    keys = keys_of(10)
    payloads = [book(key) for key in keys]
    entries = plain.filled(zip(keys, payloads, strict=True), plain.copy_of_dicts)

    def deepcopy() -> None:
        for payload in payloads:
            copy.deepcopy(payload)

    return {
        **subjects_of(shop, keys, book, lambda: plain.read(entries, keys, plain.copy_of_dicts)),
        YARDSTICK: shop.timed_blocking(deepcopy, len(keys)),
    }
