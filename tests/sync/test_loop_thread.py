"""A loop in a thread: what is accepted runs, in order, and the thread ends when all of it has."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from coalestra._lockfree import Changes
from coalestra.core.errors import BuilderClosedError
from coalestra.sync import THREAD_NAME, LoopThread, Operation, SubmissionBacklog, Work
from tests.support.elsewhere import PATIENCE, error_of, in_thread, outcome
from tests.support.running import no_more_threads
from tests.sync.steps import Door

pytestmark = pytest.mark.concurrency


async def answer() -> int:
    return 42


def started(
    thread: LoopThread, work: Work[Any], backlog: SubmissionBacklog | None = None
) -> Operation[Any]:
    return thread.start(thread.operation(backlog), lambda: work)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, also where the tests run in the background and it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupted_wait_cancels_unbegun_work(loop_thread: LoopThread, begun: bool) -> None:
    cancelled = threading.Event()

    async def interrupt_the_caller() -> None:
        try:
            while begun and not caller_waits():  # noqa: ASYNC110 - a blocked thread sets no event
                await asyncio.sleep(0)
            signal.pthread_kill(caller, signal.SIGINT)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def caller_waits() -> bool:
        frame = sys._current_frames()[caller]
        return frame.f_code is Changes.wait_for.__code__

    caller = threading.get_ident()
    with pytest.raises(KeyboardInterrupt):
        loop_thread.run("build()", interrupt_the_caller)
    assert cancelled.wait(PATIENCE)


def test_the_thread_outlives_a_task_that_ignores_its_cancellation(loop_thread: LoopThread) -> None:
    door = Door()

    async def stubborn() -> None:
        passing = asyncio.ensure_future(door.pass_())
        while not passing.done():
            try:
                await asyncio.shield(passing)
            except asyncio.CancelledError:
                if passing.cancelled():  # the loop cancels every task it knows
                    passing = asyncio.ensure_future(door.pass_())

    kept: list[asyncio.Task[None]] = []

    async def leave_behind() -> None:
        kept.append(asyncio.create_task(stubborn()))

    async def stop() -> None:
        loop_thread.stop(unwinding_seconds=0.01)

    loop_thread.run("leave_behind()", leave_behind)
    door.wait_reached()
    loop_thread.finish(stop)
    assert not loop_thread.join(PATIENCE)
    door.open()


def test_the_representation_tells_the_state(loop_thread: LoopThread) -> None:
    assert repr(loop_thread) == (
        "<LoopThread coalestra-sync-loop alive=True closing=False operations=0>"
    )
    operation = loop_thread.operation()
    assert repr(operation) == "<Operation begun=False done=False>"
    operation.discard()


def test_a_thread_that_cannot_start_leaves_no_loop_open(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.new_event_loop()
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: loop)
    no_more_threads(monkeypatch)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        LoopThread(name="x", owner="the test")
    assert loop.is_closed()


def test_a_thread_whose_start_is_interrupted_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LoopThread(name=THREAD_NAME, owner="the test")  # of which no thread may be left


def test_an_error_that_comes_after_its_waiter_has_gone_is_reported_to_nobody(
    loop_thread: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail_on_cancellation() -> None:
        door_reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise KeyError("too late") from None

    door_reached = threading.Event()
    operation = started(loop_thread, fail_on_cancellation)
    assert door_reached.wait(PATIENCE)
    operation.future.cancel()
    loop_thread.run("answer()", answer)
    loop_thread.run("answer()", answer)
    assert operation.future.cancelled()
    assert caplog.records == []


def raise_it(error: BaseException) -> None:
    raise error


class Exit(SystemExit):
    """Cannot be made of what it keeps."""

    def __init__(self, code: int, *, reason: str = "") -> None:
        super().__init__(code)
        self.reason = reason

    def __reduce__(self) -> Any:
        return Exit, (), None


class Interrupt(KeyboardInterrupt):
    def __copy__(self) -> None:
        """Be no exception."""


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Exit, Interrupt])
def test_what_ends_the_program_goes_to_the_threads_that_wait(
    loop_thread: LoopThread, kind: type[BaseException]
) -> None:
    """As in an asyncio program, where it leaves `asyncio.run`; the loop itself goes on."""
    door = Door()
    waiting = in_thread(lambda: loop_thread.run("build()", door.pass_))
    door.wait_reached()
    submitted = started(loop_thread, door.pass_, SubmissionBacklog(1))

    async def end_the_program() -> None:
        asyncio.get_running_loop().call_soon(raise_it, kind(3))
        await asyncio.Event().wait()

    with pytest.raises(kind) as caught:
        loop_thread.run("build()", end_the_program)
    assert caught.value.args == (3,)
    assert isinstance(error_of(waiting), kind)
    assert loop_thread.run("answer()", answer) == 42
    assert not submitted.future.done()
    door.open()
    outcome(submitted.future)


EAGER: Any = getattr(asyncio, "eager_task_factory", None)


@pytest.mark.skipif(EAGER is None, reason="this Python has no eager tasks")
def test_where_tasks_are_eager_an_exit_and_a_cancellation_in_the_first_step_are_told(
    loop_thread: LoopThread,
) -> None:
    begun, held, cancelled = threading.Event(), threading.Event(), threading.Event()

    async def be_eager() -> None:
        asyncio.get_running_loop().set_task_factory(EAGER)

    async def end_the_program() -> None:
        raise SystemExit(3)

    async def hold() -> None:
        begun.set()
        held.wait(PATIENCE)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    loop_thread.run("be_eager()", be_eager)
    assert isinstance(error_of(started(loop_thread, end_the_program).future), SystemExit)
    holding = started(loop_thread, hold)
    assert begun.wait(PATIENCE)
    holding.future.cancel()
    held.set()
    assert cancelled.wait(PATIENCE)


def test_what_nobody_waits_for_is_told_to_the_loops_exception_handler(
    loop_thread: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    async def end_the_program() -> None:
        asyncio.get_running_loop().call_later(0, raise_it, SystemExit(3))

    submitted = started(loop_thread, end_the_program, SubmissionBacklog(1))
    outcome(submitted.future)
    while not caplog.records:
        assert loop_thread.run("answer()", answer) == 42
    assert "broke the event loop" in caplog.records[0].getMessage()


def test_an_exception_handler_that_ends_the_program_leaves_the_loop_running(
    loop_thread: LoopThread,
) -> None:
    told, told_twice = list[object](), threading.Event()

    def end_the_program(_: object, context: dict[str, Any]) -> None:
        told.append(context["exception"])
        if len(told) == 2:
            told_twice.set()
        raise SystemExit(3)

    async def fail() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(end_the_program)
        loop.call_soon(raise_it, LookupError())

    outcome(started(loop_thread, fail, SubmissionBacklog(1)).future)
    assert told_twice.wait(PATIENCE)
    assert list(map(type, told)) == [LookupError, SystemExit]
    assert loop_thread.run("answer()", answer) == 42


def test_the_last_operation_begins_again_if_cancelled_unbegun(loop_thread: LoopThread) -> None:
    held, began = threading.Event(), threading.Event()

    async def hold() -> None:
        held.wait(PATIENCE)
        # The last operation becomes a task in the next step, and is cancelled in the same.
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: [task.cancel() for task in asyncio.all_tasks()])

    async def stop() -> None:
        began.set()
        loop_thread.stop()

    started(loop_thread, hold)
    last = loop_thread.finish(stop)
    held.set()
    assert outcome(last.future) is None
    assert began.is_set()
    assert loop_thread.join(PATIENCE)


def test_the_last_operation_begins_once_though_it_is_handed_over_twice(
    loop_thread: LoopThread,
) -> None:
    held, begun = threading.Event(), list[int]()

    async def hold() -> None:
        held.wait(PATIENCE)

    async def stop() -> None:
        begun.append(1)
        loop_thread.stop()

    started(loop_thread, hold)
    last = loop_thread.finish(stop)
    last.accepted = False  # as if it had been interrupted before this was noted
    assert loop_thread.finish(stop) is last
    held.set()
    assert outcome(last.future) is None
    assert loop_thread.join(PATIENCE)
    assert begun == [1]


def test_what_is_given_up_before_it_could_begin_is_not_done(loop_thread: LoopThread) -> None:
    held, done = threading.Event(), list[int]()

    async def hold() -> None:
        held.wait(PATIENCE)

    async def work() -> None:
        done.append(1)

    started(loop_thread, hold)
    assert started(loop_thread, work).future.cancel()
    held.set()
    assert loop_thread.run("answer()", answer) == 42
    assert done == []


def test_what_is_broken_off_keeps_its_place_until_it_has_ended(loop_thread: LoopThread) -> None:
    backlog, begun, door = SubmissionBacklog(1), threading.Event(), Door()

    async def slow_to_end() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await door.pass_()

    operation = loop_thread.operation(backlog)
    loop_thread.start(operation, lambda: slow_to_end)
    assert begun.wait(PATIENCE)
    operation.discard()
    assert operation.future.cancelled()
    assert backlog.pending == 1
    door.open()
    backlog.flush(PATIENCE)


@pytest.mark.parametrize("drained", [True, False])
def test_what_is_accepted_at_the_very_moment_of_closing_is_told(
    loop_thread: LoopThread, drained: bool
) -> None:
    async def stop() -> None:
        if drained:
            await loop_thread.drain(asyncio.get_running_loop().time(), 1.0)
        loop_thread.stop()
        late = loop_thread.operation()
        loop_thread._enqueue(late, answer)
        came_late.append(late)

    came_late: list[Any] = []
    outcome(loop_thread.finish(stop).future)
    loop_thread.join(PATIENCE)
    assert came_late[0].future.cancelled()
    over = loop_thread.operation()
    with pytest.raises(BuilderClosedError):
        loop_thread._enqueue(over, answer)
