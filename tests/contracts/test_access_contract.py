"""What the view over a cache that has to be awaited must do, whatever that can do by itself."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Collection
from typing import Any

import pytest

from coalestra.cache.access import CacheAccess, Channel, Terms
from coalestra.cache.store import Outcome
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.errors import CacheUnavailableError
from coalestra.core.policies import ObservationPolicy
from coalestra.core.protocols import AsyncCache, Lease
from coalestra.core.values import CacheWriteResult, CacheWriteStatus, Revision, SnapshotValue
from tests.contracts.caches import AtomicCache, LeasingCache, SingleKeyCache
from tests.contracts.samples import NOW, POLICY, A, B, Witness, revision_of, value_of
from tests.support import Gate, Panic, run_virtual


def access_over(cache: AsyncCache) -> CacheAccess:
    return CacheAccess(cache, PayloadCopies("test"), 4, ObservationPolicy(), None)


def leased_out() -> tuple[LeasingCache, CacheAccess, list[Lease]]:
    """A cache that has given two leases, of A and B, and how they are given back to it."""
    cache, leases = LeasingCache(), [Lease(A, "one"), Lease(B, "two")]
    cache.leased = {each.key: each for each in leases}
    return cache, access_over(cache), leases


async def write(access: CacheAccess, revision: Revision) -> Outcome:
    terms = Terms({revision.key: POLICY}, NOW, insist=True)
    outcomes, failures = await access.write({revision.key: revision}, terms)
    access.raise_first(failures)
    return outcomes[revision.key]


async def test_a_listener_nobody_holds_is_forgotten() -> None:
    access = access_over(SingleKeyCache())
    access.subscribers.subscribe(Witness())
    await write(access, revision_of(A))
    assert access.subscribers.references == ()


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
        await write(access, revision_of(A))


@pytest.mark.parametrize("answers", [
    None, {}, {A: "stored"}, {A: CacheWriteResult(CacheWriteStatus.IGNORED_OLDER, value_of(B))},
    {A: OSError("away")}, ConnectionError("away"), Panic("away"),
])  # fmt: skip
async def test_what_fails_under_a_lease_is_told_and_given_to_nobody_and_the_lease_given_back(
    answers: Any,
) -> None:
    """Nobody knows whether the cache had come to it; others would wait until it has run out."""

    class Odd(LeasingCache):
        async def fulfil_many(self, *_: object, **terms: Any) -> Any:
            if isinstance(answers, BaseException):
                raise answers
            return answers

    cache, lease, revision = Odd(), Lease(A, "one"), revision_of(A)
    access, cache.leased[A] = access_over(cache), lease
    terms = Terms({A: POLICY}, NOW, leases={A: lease})
    outcomes, failures = await access.write({A: revision}, terms)
    await access.drain(1.0)
    assert (outcomes, [*failures], cache.leased) == ({}, [A], {})


@pytest.mark.parametrize("previous", [value_of(B), "junk", 5])
async def test_what_cannot_have_been_there_before_is_nobodys_previous_value(previous: Any) -> None:
    stored = CacheWriteStatus.STORED
    access = access_over(Misjudging(lambda value: CacheWriteResult(stored, value, previous)))
    status, current, before = await write(access, revision_of(A, "new"))
    assert (status, current.payload, before) == (stored, "new", None)


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
    cache, access, leases = leased_out()

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
    cache, access, leases = leased_out()
    access.attach()
    terms = Terms({A: POLICY}, NOW, leases={A: leases[0]})
    access.write_behind((revision_of(),), terms, wanted=lambda _: False)
    access.give_back(leases[1], failed=False)
    await access.drain(5.0)
    assert cache.leased == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_giving_back_that_is_cancelled_keeps_no_later_lease_from_being_given_back() -> None:
    cache, access, leases = leased_out()
    access.attach()
    access.give_back(leases[0], failed=False)
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(1)
    access.give_back(leases[1], failed=False)
    await asyncio.sleep(1)
    assert B not in cache.leased


async def test_an_invalidation_overtakes_no_publication_that_leases_are_given_back_before() -> None:
    cache = LeasingCache()
    access = access_over(cache)
    access.attach()
    begun = asyncio.Event()

    async def publish() -> None:
        access.give_back(Lease(B, "one"), failed=True)
        begun.set()
        await write(access, revision_of(A))

    publishing = asyncio.ensure_future(publish())
    await begun.wait()
    await asyncio.gather(publishing, access.invalidate([A]))
    assert cache.calls[0] == "release_many"
    assert not cache.held


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


async def test_a_cache_cannot_take_from_the_library_the_leases_that_it_failed_to_take_back() -> (
    None
):
    told: list[tuple[str, str]] = []

    class Draining(LeasingCache):
        async def release_many(self, leases: Any, *, failed: bool = False) -> None:
            while isinstance(leases, list) and leases:
                leases.pop()
            raise ConnectionError("away")

    def failed(operation: str, error: Exception) -> None:
        told.append((operation, str(error)))

    access = CacheAccess(Draining(), PayloadCopies("test"), 4, ObservationPolicy(), failed)
    access.give_back(Lease(A, "one"), failed=True)
    await access.drain(1.0)
    assert told == [("write", "away")]


async def test_a_value_refused_under_a_lease_that_has_ended_is_nothing_that_is_held() -> None:
    """Nothing else may be there: who has begun later would be told that it was published."""

    class Late(LeasingCache):
        async def fulfil_many(self, values: Any, **terms: Any) -> Any:
            older = CacheWriteStatus.IGNORED_OLDER
            return {each.key: CacheWriteResult(older, each) for each in values.values()}

    access, witness, revision = access_over(Late()), Witness(), revision_of(A)
    access.channel().listeners.subscribe(witness)
    access.hold(revision, NOW)
    terms = Terms({A: POLICY}, NOW, leases={A: Lease(A, "one")})
    await access.write({A: revision}, terms)
    assert witness.heard == [("revised", A, revision.version), ("revised", A, None)]
    assert not access.holds(revision)
