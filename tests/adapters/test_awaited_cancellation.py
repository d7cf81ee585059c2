"""A cancellation that the application's own code made up is its failure, not ours."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from tests.adapters.sample_calls import adapter, call

pytestmark = [
    pytest.mark.concurrency,
    pytest.mark.skipif(
        sys.version_info < (3, 11),
        reason="before Python 3.11 a task does not say who asked for its cancellation",
    ),
]


async def test_a_coroutine_that_raises_cancelled_error_has_failed() -> None:
    async def function(*_: Any) -> Any:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="got CancelledError"):
        await call(adapter("single", function))


async def test_a_coroutine_that_awaits_something_cancelled_has_failed() -> None:
    async def function(*_: Any) -> Any:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.cancel)
        await future

    with pytest.raises(RuntimeError, match="got CancelledError"):
        await call(adapter("single", function))
