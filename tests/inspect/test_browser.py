"""The page in a real browser: what it says, by keyboard, on a narrow screen, cut off and back.

``--pictures`` renews the screenshots in docs/images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.inspect.farm import Farm
from tests.support.browser import a_browser

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "images"
WAIT_MS = 15_000

pytestmark = [pytest.mark.slow, pytest.mark.browser]


def expect(found: Any) -> Any:
    """Ask Playwright, which takes long to load, only in a test that has a browser of it."""
    from playwright import sync_api

    return sync_api.expect(found)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with a_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def farm() -> Iterator[Farm]:
    with Farm().open() as farm:
        yield farm


Open = Callable[..., "Page"]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens pages, each in its own browser, which come to hold some words without complaints."""
    complaints: list[str] = []
    contexts = []

    expected = re.compile(r"ERR_CONNECTION|status of 403|EventSource")

    def noted(message: Any) -> None:
        if message.type in ("error", "warning") and not expected.search(message.text):
            complaints.append(message.text)

    def visit(
        url: str, words: str = "", part: str = "body", *, clock: bool = False, **settings: Any
    ) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        if clock:  # that can be put forward
            page.clock.install()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", noted)
        page.goto(url)
        if words:
            wait(page, words, part)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def wait(page: Page, words: str, part: str = "body") -> None:
    """Wait until a part of the page holds these words."""
    expect(page.locator(part)).to_contain_text(re.compile(words), timeout=WAIT_MS)


def focused(page: Page) -> str:
    found: str = page.evaluate(
        "(document.activeElement.getAttribute('aria-label') || document.activeElement.innerText || "
        "document.activeElement.id || '').trim()"
    )
    return found


# What it says -------------------------------------------------------------------------------------


def test_an_operator_reads_what_is_wrong_and_what_to_do(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "Degraded", "#verdict")
    wait(page, "A source keeps failing and is left alone: weather", "#findings")
    wait(page, "tried again by itself", "#findings")
    row = page.locator("#sources tr", has_text="weather").first
    expect(row).to_contain_text("Left alone")
    expect(row).to_contain_text(
        re.compile(r"Circuit open for \d+ seconds?; calls are refused\. Next try in \d+ seconds?")
    )
    expect(row).to_contain_text("ConnectionError")
    assert page.title() == "Degraded · Farm"
    assert not re.search(r"\d{4,}\.\d", page.locator("main").inner_text()), "no bare clock readings"


def test_every_part_of_the_page_shows_something(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, r"\d+ a second", "#tiles")
    wait(page, r"\d of 8 slots for calls are in use", "#capacity")
    wait(page, r"well-pump", "#capacity")
    wait(page, r"entries of at most 10,000", "#cache")
    wait(page, r"farm:water-level:#[0-9a-f]{10}.*its source is running.*well-pump", "#flights")
    wait(page, r"market:price", "#graph")
    wait(page, r"complete|stale", "#traces")
    assert page.locator("#graph g.node").count() == 5
    assert page.locator("#sources tbody tr").count() == 7
    assert page.locator("#graph g.derived").count() == 2


def test_no_subject_and_no_error_text_is_on_it_unless_asked_for(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "market:price", "#graph")
    page.locator("#memory summary").click()
    wait(page, "Values are not shown", "#values")
    page.locator("#traces button").first.click()
    wait(page, "Waterfall", "#waterfall")
    frame = page.frame_locator("#waterfall iframe")
    frame.get_by_text("farm:cost:#").first.wait_for()
    whole = page.content() + frame.locator("html").inner_html()
    assert "plot-" not in whole
    assert "no route" not in whole
    with Farm(show_subjects=True, show_values=True).open() as open_farm:
        page = visit(open_farm.url, "farm:water-level:well-1", "#flights")
        page.locator("#memory summary").click()
        wait(page, r"farm:soil:plot-\d.*\{'moisture': 0\.31\}", "#values")


def test_it_is_renewed_in_place_while_one_reads(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "market:price", "#graph")
    page.evaluate("document.querySelector('#sources tbody tr').marked = 'kept'")
    calls = page.locator("#sources tbody tr").first.locator("td").nth(2)
    before = calls.inner_text()
    expect(calls).not_to_have_text(before, timeout=WAIT_MS)
    assert page.evaluate("document.querySelector('#sources tbody tr').marked") == "kept"


def test_a_source_that_comes_back_and_a_builder_that_is_closed_are_seen(visit: Open) -> None:
    with Farm(recovery_seconds=0.5).open() as farm:
        page = visit(farm.url, "ConnectionError", "#sources")
        farm.weather_fails = False
        wait(page, "Healthy", "#verdict")
        wait(page, "Nothing. All is well", "#findings")
        farm.close_builder()
        wait(page, "Closed", "#verdict")
        wait(page, "takes no more work", "#findings")
        assert page.locator("#said").inner_text() == "The builder is closed now."


def test_a_source_that_is_too_slow_for_its_readers_is_seen(visit: Open) -> None:
    with Farm(deadline_seconds=0.02).open() as farm:
        page = visit(farm.url)
        row = page.locator("#sources tr", has_text="prices").first
        expect(row).to_contain_text(
            re.compile(r"Too late.*calls in a row came too late for the deadlines"), timeout=WAIT_MS
        )
        wait(page, "Raise the deadline", "#findings")


def test_without_tracing_it_says_how_to_switch_it_on(visit: Open) -> None:
    with Farm(trace=False).open() as farm:
        page = visit(farm.url, "Tracing is off", "#traces")
        wait(page, "trace=True", "#traces")


SPITEFUL = "</script><img src=x onerror=\"document.title='owned'\"><b>bold</b>{{title}}"


def test_whatever_names_hold_is_shown_as_text(visit: Open) -> None:
    with Farm(title=SPITEFUL, name=SPITEFUL, show_subjects=True).open() as farm:
        page = visit(farm.url, "market:price", "#graph")
        wait(page, re.escape("<b>bold</b>"), "h1")
        wait(page, re.escape(SPITEFUL), "#sources")
        page.locator("#traces button").first.click()
        frame = page.frame_locator("#waterfall iframe")
        frame.get_by_text("cost-model").first.wait_for()
        assert page.locator("b, main img").count() == 0
        assert frame.locator("b, img").count() == 0
        assert "owned" not in page.title().replace(SPITEFUL, "")


def test_very_many_sources_with_long_names_are_shown(visit: Open) -> None:
    with Farm(more=120).open() as farm:
        page = visit(farm.url)
        expect(page.locator("#sources tbody tr")).to_have_count(127)
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280


# Traces -------------------------------------------------------------------------------------------


def test_a_trace_is_opened_read_and_closed(farm: Farm, visit: Open) -> None:
    page = visit(farm.url)
    page.locator("#order").select_option("slow")
    button = page.locator("#traces button").first
    button.wait_for()
    page.locator("#pause").click()  # or a slower trace may come and be the first
    button.click()
    expect(button).to_have_attribute("aria-expanded", "true")
    frame = page.frame_locator("#waterfall iframe")
    frame.get_by_text("cost-model").first.wait_for()
    higher = "least => document.querySelector('#waterfall iframe').clientHeight > least"
    page.wait_for_function(higher, arg=200)  # it is as high as what is in it
    high = page.locator("#waterfall iframe").evaluate("each => each.clientHeight")
    frame.locator("summary").first.click()
    frame.locator("details[open]").first.wait_for()
    page.wait_for_function(higher, arg=high)
    links = page.locator("#waterfall a").evaluate_all("all => all.map(each => each.href)")
    assert len(links) == 5
    for link in links:
        assert page.request.get(link).status == 200
    page.keyboard.press("Escape")
    expect(page.locator("#waterfall iframe")).to_have_count(0)
    assert "build" in focused(page), "the focus is back on the trace"


# By keyboard --------------------------------------------------------------------------------------


def test_everything_can_be_reached_and_used_by_keyboard(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "market:price", "#graph")
    wait(page, "complete|stale", "#traces")
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the content"
    page.keyboard.press("Enter")
    assert focused(page).startswith("Calls to sources"), "the content itself"
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "Pause"
    page.keyboard.press("Enter")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    wait(page, "Paused at", "#live")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(focused(page))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none" or (
            page.evaluate("document.activeElement.tagName") in ("g", "BODY")
        ), f"the focus on {reached[-1]!r} can be seen"
        if reached[-1].startswith("build "):
            break
    assert any("Kinds of resources" in each for each in reached)
    assert any(
        each.startswith("farm:need, derived by irrigation-plan, rests on") for each in reached
    )
    assert page.locator("#graph path.lit").count() == 0
    page.keyboard.press("Enter")
    page.frame_locator("#waterfall iframe").get_by_text("cost-model").first.wait_for()


def test_the_focus_stays_where_it_is_while_the_page_is_renewed(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "complete|stale", "#traces")
    page.locator("#order").select_option("slow")  # the newest may have left the list by then
    page.locator("#traces button").first.focus()
    chosen = page.evaluate("document.activeElement.closest('tr').dataset.key")
    page.wait_for_timeout(400)
    assert page.evaluate("document.activeElement.closest('tr').dataset.key") == chosen


def test_the_focus_stays_though_a_row_above_it_goes(farm: Farm, visit: Open) -> None:
    kept = visit(farm.url).evaluate(
        """() => {
            const rows = (names) => [...names].map(
                (name) => h("p", { "data-key": name }, h("button", null, name)));
            const list = document.body.appendChild(h("div"));
            fill(list, rows("abcd"));
            list.querySelector("[data-key=c] button").focus();
            fill(list, rows("xbcd"));
            return [document.activeElement.textContent, list.textContent];
        }"""
    )
    assert kept == ["c", "xbcd"]


def test_a_kind_in_the_graph_lights_up_what_it_is_tied_to(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "market:price", "#graph")
    page.locator("#graph g[aria-label^='farm:need']").focus()
    expect(page.locator("#graph path.lit")).to_have_count(3)
    page.locator("#pause").focus()
    expect(page.locator("#graph path.lit")).to_have_count(0)


# How it looks -------------------------------------------------------------------------------------

NARROW = {"viewport": {"width": 360, "height": 780}}


def test_nothing_sticks_out_whatever_the_width(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "market:price", "#graph")
    page.locator("#memory summary").click()
    page.locator("#traces button").first.click()
    page.frame_locator("#waterfall iframe").get_by_text("cost-model").first.wait_for()
    for width in (320, 360, 768, 1280, 2200):
        page.set_viewport_size({"width": width, "height": 780})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_on_a_narrow_screen_every_figure_has_its_name_beside_it(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "Left alone", "#sources", **NARROW)
    row = page.locator("#sources tbody tr").first
    labels = row.locator("td").evaluate_all(
        "all => all.filter(each => each.offsetParent && !each.classList.contains('lead'))"
        ".map(each => getComputedStyle(each, '::before').content)"
    )
    assert '"State"' in labels
    assert '"Calls"' in labels
    assert "none" not in labels


def test_text_can_be_told_from_its_ground_be_it_light_or_dark(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "Left alone", "#sources")
    wait(page, "complete|stale", "#traces")
    grounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate(CONTRAST) == []
    assert len(grounds) == 2


CONTRAST = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (each) =>
    (each /= 255) <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = parts(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const said = (node) => [...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    if (!node.offsetParent || node.closest("svg, .unseen, .skip") || !said(node)) continue;
    const lights = [light(parts(getComputedStyle(node).color)), light(ground(node))];
    const [high, low] = lights.sort((one, other) => other - one);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.push(`${node.innerText.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return poor;
}"""


def test_who_wants_no_motion_gets_none(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "Left alone", "#sources", reduced_motion="reduce")
    moving = page.evaluate(
        "[...document.querySelectorAll('*')].filter(each => !['0s', ''].includes("
        "getComputedStyle(each).transitionDuration) || getComputedStyle(each).animationName !== "
        "'none').length"
    )
    assert moving == 0


# Cut off and back ---------------------------------------------------------------------------------


def test_it_says_when_it_is_cut_off_since_when_and_comes_back_by_itself(visit: Open) -> None:
    with Farm().open() as farm:
        page = visit(farm.url, "Live", "#live", clock=True)
        farm.stop_serving()
        page.clock.fast_forward(8_000)
        wait(page, r"Not connected since \d\d:\d\d:\d\d\. What you see is from then", "#cut")
        wait(page, "Not connected", "#live")
        expect(page.locator("body")).to_have_class("old")
        assert page.locator("#said").inner_text().startswith("Not connected since")
        farm.serve_again()
        wait(page, "Live", "#live")
        expect(page.locator("#cut")).to_be_hidden()
        said = re.compile(r"Connected again\.|The builder is .* now\.")  # the latest counts
        expect(page.locator("#said")).to_have_text(said)


def test_a_page_that_is_seldom_renewed_is_not_taken_for_cut_off(visit: Open) -> None:
    with Farm(interval_seconds=60.0).open() as farm:
        page = visit(farm.url, "Live", "#live", clock=True)
        page.clock.fast_forward(9_000)
        assert page.locator("#cut").is_hidden()
        assert page.locator("#live").inner_text().startswith("Live")


def test_it_says_when_one_may_not_read_it_any_more(visit: Open) -> None:
    allowed = [True]
    with Farm(authorize=lambda scope: bool(allowed)).open() as farm:
        page = visit(farm.url, "Live", "#live", clock=True)
        allowed.clear()
        farm.stop_serving()
        farm.serve_again()
        page.wait_for_function("() => refused")
        page.clock.fast_forward(8_000)
        wait(page, "you may not read it: sign in again", "#cut")
        allowed.append(True)
        page.clock.fast_forward(16_000)
        wait(page, "Live", "#live")
        expect(page.locator("#cut")).to_be_hidden()


def test_a_page_nobody_looks_at_asks_for_nothing(farm: Farm, visit: Open) -> None:
    page = visit(farm.url, "Live", "#live")
    page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    assert page.evaluate("stream.readyState") == 2
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    assert page.evaluate("stream.readyState") < 2


# The pictures in the docs -------------------------------------------------------------------------


def test_pictures_can_be_taken(visit: Open, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    folder = PICTURES if pytestconfig.getoption("--pictures") else tmp_path
    with Farm().open() as farm:
        page = visit(farm.url, "Left alone", "#sources", viewport={"width": 1280, "height": 800})
        page.wait_for_timeout(8_000 if folder is PICTURES else 100)
        page.screenshot(path=folder / "inspect-light.png")
        page.locator("#traces").scroll_into_view_if_needed()
        page.locator("#order").select_option("slow")
        page.locator("#traces button").nth(1).click()
        page.frame_locator("#waterfall iframe").get_by_text("cost-model").first.wait_for()
        page.locator("#waterfall").screenshot(path=folder / "inspect-waterfall.png")
        small: dict[str, Any] = {"viewport": {"width": 360, "height": 700}, "color_scheme": "dark"}
        page = visit(farm.url, "Left alone", "#sources", **small)
        page.screenshot(path=folder / "inspect-narrow.png")
    for name in ("light", "waterfall", "narrow"):
        assert (folder / f"inspect-{name}.png").stat().st_size > 5_000
