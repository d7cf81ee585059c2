"""What a scrape of a registry brings, read as strictly as the format is defined."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition, parser

Series = dict[str, str]


def metrics(registry: CollectorRegistry) -> dict[str, Metric]:
    """Every metric of a scrape by its name; fails if the text breaks a rule of OpenMetrics."""
    shown: Any = exposition.generate_latest
    read: Any = parser.text_string_to_metric_families
    found: list[Metric] = list(read(shown(registry).decode()))
    named = {metric.name: metric for metric in found}
    assert len(named) == len(found)
    return named


def series(registry: CollectorRegistry, sample: str, **labels: str) -> list[tuple[Series, float]]:
    """The samples of this name with these labels among theirs: all their labels and the figure."""
    return [
        (each.labels, each.value)
        for metric in metrics(registry).values()
        for each in metric.samples
        if each.name == sample and labels.items() <= each.labels.items()
    ]


def figure(registry: CollectorRegistry, sample: str, **labels: str) -> float | None:
    """The one figure of this name with these labels among its own; None if there is none."""
    found = series(registry, sample, **labels)
    assert len(found) <= 1, found
    return found[0][1] if found else None
