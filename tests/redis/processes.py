"""Starts workers, tells them what to do, and hears what they say."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import coalestra
from tests.redis.stock import PATIENT_SECONDS

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(str(coalestra.__file__)).parents[1]


class Process:
    """One worker of its own process, for one test after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.redis.worker"], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{ROOT}"}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def order(self, do: str, **terms: Any) -> None:
        """Say what to do, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **terms}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """What it says to the order that is next; it is killed if it says nothing for a minute."""
        assert self._process.stdout is not None
        patience = threading.Timer(60, self._process.kill)
        patience.start()
        line = self._process.stdout.readline()
        patience.cancel()
        assert line, f"the worker ended with {self._process.poll()}"
        said: dict[str, Any] = json.loads(line)
        return said

    def do(self, do: str, **terms: Any) -> dict[str, Any]:
        self.order(do, **terms)
        return self.answer()

    def kill(self) -> None:
        """End it in the middle of whatever it does."""
        with self._process:
            self._process.kill()

    def end(self) -> None:
        """Give it no more orders, and see that it ends by itself in time."""
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            assert self._process.wait(60) == 0


_idle: list[Process] = []


@contextlib.contextmanager
def processes(
    url: str, prefix: str, number: int, *, offsets: tuple[float, ...] = (), **settings: Any
) -> Iterator[list[Process]]:
    """So many workers, all of them ready; those that live on are kept for the next who asks."""
    settings = {"time_limit_seconds": PATIENT_SECONDS, **settings}
    shifts = [*offsets, *[0.0] * number][:number]
    used = [_idle.pop() if _idle else Process() for _ in range(number)]
    left = list(used)
    try:
        for each, offset in zip(used, shifts, strict=True):
            each.order("begin", url=url, prefix=prefix, offset=offset, settings=settings)
        for each in used:
            each.answer()
        yield used
        living = [each for each in used if each.alive]
        for each in living:
            each.order("end")
        for each in living:
            each.answer()
            left.remove(each)
            _idle.append(each)
    finally:
        for each in left:
            each.kill()


def dismiss() -> None:
    """End the workers that were kept."""
    while _idle:
        _idle.pop().end()
