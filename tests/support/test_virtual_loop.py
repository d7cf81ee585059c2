"""The virtual loop moves time only when nothing else can happen, and notices when nothing can."""

from __future__ import annotations

import asyncio
import math

import pytest

from tests.support import (
    Deadlock,
    Leak,
    ShuffledLoop,
    VirtualLoop,
    run_virtual,
    settle,
    virtual_loop,
)
from tests.support.virtual_loop import START


async def never() -> None:
    """Wait for something that nobody will do."""
    await asyncio.get_running_loop().create_future()


def ring() -> None:
    """What a forgotten timer would do."""


def test_a_task_that_waits_for_nothing_is_a_deadlock_naming_its_innermost_line() -> None:
    async def outer() -> None:
        await never()

    with pytest.raises(Deadlock, match=r"in never: await asyncio.get_running_loop") as caught:
        run_virtual(outer())
    assert len(caught.value.waiting) == 1
    assert "outer" in caught.value.waiting[0]


def test_a_timer_at_infinity_is_no_way_out_of_a_deadlock() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_at(math.inf, lambda: None)
        await never()

    with pytest.raises(Deadlock, match="never fire"):
        run_virtual(main())


def test_a_timer_renewed_for_ever_is_a_deadlock_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_loop, "HORIZON", START + 300 * 86_400.0)

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def tick() -> None:
            loop.call_later(86_400 * 30, tick)

        tick()
        await never()

    with pytest.raises(Deadlock, match="on and on"):
        run_virtual(main())


async def test_a_call_from_another_thread_must_be_the_thread_safe_one() -> None:
    loop = asyncio.get_running_loop()

    def stray() -> str:
        with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
            loop.call_soon(print)
        with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
            loop.call_later(1, print)
        return "refused"

    assert await asyncio.to_thread(stray) == "refused"


def order_of_tasks(loop: VirtualLoop) -> list[int]:
    seen: list[int] = []

    async def note(number: int) -> None:
        seen.append(number)

    async def main() -> None:
        await asyncio.gather(*(note(number) for number in range(8)))

    run_virtual(main(), loop=loop)
    return seen


def test_a_shuffled_loop_repeats_its_order_for_a_seed_and_changes_it_with_the_seed() -> None:
    orders = {tuple(order_of_tasks(ShuffledLoop(seed))) for seed in range(20)}
    assert len(orders) > 15
    assert order_of_tasks(ShuffledLoop(7)) == order_of_tasks(ShuffledLoop(7))
    assert order_of_tasks(VirtualLoop()) == list(range(8))


def test_a_shuffled_loop_keeps_plain_callbacks_in_their_order() -> None:
    seen: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in range(8):
            loop.call_soon(seen.append, number)
        await settle()

    for seed in range(10):
        run_virtual(main(), loop=ShuffledLoop(seed))
    assert seen == list(range(8)) * 10


def test_a_task_left_behind_is_a_leak_and_is_cancelled() -> None:
    cancelled: list[bool] = []

    async def straggler() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    kept: list[object] = []

    async def main() -> None:
        kept.append(asyncio.create_task(straggler(), name="Bob"))
        await settle()

    with pytest.raises(Leak, match=r"task Bob .*straggler"):
        run_virtual(main())
    assert cancelled == [True]


def test_a_timer_left_behind_is_a_leak() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(30, ring)

    with pytest.raises(Leak, match=r"timer due in 30 s: .*ring"):
        run_virtual(main())


def test_a_callback_that_fails_is_a_leak() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon(int, "not a number")
        await settle()

    with pytest.raises(Leak, match="handled by nobody") as caught:
        run_virtual(main())
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.expects_leaks
async def test_a_test_may_leave_something_behind_on_purpose() -> None:
    asyncio.get_running_loop().call_later(30, ring)


@pytest.mark.real_loop
async def test_the_real_loop_refuses_other_threads_as_in_debug_mode_and_has_real_time() -> None:
    loop = asyncio.get_running_loop()
    assert not isinstance(loop, VirtualLoop)
    with pytest.raises(RuntimeError, match="Non-thread-safe"):
        await asyncio.to_thread(lambda: loop.call_soon(int))
