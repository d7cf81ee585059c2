"""Closing a builder: once, in bounded time, stage by stage.

| stage | waits for | at most | what is left then |
| --- | --- | --- | --- |
| refreshes | background refreshes under way | copy limit | is cancelled, and named in the error |
| engine | calls to sources and cache, cancelled | copy limit | is named in error and health |
| copies | payloads being copied in threads | copy limit | is counted in error and health |
| observability | the records in buffers | its own limit | is counted in error and health |
| managed | each managed part's own closing | the longer of both | is cancelled, and named |
| threads | nothing | | ends with its work |

Laws:

1. Every stage runs, whatever another raises; what ends the program, or else the first error, is
   raised at the end, to those who waited for this closing.
2. Cancelling who waits does not stop the closing. Cancelling the closing itself does not either:
   the stage that was cut off is done again, within its limit, and so is the closing of a managed
   part, but only by whoever closes next, or waits. That is also who begins a closing again that
   could not even begin, or whose loop has ended.
3. A limit for all of it bounds each stage; a stage that comes when it is used up has a moment.
4. A sink is closed only after its last record.
5. What goes wrong in closing never replaces what a block already raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from coalestra._endings import PROGRAM_ENDS, look_after, running_task
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.core import errors
from coalestra.core.frozen import empty
from coalestra.core.validation import is_coroutine_function
from coalestra.observability import ObservabilitySinks
from coalestra.orchestration.singleflight import Engine

MOMENT_SECONDS = 0.1
"""What a stage may take though the time for all of them is used up, to find out what is left."""

Stage = Callable[[float], Awaitable[object]]
"""Does its work within so many seconds."""

_ATTEMPTS = 10

_MEANT_FOR_THE_BLOCK = (*PROGRAM_ENDS, asyncio.CancelledError, GeneratorExit)
"""What ends a block that is being closed, whatever it raises itself."""


@contextlib.contextmanager
def gives_way(error: BaseException | None) -> Iterator[None]:
    """Log what goes wrong in closing, instead of raising it, if a block raises `error` already."""
    try:
        yield
    except BaseException as closing_error:
        if error is None or isinstance(closing_error, _MEANT_FOR_THE_BLOCK):
            raise
        logging.getLogger("coalestra").warning(
            "closing failed after %s: %s", type(error).__name__, closing_error
        )


async def insist(stage: Callable[[], Awaitable[object]]) -> None:
    """Await what a stage of closing does, again if it is cut off: it is bounded by itself."""
    for left in reversed(range(_ATTEMPTS)):
        try:
            await stage()
            return
        except asyncio.CancelledError:
            if not left:
                raise


class Limits(NamedTuple):
    """How long stages of one closing may take, in seconds; refreshes and buffers may be let go."""

    copies: float
    observability: float
    total: float
    cancel_refreshes: bool
    drain: bool


@dataclass(eq=False, repr=False)
class Closing:
    """The parts of a builder that have to be closed, and how far that is.

    These are its engine, its default cache, which copies as well, its sinks, and what it manages:
    what it closes on behalf of the application.
    """

    engine: Engine
    cache: AsyncMemoryCache | None
    sinks: ObservabilitySinks
    managed: list[Any]
    unfinished: Mapping[str, int] = field(default_factory=empty)
    _late: set[asyncio.Task[None]] = field(default_factory=set)
    _task: asyncio.Task[None] | None = None
    _errors: list[BaseException] = field(default_factory=list)
    _end: float = math.inf
    _over: bool = False

    async def close(self, limits: Limits) -> None:
        """Close everything, or wait for the closing under way; do nothing if it is over."""
        if self._over:
            return
        self.engine.close()
        loop = asyncio.get_running_loop()
        while not self._over:
            task = self._task
            if task is None or task.done() or task.get_loop() is not loop:
                task = self._task = loop.create_task(self._run(limits), name="coalestra closing")
            await asyncio.wait([task])
        if self._errors:
            raise min(self._errors, key=lambda error: not isinstance(error, PROGRAM_ENDS))

    async def _run(self, limits: Limits) -> None:
        self._end = asyncio.get_running_loop().time() + limits.total
        stages: tuple[tuple[float, Stage], ...] = (
            (limits.copies, partial(self._end_refreshes, limits.cancel_refreshes)),
            (limits.copies, self._end_engine),
            (limits.copies, self._end_copies),
            (limits.observability, partial(self._end_observability, limits.drain)),
            (max(limits.copies, limits.observability), self._end_managed),
        )
        this = asyncio.current_task()
        for seconds, stage in stages:
            try:
                await _within(self._granted(seconds), stage)
            except BaseException as error:
                self._keep(error, this)
        if not self.managed:
            self.engine.parts.threads.close()
            self._over = True

    def _granted(self, seconds: float) -> float:
        """Return how much of its own limit a stage, or a managed part, can have now."""
        return min(seconds, max(MOMENT_SECONDS, self._end - asyncio.get_running_loop().time()))

    async def _end_refreshes(self, cancel: bool, seconds: float) -> None:
        refresher = self.engine.flights.refresher
        if cancel or not refresher.active:
            return
        waiting = asyncio.ensure_future(refresher.wait())
        try:
            await asyncio.wait([waiting], timeout=seconds)
        finally:
            waiting.cancel()
        if refresher.active:
            count, names = refresher.active, errors.listed(tuple(refresher.keys))
            refresher.cancel()
            raise errors.SourceTimeoutError(
                f"closed, but background refreshes must end within {seconds:g} s of closing, got "
                f"{count} that were cancelled: {names}; allow more time with "
                "copy_shutdown_timeout_seconds, or close with cancel_refreshes=True"
            )

    async def _end_engine(self, seconds: float) -> None:
        self.unfinished = await self.engine.stop(seconds)
        if self.unfinished:
            names = ", ".join(f"{name!r} ({n})" for name, n in self.unfinished.items())
            raise errors.SourceTimeoutError(
                f"closed, but calls to these sources still run after {seconds:g} s: "
                f"{names}; a thread, or a coroutine that ignores cancellation, cannot be ended"
            )

    async def _end_copies(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end, active = loop.time() + seconds, dict[str, int]()
        for close in self._copying():
            try:
                await close(timeout_seconds=max(0.0, end - loop.time()))
            except errors.PayloadCopyShutdownTimeoutError as error:
                active.update(error.active_components)
        if active:
            raise errors.PayloadCopyShutdownTimeoutError(
                timeout_seconds=seconds, active_components=active
            )

    async def _end_observability(self, drain: bool, seconds: float) -> None:
        pending = await self.sinks.aclose(timeout_seconds=seconds, drain=drain)
        if pending:
            raise errors.ObservabilityShutdownTimeoutError(
                timeout_seconds=seconds, pending_components=pending
            )

    async def _end_managed(self, seconds: float) -> None:
        this = asyncio.current_task()
        for part in tuple(self.managed):
            late = partial(self._close_late, part, asyncio.get_running_loop())
            if not self.sinks.call_after_last_record(part, late):
                try:
                    await self._close_part(part, self._granted(seconds))
                except asyncio.CancelledError:
                    continue  # it stays, to be closed again
                except BaseException as error:
                    self._keep(error, this)
            self.managed = [each for each in self.managed if each is not part]

    def _keep(self, error: BaseException, task: asyncio.Task[Any] | None) -> None:
        """Keep an error, to be raised at the end, unless the collector ends a task left behind."""
        if running_task() is not task:
            raise error
        self._errors.append(error)

    async def _close_part(self, part: Any, seconds: float) -> None:
        close, on_loop = _closing_of(part)
        if close is None:
            return
        name = getattr(close, "__qualname__", type(close).__qualname__)
        too_long = (
            f"closing a managed part must end within {seconds:g} s, got {name} that takes longer; "
            "bound its own closing"
        )
        cancelled = (
            f"{name} was cancelled before it had ended, by nobody who closes the builder; let it "
            "end by itself"
        )
        ended: Any = None
        if not on_loop:
            # It may block, and cannot be cut off, so a cancellation is of no use to anybody.
            job = self.engine.parts.threads.start(close, name, or_here=True)
            await _within(seconds, lambda left: asyncio.wait([job.ended], timeout=left))
            if not job.ended.done():
                raise TimeoutError(too_long)
            try:
                ended = job.outcome()
            except asyncio.CancelledError as error:
                raise RuntimeError(cancelled) from error
            if not hasattr(ended, "__await__"):
                return
        task = asyncio.ensure_future(_awaited(close if on_loop else lambda: ended))
        look_after(task, set())
        try:
            await asyncio.wait([task], timeout=seconds)
        except asyncio.CancelledError:  # cut off, so it is closed again the next time
            task.cancel()
            raise
        if not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=MOMENT_SECONDS)
            raise TimeoutError(too_long)
        if task.cancelled():
            raise RuntimeError(cancelled)
        task.result()

    def _close_late(self, sink: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Close a sink that had its last record only now; in the thread that brought it."""
        close, on_loop = _closing_of(sink)
        if close is not None and not on_loop:
            with gives_way(TimeoutError()):  # which is what closing the builder has raised
                close()
        elif close is not None:
            closing = partial(_awaited, close)
            with contextlib.suppress(RuntimeError):  # its loop is closed, so it is too late
                loop.call_soon_threadsafe(
                    lambda: look_after(loop.create_task(closing()), self._late)
                )

    async def wait_for_copies(self) -> None:
        """Wait until no copy of a closed builder is running."""
        for close in self._copying() if self.engine.closed else ():
            await close(timeout_seconds=None)

    def _copying(self) -> Iterator[Callable[..., Awaitable[None]]]:
        """Yield what ends the copying of each component."""
        yield self.engine.parts.copies.aclose
        if self.cache is not None:
            yield self.cache.aclose_payload_copies

    async def wait_for_observability(self) -> None:
        """Wait until the buffers of a closed builder are empty and managed sinks closed."""
        if self.engine.closed:
            await self.sinks.aclose(timeout_seconds=None)
            await asyncio.sleep(0)  # a closing that a thread has asked for begins in this turn
            if self._late:
                await asyncio.wait(self._late)


async def _within(seconds: float, stage: Stage) -> None:
    """Have a stage done in so many seconds, all attempts together."""
    now = asyncio.get_running_loop().time
    end = now() + seconds
    await insist(lambda: stage(max(0.0, round(end - now(), 3))))


def _closing_of(part: Any) -> tuple[Callable[[], Any] | None, bool]:
    """Return how a part is closed, if it is, and whether that is done on the loop."""
    close = getattr(part, "aclose", None)
    if callable(close):
        return close, True
    close = getattr(part, "close", None)
    return (close, is_coroutine_function(close)) if callable(close) else (None, False)


async def _awaited(close: Callable[[], Any]) -> None:
    ended = close()
    if inspect.isawaitable(ended):
        await ended
