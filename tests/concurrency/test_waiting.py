"""The waiting primitive: order, hand-over, and what a cancelled waiter leaves behind."""

from __future__ import annotations

import asyncio
import gc

import pytest

from coalestra.concurrency.capacity import WaitQueue
from tests.support import drop

pytestmark = pytest.mark.concurrency


def nothing() -> None:
    """Give nothing back."""


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
