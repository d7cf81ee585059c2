"""Whatever overlaps in whatever order: nobody hangs, nothing leaks, nothing old or mixed is served.

Each seed makes a world of its own and lets a few actors loose on it, on a loop that runs the tasks
of each step in random order. What must hold is checked after every single answer.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import pytest

from coalestra import (
    AsyncMemoryCache,
    Obtained,
    PayloadCopySubsystemClosedError,
    RequestOutcome,
    ResourceAbsentError,
    ResourceAcceptanceRule,
    ResourceKey,
    Snapshot,
    SnapshotAcceptanceError,
    SnapshotAcceptancePolicy,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
)
from coalestra.concurrency import pace
from coalestra.concurrency.threads import Job, WorkerThreads
from coalestra.core import values
from coalestra.orchestration import (
    calls,
    deliveries,
    foreign_cache,
    readings,
    session,
    singleflight,
)
from tests.simulation.world import PAIR, World, facts, spoil
from tests.support import ShuffledLoop, no_leaks, run_virtual

T = TypeVar("T")

BLOCKS = 10


@pytest.fixture(autouse=True)
def _without_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no slice end early and use no thread, so that a seed means the same run every time."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", math.inf)
    monkeypatch.setattr(WorkerThreads, "_hand_over", work_later)


def work_later(threads: WorkerThreads, job: Job[Any]) -> None:
    """Stand in for a thread, which takes a turn of the loop, or a few."""
    loop = asyncio.get_running_loop()

    def work(turns: int) -> None:
        if turns:
            loop.call_soon(work, turns - 1)
        else:
            job.make()
            job.end()

    loop.call_soon(work, sum(threads.busy.values()) % 4)


@pytest.fixture
def worlds(pytestconfig: pytest.Config) -> int:
    """How many worlds to live through, as asked for with ``--worlds``."""
    return int(pytestconfig.getoption("--worlds"))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_schedule_breaks_a_law(block: int, worlds: int) -> None:
    run_block(block, worlds)


@pytest.mark.parametrize("block", range(BLOCKS))
def test_no_schedule_breaks_a_law_when_others_run_at_every_pause(
    block: int, worlds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loop over many things that may give others a turn does so after each single thing."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    for module, at_a_time in (
        (calls, "PORTION"), (deliveries, "PORTION"), (singleflight, "_STEPS_BETWEEN_LOOKS"),
        (calls, "_CALLS_BETWEEN_LOOKS"), (calls, "_WORKERS_AT_ONCE"),
        (singleflight, "_KEYS_PER_STEP"), (singleflight, "_KEYS_AT_ONCE"),
        (deliveries, "_KEYS_AT_ONCE"), (singleflight, "_WAITERS_PER_STEP"),
        (deliveries, "_KEYS_BETWEEN_LOOKS"), (foreign_cache, "_ANSWERS_BETWEEN_LOOKS"),
        (session, "_ERRORS_BETWEEN_LOOKS"), (readings, "_PER_SLICE"), (values, "_PER_SLICE"),
    ):  # fmt: skip
        monkeypatch.setattr(module, at_a_time, 1)
    run_block(block, worlds)


def run_block(block: int, worlds: int) -> None:
    """Live through the worlds of a block; the blocks share all seeds below ``worlds``."""
    for seed in range(block, worlds, BLOCKS):
        random.seed(seed)  # of which the waits between attempts come
        try:
            run_virtual(live(seed), loop=ShuffledLoop(seed))
        except BaseException as error:
            raise AssertionError(f"seed {seed} breaks a law") from error


async def live(seed: int) -> None:
    """Let actors build, converse, publish and invalidate; cancel some; look what is left."""
    world = World(seed)
    chance = world.chance
    actors = [asyncio.ensure_future(act(world)) for _ in range(chance.randint(2, 6))]
    while not all(actor.done() for actor in actors):
        await asyncio.sleep(chance.choice((0, 0.05, 0.5, 2)))
        if not world.calm and chance.random() < 0.1:
            chance.choice(actors).cancel()
        if world.wild and chance.random() < 0.3:
            world.sabotage()
        if world.jumps and chance.random() < 0.3:
            world.jump()
        if chance.random() < 0.3:
            world.spoil_what_sources_keep()
        if world.closes and chance.random() < 0.2:
            world.closed = True
            await world.builder.aclose(copy_shutdown_timeout_seconds=20)  # retries may take that
    for outcome in await asyncio.gather(*actors, return_exceptions=True):
        if world.closed and isinstance(outcome, (RuntimeError, PayloadCopySubsystemClosedError)):
            continue
        if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
            raise outcome
    for builder in () if world.closed else world.builders:
        await builder.wait_for_refreshes()
    await asyncio.sleep(20)
    for builder in (*world.builders, world.aside):
        await no_leaks(builder)
    check_counts(world)
    if not world.wild:
        assert not getattr(world.builder.cache, "leased", None)
    assert not world.calls.faults, world.calls.faults
    for builder in (*world.builders, world.aside):
        await builder.aclose()
        health = await builder.health_snapshot()
        assert health.observability_failure_count == 0
    assert not world.spans.open


async def act(world: World) -> None:
    """Do a few things one after the other."""
    for _ in range(world.chance.randint(2, 6)):
        await world.pause()
        await world.chance.choice(DEEDS)(world)


async def build(world: World) -> None:
    """Build once, by a deadline at times."""
    floor = world.known()
    keys = wanted(world)
    budget = some_budget(world)
    answer = world.builder.build(keys, strict=False, deadline_seconds=budget)
    check(world, keys, await in_time(world, answer, budget), floor, budget=budget)


async def ask(world: World) -> None:
    """Ask for several things at once, some of which may be missing."""
    floor = world.known()
    requests = [
        SnapshotRequest(required=keys[:some], optional=keys[some:])
        for keys in (wanted(world) for _ in range(world.chance.randint(1, 4)))
        for some in [world.chance.randint(0, len(keys))]
    ]
    budget = some_budget(world)
    most = world.chance.choice((None, 1, 2))
    results = world.builder.try_requests(requests, deadline_seconds=budget, max_concurrency=most)
    for result in await in_time(world, results, budget):
        assert result.snapshot is not None
        check(world, result.request.keys, result.snapshot, floor, budget=budget)
        missing = any(k not in result.snapshot for k in result.request.required)
        assert (result.outcome is RequestOutcome.REJECTED) == missing
        assert list(result.errors) == [k for k in result.request.keys if k not in result.snapshot]


async def flock(world: World) -> None:
    """Build one key from many tasks, of which some leave."""
    floor = world.known()
    keys = world.chance.sample(world.keys, 1)

    async def come() -> None:
        await world.pause()
        check(world, keys, await world.builder.build(keys, strict=False), floor)

    tasks = [asyncio.ensure_future(come()) for _ in range(5)]
    try:
        await world.pause()
        if not world.calm:
            world.chance.choice(tasks).cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for task in tasks:
            task.cancel()
    for each in ended:
        if isinstance(each, BaseException) and not isinstance(each, asyncio.CancelledError):
            raise each


async def build_both(world: World) -> None:
    """Look at what changes together."""
    if world.chance.random() < 0.5:
        snapshot = await world.builder.build(PAIR, strict=False)
    else:
        session = world.builder.session()
        await session.resolve(world.chance.sample(world.bases, 1), strict=False)
        snapshot = await session.resolve(PAIR, strict=False)
        world.told[snapshot.snapshot_id] = snapshot.diagnostics
    numbers = [snapshot[k].value for k in PAIR if k in snapshot]
    cache = world.builder.cache
    if isinstance(cache, AsyncMemoryCache) and cache.max_entries is None and not world.wild:
        assert len(numbers) in (0, 2), "one of a pair that is published together"
        assert len(set(numbers)) <= 1, "a pair that is published together is torn"


def some_budget(world: World) -> float | None:
    """Return how long an answer may take: as long as it likes, or no time at all."""
    if world.calm or world.chance.random() < 0.6:
        return None
    return world.chance.choice((1e-9, 0.02, world.chance.uniform(0.01, 4)))


async def in_time(world: World, answer: Coroutine[Any, Any, T], budget: float | None) -> T:
    """Return the answer, which must take no longer than its budget and what held the loop."""
    loop = asyncio.get_running_loop()
    began, held = loop.time(), world.held_seconds
    found = await answer
    held = world.held_seconds - held
    assert budget is None or loop.time() - began <= budget + held + 1e-3
    return found


async def converse(world: World) -> None:
    """Resolve in stages, and revalidate at times; what is pinned stays until then."""
    floor = world.known()
    async with world.builder.session() as session:
        pinned: dict[ResourceKey, str] = {}
        asked: dict[ResourceKey, None] = {}
        for _ in range(3):
            keys = wanted(world)
            asked.update(dict.fromkeys(keys))
            if world.chance.random() < 0.3:
                result = await session.try_request(SnapshotRequest(optional=keys))
                snapshot = result.require_accepted()
            else:
                snapshot = await session.resolve(keys, strict=False)
            check(world, asked, snapshot, floor)
            found = versions(snapshot)
            assert {k: found[k] for k in pinned} == pinned
            pinned = found
            await world.pause()
        if pinned and world.chance.random() < 0.5:
            await revalidate(world, session, world.chance.choice(list(pinned)), asked, floor)
        last = session.snapshot()  # others may have waited since for what was begun for this one
        world.told[last.snapshot_id] = last.diagnostics


async def converse_together(world: World) -> None:
    """Use one session from several tasks at once, which see one value of each key at a time."""
    floor = world.known()

    async def talk() -> None:
        for _ in range(2):
            await world.pause()
            known = list(session.snapshot())
            if known and world.chance.random() < 0.3:
                keys, forced = world.chance.sample(known, 1), world.chance.random() < 0.5
                with world.calls.changing(*(world.bases if forced else ())):
                    snapshot = await session.revalidate(keys, strict=False, force_refresh=forced)
            else:
                snapshot = await session.resolve(wanted(world), strict=False)
            check(world, list(snapshot), snapshot, floor, budget=budget)

    budget = some_budget(world)
    async with world.builder.session(deadline_seconds=budget) as session:
        for outcome in await asyncio.gather(*(talk() for _ in range(3)), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        snapshot = session.snapshot()
        check(world, list(snapshot), snapshot, floor, budget=budget)


async def meddle(world: World) -> None:
    """Let something be said of a derived key, or be forgotten."""
    await world.meddle()


async def revalidate(
    world: World,
    session: Any,
    k: ResourceKey,
    asked: Iterable[ResourceKey],
    floor: Mapping[ResourceKey, int],
) -> None:
    """Replace one value and what was derived from it, or nothing; the base is as new as can be.

    What failed before is not tried again.
    """
    now, before = world.floor.get(k, 0), versions(session.snapshot())
    forced = world.chance.random() < 0.5
    most = world.chance.choice((5_000, 0.05, 1.0))
    rule = ResourceAcceptanceRule(max_age_seconds=most)
    terms: dict[str, Any] = {
        "acceptance_policy": SnapshotAcceptancePolicy(resource_rules={k: rule})
    }
    if world.chance.random() < 0.3:
        terms = {"consistency_policy": SnapshotConsistencyPolicy(max_observation_skew_seconds=most)}
    failed: SnapshotBuildError | None = None
    try:
        with world.calls.changing(*(world.bases if forced else ())):
            snapshot = await session.revalidate([k], force_refresh=forced, **terms)
    except SnapshotBuildError as error:
        failed, snapshot = error, session.snapshot()
    if failed is None:
        assert snapshot[k].age_seconds <= most or "acceptance_policy" not in terms
        check(world, asked, snapshot, {k: now} if k in world.truth else {}, floor)
    else:
        assert versions(snapshot) == before
        world.told[snapshot.snapshot_id] = snapshot.diagnostics
        policies = SnapshotAcceptanceError, SnapshotConsistencyError
        assert not world.calm or world.brief or world.vanishes or isinstance(failed, policies)


async def change_both(world: World) -> None:
    """Let two keys change together."""
    await world.change_both()


async def change(world: World) -> None:
    """Let a base key change, or several."""
    count = world.chance.choice((1, 1, len(world.lively)))
    await asyncio.gather(*map(world.change, world.chance.sample(world.lively, count)))


async def change_quietly(world: World) -> None:
    """Let a base key change without news of it, as most things do."""
    world.truth[world.chance.choice(world.lively)] += 1


def wanted(world: World) -> list[ResourceKey]:
    return world.chance.sample(world.keys, world.chance.randint(1, 9))


def check(
    world: World,
    asked: Iterable[ResourceKey],
    snapshot: Snapshot,
    floor: Mapping[ResourceKey, int],
    failed_since: Mapping[ResourceKey, int] | None = None,
    budget: float | None = None,
) -> None:
    """Hold a snapshot against the laws, given what was known for sure before it was asked for.

    `failed_since` is the same for what failed, where that was asked for earlier; `budget` is how
    long it was allowed to take.
    """
    assert list(snapshot) == [k for k in asked if k in snapshot], "in the order asked for"
    for k, error in snapshot.errors.items():
        assert "Cycle" not in repr(error)
        told = " ".join(map(str, getattr(error, "failures", [error])))
        if budget is None:
            assert "the deadline" not in told, f"{k} failed with a deadline of others"
            assert "nobody waits" not in told, f"{k} failed as others had left"
        assert world.wild or "was lost" not in told, f"{k} failed though it was being asked for"
        if isinstance(error, ResourceAbsentError):
            since = floor if failed_since is None else failed_since
            assert world.may_be_absent(k, since), f"{k} is said not to exist"
            continue
        if world.vanishes and "ResourceAbsent" in str(error):
            continue  # one of its sources has denied it, another had nothing fresh
        # Where values are fresh for a second only, slow answers come stale, and circuits open.
        late = {"CircuitOpenError", "StaleSourceData"}
        assert not world.calm or (world.brief and late.intersection(causes(error))), error
    least = {str(k): value for k, value in floor.items()}
    check_trace(snapshot)
    check_diagnostics(snapshot)
    world.told[snapshot.snapshot_id] = snapshot.diagnostics
    seen: dict[str, int] = {}
    for k, value in snapshot.items():
        for name, number in facts(value.value):
            assert seen.setdefault(name, number) == number, f"{name} is mixed in {k}"
            assert number >= least.get(name, 0), f"{name} in {k} is older than what was known"
            if not value.stale:
                world.seen[name] = max(number, world.seen.get(name, 0))
        for needed, version in value.dependency_versions.items():
            if needed in snapshot:
                assert snapshot[needed].version == version, f"{k} is not made of {needed}"
                assert value.value[str(needed)] == snapshot.value(needed)
    now = world.clock.now()
    for k, value in snapshot.items():
        if not world.jumps:
            assert 0 <= value.age_seconds <= max(0.0, now - value.observed_at), k
            ttl = world.builder.policy_resolver.resolve(k).ttl_seconds
            assert value.inherits_freshness or value.stale == (value.age_seconds > ttl), k
        spoil(value.value)


def versions(snapshot: Snapshot) -> dict[ResourceKey, str]:
    """Return which revision of each key a snapshot has."""
    return {k: value.version for k, value in snapshot.items()}


def causes(error: BaseException) -> Iterator[str]:
    """Yield the types of what has made a key fail, on whatever level below it."""
    for failure in getattr(error, "failures", ()):
        yield failure.error_type
        for below in getattr(failure.exception, "errors", {}).values():
            yield from causes(below)


def check_diagnostics(snapshot: Snapshot) -> None:
    """What is counted adds up."""
    counted = snapshot.diagnostics
    by_source = counted.source_calls_by_source
    assert counted.source_calls == sum(by_source.values())
    assert counted.batch_calls == by_source.get("batch", 0)
    assert counted.derived_calls == by_source.get("derived", 0)
    assert counted.resolved_resources == len(snapshot)
    assert counted.failed_resources == len(snapshot.errors)
    stale = sum(value.stale for value in snapshot.values())
    assert counted.stale_values == stale, (counted.stale_values, stale, counted)


def check_counts(world: World) -> None:
    """All calls were told of, and each was counted for one unit of work."""
    calls = world.calls.count
    for name in ("single", "batch", "derived"):
        labels = {"resource_namespace": "test", "resource_name": name}
        scheduled, *ended = (
            world.metrics.counter("resource_refresh_total", status=status, **labels)
            for status in ("scheduled", "success", "failure", "absent", "cancelled")
        )
        assert scheduled == sum(ended), "each refresh ends once"
    counted = sum(told.source_calls + told.retries for told in world.told.values())
    assert counted <= calls, (counted, calls)
    if not world.nests:
        if world.events is not None:
            assert world.events.count["source_call_started"] == calls
        if world.calm and not (world.refreshes or world.closed or world.vanishes):
            assert counted == calls, (counted, calls)


def check_trace(snapshot: Snapshot) -> None:
    """What a trace tells is what the snapshot holds, and happened while it was made."""
    trace = snapshot.trace
    if trace is None:
        return
    for k, value in snapshot.items():
        if k not in trace.keys:  # another version was asked for, by another task of the session
            assert trace.omitted_keys
            continue
        found = trace.keys[k]
        assert found.obtained is not Obtained.FAILED, k
        assert (found.version, found.source) == (value.version, value.source), k
        assert {each.key: each.version for each in found.rests_on} == value.dependency_versions
        assert found.error is None or found.obtained is Obtained.FALLBACK
    for k in snapshot.errors.keys() - snapshot.keys():
        if "cop" in str(snapshot.errors[k]):
            continue  # it has been found, but there was no time left to copy it
        assert trace.keys[k].obtained is Obtained.FAILED, k
        assert trace.keys[k].error_type == type(snapshot.errors[k]).__name__
    for found in trace.keys.values():
        assert 0 <= found.start <= found.end <= trace.duration_seconds
        for wait in found.waits:
            assert wait.start <= wait.end <= trace.duration_seconds
        for number in found.calls:
            call = trace.calls[number]
            assert call.start <= call.end <= trace.duration_seconds
            for attempt in call.attempts:
                assert call.start <= attempt.start <= attempt.end <= call.end


DEEDS = (
    build, build, build, flock, ask, ask, build_both, converse, converse_together,
    converse_together, meddle, change, change, change_both, change_quietly, change_quietly,
)  # fmt: skip
