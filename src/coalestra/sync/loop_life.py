"""The life of an event loop in a thread: it runs until it is stopped and every task has ended."""

from __future__ import annotations

import asyncio
import threading

UNWIND_SECONDS = 1.0
"""How long cancelled work may clean up before closing goes on without it."""


class LoopLife:
    """Runs a loop to its end, which other threads can wait for."""

    __slots__ = ("_ending", "_loop", "_overdue", "_stopped")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stopped = asyncio.Event()
        self._ending = threading.Event()
        self._overdue = False

    def __repr__(self) -> str:
        return f"<LoopLife stopped={self._stopped.is_set()} ending={self._ending.is_set()}>"

    def live(self) -> None:
        """Run the loop in the calling thread and close it in the end."""
        life = self._loop.create_task(self._live())
        while not life.done():
            try:
                self._loop.run_until_complete(life)
            except BaseException:
                # Work that raises SystemExit breaks the loop off; the others still need it.
                continue
        self._loop.close()

    def stop(self) -> None:
        """Cancel the tasks, and end when all have ended; on the loop."""
        self._loop.call_soon(self._stopped.set)

    def wait_for_end(self) -> bool:
        """Wait, in another thread, for the end of all tasks; False if some take too long for it."""
        self._ending.wait()
        return not self._overdue

    async def _live(self) -> None:
        await self._stopped.wait()
        end = self._loop.time() + UNWIND_SECONDS
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            _, left = await asyncio.wait(others, timeout=max(0.0, end - self._loop.time()))
            if left:
                self._overdue = True
                self._ending.set()
                await asyncio.wait(left)
        await self._loop.shutdown_asyncgens()
        self._ending.set()
