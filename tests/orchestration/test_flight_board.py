"""The board of flights, where builds do not reach."""

from __future__ import annotations

import pytest

from coalestra import FetchContext
from coalestra.orchestration.flights import Flight, FlightBoard, Gather, Work
from coalestra.orchestration.readings import Pins
from tests.orchestration.scripted import LASTING, key

pytestmark = pytest.mark.concurrency


def test_a_flight_may_still_end_when_the_board_was_cleared() -> None:
    board, work = FlightBoard(None), Work(FetchContext(0.0))
    gather, flight = Gather(work, [key("x")], Pins()), Flight(key("x"), LASTING, work)
    board.start(gather, flight)
    board.clear()
    successor = Flight(key("x"), LASTING, work)
    board.start(gather, successor)
    assert board.take_off(flight) == {gather: False}
    assert board.flights == {key("x"): successor}
