"""The page on traces shows what its programs print and draw, in virtual time, where no run differs.

``python -m tests.docs.test_trace_page`` writes that anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
from typing import Any
from unittest import mock

from tests.docs.pages import ROOT, page_of
from tests.support import run_virtual

PAGE = ROOT / "docs" / "how-to" / "see-what-a-build-did.md"
PICTURE = ROOT / "docs" / "images" / "trace.svg"
MORNING = 1_795_673_600.0  # when the loop begins to run at 10,000 seconds, it is nine o'clock
VERSION = re.compile(r"version [^)]+")


def now(_clock: object) -> float:
    return MORNING + asyncio.get_running_loop().time()


def shown() -> tuple[list[str], list[str], str]:
    """What the page says that its blocks print, what they print, and the picture they lead to."""
    namespace: dict[str, Any] = {}
    said, printed = [], []
    output = io.StringIO()
    clock = mock.patch("coalestra.core.protocols.SystemClock.now", now)
    virtual = mock.patch("asyncio.run", run_virtual)
    with clock, virtual, contextlib.redirect_stdout(output):
        for block in page_of(PAGE, PAGE.read_text(encoding="utf-8")).blocks:
            if block.runs and "Path(" not in block.text:
                output.truncate(output.seek(0))
                exec(compile(block.text, str(PAGE), "exec"), namespace)
            elif block.language == "text":
                said.append(block.text.strip())
                printed.append(VERSION.sub("version kR3vX0a+17", output.getvalue()).strip())
    return said, printed, namespace["snapshot"].trace.to_svg() + "\n"


def test_the_page_says_what_its_blocks_print() -> None:
    said, printed, _ = shown()
    assert said == printed
    assert len(said) == 3


def test_the_picture_of_the_page_is_that_of_its_program() -> None:
    assert PICTURE.read_text(encoding="utf-8") == shown()[2]


def write() -> None:
    said, printed, picture = shown()
    text = PAGE.read_text(encoding="utf-8")
    for before, after in zip(said, printed, strict=True):
        text = text.replace(f"```text\n{before}\n", f"```text\n{after}\n", 1)
    PAGE.write_text(text, encoding="utf-8")
    PICTURE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    write()
