"""The waiting primitive: order, hand-over, and what a cancelled waiter leaves behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest

from coalestra.concurrency.capacity import WaitQueue
from tests.support import drop

pytestmark = pytest.mark.concurrency


def nothing() -> None:
    """Give nothing back."""


def run_and_abandon(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> Any:
    """Start work on a loop and close the loop under it."""
    task = loop.create_task(work)
    loop.run_until_complete(asyncio.sleep(0))
    drop(loop)
    return task


@pytest.mark.filterwarnings("ignore")
def test_a_waiter_whose_loop_was_closed_is_passed_over() -> None:
    """Waking it would raise, and it could never go on."""
    queue = WaitQueue()
    task = run_and_abandon(asyncio.new_event_loop(), queue.wait(nothing))

    async def wait_here() -> None:
        waiting = asyncio.ensure_future(queue.wait(nothing))
        await asyncio.sleep(0)
        assert queue.wake_next()
        await waiting

    asyncio.run(wait_here())
    assert not queue.wake_next()
    assert not task.done()


@pytest.mark.filterwarnings("ignore")
def test_a_woken_waiter_whose_coroutine_is_dropped_gives_its_turn_back() -> None:
    """The loop ended between the wake-up and the waiter's next step."""
    queue, given_back = WaitQueue(), []
    loop = asyncio.new_event_loop()
    coroutine = queue.wait(lambda: given_back.append(1))
    task = loop.create_task(coroutine)
    loop.run_until_complete(asyncio.sleep(0))
    queue.wake_next()
    drop(loop)
    coroutine.close()
    del task
    gc.collect()
    assert given_back == [1]


async def test_leaving_ten_thousand_waiters_from_the_front_is_linear() -> None:
    """A queue that searched for each leaver would need a hundred million steps here."""
    queue = WaitQueue()
    waits = [queue.wait(nothing) for _ in range(10_000)]
    for wait in waits:
        wait.send(None)
    assert len(queue) == 10_000
    for wait in waits:
        wait.close()
    assert not queue


async def test_any_thread_may_count_who_waits_while_others_come_and_go() -> None:
    queue = WaitQueue()

    class Restless(asyncio.Future[None]):
        def done(self) -> bool:
            wait = queue.wait(nothing)
            wait.send(None)  # as another thread may meanwhile
            wait.close()
            return super().done()

    queue._waiters[Restless()] = nothing
    queue._waiters[asyncio.get_running_loop().create_future()] = nothing
    assert len(queue) == 2
