"""What ends a program must reach it, and nothing of ours may be left undone on the way."""

from __future__ import annotations

import asyncio
from typing import Any

PROGRAM_ENDS = (KeyboardInterrupt, SystemExit)
"""What is meant for the whole program, wherever it is raised."""


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def running_task() -> asyncio.Task[Any] | None:
    """Return the task that runs in this thread, if one does."""
    return None if running_loop() is None else asyncio.current_task()


def pass_on(error: BaseException) -> None:
    """Raise what ends the program out of the running event loop, in a turn of its own.

    Whoever catches everything, so that nobody is left waiting, calls this with what was caught.
    Where no loop runs it is raised here. Any other error is the caller's to report, and stays here.
    """
    if not issubclass(type(error), PROGRAM_ENDS):  # asking the error itself may fail
        return
    loop = running_loop()
    if loop is None:
        raise error
    loop.call_soon(_raise, error)


def _raise(error: BaseException) -> None:
    raise error


def look_after(task: asyncio.Task[Any], tasks: set[asyncio.Task[Any]]) -> None:
    """Keep a task among others until it has ended; what it raises then counts as seen."""

    # No partial of the tasks: asyncio shows its arguments, the tasks theirs, and so on without end.
    def ended(task: asyncio.Task[Any]) -> None:
        tasks.discard(task)
        if not task.cancelled():
            task.exception()

    tasks.add(task)
    task.add_done_callback(ended)
