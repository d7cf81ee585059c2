"""Flights out of everybody's sight hear of events and invalidations too (invariant 11)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    CacheLookup,
    FetchContext,
    FreshnessPolicy,
    PolicyResolver,
    ResourceKey,
    Snapshot,
    SourcePayload,
)
from coalestra.orchestration import flights, singleflight
from tests.contracts.caches import SingleKeyCache
from tests.orchestration.scripted import LASTING, Batch, Derived, Single, builder, held_at, key
from tests.support import Gate, LoopClock, begun, lines_run, no_leaks, settle

pytestmark = pytest.mark.concurrency

BASE, D = key("base"), key("d")


def derived(before: Gate) -> Derived:
    """Derives d from base, after passing a gate."""
    return Derived("d", needs=lambda k: [BASE], before=before.pass_)


async def test_a_derivation_that_was_hidden_before_does_not_undo_an_event() -> None:
    at_base, at_derived = Gate(), Gate()
    building = builder(Single("base", fetch=held_at(at_base, "fetched")), derived(at_derived))
    early = await begun(building.build([D]), at_base)
    await asyncio.sleep(1)
    await building.publisher.publish(BASE, "base event", source="stream")
    at_base.open()
    await at_derived.wait_arrived()
    await building.publisher.publish(D, "derived event", source="stream")
    await asyncio.sleep(1)
    at_derived.open()
    assert (await early).value(D) == "derived event"
    assert (await building.build([D])).value(D) == "derived event"


@pytest.mark.parametrize("cache", [AsyncMemoryCache, SingleKeyCache])
async def test_what_a_session_derives_from_its_pins_is_no_news_to_others(cache: type[Any]) -> None:
    shared, gate = cache(), Gate()
    building = builder(Single("base"), Derived("d", needs=lambda k: [BASE]), cache=shared)
    other = builder(Single("base"), derived(gate), cache=shared)
    await building.publisher.publish(BASE, "old", source="stream")
    async with building.session() as session:
        await session.resolve([BASE, D])
        await other.publisher.publish(BASE, "new", source="stream")
        reader = await begun(other.build([D]), gate)
        await asyncio.sleep(1)
        again = await session.revalidate([D], force_refresh=True)
        assert again.value(D) == ("old",)
    gate.open()
    assert (await reader).value(D) == ("new",)
    assert (await other.build([D])).value(D) == ("new",)


async def test_of_more_news_than_is_remembered_all_is_taken_to_concern_what_is_derived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(singleflight, "_MOST_NEWS", 2)
    gate = Gate()
    building = builder(Single("base"), derived(gate))
    early = await begun(building.build([D]), gate)
    await building.publisher.publish(BASE, "new", source="stream")
    for name in ("x", "y", "z"):
        await building.publisher.publish(key(name), 1, source="stream")
    newcomer = await begun(building.build([D]))
    gate.open()
    assert (await newcomer).value(D) == ("new",)
    await early
    assert (await building.build([D])).value(D) == ("new",)


async def test_a_dated_read_that_an_event_and_an_invalidation_overtook_is_not_cached() -> None:
    gate = Gate()
    clock = LoopClock()

    async def fetch(k: ResourceKey, context: FetchContext) -> SourcePayload[str]:
        await gate.pass_()
        return SourcePayload("fetched", observed_at=clock.now())

    source = Single("base", fetch=fetch)
    building = builder(source, clock=clock)
    early = await begun(building.build([BASE]), gate)
    await building.publisher.publish(BASE, "event", source="stream")
    await building.publisher.invalidate(BASE)
    await asyncio.sleep(1)
    gate.open()
    await early
    await building.build([BASE])
    assert len(source.calls) == 2


@pytest.mark.parametrize("change", ["publish", "invalidate"])
async def test_a_forced_derivation_undoes_no_event_nor_outlives_its_end(change: str) -> None:
    gate = Gate(opened=True)
    source = derived(gate)
    building = builder(Single("base"), source)
    async with building.session() as session:
        await session.resolve([D])
        gate.close()
        await asyncio.sleep(1)
        forced = await begun(session.revalidate([D], force_refresh=True), gate, 2)
        if change == "publish":
            await building.publisher.publish(D, "event", source="stream")
        else:
            await building.publisher.invalidate(D)
        await asyncio.sleep(1)
        gate.open()
        await forced
    after = await building.build([D])
    if change == "publish":
        assert after.value(D) == "event"
    else:
        assert len(source.calls) == 3


# Caches that have to be awaited -----------------------------------------------------------------


class GatedCache(AsyncMemoryCache):
    """A cache of somebody else's, whose reads and writes pass gates."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.writing = Gate(opened=True), Gate(opened=True)

    async def get_many(self, keys: Any, **how: Any) -> Any:
        await self.reading.pass_()
        return await super().get_many(keys, **how)

    async def get(self, key: ResourceKey, **how: Any) -> CacheLookup:
        await self.reading.pass_()
        return await super().get(key, **how)

    async def set_many_if_newer(self, values: Any, **how: Any) -> Any:
        await self.writing.pass_()
        return await super().set_many_if_newer(values, **how)


@pytest.mark.parametrize("given_up", ["reading", "writing"])
@pytest.mark.parametrize("at_once", [True, False])
async def test_a_key_whose_call_was_given_up_can_be_had_again(given_up: str, at_once: bool) -> None:
    cache = GatedCache()
    gate: Gate = getattr(cache, given_up)
    gate.close()
    building = builder(Single("x"), cache=cache)
    early = await begun(building.build([key("x")]), gate)
    early.cancel()
    if not at_once:
        await settle()
        gate.open()
        await no_leaks(building)
    late = asyncio.ensure_future(building.build([key("x")]))
    await asyncio.sleep(0)
    gate.open()
    assert (await late).value(key("x")) == ""


async def test_a_read_that_nobody_wanted_when_its_group_was_sent_is_not_shared() -> None:
    cache = GatedCache()
    cache.reading.close()
    building = builder(Single("x"), cache=cache)
    other = asyncio.ensure_future(building.build([key("x", "other")]))
    early = asyncio.ensure_future(building.build([key("x", "left")]))
    for _ in range(2):
        await asyncio.sleep(0)
    early.cancel()
    await cache.reading.wait_arrived()
    late = await begun(building.build([key("x", "left")]))
    cache.reading.open()
    await other
    assert (await late).value(key("x", "left")) == "left"


async def test_an_expired_deadline_never_shows_a_stale_derived_value_beside_a_newer_base() -> None:
    slow = False
    clock = LoopClock()

    async def before() -> None:
        if slow:
            await asyncio.sleep(100)

    answers = iter("abcdef")

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        return next(answers)

    source = Derived("d", needs=lambda k: [BASE], before=before)
    building = builder(
        Single("base", fetch=fetch), source, clock=clock, default_policy=FreshnessPolicy(1, 100)
    )
    await building.build([D])
    await asyncio.sleep(5)
    slow = True
    snapshot: Snapshot = await building.build([D, BASE], strict=False, deadline_seconds=2)
    assert snapshot.value(BASE) == "b"
    assert D in snapshot.errors


class Counted(dict[Any, Any]):
    """Counts what it is asked."""

    asked = 0

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize("news", ["publish", "invalidate", "other"])
@pytest.mark.parametrize("joined", [True, False])
async def test_news_costs_a_chain_under_way_a_look_at_each_key(news: str, joined: bool) -> None:
    """Whoever is derived from the next, and so on, has all of that below itself."""
    gate, links = Gate(), [key("link", str(number)) for number in range(100)]

    def needs(k: ResourceKey) -> list[ResourceKey]:
        return [links[int(k.subject) - 1]] if k.subject != "0" else [BASE]

    building = builder(Single("base", fetch=held_at(gate, "fetched")), Derived("link", needs=needs))
    changed = building._engine.flights._news._changed = Counted()
    early = await begun(building.build(links[-1:]), gate)
    if news == "invalidate":
        await building.publisher.invalidate(BASE)
    else:
        about = BASE if news == "publish" else key("other")
        await building.publisher.publish(about, "event", source="stream")
    joining = await begun(building.build(links if joined else [BASE]))
    gate.open()
    await asyncio.gather(early, joining)
    assert changed.asked <= 4 * len(links)


@pytest.mark.parametrize("news", ["publish", "invalidate"])
async def test_one_news_after_the_other_hides_what_is_hidden_only_once(news: str) -> None:
    """What waits for a flight out of sight, directly or not, has gone out of sight with it."""
    gate, length = Gate(), 150

    def needs(k: ResourceKey) -> list[ResourceKey]:
        number = int(k.subject)
        below = [key("link", str(number - 1))] if number else []
        return [*below, key("base", str(number))]

    building = builder(Batch("base", before=gate.pass_), Derived("link", needs=needs))
    early = await begun(building.build([key("link", str(length))]), gate)

    async def tell() -> None:
        for number in range(length):
            about = key("base", str(number))
            if news == "publish":
                await building.publisher.publish(about, "event", source="stream")
            else:
                await building.publisher.invalidate(about)

    assert await lines_run(flights, tell()) < 100 * length
    gate.open()
    await early


@pytest.mark.parametrize("cache", [AsyncMemoryCache, SingleKeyCache])
@pytest.mark.parametrize("news", ["publication", "invalidation"])
async def test_what_rests_on_something_old_does_not_stand_in_for_who_comes_after_the_news(
    cache: type[Any], news: str
) -> None:
    gate, above = Gate(), key("above")

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        if k != BASE:
            await gate.pass_()
        return "fetched"

    building = builder(
        Single("all", "base", "slow", fetch=fetch), Derived("d", needs=lambda k: [BASE]),
        Derived("above", needs=lambda k: [D]), cache=cache(),
        default_policy=FreshnessPolicy(5, 1_000), max_concurrency=1,
    )  # fmt: skip
    await building.build([above])
    await asyncio.sleep(6)
    slow = await begun(building.build([key("slow")]), gate)
    early = asyncio.ensure_future(building.build([above]))
    await asyncio.sleep(0.1)
    if news == "publication":
        await building.publisher.publish(BASE, "event", source="stream")
    else:
        await building.publisher.invalidate(BASE)
    for wanted in (above, D):
        late = await building.build([wanted], strict=False, deadline_seconds=1)
        assert wanted not in late
    gate.open()
    assert (await early).value(above) in ((("fetched",),), (("event",),))
    await slow
    await no_leaks(building)


@pytest.mark.parametrize("cache", [AsyncMemoryCache, SingleKeyCache])
async def test_who_comes_after_news_joins_no_derivation_from_old_inputs(cache: type[Any]) -> None:
    gate = Gate(opened=True)
    policies = PolicyResolver(LASTING, overrides={D: FreshnessPolicy(5, 1_000)})
    building = builder(Single("base"), derived(gate), cache=cache(), policy_resolver=policies)
    await building.build([D])
    await asyncio.sleep(6)
    gate.close()
    early = await begun(building.build([D]), gate, 2)
    await building.publisher.publish(BASE, "event", source="stream")
    late = await begun(building.build([D]))
    gate.open()
    assert (await late).value(D) == ("event",)
    await early
