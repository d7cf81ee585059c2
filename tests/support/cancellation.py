"""Cancel a piece of work at every point where it can be cancelled."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from tests.support.virtual_loop import VirtualLoop


async def cancel_at_every_await(
    make_coroutine: Callable[[], Coroutine[Any, Any, object]],
    check: Callable[[], Awaitable[object] | object] | None = None,
    *,
    limit: int = 20_000,
) -> int:
    """Run the work again and again, cancelled one loop step later each time.

    The cancellation strikes at the beginning of the step, so it meets the work both while it
    waits and when the answer to its wait is just arriving. The last run ends uncancelled.

    Args:
        make_coroutine: starts the work anew, best on a new builder.
        check: called (and awaited if need be) after every run, once the loop has settled.
        limit: the most runs before the work is taken for endless.

    Returns:
        How many runs were cancelled.

    Raises:
        AssertionError: when a run ended with an error of its own, or never ended.
    """
    loop = asyncio.get_running_loop()
    if not isinstance(loop, VirtualLoop):
        raise TypeError("cancel_at_every_await needs a VirtualLoop to count steps on")
    for step in range(1, limit):
        task = loop.create_task(make_coroutine(), name=f"cancelled at step {step}")
        withdraw = loop.interrupt(step, task.cancel)
        await asyncio.wait([task])
        withdraw()
        await loop.settled()
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                raise AssertionError(f"cancelled at step {step}, the work raised") from error
        if check is not None:
            outcome = check()
            if inspect.isawaitable(outcome):
                await outcome
        if not task.cancelled() and step > 1:
            return step - 1
    raise AssertionError(f"the work did not come to an end within {limit} runs")
