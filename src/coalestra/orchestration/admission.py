"""The circuits that the keys of one call belong to."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from coalestra.core.errors import CircuitOpenError
from coalestra.orchestration.flights import Acquisition
from coalestra.resilience.circuit import CircuitBreakerPolicy, CircuitIdentity
from coalestra.resilience.circuit_breaker import CircuitBreaker


class Admission:
    """Asks the circuits of a call for leave, and tells each of them once how the call went.

    A batch may touch several circuits. Its keys are grouped by circuit; the groups of open ones are
    left out of the call.
    """

    __slots__ = ("_breaker", "_groups", "_policy", "_source")

    def __init__(self, breaker: CircuitBreaker, source: str, policy: CircuitBreakerPolicy) -> None:
        self._breaker = breaker
        self._source = source
        self._policy = policy
        self._groups: dict[CircuitIdentity, list[Acquisition]] = {}

    def open_now(self, flights: Sequence[Acquisition]) -> list[Acquisition]:
        """Return the flights whose circuit is open, without taking part in any circuit."""
        if not self._policy.enabled:
            return []
        return [
            flight
            for flight in flights
            if self._breaker.peek_open(self._identity(flight), self._policy)
        ]

    def enter(self, flights: Sequence[Acquisition]) -> list[Acquisition]:
        """Take part in the circuits, just before the call; return the flights that may not.

        A half-open circuit admits a single call, the probe.
        """
        refused: list[Acquisition] = []
        if not self._policy.enabled:
            return refused
        for flight in flights:
            identity = self._identity(flight)
            group = self._groups.get(identity)
            if group is None:
                try:
                    self._breaker.admit(self._source, flight.key, self._policy)
                except CircuitOpenError:
                    refused.append(flight)
                    continue
                group = self._groups[identity] = []
            group.append(flight)
        return refused

    def close(self, fresh: Collection[Acquisition]) -> None:
        """Tell each circuit how its keys fared: one fresh value makes its group a success."""
        for identity, flights in self._taken():
            if any(flight in fresh for flight in flights):
                self._breaker.succeed(identity, self._policy)
            else:
                self._breaker.fail(identity, self._policy)

    def abandon(self) -> None:
        """Tell each circuit that the call was given up: a probe has shown nothing, and reopens."""
        for identity, _ in self._taken():
            self._breaker.abandon(identity, self._policy)

    def refusal(self, flight: Acquisition) -> CircuitOpenError:
        """Return the error for a flight that an open circuit keeps out."""
        return CircuitOpenError(
            f"circuit {self._identity(flight)} is open after {self._policy.failure_threshold} "
            f"failures in a row; it is probed {self._policy.recovery_timeout_seconds:g} s after it "
            "opened"
        )

    def _identity(self, flight: Acquisition) -> CircuitIdentity:
        return self._breaker.identity_for(self._source, key=flight.key, scope=self._policy.scope)

    def _taken(self) -> list[tuple[CircuitIdentity, list[Acquisition]]]:
        groups, self._groups = self._groups, {}
        return list(groups.items())

    def __repr__(self) -> str:
        return f"<Admission {self._source} circuits={len(self._groups)}>"
