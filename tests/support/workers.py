"""Processes that do what they are told: a line of JSON is an order, or the answer to one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import coalestra

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(str(coalestra.__file__)).parents[1]


class Process:
    """A module of the tests that runs in a process of its own."""

    def __init__(self, module: str, **environment: str) -> None:
        path = f"{SOURCE}{os.pathsep}{ROOT}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module], cwd=ROOT, stdin=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path, **environment}, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def order(self, do: str, *terms: object, **named: object) -> None:
        """Say what to do, without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([do, terms, named]) + "\n")
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

    def do(self, do: str, *terms: object, **named: object) -> dict[str, Any]:
        self.order(do, *terms, **named)
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


def say(answer: dict[str, Any]) -> None:
    """Answer an order; in the process."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
