"""The cache against a real server: order, leases, fences, news, expiry."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime as dt
import enum
import threading
import time
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as ConnectionClosed

from coalestra import (
    CacheWriteStatus,
    CallableDerivedSource,
    CallableSource,
    FreshnessPolicy,
    RefreshMode,
    ResourceAbsent,
    ResourceAbsentError,
    ResourceKey,
    ResourceUpdate,
    SnapshotBuilder,
    SourceAuthorityPolicy,
    SourcePayload,
    SourceResiliencePolicy,
)
from coalestra.concurrency.pace import Pace
from coalestra.core.protocols import LeasedLookup
from coalestra.orchestration import foreign_cache
from coalestra.redis import (
    MessagePackCodec,
    RedisCache,
    SharedCacheUnavailableError,
    UnstorableValueError,
)
from coalestra.redis.codec import is_large
from coalestra.redis.scripts import key_of, name_of
from tests.redis.servers import Server
from tests.redis.stock import (
    PATIENT_SECONDS,
    POLICY,
    A,
    B,
    C,
    Caches,
    Told,
    caches_of,
    fulfil,
    lease,
    leased,
    read,
    until,
    value_of,
    waits,
)
from tests.support import Gate
from tests.support.running import profiled

pytestmark = [pytest.mark.real_loop, pytest.mark.server]

STORED = CacheWriteStatus.STORED
OLDER = CacheWriteStatus.IGNORED_OLDER
DUPLICATE = CacheWriteStatus.IGNORED_DUPLICATE
LOWER = CacheWriteStatus.IGNORED_LOWER_AUTHORITY

# What a value is like when it comes back ------------------------------------------------------


async def test_a_value_comes_back_whole_in_another_process(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        sent = value_of(A, {"x": (1, b"2")}, observed_at=1000.5, rank=3, rests_on={})
        await one.set(sent)
        found = (await other.get(A, now=1001.0, policy=POLICY)).value
        assert found is not None
        assert (found.value, found.observed_at, found.authority_rank) == (
            {"x": (1, b"2")},
            1000.5,
            3,
        )
        assert (found.version, found.source, found.attempts) == (sent.version, "test", 1)
        assert found.from_cache


async def test_a_client_that_decodes_answers_does_as_well(server: Server, prefix: str) -> None:
    client = Redis.from_url(server.url, decode_responses=True)
    cache = RedisCache(client, prefix=prefix)
    await cache.set_many([value_of(A, b"\xff\xfe"), value_of(B, 2)])
    assert await read(cache) == b"\xff\xfe"
    await cache.clear()
    assert await read(cache) is None
    await cache.aclose()
    await client.aclose()


async def test_what_has_no_date_is_as_old_as_its_time_on_the_server(caches: Caches) -> None:
    """Whatever the clocks of the two processes say."""
    async with caches(2) as [one, other]:
        await one.set(value_of(now=time.time() - 3600))
        found = await other.get(A, now=time.time() + 3600, policy=POLICY)
        assert found.value is not None
        assert found.age_seconds == pytest.approx(0.0, abs=20)
        assert found.value.observed_at == pytest.approx(time.time() + 3600, abs=20)


async def test_the_server_drops_what_nobody_may_use_any_more(
    caches: Caches, server: Server, prefix: str
) -> None:
    async with caches() as [cache]:
        await cache.set(value_of(A), policy=FreshnessPolicy(1.0, 90.0))
        now = time.time()
        await cache.set(value_of(B, observed_at=now - 80, now=now), policy=FreshnessPolicy(1.0, 90))
        await cache.set(value_of(C), policy=FreshnessPolicy(1e9, 1e9))
        lives = [
            int(server.command("PTTL", f"{prefix}:shared:thing:{name}").strip()[1:]) / 1000
            for name in "ABC"
        ]
        assert lives == pytest.approx([90, 10, 7 * 86400], abs=9)


# Order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("held,offered,terms,status", [
    ((0, 100), (0, 101), {}, STORED), ((0, 100), (0, 99), {}, OLDER),
    ((0, 100), (0, 100), {}, DUPLICATE), ((0, 100), (0, 100), {"replace_equal": True}, STORED),
    ((0, 100), (0, 99), {"replace_equal": True}, OLDER), ((1, 100), (0, 200), {}, LOWER),
    ((1, 100), (2, 50), {}, STORED), ((-1, 100), (-2, 200), {}, LOWER),
    ((1, 100), (0, 50), {"force": True}, STORED), ((0, 100.0000001), (0, 100.0000002), {}, STORED),
    ((0, None), (0, None), {}, STORED), ((1, None), (0, None), {}, LOWER),
])  # fmt: skip
async def test_the_server_decides_by_the_write_order(
    caches: Caches,
    held: tuple[int, float | None],
    offered: tuple[int, float | None],
    terms: dict[str, Any],
    status: CacheWriteStatus,
) -> None:
    async with caches(2) as [one, other]:
        first = value_of(A, "held", rank=held[0], observed_at=held[1])
        await one.set(first)
        second = value_of(A, "offered", rank=offered[0], observed_at=offered[1])
        result = await other.set_if_newer(second, **terms)
        assert result.status is status
        assert result.value.value == ("offered" if status is STORED else "held")
        assert result.previous is not None
        assert result.previous.value == "held"
        assert await read(one, policy=FreshnessPolicy(1e12, 1e12)) == result.value.value


async def test_of_many_undated_values_the_last_one_stored_stays(caches: Caches) -> None:
    async with caches(2) as both:
        for number in range(40):
            result = await both[number % 2].set_if_newer(value_of(A, number, now=1000.0 - number))
            assert result.status is STORED
        assert await read(both[0]) == 39


async def test_a_hundred_values_are_one_round_trip(caches: Caches) -> None:
    keys = [ResourceKey("many", "n", str(number)) for number in range(100)]
    async with caches() as [cache]:
        await cache.set_many([value_of(key, number) for number, key in enumerate(keys)])
        before = cache.health().calls
        found = await cache.get_many(keys, now=time.time(), policies=dict.fromkeys(keys, POLICY))
        assert cache.health().calls == before + 1
        assert [found[key].value.value for key in keys] == list(range(100))  # type: ignore[union-attr]  # there


def derived_in_steps(**more: Any) -> CallableDerivedSource:
    """Derives B from A, and C from B."""
    return CallableDerivedSource(
        name="derived", priority=1, supports=lambda k: k != A,
        dependencies=lambda k: [A if k == B else B], deriver=lambda k, known, context: k.subject,
        run_sync_in_thread=False, **more,
    )  # fmt: skip


def slow_to_write(cache: RedisCache, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Hold back what a cache writes under leases until the gate is opened."""
    gate, fulfil_many = Gate(), cache.fulfil_many

    async def late(*values: Any, **terms: Any) -> Any:
        await gate.pass_()
        return await fulfil_many(*values, **terms)

    monkeypatch.setattr(cache, "fulfil_many", late)
    return gate


async def test_a_value_that_cannot_be_stored_keeps_all_from_being_written(caches: Caches) -> None:
    async with caches() as [cache]:
        with pytest.raises(UnstorableValueError, match="builtins.object"):
            await cache.set_many([value_of(A), value_of(B, object())])
        assert await read(cache) is None


async def test_a_value_that_is_too_large_is_refused(caches: Caches) -> None:
    async with caches(max_value_bytes=1000) as [cache]:
        with pytest.raises(UnstorableValueError, match="max_value_bytes is 1,000"):
            await cache.set(value_of(A, "x" * 1000))


async def test_reading_and_writing_many_values_gives_the_loop_back_in_between(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(Pace):
        kept = 0

        async def keep(self) -> bool:
            Counted.kept += 1
            return await super().keep()

    monkeypatch.setattr("coalestra.redis.cache.Pace", Counted)
    keys = [ResourceKey("many", "n", str(number)) for number in range(100)]
    async with caches() as [cache]:
        await cache.set_many([value_of(key) for key in keys])
        assert Counted.kept > 2 * len(keys)
        await cache.get_many(keys, now=time.time(), policies=dict.fromkeys(keys, POLICY))
        assert Counted.kept > 3 * len(keys)
        told = (await leased(cache, tuple(keys), force=True)).values()
        values = {each.lease: value_of(each.lease.key) for each in told if each.lease is not None}
        await cache.fulfil_many(values, policies={})
        assert Counted.kept > 6 * len(keys)


# Entries that cannot be read ------------------------------------------------------------------


async def test_an_entry_of_another_type_is_a_miss_for_itself_alone_and_is_replaced(
    caches: Caches, server: Server, prefix: str
) -> None:
    async with caches() as [cache]:
        await cache.set(value_of(B, "well"))
        server.command("SET", f"{prefix}:shared:thing:A", "text")
        assert [await read(cache, A), await read(cache, B)] == [None, "well"]
        held = await lease(cache)
        assert (await fulfil(cache, held, "new", observed_at=time.time() - 50)).status is STORED
        assert await read(cache) == "new"


async def test_an_entry_of_a_model_unknown_here_is_a_miss_and_counted(caches: Caches) -> None:
    async with caches(models=[RefreshMode]) as [newer]:
        await newer.set(value_of(A, RefreshMode.BLOCKING))
        async with caches() as [older]:
            assert await read(older) is None
            assert older.health().unreadable == 1


class Odd(MessagePackCodec):
    """Raises what it should not."""

    def encode(self, value: Any) -> bytes:
        if value == "unwritable":
            raise ZeroDivisionError
        return super().encode(value)

    def decode(self, data: bytes) -> Any:
        value = super().decode(data)
        if value == "unreadable":
            raise ZeroDivisionError
        return value


async def test_a_publication_replaces_what_its_process_cannot_read(caches: Caches) -> None:
    """Whatever rank and date that has: it counts as missing, and is replaced by the next write."""
    async with caches(models=[Rows]) as [newer], caches() as [older]:
        await newer.set(value_of(A, Rows([]), rank=3))
        await newer.set(value_of(B, 1, rank=3))
        updates = [ResourceUpdate(each, 2, "event", time.time() - 3) for each in (A, B)]
        async with SnapshotBuilder([], cache=older, default_policy=POLICY) as builder:
            results = await builder.publisher.publish_many(updates)
        assert [results[each].published for each in (A, B)] == [True, False]
        assert (await read(newer), await read(newer, B)) == (2, 1)


async def test_an_entry_from_the_future_is_replaced_once_for_all_processes(caches: Caches) -> None:
    """One whose clock is wrong has published it."""
    asked: list[ResourceKey] = []
    source = CallableSource(
        name="s", priority=1, supports=lambda key: True, fetcher=lambda key, _: asked.append(key)
    )
    async with caches(2) as made:
        await made[0].set(value_of(A, "future", observed_at=time.time() + 1000))
        for cache in made * 2:
            async with SnapshotBuilder([source], cache=cache, default_policy=POLICY) as builder:
                assert (await builder.build([A])).value(A) is None
        assert len(asked) == 1


@pytest.mark.parametrize("payload, error", [
    (object(), UnstorableValueError), ("unwritable", ZeroDivisionError),
])  # fmt: skip
async def test_what_a_codec_refuses_or_raises_concerns_one_entry_alone(
    caches: Caches, payload: Any, error: type[Exception]
) -> None:
    async with caches(2, codec=Odd()) as [one, other]:
        held, fine = await lease(one), await lease(one, B)
        waiting = await waits(other)
        values = {held: value_of(A, payload), fine: value_of(B, "well")}
        outcome = await one.fulfil_many(values, policies={A: POLICY, B: POLICY})
        assert isinstance(outcome[A], error)
        assert (await waiting)[A] == LeasedLookup(await other.get(A, now=0.0, policy=POLICY))
        await one.set(value_of(C, "unreadable"))
        assert [await read(other, key) for key in (B, C)] == ["well", None]
        found = await other.get_many((B, C), now=time.time(), policies={B: POLICY, C: POLICY})
        assert found[B].value is not None
        assert other.health().unreadable == 2


# Leases ---------------------------------------------------------------------------------------


async def test_what_needs_no_waiting_comes_first_and_together(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        await one.set(value_of(A, "there"))
        held = await lease(one, B)
        asking = other.lease_many(
            [A, B, C], now=time.time(), policies=dict.fromkeys([A, B, C], POLICY)
        )
        first = await anext(asking)
        assert [first[key].waiting for key in (A, B, C)] == [False, True, False]
        assert first[C].lease is not None
        await fulfil(one, held)
        assert set(await anext(asking)) == {B}
        await asking.aclose()


async def test_a_lease_given_back_goes_to_one_of_those_who_wait(caches: Caches) -> None:
    async with caches(3) as [one, *others]:
        held = await lease(one)
        waiting = [await waits(each) for each in others]
        await one.release_many([held])
        await until(lambda: any(each.done() for each in waiting))
        [next_one] = [each for each in waiting if each.done()]
        taken = next_one.result()[A].lease
        assert taken is not None
        await fulfil(others[waiting.index(next_one)], taken, "second")
        told = [(await each)[A] for each in waiting if each is not next_one]
        assert [each.lookup.value.value for each in told if each.lookup.value] == ["second"]


async def test_who_has_waited_for_one_in_vain_goes_on_alone(caches: Caches) -> None:
    """A source that fails is not asked by one process after the other."""
    async with caches(3) as [one, *others]:
        held = await lease(one)
        waiting = [await waits(each) for each in others]
        await one.release_many([held], failed=True)
        for each in waiting:
            told = (await each)[A]
            assert (told.lease, told.lookup.value) == (None, None)


async def test_a_lease_that_is_not_renewed_passes_to_the_next(caches: Caches) -> None:
    async with caches(2, lease_seconds=0.3) as [one, other]:
        held = await lease(one)
        one._leases.clear()  # as if the process had died
        taken = await asyncio.wait_for(lease(other), PATIENT_SECONDS)
        assert taken.token != held.token
        assert (await fulfil(one, held, "late")).status is OLDER
        assert (await fulfil(other, taken, "second")).status is STORED
        assert await read(one) == "second"


async def test_a_lease_lasts_while_its_holder_lives(
    caches: Caches, server: Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is renewed after a third of its time each; here, of a hundredth of that."""
    async with caches(2, lease_seconds=30.0) as [one, other]:
        loop, pauses = asyncio.get_running_loop(), []
        call_later = loop.call_later

        def hurried(delay: float, callback: Any, *arguments: Any, **terms: Any) -> Any:
            if callback == one._renew:
                pauses.append(delay)
                delay /= 100
            return call_later(delay, callback, *arguments, **terms)

        monkeypatch.setattr(loop, "call_later", hurried)
        held = await lease(one)
        for _ in range(2):
            ends = ends_of_lease(server, prefix)
            await until(lambda: ends_of_lease(server, prefix) > ends)  # noqa: B023
        assert set(pauses) == {10.0}
        waiting = await waits(other)
        assert (await fulfil(one, held, "slow")).status is STORED
        told = (await waiting)[A].lookup.value
        assert told is not None
        assert told.value == "slow"


def ends_of_lease(server: Server, prefix: str) -> float:
    """When the lease on A ends, by the server's clock."""
    return float(server.command("HGET", f"{prefix}:shared:thing:A", "x").split(b"\r\n")[1])


async def test_closing_gives_back_leases_at_once(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        held = await lease(one)
        waiting = await waits(other)
        await one.aclose()
        assert (await waiting)[A].lease is not None
        assert held.key == A


async def test_closing_waits_for_leases_that_are_being_given_back(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with caches(2, lease_seconds=100) as [one, other]:
        held, gate, run = await lease(one), Gate(), one._server.run

        async def slow(*arguments: Any) -> Any:
            await gate.pass_()
            return await run(*arguments)

        monkeypatch.setattr(one._server, "run", slow)
        await fulfil(one, held, object())
        await gate.wait_arrived()
        closing = asyncio.ensure_future(one.aclose())
        await asyncio.wait([closing], timeout=0.05)
        gate.open()
        await closing
        assert (await asyncio.wait_for(leased(other), PATIENT_SECONDS))[A].lease is not None


async def test_who_waits_for_another_process_is_told_that_the_cache_closes(caches: Caches) -> None:
    """Else he would go on asking, and be given a lease that nobody gives back."""
    async with caches(3) as [one, other, third]:
        held = await lease(one)
        waiting = await waits(other)
        await other.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(waiting, 3)
        await one.release_many([held])
        assert (await asyncio.wait_for(leased(third), 3))[A].lease is not None


async def test_a_lease_that_reaches_nobody_is_given_back(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        await leased(one, (B,))
        reading = asyncio.create_task(leased(one, (A,)))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})
        assert (await asyncio.wait_for(leased(other), PATIENT_SECONDS))[A].lease is not None


async def test_a_lease_whose_grant_was_lost_with_the_connection_is_granted_once_more(
    server: Server, prefix: str
) -> None:
    """Else whoever asked would wait for himself, and all others with him."""
    client: Any = Redis.from_url(server.url)
    ask, cuts = client.execute_command, list[Exception]()

    async def cut_off(*words: Any, **options: Any) -> Any:
        answer = await ask(*words, **options)
        if cuts:
            raise cuts.pop()
        return answer

    client.execute_command = cut_off
    cache = RedisCache(client, prefix=prefix, lease_seconds=1000, time_limit_seconds=20)
    await lease(cache, B)
    cuts.append(ConnectionClosed("cut off"))
    assert (await asyncio.wait_for(leased(cache), PATIENT_SECONDS))[A].lease is not None
    assert not cuts
    await cache.aclose()
    await client.aclose()


async def test_a_stale_value_comes_along_with_the_lease(caches: Caches) -> None:
    policy = FreshnessPolicy(1.0, 100.0)
    async with caches(2) as [one, other]:
        now = time.time()
        await one.set(value_of(A, "stale", observed_at=now - 50, now=now))
        told = (await leased(other, policy=policy))[A]
        assert told.lease is not None
        assert told.lookup.value is not None
        assert (told.lookup.value.value, told.lookup.fresh) == ("stale", False)
        behind = FreshnessPolicy(1.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
        served = (await leased(one, policy=behind))[A]
        assert served.lease is None
        assert served.lookup.usable_stale


async def test_force_takes_the_lease_from_its_holder(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        before = await lease(one)
        now = await lease(other, force=True)
        assert (await fulfil(one, before, "begun before")).status is OLDER
        assert (await fulfil(other, now, "begun now")).status is STORED
        assert await read(one) == "begun now"


async def test_a_version_that_is_of_no_use_is_replaced_once_by_one(caches: Caches) -> None:
    """Two processes that refresh the same version make one call."""
    async with caches(2) as [one, other]:
        old = value_of(A, "old")
        await one.set(old)
        held = await lease(one, unlike={A: old.version})
        waiting = await waits(other, unlike={A: old.version})
        await fulfil(one, held, "new")
        told = (await waiting)[A]
        assert told.lease is None
        assert told.lookup.value is not None
        assert told.lookup.value.value == "new"


@pytest.mark.slow
async def test_very_many_leases_are_kept_and_given_back_in_few_calls(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tuple(ResourceKey("many", "n", str(number)) for number in range(500))
    made: list[int] = []
    async with caches(2, lease_seconds=1.0) as [one, other]:
        run = one._server.run

        async def counted(script: Any, calls: Any, *shared: Any, **terms: Any) -> Any:
            made.append(len(calls))
            return await run(script, calls, *shared, **terms)

        monkeypatch.setattr(one._server, "run", counted)
        told = await leased(one, keys)
        held = [each.lease for each in told.values() if each.lease is not None]
        assert len(held) == len(keys)
        await asyncio.sleep(1.5)
        waiting = asyncio.create_task(leased(other, keys[:1]))
        await until(lambda: other.health().waiting)
        await one.release_many(held)
        assert (await waiting)[keys[0]].lease is not None
        assert max(made) == 10


async def test_news_of_ones_own_that_nobody_waits_for_take_no_time(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[str] = []

    def unpack(canonical: str) -> ResourceKey:
        unpacked.append(canonical)
        return key_of(canonical)

    monkeypatch.setattr("coalestra.redis.scripts.key_of", unpack)
    async with caches(2) as [one, other]:
        await asyncio.gather(read(one), read(other))
        await one.set(value_of(A))
        await until(lambda: one.caught_up() and other.caught_up())
        assert unpacked == [A.canonical], "by the other one"


# Fences ---------------------------------------------------------------------------------------


async def test_what_arrives_after_its_time_limit_is_not_stored(caches: Caches) -> None:
    """Its key may have been invalidated since; here, as the clock is an hour ahead of what it was.

    That is known from then on.
    """
    async with caches() as [cache]:
        held = await lease(cache, B)
        cache._server._offset = -3600.0, 0.0, time.monotonic()
        with pytest.raises(SharedCacheUnavailableError, match="LATE nobody waits"):
            await cache.set(value_of(A))
        assert await read(cache) is None
        assert (await fulfil(cache, held)).stored
        cache._server._offset = -3600.0, 0.0, time.monotonic()
        assert isinstance(await fulfil(cache, held, 2), SharedCacheUnavailableError)
        assert await read(cache, B) == 1


@pytest.mark.parametrize("invalidated", [False, True])
async def test_a_stale_fetch_that_began_before_an_invalidation_stores_nothing(
    caches: Caches, server: Server, prefix: str, invalidated: bool
) -> None:
    """Else it would stand in, in all processes, for what was invalidated after it was read.

    Here its process did not hear of that.
    """
    gate = Gate()

    async def lag(key: ResourceKey, context: object) -> SourcePayload[str]:
        await gate.pass_()
        return SourcePayload("too old", observed_at=time.time() - 5)

    source = CallableSource(name="s", priority=1, supports=lambda key: True, fetcher=lag)
    async with caches(2) as [one, other]:
        lagging = FreshnessPolicy(1, 1000)
        async with SnapshotBuilder([source], cache=one, default_policy=lagging) as builder:
            reader = asyncio.ensure_future(builder.build([A]))
            await gate.wait_arrived()
            if invalidated:
                server.command("DEL", name_of(prefix, A))
            gate.open()
            assert (await reader).value(A) == "too old"
        assert await read(other) == (None if invalidated else "too old")


@pytest.mark.parametrize("seconds, stored", [(5, True), (7, False)])
async def test_who_has_waited_for_a_stale_value_goes_on_alone(
    caches: Caches, seconds: float, stored: bool
) -> None:
    """As if there had been none: a source that lags is not asked by one after the other."""
    policy, now = FreshnessPolicy(1, 1000), time.time()
    async with caches(3) as [one, *others]:
        await one.set(value_of(A, "before", observed_at=now - 6))
        held = await lease(one, policy=policy)
        waiting = [await waits(each, policy=policy) for each in others]
        stale = value_of(A, "stale", observed_at=now - seconds)
        outcome = (await one.fulfil_many({held: stale}, policies={A: policy}))[A]
        assert (getattr(outcome, "status", None) is STORED) is stored
        for each in waiting:
            assert (await asyncio.wait_for(each, PATIENT_SECONDS))[A].lease is None
        assert await read(others[0]) == ("stale" if stored else "before")


# Derived values -------------------------------------------------------------------------------


async def test_a_derived_value_is_good_while_what_it_rests_on_is_there(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        base = value_of(A, 1)
        middle = value_of(B, 2, rests_on={A: base.version})
        top = value_of(C, 3, rests_on={B: middle.version})
        await one.set_many([base, middle, top])
        assert await read(other, C) == 3
        told = await leased(other, (C,))
        assert told[C].lease is None
        assert {
            key: each.lookup.value.value for key, each in told.items() if each.lookup.value
        } == {A: 1, B: 2, C: 3}
        await one.set(value_of(A, 10))
        assert [await read(other, key) for key in (A, B, C)] == [10, None, None]
        held = await lease(other, C)
        stored = await fulfil(other, held, 30, rests_on={A: "x"}, observed_at=1.0)
        assert stored.status is STORED


@pytest.mark.parametrize("inherits", [False, True])
async def test_a_derived_value_tells_all_what_it_rests_on(caches: Caches, inherits: bool) -> None:
    source = derived_in_steps(inherit_freshness=inherits)
    observed_at = time.time() - 30
    async with caches(2) as [one, other]:
        async with SnapshotBuilder([source], cache=one, default_policy=POLICY) as builder:
            await builder.publisher.publish(A, 1, source="stream", observed_at=observed_at)
            await builder.build([C])
        async with SnapshotBuilder([source], cache=other, default_policy=POLICY) as builder:
            value = (await builder.build([C]))[C]
        assert (value.from_cache, value.oldest_key) == (True, A)
        assert value.oldest_observed_at == pytest.approx(observed_at, abs=0.01)
        assert (value.inherits_freshness, value.rests_on_stale) == (inherits, False)
        assert value.age_seconds == pytest.approx(30 if inherits else 0, abs=5)


async def test_what_is_given_to_readers_before_it_is_written_is_written_all_the_same(
    caches: Caches, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes its time to store makes readers go on at once, with the leases kept."""
    source = derived_in_steps()
    async with caches(2) as [one, other]:
        gate = slow_to_write(one, monkeypatch)
        async with SnapshotBuilder([source], cache=one, default_policy=POLICY) as builder:
            await builder.publisher.publish(A, 1, source="stream")
            await builder.build([B])  # not held back by the write
            gate.open()
            await builder.build([C])
        assert [await read(other, k) for k in (B, C)] == ["B", "C"]


async def test_while_news_may_be_missing_no_value_on_its_way_is_served(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have replaced it, and that would not be known."""
    source = CallableSource(
        name="plain", priority=1, supports=lambda k: True, fetcher=lambda k, context: 1
    )
    async with caches(2) as [one, other]:
        gate = slow_to_write(one, monkeypatch)
        monkeypatch.setattr(one, "caught_up", lambda: False)
        monkeypatch.setattr(one, "subscribe", lambda listener: None)  # the news are lost
        async with (
            SnapshotBuilder([source], cache=one, default_policy=POLICY) as first,
            SnapshotBuilder([source], cache=other, default_policy=POLICY) as second,
        ):
            assert (await first.build([A])).value(A) == 1  # which is not written yet
            await second.publisher.publish(A, 2, source="stream")
            assert (await first.build([A])).value(A) == 2
            gate.open()


async def test_what_one_knows_not_to_exist_ends_with_the_news_of_another(caches: Caches) -> None:
    calls: list[str] = []

    def source(name: str) -> CallableSource:
        async def none(k: ResourceKey, context: Any) -> Any:
            calls.append(name)
            raise ResourceAbsent("no such row", ttl_seconds=600)

        return CallableSource(name=name, priority=1, supports=lambda k: True, fetcher=none)

    async with (
        caches(2) as [one, other],
        SnapshotBuilder([source("one")], cache=one, default_policy=POLICY) as first,
        SnapshotBuilder([source("other")], cache=other, default_policy=POLICY) as second,
    ):
        for builder in (first, second, first, second):
            snapshot = await builder.build([A], strict=False)
            assert type(snapshot.errors[A]) is ResourceAbsentError
        assert calls == ["one", "other"]
        await second.publisher.publish(A, 1, source="stream")
        assert (await first.build([A])).value(A) == 1


async def test_a_call_that_finishes_late_keeps_its_lease_and_serves_all(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_cache, "SHARE", 2.0)  # so that its reader asks for no value without
    calls: list[str] = []
    answer = asyncio.Event()

    def source(name: str) -> CallableSource:
        async def slow(k: ResourceKey, context: Any) -> str:
            calls.append(name)
            await answer.wait()
            return name

        return CallableSource(
            name=name, priority=1, supports=lambda k: True, fetcher=slow, timeout_seconds=30.0,
            resilience_policy=SourceResiliencePolicy(finish_late=True),
        )  # fmt: skip

    async with (
        caches(2) as [one, other],
        SnapshotBuilder([source("one")], cache=one, default_policy=POLICY) as first,
        SnapshotBuilder([source("other")], cache=other, default_policy=POLICY) as second,
    ):
        while not calls:  # on a busy machine the deadline may end before the source is asked
            snapshot = await first.build([A], strict=False, deadline_seconds=0.1)
            assert not snapshot.complete
        waiting = asyncio.ensure_future(second.build([A]))
        await until(lambda: other.health().waiting)
        answer.set()
        assert (await waiting).value(A) == "one"
        assert calls == ["one"]


async def test_an_outdated_derived_value_defends_nothing(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        await one.set(value_of(B, "outdated", rests_on={A: "gone"}, observed_at=500.0))
        result = await other.set_if_newer(value_of(B, "new", observed_at=400.0))
        assert result.status is STORED


async def test_who_cannot_replace_an_outdated_derived_value_is_told_so(
    caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with caches() as [one]:
        await one.set(value_of(B, "outdated", rests_on={A: "gone"}, observed_at=500.0))
        written, write = 0, one._write

        async def failing(offered: Any, items: Any) -> Any:
            nonlocal written
            written += 1
            if written == 2:
                return {B: SharedCacheUnavailableError("no memory left")}, 0, {}
            return await write(offered, items)

        monkeypatch.setattr(one, "_write", failing)
        with pytest.raises(SharedCacheUnavailableError, match="no memory left"):
            await one.set_if_newer(value_of(B, "new", observed_at=400.0))


# News -----------------------------------------------------------------------------------------


async def test_every_change_is_told_before_it_is_over(caches: Caches) -> None:
    """Who looks after the change has returned finds the news on his own machine."""
    async with caches(2) as [one, other]:
        told = Told()
        other.subscribe(told)
        await read(other)
        for _ in range(50):
            value = value_of(A)
            await one.set_if_newer(value)
            assert other.caught_up()
            assert told.changes.pop() == (A, value.version)
            await one.invalidate(A)
            assert other.caught_up()
            assert told.changes.pop() == (A, None)
        other.unsubscribe(told)
        await one.invalidate(B)
        assert other.caught_up()
        assert told.changes == []


async def test_ones_own_changes_are_no_news(caches: Caches) -> None:
    async with caches() as [one]:
        told = Told()
        one.subscribe(told)
        await one.set(value_of(A))
        assert one.caught_up()
        assert told.changes == []


async def test_clearing_is_told_as_a_gap(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        told = Told()
        other.subscribe(told)
        await other.set_many([value_of(A), value_of(B)])
        gaps = told.gaps
        await one.clear()
        assert other.caught_up()
        assert told.gaps == gaps + 1
        assert [await read(other, key) for key in (A, B)] == [None, None]


async def test_clearing_much_opens_few_connections(caches: Caches, server: Server) -> None:
    def opened() -> int:
        told = server.command("INFO", "stats")
        return int(told.partition(b"total_connections_received:")[2].split()[0])

    async with caches() as [cache]:
        keys = [ResourceKey("many", "n", str(number)) for number in range(4_000)]
        await cache.set_many([value_of(key) for key in keys])
        before = opened()
        await cache.clear()
        assert opened() <= before + 3
        assert await read(cache, keys[-1]) is None


@pytest.mark.parametrize("end", ["2", ":eu", ":", ".eu"])
async def test_two_prefixes_have_nothing_in_common(
    caches: Caches, server: Server, prefix: str, end: str
) -> None:
    inner, outer = ResourceKey("shared", "thing"), ResourceKey("eu", "shared", "thing")
    async with caches() as [one], caches_of(server, f"{prefix}{end}") as [other]:
        await one.set(value_of(outer))
        assert await read(other, inner) is None
        assert await read(other, outer) is None
        await other.clear()
        assert await read(one, outer) == 1
        await other.set(value_of(inner, 2))
        await one.clear()
        assert await read(other, inner) == 2


# Whose it is ----------------------------------------------------------------------------------


async def test_after_closing_it_is_refused(caches: Caches) -> None:
    async with caches() as [cache]:
        await cache.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await read(cache)


async def test_a_client_passed_in_stays_open_unlike_its_own(server: Server, prefix: str) -> None:
    client = Redis.from_url(server.url)
    cache = RedisCache(client, prefix=prefix)
    own = RedisCache(server.url, prefix=prefix)
    await asyncio.gather(read(cache), read(own))
    await asyncio.gather(cache.aclose(), own.aclose())
    assert await client.ping()
    await client.aclose()
    clients = server.command("CLIENT", "LIST")
    assert clients.count(b" addr=") == 1  # the one that asks


def test_a_second_loop_may_have_it_once_the_first_is_closed(server: Server, prefix: str) -> None:
    cache = RedisCache(server.url, prefix=prefix)

    async def use(close: bool) -> Any:
        await cache.set(value_of(A, "there"))
        found = await read(cache)
        await cache._server.client.aclose()
        await cache._news.close()
        if close:
            await cache.aclose()
        return found

    assert asyncio.run(use(False)) == "there"
    assert asyncio.run(use(True)) == "there"


async def test_a_loop_beside_the_first_is_refused(caches: Caches) -> None:
    async with caches() as [cache]:
        await read(cache)
        with pytest.raises(RuntimeError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, read(cache))


@pytest.mark.parametrize("arguments,match", [
    ({"client": object()}, "redis.asyncio.Redis"), ({"prefix": "a*"}, "letters, digits"),
    ({"prefix": ""}, "prefix"), ({"time_limit_seconds": 0}, "above 0"),
    ({"lease_seconds": -1}, "lease_seconds must be a finite number of at least 0.001"),
    ({"lease_seconds": 0.0001}, "lease_seconds must be a finite number of at least 0.001"),
    ({"lease_seconds": 1e10}, "lease_seconds .* of at most 1e"),
    ({"max_lifetime_seconds": 1e-9}, "max_lifetime_seconds .* of at least 0.001"),
    ({"max_lifetime_seconds": 1e300}, "max_lifetime_seconds .* of at most 1e"),
    ({"near_entries": -1}, "near_entries"), ({"codec": object()}, "codec"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        RedisCache(**{"client": "redis://localhost", **arguments})


@pytest.mark.parametrize("field", list("rowtvlxd"))
async def test_an_entry_of_damaged_fields_spoils_only_itself_and_is_replaced(
    caches: Caches, server: Server, prefix: str, field: str
) -> None:
    async with caches(near_entries=0) as [cache], Redis.from_url(server.url) as raw:
        for junk in (b"", b"abc", b"1 2", b"\xff\x00", None):
            unreadable = cache.health().unreadable
            for key in (A, B):
                await cache.set(value_of(key, "old"))
            await lease(cache, force=True)
            if junk is None:
                await raw.hdel(name_of(prefix, A), field)
            else:
                await raw.hset(name_of(prefix, A), field, junk)
            told = await cache.get_many((A, B), now=time.time(), policies={A: POLICY, B: POLICY})
            assert told[B].value is not None
            damaged = field in "otd" or (field == "v" and junk is None)
            assert (told[A].value is None) is damaged, junk
            unreadable += damaged and (field, junk) != ("d", None)
            assert cache.health().unreadable == unreadable, junk
            news = [value_of(key, "new", observed_at=time.time()) for key in (A, B)]
            results = await cache.set_many_if_newer(news)
            assert {each.status for each in results.values()} == {STORED}, junk
            assert [await read(cache, key) for key in (A, B)] == ["new", "new"]
            await cache.clear()


@pytest.mark.parametrize("field", ["o", "t", "w", "r"])
async def test_who_acquires_a_damaged_entry_holds_its_lease(
    caches: Caches, server: Server, prefix: str, field: str
) -> None:
    async with caches() as [cache], Redis.from_url(server.url) as raw:
        await cache.set(value_of())
        held = await lease(cache, force=True)
        await raw.hset(name_of(prefix, A), field, "abc")
        assert (await fulfil(cache, held, "acquired")).stored
        assert await read(cache) == "acquired"


async def test_a_damaged_lease_stops_nobody(caches: Caches, server: Server, prefix: str) -> None:
    async with caches(2) as [one, other], Redis.from_url(server.url) as raw:
        await lease(one)
        await raw.hset(name_of(prefix, A), "x", "abc")
        assert (await fulfil(other, await lease(other), "acquired")).stored


@pytest.mark.parametrize("field, odd, reason", [
    ("version", "v" * 1_000, "its version takes more than 999 bytes"),
    ("version", "\udcff", "half a surrogate pair"),
    ("source", "caf\udce9", "half a surrogate pair"),
    ("authority_rank", 2**64, "more than 64 bits"),
])  # fmt: skip
async def test_provenance_that_cannot_be_told_is_refused_by_name(
    caches: Caches, field: str, odd: Any, reason: str
) -> None:
    async with caches() as [cache]:
        changes: dict[str, Any] = {field: odd}
        value = dataclasses.replace(value_of(), **changes)
        with pytest.raises(UnstorableValueError, match=reason):
            await cache.set(value)
        assert cache.health().unstorable == 1
        assert await read(cache) is None


@dataclasses.dataclass
class Rows:
    """Many of something."""

    rows: list[Any]


@pytest.mark.parametrize("large", [False, True])
async def test_a_large_value_is_written_and_read_on_another_thread(
    caches: Caches, large: bool
) -> None:
    asked: list[threading.Thread] = []

    class Codec(MessagePackCodec):
        def encode(self, value: Any) -> bytes:
            asked.append(threading.current_thread())
            return super().encode(value)

        def decode(self, data: bytes) -> Any:
            asked.append(threading.current_thread())
            return super().decode(data)

    rows = Rows([{"n": n} for n in range(10_000 if large else 10)])
    async with caches(codec=Codec([Rows])) as [cache]:
        for value in (rows, {"a": rows}, [(rows,)]):
            await cache.set(value_of(payload=value))
            assert await read(cache) == value
    assert all((each is not threading.main_thread()) is large for each in asked)
    assert len(asked) == 8  # what was there before is told, too


def test_to_see_that_a_value_is_not_large_takes_less_than_to_write_it() -> None:
    """It is looked at for each value, on the event loop."""
    value = {"rows": list(range(2_000)), "at": [dt.date.today()] * 2_000, "by": ["a"] * 900}
    assert not is_large(value)
    assert profiled(lambda: is_large(value)).total() < 100


class Numpyish(float):
    """A float that calls itself as those of numpy do."""

    def __repr__(self) -> str:
        return f"np.float64({float(self)!r})"

    __str__ = __repr__

    def __sub__(self, other: float) -> Numpyish:
        return Numpyish(float(self) - other)

    __add__ = __radd__ = lambda self, other: Numpyish(float(self) + other)


class Rank(int, enum.Enum):
    """Ranks with names."""

    LOW = 1
    HIGH = 2


async def test_numbers_of_another_class_are_shared_as_the_numbers_they_are(caches: Caches) -> None:
    class NumpyishClock:
        def now(self) -> float:
            return Numpyish(time.time())

        monotonic = staticmethod(time.monotonic)

    async def fetch(key: ResourceKey, context: Any) -> SourcePayload[int]:
        return SourcePayload(1, Numpyish(time.time() + 0.5))

    source = CallableSource(name="s", priority=1, supports=lambda key: True, fetcher=fetch)
    settings: dict[str, Any] = {
        "clock": NumpyishClock(),
        "default_policy": FreshnessPolicy(Numpyish(60.0), Numpyish(120.0)),
        "authority_policy": SourceAuthorityPolicy({"s": Rank.LOW, "event": Rank.HIGH}),
    }
    async with caches(2) as [one, other]:
        first = SnapshotBuilder([source], cache=one, **settings)
        second = SnapshotBuilder([source], cache=other, **settings)
        await first.build([A])
        await until(lambda: not one.health().leases)
        assert (await second.build([A]))[A].from_cache
        terms: dict[str, Any] = {"source": "event", "observed_at": Numpyish(time.time() + 0.5)}
        assert (await second.publisher.publish(A, 2, **terms)).published
        assert (await first.build([A])).value(A) == 2
        for each in (first, second):
            await each.aclose()


async def test_nothing_is_left_after_closing(caches: Caches) -> None:
    async with caches(2) as [one, other]:
        await lease(one)
        waiting = await waits(other)
        waiting.cancel()
    await asyncio.wait({waiting})
    assert asyncio.all_tasks() == {asyncio.current_task()}
