"""Another process that runs the example's application, and is told by lines what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


class Process:
    """One process, started with a program and what it is given."""

    def __init__(self, program: str, *given: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, program, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, *order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def do(self, *order: Any) -> Any:
        self.tell(*order)
        return self.hear()

    def end(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0
