"""The circuits that the keys of one call belong to."""

from __future__ import annotations

from collections.abc import Sequence, Set

from coalestra.core.errors import CircuitOpenError
from coalestra.orchestration.flights import Acquisition
from coalestra.resilience.circuit import CircuitBreakerPolicy, CircuitIdentity, CircuitScope
from coalestra.resilience.circuit_breaker import CircuitBreaker


class Admission:
    """Asks the circuits of a call for leave, and tells each of them once how the call went.

    A batch may touch several circuits. Its keys are grouped by circuit; the groups of open ones are
    left out of the call.
    """

    __slots__ = ("_breaker", "_groups", "_policy", "_source", "_unasked")

    def __init__(self, breaker: CircuitBreaker, source: str, policy: CircuitBreakerPolicy) -> None:
        self._breaker = breaker
        self._source = source
        self._policy = policy
        self._groups: dict[CircuitIdentity, list[Acquisition]] = {}
        self._unasked: Sequence[Acquisition] = ()

    def open_now(self, flights: Sequence[Acquisition]) -> list[Acquisition]:
        """Return the flights whose circuit is open, without taking part in any circuit."""
        if not self._policy.enabled or not len(self._breaker):
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
        if not len(self._breaker):
            self._unasked = flights  # nobody knows of a circuit that is not at rest
            return refused
        for identity, group in self._by_circuit(flights).items():
            try:
                self._breaker.admit(self._source, group[0].key, self._policy)
            except CircuitOpenError:
                refused += group
            else:
                self._groups[identity] = group
        return refused

    def close(self, fresh: Set[Acquisition]) -> None:
        """Tell each circuit how its keys fared: one fresh value makes its group a success."""
        whole = self._policy.scope is CircuitScope.SOURCE and not len(self._breaker)
        if whole and not fresh.isdisjoint(self._unasked):
            self._unasked = ()
            return
        for identity, flights in self._taken():
            if fresh.isdisjoint(flights):
                self._breaker.fail(identity, self._policy)
            else:
                self._breaker.succeed(identity, self._policy)

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

    def _by_circuit(
        self, flights: Sequence[Acquisition]
    ) -> dict[CircuitIdentity, list[Acquisition]]:
        if not flights:
            return {}
        if self._policy.scope is CircuitScope.SOURCE:
            return {self._identity(flights[0]): list(flights)}
        groups: dict[CircuitIdentity, list[Acquisition]] = {}
        for flight in flights:
            groups.setdefault(self._identity(flight), []).append(flight)
        return groups

    def _identity(self, flight: Acquisition) -> CircuitIdentity:
        return self._breaker.identity_for(self._source, key=flight.key, scope=self._policy.scope)

    def _taken(self) -> list[tuple[CircuitIdentity, list[Acquisition]]]:
        groups = {**self._groups, **self._by_circuit(self._unasked)}
        self._groups, self._unasked = {}, ()
        return list(groups.items())

    def __repr__(self) -> str:
        return f"<Admission {self._source} circuits={len(self._groups)}>"
