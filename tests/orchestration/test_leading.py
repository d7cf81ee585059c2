"""A call that was answered at once asks for what is queued behind it, in the same step.

Nothing else may tell the keys that travel so from keys that are asked for one by one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coalestra import (
    CircuitBreakerPolicy,
    CircuitScope,
    DependencyCycleError,
    FetchContext,
    ResourceAbsent,
    ResourceKey,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SourcePayload,
    SourceResiliencePolicy,
)
from coalestra.orchestration.calls import Attempt, Call, Following
from coalestra.orchestration.flights import Flight, call_served
from tests.orchestration.scripted import Batch, Derived, Single, builder, key, tuned
from tests.support import (
    EPOCH,
    Gate,
    ManualClock,
    ThreadGate,
    begun,
    loop_turn,
    no_leaks,
    settle,
    taking,
)
from tests.support.running import without_collector

KEYS = [key("x", str(number)) for number in range(6)]
A, B, C, D, E, F = KEYS
Deed = Callable[[ResourceKey], Awaitable[Any]]


def resilience(
    attempts: int = 1, threshold: int = 0, scope: CircuitScope = CircuitScope.SOURCE
) -> SourceResiliencePolicy:
    """Retry after a second; open a circuit after some failures, if a threshold is given."""
    return SourceResiliencePolicy(
        RetryPolicy(attempts, 1.0, jitter_ratio=0),
        CircuitBreakerPolicy(scope, threshold or 1, 10.0, enabled=bool(threshold)),
    )


NO_RETRY = resilience()


class Told:
    """Serves `x` at once with the subject of the key, except for what it is told to do first.

    `tasks` and `turns` are those that each key was asked for in.
    """

    def __init__(
        self,
        policy: SourceResiliencePolicy = NO_RETRY,
        timeout: float | None = None,
        **settings: Any,
    ) -> None:
        self.deeds: dict[ResourceKey, Deed] = {}
        self.tasks: list[asyncio.Task[Any] | None] = []
        self.turns: list[int] = []
        self.source = tuned(
            Single("x", "x", "y", fetch=self.fetch, timeout=timeout), resilience_policy=policy
        )
        self.builder: SnapshotBuilder = builder(self.source, **settings)

    async def fetch(self, k: ResourceKey, context: FetchContext) -> Any:
        self.tasks.append(asyncio.current_task())
        self.turns.append(loop_turn())
        deed = self.deeds.get(k)
        told = None if deed is None else await deed(k)
        return k.subject if told is None else told

    def at(self, k: ResourceKey) -> Callable[[Deed], Deed]:
        """Decorate what is done as `k` is asked for; what that returns is the answer."""

        def decorate(deed: Deed) -> Deed:
            self.deeds[k] = deed
            return deed

        return decorate

    def led(self) -> bool:
        """Whether all keys were asked for in one step of one task."""
        return len(set(self.tasks)) == 1 and len(set(self.turns)) == 1


def values(snapshot: Snapshot) -> dict[str, Any]:
    """The values by subject."""
    return {value.key.subject: value.value for value in snapshot.values()}


NEWER: Any = asyncio  # with what not every version has
ALL = {k.subject: k.subject for k in KEYS}


# Who is served when ------------------------------------------------------------------------------


async def test_what_is_answered_at_once_is_asked_for_in_one_step_of_one_task() -> None:
    """A sink is told, and a trace tells, of each call all the same."""
    sink = Noting()
    it = Told(events=sink)
    snapshot = await it.builder.build(KEYS, trace=True)
    assert values(snapshot) == ALL
    assert it.led()
    assert sink.events.count("source_call_started") == len(it.source.calls) == 6
    assert snapshot.trace is not None
    assert len({call for of_key in snapshot.trace.keys.values() for call in of_key.calls}) == 6
    assert [call.keys for call in snapshot.trace.calls] == [1] * 6


@pytest.mark.parametrize("slots", [1, 2, 8])
async def test_one_that_waits_goes_on_with_the_slot_and_keeps_none_waiting(slots: int) -> None:
    it, gate = Told(max_concurrency=slots), Gate()
    seen: list[asyncio.Task[Any] | None] = []

    @it.at(C)
    async def wait(k: ResourceKey) -> None:
        await asyncio.sleep(0)  # who gives others a turn has not answered yet
        seen.append(asyncio.current_task())
        await gate.pass_()
        seen.append(asyncio.current_task())

    alone = await begun(it.builder.build(KEYS))
    (limiter, *_) = (await it.builder.health_snapshot()).capacity.values()
    assert limiter.in_use == 1
    others = await begun(it.builder.build([A, B]))
    assert others.done(), "what was answered before is delivered"
    assert len(it.source.calls) == (3 if slots == 1 else 6), "the others are served meanwhile"
    gate.open()
    assert values(await alone) == ALL
    assert seen == [it.tasks[0]] * 2, "it goes on in its task"
    assert sorted(it.source.calls, key=str) == KEYS


@pytest.mark.skipif(not hasattr(asyncio, "timeout"), reason="came with Python 3.11")
async def test_timeouts_and_groups_of_tasks_begun_in_the_first_step_work() -> None:
    it = Told()

    @it.at(B)
    async def time_out(k: ResourceKey) -> str:
        try:
            async with NEWER.timeout(1.0):
                await asyncio.Event().wait()
        except TimeoutError:
            return "late"
        return "never"

    @it.at(D)
    async def together(k: ResourceKey) -> int:
        async with NEWER.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(1.0, number)) for number in (1, 2)]
        return sum(task.result() for task in tasks)

    assert values(await it.builder.build(KEYS)) == {**ALL, "1": "late", "3": 3}


@pytest.mark.parametrize("tasks", ["late", "eager"])
async def test_each_key_has_context_variables_of_its_own(tasks: str) -> None:
    eager = getattr(asyncio, "eager_task_factory", None)
    if tasks == "eager":
        if eager is None:
            pytest.skip("eager tasks came with Python 3.12")
        asyncio.get_running_loop().set_task_factory(eager)
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("of the build")
    it, seen = Told(), list[str]()
    for k in KEYS:

        @it.at(k)
        async def note(k: ResourceKey) -> None:
            seen.append(variable.get())
            variable.set(k.subject)
            if k in (C, E):
                await asyncio.sleep(1.0)
            seen.append((variable.get() == k.subject and "its own") or "another's")

    assert values(await it.builder.build(KEYS)) == ALL
    assert sorted(set(seen)) == ["its own", "of the build"]
    assert variable.get() == "of the build"


class Noting:
    """Keeps what events it is told of."""

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self.events: list[str] = []

    def emit(self, event_type: str, **payload: Any) -> None:
        self.events.append(event_type)


# What is no good answer --------------------------------------------------------------------------


def _stale() -> SourcePayload[Any]:
    return SourcePayload("old", observed_at=EPOCH - 5_000.0)


def _ahead() -> SourcePayload[Any]:
    return SourcePayload("early", observed_at=EPOCH + 5_000.0)


class Uncopyable:
    """A value that nobody can copy."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError("no")


def _raise_absent() -> Any:
    raise ResourceAbsent


@pytest.mark.parametrize("answer", [_stale, _ahead, Uncopyable, ResourceAbsent, _raise_absent])
async def test_an_answer_of_no_use_concerns_its_own_key_only(answer: Callable[[], Any]) -> None:
    it = Told()

    @it.at(C)
    async def answers(k: ResourceKey) -> Any:
        return answer()

    snapshot = await it.builder.build(KEYS, strict=False)
    assert values(snapshot) == {k.subject: k.subject for k in KEYS if k is not C}
    assert set(snapshot.errors) == {C}
    assert it.led() or answer is Uncopyable


@pytest.mark.parametrize("scope", [CircuitScope.SOURCE, CircuitScope.RESOURCE])
@pytest.mark.parametrize("answer", [_stale, _ahead, Uncopyable, _raise_absent])
@pytest.mark.parametrize("before", [1, 5])
async def test_answers_of_no_use_count_for_the_circuit_and_an_absence_does_not(
    before: int, answer: Callable[[], Any], scope: CircuitScope
) -> None:
    it = Told(resilience(threshold=3, scope=scope))

    async def answers(k: ResourceKey) -> Any:
        return answer()

    it.deeds[F] = answers
    await it.builder.build(KEYS[-before - 1 :], strict=False)
    circuits = (await it.builder.circuit_breaker.snapshot()).values()
    assert [each.failures for each in circuits] == ([] if answer is _raise_absent else [1])
    assert it.led() or answer is Uncopyable


@pytest.mark.parametrize("fault", [OSError("down"), None])
async def test_failures_in_a_row_open_the_circuit_to_the_rest(fault: Exception | None) -> None:
    it = Told(resilience(threshold=3))

    async def fail(k: ResourceKey) -> Any:
        if fault is not None:
            raise fault
        return _stale()

    for k in (B, C, D, E, F):
        it.deeds[k] = fail
    snapshot = await it.builder.build(KEYS, strict=False)
    assert values(snapshot) == {"0": "0"}
    assert it.source.calls == KEYS[:4]
    (circuit,) = (await it.builder.circuit_breaker.snapshot()).values()
    assert (circuit.state.value, circuit.failures) == ("open", 3)


@pytest.mark.parametrize("raises", [False, True])
async def test_a_failure_after_the_circuit_has_recovered_counts(raises: bool) -> None:
    policy = resilience(threshold=2)
    it = Told(policy)

    @it.at(C)
    async def fail(k: ResourceKey) -> Any:
        if raises:
            raise OSError("down")
        return _stale()

    for _ in range(2):
        await it.builder.circuit_breaker.record_failure("x", policy=policy.circuit)
    await asyncio.sleep(20.0)
    await it.builder.build([A])
    assert not await it.builder.circuit_breaker.snapshot()
    await it.builder.build([B, C], strict=False)
    (circuit,) = (await it.builder.circuit_breaker.snapshot()).values()
    assert circuit.failures == 1


async def test_supports_that_raises_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Told()
    supports = it.source.supports

    def raising(k: ResourceKey) -> bool:
        if k in (B, E):
            raise OSError("cannot say")
        return supports(k)

    monkeypatch.setattr(it.source, "supports", raising)
    snapshot = await it.builder.build(KEYS, strict=False)
    assert set(snapshot.errors) == {B, E}
    assert it.source.calls == [A, C, D, F]


class StruckClock(ManualClock):
    """A clock that raises when it is read for the n-th time."""

    strikes_in = -1
    readings = 0

    def _read(self) -> None:
        self.readings += 1
        self.strikes_in -= 1
        if self.strikes_in == 0:
            raise ConnectionError("no clock")

    def now(self) -> float:
        self._read()
        return super().now()

    def monotonic(self) -> float:
        self._read()
        return super().monotonic()


@pytest.mark.parametrize("readings", [1, 2, 3])
async def test_a_clock_that_raises_for_one_key_costs_no_other_its_value(readings: int) -> None:
    """As the source has answered, as the time of the answer is taken, or for the next one."""
    clock = StruckClock()
    it = Told(resilience(attempts=2), clock=clock)

    @it.at(B)
    async def strike(k: ResourceKey) -> None:
        if it.source.calls.count(B) == 1:
            clock.strikes_in = readings

    snapshot = await it.builder.build(KEYS, strict=False)
    assert {k.subject: k.subject for k in KEYS if k not in (B, C)}.items() <= values(
        snapshot
    ).items()
    (health,) = (await it.builder.health_snapshot()).sources.values()
    assert health.seconds_since_error is None


# What the source does with the builder meanwhile -----------------------------------------------


@pytest.mark.parametrize("asked", [A, B, C, F, key("y")])
@pytest.mark.parametrize("slots", [1, 2, 8])
async def test_a_source_may_ask_for_what_was_answered_or_is_queued_but_not_for_itself(
    asked: ResourceKey, slots: int
) -> None:
    it = Told(max_concurrency=slots)
    cycles: list[BaseException] = []

    @it.at(C)
    async def ask(k: ResourceKey) -> Any:
        try:
            return (await it.builder.build([asked])).value(asked)
        except Exception as error:
            cycles.append(error)
            return "circle"

    snapshot = await asyncio.wait_for(it.builder.build(KEYS), 60.0)
    answer = "circle" if asked is C else asked.subject
    assert values(snapshot) == {**ALL, "2": answer}
    assert bool(cycles) is (asked is C)
    for error in cycles:
        assert isinstance(error.errors[C], DependencyCycleError)  # type: ignore[attr-defined]
    assert len(it.source.calls) == 6 + (asked.name == "y")


@pytest.mark.parametrize("how", ["session", "request", "other", "refresh"])
async def test_it_may_ask_in_any_way(how: str) -> None:
    it = Told(max_concurrency=1)
    other = builder(Derived("z", needs=lambda k: [key("w", k.subject)]), _Passing(it))

    @it.at(C)
    async def ask(k: ResourceKey) -> Any:
        if how == "session":
            async with it.builder.session() as session:
                return (await session.resolve([E])).value(E)
        if how == "other":
            return (await other.build([key("z", "4")])).value(key("z", "4"))[0]
        if how == "refresh":
            await it.builder.wait_for_refreshes()
        return (await it.builder.build([E])).value(E)

    snapshot = await asyncio.wait_for(it.builder.build(KEYS), 60.0)
    assert values(snapshot) == {**ALL, "2": "4"}
    assert it.source.calls.count(E) == 1


class _Passing(Single):
    """Serves `w` with what another builder has for `x`."""

    def __init__(self, it: Told) -> None:
        super().__init__("w", fetch=self._pass)
        self.it = it

    async def _pass(self, k: ResourceKey, context: FetchContext) -> Any:
        asked = key("x", k.subject)
        return (await self.it.builder.build([asked])).value(asked)


@pytest.mark.parametrize("asked", [A, C, F])
async def test_an_eager_task_of_a_first_step_may_use_the_builder(asked: ResourceKey) -> None:
    eager = getattr(asyncio, "eager_task_factory", None)
    if eager is None:
        pytest.skip("eager tasks came with Python 3.12")
    asyncio.get_running_loop().set_task_factory(eager)
    it, found = Told(max_concurrency=1), list[asyncio.Task[Snapshot]]()

    @it.at(C)
    async def spawn(k: ResourceKey) -> None:
        if not found:
            found.append(asyncio.ensure_future(it.builder.build([asked], strict=False)))

    assert values(await asyncio.wait_for(it.builder.build(KEYS), 60.0)) == ALL
    snapshot = await asyncio.wait_for(found[0], 60.0)
    assert set(snapshot.errors) <= {C}


async def test_a_key_that_has_asked_for_its_call_is_at_its_first_attempt() -> None:
    it, seen = Told(), list[tuple[str, int]]()

    @it.at(C)
    async def look(k: ResourceKey) -> None:
        assert call_served() is not None
        under_way = {each.key: each for each in it.builder.flights_under_way()}
        seen.append((under_way[C].state, under_way[C].attempts))

    snapshot = await it.builder.build(KEYS)
    assert values(snapshot) == ALL
    assert seen == [("its source is running", 1)]
    assert snapshot.diagnostics.source_calls == len(KEYS)


@pytest.mark.parametrize("at, own", [("follow", False), ("running_loop", True)])
async def test_a_thread_that_stops_short_as_it_decides_holds_nobody_back(
    at: str, own: bool
) -> None:
    """What strikes a thread, as a finalizer does, may wait for the loop: no lock is held there."""
    stops, ended, seen = threading.Event(), threading.Event(), list[Any]()
    it = Told()

    def stop(frame: Any, event: str, arg: Any) -> None:
        if frame.f_code.co_name == at and not stops.is_set():
            stops.set()
            assert ended.wait(10.0)

    def in_a_thread() -> None:
        sys.settrace(stop)
        seen.append(call_served())

    @it.at(C)
    async def start(k: ResourceKey) -> None:
        context = contextvars.copy_context()
        threads.append(threading.Thread(target=context.run, args=(in_a_thread,)))
        threads[0].start()
        assert stops.wait(10.0)

    threads: list[threading.Thread] = []
    snapshot = await asyncio.wait_for(it.builder.build(KEYS), 60.0)
    ended.set()
    threads[0].join()
    assert values(snapshot) == ALL
    assert len(it.source.calls) == snapshot.diagnostics.source_calls == len(KEYS)
    assert [isinstance(each, Call) for each in seen] == [own]
    assert not it.builder.flights_under_way()


async def test_a_thread_of_its_source_may_ask_the_moment_it_is_answered() -> None:
    """Whether the key is a call of its own is decided once, whoever wants to know at the time."""
    asks, asked = threading.Event(), threading.Event()

    class AskingClock(ManualClock):
        armed = 0

        def monotonic(self) -> float:
            self.armed -= 1
            if self.armed == 0:
                asks.set()
                assert asked.wait(10.0)
            return super().monotonic()

    clock, seen = AskingClock(), list[Any]()
    it = Told(clock=clock)

    def in_a_thread() -> None:
        asks.wait(10.0)
        seen.append(call_served())
        asked.set()

    @it.at(C)
    async def start(k: ResourceKey) -> None:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(in_a_thread,))
        thread.start()
        clock.armed = 1

    assert values(await asyncio.wait_for(it.builder.build(KEYS), 60.0)) == ALL
    assert seen == [None]


@pytest.mark.parametrize("concerned", [A, B, C, D, F])
@pytest.mark.parametrize("deed", ["publish", "invalidate"])
async def test_news_in_a_first_step_outdate_its_keys(deed: str, concerned: ResourceKey) -> None:
    it = Told()

    @it.at(C)
    async def tell(k: ResourceKey) -> None:
        if it.source.calls.count(C) == 1:
            if deed == "publish":
                await it.builder.publisher.publish(concerned, "news", source="stream")
            else:
                await it.builder.publisher.invalidate(concerned)

    found = values(await it.builder.build(KEYS))
    assert {**found, concerned.subject: ...} == {**ALL, concerned.subject: ...}
    calls = len(it.source.calls)
    again = values(await it.builder.build(KEYS))
    overtaken = concerned in (A, B, C)
    if deed == "publish":
        assert again == {**ALL, **({concerned.subject: "news"} if overtaken else {})}
    else:
        assert again == ALL
        assert len(it.source.calls) == calls + overtaken


# Who leaves, and what ends the worker ------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("finish_late", [False, True])
async def test_readers_may_leave_in_the_first_step_or_later(waits: bool, finish_late: bool) -> None:
    resilience_policy = SourceResiliencePolicy(RetryPolicy(max_attempts=1), finish_late=finish_late)
    it, gate = Told(resilience_policy, 10.0, max_concurrency=1), Gate()

    @it.at(C)
    async def leave(k: ResourceKey) -> None:
        if it.source.calls.count(C) == 1:
            reader.cancel()
            if waits:
                await gate.pass_()

    reader = asyncio.ensure_future(it.builder.build(KEYS))
    with pytest.raises(asyncio.CancelledError):
        await reader
    gate.open()
    await settle()
    await no_leaks(it.builder)
    assert values(await it.builder.build(KEYS)) == ALL


@pytest.mark.parametrize("finish_late", [False, True])
async def test_a_deadline_cuts_off_one_that_waits_and_what_is_behind(finish_late: bool) -> None:
    resilience_policy = SourceResiliencePolicy(RetryPolicy(max_attempts=1), finish_late=finish_late)
    it = Told(resilience_policy, 10.0, max_concurrency=1)

    @it.at(C)
    async def wait(k: ResourceKey) -> None:
        if it.source.calls.count(C) == 1:
            await asyncio.sleep(5.0)

    snapshot = await it.builder.build(KEYS, strict=False, deadline_seconds=1.0)
    assert values(snapshot) == {"0": "0", "1": "1"}
    health = await it.builder.health_snapshot()
    (source,) = health.sources.values()
    assert source.attempt_count == (2 if finish_late else 3)
    await asyncio.sleep(10.0)
    again = await it.builder.build([C])
    assert it.source.calls.count(C) == (1 if finish_late else 2)
    assert again.value(C) == "2"


async def test_one_that_waits_is_cut_off_at_its_timeout_and_keeps_its_slot_till_it_ends() -> None:
    it = Told(timeout=1.0, max_concurrency=1)

    @it.at(C)
    async def cling(k: ResourceKey) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(100.0)
        await asyncio.sleep(0.5)

    with taking(1.5):
        building = asyncio.ensure_future(it.builder.build(KEYS, strict=False))
        await asyncio.sleep(1.25)
        assert len(it.source.calls) == 3
        snapshot = await building
    assert set(snapshot.errors) == {C}
    assert len(it.source.calls) == 6


@pytest.mark.parametrize("waits", [False, True])
async def test_a_worker_cancelled_in_a_first_step_serves_no_further_key(waits: bool) -> None:
    it = Told(max_pending_tasks=1)

    @it.at(C)
    async def cancel(k: ResourceKey) -> None:
        task = asyncio.current_task()
        if it.source.calls.count(C) == 1 and task is not None:
            task.cancel()
            if waits:
                await asyncio.sleep(1.0)

    snapshot = await asyncio.wait_for(it.builder.build(KEYS, strict=False), 60.0)
    assert len({*it.tasks[:3]}) == 1
    assert it.tasks[3] is not it.tasks[0]
    assert {k.subject for k in (A, B, D, E, F)} <= set(values(snapshot))
    assert (C in snapshot.errors) is waits


@pytest.mark.parametrize(
    "fault",
    [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError, StopAsyncIteration],
)
@pytest.mark.parametrize("waits", [False, True])
async def test_whatever_one_raises_the_others_have_their_values(
    fault: type[BaseException], waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, told_of = asyncio.get_running_loop(), list[BaseException]()
    it = Told(max_concurrency=1)
    asked_for_later = loop.call_soon

    @it.at(C)
    async def strike(k: ResourceKey) -> None:
        if waits:
            await asyncio.sleep(1.0)
        raise fault

    def note(deed: Any, *args: Any, **how: Any) -> Any:
        if args and isinstance(args[0], (KeyboardInterrupt, SystemExit)):
            told_of.append(args[0])
            return None
        return asked_for_later(deed, *args, **how)

    monkeypatch.setattr(loop, "call_soon", note)
    snapshot = await asyncio.wait_for(it.builder.build(KEYS, strict=False), 60.0)
    monkeypatch.undo()
    assert set(snapshot.errors) == {C}
    assert len(values(snapshot)) == 5
    assert bool(told_of) is (fault in (KeyboardInterrupt, SystemExit))


@pytest.mark.parametrize("waits", [False, True])
async def test_a_timeout_declared_in_a_first_step_that_cannot_be_meant_keeps_nobody_waiting(
    waits: bool,
) -> None:
    it = Told()

    @it.at(C)
    async def declare(k: ResourceKey) -> None:
        it.source.timeout_seconds = -1.0
        if waits:
            await asyncio.sleep(1.0)
        else:
            raise LookupError("a fault in a source")

    snapshot = await asyncio.wait_for(it.builder.build(KEYS, strict=False), 60.0)
    assert set(values(snapshot)) == {"0", "1", "2"} if waits else {"0", "1"}
    assert "timeout_seconds of source 'x' must be " in str(snapshot.errors[D])
    it.source.timeout_seconds = None
    del it.deeds[C]
    assert values(await asyncio.wait_for(it.builder.build(KEYS), 60.0)) == ALL


@pytest.mark.late_tasks  # the closing that is begun here is not carried through
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("is_call", [False, True])
async def test_a_builder_closed_in_a_first_step_leaves_no_one(is_call: bool, waits: bool) -> None:
    it = Told(max_concurrency=1)

    @it.at(C)
    async def close(k: ResourceKey) -> None:
        assert not is_call or call_served() is not None
        closing = it.builder.aclose()
        closing.send(None)
        closings.append(closing)
        if waits:
            await asyncio.sleep(1.0)

    closings: list[Any] = []
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(it.builder.build(KEYS), 60.0)
    closings[0].close()


# What is counted, and what is left behind ---------------------------------------------------------


class Alone(Single):
    """Serves `x` so that no key is led: each gives others a turn."""

    async def fetch(self, k: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(0)
        return await super().fetch(k, context)


@pytest.mark.parametrize("derived", [False, True])
async def test_it_counts_the_same_whether_keys_are_led_or_go_one_by_one(derived: bool) -> None:
    counted = []
    for kind in (Single, Alone):
        sources = [kind("x"), Derived("y", needs=lambda k: [key("x", k.subject)])]
        building = builder(*sources)
        keys = [key("y", k.subject) for k in KEYS] if derived else KEYS
        snapshot = await building.build(keys)
        health = await building.health_snapshot()
        one = snapshot.diagnostics
        counted.append(
            (
                one.source_calls,
                one.source_calls_by_source,
                set(one.source_latency_ms_by_source),
                one.derived_calls,
                one.batch_calls,
                one.cache_misses,
                {
                    name: (each.attempt_count, each.failed_attempt_count)
                    for name, each in health.sources.items()
                },
                [each.attempts for each in snapshot.values()],
            )
        )
        await no_leaks(building)
    assert counted[0] == counted[1]


async def test_each_answer_has_its_own_time() -> None:
    clock = ManualClock()
    it = Told(clock=clock)

    async def take(k: ResourceKey) -> None:
        clock.advance(0.5 + int(k.subject))

    it.deeds = dict.fromkeys(KEYS, take)
    snapshot = await it.builder.build(KEYS)
    assert it.led()
    assert [value.fetched_at - EPOCH for value in snapshot.values()] == [
        (number + 1) ** 2 / 2 for number in range(6)
    ]
    assert [value.latency_ms for value in snapshot.values()] == [
        500.0 + 1_000.0 * number for number in range(6)
    ]
    assert snapshot.diagnostics.source_latency_ms_by_source == {"x": 18_000.0}
    (health,) = (await it.builder.health_snapshot()).sources.values()
    assert (health.attempt_count, health.total_latency_ms) == (6, 18_000.0)


@pytest.mark.parametrize("needs", [0, 1, 2, 40])
@pytest.mark.parametrize("waits", [False, True])
async def test_derived_keys_are_led_with_what_each_is_derived_from(waits: bool, needs: int) -> None:
    batch = Batch("base", answer=lambda k: [k.subject])

    def needed(k: ResourceKey) -> list[ResourceKey]:
        return [key("base", f"{k.subject}.{number}") for number in range(needs)]

    tasks = []

    class Watched(Derived):
        async def derive(self, k: ResourceKey, inputs: Snapshot, context: FetchContext) -> Any:
            tasks.append((asyncio.current_task(), loop_turn()))
            for each in inputs.values():
                each.value.append("its own copy")
            assert list(inputs) == needed(k)
            if waits and k is not A:
                await asyncio.sleep(1.0)
            return [value.value[0] for value in inputs.values()]

    building = builder(Watched("x", needs=needed), batch)
    snapshot = await building.build(KEYS)
    for k in KEYS:
        assert snapshot.value(k) == [each.subject for each in needed(k)]
        assert set(snapshot[k].dependency_versions) == set(needed(k))
    assert waits or len(set(tasks)) == 1


class Down(ConnectionError):
    """What a source may fail with."""


@pytest.mark.parametrize("ends", ["at once", "waits", "fails", "asks"])
@pytest.mark.parametrize("lasting", [False, True])
async def test_what_was_led_is_freed_without_the_collector(ends: str, lasting: bool) -> None:
    it = Told(resilience(attempts=2), max_concurrency=1)
    gate, tasks = Gate(), list[asyncio.Task[Any]]()

    async def answer(k: ResourceKey) -> Any:
        if lasting:
            tasks.append(asyncio.ensure_future(gate.pass_()))  # it keeps the context of the key
        if ends == "waits":
            await asyncio.sleep(1.0)
        if ends == "fails" and k is not A and it.source.calls.count(k) == 1:
            raise Down
        if ends == "asks" and k is not F:
            await it.builder.build([F])

    def alive(*kinds: type) -> list[Any]:
        return [each for each in gc.get_objects() if type(each) in kinds]

    it.deeds = dict.fromkeys(KEYS, answer)
    await settle()
    with without_collector():
        await it.builder.build(KEYS, strict=False)
        await settle()
        assert not alive(Flight)
        assert not alive(Down)
        assert not alive(Attempt)
        assert lasting or not alive(Call, Following)
    gate.open()
    await asyncio.gather(*tasks)


async def test_a_value_that_takes_a_thread_to_copy_goes_on_alone() -> None:
    it = Told(max_concurrency=1)

    @it.at(C)
    async def much(k: ResourceKey) -> Any:
        return [[number] for number in range(20_000)]

    snapshot = await it.builder.build(KEYS)
    assert len(snapshot.value(C)) == 20_000
    assert {**values(snapshot), "2": "2"} == ALL
    assert len(it.source.calls) == 6


class CopiedBehind:
    """A value that is copied in a thread, which passes a gate."""

    def __init__(self, gate: ThreadGate) -> None:
        self.gate = gate

    def __deepcopy__(self, memo: Any) -> str:
        self.gate.pass_()
        return "copied"


@pytest.mark.parametrize("finish_late", [False, True])
async def test_a_copy_in_a_thread_ends_by_the_cutoff_of_its_own_key(finish_late: bool) -> None:
    policy = SourceResiliencePolicy(RetryPolicy(max_attempts=1), finish_late=finish_late)
    it, gate = Told(policy, 10.0, max_concurrency=1, max_pending_tasks=2), ThreadGate()

    @it.at(C)
    async def much(k: ResourceKey) -> Any:
        return CopiedBehind(gate)

    late = asyncio.ensure_future(it.builder.build(KEYS, strict=False, deadline_seconds=1.0))
    await asyncio.sleep(0.5)
    others = [k for k in KEYS if k is not C]
    assert list(await it.builder.build(others)) == others, "which have long been delivered"
    snapshot = await late
    assert set(snapshot.errors) == {C}
    assert "copied" in str(snapshot.errors[C])
    assert len(values(snapshot)) == 5
    await asyncio.sleep(1.0)
    gate.open()
    await asyncio.sleep(1.0)
    assert (await it.builder.build([C])).value(C) == "copied"
    assert it.source.calls.count(C) == 2 - finish_late


# What bounds a call ------------------------------------------------------------------------------


class Blocking(Single):
    """Blocks, it says, for a second at most, in a thread."""

    blocking_io = blocking_io_offloaded = True
    transport_timeout_seconds = 1.0


async def test_a_blocking_source_is_asked_for_no_key_that_does_not_fit_into_what_is_left() -> None:
    clock = ManualClock()

    async def take(k: ResourceKey, context: FetchContext) -> str:
        clock.advance(0.6)
        return k.subject

    source = tuned(Blocking("x", fetch=take, timeout=5.0), resilience_policy=NO_RETRY)
    building = builder(source, clock=clock)
    snapshot = await building.build(KEYS, strict=False, deadline_seconds=2.0)
    assert source.calls == [A, B]
    assert values(snapshot) == {"0": "0", "1": "1"}
    assert "transport timeout" in str(snapshot.errors[C])
    health = await building.health_snapshot()
    assert not health.source_transport_timeout_violations


@pytest.mark.parametrize("kind", [Single, Alone])
@pytest.mark.parametrize("workers", [1, 4])
async def test_what_waits_for_the_slot_of_a_led_key_may(workers: int, kind: type[Single]) -> None:
    """Behind the only worker, nothing waits for a slot yet."""

    async def stay(k: ResourceKey, context: FetchContext) -> str:
        if k is C:
            await asyncio.sleep(2.0)
        return k.subject

    source = tuned(kind("x", fetch=stay), resilience_policy=NO_RETRY, queue_timeout_seconds=0.5)
    building = builder(source, max_concurrency=1, max_pending_tasks=workers)
    snapshot = await building.build(KEYS, strict=False)
    assert set(snapshot.errors) == (set() if workers == 1 else {D, E, F})
    for error in snapshot.errors.values():
        assert "waited 0.5 s for capacity" in str(error)
    health = await building.health_snapshot()
    assert health.queue_timeout_count == len(snapshot.errors)
