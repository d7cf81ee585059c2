"""Run one coroutine on a fresh loop and look at what it leaves behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import FrameType, ModuleType
from typing import Any, TypeVar

import pytest

from tests.support.gates import release_threads
from tests.support.virtual_loop import Deadlock, VirtualLoop, callback_of, describe

T = TypeVar("T")


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Within the block no finalizer of what other tests have left runs, and none is counted."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Within the block whatever stands in a circle stays; what stood in one before is gone.

    What is there by then is looked at by no collection any more, and is not among `get_objects`.
    """
    gc.collect()
    gc.freeze()
    with nothing_collected():
        yield


def no_more_threads(patch: pytest.MonkeyPatch) -> None:
    """The system has none to give from now on."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    patch.setattr(threading.Thread, "start", refuse)


class Panic(BaseException):
    """No ordinary exception, as test frameworks, Rust and greenlets raise them."""


class Leak(AssertionError):
    """A test ended and something of it was still alive."""


def run_virtual(
    coroutine: Coroutine[Any, Any, T],
    *,
    loop: VirtualLoop | None = None,
    leaks_allowed: bool = False,
) -> T:
    """Run ``coroutine`` on a virtual loop; raise ``Leak`` if a task, timer or fault is left.

    Args:
        coroutine: the main task of the run.
        loop: a fresh loop to use (and close) instead of a new ``VirtualLoop``.
        leaks_allowed: clean up silently instead.
    """
    loop = VirtualLoop() if loop is None else loop
    try:
        result = loop.run_until_complete(coroutine)
        left = leftovers(loop)
        faults = list(loop.faults)
    finally:
        _wind_up(loop)
    if leaks_allowed:
        return result
    if left:
        raise Leak("left behind at the end:" + "".join(f"\n  {line}" for line in left))
    if faults:
        error = next((fault["exception"] for fault in faults if "exception" in fault), None)
        raise Leak(
            "reported to the event loop and handled by nobody: "
            + "; ".join(str(fault.get("message")) for fault in faults)
        ) from error
    return result


def run_real(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run ``coroutine`` on a plain loop in debug mode; raise ``Leak`` if a task is left."""

    async def main() -> tuple[T, list[str]]:
        # Its futures keep no stacks, which are most of what debug mode costs; the checks stay.
        vars(asyncio.get_running_loop())["get_debug"] = bool
        result = await coroutine
        others = asyncio.all_tasks() - {asyncio.current_task()}
        return result, [describe(task) for task in others if not task.done()]

    result, left = asyncio.run(main(), debug=True)
    if left:
        raise Leak("left behind at the end:" + "".join(f"\n  {line}" for line in left))
    return result


def profiled(work: Callable[[], object]) -> Counter[str]:
    """Do the work, and count what the interpreter tells of it: calls and returns, by their kind."""
    events: Counter[str] = Counter()

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        events[event] += 1

    with nothing_collected():
        sys.setprofile(count)
        try:
            work()
        finally:
            sys.setprofile(None)
    return events


async def lines_run(module: ModuleType, work: Awaitable[object]) -> int:
    """Do the work, and count the lines of a module that are run: what grows as it should not."""
    lines, its_own = 0, vars(module)

    def count(_frame: FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
        return count

    def trace(frame: FrameType, _event: str, _: object) -> Any:
        return count if frame.f_globals is its_own else None

    before = sys.gettrace()
    with nothing_collected():
        sys.settrace(trace)
        try:
            await work
        finally:
            sys.settrace(before)
    return lines


def drop(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop under the tasks that are under way on it, as a program that is broken off does.

    The collector says of each that it was pending, some time, in the log of another test.
    """
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own switch
    loop.close()


def closes_loops_and_tells(close: Callable[[Any], None], told: list[str]) -> Callable[[Any], None]:
    """What closes loops, and tells which tasks were under way then, but for those of `drop`."""

    def closing(self: asyncio.AbstractEventLoop) -> None:
        tasks: set[Any] = set() if self.is_closed() else asyncio.all_tasks(self)
        told.extend(describe(task) for task in tasks if task._log_destroy_pending)
        close(self)

    return closing


def leftovers(loop: VirtualLoop) -> list[str]:
    """Every task and timer still alive on a loop that has stopped, one line each."""
    tasks = [f"task {describe(task)}" for task in asyncio.all_tasks(loop) if not task.done()]
    timers = [
        f"timer due in {handle.when() - loop.time():g} s: {callback_name(handle)}"
        for handle in loop.live_timers()
    ]
    return sorted(tasks) + sorted(timers)


def callback_name(handle: asyncio.Handle) -> str:
    """The name of what a handle will call."""
    callback = callback_of(handle)
    module = getattr(callback, "__module__", "?")
    return f"{module}.{getattr(callback, '__qualname__', repr(callback))}"


def _wind_up(loop: VirtualLoop) -> None:
    """Let held threads go, cancel what is left, and close the loop."""
    try:
        release_threads()
        tasks = [task for task in asyncio.all_tasks(loop) if not task.done()]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(Deadlock):  # what led here is the better story
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks, timeout=60))
            loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        for task in asyncio.all_tasks(loop):  # broken off once more: what never began is no news
            coroutine = task.get_coro()
            if inspect.iscoroutine(coroutine) and _is_unbegun(coroutine):
                coroutine.close()
        drop(loop)


def _is_unbegun(coroutine: Coroutine[Any, Any, Any]) -> bool:
    return inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED


def until_logged() -> None:
    """Wait until what the library logs of its own accord is written."""
    for thread in threading.enumerate():
        if thread.name == "coalestra-log":
            thread.join(10)
