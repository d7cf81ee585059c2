"""What one asks for is what one gets, whoever else waits for it; and its age is that of now."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest

from coalestra import (
    CallableSource,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    PolicyResolver,
    RefreshMode,
    RefreshState,
    ResourceAcceptanceRule,
    ResourceKey,
    SnapshotAcceptanceError,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotBuildError,
    SnapshotRequest,
    SnapshotSession,
    SourceAuthorityPolicy,
    SourcePayload,
    SourceUnavailableError,
)
from tests.contracts.caches import BatchCache
from tests.orchestration.scripted import Batch, Derived, Single, builder, held_at, key
from tests.support import EPOCH, Gate, ManualClock, begun, settle

X, Y, OTHER = key("x"), key("y"), key("other")
SWR = FreshnessPolicy(10, 500, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)


# Joining under other terms --------------------------------------------------------------------


@contextlib.asynccontextmanager
async def waiting_refresh(building: SnapshotBuilder, gate: Gate) -> AsyncIterator[SnapshotSession]:
    """A session that has read X stale, while the refresh of it waits behind a read of OTHER."""
    await asyncio.sleep(20)
    gate.close()
    blocking = await begun(building.build([OTHER]))
    async with building.session() as session:
        assert (await session.resolve([X]))[X].stale, "a refresh is scheduled"
        await settle()
        assert gate.waiting == 1, "and waits"
        yield session
    await blocking
    await building.wait_for_refreshes()


async def test_a_forced_read_that_joins_a_waiting_refresh_accepts_nothing_stale() -> None:
    """The flight was not begun for it, but what it brings must do for it all the same."""
    gate = Gate(opened=True)
    answers = [SourcePayload("old")]

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        await gate.pass_()
        return answers[-1] if k == X else "other"

    source = Single("s", "x", "other", fetch=fetch)
    source.max_concurrency = 1
    building = builder(source, default_policy=SWR)
    await building.build([X])
    async with waiting_refresh(building, gate) as session:
        answers.append(SourcePayload("older still", observed_at=EPOCH))
        looking = await begun(session.revalidate([X], force_refresh=True))
        gate.open()
        with pytest.raises(SnapshotBuildError):
            await looking
        assert session.snapshot()[X].value == "old", "the pinned value stays"


async def test_a_forced_read_that_joins_a_waiting_refresh_yields_to_no_stale_authority() -> None:
    """Whoever insists on what is read now does not get what outranks it from before."""
    gate = Gate(opened=True)
    source = Single("s", "x", "other", fetch=held_at(gate, "read"))
    source.max_concurrency = 1
    ranks = SourceAuthorityPolicy(source_ranks={"stream": 10})
    building = builder(source, default_policy=SWR, authority_policy=ranks)
    await building.publisher.publish(X, "told", source="stream")
    async with waiting_refresh(building, gate) as session:
        looking = await begun(session.revalidate([X], force_refresh=True))
        gate.open()
        assert (await looking)[X].value == "read"


@pytest.mark.late_tasks
async def test_a_key_invalidated_while_its_call_is_planned_is_asked_for_once() -> None:
    """What is still to be read is read after the invalidation: there is no need for another."""
    batch = Batch("s", "x", "y")
    building = builder(batch)
    first = asyncio.ensure_future(building.build([X, Y]))
    await asyncio.sleep(0)
    assert not batch.calls
    await asyncio.gather(building.publisher.invalidate(X), building.build([X, Y]), first)
    assert [sorted(call) for call in batch.calls] == [[X, Y]]
    assert (await building.build([X]))[X].from_cache, "and what it brought was kept"


async def test_what_inherits_from_stale_data_does_not_stand_in_where_nothing_stale_may() -> None:
    """By its own age it would be fresh."""
    strict = FreshnessPolicy(1_000, 2_000, allow_stale_on_error=False)
    answers: list[Any] = [SourcePayload(1)]

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        if not answers:
            raise SourceUnavailableError("down")
        return answers.pop()

    derived = Derived("derived", "x", needs=lambda k: [Y])
    derived.inherit_freshness = True  # type: ignore[attr-defined] # the protocol's optional attribute
    brief = FreshnessPolicy(10, 2_000, allow_stale_on_error=False)
    resolver = PolicyResolver(strict, {Y: brief})
    building = builder(Single("source", "y", fetch=fetch), derived, policy_resolver=resolver)
    await building.build([X])
    await asyncio.sleep(20)
    assert X in (await building.build([X], strict=False)).errors


@pytest.mark.parametrize("own", [False, True], ids=["memory", "own cache"])
@pytest.mark.parametrize(
    "way, is_strict",
    [("alone", True), ("with others", True), ("with others", False), ("in a session", False)],
)
async def test_who_joins_is_served_by_the_policy_that_holds_when_he_comes(
    own: bool, way: str, is_strict: bool
) -> None:
    by_then = FreshnessPolicy(1 if is_strict else 100, 500)
    policies, gate = [FreshnessPolicy(100 if is_strict else 1, 500)], Gate()

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        await gate.pass_()
        return SourcePayload(1, building.clock.now() - 10)

    building = builder(
        Single("source", "x", fetch=fetch),
        Single("other", "y"),
        cache=BatchCache() if own else None,
        policy_resolver=PolicyResolver(by_then, dynamic=lambda _: policies[-1]),
    )
    first = await begun(building.build([X]), gate)
    policies.append(by_then)
    late: dict[str, Any] = {
        "alone": lambda: building.build([X]),
        "with others": lambda: building.build([X, Y]),
        "in a session": lambda: building.session().resolve([X]),
    }
    second = asyncio.ensure_future(late[way]())
    await asyncio.sleep(1)
    gate.open()
    assert (await second)[X].stale == is_strict
    await first
    await building.aclose()


@pytest.mark.parametrize("forced", [True, False])
async def test_a_winner_that_inherits_what_is_stale_is_not_delivered_there(forced: bool) -> None:
    """By its own age it would be fresh."""
    source = Single("source", "y", fetch=_constant(1))
    derived = Derived("derived", "x", needs=lambda k: [Y])
    derived.inherit_freshness = True  # type: ignore[attr-defined] # the protocol's optional attribute
    lasting = FreshnessPolicy(1_000, 2_000, allow_stale_on_error=forced)
    building = builder(
        derived,
        source,
        Single("rest", "x", fetch=_constant("rest"), priority=1),
        policy_resolver=PolicyResolver(lasting, {Y: FreshnessPolicy(10, 2_000)}),
        authority_policy=SourceAuthorityPolicy(source_ranks={"derived": 10}),
    )
    derived.names = ()
    async with building.session() as session:
        if forced:
            await session.resolve([X])
            await building.cache.invalidate(X)
        derived.names = ("x",)
        building.clear_source_support_cache()
        assert (await building.build([X]))[X].value == (1,)
        derived.names = ()
        building.clear_source_support_cache()
        await asyncio.sleep(20)
        wanted = session.revalidate([X], force_refresh=True) if forced else building.build([X])
        value = (await wanted)[X]
    assert (value.value, value.stale) == ("rest", False)


async def test_a_refresh_whose_value_is_outranked_by_a_stale_one_has_failed() -> None:
    building = builder(
        Single("rest", "x", fetch=_constant("rest")),
        default_policy=SWR,
        authority_policy=SourceAuthorityPolicy(source_ranks={"stream": 10}),
    )
    await building.publisher.publish(X, "told", source="stream")
    await asyncio.sleep(20)
    async with building.session() as session:
        assert (await session.resolve([X]))[X].refresh is RefreshState.UNDER_WAY
        await building.wait_for_refreshes()
        counted = session.snapshot().diagnostics
        assert (counted.refresh_completed, counted.refresh_failed) == (0, 1)
    value = (await building.build([X]))[X]
    assert (value.value, value.stale, value.refresh) == ("told", True, RefreshState.FAILING)
    assert value.metadata["refresh_error"] == (
        "test:x is still stale, as what 'stream' has said of it outranks what is fresh"
    )
    await building.wait_for_refreshes()
    await building.publisher.publish(X, "told again", source="stream")
    assert (await building.build([X]))[X].refresh is RefreshState.NONE


def _constant(value: Any) -> Any:
    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        return value

    return fetch


@pytest.mark.parametrize("found", [True, False])
async def test_a_deadline_that_passes_while_calls_are_planned_is_named(
    monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    """It is no lack of sources, and if there is one nobody had the time to find that out."""
    loop = asyncio.get_running_loop()
    genuine = loop.time

    class Slow(Single):
        def supports(self, k: ResourceKey) -> bool:
            monkeypatch.setattr(loop, "time", lambda: genuine() + 5.0)
            return found

    building = builder(Slow("s"))
    waiting = await begun(building.build([X, Y], strict=False, deadline_seconds=2))
    monkeypatch.undo()
    snapshot = await waiting
    for each in (X, Y):
        assert "the deadline of 2 s passed" in str(snapshot.error_for(each))


async def test_a_derivation_that_took_in_what_was_invalidated_is_not_stored() -> None:
    """It ends for those who wait for it, and for nobody else."""
    gate = Gate()
    derived = Derived("sum", needs=lambda k: [X], before=gate.pass_)
    cache = BatchCache()
    building = builder(Single("s", "x"), derived, cache=cache)
    waiting = await begun(building.build([key("sum")]), gate)
    await building.publisher.invalidate(X)
    gate.open()
    assert key("sum") in await waiting
    await settle()
    assert key("sum") not in cache.held


# Ages -----------------------------------------------------------------------------------------


async def test_what_is_pinned_out_of_sight_is_told_as_old_as_it_is() -> None:
    derived = Derived("sum", needs=lambda k: [X])
    building = builder(Single("s", "x"), derived, default_policy=FreshnessPolicy(50, 500))
    await building.build([X])
    await asyncio.sleep(40)
    async with building.session() as session:
        await session.resolve([key("sum")])
        await asyncio.sleep(60)
        value = (await session.resolve([X]))[X]
    assert (value.age_seconds, value.stale) == (100, True)


async def test_a_quick_value_grows_old_while_it_waits_for_a_slow_one() -> None:
    async def slow(k: ResourceKey, context: FetchContext) -> int:
        await asyncio.sleep(3)
        return 1

    building = builder(
        Single("quick", "x"), Single("slow", "y", fetch=slow), default_policy=FreshnessPolicy(2, 9)
    )
    snapshot = await building.build([X, Y])
    assert {k: (v.age_seconds, v.stale) for k, v in snapshot.items()} == {
        X: (3, True),
        Y: (0, False),
    }
    rule = ResourceAcceptanceRule(allow_stale=False)
    request = SnapshotRequest(
        required=[X, Y], acceptance_policy=SnapshotAcceptancePolicy(default_rule=rule)
    )
    await building.publisher.invalidate_many([X, Y])
    with pytest.raises(SnapshotAcceptanceError):
        await building.build_request(request)


# Order and what is left of a deadline ---------------------------------------------------------


async def test_ages_are_told_when_all_has_been_copied() -> None:
    """A copy that takes a while makes its companions older, and itself."""
    clock = ManualClock()

    def copier(value: Any) -> Any:
        clock.advance(0.5)
        return value

    building = builder(
        Batch("s", "x", "y"), default_policy=FreshnessPolicy(1, 500), clock=clock,
        payload_copier=copier, run_payload_copies_in_thread=False,
    )  # fmt: skip
    await building.build([X, Y])
    snapshot = await building.build([X, Y])
    ages = {value.age_seconds for value in snapshot.values()}
    assert ages == {clock.now() - snapshot[X].observed_at}
    assert snapshot.stale_keys == (X, Y)


@pytest.mark.expects_leaks  # that the clock was wrong is told to the loop
@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
async def test_a_clock_that_is_at_a_loss_dates_no_value(nonsense: float) -> None:
    """What it said for a moment would count as fresh for ever."""
    clock = ManualClock()
    building = builder(Single("s", "x"), default_policy=FreshnessPolicy(1, 9), clock=clock)
    sane = clock.now()
    clock.set_wall(nonsense)
    with pytest.raises(Exception, match="must be a finite number of seconds"):
        await building.build([X])
    with pytest.raises(Exception, match="must be a finite number of seconds"):
        await building.publisher.publish(X, 1, source="stream")
    clock.set_wall(sane)
    value = (await building.build([X]))[X]
    assert (value.observed_at, value.from_cache) == (sane, False)


async def test_nothing_takes_less_than_no_time_where_the_monotonic_clock_runs_back() -> None:
    """As one does that is no such clock; neither a value, nor the snapshot, nor health says so."""
    clock, metrics = ManualClock(), InMemoryMetrics()

    def back(asked: ResourceKey, _: FetchContext) -> str:
        clock.advance(-3)
        return asked.name

    source = CallableSource(
        name="s", priority=1, supports=lambda _: True, fetcher=back, run_sync_in_thread=False
    )
    building = builder(source, clock=clock, metrics=metrics)
    snapshot = await building.build([X])
    assert snapshot[X].latency_ms == snapshot.diagnostics.duration_ms == 0.0
    assert snapshot.diagnostics.source_latency_ms_by_source == {"s": 0.0}
    taken = metrics.summary("source_fetch_latency_ms", source="s")
    assert taken is not None
    assert taken.minimum == 0.0
    health = await building.health_snapshot()
    assert health.sources["s"].seconds_since_success == 0.0


@pytest.mark.parametrize("how", ["publish", "force"])
async def test_a_hung_refresh_keeps_no_later_one_away(how: str) -> None:
    """Once its answer cannot count any more, another may be asked for."""
    gates = [Gate(opened=True)]

    async def fetch(k: ResourceKey, context: FetchContext) -> int:
        await gates[-1].pass_()
        return len(gates)

    building = builder(Single("s", "x", fetch=fetch), default_policy=SWR)
    await building.build([X])
    await asyncio.sleep(20)
    gates.append(Gate())
    assert (await building.build([X]))[X].metadata["refresh_scheduled"]
    await settle()
    hung = gates[-1]
    gates.append(Gate(opened=True))
    if how == "publish":
        await building.publisher.publish(X, 9, source="stream")
    else:
        async with building.session() as session:
            await session.resolve([X])
            await session.revalidate([X], force_refresh=True)
    await asyncio.sleep(20)
    assert (await building.build([X]))[X].metadata["refresh_scheduled"], "another one"
    hung.open()
    await building.wait_for_refreshes()


# Whether a new value is on its way, or its source is down ------------------------------------


class Refreshed:
    """One key that is served stale while it is refreshed, from a source that can go down."""

    def __init__(self, policy: FreshnessPolicy = SWR, **settings: Any) -> None:
        self.down: Exception | None = None
        self.clock = ManualClock()
        self.source = Single("s", "x", "y", fetch=self._fetch)
        self.builder = builder(self.source, default_policy=policy, clock=self.clock, **settings)

    async def _fetch(self, k: ResourceKey, context: FetchContext) -> Any:
        if self.down is not None:
            raise self.down
        return len(self.source.calls)

    async def state(self, k: ResourceKey = X, *, then_wait: bool = True) -> RefreshState:
        value = (await self.builder.build([k]))[k]
        assert value.to_dict()["refresh"] == value.refresh.value
        assert ("refresh_error_type" in value.metadata) is (value.refresh is RefreshState.FAILING)
        if then_wait:
            await self.builder.wait_for_refreshes()
        return value.refresh

    async def fail(self) -> None:
        """Grow old as the source goes down, and be refreshed in vain."""
        await self.state()
        self.down = ConnectionError("no route")
        self.clock.advance(20)
        await self.state()

    async def failing(self) -> int:
        return (await self.builder.health_snapshot()).failing_refreshes


NOTHING, UNDER_WAY, FAILING = RefreshState.NONE, RefreshState.UNDER_WAY, RefreshState.FAILING


async def test_a_stale_value_says_whether_it_is_being_refreshed_or_its_source_is_down() -> None:
    it = Refreshed()
    assert await it.state() is NOTHING
    it.clock.advance(20)
    assert await it.state(then_wait=False) is UNDER_WAY
    assert await it.state() is UNDER_WAY, "somebody else has set it off"
    assert await it.state() is NOTHING
    it.down = ConnectionError("no route")
    it.clock.advance(20)
    assert await it.state() is UNDER_WAY
    assert await it.failing() == 1
    for _ in range(5):  # by then the circuit is open
        assert await it.state() is FAILING
    value = (await it.builder.build([X]))[X]
    assert value.metadata["refresh_error_type"] == "ResourceResolutionError"
    assert "CircuitOpenError" in value.metadata["refresh_error"]
    assert "The last refresh of it has failed" in (await it.builder.build([X])).explain(X)


async def test_it_is_no_longer_failing_once_a_refresh_has_succeeded() -> None:
    it = Refreshed()
    await it.fail()
    it.down = None
    assert await it.state() is FAILING, "the next one is under way, and not yet there"
    assert await it.state() is NOTHING
    assert await it.failing() == 0
    it.clock.advance(20)
    assert await it.state() is UNDER_WAY


async def test_another_value_of_the_key_has_no_failed_refresh_nor_has_none() -> None:
    for renew in ("publish", "force", "clear", "build"):
        it = Refreshed()
        await it.fail()
        assert await it.failing() == 1
        it.down = None
        if renew == "publish":
            await it.builder.publisher.publish(X, "event", source="stream")
        elif renew == "force":
            async with it.builder.session() as session:
                await session.resolve([X])
                await session.revalidate([X], force_refresh=True)
        elif renew == "clear":
            await it.builder.publisher.cache.clear()
            assert await it.failing() == 0
            await it.builder.build([X])
        else:
            await it.builder.publisher.invalidate(X)
            await it.builder.build([X])
        assert await it.failing() == 0
        await it.builder.wait_for_refreshes()
        it.clock.advance(20)
        assert await it.state() is UNDER_WAY


@pytest.mark.parametrize(
    "policy, own",
    [(FreshnessPolicy(10, 500, True, RefreshMode.REFRESH_AHEAD, 5), False), (SWR, True)],
)
async def test_a_failed_refresh_of_any_kind_is_told_too(policy: FreshnessPolicy, own: bool) -> None:
    it = Refreshed(policy, cache=BatchCache() if own else None)
    await it.state()
    it.clock.advance(20 if own else 6)
    it.down = ConnectionError("no route")
    assert await it.state() is UNDER_WAY
    assert await it.state() is FAILING


async def test_failed_refreshes_are_remembered_of_a_bounded_number_of_keys() -> None:
    it = Refreshed()
    keys = [key("x", str(number)) for number in range(1_100)]
    await it.builder.build(keys)
    it.down = ConnectionError("no route")
    it.clock.advance(20)
    await it.builder.build(keys)
    await it.builder.wait_for_refreshes()
    assert await it.failing() == 1_000
