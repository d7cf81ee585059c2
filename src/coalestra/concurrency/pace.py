"""Working through many things without holding the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable
from itertools import islice
from typing import Any, TypeVar

from coalestra._endings import running_loop

T = TypeVar("T")

Slices = Generator[None, None, T]
"""Work in slices, none of which takes long: what follows a `yield` may be done later."""

SLICE_SECONDS = 0.001_5
"""How long the library works before the event loop gets a turn."""


def at_once(slices: Slices[T]) -> T:
    """Do what could be done in slices, now; return the result."""
    while True:
        try:
            next(slices)
        except StopIteration as end:
            result: T = end.value
            return result


def portions(items: Collection[T], size: int) -> Iterable[Collection[T]]:
    """Return items in portions of a size, or as they are if they are no more than that."""
    if len(items) <= size:
        return (items,)
    rest = iter(items)
    return iter(lambda: tuple(islice(rest, size)), ())


async def side_by_side(
    several: Collection[T], do: Callable[[T], Awaitable[object]], limit: int
) -> None:
    """Do something with each of several, begun in order, no more than so many at a time."""
    rest = iter(several)

    async def work() -> None:
        for each in rest:
            await do(each)

    await all_or_none(work() for _ in range(min(limit, len(several))))


async def all_or_none(coroutines: Iterable[Any]) -> None:
    """Run coroutines side by side; if one fails or the caller is cancelled, end all and wait.

    What one fails with is raised when all have ended, so a `GeneratorExit` cannot cut that short.
    """
    tasks: list[asyncio.Task[Any]] = []
    try:
        tasks.extend(asyncio.ensure_future(each) for each in coroutines)
        if tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    except GeneratorExit:  # it is closed, and cannot wait
        with contextlib.suppress(RuntimeError):  # their loop is closed as well
            while tasks:
                tasks.pop().cancel()
        tasks.clear()
        raise
    finally:
        errors = await _ended(tasks)
        tasks.clear()
    # An error that its own traceback leads to would live, with its payloads, until a collection.
    while errors:
        raise errors.pop(0)


async def _ended(tasks: Collection[asyncio.Task[Any]]) -> list[BaseException]:
    """End all tasks and return what they raised, the culprit first."""
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True) if tasks else []
    errors = [each for each in ended if isinstance(each, BaseException)]
    return sorted(errors, key=lambda error: isinstance(error, asyncio.CancelledError))


class Pace:
    """Gives the event loop a turn whenever a slice of time is used up.

    Any number of tasks may share one: together they use one slice in each turn of the loop, however
    many they are, and however soon each is done. The first one to go on after a turn begins the
    next slice; one who starts to work calls `begin`, as the last slice may have been long ago.

    Real time is meant, whatever clock the application lives by: it is the thread that must not be
    held. A look at it costs about as much as copying a small value, so loops look at intervals.
    """

    __slots__ = ("_had", "_resting", "_turn", "_until")

    def __init__(self) -> None:
        self._resting = 0
        self._turn = 0
        self._had = False
        self._until = time.perf_counter() + SLICE_SECONDS

    def begin(self) -> bool:
        """Begin a slice, unless one is under way, or this turn has had one, or others wait for one.

        Return whether there is time left in this turn.
        """
        now = time.perf_counter()
        if now < self._until <= now + SLICE_SECONDS:  # or else the clock has been set back
            return True
        if (self._resting or self._had) and running_loop() is not None:
            return False
        self._renew(now)
        return True

    def _renew(self, now: float) -> None:
        self._until = now + SLICE_SECONDS
        loop = running_loop()
        if loop is not None:  # what is left when its loop has ended has no turns
            loop.call_soon(self.turn_over)
            self._had = True

    def turn_over(self) -> None:
        """Let there be another slice: the turn of the loop that had one is over."""
        self._had = False

    def leave_room(self, seconds: float) -> None:
        """Use so much less of this slice: others have been woken who need the time."""
        self._until -= seconds

    @property
    def due(self) -> bool:
        """Whether the slice is used up."""
        return time.perf_counter() >= self._until

    async def rest(self) -> None:
        """Let others run once, then go on in the next slice."""
        turn = self._turn
        self._resting += 1
        try:
            await asyncio.sleep(0)
        finally:
            self._resting -= 1
        if self._turn == turn:
            self._turn += 1
            self._renew(time.perf_counter())

    async def keep(self) -> bool:
        """Rest if it is time to; return whether others had a turn."""
        if not self.due:
            return False
        await self.rest()
        return True

    async def through(self, slices: Slices[T]) -> T:
        """Do what is done in slices, resting between them if it is time to; return the result."""
        self.begin()
        while True:
            try:
                next(slices)
            except StopIteration as end:
                result: T = end.value
                return result
            if self.due:
                await self.rest()

    def __repr__(self) -> str:
        return f"<Pace {self._until - time.perf_counter():+.4f} s left>"
