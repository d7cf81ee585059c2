"""Closing a builder: every stage runs, and the first thing that went wrong is told at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.errors import (
    ObservabilityShutdownTimeoutError,
    PayloadCopyShutdownTimeoutError,
    SourceTimeoutError,
)
from coalestra.observability.reports import ObservabilitySinks
from coalestra.orchestration.singleflight import Engine

Stage = Callable[[], Awaitable[None]]


class Closing:
    """The parts of a builder that have to be closed, and how each of them is."""

    def __init__(
        self,
        engine: Engine,
        copies: Sequence[PayloadCopies],
        caches: Sequence[Any],
        sinks: ObservabilitySinks,
        threads: WorkerThreads,
        managed: Sequence[Any],
    ) -> None:
        self._engine = engine
        self._copies = copies
        self._caches = caches
        self._sinks = sinks
        self._threads = threads
        self._managed = managed
        self.unfinished: Mapping[str, int] = {}
        self.task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> asyncio.Task[None] | None:
        """The closing under way or done; None also if it ended midway, together with its loop."""
        task = self.task
        if task is None or task.cancelled():
            return None
        return None if not task.done() and task.get_loop().is_closed() else task

    async def close(
        self,
        *,
        cancel_refreshes: bool,
        copy_timeout: float,
        observability_timeout: float,
        drain: bool,
    ) -> None:
        """Close everything in order; raise the first error once all stages have run."""
        self._engine.close()
        stages: tuple[Stage, ...] = (
            partial(self._refreshes, cancel_refreshes),
            partial(self._end_engine, copy_timeout),
            partial(self._end_copies, copy_timeout),
            partial(self._end_observability, observability_timeout, drain),
            self._end_managed,
            self._end_threads,
        )
        errors: list[Exception] = []
        for stage in stages:
            try:
                await stage()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _refreshes(self, cancel: bool) -> None:
        if not cancel:
            await self._engine.refresher.wait()

    async def _end_engine(self, timeout_seconds: float) -> None:
        self.unfinished = await self._engine.stop(timeout_seconds)
        if self.unfinished:
            names = ", ".join(f"{name!r} ({n})" for name, n in self.unfinished.items())
            raise SourceTimeoutError(
                f"closed, but calls to these sources still run after {timeout_seconds:g} s: "
                f"{names}; a thread, or a coroutine that ignores cancellation, cannot be ended"
            )

    async def _end_copies(self, timeout_seconds: float) -> None:
        for copies in self._copies:
            copies.close()
        end = time.monotonic() + timeout_seconds
        active: dict[str, int] = {}
        for copies in self._copies:
            left = await copies.drain(max(0.0, end - time.monotonic()))
            if left:
                active[copies.component] = left
        for cache in self._caches:
            try:
                left_seconds = max(0.0, end - time.monotonic())
                await cache.aclose_payload_copies(timeout_seconds=left_seconds)
            except PayloadCopyShutdownTimeoutError as error:
                active["cache"] = error.active_copies
        if active:
            raise PayloadCopyShutdownTimeoutError(
                timeout_seconds=timeout_seconds, active_components=active
            )

    async def _end_observability(self, timeout_seconds: float | None, drain: bool) -> None:
        if not self._sinks.owned:
            return
        pending = await self._sinks.aclose(timeout_seconds=timeout_seconds, drain=drain)
        if pending and timeout_seconds is not None:
            raise ObservabilityShutdownTimeoutError(
                timeout_seconds=timeout_seconds, pending_components=pending
            )

    async def _end_managed(self) -> None:
        errors: list[Exception] = []
        for each in _once(self._managed):
            try:
                await self._close_one(each)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    async def _close_one(self, each: Any) -> None:
        close = getattr(each, "aclose", None)
        if callable(close):
            await close()
            return
        close = getattr(each, "close", None)
        if not callable(close):
            return
        if asyncio.iscoroutinefunction(close):
            await close()
            return
        ended = await self._threads.run(close, or_here=True)
        if hasattr(ended, "__await__"):
            await ended

    async def _end_threads(self) -> None:
        self._threads.close()

    async def wait_for_copies(self) -> None:
        """Wait, however long, until no copy is running."""
        for copies in self._copies:
            await copies.drain(None)
        for cache in self._caches:
            await cache.aclose_payload_copies(timeout_seconds=None)

    async def wait_for_observability(self) -> None:
        """Wait, however long, until no buffer's worker is running."""
        if self._sinks.owned and self._engine.closed:
            await self._sinks.aclose(timeout_seconds=None)


def _once(objects: Iterable[Any]) -> Iterable[Any]:
    seen: set[int] = set()
    for each in objects:
        if id(each) not in seen:
            seen.add(id(each))
            yield each
