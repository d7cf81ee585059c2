"""Several worker processes scraped as one, by way of files that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.parser import text_string_to_metric_families

from coalestra.prometheus import HealthCollector, PrometheusMetrics
from tests.prometheus.scrape import metrics
from tests.support.workers import SOURCE, Process

pytestmark = pytest.mark.slow


class Farm:
    """Two workers and the registry that a scrape of any of them would show."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.first, self.second = (
            Process("tests.prometheus.worker", PROMETHEUS_MULTIPROC_DIR=str(shared))
            for _ in range(2)
        )

    def each(self, do: str, *terms: object) -> None:
        """Have both do something."""
        self.first.do(do, *terms)
        self.second.do(do, *terms)

    def scraped(self) -> CollectorRegistry:
        """What a scrape asks."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(self.shared))  # type: ignore[no-untyped-call]  # theirs
        return registry

    def names(self) -> set[str]:
        """The names of all metrics of a scrape."""
        return set(metrics(self.scraped()))

    def figure(self, sample: str, **labels: str) -> float | None:
        """One figure of a scrape."""
        text = generate_latest(self.scraped()).decode()
        found = [
            each.value
            for metric in text_string_to_metric_families(text)
            for each in metric.samples
            if each.name == f"coalestra_{sample}" and labels.items() <= each.labels.items()
        ]
        assert len(found) <= 1
        return found[0] if found else None


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    farm = Farm(tmp_path)
    yield farm
    for each in (farm.first, farm.second):
        if each.alive:
            each.end()


def names_of_one_process(registry: CollectorRegistry) -> set[str]:
    """The names of all metrics where each process is scraped for itself."""
    PrometheusMetrics(registry=registry)
    HealthCollector({}, registry=registry)
    return set(metrics(registry))


def test_counts_and_observations_of_all_processes_add_up_at_once(farm: Farm) -> None:
    farm.first.do("build", "a", "a", "b")
    farm.second.do("build", "a")
    of_shop = {"builder": "shop", "status": "success"}
    assert farm.figure("snapshot_build_total", **of_shop) == 4
    assert farm.figure("snapshot_build_total", builder="shop", status="error") == 0
    assert farm.figure("snapshot_build_latency_seconds_count", **of_shop) == 4
    assert farm.figure("source_fetch_total", source="x", **of_shop) == 3
    assert farm.figure("cache_access_total", status="fresh", resource_name="free") == 1


def test_gauges_of_health_add_up_over_the_processes_that_live(farm: Farm) -> None:
    farm.first.do("hold", 3)
    farm.second.do("hold", 6)
    farm.each("renew")
    assert farm.figure("builder_up") == 2
    assert farm.figure("keys_in_flight") == 9
    assert farm.figure("capacity_in_use", limiter="x") == 3 + 4
    assert farm.figure("capacity_limit", limiter="x") == 8
    farm.second.kill()
    mark_process_dead(farm.second.pid, str(farm.shared))  # type: ignore[no-untyped-call]  # theirs
    assert (farm.figure("builder_up"), farm.figure("keys_in_flight")) == (1, 3)
    farm.first.do("release")
    farm.first.do("renew")
    assert farm.figure("keys_in_flight") == 0


def test_the_worst_state_of_a_circuit_and_the_latest_answer_are_shown(farm: Farm) -> None:
    farm.each("build", "a")
    farm.second.do("fail")
    farm.each("renew")
    assert farm.figure("source_circuit_state", source="x") == 2
    assert farm.figure("source_circuits", source="x", state="open") == 1
    assert farm.figure("builder_severity") == 1
    answered = farm.figure("source_last_success_timestamp_seconds", source="x")
    farm.first.do("build", "b")
    farm.first.do("renew")
    again = farm.figure("source_last_success_timestamp_seconds", source="x")
    assert answered is not None
    assert again is not None
    assert again > answered


def test_counters_of_health_grow_by_what_is_new_and_outlive_their_process(farm: Farm) -> None:
    for expected in (2, 4):
        farm.each("build", "a")
        farm.each("renew")
        farm.each("renew")
        lookups = farm.figure("cache_lookups_total", result="fresh")
        assert (lookups, farm.figure("cache_lookups_total", result="miss")) == (expected - 2, 2)
    farm.second.kill()
    mark_process_dead(farm.second.pid, str(farm.shared))  # type: ignore[no-untyped-call]  # theirs
    assert farm.figure("cache_lookups_total", result="miss") == 2


def test_a_closed_builder_leaves_zeros_and_counts(farm: Farm, registry: CollectorRegistry) -> None:
    farm.each("build", "a")
    farm.each("renew")
    assert (farm.figure("builder_up"), farm.figure("cache_entries")) == (2, 2)
    assert farm.names() <= names_of_one_process(registry)
    answered = farm.figure("source_last_success_timestamp_seconds", source="x")
    farm.second.do("close")
    farm.second.do("renew")
    assert (farm.figure("builder_up"), farm.figure("cache_entries")) == (1, 1)
    assert farm.figure("cache_lookups_total", result="miss") == 2
    assert farm.figure("source_last_success_timestamp_seconds", source="x") == answered


def test_a_thread_copies_health_until_the_last_builder_is_gone(tmp_path: Path) -> None:
    program = """
import asyncio, threading
from coalestra import SnapshotBuilder
from coalestra.prometheus import HealthCollector, _HealthCopies
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

registry = CollectorRegistry()
MultiProcessCollector(registry)
def up():
    return registry.get_sample_value("coalestra_builder_up", {"builder": "shop"})
def copiers():
    return [each for each in threading.enumerate() if each.name == "coalestra-prometheus"]
async def main():
    for trouble in (None, OSError("no room")):
        builder = SnapshotBuilder([])
        collector = HealthCollector({}, interval_seconds=0.01)
        start, threading.Thread.start = threading.Thread.start, None  # the system has no more
        try:
            collector.watch("shop", builder)
        except TypeError:
            threading.Thread.start = start
        collector.watch("shop", builder)
        (copier,) = copiers()
        assert up() == 1
        if trouble:
            renew, raised = _HealthCopies.renew, threading.Event()
            def fails(*_):
                raised.set()
                raise trouble
            _HealthCopies.renew = fails
            assert raised.wait(60)
            _HealthCopies.renew = renew
        await builder.aclose()
        copier.join(60)
        assert not copiers()
        assert up() == 0
asyncio.run(main())
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        check=True,
    )
