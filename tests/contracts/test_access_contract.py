"""What the view over any cache must do, whatever the cache can do by itself."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from coalestra.cache.access import CacheAccess, access_to
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.protocols import AsyncCache
from coalestra.core.results import CacheWriteStatus
from coalestra.core.values import Revision
from tests.contracts.caches import ALL, FOREIGN, BatchAtomicCache, SingleKeyCache
from tests.contracts.samples import NOW, POLICY, A, B, C, Witness, begun, revision_of, value_of
from tests.support import cancel_at_every_await, settle

KEYS = tuple(ResourceKey("market", "depth", str(number)) for number in range(20))


@pytest.fixture(params=ALL, ids=lambda make: make.__name__)
def cache(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
def access(cache: AsyncCache) -> CacheAccess:
    return access_over(cache)


@pytest.fixture(params=FOREIGN, ids=lambda make: make.__name__)
def foreign(request: pytest.FixtureRequest) -> Any:
    return request.param()


def access_over(cache: AsyncCache, limit: int = 4) -> CacheAccess:
    return access_to(cache, PayloadCopies("test"), limit)


async def read(
    access: CacheAccess, *keys: ResourceKey, policy: FreshnessPolicy = POLICY
) -> dict[ResourceKey, Revision]:
    return await access.read(keys, NOW, dict.fromkeys(keys, policy))


async def test_what_was_written_is_read_in_the_order_asked(access: CacheAccess) -> None:
    await access.write([revision_of(key, number) for number, key in enumerate(KEYS)])
    asked = KEYS[::-1]
    found = await read(access, *asked, C)
    assert [found[key].payload for key in asked] == list(range(len(KEYS)))[::-1]
    assert tuple(found) == asked


async def test_a_read_keeps_version_rank_and_provenance(access: CacheAccess) -> None:
    written = revision_of(rank=7, metadata={"feed": "x"})
    await access.write([written])
    found = (await read(access, A))[A]
    assert (found.version, found.authority_rank, found.metadata) == (
        written.version,
        7,
        {"feed": "x"},
    )
    assert (found.source, found.observed_at, found.latency_ms) == ("test", NOW, 1.5)


async def test_an_entry_beyond_max_stale_is_not_read(access: CacheAccess) -> None:
    await access.write([revision_of(observed_at=NOW - 31), revision_of(B, observed_at=NOW - 29)])
    assert set(await read(access, A, B)) == {B}


@pytest.mark.parametrize(
    "rank, observed, force, replace_equal, status",
    [
        (6, NOW - 9, False, False, "stored"),
        (4, NOW + 9, False, True, "ignored_lower_authority"),
        (5, NOW + 1, False, False, "stored"),
        (5, NOW - 1, False, True, "ignored_older"),
        (5, NOW, False, False, "ignored_duplicate"),
        (5, NOW, False, True, "stored"),
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
    old = revision_of(payload="old", rank=5)
    new = revision_of(payload="new", rank=rank, observed_at=observed)
    await access.write([old])
    outcome = (
        await access.write([new], force=force, replace_equal=replace_equal, want_previous=True)
    )[A]
    assert outcome.status is CacheWriteStatus(status)
    winner = new if outcome.status is CacheWriteStatus.STORED else old
    assert outcome.current.version == winner.version
    assert outcome.current.payload == winner.payload
    assert outcome.previous is not None
    assert outcome.previous.version == old.version
    assert (await read(access, A))[A].version == winner.version


async def test_of_one_batch_the_best_per_key_is_written(access: CacheAccess) -> None:
    written = await access.write(
        [
            revision_of(A, "late", observed_at=NOW + 1),
            revision_of(A, "early"),
            revision_of(B, "first"),
            revision_of(B, "second"),
        ]
    )
    assert {key: each.current.payload for key, each in written.items()} == {A: "late", B: "second"}
    assert {key: each.payload for key, each in (await read(access, A, B)).items()} == {
        A: "late",
        B: "second",
    }


async def test_invalidated_keys_are_gone_and_others_stay(access: CacheAccess) -> None:
    await access.write([revision_of(A), revision_of(B)])
    await access.invalidate([A, C, A])
    assert set(await read(access, A, B, C)) == {B}


async def test_many_writers_of_one_key_leave_the_best(access: CacheAccess) -> None:
    for times in itertools.permutations(range(4)):
        await access.invalidate([A])
        await asyncio.gather(
            *(access.write([revision_of(A, time, observed_at=NOW + time)]) for time in times)
        )
        assert (await read(access, A))[A].payload == 3


async def test_a_derived_entry_is_read_while_its_dependencies_are_current(
    access: CacheAccess,
) -> None:
    base = revision_of(A)
    derived = revision_of(B, rests_on=[base])
    top = revision_of(C, rests_on=[derived])
    await access.write([top, derived, base])
    assert set(await read(access, C)) == {C}
    assert set(await read(access, A, B, C)) == {A, B, C}


async def test_a_derived_entry_ends_with_its_dependency_through_any_chain(
    access: CacheAccess,
) -> None:
    base = revision_of(A)
    chain = [base]
    for key in KEYS:
        chain.append(revision_of(key, rests_on=[chain[-1]]))
    await access.write(chain)
    await access.write([revision_of(A, 2.0, observed_at=NOW + 1)])
    assert set(await read(access, *reversed(KEYS), A)) == {A}


async def test_a_derived_entry_without_its_dependency_is_not_read(access: CacheAccess) -> None:
    base = revision_of(A)
    await access.write([base, revision_of(B, rests_on=[base])])
    await access.invalidate([A])
    assert await read(access, B) == {}


async def test_an_outdated_derived_entry_keeps_no_newer_derivation_out(
    access: CacheAccess,
) -> None:
    base, newer = revision_of(A), revision_of(A, 2.0, observed_at=NOW + 1)
    await access.write([base, revision_of(B, "old", rests_on=[base])])
    await access.write([newer])
    written = await access.write([revision_of(B, "new", rests_on=[newer])])
    assert written[B].status is CacheWriteStatus.STORED
    assert (await read(access, B))[B].payload == "new"


async def test_derived_entries_read_with_their_dependencies_are_joined_to_them(
    access: CacheAccess,
) -> None:
    base = revision_of(A)
    await access.write([base, revision_of(B, rests_on=[base])])
    found = (await read(access, A, B))[B]
    assert [each.version for each in found.dependencies] == [base.version]


async def test_dependencies_read_only_to_judge_a_derived_entry_are_joined_to_it(
    foreign: SingleKeyCache,
) -> None:
    access = access_over(foreign)
    base = revision_of(A)
    await access.write([base, revision_of(B, rests_on=[base])])
    found = (await read(access, B))[B]
    assert [each.version for each in found.dependencies] == [base.version]


async def test_nothing_read_or_written_shares_a_mutable_object(access: CacheAccess) -> None:
    copies = PayloadCopies("test")
    payload = {"levels": [1, 2]}
    await access.cache.set(value_of(A, payload, metadata={"tags": ["x"]}))
    payload["levels"].append(3)
    found = (await read(access, A))[A]
    opened = copies.open_now(found.payload, found.seal, context="test")
    assert opened == {"levels": [1, 2]} or access.store is None
    opened["levels"].clear()
    again = (await read(access, A))[A]
    assert copies.open_now(again.payload, again.seal, context="test")["levels"]


async def test_a_foreign_cache_is_given_copies(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    revision = revision_of(A, {"levels": [1, 2]})
    await access.write([revision])
    assert foreign.held[A].value == {"levels": [1, 2]}
    foreign.held[A].value["levels"].clear()
    assert revision.payload == {"levels": [1, 2]}


async def test_listeners_hear_of_what_was_stored_and_not_of_what_was_ignored(
    access: CacheAccess,
) -> None:
    witness = Witness()
    access.subscribe(witness)
    old, older = revision_of(A), revision_of(A, observed_at=NOW - 1)
    await access.write([old])
    await access.write([older])
    assert witness.heard == [("revised", A, old.version)]
    access.unsubscribe(witness)
    await access.write([revision_of(B)])
    assert len(witness.heard) == 1


async def test_listeners_hear_of_an_invalidation_before_anything_is_awaited(
    access: CacheAccess,
) -> None:
    witness = Witness()
    access.subscribe(witness)
    await access.write([revision_of(A)])
    invalidation = await begun(access.invalidate([A, B]))
    assert ("invalidating", (A, B)) in witness.heard
    await invalidation


async def test_a_listener_nobody_holds_is_forgotten(access: CacheAccess) -> None:
    access.subscribe(Witness())
    await access.write([revision_of(A)])
    assert access.store is None or not access.store.listeners.references


async def test_single_key_caches_are_driven_by_a_bounded_number_of_tasks() -> None:
    cache = SingleKeyCache()
    access = access_over(cache, limit=3)
    await access.write([revision_of(key) for key in KEYS])
    assert set(await read(access, *KEYS)) == set(KEYS)
    assert cache.peak_running == 3


async def test_a_batch_cache_is_asked_once_for_all_keys() -> None:
    cache = BatchAtomicCache()
    access = access_over(cache)
    await access.write([revision_of(key) for key in KEYS])
    await read(access, *KEYS)
    await access.invalidate(KEYS)
    assert cache.calls == ["set_many_if_newer", "get_many", "invalidate_many"]


async def test_an_outdated_entry_is_removed_from_the_cache(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    base = revision_of(A)
    await access.write([base, revision_of(B, rests_on=[base])])
    await access.write([revision_of(A, 2.0, observed_at=NOW + 1)])
    await read(access, B)
    assert set(foreign.held) == {A}


async def test_an_entry_replaced_while_it_was_judged_stays(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    base, newer = revision_of(A), revision_of(A, 2.0, observed_at=NOW + 1)
    await access.write([base, revision_of(B, "old", rests_on=[base])])
    await access.write([newer])
    event = revision_of(B, "event", observed_at=NOW + 1)
    await asyncio.gather(read(access, B), access.write([event]))
    assert foreign.held[B].version == event.version


async def test_a_failing_cache_is_heard(foreign: SingleKeyCache) -> None:
    async def refuse(*_: object, **__: object) -> Any:
        raise ConnectionError("the cache is away")

    for name in ("get", "get_many", "set", "set_many", "set_if_newer", "set_many_if_newer"):
        setattr(foreign, name, refuse)
    access = access_over(foreign)
    with pytest.raises(ConnectionError):
        await read(access, *KEYS)
    with pytest.raises(ConnectionError):
        await access.write([revision_of(key) for key in KEYS])
    await settle()


async def test_a_value_under_another_key_is_refused(foreign: SingleKeyCache) -> None:
    foreign.held[A] = value_of(B)
    with pytest.raises(ValueError, match="must store and return values under their own key"):
        await read(access_over(foreign), A)


async def test_users_of_one_cache_object_hear_each_other(foreign: SingleKeyCache) -> None:
    mine, yours = access_over(foreign), access_over(foreign)
    witness = Witness()
    mine.subscribe(witness)
    await read(mine, A)
    revision = revision_of(A)
    await yours.write([revision])
    assert witness.heard == [("revised", A, revision.version)]


async def test_a_cancelled_operation_leaves_no_turn_and_no_task(foreign: SingleKeyCache) -> None:
    access = access_over(foreign)
    witness = Witness()
    access.subscribe(witness)

    async def work() -> None:
        await asyncio.gather(
            access.write([revision_of(A), revision_of(B)], force=True),
            access.write([revision_of(B), revision_of(C)], force=True),
            access.invalidate([A, C]),
            read(access, A, B, C),
        )

    async def check() -> None:
        final = revision_of(C, "final")
        await asyncio.wait_for(access.write([revision_of(A), revision_of(B), final], force=True), 5)
        assert (await read(access, C))[C].version == final.version

    assert await cancel_at_every_await(work, check) > 3
