"""How a key comes by its value: cache, sources in turn, stale values, refreshes (section 4)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    CacheLookup,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    PolicyResolver,
    RefreshMode,
    ResourceKey,
    ResourceResolutionError,
    Snapshot,
    SnapshotBuildError,
    SnapshotValue,
    SourceAuthorityPolicy,
    SourcePayload,
    SourceUnavailableError,
)
from tests.contracts.caches import SingleKeyCache
from tests.orchestration.scripted import LASTING, Derived, Single, builder, down, key
from tests.orchestration.stock import BASE, MIDDLE, OTHER, Shop, Stock, shown
from tests.support import EPOCH, Gate, begun, settle

BLOCKING = FreshnessPolicy(10.0, 100.0)
SWR = FreshnessPolicy(10.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
AHEAD = FreshnessPolicy(
    10.0, 100.0, refresh_mode=RefreshMode.REFRESH_AHEAD, refresh_ahead_seconds=4.0
)
DOWN = SourceUnavailableError("down")


def old(value: Any, age: float) -> Any:
    """A fetch that answers with a value observed `age` seconds ago."""

    async def fetch(key: ResourceKey, context: FetchContext) -> SourcePayload[Any]:
        return SourcePayload(value, observed_at=context.requested_at - age)

    return fetch


async def refused(building: Any, *keys: ResourceKey) -> Mapping[ResourceKey, Exception]:
    """The errors of a strict build that must fail."""
    with pytest.raises(SnapshotBuildError) as caught:
        await building.build(keys)
    return caught.value.errors


async def gone_stale(*keys: ResourceKey, **settings: Any) -> tuple[Shop, Gate]:
    """A shop whose cached values are stale by now, and the gate at which its next calls wait."""
    gate = Gate(opened=True)
    shop = Shop(default_policy=SWR, **settings)
    shop.stock.before = gate.pass_
    await shop.builder.build(keys or [BASE])
    await asyncio.sleep(11)
    gate.close()
    return shop, gate


async def asked(answer: Any = 1, **settings: Any) -> tuple[Shop, Gate, asyncio.Future[Snapshot]]:
    """A shop, the gate at which its source is about to answer so, and who reads from it."""
    gate = Gate()
    shop = Shop(**settings)
    shop.stock.before = gate.pass_
    shop.stock.change(base=answer)
    reader = await begun(shop.builder.build([BASE]), gate)
    return shop, gate, reader


# What the cache answers


class KeepingCache(SingleKeyCache):
    """Takes no time, and calls everything usable that it holds, however old."""

    def _lookup(self, key: ResourceKey, now: float, policy: FreshnessPolicy) -> CacheLookup:
        found = super()._lookup(key, now, policy)
        return CacheLookup(found.value, found.fresh, found.value is not None, found.age_seconds)

    async def _travel(self, call: str) -> None:
        self.calls.append(call)


@pytest.mark.parametrize("age", [0.0, 5.0, 10.0])
async def test_a_cached_value_up_to_its_time_to_live_is_served_without_a_call(age: float) -> None:
    shop = Shop(default_policy=BLOCKING)
    await shop.builder.build([BASE])
    await asyncio.sleep(age)
    snapshot = await shop.builder.build([BASE])
    value = snapshot[BASE]
    assert (value.from_cache, value.stale, value.value) == (True, False, 1)
    assert value.age_seconds == pytest.approx(age)
    assert dict(value.metadata) == {}
    assert (snapshot.diagnostics.cache_hits, snapshot.diagnostics.cache_misses) == (1, 0)
    assert len(shop.stock.calls) == 1


async def test_a_stale_value_is_a_miss_unless_the_policy_revalidates_in_the_background() -> None:
    shop = Shop(default_policy=BLOCKING)
    await shop.builder.build([BASE])
    await asyncio.sleep(10.5)
    shop.stock.change(base=2)
    snapshot = await shop.builder.build([BASE])
    assert (snapshot.value(BASE), snapshot[BASE].from_cache) == (2, False)
    assert (snapshot.diagnostics.cache_hits, snapshot.diagnostics.cache_misses) == (0, 1)


@pytest.mark.parametrize("age, served", [(10.5, True), (100.0, True), (100.5, False)])
@pytest.mark.parametrize("make", [AsyncMemoryCache, KeepingCache])
async def test_stale_while_revalidate_has_its_bounds(age: float, served: bool, make: Any) -> None:
    shop = Shop(default_policy=SWR, cache=make())
    await shop.builder.build([BASE])
    await asyncio.sleep(age)
    shop.stock.change(base=2)
    snapshot = await shop.builder.build([BASE])
    value = snapshot[BASE]
    assert (value.value, value.stale) == ((1, True) if served else (2, False))
    assert snapshot.diagnostics.refresh_scheduled == served
    if served:
        assert value.metadata == {
            "refresh_mode": "stale_while_revalidate",
            "refresh_scheduled": True,
        }
        assert snapshot.stale_keys == (BASE,)
    await shop.builder.wait_for_refreshes()
    assert (await shop.builder.build([BASE])).value(BASE) == 2


@pytest.mark.parametrize("age, ahead", [(0.0, False), (5.5, False), (6.0, True), (10.0, True)])
async def test_refresh_ahead_renews_inside_its_window_only(age: float, ahead: bool) -> None:
    shop = Shop(default_policy=AHEAD)
    await shop.builder.build([BASE])
    await asyncio.sleep(age)
    shop.stock.change(base=2)
    value = (await shop.builder.build([BASE]))[BASE]
    assert (value.value, value.stale, value.from_cache) == (1, False, True)
    assert dict(value.metadata) == ({"refresh_scheduled": True} if ahead else {})
    await shop.builder.wait_for_refreshes()
    assert (await shop.builder.build([BASE])).value(BASE) == (2 if ahead else 1)


class Eager(FreshnessPolicy):
    """Has everything renewed ahead that is asked for."""

    def should_refresh_ahead(self, age_seconds: float) -> bool:
        return True


async def test_a_policy_of_ones_own_says_when_to_refresh_ahead() -> None:
    eager = Eager(10.0, 100.0, refresh_mode=RefreshMode.REFRESH_AHEAD, refresh_ahead_seconds=4.0)
    shop = Shop(default_policy=eager)
    await shop.builder.build([BASE])
    value = (await shop.builder.build([BASE]))[BASE]
    assert dict(value.metadata) == {"refresh_scheduled": True}
    await shop.builder.wait_for_refreshes()


# Policies


class Odd:
    """A resolver that raises for one key."""

    def __init__(self, key: ResourceKey) -> None:
        self.key = key

    def __call__(self, key: ResourceKey) -> FreshnessPolicy:
        if key == self.key:
            raise LookupError(f"no policy for {key.name}")
        return LASTING


async def test_a_policy_that_raises_for_a_dependency_fails_what_is_derived_from_it() -> None:
    shop = Shop(policy_resolver=PolicyResolver(LASTING, dynamic=Odd(BASE)))
    errors = await refused(shop.builder, MIDDLE)
    assert "no policy for base" in str(errors[MIDDLE])


# Sources in turn


async def test_the_first_fresh_value_wins_and_goes_to_the_cache() -> None:
    first = Single("first", "x", fetch=down, priority=3)
    second = Single("second", "x", priority=2)
    third = Single("third", "x", priority=1)
    building = builder(first, second, third)
    value = (await building.build([key("x", "v")]))[key("x", "v")]
    assert (value.source, value.value, value.from_cache) == ("second", "v", False)
    assert (await building.build([key("x", "v")]))[key("x", "v")].from_cache
    assert (len(first.calls), len(second.calls), len(third.calls)) == (1, 1, 0)


async def test_strict_raises_with_errors_and_partial_snapshot_and_lenient_returns_them() -> None:
    shop = Shop()
    shop.stock.change(other=DOWN)
    with pytest.raises(SnapshotBuildError) as caught:
        await shop.builder.build([BASE, OTHER])
    assert set(caught.value.errors) == {OTHER}
    assert caught.value.snapshot is not None
    assert shown(caught.value.snapshot) == {BASE: 1}
    snapshot = await shop.builder.build([OTHER, BASE], strict=False)
    assert set(snapshot.errors) == {OTHER}
    assert (list(snapshot), snapshot.complete) == ([BASE], False)


# Stale values stand in


async def test_a_stale_payload_is_a_failure_of_its_source_and_the_next_is_tried() -> None:
    building = builder(
        Single("lags", "x", fetch=old("past", 20), priority=2),
        Single("keeps", "x", fetch=old("present", 5), priority=1),
        default_policy=BLOCKING,
    )
    assert (await building.build([key("x")]))[key("x")].source == "keeps"
    alone = builder(Single("lags", "x", fetch=old("past", 200)), default_policy=BLOCKING)
    error = (await refused(alone, key("x")))[key("x")]
    assert isinstance(error, ResourceResolutionError)
    assert [each.error_type for each in error.failures] == ["StaleSourceData"]


@pytest.mark.parametrize("ages", [(20, 30), (30, 20)])
async def test_the_newest_stale_payload_stands_in_when_all_fail(ages: tuple[int, int]) -> None:
    building = builder(
        Single("one", "x", fetch=old("one", ages[0]), priority=3),
        Single("two", "x", fetch=old("two", ages[1]), priority=2),
        Single("down", "x", fetch=down, priority=1),
        default_policy=BLOCKING,
    )
    snapshot = await building.build([key("x")])
    value = snapshot[key("x")]
    assert value.source == ("one" if ages[0] < ages[1] else "two")
    assert (value.stale, value.from_cache, value.age_seconds) == (True, False, 20)
    assert snapshot.stale_keys == (key("x"),)
    assert (await building.build([key("x")]))[key("x")].from_cache, "it is kept to stand in again"


@pytest.mark.parametrize("age_of_payload, from_cache", [(15, True), (11, False)])
@pytest.mark.parametrize("make", [AsyncMemoryCache, SingleKeyCache])
async def test_cached_and_fetched_candidates_compete_by_their_observation(
    age_of_payload: float, from_cache: bool, make: Any
) -> None:
    stock = Stock("stock", {"base": "cached"})
    building = builder(stock, default_policy=BLOCKING, cache=make())
    await building.build([BASE])
    await asyncio.sleep(12)
    stock.change(base=SourcePayload("fetched", observed_at=EPOCH + 12 - age_of_payload))
    value = (await building.build([BASE]))[BASE]
    assert value.value == ("cached" if from_cache else "fetched")
    assert (value.from_cache, value.stale) == (from_cache, True)
    await building.aclose()


async def test_a_stand_in_tells_what_it_stands_in_for() -> None:
    shop = Shop(default_policy=BLOCKING)
    await shop.builder.build([BASE])
    await asyncio.sleep(50)
    shop.stock.change(base=DOWN)
    value = (await shop.builder.build([BASE]))[BASE]
    assert value.metadata["fallback_error_type"] == "ResourceResolutionError"
    assert "down" in value.metadata["fallback_error"]
    assert (value.from_cache, value.stale, value.age_seconds) == (True, True, 50)


@pytest.mark.parametrize("source_answers_stale", [True, False])
async def test_nothing_stands_in_where_no_policy_allows_it(source_answers_stale: bool) -> None:
    shop = Shop(default_policy=FreshnessPolicy(10.0, 100.0, allow_stale_on_error=False))
    await shop.builder.build([BASE])
    await asyncio.sleep(50)
    late = SourcePayload(2, observed_at=EPOCH + 30)
    shop.stock.change(base=late if source_answers_stale else DOWN)
    error = (await refused(shop.builder, BASE))[BASE]
    assert isinstance(error, ResourceResolutionError)
    wanted = "StaleSourceData" if source_answers_stale else "SourceUnavailableError"
    assert [each.error_type for each in error.failures] == [wanted]


@pytest.mark.parametrize("wait, stands_in", [(0, True), (20, True), (0, False)])
async def test_a_published_value_serves_those_who_wait_for_failing_sources(
    wait: float, stands_in: bool
) -> None:
    """One that is stale by now stands in as such; a fresh one is served whatever may stand in."""
    policy = FreshnessPolicy(10.0, 100.0, allow_stale_on_error=stands_in)
    shop, gate, reader = await asked(DOWN, default_policy=policy)
    await shop.builder.publisher.publish(BASE, "event", source="stream")
    await asyncio.sleep(wait)
    gate.open()
    value = (await reader)[BASE]
    assert (value.value, value.stale, value.from_cache) == ("event", wait > 0, True)
    fallback = "ResourceResolutionError" if wait else None
    assert value.metadata.get("fallback_error_type") == fallback


# Losing to a higher authority


STREAM_FIRST = SourceAuthorityPolicy({"stream": 10})


async def published_then_fetched(policy: FreshnessPolicy, wait: float) -> SnapshotValue[Any]:
    """What a read gets `wait` seconds after an event of higher authority."""
    shop = Shop(default_policy=policy, authority_policy=STREAM_FIRST)
    await shop.builder.publisher.publish(BASE, "event", source="stream")
    await asyncio.sleep(wait)
    snapshot = await shop.builder.build([BASE])
    assert shop.stock.calls == [BASE]
    return snapshot[BASE]


async def test_a_winner_that_may_not_be_used_any_more_does_not_replace_the_value() -> None:
    value = await published_then_fetched(BLOCKING, 101)
    assert (value.value, value.source, value.stale) == (1, "stock", False)
    assert "superseded_source" not in value.metadata


async def test_a_fresh_event_that_came_during_the_call_replaces_its_undated_value() -> None:
    shop, gate, reader = await asked(default_policy=BLOCKING, authority_policy=STREAM_FIRST)
    await shop.builder.publisher.publish(BASE, "event", source="stream")
    gate.open()
    value = (await reader)[BASE]
    assert (value.value, value.metadata["superseded_source"]) == ("event", "stock")


# Refreshes


@pytest.mark.parametrize(
    "policy, age, reason", [(SWR, 11, "stale_while_revalidate"), (AHEAD, 7, "refresh_ahead")]
)
async def test_a_refresh_tells_its_source_whose_and_why_it_is(
    policy: FreshnessPolicy, age: float, reason: str
) -> None:
    seen: list[FetchContext] = []

    async def fetch(key: ResourceKey, context: FetchContext) -> int:
        seen.append(context)
        return 1

    building = builder(Single("base", fetch=fetch), default_policy=policy)
    await building.build([BASE])
    await asyncio.sleep(age)
    snapshot = await building.build([BASE], metadata={"tenant": "a"}, deadline_seconds=3)
    await building.wait_for_refreshes()
    context = seen[1]
    assert context.metadata == {
        "background_refresh": True,
        "refresh_reason": reason,
        "parent_snapshot_id": snapshot.snapshot_id,
    }
    assert (context.deadline_at, context.deadline_monotonic) == (None, None)
    assert context.snapshot_id not in ("", None, snapshot.snapshot_id)
    assert context.requested_at == EPOCH + age


@pytest.mark.parametrize("answer", [DOWN, SourcePayload(2, observed_at=EPOCH - 20)])
async def test_a_refresh_without_a_fresh_value_fails_and_leaves_the_cache(answer: Any) -> None:
    metrics = InMemoryMetrics()
    shop = Shop(default_policy=SWR, metrics=metrics)
    first = await shop.builder.build([BASE])
    await asyncio.sleep(11)
    shop.stock.change(base=answer)
    await shop.builder.build([BASE])
    await shop.builder.wait_for_refreshes()
    again = await shop.builder.build([BASE])
    assert (again.value(BASE), again[BASE].version) == (1, first[BASE].version)
    await shop.builder.wait_for_refreshes()
    labels = {"resource_namespace": "test", "resource_name": "base"}
    counts = {
        status: metrics.counter("resource_refresh_total", status=status, **labels)
        for status in ("scheduled", "success", "failure", "cancelled")
    }
    assert counts == {"scheduled": 2, "success": 0, "failure": 2, "cancelled": 0}


async def test_who_waits_for_refreshes_may_be_cancelled_and_they_go_on() -> None:
    shop, gate = await gone_stale()
    shop.stock.change(base=2)
    await shop.builder.build([BASE])
    waiters = [asyncio.ensure_future(shop.builder.wait_for_refreshes()) for _ in range(3)]
    await gate.wait_arrived(2)
    waiters[0].cancel()
    await settle()
    waiters[1].cancel()
    gate.open()
    await waiters[2]
    await asyncio.gather(*waiters, return_exceptions=True)
    assert [each.cancelled() for each in waiters[:2]] == [True, True]
    assert (await shop.builder.build([BASE])).value(BASE) == 2


# What a build is asked with, and what sources are told


async def test_every_build_has_an_id_of_its_own_unless_it_is_given_one() -> None:
    shop = Shop()
    ids = [(await shop.builder.build([BASE])).snapshot_id for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(int(each, 16) >= 0 for each in ids)
    assert (await shop.builder.build([BASE], snapshot_id="mine")).snapshot_id == "mine"


@pytest.mark.parametrize("deadline", [None, 5.0])
async def test_sources_are_told_when_and_for_whom_they_are_asked(deadline: float | None) -> None:
    seen: list[FetchContext] = []

    async def fetch(key: ResourceKey, context: FetchContext) -> int:
        seen.append(context)
        return 1

    derived = Derived("d", needs=lambda k: [BASE])
    building = builder(Single("base", fetch=fetch), derived)
    metadata = {"tenant": "a"}
    await asyncio.sleep(2)
    monotonic = building.clock.monotonic()
    snapshot = await building.build(
        [key("d")], deadline_seconds=deadline, metadata=metadata, snapshot_id="s"
    )
    metadata["tenant"] = "changed"
    (context,) = seen
    assert (context.requested_at, context.snapshot_id) == (EPOCH + 2, "s")
    assert dict(context.metadata) == {"tenant": "a"}
    assert snapshot.created_at == EPOCH + 2
    if deadline is None:
        assert (context.deadline_at, context.deadline_monotonic) == (None, None)
    else:
        assert context.deadline_at == EPOCH + 7
        assert context.deadline_monotonic == pytest.approx(monotonic + 5)
    with pytest.raises(TypeError):
        context.metadata["x"] = 1  # type: ignore[index]


# Reads of a cache that take their time


class OneSlowRead(SingleKeyCache):
    """Reads at once, but hands over what it found for `slow` only after the gate, once."""

    timeout_seconds = 60.0

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.slow: ResourceKey | None = None

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        found = self._lookup(key, now, policy)
        if key == self.slow:
            self.slow = None
            await self.gate.pass_()
        return found


async def test_a_read_that_found_nothing_usable_takes_what_a_refresh_brought_meanwhile() -> None:
    gate = Gate(opened=True)
    cache = OneSlowRead()
    shop = Shop(default_policy=SWR, cache=cache)
    shop.stock.before = gate.pass_
    await shop.builder.build([BASE])
    await asyncio.sleep(11)
    gate.close()
    shop.stock.change(base=2)
    await shop.builder.build([BASE])
    await gate.wait_arrived(2)
    await asyncio.sleep(100)
    cache.slow = BASE
    reader = await begun(shop.builder.build([BASE]), cache.gate)
    gate.open()
    await shop.builder.wait_for_refreshes()
    cache.gate.open()
    assert (await reader).value(BASE) == 2
    assert len(shop.stock.calls) == 2


async def test_a_derivation_reads_again_what_was_published_while_it_read() -> None:
    cache = OneSlowRead()
    shop = Shop(cache=cache)
    await shop.builder.build([BASE])
    cache.slow = BASE
    reader = await begun(shop.builder.build([MIDDLE]), cache.gate)
    await shop.publish(BASE, "event")
    cache.gate.open()
    assert (await reader).value(MIDDLE) == ("event",)
    assert len(shop.stock.calls) == 1


# Refreshes given up at any moment


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("count", [1, 200])
async def test_refreshes_may_be_given_up_at_any_step(steps: int, count: int) -> None:
    metrics = InMemoryMetrics()
    building = builder(Single("x"), default_policy=SWR, metrics=metrics)
    keys = [key("x", str(i)) for i in range(count)]
    await building.build(keys)
    await asyncio.sleep(11)
    reader = asyncio.ensure_future(building.build(keys))
    waiter = asyncio.ensure_future(building.wait_for_refreshes())
    for _ in range(steps):
        await asyncio.sleep(0)
    await building.aclose(cancel_refreshes=True)
    await asyncio.gather(reader, waiter, return_exceptions=True)
    labels = {"resource_namespace": "test", "resource_name": "x"}
    ended = {
        status: metrics.counter("resource_refresh_total", status=status, **labels)
        for status in ("scheduled", "success", "failure", "cancelled")
    }
    scheduled = ended.pop("scheduled")
    assert sum(ended.values()) == scheduled
    assert ended["failure"] == 0
    assert (await building.health_snapshot()).background_refreshes == 0


async def test_waiting_for_several_refreshes_ends_with_the_last_of_them() -> None:
    shop, gate = await gone_stale(BASE, OTHER)
    await shop.builder.build([BASE, OTHER])
    waiting = await begun(shop.builder.wait_for_refreshes(), gate, 4)
    gate.let_through(1)
    await settle()
    assert not waiting.done()
    gate.open()
    await waiting
