"""`ResourcePublisher`: announcements, sharing with a builder, closing, and refusals."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from coalestra.cache.access import CacheAccess
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.publisher import ResourcePublisher
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.sealing import PORTION
from coalestra.core.errors import (
    PayloadCopyShutdownTimeoutError,
    PayloadIsolationError,
    SourceProtocolError,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    AuthorityPolicyResolver,
    ObservationPolicy,
    PolicyResolver,
    SourceAuthorityPolicy,
)
from coalestra.core.protocols import AsyncCache
from coalestra.core.values import (
    PublishResult,
    PublishStatus,
    ResourceUpdate,
    SnapshotValue,
    unseen_result,
)
from coalestra.observability import NullEventSink, NullMetrics
from tests.contracts.caches import AtomicCache, BatchAtomicCache, BatchCache, SingleKeyCache
from tests.contracts.samples import NOW, POLICY, A, B, C, Slow, Witness, publisher_to, value_of
from tests.orchestration.scripted import Single, builder, held_at
from tests.support import Gate, ManualClock, ThreadGate, begun, cancel_at_every_await, settle
from tests.support.running import without_collector


def shared(
    cache: AsyncCache, check_open: Callable[[], object] = lambda: None, **settings: Any
) -> tuple[CacheAccess, ResourcePublisher]:
    """A publisher as a builder makes it, and how that accesses the cache."""
    access = CacheAccess(cache, PayloadCopies("builder"), 4, ObservationPolicy())
    defaults: dict[str, Any] = {
        "clock": ManualClock(NOW), "policy_resolver": PolicyResolver(POLICY),
        "observation_policy": ObservationPolicy(), "authority_resolver": None,
        "metrics": NullMetrics(), "events": NullEventSink(),
    }  # fmt: skip
    return access, ResourcePublisher.sharing(access, None, check_open, **{**defaults, **settings})


def watched(cache: AsyncCache) -> tuple[Witness, ResourcePublisher]:
    """The same, and who hears of what it does."""
    access, publisher = shared(cache)
    witness = Witness()
    access.subscribers.subscribe(witness)
    return witness, publisher


async def test_with_a_foreign_cache_an_event_is_announced_before_anything_is_awaited() -> None:
    witness, publisher = watched(SingleKeyCache())
    publishing = publisher.publish(A, 1, source="s")
    publishing.send(None)
    assert witness.heard == [("announced", (A,))]
    publishing.close()
    assert witness.heard == [("announced", (A,)), ("concluded", (A,))]


@pytest.mark.parametrize(
    "make, told",
    [(AsyncMemoryCache, ["revised"]), (SingleKeyCache, ["announced", "revised", "concluded"])],
)
async def test_an_event_whose_copy_takes_long_is_announced_when_it_is_made(
    make: Callable[[], AsyncCache], told: list[str]
) -> None:
    Slow.release = ThreadGate()
    witness, publisher = watched(make())
    publishing = await begun(publisher.publish(A, Slow(), source="s"))
    heard = list(witness.heard)
    Slow.release.open()
    await publishing
    assert heard == []
    assert [what for what, *_ in witness.heard] == told


@pytest.mark.parametrize("make", [AsyncMemoryCache, SingleKeyCache])
async def test_nobody_waits_for_a_publication_being_copied(make: Callable[[], AsyncCache]) -> None:
    Slow.release = ThreadGate()
    gate = Gate()
    building = builder(Single("price", fetch=held_at(gate, "read")), cache=make())
    before = await begun(building.build([A]))
    await gate.wait_arrived()
    publishing = await begun(
        building.publisher.publish_many([ResourceUpdate(A, Slow(), "s"), ResourceUpdate(B, 1, "s")])
    )
    gate.open()
    assert (await before).value(A) == "read"
    assert (await building.build([B])).value(B) == "read"
    Slow.release.open()
    results = await publishing
    assert results[A].published, "its call came after that reading had begun"
    assert isinstance((await building.build([A])).value(A), Slow)
    await building.aclose()


class DatesOnArrival(BatchAtomicCache):
    """Takes events, which have no date of their own, for as new as their writing."""

    validates_write_order = True

    def _offer(self, value: SnapshotValue[Any], force: bool, replace_equal: bool) -> Any:
        return super()._offer(value, True, replace_equal)


@pytest.mark.parametrize("make", [AsyncMemoryCache, AtomicCache, SingleKeyCache, DatesOnArrival])
async def test_an_event_whose_copy_takes_long_does_not_replace_a_later_one(
    make: Callable[[], AsyncCache],
) -> None:
    Slow.release = ThreadGate()
    cache, clock = make(), ManualClock(NOW)
    publisher = publisher_to(cache, clock=clock)
    earlier = await begun(publisher.publish(A, Slow(), source="s"))
    both = await begun(publisher.publish_many([ResourceUpdate(k, Slow(), "s") for k in (B, C)]))
    clock.advance(1)
    for key in (A, B):
        assert (await publisher.publish(key, "later", source="s")).published
    Slow.release.open()
    assert (await earlier).status is PublishStatus.IGNORED_OLDER
    assert [told.status.value for told in (await both).values()] == ["ignored_older", "published"]
    assert (await publisher.publish(A, "last", source="s")).published
    found = await cache.get(A, now=clock.now(), policy=POLICY)
    assert found.value is not None
    assert found.value.value == "last"


async def test_events_that_nothing_came_between_take_one_call() -> None:
    cache = DatesOnArrival()
    publisher = publisher_to(cache)
    await publisher.publish(A, 1, source="s")
    await publisher.publish_many([ResourceUpdate(key, 2, "s") for key in (A, B, C)])
    assert cache.calls == ["set_many_if_newer"] * 2


async def test_a_failed_publication_is_concluded() -> None:
    cache = SingleKeyCache()

    async def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("the cache is away")

    cache.set = refuse  # type: ignore[method-assign]
    witness, publisher = watched(cache)
    with pytest.raises(ConnectionError):
        await publisher.publish(A, 1, source="s")
    assert witness.heard == [("announced", (A,)), ("concluded", (A,))]


async def test_cancelled_publications_leave_no_announcement_open() -> None:
    witness, publisher = watched(SingleKeyCache())
    updates = [ResourceUpdate(key, 1, "s") for key in (A, B, C)]

    async def check() -> None:
        await asyncio.sleep(1)  # what was under way at the cache ends for itself
        heard = [what for what, *_ in witness.heard]
        assert heard.count("announced") == heard.count("concluded")

    assert await cancel_at_every_await(lambda: publisher.publish_many(updates), check) > 1


async def test_a_publisher_shares_what_a_builder_gives_it_and_closes_none_of_it() -> None:
    cache = AsyncMemoryCache()
    sinks: dict[str, Any] = {"metrics": NullMetrics(), "events": NullEventSink()}
    _, publisher = shared(cache, clock=(clock := ManualClock(NOW)), **sinks)
    assert (publisher.cache, publisher.clock) == (cache, clock)
    assert (publisher.metrics, publisher.events) == tuple(sinks.values())
    assert publisher.max_pending_tasks == 4
    await publisher.aclose()
    assert (await publisher.publish(A, [1], source="s")).published


async def test_the_owner_may_refuse_further_publications() -> None:
    def closed() -> None:
        raise RuntimeError("closed")

    _, publisher = shared(AsyncMemoryCache(), closed)
    for work in (
        publisher.publish(A, 1, source="s"),
        publisher.publish_many([]),
        publisher.invalidate(A),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            await work


def in_pairs() -> dict[str, Any]:
    """Settings with which each copy waits for another one that is made at the same time."""
    meeting = threading.Barrier(2, timeout=10)

    def copier(value: Any) -> Any:
        meeting.wait()
        return copy.deepcopy(value)

    threaded = {"payload_copier": copier, "run_payload_copies_in_thread": True}
    return {**threaded, "max_copy_concurrency": 2}


@pytest.mark.parametrize("make", [AsyncMemoryCache, BatchCache])
async def test_the_values_of_one_publication_are_copied_side_by_side(
    make: Callable[[], AsyncCache],
) -> None:
    """As many at a time as there may be: in, to the cache, and out."""
    publisher = publisher_to(make(), **in_pairs())
    results = await publisher.publish_many([ResourceUpdate(k, [k.name], "s") for k in (A, B)])
    assert [results[key].value.value for key in (A, B)] == [[A.name], [B.name]]


async def test_what_is_read_from_and_written_to_a_cache_is_copied_side_by_side() -> None:
    memory, foreign = AsyncMemoryCache(**in_pairs()), BatchCache()
    values = [value_of(key, [key.name]) for key in (A, B)]
    for cache in (memory, foreign):
        await cache.set_many(values)
    found = await memory.get_many([A, B], now=NOW, policies={A: POLICY, B: POLICY})
    assert [lookup.value.value for lookup in found.values() if lookup.value] == [[A.name], [B.name]]
    building = builder(cache=foreign, clock=ManualClock(NOW), default_policy=POLICY, **in_pairs())
    assert [value.value for value in (await building.build([A, B])).values()] == [
        [A.name],
        [B.name],
    ]


async def test_closing_names_copies_that_are_late() -> None:
    Slow.release = ThreadGate()
    publisher = publisher_to(AsyncMemoryCache())
    publishing = await begun(publisher.publish(A, Slow(), source="s"))
    try:
        with pytest.raises(PayloadCopyShutdownTimeoutError) as caught:
            await publisher.aclose(timeout_seconds=0.0)
    finally:
        Slow.release.open()
    assert dict(caught.value.active_components) == {"publisher": 1}
    await asyncio.wait([publishing])
    await settle()


@pytest.mark.parametrize("settings, error", [
    ({"max_pending_tasks": 0}, ValueError), ({"lock_stripes": 0}, ValueError),
    ({"lock_stripes": True}, TypeError), ({"max_copy_concurrency": 0}, ValueError),
    ({"observation_policy": 1.0}, TypeError), ({"authority_resolver": {}}, TypeError),
    ({"clock": 5}, TypeError), ({"policy_resolver": POLICY}, TypeError),
    ({"metrics": print}, TypeError), ({"events": None}, TypeError),
])  # fmt: skip
def test_wrong_settings_are_refused_by_name(
    settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        publisher_to(AsyncMemoryCache(), **settings)


async def test_wrong_arguments_are_refused_by_name() -> None:
    publisher: Any = publisher_to(AsyncMemoryCache())
    with pytest.raises(TypeError, match="key"):
        await publisher.publish("a:b", 1, source="s")
    with pytest.raises(TypeError, match="force"):
        await publisher.publish(A, 1, source="s", force=1)
    with pytest.raises(TypeError, match="updates"):
        await publisher.publish_many([(A, 1)])
    with pytest.raises(TypeError, match="update"):
        await publisher.publish_update((A, 1))
    with pytest.raises(TypeError, match="keys"):
        await publisher.invalidate_many(["a:b"])
    for odd in (None, 5, object()):
        with pytest.raises(TypeError, match="updates must be an Iterable"):
            await publisher.publish_many(odd)
        with pytest.raises(TypeError, match="keys must be a collection"):
            await publisher.invalidate_many(odd)
    with pytest.raises(TypeError, match="reason"):
        await publisher.invalidate(A, reason=None)


def test_authority_rules_need_a_cache_that_enforces_them() -> None:
    rules = AuthorityPolicyResolver(SourceAuthorityPolicy({"local": 1}))
    with pytest.raises(ValueError, match="validates_source_authority = True"):
        publisher_to(SingleKeyCache(), authority_resolver=rules)
    publisher_to(SingleKeyCache(), authority_resolver=AuthorityPolicyResolver())
    publisher_to(AsyncMemoryCache(), authority_resolver=rules)


def numbered(count: int, value: Callable[[int], Any]) -> list[ResourceUpdate[Any]]:
    return [ResourceUpdate(ResourceKey("t", "e", str(n)), value(n), "s") for n in range(count)]


async def turns_for(publisher: ResourcePublisher, updates: list[ResourceUpdate[Any]]) -> int:
    """Return how often others have a turn while these are published."""
    publishing = asyncio.ensure_future(publisher.publish_many(updates, replace_equal=True))
    await asyncio.sleep(0)  # it has begun
    turns = 0
    while not publishing.done():
        await asyncio.sleep(0)
        turns += 1
    assert len(publishing.result()) == len(updates)
    return turns


async def test_publishing_many_events_gives_the_loop_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With slices of no length: as many trifles as weigh a portion, or one event that does."""
    monkeypatch.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
    for updates in (numbered(10 * PORTION, lambda n: n), numbered(10, lambda n: (n, [[n]]))):
        publisher = publisher_to(
            AsyncMemoryCache(), max_copy_concurrency=1
        )  # more would share turns
        turns = await turns_for(publisher, updates)
        assert turns == (
            pytest.approx(25, abs=3) if len(updates) == 10 else pytest.approx(12, abs=2)
        )


@pytest.mark.parametrize("value", [1.5, {"price": "1"}, [[1], [2]]])
def test_one_event_that_is_brief_to_copy_is_published_without_a_turn_of_others(value: Any) -> None:
    publisher = publisher_to(AsyncMemoryCache())
    for _ in range(2):
        with pytest.raises(StopIteration) as ended:
            publisher.publish(A, value, source="s").send(None)
        result: PublishResult = ended.value.value
        assert (result.published, result.value.value) == (True, value)


@pytest.mark.parametrize("many", [0, 1_024], ids=["weighed first", "at once"])
@pytest.mark.parametrize("value", [1.5, {"price": "1"}, [[1], [2]]])
async def test_results_tell_of_what_was_published_whenever_they_are_read(
    value: Any, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coalestra.cache.publisher._MANY", many)
    publisher = publisher_to(AsyncMemoryCache())
    first = await publisher.publish_many([ResourceUpdate(A, value, "s", NOW - 2, {"a": 1})])
    again = await publisher.publish_many([ResourceUpdate(A, "new", "s", NOW - 1)])
    await publisher.publish(A, "newest", source="s", observed_at=NOW)
    await publisher.aclose()
    assert first[A] is first[A]
    assert (first[A].value.value, first[A].previous, first[A].value.age_seconds) == (value, None, 2)
    assert first[A].value.metadata == {"a": 1, "published": True}
    (result,) = again.values()
    assert (result.value.value, result.previous and result.previous.value) == ("new", value)
    assert first[A].value.value is not (result.previous and result.previous.value) or value == 1.5
    assert pickle.loads(pickle.dumps(again)) == again == copy.deepcopy(again) == dict(again)
    assert repr(again) == repr(dict(again))
    assert (list(again), len(again), B in again) == ([A], 1, False)
    with pytest.raises(KeyError):
        again[B]


@pytest.mark.parametrize("value", [1.5, {"price": "1"}, [[1], [2]]])
async def test_a_result_tells_of_what_was_published_whenever_it_is_looked_at(value: Any) -> None:
    publisher = publisher_to(AsyncMemoryCache())
    first = await publisher.publish(A, value, source="s", observed_at=NOW - 2, metadata={"a": 1})
    twins = copy.copy(first), pickle.loads(pickle.dumps(first))
    again = await publisher.publish(A, "new", source="s", observed_at=NOW - 1)
    older = await publisher.publish(A, "old", source="s", observed_at=NOW - 3)
    await publisher.publish(A, "newest", source="s", observed_at=NOW)
    await publisher.aclose()
    assert (first.value.value, first.previous, first.value.age_seconds) == (value, None, 2)
    assert first.value is first.value
    assert not first.value.from_cache
    assert first.value.metadata == {"a": 1, "published": True}
    assert twins == (first, first)
    assert again.previous is not None
    assert again.previous.from_cache
    assert (again.value.value, again.previous.value) == ("new", value)
    assert again.previous.value is not first.value.value or value == 1.5
    assert not older.published
    assert older.previous == older.value
    assert (older.value.value, older.value is again.value) == ("new", False)
    assert repr(older) == f"PublishResult(status={older.status!r}, value={older.value!r}, " + (
        f"previous={older.previous!r})"
    )
    with pytest.raises(AttributeError, match="a result has no attribute 'values'"):
        older.values  # type: ignore[attr-defined]  # noqa: B018


async def test_two_threads_may_look_at_a_result_at_once() -> None:
    known = await publisher_to(AsyncMemoryCache()).publish(A, [1], source="s")
    both = threading.Barrier(2)

    def look() -> Any:
        both.wait(10)
        return known.value, known.previous

    result = unseen_result(known.status, look)
    looks = asyncio.to_thread(lambda: result.previous), asyncio.to_thread(lambda: result.value)
    assert await asyncio.gather(*looks) == [None, known.value]
    assert result == known


async def test_results_keep_no_cache_alive() -> None:
    cache = AsyncMemoryCache()
    store = weakref.ref(cache.store.listeners)
    result = await publisher_to(cache).publish(A, {"a": 0}, source="s", observed_at=NOW - 1)
    results = await publisher_to(cache).publish_many([ResourceUpdate(A, {"a": 1}, "s", NOW)])
    del cache
    gc.collect()
    assert store() is None
    assert (result.value.value, results[A].value.value) == ({"a": 0}, {"a": 1})


async def test_copying_out_for_long_gives_the_loop_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
    publisher = publisher_to(AsyncMemoryCache(), max_copy_concurrency=1)  # more share turns
    assert await turns_for(publisher, numbered(10, lambda n: [[n]])) == pytest.approx(25, abs=3)
    turns = await turns_for(publisher, numbered(10, lambda n: n))
    assert turns == pytest.approx(15, abs=3), "previous ones count"


async def test_what_was_replaced_is_let_go_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
    cache = AsyncMemoryCache()
    publisher = publisher_to(cache, payload_copier=set.copy)
    updates = numbered(PORTION, lambda n: {n})
    await publisher.publish_many(updates)
    sealed = [cache.store.peek(update.key) for update in updates]
    replaced = [weakref.ref(revision.payload) for revision in sealed if revision is not None]
    del sealed
    publishing = asyncio.ensure_future(publisher.publish_many(updates, replace_equal=True))
    alive = set()
    while not publishing.done():
        await asyncio.sleep(0)
        alive.add(sum(reference() is not None for reference in replaced))
    assert len(alive) > 3, "neither all at once nor none"


async def test_of_two_publications_at_a_time_the_later_one_wins_all_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though the first has rested before it came to what the second had by then."""
    monkeypatch.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
    building = builder(Single("a", "b"))
    much = [[number] for number in range(10 * PORTION)]
    between = [ResourceUpdate[Any](ResourceKey("test", f"{n}"), much, "first") for n in range(5)]
    first = [ResourceUpdate[Any](A, 1, "first"), *between, ResourceUpdate[Any](B, 1, "first")]
    second = [ResourceUpdate[Any](A, 2, "second"), ResourceUpdate[Any](B, 2, "second")]
    publish = building.publisher.publish_many
    earlier = asyncio.ensure_future(publish(first))
    for _ in range(2):  # by then it has begun, in whatever order tasks run
        await asyncio.sleep(0)
    await publish(second)
    await earlier
    snapshot = await building.build([A, B])
    assert [value.source for value in snapshot.values()] == ["second", "second"]


@pytest.mark.parametrize(
    "kind, steps", [(SingleKeyCache, 7), (AtomicCache, 4), (BatchCache, 8), (BatchAtomicCache, 5)]
)
async def test_over_a_foreign_cache_others_may_have_a_turn_after_each_event_in_every_step(
    kind: Callable[[], Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given is copied out, read, written or offered, compared, copied in, put together."""
    offered = []
    keep = Pace.keep

    async def kept(self: Pace) -> bool:
        offered.append(self)
        return await keep(self)

    publisher, updates = publisher_to(kind()), numbered(100, lambda n: n)
    await publisher.publish_many(updates)
    monkeypatch.setattr(Pace, "keep", kept)
    await publisher.publish_many(updates, force=True)
    assert len(offered) >= steps * len(updates)


async def test_events_are_announced_before_any_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
    witness, publisher = watched(SingleKeyCache())
    updates = numbered(2 * PORTION + 1, lambda n: n)
    keys = tuple(update.key for update in updates)
    await publisher.publish_many(updates)
    told = [each for each in witness.heard if each[0] != "revised"]
    assert told == [("announced", keys), ("concluded", keys)]
    assert witness.heard[1][:2] == ("revised", keys[0]), "announced before one is written"
    written = [key for what, key, *_ in witness.heard if what == "revised"]
    assert tuple(written) == keys


async def test_what_precedes_an_unfit_event_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
    cache = AsyncMemoryCache()
    witness, publisher = watched(cache)
    updates = numbered(PORTION, lambda n: n)
    updates += [ResourceUpdate(B, 1, "s"), ResourceUpdate(A, 1, "s", NOW + 60)]
    with pytest.raises(SourceProtocolError):
        await publisher.publish_many(updates)
    assert witness.heard == []
    assert await cache.size() == 0


class Ranks(AuthorityPolicyResolver):
    """Ranks by rules of its own."""

    def rank_for(self, key: ResourceKey, source: str) -> int:
        return 7


async def test_ranks_are_asked_of_resolvers_that_know_any(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = AuthorityPolicyResolver(SourceAuthorityPolicy(default_rank=2))
    for resolver, rank in ((ranked, 2), (Ranks(), 7)):
        publisher = publisher_to(AsyncMemoryCache(), authority_resolver=resolver)
        assert (await publisher.publish(A, 1, source="s")).value.authority_rank == rank
    publisher = publisher_to(AsyncMemoryCache(), authority_resolver=AuthorityPolicyResolver())
    monkeypatch.setattr("coalestra.cache.publisher.rank_of", pytest.fail)
    assert (await publisher.publish(A, 1, source="s")).value.authority_rank == 0


async def test_an_update_of_a_class_of_ones_own_is_published_like_any_other() -> None:
    class Tick(ResourceUpdate[int]):
        pass

    results = await publisher_to(AsyncMemoryCache()).publish_many([Tick(A, 1, "s", NOW)])
    assert results[A].value.value == 1


class Policies:
    """Says of every key that it has this policy."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def resolve(self, key: ResourceKey) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [None, 5, {"ttl_seconds": 5}])
async def test_an_event_for_a_key_without_a_policy_is_refused_unwritten(answer: Any) -> None:
    cache = AsyncMemoryCache()
    publisher = publisher_to(cache, policy_resolver=Policies(answer))
    for publishing in (
        publisher.publish(A, 1, source="s"),
        publisher.publish_many([ResourceUpdate(A, 1, "s"), ResourceUpdate(B, 1, "s")]),
    ):
        with pytest.raises(TypeError, match="^policy must be a FreshnessPolicy, got"):
            await publishing
    assert await cache.size() == 0


class Uncopyable:
    """Is not to be copied."""

    def __deepcopy__(self, memo: Any) -> Uncopyable:
        raise TypeError


async def test_an_event_that_cannot_be_copied_is_gone_with_its_error() -> None:
    publisher = publisher_to(AsyncMemoryCache())
    with without_collector():
        payload = Uncopyable()
        alive = weakref.ref(payload)
        try:
            await publisher.publish(A, payload, source="s")
        except PayloadIsolationError:
            del payload
        await settle()
        assert alive() is None
