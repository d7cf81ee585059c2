"""Builds work the same over any cache, whatever it can do and however long it takes (section 7)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import pytest

from coalestra import (
    AtomicAsyncCache,
    BatchAtomicAsyncCache,
    CacheLookup,
    FetchContext,
    FreshnessPolicy,
    LeasedLookup,
    ResourceKey,
    ResourceUpdate,
    SourcePayload,
)
from coalestra import LeasingCache as LeasingCacheProtocol
from coalestra.concurrency import pace
from coalestra.orchestration import foreign_cache, singleflight
from tests.contracts.caches import (
    ALL,
    AtomicCache,
    BatchAtomicCache,
    BatchCache,
    LeasingCache,
    SingleKeyCache,
    WrappedMemoryCache,
)
from tests.contracts.samples import value_of
from tests.orchestration.scripted import Batch, Derived, Single, builder, key
from tests.orchestration.stock import BASE, MIDDLE, OTHER, TOP, Shop, shown
from tests.support import (
    EPOCH,
    LoopClock,
    ThreadGate,
    cancel_at_every_await,
    no_leaks,
)

Make = Callable[[], Any]
SHORT = FreshnessPolicy(10.0, 100.0)

every_cache = pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
# What is the same for all


@every_cache
async def test_sessions_pin_and_revalidate_over_any_cache(make: Make) -> None:
    shop = Shop(cache=make())
    session = await shop.session(BASE, TOP)
    await shop.publish(BASE, 2)
    assert shown(await session.resolve([MIDDLE])) == {BASE: 1, TOP: ((1,),), MIDDLE: (1,)}
    after = await session.revalidate([BASE])
    assert shown(after) == {BASE: 2, TOP: ((2,),), MIDDLE: (2,)}
    shop.stock.change(base=3)
    await asyncio.sleep(1)
    forced = await session.revalidate([BASE], force_refresh=True)
    assert shown(forced) == {BASE: 3, TOP: ((3,),), MIDDLE: (3,)}
    assert (await shop.builder.build([TOP])).value(TOP) == ((3,),)


@pytest.mark.parametrize("make", [
    each if each in (SingleKeyCache, BatchAtomicCache, WrappedMemoryCache)
    else pytest.param(each, marks=pytest.mark.slow)
    for each in ALL
])  # fmt: skip
async def test_cancelling_a_build_at_any_await_leaves_nothing_behind(make: Make) -> None:
    shops: list[Shop] = []

    async def work() -> None:
        shop = Shop(cache=make())
        shops.append(shop)
        await shop.builder.build([MIDDLE, OTHER])
        await shop.builder.publisher.publish(BASE, 1, source="s", force=True)

    async def check() -> None:
        if shops:
            shop = shops.pop()
            assert (await shop.builder.build([TOP])).value(TOP) == ((1,),)
            await no_leaks(shop.builder)
            await shop.builder.aclose()

    assert await cancel_at_every_await(work, check) > 2


# Capabilities are used


class OrderlyCache(BatchAtomicCache):
    """Says that it knows the write order itself."""

    validates_write_order = True


class ProtocolsOnly(SingleKeyCache, AtomicAsyncCache, BatchAtomicAsyncCache, LeasingCacheProtocol):
    """Derives from protocols whose methods it does not have: there they do nothing."""


@pytest.mark.parametrize("make, expected", [
    (SingleKeyCache, {"get", "set"}), (ProtocolsOnly, {"get", "set"}),
    (BatchCache, {"get_many", "set_many"}),
    (AtomicCache, {"get", "set_if_newer"}), (BatchAtomicCache, {"get_many", "set_many_if_newer"}),
    (OrderlyCache, {"get_many", "set_many_if_newer"}),
])  # fmt: skip
async def test_reads_and_writes_use_the_widest_methods(make: Make, expected: set[str]) -> None:
    cache = make()
    await builder(Batch("b"), cache=cache).build([key("b", str(n)) for n in range(4)])
    used = set(cache.calls)
    assert expected <= used
    if "get_many" in expected:
        assert "get" not in used
        assert cache.calls.count("get_many") == 1 + (make is not OrderlyCache)


@pytest.mark.parametrize("make", [BatchAtomicCache, LeasingCache])
@pytest.mark.parametrize("further", [False, True])
async def test_a_stage_asks_for_all_that_it_needs_in_one_call(
    monkeypatch: pytest.MonkeyPatch, make: Make, further: bool
) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", -1.0)
    monkeypatch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
    for name in ("_KEYS_AT_ONCE", "_KEYS_PER_STEP"):
        monkeypatch.setattr(singleflight, name, 2)
    building = builder(Batch("b"), cache=make())
    some = [key("b", str(number)) for number in range(9)]
    await building.publisher.publish_many([ResourceUpdate(each, 1, "news") for each in some])
    session = building.session()
    if further:
        await session.resolve([key("b", "further")])
    reader = asyncio.ensure_future(session.resolve(some))
    await asyncio.sleep(0)
    await building.publisher.publish_many([ResourceUpdate(each, 2, "news") for each in some])
    assert len({value.value for value in (await reader).values()} - {"further"}) == 1
    assert (await reader).diagnostics.cache_batch_reads == 1 + further


@pytest.mark.parametrize("limit", [1, 3])
async def test_single_key_caches_are_driven_by_no_more_workers_than_allowed(limit: int) -> None:
    cache = SingleKeyCache()
    keys = [key("b", str(n)) for n in range(12)]
    building = builder(Batch("b"), cache=cache, max_pending_tasks=limit)
    snapshot = await building.build(keys)
    assert list(snapshot) == keys
    assert cache.peak_running == limit


# Leases


class LeasedByOthers(LeasingCache):
    """Has nothing, and gives no lease: others hold them all."""

    async def lease_many(self, keys: Collection[ResourceKey], **terms: Any) -> Any:
        yield {key: LeasedLookup(CacheLookup(None, False, False)) for key in keys}


@pytest.mark.parametrize("make, kept", [(LeasingCache, True), (LeasedByOthers, False)])
async def test_a_stale_answer_is_written_by_nobody_who_has_no_lease(make: Make, kept: bool) -> None:
    async def fetch(asked: ResourceKey, context: FetchContext) -> Any:
        return SourcePayload("old", observed_at=EPOCH - 20)

    cache = make()
    building = builder(
        Single("k", fetch=fetch), cache=cache, default_policy=FreshnessPolicy(5, 500)
    )
    assert (await building.build([key("k")]))[key("k")].stale
    await asyncio.sleep(1)
    assert (key("k") in cache.held) is kept


async def test_leases_that_reach_nobody_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are passed on one after the other; who waited for them may leave in between."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -1.0)
    monkeypatch.setattr(foreign_cache, "_ANSWERS_BETWEEN_LOOKS", 1)
    caches: list[LeasingCache] = []

    async def work() -> None:
        caches.append(LeasingCache())
        building = builder(Batch("b"), cache=caches[-1])
        await building.build([key("b", str(number)) for number in range(4)])

    async def check() -> None:
        await asyncio.sleep(1)
        assert not any(cache.leased for cache in caches)

    assert await cancel_at_every_await(work, check) > 4


# Dependency validation


class Validating(BatchAtomicCache):
    """Says that it checks dependency versions itself (and does not, so that it shows)."""

    validates_dependency_versions = True


async def test_only_a_cache_that_does_not_check_dependencies_itself_is_rid_of_what_failed() -> None:
    for make in (BatchAtomicCache, Validating):
        cache = make()
        shop = Shop(cache=cache)
        await shop.builder.build([MIDDLE])
        held = cache.held[BASE]
        await shop.publish(BASE, 2)
        assert cache.held[BASE] is not held
        assert (await shop.builder.build([MIDDLE])).value(MIDDLE) == (2,)
        await asyncio.sleep(1)
        assert ("invalidate_many" in cache.calls) is (make is BatchAtomicCache)


async def test_many_outdated_entries_are_told_from_the_others_without_comparing_each_with_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = key("base")
    deriving = Derived("derived", needs=lambda _: [base])
    building = builder(Single("base"), deriving, cache=BatchCache(), default_policy=SHORT)
    wanted = [key("derived", str(number)) for number in range(300)]
    await building.build(wanted)
    await building.publisher.publish(base, 2, source="s")
    compared = []
    equals = ResourceKey.__eq__

    def counted(self: ResourceKey, other: object) -> bool:
        compared.append(other)
        return equals(self, other)

    monkeypatch.setattr(ResourceKey, "__eq__", counted)
    assert (await building.build(wanted)).complete
    assert len(compared) < 10 * len(wanted)


# Caches that fail


@pytest.mark.parametrize("error", [ConnectionError, GeneratorExit, asyncio.CancelledError, None])
async def test_stats_that_raise_or_hang_fail_no_health(error: type[BaseException] | None) -> None:
    class Odd(SingleKeyCache):
        async def stats(self) -> Any:
            if error is None:
                await asyncio.sleep(1_000)
            else:
                raise error("lost")

    building = builder(Single("k"), cache=Odd())
    assert (await building.health_snapshot()).cache is None


@pytest.mark.parametrize("counts", [{}, {"calls": None}, 5, {"calls": "1", "failures": 2}])
async def test_a_cache_that_tells_odd_things_of_itself_does_not_fail_health(counts: Any) -> None:
    class Odd(SingleKeyCache):
        call_counts = counts
        asked = 0

        @property
        def is_available(self) -> bool:
            self.asked += 1
            if self.asked > 1:
                raise OSError("unknown")
            return True

    shop = Shop(cache=Odd())
    await shop.builder.build([BASE])
    health = await shop.builder.health_snapshot()
    assert (health.cache_left_alone, health.cache_failure_count) == (False, 0)
    assert health.cache_call_count > 0


class SlowToCopy:
    """Takes as long to copy as its gate stays closed."""

    def __init__(self, gate: ThreadGate) -> None:
        self.gate = gate

    def __deepcopy__(self, memo: object) -> SlowToCopy:
        self.gate.pass_()
        return self


async def test_who_goes_on_without_a_cached_value_that_is_being_copied_is_counted() -> None:
    """As a payload copy that ran out of time: the cache itself had answered."""
    gate, cache = ThreadGate(), SingleKeyCache()
    payload = SlowToCopy(gate)
    cache.held[key("k")] = value_of(key("k"), payload, observed_at=LoopClock().now())
    building = builder(Single("k"), cache=cache, clock=LoopClock())
    assert (await building.build([key("k")], deadline_seconds=0.5)).value(key("k")) == ""
    assert (await building.health_snapshot()).payload_copy_timeout_count == 1
    gate.open()
