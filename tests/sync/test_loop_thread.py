"""A loop in a thread: what is accepted runs, in order, and the thread ends when all of it has."""

from __future__ import annotations

import asyncio
import functools
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest

from coalestra._lockfree import Bell
from coalestra.core.errors import BuilderClosedError
from coalestra.sync import THREAD_NAME, LoopThread, Operation, SubmissionBacklog, Work
from tests.sync.steps import PATIENCE, Door, error_of, in_thread, loop_threads, outcome

pytestmark = pytest.mark.concurrency


async def answer() -> int:
    return 42


def started(
    thread: LoopThread, work: Work[Any], backlog: SubmissionBacklog | None = None
) -> Operation[Any]:
    return thread.start(work, thread.operation(backlog))


def test_work_that_fails_before_it_can_be_awaited_fails_all_the_same(
    loop_thread: LoopThread,
) -> None:
    def fail() -> Any:
        raise KeyError("missing")

    with pytest.raises(KeyError, match="missing"):
        loop_thread.run("fail()", fail)


def test_work_begins_in_the_order_in_which_it_was_accepted(loop_thread: LoopThread) -> None:
    begun: list[int] = []

    async def begin(number: int) -> None:
        begun.append(number)

    operations = [started(loop_thread, functools.partial(begin, n)) for n in range(200)]
    for operation in operations:
        outcome(operation.future)
    assert begun == list(range(200))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, also where the tests run in the background and it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_wait_cancels_the_work(loop_thread: LoopThread) -> None:
    cancelled = threading.Event()

    async def interrupt_the_caller() -> None:
        try:
            while not caller_waits():  # noqa: ASYNC110 - a blocked thread sets no event
                await asyncio.sleep(0)
            signal.pthread_kill(caller, signal.SIGINT)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def caller_waits() -> bool:
        frame = sys._current_frames()[caller]
        return frame.f_code is Bell.wait.__code__

    caller = threading.get_ident()
    with pytest.raises(KeyboardInterrupt):
        loop_thread.run("build()", interrupt_the_caller)
    assert cancelled.wait(PATIENCE)


@pytest.mark.usefixtures("interruptible")
def test_a_wait_interrupted_before_it_began_cancels_the_work_too(
    loop_thread: LoopThread,
) -> None:
    cancelled = threading.Event()

    async def interrupt_the_caller() -> None:
        signal.pthread_kill(caller, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    caller = threading.get_ident()
    with pytest.raises(KeyboardInterrupt):
        loop_thread.run("build()", interrupt_the_caller)
    assert cancelled.wait(PATIENCE)


def test_work_that_cancels_itself_tells_its_caller_so(loop_thread: LoopThread) -> None:
    async def cancel() -> None:
        raise asyncio.CancelledError

    with pytest.raises(CancelledError):
        loop_thread.run("cancel()", cancel)


def test_work_cancelled_before_it_began_never_begins(loop_thread: LoopThread) -> None:
    door = threading.Event()
    begun: list[int] = []

    async def hold_the_loop() -> None:
        door.wait(PATIENCE)

    async def begin() -> None:
        begun.append(1)

    holding = started(loop_thread, hold_the_loop)
    late = started(loop_thread, begin)
    assert late.future.cancel()
    door.set()
    outcome(holding.future)
    loop_thread.run("answer()", answer)
    assert begun == []


def test_only_the_first_last_operation_counts(loop_thread: LoopThread) -> None:
    async def stop() -> None:
        loop_thread.stop()

    first = loop_thread.finish(stop)
    assert loop_thread.finish(stop) is first
    outcome(first.future)
    assert loop_thread.join(PATIENCE)
    assert not loop_thread.alive


def test_the_thread_outlives_a_task_that_ignores_its_cancellation(
    loop_thread: LoopThread,
) -> None:
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
    assert loop_thread.alive
    door.open()


def test_cancelling_a_future_whose_loop_is_gone_does_no_harm(loop_thread: LoopThread) -> None:
    async def stop() -> None:
        loop_thread.stop()

    done = started(loop_thread, answer)
    outcome(loop_thread.finish(stop).future)
    loop_thread.join(PATIENCE)
    assert not done.future.cancel()
    assert done.future.result() == 42


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
    monkeypatch.setattr(threading.Thread, "start", refuse)
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
        LoopThread(name=THREAD_NAME, owner="the test")
    for thread in loop_threads():
        thread.join(PATIENCE)
    assert loop_threads() == []


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_generator_that_was_left_half_way_is_closed(loop_thread: LoopThread) -> None:
    closed: list[str] = []
    kept: list[Any] = []

    async def numbers() -> Any:
        try:
            yield 1
        finally:
            closed.append("closed")

    async def begin() -> None:
        kept.append(numbers())
        await kept[0].__anext__()

    async def stop() -> None:
        loop_thread.stop()

    loop_thread.run("begin()", begin)
    loop_thread.finish(stop)
    assert loop_thread.join(PATIENCE)
    assert closed == ["closed"]


def test_an_operation_given_up_on_its_way_never_begins(loop_thread: LoopThread) -> None:
    held = threading.Event()
    begun: list[int] = []

    async def hold_the_loop() -> None:
        held.wait(PATIENCE)

    async def begin() -> None:
        begun.append(1)

    started(loop_thread, hold_the_loop)
    given_up = started(loop_thread, begin)
    given_up.discard()
    held.set()
    loop_thread.run("answer()", answer)
    assert begun == []
    assert "operations=0" in repr(loop_thread)


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


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
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


def test_work_may_cancel_every_task_of_the_loop_and_the_loop_goes_on(
    loop_thread: LoopThread,
) -> None:
    async def cancel_all() -> None:
        for task in asyncio.all_tasks():
            task.cancel()

    with pytest.raises(CancelledError):  # it is one of them
        loop_thread.run("cancel_all()", cancel_all)
    assert loop_thread.run("answer()", answer) == 42


def test_the_last_operation_begins_again_if_it_is_cancelled_before_its_first_step(
    loop_thread: LoopThread,
) -> None:
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


def test_what_is_accepted_at_the_very_moment_of_closing_is_told(loop_thread: LoopThread) -> None:
    async def stop() -> None:
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
