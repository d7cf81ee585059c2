"""Revalidation replaces pinned values and all that was derived from them, or nothing at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from coalestra import (
    FetchContext,
    FreshnessPolicy,
    ResourceAbsent,
    ResourceAcceptanceRule,
    ResourceKey,
    Snapshot,
    SnapshotAcceptanceError,
    SnapshotAcceptancePolicy,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotConsistencyPolicy,
    SnapshotDeadlineExceededError,
    SnapshotSession,
    SourcePayload,
    SourceUnavailableError,
)
from coalestra.orchestration import readings
from tests.orchestration.scripted import Derived, Single, builder, key
from tests.orchestration.stock import BASE, MIDDLE, OTHER, TOP, Shop, Stock, shown
from tests.support import (
    EPOCH,
    Gate,
    ThreadGate,
    begun,
    cancel_at_every_await,
    lines_run,
    no_leaks,
    settle,
)

SHORT = FreshnessPolicy(10.0, 1_000.0)


def unchanged(session: SnapshotSession, before: Snapshot) -> bool:
    """Whether the session still has the very revisions that a snapshot showed."""
    after = session.snapshot()
    return [(k, v.version) for k, v in before.items()] == [
        (k, v.version) for k, v in after.items()
    ] and list(before.errors) == list(after.errors)


# What is replaced


async def test_a_value_that_is_still_fresh_in_the_cache_is_kept_without_asking_anyone() -> None:
    shop = Shop()
    session = await shop.session(TOP, BASE)
    before = session.snapshot()
    shop.stock.change(base=2)
    after = await session.revalidate([BASE])
    assert [v.version for v in after.values()] == [v.version for v in before.values()]
    assert len(shop.stock.calls) == len(shop.top.calls) == 1


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("asked_for", [{BASE: 2, TOP: ((2,),), OTHER: 10}, {TOP: ((2,),)}])
async def test_what_was_derived_from_a_replaced_value_is_so_through_chains(
    asked_for: dict[ResourceKey, Any], force: bool
) -> None:
    """And what is hidden, as nobody asked for it, can be replaced and stays hidden."""
    shop = Shop()
    session = await shop.session(*asked_for)
    shop.stock.change(base=2)
    await shop.publish(BASE, 2)
    after = await session.revalidate([BASE], force_refresh=force)
    assert shown(after) == shown(session.snapshot()) == asked_for
    assert after.diagnostics.resolved_resources == len(asked_for)
    assert shown(await session.resolve([MIDDLE, BASE])) == {**asked_for, MIDDLE: (2,), BASE: 2}


async def test_a_derived_key_revalidated_alone_agrees_with_its_pinned_dependencies() -> None:
    shop = Shop()
    session = await shop.session(BASE, MIDDLE)
    await shop.publish(BASE, 2)
    assert (await shop.builder.build([MIDDLE])).value(MIDDLE) == (2,)
    assert shown(await session.revalidate([MIDDLE])) == {BASE: 1, MIDDLE: (1,)}
    again = await session.revalidate([MIDDLE], force_refresh=True)
    assert shown(again) == {BASE: 1, MIDDLE: (1,)}
    assert again[MIDDLE].dependency_versions == {BASE: again[BASE].version}


@pytest.mark.parametrize("force", [False, True])
async def test_what_is_derived_only_then_agrees_with_what_is_pinned(force: bool) -> None:
    """Its pinned value came from another source, as it could not be derived then."""
    down = [True]

    async def fail() -> None:
        if down:
            raise ConnectionError("down")

    d = key("d")
    sources = [Derived("d", needs=lambda k: [BASE], before=fail), Single("late", "d", priority=1)]
    building = builder(*sources, Stock("stock", {"base": 1}))
    session = building.session()
    assert shown(await session.resolve([BASE, d])) == {BASE: 1, d: ""}
    await building.publisher.publish(BASE, 2, source="news")
    await building.publisher.invalidate(d)
    down.clear()
    after = await session.revalidate([d], force_refresh=force)
    assert shown(after) == {BASE: 1, d: (1,)}
    assert after[d].dependency_versions == {BASE: after[BASE].version}


async def test_what_is_kept_is_not_asked_for_again_to_derive_anew_from_it() -> None:
    both = key("both")
    stock = Stock("stock", {"base": 1, "other": 10})
    derived = Derived("both", needs=lambda k: [BASE, OTHER])
    building = builder(stock, derived, default_policy=SHORT)
    session = building.session()
    await session.resolve([BASE, OTHER, both])
    await asyncio.sleep(2_000)
    stock.change(base=SourceUnavailableError("down"), other=20)
    assert shown(await session.revalidate([OTHER])) == {BASE: 1, OTHER: 20, both: (1, 20)}
    assert [each.name for each in stock.calls] == ["base", "other", "other"]


# force_refresh


@pytest.mark.parametrize("absent", [True, False])
async def test_what_is_derived_by_force_from_old_pins_is_nobody_elses(absent: bool) -> None:
    """Also when it comes to nothing; what is derived from a pin that is current is for everyone."""

    class Doubling(Derived):
        async def derive(self, key: ResourceKey, inputs: Snapshot, context: FetchContext) -> Any:
            self.calls.append(inputs.value(BASE))
            if absent and self.calls == [1, 2, 1]:
                raise ResourceAbsent("there is no longer any")
            return 2 * inputs.value(BASE)

    doubling = Doubling("double", needs=lambda k: [BASE])
    building = builder(Stock("stock", {"base": 1}), doubling)
    async with building.session() as session:
        await session.resolve([BASE, key("double")])
        await asyncio.sleep(1)
        await building.publisher.publish(BASE, 2, source="stream")
        assert (await building.build([key("double")])).value(key("double")) == 4
        again = await session.revalidate([key("double")], strict=False, force_refresh=True)
        assert again.value(key("double")) == 2
    assert doubling.calls == [1, 2, 1]
    async with building.session() as session:
        assert (await session.resolve([BASE, key("double")])).value(key("double")) == 4
        assert doubling.calls == [1, 2, 1]
        await session.revalidate([key("double")], force_refresh=True)
    assert (await building.build([key("double")])).value(key("double")) == 4
    assert doubling.calls == [1, 2, 1, 2]


@pytest.mark.parametrize("force", [False, True])
async def test_force_refresh_forbids_stale_values_to_stand_in(force: bool) -> None:
    shop = Shop(default_policy=SHORT)
    session = await shop.session(BASE)
    before = session.snapshot()
    await asyncio.sleep(11)
    shop.stock.change(base=SourceUnavailableError("down"))
    if force:
        with pytest.raises(SnapshotBuildError) as caught:
            await session.revalidate([BASE], force_refresh=True)
        assert list(caught.value.errors) == [BASE]
        assert unchanged(session, before)
    else:
        after = await session.revalidate([BASE])
        assert after[BASE].stale
        assert after[BASE].metadata["fallback_error_type"] == "ResourceResolutionError"


async def test_force_refresh_accepts_no_stale_payload_either() -> None:
    shop = Shop(default_policy=SHORT)
    session = await shop.session(BASE)
    await asyncio.sleep(20)
    shop.stock.change(base=SourcePayload(2, observed_at=EPOCH + 5))
    with pytest.raises(SnapshotBuildError, match="StaleSourceData"):
        await session.revalidate([BASE], force_refresh=True)
    assert shown(session.snapshot()) == {BASE: 1}


# All or nothing


async def test_one_failed_key_keeps_everything_as_it_was() -> None:
    shop = Shop()
    session = await shop.session(BASE, TOP, OTHER)
    before = session.snapshot()
    shop.stock.change(base=2, other=SourceUnavailableError("down"))
    with pytest.raises(SnapshotBuildError) as caught:
        await session.revalidate([BASE, OTHER], force_refresh=True)
    assert list(caught.value.errors) == [OTHER]
    retained = caught.value.snapshot
    assert retained is not None
    assert shown(retained) == shown(before)
    assert list(retained.errors) == [OTHER]
    assert unchanged(session, before)


async def test_a_failed_derivation_keeps_everything_as_it_was() -> None:
    fail = False

    async def before_deriving() -> None:
        if fail:
            raise SourceUnavailableError("cannot derive")

    stock = Stock("stock", {"base": 1})
    derived = Derived("d", needs=lambda k: [BASE], before=before_deriving)
    building = builder(stock, derived, default_policy=SHORT)
    session = building.session()
    await session.resolve([BASE, key("d")])
    before = session.snapshot()
    fail = True
    stock.change(base=2)
    await asyncio.sleep(11)  # what is cached could stand in, where nothing is forced
    with pytest.raises(SnapshotBuildError) as caught:
        await session.revalidate([BASE], force_refresh=True)
    assert list(caught.value.errors) == [key("d")]
    assert unchanged(session, before)
    fail = False
    assert shown(await session.revalidate([BASE], force_refresh=True)) == {BASE: 2, key("d"): (2,)}


async def test_an_earlier_failure_of_another_key_stays_and_does_not_matter() -> None:
    shop = Shop()
    session = await shop.session(BASE)
    shop.stock.change(other=SourceUnavailableError("down"))
    await session.resolve([OTHER], strict=False)
    shop.stock.change(base=2)
    after = await session.revalidate([BASE], force_refresh=True)
    assert shown(after) == {BASE: 2}
    assert list(after.errors) == [OTHER]
    assert list(session.snapshot().errors) == [OTHER]


async def test_a_new_value_that_cannot_be_delivered_keeps_everything_as_it_was() -> None:
    class Once:
        """Can be copied on the way in, but not on the way out."""

        copies = 0

        def __deepcopy__(self, memo: object) -> Once:
            if type(self).copies:
                raise ValueError("not again")
            type(self).copies += 1
            return self

    shop = Shop()
    session = await shop.session(BASE, OTHER)
    before = session.snapshot()
    shop.stock.change(base=Once())
    with pytest.raises(SnapshotBuildError) as caught:
        await session.revalidate([BASE], force_refresh=True)
    assert list(caught.value.errors) == [BASE]
    assert unchanged(session, before)
    Once.copies = 0
    retained = await session.revalidate([BASE], force_refresh=True, strict=False)
    assert shown(retained) == {BASE: 1, OTHER: 10}
    assert list(retained.errors) == [BASE]
    assert unchanged(session, before)


# Policies


NEAR = SnapshotConsistencyPolicy(5.0)


@pytest.mark.parametrize("strict", [True, False])
async def test_a_consistency_violation_always_raises_and_changes_nothing(strict: bool) -> None:
    shop = Shop()
    session = await shop.session(BASE, OTHER)
    before = session.snapshot()
    shop.stock.change(
        base=SourcePayload(2, observed_at=EPOCH + 10), other=SourcePayload(20, observed_at=EPOCH)
    )
    await asyncio.sleep(10)
    policies: dict[str, Any] = {
        "consistency_policy": NEAR,  # which is judged first
        "acceptance_policy": SnapshotAcceptancePolicy(ResourceAcceptanceRule(max_age_seconds=0.5)),
    }
    with pytest.raises(SnapshotConsistencyError) as caught:
        await session.revalidate([BASE, OTHER], strict=strict, force_refresh=True, **policies)
    assert caught.value.snapshot is not None
    assert shown(caught.value.snapshot) == {BASE: 2, OTHER: 20}
    assert unchanged(session, before)


@pytest.mark.parametrize("strict", [True, False])
async def test_an_acceptance_violation_always_raises_and_changes_nothing(strict: bool) -> None:
    shop = Shop()
    session = await shop.session(BASE)
    await asyncio.sleep(100)
    before = session.snapshot()
    policy = SnapshotAcceptancePolicy(ResourceAcceptanceRule(max_age_seconds=5))
    with pytest.raises(SnapshotAcceptanceError) as caught:
        await session.revalidate([BASE], strict=strict, acceptance_policy=policy)
    assert list(caught.value.errors) == [BASE]
    assert unchanged(session, before)
    after = await session.revalidate([BASE], force_refresh=True, acceptance_policy=policy)
    assert after[BASE].age_seconds == 0


# What is refused


async def test_what_cannot_be_meant_is_a_value_error_and_nobody_is_asked() -> None:
    """No keys, keys without a value in the session, and a policy that names another key."""
    shop = Shop()
    shop.stock.change(other=SourceUnavailableError("down"))
    session = await shop.session(TOP)
    await session.resolve([OTHER], strict=False)
    before = session.snapshot()
    of_other = {OTHER: ResourceAcceptanceRule(max_age_seconds=1)}
    policy = SnapshotAcceptancePolicy(resource_rules=of_other)
    refused: list[tuple[list[ResourceKey], SnapshotAcceptancePolicy | None, str]] = [
        ([], None, "keys"),
        *[([TOP, unknown], None, str(unknown)) for unknown in (key("never"), OTHER)],
        ([TOP], policy, r"acceptance_policy.*other"),
    ]
    for keys, acceptance_policy, told in refused:
        with pytest.raises(ValueError, match=told):
            await session.revalidate(keys, acceptance_policy=acceptance_policy)
    assert unchanged(session, before)
    assert len(shop.stock.calls) == 2


# Deadlines


@pytest.mark.parametrize("strict", [True, False])
async def test_the_deadline_during_the_delivery_copy_blames_what_was_to_be_replaced(
    strict: bool,
) -> None:
    gate = ThreadGate()
    slow = False

    def copier(value: Any) -> Any:
        if slow and value == "new":
            gate.pass_()
        return value

    shop = Shop(payload_copier=copier, run_payload_copies_in_thread=True)
    session = await shop.session(BASE, OTHER, deadline_seconds=5)
    before = session.snapshot()
    await shop.publish(BASE, "new")
    slow = True
    if strict:
        with pytest.raises(SnapshotBuildError) as caught:
            await session.revalidate([BASE])
        assert caught.value.snapshot is None
        errors = caught.value.errors
    else:
        errors = (await session.revalidate([BASE], strict=False)).errors
    retained = await session.revalidate([BASE], strict=False)
    for told in (errors, retained.errors):
        assert list(told) == [BASE]
        assert isinstance(told[BASE], SnapshotDeadlineExceededError)
    assert shown(retained) == shown(session.snapshot()) == {BASE: 1, OTHER: 10}
    gate.open()
    await settle()
    assert unchanged(session, before)


async def test_the_deadline_while_another_revalidation_has_its_turn_changes_nothing() -> None:
    shop = Shop()
    session = await shop.session(BASE, OTHER, deadline_seconds=5)
    before = session.snapshot()
    gate = Gate()
    shop.stock.before = gate.pass_
    first = await begun(session.revalidate([BASE], force_refresh=True), gate)
    second = await session.revalidate([OTHER], force_refresh=True, strict=False)
    assert list(second.errors) == [OTHER]
    with pytest.raises(SnapshotBuildError):
        await first
    assert unchanged(session, before)
    gate.open()


# Cancellation, closing, and others at the same time


Scene = Callable[[], "tuple[Shop, list[ResourceKey], dict[str, Any]]"]


def forced_chain() -> tuple[Shop, list[ResourceKey], dict[str, Any]]:
    return Shop(), [BASE], {"force_refresh": True}


def with_policies() -> tuple[Shop, list[ResourceKey], dict[str, Any]]:
    acceptance = SnapshotAcceptancePolicy(ResourceAcceptanceRule(max_age_seconds=50))
    policies = {"consistency_policy": NEAR, "acceptance_policy": acceptance}
    return Shop(), [BASE, OTHER], {"force_refresh": True, **policies}


def copied_in_threads() -> tuple[Shop, list[ResourceKey], dict[str, Any]]:
    shop = Shop(payload_copier=lambda value: value, run_payload_copies_in_thread=True)
    return shop, [BASE], {"force_refresh": True}


def out_of_the_cache() -> tuple[Shop, list[ResourceKey], dict[str, Any]]:
    return Shop(), [BASE], {}


@pytest.mark.parametrize("scene", [
    forced_chain, with_policies, out_of_the_cache,
    pytest.param(copied_in_threads, marks=pytest.mark.slow),
])  # fmt: skip
async def test_cancelled_at_any_await_it_leaves_the_previous_state(scene: Scene) -> None:
    running: list[tuple[Shop, SnapshotSession]] = []
    outcomes: list[str] = []

    async def work() -> None:
        shop, keys, options = scene()
        session = await shop.session(BASE, TOP, OTHER)
        shop.stock.change(base=2, other=20)
        await shop.publish(BASE, 2)
        running.append((shop, session))
        await session.revalidate(keys, **options)
        outcomes.append("done")

    async def check() -> None:
        if not running:
            return
        shop, session = running.pop()
        old = {BASE: 1, TOP: ((1,),), OTHER: 10}
        values = shown(session.snapshot())
        if outcomes:
            assert (values[BASE], values[TOP]) == (2, ((2,),))
        else:
            assert values == old
            assert shown(await session.resolve([MIDDLE])) == {**old, MIDDLE: (1,)}
        assert (await session.revalidate([BASE])).value(TOP) == ((2,),)
        await no_leaks(shop.builder)
        await shop.builder.aclose()

    assert await cancel_at_every_await(work, check) > 3


async def test_what_was_begun_before_the_session_was_closed_comes_to_its_end() -> None:
    shop = Shop()
    session = await shop.session(BASE)
    gate = Gate()
    shop.stock.before = gate.pass_
    shop.stock.change(base=2)
    first_call = await begun(session.revalidate([BASE], force_refresh=True), gate)
    calls = [
        first_call,
        asyncio.ensure_future(session.revalidate([BASE])),  # waits for its turn
        asyncio.ensure_future(session.resolve([OTHER])),
    ]
    await settle()
    await session.close()
    gate.open()
    first, second, _ = await asyncio.gather(*calls)
    assert first.value(BASE) == second.value(BASE) == 2


# What the session was not asked for, but rests on


async def test_no_error_is_told_of_a_key_that_nobody_asked_for() -> None:
    shop = Shop()
    session = await shop.session(BASE, TOP)
    shop.stock.change(base=SourceUnavailableError("down"))
    retained = await session.revalidate([BASE], force_refresh=True, strict=False)
    assert set(retained.errors) == {BASE, TOP}
    hidden = await shop.session(TOP)
    retained = await hidden.revalidate([BASE], force_refresh=True, strict=False)
    assert set(retained.errors) == {BASE, TOP}  # this call asked for the first
    assert not hidden.snapshot().errors


async def test_what_is_asked_for_during_a_revalidation_is_no_longer_let_go() -> None:
    shop, gate = Shop(), Gate()
    session = await shop.session(MIDDLE)
    await shop.publish(BASE, 2)
    shop.middle.before = gate.pass_
    revalidating = await begun(session.revalidate([MIDDLE]), gate)
    assert shown(await session.resolve([BASE]))[BASE] == 1
    gate.open()
    assert shown(await revalidating) == {MIDDLE: (1,), BASE: 1}


async def test_a_value_derived_anew_during_the_commit_is_looked_at_again() -> None:
    stock = Stock("stock", {"base": 1})
    gate = Gate(opened=True)
    building = builder(stock, Derived("d", needs=lambda k: [BASE], before=gate.pass_))
    session = building.session()
    await session.resolve([BASE])
    await asyncio.sleep(1)
    await building.publisher.publish(BASE, 2, source="stream")
    assert (await building.build([key("d")])).value(key("d")) == (2,)
    gate.close()
    resolving = await begun(session.resolve([key("d")]), gate, 2)
    assert shown(await session.revalidate([BASE])) == {BASE: 2}
    gate.open()
    assert shown(await resolving) == {BASE: 2, key("d"): (2,)}


async def test_a_dependency_wanted_late_in_a_forced_refresh_is_not_read_a_second_time() -> None:
    slow = Single("slow", "d", fetch=_in_vain, priority=20)
    stock = Stock("stock", {"base": 1})
    building = builder(slow, stock, Derived("d", needs=lambda k: [BASE]))
    session = building.session()
    await session.resolve([BASE, key("d")])
    stock.change(base=2)
    after = await session.revalidate([BASE], force_refresh=True)
    assert shown(after) == {BASE: 2, key("d"): (2,)}
    assert len(stock.calls) == 2


async def test_a_key_read_twice_in_a_forced_refresh_keeps_the_value_that_others_rest_on() -> None:
    """It is read anew as it was invalidated under way, and the first call ends last."""
    gate, numbers = Gate(), [1, 2, 3]

    async def fetch(k: ResourceKey, context: Any) -> int:
        number = numbers.pop(0)
        if number == 2:
            await gate.pass_()
        return number

    slow = Single("slow", "d", fetch=_in_vain, priority=20)
    building = builder(slow, Single("base", fetch=fetch), Derived("d", needs=lambda k: [BASE]))
    session = building.session()
    await session.resolve([BASE, key("d")])
    after = await begun(session.revalidate([BASE], force_refresh=True), gate)
    await building.publisher.invalidate(BASE)
    await asyncio.sleep(10)
    gate.open()
    assert shown(await after) == {BASE: 3, key("d"): (3,)}


async def _in_vain(key: ResourceKey, context: Any) -> Any:
    await asyncio.sleep(5)
    raise SourceUnavailableError("no")


@pytest.mark.parametrize("wanted", [BASE, key("beside")])
async def test_what_is_pinned_meanwhile_agrees_with_the_new_value(wanted: ResourceKey) -> None:
    """The value that is replaced had been published, and rested on nothing."""
    gate = Gate()
    building = builder(
        Stock("stock", {"base": 1}),
        Derived("d", needs=lambda k: [BASE], before=gate.pass_),
        Derived("beside", needs=lambda k: [BASE]),
    )
    await building.publisher.publish(key("d"), "told", source="stream")
    session = building.session()
    await session.resolve([key("d")])
    revalidating = await begun(session.revalidate([key("d")], force_refresh=True), gate)
    await asyncio.sleep(1)
    await building.publisher.publish(BASE, 2, source="stream")
    await session.resolve([wanted])
    gate.open()
    assert (await revalidating).value(key("d")) == (2,)
    assert shown(await session.resolve([BASE])) == {
        key("d"): (2,),
        wanted: 2 if wanted == BASE else (2,),
        BASE: 2,
    }


async def test_what_is_turned_down_is_in_agreement_with_what_was_pinned_meanwhile() -> None:
    gate = Gate(opened=True)
    shop = Shop()
    shop.stock.before = gate.pass_
    session = await shop.session(BASE)
    gate.close()
    shop.stock.change(base=2)
    policy = SnapshotAcceptancePolicy(ResourceAcceptanceRule(minimum_authority_rank=5))
    again = session.revalidate([BASE], force_refresh=True, acceptance_policy=policy)
    revalidating = asyncio.ensure_future(again)
    await gate.wait_arrived(2)
    assert shown(await session.resolve([MIDDLE])) == {BASE: 1, MIDDLE: (1,)}
    gate.open()
    with pytest.raises(SnapshotAcceptanceError) as refused:
        await revalidating
    assert refused.value.snapshot is not None
    assert shown(refused.value.snapshot) == {BASE: 2, MIDDLE: (2,)}
    assert shown(session.snapshot()) == {BASE: 1, MIDDLE: (1,)}


@pytest.mark.parametrize("first", ["resolve", "revalidate"])
@pytest.mark.parametrize("moment", range(12))
async def test_a_stage_and_a_revalidation_never_mix(first: str, moment: int) -> None:
    shop = Shop()
    session = await shop.session(BASE)
    shop.stock.change(base=2)
    await asyncio.sleep(1)
    calls: dict[str, Callable[[], Coroutine[Any, Any, Snapshot]]] = {
        "resolve": lambda: session.resolve([TOP, MIDDLE]),
        "revalidate": lambda: session.revalidate([BASE], force_refresh=True),
    }
    one = asyncio.ensure_future(calls.pop(first)())
    for _ in range(moment):
        await asyncio.sleep(0)
    (other,) = calls.values()
    for snapshot in await asyncio.gather(one, other()):
        values = shown(snapshot)
        assert values.get(TOP, ((values[BASE],),)) == ((values[BASE],),)
        assert values.get(MIDDLE, (values[BASE],)) == (values[BASE],)
    assert shown(session.snapshot()) == {BASE: 2, TOP: ((2,),), MIDDLE: (2,)}


async def test_revalidations_of_one_session_take_turns() -> None:
    gate = Gate()
    shop = Shop()
    session = await shop.session(BASE, OTHER, TOP)
    shop.stock.before = gate.pass_
    shop.stock.change(base=2, other=20)
    one = await begun(session.revalidate([BASE], force_refresh=True), gate)
    two = await begun(session.revalidate([OTHER], force_refresh=True))
    assert gate.arrived == 1
    gate.open()
    first, second = await asyncio.gather(one, two)
    assert shown(first) == {BASE: 2, OTHER: 10, TOP: ((2,),)}
    assert shown(second) == {BASE: 2, OTHER: 20, TOP: ((2,),)}


# What is reported


async def test_health_counts_revalidations_and_those_that_failed_or_were_cancelled() -> None:
    shop = Shop()
    session = await shop.session(BASE, TOP, OTHER)
    await session.revalidate([BASE], force_refresh=True)
    shop.stock.change(base=SourceUnavailableError("down"))
    await session.revalidate([BASE], force_refresh=True, strict=False)
    gate = Gate()
    shop.stock.before = gate.pass_
    task = await begun(session.revalidate([BASE], force_refresh=True), gate)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    health = await shop.builder.health_snapshot()
    assert (health.revalidation_attempt_count, health.revalidation_failure_count) == (3, 2)
    gate.open()


@pytest.mark.parametrize("others, value", [((), "new"), ((key("d", "other"),), "")])
async def test_a_derived_value_revalidated_rests_on_newer_values_unless_others_rest_on_them_too(
    others: tuple[ResourceKey, ...], value: str
) -> None:
    building = builder(Single("base"), Derived("d", needs=lambda k: [BASE]))
    async with building.session() as session:
        await session.resolve([key("d"), *others])
        await asyncio.sleep(1)
        await building.publisher.publish(BASE, "new", source="stream")
        again = await session.revalidate([key("d")])
        assert {each.value for each in again.values()} == {(value,)}
        assert (await session.resolve([BASE])).value(BASE) == value


@pytest.mark.parametrize("how", ["forced", "published"])
async def test_a_chain_that_is_derived_anew_takes_linear_work(how: str) -> None:
    """What is pinned already is not looked through again, nor what was seen to agree."""

    def needs(k: ResourceKey) -> list[ResourceKey]:
        number = int(k.subject)
        return [key("chain", str(each)) for each in (number - 1, number - 2) if each >= 0] or [BASE]

    class Small(Derived):
        async def derive(self, k: ResourceKey, known: object, context: object) -> str:
            return k.subject

    length = 150
    building = builder(Small("chain", needs=needs), Single("base"))
    async with building.session() as session:
        await session.resolve([key("chain", str(length))])
        await building.publisher.publish(BASE, "event", source="stream")
        renewing = session.revalidate([BASE], force_refresh=how == "forced")
        assert await lines_run(readings, renewing) < 600 * length
