"""How the cost of a key grows with the number of keys: warm, cold, and in memory."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable

from tests.benchmarks import fetching, plain
from tests.benchmarks.footprint import weight
from tests.benchmarks.reading import warm
from tests.benchmarks.stock import batch_source, keys_of, price
from tests.benchmarks.subjects import PER_KEY, Line, Subjects
from tests.benchmarks.workshop import Workshop

SIZES = (1, 10, 100, 1_000, 10_000, 100_000)
WARM, COLD, PLAIN_WARM, PLAIN_COLD = TIMES = ("warm", "cold", "plain warm", "plain cold")
WEIGHT = "snapshot bytes"


def uncollected(name: str) -> str:
    """Return what the same work is called while the garbage collector is switched off."""
    return f"{name}, no collector"


def subjects_at(size: int, shop: Workshop) -> Subjects:
    """Return the builds of so many keys, with and without collector, and a snapshot's weight."""
    keys = keys_of(shop.scale.size(size))
    entries = plain.filled(((key, price(key)) for key in keys), dict.copy)
    build = warm(shop, keys, price)
    subjects = {
        WARM: shop.timed(build, len(keys)),
        PLAIN_WARM: shop.timed_blocking(lambda: plain.read_flat(entries, keys), len(keys)),
        COLD: fetching.cold(shop, keys, lambda: batch_source(price)),
        PLAIN_COLD: fetching.floor(shop, keys, fetching.plain_batch),
    }
    return {
        **subjects,
        **{uncollected(name): _without_collector(each) for name, each in subjects.items()},
        WEIGHT: lambda: shop.run(weight(build)) / len(keys),
    }


def _without_collector(sampler: Callable[[], float]) -> Callable[[], float]:
    def sample() -> float:
        gc.disable()
        try:
            return sampler()
        finally:
            gc.enable()

    return sample


def name_of(size: int) -> str:
    """Return what the line for so many keys is called."""
    return f"growth-{size}"


LINES = tuple(Line(
    name_of(size), f"snapshot of {size:,} keys", PER_KEY, "", functools.partial(subjects_at, size),
    rounds=max(1, min(12, 20_000 // size)),
) for size in SIZES)  # fmt: skip
