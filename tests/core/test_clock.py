"""The clock of the machine follows the machine."""

from __future__ import annotations

import time

import pytest

from coalestra.core.protocols import Clock, SystemClock
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
