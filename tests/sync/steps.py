"""Small pieces that the tests of the sync faces share."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from coalestra.core.keys import ResourceKey
from coalestra.sync import THREAD_NAME

T = TypeVar("T")

PATIENCE = 30.0
"""Real seconds after which a thread that should have come is given up."""

PRICE = ResourceKey("market", "price", "BTC")
VOLUME = ResourceKey("market", "volume", "BTC")


class Door:
    """Holds coroutines of any loop until some thread opens it, and tells when they have come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.entered = 0
        self._open = False
        self._lock = threading.Lock()
        self._held: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def pass_(self) -> None:
        event = asyncio.Event()
        with self._lock:
            self.entered += 1
            if not self._open:
                self._held.append((asyncio.get_running_loop(), event))
            else:
                event.set()
        self.reached.set()
        await event.wait()

    def wait_reached(self) -> None:
        assert self.reached.wait(PATIENCE)

    def open(self) -> None:
        with self._lock:
            self._open = True
            held, self._held = self._held, []
        for loop, event in held:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)


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


def in_a_fork(function: Any) -> str:
    """The message of the RuntimeError that ``function`` raises in a forked process."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        message = "nothing was raised"
        try:
            function()
        except RuntimeError as error:
            message = str(error)
        except BaseException as error:
            message = repr(error)
        finally:
            os.write(writer, message.encode())
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        message = stream.read()
    os.waitpid(child, 0)
    return message


def loop_threads() -> list[threading.Thread]:
    """Every thread that runs the loop of a sync facade."""
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads go on until it holds."""
    pause = threading.Event()
    for _ in range(int(PATIENCE / 0.001)):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it never came true")
