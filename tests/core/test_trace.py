"""A trace can be read as sentences, data, lines of text, a picture, a page and a trace file."""

from __future__ import annotations

import copy
import json
import pickle
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import fields, replace
from html.parser import HTMLParser
from typing import Any

import pytest

from coalestra.core.keys import ResourceKey
from coalestra.core.trace import (
    _COLOURS,
    LOOKS,
    Foundation,
    KeyTrace,
    Obtained,
    SourceRefusal,
    StageTrace,
    Trace,
    Wait,
    WaitReason,
    duration,
)
from tests.support.clocks import EPOCH
from tests.support.running import profiled
from tests.support.traces import EVERYTHING, RISK, attempt, call, of_many, price, rate, traced

A = price("A")
EMPTY = Trace("b1", "build", None, EPOCH, 0.0)
HOSTILE = ResourceKey("<script>alert(1)</script>", "a&b\"'", "\x00\u202e\ud800\n]]>" + "x" * 999)
SVG = "{http://www.w3.org/2000/svg}"


# Sentences ---------------------------------------------------------------------------------------


def told(found: KeyTrace, *calls: Any, **more: Any) -> str:
    return traced(found, calls=calls, **more).explain(found.key)


@pytest.mark.parametrize("key, sentences", [
    (price("CACHED"),
        "price:last:CACHED was fresh in the cache (from 'quotes', version v1), 0.300 ms after "
        "the build began."),
    (price("NEAR"),
        "price:last:NEAR was fresh in the near cache (from 'quotes', version v2), 0.300 ms "
        "after the build began."),
    (price("STALE"),
        "price:last:STALE was stale in the cache, and served while it is refreshed (from "
        "'quotes', version v3), 0.400 ms after the build began. It set off a refresh in the "
        "background."),
    (price("PINNED"),
        "price:last:PINNED had been read by an earlier stage (from 'quotes', version v4), "
        "0.100 ms after the build began."),
    (price("AAPL"),
        "price:last:AAPL was fetched from 'quotes' (version v5), 42.1 ms after the build "
        "began. The cache had nothing fresh. It waited 0.200 ms for the cache to answer. The "
        "call of 'quotes' for 120 keys took 2 attempts: attempt 1 waited 12.0 ms for capacity "
        "held by 'news' (3) and failed after 10.0 ms (TimeoutError: no answer in 10 ms); "
        "attempt 2, 5.0 ms later, succeeded in 14.2 ms."),
    (rate("EUR"),
        "fx:rate:EUR was fetched from 'rates' (version v6), 30.3 ms after the build began. It "
        "was not asked for: risk:exposure:desk-7 needs it. Snapshot 'a9' had begun to acquire "
        "it; it waited 29.9 ms for that. The call of 'rates' by snapshot 'a9' succeeded in "
        "34.0 ms."),
    (price("PUSHED"),
        "price:last:PUSHED was published while it was being acquired (from 'feed', version "
        "v7), 20.0 ms after the build began. It waited 2.0 ms for the end of a publication of "
        "it."),
    (RISK, "risk:exposure:desk-7 was derived by 'risk' (version v8), 56.5 ms after the build "
        "began. The cache had nothing fresh. It waited 42.8 ms for what it is derived from. "
        "It waited 0.400 ms to be stored in the cache. The call of 'risk' succeeded in 13.0 "
        "ms. It rests on 2 values, the oldest first: fx:rate:EUR from 'rates' (observed 12.0 "
        "s before the build began); price:last:AAPL from 'quotes' (observed 40.0 ms after the "
        "build began). The critical path: price:last:AAPL after 42.1 ms, risk:exposure:desk-7 "
        "after 56.5 ms."),
    (ResourceKey("news", "headline", "AAPL"),
        "news:headline:AAPL is a stale value that stands in (from 'news', version v9), 51.1 ms "
        "after the build began. It stands in for what failed: no source had one. The call of "
        "'news' timed out after 50.0 ms (SourceTimeoutError: 50 ms). What 'archive' brought "
        "was stale already: StaleSourceData: 3 h old."),
    (ResourceKey("book", "depth", "<b>&\u202e"),
        "book:depth:<b>&\\u202e has no value, as was known 1.2 ms after the build began: "
        "no source had one. The cache had nothing fresh. The circuit of 'book' was open, so it "
        "was not called: CircuitOpenError: open. 'paper' said that there is none: Absent: no "
        "such book."),
])  # fmt: skip
def test_every_way_to_obtain_a_key_is_told_in_sentences(key: ResourceKey, sentences: str) -> None:
    assert EVERYTHING.explain(key) == sentences


def test_every_kind_of_obtaining_and_waiting_is_in_that_table() -> None:
    keys = EVERYTHING.keys.values()
    assert {each.obtained for each in keys} == set(Obtained)
    assert {wait.reason for each in keys for wait in each.waits} == set(WaitReason)


def test_a_key_that_a_trace_does_not_hold_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="price:last:A is not in this trace'"):
        EMPTY.explain(A)
    with pytest.raises(KeyError, match="not in this trace; there was no room for 1,200 keys"):
        replace(EMPTY, omitted_keys=1200).explain(A)


@pytest.mark.parametrize("outcome, words", [
    ("success", "succeeded in 10.0 ms"), ("failure", "failed after 10.0 ms"),
    ("timeout", "timed out after 10.0 ms"),
    ("deadline", "was ended by the deadline after 10.0 ms"),
    ("abandoned", "was given up after 10.0 ms"),
    ("under_way", "was still under way after 10.0 ms"),
    ("as yet unheard of", "ended as as yet unheard of after 10.0 ms"),
])  # fmt: skip
def test_the_end_of_an_attempt_is_told(outcome: str, words: str) -> None:
    failed = KeyTrace(A, Obtained.FAILED, 0.0, 0.01, calls=(0,))
    assert f"The call of 'quotes' {words}." in told(failed, call(attempt(outcome=outcome)))


def test_an_attempt_that_never_reached_its_source_says_so() -> None:
    never = attempt(called=None, outcome="deadline", holders=(("a", 2), ("b", 1)), error="late")
    failed = KeyTrace(A, Obtained.FAILED, 0.0, 0.01, calls=(0,))
    assert (
        "The call of 'quotes' never reached it in 10.0 ms of waiting for capacity held by 'a' (2), "
        "'b' (1) (late)."
    ) in told(failed, call(never))


def test_what_held_up_an_attempt_is_named_only_if_it_is_known() -> None:
    fetched = KeyTrace(A, Obtained.FETCHED, 0.0, 0.01, calls=(0,))
    assert "was made 2.0 ms later and succeeded in 8.0 ms" in told(
        fetched, call(attempt(called=0.002))
    )
    assert "The call of 'quotes' succeeded in 9.9 ms" in told(fetched, call(attempt(called=0.0001)))
    held = call(attempt(called=0.0001, holders=(("news", 8),)))
    assert "waited 0.100 ms for capacity held by 'news' (8) and succeeded" in told(fetched, held)


def test_a_call_without_attempts_says_why() -> None:
    failed = KeyTrace(A, Obtained.FAILED, 0.0, 0.01, calls=(0,))
    gone = call(outcome="deadline", error_type="SnapshotDeadlineExceededError")
    assert "'quotes' was not reached: SnapshotDeadlineExceededError." in told(failed, gone)


def test_each_source_is_told_in_the_order_of_what_happened() -> None:
    found = KeyTrace(A, Obtained.FETCHED, 0.0, 0.03, source="third", calls=(0, 1), refusals=(
        SourceRefusal("second", 0.015, "invalid_timestamp", "SourceProtocolError", "5 s ahead"),
        SourceRefusal("first", 0.01, "failure", "OSError", "no route"),
        SourceRefusal("omitting", 0.016, "failure", "SourceProtocolError", "left it out"),
    ))  # fmt: skip
    first = call(attempt(outcome="failure", error_type="OSError", error="no route"), source="first")
    third = call(attempt(1, 0.02, 0.02, 0.03), source="third")
    assert told(found, first, third).split("The cache had nothing fresh. ")[1] == (
        "The call of 'first' failed after 10.0 ms (OSError: no route). 'second' dated its value "
        "in the future: SourceProtocolError: 5 s ahead. 'omitting' brought nothing: "
        "SourceProtocolError: left it out. The call of 'third' succeeded in 10.0 ms."
    )


def test_it_is_not_said_that_the_cache_was_asked_where_it_may_not_have_been() -> None:
    fetched = KeyTrace(A, Obtained.FETCHED, 0.0, 0.01, source="quotes", calls=(0,))
    assert "The cache had nothing fresh." in told(fetched, call(attempt()))
    forced = StageTrace("revalidate", 0.0, 0.01, 1)
    for more in ({"kind": "refresh"}, {"kind": "session", "stages": (forced,)}):
        assert "cache" not in told(fetched, call(attempt()), **more)
    assert "cache" not in told(replace(fetched, joined="a9"), call(attempt()))


def test_the_unit_of_work_is_called_what_it_is() -> None:
    pinned = KeyTrace(A, Obtained.PINNED, 0.0, 0.0)
    assert told(pinned, kind="session").endswith(", 0 ms after the session began.")


def test_a_refresh_that_was_under_way_is_told_from_one_that_was_set_off() -> None:
    stale = KeyTrace(A, Obtained.STALE, 0.0, 0.0, refresh="under_way")
    assert told(stale).endswith("A refresh of it was under way already.")


def test_an_error_that_no_source_is_to_blame_for_is_told_itself() -> None:
    late: dict[str, Any] = {
        "error_type": "SnapshotDeadlineExceededError",
        "error": "0.2 s are over",
    }
    failed = KeyTrace(A, Obtained.FAILED, 0.0, 0.2, **late)
    assert told(failed).endswith("began: SnapshotDeadlineExceededError: 0.2 s are over.")
    stale = KeyTrace(A, Obtained.FALLBACK, 0.0, 0.2, **late)
    assert told(stale).endswith("what failed: SnapshotDeadlineExceededError: 0.2 s are over.")


def test_what_does_not_exist_is_told_from_a_failure() -> None:
    refusal = SourceRefusal("quotes", 0.01, "absent", "ResourceAbsent", "delisted")
    error: dict[str, Any] = {"error_type": "ResourceAbsentError", "error": "A does not exist"}
    absent = KeyTrace(A, Obtained.FAILED, 0.0, 0.01, refusals=(refusal,), **error)
    assert told(absent) == (
        "price:last:A has no value, as was known 10.0 ms after the build began: it does not exist. "
        "The cache had nothing fresh. 'quotes' said that there is none: ResourceAbsent: delisted."
    )
    remembered = KeyTrace(A, Obtained.FAILED, 0.0, 0.01, **error)
    assert told(remembered).endswith(
        "began: it was remembered not to exist: ResourceAbsentError: A does not exist."
    )
    of_another = replace(remembered, joined="a9")
    assert "began: ResourceAbsentError: A does not exist. Snapshot 'a9'" in told(of_another)
    text = traced(absent).to_text()
    assert "1 absent" in text
    assert "failed" not in text
    assert 'class="bad"' not in traced(absent).to_svg()


def test_what_the_acquisition_of_another_one_waited_for_is_told_of_that() -> None:
    waits = (Wait(WaitReason.FLIGHT, 0.0, 0.01, "a9"), Wait(WaitReason.CACHE, 0.0, 0.002))
    joined = KeyTrace(A, Obtained.FETCHED, 0.0, 0.01, joined="a9", waits=waits)
    assert "The acquisition waited 2.0 ms for the cache to answer." in told(joined)


def test_what_a_cached_value_rests_on_did_not_hold_it_up() -> None:
    one = KeyTrace(A, Obtained.CACHE, 0.0, 0.02)
    below = (Foundation(A, "v", "s", EPOCH),)
    other = KeyTrace(RISK, Obtained.CACHE, 0.0, 0.03, rests_on=below)
    assert "It rests on 1 value: price:last:A" in traced(one, other).explain(RISK)
    assert "critical path" not in traced(one, other).explain(RISK)


def test_a_flight_without_a_known_owner_is_told_as_one() -> None:
    flight = Wait(WaitReason.FLIGHT, 0.0, 0.01)
    joined = KeyTrace(A, Obtained.FETCHED, 0.0, 0.01, waits=(flight,))
    assert "Another unit of work had begun to acquire it; it waited 10.0 ms" in told(joined)
    taken = KeyTrace(A, Obtained.FETCHED, 0.0, 0.01, joined="a9")
    assert "Snapshot 'a9' had begun to acquire it." in told(taken)


def test_waits_for_the_same_are_added_up() -> None:
    waits = tuple(Wait(WaitReason.CACHE, start, start + 0.002) for start in (0.0, 0.005))
    found = KeyTrace(A, Obtained.CACHE, 0.0, 0.01, waits=waits)
    assert "It waited 4.0 ms for the cache to answer." in told(found)


def chain(length: int) -> list[KeyTrace]:
    """Keys of which each is derived from the one before, and waited for it."""
    keys = [KeyTrace(price("0"), Obtained.FETCHED, 0.0, 0.001)]
    for number in range(1, length):
        below = Foundation(price(str(number - 1)), "v", "s", EPOCH)
        end = 0.001 + number / 1000
        key = price(str(number))
        keys.append(KeyTrace(key, Obtained.DERIVED, 0.0, end, rests_on=(below,)))
    return keys


def test_the_critical_path_leads_through_what_was_waited_for_longest() -> None:
    keys = chain(2_000)
    text = traced(*keys).explain(keys[-1].key)
    assert "The critical path: price:last:0 after 1.0 ms, price:last:1 after 2.0 ms" in text
    assert "(1,995 more), price:last:1999 after 2.00 s." in text


def test_what_was_there_before_somebody_waited_is_not_on_the_critical_path() -> None:
    early = KeyTrace(price("early"), Obtained.CACHE, 0.0, 0.001)
    below = (Foundation(early.key, "v", "s", EPOCH), Foundation(price("gone"), "v", "s", EPOCH))
    late = KeyTrace(A, Obtained.DERIVED, 0.002, 0.01, rests_on=below)
    assert "critical path" not in traced(early, late).explain(A)


def test_keys_that_rest_on_each_other_end_the_critical_path() -> None:
    """No trace of a build holds such; one that is made by hand must not hang its reader."""
    one = KeyTrace(A, Obtained.DERIVED, 0.0, 1.0, rests_on=(Foundation(RISK, "v", "s", EPOCH),))
    other = KeyTrace(RISK, Obtained.DERIVED, 0.0, 1.0, rests_on=(Foundation(A, "v", "s", EPOCH),))
    assert "The critical path: risk" in traced(one, other).explain(A)


@pytest.mark.parametrize(
    "inputs, listed", [(5, "0 1 2 3 4"), (6, "0 1 2 3 (1 more) 5"), (9, "0 1 2 3 (4 more) 8")]
)
def test_five_of_a_list_are_told_and_the_rest_counted(inputs: int, listed: str) -> None:
    below = tuple(Foundation(price(str(n)), "v", "s", EPOCH + n) for n in range(inputs))
    text = told(KeyTrace(A, Obtained.DERIVED, 0.0, 1.0, rests_on=below))
    found = ["".join(each) for each in re.findall(r"price:last:(\d)|(\(\d more\))", text)]
    assert " ".join(found) == listed


def test_a_sentence_keeps_to_one_line_whatever_an_error_says() -> None:
    failed = KeyTrace(HOSTILE, Obtained.FAILED, 0.0, 0.0, error_type="E", error="a\nb\x00" * 999)
    text = told(failed)
    assert text.isprintable()
    assert len(text) < 800


@pytest.mark.parametrize("seconds, words", [
    (0.0, "0 ms"), (0.000_000_4, "0 ms"), (0.000_001, "0.001 ms"), (0.000_999_4, "0.999 ms"),
    (0.000_999_6, "1.0 ms"), (0.0421, "42.1 ms"), (0.999_94, "999.9 ms"), (0.999_96, "1.00 s"),
    (9.994, "9.99 s"), (9.996, "10.0 s"), (99.94, "99.9 s"), (99.96, "1 min 40 s"),
    (120.0, "2 min"), (5999.4, "99 min 59 s"), (6000.0, "1 h 40 min"), (86_400.0 * 3, "72 h"),
    (86_400.0 * 5, "5 d"), (1e300, "1e+300 s"), (-0.004, "-4.0 ms"),
])  # fmt: skip
def test_a_length_of_time_is_written_in_words_that_suit_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Data --------------------------------------------------------------------------------------------


def test_its_json_form_has_every_fact_under_stable_names() -> None:
    data = EVERYTHING.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert list(data) == ["schema", "schema_version", *(each.name for each in fields(Trace))]
    assert (data["schema"], data["schema_version"]) == ("coalestra.trace", 1)
    assert data["started_at"] == "2023-11-14T22:13:20.000000+00:00"
    assert list(data["keys"]) == [key.canonical for key in EVERYTHING.keys]
    risk = data["keys"][RISK.canonical]
    assert list(risk) == [*(each.name for each in fields(KeyTrace)), "resource"]
    assert (risk["key"], risk["resource"], risk["obtained"]) == (
        RISK.canonical,
        "risk:exposure:desk-7",
        "derived",
    )
    assert risk["rests_on"][1] == {
        "key": "fx:rate:EUR", "version": "v6", "source": "rates",
        "observed_at": "2023-11-14T22:13:08.000000+00:00", "resource": "fx:rate:EUR",
    }  # fmt: skip
    assert data["calls"][0]["attempts"][0]["holders"] == [["news", 3]]


def test_its_json_form_keeps_keys_apart_whose_texts_are_alike() -> None:
    one, other = ResourceKey("a", "b:c"), ResourceKey("a", "b", "c")
    trace = traced(*(KeyTrace(key, Obtained.CACHE, 0.0, 0.0) for key in (one, other)))
    assert len(trace.to_dict()["keys"]) == 2


def test_what_many_keys_rest_on_is_told_of_each_in_data_of_its_own() -> None:
    below = tuple(Foundation(price(str(n)), "v", "quotes", EPOCH) for n in range(2))
    keys = [KeyTrace(rate(str(n)), Obtained.CACHE, 0.0, 0.0, rests_on=below) for n in range(2)]
    one, other = (found["rests_on"] for found in traced(*keys).to_dict()["keys"].values())
    assert one == other
    assert [each["key"] for each in one] == ["price:last:0", "price:last:1"]
    assert one[0] is not other[0]


def test_it_can_be_copied_and_pickled() -> None:
    for twin in (copy.deepcopy(EVERYTHING), pickle.loads(pickle.dumps(EVERYTHING))):
        assert twin == EVERYTHING
        assert twin.to_text() == EVERYTHING.to_text()


# Text --------------------------------------------------------------------------------------------


def test_a_waterfall_shows_stages_calls_and_keys_in_the_order_of_time() -> None:
    assert EVERYTHING.to_text() == (
        """\
build b1
57.0 ms · began 2023-11-14 22:13:20.000 UTC · 10 keys · 2 fetched · 1 from the cache
1 from the near cache · 1 stale · 1 pinned · 1 published · 1 derived · 1 stale, standing in
1 failed · 5 calls · critical path: price:last:AAPL, risk:exposure:desk-7

                        0                              57.0 ms
Stages
  build                 ──────────────────────────────────────    56.8 ms  9 keys
  delivery                                                   ─   0.200 ms  9 keys
Calls
  rates                 ████████████████████                      34.2 ms  for a9
  quotes                ░░░░░░░░✕✕✕✕✕✕✕···██████████              41.5 ms  120 keys, 2 attempts
  news                  ✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕        50.0 ms  timeout
  book                  ─                                        0.100 ms  CircuitOpenError
  risk                                              █████████     13.1 ms
Keys
  price:last:PINNED     ◆                                        0.100 ms  pinned, quotes
  price:last:CACHED     ◆                                        0.100 ms  from the cache, quotes
  price:last:NEAR       ◆                                        0.100 ms  from the near cache, quo…
  price:last:STALE      ◆                                        0.200 ms  stale, quotes
  risk:exposure:desk-7  ╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌█████████▿    56.3 ms  derived, risk
  price:last:PUSHED     ────────────▫                             19.7 ms  published, feed
  fx:rate:EUR           ════════════════════                      30.0 ms  fetched, rates
  price:last:AAPL       ░░░░░░░░✕✕✕✕✕✕✕···██████████              41.8 ms  fetched, quotes
  book:depth:<b>&\\u202e ─                                        0.800 ms  failed: Absent
  news:headline:AAPL    ✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕✕        50.7 ms  stale, standing in: Stal…

─ under way   ◆ there at once   █ call   ✕ call that failed   ░ wait for capacity
· pause before a retry   ═ wait for another's flight   ╌ wait for dependencies
▪ wait for the cache   ▫ wait for a publication   ▿ wait to be stored
"""
    )


def test_what_is_alike_shares_a_row_only_where_rows_are_too_many() -> None:
    assert of_many(300).to_text(limit=300).count("alike") == 0
    assert of_many().to_text(limit=10, ascii_only=True) == (
        """\
build b1
61.2 ms - began 2023-11-14 22:13:20.000 UTC - 1,000 keys - 500 fetched - 498 from the cache
2 failed - 10 calls

                                 0                        61.2 ms
Calls
  quotes                         ######                              11.1 ms  100 keys
  quotes                         ..######                            15.1 ms  100 keys
  quotes                         ....######-                         19.1 ms  100 keys
  quotes                         ......#######                       23.1 ms  100 keys
  quotes                         ........#######                     27.1 ms  100 keys
  quotes                         ..........#######                   31.1 ms  100 keys
  quotes                         .............######                 35.1 ms  100 keys
  quotes                         ...............######               39.1 ms  100 keys
  quotes                         .................######             43.1 ms  100 keys
  quotes                         ...................######           47.1 ms  100 keys
Keys
  price:last:S0001 and 497 alike *                                  0.100 ms  from the cache, quotes
  price:last:S0902 and 499 alike ...................######           48.3 ms  fetched, quotes
  price:last:S0499 and 1 alike   -------------------------------     59.6 ms  failed: LookupError

- under way   * there at once   # call   . wait for capacity
"""
    )


def test_where_even_that_is_too_much_the_worst_and_slowest_are_kept_and_the_rest_counted() -> None:
    slow = KeyTrace(price("slow"), Obtained.FETCHED, 0.0, 0.5, source="a")
    failed = KeyTrace(price("failed"), Obtained.FAILED, 0.1, 0.2, error_type="E")
    quick = [KeyTrace(ResourceKey("quick", str(n)), Obtained.CACHE, 0.0, 0.001) for n in range(940)]
    text = traced(*quick, failed, slow, omitted_keys=60).to_text(limit=2)
    lines = [line.split()[0] for line in text.splitlines() if line.startswith("  price")]
    assert lines == ["price:last:slow", "price:last:failed"]
    assert "  and 940 more, faster and with less to tell; 60 that there was no room" in text
    assert "1,002 keys" in text


def test_a_trace_of_nothing_and_of_no_time_can_be_shown() -> None:
    assert EMPTY.to_text().startswith("build b1\n0 ms · began")
    for trace in (EMPTY, replace(EMPTY, omitted_keys=3), traced(KeyTrace(A, Obtained.CACHE, 0, 0))):
        ElementTree.fromstring(trace.to_svg())
        assert "<main" in trace.to_html()
        assert trace.to_text()


@pytest.mark.parametrize("given", [{"width": 39}, {"limit": 0}])
def test_a_text_needs_some_room(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be an integer of at least"):
        EVERYTHING.to_text(**given)  # type: ignore[arg-type]  # either of two integers
    for draw in (EVERYTHING.to_svg, EVERYTHING.to_html):
        with pytest.raises(ValueError, match="limit must be"):
            draw(limit=0)


def test_a_call_that_began_before_and_outlasts_the_trace_stays_within_the_picture() -> None:
    long = call(attempt(1, -5.0, -4.0, 9.0, "under_way"), start=-5.0, end=9.0)
    trace = traced(KeyTrace(A, Obtained.FAILED, 0.0, 1.0, calls=(0,)), calls=(long,))
    row = next(line for line in trace.to_text().splitlines() if "quotes" in line)
    assert row.count("█") == max(len(line) for line in re.findall("█+", trace.to_text()))
    assert "14.0 s" in row


# Picture and page --------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and its text."""

    VOID = frozenset({"meta", "rect", "line", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("trace", [EVERYTHING, of_many(), EMPTY])
def test_a_picture_is_one_accessible_svg_that_needs_nothing_else(trace: Trace) -> None:
    picture = trace.to_svg()
    root = ElementTree.fromstring(picture)
    assert (root.tag, root.get("role")) == (f"{SVG}svg", "img")
    assert [each.tag for each in root][:2] == [f"{SVG}title", f"{SVG}desc"]
    assert root[0].text == "build b1"
    assert str(root[1].text).startswith(duration(trace.duration_seconds))
    assert not re.search(r"<script|href|url\(|@import|\bid=", picture)
    assert "@media (prefers-color-scheme:dark)" in picture


def test_a_picture_names_every_row_and_every_kind_of_bar() -> None:
    root = ElementTree.fromstring(EVERYTHING.to_svg())
    words = [each.text for each in root.iter(f"{SVG}text")]
    assert {key.display for key in EVERYTHING.keys} <= set(words)
    used = {each.get("class") for tag in ("rect", "line") for each in root.iter(f"{SVG}{tag}")}
    assert used == {*LOOKS, "ground", "grid"}
    assert {look.legend for look in LOOKS.values()} <= set(words)


@pytest.mark.parametrize("trace", [EVERYTHING, of_many(), EMPTY])
def test_a_page_is_whole_and_its_rows_open_without_a_script(trace: Trace) -> None:
    page = Page(trace.to_html())
    assert page.open == []
    tags = [tag for tag, _ in page.found]
    assert {"script", "link", "img", "iframe", "a"}.isdisjoint(tags)
    assert tags.count("details") == tags.count("summary")
    assert all(not name.startswith("on") for _, given in page.found for name in given)
    assert ("html", {"lang": "en"}) in page.found
    if trace.keys:
        assert tags.count("details") > 3
    if trace is EVERYTHING:
        assert EVERYTHING.explain(RISK).startswith(page.words[page.words.index("risk", 40) :][0])
        for sentence in ("The circuit of 'book' was open, so it was not called", "It rests on 2"):
            assert any(sentence in each for each in page.words)


def test_what_went_wrong_is_written_in_another_colour() -> None:
    root = ElementTree.fromstring(EVERYTHING.to_svg())
    bad = [each.text for each in root.iter(f"{SVG}text") if each.get("class") == "bad"]
    assert bad == ["timeout", "CircuitOpenError", "failed: Absent", "stale, standing in: Stale…"]


def test_only_what_took_no_wait_and_no_call_was_there_at_once() -> None:
    cached = KeyTrace(A, Obtained.CACHE, 0.0, 0.001)
    awaited = replace(cached, waits=(Wait(WaitReason.CACHE, 0.0, 0.001),))
    fetched = replace(cached, obtained=Obtained.FETCHED)
    shown = ["there at once" in traced(each).to_text() for each in (cached, awaited, fetched)]
    assert shown == [True, False, False]


def test_nothing_that_is_shown_is_taken_for_markup() -> None:
    hostile = KeyTrace(
        HOSTILE, Obtained.FALLBACK, 0.0, 1.0, source="<img src=x onerror=alert(1)>",
        version="</style>", error_type="</title>", error="<!--", calls=(0,),
    )  # fmt: skip
    bad = call(attempt(outcome="<b>", error="</p>"), source="</svg>", snapshot_id='"><i>')
    stage = StageTrace("</h2>\x00", 0.0, 1.0, 1)
    derived = KeyTrace(
        RISK, Obtained.DERIVED, 0.0, 2.0, rests_on=(Foundation(HOSTILE, "<i>", "<b>", EPOCH),)
    )
    trace = traced(
        hostile, derived, calls=(bad,), snapshot_id="<u>\ud800", kind="]]>", stages=(stage,),
        parent_snapshot_id="<i>",
    )  # fmt: skip
    assert "critical path: " in trace.to_text()
    ElementTree.fromstring(trace.to_svg())
    tags = {tag for tag, _ in Page(trace.to_html()).found}
    assert {"img", "b", "i", "u", "script"}.isdisjoint(tags)
    for shown in (trace.to_svg(), trace.to_html(), trace.to_text()):
        shown.encode()  # half a surrogate pair could not be written to a file
        assert "\x00" not in shown
        assert "\u202e" not in shown


def test_pictures_are_bounded_whatever_the_number_of_keys() -> None:
    different = [
        KeyTrace(ResourceKey(f"n{n}", "x" * 500, "y" * 500), Obtained.CACHE, 0.0, n / 1000)
        for n in range(3000)
    ]
    trace = traced(*different)
    assert len(trace.to_text()) < 5_000
    assert len(trace.to_svg()) < 100_000
    assert len(trace.to_html()) < 400_000


def test_a_page_costs_in_proportion_to_what_keys_rest_on() -> None:
    def cost(number: int) -> int:
        below = [KeyTrace(price(str(n)), Obtained.FETCHED, 0.0, 1.0, False) for n in range(number)]
        rests_on = tuple([Foundation(each.key, "v1", "quotes", EPOCH) for each in below])
        desks = [ResourceKey("risk", "exposure", f"{n}") for n in range(number)]
        above = [
            KeyTrace(desk, Obtained.DERIVED, 0.0, 2.0, rests_on=rests_on[at : at + 3])
            for at, desk in enumerate(desks)
        ]
        trace = traced(*below, *above)
        return profiled(lambda: trace.to_html(limit=9_999)).total()

    assert cost(200) < 5 * cost(50)


def luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_words_and_bars_stand_out_from_their_ground(which: int) -> None:
    """As WCAG asks for: 4.5 for text, 3 for what else must be seen."""
    ground = _COLOURS["ground"][which]
    for name in ("text", "quiet", "bad"):
        assert contrast(_COLOURS[name][which], ground) >= 4.5, name
    for kind, look in LOOKS.items():
        assert contrast((look.light, look.dark)[which], ground) >= 3, kind


# A trace file ------------------------------------------------------------------------------------

FORMAT = {
    "X": {"name", "ph", "pid", "tid", "ts", "dur", "cat", "args"},
    "M": {"name", "ph", "pid", "tid", "args"},
    "s": {"name", "ph", "pid", "tid", "ts", "cat", "id"},
    "f": {"name", "ph", "pid", "tid", "ts", "cat", "id", "bp"},
}


def events_of(trace: Trace) -> list[dict[str, Any]]:
    """The events of a trace file, each checked against the format."""
    written = json.loads(json.dumps(trace.to_chrome(), allow_nan=False))
    assert set(written) == {"traceEvents", "displayTimeUnit", "otherData"}
    for event in written["traceEvents"]:
        assert set(event) == FORMAT[event["ph"]]
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        assert (event.get("bp", "e"), event["pid"]) == ("e", 1)
        assert isinstance(event["tid"], int)
    found: list[dict[str, Any]] = written["traceEvents"]
    return found


def within(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    return bool(
        outer["ts"] <= inner["ts"] + 1e-6
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-6
    )


def test_processes_and_threads_have_names_and_an_order() -> None:
    named = [event for event in events_of(EVERYTHING) if event["ph"] == "M"]
    assert named[0]["name"] == "process_name"
    assert named[0]["args"] == {"name": "build b1"}
    names = [event["args"]["name"] for event in named if event["name"] == "thread_name"]
    assert names[:6] == [
        "stages", "source quotes", "source rates", "source news", "source book", "source risk",
    ]  # fmt: skip
    assert names.count("keys") == len(names) - names.index("keys") > 1
    order = [event["args"]["sort_index"] for event in named if "sort_index" in event["args"]]
    assert len(set(order)) == len(names)


def test_an_arrow_leads_from_each_key_to_each_call_that_carried_it() -> None:
    events = events_of(EVERYTHING)
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(len(found.calls) for found in EVERYTHING.keys.values())
    slices = [event for event in events if event["ph"] == "X"]
    for number, start in starts.items():
        for arrow in (start, ends[number]):
            point = {**arrow, "dur": 0}
            assert any(s["tid"] == arrow["tid"] and within(point, s) for s in slices)
        assert start["ts"] <= ends[number]["ts"]


def test_a_slice_has_the_facts_of_its_record() -> None:
    slices = {e["name"]: e for e in events_of(EVERYTHING) if e["ph"] == "X"}
    assert slices["risk:exposure:desk-7"]["args"]["rests_on"][0]["version"] == "v5"
    assert slices["attempt 1"]["args"]["outcome"] in {"failure", "success", "timeout"}
    assert slices["stages" if "stages" in slices else "build"]["args"]["keys"] == 9
    first = min(each["ts"] for each in slices.values())
    assert first == 0  # a call that had begun before is the earliest event there is
