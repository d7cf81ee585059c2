"""What a trace says of a build: how each key was come by, what it waited for, and what follows."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    CircuitBreakerPolicy,
    FetchContext,
    FreshnessPolicy,
    NearCache,
    RefreshMode,
    ResourceAcceptanceRule,
    ResourceKey,
    RetryPolicy,
    Snapshot,
    SnapshotAcceptanceError,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotBuildError,
    SnapshotRequest,
    SourcePayload,
    SourceResiliencePolicy,
    SourceUnavailableError,
    SyncSnapshotBuilder,
)
from coalestra.core.trace import CallTrace, KeyTrace, Obtained, Trace, WaitReason
from coalestra.orchestration import flights, tracing
from coalestra.orchestration.tracing import (
    MOST_ATTEMPTS,
    MOST_INPUTS,
    MOST_KEPT,
    MOST_KEYS,
)
from tests.contracts.caches import SingleKeyCache
from tests.observability.recording import Recorder
from tests.orchestration.scripted import (
    Batch,
    Derived,
    Single,
    builder,
    held_at,
    key,
    latency,
    tuned,
)
from tests.support import Gate, begun, lines_run, settle

A, B, D = key("a"), key("b"), key("d")
SWR = FreshnessPolicy(10.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
TWICE = SourceResiliencePolicy(retry=RetryPolicy(max_attempts=2, base_delay_seconds=1.0))


def trace_of(snapshot: Snapshot) -> Trace:
    """The trace of a snapshot that has one."""
    assert snapshot.trace is not None
    return snapshot.trace


def the_call(trace: Trace, wanted: ResourceKey = A) -> CallTrace:
    """The only call that carried a key."""
    (number,) = trace.keys[wanted].calls
    return trace.calls[number]


async def down(key: ResourceKey, context: FetchContext) -> Any:
    """Fail after a second."""
    await asyncio.sleep(1)
    raise SourceUnavailableError("down for repairs")


# Whether there is one -----------------------------------------------------------------------------


async def test_a_snapshot_has_no_trace_unless_it_was_asked_for() -> None:
    b = builder(Single("a"))
    assert (await b.build([A])).trace is None
    assert b.recent_traces() == ()
    assert (await b.build([A], trace=True)).trace is not None


@pytest.mark.parametrize("rate, traced", [(0, 0), (0.5, 1), (1, 2)])
async def test_a_rate_is_the_share_of_builds_that_are_traced(
    rate: float, traced: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = iter([0.2, 0.7])
    monkeypatch.setattr("random.random", lambda: next(draws))
    b = builder(Single("a"), trace=rate)
    found = [await b.build([A]), await b.build([A])]
    assert sum(snapshot.trace is not None for snapshot in found) == traced


async def test_a_trace_stays_the_same_and_goes_where_its_snapshot_goes() -> None:
    snapshot = await builder(Single("a", fetch=latency(1))).build([A], trace=True)
    again = pickle.loads(pickle.dumps(snapshot))  # before anybody has looked
    assert again.trace == snapshot.trace == copy.copy(snapshot).trace
    assert snapshot.trace is snapshot.trace


# How a key was come by ----------------------------------------------------------------------------


async def test_a_fetched_key_says_which_call_brought_it_and_when() -> None:
    b = builder(Single("a", fetch=latency(2)))
    trace = trace_of(await b.build([A], trace=True, snapshot_id="mine"))
    found = trace.keys[A]
    assert (found.obtained, found.source, found.requested) == (Obtained.FETCHED, "a", True)
    assert (found.start, found.end) == (0, 2)
    call = the_call(trace)
    assert (call.source, call.kind, call.keys, call.outcome) == ("a", "single", 1, "success")
    assert (call.start, call.end, call.snapshot_id) == (0, 2, "mine")
    (attempt,) = call.attempts
    assert (attempt.number, attempt.called, attempt.end) == (1, 0, 2)
    assert (trace.snapshot_id, trace.kind, trace.duration_seconds) == ("mine", "build", 2)
    assert [stage.name for stage in trace.stages] == ["build", "delivery"]


async def test_a_cache_that_is_awaited_is_a_wait() -> None:
    b = builder(Single("a"), cache=Slow())
    trace = trace_of(await b.build([A], trace=True))
    wait = trace.keys[A].waits[0]
    assert (wait.reason, wait.start) == (WaitReason.CACHE, 0)
    assert wait.end == pytest.approx(0.2, abs=0.01)
    assert trace.keys[A].obtained is Obtained.FETCHED
    held = trace_of(await b.build([A], trace=True))
    assert held.keys[A].obtained in (Obtained.CACHE, Obtained.NEAR_CACHE)
    await b.aclose()


async def test_who_still_read_a_cache_when_anothers_flight_ended_says_whose_value_it_is() -> None:
    gate = Gate(opened=True)

    class Slow(SingleKeyCache):
        async def get(self, key: ResourceKey, **more: Any) -> Any:
            found = await super().get(key, **more)
            await gate.pass_()
            return found

    source = Single("a")
    b = builder(source, cache=Slow())
    async with b.session(snapshot_id="other") as session:
        await session.resolve([A])
        await b.publisher.invalidate(A)
        gate.close()
        reader = await begun(b.build([A], trace=True))
        await session.revalidate([A], force_refresh=True)
        gate.open()
        found = trace_of(await reader).keys[A]
    assert (found.obtained, found.joined) == (Obtained.FETCHED, "other")
    assert len(source.calls) == 2
    await b.aclose()


async def test_the_memory_before_a_shared_cache_is_told_apart() -> None:
    b = builder(Single("a"), cache=NearCache(SingleKeyCache()))
    await b.build([A])
    await settle()
    assert trace_of(await b.build([A], trace=True)).keys[A].obtained is Obtained.NEAR_CACHE


async def test_a_derived_key_says_what_it_rests_on_and_that_it_waited_for_it() -> None:
    b = builder(Single("a", fetch=latency(3)), Derived("d", needs=lambda _: [A]))
    snapshot = await b.build([D], trace=True)
    trace = trace_of(snapshot)
    found = trace.keys[D]
    assert found.obtained is Obtained.DERIVED
    (wait,) = found.waits
    assert (wait.reason, wait.start, wait.end) == (WaitReason.DEPENDENCIES, 0, 3)
    (below,) = found.rests_on
    assert (below.key, below.source) == (A, "a")
    assert below.version == trace.keys[A].version == snapshot[D].dependency_versions[A]
    assert trace.keys[A].requested is False


async def test_one_who_joins_says_whose_flight_and_how_long_though_that_is_not_traced() -> None:
    gate = Gate()
    b = builder(Single("a", fetch=held_at(gate)))
    first = await begun(b.build([A], snapshot_id="first"), gate)
    await asyncio.sleep(1)
    second = await begun(b.build([A], trace=True))
    await asyncio.sleep(2)
    gate.open()
    trace = trace_of(await second)
    found = trace.keys[A]
    assert (found.obtained, found.joined) == (Obtained.FETCHED, "first")
    assert [(w.reason, w.start, w.end, w.detail) for w in found.waits] == [
        (WaitReason.FLIGHT, 0, 2, "first")
    ]
    call = the_call(trace)
    assert (call.snapshot_id, call.start, call.end) == ("first", -1, 2)
    assert (await first).trace is None


async def test_attempts_tell_their_errors_and_the_pause_between_them() -> None:
    source = tuned(Single("a", fetch=down), resilience_policy=TWICE)
    b = builder(source)
    trace = trace_of(await b.build([A], strict=False, trace=True))
    first, second = the_call(trace).attempts
    assert (first.outcome, first.error_type, first.error) == (
        "failure",
        "SourceUnavailableError",
        "down for repairs",
    )
    assert first.pause_seconds is not None
    assert second.start == pytest.approx(first.end + first.pause_seconds)
    assert second.pause_seconds is None
    assert the_call(trace).outcome == "failure"
    found = trace.keys[A]
    assert (found.obtained, found.error_type) == (Obtained.FAILED, "ResourceResolutionError")
    (refusal,) = found.refusals
    assert (refusal.source, refusal.status, refusal.at) == ("a", "failure", second.end)


async def test_a_call_that_an_open_circuit_did_not_let_through_says_so() -> None:
    once = SourceResiliencePolicy(RetryPolicy(1), CircuitBreakerPolicy(failure_threshold=1))
    b = builder(tuned(Single("a", fetch=down), resilience_policy=once))
    await b.build([A], strict=False)
    trace = trace_of(await b.build([A], strict=False, trace=True))
    assert the_call(trace).outcome == "circuit_open"
    assert [refusal.status for refusal in trace.keys[A].refusals] == ["circuit_open"]


async def test_a_wait_for_capacity_names_who_held_it() -> None:
    b = builder(Single("a", fetch=latency(2)), Single("b", fetch=latency(1)), max_concurrency=1)
    first = await begun(b.build([A]))
    trace = trace_of(await b.build([B], trace=True))
    (attempt,) = the_call(trace, B).attempts
    assert attempt.holders == (("a", 1),)
    assert (attempt.start, attempt.called, attempt.end) == (0, 2, 3)
    await first


async def test_a_slot_on_its_way_to_who_waited_for_it_is_held_by_that_one() -> None:
    b = builder(Single("a", fetch=latency(1)), Single("b", fetch=latency(2)), max_concurrency=1)
    keys = key("a", "1"), key("a", "2")
    first = await begun(b.build(keys, trace=True))
    other = asyncio.ensure_future(b.build([B]))
    (attempt,) = the_call(trace_of(await first), keys[1]).attempts
    assert (attempt.start, attempt.called) == (1, 3)
    assert attempt.holders == (("b", 1),), "the first key was over, and `b` had waited for longer"
    await other


async def test_who_joins_a_call_that_waits_for_capacity_is_told_who_holds_it() -> None:
    b = builder(Single("a", fetch=latency(2)), Single("b"), max_concurrency=1)
    others = []
    for each in (A, B):
        others.append(asyncio.ensure_future(b.build([each])))
        await asyncio.sleep(0.5)
    trace = trace_of(await b.build([B], trace=True))
    (attempt,) = the_call(trace, B).attempts
    assert (attempt.holders, attempt.called) == ((("a", 1),), 1)
    await asyncio.wait(others)


async def test_a_stale_value_that_is_served_says_that_a_refresh_was_set_off() -> None:
    b = builder(Single("a", fetch=latency(1)), default_policy=SWR)
    await b.build([A])
    await asyncio.sleep(20)
    first = trace_of(await b.build([A], trace=True, snapshot_id="cause")).keys[A]
    second = trace_of(await b.build([A], trace=True)).keys[A]
    assert (first.obtained, first.refresh) == (Obtained.STALE, "scheduled")
    assert (second.obtained, second.refresh) == (Obtained.STALE, "under_way")
    await b.wait_for_refreshes()
    refresh = b.recent_traces()[-1]
    assert (refresh.kind, refresh.parent_snapshot_id) == ("refresh", "cause")
    assert refresh.keys[A].obtained is Obtained.FETCHED
    assert refresh.duration_seconds == 1


async def test_a_fallback_says_what_it_stands_in_for() -> None:
    answers = [latency(0), down]

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        return await answers.pop(0)(key, context)

    b = builder(Single("a", fetch=fetch), default_policy=FreshnessPolicy(10.0, 100.0))
    await b.build([A])
    await asyncio.sleep(20)
    found = trace_of(await b.build([A], trace=True)).keys[A]
    assert (found.obtained, found.source) == (Obtained.FALLBACK, "a")
    assert found.error_type == "ResourceResolutionError"
    assert "repairs" in str(found.error)


async def test_a_value_that_is_kept_as_its_source_fails_stands_in_from_then_on() -> None:
    answers: list[object] = [1, SourceUnavailableError("down for repairs"), 1]

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    b = builder(Single("a", fetch=fetch), default_policy=FreshnessPolicy(10.0, 100.0))
    async with b.session(trace=True) as session:
        ways = [trace_of(await session.resolve([A])).keys[A].obtained]
        await asyncio.sleep(20)
        kept = await session.revalidate([A])
        assert "fallback_error" in kept[A].metadata
        found = trace_of(kept).keys[A]
        ways.append(found.obtained)
        assert (found.error_type, found.start) == ("ResourceResolutionError", 20)
        ways.append(trace_of(await session.revalidate([A])).keys[A].obtained)
    assert ways == [Obtained.FETCHED, Obtained.FALLBACK, Obtained.FETCHED]


async def test_a_deadline_during_the_wait_for_a_later_source_is_among_what_was_tried() -> None:
    async def broken(key: ResourceKey, context: FetchContext) -> Any:
        raise SourceUnavailableError("down for repairs")

    b = builder(
        Single("first", "d", priority=20, fetch=broken),
        Derived("second", "d", needs=lambda key: [A]),
        Single("a", fetch=latency(50)),
    )
    snapshot = await b.build([D], strict=False, deadline_seconds=2, trace=True)
    found = trace_of(snapshot).keys[D]
    assert [(each.source, each.at) for each in found.refusals] == [("first", 0), ("second", 2)]
    assert "'second' brought nothing" in snapshot.explain(D)
    assert "deadline of 2 s" in snapshot.explain(D)
    await settle()


async def test_who_gets_what_was_acquired_while_a_cache_was_asked_waits_no_longer() -> None:
    """That is a join, and told as one: in the trace, in metadata, in counts and in events."""

    class Slow(SingleKeyCache):
        async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> Any:
            found = self._lookup(key, now, policy)
            await asyncio.sleep(1)
            return found

    seen = Recorder()
    b = builder(
        Single("a", fetch=latency(0.1)), Single("b", fetch=latency(5)),
        cache=Slow(), events=seen, metrics=seen, buffer_observability=False,
    )  # fmt: skip
    hurried = b.build([A], deadline_seconds=1, snapshot_id="hurried")
    _, snapshot = await asyncio.gather(hurried, b.build([A, B], trace=True))
    found, counted = trace_of(snapshot).keys[A], snapshot.diagnostics
    assert (found.joined, found.end) == ("hurried", 1)
    assert snapshot[A].metadata == {"coalesced_request": True}
    assert (counted.coalesced_requests, counted.cache_misses) == (1, 2)
    (joined,) = [each for each in seen.events if each.event_type == "resource_joined"]
    assert joined.payload["snapshot_id"] == snapshot.snapshot_id
    counters = [each.metric for each in seen.metrics]
    assert counters.count("singleflight_join_total") == 1
    assert counters.count("cache_access_total") == 3, "none of the looks found anything"
    await asyncio.sleep(5)  # until all is stored


async def test_a_wait_for_the_value_to_be_stored_ends_with_that_though_the_build_goes_on() -> None:
    b = builder(
        Single("a", fetch=latency(1)), Single("b", fetch=latency(5)), cache=SingleKeyCache()
    )
    found = trace_of(await b.build([A, B], trace=True)).keys[A]
    (stored,) = [each for each in found.waits if each.reason is WaitReason.STORE]
    assert 1 < stored.start < stored.end == found.end < 1.1


async def test_what_took_the_place_of_what_a_stage_had_read_has_its_own_story() -> None:
    b = builder(Single("a", fetch=latency(1)), Single("b", fetch=latency(9)))
    async with b.session(trace=True) as session:
        slow = asyncio.ensure_future(session.resolve([A, B]))
        await asyncio.sleep(2)
        await session.resolve([A])
        await session.revalidate([A], force_refresh=True)
        snapshot = await slow
    found = trace_of(snapshot).keys[A]
    assert (found.version, found.obtained) == (snapshot[A].version, Obtained.FETCHED)
    assert (found.start, found.end, the_call(trace_of(snapshot)).start) == (2, 3, 2)


async def test_an_event_that_came_meanwhile_is_told_as_published() -> None:
    gate = Gate()
    b = builder(Single("a", fetch=held_at(gate)))
    building = await begun(b.build([A], trace=True), gate)
    await b.publisher.publish(A, 2, source="feed")
    gate.open()
    snapshot = await building
    assert snapshot.value(A) == 2
    found = trace_of(snapshot).keys[A]
    assert (found.obtained, found.source) == (Obtained.PUBLISHED, "feed")


async def test_a_deadline_leaves_a_call_under_way_in_the_trace_that_is_made_then() -> None:
    gate = Gate()
    b = builder(Single("a", fetch=held_at(gate), timeout=100.0))
    patient = asyncio.ensure_future(b.build([A]))
    hasty = await b.build([A], strict=False, deadline_seconds=1.0, trace=True)
    await asyncio.sleep(1)
    gate.open()
    await patient
    trace = trace_of(hasty)  # looked at when the call was over: it tells what was known then
    assert trace.keys[A].obtained is Obtained.FAILED
    assert trace.keys[A].error_type == "ResourceResolutionError"
    (attempt,) = the_call(trace).attempts
    assert (the_call(trace).outcome, attempt.outcome, attempt.end) == ("under_way", "under_way", 1)


async def test_a_strict_build_that_fails_has_its_trace_in_the_error() -> None:
    b = builder(Single("a", fetch=down))
    with pytest.raises(SnapshotBuildError) as raised:
        await b.build([A], trace=True)
    assert raised.value.snapshot is not None
    assert trace_of(raised.value.snapshot).keys[A].obtained is Obtained.FAILED


# Sessions -----------------------------------------------------------------------------------------


async def test_a_session_tells_its_stages_and_each_snapshot_what_was_known_by_then() -> None:
    b = builder(Single("a", fetch=latency(1)), Single("b", fetch=latency(2)))
    async with b.session(trace=True) as session:
        first = await session.resolve([A])
        second = await session.resolve([A, B])
        third = await session.revalidate([A], force_refresh=True)
    assert list(trace_of(first).keys) == [A]
    assert trace_of(second).keys[A] == trace_of(first).keys[A]
    assert (trace_of(second).keys[B].start, trace_of(second).keys[B].end) == (1, 3)
    stages = [stage.name for stage in trace_of(third).stages if stage.name != "delivery"]
    assert stages == ["resolve", "resolve", "revalidate"]
    assert (trace_of(third).keys[A].start, trace_of(third).keys[A].end) == (3, 4)
    assert trace_of(third).keys[A].obtained is Obtained.FETCHED
    assert [trace.kind for trace in b.recent_traces()] == ["session"]


async def test_keys_come_in_the_order_in_which_they_were_looked_for() -> None:
    b = builder(Single("a", "a", "b"))
    await b.build([B])
    async with b.session(trace=True) as session:
        await session.resolve([A])
        trace = trace_of(await session.resolve([B]))
    assert list(trace.keys) == [A, B]
    assert [each.obtained for each in trace.keys.values()] == [Obtained.FETCHED, Obtained.CACHE]


async def test_what_another_stage_was_about_to_bring_is_not_told_though_it_came_since() -> None:
    derived = Derived("d", needs=lambda _: [A])
    b = builder(Single("a", fetch=latency(2)), Single("b", fetch=latency(1)), derived)
    async with b.session(trace=True) as session:
        slow = asyncio.ensure_future(session.resolve([D]))
        early = await session.resolve([B])
        await slow
    for found in map(trace_of(early).keys.__getitem__, [A, D]):
        assert (found.obtained, found.version, found.end) == (Obtained.FAILED, None, 1)
        assert (found.source, found.rests_on) == (None, ())


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("fails", [True, False])
async def test_of_a_key_tried_again_is_told_how_it_failed(ended: bool, fails: bool) -> None:
    """That its flight has ended by then, and well, is of no account: others are waited for."""
    seconds = 3

    async def first_down(k: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(seconds)
        if fails or len(source.calls) == 1:
            raise SourceUnavailableError(f"down {len(source.calls)}")
        return "up"

    source = Single("a", fetch=first_down)
    b = builder(source, Single("b"), Single("slow", fetch=latency(9)))
    async with b.session(trace=True) as session:
        failed = await session.resolve([A], strict=False)
        seconds = 1 if ended else 5
        trying = session.resolve([A, key("slow")], strict=False, retry_errors=True)
        again = asyncio.ensure_future(trying)
        await asyncio.sleep(2)
        early = await session.resolve([B])
        last = await again
    assert trace_of(early).keys[A] == trace_of(failed).keys[A]
    assert "down 1" in early.explain(A)
    assert trace_of(last).keys[A].start == 3, "that is where the second try begins"


async def test_what_was_found_out_of_sight_while_it_is_being_asked_for_is_told_as_found() -> None:
    gate = Gate()
    b = builder(Single("a"), Derived("d", needs=lambda k: [A], before=gate.pass_), cache=Slow())
    async with b.session(trace=True) as session:
        deriving = await begun(session.resolve([D]), gate)
        asking = await begun(session.resolve([A]))
        gate.open()
        early = await deriving
        await asking
    assert trace_of(early).keys[A].version == early[A].version
    assert "has no value" not in early.explain(A)
    await b.aclose()


async def test_a_value_that_could_not_be_copied_is_explained_with_that() -> None:
    def refuse(payload: Any) -> Any:
        if len(copied) == 1:
            raise TypeError("not to be copied")
        copied.append(payload)
        return payload

    copied: list[Any] = []
    b = builder(Single("a"), payload_copier=refuse)
    snapshot = await b.build([A], trace=True, strict=False)
    told = snapshot.explain(A)
    assert told.startswith("test:a was fetched from 'a'")
    assert "test:a has no value: " in told
    assert "copyable, got str" in told


class Slow(SingleKeyCache):
    """A cache that takes a while to look."""

    async def get(self, *arguments: Any, **named: Any) -> Any:
        await asyncio.sleep(0.2)
        return await super().get(*arguments, **named)


# Bounds -------------------------------------------------------------------------------------------


async def test_each_key_that_there_was_no_room_for_is_counted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most_keys = 50
    monkeypatch.setattr(tracing, "MOST_KEYS", most_keys)
    keys = [key("a", str(n)) for n in range(most_keys + 5)]
    b = builder(Batch("a"), Derived("d", needs=lambda _: keys[:3]))
    derived = [key("d", str(n)) for n in range(most_keys + 5)]
    assert trace_of(await b.build(derived, trace=True)).omitted_keys == 5 + 3
    async with b.session(trace=True) as session:
        first = await session.resolve(keys[:4])
        for _ in range(3):
            trace = trace_of(await session.resolve(keys))
            assert (len(trace.keys), trace.omitted_keys) == (most_keys, 5)
        trace = trace_of(await session.revalidate(keys))
        assert len(trace.keys) + trace.omitted_keys == len(keys)
    assert trace_of(first).omitted_keys == 0


async def test_a_key_that_was_read_out_of_sight_is_counted_too_if_there_is_no_room_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "MOST_KEYS", 1)
    b = builder(Single("a"), Derived("d", needs=lambda k: [A]))
    await b.build([D])
    async with b.session(trace=True) as session:
        await session.resolve([D])
        trace = trace_of(await session.resolve([A]))
    assert (len(trace.keys), trace.omitted_keys) == (1, 1)


async def test_what_was_in_memory_takes_the_room_of_one_key_in_a_session_too() -> None:
    keys = [key("a", str(n)) for n in range(MOST_KEYS)]
    b = builder(Batch("a"))
    await b.build(keys)
    async with b.session(trace=True) as session:
        for start in range(0, MOST_KEYS, 200):
            trace = trace_of(await session.resolve(keys[start : start + 200]))
    assert (len(trace.keys), trace.omitted_keys) == (MOST_KEYS, 0)


async def test_a_session_may_go_on_for_ever_and_its_trace_tells_of_what_is_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most_keys, most_stages = 30, 20
    monkeypatch.setattr(tracing, "MOST_KEYS", most_keys)
    monkeypatch.setattr(tracing, "MOST_STAGES", most_stages)
    b = builder(Single("a", fetch=latency(1)), Single("b"))
    async with b.session(trace=True) as session:
        early = await session.resolve([A, B])
        for _ in range(most_keys + most_stages):
            late = await session.revalidate([A], force_refresh=True)
        trace = trace_of(late)
        (kept,) = b.recent_traces()
    for told in (trace, kept):
        found = told.keys[A]
        assert (found.obtained, found.version) == (Obtained.FETCHED, late[A].version)
        assert found.end - found.start == 1
        assert len(told.stages) == most_stages
        assert told.stages[-1].end == told.duration_seconds
        assert len(told.stages) + told.omitted_stages > most_keys + most_stages
    assert "that there was no room to note" in trace.to_text()
    assert set(trace_of(early).keys) | {A} == {A, B}  # what took its place is not told of it
    assert len(trace_of(early).keys) + trace_of(early).omitted_keys == 2


async def test_what_many_values_rest_on_is_held_once_for_all_traces() -> None:
    bases = [key("a", str(n)) for n in range(20)]
    derived = [key("d", str(n)) for n in range(20)]
    b = builder(Batch("a"), Derived("d", needs=lambda _: bases))
    traces = [trace_of(await b.build(derived, trace=True)) for _ in range(3)]
    held = {
        id(each) for trace in traces for found in trace.keys.values() for each in found.rests_on
    }
    assert len(held) == len(bases)


async def test_of_very_many_inputs_the_oldest_and_latest_are_kept_and_the_rest_counted() -> None:
    bases = [key("a", str(n)) for n in range(MOST_INPUTS + 7)]

    async def fetch(key: ResourceKey, context: FetchContext) -> SourcePayload[int]:
        number = int(str(key.subject))
        return SourcePayload(number, observed_at=context.requested_at - 200 + number / 10)

    b = builder(Single("a", fetch=fetch), Derived("d", needs=lambda _: bases))
    for _ in range(2):  # derived, and then found in memory
        trace = trace_of(await b.build([D], trace=True))
        found = trace.keys[D]
        told = [each.key for each in found.rests_on]
        half = MOST_INPUTS // 2
        assert (told, found.omitted_inputs) == ([*bases[:half], *bases[-half:]], 7)
        assert f"It rests on {len(bases):,} values, the oldest first: test:a:0 " in trace.explain(D)
        assert f"({len(bases) - 5:,} more); test:a:{len(bases) - 1} from" in trace.explain(D)


async def test_of_a_call_tried_again_and_again_the_first_and_latest_attempts_are_kept() -> None:
    tries = MOST_ATTEMPTS + 50

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(1)
        raise ConnectionError("down")

    often = SourceResiliencePolicy(RetryPolicy(tries, 0.0))
    b = builder(tuned(Single("a", fetch=fetch), resilience_policy=often))
    snapshot = await b.build([A], strict=False, trace=True)
    (made,) = trace_of(snapshot).calls
    numbers = [each.number for each in made.attempts]
    assert numbers == [1, *range(tries - MOST_ATTEMPTS + 2, tries + 1)]
    text = trace_of(snapshot).explain(A)
    assert f"took {tries} attempts: attempt 1 failed" in text
    assert f"; ({tries - 5} more); attempt {tries}, " in text
    assert f"{tries} attempts" in trace_of(snapshot).to_text()


async def test_a_session_that_goes_on_is_among_the_latest_again() -> None:
    b = builder(Single("a", "a", "b"), trace=True)
    async with b.session(snapshot_id="s") as session:
        await session.resolve([A])
        for n in range(MOST_KEPT - 1):
            await b.build([A], snapshot_id=str(n))
        assert b.recent_traces()[0].snapshot_id == "s"
        await session.resolve([B])
        await b.build([A], snapshot_id="last")
    kept = [trace.snapshot_id for trace in b.recent_traces()]
    assert kept == [*map(str, range(1, MOST_KEPT - 1)), "s", "last"]
    assert set(b.recent_traces()[-2].keys) == {A, B}


async def test_of_the_traces_that_a_builder_keeps_only_those_that_are_looked_into_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b = builder(Single("a"), trace=True)
    for n in range(3):
        await b.build([A], snapshot_id=str(n))
    made: list[ResourceKey] = []

    class Counted(KeyTrace):
        def __init__(self, key: ResourceKey, *facts: Any, **more: Any) -> None:
            super().__init__(key, *facts, **more)
            made.append(key)

    monkeypatch.setattr("coalestra.orchestration.tracing.KeyTrace", Counted)
    first, second, _ = b.recent_traces()
    assert [first.snapshot_id, first.duration_seconds, made] == ["0", 0.0, []]
    assert first.keys[A].requested
    assert copy.copy(second).keys[A] is not None
    assert made == [A, A]
    assert b.recent_traces()[0] is first
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = first.other  # type: ignore[attr-defined]  # there is none


async def test_a_trace_keeps_no_payload_and_no_error_alive() -> None:
    class Payload:
        pass

    class Broken(SourceUnavailableError):
        pass

    seen: list[weakref.ref[Any]] = []

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        if key == A:
            payload = Payload()
            seen.append(weakref.ref(payload))
            return payload
        error = Broken("x")
        seen.append(weakref.ref(error))
        raise error

    b = builder(
        Single("a", "a", "b", fetch=fetch), trace=True, cache=AsyncMemoryCache(max_entries=1)
    )
    snapshot = await b.build([A, B], strict=False)
    trace = trace_of(snapshot)
    del snapshot
    await b.cache.clear()
    await settle()
    gc.collect()
    assert len(seen) == 2
    assert [ref() for ref in seen] == [None, None]
    assert trace.keys[A].source == "a"
    assert b.recent_traces()


def test_the_threaded_facade_traces_the_same_way() -> None:
    with SyncSnapshotBuilder(SnapshotBuilder([Single("a")], trace=True)) as b:
        assert trace_of(b.build([A])).keys[A].obtained is Obtained.FETCHED
        assert b.build([A], trace=False).trace is None
        with b.session(trace=True) as session:
            assert trace_of(session.resolve([A])).kind == "session"
        assert [trace.kind for trace in b.recent_traces()] == ["build", "session"]


# What follows the work while it is under way ------------------------------------------------------

current: contextvars.ContextVar[str | None] = contextvars.ContextVar("current", default=None)


class Spans:
    """A tracer that writes down what it is told; a span is its number."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.ended: dict[str, tuple[Mapping[str, Any], BaseException | None]] = {}
        self.joins: list[tuple[Any, Any, float, Mapping[str, Any]]] = []

    def begin(
        self, kind: str, attributes: Mapping[str, Any], *, parent: Any = None, link: Any = None
    ) -> str:
        name = f"{kind} {sum(each['kind'] == kind for each in self.begun) + 1}"
        self.begun.append(
            {"kind": kind, "name": name, "parent": parent, "link": link, **attributes}
        )
        return name

    def enter(self, span: str) -> Callable[[], None]:
        token = current.set(span)
        return lambda: current.reset(token)

    def end(
        self, span: str, attributes: Mapping[str, Any], error: BaseException | None = None
    ) -> None:
        assert span not in self.ended
        self.ended[span] = attributes, error

    def joined(self, parent: Any, call: Any, seconds: float, attributes: Mapping[str, Any]) -> None:
        self.joins.append((parent, call, seconds, attributes))


async def test_a_tracer_sees_the_build_and_attempts_below_it_and_is_current_in_calls() -> None:
    seen: list[str | None] = []

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(0)
        seen.append(current.get())
        if len(seen) == 1:
            raise SourceUnavailableError("once")
        return 1

    spans = Spans()
    b = builder(tuned(Single("a", fetch=fetch), resilience_policy=TWICE), tracer=spans)
    snapshot = await b.build([A], snapshot_id="s")
    assert seen == ["call 1", "call 2"]
    assert current.get() is None
    assert snapshot.trace is None
    assert b.recent_traces() == ()
    assert [(each["name"], each["parent"]) for each in spans.begun] == [
        ("build 1", None),
        ("call 1", "build 1"),
        ("call 2", "build 1"),
    ]
    assert {**spans.begun[1], "waited_seconds": 0} == {
        "kind": "call", "name": "call 1", "parent": "build 1", "link": None, "source": "a",
        "source_kind": "single", "snapshot_id": "s", "keys": 1, "attempt": 1, "waited_seconds": 0,
    }  # fmt: skip
    assert spans.ended["build 1"] == ({"resolved": 1, "failed": 0}, None)
    outcome, error = spans.ended["call 1"]
    assert outcome == {"outcome": "failure"}
    assert isinstance(error, SourceUnavailableError)
    assert spans.ended["call 2"] == ({"outcome": "success"}, None)


@pytest.mark.parametrize("deadline, waited", [(None, 1.5), (1.0, 1.0)])
async def test_a_tracer_sees_who_joined_or_gave_up_with_how_long_and_the_call_that_served(
    deadline: float | None, waited: float
) -> None:
    spans = Spans()
    b = builder(Single("a", fetch=latency(2)), tracer=spans)
    first = await begun(b.build([A], snapshot_id="first"))
    await asyncio.sleep(0.5)
    await b.build([A], deadline_seconds=deadline, strict=False)
    ((parent, call, seconds, attributes),) = spans.joins
    assert (parent, call) == ("build 2", "call 1")
    assert seconds == pytest.approx(waited)
    assert attributes == {
        "snapshot_id": "first",
        "resource_namespace": "test",
        "resource_name": "a",
    }
    await first
    assert len(spans.joins) == 1


async def test_a_tracer_sees_a_refresh_linked_to_what_set_it_off() -> None:
    spans = Spans()
    b = builder(Single("a"), default_policy=SWR, tracer=spans)
    await b.build([A])
    await asyncio.sleep(20)
    await b.build([A], snapshot_id="cause")
    await b.wait_for_refreshes()
    (refresh,) = [each for each in spans.begun if each["kind"] == "refresh"]
    assert (refresh["link"], refresh["parent"], refresh["parent_snapshot_id"]) == (
        "build 2",
        None,
        "cause",
    )
    assert spans.begun[-1]["parent"] == "refresh 1"
    assert spans.ended["refresh 1"] == ({"resolved": 1, "failed": 0}, None)


@pytest.mark.parametrize("awaited", [False, True])
async def test_stages_of_one_session_at_the_same_time_have_each_its_own_span(awaited: bool) -> None:
    spans = Spans()
    b = builder(
        Single("a", fetch=latency(3)), Single("b", fetch=latency(2)), Single("c", fetch=latency(5)),
        Derived("d", needs=lambda _: [B]), tracer=spans,
        cache=SingleKeyCache() if awaited else None,
    )  # fmt: skip
    other = await begun(b.build([key("c")]))
    async with b.session() as session:
        stages = [[A], [D], [key("c")]]
        await asyncio.gather(*(session.resolve(keys) for keys in stages))
        resolved = [each["name"] for each in spans.begun if each["kind"] == "resolve"]
        first, second = (session.revalidate([k], force_refresh=True) for k in (A, B))
        await asyncio.gather(first, second, session.resolve([key("a", "2")]))
    await other
    calls = {
        name: [each["parent"] for each in spans.begun if each.get("source") == name]
        for name in ("a", "b", "d")
    }
    ended = list(spans.ended)
    for parents in calls.values():
        assert len(parents) == len(set(parents)), "each stage makes the calls of its own"
    assert calls["b"] == calls["d"], "a derivation and what it needs belong together"
    for each in spans.begun:
        if each["kind"] == "call":
            assert ended.index(each["name"]) < ended.index(each["parent"])
    ((waiting, _, seconds, _),) = spans.joins
    assert waiting in set(resolved) - {calls["a"][0], calls["d"][0]}
    assert seconds == pytest.approx(5, abs=0.01)


async def test_a_stage_that_raises_has_failed_with_what_it_raises() -> None:
    spans = Spans()
    b = builder(Single("a", fetch=down), Single("b"), tracer=spans)
    request = SnapshotRequest(
        required=[B],
        optional=[A],
        acceptance_policy=SnapshotAcceptancePolicy(
            ResourceAcceptanceRule(minimum_authority_rank=9)
        ),
    )
    raised: list[BaseException] = []
    async with b.session() as session:
        for work in (
            b.build([A, B]),
            b.build_request(request),
            session.resolve([A, B]),
            session.resolve_request(request),
            session.revalidate([B], acceptance_policy=request.acceptance_policy),
        ):
            with pytest.raises(SnapshotBuildError) as caught:
                await work
            raised.append(caught.value)
        await b.build([A, B], strict=False)
        await b.try_request(request)
        await session.revalidate([B])
    ends = {name: end for name, end in spans.ended.items() if not name.startswith("call")}
    errors = [error for _, error in ends.values()]
    assert errors[:5] == raised
    assert [type(error) for error in errors[5:]] == [
        type(None),
        SnapshotAcceptanceError,
        type(None),
    ]
    one_of_two, none_of_one = {"resolved": 1, "failed": 1}, {"resolved": 0, "failed": 0}
    counts = [dict(facts) for facts, _ in ends.values()]
    assert counts == [
        *[one_of_two] * 4, none_of_one, *[one_of_two] * 2, {"resolved": 1, "failed": 0},
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["begin", "enter", "end", "joined"])
async def test_what_a_tracer_raises_is_counted_and_logged_once_and_stops_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no spans today")

    spans = Spans()
    monkeypatch.setattr(spans, method, broken)
    b = builder(Single("a", fetch=latency(1)), tracer=spans)
    first = await begun(b.build([A]))
    assert (await b.build([A])).value(A) == (await first).value(A)
    assert (await b.health_snapshot()).observability_failure_count > 0
    await b.build([A], trace=True)
    await b.aclose()
    assert [each.getMessage() for each in caplog.records] == ["tracer Spans fails: RuntimeError"]


def test_a_tracer_must_have_its_methods() -> None:
    with pytest.raises(TypeError, match="tracer.*joined"):
        builder(Single("a"), tracer=object())


@pytest.mark.slow
@pytest.mark.parametrize("followed", [False, True])
async def test_a_chain_that_is_traced_takes_linear_work(followed: bool) -> None:
    """Each derivation finds the span that waits for it at its reader, not through all above it."""

    def needs(k: ResourceKey) -> list[ResourceKey]:
        return [key("d", str(int(k.subject) - 1)) if k.subject != "0" else A]

    length = 150
    building = builder(Derived("d", needs=needs), Single("a"), tracer=Spans() if followed else None)
    building_all = building.build([key("d", str(length))], trace=True)
    assert await lines_run(flights, building_all) < 300 * length
