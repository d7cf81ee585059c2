"""The clock of the machine follows the machine."""

from __future__ import annotations

import datetime
import math
import time
from decimal import Decimal
from typing import Any

import pytest

from coalestra.core.protocols import Clock, SystemClock, checked
from tests.support import ManualClock


def test_the_system_clock_reads_wall_and_monotonic_time() -> None:
    clock = SystemClock()
    before = time.time(), time.monotonic()
    read = clock.now(), clock.monotonic()
    after = time.time(), time.monotonic()
    for low, value, high in zip(before, read, after, strict=True):
        assert low <= value <= high


def test_a_clock_is_whatever_has_the_two_readings() -> None:
    assert isinstance(SystemClock(), Clock)
    assert isinstance(ManualClock(), Clock)
    assert not isinstance(time, Clock)


def test_the_system_clock_has_no_state() -> None:
    with pytest.raises(AttributeError):
        SystemClock().offset = 1  # type: ignore[attr-defined]  # what must not work
    assert repr(SystemClock()) == "SystemClock()"


class Telling:
    """A clock that says whatever it was told to say."""

    def __init__(self, moment: Any) -> None:
        self.moment = moment

    def now(self) -> Any:
        return self.moment

    monotonic = now


@pytest.mark.parametrize(
    "moment, error",
    [(m, TypeError) for m in (None, "5", Decimal(5), True, datetime.datetime(2024, 1, 1))]
    + [(m, ValueError) for m in (math.nan, math.inf, 10**400)],
    ids=lambda each: str(each)[:20],
)
def test_a_moment_that_is_none_names_the_clock(moment: Any, error: type[Exception]) -> None:
    clock = checked(Telling(moment))
    for name in ("now", "monotonic"):
        with pytest.raises(error, match=rf"^{name}\(\) of the clock must be a finite number"):
            getattr(clock, name)()


class Moment(float):
    """A float of another class, as those of numpy are."""


@pytest.mark.parametrize("moment", [5, 5.5, -1.0, Moment(5)])
def test_a_clock_may_tell_whole_seconds_and_those_before_the_epoch(moment: float) -> None:
    clock = checked(Telling(moment))
    for told in (clock.now(), clock.monotonic()):
        assert (type(told), told) == (float, moment)


def test_monotonic_seconds_that_run_back_go_on_from_where_they_were() -> None:
    """So that no latency is negative, and nothing stands still until the clock has caught up."""
    theirs = Telling(10.0)
    clock = checked(theirs)
    told = []
    for moment in (10.0, 12.0, 4.0, 5.0, 5.0, 1.0, 2.5):
        theirs.moment = moment
        told.append(clock.monotonic())
        assert clock.now() == moment  # which may be corrected
    assert told == [10.0, 12.0, 12.0, 13.0, 13.0, 13.0, 14.5]


def test_a_moment_that_another_thread_was_told_meanwhile_is_no_clock_that_runs_back() -> None:
    class Overtaken(Telling):
        def monotonic(self) -> Any:
            self.moment += 1.0
            read = self.moment
            if read == 1.0:  # and before it has returned, another thread asks
                assert clock.monotonic() == 2.0
            return read

    clock = checked(Overtaken(0.0))
    assert [clock.monotonic() for _ in range(3)] == [1.0, 3.0, 4.0]
