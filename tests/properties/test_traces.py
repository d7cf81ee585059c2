"""Whatever a trace holds, it can be shown: within bounds, well formed, and as plain words."""

from __future__ import annotations

import json
import math
import unicodedata
import xml.etree.ElementTree as ElementTree
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.trace import (
    AttemptTrace,
    CallTrace,
    Foundation,
    KeyTrace,
    Obtained,
    SourceRefusal,
    StageTrace,
    Trace,
    Wait,
    WaitReason,
)
from tests.core.test_trace import EMPTY, Page, events_of, within
from tests.support.examples import times
from tests.support.traces import EVERYTHING, of_many

SECONDS = st.floats(-10.0, 1000.0, allow_nan=False)
EPOCHS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(st.characters(codec=None), max_size=30)
MAYBE = st.none() | WORDS
NAMES = st.text(st.characters(codec=None), min_size=1, max_size=20).filter(str.strip)
KEYS = st.builds(ResourceKey, NAMES, NAMES, WORDS)


def spans(kind: Any, *before: Any, **more: Any) -> Any:
    """Records with a start and an end after it."""
    times = st.tuples(SECONDS, SECONDS).map(sorted)
    return st.builds(
        lambda time, first, rest: kind(*first, start=time[0], end=time[1], **rest),
        times,
        st.tuples(*before),
        st.fixed_dictionaries(more),
    )


REFUSALS = st.builds(SourceRefusal, WORDS, SECONDS, WORDS | st.just("stale"), WORDS, WORDS)
FOUNDATIONS = st.builds(Foundation, KEYS, WORDS, WORDS, EPOCHS)
WAITS = spans(Wait, st.sampled_from(WaitReason), detail=WORDS)
ATTEMPTS = spans(
    AttemptTrace, st.integers(1, 9), called=st.none() | SECONDS,
    outcome=st.sampled_from(["success", "failure", "under_way"]) | WORDS,
    holders=st.lists(st.tuples(WORDS, st.integers(0, 9)), max_size=3).map(tuple), error_type=MAYBE,
    error=MAYBE, pause_seconds=st.none() | st.floats(0, 10),
)  # fmt: skip
CALLS = spans(
    CallTrace, WORDS, st.sampled_from(["single", "batch", "derived"]), WORDS, st.integers(1, 10**9),
    outcome=st.sampled_from(["success", "circuit_open", "timeout"]),
    attempts=st.lists(ATTEMPTS, max_size=3).map(tuple), error_type=MAYBE, error=MAYBE,
)  # fmt: skip


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    calls = tuple(draw(st.lists(CALLS, max_size=4)))
    keys = spans(
        KeyTrace, KEYS, st.sampled_from(Obtained), requested=st.booleans(), source=MAYBE,
        version=MAYBE, joined=MAYBE, waits=st.lists(WAITS, max_size=3).map(tuple),
        calls=st.lists(st.sampled_from(range(len(calls))),
            max_size=3).map(tuple) if calls else st.just(()),
        refusals=st.lists(REFUSALS, max_size=3).map(tuple),
        rests_on=st.lists(FOUNDATIONS, max_size=3).map(tuple),
        refresh=st.sampled_from([None, "scheduled", "under_way"]), error_type=MAYBE, error=MAYBE,
    )  # fmt: skip
    found = draw(st.lists(keys, max_size=4))
    return Trace(
        draw(WORDS), draw(st.sampled_from(["build", "session", "refresh"])), draw(MAYBE),
        draw(EPOCHS), draw(st.just(0.0) | st.floats(0, 1000)),
        tuple(draw(st.lists(spans(StageTrace, WORDS, keys=st.integers(0, 9)), max_size=2))),
        FrozenDict({each.key: each for each in found}), calls, draw(st.integers(0, 10**6)),
    )  # fmt: skip


def cells(line: str) -> int:
    """How wide a terminal draws a line."""
    return sum(
        0
        if unicodedata.category(each) in {"Mn", "Me", "Cf"}
        else 1 + (unicodedata.east_asian_width(each) in {"W", "F"})
        for each in line
    )


@times(0.25)
@given(traces(), st.integers(40, 200), st.integers(1, 9), st.booleans())
def test_no_line_of_a_waterfall_is_wider_than_allowed(
    trace: Trace, width: int, limit: int, ascii_only: bool
) -> None:
    text = trace.to_text(width=width, limit=limit, ascii_only=ascii_only)
    text.encode("ascii" if ascii_only else "utf-8")
    lines = text.splitlines()
    assert max(map(cells, lines)) <= width
    assert all(line.isprintable() for line in lines)
    assert len(lines) < 60 + 3 * limit


@times(0.25)
@given(traces(), st.integers(1, 9))
def test_every_bar_of_a_picture_lies_within_its_track(trace: Trace, limit: int) -> None:
    root = ElementTree.fromstring(trace.to_svg(limit=limit))
    parts = [part for part in root.iter() if "%" in (part.get("width") or part.get("x2") or "")]
    for part in parts:
        near, far = part.get("x") or part.get("x1") or "0%", part.get("x2")
        left = float(near[:-1])
        right = float(far[:-1]) if far else left + float((part.get("width") or "")[:-1])
        assert 0 <= left <= right <= 100.01
    high = float(root.get("height") or 0)
    assert all(0 <= float(each.get("y") or 0) <= high for each in root if "%" not in str(each))


@times(0.25)
@given(traces())
def test_a_page_has_no_elements_but_its_own(trace: Trace) -> None:
    page = Page(trace.to_html())
    assert page.open == []
    assert {tag for tag, _ in page.found} <= {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "ul", "ol", "li",
        "section", "div", "span", "p", "details", "summary", "svg", "rect", "line", "text",
    }  # fmt: skip


@times(0.25)
@given(traces())
def test_every_key_is_told_in_one_line_of_bounded_length(trace: Trace) -> None:
    for key in trace.keys:
        text = trace.explain(key)
        assert text.isprintable()
        assert text.startswith(key.display)
        assert text[-1] in ".!?"
        assert len(text) < 20_000


@times(0.25)
@example(EVERYTHING)
@example(of_many(200))
@example(EMPTY)
@given(traces())
def test_data_and_trace_files_are_json_and_slices_lie_within_each_other(trace: Trace) -> None:
    data = trace.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    slices = [event for event in events_of(trace) if event["ph"] == "X"]
    assert all(math.isfinite(event["ts"]) and math.isfinite(event["dur"]) for event in slices)
    for at, one in enumerate(slices):
        for other in slices[at + 1 :]:
            if one["tid"] == other["tid"]:
                ends = one["ts"] + one["dur"], other["ts"] + other["dur"]
                apart = ends[0] <= other["ts"] + 1e-3 or ends[1] <= one["ts"] + 1e-3
                assert apart or within(one, other) or within(other, one)
