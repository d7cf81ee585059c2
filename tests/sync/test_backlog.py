"""A bounded number of submissions may be under way, and nobody waits to hand one in."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from coalestra.core.errors import SubmissionBacklogFullError
from coalestra.sync import SubmissionBacklog
from tests.sync.steps import in_thread, outcome


def test_a_full_backlog_refuses_at_once_and_says_how_full_it_is() -> None:
    backlog = SubmissionBacklog(2)
    backlog.take()
    backlog.take()
    with pytest.raises(SubmissionBacklogFullError) as caught:
        backlog.take()
    assert (caught.value.limit, caught.value.pending) == (2, 2)


def test_a_place_given_back_twice_counts_once() -> None:
    backlog = SubmissionBacklog(2)
    place = backlog.take()
    backlog.take()
    backlog.leave(place)
    backlog.leave(place)
    assert backlog.pending == 1


def test_a_flush_of_nothing_returns_at_once() -> None:
    SubmissionBacklog(1).flush(None)


def test_a_submission_that_is_still_being_made_is_not_waited_for() -> None:
    backlog = SubmissionBacklog(1)
    backlog.take()
    backlog.flush(None)


def test_a_flush_waits_for_what_was_accepted_before_it_and_nothing_else() -> None:
    backlog = SubmissionBacklog(2)
    before, after = Future[None](), Future[None]()
    backlog.take().future = before
    flushing = in_thread(lambda: backlog.flush(None))
    backlog.take().future = after
    before.set_result(None)
    after.set_result(None)
    outcome(flushing)


def test_a_failed_submission_is_done_too() -> None:
    backlog = SubmissionBacklog(1)
    failed = Future[None]()
    failed.set_exception(KeyError())
    backlog.take().future = failed
    backlog.flush(0)


def test_a_flush_that_takes_too_long_says_how_much_is_left() -> None:
    backlog = SubmissionBacklog(2)
    done = Future[None]()
    done.set_result(None)
    backlog.take().future = done
    backlog.take().future = Future[None]()
    with pytest.raises(TimeoutError, match=r"within 0\.01 s, got 1 of 2 still pending"):
        backlog.flush(0.01)


def test_the_representation_tells_how_full_it_is() -> None:
    backlog = SubmissionBacklog(2)
    backlog.take()
    assert repr(backlog) == "<SubmissionBacklog 1/2>"
