"""A look at one circuit."""

from __future__ import annotations

from dataclasses import dataclass

from coalestra.resilience.circuit import Circuit, CircuitState


@dataclass(frozen=True, slots=True)
class CircuitSnapshot:
    """A circuit at one moment.

    Attributes:
        state: whether it lets calls through.
        failures: failures in a row.
        opened_at: when it opened last, on the clock's monotonic scale; 0.0 if it never did.
        half_open_probe_active: whether the one probe is under way.
    """

    state: CircuitState
    failures: int
    opened_at: float
    half_open_probe_active: bool


def snapshot_of(circuit: Circuit, now: float) -> CircuitSnapshot:
    """Return the figures of a circuit at `now`."""
    return CircuitSnapshot(circuit.state(now), circuit.failures, circuit.opened_at, circuit.probing)
