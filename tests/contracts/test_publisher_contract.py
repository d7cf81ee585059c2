"""What publishing must do over any cache."""

from __future__ import annotations

from typing import Any

import pytest

from coalestra.core.errors import SourceProtocolError
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    AuthorityPolicyResolver,
    ObservationPolicy,
    SourceAuthorityPolicy,
)
from coalestra.core.protocols import AsyncCache
from coalestra.core.values import PublishStatus, ResourceUpdate, SnapshotValue
from coalestra.observability import InMemoryMetrics
from tests.contracts.caches import ALL, BatchAtomicCache, SingleKeyCache
from tests.contracts.samples import NOW, POLICY, A, B, C, publisher_to, value_of
from tests.support import ManualClock, ThreadGate, begun


class Events:
    """Writes events down."""

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def emit(self, event_type: str, **payload: Any) -> None:
        self.seen.append((event_type, payload))


@pytest.fixture(params=ALL, ids=lambda make: make.__name__)
def cache(request: pytest.FixtureRequest) -> Any:
    return request.param()


async def payload_in(cache: AsyncCache, key: Any = A) -> Any:
    value = (await cache.get(key, now=NOW, policy=POLICY)).value
    return None if value is None else value.value


async def test_a_published_value_tells_its_provenance(cache: AsyncCache) -> None:
    result = await publisher_to(cache).publish(A, 1.5, source="stream", metadata={"seq": 7})
    assert result.published
    assert result.status is PublishStatus.PUBLISHED
    assert result.previous is None
    value = result.value
    assert (value.key, value.value, value.source) == (A, 1.5, "stream")
    assert (value.observed_at, value.fetched_at, value.age_seconds) == (NOW, NOW, 0.0)
    assert (value.attempts, value.from_cache, value.stale) == (0, False, False)
    assert value.metadata == {"seq": 7, "published": True}
    assert await payload_in(cache) == 1.5


async def test_an_event_without_metadata_is_known_as_published(cache: AsyncCache) -> None:
    publisher = publisher_to(cache)
    for observed_at in (None, NOW - 1):
        result = await publisher.publish(A, 1, source="s", observed_at=observed_at)
        assert result.value.metadata == {"published": True}
        with pytest.raises(TypeError, match="read-only"):
            result.value.metadata["published"] = False  # type: ignore[index]
    held = (await cache.get(A, now=NOW, policy=POLICY)).value
    assert held is not None
    assert held.metadata == {"published": True}


async def test_age_and_staleness_are_judged_by_the_policy_of_the_key(cache: AsyncCache) -> None:
    result = await publisher_to(cache).publish(A, 1, source="s", observed_at=NOW - 6.0)
    assert result.value.age_seconds == 6.0
    assert result.value.stale


@pytest.mark.parametrize("seconds, stale", [(-0.5, False), (2.0, False), (6.0, True)])
async def test_what_was_there_before_is_as_old_as_readers_would_have_seen_it(
    cache: AsyncCache, seconds: float, stale: bool
) -> None:
    publisher = publisher_to(cache)
    await publisher.publish(A, 1, source="s", observed_at=NOW - seconds)
    result = await publisher.publish(A, 2, source="s", force=True)
    assert not result.value.from_cache
    before = result.previous
    assert before is not None
    assert (before.age_seconds, before.stale) == (max(0.0, seconds), stale)
    assert before.from_cache


async def test_what_stayed_is_copied_for_both_places_in_the_result(cache: AsyncCache) -> None:
    publisher = publisher_to(cache)
    await publisher.publish(A, ["new"], source="s", metadata={"tags": ["x"]})
    result = await publisher.publish(A, ["old"], source="s", observed_at=NOW - 1)
    before = result.previous
    assert before is not None
    assert (result.value.from_cache, before.from_cache) == (True, True)
    before.value.append("mine")
    before.metadata["tags"].append("mine")
    held = (await cache.get(A, now=NOW, policy=POLICY)).value
    assert held is not None
    for other in (result.value, held):
        assert (other.value, other.metadata["tags"]) == (["new"], ["x"])


@pytest.mark.parametrize("at", [NOW, NOW - 1])
async def test_a_dated_duplicate_is_ignored_unless_told(cache: AsyncCache, at: float) -> None:
    publish = publisher_to(cache).publish
    await publish(A, 1, source="s", observed_at=at)
    result = await publish(A, 2, source="s", observed_at=at)
    assert result.status is PublishStatus.IGNORED_DUPLICATE
    result = await publish(A, 3, source="s", observed_at=at, replace_equal=True)
    assert result.published
    assert result.previous is not None
    assert result.previous.value == 1


async def test_undated_events_at_one_time_count_in_order_of_arrival(cache: AsyncCache) -> None:
    publisher = publisher_to(cache)
    for number in range(3):
        assert (await publisher.publish(A, number, source="s")).published
    assert await payload_in(cache) == 2
    results = await publisher.publish_many([ResourceUpdate(A, number, "s") for number in (7, 8)])
    assert results[A].published
    assert await payload_in(cache) == 8


async def test_of_undated_events_at_one_time_the_one_that_began_last_counts(
    cache: AsyncCache,
) -> None:
    """Though another one that began before it was copied only after it had been written."""
    gate = ThreadGate()

    def copier(value: Any) -> Any:
        if value == "first":
            gate.pass_()
        return value

    publisher = publisher_to(cache, payload_copier=copier, run_payload_copies_in_thread=True)
    first = await begun(publisher.publish(A, "first", source="s"))
    assert (await publisher.publish(A, "second", source="s")).published
    gate.open()
    assert not (await first).published
    assert await payload_in(cache) == "second"


async def test_an_undated_event_counts_although_the_clock_was_set_back(cache: AsyncCache) -> None:
    clock = ManualClock(NOW)
    publisher = publisher_to(cache, clock=clock)
    await publisher.publish(A, "before", source="s")
    clock.set_wall(NOW - 3600.0)
    assert (await publisher.publish(A, "after", source="s")).published
    held = (await cache.get(A, now=clock.now(), policy=POLICY)).value
    assert held is not None
    assert held.value == "after"


async def test_what_is_held_from_the_future_does_not_win_by_its_date(cache: AsyncCache) -> None:
    """Not even against a dated event; what lies within the tolerance does."""
    clock = ManualClock(NOW)
    publisher = publisher_to(cache, clock=clock)
    await publisher.publish(A, "before", source="s", observed_at=NOW - 5.0)
    clock.set_wall(NOW - 5.5)
    kept = await publisher.publish(A, "older", source="s", observed_at=NOW - 6.0)
    assert kept.status is PublishStatus.IGNORED_OLDER
    clock.set_wall(NOW - 3600.0)
    after = await publisher.publish(A, "after", source="s", observed_at=NOW - 3601.0)
    assert after.published


async def test_ranks_come_from_the_resolver_and_decide(cache: AsyncCache) -> None:
    if not getattr(cache, "validates_source_authority", False):
        vars(cache)["validates_source_authority"] = True
    ranks = AuthorityPolicyResolver(SourceAuthorityPolicy({"local": 3, "rest": 1}))
    publisher = publisher_to(cache, authority_resolver=ranks)
    assert (await publisher.publish(A, 1, source="local")).value.authority_rank == 3
    result = await publisher.publish(A, 2, source="rest", observed_at=NOW + 0.5)
    assert result.status is PublishStatus.IGNORED_LOWER_AUTHORITY


@pytest.mark.parametrize("backwards", [False, True])
async def test_of_many_updates_the_best_per_key_counts(cache: AsyncCache, backwards: bool) -> None:
    updates = [
        ResourceUpdate(A, "late", "s", NOW),
        ResourceUpdate(A, "early", "s", NOW - 1),
        ResourceUpdate(B, "only", "s", NOW),
    ]
    results = await publisher_to(cache).publish_many(updates[::-1] if backwards else updates)
    assert {key: result.value.value for key, result in results.items()} == {A: "late", B: "only"}
    assert await payload_in(cache) == "late"


async def test_an_observation_too_far_ahead_is_refused_unwritten(cache: AsyncCache) -> None:
    updates = [ResourceUpdate(B, 1, "s", NOW), ResourceUpdate(A, 1, "s", NOW + 1.5)]
    with pytest.raises(SourceProtocolError, match="future"):
        await publisher_to(cache).publish_many(updates)
    assert await payload_in(cache, B) is None


async def test_a_small_clock_skew_is_accepted_and_recorded(cache: AsyncCache) -> None:
    value = (await publisher_to(cache).publish(A, 1, source="s", observed_at=NOW + 0.5)).value
    assert value.metadata["clock_skew_seconds"] == pytest.approx(0.5)
    assert value.age_seconds == 0.0


async def test_the_observation_policy_may_allow_the_future(cache: AsyncCache) -> None:
    lenient = ObservationPolicy(reject_future_observations=False)
    publisher = publisher_to(cache, observation_policy=lenient)
    assert (await publisher.publish(A, 1, source="s", observed_at=NOW + 60)).published


async def test_invalidated_keys_are_removed_and_reported(cache: AsyncCache) -> None:
    events, metrics = Events(), InMemoryMetrics()
    publisher = publisher_to(cache, events=events, metrics=metrics)
    await publisher.publish_many([ResourceUpdate(key, 1, "s") for key in (A, B, C)])
    events.seen.clear()
    await publisher.invalidate(A, reason="gap")
    await publisher.invalidate_many([B, B])
    await publisher.invalidate_many([])
    assert [await payload_in(cache, key) for key in (A, B, C)] == [None, None, 1]
    assert events.seen == [
        ("resource_invalidated", {"resource": str(A), "reason": "gap"}),
        ("resource_invalidated", {"resource": str(B), "reason": ""}),
    ]
    labels = {"resource_namespace": "market", "resource_name": "price"}
    assert metrics.counter("resource_invalidation_total", **labels) == 2


class Failing(SingleKeyCache):
    """Takes and gives up A only."""

    async def set(self, value: SnapshotValue[Any]) -> None:
        await super().set(value)
        if value.key != A:
            del self.held[value.key]
            raise OSError(f"no room for {value.key.subject}")

    async def invalidate(self, key: ResourceKey) -> None:
        if key != A:
            raise OSError(f"no way to {key.subject}")
        await super().invalidate(key)


async def test_of_several_keys_that_a_cache_fails_for_none_is_lost_nor_what_it_did_write() -> None:
    events, metrics = Events(), InMemoryMetrics()
    publisher = publisher_to(Failing(), events=events, metrics=metrics)
    with pytest.raises(OSError, match="no room for B"):
        await publisher.publish_many([ResourceUpdate(key, 1, "s") for key in (B, A, C)])
    with pytest.raises(OSError, match="no way to B"):
        await publisher.invalidate_many([B, A, C])
    told = [(name, payload.get("resource") or payload["error"]) for name, payload in events.seen]
    assert told == [
        ("resource_published", str(A)),
        ("cache_failed", "no room for C"),
        ("resource_invalidated", str(A)),
        ("cache_failed", "no way to C"),
    ]
    assert metrics.counter("cache_failure_total", operation="write") == 2


async def test_outcomes_are_reported(cache: AsyncCache) -> None:
    events, metrics = Events(), InMemoryMetrics()
    publisher = publisher_to(cache, events=events, metrics=metrics)
    await publisher.publish(A, 1, source="s")
    await publisher.publish(A, 2, source="s", force=True)
    await publisher.publish(A, 3, source="s", observed_at=NOW - 1)
    assert [name for name, _ in events.seen] == [
        "resource_published",
        "resource_published",
        "resource_publish_ignored",
    ]
    assert events.seen[1][1] == {
        "resource": str(A), "source": "s", "observed_at": NOW, "replaced": True, "forced": True,
        "authority_rank": 0,
    }  # fmt: skip
    assert events.seen[2][1] == {
        "resource": str(A), "source": "s", "status": "ignored_older", "observed_at": NOW - 1,
        "cached_observed_at": NOW, "candidate_authority_rank": 0, "cached_authority_rank": 0,
    }  # fmt: skip
    labels = {"resource_namespace": "market", "resource_name": "price", "source": "s"}
    assert metrics.counter("resource_publish_total", status="published", **labels) == 2
    assert metrics.counter("resource_publish_total", status="ignored_older", **labels) == 1


async def test_what_was_outdated_is_nobodys_previous_value(cache: AsyncCache) -> None:
    base = value_of(A, 1)
    for value in (base, value_of(B, 2, observed_at=NOW - 1, rests_on=[base]), value_of(A, 3)):
        await cache.set(value)
    publisher = publisher_to(cache)
    assert (await publisher.publish(B, 4, source="s")).previous is None
    before = (await publisher.publish(B, 5, source="s", force=True)).previous
    assert before is not None
    assert before.value == 4


@pytest.mark.parametrize("order", [(A, B), (B, A)])
async def test_what_rests_on_something_published_along_was_there_before_and_keeps_nothing_out(
    cache: AsyncCache, order: tuple[ResourceKey, ...]
) -> None:
    """They are one publication, in whatever order its updates are given."""
    base = value_of(A, 1, observed_at=NOW - 1)
    for value in (base, value_of(B, 2, observed_at=NOW - 1, rank=1, rests_on=[base])):
        await cache.set(value)
    results = await publisher_to(cache).publish_many([ResourceUpdate(k, 3, "s") for k in order])
    told = {
        key: (each.status, each.previous and each.previous.value) for key, each in results.items()
    }
    assert told == {A: (PublishStatus.PUBLISHED, 1), B: (PublishStatus.PUBLISHED, 2)}


async def test_what_was_stored_by_a_call_with_a_senseless_answer_is_published() -> None:
    class Odd(BatchAtomicCache):
        async def set_many_if_newer(self, values: Any, **terms: Any) -> Any:
            return {**await super().set_many_if_newer(values, **terms), B: "nonsense"}

    cache = Odd()
    updates = [ResourceUpdate(key, 1, "s", NOW - 1) for key in (A, B)]
    results = await publisher_to(cache).publish_many(updates)
    assert [results[key].status for key in (A, B)] == [PublishStatus.PUBLISHED] * 2
    later = await publisher_to(cache).publish(A, 2, source="s", observed_at=NOW - 1)
    assert later.status is PublishStatus.IGNORED_DUPLICATE
