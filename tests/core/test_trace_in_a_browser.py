"""Pictures and pages of traces as a real browser draws them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coalestra.core.keys import ResourceKey
from coalestra.core.trace import KeyTrace, Obtained, Trace
from tests.support.browser import a_browser
from tests.support.traces import EVERYTHING, RISK, of_many, traced

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.slow, pytest.mark.browser]

LONG = traced(
    *(
        KeyTrace(
            ResourceKey(kind, each * 120), Obtained.FAILED, 0.0, 1.0, error_type=each * 80
        )
        for kind in ("a", "b")
        for each in ("W", "漢", "ﷺ", "m i", "שלום", "\u0300", "🜂")
    ),
    snapshot_id="W" * 200,
)  # fmt: skip
TRACES = pytest.mark.parametrize(
    "trace", [EVERYTHING, of_many(), LONG], ids=["all", "many", "long"]
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with a_browser() as browser:
        yield browser


def opened(browser: Browser, file: Path, content: str) -> Page:
    """A page that may ask for nothing but its own file, and complain of nothing."""
    file.write_text(content, encoding="utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 800}, offline=True)
    page.on("request", lambda request: _only(request.url, file))
    page.on("console", lambda message: pytest.fail(message.text))
    page.goto(file.as_uri())
    return page


def _only(url: str, file: Path) -> None:
    assert url == file.as_uri()


@TRACES
def test_a_page_fits_the_width_of_a_window(browser: Browser, tmp_path: Path, trace: Trace) -> None:
    page = opened(browser, tmp_path / "trace.html", trace.to_html())
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    for width in (320, 720, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_a_row_opens_by_keyboard_and_tells_its_story(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, tmp_path / "trace.html", EVERYTHING.to_html())
    said = page.get_by_text("It rests on 2 values, the oldest first")
    assert not said.is_visible()
    for _ in range(len(EVERYTHING.calls) + len(EVERYTHING.keys)):
        page.keyboard.press("Tab")
        if RISK.display in page.evaluate("document.activeElement.innerText"):
            break
    page.keyboard.press("Enter")
    assert said.is_visible()
    page.close()


@pytest.mark.parametrize("form", ["html", "svg"])
def test_a_trace_is_light_or_dark_as_preferred(browser: Browser, tmp_path: Path, form: str) -> None:
    content = EVERYTHING.to_html() if form == "html" else EVERYTHING.to_svg()
    page = opened(browser, tmp_path / f"trace.{form}", content)
    ground = "getComputedStyle(document.querySelector('.coalestra-trace')).backgroundColor"
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == "rgb(15, 21, 28)"
    page.close()


SEEN = """
[...document.querySelectorAll('text:not(.cross)')].filter(each => each.textContent).map(each => {
  const box = each.getBoundingClientRect(), place = each.parentElement
  const [x, y, wide, high] = ['x', 'y', 'width', 'height'].map(at => +place.getAttribute(at))
  if (place.tagName !== 'svg' || place === document.documentElement)
    return [each.textContent, box.left, box.top, box.right, box.bottom]
  return [each.textContent, Math.max(box.left, x), Math.max(box.top, y),
          Math.min(box.right, x + wide), Math.min(box.bottom, y + high)]
})
"""
"""Where each text can be seen: no further than the inner picture that it is in."""


@TRACES
def test_no_words_in_pictures_run_together(browser: Browser, tmp_path: Path, trace: Trace) -> None:
    page = opened(browser, tmp_path / "trace.svg", trace.to_svg())
    boxes = page.evaluate(SEEN)
    page.close()
    assert len(boxes) > 20
    for at, (text, left, top, right, bottom) in enumerate(boxes):
        for other, *box in boxes[at + 1 :]:
            apart = right <= box[0] or box[2] <= left or bottom <= box[1] + 5 or box[3] <= top + 5
            assert apart, (text, other)


def test_what_a_picture_says_is_said_to_who_cannot_see_it(browser: Browser, tmp_path: Path) -> None:
    page = opened(browser, tmp_path / "trace.svg", EVERYTHING.to_svg())
    assert page.get_by_role("img", name="build b1", exact=True).count() == 1
    page.close()
