"""What is measured: lines of the table, and the subjects that do the work of a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tests.benchmarks.workshop import Workshop

OURS, FLOOR, YARDSTICK = "coalestra", "plain loop", "copy.deepcopy"
RIVALS = ("aiocache", "aiodataloader", "async-lru", "cashews")
UNWATCHED = "the same unwatched"
"""The name of the subject that is the floor of what a watcher adds."""

Subjects = dict[str, Callable[[], float]]
"""The ways to do the work of a line; each call is a sample: what a unit cost, in SI units."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """How the figures of a line are shown: in ``name``, of which ``per_si`` make an SI unit."""

    name: str
    per_si: float = 1e6


PER_KEY = Unit("us/key")
MICROSECONDS = Unit("us")
MILLISECONDS = Unit("ms", 1e3)
BYTES = Unit("bytes", 1.0)


@dataclasses.dataclass(frozen=True)
class Aim:
    """What is asked of a line: at most ``most`` units, ``floors`` floors, ``share`` of the
    yardstick; what is not named may be anything."""

    most: float | None = None
    floors: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        parts = [] if self.most is None else [f"<= {self.most:g}"]
        if self.floors is not None:
            parts.append(f"{self.floors:g} floors")
        if self.share is not None:
            parts.append(f"{self.share:g} of the yardstick")
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        name: how the command line calls it.
        work: what is done.
        unit: what the figures are in.
        published: what version 0.6 of the published library took, according to issue 4.
        subjects: makes the subjects, ready to be sampled.
        aim: what to reach; None where the line only belongs to the plot.
        rounds: how many rounds at most, for lines that take long.
    """

    name: str
    work: str
    unit: Unit
    published: str
    subjects: Callable[[Workshop], Subjects]
    aim: Aim | None = None
    rounds: int | None = None
