"""Nobody waits for ever: whatever is plugged in may raise anything, at any of its calls."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    AuthorityPolicyResolver,
    CacheWriteResult,
    CacheWriteStatus,
    FreshnessPolicy,
    PolicyResolver,
    RefreshMode,
    ResiliencePolicyResolver,
    ResourceKey,
    Snapshot,
    SnapshotBuilder,
    SnapshotValue,
    SourceAuthorityPolicy,
    SourceFailure,
    SourcePayload,
)
from coalestra.orchestration.flights import Flight, FlightBoard, Gather
from coalestra.orchestration.singleflight import SingleFlight
from coalestra.orchestration.tracing import CallLog
from tests.contracts.caches import BatchAtomicCache, LeasingCache, SingleKeyCache
from tests.orchestration.scripted import Batch, Derived, Single, builder, down, key, latency
from tests.support import (
    EPOCH,
    LoopClock,
    Panic,
    VirtualLoop,
    begun,
    no_leaks,
    run_virtual,
    settle,
    taking,
)

BASES = [key("base", str(number)) for number in range(3)]
KEYS = [*BASES, key("derived"), key("single"), key("late")]
SERVED_STALE = FreshnessPolicy(5, 500, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
MOST_CALLS = 60


class Answering:
    """Resolves every key to the same thing, whatever that is."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def resolve(self, key: ResourceKey) -> Any:
        return self.answer


class Fuse:
    """Raises at one of the calls that pass through it, when it is armed."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.error = error
        self.left = -1

    def arm(self, calls: int) -> None:
        self.left = calls

    def passed(self) -> None:
        if self.left >= 0:
            self.left -= 1
            if self.left < 0:
                raise self.error()

    @property
    def blown(self) -> bool:
        return self.left < 0


class FusedClock(LoopClock):
    """The time of the loop, as long as the fuse holds."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def now(self) -> float:
        self.fuse.passed()
        return super().now()

    def monotonic(self) -> float:
        self.fuse.passed()
        return super().monotonic()


def world(plug: str, fuse: Fuse) -> SnapshotBuilder:
    """A builder with sources of each kind, one of whose plugs goes through the fuse."""

    def policy(asked: ResourceKey) -> FreshnessPolicy:
        fuse.passed()
        return SERVED_STALE

    def authority(asked: ResourceKey) -> SourceAuthorityPolicy:
        fuse.passed()
        return SourceAuthorityPolicy()

    async def aged(asked: ResourceKey, context: Any) -> SourcePayload[int]:
        return SourcePayload(1, observed_at=EPOCH - 20)

    plugs: dict[str, dict[str, Any]] = {
        "clock": {"clock": FusedClock(fuse)},
        "policy": {"policy_resolver": PolicyResolver(SERVED_STALE, dynamic=policy)},
        "authority": {"authority_resolver": AuthorityPolicyResolver(dynamic=authority)},
    }
    settings = {"default_policy": None if plug == "policy" else SERVED_STALE, **plugs[plug]}
    return builder(
        Batch("base"), Derived("derived", needs=lambda _: [BASES[0], BASES[1], key("single")]),
        Single("single", fetch=latency(0.5)), Single("late", fetch=aged, priority=5), **settings,
    )  # fmt: skip


async def life(building: SnapshotBuilder) -> None:
    """Ask for everything cold, warm, stale and derived, by builds and a session side by side."""

    async def build() -> None:
        await building.build(KEYS, strict=False, deadline_seconds=20)

    async def look_again() -> None:
        async with building.session(deadline_seconds=20) as session:
            await session.resolve(KEYS[:4], strict=False)
            await session.revalidate(list(session.snapshot()) or KEYS[:1], force_refresh=True)

    async def tell() -> None:
        await building.publisher.publish(BASES[0], "event", source="stream")
        await building.publisher.invalidate(BASES[1])

    for _ in range(2):
        await asyncio.gather(build(), look_again(), tell(), return_exceptions=True)
        await asyncio.sleep(10)
    await building.wait_for_refreshes()


@pytest.mark.expects_leaks  # what a plug raises is told to the loop, and a deadline may come first
@pytest.mark.parametrize("plug", ["clock", "policy", "authority"])
@pytest.mark.parametrize("every, errors", [
    pytest.param(2, [LookupError], id="ordinary"),
    pytest.param(1, [LookupError], id="ordinary, each", marks=pytest.mark.slow),
    pytest.param(
        1, [Panic, asyncio.CancelledError, GeneratorExit], id="any", marks=pytest.mark.slow
    ),
])  # fmt: skip
async def test_whatever_a_plug_raises_at_whichever_call_everybody_is_told(
    plug: str, every: int, errors: list[Callable[[], BaseException]]
) -> None:
    """The loop of the tests says so at once if somebody waits for what never comes."""
    for calls in range(0, MOST_CALLS, every):
        fuse = Fuse(errors[calls % len(errors)])
        building = world(plug, fuse)
        fuse.arm(calls)
        life_and_end = asyncio.ensure_future(asyncio.wait_for(life(building), 1_000))
        await asyncio.wait([life_and_end])
        if not life_and_end.cancelled() and isinstance(life_and_end.exception(), TimeoutError):
            raise AssertionError(f"somebody still waits after call {calls} of the {plug}")
        if not fuse.blown:
            return
        snapshot = await building.build(KEYS, strict=False, deadline_seconds=5)
        healthy = f"healthy again after call {calls} of the {plug}"
        assert not snapshot.errors, healthy
        await building.wait_for_refreshes()
        await settle()
        await no_leaks(building)
        await building.aclose()


class Ahead(BatchAtomicCache):
    """Has always been told something newer by others in the meantime."""

    def _offer(self, value: SnapshotValue[Any], force: bool, replace_equal: bool) -> Any:
        newer = dataclasses.replace(value, observed_at=value.observed_at + 0.5, source="others")
        super()._offer(newer, True, replace_equal)
        return CacheWriteResult(CacheWriteStatus.IGNORED_OLDER, newer, newer)


@pytest.mark.expects_leaks
@pytest.mark.parametrize(
    "cache", [AsyncMemoryCache, SingleKeyCache, Ahead, LeasingCache], ids=lambda c: c.__name__
)
async def test_a_clock_that_raises_once_blocks_no_key_whatever_the_cache(cache: type[Any]) -> None:
    """Also in what no reader waits for, as it is done later in a step of its own."""
    clock_calls = 0
    while True:
        fuse = Fuse(Panic)
        building = builder(
            Batch("base", before=lambda: asyncio.sleep(0.1)),
            cache=cache(),
            clock=FusedClock(fuse),
            default_policy=SERVED_STALE,
        )
        fuse.arm(clock_calls)
        for _ in range(2):
            with contextlib.suppress(Panic):
                await asyncio.wait_for(building.build(BASES, strict=False), 50)
            await asyncio.sleep(10)
        await asyncio.wait_for(building.wait_for_refreshes(), 50)
        if not fuse.blown:
            break
        await asyncio.sleep(10)
        again = await asyncio.wait_for(building.build(BASES, strict=False), 50)
        assert list(again) == BASES, f"after call {clock_calls} of the clock"
        await asyncio.wait_for(building.wait_for_refreshes(), 50)
        again = await building.build(BASES)
        assert not again.stale_keys, f"nothing is refreshed after call {clock_calls} of the clock"
        await building.aclose()
        clock_calls += 1
    assert clock_calls > 10


@pytest.mark.expects_leaks
@pytest.mark.parametrize("owner, method", [
    (SingleFlight, name)
    for name in ("_look_on", "_proceed", "_go_on", "_gathered", "_conclude", "_offer", "_fit",
                 "_serve", "_acquire", "_join", "_missed", "_choose", "strike", "_check")
] + [(FlightBoard, "join"), (FlightBoard, "leave"), (Gather, "receive"),
     (Flight, "choose"), (Flight, "offer")])  # fmt: skip
async def test_an_error_of_the_engine_itself_ends_no_readers_in_waiting(
    owner: type[Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any step of it may be wrong once: who waits is told, at the deadline at the latest."""
    genuine = getattr(owner, method)
    for calls in range(12):
        fuse = Fuse(lambda: AssertionError("a fault of our own"))

        def faulty(*arguments: Any, fuse: Fuse = fuse, **named: Any) -> Any:
            fuse.passed()
            return genuine(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, faulty)
            building = world("clock", Fuse(Panic))
            fuse.arm(calls)
            budgets = (None, 5, 5)
            builds = [building.build(KEYS, strict=False, deadline_seconds=b) for b in budgets]
            ended = await asyncio.wait_for(asyncio.gather(*builds, return_exceptions=True), 50)
        assert all(isinstance(each, (Snapshot, Exception)) for each in ended)
        if not fuse.blown:
            return
        await asyncio.sleep(50)
        again = await asyncio.wait_for(building.build(KEYS, strict=False), 50)
        assert len(again) == len(KEYS)
        await building.aclose()


@pytest.mark.expects_leaks  # the fault is told to the loop
@pytest.mark.parametrize("wrong, after", [("it does nothing", 5.25), ("it fails", 5.0)])
async def test_a_deadline_ends_its_reader_whatever_the_engine_makes_of_it(
    wrong: str, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strike(*_: Any) -> None:
        if wrong == "it fails":
            raise AssertionError("a fault of our own")

    monkeypatch.setattr(SingleFlight, "strike", strike)
    building = builder(Single("b", fetch=latency(50)))
    other = await begun(building.build([key("b")]))
    with taking(after, within=0.01):
        snapshot = await building.build([key("b")], strict=False, deadline_seconds=5)
    assert list(snapshot.errors) == [key("b")]
    assert (await other).complete


@pytest.mark.expects_leaks  # the fault is told to the loop
@pytest.mark.parametrize(
    "owner, method", [(SourceFailure, "of"), (CallLog, "ended"), (CallLog, "over")]
)
async def test_an_error_that_cannot_be_kept_ends_its_key(
    owner: type[Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in dealing with an error must not lose the key that the error is of."""

    def unreadable(*told: Any) -> None:
        if any(isinstance(each, Exception) for each in told):
            raise AssertionError("a fault of our own")

    building = builder(
        Single("first", "x", fetch=down, priority=2), Single("second", "x", priority=1)
    )
    monkeypatch.setattr(owner, method, unreadable)
    snapshot = await asyncio.wait_for(building.build([key("x")], trace=True), 50)
    assert snapshot[key("x")].source == "second"


@pytest.mark.parametrize("answer", [None, 5, FreshnessPolicy], ids=repr)
async def test_a_key_whose_policy_is_none_has_failed_and_is_not_left_out(answer: Any) -> None:
    policies: Any = Answering(answer)
    building = builder(Batch("base"), default_policy=None, policy_resolver=policies)
    snapshot = await building.build(BASES, strict=False)
    assert list(snapshot.errors) == BASES
    assert "freshness policy: TypeError" in str(snapshot.errors[BASES[0]])
    async with building.session() as session:
        assert list((await session.resolve(BASES, strict=False)).errors) == BASES


@pytest.mark.parametrize("plug", ["clock", "policy", "authority"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_ends_programs_reaches_it_from_any_plug(plug: str) -> None:
    """An interrupt strikes wherever the program is: in whichever call of a plug."""

    async def act(building: SnapshotBuilder, fuse: Fuse) -> bool:
        for _ in range(2):
            await building.build(KEYS, strict=False)
        await building.wait_for_refreshes()
        await settle()
        return fuse.blown

    for calls in range(MOST_CALLS):
        error = (KeyboardInterrupt, SystemExit)[calls % 2]
        fuse, loop = Fuse(error), VirtualLoop()
        building = world(plug, fuse)
        fuse.arm(calls)
        with contextlib.suppress(error):
            blown = run_virtual(act(building, fuse), loop=loop, leaks_allowed=True)
            assert not blown, f"call {calls} of the {plug} was swallowed"
            break
    else:
        raise AssertionError("more calls than were tried")
    gc.collect()  # what the program has broken off


class Illegible(Exception):
    """Lets nobody ask anything, not even what kind of error it is."""

    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


def illegible(*asked: Any) -> Any:
    """Raise for whatever is asked, unless that is about one of the other keys."""
    if asked[0] not in BASES[1:]:
        raise Illegible("x")


class Supports(Batch):
    """Cannot say whether it has a key."""

    def supports(self, key: ResourceKey) -> bool:
        return illegible(key) is None


class Sink:
    """A sink and a tracer that can take nothing."""

    coalestra_non_blocking = True
    emit = increment = observe = begin = enter = end = joined = staticmethod(
        lambda *facts, **_: illegible(*facts)
    )


SERVED_BY_RULE = PolicyResolver(SERVED_STALE, dynamic=illegible)
RANKED_BY_RULE = AuthorityPolicyResolver(dynamic=illegible)
TRIED_BY_RULE = ResiliencePolicyResolver(dynamic=illegible)


@pytest.mark.parametrize("source, settings, values", [
    (Supports("base"), {}, 2),
    (Derived("base", needs=lambda key: illegible(key) or ()), {}, 2),
    (Batch("base"), {"policy_resolver": SERVED_BY_RULE}, 2),
    (Batch("base"), {"authority_resolver": RANKED_BY_RULE}, 2),
    (Batch("base"), {"resilience_resolver": TRIED_BY_RULE}, 0),
    (Batch("base"), {"metrics": Sink(), "events": Sink()}, 3),
    (Batch("base"), {"tracer": Sink()}, 3),
], ids=["supports", "needs", "policy", "authority", "resilience", "sinks", "tracer"])  # fmt: skip
async def test_an_error_that_cannot_be_asked_anything_fails_no_more_than_any_other(
    source: Any, settings: dict[str, Any], values: int
) -> None:
    """Neither other keys of the build, nor all of it; and the key that fails says what it was."""
    building = builder(source, **{"default_policy": None, **settings})
    snapshot = await building.build(BASES, strict=False)
    assert len(snapshot) == values
    told = [str(error) for error in snapshot.errors.values()]
    assert all("Illegible(x" in each for each in told), told
