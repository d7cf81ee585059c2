"""One process that measures one line and prints what it found as JSON.

Run as ``python -m tests.benchmarks.worker LINE SCALE``.
"""

from __future__ import annotations

import gc
import json
import sys

from tests.benchmarks.lines import LINES
from tests.benchmarks.scale import SCALES, Scale
from tests.benchmarks.subjects import Line
from tests.benchmarks.workshop import workshop

Samples = dict[str, list[float]]


def measure(line: Line, scale: Scale) -> Samples:
    """Return the samples of every subject of a line, taken in turn, round by round.

    Taking turns lets whatever disturbs the machine disturb all subjects alike. What the subjects
    were made of is moved out of the garbage collector's sight first, so that it looks at what the
    work itself makes.
    """
    with workshop(scale) as shop:
        subjects = line.subjects(shop)
        samples: Samples = {name: [] for name in subjects}
        rounds = scale.rounds if line.rounds is None else min(scale.rounds, line.rounds)
        for sample in subjects.values():
            for _ in range(min(scale.warmups, rounds - 1)):
                sample()
        gc.collect()
        gc.freeze()
        try:
            for _ in range(rounds):
                for name, sample in subjects.items():
                    samples[name].append(sample())
        finally:
            gc.unfreeze()
    return samples


if __name__ == "__main__":
    name, scale_name = sys.argv[1:]
    sys.stdout.write(json.dumps(measure(LINES[name], SCALES[scale_name])))
