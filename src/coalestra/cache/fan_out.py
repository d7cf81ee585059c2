"""Driving many single-key operations with few tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

_T = TypeVar("_T")


async def for_each(
    items: Collection[_T], operation: Callable[[_T], Awaitable[None]], limit: int
) -> None:
    """Apply ``operation`` to every item with at most ``limit`` tasks, started in order.

    The first failure stops the rest and is raised. No task is left behind, whatever happens.
    """
    remaining = iter(items)

    async def work() -> None:
        for item in remaining:
            await operation(item)

    workers = min(limit, len(items))
    if workers <= 1:
        await work()
        return
    tasks = [asyncio.ensure_future(work()) for _ in range(workers)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
