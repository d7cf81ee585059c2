"""Starts workers, tells them what to do, and hears what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
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
    """One worker of its own process."""

    def __init__(self, url: str, prefix: str, offset: float = 0.0, **settings: Any) -> None:
        command = [sys.executable, "-m", "tests.redis.worker", url, prefix]
        self._process = subprocess.Popen(
            [*command, str(offset), json.dumps(settings)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{ROOT}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

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
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Let it close what it has, and see that it does so in time."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                assert self._process.wait(30) == 0
            finally:
                self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def processes(
    url: str, prefix: str, number: int, *, offsets: tuple[float, ...] = (), **settings: Any
) -> Iterator[list[Process]]:
    """So many workers, all of them ready."""
    settings = {"time_limit_seconds": PATIENT_SECONDS, **settings}
    shifts = [*offsets, *[0.0] * number][:number]
    started = [Process(url, prefix, shift, **settings) for shift in shifts]
    try:
        for each in started:
            each.answer()
        yield started
    finally:
        for each in started:
            each.end()
