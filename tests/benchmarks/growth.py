"""How the cost of a key grows with the number of keys: warm, cold, and in memory."""

from __future__ import annotations

import functools

from tests.benchmarks import fetching, plain
from tests.benchmarks.footprint import weight
from tests.benchmarks.reading import warm
from tests.benchmarks.stock import batch_source, keys_of, price
from tests.benchmarks.subjects import PER_KEY, Line, Role, Subject
from tests.benchmarks.workshop import Workshop

SIZES = (1, 10, 100, 1_000, 10_000, 100_000)
WARM, COLD, PLAIN_WARM, PLAIN_COLD, WEIGHT = (
    "warm",
    "cold",
    "plain warm",
    "plain cold",
    "snapshot bytes",
)


def subjects_at(size: int, shop: Workshop) -> list[Subject]:
    """Return the builds of so many keys, and what their snapshot weighs."""
    keys = keys_of(shop.scale.size(size))
    entries = plain.filled(((key, price(key)) for key in keys), dict.copy)
    build = warm(shop, keys, price)
    cold = fetching.cold(shop, keys, lambda: batch_source(price))
    cold_floor = fetching.floor(shop, keys, fetching.plain_batch)
    return [
        Subject(WARM, Role.OURS, shop.timed(build, len(keys))),
        Subject(
            PLAIN_WARM,
            Role.FLOOR,
            shop.timed_blocking(lambda: plain.read_flat(entries, keys), len(keys)),
        ),
        Subject(COLD, Role.OURS, cold.sample),
        Subject(PLAIN_COLD, Role.FLOOR, cold_floor.sample),
        Subject(WEIGHT, Role.YARDSTICK, lambda: shop.run(weight(build)) / len(keys)),
    ]


def name_of(size: int) -> str:
    """Return what the line for so many keys is called."""
    return f"growth-{size}"


LINES = tuple(
    Line(
        name_of(size),
        f"snapshot of {size:,} keys",
        PER_KEY,
        "",
        functools.partial(subjects_at, size),
        rounds=max(1, min(12, 20_000 // size)),
    )
    for size in SIZES
)
