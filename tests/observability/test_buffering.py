"""Which sinks get a buffer in a builder, and how these buffers are closed together."""

from __future__ import annotations

from typing import Any

import pytest

from coalestra.observability import (
    BufferedEventSink,
    BufferedMetricsSink,
    ObservabilitySinks,
    reporter_for,
)
from tests.observability.recording import Recorder


class Undecided(Recorder):
    """A sink that says something else."""

    coalestra_non_blocking = "sometimes"


def test_only_true_counts_as_never_blocking() -> None:
    assert list(ObservabilitySinks(Undecided(), None).owned) == ["metrics"]


@pytest.mark.parametrize("buffer", [None, True, False])
def test_a_buffered_sink_gets_no_second_buffer(buffer: bool | None) -> None:
    metrics, events = BufferedMetricsSink(Recorder()), BufferedEventSink(Recorder())
    sinks = ObservabilitySinks(metrics, events, buffer=buffer)
    assert (sinks.metrics, sinks.events) == (metrics, events)
    assert sinks.owned == {}
    assert set(sinks.stats()) == {"events", "metrics"}


def test_forced_buffers_before_null_sinks_still_cost_nothing() -> None:
    sinks = ObservabilitySinks(None, None, buffer=True)
    assert set(sinks.owned) == {"events", "metrics"}
    assert reporter_for(sinks.metrics, sinks.events) is None


class Halfway:
    """A sink that counts and does not observe."""

    def increment(self, metric: str, value: int = 1, **labels: str) -> None: ...


@pytest.mark.parametrize("arguments, error, parameter", [
    ({"metrics": Halfway()}, TypeError, "metrics"), ({"events": Halfway()}, TypeError, "events"),
    ({"buffer": "auto"}, TypeError, "buffer_observability"),
    ({"max_pending": 0, "events": Recorder()}, ValueError, "max_pending"),
])  # fmt: skip
def test_wrong_arguments_are_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], parameter: str
) -> None:
    with pytest.raises(error, match=parameter):
        ObservabilitySinks(**{"metrics": None, "events": None, **arguments})
