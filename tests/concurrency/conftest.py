"""Worker threads for the tests of what works in threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coalestra.concurrency.threads import WorkerThreads, current_threads


@pytest.fixture
def threads() -> Iterator[WorkerThreads]:
    """Threads of the test's own, ended after it."""
    own = WorkerThreads()
    token = current_threads.set(own)
    yield own
    current_threads.reset(token)
    own.close()
    assert own.idle == 0
