"""Closing is bounded, happens once, and what goes wrong in it replaces nothing that is worse."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

from coalestra import (
    FreshnessPolicy,
    ObservabilityShutdownTimeoutError,
    RefreshMode,
    RetryPolicy,
    SnapshotBuilder,
    SourceResiliencePolicy,
    SourceTimeoutError,
)
from coalestra.orchestration.closing import insist
from tests.contracts.caches import BatchCache, LeasingCache, SingleKeyCache
from tests.orchestration.scripted import Derived, Single, builder, key, tuned
from tests.orchestration.stock import Stock
from tests.support import Gate, Panic, ThreadGate, VirtualLoop, begun, run_virtual, settle, taking
from tests.support.running import no_more_threads

K = key("k")
SWR = FreshnessPolicy(5.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)


class FileSink:
    """A sink that must not be used once it is closed; each delivery waits at a gate."""

    def __init__(self) -> None:
        self.gate = ThreadGate()
        self.lines: list[str] = []
        self.closed_after: list[int] = []

    def write(self, line: str) -> None:
        self.gate.pass_()
        assert not self.closed_after
        self.lines.append(line)

    def emit(self, event_type: str, **payload: Any) -> None:
        self.write(event_type)

    def increment(self, metric: str, value: int = 1, **labels: Any) -> None:
        self.write(metric)

    def observe(self, metric: str, value: float, **labels: Any) -> None:
        self.write(metric)

    def close(self) -> None:
        self.closed_after.append(len(self.lines))


class LoopSink(FileSink):
    """The same, closed on the loop."""

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.close()


class Parts(Single):
    """A source that counts how often it is closed."""

    ends = 0

    async def aclose(self) -> None:
        self.ends += 1


class Hanging(Single):
    """A source whose closing never ends."""

    async def aclose(self) -> None:
        await asyncio.Event().wait()


# A sink is closed after its last record -----------------------------------------------------------


@pytest.mark.parametrize("kind", [FileSink, LoopSink])
@pytest.mark.parametrize("both", [True, False])
async def test_a_managed_sink_is_closed_after_all_records(kind: type[FileSink], both: bool) -> None:
    sink, source = kind(), Parts("k")
    metrics = {"metrics": sink} if both else {}
    building = builder(source, events=sink, manage_lifecycle=True, **metrics)
    await building.build([K])
    with pytest.raises(ObservabilityShutdownTimeoutError):
        await building.aclose(observability_shutdown_timeout_seconds=0)
    assert sink.closed_after == []
    assert source.ends == 1
    sink.gate.open()
    await building.wait_for_observability_shutdown()
    assert sink.closed_after == [len(sink.lines)]
    assert "snapshot_built" in sink.lines


# Every wait has an end ----------------------------------------------------------------------------


async def hung_refresh(**settings: Any) -> SnapshotBuilder:
    """A builder whose refresh of K waits at a gate that nobody opens."""
    gate = Gate(opened=True)
    building = builder(Stock("k", {"k": 1}, before=gate.pass_), default_policy=SWR, **settings)
    await building.build([K])
    await asyncio.sleep(6)
    gate.close()
    await building.build([K])
    await gate.wait_arrived(2)
    return building


async def test_a_refresh_that_hangs_is_waited_for_cancelled_and_named() -> None:
    source = Parts("s")
    building = await hung_refresh()
    with taking(3):
        with pytest.raises(SourceTimeoutError, match=r"background refreshes .* 3 s .*: test:k;"):
            await building.aclose(copy_shutdown_timeout_seconds=3)
    assert (await building.health_snapshot()).background_refreshes == 0
    await building.aclose()
    assert source.ends == 0


async def test_a_managed_part_whose_closing_hangs_hinders_no_other_and_is_named() -> None:
    class Blocking(Single):
        gate = ThreadGate()

        def close(self) -> None:
            self.gate.pass_()

    last = Parts("l")
    building = builder(Hanging("k"), Blocking("b"), last, manage_lifecycle=True)
    with pytest.raises(TimeoutError, match=r"within 5 s, got .*Hanging.aclose that"):
        await building.aclose()
    assert last.ends == 1
    Blocking.gate.open()
    await settle()


@pytest.mark.parametrize("plain", [True, False], ids=["close", "aclose"])
@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, SystemError])
async def test_what_a_managed_part_raises_as_it_is_closed_hinders_no_other(
    error: type[BaseException], plain: bool
) -> None:
    """If it cancels itself, that is no cancellation of who closes the builder."""

    class Plain(Single):
        def close(self) -> None:
            raise error

    class Awaited(Single):
        async def aclose(self) -> None:
            raise error

    last = Parts("l")
    building = builder((Plain if plain else Awaited)("k"), last, manage_lifecycle=True)
    (told,) = await asyncio.gather(asyncio.wait_for(building.aclose(), 100), return_exceptions=True)
    assert last.ends == 1
    if error is asyncio.CancelledError:
        assert isinstance(told, RuntimeError)
        assert "close was cancelled before it had ended" in str(told)
    await asyncio.wait_for(building.aclose(), 100)
    assert building.closed


async def test_a_time_for_all_of_it_bounds_every_stage() -> None:
    sink = FileSink()
    building = await hung_refresh(events=sink, manage_lifecycle=True)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(SourceTimeoutError):
        await building.aclose(shutdown_timeout_seconds=1)
    assert loop.time() - began <= 1.5
    sink.gate.open()
    await building.wait_for_observability_shutdown()


async def test_a_time_for_all_of_it_is_no_time_for_each_managed_part() -> None:
    last = Parts("l")
    parts = [Hanging(f"k{number}") for number in range(5)]
    building = builder(*parts, last, manage_lifecycle=True)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(TimeoutError):
        await building.aclose(shutdown_timeout_seconds=1)
    assert loop.time() - began <= 2
    assert last.ends == 1


async def test_without_threads_closing_does_its_work_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blocking(Single):
        ends = 0

        def close(self) -> None:
            self.ends += 1

    no_more_threads(monkeypatch)
    sink, source = FileSink(), Blocking("k")
    sink.gate.open()
    building = builder(source, events=sink, manage_lifecycle=True)
    for number in range(20):
        await building.build([key("k", str(number))])
    await building.aclose()
    assert sink.lines.count("snapshot_built") == 20
    assert (source.ends, len(sink.closed_after)) == (1, 1)


# Cancellation -------------------------------------------------------------------------------------


def cancelling_everything_at(step: int, *, also_waiters: bool) -> None:
    """Close a builder on a loop where every task is cancelled at one step; then close it again."""

    async def program() -> None:
        sink, source = FileSink(), Parts("k")
        sink.gate.open()
        building = builder(source, events=sink, manage_lifecycle=True)
        await building.build([K])
        me = asyncio.current_task()
        closings = [asyncio.ensure_future(building.aclose()) for _ in range(2)]
        spared = {me} if also_waiters else {me, *closings}

        def cancel_all() -> None:
            for task in asyncio.all_tasks(loop) - spared:
                task.cancel()

        loop: Any = asyncio.get_running_loop()
        withdraw = loop.interrupt(step, cancel_all)
        outcomes = await asyncio.gather(*closings, return_exceptions=True)
        withdraw()
        if not also_waiters:
            assert outcomes == [None, None]
        await building.aclose()
        assert building.closed
        assert source.ends >= 1
        assert sink.closed_after == [len(sink.lines)]
        assert "snapshot_built" in sink.lines
        health = await building.health_snapshot()
        assert health.observability_pending == 0

    run_virtual(program())


@pytest.mark.parametrize("also_waiters", [True, False])
def test_closing_is_done_whatever_internal_task_is_cancelled_and_when(also_waiters: bool) -> None:
    """As `asyncio.run` and handlers of SIGTERM do, also before the first step of a task."""
    for step in range(1, 25):
        cancelling_everything_at(step, also_waiters=also_waiters)


async def test_who_closes_at_the_same_time_is_told_the_same_and_who_closes_later_nothing() -> None:
    sink = FileSink()
    building = builder(Single("k"), events=sink)
    await building.build([K])
    outcomes = await asyncio.gather(
        *(building.aclose(observability_shutdown_timeout_seconds=0) for _ in range(3)),
        return_exceptions=True,
    )
    assert [type(each) for each in outcomes] == [ObservabilityShutdownTimeoutError] * 3
    await building.aclose()
    sink.gate.open()
    await building.wait_for_observability_shutdown()


# What is raised already wins ----------------------------------------------------------------------


def late_sink() -> tuple[FileSink, SnapshotBuilder]:
    """A builder whose closing fails, as its sink takes nothing."""
    sink = FileSink()
    building = builder(Single("k"), events=sink, observability_shutdown_timeout_seconds=0.1)
    return sink, building


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt, SystemExit, GeneratorExit, None])
async def test_an_error_of_the_block_wins_over_one_of_closing_which_is_logged(
    kind: type[BaseException] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Without one the error of closing is raised."""
    sink, building = late_sink()
    raised = kind or ObservabilityShutdownTimeoutError
    with caplog.at_level(logging.WARNING, "coalestra"), pytest.raises(raised):
        async with building:
            await building.build([K])
            if kind is not None:
                raise kind
    if kind is not None:
        assert f"closing failed after {kind.__name__}: observability must be" in caplog.text
    sink.gate.open()
    await building.wait_for_observability_shutdown()


@pytest.mark.parametrize("end", ["cancelled", "timed out"])
async def test_a_cancellation_wins_over_an_error_of_closing(end: str) -> None:
    sink, building = late_sink()

    async def block() -> None:
        async with building:
            await building.build([K])
            await asyncio.Event().wait()

    if end == "cancelled":
        task = asyncio.ensure_future(block())
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    else:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(block(), 1)
    assert building.closed
    sink.gate.open()
    await building.wait_for_observability_shutdown()


@pytest.mark.parametrize("end", [LookupError, asyncio.CancelledError])
async def test_an_end_of_the_block_wins_over_what_is_no_ordinary_exception_of_a_managed_part(
    end: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Panicking(Single):
        def close(self) -> None:
            raise Panic("cannot close")

    with pytest.raises(end):
        async with builder(Panicking("k"), manage_lifecycle=True):
            raise end
    assert f"closing failed after {end.__name__}: cannot close" in caplog.text
    with pytest.raises(Panic):
        async with builder(Panicking("k"), manage_lifecycle=True):
            pass


@pytest.mark.parametrize("at", ["cache_access_total", "singleflight_join_total"])
async def test_a_sink_that_closes_the_builder_in_a_step_leaves_nothing_under_way(at: str) -> None:
    """As an eager task does, whose first step is taken where it is made."""

    class Closing(FileSink):
        coalestra_non_blocking = True

        def write(self, line: str) -> None:
            if line == at and not building.closed:
                building.aclose().send(None)

    base, top = key("base"), key("top")
    building = builder(
        Derived("top", needs=lambda _: [base]), Single("base"), events=Closing(), metrics=Closing()
    )
    builds = (building.build(keys) for keys in ([base, top], [top, base, K]))
    outcomes = await asyncio.gather(*builds, return_exceptions=True)
    assert all(isinstance(each, RuntimeError) for each in outcomes), outcomes
    await building.aclose()
    assert building.health_snapshot_nowait().singleflight_in_flight == 0


@pytest.mark.parametrize("by", ["predicate", "sink"])
async def test_who_closes_the_builder_as_a_call_is_to_be_tried_again_leaves_no_timer(
    by: str,
) -> None:
    class Closing(FileSink):
        coalestra_non_blocking = True

        def write(self, line: str) -> None:
            if by == "sink" and line == "source_call_retried":
                building.aclose().send(None)

    def is_passing(error: Exception) -> bool:
        if by == "predicate":
            building.aclose().send(None)
        return True

    retry = RetryPolicy(2, 50.0, max_delay_seconds=50.0, retry_on=is_passing)
    source = Stock("k", {"k": ConnectionError("down")})
    tuned(source, resilience_policy=SourceResiliencePolicy(retry))
    building = builder(source, events=Closing())
    with pytest.raises(RuntimeError):
        await building.build([K])
    await building.aclose()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    assert not [*loop.live_timers()]


# What health tells --------------------------------------------------------------------------------


async def test_a_stage_that_is_cut_off_again_and_again_is_given_up_in_the_end() -> None:
    attempts = 0

    async def cut_off() -> None:
        nonlocal attempts
        attempts += 1
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await insist(cut_off)
    assert attempts == 10


# Calls to a cache ---------------------------------------------------------------------------------


class Untidy(BatchCache):
    """A cache whose reads never answer, and take their time to end once they are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    async def _travel(self, call: str) -> None:
        try:
            await Gate().pass_()
        finally:
            await self.gate.pass_()


class Asking(LeasingCache):
    """Takes its time to tidy up when nobody wants to hear more of leases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    async def lease_many(self, *keys: Any, **more: Any) -> AsyncGenerator[Mapping[Any, Any], None]:
        try:
            async for part in super().lease_many(*keys, **more):
                yield part
        finally:
            await self.gate.pass_()


@pytest.mark.parametrize("kind", [Untidy, Asking])
async def test_closing_waits_for_calls_to_a_cache_that_tidy_up(kind: type[Untidy | Asking]) -> None:
    building = builder(Single("k"), cache=(cache := kind()))
    reading = await begun(building.build([K]))
    reading.cancel()
    closing = await begun(building.aclose())
    assert cache.gate.waiting
    cache.gate.open()
    await closing
    assert not cache.gate.waiting
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_calls_to_a_cache_that_do_not_end_are_named() -> None:
    building = builder(Single("k"), cache=(cache := Untidy()))
    reading = await begun(building.build([K]))
    reading.cancel()
    with pytest.raises(SourceTimeoutError, match=r"after 3 s: 'cache call' \(1\)"):
        await building.aclose(copy_shutdown_timeout_seconds=3)
    assert (await building.health_snapshot()).unfinished_source_calls == {"cache call": 1}
    cache.gate.open()


async def test_a_source_and_a_cache_that_do_not_end_take_no_longer_than_one() -> None:
    gate, cache = Gate(), Untidy()

    async def stubborn(*_: Any) -> Any:
        while not gate.opened:
            with contextlib.suppress(asyncio.CancelledError):
                await gate.pass_()

    building = builder(Single("k", fetch=stubborn), cache=cache)
    reading = await begun(building.build([K]))
    await asyncio.sleep(2)  # which is more than the cache may take
    now = asyncio.get_running_loop().time
    began = now()
    with pytest.raises(SourceTimeoutError, match="'k'"):
        await building.aclose(copy_shutdown_timeout_seconds=3)
    assert now() - began < 4
    gate.open()
    cache.gate.open()
    await asyncio.gather(reading, return_exceptions=True)


class Unstoring(LeasingCache):
    """Never answers when something is to be stored."""

    async def fulfil_many(self, *_: Any, **__: Any) -> Any:
        await Gate().pass_()


async def test_the_lease_of_what_closing_has_not_the_time_to_store_is_given_back() -> None:
    building = builder(Single("k"), cache=(cache := Unstoring()))
    assert len(await building.build([K])) == 1
    assert len(cache.leased) == 1
    await building.aclose(copy_shutdown_timeout_seconds=0.5)
    assert cache.leased == {}


@pytest.mark.parametrize("asked", ["publish", "invalidate"])
async def test_a_managed_cache_is_closed_after_what_an_application_asked_of_it(asked: str) -> None:
    gate, ended = Gate(), list[str]()

    class Managed(SingleKeyCache):
        timeout_seconds = 60.0

        async def _travel(self, call: str) -> None:
            if call != "get":
                await gate.pass_()
                ended.append(asked)

        async def aclose(self) -> None:
            ended.append("aclose")

    building = builder(Single("k"), cache=Managed(), manage_lifecycle=True)
    publisher = building.publisher
    asking = publisher.publish(K, 1, source="s") if asked == "publish" else publisher.invalidate(K)
    task = await begun(asking, gate)
    closing = asyncio.ensure_future(building.aclose())
    await settle()
    gate.open()
    await asyncio.gather(task, closing)
    assert ended == [asked, "aclose"]
