"""How many calls of sources may run at once: over a whole builder, and for each source.

Laws of the queue under everything here that waits, which every user may build on:

1. Waiters are woken in the order in which they came.
2. A waiter that is cancelled leaves the queue by itself and is never woken.
3. A wake-up is never lost: if the woken waiter is cancelled before it could go on, what it was
   handed goes to ``give_back``, which passes it on.

Laws of the limits:

4. A free slot and a waiter that could take it never exist at the same time, so whoever finds a slot
   free may take it without overtaking anybody.
5. A slot goes straight from the one who releases it to the longest waiting.
6. A cancelled `acquire` holds nothing, also when the slot was handed over in the same loop step.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from coalestra.core.frozen import record
from coalestra.core.validation import integer, mapping, text

__all__ = ["CapacityController", "CapacityLease", "CapacityLimiter", "CapacitySnapshot"]

GLOBAL = "__global__"
"""The name under which a controller reports its limit over all sources."""


class WaitQueue:
    """First in, first out; for the tasks of one event loop at a time.

    The queue belongs to no loop: each waiter brings its own, and those whose loop has been closed
    are passed over.
    """

    __slots__ = ("_waiters",)

    def __init__(self) -> None:
        self._waiters: OrderedDict[asyncio.Future[None], Callable[[], object]] = OrderedDict()

    def __len__(self) -> int:
        """Count the waiters that can still be woken."""
        return sum(not each.done() for each in tuple(self._waiters))  # a copy, for any thread

    def __repr__(self) -> str:
        return f"<WaitQueue waiting={len(self)}>"

    async def wait(
        self, give_back: Callable[[], object], handed: Callable[[], object] = lambda: None
    ) -> None:
        """Wait for one's turn.

        ``handed`` is called in the instant that the turn comes. ``give_back`` is called when it
        came but the task was cancelled (or dropped) before it could go on; it must hand the turn
        to the next.
        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = handed
        try:
            await waiter
        except BaseException:
            if waiter in self._waiters:
                del self._waiters[waiter]
            elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                give_back()
            raise

    def wake_next(self, error: Exception | None = None) -> bool:
        """Wake the longest waiting, with an ``error`` of its own; return whether there was any."""
        while self._waiters:
            waiter, handed = self._waiters.popitem(last=False)
            if can_be_woken(waiter):
                if error is None:
                    waiter.set_result(None)
                    handed()
                else:
                    waiter.set_exception(error)
                return True
        return False


def can_be_woken(waiter: asyncio.Future[None]) -> bool:
    """Whether somebody may still wait: it is not done, and its loop not closed."""
    return not waiter.done() and not waiter.get_loop().is_closed()


@record
class CapacitySnapshot:
    """A limiter at one moment: slots in all, slots taken, tasks waiting for one."""

    limit: int
    in_use: int
    waiting: int


class CapacityLimiter:
    """A fixed number of slots, given out first come, first served.

    A limiter is bound to no event loop. Use it from one loop at a time, not from several threads.
    """

    __slots__ = ("_in_use", "_limit", "_queue")

    def __init__(self, limit: int) -> None:
        self._limit = integer("limit", limit, minimum=1)
        self._in_use = 0
        self._queue = WaitQueue()

    @property
    def limit(self) -> int:
        """How many slots there are."""
        return self._limit

    def try_acquire(self) -> bool:
        """Take a slot if one is free; never waits, never overtakes a waiting task."""
        if self._in_use >= self._limit:
            return False
        self._in_use += 1
        return True

    async def acquire(self) -> None:
        """Take a slot, waiting for one in turn if none is free."""
        if not self.try_acquire():
            await self._queue.wait(self.release)

    def release(self) -> None:
        """Give a slot back: to the longest waiting task if there is one.

        Raises:
            RuntimeError: if no slot is taken.
        """
        if not self._in_use:
            raise RuntimeError(
                "release() was called more often than acquire(): all "
                f"{self._limit} slots are free already; release each slot once"
            )
        if not self._queue.wake_next():
            self._in_use -= 1

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot for the length of an ``async with`` block."""
        await self.acquire()
        try:
            yield
        finally:
            self.release()

    def view(self) -> CapacitySnapshot:
        """Return the present figures."""
        return CapacitySnapshot(self._limit, self._in_use, len(self._queue))

    async def snapshot(self) -> CapacitySnapshot:
        """Return the present figures."""
        return self.view()

    def __repr__(self) -> str:
        return (
            f"<CapacityLimiter limit={self._limit} in_use={self._in_use} "
            f"waiting={len(self._queue)}>"
        )


class CapacityLease:
    """The slots held for one call of a source, until `release`."""

    __slots__ = ("_held", "_leases", "source")

    def __init__(
        self, source: str, held: tuple[CapacityLimiter, ...], leases: dict[CapacityLease, None]
    ) -> None:
        self.source: str = source
        self._held = held
        self._leases = leases
        leases[self] = None

    async def _take(self, limiter: CapacityLimiter, also: CapacityLimiter | None = None) -> None:
        """Hold a slot more; while it is waited for, and until it is handed over, hold up nobody.

        One that is needed `also` is taken in the instant of handing over, if it is free then.
        """
        if not limiter.try_acquire():
            self._leases.pop(self, None)
            await limiter._queue.wait(limiter.release, partial(self._handed, also))
        self._held = (*self._held, limiter)

    def _handed(self, also: CapacityLimiter | None) -> None:
        self._leases.setdefault(self)
        if also is not None and also.try_acquire():
            self._held = (also,)

    @property
    def released(self) -> bool:
        """Whether the slots have been given back."""
        return not self._held

    def release(self) -> None:
        """Give the slots back; further calls do nothing."""
        held, self._held = self._held, ()
        self._leases.pop(self, None)
        for limiter in held:
            limiter.release()

    def __repr__(self) -> str:
        return f"<CapacityLease {self.source!r} {'released' if self.released else 'held'}>"


class CapacityController:
    """One limit over all sources, and one for each source that has its own.

    Args:
        global_limit: how many calls may run at once, whatever their source.
        source_limits: limits by source name; they win over what sources declare.

    Raises:
        ValueError: if a limited source is named like the global limit, ``__global__``.
    """

    __slots__ = ("_global", "_leases", "_sources")

    def __init__(
        self, *, global_limit: int, source_limits: Mapping[str, int] | None = None
    ) -> None:
        self._global = CapacityLimiter(integer("global_limit", global_limit, minimum=1))
        self._sources: dict[str, CapacityLimiter] = {}
        self._leases: dict[CapacityLease, None] = {}
        for source, limit in mapping("source_limits", source_limits, optional=True).items():
            text("source_limits key", source)
            integer(f"source_limits[{source!r}]", limit, minimum=1)
            self.register_source(source, limit)

    def register_source(self, source: str, limit: int | None) -> None:
        """Give a source the limit that it declares; None is none of its own.

        A source that has a limit already, given at construction or registered before, keeps it.
        """
        text("source", source)
        if limit is None:
            return
        integer("limit", limit, minimum=1)
        if source == GLOBAL:
            raise ValueError(
                f"source must not be {GLOBAL!r}, the name of the limit over all sources; "
                "rename the source"
            )
        if source not in self._sources:
            self._sources[source] = CapacityLimiter(limit)

    def limit_for(self, source: str) -> int | None:
        """Return the limit of a source's own, or None if only the global one applies."""
        limiter = self._sources.get(source)
        return None if limiter is None else limiter.limit

    def forget(self) -> None:
        """Let every slot be free: who held or awaited one was on an event loop that has ended.

        Leases from before keep to the limits of before, so that none of them frees a slot twice.
        """
        self._global = CapacityLimiter(self._global.limit)
        self._sources = {name: CapacityLimiter(own.limit) for name, own in self._sources.items()}
        self._leases = {}

    def try_acquire(self, source: str) -> CapacityLease | None:
        """Return a lease if everything it needs is free now, else None; never waits."""
        own = self._sources.get(source)
        if own is not None and not own.try_acquire():
            return None
        if self._global.try_acquire():
            held = (self._global,) if own is None else (self._global, own)
            return CapacityLease(source, held, self._leases)
        if own is not None:
            own.release()
        return None

    async def acquire(self, source: str) -> CapacityLease:
        """Wait for a slot of the source, then for a global one; both in turn.

        The order keeps a crowd at one source from blocking all others: those who wait for their
        source hold no global slot.
        """
        own, whole = self._sources.get(source), self._global
        lease = CapacityLease(source, (), self._leases)
        try:
            if own is not None:
                await lease._take(own, whole)
            if whole not in lease._held:
                await lease._take(whole)
            lease._held = (whole,) if own is None else (whole, own)  # in which order to release
        except BaseException:
            lease.release()
            raise
        return lease

    def beyond(self, source: str) -> CapacityLease:
        """Return a lease beyond all limits, for what a holder of a slot waits for.

        To wait for a slot would be to wait for oneself.
        """
        return CapacityLease(source, (), self._leases)

    @asynccontextmanager
    async def slot(self, source: str) -> AsyncIterator[None]:
        """Hold the slots for one operation of a source for the length of an ``async with``."""
        lease = await self.acquire(source)
        try:
            yield
        finally:
            lease.release()

    def view(self) -> dict[str, CapacitySnapshot]:
        """Return the present figures by source name; the global ones under ``__global__``."""
        limiters = {GLOBAL: self._global, **self._sources}
        return {name: limiter.view() for name, limiter in limiters.items()}

    def holders(self) -> dict[str, int]:
        """Return how many leases each source holds, by its name, the most first.

        A slot is held from when it is handed over, though who waited for it has yet to go on. Who
        waits for a slot over all sources waits for these, not for its own source.
        """
        return dict(Counter([lease.source for lease in self._leases.copy()]).most_common())

    async def snapshot(self) -> dict[str, CapacitySnapshot]:
        """Return the present figures by source name; the global ones under ``__global__``."""
        return self.view()

    def __repr__(self) -> str:
        return f"<CapacityController global={self._global!r} sources={sorted(self._sources)}>"
