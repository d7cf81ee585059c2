"""Every key of a call is settled, once: whatever a source raises, and whatever ends its worker."""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import contextvars
import gc
import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from coalestra import (
    CallableSource,
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    RefreshMode,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SnapshotBuildError,
    SourcePayload,
    SourceResiliencePolicy,
)
from coalestra.concurrency import pace
from coalestra.concurrency.deadline import CutOff
from coalestra.orchestration import calls
from coalestra.orchestration.calls import Call, Dispatch
from coalestra.orchestration.flights import FlightBoard
from coalestra.orchestration.singleflight import Agenda, Engine, SingleFlight
from tests.contracts.caches import BatchAtomicCache
from tests.orchestration.scripted import (
    Batch,
    Derived,
    Single,
    builder,
    held_at,
    key,
    latency,
    tuned,
)
from tests.support import (
    Gate,
    Panic,
    ThreadGate,
    VirtualLoop,
    begun,
    drop,
    no_leaks,
    run_virtual,
    settle,
    taking,
)
from tests.support.running import nothing_collected, without_collector

pytestmark = pytest.mark.concurrency

BAD, GOOD, NEXT = key("bad"), key("good"), key("next")


def group(error: BaseException) -> BaseException:
    """Wrap an error as a task group does; before Python 3.11 there are none."""
    kind = getattr(builtins, "BaseExceptionGroup", None)
    return error if kind is None else kind("several", [error])


ERRORS: dict[str, Callable[[], BaseException]] = {
    "a panic": lambda: Panic("x"), "a panic in a group": lambda: group(Panic("x")),
    "an outcome of pytest": lambda: pytest.fail.Exception("x"),
    "the end of a generator": GeneratorExit, "the end of an iteration": StopIteration,
    "the end of an asynchronous one": StopAsyncIteration, "a cancellation": asyncio.CancelledError,
    "an error": lambda: LookupError("x"),
}  # fmt: skip

Raise = Callable[[], Any]


class Awaiting:
    """An awaitable of a kind of its own, which fails when it is asked for its steps."""

    def __init__(self, fail: Raise) -> None:
        self.fail = fail

    def __await__(self) -> Iterator[Any]:
        self.fail()
        yield


class Steps:
    """One that can only be stepped on, and fails at the first or the second step."""

    def __init__(self, fail: Raise, after: int) -> None:
        self.fail = fail
        self.left = after

    def __await__(self) -> Iterator[Any]:
        return self

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> None:
        if not self.left:
            self.fail()
        self.left -= 1


class Lazy(Mapping[ResourceKey, Any]):
    """An answer that is worked out when it is looked at, which fails in one of its methods."""

    def __init__(self, fails: str, fail: Raise, more: bool = False) -> None:
        self.fails = fails
        self.fail = fail
        self.more = more

    def __getitem__(self, wanted: ResourceKey) -> Any:
        if self.fails == "__getitem__":
            self.fail()
        return 1

    def __len__(self) -> int:
        if self.fails == "__len__":
            self.fail()
        return 99 if self.more else 1

    def __iter__(self) -> Iterator[ResourceKey]:
        if self.fails == "__iter__":
            self.fail()
        yield BAD


class Proxy:
    """A payload whose every attribute fails, its class included."""

    def __init__(self, fail: Raise) -> None:
        object.__setattr__(self, "fail", fail)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, "fail")()


class Uncopyable:
    """What fails when it is copied."""

    def __init__(self, fail: Raise) -> None:
        self.fail = fail

    def __deepcopy__(self, _memo: object) -> Any:
        return self.fail()


def single(answer: Callable[[], Any]) -> Single:
    """A source of BAD that returns what `answer` makes, awaitable or not."""
    source = Single("bad", priority=20)
    given: Any = source
    given.fetch = lambda _key, _context: answer()
    return source


async def later(answer: Callable[[], Any]) -> Any:
    await asyncio.sleep(0)
    return answer()


async def at_once(answer: Callable[[], Any]) -> Any:
    return answer()


def batch(answer: Callable[[], Any]) -> Batch:
    source = Batch("bad", priority=20)
    given: Any = source
    given.fetch_many = lambda _keys, _context: later(answer)
    return source


def derived(dependencies: Callable[[], Any], derive: Callable[[], Any]) -> Derived:
    source = Derived("bad", needs=lambda _: [GOOD], priority=20)
    given: Any = source
    given.dependencies = lambda _key: dependencies()
    given.derive = lambda *_: later(derive)
    return source


def supporting(answer: Callable[[], Any]) -> Single:
    source = Single("bad", priority=20)
    given: Any = source
    given.supports = lambda wanted: answer() if wanted == BAD else False
    return source


class TimeoutFails(Single):
    """Its setting can be read while the builder is made, and no more."""

    def __init__(self, fail: Raise) -> None:
        self.fail: Raise | None = None
        super().__init__("bad", priority=20)
        self.fail = fail

    @property
    def timeout_seconds(self) -> float | None:
        if self.fail is not None and self.asked:
            self.fail()
        return None

    @timeout_seconds.setter
    def timeout_seconds(self, value: float | None) -> None:
        self.asked = False

    def supports(self, key: ResourceKey) -> bool:
        self.asked = True
        return super().supports(key)


PLACES: dict[str, Callable[[Raise], Any]] = {
    "fetch, before anything is awaited": single,
    "fetch, when first awaited": lambda fail: single(lambda: at_once(fail)),
    "fetch, later": lambda fail: single(lambda: later(fail)),
    "__await__": lambda fail: single(lambda: Awaiting(fail)),
    "the first step": lambda fail: single(lambda: Steps(fail, 0)),
    "the second step": lambda fail: single(lambda: Steps(fail, 1)),
    "fetch_many": batch,
    "the answer's __getitem__": lambda fail: batch(lambda: Lazy("__getitem__", fail)),
    "the answer's __len__": lambda fail: batch(lambda: Lazy("__len__", fail)),
    "the answer's __iter__": lambda fail: batch(lambda: Lazy("__iter__", fail, more=True)),
    "an attribute of the answer": lambda fail: batch(lambda: Proxy(fail)),
    "an attribute of the payload": lambda fail: single(lambda: later(lambda: Proxy(fail))),
    "the payload's copying": lambda fail: batch(lambda: {BAD: Uncopyable(fail)}),
    "the metadata's copying": lambda fail: single(
        lambda: later(lambda: SourcePayload(1, metadata={"x": Uncopyable(fail)}))
    ),
    "dependencies": lambda fail: derived(fail, lambda: 1),
    "derive": lambda fail: derived(lambda: [GOOD], fail),
    "supports": supporting,
    "timeout_seconds": TimeoutFails,
}


@pytest.mark.parametrize("place", PLACES)
async def test_what_a_source_raises_fails_its_key_and_no_chain(place: str) -> None:
    """The error names the source and what it raised; other keys and later builds are served."""
    for what, error in ERRORS.items():
        if "step" not in place or what != "the end of an iteration":  # so an awaitable ends
            await fails_its_key_and_no_chain(place, error)


async def fails_its_key_and_no_chain(place: str, make: Callable[[], BaseException]) -> None:
    def fail() -> Any:
        raise make()

    second = Single("second", "bad", "next", priority=5)
    building = builder(PLACES[place](fail), Single("good"), second)
    alone = builder(PLACES[place](fail), Single("good"))
    snapshot = await building.build([BAD, GOOD, NEXT])
    failed = await alone.build([BAD, GOOD], strict=False)
    assert set(snapshot) == {BAD, GOOD, NEXT}
    assert set(failed) == {GOOD}
    error = failed.errors[BAD]
    assert isinstance(error, ResourceResolutionError)
    (failure,) = error.failures
    assert failure.source == "bad"
    told = {type(each).__name__ for each in causes(failure.exception)}
    assert type(make()).__name__ in told, failure.format()
    for each in (building, alone):
        assert (await each.build([GOOD])).value(GOOD) == ""
        await no_leaks(each)
        await each.aclose()


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# What ends a program -----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["fetch, later", "fetch_many", "derive", "supports"])
def test_what_ends_the_program_reaches_it_after_every_key_has_been_settled(
    place: str, ending: type[BaseException]
) -> None:
    """The loop raises it; whoever runs the loop again finds the build done."""

    def fail() -> Any:
        raise ending("stop")

    building = builder(PLACES[place](fail), Single("good"), clock=None)
    several = [BAD, key("bad", "too"), key("bad", "as well")] if place == "fetch_many" else [BAD]
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(building.build([*several, GOOD], strict=False))
        with pytest.raises(ending, match="stop"):
            loop.run_until_complete(task)
        snapshot = loop.run_until_complete(task)
        assert set(snapshot) == {GOOD}
        assert ending.__name__ in str(snapshot.errors[BAD])
        loop.run_until_complete(building.aclose())
    finally:
        loop.close()


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_reaches_it_though_the_call_was_over(
    ending: type[BaseException],
) -> None:
    """Its source was given up at its timeout, and went on."""

    async def fetch(k: ResourceKey, _: FetchContext) -> int:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        raise ending("stop")

    building = builder(Single("bad", timeout=1, fetch=fetch))
    loop = VirtualLoop()
    try:
        with pytest.raises(ending, match="stop"):
            loop.run_until_complete(building.build([BAD], strict=False))
        loop.run_until_complete(building.aclose())
    finally:
        loop.close()


@pytest.mark.parametrize("struck", [(Call, "_circuits_need_not_know"), (SingleFlight, "_check")])
def test_an_interrupt_in_a_step_of_the_library_reaches_the_program_and_nobody_waits(
    struck: tuple[type[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C is one, where the loop leaves signals to Python: it may strike at any line."""
    building = builder(Batch("several", "good", "bad"))
    strikes: list[str] = []
    plain = getattr(*struck)

    def strike(*arguments: Any) -> Any:
        if not strikes and all(gather.readings for gather in arguments[1:]):
            strikes.append("Ctrl-C")
            raise KeyboardInterrupt
        return plain(*arguments) if callable(plain) else plain.fget(*arguments)

    loop = VirtualLoop()

    async def both() -> list[Snapshot]:
        session = building.session()
        return await asyncio.gather(*(session.resolve([k], strict=False) for k in (BAD, GOOD)))

    task = loop.create_task(both())
    monkeypatch.setattr(*struck, strike if callable(plain) else property(strike))
    try:
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        assert len(loop.run_until_complete(task)) == 2
        loop.run_until_complete(building.aclose())
    finally:
        loop.close()


def interrupted_within(functions: set[CodeType], at: int, work: Callable[[], object]) -> int:
    """Do some work, interrupted at the `at`-th place within some functions where Python may be.

    That is as it calls another one, and as that returns. Return how many such places there were.
    """
    places = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal places
        caller = frame.f_back
        ours = frame if event.startswith("c_") else caller
        if event != "c_call" and ours is not None and ours.f_code in functions:
            places += 1
            if places == at:
                raise KeyboardInterrupt

    with nothing_collected(), contextlib.suppress(KeyboardInterrupt):
        sys.setprofile(profile)
        try:
            work()
        finally:
            sys.setprofile(None)
    return places


@pytest.mark.parametrize(
    "struck",
    [
        FlightBoard.start,
        FlightBoard.hide,
        FlightBoard.land,
        FlightBoard.take_off,
        Call._deliver,
        Dispatch._flush_soon,
    ],
    ids=lambda each: str(each.__name__),
)
def test_an_interrupt_at_any_place_leaves_no_key_that_nobody_acquires(struck: FunctionType) -> None:
    keys = [key("single"), key("several", "a"), key("several", "b"), key("derived")]

    def world(at: int) -> int:
        derived = Derived("derived", needs=lambda _: keys[:2])
        building = builder(Single("single", fetch=latency(2)), Batch("several"), derived)
        loop = VirtualLoop()
        task = loop.create_task(building.build(keys, strict=False))

        async def work() -> None:
            await asyncio.sleep(1)
            await building.publisher.invalidate(keys[0])
            await asyncio.wait([task])

        async def rest() -> None:
            await asyncio.wait_for(task, 9)
            for k in keys:
                await asyncio.wait_for(building.build([k], strict=False), 9)
            await building.aclose()

        try:
            working = loop.create_task(work())
            places = interrupted_within(
                {struck.__code__}, at, lambda: loop.run_until_complete(working)
            )
            working.cancel()
            going = loop.create_task(rest())
            while not going.done():
                with contextlib.suppress(KeyboardInterrupt):  # as it reaches the program
                    loop.run_until_complete(going)
            going.result()
        finally:
            drop(loop)
        return places

    count = 1
    while count <= world(count):
        count += 1
    assert count > 2


def test_an_interrupt_as_a_builder_comes_to_a_loop_keeps_no_later_loop_out() -> None:
    def places(at: int) -> int:
        building = SnapshotBuilder([Single("k")])
        publish = partial(building.publisher.publish, key("k"), 1, source="s", force=True)
        reached = interrupted_within({Engine.attach.__code__}, at, lambda: asyncio.run(publish()))
        assert asyncio.run(publish()).published
        asyncio.run(building.aclose())
        return reached

    count = 1
    while count <= places(count):
        count += 1
    assert count > 2


def test_an_interrupt_as_a_turn_begins_takes_none_of_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    steps: list[str] = []
    agenda, loop = Agenda(lambda _, error: steps.append(str(error))), VirtualLoop()
    with monkeypatch.context() as patch:
        patch.setattr(pace.Pace, "begin", lambda _: False)  # so that they are left to the next turn
        patch.setattr(pace.Pace, "turn_over", interrupt)
        for step in "ab":
            loop.call_soon(agenda.add, steps.append, step)
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.sleep(1))
    loop.call_soon(agenda.add, steps.append, "c")
    loop.run_until_complete(asyncio.sleep(1))
    assert steps == ["a", "b", "c"]
    drop(loop)


# Workers that are cancelled ----------------------------------------------------------------------


def workers() -> list[asyncio.Task[Any]]:
    """The tasks of the library that call sources."""
    return [task for task in asyncio.all_tasks() if task.get_name().startswith("coalestra ")]


@pytest.mark.late_tasks
@pytest.mark.parametrize("limit", [1, 3])
async def test_a_worker_cancelled_unbegun_leaves_its_keys_to_another(limit: int) -> None:
    """Its coroutine never runs, so nothing may depend on that."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    source = Single("good")
    building = builder(source, max_pending_tasks=limit, max_concurrency=limit)
    wanted = [key("good", str(number)) for number in range(4)]
    calls_before: list[int] = []

    def strike() -> None:
        for worker in workers():
            worker.cancel()
        calls_before.append(len(source.calls))

    loop.interrupt_when(workers, strike)
    assert set(await building.build(wanted)) == set(wanted)
    assert calls_before == [0]
    assert await building.build([key("good", "more")])


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("kind", ["single", "batch", "derived", "copied in a thread"])
async def test_a_build_ends_whenever_its_workers_are_cancelled(kind: str, steps: int) -> None:
    """With a value or with an error, and what comes after it is served."""

    async def pause() -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    sources: list[Any] = [
        Single("good"),
        Batch("batch", before=pause),
        Derived("derived", needs=lambda _: [GOOD], before=pause),
    ]
    wanted = {"batch": key("batch"), "derived": key("derived")}.get(kind, GOOD)
    building = builder(*sources, run_payload_copies_in_thread=kind == "copied in a thread" or None)
    task = asyncio.ensure_future(building.build([wanted], strict=False))
    for _ in range(steps):
        await asyncio.sleep(0)
    for worker in workers():
        worker.cancel()
    snapshot = await task
    assert wanted in snapshot or "cancelled" in str(snapshot.errors[wanted])
    assert wanted in await building.build([wanted])


async def test_a_client_that_times_itself_out_holds_up_no_other_source() -> None:
    """Many cancel the task that they run in, and do not take that back."""

    async def fetch(_key: ResourceKey, _context: FetchContext) -> Any:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)
        raise TimeoutError

    building = builder(Single("slow", fetch=fetch), Single("good"))
    await building.build([key("slow")], strict=False)
    with taking(0):
        await building.build([GOOD])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_program_that_ends_in_the_middle_of_work_ends_quietly(
    steps: int,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`asyncio.run` cancels every task once; what was started then would be destroyed pending."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", 60.0)  # however slow the machine is
    monkeypatch.setattr(calls, "_QUIET_SECONDS", 60.0)
    refreshed = FreshnessPolicy(0.0, 1e9, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)

    async def fetch(_key: ResourceKey, _context: FetchContext) -> Any:
        for _ in range(100):
            await asyncio.sleep(0)
        return 1

    async def main() -> None:
        building = builder(
            Single("good", fetch=fetch, priority=20),
            Single("again", "good", priority=5, fetch=fetch), clock=None, default_policy=refreshed,
            max_pending_tasks=1, max_concurrency=2,
        )  # fmt: skip
        wanted = [key("good", str(number)) for number in range(5)]
        await building.build(wanted)
        await building.build(wanted)  # all are refreshed in the background now
        building_more = asyncio.ensure_future(building.build([key("good", "more")]))
        for _ in range(steps):
            await asyncio.sleep(0)
        assert not building_more.done()

    gc.collect()  # what other tests have left is not told of this program
    caplog.clear()
    recwarn.clear()
    with caplog.at_level(logging.ERROR, logger="asyncio"):
        asyncio.run(main())
        gc.collect()
    assert caplog.records == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="task groups come with Python 3.11")
@pytest.mark.parametrize("by", ["its timeout", "somebody else"])
async def test_a_swallowed_cancellation_does_not_meet_the_next_key(by: str) -> None:
    """A task group asks its task whether it was cancelled; the worker of the next key was not."""

    async def fetch(wanted: ResourceKey, _context: FetchContext) -> Any:
        if wanted == first:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1000)
            return 1
        return await _failing_group()

    source = Single("good", fetch=fetch, timeout=5.0 if by == "its timeout" else None)
    building = builder(source, max_pending_tasks=1)
    first, second = key("good", "first"), key("good", "second")
    task = await begun(building.build([first, second], strict=False))
    if by == "somebody else":
        for worker in workers():
            worker.cancel()
    assert (await task).value(second) == "caught ExceptionGroup"


async def test_a_worker_ended_in_a_call_leaves_no_waiter(monkeypatch: pytest.MonkeyPatch) -> None:
    """However that may come about: the loop tells the lane, and the lane the call."""

    async def broken(call: calls.Call, worker: calls.Worker, begun: object) -> None:
        raise asyncio.CancelledError

    building = builder(Single("good"), Batch("batch"))
    monkeypatch.setattr(calls.Call, "run", broken)
    lost = await building.build([GOOD, key("batch")], strict=False)
    assert {each: "was lost" in str(error) for each, error in lost.errors.items()} == {
        GOOD: True,
        key("batch"): True,
    }
    monkeypatch.undo()
    assert GOOD in await building.build([GOOD])


async def _failing_group() -> str:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("in a task group")

    library: Any = asyncio
    try:
        async with library.TaskGroup() as tasks:
            tasks.create_task(fail())
    except Exception as error:
        await asyncio.sleep(0)  # where a task that is asked to end would
        return f"caught {type(error).__name__}"
    return "nothing"


# Context variables -------------------------------------------------------------------------------


VARIABLE = contextvars.ContextVar("VARIABLE", default="unset")


async def test_a_call_sees_the_variables_of_its_build_and_no_others() -> None:
    """Neither those of another key, nor of the attempt before, nor of a question before."""
    seen: list[str] = []

    def leave_a_trace() -> None:
        seen.append(VARIABLE.get())
        VARIABLE.set("left behind")

    class Tracing(Single):
        def supports(self, key: ResourceKey) -> bool:
            leave_a_trace()
            return super().supports(key)

    class TracingDerived(Derived):
        def dependencies(self, key: ResourceKey) -> Any:
            leave_a_trace()
            return super().dependencies(key)

    async def fetch(wanted: ResourceKey, _context: FetchContext) -> Any:
        leave_a_trace()
        await asyncio.sleep(1)
        assert VARIABLE.get() == "left behind", "within one call they stay"
        if len(tracing.calls) == 1:
            raise ConnectionError("once")
        return 1

    async def pause() -> None:
        leave_a_trace()

    tracing = tuned(
        Tracing("single", fetch=fetch),
        resilience_policy=SourceResiliencePolicy(RetryPolicy(2, 1.0, jitter_ratio=0.0)),
    )
    deriving = TracingDerived("derived", needs=lambda _: [key("single", "0")], before=pause)
    building = builder(tracing, deriving, max_pending_tasks=1)
    wanted = [key("single", str(number)) for number in range(3)]
    VARIABLE.set("of the build")
    await building.build([*wanted, key("derived"), key("derived", "more")])
    assert Counter(seen) == {"of the build": 5 + 4 + 2 + 2}
    assert VARIABLE.get() == "of the build"


# The original error, and nothing else ------------------------------------------------------------


class Payload:
    """What a fetcher holds while it fails."""


@pytest.mark.parametrize("kind", ["a plain function", "a coroutine", "one that is late"])
def test_an_error_keeps_no_payload_alive_once_it_is_dropped(kind: str) -> None:
    """Without the collector: nothing of the library leads in a circle back to it."""
    alive: weakref.WeakSet[Payload] = weakref.WeakSet()
    go_on = threading.Event()

    def plain(_key: ResourceKey, _context: FetchContext) -> Any:
        payload = Payload()
        alive.add(payload)
        if kind == "one that is late":
            go_on.wait(10.0)
        raise LookupError("no price")

    async def awaited(_key: ResourceKey, _context: FetchContext) -> Any:
        await asyncio.sleep(0)
        return plain(_key, _context)

    async def main() -> None:
        source = CallableSource(
            name="s",
            priority=1,
            supports=lambda _: True,
            fetcher=awaited if kind == "a coroutine" else plain,
        )
        building = SnapshotBuilder([source], retry_policy=RetryPolicy(max_attempts=1))
        deadline = 0.05 if kind == "one that is late" else None
        with contextlib.suppress(SnapshotBuildError):
            await building.build([GOOD], deadline_seconds=deadline)
        go_on.set()
        for _ in range(2_000):  # on a busy machine the thread may take its time
            if not alive:
                break
            await asyncio.sleep(0.01)
        assert not alive
        await building.aclose()

    with without_collector():
        asyncio.run(main())


class Slow(Payload):
    """Takes a thread to be copied."""

    def __deepcopy__(self, _memo: object) -> Slow:
        return Slow()


async def waits(_key: ResourceKey, _context: FetchContext) -> Any:
    payload = Payload()
    await asyncio.sleep(100)
    return payload


async def left_alone(building: SnapshotBuilder) -> None:
    reading = asyncio.ensure_future(building.build([GOOD, key("waits")]))
    await asyncio.sleep(1)
    reading.cancel()
    await asyncio.wait([reading])


async def talk(building: SnapshotBuilder) -> None:
    async with building.session(metadata={"for": Payload()}) as session:
        await session.resolve([GOOD, key("derived")])
        await session.revalidate([GOOD], force_refresh=True)


async def renew(building: SnapshotBuilder) -> None:
    for _ in range(2):
        await building.build([GOOD, key("batch")], metadata={"for": Payload()})
        await asyncio.sleep(10)
        await building.wait_for_refreshes()


async def share(building: SnapshotBuilder) -> None:
    await asyncio.gather(*(building.build([GOOD], metadata={"n": Payload()}) for _ in range(3)))


DEEDS: dict[str, Callable[[SnapshotBuilder], Any]] = {
    "read": lambda building: building.build([GOOD, key("batch"), key("derived")]),
    "read what takes a thread": lambda building: building.build([key("slow")]),
    "say what for": lambda building: building.build([GOOD], metadata={"for": Payload()}),
    "be late": lambda b: b.build([GOOD, key("waits")], strict=False, deadline_seconds=1),
    "fail in part": lambda building: building.build([GOOD, key("nobody")]), "leave": left_alone,
    "talk": talk, "renew": renew, "share": share,
}  # fmt: skip


@pytest.mark.parametrize("cache", [None, BatchAtomicCache], ids=["memory", "awaited"])
@pytest.mark.parametrize("deed", DEEDS)
def test_nothing_of_a_unit_of_work_that_is_over_waits_for_the_collector(
    deed: str, cache: Callable[[], Any] | None
) -> None:
    """A payload may be large, and a program may do without the collector."""

    async def give(_key: ResourceKey, _context: FetchContext) -> Any:
        await asyncio.sleep(0)
        return Payload()

    async def give_slow(_key: ResourceKey, _context: FetchContext) -> Any:
        return Slow()

    async def main() -> int:
        building = builder(
            Single("good", fetch=give),
            Single("slow", fetch=give_slow),
            Single("waits", fetch=waits),
            Batch("batch", answer=lambda _: Payload()),
            Derived("derived", needs=lambda _: [GOOD, key("batch")]),
            default_policy=FreshnessPolicy(5, 50, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE),
            cache=None if cache is None else cache(),
        )
        with contextlib.suppress(SnapshotBuildError):
            await DEEDS[deed](building)
        keys = [GOOD, key("batch"), key("derived"), key("slow")]
        await building.publisher.invalidate_many(keys)
        await asyncio.sleep(1)
        left = sum(isinstance(each, Payload) for each in gc.get_objects())
        await building.aclose()
        return left

    with without_collector():
        assert run_virtual(main()) == 0


# Answers that are being taken in -----------------------------------------------------------------


async def test_what_a_source_has_answered_counts_though_its_readers_left_meanwhile() -> None:
    """The deadline strikes while a payload is copied: the call was a success, its probe too."""
    gate = ThreadGate()

    def copier(value: Any) -> Any:
        if value == ["slow"]:
            gate.pass_()
        return list(value)

    fails = True

    def answer(wanted: ResourceKey) -> Any:
        if fails:
            raise ConnectionError("down")
        return ["slow"] if wanted.subject == "slow" else ["quick"]

    metrics = InMemoryMetrics()
    source = tuned(
        Batch("batch", answer=answer),
        resilience_policy=SourceResiliencePolicy(
            RetryPolicy(max_attempts=1),
            CircuitBreakerPolicy(failure_threshold=1, recovery_timeout_seconds=1.0),
        ),
    )
    building = builder(
        source, metrics=metrics, payload_copier=copier, run_payload_copies_in_thread=True
    )
    slow, quick = key("batch", "slow"), key("batch", "quick")
    await building.build([quick], strict=False)
    await asyncio.sleep(2)
    fails = False
    before = (await building.health_snapshot()).payload_copy_timeout_count
    snapshot = await building.build([slow, quick], strict=False, deadline_seconds=5.0)
    gate.open()
    assert set(snapshot) == {quick}
    assert "SnapshotDeadlineExceededError" in str(snapshot.errors[slow])
    assert "was being copied" in str(snapshot.errors[slow])
    health = await building.health_snapshot()
    assert health.payload_copy_timeout_count == before + 1
    assert health.circuits == {}
    assert metrics.counter("source_batch_call_total", source="batch", status="success") == 1
    assert metrics.counter("source_batch_call_total", source="batch", status="failure") == 1
    assert (
        metrics.counter("source_batch_call_total", source="batch", status="deadline_exceeded") == 0
    )


def test_what_is_left_of_an_ended_loop_disturbs_no_other() -> None:
    """Its workers are closed by the collector, whichever loop may be running then."""
    reported: list[Mapping[str, Any]] = []

    async def forever(_key: ResourceKey, _context: FetchContext) -> Any:
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.stop)
        await loop.create_future()

    def abandon() -> None:
        loop = asyncio.new_event_loop()
        building = builder(Single("good", fetch=forever), clock=None)
        task = loop.create_task(building.build([GOOD]))
        loop.run_forever()
        drop(loop)
        assert not task.done()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: reported.append(context))
        abandoned = threading.Thread(target=abandon)
        abandoned.start()
        abandoned.join()
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main())
    assert [each for each in reported if "coalestra" in each["message"]] == []


@pytest.mark.parametrize("side_by_side", [1, 2, 4])
async def test_the_payloads_of_one_answer_are_copied_side_by_side(side_by_side: int) -> None:
    """As many at a time as copies may be made at once; the order asked for stays."""
    gate = ThreadGate()
    entered = threading.Semaphore(0)

    def copier(value: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            entered.release()
            gate.pass_()
        return list(value)

    source = Batch("batch", answer=lambda wanted: [wanted.subject])
    building = builder(
        source,
        payload_copier=copier,
        run_payload_copies_in_thread=True,
        max_copy_concurrency=side_by_side,
    )
    wanted = [key("batch", str(number)) for number in range(6)]
    task = asyncio.ensure_future(building.build(wanted))
    for _ in range(10_000):
        copies = (await building.health_snapshot()).active_payload_copies
        if copies == side_by_side:
            break
        await asyncio.sleep(0)
    assert copies == side_by_side
    gate.open()
    assert list(await task) == wanted


# Many keys at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [CircuitScope.SOURCE, CircuitScope.RESOURCE])
@pytest.mark.parametrize("how", ["fails", "leaves out", "is refused", "is cut off"])
async def test_keys_that_go_on_in_slices_travel_together(
    how: str, scope: CircuitScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of a call, its keys are asked of the next source in one more call."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)  # each single step uses its slice up

    async def forever() -> None:
        if how == "is cut off":
            await asyncio.sleep(1000)

    def answer(_wanted: ResourceKey) -> Any:
        raise ConnectionError("down")

    first = Batch("first", "k", answer=answer, before=forever, priority=20, timeout=5.0)
    if how == "leaves out":
        given: Any = first
        given.fetch_many = lambda _keys, _context: later(dict)
    first.resilience_policy = SourceResiliencePolicy(
        RetryPolicy(max_attempts=1), CircuitBreakerPolicy(scope, failure_threshold=1)
    )
    second = Batch("second", "k", priority=5)
    building = builder(first, second)
    wanted = [key("k", str(number)) for number in range(20)]
    if how == "is refused":
        for each in wanted:
            policy = first.resilience_policy.circuit
            await building.circuit_breaker.record_failure("first", key=each, policy=policy)
    assert set(await building.build(wanted)) == set(wanted)
    assert second.calls == [tuple(wanted)]


async def test_joining_a_large_call_moves_its_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each key, each time looking at all of them."""
    moved: list[float | None] = []
    move = CutOff.move

    def counting(self: CutOff, when: float | None) -> None:
        moved.append(when)
        move(self, when)

    monkeypatch.setattr(CutOff, "move", counting)
    gate = Gate()
    building = builder(Batch("batch", before=gate.pass_))
    wanted = [key("batch", str(number)) for number in range(500)]
    brief = await begun(building.build(wanted, strict=False, deadline_seconds=5.0))
    patient = await begun(building.build(wanted, deadline_seconds=50.0))
    assert len(moved) == 1
    await asyncio.sleep(10)
    assert not (await brief).resources
    gate.open()
    assert set(await patient) == set(wanted)


@pytest.mark.parametrize("steps", range(4))
async def test_no_more_workers_are_started_once_those_of_the_same_keys_are_being_ended(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that ends cancels every task once; it knows nothing of those that are to come."""
    monkeypatch.setattr(calls, "_WORKERS_AT_ONCE", 2)
    source = Single("good", fetch=held_at(gate := Gate()))
    building = builder(source, max_pending_tasks=20, max_concurrency=20)
    task = await begun(building.build([key("good", str(n)) for n in range(20)]), gate)
    for _ in range(steps):
        await asyncio.sleep(0)
    for worker in workers():
        worker.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not workers()
    await building.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await task


async def test_closing_in_the_quiet_after_a_cancellation_leaves_nothing_behind() -> None:
    """Neither a worker that is still to be started nor the timer that would start it."""
    building = builder(Single("good", fetch=_forever), max_pending_tasks=1)
    wanted = [key("good", str(number)) for number in range(3)]
    task = await begun(building.build(wanted))
    for worker in workers():
        worker.cancel()
    await settle()
    await building.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await task


async def _forever(_key: ResourceKey, _context: FetchContext) -> Any:
    return await asyncio.get_running_loop().create_future()
