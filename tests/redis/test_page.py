"""The code of the page about sharing runs as it stands there, with a server for this test."""

from __future__ import annotations

import contextlib
import io

import pytest

from tests.docs.pages import ROOT, page_of
from tests.docs.running import namespace
from tests.redis.servers import Server

PAGE = ROOT / "docs" / "how-to" / "share-between-processes.md"

pytestmark = pytest.mark.server


def test_the_code_of_the_page_runs_and_prints_what_is_shown(server: Server) -> None:
    page = page_of(PAGE, PAGE.read_text(encoding="utf-8"))
    code = [block.text for block in page.blocks if block.language == "python"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), namespace() as variables:
        source = "\n".join(code).replace("redis://localhost:6379", server.url)
        exec(compile(source, str(PAGE), "exec"), variables)
    shown = [block.text for block in page.blocks if block.language == "text"]
    assert printed.getvalue() in shown
