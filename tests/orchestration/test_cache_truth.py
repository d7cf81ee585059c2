"""A read never undoes newer knowledge, and derived values never mix old and new (11, 12)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    FetchContext,
    FreshnessPolicy,
    RefreshMode,
    ResourceAbsent,
    ResourceKey,
    ResourceUpdate,
    SnapshotBuilder,
    SnapshotRequest,
    SourcePayload,
)
from coalestra.concurrency import pace
from coalestra.orchestration import calls, deliveries, singleflight
from tests.contracts.caches import BatchAtomicCache, SingleKeyCache
from tests.contracts.samples import value_of
from tests.orchestration.scripted import (
    Batch,
    Derived,
    Scripted,
    Single,
    builder,
    down,
    held_at,
    key,
    latency,
)
from tests.support import Gate, begun, settle

pytestmark = pytest.mark.concurrency

K = key("x", "1")


def gated(kind: str, gate: Gate) -> Scripted:
    """A source of the given kind for keys named x (or one that is busy), which passes the gate."""
    if kind == "batch":
        return Batch("x", before=gate.pass_, answer=lambda k: "fetched")
    if kind == "derived":
        return Derived("x", needs=lambda k: [key("base")], before=gate.pass_)

    return Single(kind if kind == "busy" else "x", fetch=held_at(gate, "fetched"))


KINDS = ["single", "batch", "derived"]


@pytest.mark.parametrize("kind, pause", [*((kind, 1) for kind in KINDS), ("single", 0)])
async def test_a_read_begun_before_a_publication_neither_undoes_it_nor_is_joined(
    kind: str, pause: int
) -> None:
    """Also where the clock stands still: order does not depend on it."""
    gate = Gate()
    building = builder(gated(kind, gate), Single("base"))
    reader = await begun(building.build([K]), gate)
    await asyncio.sleep(pause)
    await building.publisher.publish(K, "event", source="stream")
    assert (await building.build([K])).value(K) == "event"
    await asyncio.sleep(pause)
    gate.open()
    assert (await reader).value(K) == "event"
    assert (await building.build([K])).value(K) == "event"


@pytest.mark.parametrize("kind", ["single", "batch"])
@pytest.mark.parametrize("memory", [True, False])
async def test_what_is_read_after_an_event_is_newer_than_that(memory: bool, kind: str) -> None:
    """And it is read once, though the event is too old to be of use to who comes next."""
    gate, source = Gate(), gated(kind, Gate(opened=True))
    cache = AsyncMemoryCache() if memory else SingleKeyCache()
    building = builder(source, gated("busy", gate), max_concurrency=1, cache=cache)
    busy = await begun(building.build([key("busy")]), gate)
    readers = [asyncio.ensure_future(building.build([K]))]
    await settle()
    old = building.clock.now() - 1_500.0
    await building.publisher.publish(K, "event", source="stream", observed_at=old)
    readers.append(asyncio.ensure_future(building.build([K])))
    await settle()
    await asyncio.sleep(1)
    gate.open()
    await busy
    assert [snapshot.value(K) for snapshot in await asyncio.gather(*readers)] == ["fetched"] * 2
    assert (await building.build([K])).value(K) == "fetched", "and it is cached"
    assert len(source.calls) == 1


async def test_what_is_read_after_another_process_has_stored_a_value_is_newer_than_that() -> None:
    """It comes out under way, as what had been read before that is written only then."""

    class Slow(BatchAtomicCache):
        timeout_seconds = 60.0

        async def _travel(self, call: str) -> None:
            await super()._travel(call)
            if call.startswith("set"):
                await writing.pass_()

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        if len(source.calls) == 1:
            return SourcePayload("old", observed_at=context.requested_at - 3)
        await reading.pass_()
        return "new"

    writing, reading, source = Gate(), Gate(), Single("x", fetch=fetch)
    cache = Slow()
    building = builder(source, cache=cache)
    session = building.session()
    assert (await session.resolve([K])).value(K) == "old"
    cache.held[K] = value_of(K, "elsewhere", observed_at=building.clock.now() - 1)
    await asyncio.sleep(1)
    forced = await begun(session.revalidate([K], force_refresh=True), reading)
    writing.open()
    await settle()
    assert (await building.build([K])).value(K) == "elsewhere"
    reading.open()
    assert (await forced).value(K) == "new"
    assert (await building.build([K])).value(K) == "new"
    await building.aclose()


@pytest.mark.parametrize("stale", [False, True])
async def test_what_was_published_of_a_queued_key_stands_in_while_it_may(stale: bool) -> None:
    gate = Gate()
    policy = FreshnessPolicy(1_000.0, 2_000.0, allow_stale_on_error=False)
    sources = [Single("x", fetch=down), gated("busy", gate)]
    building = builder(*sources, max_concurrency=1, default_policy=policy)
    busy = await begun(building.build([key("busy")]), gate)
    reader = await begun(building.build([K], strict=False))
    at = building.clock.now() - (1_500.0 if stale else 0.0)
    await building.publisher.publish(K, "event", source="stream", observed_at=at)
    gate.open()
    await busy
    assert (K in await reader) is not stale


@pytest.mark.parametrize("room", [None, 1])
async def test_a_dated_read_does_not_undo_an_event_that_had_to_make_room(room: int | None) -> None:
    gate, world = Gate(), ["before"]

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        if k != K:
            return "other"
        seen = SourcePayload(world[0], observed_at=context.requested_at)
        await gate.pass_()
        return seen

    building = builder(
        Single("all", "x", "other", fetch=fetch), cache=AsyncMemoryCache(max_entries=room)
    )
    reader = await begun(building.build([K]), gate)
    await asyncio.sleep(1)
    world[0] = "after"
    await building.publisher.publish(K, "after", source="stream")
    await building.build([key("other")])
    gate.open()
    assert (await reader).value(K) == "after"
    assert (await building.build([K])).value(K) == "after"


@pytest.mark.parametrize("kind, of", [*((kind, "its key") for kind in KINDS), ("single", "all")])
async def test_a_read_that_began_before_an_invalidation_is_not_cached_nor_joined(
    kind: str, of: str
) -> None:
    gate = Gate()
    source, cache = gated(kind, gate), AsyncMemoryCache()
    building = builder(source, Single("base"), cache=cache)
    early = await begun(building.build([K]), gate)
    if of == "its key":
        await building.publisher.invalidate(K)
    else:
        await cache.invalidate_namespace("test")
    late = await begun(building.build([K]), gate, 2)
    gate.let_through(1)
    first = await early
    assert not late.done()
    gate.open()
    second = await late
    assert len(source.calls) == 2
    assert first[K].version != second[K].version
    assert (await building.build([K]))[K].version == second[K].version


@pytest.mark.parametrize("change", ["publish", "invalidate"])
async def test_a_refresh_begun_before_a_change_neither_undoes_nor_outlives_it(change: str) -> None:
    gate = Gate(opened=True)
    policy = FreshnessPolicy(1, 100, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    source = gated("single", gate)
    building = builder(source, default_policy=policy)
    await building.build([K])
    gate.close()
    await asyncio.sleep(5)
    stale = await building.build([K])
    assert stale[K].stale
    await gate.wait_arrived(2)
    if change == "publish":
        await building.publisher.publish(K, "event", source="stream")
    else:
        await building.publisher.invalidate(K)
    gate.open()
    await building.wait_for_refreshes()
    after = await building.build([K])
    if change == "publish":
        assert after.value(K) == "event"
    else:
        assert len(source.calls) == 3


@pytest.mark.parametrize("news", ["publish", "invalidate", "invalidate_matching"])
async def test_a_derivation_about_to_be_handed_what_was_replaced_since_is_not_joined(
    news: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Very many wait for the base, and are told in portions."""
    monkeypatch.setattr(singleflight, "_WAITERS_PER_STEP", 1)
    monkeypatch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    gates, truth = {"base": Gate(), "late": Gate()}, [1]
    base, derived = key("base"), key("derived")

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        number = truth[0]
        if k.name in gates:
            await gates[k.name].pass_()
        return number

    single = Single("all", "base", "late", "other", fetch=fetch)
    cache = AsyncMemoryCache()
    building = builder(single, Derived("derived", needs=lambda k: [base, key("late")]), cache=cache)
    asked = [[base, key("other", str(number))] for number in range(30)]
    readers = [asyncio.ensure_future(building.build(keys)) for keys in [*asked, [derived]]]
    await gates["base"].wait_arrived()
    await settle()
    gates["base"].open()
    await readers[0]
    truth[0] = 2
    if news == "publish":
        await building.publisher.publish(base, 2, source="stream")
    elif news == "invalidate":
        await building.publisher.invalidate(base)
    else:
        await cache.invalidate_matching(base.__eq__)
    newcomer = await begun(building.build([derived]))
    gates["late"].open()
    assert (await readers[-1]).value(derived) in ((1, 1), (2, 1))
    assert (await newcomer).value(derived)[0] == 2
    assert (await building.build([derived])).value(derived)[0] == 2
    await asyncio.gather(*readers)


async def test_a_fetch_that_ends_while_a_publication_is_being_written_gives_way_to_it() -> None:
    at_source, at_write = Gate(), Gate()

    class Store(AsyncMemoryCache):
        """A cache whose writes of events pass a gate."""

        async def set_many_if_newer(self, values: Any, **how: Any) -> Any:
            if any(value.source == "stream" for value in values):
                await at_write.pass_()
            return await super().set_many_if_newer(values, **how)

        async def set_if_newer(self, value: Any, **how: Any) -> Any:
            if value.source == "stream":
                await at_write.pass_()
            return await super().set_if_newer(value, **how)

    building: SnapshotBuilder = builder(gated("single", at_source), cache=Store())
    reader = await begun(building.build([K]), at_source)
    event = await begun(building.publisher.publish(K, "event", source="stream"), at_write)
    await asyncio.sleep(0.5)
    at_source.open()
    await settle()
    assert not reader.done()
    at_write.open()
    await event
    assert (await reader).value(K) == "event"
    assert (await building.build([K])).value(K) == "event"


@pytest.mark.parametrize("steps", range(16))
async def test_an_invalidation_at_any_step_of_a_fetch_leaves_nothing_cached(steps: int) -> None:
    class Foreign(AsyncMemoryCache):
        """Any other type than the library's own is a cache that has to be awaited."""

    gate = Gate()
    source = gated("single", gate)
    building = builder(source, cache=Foreign())
    reader = await begun(building.build([K]), gate)
    gate.open()
    for _ in range(steps):
        await asyncio.sleep(0)
    await building.publisher.invalidate(K)
    await reader
    await building.build([K])
    assert len(source.calls) == 2


@pytest.mark.parametrize("lasting", [False, True], ids=["build", "session"])
@pytest.mark.parametrize(
    "names",
    [["a", "b"], ["a", "slow", "b"], ["sum"], ["sum", "b", "a"]],
    ids=str,
)
async def test_who_waits_for_one_half_of_a_publication_sees_the_other_too(
    names: list[str], lasting: bool
) -> None:
    gate = Gate()
    a, b = (key(name) for name in "ab")
    slow = Single("slow", "b", "slow", fetch=held_at(gate, "fetched"))
    derived = Derived("sum", needs=lambda _: [a, b])
    building = builder(Single("a"), slow, derived, max_concurrency=3)
    await building.publisher.publish(a, 1, source="news")
    wanted, session = [key(name) for name in names], building.session()
    reader = await begun(session.resolve(wanted) if lasting else building.build(wanted), gate)
    await building.publisher.publish_many([ResourceUpdate(k, 2, "news") for k in (a, b)])
    gate.open()
    expected = {"a": 2, "b": 2, "slow": "fetched", "sum": (2, 2)}
    snapshot = await reader
    assert [value.value for value in snapshot.values()] == [expected[name] for name in names]
    assert (await building.build([key("sum")])).value(key("sum")) == (2, 2)
    assert len(derived.calls) == 1


@pytest.mark.parametrize("error", [ResourceAbsent("none"), ValueError("broken")], ids=repr)
async def test_who_had_no_value_of_one_half_of_a_publication_sees_it_too(error: Exception) -> None:
    async def fail(*_: object) -> None:
        raise error

    gate = Gate()
    a, b = (key(name) for name in "ab")
    building = builder(Single("a", fetch=fail), Single("b", fetch=held_at(gate, 1)))
    reader = await begun(building.build([a, b], strict=False), gate)
    await building.publisher.publish_many([ResourceUpdate(k, 2, "news") for k in (a, b)])
    gate.open()
    assert {k: value.value for k, value in (await reader).items()} == {a: 2, b: 2}


async def test_who_waits_for_one_half_of_an_answer_gets_the_other_too() -> None:
    rounds, gate, keys = iter(range(9)), Gate(), [key("b", "1"), key("b", "2")]

    class Together(Batch):
        async def fetch_many(self, keys: Any, context: FetchContext) -> Any:
            current = next(rounds)
            if current:
                await gate.pass_()
            return dict.fromkeys(keys, current)

    building = builder(Together("b"))
    session = building.session()
    await session.resolve(keys)
    await building.publisher.invalidate(keys[1])
    writing = await begun(session.revalidate(keys, force_refresh=True), gate)
    reader = asyncio.ensure_future(building.build(keys))
    await settle()
    gate.open()
    assert [value.value for value in (await reader).values()] == [1, 1]
    assert [value.value for value in (await writing).values()] == [1, 1]


async def test_who_gets_one_half_of_a_publication_at_his_deadline_gets_the_other_too() -> None:
    a, b, c = (key(name) for name in "abc")
    building = builder(Single("slow", "b", "c", fetch=latency(10)))
    await building.publisher.publish(a, 1, source="news")
    reader = asyncio.ensure_future(building.build([a, b, c], strict=False, deadline_seconds=2))
    await asyncio.sleep(1)
    await building.publisher.publish_many([ResourceUpdate(k, 2, "news") for k in (a, b)])
    snapshot = await reader
    assert {k: value.value for k, value in snapshot.items()} == {a: 2, b: 2}
    assert list(snapshot.errors) == [c]


async def test_whose_time_was_over_before_he_began_gets_nothing_that_was_published_either() -> None:
    building = builder(Batch("b"))
    some = [key("b", "1"), key("b", "2")]
    await building.build(some)
    await building.publisher.publish_many([ResourceUpdate(k, 2, "news") for k in some])
    session = building.session(deadline_seconds=1)
    await asyncio.sleep(2)
    assert len((await session.resolve(some, strict=False)).errors) == 2


async def test_what_is_pinned_or_read_anew_gives_way_to_no_publication() -> None:
    gate = Gate()
    a, b, c = (key(name) for name in "abc")
    building = builder(Single("a"), Single("b", fetch=held_at(gate, 1)), Single("c"))
    session = building.session()
    await session.resolve([a])
    reader = await begun(session.resolve([b, c]), gate)
    await building.publisher.publish_many([ResourceUpdate(k, 2, "news") for k in (a, b, c)])
    gate.open()
    assert [value.value for value in (await reader).values()] == ["", 2, 2]
    assert (await session.revalidate([a])).value(a) == 2


@pytest.mark.parametrize("turns", range(20))
@pytest.mark.parametrize("nested", [False, True])
async def test_what_is_derived_anew_is_made_of_no_halves(
    nested: bool, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", -1.0)
    monkeypatch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
    gate = Gate()
    a, b, total = (key(name) for name in ("a", "b", "total"))
    derived = Derived("total", needs=lambda _: [a, b], before=gate.pass_)
    top = Derived("top", needs=lambda _: [a, total])
    building = builder(Single("a"), Single("b"), derived, top)

    async def publish(number: int) -> None:
        await building.publisher.publish_many([ResourceUpdate(k, number, "news") for k in (a, b)])

    await publish(1)
    reader = await begun(building.build([key("top")] if nested else [a, total]), gate)
    await publish(2)
    gate.open()
    for _ in range(turns):
        await asyncio.sleep(0)
    await publish(3)
    snapshot = await reader
    it, both = snapshot.value(key("top")) if nested else (snapshot.value(a), snapshot.value(total))
    assert both == (it, it)


@pytest.mark.parametrize("way", ["build", "request", "session", "further stage", "derivation"])
async def test_a_reader_of_very_much_sees_all_of_a_publication_or_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", -1.0)
    monkeypatch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
    for module, name in (
        (deliveries, "_KEYS_AT_ONCE"),
        (deliveries, "_KEYS_BETWEEN_LOOKS"),
        (singleflight, "_KEYS_AT_ONCE"),
        (singleflight, "_KEYS_PER_STEP"),
    ):
        monkeypatch.setattr(module, name, 2)
    some = [key("b", str(number)) for number in range(6)]
    double, total, further = key("double"), key("total"), key("further")
    needs = {double: some[-1:], total: some, further: [key("b", "apart")]}
    keys = [double, *some]

    async def found_after(turns: int) -> set[int]:
        derived = Derived("derived", "double", "total", "further", needs=needs.__getitem__)
        building = builder(Batch("b"), derived)
        first, second = (
            [ResourceUpdate(each, number, "news") for each in some] for number in (1, 2)
        )
        await building.publisher.publish_many(first)
        await building.build([double])
        session = building.session()
        if way == "further stage":
            await session.resolve([further])
        reading: dict[str, Any] = {
            "build": lambda: building.build(keys),
            "request": lambda: building.build_request(SnapshotRequest(required=keys)),
            "derivation": lambda: building.build([total]),
        }
        reader = asyncio.ensure_future(reading.get(way, lambda: session.resolve(keys))())
        for _ in range(turns):
            await asyncio.sleep(0)
        await building.publisher.publish_many(second)
        values = [value.value for k, value in (await reader).items() if k != further]
        return {n for each in values for n in (each if isinstance(each, tuple) else (each,))}

    found = [await found_after(turns) for turns in range(1, 12)]
    assert {1} in found
    assert all(each in ({1}, {2}) for each in found), found


@pytest.mark.parametrize("further", [False, True])
async def test_a_reader_of_very_much_without_sources_sees_all_of_a_first_publication_or_nothing(
    monkeypatch: pytest.MonkeyPatch, further: bool
) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", -1.0)
    monkeypatch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
    monkeypatch.setattr(singleflight, "_KEYS_AT_ONCE", 2)
    monkeypatch.setattr(singleflight, "_KEYS_PER_STEP", 2)
    some, known = [key("news", str(number)) for number in range(6)], key("news", "known")
    seen = set()
    for turns in range(1, 12):
        building = builder()
        session = building.session()
        await building.publisher.publish(known, 0, source="news")
        if further:
            await session.resolve([known])
        reader = asyncio.ensure_future(session.resolve(some, strict=False))
        for _ in range(turns):
            await asyncio.sleep(0)
        await building.publisher.publish_many([ResourceUpdate(each, 1, "news") for each in some])
        snapshot = await reader
        found = len([each for each in some if each in snapshot])
        assert found in (0, len(some)), f"torn after {turns} turns"
        seen.add(found)
    assert seen == {0, len(some)}


async def test_others_see_all_values_of_one_answer_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(calls, "PORTION", 1)
    rounds, cache, keys = iter(range(100)), AsyncMemoryCache(), [key("b", str(n)) for n in range(9)]
    current = 0

    class Together(Batch):
        async def fetch_many(self, keys: Any, context: FetchContext) -> Any:
            nonlocal current
            current = next(rounds)
            return {k: [current] for k in keys}

    building = builder(Together("b"), cache=cache)
    seen = set()
    for number in range(3):
        await asyncio.sleep(1)
        session = building.session()
        if number:
            await session.resolve(keys)
        renewal = session.revalidate(keys, force_refresh=True) if number else session.resolve(keys)
        writing = asyncio.ensure_future(renewal)
        while not writing.done():
            held = [cache.store.peek(each) for each in keys]
            values = {None if each is None else each.payload[0] for each in held}
            assert len(values) == 1, values
            seen |= values
            await asyncio.sleep(0)
        assert writing.result().diagnostics.cache_batch_writes == 1
    assert seen == {None, 0, 1, 2}


async def test_what_an_answer_has_one_value_of_is_no_write_of_many() -> None:
    class Forgetful(Batch):
        async def fetch_many(self, keys: Any, context: FetchContext) -> Any:
            return {k: 1 for k in keys if k.subject == "0"}

    building = builder(Forgetful("b"))
    for keys in ([key("b", "0"), key("b", "1")], [key("b", "1"), key("b", "2")]):
        snapshot = await building.build(keys, strict=False)
        assert snapshot.diagnostics.cache_batch_writes == 0
