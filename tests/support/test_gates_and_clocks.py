"""Gates hold whom they should; clocks read what they should."""

from __future__ import annotations

import asyncio

from tests.support import EPOCH, Gate, LoopClock, ManualClock, settle


async def test_a_gate_holds_everyone_until_it_opens() -> None:
    gate = Gate("door")
    tasks = [asyncio.create_task(gate.pass_()) for _ in range(3)]
    await gate.wait_arrived(3)
    assert repr(gate) == "<Gate 'door' closed, 3 arrived, 3 held>"
    assert not any(task.done() for task in tasks)
    gate.open()
    await asyncio.gather(*tasks)
    assert repr(gate) == "<Gate 'door' open, 3 arrived, 0 held>"
    await gate.pass_()


async def test_a_gate_lets_a_given_number_through_in_order() -> None:
    gate = Gate()
    passed: list[int] = []

    async def visit(number: int) -> None:
        await gate.pass_()
        passed.append(number)

    tasks = []
    for number in range(3):
        tasks.append(asyncio.create_task(visit(number)))
        await gate.wait_arrived(number + 1)
    gate.let_through(1)
    await settle()
    gate.let_through(1)
    await settle()
    assert passed == [0, 1]
    gate.open()
    await asyncio.gather(*tasks)


async def test_a_gate_forgets_the_cancelled() -> None:
    gate = Gate()
    task = asyncio.create_task(gate.pass_())
    await gate.wait_arrived()
    task.cancel()
    await settle()
    assert gate.waiting == 0
    watcher = asyncio.create_task(gate.wait_arrived(5))
    await settle()
    watcher.cancel()
    await settle()
    await asyncio.gather(gate_opened(gate), gate.pass_())


async def gate_opened(gate: Gate) -> None:
    gate.open()


def test_a_manual_clock_moves_only_by_hand() -> None:
    clock = ManualClock()
    wall, monotonic = clock.now(), clock.monotonic()
    assert wall == EPOCH
    clock.advance(2.5)
    assert (clock.now() - wall, clock.monotonic() - monotonic) == (2.5, 2.5)
    clock.set_wall(EPOCH - 60)
    assert (clock.now(), clock.monotonic() - monotonic) == (EPOCH - 60, 2.5)


def test_a_loop_clock_made_outside_of_a_loop_stands_at_the_epoch() -> None:
    assert LoopClock().now() == EPOCH
