"""Striking between any two lines of the library, as signal handlers and finalizers do."""

from __future__ import annotations

import linecache
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from types import FrameType
from typing import Any

import coalestra
from tests.support.running import nothing_collected

LIBRARY = os.path.dirname(coalestra.__file__) + os.sep


class Struck(BaseException):
    """What a handler raises."""


def raise_struck() -> None:
    raise Struck


def lines_of(call: Callable[[], object]) -> int:
    """How many lines of the library a call runs in this thread, the second time."""
    count = [0]

    def counted() -> None:
        count[0] += 1

    call()
    traced(call, counted)
    return count[0]


def traced(call: Callable[[], object], at_line: Callable[[], object]) -> None:
    """Make a call, and call ``at_line`` before each line of the library that it runs.

    Lines that begin a ``with`` come a second time as it ends, where no handler can strike before
    the end has been seen to; they are left out.
    """

    def tracer(frame: FrameType, event: str, _argument: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(LIBRARY):
            return None
        line = linecache.getline(file, frame.f_lineno).lstrip()
        if event == "line" and not line.startswith(("with ", "async with ")):
            at_line()
        return tracer

    before = sys.gettrace()
    with nothing_collected():
        sys.settrace(tracer)
        try:
            call()
        finally:
            sys.settrace(before)


def at_every_line(
    call: Callable[[], object],
    strike: Callable[[], object],
    *,
    errors: tuple[type[BaseException], ...] = (),
) -> int:
    """Make the call once for each of its lines, struck there; return how many that were.

    Args:
        call: what is struck.
        strike: what the handler does.
        errors: what may come out of a struck call.
    """
    lines = lines_of(call)
    for number in range(1, lines + 1):
        left = [number]

        def at_line(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                strike()

        try:
            traced(call, at_line)
        except errors:
            continue
    return lines


def in_an_interpreter_of_its_own(check: Callable[[], object]) -> None:
    """Call a function of a test module where nothing else is, as it is quick to fork there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(check).result(timeout=60)
