"""Calling what an application wrote: plain or async, here or in a worker thread.

Only ordinary exceptions leave a call. An exception that would end a generator, a task or the
process is the callable's mistake, and becomes a `RuntimeError` that says so.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from coalestra.concurrency.threads import threads_of_context
from coalestra.core.values import SourcePayload

T = TypeVar("T")

_NOT_AWAITABLE = frozenset({SourcePayload, bool, dict, float, int, list, str, tuple, type(None)})
"""What callables most often return; for others it takes a closer look."""

_ENDINGS_OF_COROUTINES = (KeyboardInterrupt, GeneratorExit)


class Invocation:
    """One callable of an adapter, and how to call it.

    Attributes:
        role: what messages call it, such as ``fetcher of source 'rest'``.
        in_thread: whether it runs in a worker thread; a coroutine function never does.
    """

    __slots__ = ("_function", "_label", "in_thread", "role")

    def __init__(
        self, function: Callable[..., Any], *, source: str, parameter: str, in_thread: bool
    ) -> None:
        self._function = function
        self._label = source
        self.role: str = f"{parameter} of source {source!r}"
        self.in_thread: bool = in_thread and not is_coroutine_function(function)

    async def call(self, *arguments: Any) -> Any:
        """Return the result, awaited if it is awaitable.

        Raises:
            RuntimeError: in place of an exception that must not leave a source.
            Exception: whatever else the callable raised.
        """
        asked = _requests_to_cancel()
        if self.in_thread:
            result = await self._call_in_thread(arguments)
        else:
            result = self.call_now(*arguments)
        if type(result) in _NOT_AWAITABLE:
            return result
        if inspect.isawaitable(result):
            return await self._awaited(result, asked)
        return result

    def call_now(self, *arguments: Any) -> Any:
        """Call it in this thread and return what it returns, awaitable or not; see `call`."""
        try:
            return self._function(*arguments)
        except BaseException as error:
            self._check(error)
            raise

    def answer_now(self, *arguments: Any) -> Any:
        """Return the result of a callable that has to be plain.

        Raises:
            TypeError: if it returned an awaitable.
        """
        try:
            result = self._function(*arguments)
        except BaseException as error:
            self._check(error)
            raise
        if type(result) in _NOT_AWAITABLE:
            return result
        if inspect.isawaitable(result):
            _discard(result)
            raise TypeError(f"{self.role} must be a plain function, got one that is async")
        return result

    async def _call_in_thread(self, arguments: tuple[Any, ...]) -> Any:
        returned: list[Any] = []
        try:
            await threads_of_context().run(self._deliver, returned, arguments, label=self._label)
        except asyncio.CancelledError:
            for result in returned:
                _discard(result)
            raise
        return returned.pop()

    def _deliver(self, returned: list[Any], arguments: tuple[Any, ...]) -> None:
        returned.append(self.call_now(*arguments))

    async def _awaited(self, awaitable: Awaitable[T], asked: int | None) -> T:
        try:
            return await awaitable
        except asyncio.CancelledError as error:
            # Before Python 3.11 a task does not say who asked, so there the caller has to judge.
            if asked is None or _requests_to_cancel() != asked:
                raise
            raise self._misuse(error) from error
        except (Exception, *_ENDINGS_OF_COROUTINES):
            raise
        except BaseException as error:
            raise self._misuse(error) from error

    def _check(self, error: BaseException) -> None:
        """Raise a `RuntimeError` in place of an exception that must not leave a source."""
        if isinstance(error, Exception):
            if not isinstance(error, StopIteration):
                return
        elif isinstance(error, KeyboardInterrupt) and _on_main_thread():
            return
        raise self._misuse(error) from error

    def _misuse(self, error: BaseException) -> RuntimeError:
        return RuntimeError(
            f"{self.role} may raise ordinary exceptions only, got {type(error).__qualname__}; "
            "catch it there and raise what failed"
        )

    def __repr__(self) -> str:
        return f"<Invocation {self.role} in_thread={self.in_thread}>"


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Say whether calling `function` only makes a coroutine, so that nothing blocks yet."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _discard(result: Any) -> None:
    """Close a coroutine that nobody is going to await."""
    if inspect.iscoroutine(result):
        result.close()


if sys.version_info >= (3, 11):

    def _requests_to_cancel() -> int | None:
        task = asyncio.current_task()
        return None if task is None else task.cancelling()

else:

    def _requests_to_cancel() -> int | None:
        return None
