"""Measures, prints the table, and after a full run renews the page.

Usage: ``python -m tests.benchmarks [--quick] [--no-growth] [--keep-page] [LINE ...]``
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.benchmarks import growth
from tests.benchmarks.archive import save
from tests.benchmarks.lines import TABLE
from tests.benchmarks.page import PAGE, PLOT, circumstances, renewed
from tests.benchmarks.plot import curves_of, svg
from tests.benchmarks.processes import ROOT, Runs, measured
from tests.benchmarks.results import rows_of
from tests.benchmarks.scale import FULL, QUICK
from tests.benchmarks.table import growth_sentence, growth_table, table


def main() -> None:
    """Do what the command line says."""
    names = [line.name for line in TABLE]
    asked = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    asked.add_argument("--quick", action="store_true", help="under a minute; the page is kept")
    asked.add_argument("--no-growth", action="store_true", help="leave the plot out")
    asked.add_argument("--keep-page", action="store_true", help="do not renew the page")
    asked.add_argument("lines", nargs="*", metavar="LINE", help=f"of: {', '.join(names)}")
    options = asked.parse_args()
    if unknown := set(options.lines) - set(names):
        asked.error(f"no such line: {', '.join(sorted(unknown))}")
    scale = QUICK if options.quick else FULL
    lines = [line for line in TABLE if not options.lines or line.name in options.lines]
    began = time.monotonic()
    runs: Runs = measured(lines, scale.processes, scale, _progress)
    blocks = {"table": f"{circumstances()}\n\n{table(rows_of(lines, runs))}"}
    whole = not (options.lines or options.no_growth)
    if whole:
        runs |= measured(growth.LINES, scale.growth_processes, scale, _progress)
        curves = curves_of(runs)
        blocks["growth"] = f"{growth_table(curves)}\n\n{growth_sentence(curves)}"
        if scale is FULL and not options.keep_page:
            PAGE.write_text(renewed(PAGE.read_text("utf-8"), blocks), "utf-8")
            PLOT.write_text(svg(curves), "utf-8")
    _progress("")
    sys.stdout.write("\n\n".join(blocks.values()) + "\n")
    archive = ROOT / "build" / f"bench-{scale.name}.json"
    if save(runs, archive):
        sys.stdout.write(f"\nsamples: {archive.relative_to(ROOT)}\n")
    sys.stdout.write(f"{time.monotonic() - began:.0f} s\n")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text:<40}\r")
        sys.stderr.flush()


if __name__ == "__main__":
    main()
