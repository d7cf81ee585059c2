"""The rules of one circuit, as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalestra.resilience import (
    Circuit,
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    CircuitState,
    Outcome,
)

CLOSED, OPEN, HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN
POLICY = CircuitBreakerPolicy(failure_threshold=2, recovery_timeout_seconds=10.0)
NOW = 100.0


def fresh() -> Circuit:
    return Circuit()


def failed(*times: float) -> Circuit:
    circuit = Circuit()
    for turn, now in enumerate(times):
        circuit.report(Outcome.FAILURE, now, turn, POLICY)
    return circuit


def failed_once() -> Circuit:
    return failed(NOW)


def opened() -> Circuit:
    return failed(NOW, NOW)


def half_open() -> Circuit:
    """Open since ten seconds."""
    return failed(NOW - 10, NOW - 10)


def probing() -> Circuit:
    circuit = half_open()
    assert circuit.admit(NOW, 7)
    assert circuit.turn == 7
    return circuit


def step_on(circuit: Circuit, step: Outcome, now: float = NOW) -> bool:
    return circuit.report(step, now, 9, POLICY)


def ask(circuit: Circuit, now: float = NOW) -> bool:
    """Ask for leave, and take it."""
    if circuit.refuses(now):
        return False
    circuit.admit(now, 8)
    return True


@pytest.mark.parametrize("start,step,state,failures,is_probing", [
    (fresh, Outcome.SUCCESS, CLOSED, 0, False), (fresh, Outcome.FAILURE, CLOSED, 1, False),
    (fresh, Outcome.ABANDONED, CLOSED, 0, False), (fresh, Outcome.SKIPPED, CLOSED, 0, False),
    (failed_once, Outcome.SUCCESS, CLOSED, 0, False),
    (failed_once, Outcome.FAILURE, OPEN, 2, False),
    (failed_once, Outcome.ABANDONED, CLOSED, 1, False),
    (failed_once, Outcome.SKIPPED, CLOSED, 1, False), (opened, Outcome.SUCCESS, OPEN, 2, False),
    (opened, Outcome.FAILURE, OPEN, 2, False), (opened, Outcome.ABANDONED, OPEN, 2, False),
    (opened, Outcome.SKIPPED, OPEN, 2, False), (half_open, Outcome.SUCCESS, CLOSED, 0, False),
    (half_open, Outcome.FAILURE, OPEN, 3, False),
    (half_open, Outcome.ABANDONED, HALF_OPEN, 2, False),
    (half_open, Outcome.SKIPPED, HALF_OPEN, 2, False),
    (probing, Outcome.SUCCESS, CLOSED, 0, False), (probing, Outcome.FAILURE, OPEN, 3, False),
    (probing, Outcome.ABANDONED, OPEN, 2, False), (probing, Outcome.SKIPPED, HALF_OPEN, 2, False),
])  # fmt: skip
def test_each_report_takes_each_state_where_the_table_says(
    start: Callable[[], Circuit],
    step: Outcome,
    state: CircuitState,
    failures: int,
    is_probing: bool,
) -> None:
    """The whole table of the module; what changes the state begins a new turn."""
    circuit = start()
    before, turn = circuit.state(NOW), circuit.turn
    changed = step_on(circuit, step)
    figures = circuit.view(NOW)
    assert figures.state is state
    assert changed == (circuit.turn == 9) == (circuit.turn != turn)
    assert changed or state is before
    assert (figures.failures, figures.half_open_probe_active) == (failures, is_probing)


@given(st.lists(st.sampled_from(["ask", "time", *Outcome])))
def test_whatever_happens_a_probe_is_the_only_one_and_half_open(steps: list[str | Outcome]) -> None:
    circuit, now, probes = Circuit(), 0.0, 0
    for step in steps:
        if step == "ask":
            was = circuit.state(now)
            probes += ask(circuit, now) and was is HALF_OPEN
        elif step == "time":
            now += 6.0
        else:
            assert isinstance(step, Outcome)
            step_on(circuit, step, now)
        figures = circuit.view(now)
        if not figures.half_open_probe_active:
            probes = 0
        assert probes == int(figures.half_open_probe_active)
        assert not figures.half_open_probe_active or figures.state is HALF_OPEN


@pytest.mark.parametrize("identity,text", [
    (CircuitIdentity("rest", CircuitScope.SOURCE), "rest"),
    (CircuitIdentity("rest", CircuitScope.SUBJECT, "BTC"), "rest:subject:BTC"),
    (CircuitIdentity("rest", CircuitScope.SUBJECT, ("app", "size")), "rest:subject:app:size"),
    (CircuitIdentity("rest", CircuitScope.SUBJECT), "rest:subject"),
])  # fmt: skip
def test_an_identity_reads_as_source_scope_and_part(identity: CircuitIdentity, text: str) -> None:
    """The scope of the whole source goes without saying."""
    assert str(identity) == text


@pytest.mark.parametrize("field, value, error", [
    ("failure_threshold", 0, ValueError), ("recovery_timeout_seconds", -1, ValueError),
    ("recovery_timeout_seconds", float("nan"), ValueError),
    ("recovery_timeout_seconds", float("inf"), ValueError), ("scope", "source", TypeError),
    ("failure_threshold", True, TypeError), ("failure_threshold", 1.5, TypeError),
    ("recovery_timeout_seconds", "10", TypeError), ("enabled", 1, TypeError),
])  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field: str, value: Any, error: type[Exception]) -> None:
    """A bool is not a number, and a number not a bool."""
    with pytest.raises(error, match=field):
        CircuitBreakerPolicy(**{field: value})


def test_a_circuit_tells_about_itself() -> None:
    """Every stateful object can be looked into."""
    assert repr(probing()) == "<Circuit half_open failures=2 probing=True>"
