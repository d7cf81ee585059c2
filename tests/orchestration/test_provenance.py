"""What a derived value rests on: how old the oldest of it is, and whether any of it is stale."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    CallableDerivedSource,
    CircuitBreakerPolicy,
    FreshnessPolicy,
    InMemoryMetrics,
    PolicyResolver,
    RefreshMode,
    RefreshState,
    ResourceAcceptanceRule,
    ResourceKey,
    Snapshot,
    SnapshotAcceptanceError,
    SnapshotAcceptancePolicy,
    SnapshotAcceptanceReason,
    SnapshotBuilder,
    SnapshotRequest,
    SnapshotValue,
    SourcePayload,
    SourceResiliencePolicy,
)
from tests.contracts.caches import BatchAtomicCache, BatchCache, SingleKeyCache
from tests.orchestration.scripted import ONCE, Derived, Single, key, tuned
from tests.support import EPOCH, ManualClock

LEFT, RIGHT, MIDDLE, TOP = key("left"), key("right"), key("middle"), key("top")
MINUTE = FreshnessPolicy(60.0, 600.0)
LONG = FreshnessPolicy(600.0, 6_000.0)
SWR = FreshnessPolicy(60.0, 600.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)


class World:
    """Two sources that can go down, `middle` of both, and `top` of `middle`."""

    def __init__(
        self,
        *,
        inherits: Collection[str] = (),
        policies: dict[ResourceKey, FreshnessPolicy] | None = None,
        default: FreshnessPolicy = MINUTE,
        **settings: Any,
    ) -> None:
        self.clock = ManualClock()
        self.down: set[str] = set()
        self.dated: dict[str, float] = {}
        self.plain = Single("plain", "left", "right", fetch=self._fetch)
        self.middle = Derived("middle", needs=lambda _: [LEFT, RIGHT])
        self.top = Derived("top", needs=lambda _: [MIDDLE])
        for source in (self.middle, self.top):
            source.inherit_freshness = source.name in inherits  # type: ignore[attr-defined] # the protocol's optional attribute
        self.builder = SnapshotBuilder(
            [self.plain, self.middle, self.top],
            policy_resolver=PolicyResolver(default, policies),
            clock=self.clock,
            **settings,
        )

    async def _fetch(self, k: ResourceKey, context: Any) -> Any:
        if k.name in self.down:
            raise ConnectionError(k.name)
        at = self.dated.get(k.name)
        return SourcePayload(len(self.plain.calls), observed_at=at)

    async def read(self, wanted: ResourceKey) -> SnapshotValue[Any]:
        return (await self.builder.build([wanted]))[wanted]

    def below(self, value: SnapshotValue[Any]) -> tuple[float, str, bool]:
        """How old the oldest below a value is now, which that is, and whether any is stale."""
        age = self.clock.now() - value.oldest_observed_at
        assert (value.stale_key is not None) is value.rests_on_stale
        return age, value.oldest_key.name, value.rests_on_stale


# Provenance ----------------------------------------------------------------------------------


async def test_a_plain_value_rests_on_itself() -> None:
    world = World()
    value = await world.read(LEFT)
    assert world.below(value) == (0.0, "left", False)
    world.down.add("left")
    world.clock.advance(100)
    value = await world.read(LEFT)
    assert value.stale
    assert world.below(value) == (100.0, "left", True)


@pytest.mark.parametrize("wanted", [MIDDLE, TOP])
async def test_a_derived_value_tells_of_the_oldest_and_the_stale_below(wanted: ResourceKey) -> None:
    world = World()
    world.dated["right"] = EPOCH - 30
    assert world.below(await world.read(wanted)) == (30.0, "right", False)
    world.down.update({"left", "right"})
    world.clock.advance(100)
    value = await world.read(wanted)
    assert not value.stale
    assert (value.age_seconds, value.observed_at) == (0.0, EPOCH + 100)
    assert world.below(value) == (130.0, "right", True)


async def test_a_session_is_told_of_what_lies_below_as_it_is_when_each_stage_is_delivered() -> None:
    world = World(policies={MIDDLE: LONG})
    async with world.builder.session() as session:
        assert not (await session.resolve([MIDDLE]))[MIDDLE].rests_on_stale
        world.clock.advance(61)
        assert session.snapshot()[MIDDLE].rests_on_stale
        assert (await session.resolve([LEFT]))[MIDDLE].oldest_observed_at == EPOCH


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
async def test_copies_and_pickles_keep_what_they_rest_on(copied: Callable[[Any], Any]) -> None:
    world = World(inherits={"middle"})
    world.dated["right"] = EPOCH - 30
    value = await world.read(MIDDLE)
    twin = copied(value)
    assert world.below(twin) == world.below(value) == (30.0, "right", False)
    assert (twin, twin.inherits_freshness) == (value, True)


def rebuilt(value: SnapshotValue[Any]) -> SnapshotValue[Any]:
    """The value as a cache returns it that keeps fields, and knows nothing of what lies below."""
    fields = ("key", "value", "source", "observed_at", "fetched_at", "age_seconds", "stale")
    facts = {name: getattr(value, name) for name in fields}
    return SnapshotValue(
        **facts, from_cache=True, latency_ms=value.latency_ms, metadata=dict(value.metadata),
        version=value.version, dependency_versions=dict(value.dependency_versions),
    )  # fmt: skip


class Forgetful:
    """Turns every value that goes in into one made of its fields."""

    async def set(self, value: SnapshotValue[Any]) -> None:
        await super().set(rebuilt(value))  # type: ignore[misc] # a mixin of caches

    async def set_many(self, values: Collection[SnapshotValue[Any]]) -> None:
        await super().set_many([rebuilt(each) for each in values])  # type: ignore[misc] # likewise


class ForgetfulCache(Forgetful, SingleKeyCache):
    pass


class ForgetfulBatchCache(Forgetful, BatchCache):
    pass


@pytest.mark.parametrize("inherits", [(), ("middle", "top")])
@pytest.mark.parametrize(
    "make", [SingleKeyCache, BatchCache, BatchAtomicCache, ForgetfulCache, ForgetfulBatchCache]
)
async def test_what_comes_out_of_a_cache_of_ones_own_knows_what_it_rests_on(
    make: Callable[[], Any], inherits: Collection[str]
) -> None:
    cache = make()
    world = World(inherits=inherits, policies={MIDDLE: LONG, TOP: LONG}, cache=cache)
    world.dated["right"] = EPOCH - 30
    await world.read(TOP)
    await world.builder.aclose()
    other = World(inherits=inherits, policies={MIDDLE: LONG, TOP: LONG}, cache=cache)
    other.clock.advance(20)
    value = await other.read(TOP)
    assert (value.from_cache, other.plain.calls) == (True, [])
    assert other.below(value) == (50.0, "right", False)
    assert value.age_seconds == (50.0 if inherits else 20.0)
    if not inherits:
        other.clock.advance(20)
        assert other.below(await other.read(TOP)) == (70.0, "right", True)


@pytest.mark.slow
async def test_a_long_chain_from_a_cache_of_ones_own_needs_no_stack() -> None:
    clock, depth = ManualClock(), 1_100  # more than Python lets calls nest
    cache = ForgetfulBatchCache()

    def needs(k: ResourceKey) -> list[ResourceKey]:
        return [LEFT if k.subject == "1" else key("link", str(int(k.subject) - 1))]

    def building() -> SnapshotBuilder:
        chain = CallableDerivedSource(
            name="chain", priority=1, supports=lambda k: k.name == "link", dependencies=needs,
            deriver=lambda k, known, context: k.subject, run_sync_in_thread=False,
        )  # fmt: skip
        return SnapshotBuilder(
            [Single("plain", "left"), chain], clock=clock, cache=cache, default_policy=MINUTE
        )

    last = key("link", str(depth))
    async with building() as first:
        await first.build([last])
    clock.advance(50)
    async with building() as second:
        value = (await second.build([last]))[last]
    assert (value.from_cache, value.oldest_key, value.oldest_observed_at) == (True, LEFT, EPOCH)


# Freshness that is inherited -----------------------------------------------------------------


async def test_a_value_that_inherits_is_as_old_as_its_oldest_input_and_stale_if_one_is() -> None:
    world = World(inherits={"middle"})
    world.dated.update(left=EPOCH - 10, right=EPOCH - 30)
    value = await world.read(MIDDLE)
    assert (value.observed_at, value.age_seconds, value.stale) == (EPOCH - 30, 30.0, False)
    assert value.fetched_at == EPOCH
    world.down.update({"left", "right"})
    world.clock.advance(100)
    value = await world.read(MIDDLE)
    assert (value.observed_at, value.age_seconds, value.stale) == (EPOCH - 30, 130.0, True)
    assert "fallback_error" not in value.metadata


async def test_its_own_policy_says_how_long_it_is_kept_since_it_was_derived() -> None:
    """A short time to live of its own makes it neither stale nor absent: its inputs are fresh."""
    brief = FreshnessPolicy(5.0, 5.0, allow_stale_on_error=False)
    world = World(inherits={"middle"}, policies={LEFT: LONG, RIGHT: LONG, MIDDLE: brief})
    await world.read(MIDDLE)
    world.clock.advance(300)
    value = await world.read(MIDDLE)
    assert (value.age_seconds, value.stale, len(world.middle.calls)) == (300.0, False, 2)
    world.clock.advance(5)
    value = await world.read(MIDDLE)
    assert (value.age_seconds, value.from_cache, len(world.middle.calls)) == (305.0, True, 2)
    assert len(world.plain.calls) == 2


async def test_a_kept_value_goes_stale_with_its_input_and_is_derived_anew() -> None:
    world = World(inherits={"middle"}, policies={MIDDLE: LONG})
    await world.read(MIDDLE)
    world.clock.advance(60)
    assert (await world.read(MIDDLE)).from_cache
    world.clock.advance(1)
    value = await world.read(MIDDLE)
    assert (value.from_cache, value.age_seconds, value.stale) == (False, 0.0, False)
    assert len(world.plain.calls) == 4


async def test_levels_that_inherit_pass_on_age_and_staleness_and_others_do_not() -> None:
    for inherits, expected in (
        ({"middle", "top"}, (130.0, True)),
        ({"top"}, (0.0, False)),
        ({"middle"}, (0.0, False)),
    ):
        world = World(inherits=inherits)
        world.dated["right"] = EPOCH - 30
        await world.read(TOP)
        world.down.update({"left", "right"})
        world.clock.advance(100)
        value = await world.read(TOP)
        assert (value.age_seconds, value.stale) == expected
        assert world.below(value) == (130.0, "right", True)


async def test_inherited_staleness_is_no_failure_of_the_source_nor_of_its_circuit() -> None:
    circuit = CircuitBreakerPolicy(failure_threshold=1)
    metrics = InMemoryMetrics()
    world = World(inherits={"middle"}, metrics=metrics, buffer_observability=False)
    tuned(world.middle, resilience_policy=SourceResiliencePolicy(ONCE.retry, circuit))
    await world.read(MIDDLE)
    world.down.update({"left", "right"})
    for _ in range(3):
        world.clock.advance(100)
        snapshot = await world.builder.build([MIDDLE])
        assert snapshot[MIDDLE].stale
        assert (snapshot.diagnostics.derived_calls, snapshot.diagnostics.retries) == (1, 0)
    assert metrics.counter("source_fetch_total", source="middle", status="success") == 4
    health = await world.builder.health_snapshot()
    assert not [each for each in health.circuits if each.source == "middle"]
    assert health.sources["middle"].last_error is None


async def test_what_stands_in_for_a_failed_derivation_tells_its_inherited_age() -> None:
    world = World(inherits={"middle"}, policies={LEFT: LONG, RIGHT: LONG})
    world.dated["right"] = EPOCH - 30
    await world.read(MIDDLE)
    world.clock.advance(61)

    async def broken() -> None:
        raise ValueError("cannot add up")

    world.middle.before = broken
    value = await world.read(MIDDLE)
    assert "cannot add up" in value.metadata["fallback_error"]
    assert (value.age_seconds, value.stale, value.rests_on_stale) == (91.0, True, False)


async def test_an_explicit_date_of_the_deriver_counts_if_it_is_older_still() -> None:
    world = World(inherits={"middle"})
    world.dated["right"] = EPOCH - 10
    for at, expected in ((EPOCH - 40, 40.0), (EPOCH, 10.0), (None, 10.0)):

        async def derive(
            k: ResourceKey, known: Snapshot, context: Any, at: float | None = at
        ) -> SourcePayload[int]:
            return SourcePayload(1, observed_at=at)

        world.middle.derive = derive  # type: ignore[method-assign, assignment] # its own
        await world.builder.publisher.invalidate(MIDDLE)
        assert (await world.read(MIDDLE)).age_seconds == expected


async def test_an_event_for_the_derived_key_competes_with_when_it_was_derived() -> None:
    """An old input does not make a new derivation lose to an event that was before it."""
    world = World(inherits={"middle"}, policies={LEFT: LONG, RIGHT: LONG})
    world.dated.update(left=EPOCH - 300, right=EPOCH - 300)
    publish = world.builder.publisher.publish
    await publish(MIDDLE, "event", source="stream", observed_at=EPOCH)
    assert (await world.read(MIDDLE)).value == "event"
    world.clock.advance(61)
    value = await world.read(MIDDLE)
    assert (value.source, value.age_seconds, value.stale) == ("middle", 361.0, False)
    late = await publish(MIDDLE, "late", source="stream", observed_at=EPOCH + 60)
    assert late.status.value == "ignored_older"
    await publish(MIDDLE, "new", source="stream", observed_at=EPOCH + 62)
    assert (await world.read(MIDDLE)).value == "new"


async def test_refresh_ahead_goes_by_what_goes_stale_first() -> None:
    ahead = FreshnessPolicy(
        600.0, 600.0, refresh_mode=RefreshMode.REFRESH_AHEAD, refresh_ahead_seconds=10.0
    )
    early = FreshnessPolicy(
        60.0, 600.0, refresh_mode=RefreshMode.REFRESH_AHEAD, refresh_ahead_seconds=10.0
    )
    world = World(inherits={"middle"}, default=early, policies={MIDDLE: ahead})
    await world.read(MIDDLE)
    world.clock.advance(49)
    assert "refresh_scheduled" not in (await world.read(MIDDLE)).metadata
    world.clock.advance(1)
    value = await world.read(MIDDLE)
    assert (value.stale, value.metadata["refresh_scheduled"]) == (False, True)
    await world.builder.wait_for_refreshes()
    await world.builder.wait_for_refreshes()
    assert len(world.plain.calls) == 4, "its inputs were due, too"


@pytest.mark.parametrize("inherits", [{"middle"}, {"middle", "top"}])
async def test_a_refresh_waits_for_stale_inputs_and_so_is_fresh(inherits: Collection[str]) -> None:
    """Inputs are served stale while they are refreshed, too; once is enough all the same."""
    world = World(inherits=inherits, default=SWR)
    wanted = TOP if "top" in inherits else MIDDLE
    await world.read(wanted)
    world.clock.advance(61)
    value = await world.read(wanted)
    assert (value.stale, value.refresh) == (True, RefreshState.UNDER_WAY)
    await world.builder.wait_for_refreshes()
    value = await world.read(wanted)
    assert (value.stale, value.from_cache, value.age_seconds) == (False, True, 0.0)
    assert len(world.plain.calls) == 4


async def test_a_refresh_that_brings_nothing_fresher_as_an_input_is_down_is_failing() -> None:
    metrics = InMemoryMetrics()
    world = World(inherits={"middle"}, default=SWR, metrics=metrics, buffer_observability=False)
    await world.read(MIDDLE)
    world.down.add("right")
    world.clock.advance(61)
    assert (await world.read(MIDDLE)).refresh is RefreshState.UNDER_WAY
    await world.builder.wait_for_refreshes()
    for _ in range(2):
        value = await world.read(MIDDLE)
        assert (value.stale, value.refresh, value.age_seconds) == (True, RefreshState.FAILING, 61.0)
        assert value.metadata["refresh_error"] == "test:middle is still stale, as test:right is"
        await world.builder.wait_for_refreshes()
    assert metrics.counter("source_fetch_total", source="middle", status="failure") == 0
    assert (await world.builder.health_snapshot()).sources["middle"].last_error is None
    world.down.clear()
    world.clock.advance(60)  # until the circuit of the source lets a call through
    await world.read(MIDDLE)
    await world.builder.wait_for_refreshes()
    assert (await world.read(MIDDLE)).refresh is RefreshState.NONE


async def test_a_forced_revalidation_renews_inputs_and_what_inherits_from_them() -> None:
    world = World(inherits={"middle", "top"})
    async with world.builder.session() as session:
        await session.resolve([TOP, LEFT, RIGHT])
        world.clock.advance(61)
        assert session.snapshot()[TOP].stale
        fresh = await session.revalidate([LEFT, RIGHT], force_refresh=True)
        assert (fresh[TOP].stale, fresh[TOP].age_seconds) == (False, 0.0)


async def test_a_value_put_back_into_a_cache_by_hand_counts_from_its_derivation() -> None:
    world = World(inherits={"middle"}, policies={MIDDLE: FreshnessPolicy(20.0, 20.0)})
    world.dated["right"] = EPOCH - 50
    value = await world.read(MIDDLE)
    cache = world.builder.cache
    assert isinstance(cache, AsyncMemoryCache)
    assert value.ordered_at == EPOCH
    await cache.set(value)
    world.clock.advance(5)
    again = await world.read(MIDDLE)
    assert (again.from_cache, again.age_seconds, len(world.middle.calls)) == (True, 55.0, 1)


def test_the_adapter_keeps_the_setting_and_checks_it() -> None:
    def made(**more: Any) -> CallableDerivedSource:
        return CallableDerivedSource(
            name="d", priority=1, supports=lambda k: True, dependencies=lambda k: [LEFT],
            deriver=lambda k, known, context: None, **more,
        )  # fmt: skip

    assert (made().inherit_freshness, made(inherit_freshness=True).inherit_freshness) == (
        False,
        True,
    )
    with pytest.raises(TypeError, match="^inherit_freshness must be"):
        made(inherit_freshness=1)


def test_a_source_of_ones_own_must_say_it_with_a_flag() -> None:
    source = Derived("d", needs=lambda _: [LEFT])
    source.inherit_freshness = "yes"  # type: ignore[attr-defined] # what is refused
    with pytest.raises(TypeError, match="^inherit_freshness of source 'd' must be"):
        SnapshotBuilder([source])


# Acceptance ----------------------------------------------------------------------------------


async def judged(world: World, wanted: ResourceKey, **rule: Any) -> list[Any]:
    policy = SnapshotAcceptancePolicy(ResourceAcceptanceRule(**rule))
    request = SnapshotRequest(required=[wanted], acceptance_policy=policy)
    try:
        await world.builder.build_request(request)
    except SnapshotAcceptanceError as error:
        return list(error.violations)
    return []


async def test_a_request_may_bound_the_age_of_the_oldest_below_and_learns_which_it_was() -> None:
    world = World(policies={LEFT: LONG, RIGHT: LONG})
    world.dated["right"] = EPOCH - 300
    for wanted in (TOP, RIGHT):
        assert await judged(world, wanted, max_oldest_age_seconds=300.0) == []
        (violation,) = await judged(world, wanted, max_oldest_age_seconds=299.0)
        assert violation.reason is SnapshotAcceptanceReason.OLDEST_TOO_OLD
        assert (violation.key, violation.input_key) == (wanted, RIGHT)
        assert (violation.current_age_seconds, violation.max_age_seconds) == (300.0, 299.0)
        assert violation.message == (
            f"{wanted} must rest on nothing that is more than 299 s old, got test:right observed "
            "300 s ago"
        )
    assert await judged(world, TOP, max_age_seconds=0.0) == []


@pytest.mark.parametrize("inherits", [(), ("middle", "top")])
async def test_a_request_may_refuse_what_rests_on_stale_data(inherits: Collection[str]) -> None:
    world = World(inherits=inherits)
    assert await judged(world, TOP, allow_resting_on_stale=False) == []
    world.down.add("right")
    world.clock.advance(61)
    (violation,) = await judged(world, TOP, allow_resting_on_stale=False)
    assert violation.reason is SnapshotAcceptanceReason.RESTS_ON_STALE
    assert (violation.key, violation.input_key, violation.stale) == (TOP, RIGHT, True)
    assert violation.message == "test:top must rest on fresh values, got test:right, which is stale"
    assert len(await judged(world, TOP, allow_stale=False)) == (1 if inherits else 0)


async def test_a_plain_value_that_is_stale_rests_on_something_stale() -> None:
    world = World()
    await world.read(LEFT)
    world.down.add("left")
    world.clock.advance(61)
    (violation,) = await judged(world, LEFT, allow_resting_on_stale=False)
    assert violation.input_key == LEFT


async def test_acceptance_is_judged_now_and_not_as_of_the_delivery() -> None:
    world = World(inherits={"middle"}, policies={MIDDLE: LONG})
    strict = SnapshotAcceptancePolicy(
        ResourceAcceptanceRule(allow_resting_on_stale=False, max_oldest_age_seconds=30.0)
    )
    loose = SnapshotAcceptancePolicy(ResourceAcceptanceRule(allow_stale=False))

    async def slow() -> None:
        world.clock.advance(61)

    async with world.builder.session() as session:
        await session.resolve([MIDDLE])
        world.clock.advance(61)
        for policy, reasons in ((strict, {"oldest_too_old", "rests_on_stale"}), (loose, {"stale"})):
            request = SnapshotRequest(required=[MIDDLE], acceptance_policy=policy)
            with pytest.raises(SnapshotAcceptanceError) as caught:
                await session.resolve_request(request)
            assert {each.reason.value for each in caught.value.violations} == reasons


async def test_an_inherited_age_beyond_its_own_time_to_live_is_not_stale_for_acceptance() -> None:
    brief = FreshnessPolicy(5.0, 5.0)
    world = World(inherits={"middle"}, policies={LEFT: LONG, RIGHT: LONG, MIDDLE: brief})
    world.dated.update(left=EPOCH - 300, right=EPOCH - 300)
    assert await judged(world, MIDDLE, allow_stale=False) == []
