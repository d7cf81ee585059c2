"""Worker threads: results, errors, context, and callers who may not leave before the thread."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.threads import Job, WorkerThreads, current_threads
from tests.support import ThreadGate, begun, drop, settle
from tests.support.elsewhere import in_a_child, needs_fork
from tests.support.running import no_more_threads
from tests.support.strikes import at_every_line

pytestmark = pytest.mark.concurrency

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")


def ident() -> int:
    return threading.get_ident()


async def test_calls_side_by_side_have_a_thread_each(threads: WorkerThreads) -> None:
    """Nothing queues behind a blocked thread."""
    gate = ThreadGate()
    calls = [asyncio.create_task(threads.run(gate.pass_, label="blocked")) for _ in range(3)]
    await settle()
    gate.wait_arrived(3)
    assert threads.busy == {"blocked": 3}
    gate.open()
    await asyncio.gather(*calls)
    assert threads.busy == {}
    assert threads.idle == 3


async def test_calls_are_counted_by_the_functions_name_at_first(threads: WorkerThreads) -> None:
    """The name that is told when a thread hangs at closing time."""
    gate = ThreadGate()
    call = await begun(threads.run(gate.pass_))
    assert dict(threads.busy) == {"ThreadGate.pass_": 1}
    assert repr(threads) == "<WorkerThreads busy={'ThreadGate.pass_': 1} idle=0 closed=False>"
    gate.open()
    await call


async def test_a_call_cancelled_as_its_result_arrives_is_cancelled(threads: WorkerThreads) -> None:
    """The request is never lost, the result is."""
    loop = asyncio.get_running_loop()
    task: asyncio.Task[None] | None = None

    def function() -> None:
        loop.call_soon_threadsafe(lambda: task and task.cancel())

    task = asyncio.create_task(threads.run(function))
    await asyncio.wait([task])
    assert task.cancelled()


async def test_closed_threads_refuse_work_and_end(threads: WorkerThreads) -> None:
    """Closing waits for those at rest."""
    others = set(threading.enumerate())  # of which some may end meanwhile
    await threads.run(ident)
    (mine,) = set(threading.enumerate()) - others
    threads.close()
    assert not mine.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        await threads.run(ident)
    assert (threads.busy, threads.idle, threads.closed) == ({}, 0, True)


async def test_a_thread_at_work_while_closing_ends_with_its_work(threads: WorkerThreads) -> None:
    """It cannot be stopped, its result still arrives, and it does not stay."""
    gate, seen = ThreadGate(), []

    def work() -> str:
        seen.append(threading.current_thread())
        gate.pass_()
        return "late"

    call = await begun(threads.run(work))
    gate.wait_arrived()
    threads.close()
    assert threads.busy
    gate.open()
    assert await call == "late"
    assert threads.idle == 0
    seen[0].join()
    assert (threads.busy, threads.idle, threads.closed) == ({}, 0, True)


async def test_a_thread_without_work_ends_after_its_idle_time() -> None:
    """At once here."""
    threads, seen = WorkerThreads(idle_seconds=0), []
    await threads.run(lambda: seen.append(threading.current_thread()))
    seen[0].join()
    assert threads.idle == 0
    for _ in range(50):
        assert await threads.run(max, 1, 2) == 2
    threads.close()


class LateBox(queue.SimpleQueue[Any]):
    """A letter box in which the wait for the second letter times out just as it is posted."""

    def __init__(self) -> None:
        self.posted = threading.Semaphore(0)
        self.waits = 0

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self.posted.release()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        self.waits += 1
        if self.waits == 2:
            self.posted.acquire()
            raise queue.Empty
        if self.waits != 3:
            self.posted.acquire()
        return super().get()


async def test_work_assigned_to_a_thread_that_is_about_to_end_is_still_done(
    threads: WorkerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wait timed out in the moment between the assignment and the look into the box."""
    monkeypatch.setattr(queue, "SimpleQueue", LateBox)
    first = await threads.run(ident)
    monkeypatch.undo()
    assert await threads.run(ident) == first


async def test_work_that_must_not_be_lost_is_done_here_where_no_thread_can_be_started(
    threads: WorkerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of the context and with every ending, as in a thread."""
    no_more_threads(monkeypatch)
    VARIABLE.set("callers")
    assert await threads.run(ident, or_here=True) == ident()
    assert await threads.run(VARIABLE.get, or_here=True) == "callers"
    await threads.run(VARIABLE.set, "changed", or_here=True)
    assert VARIABLE.get() == "callers"
    with pytest.raises(KeyError):
        await threads.run({}.__getitem__, 1, or_here=True)
    with pytest.raises(RuntimeError, match="the call's own"):
        await threads.run(fail_with, RuntimeError("the call's own"), or_here=True)
    assert threads.busy == {}


async def test_a_thread_at_rest_is_used_where_no_other_can_be_started(
    threads: WorkerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop is blocked only if there is no other way."""
    here = ident()
    at_rest = await threads.run(ident)
    no_more_threads(monkeypatch)
    assert await threads.run(ident, or_here=True) == at_rest != here


async def test_no_thread_is_relied_on_while_the_interpreter_ends(
    threads: WorkerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Daemons stand still by then: what is given to one that seems to rest never ends."""
    await threads.run(ident)
    monkeypatch.setattr(sys, "is_finalizing", lambda: True)
    assert await threads.run(ident, or_here=True) == ident()
    with pytest.raises(RuntimeError, match="as the interpreter is ending"):
        await threads.run(ident)
    assert (threads.busy, threads.idle) == ({}, 1)
    monkeypatch.undo()


def fail_with(error: BaseException) -> None:
    raise error


async def test_a_call_that_stops_an_iteration_fails_like_any_other(threads: WorkerThreads) -> None:
    """``StopIteration`` can pass neither through a future nor through a coroutine."""
    with pytest.raises(RuntimeError) as caught:
        await threads.run(next, iter(()))
    assert isinstance(caught.value.__cause__, StopIteration)
    assert threads.busy == {}


async def test_an_interrupt_while_a_call_is_handed_over_leaves_it_uncounted(
    threads: WorkerThreads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may raise at any line, also as the thread is being started."""
    monkeypatch.setattr(threading.Thread, "start", lambda _: fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        await threads.run(ident)
    assert threads.busy == {}


@pytest.mark.parametrize("reported", [False, True])
def test_a_call_whose_loop_has_closed_is_no_longer_counted(
    threads: WorkerThreads, reported: bool
) -> None:
    """The thread ends some time, and tells nobody; or has told a loop that was then closed."""
    gate, told = ThreadGate(), threading.Event()
    loop = asyncio.new_event_loop()
    coroutine = threads.run(gate.pass_)
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0))
    gate.wait_arrived()
    tell = loop.call_soon_threadsafe

    def told_of(callback: Callable[[], object]) -> None:
        tell(callback)
        told.set()

    if reported:
        loop.call_soon_threadsafe = told_of  # type: ignore[method-assign,assignment]
        gate.open()
        assert told.wait(30)
    drop(loop)
    assert not task.done()
    assert sum(threads.busy.values()) == (not reported)
    coroutine.close()
    gate.open()

    async def next_call() -> None:
        while threads.busy:
            await threads.run(int)

    asyncio.run(next_call())


async def test_a_context_that_outlives_its_threads_has_those_of_the_process() -> None:
    """What a source has begun goes on, and copies payloads, when its builder is closed."""
    own = WorkerThreads()
    token = current_threads.set(own)
    own.close()
    copies = PayloadCopies("cache", run_in_thread=True)
    assert (await copies.seal([1], context=""))[0] == [1]
    current_threads.reset(token)


@needs_fork
def test_a_forked_process_starts_without_threads(threads: WorkerThreads) -> None:
    """Those of its parent do not exist in it, and must not be given work."""
    asyncio.run(threads.run(ident))
    assert threads.idle == 1

    def in_the_child() -> None:
        assert (threads.idle, threads.busy) == (0, {})

    in_a_child(in_the_child)
    assert threads.idle == 1


@needs_fork
def test_a_call_whose_thread_a_fork_has_lost_ends_with_an_error(threads: WorkerThreads) -> None:
    """In the child nobody is at work, so who waits there would wait for ever."""
    gate = ThreadGate()

    async def fork_while_a_thread_works() -> None:
        ended: list[Job[None]] = []
        told = asyncio.Event()

        def on_end(job: Job[None]) -> None:
            ended.append(job)
            told.set()

        def in_the_child() -> None:
            with pytest.raises(RuntimeError, match="'work' did not survive a fork"):
                ended.pop().outcome()

        threads.start(gate.pass_, "work", on_end)
        in_a_child(in_the_child)
        assert not ended
        gate.open()
        await told.wait()

    asyncio.run(fork_while_a_thread_works())


def test_threads_may_be_told_to_rest_longer_than_threads_can_wait() -> None:
    """It is for as long as it takes."""
    threads = WorkerThreads(idle_seconds=1e300)
    assert asyncio.run(threads.run(max, 1, 2)) == 2
    threads.close()


def test_a_signal_handler_may_use_the_threads_wherever_it_strikes() -> None:
    """Nothing is locked that it could wait for, and no call is lost or counted for ever."""

    async def main() -> None:
        threads = WorkerThreads()
        loop = asyncio.get_running_loop()
        ended: list[int] = []
        told = asyncio.Event()

        def on_end(job: Job[int]) -> None:
            ended.append(job.outcome())
            told.set()

        def start() -> None:
            threads.start(ident, "work", on_end)

        def strike() -> None:
            start()
            assert sum(threads.busy.values()) >= 1
            assert threads.idle >= 0
            threads.end_idle()

        expected = 1 + at_every_line(start, strike) * 2 + 1
        while threads.busy:
            told.clear()
            await told.wait()
        assert len(ended) == expected
        assert loop.time()
        threads.close()

    asyncio.run(main())


class Interrupt(BaseException):
    """What a signal handler raises."""


def test_an_interrupt_at_any_line_of_a_start_leaves_no_call_counted_for_ever() -> None:
    """What has been given to a thread ends there; what has not is taken back."""

    async def main() -> None:
        threads = WorkerThreads()

        def start() -> None:
            threads.start(ident, "work", lambda _: None)

        at_every_line(start, lambda: fail_with(Interrupt()), errors=(Interrupt,))
        for _ in range(1000):
            if not threads.busy:
                break
            await threads.run(ident)
        assert threads.busy == {}
        threads.close()

    asyncio.run(main())
