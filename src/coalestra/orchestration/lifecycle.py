"""The end of a snapshot builder."""

from __future__ import annotations

import asyncio

from coalestra.core.validation import flag, number
from coalestra.orchestration.configured import ConfiguredBuilder


class ClosableBuilder(ConfiguredBuilder):
    """A configured builder that can be closed, once, in bounded time."""

    @property
    def closed(self) -> bool:
        """Whether the builder takes no more work."""
        return self.parts.engine.closed

    async def aclose(
        self,
        *,
        cancel_refreshes: bool = False,
        copy_shutdown_timeout_seconds: float | None = None,
        observability_shutdown_timeout_seconds: float | None = None,
    ) -> None:
        """Close the builder: end what is under way, then copies, then sinks, then what it manages.

        Every stage runs even if one fails. Closing again does nothing, or waits for the closing
        that is under way.

        Args:
            cancel_refreshes: give up background refreshes instead of waiting for them.
            copy_shutdown_timeout_seconds: how long to wait for running copies, and for sources that
                do not end; the builder's setting by default.
            observability_shutdown_timeout_seconds: how long to wait for buffers to empty; the
                builder's setting by default.

        Raises:
            RuntimeError: the builder has work under way on another event loop.
            SourceTimeoutError: a source still runs in a thread, or ignores its cancellation.
            PayloadCopyShutdownTimeoutError: copies still run.
            ObservabilityShutdownTimeoutError: a buffer has not been emptied.
        """
        flag("cancel_refreshes", cancel_refreshes)
        copy_timeout = number(
            "copy_shutdown_timeout_seconds", copy_shutdown_timeout_seconds, minimum=0, optional=True
        )
        observability_timeout = number(
            "observability_shutdown_timeout_seconds",
            observability_shutdown_timeout_seconds,
            minimum=0,
            optional=True,
        )
        self.parts.engine.attach()
        closing = self.parts.closing
        task = closing.begun
        if task is None:
            task = closing.task = asyncio.get_running_loop().create_task(
                closing.close(
                    cancel_refreshes=cancel_refreshes,
                    copy_timeout=_first(copy_timeout, self.copy_shutdown_timeout_seconds),
                    observability_timeout=_first(
                        observability_timeout, self.observability_shutdown_timeout_seconds
                    ),
                    drain=self.observability_drain_on_shutdown,
                ),
                name="coalestra closing",
            )
        elif task.done():
            return
        await asyncio.shield(task)

    async def wait_for_payload_copy_shutdown(self) -> None:
        """Wait, however long, until no payload copy of a closed builder is running."""
        await self.parts.closing.wait_for_copies()

    async def wait_for_observability_shutdown(self) -> None:
        """Wait, however long, until the buffers of a closed builder are empty."""
        await self.parts.closing.wait_for_observability()

    async def wait_for_background_shutdown(self) -> None:
        """Wait, however long, for both payload copies and buffers of a closed builder."""
        await self.parts.closing.wait_for_copies()
        await self.parts.closing.wait_for_observability()


def _first(value: float | None, default: float) -> float:
    return default if value is None else value
