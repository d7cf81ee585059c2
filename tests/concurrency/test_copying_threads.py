"""Copies in threads: their bound, their queue, deadlines, cancellation and the end."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest

from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.deadline import Deadline
from coalestra.concurrency.sealing import Seal
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.errors import (
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    SnapshotDeadlineExceededError,
)
from tests.support import (
    LoopClock,
    ThreadGate,
    VirtualLoop,
    cancel_at_every_await,
    drop,
    run_virtual,
    settle,
)
from tests.support.running import no_more_threads

pytestmark = pytest.mark.concurrency


class Held:
    """Takes as long to copy as its gate stays closed."""

    def __init__(self, gate: ThreadGate, fails: bool = False) -> None:
        self.gate = gate
        self.fails = fails

    def __deepcopy__(self, memo: object) -> Held:
        self.gate.pass_()
        if self.fails:
            raise ValueError("no")
        return Held(self.gate)


def start(copies: PayloadCopies, value: Any) -> Any:
    """A task that seals ``value``."""
    return asyncio.create_task(copies.seal(value, context="test"))


async def opened(copies: PayloadCopies, value: Any, seconds: float) -> Any:
    """Copy ``value`` out within so many seconds."""
    deadline, seal = Deadline(LoopClock(), seconds), Seal("slow", copy.deepcopy, brief=False)
    return await copies.open(value, seal, context="test", deadline=deadline)


async def finish(copies: PayloadCopies, gate: ThreadGate) -> None:
    """Let every copy end."""
    gate.open()
    await copies.drain(None)
    await settle()
    assert (copies.active, copies.health().waiting_for_capacity) == (0, 0)


async def test_a_deadline_ends_the_wait_for_a_running_copy() -> None:
    """The waiter leaves in time; the slot is free only when the thread has ended."""
    gate, copies = ThreadGate(), PayloadCopies("builder", max_concurrency=1)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(SnapshotDeadlineExceededError, match=r"0\.25 s"):
        await opened(copies, Held(gate), 0.25)
    assert loop.time() - began == pytest.approx(0.25)
    health = copies.health()
    assert (health.timeout_count, health.capacity_timeout_count) == (1, 0)
    assert health.active_copies == 1
    await finish(copies, gate)


async def test_a_deadline_ends_the_wait_for_a_slot() -> None:
    """It counts as a time-out, and as one in the queue."""
    gate, copies = ThreadGate(), PayloadCopies("builder", max_concurrency=1)
    first = start(copies, Held(gate))
    await settle()
    waits = r"was waiting for a copy thread, held by 'test' \(1\)"
    with pytest.raises(SnapshotDeadlineExceededError, match=waits):
        await opened(copies, Held(gate), 0.5)
    health = copies.health()
    assert (health.timeout_count, health.capacity_timeout_count) == (1, 1)
    assert (health.waiting_for_capacity, health.started_count) == (0, 1)
    assert health.max_wait_ms == pytest.approx(500.0)
    gate.open()
    await first
    await finish(copies, gate)


async def test_cancelling_anywhere_leaves_neither_slot_nor_waiter_nor_task() -> None:
    """Three copies through one slot, cancelled at every step."""
    gate, copies = ThreadGate(), PayloadCopies("builder", max_concurrency=1)
    gate.open()

    async def work() -> None:
        others = [start(copies, Held(gate)) for _ in range(2)]
        try:
            await copies.seal(Held(gate), context="test")
        finally:
            for other in others:
                other.cancel()
            await asyncio.wait(others)

    async def check() -> None:
        await copies.drain(None)
        assert copies.active == copies.health().waiting_for_capacity == 0

    assert await cancel_at_every_await(work, check) > 1


async def test_a_failure_that_meets_a_cancellation_bothers_nobody() -> None:
    """The waiter leaves as it was told to, and the event loop has nothing to complain about."""
    gate, copies = ThreadGate(), PayloadCopies("builder")
    gate.open()

    async def work() -> None:
        with contextlib.suppress(PayloadIsolationError):
            await copies.seal(Held(gate, fails=True), context="test")

    assert await cancel_at_every_await(work, gc.collect) > 1
    assert copies.active == 0


class TestClosing:
    """Closing refuses what is new, tells who waits, and waits for what runs."""

    async def test_draining_at_rest_returns_at_once(self) -> None:
        """Also with no time given at all, and again and again."""
        copies = PayloadCopies("builder")
        copies.close()
        copies.close()
        assert await copies.drain(0.0) == 0
        assert await copies.drain(None) == 0
        assert copies.health().shutdown_complete

    async def test_a_waiter_whose_turn_came_as_it_closed_starts_nothing(self) -> None:
        """Closing comes before whoever has not begun."""
        copies = PayloadCopies("builder", max_concurrency=1)
        gate, late = ThreadGate(), ThreadGate()
        late.open()
        first = start(copies, Held(gate))
        await settle()
        second = start(copies, Held(late))
        await settle()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.interrupt_when(lambda: not copies.health().waiting_for_capacity, copies.close)
        gate.open()
        await first
        with pytest.raises(PayloadCopySubsystemClosedError):
            await second
        assert late.arrived == 0
        await settle()


async def test_without_threads_copies_are_made_in_place(
    monkeypatch: pytest.MonkeyPatch, threads: WorkerThreads
) -> None:
    """As in a container at its limit of threads: late is better than not at all."""
    gate, copies = ThreadGate(), PayloadCopies("builder", threads=threads)
    gate.open()
    no_more_threads(monkeypatch)
    payload, seal = await copies.seal(Held(gate), context="test")
    assert isinstance(await copies.open(payload, seal, context="test"), Held)
    with pytest.raises(PayloadIsolationError):
        await copies.seal(Held(gate, fails=True), context="test")
    health = copies.health()
    assert (health.started_count, health.completed_count, health.failure_count) == (3, 2, 1)
    assert copies.active == 0


async def test_a_start_that_fails_leaves_no_slot_taken(
    monkeypatch: pytest.MonkeyPatch, threads: WorkerThreads
) -> None:
    """An interrupt may strike while a thread is being started."""

    def strike(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    gate, copies = ThreadGate(), PayloadCopies("builder", max_concurrency=1, threads=threads)
    gate.open()
    monkeypatch.setattr(threading.Thread, "start", strike)
    coroutine = copies.seal(Held(gate), context="test")
    with pytest.raises(KeyboardInterrupt):
        coroutine.send(None)
    assert copies.active == 0
    monkeypatch.undo()
    await copies.seal(Held(gate), context="test")
    await settle()


async def test_an_interrupt_as_a_copy_has_been_handed_over_gives_its_slot_back_once(
    monkeypatch: pytest.MonkeyPatch, threads: WorkerThreads
) -> None:
    """The thread goes on with it, and what comes of it finds the slot given back."""
    gate, copies = ThreadGate(), PayloadCopies("builder", max_concurrency=1, threads=threads)
    begin = threads.start

    def strike(*arguments: Any, **named: Any) -> None:
        begin(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerThreads, "start", lambda _, *rest, **named: strike(*rest, **named))
    with pytest.raises(KeyboardInterrupt):
        copies.seal(Held(gate), context="test").send(None)
    assert copies.active == 0
    monkeypatch.undo()
    gate.open()
    await threads.run(int)
    await settle()
    assert copies.active == 0


async def test_whoever_cancels_every_task_leaves_no_copy_active_for_ever() -> None:
    """As recipes for shutting down do: a copy hangs on its thread, and on no task of its own."""
    copies = PayloadCopies("builder", max_concurrency=2)
    for steps in range(4):
        gate = ThreadGate()
        tasks = [start(copies, Held(gate)) for _ in range(4)]
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)
        gate.open()
        await copies.drain(None)
        assert copies.active == copies.health().waiting_for_capacity == 0
    health = copies.health()
    assert health.started_count == health.completed_count + health.failure_count


def test_a_copy_whose_loop_was_closed_keeps_no_slot_from_the_next_one(
    threads: WorkerThreads,
) -> None:
    """Its thread ends some time, and tells of that who waits for the end upon another loop."""
    gate, copies = ThreadGate(), PayloadCopies("builder", max_concurrency=1, threads=threads)

    async def begin() -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = start(copies, Held(gate))
        await asyncio.sleep(0)
        gate.wait_arrived()
        return task

    loop = asyncio.new_event_loop()
    left = loop.run_until_complete(begin())
    drop(loop)
    assert copies.active == 1
    assert not left.done()

    async def next_one() -> None:
        opened = ThreadGate()
        opened.open()
        for _ in range(2):
            assert isinstance((await copies.seal(Held(opened), context="test"))[0], Held)
        copies.close()
        assert await copies.drain(1.0) == 1
        last = asyncio.create_task(copies.drain(None))
        await settle()
        gate.open()
        assert await last == 0

    run_virtual(next_one())
    assert copies.active == 0


def test_a_copy_that_ended_as_its_loop_was_closed_is_not_active(threads: WorkerThreads) -> None:
    """The loop was told of the end, and then had no turn to hear of it."""
    gate, copies = ThreadGate(), PayloadCopies("builder", max_concurrency=1, threads=threads)
    told = threading.Event()
    loop = asyncio.new_event_loop()
    tell = loop.call_soon_threadsafe

    def told_of(callback: Callable[[], object]) -> None:
        tell(callback)
        told.set()

    loop.call_soon_threadsafe = told_of  # type: ignore[method-assign,assignment]

    async def begin() -> list[asyncio.Task[Any]]:
        return [start(copies, Held(gate)) for _ in range(2)]

    left = loop.run_until_complete(begin())
    loop.run_until_complete(asyncio.sleep(0))
    gate.wait_arrived()
    gate.open()
    assert told.wait(30)
    drop(loop)
    assert not any(task.done() for task in left)
    health = copies.health()
    assert (copies.active, health.completed_count, health.started_count) == (0, 1, 1)
