"""A source may use its own builder: it waits for no slot that it holds itself, and in no circle."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from coalestra import (
    CallableSource,
    FetchContext,
    FreshnessPolicy,
    PolicyResolver,
    RefreshMode,
    ResourceKey,
    Snapshot,
    SnapshotBuilder,
    SourceUnavailableError,
    SyncSnapshotBuilder,
)
from coalestra.orchestration.flights import Flight
from tests.orchestration.scripted import LASTING, Batch, Derived, Single, builder, key
from tests.support import Gate, VirtualLoop, begun, drop, no_leaks, settle
from tests.support.leaks import look_after_none

INNER = key("inner")
OUTERS = [key("outer", str(number)) for number in range(8)]


class Asking:
    """Serves `outer` with what it asks the builder for, and everything else with a constant."""

    def __init__(self, *sources: Any, asks: Any = lambda k: INNER, **settings: Any) -> None:
        self.asks = asks
        self.gate = Gate(opened=True)
        self.source = Single("outer", "outer", "inner", "other", fetch=self.fetch)
        self.builder: SnapshotBuilder = builder(self.source, *sources, **settings)

    async def fetch(self, k: ResourceKey, context: FetchContext) -> Any:
        await self.gate.pass_()
        await asyncio.sleep(0.1)
        if k.name != "outer":
            return 1
        asked = self.asks(k)
        return (await self.builder.build([asked])).value(asked)


@pytest.mark.parametrize("asks", [lambda k: INNER, lambda k: key("inner", k.subject)])
@pytest.mark.parametrize("also", [(), (INNER,)])
@pytest.mark.parametrize("slots", [1, 2, 8])
async def test_as_many_calls_as_there_are_slots_may_ask_for_the_same_key_or_one_of_their_own(
    slots: int, also: tuple[ResourceKey, ...], asks: Any
) -> None:
    """Even if the key that all of them wait for comes last in the very queue that they hold up."""
    asking = Asking(asks=asks, max_concurrency=slots, max_pending_tasks=slots)
    snapshot = await asking.builder.build([*OUTERS, *also])
    assert {value.value for value in snapshot.values()} == {1}
    assert asking.source.calls.count(INNER) == (asks(OUTERS[0]) == INNER or len(also))


async def test_what_is_asked_for_may_wait_for_capacity_in_another_build() -> None:
    asking = Asking(max_concurrency=1)
    asking.gate = Gate()
    outer = await begun(asking.builder.build(OUTERS[:1]))
    inner = await begun(asking.builder.build([INNER]))
    assert asking.source.calls == OUTERS[:1]
    asking.gate.open()
    await asyncio.gather(outer, inner)
    assert asking.source.calls.count(INNER) == 1


async def test_what_is_asked_for_may_be_derived_from_what_waits_for_capacity() -> None:
    derived = Derived("sum", needs=lambda k: [INNER, key("other")])
    asking = Asking(derived, asks=lambda k: key("sum"), max_concurrency=1)
    asking.gate = Gate()
    builds = [asyncio.ensure_future(asking.builder.build([k])) for k in (OUTERS[0], key("sum"))]
    await settle()
    asking.gate.open()
    await asyncio.gather(*builds)


async def test_a_batch_source_and_a_derivation_may_ask_as_well() -> None:
    async def ask() -> None:
        await building.build([INNER])

    batch = Batch("batch", before=ask)
    derived = Derived("derived", needs=lambda k: [key("batch")], before=ask)
    building = builder(batch, derived, Single("inner"), max_concurrency=1)
    await building.build([key("derived"), *(key("batch", str(number)) for number in range(5))])


def circles() -> dict[str, Any]:
    """What the key of each name asks for."""
    first, second = key("outer", "1"), key("outer", "2")
    return {
        "itself": lambda k: k,
        "one another": lambda k: second if k == first else first,
        "what derives from it": lambda k: key("derived", k.subject),
    }


@pytest.mark.parametrize("circle", circles())
async def test_a_circle_is_an_error_that_names_the_path(circle: str) -> None:
    derived = Derived("derived", needs=lambda k: [key("outer", k.subject)])
    asking = Asking(derived, asks=circles()[circle])
    snapshot = await asking.builder.build([key("outer", "1")], strict=False)
    error = str(snapshot.error_for(key("outer", "1")))
    path = error.partition("must not form a cycle, got ")[2].partition(";")[0].split(" -> ")
    assert path[0] == path[-1]
    assert "test:outer:1" in path


async def test_a_call_that_is_over_lends_nothing_to_what_its_source_left_running() -> None:
    """A task begun by a source is on its own once the source has answered."""
    later: list[asyncio.Task[Snapshot]] = []
    go = Gate()

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k == INNER:
            return 1

        async def ask() -> Snapshot:
            await go.pass_()
            return await building.build([k])

        later.append(asyncio.ensure_future(ask()))
        return 2

    building = builder(Single("outer", "outer", "inner", fetch=fetch))
    await building.build(OUTERS[:1])
    go.open()
    assert (await later[0])[OUTERS[0]].value == 2


async def test_a_source_that_is_late_needs_no_slot_as_it_still_has_one() -> None:
    """As one in a thread, it does not end when it is told to, but asks for something first."""

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k != INNER:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1_000)
            found.append((await building.build([INNER])).value(INNER))
        return 1

    found: list[int] = []
    building = builder(Single("outer", "outer", "inner", fetch=fetch), max_concurrency=1)
    late = await building.build(OUTERS[:1], strict=False, deadline_seconds=1)
    assert late.errors
    assert (await building.build([INNER])).value(INNER) == 1
    await settle()
    assert found == [1]


def test_a_source_in_a_thread_may_ask_through_the_facade() -> None:
    """The thread of the source waits; the slot that it holds is waited for by nobody."""
    asked: list[int] = []

    def fetch(k: ResourceKey, context: FetchContext) -> int:
        asked.append(threading.get_ident())
        return 1 if k == INNER else facade.build([INNER]).value(INNER, int)

    source = CallableSource(
        name="outer", priority=1, supports=lambda k: True, fetcher=fetch, blocking_io=False
    )
    building = SnapshotBuilder([source], default_policy=LASTING, max_concurrency=2)
    with SyncSnapshotBuilder(building) as facade:
        snapshot = facade.build(OUTERS, deadline_seconds=30)
    assert len(snapshot) == len(OUTERS)
    assert len(asked) == len(OUTERS) + 1


async def test_a_circle_over_two_builders_is_an_error_as_well() -> None:
    """Each asks the other for the same key; the path leads through both."""
    other = key("other")

    async def ask_second(k: ResourceKey, context: FetchContext) -> Any:
        return (await second.build([other])).value(other)

    async def ask_first(k: ResourceKey, context: FetchContext) -> Any:
        return (await first.build([INNER])).value(INNER)

    first = builder(Single("first", "inner", fetch=ask_second), max_concurrency=1)
    second = builder(Single("second", "other", fetch=ask_first), max_concurrency=1)
    snapshot = await first.build([INNER], strict=False)
    assert "must not form a cycle, got " in str(snapshot.error_for(INNER))
    for building in (first, second):
        await no_leaks(building)


async def test_a_source_that_serves_a_refresh_does_not_wait_for_that_one() -> None:
    waited = 0

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        nonlocal waited
        await building.wait_for_refreshes()
        waited += 1
        return waited

    policy = FreshnessPolicy(10, 500, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(Single("s", "inner", fetch=fetch), default_policy=policy)
    await building.build([INNER])
    await asyncio.sleep(20)
    assert (await building.build([INNER]))[INNER].stale
    await building.wait_for_refreshes()
    assert waited == 2


# Through sessions, and through refreshes ------------------------------------------------------


@pytest.mark.parametrize("kind", [Single, Batch])
async def test_a_source_may_ask_the_session_that_asks_it_with_workers_all_busy(kind: Any) -> None:
    """They wait for what is asked for, so that it takes another one."""

    class Asks(kind):  # type: ignore[misc]  # one of two
        async def fetch(self, k: ResourceKey, context: FetchContext) -> Any:
            return (await self.fetch_many([k], context))[k]

        async def fetch_many(self, keys: Any, context: FetchContext) -> Any:
            if INNER in keys:
                return dict.fromkeys(keys, 1)
            return dict.fromkeys(keys, (await session.resolve([INNER])).value(INNER))

    source = Asks("outer", "outer", "inner")
    source.max_batch_size = 1
    building = builder(source, max_concurrency=1)
    session = building.session()
    snapshot = await session.resolve(OUTERS)
    assert {value.value for value in snapshot.values()} == {1}


async def test_a_source_that_replaces_values_of_the_session_that_waits_for_it_is_told_so() -> None:
    inside: list[Snapshot] = []

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if len(source.calls) > 2:
            inside.append(await session.revalidate([INNER], strict=False))
        return len(source.calls)

    source = Single("outer", "outer", "inner", fetch=fetch)
    building = builder(source)
    session = building.session()
    await session.resolve([INNER, OUTERS[0]])
    snapshot = await session.revalidate(OUTERS[:1], force_refresh=True)
    assert snapshot.value(OUTERS[0]) == 3
    assert "must not form a cycle, got test:outer:0" in str(inside[0].error_for(INNER))


async def test_what_is_asked_for_is_tried_again_before_what_waits_for_the_askers_slot() -> None:
    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k == OUTERS[0]:
            return int((await session.resolve([INNER])).value(INNER))
        if k == INNER and source.calls.count(INNER) == 1:
            raise SourceUnavailableError("not yet")
        return 1

    source = Single("outer", "outer", "inner", fetch=fetch)
    source.resilience_policy = None
    building = builder(source, max_concurrency=1)
    session = building.session()
    snapshot = await session.resolve(OUTERS[:4])
    assert {value.value for value in snapshot.values()} == {1}


@pytest.mark.parametrize("through_session", [True, False])
async def test_what_is_asked_for_stepwise_takes_no_more_workers(through_session: bool) -> None:
    """One that does not wait itself comes back, and takes what has come meanwhile."""
    inners = [key("inner", str(number)) for number in range(20)]
    gate, running, most = Gate(), 0, 0

    async def refuse(k: ResourceKey, context: FetchContext) -> int:
        await asyncio.sleep(int(k.subject))
        raise SourceUnavailableError("ask the next one")

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        nonlocal running, most
        if k == OUTERS[0]:
            await ask(inners)
            return 1
        running += 1
        most = max(most, running)
        await gate.pass_()
        running -= 1
        return 1

    async def ask(keys: list[ResourceKey]) -> None:
        async def one(k: ResourceKey) -> None:
            await asyncio.sleep(int(k.subject))
            await session.resolve([k])

        if through_session:
            await asyncio.gather(*(one(k) for k in keys))
        else:
            await building.build(keys)

    first = Single("first", "inner", fetch=refuse, priority=20)
    building = builder(first, Single("outer", "outer", "inner", fetch=fetch), max_pending_tasks=2)
    session = building.session()
    asked = asyncio.ensure_future(session.resolve(OUTERS[:1]))
    await asyncio.sleep(500)
    gate.open()
    await asked
    assert most == 2


async def test_what_is_asked_for_may_have_to_agree_with_what_was_read_before() -> None:
    """So it is derived anew beside a value that others share, and waits for no slot either."""
    version = 1

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k == OUTERS[0]:
            await building.publisher.publish(INNER, 2, source="event")
            return int((await session.resolve([key("derived")])).value(key("derived"))[0])
        return version

    source = Single("outer", "outer", "inner", fetch=fetch)
    derived = Derived("derived", needs=lambda k: [INNER])
    building = builder(derived, source, max_concurrency=1)
    session = building.session()
    await session.resolve([INNER])
    assert (await building.build(OUTERS[:1])).value(OUTERS[0]) == 1


async def test_a_worker_that_was_to_come_back_and_comes_to_wait_makes_room_for_another() -> None:
    """For a key whose source has asked for what is queued behind this one."""
    first, second = key("inner", "1"), key("inner", "2")
    under_way = asyncio.Event()

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k == OUTERS[0]:
            await session.resolve([first])
        elif k == first:
            under_way.set()
            await asyncio.sleep(1)  # by now the other one has asked for the second, which is queued
            await building.build([key("other")])
        return 1

    async def ask() -> None:
        await session.resolve([second])

    source = Single("outer", "outer", "inner", fetch=fetch)
    building = builder(source, Batch("other", before=ask), max_concurrency=3, max_pending_tasks=1)
    session = building.session()
    resolved = asyncio.ensure_future(session.resolve(OUTERS[:1]))
    await under_way.wait()
    await building.build([key("other")])
    await resolved
    assert source.calls == [OUTERS[0], first, second]


async def test_what_is_asked_for_goes_before_what_is_needed_besides() -> None:
    """Both become ready in one step, for a source that has one worker for the session."""

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k == OUTERS[0]:
            await session.resolve([INNER])
        return 1

    asking = Single("outer", "outer", fetch=fetch)
    gate = Gate()
    gated = Batch("gated", before=gate.pass_)
    inner = Derived("derived", "inner", "sum", needs=lambda k: [key("gated")])
    building = builder(asking, gated, inner, max_concurrency=2, max_pending_tasks=1)
    session = building.session()
    tasks = [
        asyncio.ensure_future(session.resolve([key("sum")])),
        asyncio.ensure_future(session.resolve(OUTERS[:1])),
    ]
    await settle()
    # From now on there is no slot but for what is asked for.
    blocked = await begun(building.capacity.acquire("someone"))
    gate.open()
    await tasks[1]
    (await blocked).release()
    await tasks[0]


@pytest.mark.parametrize("started", [True, False])
async def test_a_source_waits_for_no_refresh_that_comes_to_wait_for_it(started: bool) -> None:
    """The refresh of what is derived from its key has not got there yet when it begins to wait."""

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if len(source.calls) == 2:
            await building.build([key("derived")])
            if started:
                await settle()
            await building.wait_for_refreshes()
        return len(source.calls)

    source = Single("inner", fetch=fetch)
    derived = Derived("derived", needs=lambda k: [INNER])
    swr = FreshnessPolicy(10, 500, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    policies = PolicyResolver(FreshnessPolicy(10, 500), {key("derived"): swr})
    building = builder(derived, source, policy_resolver=policies, default_policy=None)
    await building.build([key("derived")])
    await asyncio.sleep(20)
    assert (await building.build([INNER])).value(INNER) == 2
    await building.wait_for_refreshes()


@pytest.mark.parametrize("settings", [{"max_concurrency": 1}, {"max_pending_tasks": 1}])
async def test_a_source_that_waits_its_turn_has_the_slot_and_the_worker_that_others_need(
    settings: dict[str, int],
) -> None:
    nested, asks = Gate(), False

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        if asks and k == OUTERS[0]:
            await nested.pass_()
            return (await session.revalidate([INNER])).value(INNER)
        return k.name

    building = builder(Single("s", "outer", "inner", "other", fetch=fetch), **settings)
    session = building.session()
    await session.resolve([INNER, key("other")])
    asks = True
    build = await begun(session.resolve(OUTERS[:1]), nested)
    other = await begun(session.revalidate([key("other")], force_refresh=True))
    nested.open()
    await asyncio.sleep(1)
    assert build.done(), "no longer than until the next look"
    assert (await build).value(OUTERS[0]) == "inner"
    assert (await other).value(key("other")) == "other"
    await no_leaks(building)


async def test_sources_that_wait_for_the_turn_of_each_others_sessions_wait_in_a_circle() -> None:
    asks, errors = False, list[Exception]()

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        if asks:
            await asyncio.sleep(1)
            answer = await sessions[k == OUTERS[0]].revalidate([INNER], strict=False)
            errors.extend(answer.errors.values())
        return k.name

    building = builder(Single("outer", fetch=fetch), Single("inner"))
    sessions = [building.session(), building.session()]
    for session, k in zip(sessions, OUTERS, strict=False):
        await session.resolve([k, INNER])
    asks = True
    revalidating = [
        asyncio.ensure_future(session.revalidate([k], force_refresh=True))
        for session, k in zip(sessions, OUTERS, strict=False)
    ]
    await asyncio.sleep(3)
    assert all(each.done() for each in revalidating)
    assert "outer:0" in str(errors[0])
    assert "outer:1" in str(errors[0])
    assert [type(error).__name__ for error in errors] == ["DependencyCycleError"]
    await no_leaks(building)


async def test_a_source_waits_for_no_revalidation_that_comes_to_wait_for_it() -> None:
    inside: list[Snapshot] = []

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k == INNER:
            inside.append(await session.revalidate(OUTERS[1:2], strict=False))
        elif k == OUTERS[0] and source.calls.count(k) == 2:
            await asyncio.sleep(1)  # by now the other one waits for the turn of this one
            await building.build([INNER])
        return 1

    source = Single("outer", "outer", "inner", fetch=fetch)
    building = builder(source)
    session = building.session()
    await session.resolve(OUTERS[:2])
    turn = session.revalidate(OUTERS[:1], force_refresh=True)
    await asyncio.gather(turn, building.build([INNER]))
    assert "must not form a cycle, got test:outer:0" in str(inside[0].error_for(OUTERS[1]))


@pytest.mark.parametrize("started", [True, False])
async def test_refreshes_that_a_source_waits_for_wait_for_no_slot(started: bool) -> None:
    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k == OUTERS[0]:
            if started:
                await settle()
            await building.wait_for_refreshes()
        return len(source.calls)

    source = Single("outer", "outer", "inner", fetch=fetch)
    policy = FreshnessPolicy(10, 500, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(source, default_policy=policy, max_concurrency=1)
    await building.build([INNER])
    await asyncio.sleep(20)
    snapshot = await building.build([INNER, OUTERS[0]])
    assert snapshot[INNER].stale
    assert source.calls == [INNER, OUTERS[0], INNER]


@pytest.mark.parametrize("ends", ["refresh", "build"])
async def test_refreshes_whose_sources_wait_for_each_other_all_end(ends: str) -> None:
    """By all refreshes under way, or by the build of one who waits for them."""

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if len(source.calls) > 2:
            await settle()
            if k == INNER or ends == "refresh":
                await building.wait_for_refreshes()
            else:
                await building.build([INNER], strict=False)
        return len(source.calls)

    source = Single("outer", "outer", "inner", fetch=fetch)
    policy = FreshnessPolicy(10, 500, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(source, default_policy=policy)
    await building.build([INNER, OUTERS[0]])
    await asyncio.sleep(20)
    if ends == "build":
        await building.publisher.invalidate(INNER)
    keys = [INNER, OUTERS[0]]
    assert (await building.build(keys[::-1], strict=False)).value(OUTERS[0])
    await building.wait_for_refreshes()


@pytest.mark.parametrize("waits_for", ["a turn", "refreshes"])
async def test_a_worker_whose_source_waits_for_others_makes_room_for_another(
    waits_for: str,
) -> None:
    """What is queued behind it may be what they wait for."""
    first, behind, asker, old = (key(name) for name in ("first", "behind", "asker", "old"))
    gate = Gate(opened=True)

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        await gate.pass_()
        if k == asker:
            await building.build([first, behind])
        elif k == old and not gate.opened:
            await building.build([behind])
        elif k == first and waits_for == "a turn":
            await session.revalidate([old], strict=False)
        elif k == first:
            await building.wait_for_refreshes()
        return 1

    policy = FreshnessPolicy(5, 100, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    source = Single("source", "first", "behind", "asker", "old", fetch=fetch)
    building = builder(source, max_pending_tasks=1, default_policy=policy)
    session = building.session()
    await session.resolve([old])
    await asyncio.sleep(10)
    gate.close()
    asking = await begun(building.build([asker]), gate, 2)
    if waits_for == "a turn":
        other = await begun(session.revalidate([old], force_refresh=True), gate, 3)
    else:
        other = await begun(building.build([old]), gate, 3)
    gate.let_through(2)
    await settle()
    gate.open()
    await asyncio.wait_for(asyncio.gather(asking, other), 20)
    await building.wait_for_refreshes()


# Over several event loops ---------------------------------------------------------------------


class Facades:
    """Two facades, on loops of their own, whose sources ask each other."""

    def __init__(self, form: str, asks: Any, **settings: Any) -> None:
        self.asks = asks
        self.meet = threading.Barrier(2)
        self.facades = [
            SyncSnapshotBuilder(
                SnapshotBuilder(
                    [
                        CallableSource(
                            name=f"source {number}",
                            priority=1,
                            supports=lambda k: True,
                            fetcher=partial(getattr(self, form), number),
                        )
                    ],
                    default_policy=LASTING,
                    **settings,
                )
            )
            for number in range(2)
        ]

    def thread(self, number: int, k: ResourceKey, context: FetchContext) -> Any:
        asked = self.asks(self, number, k)
        return 1 if asked is None else self.facades[1 - number].build([asked]).value(asked)

    async def loop(self, number: int, k: ResourceKey, context: FetchContext) -> Any:
        asked = await asyncio.to_thread(self.asks, self, number, k)
        if asked is None:
            return 1
        other = self.facades[1 - number]
        return (await asyncio.wrap_future(other.submit(lambda b: b.build([asked])))).value(asked)

    def build(self, *numbers: int) -> list[Snapshot]:
        with ThreadPoolExecutor(2) as pool:
            builds = [
                pool.submit(self.facades[number].build, [INNER], strict=False) for number in numbers
            ]
            try:
                return [each.result(20) for each in builds]
            finally:
                for facade in self.facades:
                    facade.close()


@pytest.mark.parametrize("form", ["thread", "loop"])
@pytest.mark.parametrize("numbers", [(0,), (0, 1)])
def test_a_circle_over_two_event_loops_is_an_error_whoever_has_begun_it(
    form: str, numbers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asks(facades: Facades, number: int, k: ResourceKey) -> ResourceKey:
        if len(numbers) == 2:
            facades.meet.wait(20)  # both are under way before either asks the other
        return k

    monkeypatch.setattr("coalestra.orchestration.singleflight.LOOK_SECONDS", 0.001)
    snapshots = Facades(form, asks).build(*numbers)
    assert "must not form a cycle, got test:inner" in str(
        [each.error_for(INNER) for each in snapshots]
    )


@pytest.mark.parametrize("form", ["thread", "loop"])
def test_what_is_asked_for_through_another_event_loop_waits_for_no_slot(form: str) -> None:
    def asks(facades: Facades, number: int, k: ResourceKey) -> ResourceKey | None:
        if number:
            return OUTERS[0]
        return k if k == INNER else None

    snapshots = Facades(form, asks, max_concurrency=1).build(0)
    assert snapshots[0].value(INNER) == 1


@pytest.mark.parametrize("form", ["thread", "loop"])
def test_two_loops_whose_only_slots_are_held_by_who_asks_the_other_wait_for_none(form: str) -> None:
    """Neither is asked on behalf of the other: there is no circle, but for the two slots."""

    def asks(facades: Facades, number: int, k: ResourceKey) -> ResourceKey | None:
        if k != INNER:
            return None
        facades.meet.wait(20)
        return OUTERS[number]

    snapshots = Facades(form, asks, max_concurrency=1).build(0, 1)
    assert [each.value(INNER) for each in snapshots] == [1, 1]


def test_a_worker_whose_source_comes_to_wait_upon_another_loop_makes_room_for_another() -> None:
    """What is queued behind it may be what it waits for, by way of that loop."""
    first, behind, asker, between = (key(name) for name in ("first", "behind", "asker", "between"))
    asked = {asker: [first, behind], between: [behind], first: [between]}
    submitted = threading.Semaphore(0)

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        if k in asked:
            other = there if k is first else here
            build = other.submit(lambda b: b.build(asked[k]))
            submitted.release()
            await asyncio.wrap_future(build)
        return 1

    here = SyncSnapshotBuilder(
        builder(Single("here", "first", "behind", fetch=fetch), max_concurrency=1)
    )
    there = SyncSnapshotBuilder(builder(Single("there", "asker", "between", fetch=fetch)))
    held = threading.Event()

    async def hold(_: SnapshotBuilder) -> None:
        held.wait(20)

    async def build(k: ResourceKey, of: SnapshotBuilder) -> Any:
        return (await of.build([k])).value(k)

    holding = here.submit(hold)  # so that both are asked for in one turn
    builds = []
    for k in (asker, between):
        builds.append(there.submit(partial(build, k)))
        assert submitted.acquire(timeout=20)
    held.set()
    assert [each.result(20) for each in builds] == [1, 1]
    holding.result(20)
    for facade in (here, there):
        facade.close()


def test_a_source_that_waits_on_a_loop_that_is_gone_keeps_nothing_of_it() -> None:
    """Who waits for whom is known over all builders; what nobody runs any more is dropped."""

    async def broken_off() -> None:
        async def fetch(k: ResourceKey, context: FetchContext) -> Any:
            if k == INNER:
                await asyncio.sleep(1_000)
            return (await building.build([INNER])).value(INNER)

        building = builder(Single("outer", "outer", "inner", fetch=fetch))
        task = asyncio.ensure_future(building.build([OUTERS[0]]))
        await asyncio.sleep(1)
        assert not task.done()

    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    for _ in range(5):
        loop = VirtualLoop()
        loops.append(weakref.ref(loop))
        loop.run_until_complete(broken_off())
        drop(loop)
        del loop
        gc.collect()
    assert len([True for loop in loops if loop() is not None]) <= 1


async def test_nothing_stays_of_what_derived_from_a_key_whose_source_asked_for_another() -> None:
    """The waits of all builders of a loop are kept as long as that, but none that is over."""

    class Outer(Batch):
        async def fetch_many(self, keys: Any, context: FetchContext) -> Any:
            if INNER not in keys:
                await building.build([INNER])
                await settle()
            return dict.fromkeys(keys, 1)

    bases = [key("outer", f"mine {number}") for number in range(8)]
    needs = {key("sum", each.subject): [each] for each in bases}
    building = builder(Outer("outer", "outer", "inner"), Derived("sum", needs=needs.__getitem__))
    assert len(await building.build(needs)) == len(needs)
    await no_leaks(building)
    await building.aclose()
    gc.collect()
    asked = {*needs, *bases}
    assert not [each for each in gc.get_objects() if type(each) is Flight and each.key in asked]


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("kind", ["single", "led", "batch", "derived"])
async def test_what_a_source_has_begun_keeps_none_of_a_closed_one(kind: str, waits: bool) -> None:
    """A pool of connections, say, whose tasks the first call has begun and which is kept."""
    variables: list[contextvars.Context] = []

    async def begin(*_: Any) -> Any:
        variables.append(contextvars.copy_context())
        if waits:
            await settle()
        return 1

    sources: list[Any] = [Single("outer", "outer", "inner", fetch=begin)]
    if kind == "batch":
        sources = [Batch("outer", "outer", before=begin)]
    elif kind == "derived":
        sources.append(Derived("sum", before=begin, needs=lambda k: [INNER]))
    wanted = {"led": OUTERS, "derived": [key("sum")]}.get(kind, OUTERS[:1])
    building = builder(*sources)
    await building.build(wanted)
    await building.aclose()
    assert variables
    left = weakref.ref(building.cache)
    del building, sources
    look_after_none()
    gc.collect()
    assert left() is None
