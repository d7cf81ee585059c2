"""From samples to medians, spreads, ratios and verdicts."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from tests.benchmarks.subjects import FLOOR, OURS, RIVALS, UNWATCHED, YARDSTICK, Line
from tests.benchmarks.worker import Samples


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a subject took, in SI units: the median of all samples and their middle half."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Figure:
        """Summarize samples."""
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0])
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(statistics.median(samples), low, high)

    @property
    def spread(self) -> float:
        """Half of the middle half, as a share of the median."""
        return (self.high - self.low) / 2 / self.median


def figures_of(processes: Sequence[Samples]) -> dict[str, Figure]:
    """Return the figure of every subject over all processes."""
    return {
        name: Figure.of([each for samples in processes for each in samples[name]])
        for name in processes[0]
    }


def ratio(processes: Sequence[Samples], ours: str, other: str) -> float | None:
    """Return how many times more one subject takes than another, compared within each process."""
    if other not in processes[0]:
        return None
    return statistics.median(
        statistics.median(samples[ours]) / statistics.median(samples[other])
        for samples in processes
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table with its figures, in SI units."""

    line: Line
    ours: Figure
    floor: Figure | None
    floors: float | None
    share: float | None
    rival: tuple[str, Figure] | None

    @property
    def met(self) -> bool | None:
        """Whether the aim is reached; None without one."""
        aim = self.line.aim
        if aim is None:
            return None
        return (
            _within(self.ours.median * self.line.unit.per_si, aim.most)
            and _within(self.floors, aim.floors)
            and _within(self.share, aim.share)
        )


def _within(measured: float | None, most: float | None) -> bool:
    return most is None or (measured is not None and measured <= most)


def row_of(line: Line, processes: Sequence[Samples]) -> Row:
    """Summarize what all processes found for a line."""
    figures = figures_of(processes)
    floor = FLOOR if FLOOR in figures else UNWATCHED
    rivals = [(name, figures[name]) for name in RIVALS if name in figures]
    return Row(
        line, figures[OURS], figures.get(floor), ratio(processes, OURS, floor),
        ratio(processes, OURS, YARDSTICK),
        min(rivals, key=lambda rival: rival[1].median, default=None),
    )  # fmt: skip


def rows_of(lines: Sequence[Line], runs: Mapping[str, Sequence[Samples]]) -> list[Row]:
    """Summarize what was found for every line."""
    return [row_of(line, runs[line.name]) for line in lines]
