"""What happens in other threads and processes while a test runs."""

from __future__ import annotations

import functools
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

PATIENCE = 30.0
"""Real seconds after which a thread that should have come is given up."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Call ``function`` in a thread of its own; the future holds what came of it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="test caller", daemon=True).start()
    return future


def outcome(future: Future[T]) -> T:
    """What came of it, within reason."""
    return future.result(PATIENCE)


def error_of(future: Future[Any]) -> BaseException | None:
    """The exception it ended with, within reason."""
    return future.exception(PATIENCE)


def side_by_side(count: int, call: Callable[[int], object]) -> None:
    """Make a call in so many threads, all of which begin together, and wait for them."""
    start = threading.Barrier(count)

    def begin(number: int) -> None:
        start.wait(PATIENCE)
        call(number)

    for future in [in_thread(functools.partial(begin, number)) for number in range(count)]:
        outcome(future)


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads go on until it holds."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it never came true")


def in_a_child(check: Callable[[], object]) -> None:
    """Assert that a check passes in a forked process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        signal.alarm(60)
        try:
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the check of the child did not pass"
