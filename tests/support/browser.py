"""A real browser: Playwright for Python, and a Chromium on the PATH (``sh .ci/find-chromium``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

QUIETLY = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@contextmanager
def a_browser() -> Iterator[Browser]:
    """A Chromium for the length of a ``with`` block; skips where there is none, or fails."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright for Python here")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        if os.environ.get("COALESTRA_REQUIRE_BROWSER"):
            pytest.fail("a Chromium is required here, and none is on the PATH")
        pytest.skip("no Chromium on the PATH; sh .ci/find-chromium installs one if it can")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=QUIETLY)
        yield browser
        browser.close()
