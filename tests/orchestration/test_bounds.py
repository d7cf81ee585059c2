"""Nothing grows with the keys ever seen; contexts are as said; ties do not reorder (14, 17, 18)."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    RefreshMode,
    ResourceAcceptanceRule,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotRequest,
    SourceResiliencePolicy,
)
from tests.contracts.caches import SingleKeyCache
from tests.contracts.samples import value_of
from tests.orchestration.scripted import Batch, Derived, Scripted, Single, builder, key
from tests.support import EPOCH, Gate, ManualClock, loop_turn, settle

REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("REQUEST", default="nobody")


def living_keys() -> int:
    """How many keys of the churning kind are alive."""
    gc.collect()
    return sum(type(each) is ResourceKey and each.namespace == "churn" for each in gc.get_objects())


class Churning:
    """Builders that have seen very many keys, one after the other."""

    def __init__(self, **settings: Any) -> None:
        self.chance = random.Random(1)
        self.down = False

        async def fetch(k: ResourceKey, context: FetchContext) -> str:
            if self.down:
                raise ConnectionError("down")
            return ""

        resilience = SourceResiliencePolicy(
            RetryPolicy(max_attempts=2, base_delay_seconds=0),
            CircuitBreakerPolicy(CircuitScope.RESOURCE, failure_threshold=1),
        )
        self.metrics = InMemoryMetrics()
        self.sources: list[Scripted] = [
            Single("single", fetch=fetch),
            Batch("batch"),
            Derived("derived", needs=lambda k: [ResourceKey("churn", "single", k.subject)]),
        ]
        for source in self.sources:
            source.resilience_policy = None
        self.builder = builder(
            *self.sources, cache=AsyncMemoryCache(max_entries=10),
            source_support_cache_max_entries=10, default_resilience=resilience,
            metrics=self.metrics, **settings,
        )  # fmt: skip

    async def churn(self, first: int, count: int) -> None:
        """Fetch, derive, publish, invalidate, join and leave so many distinct keys."""
        building = self.builder
        for i in range(first, first + count):
            a, b, c = (ResourceKey("churn", n, str(i)) for n in ("single", "batch", "derived"))
            left = asyncio.ensure_future(building.build([a, b, c]))
            await asyncio.gather(building.build([c, a]), building.build([b]))
            left.cancel()
            await building.publisher.publish(b, i, source="stream")
            await building.publisher.invalidate(a)
            async with building.session() as session:
                await session.resolve([c])
                await session.revalidate([c], force_refresh=True)
        await settle()
        for source in self.sources:
            source.calls.clear()


async def test_no_state_grows_with_the_number_of_keys_ever_seen() -> None:
    churning = Churning()
    await churning.churn(0, 20)
    await settle()
    before = living_keys()
    series = len(churning.metrics.snapshot().counters)
    await churning.churn(20, 60)
    await settle()
    assert living_keys() <= before + 5
    assert len(churning.metrics.snapshot().counters) <= series + 2


async def test_many_flights_leave_no_room_for_as_many_behind() -> None:
    building = builder(Batch("b"))
    await building.build([key("b", str(number)) for number in range(10_000)])
    assert sys.getsizeof(building._engine.flights.board.flights) < 1_000


async def test_circuits_that_remember_failures_are_bounded_too() -> None:
    churning = Churning()
    churning.down = True
    breaker = churning.builder.circuit_breaker
    breaker.max_circuits = 7
    keys = [ResourceKey("churn", "single", str(i)) for i in range(50)]
    await churning.builder.build(keys, strict=False)
    assert len(breaker) == 7


async def test_a_builder_forgets_what_left_its_cache_and_memory() -> None:
    churning = Churning(default_policy=FreshnessPolicy(1, 1))
    await churning.churn(0, 50)
    await settle()
    churning.builder.clear_source_support_cache()
    await churning.builder.circuit_breaker.reset()
    await churning.builder.cache.clear()
    await settle()
    assert living_keys() <= 3


# Context variables --------------------------------------------------------------------------------


def seeing(seen: list[str]) -> Any:
    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        seen.append(REQUEST.get())
        await asyncio.sleep(1)
        return ""

    return fetch


async def build_as(who: str, building: SnapshotBuilder, *keys: ResourceKey) -> None:
    """Build in a context of its own."""

    async def run() -> None:
        REQUEST.set(who)
        await building.build(keys)

    await asyncio.create_task(run())


async def test_a_background_refresh_sees_the_context_of_the_builders_making() -> None:
    seen: list[str] = []
    REQUEST.set("maker")
    policy = FreshnessPolicy(2, 100, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(Single("x", fetch=seeing(seen)), default_policy=policy)
    await build_as("visitor", building, key("x"))
    await asyncio.sleep(5)
    await build_as("other visitor", building, key("x"))
    await building.wait_for_refreshes()
    assert seen == ["visitor", "maker"]


# Clocks that are read seldom, or set back ---------------------------------------------------------


async def test_a_reading_that_ends_between_two_looks_at_the_clock_undoes_no_event() -> None:
    """Another process has published it, after the reading had begun."""

    class Running(ManualClock):
        def monotonic(self) -> float:
            read = super().monotonic()
            self.advance(1)
            return read

    clock, cache = Running(), SingleKeyCache()

    async def fetch(key: ResourceKey, context: FetchContext) -> str:
        cache.held[key] = value_of(key, "event", observed_at=clock.now() - 0.5)
        clock.advance(10)
        return "fetched"

    building = builder(Single("x", fetch=fetch), clock=clock, cache=cache)
    await building.build([key("x")])
    await settle()
    assert cache.held[key("x")].value == "event"


async def test_a_wall_clock_that_is_set_back_makes_no_value_young_again() -> None:
    clock = ManualClock()
    source = Single("x")
    building = builder(source, clock=clock, default_policy=FreshnessPolicy(10, 100))
    await building.build([key("x")])
    clock.set_wall(EPOCH - 3_600)
    value = (await building.build([key("x")]))[key("x")]
    assert value.age_seconds == 0
    assert len(source.calls) == 2, "what is held from the future counts as nothing"
    clock.set_wall(EPOCH + 11)
    await building.build([key("x")])
    assert len(source.calls) == 3


# The event loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", [Batch, Single])
async def test_many_keys_never_hold_the_loop_for_long(
    kind: type[Batch | Single], warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reading of the slice clock is 0.1 ms later: a build of 10,000 keys must pause."""
    keys = [key("x", str(i)) for i in range(10_000)]
    building = builder(kind("x"), cache=AsyncMemoryCache(max_entries=None))
    if warm:
        await building.build(keys)
    ticks = itertools.count(1, 1)
    began = time.perf_counter()
    monkeypatch.setattr(
        "coalestra.concurrency.pace.time.perf_counter", lambda: began + next(ticks) * 0.0001
    )
    loop = asyncio.get_running_loop()
    steps = 0
    running = asyncio.ensure_future(building.build(keys))
    while not running.done():
        steps += 1
        await asyncio.sleep(0)
    assert steps > 10
    assert loop.time() >= 0
    assert (await running).complete


class Turns:
    """Counts what is done in each turn of the event loop, while every slice is used up at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ticks = itertools.count(time.perf_counter())
        monkeypatch.setattr("coalestra.concurrency.pace.time.perf_counter", lambda: next(ticks))
        self.counts: Counter[int] = Counter()

    def count(self) -> None:
        self.counts[loop_turn()] += 1

    async def most(self, work: Awaitable[Any]) -> int:
        """Return the most that was counted in one turn of the work."""
        await work
        return max(self.counts.values())


@pytest.mark.parametrize("what, in_one_build, most", [
    ("calls that never wait", True, 2 * 8), ("values that are taken in", True, 2),
    ("builds that begin at once", False, 8),
])  # fmt: skip
async def test_what_there_is_much_of_gives_others_a_turn(
    what: str, in_one_build: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(monkeypatch)

    def counting(passed: Any, kind: str) -> Any:
        if what == kind:
            turns.count()
        return passed

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        return counting("", "calls that never wait")

    class Asked(Single):
        def supports(self, key: ResourceKey) -> bool:
            return bool(counting(super().supports(key), "builds that begin at once"))

    building = builder(
        Asked("x", fetch=fetch), Batch("y"), max_pending_tasks=2,
        payload_copier=lambda value: counting(value, "values that are taken in"),
    )  # fmt: skip
    name = "y" if what == "values that are taken in" else "x"
    keys = [key(name, str(number)) for number in range(500 if in_one_build else 100)]
    builds = [keys] if in_one_build else [[each] for each in keys]
    assert await turns.most(asyncio.gather(*map(building.build, builds))) <= most


@pytest.mark.parametrize("in_session", [False, True])
async def test_many_warm_requests_let_others_have_a_turn(
    in_session: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = Turns(monkeypatch)

    class Counting(SnapshotAcceptancePolicy):
        def rule_for(self, key: ResourceKey) -> ResourceAcceptanceRule:
            turns.count()
            return super().rule_for(key)

    policy = Counting(ResourceAcceptanceRule(max_age_seconds=100))
    requests = [
        SnapshotRequest(required=[key("x", str(number))], acceptance_policy=policy)
        for number in range(100)
    ]
    building = builder(Single("x"))
    place = building.session() if in_session else building
    await place.try_requests(requests)
    turns.counts.clear()
    assert await turns.most(place.try_requests(requests, max_concurrency=2)) <= 2


@pytest.mark.parametrize("form", ["build", "derived", "revalidate"])
async def test_errors_are_made_over_many_turns(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, down = Turns(monkeypatch), False

    class Counting(ResourceResolutionError):
        def __init__(self, *arguments: Any) -> None:
            turns.count()
            super().__init__(*arguments)

    async def before() -> None:
        if down:
            raise ConnectionError("down")

    keys = [key("x", str(i)) for i in range(500)]
    source = Batch("x", before=before)
    building = builder(source, Derived("d", needs=lambda k: keys))
    session = building.session()
    if form == "revalidate":
        await session.resolve(keys)
    down = True
    monkeypatch.setattr("coalestra.core.errors.ResourceResolutionError", Counting)
    works: dict[str, Callable[[], Awaitable[Any]]] = {
        "build": lambda: building.build(keys, strict=False),
        "derived": lambda: building.build([key("d")], strict=False),
        "revalidate": lambda: session.revalidate(keys, strict=False, force_refresh=True),
    }
    assert await turns.most(works[form]()) <= 128
    assert sum(turns.counts.values()) >= 500


async def test_deadlines_that_strike_at_once_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    building = builder(Batch("x", before=Gate().pass_))
    ended = Counter[int]()

    async def build(number: int) -> None:
        await building.build([key("x", str(number))], strict=False, deadline_seconds=1)
        ended[loop_turn()] += 1

    waiting = asyncio.gather(*(build(number) for number in range(100)))
    await settle()
    Turns(monkeypatch)
    await waiting
    assert max(ended.values()) <= 8
    await building.aclose()


async def test_very_many_workers_are_started_over_several_turns() -> None:
    begun = Counter[int]()

    async def fetch(k: ResourceKey, context: FetchContext) -> str:
        begun[loop_turn()] += 1
        await asyncio.sleep(1)
        return ""

    building = builder(Single("x", fetch=fetch), max_concurrency=500, max_pending_tasks=500)
    snapshot = await building.build([key("x", str(number)) for number in range(500)])
    assert snapshot.complete
    assert max(begun.values()) <= 64
    assert begun.total() == 500
