"""What every cache behind `AsyncCache` must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coalestra.core.protocols import (
    AsyncCache,
    AtomicAsyncCache,
    BatchAsyncCache,
    BatchAtomicAsyncCache,
)
from coalestra.core.values import CacheWriteStatus
from tests.contracts.caches import ALL, ATOMIC, BATCH, BATCH_ATOMIC
from tests.contracts.samples import NOW, POLICY, A, B, C, value_of


@pytest.fixture(params=ALL, ids=lambda make: make.__name__)
def cache(request: pytest.FixtureRequest) -> Any:
    return request.param()


def those(makers: tuple[Callable[[], AsyncCache], ...]) -> pytest.MarkDecorator:
    """Run a test with the caches of one capability only."""
    return pytest.mark.parametrize("make", makers, ids=lambda make: make.__name__)


async def test_a_key_never_written_gives_an_empty_lookup(cache: AsyncCache) -> None:
    lookup = await cache.get(A, now=NOW, policy=POLICY)
    assert (lookup.value, lookup.fresh, lookup.usable_stale) == (None, False, False)


async def test_what_was_set_comes_back_with_version_rank_and_provenance(cache: AsyncCache) -> None:
    value = value_of(A, {"bid": 1}, rank=3, metadata={"feed": "x"})
    await cache.set(value)
    held = (await cache.get(A, now=NOW, policy=POLICY)).value
    assert held is not None
    assert (held.value, held.source, held.metadata) == ({"bid": 1}, "test", {"feed": "x"})
    assert (held.version, held.authority_rank) == (value.version, 3)
    assert (held.observed_at, held.fetched_at, held.attempts) == (NOW, NOW, 1)


@pytest.mark.parametrize(
    "age, fresh", [(0.0, True), (5.0, True), (5.1, False), (30.0, False), (-1.0, True)]
)
async def test_freshness_is_judged_by_the_age_at_reading(
    cache: AsyncCache, age: float, fresh: bool
) -> None:
    await cache.set(value_of(observed_at=NOW - age))
    lookup = await cache.get(A, now=NOW, policy=POLICY)
    assert (lookup.fresh, lookup.usable_stale) == (fresh, True)
    assert lookup.age_seconds == pytest.approx(max(0.0, age))


async def test_beyond_max_stale_nothing_is_usable(cache: AsyncCache) -> None:
    await cache.set(value_of(observed_at=NOW - 30.1))
    lookup = await cache.get(A, now=NOW, policy=POLICY)
    assert not lookup.fresh
    assert not lookup.usable_stale


async def test_set_replaces_whatever_is_there(cache: AsyncCache) -> None:
    await cache.set(value_of(payload=2.0, rank=9))
    await cache.set(value_of(payload=1.0, observed_at=NOW - 1))
    assert _payload(await cache.get(A, now=NOW, policy=POLICY)) == 1.0


async def test_an_invalidated_key_is_gone_and_others_stay(cache: AsyncCache) -> None:
    await cache.set(value_of(A))
    await cache.set(value_of(B, 2.0))
    await cache.invalidate(A)
    await cache.invalidate(C)
    assert (await cache.get(A, now=NOW, policy=POLICY)).value is None
    assert _payload(await cache.get(B, now=NOW, policy=POLICY)) == 2.0


async def test_after_clear_nothing_is_left(cache: AsyncCache) -> None:
    await cache.set(value_of(A))
    await cache.clear()
    assert (await cache.get(A, now=NOW, policy=POLICY)).value is None


@those(BATCH)
async def test_batches_do_what_the_single_calls_do(make: Callable[[], BatchAsyncCache]) -> None:
    cache = make()
    assert isinstance(cache, BatchAsyncCache)
    await cache.set_many([value_of(A, 1.0), value_of(B, 2.0)])
    await cache.invalidate_many([A])
    found = await cache.get_many([C, B, A], now=NOW, policies=dict.fromkeys((A, B, C), POLICY))
    assert {key: _payload(lookup) for key, lookup in found.items()} == {A: None, B: 2.0, C: None}


@those(ATOMIC)
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
async def test_an_atomic_write_follows_the_write_order(
    make: Callable[[], AtomicAsyncCache],
    rank: int,
    observed: float,
    force: bool,
    replace_equal: bool,
    status: str,
) -> None:
    cache = make()
    assert isinstance(cache, AtomicAsyncCache)
    await cache.set(value_of(payload="old", rank=5))
    result = await cache.set_if_newer(
        value_of(payload="new", rank=rank, observed_at=observed),
        force=force,
        replace_equal=replace_equal,
    )
    assert result.status is CacheWriteStatus(status)
    assert result.value.value == ("new" if result.stored else "old")
    assert result.previous is not None
    assert result.previous.value == "old"


@those(BATCH_ATOMIC)
async def test_an_atomic_batch_writes_the_best_per_key_and_later_wins_a_tie(
    make: Callable[[], BatchAtomicAsyncCache],
) -> None:
    cache = make()
    assert isinstance(cache, BatchAtomicAsyncCache)
    results = await cache.set_many_if_newer(
        [
            value_of(A, "late", observed_at=NOW + 1),
            value_of(A, "early"),
            value_of(B, "first"),
            value_of(B, "second"),
            value_of(C, "high", rank=1, observed_at=NOW - 9),
            value_of(C, "low"),
        ]
    )
    assert [results[key].value.value for key in (A, B, C)] == ["late", "second", "high"]


def _payload(lookup: Any) -> Any:
    return None if lookup.value is None else lookup.value.value
