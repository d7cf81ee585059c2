"""After each test no thread of a loop may be left."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coalestra.sync import THREAD_NAME, LoopThread
from tests.support.elsewhere import PATIENCE
from tests.sync.steps import loop_threads


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    for thread in loop_threads():
        thread.join(PATIENCE)
    assert loop_threads() == []


@pytest.fixture
def loop_thread() -> Iterator[LoopThread]:
    """A running loop thread, stopped at the end if the test has not done so."""
    thread = LoopThread(name=THREAD_NAME, owner="the test")

    async def stop() -> None:
        thread.stop()

    yield thread
    thread.finish(stop)
    thread.join(PATIENCE)
