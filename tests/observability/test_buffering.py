"""Which sinks get a buffer in a builder, and how these buffers are closed together."""

from __future__ import annotations

from typing import Any

import pytest

from coalestra.observability import (
    BufferedEventSink,
    BufferedMetricsSink,
    BufferOverflowPolicy,
    InMemoryMetrics,
    LoggingEventSink,
    NullEventSink,
    NullMetrics,
)
from coalestra.observability.reports import ObservabilitySinks, reporter_for
from tests.observability.recording import PATIENCE, Held, Recorder


class Quick(Recorder):
    """A sink that says it never blocks."""

    coalestra_non_blocking = True


class Undecided(Recorder):
    """A sink that says something else."""

    coalestra_non_blocking = "sometimes"


def test_without_sinks_everything_is_discarded_and_nothing_buffered() -> None:
    sinks = ObservabilitySinks(None, None)

    assert type(sinks.metrics) is NullMetrics
    assert type(sinks.events) is NullEventSink
    assert sinks.buffers == {}
    assert sinks.owned == {}


def test_a_sink_that_may_block_gets_a_buffer() -> None:
    sink = Recorder()

    sinks = ObservabilitySinks(sink, sink, max_pending=7, overflow=BufferOverflowPolicy.DROP_NEWEST)

    assert isinstance(sinks.events, BufferedEventSink)
    assert isinstance(sinks.metrics, BufferedMetricsSink)
    assert sinks.events.downstream is sink
    assert sinks.metrics.downstream is sink
    assert {name: stats.max_pending for name, stats in sinks.stats().items()} == {
        "events": 7,
        "metrics": 7,
    }


def test_logging_gets_a_buffer_and_metrics_in_memory_do_not() -> None:
    metrics = InMemoryMetrics()

    sinks = ObservabilitySinks(metrics, LoggingEventSink())

    assert sinks.metrics is metrics
    assert list(sinks.owned) == ["events"]


def test_a_sink_that_says_it_never_blocks_is_used_directly() -> None:
    sink = Quick()

    sinks = ObservabilitySinks(sink, sink)

    assert sinks.metrics is sink
    assert sinks.events is sink


def test_only_true_counts_as_never_blocking() -> None:
    assert list(ObservabilitySinks(Undecided(), None).owned) == ["metrics"]


def test_buffers_can_be_forced() -> None:
    assert set(ObservabilitySinks(Quick(), Quick(), buffer=True).owned) == {"events", "metrics"}


def test_buffers_can_be_forbidden() -> None:
    sink = Recorder()

    sinks = ObservabilitySinks(sink, sink, buffer=False)

    assert sinks.metrics is sink
    assert sinks.events is sink
    assert sinks.stats() == {}


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


async def test_closing_closes_the_buffers_that_were_put_there_and_no_others() -> None:
    theirs = BufferedEventSink(Recorder())
    sinks = ObservabilitySinks(Recorder(), theirs)

    assert await sinks.aclose(timeout_seconds=PATIENCE) == {}

    assert sinks.owned["metrics"].stats().closed
    assert not theirs.stats().closed


async def test_closing_names_the_components_that_are_late_with_what_they_have_pending() -> None:
    held = Held()
    sinks = ObservabilitySinks(Recorder(), held)
    sinks.events.emit("first")
    held.wait_arrived()
    sinks.events.emit("second")

    assert await sinks.aclose(timeout_seconds=0) == {"events": 2}
    assert all(stats.closed for stats in sinks.stats().values())

    held.let_through()
    assert await sinks.aclose(timeout_seconds=None) == {}
    assert held.emitted == ["first", "second"]


async def test_closing_without_draining_discards_at_once_in_every_buffer() -> None:
    events, metrics = Held(), Held()
    sinks = ObservabilitySinks(metrics, events)
    for number in range(3):
        sinks.events.emit(f"event {number}")
        sinks.metrics.increment(f"metric {number}")
        events.wait_arrived()
        metrics.wait_arrived()

    late = await sinks.aclose(timeout_seconds=0, drain=False)

    assert late == {"events": 1, "metrics": 1}
    events.let_through()
    metrics.let_through()
    assert await sinks.aclose(timeout_seconds=PATIENCE) == {}
    assert (len(events.events), len(metrics.metrics)) == (1, 1)


class Halfway:
    """A sink that counts and does not observe."""

    def increment(self, metric: str, value: int = 1, **labels: str) -> None: ...


@pytest.mark.parametrize(
    "arguments, error, parameter",
    [
        ({"metrics": Halfway()}, TypeError, "metrics"),
        ({"events": Halfway()}, TypeError, "events"),
        ({"buffer": "auto"}, TypeError, "buffer_observability"),
        ({"max_pending": 0, "events": Recorder()}, ValueError, "max_pending"),
    ],
)
def test_wrong_arguments_are_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], parameter: str
) -> None:
    with pytest.raises(error, match=parameter):
        ObservabilitySinks(**{"metrics": None, "events": None, **arguments})
