"""A cache of one's own never fails, holds up or deceives a build, whatever it does."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import math
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from time import perf_counter
from typing import Any, ClassVar

import pytest

from coalestra import (
    AsyncMemoryCache,
    CacheCircuitOpenError,
    CacheLookup,
    CacheTimeoutError,
    CacheUnavailableError,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    PolicyResolver,
    RefreshMode,
    ResourceKey,
    ResourceUpdate,
    Snapshot,
    SnapshotBuilder,
    SnapshotValue,
    SourceAuthorityPolicy,
    SourcePayload,
    SourceUnavailableError,
)
from coalestra.concurrency import pace
from coalestra.core.protocols import AsyncCache
from coalestra.core.values import next_version
from coalestra.orchestration import foreign_cache
from coalestra.orchestration.singleflight import SingleFlight
from tests.contracts.caches import (
    FOREIGN,
    AtomicCache,
    BatchAtomicCache,
    BatchCache,
    LeasingCache,
    SingleKeyCache,
)
from tests.contracts.samples import value_of
from tests.observability.recording import Recorder
from tests.orchestration.scripted import (
    LASTING,
    Batch,
    Derived,
    Single,
    builder,
    held_at,
    key,
    latency,
)
from tests.orchestration.stock import BASE, MIDDLE, OTHER, TOP, Shop, shown
from tests.support import (
    EPOCH,
    Gate,
    LoopClock,
    ManualClock,
    Panic,
    VirtualLoop,
    begun,
    cancel_at_every_await,
    drop,
    loop_turn,
    settle,
    taking,
)
from tests.support.running import without_collector

KEYS = [key("b", str(number)) for number in range(5)]
Kind = Callable[[], SingleKeyCache]
KINDS = pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)


class Held:
    """What somebody holds as something fails."""

    alive: ClassVar[weakref.WeakSet[Held]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)

    def __deepcopy__(self, _memo: Any) -> Held:
        return Held()


def doing(kind: Kind, act: Callable[[str], Awaitable[None]]) -> SingleKeyCache:
    """Return a cache of that kind that does as told in each of its calls."""

    class Acting(kind):  # type: ignore[misc, valid-type]
        async def _travel(self, call: str) -> None:
            await super()._travel(call)
            await act(call)

    cache: SingleKeyCache = Acting()
    return cache


WRITES = ("set", "set_many", "set_if_newer", "set_many_if_newer")


def hanging(kind: Kind, *calls: str, patience: float = 1.0) -> tuple[SingleKeyCache, Gate]:
    """Return a cache that waits at a gate in these calls, or in all."""
    gate = Gate()

    async def act(call: str) -> None:
        if not calls or call in calls:
            await gate.pass_()

    cache = doing(kind, act)
    vars(cache)["timeout_seconds"] = patience
    return cache, gate


def slow_to_write(kind: Kind) -> tuple[Shop, SingleKeyCache, Gate]:
    """Return a shop over such a cache, that cache, and the gate at which what is written waits."""
    cache, gate = hanging(kind, *WRITES, patience=60.0)
    return Shop(cache=cache), cache, gate


async def seconds(work: Awaitable[Any]) -> float:
    """Return how long some work takes, in virtual time."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    await work
    return loop.time() - began


# Whatever it raises -------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("when", ["every call", "writes", "what it reads makes no sense"])
async def test_a_failure_that_was_told_keeps_nothing_alive(kind: Kind, when: str) -> None:
    async def act(call: str) -> None:
        _held = Held()
        if when == "every call" or (when == "writes" and "get" not in call):
            raise LookupError("no cache today")

    cache = doing(kind, act)
    building = builder(Single("k", fetch=lambda *_: _given(Held())), cache=cache)
    with without_collector():
        for _ in range(2):
            await building.build([key("k"), key("k", "2")])
            for asked in (
                building.publisher.publish_many([ResourceUpdate(key("k"), Held(), "s")]),
                building.publisher.invalidate(key("k")),
            ):
                with contextlib.suppress(LookupError):
                    await asked
            if when == "what it reads makes no sense":
                await building.build([key("k")])
                odd: Any = cache.held[key("k")]
                cache.held = {key("k", "2"): odd, key("k"): dataclasses.replace(odd, attempts="1")}
                del odd
        await settle()
        cache.held.clear()
        await settle()
        assert not Held.alive


async def _given(value: Any) -> Any:
    return value


@KINDS
@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError, Panic, GeneratorExit])
async def test_whatever_a_cache_raises_builds_go_on_and_publishers_hear_of_it(
    kind: Kind, error: type[BaseException]
) -> None:
    async def act(call: str) -> None:
        raise error("no cache today")

    metrics = InMemoryMetrics()
    shop = Shop(cache=doing(kind, act), metrics=metrics)
    for _ in range(2):
        assert shown(await shop.builder.build([TOP, OTHER])) == {TOP: ((1,),), OTHER: 10}
    assert metrics.counter("cache_failure_total", operation="read") > 0
    for asked in (
        shop.builder.publisher.publish(BASE, 2, source="s"),
        shop.builder.publisher.invalidate(BASE),
    ):
        with pytest.raises((LookupError, CacheUnavailableError)) as caught:
            await asked
        assert isinstance(caught.value, error) or isinstance(caught.value.__cause__, error)


@KINDS
async def test_a_cache_that_hangs_costs_its_limit_once_and_is_then_left_alone(kind: Kind) -> None:
    cache, gate = hanging(kind)
    building = builder(Batch("b"), cache=cache, max_pending_tasks=8)
    keys = [key("b", str(number)) for number in range(100)]
    assert await seconds(building.build(keys)) < 2.5
    before = await building.health_snapshot()
    for number in range(5):
        await building.build([key("b", f"one more, {number}")])
    assert await seconds(building.build([key("b", "the last"), *keys])) < 0.1, "it is left alone"
    health = await building.health_snapshot()
    assert health.cache_left_alone
    assert health.cache_call_count >= health.cache_failure_count >= health.cache_timeout_count > 0
    told = {finding.reason.value for finding in health.assess(previous=before).findings}
    assert "cache_left_alone" in told
    gate.open()
    await asyncio.sleep(30)
    await building.build(keys)
    await asyncio.sleep(1)
    await building.build(keys)
    await asyncio.sleep(1)
    assert all(value.from_cache for value in (await building.build(keys)).values())
    assert not (await building.health_snapshot()).cache_left_alone


async def test_a_reader_waits_for_the_events_before_it_however_many_come_after_it() -> None:
    async def act(_call: str) -> None:
        await asyncio.sleep(0.3)

    shop = Shop(cache=doing(SingleKeyCache, act))
    publish = shop.builder.publisher.publish
    loop, events = asyncio.get_running_loop(), []

    async def feed() -> None:
        for number in range(20):
            events.append(loop.create_task(publish(BASE, number, source="feed")))
            await asyncio.sleep(0.5)  # each takes 0.6 s

    feeding = loop.create_task(feed())
    await asyncio.sleep(0.1)
    assert await seconds(shop.builder.build([BASE], deadline_seconds=3.0)) < 1.5
    await feeding
    await asyncio.gather(*events)


@pytest.mark.parametrize("deadline, waits", [(None, 1.0), (0.8, 0.4)])
async def test_an_event_that_the_cache_does_not_take_holds_no_value_in_hand_back_for_long(
    deadline: float | None, waits: float
) -> None:
    cache, gate = hanging(SingleKeyCache, "set")
    shop = Shop(cache=cache)
    publishing = await begun(shop.builder.publisher.publish(BASE, 7, source="feed"), gate)
    with taking(waits, within=0.02):
        snapshot = await shop.builder.build([BASE], deadline_seconds=deadline)
        assert snapshot.value(BASE) == 1
    if deadline:
        gate.open()
        await publishing
        assert (await shop.builder.build([BASE])).value(BASE) == 7, "it was not stored over it"
    else:
        with pytest.raises(CacheTimeoutError):
            await publishing
        gate.open()


@KINDS
@pytest.mark.parametrize("what", ["publish", "invalidate", "invalidate many"])
async def test_what_waits_at_a_hanging_cache_is_given_up_in_time(kind: Kind, what: str) -> None:
    cache, _ = hanging(kind)
    building = Shop(cache=cache).builder
    publisher = building.publisher
    call: Callable[[], Awaitable[Any]] = {
        "publish": lambda: publisher.publish(BASE, 1, source="s"),
        "invalidate": lambda: publisher.invalidate(BASE),
        "invalidate many": lambda: publisher.invalidate_many([BASE, OTHER]),
    }[what]
    began = asyncio.get_running_loop().time()
    ended = await asyncio.gather(*(call() for _ in range(50)), return_exceptions=True)
    assert asyncio.get_running_loop().time() - began < 20
    assert {type(each) for each in ended} == {CacheTimeoutError, CacheCircuitOpenError}
    with pytest.raises(CacheTimeoutError, match="within 1 s"):
        await call()  # it is tried all the same
    assert (await building.build([BASE])).complete
    assert await seconds(building.aclose()) < 5


async def test_a_hanging_cache_read_does_not_outlive_the_readers_who_left() -> None:
    cache, gate = hanging(SingleKeyCache, "get")
    task = await begun(builder(Single("k"), cache=cache).build([key("k")]), gate)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await settle()
    assert gate.waiting == 0


async def test_a_reader_in_a_hurry_goes_on_without_the_cache_and_others_do_not() -> None:
    cache, gate = hanging(SingleKeyCache, "get")
    cache.held[key("k")] = value_of(key("k"), "cached", observed_at=LoopClock().now())
    building = builder(Single("k"), cache=cache, clock=LoopClock())
    patient = await begun(building.build([key("k")]), gate)
    hasty = await building.build([key("k")], deadline_seconds=0.5)
    assert hasty.value(key("k")) == ""
    assert (await building.build([key("k")])).value(key("k")) == "", "known since"
    gate.open()
    assert (await patient).value(key("k")) == "cached"
    await building.aclose()


async def test_a_reader_in_a_hurry_waits_for_no_lease_that_is_not_answered() -> None:
    cache, gate = hanging(LeasingCache, "lease_many")
    building = builder(Single("k"), cache=cache)
    found = await building.build([key("k")], deadline_seconds=0.5)
    assert found.value(key("k")) == ""
    gate.open()
    await asyncio.sleep(1)
    assert vars(cache)["leased"] == {}
    await building.aclose()


async def test_what_was_read_before_a_lease_was_granted_is_not_stored_under_it() -> None:
    """Another process may have changed the key in between, and would have ended an older lease."""
    at_source = Gate()
    cache, gate = hanging(LeasingCache, "lease_many")
    building = builder(Single("k", fetch=lambda _key, _context: at_source.pass_()), cache=cache)
    hasty = building.build([key("k")], deadline_seconds=0.5)
    early = await begun(hasty, at_source)
    late = await begun(building.build([key("k")]))
    gate.open()
    await settle()
    at_source.open()
    assert (await early)[key("k")].version == (await late)[key("k")].version
    await asyncio.sleep(1)
    assert cache.held == vars(cache)["leased"] == {}
    await building.aclose()


async def test_who_comes_while_a_reader_in_a_hurry_is_at_a_source_is_served_by_the_cache() -> None:
    async def fail(_key: ResourceKey, _context: FetchContext) -> Any:
        await at_source.pass_()
        raise SourceUnavailableError("down")

    at_source = Gate()
    cache, gate = hanging(SingleKeyCache, "get")
    cache.held[key("k")] = value_of(key("k"), "cached", observed_at=LoopClock().now())
    building = builder(Single("k", fetch=fail), cache=cache, clock=LoopClock())
    hasty = building.build([key("k")], deadline_seconds=0.5, strict=False)
    leaving = await begun(hasty, at_source)
    patient = await begun(building.build([key("k")]))
    gate.open()
    assert (await patient).value(key("k")) == "cached"
    at_source.open()
    assert (await leaving).errors
    await building.aclose()


# Whatever it answers ------------------------------------------------------------------------------


def changed(**fields: Any) -> Callable[[SnapshotValue[Any]], object]:
    def change(value: SnapshotValue[Any]) -> object:
        twin = dataclasses.replace(value)
        for name, field in fields.items():
            getattr(SnapshotValue, name).__set__(twin, field)
        return CacheLookup(twin, True, True, 0.0)

    return change


class Unlike:
    """Equal to nothing, and angry when asked."""

    def __eq__(self, other: object) -> bool:
        raise LookupError("do not compare me")

    __hash__ = None  # type: ignore[assignment]


ODD: dict[str, Callable[[SnapshotValue[Any]], object]] = {
    "the bare value": lambda value: value,
    "a text": lambda value: "fresh",
    "a lookup of no value": lambda value: CacheLookup("value", True, True),  # type: ignore[arg-type]
    "another key": lambda value: CacheLookup(value_of(OTHER), True, True),
    "no key": changed(key=None),
    "an angry key": changed(key=Unlike()),
    "NaN": changed(observed_at=math.nan),
    "infinity": changed(observed_at=math.inf),
    "minus infinity": changed(fetched_at=-math.inf),
    "a truth for a time": changed(observed_at=True),
    "a text for a time": changed(observed_at="1700000000"),
    "no latency": changed(latency_ms=None),
    "a text for a rank": changed(authority_rank="high"),
    "no version": changed(version=None),
    "versions without keys": changed(dependency_versions={"base": "1"}),
    "no mapping of versions": changed(dependency_versions=None),
    "no mapping of metadata": changed(metadata=7),
    "the far future": changed(observed_at=1e12),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
@pytest.mark.parametrize("kind", [SingleKeyCache, BatchCache, BatchAtomicCache])
async def test_what_makes_no_sense_is_a_miss_for_its_key_alone(
    kind: type[SingleKeyCache], odd: Callable[[SnapshotValue[Any]], object]
) -> None:
    class Odd(kind):  # type: ignore[misc, valid-type]
        def _lookup(self, key: ResourceKey, now: float, policy: FreshnessPolicy) -> Any:
            found = super()._lookup(key, now, policy)
            if key == KEYS[2] and found.value is not None and found.value.value == "odd":
                return odd(found.value)
            return found

    cache, clock = Odd(), LoopClock()
    source = Batch("b")
    for each in KEYS:
        payload = "odd" if each == KEYS[2] else "held"
        cache.held[each] = value_of(each, payload, observed_at=clock.now() - 1)
    building = builder(source, cache=cache, clock=clock)
    snapshot = await building.build(KEYS)
    assert [value.value for value in snapshot.values()] == ["held", "held", "2", "held", "held"]
    assert source.calls == [(KEYS[2],)]


async def test_a_value_under_another_key_is_told_as_that() -> None:
    cache, told = SingleKeyCache(), Recorder()
    cache.held[KEYS[0]] = value_of(OTHER)
    await builder(Single("b"), cache=cache, events=told, buffer_observability=False).build(KEYS[:1])
    failed = next(each.payload for each in told.events if each.event_type == "cache_failed")
    remedy = "store and return values under their own key"
    assert failed["error"].endswith(f"with a value of {OTHER}; {remedy}")


class Pickled(SingleKeyCache):
    """Cannot read what stands in `spoiled`, and fails as a whole where many are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.spoiled: set[ResourceKey] = set()

    def _lookup(self, key: ResourceKey, now: float, policy: FreshnessPolicy) -> CacheLookup:
        self._load(key)
        return super()._lookup(key, now, policy)

    def _offer(self, value: Any, force: bool, replace_equal: bool) -> Any:
        self._load(value.key)
        return super()._offer(value, force, replace_equal)

    def _load(self, key: ResourceKey) -> None:
        if key in self.spoiled:
            raise EOFError(f"{key} is cut short")

    async def set(self, value: Any) -> None:
        await super().set(value)
        self.spoiled.discard(value.key)

    async def set_many(self, values: Any) -> None:
        await super().set_many(values)  # type: ignore[misc]  # if the other class has it
        self.spoiled.difference_update([value.key for value in values])


@pytest.mark.parametrize("others", [(), (BatchCache,), (AtomicCache,), (BatchAtomicCache,)])
@pytest.mark.parametrize("spoiled", [KEYS[2:3], KEYS[1:4], KEYS])
async def test_entries_that_cannot_be_read_spoil_only_themselves_and_are_written_over(
    others: tuple[type, ...], spoiled: list[ResourceKey]
) -> None:
    kind = type("Kind", (Pickled, *others), {} if others else {"set_many": None})
    cache, source = kind(), Batch("b")
    building = builder(source, cache=cache)
    await building.build(KEYS)
    cache.spoiled.update(spoiled)
    source.calls.clear()
    assert shown(await building.build(KEYS)) == {each: each.subject for each in KEYS}
    assert [set(call) for call in source.calls] == [set(spoiled)]
    await asyncio.sleep(1)
    assert not cache.spoiled
    assert all(value.from_cache for value in (await building.build(KEYS)).values())
    cache.spoiled.update(spoiled)
    for each in spoiled:
        assert (await building.publisher.publish(each, "event", source="s", force=True)).published
    assert not cache.spoiled


# Values on their way ------------------------------------------------------------------------------


@KINDS
async def test_a_slow_write_holds_no_value_back_and_its_value_counts_as_cached(kind: Kind) -> None:
    shop, cache, gate = slow_to_write(kind)
    assert await seconds(shop.builder.build([TOP])) < 0.1
    first = (await shop.builder.build([TOP]))[TOP]
    assert first.from_cache
    assert len(shop.stock.calls) == len(shop.top.calls) == 1
    gate.open()
    await asyncio.sleep(1)
    assert (await shop.builder.build([TOP]))[TOP].version == first.version
    assert {BASE, MIDDLE, TOP} <= set(cache.held)


@KINDS
async def test_a_cache_that_never_waits_is_not_slow_because_the_machine_is(kind: Kind) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    be_busy = loop.be_busy

    class Busy(kind):  # type: ignore[misc, valid-type]
        async def _travel(self, call: str) -> None:
            be_busy(0.1)
            for _ in range(3):
                await asyncio.sleep(0)

    cache = Busy()
    await builder(Batch("b"), cache=cache).build(KEYS)
    assert set(cache.held) == set(KEYS)


@KINDS
async def test_what_arrives_while_the_loop_is_held_is_in_time_from_cache_and_source(
    kind: Kind,
) -> None:
    loop, held = asyncio.get_running_loop(), False
    assert isinstance(loop, VirtualLoop)
    be_busy = loop.be_busy

    async def travel(*_of: object) -> None:
        if held:
            loop.call_later(0.5, be_busy, 5.0)
            await asyncio.sleep(0.6)
            for _ in range(3):
                await asyncio.sleep(0)

    source, cache = Batch("b", before=travel, timeout=1.0), doing(kind, travel)
    building = builder(source, cache=cache)
    await building.build(KEYS[:1])
    held = True
    assert (await building.build(KEYS[:2])).value(KEYS[1]) == "1"
    assert source.calls == [(KEYS[0],), (KEYS[1],)]  # as the first was found in the cache
    await building.aclose()


@pytest.mark.parametrize("kind", [*FOREIGN, LeasingCache], ids=lambda kind: kind.__name__)
async def test_what_is_on_its_way_is_not_fresh_once_the_clock_was_set_back(kind: Kind) -> None:
    cache, gate = hanging(kind, *WRITES, "fulfil_many", patience=60.0)
    clock = ManualClock()
    shop = Shop(cache=cache, clock=clock)
    await shop.builder.build([BASE])
    shop.stock.change(base=2)
    clock.set_wall(EPOCH - 3_600)
    clock.advance(60)
    assert (await shop.builder.build([BASE])).value(BASE) == 2
    assert (await shop.builder.build([BASE]))[BASE].from_cache
    gate.open()
    await asyncio.sleep(1)
    assert (await shop.builder.build([BASE])).value(BASE) == 2


@KINDS
async def test_an_invalidation_reaches_what_is_on_its_way(kind: Kind) -> None:
    shop, cache, gate = slow_to_write(kind)
    await shop.builder.build([BASE])
    invalidation = await begun(shop.builder.publisher.invalidate(BASE))
    shop.stock.change(base=2)
    assert (await shop.builder.build([BASE])).value(BASE) == 2
    gate.open()
    await invalidation
    await asyncio.sleep(1)
    assert (await shop.builder.build([BASE])).value(BASE) == 2
    assert cache.held[BASE].value == 2


@KINDS
async def test_an_event_reaches_what_is_on_its_way_and_what_is_derived_of_that(kind: Kind) -> None:
    shop, cache, gate = slow_to_write(kind)
    assert (await shop.builder.build([TOP])).value(TOP) == ((1,),)
    event = asyncio.ensure_future(shop.publish(BASE, "event"))
    await asyncio.sleep(2)
    gate.open()
    await event
    assert shown(await shop.builder.build([TOP, BASE])) == {TOP: (("event",),), BASE: "event"}
    await asyncio.sleep(1)
    assert shown(await shop.builder.build([TOP, BASE])) == {TOP: (("event",),), BASE: "event"}
    assert cache.held[BASE].value == "event"


@KINDS
async def test_what_is_derived_in_the_cache_gives_way_to_an_input_on_its_way(kind: Kind) -> None:
    shop, _, gate = slow_to_write(kind)
    gate.open()
    await shop.builder.build([TOP])
    gate.close()
    shop.stock.change(base=2)
    async with shop.builder.session() as session:
        await session.resolve([BASE])
        await asyncio.sleep(1)
        assert (await session.revalidate([BASE], force_refresh=True)).value(BASE) == 2
    assert (await shop.builder.build([TOP])).value(TOP) == ((2,),)
    gate.open()
    await asyncio.sleep(1)
    assert (await shop.builder.build([TOP])).value(TOP) == ((2,),)


@KINDS
async def test_what_a_session_derives_from_its_pins_defends_nothing_on_its_way(kind: Kind) -> None:
    cache, at_cache = hanging(kind, "set", "set_many", "set_if_newer", "set_many_if_newer")
    vars(cache)["timeout_seconds"] = 60.0
    at_cache.open()
    second, d = Gate(), key("d")

    async def before() -> None:
        if len(derived.calls) == 2:
            await second.pass_()

    derived = Derived("d", needs=lambda k: [BASE], before=before)
    building = builder(Single("base"), derived, cache=cache)
    await building.publisher.publish(BASE, "old", source="s")
    async with building.session() as session:
        await session.resolve([BASE, d])
        await building.publisher.publish(BASE, "new", source="s")
        reader = await begun(building.build([d]), second)
        await asyncio.sleep(1)
        at_cache.close()
        assert (await session.revalidate([d], force_refresh=True)).value(d) == ("old",)
    second.open()
    assert (await reader).value(d) == ("new",)
    at_cache.open()
    assert (await building.build([d])).value(d) == ("new",)


async def test_a_quick_write_ends_no_patience_with_a_slow_one_of_the_same_step() -> None:
    slow, at_source = Gate(), Gate()

    class Slow(SingleKeyCache):
        async def set(self, value: Any) -> None:
            if value.value == "forced":
                await slow.pass_()
            await super().set(value)

    truth = {KEYS[0]: "old", KEYS[1]: "quick"}

    async def fetch(key: ResourceKey, context: object) -> Any:
        await at_source.pass_()
        return truth[key]

    cache = Slow()
    vars(cache)["timeout_seconds"] = 60.0
    building = builder(Single("b", fetch=fetch), cache=cache)
    at_source.open()
    async with building.session() as session:
        await session.resolve(KEYS[:1])
        at_source.close()
        truth[KEYS[0]] = "forced"
        forced = asyncio.ensure_future(session.revalidate(KEYS[:1], force_refresh=True))
        quick = asyncio.ensure_future(building.build(KEYS[1:2]))
        await asyncio.sleep(1)
        at_source.open()
        assert await seconds(asyncio.wait_for(forced, 5)) < 0.1
        await quick
    slow.open()
    await building.aclose()


async def test_two_builders_over_one_cache_object_share_what_is_on_its_way() -> None:
    cache, gate = hanging(BatchAtomicCache, "set_many_if_newer")
    one, two = (builder(Single("b"), cache=cache) for _ in range(2))
    first = (await one.build(KEYS[:1]))[KEYS[0]]
    second = (await two.build(KEYS[:1]))[KEYS[0]]
    assert second.from_cache
    assert second.version == first.version
    gate.open()


async def test_a_write_that_fails_late_takes_the_value_out_of_sight_and_is_told() -> None:
    metrics = InMemoryMetrics()
    cache, _ = hanging(SingleKeyCache, "set")
    source = Single("b")
    building = builder(source, cache=cache, metrics=metrics)
    await building.build(KEYS[:1])
    await asyncio.sleep(2)
    assert metrics.counter("cache_failure_total", operation="write") == 1
    await building.build(KEYS[:1])
    assert len(source.calls) == 2
    await building.aclose()


async def test_a_forced_value_waits_for_the_word_of_the_cache_where_ranks_differ() -> None:
    class Ranked(BatchAtomicCache):
        validates_source_authority = True

    cache, gate = hanging(Ranked, "set_many_if_newer")
    shop = Shop(cache=cache, authority_policy=SourceAuthorityPolicy({"stream": 2}))
    session = await shop.session(BASE)
    gate.open()
    await shop.publish(BASE, "event")
    shop.stock.change(base=2)
    forced = await session.revalidate([BASE], force_refresh=True)
    assert forced.value(BASE) == "event"
    assert forced[BASE].metadata["superseded_source"] == "stock"


@KINDS
async def test_what_is_too_old_for_use_keeps_no_lower_rank_out(kind: Kind) -> None:
    """A memory cache drops such entries; one of one's own may keep them for ever."""
    cache = kind()
    vars(cache)["validates_source_authority"] = True
    rules = SourceAuthorityPolicy({"stream": 2})
    single, clock = Single("b"), ManualClock()
    building = builder(
        single, cache=cache, clock=clock, authority_policy=rules,
        default_policy=FreshnessPolicy(1, 10),
    )  # fmt: skip
    await building.publisher.publish(KEYS[0], "event", source="stream")
    clock.advance(11)
    for _ in range(2):
        await building.build([KEYS[0]])
    assert len(single.calls) == 1


# The order between builders that share a store ----------------------------------------------------


def sharing(kind: Kind, held: dict[ResourceKey, Any]) -> SingleKeyCache:
    cache = kind()
    cache.held = held
    return cache


@KINDS
@pytest.mark.parametrize("newer", ["read", "event"])
async def test_a_slow_older_read_overwrites_nothing_newer_in_a_shared_store(
    kind: Kind, newer: str
) -> None:
    held: dict[ResourceKey, Any] = {}
    slow, quick = (
        builder(Single("b", fetch=latency(wait)), cache=sharing(kind, held)) for wait in (10, 1)
    )
    reading = asyncio.ensure_future(slow.build(KEYS[:1]))
    await asyncio.sleep(2)
    if newer == "event":
        await quick.publisher.publish(KEYS[0], "event", source="s")
    version = (await quick.build(KEYS[:1]))[KEYS[0]].version
    await reading
    await asyncio.sleep(1)
    assert (await quick.build(KEYS[:1]))[KEYS[0]].version == version


@KINDS
async def test_a_newer_derived_value_in_a_shared_store_tells_what_it_rests_on(kind: Kind) -> None:
    """As whoever is given it must see whether that agrees with all else he is given."""
    held: dict[ResourceKey, Any] = {}
    base, top, gate = key("base"), key("top"), Gate()

    class Dated(Derived):
        async def derive(self, k: ResourceKey, inputs: Snapshot, context: FetchContext) -> Any:
            seen_at = time()
            return SourcePayload(await super().derive(k, inputs, context), seen_at)

    def process(before: Callable[[], Awaitable[None]] | None) -> SnapshotBuilder:
        derived = Dated("top", needs=lambda _: [base], before=before)
        return builder(Single("base"), derived, cache=sharing(kind, held), trace=True)

    time = LoopClock().now
    slow, quick = process(gate.pass_), process(None)
    await quick.build([base])
    reading = await begun(slow.build([top]), gate)
    await asyncio.sleep(1)
    theirs = (await quick.build([top]))[top]
    gate.open()
    snapshot = await reading
    assert snapshot[top].version == theirs.version
    assert snapshot.trace is not None
    told = {each.key: each.version for each in snapshot.trace.keys[top].rests_on}
    assert told == theirs.dependency_versions != {}


async def test_what_is_read_while_several_publish_waits_for_each_that_had_begun() -> None:
    at_source = Gate()

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        await at_source.pass_()
        return "fetched"

    cache, at_cache = hanging(BatchAtomicCache, "set_many_if_newer", patience=60.0)
    building = builder(Single("k", fetch=fetch), cache=cache)
    reading = await begun(building.build([key("k")]), at_source)
    publish = building.publisher.publish
    events = []
    for name in ("first", "second"):
        events.append(await begun(publish(key("k"), name, source="s")))
        await asyncio.sleep(1)  # at one time they would have to be offered twice
    at_source.open()
    await settle()
    later = await begun(publish(key("k"), "third", source="s"))
    for number, event in enumerate(events, 1):
        await at_cache.wait_arrived(number)
        assert not reading.done()
        at_cache.let_through()
        await event
        await settle()
    assert reading.done()
    assert (await reading).value(key("k")) == "second"
    at_cache.open()
    await later


# Invalidations that take their time ---------------------------------------------------------------


@KINDS
async def test_what_was_invalidated_does_not_stand_in_for_who_asks_after_that(kind: Kind) -> None:
    """Although somebody else read it while the invalidation was under way."""
    cache, gate = hanging(kind, "invalidate", "invalidate_many", patience=60.0)
    shop = Shop(cache=cache, default_policy=FreshnessPolicy(1, 1000))
    await shop.builder.build([BASE])
    await asyncio.sleep(5)
    at_source = Gate()
    shop.stock.change(base=SourceUnavailableError("down"))
    shop.stock.before = at_source.pass_
    invalidation = await begun(shop.builder.publisher.invalidate(BASE), gate)
    early = await begun(shop.builder.build([BASE], strict=False), at_source)
    gate.open()
    await invalidation
    late = await begun(shop.builder.build([BASE], strict=False))
    at_source.open()
    assert BASE in (await late).errors
    await early


class Lingering(SingleKeyCache):
    """A cache that takes its time to answer what it has read of `base`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate(opened=True)

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        found = await super().get(key, now=now, policy=policy)
        if key == BASE:
            await self.gate.pass_()
        return found


@pytest.mark.parametrize("news", ["publish", "invalidate"])
@pytest.mark.parametrize("wanted", [BASE, MIDDLE])
async def test_what_was_read_before_news_does_not_stand_in_for_who_asks_after_them(
    wanted: ResourceKey, news: str
) -> None:
    cache = Lingering()
    vars(cache)["timeout_seconds"] = 60.0
    shop = Shop(cache=cache, default_policy=FreshnessPolicy(5, 1000))
    await shop.builder.build([wanted])
    await asyncio.sleep(6)
    shop.stock.change(base=SourceUnavailableError("down"))
    at_source, before = Gate(), cache.gate.arrived
    shop.stock.before = at_source.pass_
    cache.gate.close()
    early = asyncio.ensure_future(shop.builder.build([wanted], strict=False))
    await cache.gate.wait_arrived(before + 1)
    cache.gate.opened = True  # for all but that one
    if news == "publish":
        await shop.publish(BASE, "event")
        await asyncio.sleep(0.1)
    else:
        await shop.builder.publisher.invalidate(BASE)
    cache.gate.open()
    await settle()
    late = await begun(shop.builder.build([wanted], strict=False))
    at_source.open()
    told = await late
    if news == "publish":
        assert told.value(wanted) == ("event" if wanted == BASE else ("event",))
    else:
        assert wanted in told.errors
    await early


# Leases -------------------------------------------------------------------------------------------


async def test_a_cache_that_is_slow_to_give_leases_is_left_alone_after_a_while() -> None:
    cache, gate = hanging(LeasingCache, "lease_many")
    building = builder(Single("b"), cache=cache)
    for number in range(5):
        assert await seconds(building.build([key("b", str(number))])) < 1.1
    assert await seconds(building.build([key("b", "one more")])) < 0.1
    health = await building.health_snapshot()
    assert health.cache_left_alone
    assert health.cache_timeout_count == 5
    gate.open()
    await asyncio.sleep(10)
    await building.build([key("b", "well again")])
    assert not (await building.health_snapshot()).cache_left_alone
    await building.aclose()
    assert set(cache.held) == {key("b", "well again")}


class CopiedOnce:
    """Fails when it is copied for the second time, on its way into the cache."""

    copies = 0

    def __deepcopy__(self, memo: object) -> CopiedOnce:
        CopiedOnce.copies += 1
        if CopiedOnce.copies == 2:
            raise LookupError("once is enough")
        return self


async def test_the_lease_on_what_cannot_be_copied_into_the_cache_is_given_back() -> None:
    async def fetch(key: ResourceKey, context: object) -> Any:
        return CopiedOnce()

    cache = LeasingCache()
    building = builder(Single("b", fetch=fetch), cache=cache)
    assert type((await building.build(KEYS[:1])).value(KEYS[0])) is CopiedOnce
    await asyncio.sleep(1)
    assert (cache.held, cache.leased) == ({}, {})
    assert "release_many" in cache.calls


@pytest.mark.parametrize("rank, given", [(0, "fetched"), (1, "future")])
async def test_what_comes_from_the_future_while_a_lease_is_held_wins_by_rank_alone(
    rank: int, given: str
) -> None:
    """Another process, whose clock is wrong, has published it."""
    gate, cache, clock = Gate(), LeasingCache(), LoopClock()

    async def fetch(key: ResourceKey, context: object) -> str:
        await gate.pass_()
        return "fetched"

    building = builder(Single("b", fetch=fetch), cache=cache, clock=clock)
    reader = asyncio.ensure_future(building.build(KEYS[:1]))
    await gate.wait_arrived()
    future = value_of(KEYS[0], "future", observed_at=clock.now() + 900.0, rank=rank)
    cache.held[KEYS[0]] = future
    gate.open()
    assert (await reader).value(KEYS[0]) == given


async def test_a_leasing_cache_that_gives_what_is_of_no_use_another_version_each_time_is_left() -> (
    None
):
    """It keeps no version, and the library makes a new one for each value that is read."""

    class Forgetful(LeasingCache):
        def _lookup(self, *asked: Any) -> CacheLookup:
            found = super()._lookup(*asked)
            if found.value is None:
                return found
            return dataclasses.replace(
                found, value=dataclasses.replace(found.value, version=next_version())
            )

    cache, clock, source = Forgetful(), LoopClock(), Single("b")
    cache.held[KEYS[0]] = value_of(KEYS[0], "future", observed_at=clock.now() + 900.0)
    building = builder(source, cache=cache, clock=clock)
    await asyncio.wait_for(building.build(KEYS[:1]), 5)
    assert source.calls == KEYS[:1]


async def test_what_a_reader_who_left_has_asked_of_a_cache_ends_without_a_collection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asking: list[tuple[ResourceKey, ...]] = []

    class Asked(LeasingCache):
        async def lease_many(self, keys: Any, **terms: Any) -> AsyncGenerator[Any, None]:
            asking.append(tuple(keys))
            try:
                async for part in super().lease_many(keys, **terms):
                    yield part
            finally:
                asking.remove(tuple(keys))

    building, gate = builder(Single("b"), cache=Asked()), Gate()
    await building.build(KEYS[:1])
    await asyncio.sleep(1)
    monkeypatch.setattr(pace.Pace, "keep", lambda _: gate.pass_())
    with without_collector():
        reader = asyncio.ensure_future(building.build(KEYS[:1]))
        await gate.wait_arrived()
        assert asking
        reader.cancel()
        await asyncio.wait([reader])
        await asyncio.sleep(1)
        assert not asking
    gate.open()


class NeverCopied:
    """Fails when it is copied."""

    def __deepcopy__(self, memo: object) -> NeverCopied:
        raise LookupError("there is only one of me")


@pytest.mark.parametrize("trouble", ["from the future", "unsound", "not to be copied", "outdated"])
@pytest.mark.parametrize("mode", list(RefreshMode), ids=lambda mode: mode.value)
async def test_what_a_leasing_cache_has_and_nobody_can_use_is_replaced_under_a_lease(
    trouble: str, mode: RefreshMode
) -> None:
    """Else each of its readers would acquire it for himself, and store nothing."""
    cache, clock, source = LeasingCache(), LoopClock(), Single("b")
    value = value_of(KEYS[0], "odd", observed_at=clock.now() + 900.0, rank=1)
    if trouble == "unsound":
        object.__setattr__(value, "source", 5)
    elif trouble == "not to be copied":
        value = dataclasses.replace(value, value=NeverCopied(), observed_at=clock.now())
    elif trouble == "outdated":
        base = value_of(OTHER, "future", observed_at=clock.now() + 900.0)
        await cache.set(base)
        await cache.set(value_of(KEYS[0], "old", observed_at=clock.now(), rests_on=[base]))
    if trouble != "outdated":
        await cache.set(value)
    policy = FreshnessPolicy(1_000.0, 1_000.0, refresh_mode=mode)
    building = builder(source, cache=cache, clock=clock, default_policy=policy)
    for _ in range(3):
        snapshot = await building.build(KEYS[:2])
        assert [snapshot.value(each) for each in KEYS[:2]] == ["0", "1"]
        await asyncio.sleep(1)
    assert sorted(source.calls) == KEYS[:2]
    assert not cache.leased
    assert cache.held[KEYS[0]].value == "0"


@pytest.mark.parametrize("policy", [
    FreshnessPolicy(1.0, 1_000.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE),
    FreshnessPolicy(
        1_000.0, 1_000.0, refresh_mode=RefreshMode.REFRESH_AHEAD, refresh_ahead_seconds=999.0
    ),
])  # fmt: skip
async def test_a_refresh_brings_a_new_value_under_its_lease(policy: FreshnessPolicy) -> None:
    source = Single("b")
    building = builder(source, cache=LeasingCache(), default_policy=policy)
    await building.build(KEYS[:1])
    for calls in (2, 3):
        await asyncio.sleep(10)
        await building.build(KEYS[:1])
        await building.wait_for_refreshes()
        assert len(source.calls) == calls
        await asyncio.sleep(0.1)
        assert not (await building.build(KEYS[:1])).stale_keys


@pytest.mark.parametrize("mode", list(RefreshMode), ids=lambda mode: mode.value)
async def test_leases_change_nothing_about_what_inherits_its_freshness(mode: RefreshMode) -> None:
    """What is served for its own age alone may rest on something stale, or be due for that."""
    ahead = 2.0 if mode is RefreshMode.REFRESH_AHEAD else 0.0
    stories: list[list[tuple[bool, int, int]]] = []
    for kind in (BatchAtomicCache, LeasingCache):
        policies = {
            key("base"): FreshnessPolicy(5.0, 300.0, True, mode, ahead),
            key("top"): FreshnessPolicy(100.0, 300.0, True, mode, ahead),
        }
        source = Single("base")
        top = Derived("top", needs=lambda _: [key("base")])
        top.inherit_freshness = True  # type: ignore[attr-defined]  # the protocol's optional attribute
        resolver = PolicyResolver(LASTING, overrides=policies)
        building = builder(source, top, cache=kind(), default_policy=None, policy_resolver=resolver)
        stories.append([])
        for seconds in (0.5, 4, 0.5, 4, 0.5, 4, 0.5):
            value = (await building.build([key("top")]))[key("top")]
            await building.wait_for_refreshes()
            stories[-1].append((value.stale, len(source.calls), len(top.calls)))
            await asyncio.sleep(seconds)
        await building.aclose()
    assert stories[1] == stories[0]


@pytest.mark.parametrize(
    "kind", [*FOREIGN, LeasingCache, AsyncMemoryCache], ids=lambda k: k.__name__
)
async def test_a_stale_answer_is_kept_to_stand_in_later(kind: Callable[[], AsyncCache]) -> None:
    down = False

    async def lag(asked: ResourceKey, context: object) -> SourcePayload[int]:
        if down:
            raise ConnectionError("down")
        return SourcePayload(1, observed_at=clock.now() - 20)

    clock, cache = LoopClock(), kind()
    doubling = Derived("double", needs=lambda _: [key("b")])
    building = builder(
        Single("b", fetch=lag), doubling, cache=cache, clock=clock, default_policy=None,
        policy_resolver=PolicyResolver(FreshnessPolicy(10.0, 100.0),
            overrides={key("double"): LASTING}),
    )  # fmt: skip
    assert (await building.build([key("b"), key("double")]))[key("b")].stale
    await asyncio.sleep(1)
    down = True
    snapshot = await building.build([key("b"), key("double")])
    assert snapshot[key("b")].from_cache
    assert len(doubling.calls) == 1  # as what it rests on is there
    await building.aclose()
    assert not getattr(cache, "leased", {})


async def test_what_a_session_has_derived_anew_is_stored_under_leases() -> None:
    shop = Shop(cache=LeasingCache())
    async with await shop.session(TOP) as session:
        shop.stock.change(base=2)
        await session.revalidate([BASE, TOP], force_refresh=True)
    assert len(shop.stock.calls) == 2, "once for the session, and once for the revalidation"
    await asyncio.sleep(1)
    shop.middle.calls.clear()
    assert shown(await shop.builder.build([TOP, MIDDLE])) == {TOP: ((2,),), MIDDLE: (2,)}
    assert shop.middle.calls == []
    await shop.builder.aclose()
    assert shop.builder.cache.leased == {}  # type: ignore[attr-defined]  # it is the double


async def test_the_lease_on_what_waits_for_a_publication_is_given_back_by_closing() -> None:
    at_source = Gate()

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        await at_source.pass_()
        return "fetched"

    cache, at_cache = hanging(LeasingCache, "set_many_if_newer", patience=60.0)
    building = builder(Single("k", fetch=fetch), cache=cache)
    reading = await begun(building.build([key("k")]), at_source)
    event = await begun(building.publisher.publish(key("k"), "event", source="s"), at_cache)
    at_source.open()
    await settle()
    assert not reading.done()
    await building.aclose()
    assert cache.leased == {}  # type: ignore[attr-defined]  # it is the double
    assert (await building.health_snapshot()).singleflight_in_flight == 0
    at_cache.open()
    for each in (reading, event):
        with contextlib.suppress(RuntimeError):
            await each


async def test_a_lease_that_comes_as_its_reader_leaves_is_given_back() -> None:
    caches: list[LeasingCache] = []

    def start() -> Any:
        caches.append(LeasingCache())
        return builder(Single("b", fetch=latency(1)), cache=caches[-1]).build(KEYS[:2])

    async def check() -> None:
        await asyncio.sleep(5)
        assert caches[-1].leased == {}

    assert await cancel_at_every_await(start, check) > 5


async def test_of_two_values_of_one_key_that_are_ready_at_once_each_has_a_lease_of_its_own() -> (
    None
):
    """One was begun before an event beneath it, the other for a reader who came after that."""
    base, top, cache, at_base, at_top = key("base"), key("top"), LeasingCache(), Gate(), Gate()
    building = builder(
        Single("base", fetch=held_at(at_base)),
        Derived("top", needs=lambda _: [base], before=at_top.pass_),
        cache=cache,
    )
    before = await begun(building.build([top]), at_base)
    await building.publisher.publish(base, 2, source="event")
    after = await begun(building.build([top]), at_top)
    at_base.open()
    await at_top.wait_arrived(2)
    at_top.open()
    assert [(await each).value(top) for each in (before, after)] == [(2,), (2,)]
    await asyncio.sleep(5)
    assert cache.leased == {}
    assert cache.held[top].value == (2,)


async def test_a_lease_that_comes_when_its_reader_has_long_left_is_given_back() -> None:
    gate = Gate()

    class Deaf(LeasingCache):
        async def lease_many(self, keys: Any, **terms: Any) -> AsyncGenerator[Any, None]:
            answering = asyncio.ensure_future(gate.pass_())
            while not answering.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([answering])
            async for part in super().lease_many(keys, **terms):
                yield part

    cache = Deaf()
    reader = await begun(builder(Single("b"), cache=cache).build(KEYS[:1]), gate)
    reader.cancel()
    await asyncio.wait([reader])
    await asyncio.sleep(5)
    gate.open()
    await asyncio.sleep(5)
    assert cache.calls == ["lease_many", "release_many"]
    assert cache.leased == {}


@pytest.mark.parametrize("answered", [0, 1])
async def test_a_leasing_cache_that_ends_before_it_has_told_all_keeps_nobody_waiting(
    answered: int,
) -> None:
    class Brief(LeasingCache):
        async def lease_many(self, keys: Any, **terms: Any) -> AsyncGenerator[Any, None]:
            if answered:
                async for part in super().lease_many(tuple(keys)[:answered], **terms):
                    yield part

    cache, source = Brief(), Single("b")
    assert await seconds(builder(source, cache=cache).build(KEYS[:2])) < 0.1
    assert source.calls == KEYS[:2]
    await asyncio.sleep(1)
    assert [*cache.held] == KEYS[:answered]


async def test_what_a_leasing_cache_has_not_told_waits_for_nothing_that_is_asked_again() -> None:
    gate = Gate()

    class Brief(LeasingCache):
        async def lease_many(self, keys: Any, **terms: Any) -> AsyncGenerator[Any, None]:
            if terms["unlike"]:
                await gate.pass_()
            async for part in super().lease_many({*KEYS[:1]}.intersection(keys), **terms):
                yield part

    cache, clock = Brief(), LoopClock()
    cache.held[KEYS[0]] = value_of(KEYS[0], "future", observed_at=clock.now() + 900.0)
    building = builder(Single("b"), cache=cache, clock=clock)
    asked_again = asyncio.ensure_future(building.build(KEYS[:1]))
    assert await seconds(building.build(KEYS[1:2])) < 0.1
    assert not asked_again.done()
    gate.open()
    await asked_again


@pytest.mark.parametrize("kind", [BatchCache, LeasingCache], ids=lambda kind: kind.__name__)
async def test_the_answers_of_a_cache_are_passed_on_in_portions(
    kind: Callable[[], AsyncCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = Counter[Any]()  # of each task in each turn
    pass_on = SingleFlight._cache_answered

    def watched(self: SingleFlight, read: Any, revision: Any) -> None:
        answered[loop_turn(), asyncio.current_task()] += 1
        pass_on(self, read, revision)

    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    monkeypatch.setattr(SingleFlight, "_cache_answered", watched)
    building = builder(Batch("b"), cache=kind())
    await building.build([key("b", str(number)) for number in range(1_000)])
    assert answered.total() == 1_000
    assert max(answered.values()) <= 32


async def test_what_fails_as_the_first_is_about_to_ask_keeps_nobody_from_asking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    building = builder(Batch("b"), cache=BatchCache())
    with monkeypatch.context() as failing:
        failing.setattr(foreign_cache, "Read", None)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # which is told
        snapshot = await building.build(KEYS, strict=False)
        assert set(snapshot.errors) == set(KEYS)
    assert (await asyncio.wait_for(building.build(KEYS), 5)).complete


class Copier:
    """Copies payloads, and counts how many in each turn, while four looks use up a slice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copied = Counter[int]()
        began, looks = perf_counter(), itertools.count()
        monkeypatch.setattr(pace, "SLICE_SECONDS", 0.001)
        monkeypatch.setattr(
            "coalestra.concurrency.pace.time.perf_counter", lambda: began + next(looks) * 0.000_3
        )

    def __call__(self, value: Any) -> Any:
        self.copied[loop_turn()] += 1
        return value


async def test_who_read_a_cache_share_one_slice_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[key("b", f"{who} {number}") for number in range(50)] for who in range(10)]
    cache = BatchCache()
    async with builder(Batch("b"), cache=cache) as filling:
        await filling.build([key for group in groups for key in group])
    copier = Copier(monkeypatch)
    building = builder(Batch("b"), cache=cache, payload_copier=copier)
    builds = []
    for group in groups:
        builds.append(asyncio.ensure_future(building.build(group)))
        await asyncio.sleep(0)
    await asyncio.gather(*builds)
    assert copier.copied.total() >= 500
    assert max(copier.copied.values()) <= 20


async def test_who_reads_a_cache_and_who_takes_in_an_answer_share_one_slice_of_each_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held, lacking = ([key("b", f"{what} {n}") for n in range(500)] for what in ("held", "lacking"))
    cache = BatchCache()
    async with builder(Batch("b"), cache=cache) as filling:
        await filling.build(held)
    copier = Copier(monkeypatch)
    building = builder(Batch("b"), cache=cache, payload_copier=copier)
    await asyncio.gather(building.build(held), building.build(lacking))
    assert copier.copied.total() >= 2_000
    assert max(copier.copied.values()) <= 10  # with a slice for each of them it were twelve


# A cache that is right at every read --------------------------------------------------------------


class Checking(AsyncMemoryCache):
    """The memory cache as somebody's own: it judges derived entries itself, at every read."""


class Remote:
    """One process's way to a cache that several share, and that judges derived entries itself."""

    validates_dependency_versions = True

    def __init__(self, shared: AsyncMemoryCache) -> None:
        self.shared = shared
        self.gate = Gate(opened=True)

    async def get(self, key: ResourceKey, **how: Any) -> CacheLookup:
        if key == TOP:
            await self.gate.pass_()
        return await self.shared.get(key, **how)

    async def set(self, value: Any) -> None:
        await self.shared.set(value)

    async def invalidate(self, key: ResourceKey) -> None:
        await self.shared.invalidate(key)

    async def clear(self) -> None:
        await self.shared.clear()


async def test_no_value_is_made_from_two_revisions_though_each_read_was_right() -> None:
    """What is derived last rests on `base` directly, and two levels up once more."""
    shared = AsyncMemoryCache()
    shop, cache = Shop(cache=Remote(shared)), Remote(shared)
    last = Derived("last", needs=lambda k: [BASE, TOP])
    building = builder(shop.stock, shop.middle, shop.top, last, cache=cache)
    await shop.builder.build([TOP])
    cache.gate.close()
    reading = await begun(building.build([key("last")]), cache.gate)
    await asyncio.sleep(0.1)
    await shop.builder.publisher.publish(BASE, "event", source="s")
    await shop.builder.build([TOP])
    cache.gate.open()
    value = (await reading).value(key("last"))
    assert value in ((1, ((1,),)), ("event", (("event",),)))


@pytest.mark.parametrize("change", ["publish", "invalidate"])
async def test_who_comes_after_news_two_levels_down_gets_no_old_derivation(change: str) -> None:
    cache, gate = Checking(), Gate()
    shop = Shop(cache=cache)
    last = Derived("last", needs=lambda k: [TOP], before=gate.pass_)
    building = builder(shop.stock, shop.middle, shop.top, last, cache=cache)
    await building.build([TOP])
    early = await begun(building.build([key("last")]), gate)
    await asyncio.sleep(1)
    if change == "publish":
        await building.publisher.publish(BASE, 2, source="s")
    else:
        shop.stock.change(base=2)
        await building.publisher.invalidate(BASE)
    late = await begun(building.build([key("last")]))
    gate.open()
    assert (await late).value(key("last")) == (((2,),),)
    await early


# What a cache can do is asked by attribute --------------------------------------------------------


class Delegating:
    """Hands everything on to another cache, by attribute."""

    def __init__(self, wrapped: object) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


async def test_a_delegating_wrapper_keeps_what_its_cache_can_do() -> None:
    cache = BatchAtomicCache()
    building = builder(Batch("b"), cache=Delegating(cache))
    await building.build(KEYS)
    await building.publisher.invalidate_many(KEYS)
    await building.aclose()
    assert set(cache.calls) == {"get_many", "set_many_if_newer", "invalidate_many"}
    rules = SourceAuthorityPolicy({"b": 1})
    await builder(Batch("b"), cache=Delegating(AsyncMemoryCache()), authority_policy=rules).aclose()
    with pytest.raises(ValueError, match="validates_source_authority"):
        builder(Batch("b"), cache=Delegating(cache), authority_policy=rules)


async def test_a_cache_that_asks_for_it_learns_the_policy_of_what_it_stores() -> None:
    told: dict[str, Any] = {}

    class Expiring(BatchAtomicCache):
        accepts_policies = True

        async def set(self, value: Any, *, policy: Any = None) -> None:
            told["set"] = policy

        async def set_many_if_newer(self, values: Any, *, policies: Any = None, **how: Any) -> Any:
            told.update({value.key.name: policies[value.key] for value in values})
            return await super().set_many_if_newer(values, **how)

    building = builder(Batch("b"), cache=Expiring())
    await building.build(KEYS)
    await building.publisher.publish(key("event"), 1, source="s")
    await building.aclose()
    assert told == {"b": LASTING, "event": LASTING}


# Tasks that somebody else cancels, loops that end -------------------------------------------------


@KINDS
async def test_cancelling_every_task_at_any_step_leaves_nobody_waiting(kind: Kind) -> None:
    for steps in range(1, 30):
        building = builder(Batch("b"), cache=kind())
        reading = asyncio.ensure_future(building.build(KEYS, strict=False))
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task(), reading}:
            task.cancel()
        await asyncio.wait_for(reading, 10)
        assert (await asyncio.wait_for(building.build(KEYS), 10)).complete
        await asyncio.wait_for(building.aclose(), 10)


@pytest.mark.parametrize("kind", [AsyncMemoryCache, SingleKeyCache, BatchAtomicCache])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_a_publication_left_on_a_dead_loop_blocks_no_key_on_the_next(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    building = SnapshotBuilder([Single("b")], cache=kind(), default_policy=LASTING)

    async def leave() -> None:
        with monkeypatch.context() as slices:
            slices.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
            events = [ResourceUpdate(each, [1], "s") for each in KEYS]
            task = asyncio.ensure_future(building.publisher.publish_many(events))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not task.done(), "it has been announced, and rests"

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    drop(loop)

    async def later() -> None:
        for _ in range(2):
            await asyncio.wait_for(building.build(KEYS[:1]), 5)
        assert (await building.publisher.publish(KEYS[0], "event", source="s")).published
        assert (await asyncio.wait_for(building.build(KEYS[:1]), 5)).value(KEYS[0]) == "event"
        await building.aclose()

    asyncio.run(later())
    del loop
    gc.collect()  # what is left of the dead loop
