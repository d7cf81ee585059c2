"""State that threads share without locks, and how threads and loops wait for it to change.

Laws:

1. No lock is held while code that is not ours may run: signal handlers, finalizers, other threads
   and forked children may use such state wherever they strike, and find it whole.
2. A change is one step of the interpreter that either happens or does not, such as ``setdefault``
   on a dictionary, ``append`` or ``popleft`` on a deque.
3. Who waits has a bell of his own and looks at the state again whenever it rings. While the
   interpreter ends nobody waits: no other thread will ever run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

S = TypeVar("S")

LONGEST_WAIT_SECONDS = 4_000_000.0
"""What every system lets a thread wait for at a time; who wants longer waits again."""


class Cell(Generic[S]):
    """One immutable value that changes by steps, none of which is ever lost.

    Each version of the value has room for one successor, so that of two changes of one version
    the second one finds the room taken and is made to the successor instead.
    """

    __slots__ = ("_newest",)

    def __init__(self, value: S) -> None:
        self._newest: dict[str, Any] = {"value": value}

    @property
    def value(self) -> S:
        """The value as it is now."""
        version = self._newest
        while "next" in version:
            version = version["next"]
        value: S = version["value"]
        return value

    def change(self, step: Callable[[S], S]) -> None:
        """Replace the value by what ``step``, which has no effects, makes of it."""
        version = self._newest
        while True:
            while "next" in version:
                version = version["next"]
            changed = {"value": step(version["value"])}
            if version.setdefault("next", changed) is changed:
                self._newest = changed
                return

    def __repr__(self) -> str:
        return f"Cell({self.value!r})"


class Bell:
    """Wakes one wait: who waits for it goes on once it has been rung since the last time.

    Two that waited for one bell would take the ring from each other; see `Changes`.
    """

    __slots__ = ("_silent",)

    def __init__(self) -> None:
        # Used as a flag that can be waited for; it guards nothing.
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        """Wake who waits, or who will; any number of times is as good as once."""
        if self._silent.locked():
            with contextlib.suppress(RuntimeError):  # it has just been rung
                self._silent.release()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is rung, for so long at most; return whether it was."""
        if sys.is_finalizing():
            return self._silent.acquire(blocking=False)
        if seconds is None:
            return self._silent.acquire()
        return self._silent.acquire(timeout=min(seconds, LONGEST_WAIT_SECONDS))


class Changes:
    """Lets threads and coroutines wait until something holds of state that others change."""

    __slots__ = ("_ringers",)

    def __init__(self) -> None:
        self._ringers: dict[Callable[[], object], None] = {}

    def tell(self) -> None:
        """Have everybody who waits look at the state again; call this after a change."""
        for ring in self._ringers.copy():
            ring()

    def wait_for(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait in this thread until ``holds`` returns True; return what it says in the end.

        Args:
            holds: looks at the state; may be called any number of times.
            seconds: the longest wait, however long; None waits as long as it takes.
        """
        if holds():
            return True
        bell = Bell()
        self._ringers[bell.ring] = None
        end = None if seconds is None else time.monotonic() + seconds
        try:
            while not holds():
                left = LONGEST_WAIT_SECONDS if end is None else end - time.monotonic()
                if left <= 0 or sys.is_finalizing():
                    return holds()
                bell.wait(left)
            return True
        finally:
            self._ringers.pop(bell.ring, None)

    async def until(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait on the running loop until ``holds`` returns True; see `wait_for`."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        late: list[bool] = []

        def ring() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(woken.set)

        def expire() -> None:
            late.append(True)
            woken.set()

        timer = None if seconds is None else loop.call_later(seconds, expire)
        self._ringers[ring] = None
        try:
            while not holds() and not late:
                await woken.wait()
                woken.clear()
            return holds()
        finally:
            self._ringers.pop(ring, None)
            if timer is not None:
                timer.cancel()
