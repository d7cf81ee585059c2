"""Deadlines, cancellations and closing leave nothing behind (8, 9, 10)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coalestra import (
    FetchContext,
    ResourceKey,
    SnapshotBuilder,
)
from coalestra.orchestration import singleflight
from tests.orchestration.scripted import Batch, Derived, Single, builder, echo, key, latency
from tests.support import Gate, LoopClock, cancel_at_every_await, no_leaks, settle

pytestmark = pytest.mark.concurrency

X = key("x", "1")


def mixed() -> SnapshotBuilder:
    """A builder with a source of each kind, each of which waits in the midst of its call."""

    async def wait() -> None:
        await asyncio.sleep(1)

    return builder(
        Single("single", fetch=latency(1)),
        Batch("batch", before=wait),
        Derived("derived", needs=lambda k: [key("single"), key("batch")], before=wait),
        max_concurrency=1,
    )


async def test_a_build_cancelled_at_any_await_leaves_nothing_behind() -> None:
    builders: list[SnapshotBuilder] = []

    def start() -> Any:
        builders.append(mixed())
        return builders[-1].build([key("derived"), key("single", "2"), key("batch", "3")])

    async def check() -> None:
        await no_leaks(builders[-1])

    assert await cancel_at_every_await(start, check) > 10


async def test_who_leaves_before_his_keys_were_looked_for_starts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """His turn comes late: of twenty others, who came before him, four have theirs in each step."""
    monkeypatch.setattr(singleflight, "SLICE_SECONDS", -1.0)
    source = Batch("many", "x", "y")
    building = builder(source)
    others = [
        asyncio.ensure_future(building.build([key("y", f"{who} {n}") for n in range(260)]))
        for who in range(20)
    ]
    await asyncio.sleep(0)
    leaving = asyncio.ensure_future(building.build([X]))
    for _ in range(2):
        await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait([leaving, *others])
    assert leaving.cancelled()
    assert sum(len(asked) for asked in source.calls) == 20 * 260
    await no_leaks(building)


async def test_an_abandoned_call_runs_on_to_the_last_deadline_and_no_longer() -> None:
    source = Single("x", fetch=latency(100))
    building = builder(source)
    owner = asyncio.ensure_future(building.build([X], deadline_seconds=10))
    await asyncio.sleep(1)
    owner.cancel()
    await settle()
    assert (await building.capacity_snapshot())["__global__"].in_use == 1
    await asyncio.sleep(9)
    await no_leaks(building)


async def test_a_source_that_ignores_its_cancellation_delays_nobody() -> None:
    release = Gate()

    async def stubborn(k: ResourceKey, context: FetchContext) -> str:
        while True:
            try:
                await release.pass_()
                return "late"
            except asyncio.CancelledError:
                continue

    first = Single("first", "x", fetch=stubborn, priority=20, timeout=2)
    second = Single("second", "x", fetch=echo)
    building = builder(first, second)
    loop = asyncio.get_running_loop()
    began = loop.time()
    snapshot = await building.build([X])
    assert loop.time() - began == pytest.approx(2)
    assert snapshot[X].source == "second"
    assert (await building.capacity_snapshot())["__global__"].in_use == 1
    release.open()
    await no_leaks(building)


async def _cancels_itself(k: ResourceKey, context: FetchContext) -> str:
    raise asyncio.CancelledError


async def _cancels_itself_later(k: ResourceKey, context: FetchContext) -> str:
    await asyncio.sleep(1)
    raise asyncio.CancelledError


def _raises_at_once(k: ResourceKey, context: FetchContext) -> Any:
    raise LookupError("before the first await")


def _returns_no_awaitable(k: ResourceKey, context: FetchContext) -> Any:
    return 42


@pytest.mark.parametrize(
    "misbehave",
    [_cancels_itself, _cancels_itself_later, _raises_at_once, _returns_no_awaitable],
)
async def test_a_misbehaving_source_fails_its_keys_like_any_other_error(
    misbehave: Callable[..., Any],
) -> None:
    class Odd(Single):
        def fetch(self, key: ResourceKey, context: FetchContext) -> Any:
            return misbehave(key, context)

    building = builder(Odd("first", "x", priority=20), Single("second", "x"))
    snapshot = await building.build([X, key("x", "2")])
    assert {value.source for value in snapshot.values()} == {"second"}
    await no_leaks(building)


class Stopped(LoopClock):
    """A clock that can be stopped: it tells no time then."""

    stopped = False

    def monotonic(self) -> float:
        if self.stopped:
            raise LookupError("stopped")
        return super().monotonic()


async def test_who_joins_and_finds_that_no_clock_goes_keeps_nothing_under_way() -> None:
    clock = Stopped()
    building = builder(Single("a", fetch=latency(1_000)), clock=clock)
    waiting = [asyncio.ensure_future(building.build([key("a")])) for _ in range(2)]
    await settle()
    clock.stopped = True
    with pytest.raises(LookupError):
        await building.build([key("a")])
    clock.stopped = False
    for task in waiting:
        task.cancel()
    await no_leaks(building)
    await building.aclose()
