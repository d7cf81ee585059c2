"""Measuring in many processes, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.scale import Scale
from tests.benchmarks.subjects import Line
from tests.benchmarks.worker import Samples

ROOT = Path(__file__).resolve().parents[2]
Runs = dict[str, list[Samples]]
"""The samples of every process, by the name of the line."""


def measured(
    lines: Sequence[Line], processes: int, scale: Scale, told: Callable[[str], None]
) -> Runs:
    """Measure every line in so many processes; ``told`` hears which one is next.

    All lines are measured once before any is measured again, so that a bad minute of the machine
    spoils one process of many lines rather than all processes of one.
    """
    runs: Runs = {line.name: [] for line in lines}
    for turn in range(processes):
        for line in lines:
            told(f"{line.name} {turn + 1}/{processes}")
            runs[line.name].append(_in_a_process(line, scale))
    return runs


def _in_a_process(line: Line, scale: Scale) -> Samples:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.worker", line.name, scale.name], cwd=ROOT,
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    samples: Samples = json.loads(done.stdout)
    return samples
