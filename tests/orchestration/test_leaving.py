"""Deadlines, cancellations and closing leave nothing behind (8, 9, 10)."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from typing import Any

import pytest

from coalestra import (
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    ResourceKey,
    RetryPolicy,
    SnapshotBuilder,
    SnapshotRequest,
    SourceResiliencePolicy,
)
from coalestra.concurrency import pace
from coalestra.orchestration import flights, singleflight
from tests.observability.recording import Recorder
from tests.orchestration.scripted import (
    Batch,
    Derived,
    Single,
    builder,
    echo,
    held_at,
    key,
    latency,
    mixed,
    tuned,
)
from tests.support import (
    Gate,
    LoopClock,
    VirtualLoop,
    begun,
    cancel_at_every_await,
    drop,
    lines_run,
    loop_turn,
    no_leaks,
    settle,
    taking,
)

pytestmark = pytest.mark.concurrency

X = key("x", "1")


async def test_a_build_cancelled_at_any_await_leaves_nothing_behind() -> None:
    builders: list[SnapshotBuilder] = []

    def start() -> Any:
        builders.append(mixed())
        return builders[-1].build([key("derived"), key("single", "2"), key("batch", "3")])

    async def check() -> None:
        await no_leaks(builders[-1])

    assert await cancel_at_every_await(start, check) > 10


async def test_who_leaves_unlooked_for_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """His turn comes late: of twenty others, who came before him, four have theirs in each step."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    source = Batch("many", "x", "y")
    building = builder(source)
    others = [
        asyncio.ensure_future(building.build([key("y", f"{who} {n}") for n in range(260)]))
        for who in range(20)
    ]
    await asyncio.sleep(0)
    leaving = asyncio.ensure_future(building.build([X]))
    for _ in range(2):
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving, *others])
    assert leaving.cancelled()
    assert sum(len(asked) for asked in source.calls) == 20 * 260


async def test_an_abandoned_call_runs_on_to_the_last_deadline_and_no_longer() -> None:
    source = Single("x", fetch=latency(100))
    building = builder(source)
    owner = asyncio.ensure_future(building.build([X], deadline_seconds=10))
    await asyncio.sleep(1)
    owner.cancel()
    await settle()
    assert (await building.capacity_snapshot())["__global__"].in_use == 1
    await asyncio.sleep(9)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "source",
    [Single("x", fetch=latency(50)), Batch("x", before=lambda: asyncio.sleep(50))],
    ids=["single", "batch"],
)
async def test_a_call_that_nobody_waits_for_any_more_is_no_failure_of_its_source(
    source: Any, waits: bool
) -> None:
    heard = Recorder()
    building = builder(
        source, metrics=heard, events=heard, buffer_observability=False, max_concurrency=1
    )
    lease = await building.capacity.acquire("other") if waits else None
    leaving = await begun(building.build([X]))
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    events = {each.event_type for each in heard.events}
    assert events == {"snapshot_started", "source_call_queued" if waits else "source_call_started"}
    counted = {each.metric for each in heard.metrics if each.operation == "increment"}
    assert not {"source_fetch_total", "source_batch_call_total"} & counted
    if lease is not None:
        lease.release()


async def test_who_leaves_a_batch_hears_nothing_of_a_circuit_that_has_kept_out_another_key() -> (
    None
):
    async def fail() -> None:
        raise ConnectionError("down")

    heard, circuit = Recorder(), CircuitBreakerPolicy(CircuitScope.RESOURCE, 1, 50)
    policy = SourceResiliencePolicy(RetryPolicy(max_attempts=1), circuit)
    source = tuned(Batch("x", before=fail), resilience_policy=policy)
    building = builder(
        source, metrics=heard, events=heard, buffer_observability=False, max_concurrency=1
    )
    await building.build([X], strict=False)
    lease = await building.capacity.acquire("other")
    leaving = await begun(building.build([X, key("x", "2")]))
    heard.events.clear()
    heard.metrics.clear()
    leaving.cancel()
    await settle()
    assert not heard.events
    assert {each.metric for each in heard.metrics} <= {"source_capacity_wait_ms"}
    lease.release()
    await no_leaks(building)


async def test_a_source_that_ignores_its_cancellation_delays_nobody() -> None:
    release = Gate()

    async def stubborn(k: ResourceKey, context: FetchContext) -> str:
        while True:
            try:
                await release.pass_()
                return "late"
            except asyncio.CancelledError:
                continue

    first = Single("first", "x", fetch=stubborn, priority=20, timeout=2)
    second = Single("second", "x", fetch=echo)
    building = builder(first, second)
    with taking(2):
        snapshot = await building.build([X])
    assert snapshot[X].source == "second"
    assert (await building.capacity_snapshot())["__global__"].in_use == 1
    release.open()


class Stopped(LoopClock):
    """A clock that can be stopped: it tells no time then."""

    stopped = False

    def monotonic(self) -> float:
        if self.stopped:
            raise LookupError("stopped")
        return super().monotonic()


async def test_who_joins_and_finds_that_no_clock_goes_keeps_nothing_under_way() -> None:
    clock = Stopped()
    building = builder(Single("a", fetch=latency(1_000)), clock=clock)
    waiting = [asyncio.ensure_future(building.build([key("a")])) for _ in range(2)]
    await settle()
    clock.stopped = True
    with pytest.raises(LookupError):
        await building.build([key("a")])
    clock.stopped = False
    for task in waiting:
        task.cancel()


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_many_keys_are_left_in_many_turns(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither who cancels nor who closes holds the loop, and both go on to no other source."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    left = Counter[int]()  # in each turn
    leave = flights.FlightBoard.leave

    def counting(self: flights.FlightBoard, *who: Any) -> None:
        left[loop_turn()] += 1
        leave(self, *who)

    monkeypatch.setattr(flights.FlightBoard, "leave", counting)
    gate, other = Gate(), Batch("other", "x", priority=1)
    building = builder(Batch("x", before=gate.pass_), other)
    running = asyncio.ensure_future(building.build([key("x", str(n)) for n in range(1_000)]))
    await asyncio.sleep(1)
    if how == "closed":
        await building.aclose()
        with pytest.raises(RuntimeError):
            await running
        assert (await building.health_snapshot()).singleflight_in_flight == 0
    else:
        running.cancel()
        await asyncio.sleep(1)
    assert left.total() == 1_000
    assert max(left.values()) <= 64
    assert other.calls == []


async def test_a_call_is_looked_through_for_no_leaver(monkeypatch: pytest.MonkeyPatch) -> None:
    """That nobody waits for any of its keys is found by a look at each of them."""
    looks = 0

    class Counting(flights.Liveness):
        @property
        def alive(self) -> bool:
            nonlocal looks
            looks += 1
            return super().alive

    monkeypatch.setattr("coalestra.orchestration.calls.Liveness", Counting)
    keys = [key("x", str(number)) for number in range(100)]
    gate = Gate()
    source = Batch("x", before=gate.pass_, timeout=30)
    building = builder(source, Derived("over all", needs=lambda k: keys))
    running = asyncio.ensure_future(building.build([key("over all")]))
    await asyncio.sleep(1)
    running.cancel()
    await asyncio.sleep(1)
    assert looks <= 1
    gate.open()
    await asyncio.sleep(1)
    await building.build(keys)
    assert len(source.calls) == 1  # it has brought what is wanted later


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "late"])
async def test_a_chain_that_is_asked_for_by_others_by_now_takes_linear_work(how: str) -> None:
    """Who it is acted for is found once, and not for each flight through all that wait for it."""

    def needs(k: ResourceKey) -> list[ResourceKey]:
        return [key("chain", str(int(k.subject) - 1)) if k.subject != "0" else key("base")]

    gate, length = Gate(), 150
    building = builder(Derived("chain", needs=needs), Single("base", fetch=held_at(gate)))
    top = [key("chain", str(length))]
    session = building.session(deadline_seconds=20 if how == "late" else None)
    first = asyncio.ensure_future(session.resolve(top, strict=False))
    await asyncio.sleep(5)
    second = asyncio.ensure_future(building.build(top))
    if how == "late":
        assert not (await first).complete
        await asyncio.sleep(1)
    else:
        await session.close()

    async def to_its_end() -> None:
        gate.open()
        assert (await second).complete

    assert await lines_run(flights, to_its_end()) < 150 * length
    assert (await first).complete == (how == "closed")  # what is under way comes to its end


@pytest.mark.parametrize("kind", ["single", "batch", "derived", "needed"])
@pytest.mark.parametrize("ends_by", ["cancellation", "deadline"])
@pytest.mark.parametrize("is_first", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("wanted", [1, 3])
async def test_who_comes_while_a_call_that_nobody_waited_for_ends_is_served(
    monkeypatch: pytest.MonkeyPatch, kind: str, ends_by: str, is_first: bool, wanted: int
) -> None:
    """Of many keys they leave the call one after the other, and others have turns in between."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    monkeypatch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
    monkeypatch.setattr(singleflight, "_KEYS_PER_STEP", 1)
    keys = [key("x", str(n)) for n in range(3)]

    async def ask(building: SnapshotBuilder, turns: int) -> Any:
        await asyncio.sleep(10.0)
        for _ in range(turns):
            await asyncio.sleep(0)
        came_alone.append(not building.flights_under_way())
        return await building.build(keys[-wanted:], strict=False)

    async def wait(*_: Any) -> None:
        await gate.pass_()

    came_alone: list[bool] = []
    while sum(came_alone) < 3:
        gate, turns = Gate(), len(came_alone)
        sources: list[Any] = [{
            "single": Single("x", "x", fetch=wait), "batch": Batch("x", "x", before=gate.pass_),
            "derived": Derived("x", "x", before=gate.pass_, needs=lambda k: [key("z")]),
            "needed": Derived("x", "x", needs=lambda k: [key("y", k.subject)]),
        }[kind], Single("y", "y", fetch=wait), Single("z", "z")]  # fmt: skip
        building = builder(*sources, max_concurrency=20)
        if is_first:
            second = asyncio.ensure_future(ask(building, turns))
        limit = 10.0 if ends_by == "deadline" else None
        first = asyncio.ensure_future(building.build(keys, strict=False, deadline_seconds=limit))
        if not is_first:
            second = asyncio.ensure_future(ask(building, turns))
        if limit is None:
            asyncio.get_running_loop().call_later(10.0, first.cancel)
        await asyncio.sleep(20.0)
        await asyncio.wait([first])
        gate.open()
        assert not dict((await second).errors)
        await no_leaks(building)


@pytest.mark.parametrize("queue_timeout", [None, 100.0])
@pytest.mark.parametrize("turns", range(6))
async def test_who_comes_as_the_time_of_a_call_that_waits_for_capacity_is_up_waits_on(
    monkeypatch: pytest.MonkeyPatch, turns: int, queue_timeout: float | None
) -> None:
    """Whose time is up leaves later than the call learns of it, as one of many."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    gate = Gate()
    holder = Single("y", "y", fetch=lambda k, context: gate.pass_())
    source = tuned(Single("x", "x"), queue_timeout_seconds=queue_timeout)
    building = builder(holder, source, max_concurrency=1)
    holding = await begun(building.build([key("y")]))
    keys = [key("x", str(n)) for n in range(6)]

    async def come() -> Any:
        await asyncio.sleep(10.0)
        for _ in range(turns):
            await asyncio.sleep(0)
        return await building.build(keys[:1])

    second = asyncio.ensure_future(come())
    first = asyncio.ensure_future(building.build(keys, strict=False, deadline_seconds=10.0))
    await asyncio.sleep(20.0)
    assert set((await first).errors) == set(keys)
    gate.open()
    await asyncio.wait([second, holding])
    assert (await second).value(keys[0]) == keys[0].subject
    await no_leaks(building)


@pytest.mark.parametrize("loop_is_closed", [True, False])
def test_several_requests_that_are_closed_end_as_they_are_told(loop_is_closed: bool) -> None:
    """As by the collector, where their loop was dropped."""
    building = builder(Single("x", "x", fetch=latency(1)))
    asked = building.try_requests([SnapshotRequest(required=[key("x", str(n))]) for n in range(3)])

    async def begin() -> None:
        asked.send(None)
        if not loop_is_closed:
            asked.close()
            await settle()
            await no_leaks(building)

    loop = VirtualLoop()
    loop.run_until_complete(begin())
    drop(loop)
    asked.close()


@pytest.mark.parametrize("turns", range(4))
def test_a_call_whose_loop_is_dropped_while_it_tells_its_circuits_is_dropped_too(
    monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    unheard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    policy = SourceResiliencePolicy(circuit=CircuitBreakerPolicy(CircuitScope.RESOURCE))

    async def begin() -> None:
        source = tuned(Batch("x", "x", before=Gate().pass_), resilience_policy=policy)
        building = builder(source)
        keys = [key("x", str(n)) for n in range(6)]
        first = asyncio.ensure_future(building.build(keys, deadline_seconds=10.0))
        await asyncio.sleep(10.0)
        for _ in range(turns):
            await asyncio.sleep(0)
        first.cancel()

    loop = VirtualLoop()
    loop.run_until_complete(begin())
    drop(loop)
    del loop
    gc.collect()
    assert not unheard
