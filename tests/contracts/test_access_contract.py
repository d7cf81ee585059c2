"""What the view over a cache that has to be awaited must do, whatever that can do by itself."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest

from coalestra.cache.access import CacheAccess
from coalestra.cache.near import Channel
from coalestra.cache.store import Outcome
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.errors import CacheUnavailableError
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, ObservationPolicy
from coalestra.core.protocols import AsyncCache, Lease
from coalestra.core.results import CacheWriteResult, CacheWriteStatus
from coalestra.core.values import Revision, SnapshotValue
from tests.contracts.caches import (
    FOREIGN,
    AtomicCache,
    BatchAtomicCache,
    LeasingCache,
    SingleKeyCache,
    WrappedMemoryCache,
)
from tests.contracts.samples import NOW, POLICY, A, B, C, Witness, begun, revision_of, value_of
from tests.support import cancel_at_every_await, run_virtual

KEYS = tuple(ResourceKey("market", "depth", str(number)) for number in range(20))


@pytest.fixture(params=(*FOREIGN, WrappedMemoryCache), ids=lambda make: make.__name__)
def cache(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def access(cache: AsyncCache) -> CacheAccess:
    return access_over(cache)


@pytest.fixture(params=FOREIGN, ids=lambda make: make.__name__)
def foreign(request: pytest.FixtureRequest) -> Any:
    return request.param()


def access_over(
    cache: AsyncCache, limit: int = 4, failed: Callable[[str, Exception], None] | None = None
) -> CacheAccess:
    return CacheAccess(cache, PayloadCopies("test"), limit, ObservationPolicy(), failed)


async def read(
    access: CacheAccess, *keys: ResourceKey, policy: FreshnessPolicy = POLICY
) -> dict[ResourceKey, Revision]:
    return await access.read(keys, NOW, dict.fromkeys(keys, policy))


async def write(
    access: CacheAccess, revisions: Collection[Revision], **terms: bool
) -> dict[ResourceKey, Outcome]:
    policies = {each.key: POLICY for each in revisions}
    outcomes, failures = await access.publish(revisions, policies, NOW, **terms)
    access.raise_first(failures)
    return outcomes


async def test_what_was_written_is_read_in_the_order_asked(access: CacheAccess) -> None:
    await write(access, [revision_of(key, number) for number, key in enumerate(KEYS)])
    asked = KEYS[::-1]
    found = await read(access, *asked, C)
    assert [found[key].payload for key in asked] == list(range(len(KEYS)))[::-1]
    assert tuple(found) == asked


async def test_a_read_keeps_version_rank_and_provenance(access: CacheAccess) -> None:
    written = revision_of(rank=7, metadata={"feed": "x"})
    await write(access, [written])
    found = (await read(access, A))[A]
    assert (found.version, found.authority_rank, found.metadata) == (
        written.version,
        7,
        {"feed": "x"},
    )
    assert (found.source, found.observed_at, found.latency_ms) == ("test", NOW, 1.5)


async def test_an_entry_beyond_max_stale_is_not_read(access: CacheAccess) -> None:
    await write(access, [revision_of(observed_at=NOW - 31), revision_of(B, observed_at=NOW - 29)])
    assert set(await read(access, A, B)) == {B}


@pytest.mark.parametrize(
    "rank, observed, force, replace_equal, status",
    [
        (6, NOW - 9, False, False, "stored"),
        (4, NOW, False, True, "ignored_lower_authority"),
        (5, NOW - 4, False, False, "stored"),
        (5, NOW - 6, False, True, "ignored_older"),
        (5, NOW - 5, False, False, "ignored_duplicate"),
        (5, NOW - 5, False, True, "stored"),
        (0, NOW - 9, True, False, "stored"),
    ],
)
async def test_writes_follow_the_write_order_and_tell_what_stayed(
    access: CacheAccess,
    rank: int,
    observed: float,
    force: bool,
    replace_equal: bool,
    status: str,
) -> None:
    old = revision_of(payload="old", rank=5, observed_at=NOW - 5)
    new = revision_of(payload="new", rank=rank, observed_at=observed)
    await write(access, [old])
    outcomes = await write(access, [new], force=force, replace_equal=replace_equal)
    became, current, previous = outcomes[A]
    assert became is CacheWriteStatus(status)
    winner = new if became is CacheWriteStatus.STORED else old
    assert current.version == winner.version
    assert current.payload == winner.payload
    assert previous is not None
    assert previous.version == old.version
    assert (await read(access, A))[A].version == winner.version


async def test_of_one_batch_the_best_per_key_is_written(access: CacheAccess) -> None:
    written = await write(
        access,
        [
            revision_of(A, "late", observed_at=NOW + 1),
            revision_of(A, "early"),
            revision_of(B, "first"),
            revision_of(B, "second"),
        ],
    )
    assert {key: current.payload for key, (_, current, _) in written.items()} == {
        A: "late",
        B: "second",
    }
    assert {key: each.payload for key, each in (await read(access, A, B)).items()} == {
        A: "late",
        B: "second",
    }


async def test_invalidated_keys_are_gone_and_others_stay(access: CacheAccess) -> None:
    await write(access, [revision_of(A), revision_of(B)])
    await access.invalidate([A, C, A])
    assert set(await read(access, A, B, C)) == {B}


async def test_many_writers_of_one_key_leave_the_best(access: CacheAccess) -> None:
    for times in itertools.permutations(range(4)):
        await access.invalidate([A])
        await asyncio.gather(
            *(write(access, [revision_of(A, time, observed_at=NOW - 9 + time)]) for time in times)
        )
        assert (await read(access, A))[A].payload == 3


async def test_a_derived_entry_is_read_while_its_dependencies_are_current(
    access: CacheAccess,
) -> None:
    base = revision_of(A)
    derived = revision_of(B, rests_on=[base])
    top = revision_of(C, rests_on=[derived])
    await write(access, [top, derived, base])
    assert set(await read(access, C)) == {C}
    assert set(await read(access, A, B, C)) == {A, B, C}


async def test_a_derived_entry_ends_with_its_dependency_through_any_chain(
    access: CacheAccess,
) -> None:
    base = revision_of(A)
    chain = [base]
    for key in KEYS:
        chain.append(revision_of(key, rests_on=[chain[-1]]))
    await write(access, chain)
    await write(access, [revision_of(A, 2.0, observed_at=NOW + 1)])
    assert set(await read(access, *reversed(KEYS), A)) == {A}
    await access.drain(1)


async def test_a_derived_entry_without_its_dependency_is_not_read(access: CacheAccess) -> None:
    base = revision_of(A)
    await write(access, [base, revision_of(B, rests_on=[base])])
    await access.invalidate([A])
    assert await read(access, B) == {}
    await access.drain(1)


async def test_an_outdated_derived_entry_keeps_no_newer_derivation_out(
    access: CacheAccess,
) -> None:
    base, newer = revision_of(A), revision_of(A, 2.0, observed_at=NOW + 1)
    await write(access, [base, revision_of(B, "old", rests_on=[base])])
    await write(access, [newer])
    written = await write(access, [revision_of(B, "new", rests_on=[newer])])
    assert written[B][0] is CacheWriteStatus.STORED
    assert (await read(access, B))[B].payload == "new"


async def test_derived_entries_read_with_their_dependencies_are_joined_to_them(
    access: CacheAccess,
) -> None:
    base = revision_of(A)
    await write(access, [base, revision_of(B, rests_on=[base])])
    found = (await read(access, A, B))[B]
    assert [each.version for each in found.dependencies] == [base.version]


async def test_dependencies_read_only_to_judge_a_derived_entry_are_joined_to_it(
    foreign: SingleKeyCache,
) -> None:
    access = access_over(foreign)
    base = revision_of(A)
    await write(access, [base, revision_of(B, rests_on=[base])])
    found = (await read(access, B))[B]
    assert [each.version for each in found.dependencies] == [base.version]


async def test_nothing_read_or_written_shares_a_mutable_object(access: CacheAccess) -> None:
    copies = PayloadCopies("test")
    payload = {"levels": [1, 2]}
    await access.cache.set(value_of(A, payload, metadata={"tags": ["x"]}))
    payload["levels"].append(3)
    found = (await read(access, A))[A]
    copies.open_now(found.payload, found.seal, context="test")["levels"].clear()
    again = (await read(access, A))[A]
    assert copies.open_now(again.payload, again.seal, context="test")["levels"]


async def test_a_foreign_cache_is_given_copies(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    revision = revision_of(A, {"levels": [1, 2]})
    await write(access, [revision])
    assert foreign.held[A].value == {"levels": [1, 2]}
    foreign.held[A].value["levels"].clear()
    assert revision.payload == {"levels": [1, 2]}


async def test_listeners_hear_of_what_was_stored_and_not_of_what_was_ignored(
    access: CacheAccess,
) -> None:
    witness = Witness()
    access.subscribers.subscribe(witness)
    old, older = revision_of(A), revision_of(A, observed_at=NOW - 1)
    await write(access, [old])
    await write(access, [older])
    assert witness.heard == [("revised", A, old.version)]
    access.subscribers.unsubscribe(witness)
    await write(access, [revision_of(B)])
    assert len(witness.heard) == 1


async def test_listeners_hear_of_an_invalidation_before_anything_is_awaited(
    access: CacheAccess,
) -> None:
    witness = Witness()
    access.subscribers.subscribe(witness)
    await write(access, [revision_of(A)])
    invalidation = await begun(access.invalidate([A, B]))
    assert ("invalidating", (A, B)) in witness.heard
    await invalidation


async def test_a_listener_nobody_holds_is_forgotten(access: CacheAccess) -> None:
    access.subscribers.subscribe(Witness())
    await write(access, [revision_of(A)])
    assert access.subscribers.references == ()


async def test_single_key_caches_are_driven_by_a_bounded_number_of_tasks() -> None:
    cache = SingleKeyCache()
    access = access_over(cache, limit=3)
    await write(access, [revision_of(key) for key in KEYS])
    assert set(await read(access, *KEYS)) == set(KEYS)
    assert cache.peak_running == 3


async def test_a_batch_cache_is_asked_once_for_all_keys() -> None:
    cache = BatchAtomicCache()
    access = access_over(cache)
    await write(access, [revision_of(key, observed_at=NOW - 1) for key in KEYS])
    await read(access, *KEYS)
    await access.invalidate(KEYS)
    assert cache.calls == ["set_many_if_newer", "get_many", "invalidate_many"]


async def test_an_outdated_entry_is_removed_from_the_cache(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    base = revision_of(A)
    await write(access, [base, revision_of(B, rests_on=[base])])
    await write(access, [revision_of(A, 2.0, observed_at=NOW + 1)])
    await read(access, B)
    await access.drain(1)
    assert set(foreign.held) == {A}


async def test_an_entry_replaced_while_it_was_judged_stays(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    base, newer = revision_of(A), revision_of(A, 2.0, observed_at=NOW + 1)
    await write(access, [base, revision_of(B, "old", rests_on=[base])])
    await write(access, [newer])
    event = revision_of(B, "event", observed_at=NOW + 1)
    await asyncio.gather(read(access, B), write(access, [event]))
    await access.drain(1)
    assert foreign.held[B].version == event.version


class Told:
    """Writes down what the library went on without."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str]] = []

    def __call__(self, operation: str, error: Exception) -> None:
        self.failures.append((operation, f"{type(error).__name__}: {error}"))


async def test_a_failing_cache_holds_nothing_and_tells_who_writes(foreign: SingleKeyCache) -> None:
    async def refuse(*_: object, **__: object) -> Any:
        raise ConnectionError("the cache is away")

    for name in ("get", "get_many", "set", "set_many", "set_if_newer", "set_many_if_newer"):
        setattr(foreign, name, refuse)
    told = Told()
    access = access_over(foreign, failed=told)
    assert await read(access, *KEYS) == {}
    assert told.failures[0] == ("read", "ConnectionError: the cache is away")
    with pytest.raises(ConnectionError):
        await write(access, [revision_of(key) for key in KEYS])


async def test_a_value_under_another_key_is_a_miss_and_told(foreign: SingleKeyCache) -> None:
    foreign.held.update({A: value_of(B), C: value_of(C)})
    told = Told()
    assert set(await read(access_over(foreign, failed=told), A, C)) == {C}
    ((operation, text),) = told.failures
    assert operation == "read"
    assert "store and return values under their own key" in text


class Anything:
    """Claims to be equal to whatever it is compared with."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash(A)


@pytest.mark.parametrize("field, odd", [("key", Anything()), ("source", None), ("source", ["x"])])
async def test_a_value_whose_provenance_is_none_is_a_miss_and_told(
    foreign: SingleKeyCache, field: str, odd: Any
) -> None:
    foreign.held.update({A: replace(value_of(A), **{field: odd}), C: value_of(C)})
    told = Told()
    assert set(await read(access_over(foreign, failed=told), A, C)) == {C}
    assert len(told.failures) == 1


class Misjudging(AtomicCache):
    """Stores what it is offered, and says of it whatever it is told to say."""

    def __init__(self, answer: Callable[[SnapshotValue[Any]], Any]) -> None:
        super().__init__()
        self.answer = answer

    async def set_if_newer(self, value: SnapshotValue[Any], **terms: bool) -> CacheWriteResult:
        await super().set_if_newer(value, **terms)
        return self.answer(value)  # type: ignore[no-any-return]  # what a real one must not say


async def test_a_status_that_is_a_bare_text_is_an_error_that_says_so() -> None:
    status: Any = "stored"
    access = access_over(Misjudging(lambda value: CacheWriteResult(status, value)))
    with pytest.raises(CacheUnavailableError, match="'stored' instead of a CacheWriteStatus"):
        await write(access, [revision_of(A)])


@pytest.mark.parametrize("previous", [value_of(B), "junk", 5])
async def test_what_cannot_have_been_there_before_is_nobodys_previous_value(previous: Any) -> None:
    stored = CacheWriteStatus.STORED
    access = access_over(Misjudging(lambda value: CacheWriteResult(stored, value, previous)))
    status, current, before = (await write(access, [revision_of(A, "new")]))[A]
    assert (status, current.payload, before) == (stored, "new", None)


async def test_users_of_one_cache_object_hear_each_other(foreign: SingleKeyCache) -> None:
    mine, yours = access_over(foreign), access_over(foreign)
    witness = Witness()
    mine.subscribers.subscribe(witness)
    await read(mine, A)
    revision = revision_of(A)
    await write(yours, [revision])
    assert witness.heard == [("revised", A, revision.version)]


async def test_a_cancelled_operation_leaves_no_turn_and_no_task(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    witness = Witness()
    access.subscribers.subscribe(witness)

    async def work() -> None:
        await asyncio.gather(
            write(access, [revision_of(A), revision_of(B)], force=True),
            write(access, [revision_of(B), revision_of(C)], force=True),
            access.invalidate([A, C]),
            read(access, A, B, C),
        )

    async def check() -> None:
        final = revision_of(C, "final")
        await asyncio.wait_for(
            write(access, [revision_of(A), revision_of(B), final], force=True), 5
        )
        assert (await read(access, C))[C].version == final.version

    assert await cancel_at_every_await(work, check) > 3


def test_each_event_loop_has_a_channel_of_its_own_and_only_the_last_one_is_listened_to() -> None:
    """One left by a loop that has ended tells nobody any more, and is not kept alive."""
    cache = SingleKeyCache()
    mine, yours = access_over(cache), access_over(cache)
    witness = Witness()
    mine.subscribers.subscribe(witness)

    async def meet() -> Channel:
        assert mine.channel() is yours.channel()
        return mine.channel()

    channels = [run_virtual(meet()) for _ in range(2)]
    first, second = channels
    assert first is not second
    first.listeners.tell(lambda each: each.revised({A: None}))
    assert witness.heard == []
    second.listeners.tell(lambda each: each.revised({B: None}))
    assert witness.heard == [("revised", B, None)]
    left = weakref.ref(first)
    del channels, first
    assert left() is None


def test_leases_left_on_a_loop_that_has_ended_keep_no_later_ones_from_being_given_back() -> None:
    cache = LeasingCache()
    access = access_over(cache)
    leases = [Lease(A, "one"), Lease(B, "two")]
    cache.leased = {each.key: each for each in leases}

    def leave() -> None:
        access.give_back(leases[0], failed=False)
        loop.stop()

    async def begin() -> None:
        access.attach()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    loop.call_soon(leave)
    loop.run_forever()
    loop.close()

    async def later() -> None:
        access.attach()
        access.give_back(leases[1], failed=False)
        await asyncio.sleep(1)

    run_virtual(later())
    assert set(cache.leased) == {A}
