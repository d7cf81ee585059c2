"""A bounded number of submissions may be under way, and nobody waits to hand one in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from coalestra.core.errors import SubmissionBacklogFullError
from coalestra.sync import Operation, SubmissionBacklog
from tests.support.strikes import at_every_line

pytestmark = pytest.mark.concurrency


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def entered(
    backlog: SubmissionBacklog, loop: asyncio.AbstractEventLoop, *, accepted: bool = True
) -> Operation[Any]:
    operation: Operation[Any] = Operation(loop, {}, backlog=backlog)
    backlog.enter(operation)
    operation.accepted = accepted
    return operation


def test_of_two_that_come_to_the_last_place_one_has_it(loop: asyncio.AbstractEventLoop) -> None:
    backlog = SubmissionBacklog(1)
    accepted: list[int] = []

    def enter() -> None:
        try:
            entered(backlog, loop)
        except SubmissionBacklogFullError:
            return
        accepted.append(1)
        assert backlog.pending == 1

    def come_and_go() -> None:
        enter()
        for operation in tuple(backlog._places):
            backlog.leave(operation)

    def strike() -> None:
        enter()

    at_every_line(come_and_go, strike)
    assert accepted


def test_a_submission_still_being_made_is_not_waited_for(loop: asyncio.AbstractEventLoop) -> None:
    backlog = SubmissionBacklog(1)
    entered(backlog, loop, accepted=False)
    backlog.flush(None)


def test_a_flush_that_takes_too_long_says_how_much_is_left(loop: asyncio.AbstractEventLoop) -> None:
    backlog = SubmissionBacklog(3)
    entered(backlog, loop).discard()
    entered(backlog, loop)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s, got 1 of 1 still pending"):
        backlog.flush(0.01)
