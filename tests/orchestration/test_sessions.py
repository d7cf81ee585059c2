"""A session keeps one id, one time, one deadline and one set of values over all of its stages."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    FetchContext,
    FreshnessPolicy,
    PolicyResolver,
    ResourceAcceptanceRule,
    ResourceKey,
    ResourceResolutionError,
    SessionClosedError,
    Snapshot,
    SnapshotAcceptancePolicy,
    SnapshotBuildError,
    SnapshotDeadlineExceededError,
    SnapshotRequest,
    SourceUnavailableError,
)
from coalestra.orchestration import singleflight
from tests.contracts.caches import SingleKeyCache
from tests.orchestration.scripted import Derived, Single, builder, key, latency
from tests.orchestration.stock import BASE, MIDDLE, OTHER, TOP, Shop, Stock, shown
from tests.support import (
    EPOCH,
    Gate,
    ManualClock,
    Panic,
    ThreadGate,
    begun,
    lines_run,
    no_leaks,
    settle,
)

LARGE = [list(range(200)) for _ in range(200)]
"""A payload that takes a thread to copy."""


# One identity


async def test_every_stage_bears_the_id_and_the_creation_time_of_the_session() -> None:
    shop = Shop()
    session = shop.builder.session(snapshot_id="mine")
    first = await session.resolve([BASE])
    await asyncio.sleep(5)
    second = await session.resolve([OTHER])
    again = await session.revalidate([OTHER])
    assert {each.snapshot_id for each in (first, second, again, session)} == {"mine"}
    assert {each.created_at for each in (first, second, again, session)} == {EPOCH}
    assert list(again) == [BASE, OTHER]


@pytest.mark.parametrize("asked_by", ["one call", "two calls"])
async def test_a_key_whose_reading_was_cancelled_counts_as_not_asked_for(asked_by: str) -> None:
    gate = Gate()

    async def fetch(key: ResourceKey, context: FetchContext) -> int:
        if key.name == "slow":
            await gate.pass_()
        return 1

    session = builder(Single("s", "slow", "quick", fetch=fetch)).session()
    slow, quick = key("slow"), key("quick")
    given_up = await begun(session.resolve([slow, quick]), gate)
    other = asyncio.ensure_future(session.resolve([slow])) if asked_by == "two calls" else None
    await settle()
    given_up.cancel()
    await asyncio.wait([given_up])
    after = await session.resolve([quick])
    assert after.diagnostics.requested_resources == len(after) + (other is not None)
    gate.open()
    if other is not None:
        assert list(await other) == [slow, quick]
    assert list(await session.resolve([slow])) == ([slow, quick] if other else [quick, slow])


async def test_sources_are_told_the_context_that_the_session_shows() -> None:
    seen: list[Any] = []

    async def fetch(key: ResourceKey, context: Any) -> None:
        seen.append(context)

    session = builder(Single("a", fetch=fetch)).session(deadline_seconds=9, metadata={"for": "ann"})
    await session.resolve([key("a")])
    assert seen == [session.context]
    assert (session.context.metadata, session.context.deadline_at) == ({"for": "ann"}, EPOCH + 9)


async def test_the_deadline_of_a_session_runs_from_its_opening_over_all_stages() -> None:
    building = builder(Single("slow", fetch=latency(3)))
    began = asyncio.get_running_loop().time()
    session = building.session(deadline_seconds=5)
    await session.resolve([key("slow", "1")])
    with pytest.raises(SnapshotBuildError) as caught:
        await session.resolve([key("slow", "2")])
    assert asyncio.get_running_loop().time() == pytest.approx(began + 5)
    partial = caught.value.snapshot
    assert partial is not None
    assert list(partial) == [key("slow", "1")]
    assert "SnapshotDeadlineExceededError" in str(caught.value)
    assert "5 s" in str(caught.value)


# Pinned values


async def test_a_resolved_key_is_never_fetched_again() -> None:
    shop = Shop()
    session = await shop.session(BASE)
    shop.stock.change(base=2)
    await asyncio.sleep(5_000)
    assert shown(await session.resolve([BASE, OTHER])) == {BASE: 1, OTHER: 10}
    assert [call.name for call in shop.stock.calls] == ["base", "other"]


async def test_every_stage_returns_everything_requested_so_far_in_the_order_of_asking() -> None:
    shop = Shop()
    session = await shop.session(TOP)
    assert list(await session.resolve([OTHER])) == [TOP, OTHER]
    assert list(await session.resolve([BASE, TOP])) == [TOP, OTHER, BASE]
    assert list(await session.resolve([])) == [TOP, OTHER, BASE]


async def test_dependencies_stay_hidden_until_they_are_asked_for() -> None:
    shop = Shop()
    session = await shop.session(TOP)
    assert list(session.snapshot()) == [TOP]
    shop.stock.change(base=2)
    await shop.publish(BASE, 3)
    assert shown(await session.resolve([MIDDLE, BASE])) == {TOP: ((1,),), MIDDLE: (1,), BASE: 1}
    assert len(shop.stock.calls) == len(shop.middle.calls) == 1


async def test_a_derived_key_is_made_from_what_the_session_pinned_before() -> None:
    shop = Shop()
    session = await shop.session(BASE)
    await shop.publish(BASE, 2)
    assert (await shop.builder.build([TOP])).value(TOP) == ((2,),)
    assert shown(await session.resolve([TOP])) == {BASE: 1, TOP: ((1,),)}


@pytest.mark.parametrize("trouble", ["fails", "hangs"])
@pytest.mark.parametrize("loses", ["expires", "is invalidated", "is from the future"])
@pytest.mark.parametrize("cache", [AsyncMemoryCache, SingleKeyCache])
async def test_what_is_pinned_is_not_asked_for_again_to_derive_from_it(
    cache: Callable[[], Any], loses: str, trouble: str
) -> None:
    clock = ManualClock()
    shop = Shop(default_policy=FreshnessPolicy(10, 20), clock=clock, cache=cache())
    session = await shop.session(BASE, trace=True)
    if loses == "expires":
        clock.advance(30)
    elif loses == "is from the future":
        clock.set_wall(EPOCH - 30)
    else:
        await shop.builder.publisher.invalidate(BASE)
    if trouble == "hangs":
        shop.stock.before = asyncio.Event().wait  # type: ignore[assignment]  # it never comes
    else:
        shop.stock.change(base=SourceUnavailableError("down"))
    began = asyncio.get_running_loop().time()
    snapshot = await session.resolve([TOP])
    assert shown(snapshot) == {BASE: 1, TOP: ((1,),)}
    assert asyncio.get_running_loop().time() < began + 0.1
    assert snapshot.trace is not None
    told = {each: record.obtained.value for each, record in snapshot.trace.keys.items()}
    assert told == {BASE: "fetched", MIDDLE: "derived", TOP: "derived"}
    assert len(shop.stock.calls) == len(shop.middle.calls) == len(shop.top.calls) == 1
    await no_leaks(shop.builder)


@pytest.mark.parametrize("comes", ["with another session", "before a look", "from above"])
async def test_what_is_pinned_is_not_waited_for_through_what_others_began(comes: str) -> None:
    class Slow(SingleKeyCache):
        async def get(self, key: ResourceKey, *arguments: Any, **more: Any) -> Any:
            if key == BASE:
                await look.pass_()
            return await super().get(key, *arguments, **more)

    async def fail(key: ResourceKey, context: FetchContext) -> Any:
        await look.pass_()
        raise SourceUnavailableError("not here")

    look, fetch = Gate(opened=True), Gate()
    stock = Stock("stock", {"base": 1, "other": 10})
    sources: list[Any] = [stock, Derived("middle", needs=lambda key: [BASE])]
    sources.append(Derived("top", needs=lambda key: [MIDDLE]))
    if comes == "with another session":
        sources.append(Single("first", "middle", fetch=fail, priority=100))
    building = builder(*sources, cache=Slow() if comes == "before a look" else None)
    session, other = building.session(), building.session()
    await session.resolve([BASE])
    await other.resolve([OTHER])
    await building.publisher.invalidate(BASE)
    stock.before = fetch.pass_
    look.close()
    before = asyncio.ensure_future(other.resolve([MIDDLE]))
    await settle()
    asking = asyncio.ensure_future(session.resolve([TOP if comes == "from above" else MIDDLE]))
    await settle()
    look.open()
    await asyncio.wait([asking], timeout=1)
    assert (asking.done(), before.done()) == (True, False)
    assert BASE in asking.result()
    fetch.open()
    assert (await before).value(MIDDLE) == (1,)
    await no_leaks(building)


async def test_a_session_with_pins_joins_much_that_is_under_way_in_linear_time() -> None:
    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        if k.subject:
            await gate.pass_()
        return 1

    async def joining(count: int) -> int:
        leaves = [key("leaf", str(number)) for number in range(count)]
        middle = Derived("middle", needs=lambda key: leaves)
        top = Derived("top", needs=lambda key: [MIDDLE])
        building = builder(Single("leaf", fetch=fetch), middle, top)
        session = building.session()
        await session.resolve([key("leaf")])
        tops = [key("top", str(number)) for number in range(count)]
        first = await begun(building.build(tops))
        await settle()
        joined: list[asyncio.Future[Any]] = []

        async def join() -> None:
            joined.append(asyncio.ensure_future(session.resolve(tops)))
            await settle()

        lines = await lines_run(singleflight, join())
        gate.open()
        await asyncio.wait([first, *joined])
        gate.close()
        await no_leaks(building)
        return lines

    gate = Gate()
    few = await joining(100)
    assert await joining(400) < 6 * few


async def test_a_session_joins_what_many_sessions_wait_for_as_soon_as_what_one_waits_for() -> None:
    gate, count, taken = Gate(), 600, list[int]()
    shop = Shop()
    shop.middle.before = gate.pass_
    sessions = [await shop.session(OTHER) for _ in range(count)]
    joined = [await begun(sessions.pop().resolve([TOP]))]
    tracemalloc.start()
    try:
        for session in sessions:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            joined.append(asyncio.ensure_future(session.resolve([TOP])))
            await settle()
            taken.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert min(taken[-40:]) < 2 * min(taken[:40])  # no copy of what is known of the others
    gate.open()
    assert {shown(await each)[TOP] for each in joined} == {((1,),)}
    await no_leaks(shop.builder)


async def test_a_stale_value_made_from_what_is_pinned_stands_in_for_one_that_fails() -> None:
    shop = Shop(default_policy=FreshnessPolicy(10, 1_000))
    session = await shop.session(BASE)
    await shop.builder.build([MIDDLE])
    await asyncio.sleep(30)

    async def fail() -> None:
        raise ConnectionError("down")

    shop.middle.before = fail
    snapshot = await session.resolve([MIDDLE])
    assert shown(snapshot) == {BASE: 1, MIDDLE: (1,)}
    assert "down" in snapshot[MIDDLE].metadata["fallback_error"]


async def test_what_a_session_fetched_to_derive_from_was_not_in_the_cache() -> None:
    """What was there before it began, or was published, was; asked for or not."""
    shop = Shop()
    await shop.builder.build([OTHER])
    shop.middle.needs = lambda key: [BASE, OTHER]
    session = await shop.session(MIDDLE)
    snapshot = await session.resolve([BASE, OTHER])
    assert [snapshot[k].from_cache for k in (MIDDLE, BASE, OTHER)] == [False, False, True]
    session = await shop.session(TOP, BASE)
    await session.revalidate([BASE], force_refresh=True)
    snapshot = await session.resolve([MIDDLE, OTHER])
    assert [snapshot[k].from_cache for k in (MIDDLE, OTHER)] == [False, True]
    session = shop.builder.session()
    await shop.builder.publisher.publish(BASE, 2, source="feed")
    await session.resolve([MIDDLE])
    assert (await session.resolve([BASE]))[BASE].from_cache


@pytest.mark.parametrize("first", ["the session", "the other"])
async def test_who_waits_for_what_a_session_derives_from_pins_gets_the_current(first: str) -> None:
    shop = Shop(default_policy=FreshnessPolicy(10, 20))
    gate = Gate()
    session = await shop.session(BASE)
    await asyncio.sleep(30)
    shop.stock.before = gate.pass_
    shop.stock.change(base=2)
    asking = [session.resolve([TOP]), shop.builder.build([TOP])]
    tasks = []
    for each in asking if first == "the session" else reversed(asking):
        tasks.append(asyncio.ensure_future(each))
        await asyncio.sleep(0)
    await asyncio.sleep(1)
    done = [task for task in tasks if task.done()]
    assert [shown(task.result()) for task in done] == [{BASE: 1, TOP: ((1,),)}]
    gate.open()
    await asyncio.wait(tasks)
    (other,) = (task for task in tasks if task not in done)
    assert shown(other.result()) == {TOP: ((2,),)}
    assert shown(await shop.builder.build([TOP, BASE])) == {TOP: ((2,),), BASE: 2}
    assert len(shop.stock.calls) == 2
    await no_leaks(shop.builder)


async def test_a_chain_derived_from_an_old_pin_takes_no_more_for_each_link_if_it_is_long() -> None:
    def below(each: ResourceKey) -> list[ResourceKey]:
        number = int(each.subject) - 1
        return [key("step", str(number)) if number else BASE]

    length = 100
    stock, steps = Stock("stock", {"base": 1}), Derived("step", needs=below)
    building = builder(stock, steps, default_policy=FreshnessPolicy(10, 20))
    session = building.session()
    await session.resolve([BASE])
    await asyncio.sleep(30)
    lines = await lines_run(singleflight, session.resolve([key("step", str(length))]))
    assert lines < 1_000 * length
    assert len(steps.calls) == length
    assert len(stock.calls) == 1


# Errors


async def test_a_failed_key_is_not_tried_again_unless_retry_errors_names_it() -> None:
    shop = Shop()
    shop.stock.change(base=SourceUnavailableError("down"))
    session = await shop.session(OTHER)
    failed = await session.resolve([BASE], strict=False)
    assert isinstance(failed.errors[BASE], ResourceResolutionError)
    shop.stock.change(base=2)
    assert BASE in (await session.resolve([BASE], strict=False)).errors
    assert BASE in (await session.resolve([OTHER], retry_errors=True)).errors
    assert len(shop.stock.calls) == 2
    shop.stock.change(base=SourceUnavailableError("down again"))
    for again in (
        await session.resolve([BASE], strict=False, retry_errors=True),
        session.snapshot(),
    ):
        assert "down again" in str(again.errors[BASE])
    shop.stock.change(base=2)
    assert shown(await session.resolve([BASE], retry_errors=True)) == {OTHER: 10, BASE: 2}
    assert session.snapshot().complete


async def test_a_failed_key_that_was_read_as_a_dependency_has_a_value_and_no_error() -> None:
    shop = Shop()
    shop.stock.change(base=SourceUnavailableError("down"))
    session = await shop.session()
    await session.resolve([BASE], strict=False)
    shop.stock.change(base=4)
    assert shown(await session.resolve([TOP])) == {BASE: 4, TOP: ((4,),)}
    assert (await session.resolve([BASE])).complete


# A policy that cannot be told


@pytest.mark.parametrize(
    "error", [KeyError("x"), Panic("x"), asyncio.CancelledError("x")], ids=repr
)
@pytest.mark.parametrize("warm", [False, True])
async def test_a_policy_that_cannot_be_told_fails_its_key(error: BaseException, warm: bool) -> None:
    lost = False

    def policy(of: ResourceKey) -> FreshnessPolicy | None:
        if lost and of == key("bad"):
            raise error
        return None

    policies = PolicyResolver(FreshnessPolicy(60.0, 600.0), dynamic=policy)
    building = builder(Single("any", "bad", "good"), policy_resolver=policies)
    if warm:
        await building.build([key("bad"), key("good")])
    session = building.session()
    pinned = building.session()
    await pinned.resolve([key("bad")])
    lost = True
    request = SnapshotRequest(
        required=[key("good")],
        optional=[key("bad")],
        acceptance_policy=SnapshotAcceptancePolicy(
            ResourceAcceptanceRule(allow_stale=False), include_optional_resources=True
        ),
    )
    for snapshot in (
        await building.build([key("bad"), key("good")], strict=False),
        await building.build_request(request),
        await session.resolve([key("bad"), key("good")], strict=False),
    ):
        assert list(snapshot) == [key("good")]
        failed = snapshot.errors[key("bad")]
        assert isinstance(failed, ResourceResolutionError)
        assert failed.__cause__ is error
        assert "policy" in str(failed)
    kept = await pinned.revalidate([key("bad")], strict=False)
    assert list(kept) == list(kept.errors) == [key("bad")]
    assert isinstance(kept.errors[key("bad")], ResourceResolutionError)
    assert (await pinned.snapshot_async())[key("bad")].stale is False


# Closing


async def test_a_closed_session_refuses_every_call() -> None:
    shop = Shop()
    async with shop.builder.session() as session:
        snapshot = await session.resolve([BASE])
        assert not session.closed
    assert session.closed
    assert "closed" in repr(session)
    assert shown(snapshot) == {BASE: 1}
    calls = (
        session.resolve([BASE]), session.resolve_request(SnapshotRequest(required=[BASE])),
        session.revalidate([BASE]), session.snapshot_async(), session.__aenter__(),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(SessionClosedError, match=session.snapshot_id):
            await call
    with pytest.raises(SessionClosedError):
        session.snapshot()


# Snapshots


async def test_snapshot_and_snapshot_async_show_the_same_values_and_errors() -> None:
    shop = Shop()
    shop.stock.change(other=SourceUnavailableError("down"))
    session = await shop.session(BASE)
    await session.resolve([OTHER], strict=False)
    now, later = session.snapshot(), await session.snapshot_async()
    assert shown(now) == shown(later) == {BASE: 1}
    assert list(now.errors) == list(later.errors) == [OTHER]
    assert now.snapshot_id == later.snapshot_id == session.snapshot_id


@pytest.mark.parametrize("again", [False, True])
async def test_snapshots_of_a_session_are_bound_by_its_deadline(again: bool) -> None:
    building = builder(Stock("large", {"large": LARGE}))
    session = building.session(deadline_seconds=100)
    await session.resolve([key("large")])
    await asyncio.sleep(101)
    with pytest.raises(SnapshotBuildError) as caught:
        await (session.resolve([key("large")]) if again else session.snapshot_async())
    assert caught.value.snapshot is None
    assert isinstance(caught.value.errors[key("large")], SnapshotDeadlineExceededError)
    assert session.snapshot().value(key("large")) == LARGE


# Stages side by side


@pytest.mark.parametrize("call", ["resolve", "snapshot_async", "revalidate"])
async def test_what_is_tried_again_in_a_copying_is_in_it_or_has_failed(call: str) -> None:
    gate = ThreadGate()
    gate.open()

    def copied(payload: Any) -> Any:
        if payload == "slow":
            gate.pass_()
        return payload

    stock = Stock("stock", {"base": "slow", "other": SourceUnavailableError("down")})
    building = builder(stock, payload_copier=copied, run_payload_copies_in_thread=True)
    session = building.session()
    await session.resolve([BASE, OTHER], strict=False)
    stock.change(other="quick")
    gate = ThreadGate()
    calls: dict[str, Callable[[], Coroutine[Any, Any, Snapshot]]] = {
        "resolve": lambda: session.resolve([BASE]),
        "snapshot_async": session.snapshot_async,
        "revalidate": lambda: session.revalidate([BASE]),
    }
    copying = asyncio.ensure_future(calls[call]())
    await asyncio.sleep(1)
    trying = asyncio.ensure_future(session.resolve([OTHER], retry_errors=True))
    await asyncio.sleep(1)
    gate.open()
    early, late = await asyncio.gather(copying, trying)
    assert (shown(early), list(early.errors)) == ({BASE: "slow"}, [OTHER])
    assert (shown(late), list(late.errors)) == ({BASE: "slow", OTHER: "quick"}, [])


async def test_stages_side_by_side_agree_on_what_derived_keys_rest_on() -> None:
    gates = {"left": Gate(), "right": Gate()}
    stock = Stock("stock", {"base": 1})
    left = Derived("left", needs=lambda k: [BASE], before=gates["left"].pass_)
    right = Derived("right", needs=lambda k: [BASE])
    building = builder(stock, left, right)
    session = building.session()
    first = asyncio.ensure_future(session.resolve([key("left")]))
    await gates["left"].wait_arrived()
    await building.publisher.publish(BASE, 2, source="stream", observed_at=EPOCH + 1)
    second = asyncio.ensure_future(session.resolve([key("right")]))
    await asyncio.sleep(1)
    gates["left"].open()
    await asyncio.gather(first, second)
    values = shown(await session.resolve([BASE]))
    assert values[key("left")] == values[key("right")] == (values[BASE],)


async def test_a_key_whose_inputs_never_stand_still_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(singleflight, "_SPARE_ROUNDS", -9)
    gate = Gate()
    stock = Stock("stock", {"base": 1})
    left = Derived("left", needs=lambda _: [BASE], before=gate.pass_)
    building = builder(stock, left, Derived("right", needs=lambda _: [BASE]))
    session = building.session()
    first = asyncio.ensure_future(session.resolve([key("left")], strict=False))
    await gate.wait_arrived()
    await building.publisher.publish(BASE, 2, source="stream", observed_at=EPOCH + 1)
    await session.resolve([key("right")])
    gate.open()
    error = (await first).error_for(key("left"))
    assert "kept changing" in str(error)
    assert shown(await session.snapshot_async()) == {key("right"): (2,)}
