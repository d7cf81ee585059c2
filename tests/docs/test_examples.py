"""The examples run by themselves, as a reader would start them, and end well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import coalestra
from tests.docs.pages import ROOT

PACKAGE_HOME = Path(str(coalestra.__file__)).parents[1]
EXAMPLES = [
    path
    for path in sorted((ROOT / "docs" / "examples").glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
]


def test_the_first_run_is_among_the_examples() -> None:
    assert "first_run.py" in {path.name for path in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_to_its_end(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", str(example)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_HOME), "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip()
