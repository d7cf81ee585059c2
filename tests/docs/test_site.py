"""The documentation site builds without a warning, and has a place for every public name."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.docs import public_names
from tests.docs.pages import ROOT
from tests.support import PUBLIC

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason="mkdocs not installed: pip install -e '.[docs]'",
)
MADE = {"index.md", "changelog.md", "reference/a-z.md"}


def test_the_navigation_of_the_site_names_pages_that_are_there() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    navigation = settings.partition("\nnav:\n")[2].partition("\nexclude_docs:")[0]
    named = re.findall(r"([\w./-]+\.md)\b", navigation)
    assert len(named) > 20
    assert not [page for page in named if page not in MADE and not (ROOT / "docs" / page).exists()]


@needs_mkdocs
def test_the_site_says_of_each_public_name_what_its_docstring_says() -> None:
    page = public_names.PAGE.read_text(encoding="utf-8")
    assert public_names.renewed(page) == page, "run python -m tests.docs.public_names --write"


@needs_mkdocs
@pytest.mark.slow
def test_the_site_has_no_broken_link_and_an_entry_for_every_public_name(tmp_path: Path) -> None:
    site = ROOT / os.environ.get("COALESTRA_SITE", tmp_path)  # `make docs` keeps it
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)], cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    documented = names_in((site / "objects.inv").read_bytes())
    assert {f"coalestra.{name}" for name in PUBLIC} <= documented
    api = "".join(page.read_text("utf-8") for page in (site / "reference" / "api").glob("*.html"))
    assert "fetcher" in api
    assert not re.search(r">ruled<|See\W+(<code>)?CallableAdapter", api)  # which nobody can import


def names_in(inventory: bytes) -> set[str]:
    """The names that a Sphinx inventory lists: four lines of text, then compressed ones."""
    *_, packed = inventory.split(b"\n", maxsplit=4)
    return {line.partition(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
