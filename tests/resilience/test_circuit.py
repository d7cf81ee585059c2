"""The rules of one circuit, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalestra.resilience.circuit_breaker import (
    Circuit,
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    CircuitSnapshot,
    CircuitState,
    snapshot_of,
)

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
POLICY = CircuitBreakerPolicy(failure_threshold=2, recovery_timeout_seconds=10.0)
NOW = 100.0


def fresh() -> Circuit:
    return Circuit()


def failed_once() -> Circuit:
    circuit = Circuit()
    circuit.fail(NOW, POLICY)
    return circuit


def opened() -> Circuit:
    circuit = failed_once()
    circuit.fail(NOW, POLICY)
    return circuit


def half_open() -> Circuit:
    """Open since ten seconds."""
    circuit = Circuit()
    circuit.fail(NOW - 10, POLICY)
    circuit.fail(NOW - 10, POLICY)
    return circuit


def probing() -> Circuit:
    circuit = half_open()
    assert circuit.admit(NOW)
    return circuit


STEPS: dict[str, Callable[[Circuit], object]] = {
    "success": lambda circuit: circuit.succeed(NOW),
    "failure": lambda circuit: circuit.fail(NOW, POLICY),
    "abandoned": lambda circuit: circuit.abandon(NOW, POLICY),
    "skipped": lambda circuit: circuit.skip(),
}


@pytest.mark.parametrize(
    "start,step,state,failures,is_probing",
    [
        (fresh, "success", CLOSED, 0, False),
        (fresh, "failure", CLOSED, 1, False),
        (fresh, "abandoned", CLOSED, 0, False),
        (fresh, "skipped", CLOSED, 0, False),
        (failed_once, "success", CLOSED, 0, False),
        (failed_once, "failure", OPEN, 2, False),
        (failed_once, "abandoned", CLOSED, 1, False),
        (failed_once, "skipped", CLOSED, 1, False),
        (opened, "success", OPEN, 2, False),
        (opened, "failure", OPEN, 2, False),
        (opened, "abandoned", OPEN, 2, False),
        (opened, "skipped", OPEN, 2, False),
        (half_open, "success", CLOSED, 0, False),
        (half_open, "failure", OPEN, 3, False),
        (half_open, "abandoned", HALF_OPEN, 2, False),
        (half_open, "skipped", HALF_OPEN, 2, False),
        (probing, "success", CLOSED, 0, False),
        (probing, "failure", OPEN, 3, False),
        (probing, "abandoned", OPEN, 2, False),
        (probing, "skipped", HALF_OPEN, 2, False),
    ],
)
def test_each_report_takes_each_state_where_the_table_says(
    start: Callable[[], Circuit], step: str, state: CircuitState, failures: int, is_probing: bool
) -> None:
    """The whole table of the module."""
    circuit = start()
    STEPS[step](circuit)
    figures = snapshot_of(circuit, NOW)
    assert figures.state is state
    assert (figures.failures, figures.half_open_probe_active) == (failures, is_probing)


@pytest.mark.parametrize(
    "start,admitted", [(fresh, 3), (failed_once, 3), (opened, 0), (half_open, 1), (probing, 0)]
)
def test_each_state_admits_all_none_or_one(start: Callable[[], Circuit], admitted: int) -> None:
    """Of three calls that ask."""
    circuit = start()
    refused_before = circuit.refuses(NOW)
    assert [circuit.admit(NOW) for _ in range(3)].count(True) == admitted
    assert refused_before == (not admitted)


def test_an_open_circuit_turns_half_open_exactly_at_its_time() -> None:
    """Not a moment before."""
    circuit = opened()
    assert circuit.state(NOW + 9.999) is OPEN
    assert circuit.wait(NOW + 4) == 6.0
    assert circuit.state(NOW + 10) is HALF_OPEN
    assert circuit.wait(NOW + 11) == 0.0
    assert fresh().wait(NOW) == 0.0


@pytest.mark.parametrize("step", ["failure", "abandoned"])
def test_a_probe_that_fails_or_is_cancelled_reopens_for_the_whole_time(step: str) -> None:
    """Counted from now, not from the first opening."""
    circuit = probing()
    STEPS[step](circuit)
    assert snapshot_of(circuit, NOW).opened_at == NOW
    assert not circuit.admit(NOW + 9)
    assert circuit.admit(NOW + 10)


def test_a_skipped_probe_makes_room_for_exactly_one_other() -> None:
    """At once: nothing has been learned."""
    circuit = probing()
    circuit.skip()
    assert [circuit.admit(NOW) for _ in range(3)] == [True, False, False]


def test_looking_at_a_circuit_changes_nothing() -> None:
    """However late it is."""
    circuit = opened()
    before = snapshot_of(circuit, NOW)
    circuit.refuses(NOW + 99)
    circuit.state(NOW + 99)
    snapshot_of(circuit, NOW + 99)
    assert snapshot_of(circuit, NOW) == before == CircuitSnapshot(OPEN, 2, NOW, False)


@given(st.lists(st.sampled_from(["admit", *STEPS, "time"])))
def test_whatever_happens_there_is_at_most_one_probe_and_it_is_half_open(steps: list[str]) -> None:
    """And a circuit at rest has no failures."""
    circuit, now, probes = Circuit(), 0.0, 0
    for step in steps:
        if step == "admit":
            was = circuit.state(now)
            probes += circuit.admit(now) and was is HALF_OPEN
        elif step == "time":
            now += 6.0
        elif step == "failure":
            circuit.fail(now, POLICY)
        elif step == "abandoned":
            circuit.abandon(now, POLICY)
        elif step == "success":
            circuit.succeed(now)
        else:
            circuit.skip()
        figures = snapshot_of(circuit, now)
        if not figures.half_open_probe_active:
            probes = 0
        assert probes == int(figures.half_open_probe_active)
        assert not figures.half_open_probe_active or figures.state is HALF_OPEN
        assert circuit.at_rest == (figures.state is CLOSED and figures.failures == 0)


@pytest.mark.parametrize(
    "identity,text",
    [
        (CircuitIdentity("rest", CircuitScope.SOURCE), "rest"),
        (CircuitIdentity("rest", CircuitScope.SUBJECT, "BTC"), "rest:subject:BTC"),
    ],
)
def test_an_identity_reads_as_source_scope_and_part(identity: CircuitIdentity, text: str) -> None:
    """The scope of the whole source goes without saying."""
    assert str(identity) == text


@pytest.mark.parametrize(
    "field,value",
    [
        ("failure_threshold", 0),
        ("recovery_timeout_seconds", -1),
        ("recovery_timeout_seconds", float("nan")),
        ("recovery_timeout_seconds", float("inf")),
    ],
)
def test_a_policy_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    """The message names the field."""
    with pytest.raises(ValueError, match=field):
        CircuitBreakerPolicy(**{field: value})


@pytest.mark.parametrize(
    "field,value",
    [
        ("scope", "source"),
        ("failure_threshold", True),
        ("failure_threshold", 1.5),
        ("recovery_timeout_seconds", "10"),
        ("enabled", 1),
    ],
)
def test_a_policy_value_of_the_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    """A bool is not a number, and a number not a bool."""
    with pytest.raises(TypeError, match=field):
        CircuitBreakerPolicy(**{field: value})


def test_a_circuit_tells_about_itself() -> None:
    """Every stateful object can be looked into."""
    assert repr(probing()) == "<Circuit half_open failures=2 probing=True>"
