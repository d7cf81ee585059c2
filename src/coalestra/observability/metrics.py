"""Metric sinks that come with the library, and what they keep."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping

Labels = tuple[tuple[str, str], ...]
"""The labels of a series: pairs in the order of their names."""

Series = tuple[str, Labels]
"""What one number is kept for: the name of a metric, and its labels."""


@dataclasses.dataclass(frozen=True, slots=True)
class MetricRecord:
    """One call to a metrics sink.

    Attributes:
        operation: the method called, ``increment`` or ``observe``.
        metric: the name of the metric.
        value: what it was increased by, or what was observed.
        labels: the labels, in a dictionary of the record's own.
    """

    operation: str
    metric: str
    value: int | float
    labels: dict[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class ObservationSummary:
    """What all observations of one series come to, in the unit of the metric.

    Attributes:
        count: how many there were, at least one.
        total: their sum.
        minimum: the least of them.
        maximum: the greatest of them.
    """

    count: int
    total: float
    minimum: float
    maximum: float

    @property
    def average(self) -> float:
        """The arithmetic mean of the observations."""
        return self.total / self.count

    def including(self, value: float) -> ObservationSummary:
        """Return the summary with one more observation."""
        return ObservationSummary(
            self.count + 1,
            self.total + value,
            min(self.minimum, value),
            max(self.maximum, value),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class MetricsSnapshot:
    """Everything an ``InMemoryMetrics`` held at one moment.

    Attributes:
        counters: the value of each counter, by metric and labels.
        observations: the summary of each observed metric, by metric and labels.
    """

    counters: Mapping[Series, int]
    observations: Mapping[Series, ObservationSummary]


class InMemoryMetrics:
    """Keeps one number per counter and one summary per observed series; safe from many threads.

    Memory grows with the number of distinct label sets, not with the number of calls.
    """

    __slots__ = ("_counters", "_lock", "_observations")

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[Series, int] = {}
        self._observations: dict[Series, ObservationSummary] = {}

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Add ``value`` to the counter with exactly these labels."""
        series = series_of(metric, labels)
        with self._lock:
            self._counters[series] = self._counters.get(series, 0) + value

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Add one observation to the summary with exactly these labels."""
        series = series_of(metric, labels)
        with self._lock:
            known = self._observations.get(series)
            self._observations[series] = (
                ObservationSummary(1, value, value, value)
                if known is None
                else known.including(value)
            )

    def counter(self, metric: str, **labels: str) -> int:
        """Return the counter with exactly these labels; 0 if it was never increased."""
        with self._lock:
            return self._counters.get(series_of(metric, labels), 0)

    def summary(self, metric: str, **labels: str) -> ObservationSummary | None:
        """Return what was observed with exactly these labels; None if nothing was."""
        with self._lock:
            return self._observations.get(series_of(metric, labels))

    def snapshot(self) -> MetricsSnapshot:
        """Return a copy of all that is kept."""
        with self._lock:
            return MetricsSnapshot(dict(self._counters), dict(self._observations))

    def __repr__(self) -> str:
        kept = self.snapshot()
        counters, observed = len(kept.counters), len(kept.observations)
        return f"<{type(self).__name__} counters={counters} observations={observed}>"


def series_of(metric: str, labels: Mapping[str, str]) -> Series:
    """Return the series that ``metric`` with these labels belongs to, whatever their order."""
    return metric, tuple(sorted(labels.items()))
