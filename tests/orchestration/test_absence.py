"""A source may answer that there is none: an outcome of its own, and no failure."""

from __future__ import annotations

import asyncio
import contextlib
import math
import pickle
from collections.abc import Mapping
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    CacheLookup,
    CallableBatchSource,
    CallableSource,
    CircuitBreakerPolicy,
    DependencyResolutionError,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    RefreshMode,
    ResourceAbsent,
    ResourceAbsentError,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SnapshotBuildError,
    SourceAuthorityPolicy,
    SourcePayload,
    SourceResiliencePolicy,
)
from coalestra.concurrency import pace
from tests.observability.recording import Recorder
from tests.orchestration.scripted import Batch, Derived, Single, builder, key, tuned
from tests.orchestration.stock import Stock
from tests.support import Gate, LoopClock, begun

X, Y = key("x"), key("y")
NONE = ResourceAbsent("no such row")
FOR_A_MINUTE = ResourceAbsent("no such row", ttl_seconds=60)
DOWN = ConnectionError("down")
SHORT = FreshnessPolicy(5.0, 500.0)
FRAGILE = SourceResiliencePolicy(
    RetryPolicy(5, 1.0, retry_on=Exception),
    CircuitBreakerPolicy(failure_threshold=1, recovery_timeout_seconds=1000),
)


async def attempt(building: SnapshotBuilder, *keys: ResourceKey, **how: Any) -> Snapshot:
    return await building.build(keys or [X], strict=False, **how)


def absence(snapshot: Snapshot, of: ResourceKey = X) -> ResourceAbsentError:
    error = snapshot.errors[of]
    assert type(error) is ResourceAbsentError, error
    return error


def failure(snapshot: Snapshot, of: ResourceKey = X) -> ResourceResolutionError:
    error = snapshot.errors[of]
    assert type(error) is ResourceResolutionError, error
    return error


def sources_of(error: ResourceResolutionError) -> list[tuple[str, str]]:
    return [(each.source, each.error_type) for each in error.failures]


# What it is ---------------------------------------------------------------------------------------


def test_what_a_source_says_of_an_absence_is_checked_at_once() -> None:
    said = ResourceAbsent("gone", final=True, ttl_seconds=math.inf)
    assert (str(said), said.final, said.ttl_seconds) == ("gone", True, math.inf)
    assert (str(ResourceAbsent()), ResourceAbsent().final) == ("there is none", False)
    assert ResourceAbsent().ttl_seconds is None
    twin = pickle.loads(pickle.dumps(said))
    assert (str(twin), twin.final, twin.ttl_seconds) == ("gone", True, math.inf)
    with pytest.raises(TypeError, match="final"):
        ResourceAbsent(final=1)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError, match="ttl_seconds"):
        ResourceAbsent(ttl_seconds=True)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="ttl_seconds"):
            ResourceAbsent(ttl_seconds=wrong)


async def raises(k: ResourceKey, context: FetchContext) -> Any:
    raise NONE


async def raises_the_class(k: ResourceKey, context: FetchContext) -> Any:
    raise ResourceAbsent


async def returns(k: ResourceKey, context: FetchContext) -> Any:
    return NONE


async def returns_a_payload(k: ResourceKey, context: FetchContext) -> Any:
    return SourcePayload(NONE)


async def raises_for_all(keys: Any, context: FetchContext) -> Any:
    raise NONE


async def maps(keys: Any, context: FetchContext) -> Mapping[ResourceKey, Any]:
    return dict.fromkeys(keys, NONE)


async def maps_to_the_class(keys: Any, context: FetchContext) -> Mapping[ResourceKey, Any]:
    return dict.fromkeys(keys, ResourceAbsent)


def in_a_thread(k: Any, context: FetchContext) -> Any:
    raise NONE


COMMON: dict[str, Any] = {
    "name": "table", "priority": 1, "supports": lambda k: True, "resilience_policy": FRAGILE,
}  # fmt: skip


@pytest.mark.parametrize(
    "source",
    [
        *[
            CallableSource(fetcher=fetcher, **COMMON)
            for fetcher in (raises, raises_the_class, returns, returns_a_payload, in_a_thread)
        ],
        *[
            CallableBatchSource(fetcher=fetcher, **COMMON)
            for fetcher in (raises_for_all, maps, maps_to_the_class, in_a_thread)
        ],
        tuned(Single("table", "x", "y", fetch=raises), resilience_policy=FRAGILE),
        tuned(Single("table", "x", "y", fetch=returns), resilience_policy=FRAGILE),
        tuned(Batch("table", "x", "y", answer=lambda _: NONE), resilience_policy=FRAGILE),
    ],
    ids=lambda source: f"{type(source).__name__} {getattr(source, 'fetcher', 0)!s:.20}",
)
async def test_every_source_can_say_that_there_is_none(source: Any) -> None:
    """As an exception or as a value; once, whatever the policy retries, and no circuit opens."""
    building = builder(source)
    for _ in range(3):
        snapshot = await attempt(building, X, Y)
        for each in (X, Y):
            (said,) = absence(snapshot, each).failures
            assert (said.source, said.error_type, said.attempts) == ("table", "ResourceAbsent", 1)
        assert snapshot.diagnostics.retries == 0
        assert snapshot.diagnostics.absent_answers == 2
    assert not await building.circuit_breaker.snapshot()
    health = await building.health_snapshot()
    told = health.sources["table"]
    assert (told.last_error, told.seconds_since_error) == (None, None)
    assert told.seconds_since_success == 0


async def test_applications_that_know_nothing_of_it_see_a_failed_resource() -> None:
    building = builder(Stock("x", {"x": NONE}), Single("y"))
    with pytest.raises(SnapshotBuildError) as raised:
        await building.build([X, Y])
    assert isinstance(raised.value.errors[X], ResourceResolutionError)
    assert isinstance(raised.value.__cause__, ResourceAbsentError)
    assert raised.value.snapshot is not None
    assert set(raised.value.snapshot) == {Y}


async def test_a_subclass_of_it_is_one_though_it_leaves_out_what_its_base_is_made_with() -> None:
    class NoSuchUser(ResourceAbsent):
        """An application's own word."""

        def __init__(self, user: str) -> None:
            self.user = user

    error = NoSuchUser("ann")
    assert (error.final, error.ttl_seconds, str(error)) == (False, None, "ann")
    assert pickle.loads(pickle.dumps(ResourceAbsent("x", final=True))).final
    snapshot = await attempt(builder(Stock("x", {"x": error})))
    assert sources_of(absence(snapshot)) == [("x", "NoSuchUser")]
    assert snapshot.to_dict()["errors"]["test:x"]["reason"] == "absent"


@pytest.mark.parametrize("odd", ["30", math.nan, -1.0, LookupError("not known")], ids=repr)
@pytest.mark.parametrize("fact", ["final", "ttl_seconds"])
@pytest.mark.expects_leaks  # the loop is told
async def test_what_a_subclass_says_and_cannot_be_meant_is_left_alone(fact: str, odd: Any) -> None:
    def told(_self: ResourceAbsent) -> Any:
        if isinstance(odd, Exception):
            raise odd
        return odd

    def silent(self: ResourceAbsent) -> None:
        """Set nothing."""

    kind: Any = type("NoSuchUser", (ResourceAbsent,), {fact: property(told), "__init__": silent})
    building, (first, second) = chain(kind(), NONE)
    absence(await attempt(building))
    absence(await attempt(building))
    assert (len(first.calls), len(second.calls)) == (2, 2)
    building, (_, second) = chain(kind(), "found")
    assert (await building.build([X])).value(X) == "found"


# The chain ----------------------------------------------------------------------------------------


def chain(*answers: Any, **settings: Any) -> tuple[SnapshotBuilder, list[Stock]]:
    """A builder of sources of `x` by descending priority, and these sources."""
    sources = [
        Stock(name, {"x": answer}, priority=-number)
        for number, (name, answer) in enumerate(zip("abc", answers, strict=False))
    ]
    for source in sources:
        source.names = ("x",)
    return builder(*sources, **settings), sources


async def test_one_that_is_final_ends_the_chain() -> None:
    building, (_, second) = chain(ResourceAbsent(final=True), "found")
    assert sources_of(absence(await attempt(building))) == [("a", "ResourceAbsent")]
    assert second.calls == []


@pytest.mark.parametrize("answers", [
    (DOWN, NONE), (NONE, DOWN), (DOWN, ResourceAbsent(final=True)), (NONE, DOWN, NONE),
    (SourcePayload("old", observed_at=0.0), NONE),
], ids=lambda answers: " ".join(type(answer).__name__ for answer in answers))  # fmt: skip
async def test_a_source_that_failed_might_have_had_it(answers: tuple[Any, ...]) -> None:
    """Then nobody knows, and the absence is one of the reasons."""
    building, _ = chain(*answers)
    told = sources_of(failure(await attempt(building)))
    assert [source for source, _ in told] == list("abc"[: len(answers)])
    assert "ResourceAbsent" in [kind for _, kind in told]


async def test_without_any_source_nothing_is_known_of_its_absence() -> None:
    assert failure(await attempt(builder(Single("y")))).failures == ()


async def test_keys_that_a_source_lacks_go_on_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many turns of the loop it takes to find that out."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", 0.0)
    wanted = [key("x", str(number)) for number in range(3000)]

    async def some(keys: Any, context: FetchContext) -> Mapping[ResourceKey, Any]:
        old = SourcePayload(0, observed_at=0.0)
        return {k: (NONE, old, "here")[int(k.subject) % 3] for k in keys}

    first = tuned(Batch("first", "x", priority=20), resilience_policy=FRAGILE)
    setattr(first, "fetch_many", some)  # noqa: B010 - answers by key
    second = Batch("second", "x")
    snapshot = await builder(first, second).build(wanted)
    assert [len(keys) for keys in second.calls] == [2000]
    assert len(snapshot) == 3000


async def test_a_deadline_that_passes_after_it_was_said_is_a_failure() -> None:
    gate = Gate()
    building, (_, second) = chain(NONE, NONE)
    second.before = gate.pass_
    told = sources_of(failure(await attempt(building, deadline_seconds=1)))
    assert told == [("a", "ResourceAbsent"), ("b", "SnapshotDeadlineExceededError")]


async def test_it_is_no_failure_in_metrics_and_events() -> None:
    metrics, events = InMemoryMetrics(), Recorder()
    building = builder(
        Stock("x", {"x": FOR_A_MINUTE}), metrics=metrics, events=events, buffer_observability=False
    )
    await attempt(building)
    await attempt(building)
    assert metrics.counter("source_fetch_total", source="x", status="absent") == 1
    assert metrics.counter("source_fetch_total", source="x", status="failure") == 0
    labels = {"resource_namespace": "test", "resource_name": "x"}
    assert metrics.counter("cache_access_total", status="absent", **labels) == 1
    (told,) = [each for each in events.events if each.event_type.startswith(("reso", "source_f"))]
    assert (told.event_type, told.payload["resource"]) == ("resource_absent", "test:x")
    assert told.payload["source"] == "x"


# What is remembered -------------------------------------------------------------------------------


async def test_it_is_remembered_for_as_long_as_the_source_says() -> None:
    source = Stock("x", {"x": FOR_A_MINUTE})
    building = builder(source, default_policy=FreshnessPolicy(0.0, 0.0))
    absence(await attempt(building))
    source.change(x="there")
    await asyncio.sleep(59.9)
    snapshot = await attempt(building)
    assert sources_of(absence(snapshot)) == [("x", "ResourceAbsent")]
    assert (snapshot.diagnostics.cache_hits, snapshot.diagnostics.source_calls) == (1, 0)
    await asyncio.sleep(0.2)
    assert (await attempt(building)).value(X) == "there"


@pytest.mark.parametrize("answers, seconds", [
    ((NONE,), 0), ((FOR_A_MINUTE, ResourceAbsent(ttl_seconds=10)), 10),
    ((ResourceAbsent(ttl_seconds=10), FOR_A_MINUTE), 10), ((FOR_A_MINUTE, NONE), 0),
    ((NONE, FOR_A_MINUTE), 0), ((FOR_A_MINUTE, ResourceAbsent(ttl_seconds=0)), 0),
    ((ResourceAbsent(ttl_seconds=math.inf), FOR_A_MINUTE), 60),
], ids=repr)  # fmt: skip
async def test_of_several_the_shortest_counts(answers: tuple[Any, ...], seconds: float) -> None:
    building, sources = chain(*answers)
    await attempt(building)
    for source in sources:
        source.change(x="there")
    if seconds:
        await asyncio.sleep(seconds - 0.1)
        absence(await attempt(building))
        await asyncio.sleep(0.2)
    assert (await attempt(building)).value(X) == "there"


async def publish(building: SnapshotBuilder) -> None:
    await building.publisher.publish(X, "event", source="stream")


async def invalidate(building: SnapshotBuilder) -> None:
    await building.publisher.invalidate(X)


async def invalidate_many(building: SnapshotBuilder) -> None:
    await building.publisher.invalidate_many([Y, X])


async def invalidate_in_the_cache(building: SnapshotBuilder) -> None:
    await building.cache.invalidate(X)


async def invalidate_the_namespace(building: SnapshotBuilder) -> None:
    cache = building.cache
    assert isinstance(cache, AsyncMemoryCache)
    await cache.invalidate_namespace("test")


async def clear(building: SnapshotBuilder) -> None:
    await building.cache.clear()


NEWS = [publish, invalidate, invalidate_many, invalidate_in_the_cache, clear]


@pytest.mark.parametrize("tell", [*NEWS, invalidate_the_namespace], ids=lambda tell: tell.__name__)
async def test_news_of_the_key_ends_what_is_remembered(tell: Any) -> None:
    source = Stock("x", {"x": FOR_A_MINUTE})
    building = builder(source)
    await attempt(building)
    source.change(x="there")
    await tell(building)
    assert (await attempt(building)).value(X) == ("event" if tell is publish else "there")


@pytest.mark.parametrize("tell", NEWS, ids=lambda tell: tell.__name__)
async def test_what_began_before_the_news_is_not_remembered(tell: Any) -> None:
    """Who waited gets the event, or else the answer."""
    gate = Gate()
    source = Stock("x", {"x": FOR_A_MINUTE}, before=gate.pass_)
    building = builder(source)
    early = await begun(attempt(building), gate)
    await asyncio.sleep(1)
    await tell(building)
    gate.open()
    if tell is publish:
        assert (await early).value(X) == "event"
    else:
        absence(await early)
    source.change(x="there")
    assert (await attempt(building)).value(X) == ("event" if tell is publish else "there")


async def test_a_value_that_was_fetched_since_ends_what_is_remembered() -> None:
    """A forced reading finds it; when that is old, the source is asked and not the memory."""
    source = Stock("x", {"x": FOR_A_MINUTE})
    building = builder(source, Derived("y", needs=lambda _: [X]), default_policy=SHORT)
    async with building.session() as session:
        await building.publisher.publish(X, "event", source="stream")
        await session.resolve([X])
        await building.publisher.invalidate(X)
        absence(await attempt(building))
        source.change(x="there")
        await session.revalidate([X], force_refresh=True)
    await asyncio.sleep(6)
    source.change(x="still there")
    assert (await attempt(building)).value(X) == "still there"


async def test_so_many_absent_keys_are_known_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.orchestration.singleflight._MOST_ABSENT", 10)
    source = Batch("x", answer=lambda _: FOR_A_MINUTE)
    building = builder(source)
    keys = [key("x", str(number)) for number in range(30)]
    await attempt(building, *keys)
    await attempt(building, *keys[-10:])
    assert len(source.calls) == 1
    await attempt(building, keys[0])
    assert len(source.calls) == 2


def test_what_is_remembered_belongs_to_one_event_loop_as_everything_does() -> None:
    source = Stock("x", {"x": FOR_A_MINUTE})
    building = builder(source)
    asyncio.run(attempt(building))
    asyncio.run(attempt(building))
    assert len(source.calls) == 2


# What was there before ----------------------------------------------------------------------------


async def test_nothing_stale_stands_in_for_what_does_not_exist() -> None:
    source = Stock("x", {"x": "there"})
    building = builder(source, default_policy=SHORT)
    await attempt(building)
    await asyncio.sleep(6)
    source.change(x=NONE)
    absence(await attempt(building))
    source.change(x=DOWN)
    failure(await attempt(building))  # gone from the cache, too


@pytest.mark.parametrize("answer", [NONE, FOR_A_MINUTE], ids=["once", "remembered"])
@pytest.mark.parametrize("mode", [RefreshMode.STALE_WHILE_REVALIDATE, RefreshMode.REFRESH_AHEAD])
async def test_a_refresh_told_of_an_absence_ends_the_value(mode: RefreshMode, answer: Any) -> None:
    """It has completed, and nobody gets the old value any more."""
    metrics = InMemoryMetrics()
    source = Stock("x", {"x": "there"})
    ahead = 4.0 if mode is RefreshMode.REFRESH_AHEAD else 0.0
    policy = FreshnessPolicy(5, 500, refresh_mode=mode, refresh_ahead_seconds=ahead)
    building = builder(source, default_policy=policy, metrics=metrics)
    await attempt(building)
    await asyncio.sleep(3 if ahead else 6)
    source.change(x=answer)
    session = building.session()
    assert (await session.resolve([X])).value(X) == "there"
    await building.wait_for_refreshes()
    counted = session.snapshot().diagnostics
    assert (counted.refresh_completed, counted.refresh_failed) == (1, 0)
    absence(await attempt(building))
    labels = {"resource_namespace": "test", "resource_name": "x"}
    assert metrics.counter("resource_refresh_total", status="absent", **labels) == 1
    assert metrics.counter("resource_refresh_total", status="failure", **labels) == 0


async def test_a_value_of_higher_authority_outlives_an_absence_of_lower_authority() -> None:
    source = Stock("x", {"x": FOR_A_MINUTE})
    building = builder(
        source, default_policy=SHORT, authority_policy=SourceAuthorityPolicy({"stream": 10, "x": 1})
    )
    await publish(building)
    await asyncio.sleep(6)
    snapshot = await attempt(building)
    assert (snapshot[X].value, snapshot[X].stale) == ("event", True)
    source.change(x="there")
    assert (await attempt(building)).value(X) == "event"


async def test_a_forced_absence_of_lower_authority_leaves_the_value_to_other_readers() -> None:
    source = Stock("x", {"x": FOR_A_MINUTE})
    ranks = SourceAuthorityPolicy({"stream": 10})
    building = builder(source, authority_policy=ranks)
    await publish(building)
    async with building.session() as session:
        await session.resolve([X])
        absence(await session.revalidate([X], strict=False, force_refresh=True))
    assert (await attempt(building)).value(X) == "event"


@pytest.mark.parametrize("awaited", [False, True])
async def test_an_event_that_is_old_when_it_comes_is_newer_than_the_absence(awaited: bool) -> None:
    gate = Gate()
    building = builder(
        Stock("x", {"x": FOR_A_MINUTE}, before=gate.pass_),
        default_policy=SHORT,
        cache=Awaited() if awaited else None,
    )
    early = await begun(attempt(building), gate)
    await asyncio.sleep(20)
    then = building.clock.now() - 10
    await building.publisher.publish(X, "event", source="stream", observed_at=then)
    gate.open()
    snapshot = await early
    assert (snapshot[X].value, snapshot[X].stale) == ("event", True)


async def test_readers_of_a_shared_cache_learn_that_the_value_has_gone() -> None:
    cache = AsyncMemoryCache()
    source = Stock("x", {"x": "there"})
    one = builder(source, cache=cache, default_policy=SHORT)
    other = builder(Single("unused"), cache=cache, default_policy=SHORT)
    await attempt(one)
    await asyncio.sleep(6)
    assert (await attempt(other)).value(X) == "there"
    source.change(x=NONE)
    await attempt(one)
    failure(await attempt(other))


# What is derived ----------------------------------------------------------------------------------


def judged(absent: ResourceAbsent, gate: Gate | None = None) -> Derived:
    """Y is what X is, and raises `absent` where that is "none", once the gate lets it through."""

    async def judge(k: ResourceKey, known: Snapshot, context: FetchContext) -> Any:
        if known.value(X) == "none":
            await (gate or Gate(opened=True)).pass_()
            raise absent
        return known.value(X)

    derived = Derived("y", needs=lambda _: [X])
    setattr(derived, "derive", judge)  # noqa: B010 - judges what it is given
    return derived


async def test_what_a_derivation_says_is_not_remembered_as_what_it_rests_on_may_change() -> None:
    building = builder(judged(FOR_A_MINUTE))
    await building.publisher.publish(X, "some", source="stream")
    assert (await attempt(building, Y)).value(Y) == "some"
    await asyncio.sleep(1)
    await building.publisher.publish(X, "none", source="stream")
    absence(await attempt(building, Y), Y)
    await asyncio.sleep(1)
    await building.publisher.publish(X, "more", source="stream")
    assert (await attempt(building, Y)).value(Y) == "more"


async def test_an_absence_derived_from_what_has_changed_meanwhile_leaves_what_is_cached() -> None:
    gate = Gate()
    building = builder(judged(NONE, gate))
    await building.publisher.publish(X, "none", source="stream")
    early = await begun(attempt(building, Y), gate)
    await asyncio.sleep(1)
    await building.publisher.publish(X, "some", source="stream")
    assert (await attempt(building, Y)).value(Y) == "some"
    gate.open()
    absence(await early, Y)
    snapshot = await attempt(building, Y)
    assert (snapshot.value(Y), snapshot[Y].from_cache) == ("some", True)


async def test_what_rests_on_something_absent_is_absent() -> None:
    derived = Derived("y", needs=lambda _: [X])
    metrics = InMemoryMetrics()
    building = builder(Stock("x", {"x": NONE}), derived, metrics=metrics)
    (said,) = absence(await attempt(building, Y), Y).failures
    assert (said.source, said.error_type, said.attempts) == ("y", "ResourceAbsent", 0)
    assert said.exception is not None
    cause = said.exception.__cause__
    assert isinstance(cause, DependencyResolutionError)
    assert type(cause.errors[X]) is ResourceAbsentError
    assert derived.calls == []
    assert metrics.counter("source_fetch_total", source="y", status="failure") == 0


@pytest.mark.parametrize("through", [False, True], ids=["directly", "through another"])
async def test_nobody_joins_what_waits_on_though_what_it_lacked_has_come(through: bool) -> None:
    gate = Gate()
    stock = Stock("stock", {"x": NONE})
    middle = Derived("middle", needs=lambda _: [X])
    slow = Stock("slow", {"slow": 1}, before=gate.pass_)
    needed = key("middle") if through else X
    derived = Derived("y", needs=lambda _: [needed, key("slow")])
    building = builder(stock, middle, slow, derived)
    early = await begun(attempt(building, Y), gate)
    await asyncio.sleep(1)
    await publish(building)
    late = asyncio.ensure_future(attempt(building, Y))
    await asyncio.sleep(1)
    gate.open()
    for reader in (early, late):  # the early one takes what has come, too
        assert (await reader).value(Y) == ((("event",), 1) if through else ("event", 1))
    assert len(slow.calls) == 1


# Caches that are awaited --------------------------------------------------------------------------


class Awaited(AsyncMemoryCache):
    """Counts its reads; a subclass has to be awaited."""

    reads = 0

    async def get_many(self, keys: Any, **how: Any) -> Mapping[ResourceKey, CacheLookup]:
        self.reads += 1
        return await super().get_many(keys, **how)


async def test_what_an_awaited_cache_holds_is_not_served_while_it_is_known_to_be_gone() -> None:
    source = Stock("x", {"x": "there"})
    policy = FreshnessPolicy(5, 500, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(source, cache=Awaited(), default_policy=policy)
    await attempt(building)
    await asyncio.sleep(6)
    source.change(x=FOR_A_MINUTE)
    await attempt(building)
    await building.wait_for_refreshes()
    absence(await attempt(building))


async def test_who_joins_a_slow_read_after_the_news_gets_no_absence_from_before_them() -> None:
    gate, z = Gate(), key("z")

    class Slow(Awaited):
        async def get_many(self, keys: Any, **how: Any) -> Mapping[ResourceKey, CacheLookup]:
            found = await super().get_many(keys, **how)
            if Y in keys:
                await gate.pass_()
            return found

    source, cache = Stock("x", {"x": NONE}), Slow()
    vars(cache)["timeout_seconds"] = 60.0
    rest = [Derived("y", needs=lambda _: [X]), Derived("z", needs=lambda _: [Y])]
    building = builder(source, *rest, cache=cache)
    first = await begun(attempt(building, Y), gate)
    await building.publisher.publish(key("other"), 1, source="stream")
    early = await begun(attempt(building, z), gate, 2)
    gate.let_through()
    absence(await first, Y)
    await building.publisher.publish(X, "there", source="stream")
    late = await begun(attempt(building, z))
    gate.open()
    assert (await late).value(z) == (("there",),)
    await early


@pytest.mark.expects_leaks  # that the clock was wrong is told to the loop
@pytest.mark.parametrize("says", [math.nan, math.inf])
@pytest.mark.parametrize("reading", range(1, 4))
async def test_an_absence_at_no_known_time_is_not_kept_for_ever(reading: int, says: float) -> None:
    class Clock(LoopClock):
        left = 0

        def monotonic(self) -> float:
            self.left -= 1
            return super().monotonic() if self.left else says

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        if source.calls[1:]:
            return "here"
        clock.left = reading
        raise ResourceAbsent("not yet", ttl_seconds=5)

    clock, source = Clock(), Single("x", fetch=fetch)
    building = builder(source, clock=clock)
    with contextlib.suppress(ValueError):  # of the time that the build has taken
        assert (await attempt(building)).errors
    await asyncio.sleep(6)
    assert (await building.build([X])).value(X) == "here"
