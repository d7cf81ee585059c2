"""Runs examples, and the Python blocks of one page as one program, and compares what they print.

``python -m tests.docs.running PAGE NUMBER`` runs one of the programs of a page in this process.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import coalestra
from tests.docs.pages import ROOT, Block, Page, page_of

EXAMPLES = ROOT / "docs" / "examples"
PACKAGE_HOME = Path(str(coalestra.__file__)).parents[1]


def printed_by(example: str, directory: Path) -> str:
    """Run an example as a reader would, warnings being errors; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / example)], cwd=directory,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_HOME), "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


class WrongOutput(AssertionError):
    """The blocks of a page printed something else than the page says."""


def run_page(page: Page) -> int:
    """Run every block of the page in one namespace, in order; return how many there were.

    Raises:
        WrongOutput: at the first output block that does not hold.
        Exception: whatever a block raised, with the page's own lines in the traceback.
    """
    ran = 0
    printed = io.StringIO()
    with namespace() as variables:
        for block in page.blocks:
            if block.is_output:
                _compare(page, block, printed.getvalue())
                printed = io.StringIO()
            elif block.runs:
                # Blank lines in front keep the line numbers of the page.
                source = "\n" * (block.line - 1) + block.text
                code = compile(source, str(page.path), "exec")
                with contextlib.redirect_stdout(printed):
                    exec(code, variables)
                ran += 1
    return ran


@contextlib.contextmanager
def namespace() -> Iterator[dict[str, object]]:
    """The globals of a fresh module, known to the import system as long as the page runs."""
    module = types.ModuleType("documentation_page")
    sys.modules[module.__name__] = module
    try:
        yield vars(module)
    finally:
        del sys.modules[module.__name__]


def _compare(page: Page, block: Block, printed: str) -> None:
    wanted, got = _tidy(block.text), _tidy(printed)
    if not doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS):
        where = f"{page.name}:{block.line}"
        raise WrongOutput(f"{where} says\n\n{wanted}\nbut the blocks above it print\n\n{got}")


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines()) + "\n"


if __name__ == "__main__":
    path = ROOT / sys.argv[1]
    _, program = page_of(path, path.read_text(encoding="utf-8")).programs()[int(sys.argv[2])]
    run_page(program)
