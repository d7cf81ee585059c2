"""Count the tests by collecting them, and refuse if there are too few.

Usage: python tests/release/counting.py [MINIMUM]
"""

from __future__ import annotations

import contextlib
import io
import sys

import pytest

MINIMUM = 700


class Counter:
    """A plugin that remembers how many tests were collected."""

    collected = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = len(session.items)


def count(*arguments: str) -> int:
    """How many tests pytest collects.

    Raises:
        RuntimeError: if it cannot collect all of them.
    """
    counter, printed = Counter(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = pytest.main(["--collect-only", "-q", *arguments], plugins=[counter])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests cannot be collected:\n{printed.getvalue()}")
    return counter.collected


def main(minimum: int = MINIMUM) -> int:
    found = count()
    print(f"{found} tests collected, at least {minimum} wanted")
    return 0 if found >= minimum else 1


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:2])))
