"""An event loop on virtual time: it never sleeps, and says so when nothing can ever happen.

When nothing is ready, the loop jumps to the next timer. When there is no timer either and no
thread that could still post something, it raises ``Deadlock`` instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import selectors
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from tests.support.thread_watch import ThreadWatch, threads_held

T = TypeVar("T")

START = 10_000.0
"""The first reading of a virtual loop's clock: unlike zero, unlike the real clock."""

PATIENCE = 5.0
"""Real seconds to wait for a working thread or a socket before going on without it."""

MOMENT = 1e-6
"""The least step of time, so that rounding cannot stop it."""

HORIZON = START + 50 * 365 * 86_400.0
"""Virtual time beyond which the loop takes endless timers for a deadlock."""


class Deadlock(AssertionError):
    """Nothing is ready, no timer is set, no thread works, and a task still waits."""

    def __init__(self, reason: str, waiting: list[str]) -> None:
        self.reason = reason
        self.waiting = tuple(waiting)
        lines = "".join(f"\n  {line}" for line in waiting) or "\n  (no task is left)"
        super().__init__(f"{reason}; still waiting:{lines}")


def describe(task: asyncio.Task[Any]) -> str:
    """A task in one line: its name, its coroutine and the innermost line where it waits."""
    name = getattr(task.get_coro(), "__qualname__", repr(task.get_coro()))
    return f"{task.get_name()} ({name}) at {innermost_line(task)}"


def innermost_line(task: asyncio.Task[Any]) -> str:
    """Where the chain of awaits of this task ends, as ``file:line in function: source``."""
    target: Any = task.get_coro()
    frame = None
    while target is not None:
        frame = getattr(target, "cr_frame", None) or getattr(target, "gi_frame", None) or frame
        target = getattr(target, "cr_await", None) or getattr(target, "gi_yieldfrom", None)
    if frame is None:
        return "its very beginning or end"
    entry = traceback.extract_stack(frame, limit=1)[-1]
    return f"{entry.filename}:{entry.lineno} in {entry.name}: {entry.line}"


def callback_of(handle: asyncio.Handle) -> Callable[..., object] | None:
    """What a handle will call; None once it is cancelled."""
    callback: Callable[..., object] | None = getattr(handle, "_callback", None)
    return callback


class _VirtualSelector(selectors.DefaultSelector):
    """Asks its loop what to do where a real selector would sleep."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            events = self.loop.pass_time(super().select, timeout)
        else:
            events = super().select(0)
        self.loop.begin_step(events)
        return events


Select = Callable[[float], list[tuple[selectors.SelectorKey, int]]]


class VirtualLoop(asyncio.SelectorEventLoop):
    """A selector event loop whose ``time()`` moves only when nothing else can happen.

    Attributes:
        steps: how many iterations the loop has begun.
        faults: what was reported to the loop's exception handler.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.faults: list[Mapping[str, Any]] = []
        self._virtual_now = START
        self._executor_jobs = 0
        self._watch = ThreadWatch()
        self._idlers: list[asyncio.Future[None]] = []
        self._interrupts: list[tuple[int, Callable[[], object]]] = []
        selector = _VirtualSelector()
        selector.loop = self
        super().__init__(selector)
        self._own_descriptors = len(selector.get_map())
        self.set_exception_handler(_collect_fault)

    if TYPE_CHECKING:  # what asyncio.BaseEventLoop keeps, and typeshed does not tell
        _ready: deque[asyncio.Handle]
        _scheduled: list[asyncio.TimerHandle]
        _selector: selectors.BaseSelector
        _thread_id: int | None
        _clock_resolution: float

    def time(self) -> float:
        return self._virtual_now

    def be_busy(self, seconds: float) -> None:
        """Let time pass within this very step, as if it took so long."""
        self._virtual_now += seconds

    # The three signatures of asyncio that follow need a TypeVarTuple, which Python 3.10 has not.

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        self._refuse_strangers("call_soon")
        return super().call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        self._refuse_strangers("call_at")
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._executor_jobs += 1
        future.add_done_callback(self._executor_job_ended)
        return future

    def interrupt(self, after_steps: int, callback: Callable[[], object]) -> Callable[[], None]:
        """Call ``callback`` as the loop begins its ``after_steps``-th step from now.

        It runs before anything that is ready in that step. Returns a function that takes the
        interrupt back.
        """
        entry = (self.steps + after_steps, callback)
        self._interrupts.append(entry)

        def withdraw() -> None:
            if entry in self._interrupts:
                self._interrupts.remove(entry)

        return withdraw

    def interrupt_when(self, holds: Callable[[], object], callback: Callable[[], object]) -> None:
        """Call ``callback`` as the first step begins before which ``holds`` has become true."""

        def look() -> None:
            if holds():
                callback()
            else:
                self.interrupt(1, look)

        self.interrupt(1, look)

    async def settled(self) -> None:
        """Wait until nothing more can happen unless time moves; threads at work count too."""
        future: asyncio.Future[None] = self.create_future()
        self._idlers.append(future)
        await future

    def live_timers(self) -> list[asyncio.TimerHandle]:
        """Every timer that is set and not cancelled."""
        return [handle for handle in self._scheduled if not handle.cancelled()]

    def begin_step(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Called by the selector as a step begins, with the input and output that is ready."""
        self.steps += 1
        due = [entry for entry in self._interrupts if entry[0] <= self.steps]
        for entry in due:
            self._interrupts.remove(entry)
            entry[1]()

    def pass_time(
        self, select: Select, timeout: float | None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """Called by the selector when nothing is ready: wait for threads, else move time."""
        events = select(0)
        if not events:
            events = self._wait_for_the_world(select, timeout)
        if events or self._ready or self._wake_idlers():
            return events
        if timeout is None:
            raise Deadlock("nothing is ready and no timer is set", self._waiting())
        self._jump(timeout)
        return []

    def _wait_for_the_world(
        self, select: Select, timeout: float | None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        """Give working threads and open sockets some real time to report."""
        patience = time.monotonic() + PATIENCE
        pause = 0.0005
        self._watch.look_afresh()
        while time.monotonic() < patience:
            if not self._watch.working(self._executor_jobs):
                break
            events = select(pause)
            if events:
                return events
            pause = min(pause * 2, 0.02)
        if self._has_sockets():
            return select(PATIENCE if timeout is None and not self._idlers else 0.02)
        return select(0)

    def _has_sockets(self) -> bool:
        return len(self._selector.get_map()) > self._own_descriptors

    def _wake_idlers(self) -> bool:
        idlers, self._idlers = self._idlers, []
        for future in idlers:
            if not future.done():
                future.set_result(None)
        return bool(self._ready)

    def _jump(self, timeout: float) -> None:
        """Move time to the next timer (or by a day, the longest asyncio would sleep at once)."""
        next_timer = self._scheduled[0].when()
        if math.isinf(next_timer):
            raise Deadlock("nothing is ready and the only timers never fire", self._waiting())
        if self._virtual_now > HORIZON:
            raise Deadlock("timers go on and on and nothing else happens", self._waiting())
        # Adding a difference may miss the timer by a rounding error; its own reading cannot.
        self._virtual_now = min(next_timer, self._virtual_now + max(timeout, MOMENT))
        # asyncio fires what is due before now + resolution: a sum that must differ from now.
        self._clock_resolution = max(1e-9, 2 * math.ulp(self._virtual_now))

    def _waiting(self) -> list[str]:
        tasks = [describe(task) for task in asyncio.all_tasks(self) if not task.done()]
        return sorted(tasks) + sorted(threads_held())

    def _executor_job_ended(self, _: object) -> None:
        self._executor_jobs -= 1

    def _refuse_strangers(self, method: str) -> None:
        owner = self._thread_id
        if owner is not None and owner != threading.get_ident():
            raise RuntimeError(f"{method} from another thread; use call_soon_threadsafe")


@contextlib.contextmanager
def taking(seconds: float, *, within: float = 1e-6) -> Iterator[None]:
    """Assert that the block takes just so long by the time of the running loop."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    yield
    assert loop.time() - began == pytest.approx(seconds, abs=within)


def loop_turn() -> int:
    """How many steps the running loop has begun: two things with one number share a turn."""
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualLoop):
        raise TypeError("only a VirtualLoop counts its steps")
    return loop.steps


class ShuffledLoop(VirtualLoop):
    """A virtual loop that runs the tasks of each step in an order drawn from ``seed``.

    Only task steps change places, and no task has two in one step: everything asyncio promises
    still holds, while every order of tasks that it does not promise may come up.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = random.Random(seed)
        super().__init__()

    def begin_step(self, events: list[tuple[selectors.SelectorKey, int]]) -> None:
        super().begin_step(events)
        ready = self._ready
        places = [index for index, handle in enumerate(ready.copy()) if _steps_a_task(handle)]
        handles = [ready[index] for index in places]
        self._random.shuffle(handles)
        for index, handle in zip(places, handles, strict=True):
            ready[index] = handle


def _steps_a_task(handle: asyncio.Handle) -> bool:
    return isinstance(getattr(callback_of(handle), "__self__", None), asyncio.Task)


def _collect_fault(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    assert isinstance(loop, VirtualLoop)
    loop.faults.append(dict(context))
