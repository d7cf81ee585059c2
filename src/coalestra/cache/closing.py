"""Ending the copying of a component."""

from __future__ import annotations

from coalestra.concurrency.copying import PayloadCopies
from coalestra.core import validation
from coalestra.core.errors import PayloadCopyShutdownTimeoutError


async def close_copies(copies: PayloadCopies, timeout_seconds: float | None) -> None:
    """Refuse new copies and wait for running ones, for ``timeout_seconds`` (None: no limit).

    Raises `PayloadCopyShutdownTimeoutError` if some are still running then.
    """
    validation.number("timeout_seconds", timeout_seconds, minimum=0.0, optional=True)
    copies.close()
    active = await copies.drain(timeout_seconds)
    if active and timeout_seconds is not None:
        raise PayloadCopyShutdownTimeoutError(
            timeout_seconds=timeout_seconds, active_components={copies.component: active}
        )
