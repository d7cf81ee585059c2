"""How a sync builder comes to its end, once, whoever asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.sync.loop_thread import LoopThread


class Shutdown:
    """Drains the work of a loop thread, closes its builder, and ends the thread.

    Args:
        thread: what to end.
        builder: what works on it.
        close_builder: whether to close the builder.
        timeout_seconds: how long accepted work and refreshes may take.
    """

    __slots__ = ("_builder", "_close_builder", "_lingering", "_thread", "_timeout_seconds")

    def __init__(
        self,
        thread: LoopThread,
        builder: SnapshotBuilder,
        *,
        close_builder: bool,
        timeout_seconds: float,
    ) -> None:
        self._thread = thread
        self._builder = builder
        self._close_builder = close_builder
        self._timeout_seconds = timeout_seconds
        self._lingering: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Shutdown begun={self._thread.closing} lingering={self._lingering is not None}>"

    def wait(self) -> None:
        """Begin, or join the shutdown that has begun; raise what it raised unless it was over.

        An interrupted wait leaves the shutdown going.
        """
        if self._thread.forked:
            return
        self._thread.require_other_thread("close()")
        was_over = self._thread.finished
        ending = self._thread.finish(self._run).future
        error = ending.exception()
        if self._lingering is None:
            self._thread.join()
        if error is not None and not was_over:
            raise error

    async def _run(self) -> None:
        until = asyncio.get_running_loop().time() + self._timeout_seconds
        try:
            await self._thread.drain(self._timeout_seconds)
            await self._end_builder(until)
        except BaseException:
            if await self._has_late_workers():
                self._lingering = asyncio.create_task(self._outlive_late_workers())
            raise
        finally:
            if self._lingering is None:
                self._thread.stop()

    async def _end_builder(self, until: float) -> None:
        builder = self._builder
        in_time = builder.closed or await _within(until, builder.wait_for_refreshes())
        if self._close_builder:
            await builder.aclose(cancel_refreshes=not in_time)

    async def _has_late_workers(self) -> bool:
        health = await self._builder.health_snapshot()
        return health.payload_copy_shutdown_incomplete or health.observability_shutdown_incomplete

    async def _outlive_late_workers(self) -> None:
        try:
            await self._builder.wait_for_payload_copy_shutdown()
            await self._builder.wait_for_observability_shutdown()
        finally:
            self._thread.stop()


async def _within(until: float, waiting: Awaitable[None]) -> bool:
    """Wait until an instant on the loop's clock at most; return whether the wait ended itself."""
    remaining = until - asyncio.get_running_loop().time()
    try:
        await asyncio.wait_for(waiting, max(0.0, remaining))
    except asyncio.TimeoutError:
        return False
    return True
