"""What a look at a builder finds, and how it is told."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest

from coalestra import (
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    KeyNormalizer,
    RefreshMode,
    ResourceAbsent,
    ResourceKey,
)
from coalestra.core.trace import KeyTrace, Obtained, Trace
from coalestra.inspect.looks import Names, Story, Traces, kind_name, look_at, told_values, trace_id
from tests.contracts.caches import SingleKeyCache
from tests.contracts.samples import value_of
from tests.orchestration.scripted import (
    Batch,
    Derived,
    Single,
    breaking,
    builder,
    held_at,
    key,
    latency,
    tuned,
)
from tests.support import Gate, begun, settle


async def told(story: Story, made: Any, *, late: float = 0.0) -> dict[str, Any]:
    """What the page would show now."""
    now = asyncio.get_running_loop().time()
    state = story.told(await look_at(made), now, late)
    return json.loads(json.dumps(state))  # type: ignore[no-any-return]  # as a browser reads it


def story_of(made: Any, *, show: bool = False) -> Story:
    return Story(made, Names(show=show))


async def watched(made: Any) -> Story:
    """What the page has seen, after one look."""
    story = story_of(made)
    await told(story, made)
    return story


async def failing(key: ResourceKey, context: FetchContext) -> Any:
    raise ConnectionError("of a subject")


# Sources ------------------------------------------------------------------------------------------


async def test_a_builder_that_was_never_used_has_a_page_too() -> None:
    made = builder(Single("one"), Batch("many"), Derived("made", needs=lambda _: []))
    state = await told(story_of(made), made)
    assert [(each["name"], each["kind"]) for each in state["sources"]] == [
        ("one", "single"),
        ("many", "batch"),
        ("made", "derived"),
    ]
    assert state["verdict"]["findings"] == []
    assert state["flights"] == {"count": 0, "shown": []}
    assert state["graph"] == {"kinds": [], "edges": [], "omitted": 0}
    assert (state["tracing"], state["traces"]) == (0.0, [])
    assert (state["cache"]["fresh"], state["cache"]["reads"], state["seconds"]) == (None, None, 0)
    assert state["submissions"] == [0, None]


async def test_rates_are_told_for_the_time_between_two_looks() -> None:
    made = builder(Single("k", fetch=latency(0.25)), Single("idle"))
    story = story_of(made)
    assert (await told(story, made))["sources"][0]["rate"] is None, "one look gives no rate"
    for number in range(8):
        await made.build([key("k", str(number))])
    state = await told(story, made)
    busy, idle = state["sources"]
    assert state["seconds"] == pytest.approx(2)
    assert busy["rate"] == pytest.approx(4)
    assert busy["latency_ms"] == pytest.approx(250)
    assert (busy["failing"], idle["rate"], idle["latency_ms"]) == (0, 0, None)


async def test_rates_forget_what_is_more_than_some_seconds_ago() -> None:
    made = builder(Single("k"))
    story = await watched(made)
    await made.build([key("k")])
    for _ in range(20):
        await asyncio.sleep(1)
        state = await told(story, made)
    assert state["sources"][0]["rate"] == 0
    assert 9 <= state["seconds"] <= 12


async def test_a_rate_after_a_long_absence_is_not_made_up() -> None:
    made = builder(Single("k"))
    story = await watched(made)
    await made.build([key("k")])
    await asyncio.sleep(3_600)
    state = await told(story, made)
    assert (state["sources"][0]["rate"], state["seconds"]) == (None, 0)
    assert state["verdict"]["baseline_used"] is False


async def test_failures_are_told_as_a_rate_and_by_the_type_of_the_last() -> None:
    made = builder(Single("k", fetch=failing))
    story = await watched(made)
    await made.build([key("k")], strict=False)
    await asyncio.sleep(4)
    (source,) = (await told(story, made))["sources"]
    assert source["failing"] == pytest.approx(0.25)
    assert source["last_error"] == "ConnectionError"
    assert source["seconds_since_error"] == pytest.approx(4)
    assert source["seconds_since_success"] is None


async def test_an_open_circuit_says_for_how_long_and_when_it_is_tried() -> None:
    made = builder(tuned(Single("k", fetch=failing), resilience_policy=breaking()))
    await made.build([key("k")], strict=False)
    await asyncio.sleep(12)
    state = await told(story_of(made), made)
    ((circuit,), (finding,)) = (state["sources"][0]["circuits"], state["verdict"]["findings"])
    assert (circuit["scope"], circuit["state"], circuit["count"]) == ("source", "open", 1)
    assert circuit["seconds_since_opened"] == pytest.approx(12)
    assert circuit["seconds_until_probe"] == pytest.approx(18)
    assert (finding["reason"], finding["component"]) == ("circuit_open", "k")


async def test_circuits_of_parts_of_a_source_are_counted_and_name_no_part() -> None:
    by_subject = breaking(scope=CircuitScope.SUBJECT)
    made = builder(tuned(Single("k", fetch=failing), resilience_policy=by_subject))
    await made.build([key("k", "secret-1"), key("k", "secret-2")], strict=False)
    state = await told(story_of(made), made)
    (circuit,) = state["sources"][0]["circuits"]
    assert (circuit["scope"], circuit["count"]) == ("subject", 2)
    assert "secret" not in json.dumps(state)


async def test_a_failure_of_the_last_minute_is_a_finding_and_one_before_it_is_not() -> None:
    made = builder(Single("k", fetch=latency(5.0), timeout=1.0))
    story = await watched(made)
    await made.build([key("k")], strict=False)
    reasons = []
    for _ in range(8):
        await asyncio.sleep(10)
        findings = (await told(story, made))["verdict"]["findings"]
        reasons.append([finding["reason"] for finding in findings])
    assert reasons[:5] == [["source_timeouts_increased"]] * 5
    assert reasons[-1] == []


# Capacity, cache, flights -------------------------------------------------------------------------


async def test_capacity_says_who_holds_the_slots_and_who_waits() -> None:
    gate = Gate()
    limited = tuned(Single("k", fetch=held_at(gate)), max_concurrency=1)
    made = builder(limited, Single("o", fetch=held_at(gate)), max_concurrency=2)
    keys = [key("k", "1"), key("k", "2"), key("o")]
    build = await begun(made.build(keys), gate, 2)
    await settle()
    state = await told(story_of(made), made)
    holders = state["capacity"].pop("holders")
    assert sorted(holders) == [["k", 1], ["o", 1]]
    assert state["capacity"] == {"limit": 2, "in_use": 2, "waiting": 0}
    first, other = state["sources"]
    assert first["slots"] == {"limit": 1, "in_use": 1, "waiting": 1}
    assert (other["slots"], other["holding"]) == (None, 1)
    gate.open()
    await build


async def test_what_the_cache_gave_is_told_since_the_last_looks_and_in_all() -> None:
    made = builder(Single("k"))
    await made.build([key("k")])
    story = await watched(made)
    for _ in range(3):
        await made.build([key("k")])
    await made.build([key("k", "new")])
    await asyncio.sleep(1)
    cache = (await told(story, made))["cache"]
    assert (cache["fresh"], cache["reads"]) == (3, 4)
    assert (cache["stats"]["hits"], cache["stats"]["misses"], cache["stats"]["size"]) == (3, 2, 2)


async def test_what_was_found_stale_is_not_told_as_fresh() -> None:
    made = builder(Single("k"), default_policy=FreshnessPolicy(1.0, 100.0))
    await made.build([key("k")])
    story = await watched(made)
    await asyncio.sleep(5)
    await made.build([key("k")])
    cache = (await told(story, made))["cache"]
    assert (cache["fresh"], cache["reads"], cache["stats"]["stale_hits"]) == (0, 1, 1)


class Odd(SingleKeyCache):
    """Tells whatever it likes of itself."""

    async def stats(self) -> Any:
        return {"hits": "many", "misses": object()}


class Stuck(SingleKeyCache):
    """Does not answer."""

    async def stats(self) -> Any:
        await asyncio.Event().wait()


@pytest.mark.parametrize("kind", [SingleKeyCache, Odd, Stuck])
async def test_a_cache_that_tells_nothing_holds_up_no_look(kind: type[SingleKeyCache]) -> None:
    made = builder(Single("k"), cache=kind())
    await made.build([key("k")])
    await settle()
    story = await watched(made)
    began = asyncio.get_running_loop().time()
    state = await told(story, made)
    assert asyncio.get_running_loop().time() - began < 5
    assert (state["cache"]["stats"] is None) is (kind is not Odd)
    assert state["cache"]["reads"] is None
    assert state["cache"]["calls"] > 0
    assert state["graph"]["kinds"] == []


async def test_flights_say_where_they_stand_without_subjects_unless_asked() -> None:
    gate = Gate()
    made = builder(Single("k", fetch=held_at(gate)))
    build = await begun(made.build([key("k", "secret")]), gate)
    await asyncio.sleep(2)
    flights = (await told(story_of(made), made))["flights"]
    (flight,) = flights["shown"]
    assert flights["count"] == 1
    assert (flight["source"], flight["state"]) == ("k", "its source is running")
    assert (flight["waiters"], flight["running_seconds"]) == (1, pytest.approx(2))
    assert flight["key"].startswith("test:k:#")
    (shown,) = (await told(story_of(made, show=True), made))["flights"]["shown"]
    assert shown["key"] == "test:k:secret"
    gate.open()
    await build


async def test_keys_of_any_length_are_told_in_short() -> None:
    gate, long = Gate(), "x" * 100_000
    made = builder(Single("k", fetch=held_at(gate)))
    build = await begun(made.build([ResourceKey(long, "k", long, {long: long})]), gate)
    for show in (True, False):
        assert len(json.dumps(await told(story_of(made, show=show), made))) < 10_000
    gate.open()
    await build
    assert len(json.dumps(await told(story_of(made), made))) < 10_000
    values = [value_of(ResourceKey("n", "a", long)), value_of(ResourceKey("n", "a", long + "y"))]
    shown = [each["key"] for each in told_values(values, Names(show=True), 0.0, False)]
    assert [len(each) for each in shown] == [200, 200]
    assert shown[0] != shown[1]


async def test_of_very_many_flights_some_are_shown_and_all_are_counted() -> None:
    gate = Gate()
    made = builder(Batch("k", before=gate.pass_))
    build = await begun(made.build([key("k", str(n)) for n in range(200)]), gate)
    flights = (await told(story_of(made), made))["flights"]
    assert (flights["count"], len(flights["shown"])) == (200, 50)
    gate.open()
    await build


async def test_refreshes_are_counted() -> None:
    gate = Gate(opened=True)
    policy = FreshnessPolicy(1.0, 1_000.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    made = builder(Single("k", fetch=held_at(gate)), default_policy=policy)
    await made.build([key("k")])
    await asyncio.sleep(5)
    gate.opened = False
    await made.build([key("k")])
    await gate.wait_arrived(2)
    state = await told(story_of(made), made)
    assert state["refreshes"] == 1
    assert state["flights"]["shown"][0]["refresh"] is True
    gate.open()
    await made.wait_for_refreshes()


async def test_how_late_the_loop_was_is_told() -> None:
    made = builder(Single("k"))
    state = await told(story_of(made), made, late=0.25)
    assert state["loop"] == {"late_ms": 250, "answers": True}


# The graph ----------------------------------------------------------------------------------------


def layered(**more: Any) -> Any:
    return builder(
        Single("base", "b", "c"),
        Derived("middle", "m", needs=lambda each: [key("b", each.subject), key("c", each.subject)]),
        Derived("top", "t", needs=lambda each: [key("m", each.subject)]),
        **more,
    )


EDGES = [["test:b", "test:m"], ["test:c", "test:m"], ["test:m", "test:t"]]


async def test_the_graph_is_learnt_from_what_the_memory_cache_holds() -> None:
    made = layered()
    await made.build([key("t", "secret-1"), key("t", "secret-2")])
    graph = (await told(story_of(made), made))["graph"]
    assert graph["edges"] == EDGES
    assert {each["name"]: (each["sources"], each["derived"]) for each in graph["kinds"]} == {
        "test:b": (["base"], False),
        "test:c": (["base"], False),
        "test:m": (["middle"], True),
        "test:t": (["top"], True),
    }
    assert "secret" not in json.dumps(graph)


async def test_the_graph_is_learnt_from_traces_where_the_cache_is_elsewhere() -> None:
    made = layered(cache=SingleKeyCache(), trace=True)
    await made.build([key("t")])
    await settle()
    assert (await told(story_of(made), made))["graph"]["edges"] == EDGES


async def test_what_was_learnt_is_kept_while_the_page_lives() -> None:
    made = layered()
    await made.build([key("t")])
    story = await watched(made)
    await made.cache.clear()
    assert (await told(story, made))["graph"]["edges"] == EDGES


async def test_an_entry_seen_before_is_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layered()
    story, named = story_of(made), list[ResourceKey]()

    def name_of(key: ResourceKey) -> str:
        named.append(key)
        return kind_name(key)

    monkeypatch.setattr("coalestra.inspect.looks.kind_name", name_of)
    await made.build([key("t", "1")])
    await told(story, made)
    assert len(named) == 4 + 3  # what is held, and what that rests on
    named.clear()
    await made.build([key("b", "2")])
    await told(story, made)
    assert named == [key("b", "2")]


async def test_very_many_kinds_do_not_make_an_endless_graph() -> None:
    names = [f"k{number:03}" for number in range(200)]
    made = builder(Batch("base", *names))
    await made.build([key(name) for name in names])
    graph = (await told(story_of(made), made))["graph"]
    assert len(graph["kinds"]) == 80
    assert graph["omitted"] == 120


# Traces -------------------------------------------------------------------------------------------


def trace_of(number: int, seconds: float = 0.0, obtained: Obtained = Obtained.CACHE) -> Trace:
    found = KeyTrace(key("k"), obtained, 0.0, seconds)
    return Trace(str(number), "build", None, float(number), seconds, keys={found.key: found})


def ids(told: list[dict[str, Any]]) -> list[int]:
    return [int(each["snapshot_id"]) for each in told]


def test_of_many_traces_the_newest_the_slowest_and_the_worst_are_told() -> None:
    traces = Traces()
    traces.take([trace_of(1, 9.0), trace_of(2, 0.0, Obtained.FAILED), trace_of(3)])
    traces.take([trace_of(4, 0.0, Obtained.FALLBACK), *(trace_of(n, 0.1) for n in range(5, 300))])
    told = ids(traces.told(300.0))
    assert told == sorted(told, reverse=True)
    assert told[:20] == list(range(299, 279, -1))
    assert {1, 2, 4} < set(told)
    assert 3 not in told
    assert len(told) <= 50


def test_names_of_any_length_are_told_in_short() -> None:
    endless = "x" * 1_000_000
    traces = Traces()
    traces.take([Trace(endless, "refresh", endless, 0.0, 0.0)])
    (trace,) = traces.told(0.0)
    published = dataclasses.replace(value_of(key("k")), source=endless)
    (value,) = told_values([published], Names(show=False), 0.0, show_values=True)
    assert len(json.dumps([trace, value])) < 2_000


def test_what_was_notable_is_let_go_after_a_quarter_of_an_hour() -> None:
    traces = Traces()
    traces.take([trace_of(1, 9.0), trace_of(2, 0.0, Obtained.FAILED)])
    for number in range(100, 2_000):
        traces.take([trace_of(number)])
        told = ids(traces.told(float(number)))
        assert ({1, 2} < set(told)) == (number < 901), number


def test_very_many_traces_are_not_kept() -> None:
    traces = Traces()
    for number in range(1_000):
        traces.take([trace_of(number, number % 7)])
        traces.told(float(number))
    assert sum(traces.find(trace_id(trace_of(n, n % 7))) is not None for n in range(1_000)) <= 130


def test_a_trace_of_a_session_that_goes_on_takes_the_place_of_the_one_before() -> None:
    traces = Traces()
    before, after = trace_of(1, 1.0), trace_of(1, 2.0)
    assert traces.take([before]) == [before]
    assert traces.take([before]) == []
    assert traces.take([after]) == [after]
    (told,) = traces.told(1.0)
    assert told["seconds"] == 2.0
    assert traces.find(told["id"]) is after


async def test_what_does_not_exist_is_no_failure() -> None:
    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        raise ResourceAbsent

    made = builder(Single("k", fetch=fetch), trace=True)
    await made.build([key("k")], strict=False)
    state = await told(story_of(made), made)
    assert (state["traces"][0]["failed"], state["traces"][0]["absent"]) == (0, 1)
    assert state["sources"][0]["failed_attempt_count"] == 0


# Names and values ---------------------------------------------------------------------------------


def test_a_code_stands_for_subject_and_qualifiers_and_is_the_same_each_time() -> None:
    names = Names(show=False)
    plain = ResourceKey("bank", "rate")
    full = ResourceKey("bank", "account", "alice", {"currency": "EUR"})
    assert names.key(plain) == plain
    assert names.key(full) == names.key(full)
    assert names.key(full) != names.key(ResourceKey("bank", "account", "alice"))
    assert names.key(full) != names.key(ResourceKey("bank", "account", "bob", {"currency": "EUR"}))
    assert "alice" not in str(names.key(full))
    assert "EUR" not in str(names.key(full))
    assert Names(show=True).key(full) == full


def test_a_code_says_nothing_to_who_knows_the_subject_and_another_page() -> None:
    wanted = ResourceKey("bank", "account", "alice")
    assert Names(show=False).key(wanted) != Names(show=False).key(wanted)


def test_a_subject_of_any_characters_has_a_code() -> None:
    assert Names(show=False).key(ResourceKey("n", "n", "\ud800\n")).subject.startswith("#")


def test_a_key_whose_normalizer_keeps_white_space_is_shown_like_any_other() -> None:
    kept = KeyNormalizer(namespace=str, name=str)
    keys = [ResourceKey(each, "n", "s", normalizer=kept) for each in (" ", "a", " a")]
    shown = [Names(show=False).key(each) for each in keys]
    assert [each.namespace for each in shown] == [" ", "a", " a"]


class Unruly:
    def __repr__(self) -> str:
        raise RuntimeError("not today")


class Rude:
    def __repr__(self) -> str:
        return 5  # type: ignore[return-value]  # as some do


@pytest.mark.parametrize("value,shown", [
    (5, "5"), ({"a": [1, 2]}, "{'a': [1, 2]}"), (Unruly(), "<Unruly instance at "),
    (Rude(), "<Rude instance at "),
])  # fmt: skip
def test_values_are_shown_by_their_repr_whatever_that_does(value: Any, shown: str) -> None:
    (each,) = told_values([value_of(payload=value)], Names(show=True), 0.0, True)
    assert each["value"].startswith(shown)


def test_a_large_value_is_cut() -> None:
    values = [value_of(payload=["x" * 5_000] * 5_000)]
    (each,) = told_values(values, Names(show=True), 0.0, True)
    assert len(each["value"]) <= 300
