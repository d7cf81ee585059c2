"""`AsyncMemoryCache`: what it adds to the entry store."""

from __future__ import annotations

import asyncio
import math
import weakref
from typing import Any

import pytest

from coalestra.cache.memory import AsyncMemoryCache
from coalestra.core.errors import PayloadCopyShutdownTimeoutError, PayloadCopySubsystemClosedError
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import PolicyResolver
from coalestra.core.values import CacheStats
from tests.contracts.samples import NOW, POLICY, A, B, C, Slow, value_of
from tests.support import ThreadGate, begun, settle


async def payload_of(cache: AsyncMemoryCache, key: ResourceKey = A) -> Any:
    value = (await cache.get(key, now=NOW, policy=POLICY)).value
    return None if value is None else value.value


@pytest.mark.parametrize("age, fresh, usable", [
    (0.0, True, True), (5.0, True, True), (5.1, False, True), (30.0, False, True),
    (30.1, False, False), (-1.0, True, True),
])  # fmt: skip
async def test_freshness_is_judged_by_age_at_reading(age: float, fresh: bool, usable: bool) -> None:
    cache = AsyncMemoryCache()
    await cache.set(value_of(observed_at=NOW - age))
    lookup = await cache.get(A, now=NOW, policy=POLICY)
    assert (lookup.fresh, lookup.usable_stale) == (fresh, usable)
    if usable:
        assert lookup.age_seconds == pytest.approx(max(0.0, age))


async def test_set_replaces_whatever_is_there() -> None:
    cache = AsyncMemoryCache()
    await cache.set(value_of(payload=2.0, rank=9))
    await cache.set(value_of(payload=1.0, observed_at=NOW - 1))
    assert await payload_of(cache) == 1.0


async def test_a_write_result_is_a_copy_of_what_is_stored() -> None:
    cache = AsyncMemoryCache()
    offered = value_of(payload=[1])
    result = await cache.set_if_newer(offered)
    assert result.stored
    assert result.value == offered
    assert result.value.value is not offered.value
    result.value.value.append(2)
    assert await payload_of(cache) == [1]


async def test_a_batch_read_needs_a_policy_for_each_key() -> None:
    cache = AsyncMemoryCache()
    with pytest.raises(KeyError):
        await cache.get_many([A, B], now=NOW, policies={A: POLICY})


async def test_matching_keys_are_invalidated_and_returned() -> None:
    cache = AsyncMemoryCache()
    await cache.set_many([value_of(A), value_of(B), value_of(C)])
    assert set(await cache.invalidate_matching(lambda key: key.subject > "A")) == {B, C}
    assert await cache.size() == 1
    with pytest.raises(TypeError, match="predicate"):
        await cache.invalidate_matching("A")  # type: ignore[arg-type]


@pytest.mark.parametrize("narrowing, left", [
    ({}, {("b", "x", "")}), ({"name": "x"}, {("a", "y", "1"), ("b", "x", "")}),
    ({"name": "x", "subject": "1"}, {("a", "x", ""), ("a", "y", "1"), ("b", "x", "")}),
    ({"subject": ""}, {("a", "x", "1"), ("a", "y", "1"), ("b", "x", "")}),
])  # fmt: skip
async def test_a_namespace_is_invalidated_as_narrowly_as_asked(
    narrowing: dict[str, str], left: set[tuple[str, str, str]]
) -> None:
    cache = AsyncMemoryCache()
    parts = [("a", "x", ""), ("a", "x", "1"), ("a", "y", "1"), ("b", "x", "")]
    await cache.set_many([value_of(ResourceKey(*each)) for each in parts])
    dropped = await cache.invalidate_namespace("a", **narrowing)
    assert {(key.namespace, key.name, key.subject) for key in dropped} == set(parts) - left
    assert await cache.size() == len(left)


async def test_pruning_drops_by_the_policy_of_each_key_and_returns_the_keys() -> None:
    cache = AsyncMemoryCache()
    old = value_of(A, observed_at=NOW - 31)
    await cache.set_many([old, value_of(B), value_of(C, rests_on=[old])])
    dropped = await cache.prune(now=NOW, policy_resolver=PolicyResolver(POLICY))
    assert set(dropped) == {A, C}
    assert await cache.size() == 1


async def test_statistics_add_up() -> None:
    cache = AsyncMemoryCache(max_entries=1)
    await cache.set(value_of(A))
    await cache.set(value_of(B))
    await payload_of(cache, A)
    await payload_of(cache, B)
    await cache.clear()
    assert await cache.stats() == CacheStats(
        size=0, max_entries=1, hits=1, misses=1, fresh_hits=1, stale_hits=0, sets=2,
        invalidations=1, evictions=1, expirations=0,
    )  # fmt: skip


@pytest.mark.parametrize("settings, error", [
    ({"max_entries": 0}, ValueError), ({"max_entries": True}, TypeError),
    ({"max_entries": 1.5}, TypeError), ({"max_copy_concurrency": 0}, ValueError),
    ({"max_copy_concurrency": "4"}, TypeError), ({"run_payload_copies_in_thread": 1}, TypeError),
    ({"payload_copier": 3}, TypeError),
])  # fmt: skip
def test_wrong_settings_are_refused_by_name(
    settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        AsyncMemoryCache(**settings)


def test_settings_read_back() -> None:
    cache = AsyncMemoryCache()
    assert (cache.max_entries, cache.max_copy_concurrency) == (10_000, 4)
    assert cache.run_payload_copies_in_thread is True
    custom = AsyncMemoryCache(max_entries=None, payload_copier=lambda value: value)
    assert custom.max_entries is None
    assert custom.run_payload_copies_in_thread is False
    assert "EntryStore(0 entries, unbounded" in repr(custom)


@pytest.mark.parametrize("now", [math.nan, math.inf])
async def test_an_instant_that_is_not_finite_is_refused(now: float) -> None:
    cache = AsyncMemoryCache()
    with pytest.raises(ValueError, match="now"):
        await cache.get(A, now=now, policy=POLICY)
    with pytest.raises(ValueError, match="now"):
        await cache.prune(now=now, policy_resolver=PolicyResolver(POLICY))


async def test_something_other_than_a_snapshot_value_is_refused() -> None:
    cache = AsyncMemoryCache()
    with pytest.raises(TypeError, match="value"):
        await cache.set("x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="values"):
        await cache.set_many([value_of(), "x"])  # type: ignore[list-item]
    assert await cache.size() == 0


async def test_values_of_which_there_is_one_look_only_are_all_stored() -> None:
    cache = AsyncMemoryCache()
    await cache.set_many(value_of(key=key) for key in (A, B))  # type: ignore[arg-type]
    await cache.set_many_if_newer(iter([value_of(key=C)]))  # type: ignore[arg-type]
    assert await cache.size() == 3


@pytest.mark.parametrize("method, arguments", [
    ("get", {"key": "x", "now": NOW, "policy": POLICY}),
    ("get", {"policy": None, "key": A, "now": NOW}),
    ("get_many", {"keys": 5, "now": NOW, "policies": {}}),
    ("get_many", {"keys": "x", "now": NOW, "policies": {"x": POLICY}}),
    ("get_many", {"policies": 5, "keys": (A,), "now": NOW}),
    ("get_many", {"policies": {A: 5.0}, "keys": (A,), "now": NOW}), ("set_many", {"values": 5}),
    ("set_if_newer", {"force": 1, "value": value_of()}),
    ("set_many_if_newer", {"replace_equal": "yes", "values": ()}), ("invalidate", {"key": "x"}),
    ("invalidate_many", {"keys": "xy"}), ("invalidate_many", {"keys": A}),
    ("invalidate_namespace", {"namespace": None}),
    ("invalidate_namespace", {"subject": 5, "namespace": "n"}),
    ("prune", {"policy_resolver": POLICY, "now": NOW}),
])  # fmt: skip
async def test_a_wrong_argument_is_refused_by_name(method: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(arguments))[:3]}.* must "):
        await getattr(AsyncMemoryCache(), method)(**arguments)


async def test_closing_waits_for_copies_and_names_what_is_late() -> None:
    Slow.release = ThreadGate()
    cache = AsyncMemoryCache()
    storing = await begun(cache.set(value_of(payload=Slow())))
    try:
        with pytest.raises(PayloadCopyShutdownTimeoutError) as caught:
            await cache.aclose_payload_copies(timeout_seconds=0.0)
    finally:
        Slow.release.open()
    assert caught.value.active_copies == 1
    assert dict(caught.value.active_components) == {"cache": 1}
    await asyncio.wait([storing])
    await settle()
    await cache.aclose()
    health = cache.copy_health_snapshot()
    assert (health.accepting_copies, health.shutdown_complete) == (False, True)
    with pytest.raises(PayloadCopySubsystemClosedError):
        await cache.set(value_of(payload=[1]))


async def test_pruning_gives_others_a_turn_after_every_portion() -> None:
    cache = AsyncMemoryCache(max_entries=None)
    keys = [ResourceKey("t", "e", str(number)) for number in range(3_000)]
    await cache.set_many([value_of(key, observed_at=NOW - 99) for key in keys])
    pruning = asyncio.ensure_future(cache.prune(now=NOW, policy_resolver=PolicyResolver(POLICY)))
    sizes = set()
    while not pruning.done():
        await asyncio.sleep(0)
        sizes.add(await cache.size())
    assert len(pruning.result()) == len(keys)
    assert len(sizes) >= 4


async def test_what_is_removed_at_once_is_let_go_in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.concurrency.pace.SLICE_SECONDS", 0.0)
    cache = AsyncMemoryCache(max_entries=None)
    keys = [ResourceKey("t", "e", str(number)) for number in range(2_000)]
    await cache.set_many([value_of(key, {number}) for number, key in enumerate(keys)])
    payloads = [each.payload for each in map(cache.store.peek, keys) if each is not None]
    sealed = [weakref.ref(payload) for payload in payloads]
    del payloads
    removing = asyncio.ensure_future(cache.invalidate_many(keys))
    sizes, alive = {2_000}, set()
    while not removing.done():
        sizes.add(await cache.size())
        alive.add(sum(reference() is not None for reference in sealed))
        await asyncio.sleep(0)
    assert sizes == {2_000, 0}, "in one step"
    assert len(alive) > 2, "neither all at once nor none"


async def test_to_look_at_the_newest_entries_counts_and_moves_nothing() -> None:
    cache = AsyncMemoryCache(max_entries=3)
    await cache.set_many([value_of(key, key.name) for key in (A, B, C)])
    await payload_of(cache, A)
    before = await cache.stats()
    assert [value.key for value in await cache.newest()] == [A, C, B]
    assert [value.value for value in await cache.newest(2)] == [A.name, C.name]
    assert await cache.stats() == before
    await cache.set(value_of(ResourceKey("t", "d")))
    assert await payload_of(cache, B) is None, "it is still the one used longest ago"


async def test_who_looks_at_the_newest_entries_gets_copies() -> None:
    cache = AsyncMemoryCache()
    await cache.set(value_of(payload={"levels": [1]}))
    (seen,) = await cache.newest()
    seen.value["levels"].append(2)
    assert await payload_of(cache) == {"levels": [1]}


@pytest.mark.parametrize("limit", [0, True, 1.5])
async def test_how_many_of_the_newest_entries_must_be_a_count(limit: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="limit must be"):
        await AsyncMemoryCache().newest(limit)


async def test_any_number_of_the_newest_entries_may_be_asked_for() -> None:
    cache = AsyncMemoryCache()
    await cache.set(value_of())
    assert len(await cache.newest(10**30)) == 1
