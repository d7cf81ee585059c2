"""Which threads may still post something, decided without waiting for luck."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from types import SimpleNamespace

import pytest

from coalestra.concurrency.threads import WorkerThreads
from coalestra.observability import BufferedEventSink
from tests.observability.recording import Recorder
from tests.support import ThreadGate, begun, settle, thread_watch
from tests.support.elsewhere import wait_until
from tests.support.thread_watch import BLOCKED_SECONDS, ThreadWatch, library_jobs
from tests.support.virtual_loop import PATIENCE


async def test_a_job_counts_as_work_before_its_thread_has_woken_up() -> None:
    threads = WorkerThreads()
    await threads.run(int)
    await settle()  # until the thread is back in its loop
    assert ThreadWatch().working(jobs=0) == []
    assert ThreadWatch().working(jobs=1) == ["1 call(s) handed to a thread"]
    threads.close()


async def test_the_jobs_of_the_library_are_counted_until_the_loop_knows_their_end() -> None:
    threads, gate = WorkerThreads(), ThreadGate()
    before = library_jobs()
    call = await begun(threads.run(gate.pass_))
    assert library_jobs() - before == 1
    gate.open()
    await call
    assert library_jobs() == before
    threads.close()


def test_a_thread_held_at_a_gate_is_no_work_until_the_gate_opens() -> None:
    watch = ThreadWatch()
    gate = ThreadGate()
    thread = threading.Thread(target=gate.pass_, name="visitor")
    thread.start()
    gate.wait_arrived()
    assert watch.working(jobs=0) == []  # at the first look, with nothing to compare it with
    gate.open()
    thread.join()
    assert watch.working(jobs=0) == []


def test_a_thread_that_was_there_before_the_loop_is_none_of_its_business() -> None:
    release = threading.Event()
    older = threading.Thread(target=release.wait)
    older.start()
    assert ThreadWatch().working(jobs=0) == []
    release.set()
    older.join()


async def test_a_blocked_thread_is_given_up_long_before_the_end_of_patience() -> None:
    released = threading.Event()
    call = asyncio.create_task(asyncio.to_thread(released.wait, 10))
    began = time.monotonic()
    await settle()
    assert BLOCKED_SECONDS <= time.monotonic() - began < PATIENCE
    released.set()
    await call


def waiting_thread(condition: threading.Condition) -> threading.Thread:
    """A thread that has begun to wait for the condition; the caller may take its lock."""

    def wait() -> None:
        with condition:
            beginning.set()
            condition.wait(30)

    beginning = threading.Event()
    thread = threading.Thread(target=wait, name="sleeper")
    thread.start()
    assert beginning.wait(30)
    return thread


@pytest.fixture
def looks_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let more than the time that makes a thread count as blocked pass between any two looks."""
    clock = itertools.count(1, 2 * BLOCKED_SECONDS)
    monkeypatch.setattr(thread_watch, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def is_given_up(watch: ThreadWatch) -> bool:
    """Whether nobody counts as working any more at the second look."""
    watch.working(jobs=0)
    return watch.working(jobs=0) == []


@pytest.mark.usefixtures("looks_far_apart")
def test_a_thread_that_has_been_notified_is_working_however_long_it_gets_no_processor() -> None:
    """Holding the lock that it needs to go on stands for a machine that is busy elsewhere."""
    watch, condition = ThreadWatch(), threading.Condition()
    thread = waiting_thread(condition)
    with condition:
        assert is_given_up(watch)
        condition.notify()
        assert not is_given_up(watch)
    thread.join()


@pytest.mark.usefixtures("looks_far_apart")
def test_a_buffer_that_has_something_to_deliver_is_working_however_long_it_must_wait() -> None:
    """A bell that is rung and not heard stands for a machine that is busy elsewhere."""
    watch, sink = ThreadWatch(), Recorder()
    buffer, processor = BufferedEventSink(sink), threading.Event()
    buffer.queue._bell = SimpleNamespace(  # type: ignore[assignment]  # a bell
        empty=bool, get=processor.wait
    )
    buffer.emit("first")
    assert buffer.flush(30)
    wait_until(lambda: processor._cond._waiters)  # type: ignore[attr-defined]  # at its bell
    assert is_given_up(watch)
    buffer.emit("second")
    assert not is_given_up(watch)
    processor.set()
    assert buffer.close(timeout=30)
    assert sink.emitted == ["first", "second"]


@pytest.mark.usefixtures("looks_far_apart")
def test_who_waits_for_the_end_of_a_thread_is_blocked_as_long_as_that_one() -> None:
    watch, condition = ThreadWatch(), threading.Condition()
    sleeper = waiting_thread(condition)
    follower = threading.Thread(target=sleeper.join, name="follower")
    follower.start()
    with condition:
        wait_until(lambda: is_given_up(watch))  # the follower may not have got there yet
        condition.notify()
    follower.join()
    assert watch.working(jobs=0) == []


@pytest.mark.usefixtures("looks_far_apart")
def test_a_thread_that_has_not_begun_its_work_is_working_however_long_it_must_wait() -> None:
    """Holding it where it tells that it has started stands for a machine that is busy elsewhere."""

    class Held(threading.Event):
        def set(self) -> None:
            super().set()
            processor.wait(30)

    watch, processor = ThreadWatch(), threading.Event()
    thread = threading.Thread(target=int, name="late")
    vars(thread)["_started"] = Held()
    thread.start()
    assert not is_given_up(watch)
    processor.set()
    thread.join()
    assert watch.working(jobs=0) == []
