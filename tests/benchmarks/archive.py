"""The samples of a run in pyperf's format, so that ``pyperf compare_to`` can compare two runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.lines import LINES
from tests.benchmarks.subjects import BYTES
from tests.benchmarks.worker import Samples


def save(runs: Mapping[str, Sequence[Samples]], path: Path) -> bool:
    """Write all samples to a file; False if pyperf is not installed."""
    try:
        pyperf: Any = importlib.import_module("pyperf")
    except ImportError:
        return False
    benchmarks = []
    for name, processes in runs.items():
        for subject in processes[0]:
            weighed = LINES[name].unit is BYTES or subject.endswith("bytes")
            facts = {"name": f"{name}: {subject}", "unit": "byte" if weighed else "second"}
            benchmarks.append(
                pyperf.Benchmark(
                    [
                        pyperf.Run(samples[subject], metadata=facts, collect_metadata=False)
                        for samples in processes
                    ]
                )
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyperf.BenchmarkSuite(benchmarks).dump(str(path), replace=True)
    return True
