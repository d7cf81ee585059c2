"""Deadlines, cutting off what runs past one, and telling whose a cancellation is."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable
from typing import Any

from coalestra._endings import running_loop
from coalestra.core.protocols import Clock

if sys.version_info >= (3, 11):

    def _counting(task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        return task

else:
    _SHADOWED = "cancel"

    class _Counting:
        """Stands in for one task's ``cancel`` and counts the requests, as newer tasks do.

        Only who has bound the method before (``call_later(1, task.cancel)``) escapes that count,
        and is still heard unless the request falls into the very step of one's own.
        """

        __slots__ = ("_cancel", "_requests", "parties", "task")

        def __init__(self, task: asyncio.Task[Any]) -> None:
            self.task = task
            self.parties = 0
            self._cancel = task.cancel
            self._requests = 0

        def __call__(self, msg: Any | None = None) -> bool:
            self._requests += 1
            return self._cancel(msg)

        cancel = __call__

        def cancelling(self) -> int:
            return self._requests

        def uncancel(self) -> int:
            self._requests -= 1
            return self._requests

        def end(self) -> None:
            self.parties -= 1
            if not self.parties:
                delattr(self.task, _SHADOWED)

    def _counting(task: asyncio.Task[Any]) -> _Counting:
        present: object = task.cancel
        counting = present if isinstance(present, _Counting) else _Counting(task)
        setattr(task, _SHADOWED, counting)
        counting.parties += 1
        return counting


class OwnCancellation:
    """One party's requests to cancel a task, kept apart from everybody else's until `end`."""

    __slots__ = ("_before", "_task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = _counting(task)
        self._before = self._task.cancelling()

    def request(self) -> None:
        """Cancel the task."""
        self._task.cancel()

    @property
    def asked(self) -> bool:
        """Whether anybody at all has asked since the beginning, without taking it back."""
        return self._task.cancelling() > self._before

    def withdraw(self) -> bool:
        """Take the one request back; return whether nobody else has asked since the beginning."""
        return self._task.uncancel() <= self._before

    def end(self) -> None:
        """Stop telling requests apart."""
        if sys.version_info < (3, 11):
            self._task.end()


_NOTHING_LEFT_SECONDS = 1e-6
"""Less than this is no time left: timers may fire early by their clock's resolution."""


class Deadline:
    """One absolute instant, seen on the builder's clock and on the event loop's.

    The two clocks may run apart (a clock moved by hand does), so the deadline has passed as soon
    as either says so. Its place on the loop's clock is fixed at creation or, outside of a running
    loop, when it is first asked for inside of one.

    Args:
        clock: the builder's clock.
        seconds: how long from now.
    """

    __slots__ = ("_clock", "_loop", "_loop_at", "budget_seconds", "monotonic_at")

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self.monotonic_at: float = clock.monotonic() + seconds
        self.budget_seconds: float = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_at = 0.0
        self._find_loop()

    def _find_loop(self) -> asyncio.AbstractEventLoop | None:
        if self._loop is None and (loop := running_loop()) is not None:
            self._loop_at = loop.time() + (self.monotonic_at - self._clock.monotonic())
            self._loop = loop
        return self._loop

    @property
    def loop_time(self) -> float:
        """The instant on the event loop's clock; RuntimeError if none runs and it is not fixed."""
        if self._find_loop() is None:
            raise RuntimeError(
                "loop_time is not known before the deadline was used in a running event loop"
            )
        return self._loop_at

    def remaining(self) -> float:
        """Return the seconds left, by whichever clock is further; 0.0 once it has passed."""
        left = self.monotonic_at - self._clock.monotonic()
        loop = self._find_loop()
        if loop is not None:
            left = min(left, self._loop_at - loop.time())
        return left if left > _NOTHING_LEFT_SECONDS else 0.0

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed on either clock."""
        return not self.remaining()

    def cut_off(self) -> CutOff:
        """Return a cut-off at this deadline, at once if it has passed already."""
        loop = asyncio.get_running_loop()
        return CutOff(min(self.loop_time, loop.time() + self.remaining()))

    def __repr__(self) -> str:
        return f"<Deadline budget={self.budget_seconds:g} s remaining={self.remaining():.3f} s>"


_LATE_SECONDS = 0.005
_LOOK_SECONDS = 0.02
"""A loop that is late by more than the first has the second to look at what has come meanwhile."""


async def ended_within(task: asyncio.Future[Any], seconds: float | None) -> bool:
    """Wait for so long (None: any time) for a task to end; return whether it has."""
    loop = asyncio.get_running_loop()
    until = math.inf if seconds is None else loop.time() + seconds
    await asyncio.wait([task], timeout=seconds)
    if not task.done() and loop.time() - until > _LATE_SECONDS:
        await asyncio.wait([task], timeout=_LOOK_SECONDS)
    return task.done()


class CutOffExpired(Exception):
    """The block of a `CutOff` was ended because its time was up, and for no other reason."""

    def __init__(self, when: float) -> None:
        self.when = when
        super().__init__(f"cut off at {when:.6f} on the event loop's clock")


class CutOff:
    """Ends what the current task awaits inside a ``with`` block once its time is up.

    It costs one timer handle. When the time comes, `on_expire` is called synchronously, then the
    task is cancelled, and the block ends with `CutOffExpired`. Three things to know:

    - If anybody else asked for the task's cancellation meanwhile, even in the same step of the
      loop, the block ends with `CancelledError`: a cancellation is never swallowed.
    - Cut-offs nest. When several strike together the outermost of them reports.
    - If the block survives (it caught the cancellation, or raised something else) its own outcome
      stands, and `expired` tells that the time was up before the block had ended.

    Args:
        when: the instant on the event loop's clock, or None for never.
        on_expire: called when the time is up, before anything is cancelled.
        looks: whether a loop that was held until then first looks at what has come meanwhile.

    Raises:
        RuntimeError: on entering outside of a task, or a second time.
    """

    __slots__ = ("_cancellation", "_handle", "_left", "_looks", "_on_expire", "expired", "when")

    def __init__(
        self,
        when: float | None,
        on_expire: Callable[[], object] | None = None,
        *,
        looks: bool = False,
    ) -> None:
        self.when = when
        self._on_expire = on_expire
        self._looks = looks
        self._handle: asyncio.TimerHandle | None = None
        self._cancellation: OwnCancellation | None = None
        self.expired: bool = False
        self._left = False

    def move(self, when: float | None) -> None:
        """Set another time, or none, unless the time is up."""
        if not self.expired:
            self.when = when
            if self._cancellation is not None:
                self._arm()

    def _arm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self.when is not None:
            loop = asyncio.get_running_loop()
            due = max(self.when, loop.time()) if self._looks else math.inf
            self._handle = loop.call_at(self.when, self._expire, due)

    def _expire(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - due > _LATE_SECONDS:
            self._handle = loop.call_later(_LOOK_SECONDS, self._expire, math.inf)
            return
        self._handle = None
        self.expired = True
        try:
            if self._on_expire is not None:
                self._on_expire()
        finally:
            if self._cancellation is not None:
                self._cancellation.request()

    def __enter__(self) -> CutOff:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a cut-off needs a task to cut off; enter it inside of one")
        if self._cancellation is not None or self._left:
            raise RuntimeError("a cut-off can be entered only once; make a new one")
        self._cancellation = OwnCancellation(task)
        self._arm()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self._left, self._on_expire = True, None  # it may lead to whoever keeps this
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        cancellation, self._cancellation = self._cancellation, None
        if cancellation is None:
            return
        alone = self.expired and cancellation.withdraw()
        cancellation.end()
        if alone and self.when is not None and isinstance(error, asyncio.CancelledError):
            raise CutOffExpired(self.when) from error

    def __repr__(self) -> str:
        state = "expired" if self.expired else "left" if self._left else "open"
        return f"<CutOff when={self.when} {state}>"
