"""The benchmark works: each line can be measured, summarized, shown and drawn, at any speed."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.benchmarks import growth
from tests.benchmarks.lines import LINES, TABLE
from tests.benchmarks.page import PAGE, renewed
from tests.benchmarks.plot import curves_of, svg
from tests.benchmarks.results import figures_of, ratio, row_of
from tests.benchmarks.scale import TINY
from tests.benchmarks.table import growth_sentence, growth_table, table
from tests.benchmarks.worker import measure


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_line_of_the_benchmark_can_be_measured(name: str) -> None:
    if "prometheus" in name:
        pytest.importorskip("prometheus_client")
    samples = measure(LINES[name], TINY)
    assert len(samples) >= 1
    assert all(each > 0 for found in samples.values() for each in found)


def test_the_table_shows_the_figures_beside_floor_and_aim() -> None:
    (line,) = (line for line in TABLE if line.name == "publish-one")
    processes = [{"coalestra": [3e-6, 4e-6, 5e-6], "plain loop": [2e-6, 2e-6, 2e-6]}] * 2
    row = row_of(line, processes)
    assert (row.ours.median, row.floors, row.met) == (4e-6, 2.0, True)
    shown = table([row]).splitlines()[-1]
    assert [cell.strip() for cell in shown.strip("|").split("|")] == [
        "publish one", "2.0", "<= 22, 6 floors", "met", "4.00 us", "±19%", "2.00", "", "1,084",
    ]  # fmt: skip


def test_an_aim_in_floors_is_missed_by_too_many_floors() -> None:
    line = next(line for line in TABLE if line.aim is not None and line.aim.floors == 1.8)
    slow = row_of(line, [{"coalestra": [3e-6], "plain loop": [0.5e-6]}])
    quick = row_of(line, [{"coalestra": [3e-6], "plain loop": [2e-6]}])
    assert (slow.met, quick.met) == (False, True)


def test_ratios_are_formed_within_each_process() -> None:
    processes = [{"a": [2.0], "b": [1.0]}, {"a": [20.0], "b": [10.0]}, {"a": [200.0], "b": [100.0]}]
    assert ratio(processes, "a", "b") == 2.0
    assert figures_of(processes)["a"].median == 20.0


def test_the_plot_is_a_picture_of_all_sizes() -> None:
    names = (*growth.TIMES, *map(growth.uncollected, growth.TIMES), growth.WEIGHT)
    curves = curves_of({line.name: [{name: [4e-6] for name in names}] for line in growth.LINES})
    picture = ElementTree.fromstring(svg(curves))
    circles = [part for part in picture if part.tag.endswith("circle")]
    assert len(circles) == 4 * len(growth.SIZES)
    assert len(growth_table(curves).splitlines()) == 2 + len(growth.SIZES)
    assert "0% warm" in growth_sentence(curves)


def test_the_page_has_a_place_for_what_a_full_run_finds() -> None:
    page = renewed(PAGE.read_text(encoding="utf-8"), {"table": "TABLE", "growth": "GROWTH"})
    assert page.count("TABLE") == page.count("GROWTH") == 1
