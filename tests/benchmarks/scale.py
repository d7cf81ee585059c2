"""How thoroughly to measure."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
    """One thoroughness.

    Attributes:
        name: what it is called on the command line of a worker.
        processes: how many processes measure each line of the table.
        growth_processes: how many measure each line of the plot.
        warmups: rounds that are thrown away in each process.
        rounds: rounds that count in each process; every subject has one sample in each.
        sample_seconds: work is repeated until a sample takes about this long.
        divisor: sizes are divided by this.
    """

    name: str
    processes: int
    growth_processes: int
    warmups: int
    rounds: int
    sample_seconds: float
    divisor: int = 1

    def size(self, keys: int) -> int:
        """Return how many keys to use where ``keys`` are meant."""
        return max(1, keys // self.divisor)


FULL = Scale("full", processes=6, growth_processes=3, warmups=3, rounds=12, sample_seconds=0.02)
QUICK = Scale("quick", processes=2, growth_processes=1, warmups=1, rounds=4, sample_seconds=0.005)
TINY = Scale(
    "tiny", processes=1, growth_processes=1, warmups=0, rounds=1, sample_seconds=0.0, divisor=100
)
"""Only shows that the harness works; its figures mean nothing."""

SCALES = {scale.name: scale for scale in (FULL, QUICK, TINY)}
