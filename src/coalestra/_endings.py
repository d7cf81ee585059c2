"""What ends a program must reach it, and nothing of ours may be left undone on the way."""

from __future__ import annotations

import asyncio

PROGRAM_ENDS = (KeyboardInterrupt, SystemExit)
"""What is meant for the whole program, wherever it is raised."""


def pass_on(error: BaseException) -> None:
    """Raise what ends the program out of the running event loop, in a turn of its own.

    Whoever catches everything, so that nobody is left waiting, calls this with what was caught.
    Where no loop runs it is raised here. Any other error is the caller's to report, and stays here.
    """
    if not isinstance(error, PROGRAM_ENDS):
        return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        loop = None
    if loop is None:
        raise error
    loop.call_soon(_raise, error)


def _raise(error: BaseException) -> None:
    raise error
