"""Closing ends everything, in bounded time and once; a builder outlives its event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
import types
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

import pytest

from coalestra import (
    CallableSource,
    CircuitBreakerPolicy,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    ObservabilityShutdownTimeoutError,
    PayloadCopyShutdownTimeoutError,
    RefreshMode,
    ResourceKey,
    SnapshotBuilder,
    SnapshotBuildError,
    SnapshotSession,
    SourceResiliencePolicy,
    SourceTimeoutError,
    SourceUnavailableError,
)
from coalestra.concurrency import pace
from coalestra.orchestration import singleflight
from coalestra.orchestration.flights import Work
from tests.contracts.caches import SingleKeyCache
from tests.orchestration.scripted import LASTING, ONCE, Batch, Single, builder, key
from tests.orchestration.stock import Stock
from tests.support import Gate, ManualClock, ThreadGate, begun, drop, no_leaks, run_virtual, settle
from tests.support.elsewhere import in_a_child, needs_fork
from tests.support.running import without_collector

pytestmark = pytest.mark.concurrency

K = key("k")
SWR = FreshnessPolicy(5.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)


async def test_what_has_a_state_says_in_a_line_how_it_stands() -> None:
    """It is what a debugger shows of the inside."""
    building = builder(Single("k"), cache=SingleKeyCache(), trace=True)
    session = building.session(snapshot_id="here")
    await session.resolve([K])
    unit, flights = session._unit, building._engine.flights
    parts = flights.parts
    told = [
        *(unit, unit.pins[K], unit.work.trace, parts.chains, parts.chains.links[0]),
        *(parts.tracing, flights.reads, flights.writes),
    ]
    assert [repr(each) for each in told] == [
        "<UnitOfWork here pins=1>",
        f"<Reading {K} from_cache=False stale=False>",
        "<WorkTrace session here keys=1>",
        "<Chains k entries=1>",
        "<Link k single>",
        "<Tracing rate=1.0 tracer=None kept=1>",
        "<CacheReads open=0>",
        "<CacheWrites waiting=0 slow=False>",
    ]


# Closing


async def test_a_closed_builder_refuses_every_call() -> None:
    building = builder(Single("k"))
    assert not building.closed
    await building.aclose()
    assert building.closed
    with pytest.raises(RuntimeError, match="closed"):
        await building.build([K])
    with pytest.raises(RuntimeError, match="closed"):
        building.session()
    with pytest.raises(RuntimeError, match="closed"):
        await building.publisher.publish(K, 1, source="s")
    with pytest.raises(RuntimeError, match="closed"):
        async with building:
            pass
    assert "closed" in repr(building)
    assert (await building.health_snapshot()).closed


async def closed_over_a_stuck_thread() -> tuple[ThreadGate, SnapshotBuilder, asyncio.Task[Any]]:
    """A gate at which a thread waits for a source, its closed builder, and who reads from it."""
    gate = ThreadGate()
    source = CallableSource(
        name="stuck",
        priority=1,
        supports=lambda key: True,
        fetcher=lambda key, context: gate.pass_(),
    )
    building = builder(source)
    reading = await begun(building.build([K]))
    with pytest.raises(SourceTimeoutError, match="stuck"):
        await building.aclose(copy_shutdown_timeout_seconds=1)
    return gate, building, reading


async def test_a_source_thread_that_cannot_be_ended_is_named_in_the_error_and_in_health() -> None:
    gate, building, reading = await closed_over_a_stuck_thread()
    assert (await building.health_snapshot()).unfinished_source_calls == {"stuck": 1}
    with pytest.raises(RuntimeError):
        await reading
    gate.open()
    await settle()


@pytest.mark.expects_leaks  # the thread, which nothing can end
async def test_after_closing_nobody_waits_for_a_thread_without_end() -> None:
    """Else a program could not end that has cancelled all tasks at once, and waits for them."""
    gate, _, reading = await closed_over_a_stuck_thread()
    await asyncio.gather(reading, return_exceptions=True)
    await settle()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gate.open()


def test_a_program_that_leaves_a_builder_open_ends_though_a_thread_does_not() -> None:
    """As it does on Ctrl-C: ``asyncio.run`` cancels all tasks that are left, and waits for them."""
    gate = ThreadGate()
    stuck = CallableSource(
        name="stuck", priority=1, supports=lambda _: True, fetcher=lambda key, _: gate.pass_()
    )

    async def program() -> asyncio.Task[Any]:
        reading = asyncio.ensure_future(builder(stuck).build([K]))
        await asyncio.to_thread(gate.wait_arrived)
        reading.cancel()
        await asyncio.wait([reading])
        # That a reader has left is no reason yet for the slot of the thread to be free.
        (worker,) = asyncio.all_tasks() - {asyncio.current_task()}
        return worker

    worker = asyncio.run(program())
    assert worker.done()
    gate.open()


# Every stage runs, and the first error is raised


class Parts:
    """Writes down who was closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def part(self, name: str, error: BaseException | None = None, *, plain: bool = False) -> Any:
        record = self

        class Source(Single):
            if plain:

                def close(self) -> None:
                    record.end(name, error)
            else:

                async def aclose(self) -> None:
                    record.end(name, error)

        return Source(name)

    def end(self, name: str, error: BaseException | None) -> None:
        self.closed.append(name)
        if error is not None:
            raise error


@pytest.mark.parametrize("second, raised", [(OSError, ValueError), (SystemExit, SystemExit)])
async def test_managed_parts_are_all_closed_and_the_first_error_is_raised_or_what_ends_the_program(
    second: type[BaseException], raised: type[BaseException]
) -> None:
    parts = Parts()
    sources = [
        parts.part("a", ValueError("first")),
        parts.part("b", plain=True),
        parts.part("c", second("second"), plain=True),
        parts.part("d"),
    ]
    building = builder(*sources, manage_lifecycle=True)
    with pytest.raises(raised):
        await building.aclose()
    assert parts.closed == ["a", "b", "c", "d"]


class BlockingSink:
    """An event sink whose worker is held at a gate."""

    def __init__(self) -> None:
        self.gate = ThreadGate()

    def emit(self, event_type: str, **payload: Any) -> None:
        self.gate.pass_()


async def test_a_stuck_copy_and_a_stuck_sink_hinder_no_later_stage_and_the_copy_is_told() -> None:
    parts, sink, copying = Parts(), BlockingSink(), ThreadGate()
    armed = False

    def copier(value: Any) -> Any:
        if armed:
            copying.pass_()
        return value

    building = builder(
        parts.part("k"), events=sink, manage_lifecycle=True, payload_copier=copier,
        run_payload_copies_in_thread=True,
    )  # fmt: skip
    await building.build([K])
    armed = True
    reading = await begun(building.build([K]))
    with pytest.raises(PayloadCopyShutdownTimeoutError):
        await building.aclose(
            copy_shutdown_timeout_seconds=1, observability_shutdown_timeout_seconds=0
        )
    assert parts.closed == ["k"]
    health = await building.health_snapshot()
    assert health.observability_shutdown_incomplete
    assert health.payload_copy_shutdown_incomplete
    copying.open()
    sink.gate.open()
    await building.wait_for_background_shutdown()
    health = await building.health_snapshot()
    assert not health.observability_shutdown_incomplete
    assert not health.payload_copy_shutdown_incomplete
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_stuck_sink_alone_is_told_with_what_it_still_holds() -> None:
    sink = BlockingSink()
    building = builder(Single("k"), events=sink)
    await building.build([K])
    with pytest.raises(ObservabilityShutdownTimeoutError) as caught:
        await building.aclose(observability_shutdown_timeout_seconds=0)
    assert set(caught.value.pending_components) == {"events"}
    assert caught.value.pending_records == sum(caught.value.pending_components.values())
    sink.gate.open()
    await building.wait_for_observability_shutdown()
    health = await building.health_snapshot()
    assert (health.observability_pending, health.observability_shutdown_timeout_count) == (0, 1)


@pytest.mark.parametrize("drain", [True, False])
async def test_closing_delivers_what_waits_in_buffers_or_discards_it(drain: bool) -> None:
    class Sink:
        def __init__(self) -> None:
            self.gate = ThreadGate()
            self.seen: list[str] = []

        def emit(self, event_type: str, **payload: Any) -> None:
            self.gate.pass_()
            self.seen.append(event_type)

    sink = Sink()
    building = builder(Single("k"), events=sink, observability_drain_on_shutdown=drain)
    await building.build([K])
    await building.build([K])
    await asyncio.to_thread(sink.gate.wait_arrived)
    closing = await begun(building.aclose())
    sink.gate.open()
    await closing
    assert (sink.seen.count("snapshot_built") == 2) is drain


# Managed parts


class Closable:
    """Counts how often it is closed, and where."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def close(self) -> None:
        self.threads.append(threading.get_ident())


class ClosableCache(SingleKeyCache, Closable):
    def __init__(self) -> None:
        SingleKeyCache.__init__(self)
        Closable.__init__(self)


class ClosableSink(Closable):
    """Both sinks at once."""

    coalestra_non_blocking = True

    def emit(self, event_type: str, **payload: Any) -> None:
        """Forget it."""

    def increment(self, metric: str, value: int = 1, **labels: Any) -> None:
        """Forget it."""

    def observe(self, metric: str, value: float, **labels: Any) -> None:
        """Forget it."""


class ClosableSource(Single, Closable):
    def __init__(self, name: str) -> None:
        Single.__init__(self, name)
        Closable.__init__(self)


@pytest.mark.parametrize("managed", [True, False])
async def test_parts_are_closed_once_each_and_off_the_loop_if_managed(managed: bool) -> None:
    source, cache, sink = ClosableSource("k"), ClosableCache(), ClosableSink()
    building = builder(source, cache=cache, events=sink, metrics=sink, manage_lifecycle=managed)
    await building.build([K])
    await building.aclose()
    for part in (source, cache, sink):
        assert len(part.threads) == managed
        assert threading.get_ident() not in part.threads


async def test_aclose_goes_before_close_and_a_part_without_either_is_left_alone() -> None:
    calls: list[str] = []

    class Both(Single):
        async def aclose(self) -> None:
            calls.append("aclose")

        def close(self) -> None:
            calls.append("close")

    class Later(Single):
        async def close(self) -> None:
            calls.append("async close")

    class Plain(Single):
        def aclose(self) -> None:
            calls.append("plain aclose")

    class Generating(Single):
        @types.coroutine
        def aclose(self) -> Generator[Any, Any, None]:
            yield
            calls.append("generating aclose")

    parts = Both("k"), Later("l"), Plain("p"), Single("m"), Generating("g")
    building = builder(*parts, manage_lifecycle=True)
    await building.aclose()
    assert calls == ["aclose", "async close", "plain aclose", "generating aclose"]


# From one event loop to the next


def made(*sources: Any, **settings: Any) -> SnapshotBuilder:
    settings.setdefault("default_policy", LASTING)
    settings.setdefault("clock", ManualClock())
    return SnapshotBuilder(sources, **settings)


def reading(building: SnapshotBuilder) -> Callable[[], Coroutine[Any, Any, Any]]:
    """The work of several readers of the builder."""

    async def read() -> None:
        await asyncio.gather(*(building.build([key("k", str(n)), K]) for n in range(3)))

    return read


class Hanging(Single):
    """Hangs for ever until it is `healed`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, fetch=self._fetch)
        self.healed = False

    async def _fetch(self, key: ResourceKey, context: FetchContext) -> str:
        if not self.healed:
            await asyncio.Event().wait()
        return "fine"


@pytest.mark.parametrize("kind", ["run", "dropped"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_capacity_and_flights_left_over_from_an_ended_loop_are_free_again(kind: str) -> None:
    source = Hanging("k")
    building = made(source, max_concurrency=2, source_concurrency={"k": 1})
    left_on_a_loop(reading(building), kind=kind)
    source.healed = True

    async def read() -> Any:
        snapshot = await asyncio.wait_for(building.build([K, key("k", "1")]), 60)
        await no_leaks(building)
        return snapshot.value(K)

    assert run_virtual(read()) == "fine"
    asyncio.run(building.aclose())


@needs_fork
def test_a_child_forked_while_work_is_under_way_uses_the_builder_on_a_loop_of_its_own() -> None:
    """That of its parent goes on elsewhere, though it is never closed here."""
    source = Hanging("k")
    building = made(source, max_concurrency=1)

    async def read() -> None:
        source.healed = True
        await asyncio.wait_for(building.build([K]), 60)
        await no_leaks(building)
        await building.aclose()

    async def fork() -> None:
        reader = await begun(building.build([K]))
        in_a_child(lambda: asyncio.run(read()))
        reader.cancel()

    asyncio.run(fork())
    asyncio.run(building.aclose())


@pytest.mark.parametrize("kind", ["run", "dropped"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_custom_cache_that_hung_on_the_first_loop_works_on_the_next(kind: str) -> None:
    class Slow(SingleKeyCache):
        healed = False

        async def _travel(self, call: str) -> None:
            if not self.healed:
                await asyncio.Event().wait()

    cache = Slow()
    building = made(Single("k"), cache=cache, max_pending_tasks=1)
    left_on_a_loop(reading(building), kind=kind)
    cache.healed = True

    async def read() -> Any:
        snapshot = await asyncio.wait_for(building.build([K, key("k", "1")]), 60)
        await building.publisher.publish(K, "event", source="s", force=True)
        await no_leaks(building)
        return snapshot.value(key("k", "1"))

    assert run_virtual(read()) == "1"
    asyncio.run(building.aclose())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_answer_whose_copying_was_dropped_with_its_loop_is_no_failure_of_its_source() -> None:
    """The collector ends what the loop has left, when the builder has long gone on."""
    gate, metrics = ThreadGate(), InMemoryMetrics()

    class Payload:
        def __deepcopy__(self, memo: object) -> Payload:
            gate.pass_()
            return self

    source = Batch("k", answer=lambda _: Payload())
    building = made(source, metrics=metrics, run_payload_copies_in_thread=True)
    left_on_a_loop(reading(building), steps=50)
    gate.wait_arrived()
    gate.open()

    async def read() -> None:
        await building.build([K])
        gc.collect()
        await no_leaks(building)
        await building.aclose()

    run_virtual(read())
    assert not metrics.counter("source_fetch_total", source="k", status="failure")


@pytest.mark.parametrize("kind", ["run", "dropped"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_refreshes_left_over_from_the_first_loop_do_not_block_later_ones(kind: str) -> None:
    clock = ManualClock()
    source = Hanging("k")
    source.healed = True
    building = made(source, clock=clock, default_policy=SWR)

    async def read() -> bool:
        stale = (await building.build([K]))[K].stale
        for _ in range(20):
            await asyncio.sleep(0)
        return stale

    assert not asyncio.run(read())
    clock.advance(6)
    source.healed = False
    if kind == "run":
        assert asyncio.run(read())
    else:
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(read())
        drop(loop)
    source.healed = True

    async def refreshed() -> bool:
        first = await building.build([K])
        assert first[K].stale
        assert first[K].metadata["refresh_scheduled"]
        await building.wait_for_refreshes()
        return (await building.build([K]))[K].stale

    assert not run_virtual(refreshed())
    asyncio.run(building.aclose())


@pytest.mark.parametrize("kind", ["run", "dropped"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_open_circuits_are_remembered_on_the_next_loop_and_probes_are_not_lost(kind: str) -> None:
    clock = ManualClock()
    stock = Stock("k", {"k": SourceUnavailableError("down")})
    stock.resilience_policy = SourceResiliencePolicy(
        retry=ONCE.retry,
        circuit=CircuitBreakerPolicy(failure_threshold=1, recovery_timeout_seconds=10),
    )
    building = made(stock, clock=clock)

    async def read() -> Any:
        return (await building.build([K])).value(K)

    with pytest.raises(SnapshotBuildError, match="down"):
        asyncio.run(read())
    with pytest.raises(SnapshotBuildError, match="CircuitOpenError"):
        asyncio.run(read())
    clock.advance(11)
    gate = Gate()
    stock.before = gate.pass_
    left = left_on_a_loop(read, kind=kind)
    assert gate.arrived == 1
    stock.before = None
    stock.change(k="up")
    with pytest.raises(SnapshotBuildError, match="may be probed in 10 s"):
        asyncio.run(read())
    clock.advance(11)
    assert asyncio.run(read()) == "up"
    assert left
    asyncio.run(building.aclose())


def left_on_a_loop(
    work: Callable[[], Coroutine[Any, Any, Any]], *, kind: str = "dropped", steps: int = 20
) -> list[asyncio.Task[Any]]:
    """Begin work on an event loop that ends in the midst of it; return the task in a list."""

    async def begin() -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work())
        for _ in range(steps):
            await asyncio.sleep(0)
        assert not task.done()
        return task

    if kind == "run":
        return [asyncio.run(begin())]
    loop = asyncio.new_event_loop()
    left = [loop.run_until_complete(begin())]
    drop(loop)
    return left


@pytest.mark.parametrize("call", ["look", "resolve", "revalidate"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_session_whose_call_was_left_on_the_last_loop_goes_on_on_the_next(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Hanging("k")
    source.healed = True
    building = made(source, max_pending_tasks=1)
    session = asyncio.run(opened(building))
    source.healed = False
    calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "look": lambda: session.resolve([key("k", f"many {number}") for number in range(50)]),
        "resolve": lambda: session.resolve([key("k", "1")]),
        "revalidate": lambda: session.revalidate([K], force_refresh=True),
    }
    with monkeypatch.context() as patch:
        patch.setattr(pace, "SLICE_SECONDS", -0.5)  # a turn for each key
        patch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
        patch.setattr(singleflight, "_KEYS_PER_STEP", 1)
        left = left_on_a_loop(calls[call])
    source.healed = True

    async def go_on() -> None:
        await session.resolve([key("k", "2")])
        await session.revalidate([K], force_refresh=True)

    run_virtual(go_on())
    assert left
    asyncio.run(building.aclose())


@without_collector()
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_the_last_loop_has_left_may_be_collected_while_a_session_goes_on_on_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was in the midst of letting keys go on to the next source, so that none was asked yet."""

    async def fail(k: ResourceKey, context: FetchContext) -> int:
        await asyncio.sleep(0)
        left.clear()
        gc.collect()
        raise SourceUnavailableError("down")

    async def serve(k: ResourceKey, context: FetchContext) -> int:
        if not going_on:
            await asyncio.sleep(1_000)
        return 1

    left: list[Any] = []
    keys = [key("k", str(number)) for number in range(3)]
    for steps in range(20):
        going_on = False
        sources = Single("first", "k", fetch=fail), Single("second", "k", fetch=serve, priority=1)
        building = made(*sources, max_pending_tasks=1)
        session = building.session()
        with monkeypatch.context() as patch:
            patch.setattr(pace, "SLICE_SECONDS", -0.5)  # a turn for each key
            patch.setattr(singleflight, "_STEPS_BETWEEN_LOOKS", 1)
            patch.setattr(singleflight, "_KEYS_PER_STEP", 1)
            resolve = partial(session.resolve, keys)
            left += left_on_a_loop(resolve, steps=steps)
        going_on = True
        snapshot = run_virtual(resolve())
        assert [value.source for value in snapshot.values()] == ["second"] * 3
        asyncio.run(building.aclose())


async def opened(building: SnapshotBuilder) -> SnapshotSession:
    """Return a session that has resolved K."""
    session = building.session()
    await session.resolve([K])
    return session


def in_another_loop(work: Callable[[], Coroutine[Any, Any, Any]]) -> BaseException | None:
    """Run work on a loop of its own in another thread; return what it raised."""
    errors: list[BaseException | None] = []

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as error:
            errors.append(error)
        else:
            errors.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors[0]


@pytest.mark.parametrize("call", ["build", "session", "publish"])
async def test_a_second_loop_is_refused_while_the_first_has_work_under_way(call: str) -> None:
    gate = Gate()
    building = builder(Stock("k", {"k": 1}, before=gate.pass_), clock=ManualClock())
    reading = await begun(building.build([K]), gate)

    async def intrude() -> None:
        if call == "build":
            await building.build([K])
        elif call == "session":
            await building.session().resolve([key("k", "other")])
        else:
            await building.publisher.publish(K, 1, source="s")

    error = in_another_loop(intrude)
    assert isinstance(error, RuntimeError)
    assert "event loop" in str(error)
    assert "SyncSnapshotBuilder" in str(error)
    gate.open()
    assert (await reading).value(K) == 1


@pytest.mark.parametrize(
    "where, step, refused",
    [(Work, "settle_on", "first"), (singleflight.SingleFlight, "forget", "second")],
)
def test_of_two_loops_that_come_at_once_one_is_refused(
    where: type[Any], step: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second comes as the first enters the builder, or has, and cannot be seen in it yet."""
    gate, refusals = ThreadGate(), []

    async def before() -> None:
        if threading.current_thread() is second:
            gate.pass_()

    building = made(Stock("k", {"k": 1}, before=before))

    def build(name: str) -> None:
        try:
            asyncio.run(building.build([key("k", name)]))
        except RuntimeError as error:
            refusals.append((name, "another event loop" in str(error)))

    second = threading.Thread(target=build, args=["second"])
    build("at first")
    plain = getattr(where, step)

    def struck(*arguments: Any) -> None:
        plain(*arguments)
        if second.ident is None:
            second.start()
            if refused == "first":
                gate.wait_arrived()
            else:
                second.join()

    monkeypatch.setattr(where, step, struck)
    build("first")
    gate.open()
    second.join()
    assert refusals == [(refused, True)]


@pytest.mark.parametrize("kind", ["run", "dropped"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_closing_that_was_cut_short_with_its_loop_is_done_by_the_next_call(kind: str) -> None:
    """Also of what comes after the part that it was cut short at; and no error comes of that."""

    class Slow(Single):
        ends = 0
        gate: Gate | None = None

        async def aclose(self) -> None:
            self.ends += 1
            if self.gate is not None:
                await self.gate.pass_()
            gc.collect()  # what the first loop has left ends here

    source, last = Slow("k"), Slow("last")
    building = made(source, last, manage_lifecycle=True)

    async def cut_short() -> None:
        source.gate = Gate()
        await building.aclose()

    left_on_a_loop(cut_short, kind=kind)
    source.gate = None
    asyncio.run(building.aclose())
    assert (source.ends, last.ends) == (2, 1)


def test_closing_that_was_left_on_a_loop_that_stands_still_is_done_by_the_next_call() -> None:
    """A loop that was interrupted may never be closed, nor run again."""
    building = made(Single("k"))
    abandoned = asyncio.new_event_loop()
    closing = abandoned.create_task(building.aclose())
    abandoned.call_soon(abandoned.stop)
    abandoned.run_forever()
    assert building.closed
    assert not closing.done()
    run_virtual(building.aclose())
    abandoned.run_until_complete(closing)
    abandoned.close()


def test_a_build_dropped_outside_its_loop_harms_no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)  # time has passed since anything was begun
    building = builder(Single("x"))
    loop = asyncio.new_event_loop()

    async def begin() -> Coroutine[Any, Any, Any]:
        left = building.build([key("x", "left")])
        left.send(None)
        return left

    loop.run_until_complete(begin()).close()
    further = asyncio.wait_for(building.build([key("x", "next")]), 5)
    (value,) = loop.run_until_complete(further).values()
    assert value.value == "next"
    loop.run_until_complete(building.aclose())
    drop(loop)


async def test_an_interrupt_at_a_slice_harms_no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may come in any line."""

    def interrupted(self: pace.Pace) -> bool:
        monkeypatch.setattr(pace.Pace, "begin", begin)
        raise KeyboardInterrupt

    building = builder(Single("x"))
    begin, first = pace.Pace.begin, building.build([key("x")])
    monkeypatch.setattr(pace.Pace, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        await first
    (value,) = (await asyncio.wait_for(building.build([key("x", "next")]), 5)).values()
    assert value.value == "next"
