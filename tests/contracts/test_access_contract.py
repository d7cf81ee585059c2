"""What the view over a cache that has to be awaited must do, whatever that can do by itself."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import pytest

from coalestra.cache.access import CacheAccess, Terms
from coalestra.cache.near import Channel
from coalestra.cache.store import Outcome, best_per_key
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.errors import CacheUnavailableError
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, ObservationPolicy
from coalestra.core.protocols import AsyncCache, Lease
from coalestra.core.values import CacheWriteResult, CacheWriteStatus, Revision, SnapshotValue
from tests.contracts.caches import (
    FOREIGN,
    AtomicCache,
    BatchAtomicCache,
    LeasingCache,
    SingleKeyCache,
    WrappedMemoryCache,
)
from tests.contracts.samples import NOW, POLICY, A, B, C, Witness, revision_of, value_of
from tests.support import Gate, cancel_at_every_await, run_virtual

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
    access: CacheAccess, revisions: Collection[Revision], **terms: Any
) -> dict[ResourceKey, Outcome]:
    policies = {each.key: POLICY for each in revisions}
    outcomes, failures = await access.write(
        best_per_key(revisions), Terms(policies, NOW, insist=True, **terms)
    )
    access.raise_first(failures)
    return outcomes


async def test_an_entry_beyond_max_stale_is_not_read(access: CacheAccess) -> None:
    await write(access, [revision_of(observed_at=NOW - 31), revision_of(B, observed_at=NOW - 29)])
    assert set(await read(access, A, B)) == {B}


async def test_an_outdated_derived_entry_keeps_no_newer_derivation_out(access: CacheAccess) -> None:
    base, newer = revision_of(A), revision_of(A, 2.0, observed_at=NOW + 1)
    await write(access, [base, revision_of(B, "old", rests_on=[base])])
    await write(access, [newer])
    written = await write(access, [revision_of(B, "new", rests_on=[newer])])
    assert written[B][0] is CacheWriteStatus.STORED
    assert (await read(access, B))[B].payload == "new"


async def test_dependencies_read_to_judge_a_value_are_joined_to_it(foreign: SingleKeyCache) -> None:
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


async def test_a_listener_nobody_holds_is_forgotten(access: CacheAccess) -> None:
    access.subscribers.subscribe(Witness())
    await write(access, [revision_of(A)])
    assert access.subscribers.references == ()


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


async def test_leases_that_a_write_gives_back_as_the_last_one_are_waited_for_at_the_end() -> None:
    cache = LeasingCache()
    access = access_over(cache)
    access.attach()
    leases = [Lease(A, "one"), Lease(B, "two")]
    cache.leased = {each.key: each for each in leases}
    terms = Terms({A: POLICY}, NOW, leases={A: leases[0]})
    access.write_behind((revision_of(),), terms, wanted=lambda _: False)
    access.give_back(leases[1], failed=False)
    await access.drain(5.0)
    assert cache.leased == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_giving_back_that_is_cancelled_keeps_no_later_lease_from_being_given_back() -> None:
    cache = LeasingCache()
    access = access_over(cache)
    access.attach()
    leases = [Lease(A, "one"), Lease(B, "two")]
    cache.leased = {each.key: each for each in leases}
    access.give_back(leases[0], failed=False)
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(1)
    access.give_back(leases[1], failed=False)
    await asyncio.sleep(1)
    assert B not in cache.leased


async def test_leases_given_back_before_a_publication_come_back_though_it_is_cancelled() -> None:
    gate = Gate()

    class Slow(LeasingCache):
        async def release_many(self, leases: Collection[Lease], *, failed: bool = False) -> None:
            await gate.pass_()
            await super().release_many(leases, failed=failed)

    cache = Slow()
    access = access_over(cache)
    lease = Lease(B, "one")
    cache.leased = {B: lease}

    async def publish() -> None:
        access.give_back(lease, failed=False)
        await access.write({A: revision_of(A)}, Terms({A: POLICY}, NOW, insist=True))

    publication = asyncio.create_task(publish())
    await gate.wait_arrived()
    publication.cancel()
    await asyncio.sleep(0.1)
    assert publication.cancelled()
    gate.open()
    await asyncio.sleep(0.1)
    assert not cache.leased
