"""The metric sinks that come with the library."""

from __future__ import annotations

from coalestra.observability import InMemoryMetrics, NullMetrics, ObservationSummary
from tests.support.elsewhere import in_a_child, in_thread, needs_fork, outcome, side_by_side
from tests.support.strikes import at_every_line


def test_counters_with_other_labels_are_other_counters() -> None:
    metrics = InMemoryMetrics()
    metrics.increment("calls", source="a")
    assert metrics.counter("calls", source="b") == 0
    assert metrics.counter("calls") == 0
    assert metrics.counter("other", source="a") == 0


def test_the_order_of_labels_does_not_matter() -> None:
    metrics = InMemoryMetrics()
    metrics.increment("calls", source="a", status="ok")
    assert metrics.counter("calls", status="ok", source="a") == 1


def test_observations_are_summed_up() -> None:
    metrics = InMemoryMetrics()
    for value in (4.0, 1.0, 7.0):
        metrics.observe("latency", value, source="a")
    summary = metrics.summary("latency", source="a")
    assert summary == ObservationSummary(count=3, total=12.0, minimum=1.0, maximum=7.0)
    assert summary is not None
    assert summary.average == 4.0


def test_what_was_never_observed_has_no_summary() -> None:
    assert InMemoryMetrics().summary("latency") is None


def test_memory_grows_with_label_sets_and_not_with_calls() -> None:
    metrics = InMemoryMetrics()
    for value in range(1_000):
        metrics.observe("latency", float(value))
        metrics.increment("calls")
    kept = metrics.snapshot()
    assert len(kept.counters) == len(kept.observations) == 1


def test_a_snapshot_does_not_move_with_the_metrics() -> None:
    metrics = InMemoryMetrics()
    metrics.increment("calls", source="a")
    before = metrics.snapshot()
    metrics.increment("calls", source="a")
    assert before.counters == {("calls", (("source", "a"),)): 1}


def test_counts_from_many_threads_are_not_lost() -> None:
    metrics = InMemoryMetrics()

    def count(_: int) -> None:
        for _ in range(500):
            metrics.increment("calls")
            metrics.observe("latency", 1.0)

    side_by_side(8, count)
    summary = metrics.summary("latency")
    assert metrics.counter("calls") == 4_000
    assert summary is not None
    assert summary.count == 4_000


def test_metrics_in_memory_tell_how_much_they_keep() -> None:
    metrics = InMemoryMetrics()
    metrics.increment("calls")
    assert repr(metrics) == "<InMemoryMetrics counters=1 observations=0>"


def test_null_metrics_take_everything_and_keep_nothing() -> None:
    metrics = NullMetrics()
    metrics.increment("calls", 2, source="a")
    metrics.observe("latency", 1.0)
    assert repr(metrics) == "NullMetrics()"


def test_the_sinks_that_never_block_say_so() -> None:
    assert NullMetrics.coalestra_non_blocking is True
    assert InMemoryMetrics.coalestra_non_blocking is True


def test_a_handler_that_strikes_at_any_line_may_count_and_nothing_is_lost() -> None:
    metrics = InMemoryMetrics()

    def count() -> None:
        metrics.increment("calls", source="a")
        metrics.observe("latency", 1.0, source="a")

    lines = at_every_line(count, count)
    assert lines > 4
    assert metrics.counter("calls", source="a") == 2 + 2 * lines
    summary = metrics.summary("latency", source="a")
    assert summary == ObservationSummary(2 + 2 * lines, 2.0 + 2 * lines, 1.0, 1.0)


def test_another_thread_may_count_while_a_handler_holds_one_up() -> None:
    """No lock is held where a handler may strike: it may wait for who counts elsewhere."""
    metrics = InMemoryMetrics()

    def count() -> None:
        metrics.increment("calls")

    lines = at_every_line(count, lambda: outcome(in_thread(count)))
    assert metrics.counter("calls") == 2 + 2 * lines


@needs_fork
def test_a_child_forked_at_any_line_may_count_and_read() -> None:
    metrics = InMemoryMetrics()

    def count() -> None:
        before = metrics.counter("calls")
        metrics.increment("calls")
        assert metrics.snapshot().counters["calls", ()] == before + 1

    at_every_line(lambda: metrics.increment("calls"), lambda: in_a_child(count))
