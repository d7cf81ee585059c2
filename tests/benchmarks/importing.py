"""The line that asks what importing the library adds to a program that uses asyncio."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

from tests.benchmarks.rivals import installed
from tests.benchmarks.subjects import OURS, Subjects
from tests.benchmarks.workshop import Workshop

_PROGRAM = """
import asyncio
from time import perf_counter
began = perf_counter()
{statement}
print(perf_counter() - began)
"""


def seconds_of(statement: str) -> float:
    """Return how long a new interpreter takes for an import after asyncio.

    It may keep compiled modules, as an installed library has them; only the first one compiles.
    """
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    surroundings.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(statement=statement)], env=surroundings,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def beyond_asyncio(_shop: Workshop) -> Subjects:
    """Import the library, and the rivals that are caches, each in a new interpreter."""
    names = [OURS, *(name for name in ("aiocache", "cashews") if installed(name))]
    return {name: functools.partial(seconds_of, f"import {name}") for name in names}


def with_a_builder(_shop: Workshop) -> Subjects:
    """Import what every program needs that uses the library."""
    statement = "from coalestra import CallableSource, ResourceKey, SnapshotBuilder"
    return {OURS: functools.partial(seconds_of, statement)}
