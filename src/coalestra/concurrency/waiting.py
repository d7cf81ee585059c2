"""The one waiting primitive: a first-in, first-out queue that hands over on wake.

Laws that every user may build on:

1. Waiters are woken in the order in which they came.
2. A waiter that is cancelled leaves the queue by itself and is never woken.
3. A wake-up is never lost: if the woken waiter is cancelled before it could go on, what it was
   handed goes to ``give_back``, which passes it on.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable


class WaitQueue:
    """First in, first out; for the tasks of one event loop at a time.

    The queue belongs to no loop: each waiter brings its own, and those whose loop has been closed
    are passed over.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: OrderedDict[asyncio.Future[None], None] = OrderedDict()

    def __len__(self) -> int:
        """Count the waiters that can still be woken."""
        return sum(not waiter.done() for waiter in self._waiters)

    def __bool__(self) -> bool:
        return any(not waiter.done() for waiter in self._waiters)

    def __repr__(self) -> str:
        return f"<WaitQueue waiting={len(self)}>"

    def enqueue(self) -> asyncio.Future[None]:
        """Put a new waiter at the end; whoever awaits it must `leave` if the wait is broken off."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        return waiter

    def leave(self, waiter: asyncio.Future[None]) -> bool:
        """Take a waiter out; return whether it had been woken, so that its turn must go on."""
        if waiter in self._waiters:
            del self._waiters[waiter]
            return False
        return waiter.done() and not waiter.cancelled() and waiter.exception() is None

    async def wait(self, give_back: Callable[[], object]) -> None:
        """Wait for one's turn.

        Args:
            give_back: called when the turn came but the task was cancelled (or dropped) before it
                could go on; it must hand the turn to the next.
        """
        waiter = self.enqueue()
        try:
            await waiter
        except BaseException:
            if self.leave(waiter):
                give_back()
            raise

    def wake_next(self) -> bool:
        """Wake the longest waiting; return whether there was anyone to wake."""
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if _can_be_woken(waiter):
                waiter.set_result(None)
                return True
        return False

    def wake_all(self) -> int:
        """Wake everybody; return how many there were."""
        woken = 0
        while self.wake_next():
            woken += 1
        return woken

    def refuse_all(self, make_error: Callable[[], Exception]) -> int:
        """End every wait with an exception of its own; return how many there were."""
        refused = 0
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if _can_be_woken(waiter):
                waiter.set_exception(make_error())
                refused += 1
        return refused


def _can_be_woken(waiter: asyncio.Future[None]) -> bool:
    return not waiter.done() and not waiter.get_loop().is_closed()
