"""A memory in front of a cache: when it serves, what it lets in, and when it forgets."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest

from coalestra import (
    CacheWriteStatus,
    CallableDerivedSource,
    CallableSource,
    FreshnessPolicy,
    NearCache,
    ObservationPolicy,
    ResourceKey,
    SnapshotBuilder,
    SnapshotBuildError,
)
from coalestra.cache.access import CacheAccess, Channel
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.values import Revision
from tests.contracts.caches import BatchAtomicCache, SingleKeyCache
from tests.contracts.samples import NOW, A, B, Witness, revision_of, value_of
from tests.support import Gate, ManualClock, begun

POLICY = FreshnessPolicy(60.0, 120.0)


class Telling(BatchAtomicCache):
    """A cache that tells of changes when the test says so."""

    near_entries = 100
    near_seconds = 60.0

    def __init__(self) -> None:
        super().__init__()
        self.listeners: list[Any] = []
        self.connected = True

    def subscribe(self, listener: Any) -> None:
        self.listeners.append(listener)

    def unsubscribe(self, listener: Any) -> None:
        self.listeners.remove(listener)

    def caught_up(self) -> bool:
        return self.connected


class LeftAlone(Telling):
    """One that has failed so often that it is not asked for a while."""

    is_available = False


def near_of(cache: Any, *, entries: int = 10, seconds: float = 60.0) -> tuple[Channel, Witness]:
    cache.near_entries, cache.near_seconds = entries, seconds
    channel, witness = Channel(cache, asyncio.new_event_loop()), Witness()
    channel.loop.close()
    channel.listeners.subscribe(witness)
    return channel, witness


def kept(near: Channel, revision: Revision) -> bool:
    return near.store.peek(revision.key) is revision


def put(near: Channel, revision: Revision) -> None:
    with near.filling() as filling:
        near.put(filling, [revision])


def test_news_of_another_version_removes_what_is_kept_and_is_passed_on() -> None:
    near, witness = near_of(Telling())
    held = revision_of(A)
    put(near, held)
    near.changed(A, held.version)
    assert kept(near, held)
    assert witness.heard == []
    near.changed(A, "other")
    assert not kept(near, held)
    assert witness.heard == [("invalidating", (A,), "other")]


@pytest.mark.parametrize("told", [None, "other"])
def test_what_was_read_before_a_change_is_not_put_in_after_it(told: str | None) -> None:
    near, _ = near_of(Telling())
    read, same = revision_of(A), revision_of(B)
    with near.filling() as filling:
        near.changed(A, told)
        near.changed(B, same.version)
        near.put(filling, [read])
        near.put(filling, [same])
    assert not kept(near, read)
    assert kept(near, same)


def test_what_was_read_before_this_process_wrote_is_not_put_in_after_it() -> None:
    near, _ = near_of(Telling())
    read, stored = revision_of(A), revision_of(A)
    with near.filling() as reading, near.filling() as writing:
        near.wrote(writing, [(CacheWriteStatus.STORED, stored, None)])
        near.put(reading, [read])
        assert kept(near, stored)


@pytest.mark.parametrize("what", ["missed", "changed"])
def test_what_was_stored_while_something_else_may_have_been_is_looked_up_again(what: str) -> None:
    near, _ = near_of(Telling())
    old, stored = revision_of(A), revision_of(A)
    with near.filling() as writing:
        if what == "missed":
            near.missed()
        else:
            near.changed(A, "other")
        put(near, old)
        near.wrote(writing, [(CacheWriteStatus.STORED, stored, None)])
        assert near.store.peek(A) is None


def test_a_value_on_its_way_keeps_out_what_it_replaces_and_is_let_in_itself() -> None:
    near, _ = near_of(Telling())
    old, new = revision_of(A), revision_of(A)
    put(near, old)
    with near.filling() as reading, near.filling() as writing:
        near.drop({A: new.version})
        assert not kept(near, old)
        near.put(reading, [old])
        assert not kept(near, old)
        near.wrote(writing, [(CacheWriteStatus.STORED, new, None)])
        assert kept(near, new)


def test_without_entries_it_only_passes_on_the_news() -> None:
    near, witness = near_of(Telling(), entries=0)
    put(near, revision_of(A))
    assert near.trusted() is None
    assert not len(near.store)
    near.changed(A, None)
    assert witness.heard == [("invalidating", (A,))]


@pytest.mark.parametrize("what", ["missed", "dropped"])
def test_nor_after_a_gap_in_the_news_or_a_change_of_ones_own(what: str) -> None:
    near, _ = near_of(Telling())
    read = revision_of(A)
    with near.filling() as filling:
        if what == "missed":
            near.missed()
        else:
            near.drop({A: None})
        near.put(filling, [read])
        assert not kept(near, read)


def test_a_gap_empties_it() -> None:
    near, witness = near_of(Telling())
    put(near, revision_of(A))
    near.missed()
    assert not len(near.store)
    assert witness.heard[0][0] == "invalidating_where"


def test_after_its_time_an_entry_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    near, _ = near_of(SingleKeyCache(), seconds=1.0)
    once, again = revision_of(A), revision_of(B)
    put(near, once)
    put(near, again)
    now[0] += 0.9
    put(near, again)
    now[0] += 0.9
    assert near.trusted() is near.store
    assert (kept(near, once), kept(near, again)) == (False, True)
    now[0] += 0.2
    assert near.trusted() is near.store
    assert not kept(near, again)


def test_what_it_remembers_of_arrivals_is_bounded() -> None:
    near, _ = near_of(SingleKeyCache(), entries=10)
    for number in range(5000):
        put(near, revision_of(ResourceKey("test", "entry", str(number))))
    assert len(near._due) < 2000


# Behind a builder -----------------------------------------------------------------------------


def builder_over(cache: Any, fetch: Callable[..., Any], *others: Any) -> SnapshotBuilder:
    source = CallableSource(name="s", priority=1, supports=lambda _: True, fetcher=fetch)
    clock = ManualClock(NOW)
    return SnapshotBuilder([source, *others], cache=cache, default_policy=POLICY, clock=clock)


async def one(_key: ResourceKey, _context: object) -> int:
    return 1


@pytest.mark.parametrize("make", [SingleKeyCache, BatchAtomicCache])
async def test_a_warm_read_does_not_ask_the_cache(make: type[SingleKeyCache]) -> None:
    cache = make()
    async with builder_over(NearCache(cache), one) as builder:
        await builder.build([A])
        asked = list(cache.calls)
        value = (await builder.build([A]))[A]
        assert (value.value, value.from_cache) == (1, True)
        assert cache.calls == asked


async def test_what_this_process_publishes_or_invalidates_is_seen_at_once() -> None:
    async with builder_over(NearCache(SingleKeyCache()), one) as builder:
        await builder.build([A])
        await builder.publisher.publish(A, 2, source="s")
        assert (await builder.build([A]))[A].value == 2
        await builder.publisher.invalidate(A)
        assert (await builder.build([A]))[A].value == 1


async def test_what_may_have_been_written_is_looked_up_though_its_publisher_has_left() -> None:
    gate = Gate()

    class Slow(SingleKeyCache):
        async def set(self, value: Any) -> None:
            await super().set(value)
            await gate.pass_()

    gate.open()
    cache = Slow()
    async with builder_over(NearCache(cache), one) as builder:
        await builder.build([A])
        gate.close()
        publishing = asyncio.ensure_future(builder.publisher.publish(A, 2, source="s"))
        await asyncio.sleep(0.5)
        assert cache.held[A].value == 2
        publishing.cancel()
        await asyncio.wait([publishing])
        assert (await builder.build([A]))[A].value == 2


async def test_while_the_news_are_cut_reads_go_to_the_cache() -> None:
    cache = Telling()
    async with builder_over(cache, one) as builder:
        await builder.build([A])
        cache.connected = False
        before = cache.calls.count("get_many")
        await builder.build([A])
        assert cache.calls.count("get_many") == before + 1


@pytest.mark.parametrize("since", ["the beginning", "the second reader"])
async def test_while_the_news_are_cut_nobody_joins_a_fetch_that_began_before(since: str) -> None:
    cache, gate = Telling(), Gate()
    cache.connected = since != "the beginning"
    truth = [1]

    async def slow(_key: ResourceKey, _context: object) -> int:
        read = truth[0]
        await gate.pass_()
        return read

    async with builder_over(cache, slow) as builder:
        first = await begun(builder.build([A]), gate)
        truth[0] = 2
        cache.connected = False
        second = await begun(builder.build([A]), gate, 2)
        gate.open()
        assert [(await first)[A].value, (await second)[A].value] == [1, 2]


@pytest.mark.parametrize("since", ["the beginning", "the second reader"])
async def test_nor_a_derivation_that_has_taken_in_what_may_be_old(since: str) -> None:
    cache, gate = Telling(), Gate()
    cache.connected = since != "the beginning"

    async def derive(_key: ResourceKey, snapshot: Any, _context: object) -> int:
        value: int = snapshot[A].value
        await gate.pass_()
        return value

    derived = CallableDerivedSource(
        name="derived", priority=2, supports=lambda key: key == B, dependencies=lambda _: [A],
        deriver=derive,
    )  # fmt: skip
    async with builder_over(cache, one, derived) as builder:
        first = await begun(builder.build([B]), gate)
        cache.held[A] = value_of(A, 2)  # by another process
        cache.connected = False
        second = await begun(builder.build([B]), gate, 2)
        gate.open()
        assert [(await first)[B].value, (await second)[B].value] == [1, 2]


async def test_while_the_news_are_cut_a_cycle_is_still_found() -> None:
    cache, asked = Telling(), 0
    cache.connected = False

    async def asks_itself(key: ResourceKey, _context: object) -> int:
        nonlocal asked
        asked += 1
        return asked if asked > 9 else (await builder.build([B if key == A else A])).value(key)

    async with builder_over(cache, asks_itself) as builder:
        with pytest.raises(SnapshotBuildError, match="must not form a cycle"):
            await builder.build([A])
        assert asked == 2


async def test_while_a_cache_that_tells_is_left_alone_readers_share_a_fetch() -> None:
    """Nobody could tell them more than the source, which is spared the crowd."""
    cache, gate = LeftAlone(), Gate()
    cache.connected = False

    async def slow(_key: ResourceKey, _context: object) -> int:
        await gate.pass_()
        return 1

    async with builder_over(cache, slow) as builder:
        first = await begun(builder.build([A]), gate)
        second = asyncio.ensure_future(builder.build([A]))
        await asyncio.sleep(0.1)
        gate.open()
        assert [(await first)[A].value, (await second)[A].value] == [1, 1]
        assert gate.arrived == 1


async def test_while_the_news_are_cut_what_is_on_its_way_does_not_count_as_held() -> None:
    cache, on_its_way = Telling(), revision_of(A)
    access = CacheAccess(cache, PayloadCopies("test"), 4, ObservationPolicy())
    access.hold(on_its_way, NOW)
    assert await access.read([A], NOW, {A: POLICY}) == {A: on_its_way}
    cache.connected = False
    assert await access.read([A], NOW, {A: POLICY}) == {}


async def test_news_from_elsewhere_are_seen_by_the_next_read() -> None:
    cache = Telling()
    async with builder_over(cache, one) as builder:
        await builder.build([A])
        [near] = cache.listeners
        del cache.held[A]
        near.changed(A, None)
        value = (await builder.build([A]))[A]
        assert not value.from_cache


def test_it_passes_on_what_the_cache_can_do() -> None:
    cache = BatchAtomicCache()
    near = NearCache(cache)
    assert near.get_many == cache.get_many
    assert not hasattr(NearCache(SingleKeyCache()), "get_many")


@pytest.mark.parametrize(
    "arguments", [{"near_entries": 0}, {"near_seconds": 0.0}, {"near_seconds": -1.0}]
)
def test_bounds_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="near_"):
        NearCache(SingleKeyCache(), **arguments)


class Deaf(Telling):
    def subscribe(self, listener: Any) -> None:
        raise OSError("no news today")


class Unsure(Telling):
    def caught_up(self) -> bool:
        raise OSError("no news today")


class Timeless(BatchAtomicCache):
    near_entries, near_seconds = 100, None


@pytest.mark.parametrize("kind", [Deaf, Unsure, Timeless])
async def test_of_a_cache_without_news_nothing_is_kept_all_works(kind: Callable[[], Any]) -> None:
    cache = kind()
    async with builder_over(cache, one) as building:
        await building.build([A])
        await building.publisher.publish(A, 2, source="s")
        cache.held[B] = value_of(key=B, payload=3)
        assert (await building.build([A])).value(A) == 2
        del cache.held[A]  # by somebody else
        assert (await building.build([A])).value(A) == 1
        await building.publisher.invalidate(A)


def test_to_note_a_change_takes_no_look_at_its_keys_however_many_read_or_write_meanwhile() -> None:
    looked_at = []

    class Versions(UserDict[ResourceKey, None]):
        def __getitem__(self, key: ResourceKey) -> None:
            looked_at.append(key)

    near, _ = near_of(Telling())
    with contextlib.ExitStack() as under_way:
        for _ in range(100):
            under_way.enter_context(near.filling())
        near.drop(Versions({A: None}))
    assert looked_at == []


def test_what_changed_is_known_to_those_who_began_before_it_and_then_forgotten() -> None:
    near, _ = near_of(Telling())
    a, b = revision_of(A), revision_of(B)
    with near.filling() as first:
        near.drop({A: None})
        with near.filling() as second:
            near.put(first, [a, b])
            assert (kept(near, a), kept(near, b)) == (False, True)
            near.put(second, [a])
            assert kept(near, a)
            near.drop({B: b.version, A: None})
            near.put(first, [a, b])
            assert (kept(near, a), kept(near, b)) == (False, True)
    assert not near._fillings


def test_what_a_long_reading_remembers_of_changes_is_bounded_by_their_keys() -> None:
    near, _ = near_of(Telling())
    a, b = revision_of(A), revision_of(B)
    with near.filling() as filling:
        for _ in range(5_000):
            near.drop({A: None})
        assert len(filling.changes) < 2_000
        near.put(filling, [a, b])
        assert (kept(near, a), kept(near, b)) == (False, True)
