"""Every page tells the truth: its code runs, prints what is shown, and its links lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import coalestra
from tests.docs.pages import ROOT, Page, page_of, pages
from tests.docs.running import WrongOutput, run_page

PACKAGE_HOME = Path(str(coalestra.__file__)).parents[1]
PAGES = pages()
MAKE_COMMAND = re.compile(r"(?:^|`|\$ )make ([a-z][a-z-]*)", re.MULTILINE)


def test_the_readme_shows_code_and_what_it_prints() -> None:
    (readme,) = [page for page in PAGES if page.name == "README.md"]
    assert any(block.runs for block in readme.blocks)
    assert any(block.is_output for block in readme.blocks)


def test_the_first_commands_of_the_readme_show_it_at_work_and_test_it() -> None:
    (readme,) = [page for page in PAGES if page.name == "README.md"]
    shown = "".join(block.text for block in readme.blocks if block.language == "console")
    assert shown.splitlines()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if not page.needs], ids=lambda page: page.name
)
def test_the_code_of_a_page_runs_and_prints_what_is_shown(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.parametrize(
    "page, number, needed",
    [
        pytest.param(page, number, needed, id=f"{page.name} with {', '.join(needed) or 'nothing'}")
        for page in PAGES
        if page.needs
        for number, (needed, _) in enumerate(page.programs())
    ],
)
def test_a_recipe_runs_in_the_framework_that_it_is_for(
    page: Page, number: int, needed: tuple[str, ...], tmp_path: Path
) -> None:
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "tests.docs.running", page.name, str(number)], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGE_HOME)])},
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_links_of_every_page_lead_somewhere() -> None:
    broken = [
        f"{page.name}:{line} {target}"
        for page in PAGES
        for line, target in page.links
        if not target.startswith(("http://", "https://", "mailto:"))
        if not leads_somewhere(page, target)
    ]
    assert not broken


def test_the_picture_of_the_readme_is_the_same_in_light_and_dark_but_for_its_colours() -> None:
    named = re.findall(r'(?:src|srcset)="([^"]+)"', (ROOT / "README.md").read_text("utf-8"))
    assert named == [f"docs/images/snapshot-{mode}.svg" for mode in ("dark", "light")]
    dark, light = ((ROOT / name).read_text(encoding="utf-8") for name in named)
    assert dark != light
    assert re.sub(r"#[0-9a-f]{6}", "", dark) == re.sub(r"#[0-9a-f]{6}", "", light)
    assert ElementTree.fromstring(light).find("{*}title") is not None


def leads_somewhere(page: Page, target: str) -> bool:
    """Whether the file exists and has the heading that is asked for, if any."""
    path, _, heading = target.partition("#")
    file = (page.path.parent / path).resolve() if path else page.path
    if not heading or file.suffix != ".md":
        return file.exists()
    return file.exists() and heading in anchors(file)


def anchors(file: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ +(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_the_commands_of_every_page_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    shells = {"", "console", "sh", "bash"}
    for page in PAGES:
        shown = [block.text for block in page.blocks if block.language in shells]
        shown += [text for _, text in page.prose if "`make " in text]
        assert set(MAKE_COMMAND.findall("\n".join(shown))) <= targets, page.name


def page_with(*lines: str) -> Page:
    return page_of(ROOT / "page.md", "\n".join(lines))


def test_blocks_of_a_page_share_their_names() -> None:
    page = page_with("```python", "x = 2", "```", "", "```python", "assert x == 2", "```")
    assert run_page(page) == 2


def test_a_wrong_output_is_found_and_placed() -> None:
    block = ["```python", "print(1 + 1)", "```"]
    good = page_with(*block, "<!-- output -->", "```text", "2", "```")
    bad = page_with(*block, "<!-- output -->", "```text", "3", "```")
    run_page(good)
    with pytest.raises(WrongOutput, match=r"page\.md:6 says"):
        run_page(bad)


def test_dots_in_an_output_stand_for_anything() -> None:
    run_page(
        page_with(
            "```python", "print('id', object())", "```", "", "<!-- output -->", "```text",
            "id <object ...>", "```",
        )
    )  # fmt: skip


def test_an_error_in_a_block_points_at_the_line_of_the_page() -> None:
    page = page_with("words", "", "```python", "a = 1", "a / 0", "```")
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(page)
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_block_may_be_shown_only_if_a_reason_is_given() -> None:
    page = page_with("<!-- no-run: needs a server -->", "```python", "boom", "```")
    assert run_page(page) == 0
    with pytest.raises(ValueError, match="gives a reason"):
        page_with("<!-- no-run -->", "```python", "boom", "```")


def test_programs_of_a_page_share_only_what_stands_above_them() -> None:
    page = page_with(
        "```python", "x = 1", "```",
        "<!-- needs: nothing -->", "```python", "x += 1", "assert x == 2", "```",
        "<!-- needs: json, re -->", "```python", "x += 1", "assert x == 2", "```",
    )  # fmt: skip
    assert [needed for needed, _ in page.programs()] == [(), ("json", "re")]
    assert [run_page(program) for _, program in page.programs()] == [2, 2]


def test_a_mark_without_its_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="no block below"):
        page_with("<!-- output -->", "words")
    with pytest.raises(ValueError, match="marks a text block"):
        page_with("<!-- output -->", "```python", "x", "```")
    with pytest.raises(ValueError, match="no end"):
        page_with("```python", "x")
