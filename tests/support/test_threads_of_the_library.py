"""The virtual loop also waits for the library's own worker threads, and for nobody idle."""

from __future__ import annotations

import asyncio
import time

import pytest

from coalestra.concurrency.threads import WorkerThreads
from tests.support import Deadlock, ThreadGate, run_virtual
from tests.support.virtual_loop import PATIENCE


async def test_an_idle_worker_thread_costs_no_real_time() -> None:
    threads = WorkerThreads()
    await threads.run(int)
    began = time.monotonic()
    for _ in range(100):
        await asyncio.sleep(1)
    assert time.monotonic() - began < PATIENCE
    threads.close()


def test_waiting_for_a_thread_that_nobody_lets_go_is_a_deadlock_that_names_the_gate() -> None:
    threads, gate = WorkerThreads(), ThreadGate("shut")
    ended: list[bool] = []

    def work() -> None:
        gate.pass_()
        ended.append(True)

    with pytest.raises(Deadlock, match=r"coalestra-worker-\d+ held at <ThreadGate 'shut'"):
        run_virtual(threads.run(work))
    threads.close()
    assert ended == [True]
