"""Every circuit that has anything to remember, driven synchronously."""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from typing import TYPE_CHECKING

from coalestra.core.clock import Clock, SystemClock
from coalestra.core.errors import CircuitOpenError
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import integer
from coalestra.resilience.circuit import (
    Circuit,
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    CircuitState,
)

if TYPE_CHECKING:
    from coalestra.resilience.circuit_snapshot import CircuitSnapshot

MAX_CIRCUITS = 10_000
"""How many circuits that are not at rest are remembered."""


class Circuits:
    """The circuits of all sources: a step is one plain call, and one on a circuit at rest is free.

    A circuit without failures is not stored at all. Of the others the `max_circuits` most recently
    used are; beyond that the longest unused is forgotten, that is, closed.

    Attributes:
        clock: whose monotonic seconds count.
        default_policy: the policy where a call names none.
    """

    def __init__(
        self,
        default_policy: CircuitBreakerPolicy,
        *,
        clock: Clock | None = None,
        max_circuits: int = MAX_CIRCUITS,
    ) -> None:
        self.clock: Clock = SystemClock() if clock is None else clock
        self.default_policy = default_policy
        self.max_circuits: int = integer("max_circuits", max_circuits, minimum=1)
        self._circuits: OrderedDict[CircuitIdentity, Circuit] = OrderedDict()

    def __len__(self) -> int:
        """Count the circuits that are not at rest."""
        return len(self._circuits)

    def __bool__(self) -> bool:
        return True

    def identity_for(
        self, source: str, *, key: ResourceKey | None = None, scope: CircuitScope | None = None
    ) -> CircuitIdentity:
        """Return which circuit a call belongs to.

        Args:
            source: the name of the source.
            key: the key asked for; needed by every scope but SOURCE.
            scope: by default that of the default policy.

        Raises:
            ValueError: if the scope needs a key and there is none.
        """
        scope = self.default_policy.scope if scope is None else scope
        if scope is CircuitScope.SOURCE:
            return _of_whole(source)
        if key is None:
            raise ValueError(
                f"key must be given for a circuit of scope {scope.value!r}, got None; "
                "pass the key that the call is for"
            )
        return CircuitIdentity(source, scope, _part(key, scope))

    def peek_open(self, identity: CircuitIdentity, policy: CircuitBreakerPolicy) -> bool:
        """Whether a call would be refused now; changes nothing."""
        if not self._circuits or not policy.enabled:
            return False
        circuit = self._circuits.get(identity)
        return circuit is not None and circuit.refuses(self.clock.monotonic())

    def admit(
        self, source: str, key: ResourceKey | None, policy: CircuitBreakerPolicy
    ) -> CircuitIdentity:
        """Let a call through and return its circuit; a half-open one admits it as its only probe.

        Whoever was let through must report once: `succeed`, `fail`, `abandon` or `skip`.

        Raises:
            CircuitOpenError: if the circuit is open, or its probe is under way.
            ValueError: if the policy's scope needs a key and there is none.
        """
        identity = self.identity_for(source, key=key, scope=policy.scope)
        if self._circuits and policy.enabled:
            circuit = self._circuits.get(identity)
            if circuit is not None:
                self._circuits.move_to_end(identity)
                now = self.clock.monotonic()
                if not circuit.admit(now):
                    raise _refusal(identity, circuit, now)
        return identity

    def succeed(self, identity: CircuitIdentity, policy: CircuitBreakerPolicy) -> None:
        """Report a call that returned something fresh."""
        circuit = self._known(identity, policy)
        if circuit is not None:
            circuit.succeed(self.clock.monotonic())
            if circuit.at_rest:
                del self._circuits[identity]

    def fail(self, identity: CircuitIdentity, policy: CircuitBreakerPolicy) -> None:
        """Report a call that failed, or returned only what is stale; once, whatever its retries."""
        if not policy.enabled:
            return
        circuit = self._circuits.get(identity)
        if circuit is None:
            self._make_room()
            circuit = self._circuits[identity] = Circuit()
        else:
            self._circuits.move_to_end(identity)
        circuit.fail(self.clock.monotonic(), policy)

    def abandon(self, identity: CircuitIdentity, policy: CircuitBreakerPolicy) -> None:
        """Report a call that was cancelled under way: if it was the probe, the circuit reopens."""
        circuit = self._known(identity, policy)
        if circuit is not None:
            circuit.abandon(self.clock.monotonic(), policy)

    def skip(self, identity: CircuitIdentity, policy: CircuitBreakerPolicy) -> None:
        """Report a call that was not made after all: a probe becomes free for another call."""
        circuit = self._known(identity, policy)
        if circuit is not None:
            circuit.skip()

    def state_of(self, identity: CircuitIdentity) -> CircuitState:
        """Return the state of a circuit now."""
        circuit = self._circuits.get(identity)
        return CircuitState.CLOSED if circuit is None else circuit.state(self.clock.monotonic())

    def view(self) -> dict[CircuitIdentity, CircuitSnapshot]:
        """Return the figures of every circuit that is not at rest."""
        from coalestra.resilience.circuit_snapshot import snapshot_of

        now = self.clock.monotonic()
        return {identity: snapshot_of(circuit, now) for identity, circuit in self._circuits.items()}

    def forget(self, identity: CircuitIdentity) -> None:
        """Close one circuit as if it had never failed."""
        self._circuits.pop(identity, None)

    def forget_source(self, source: str | None = None) -> None:
        """Close all circuits of a source, or of every source."""
        for identity in tuple(self._circuits):
            if source is None or identity.source == source:
                del self._circuits[identity]

    def _known(self, identity: CircuitIdentity, policy: CircuitBreakerPolicy) -> Circuit | None:
        if not self._circuits or not policy.enabled:
            return None
        return self._circuits.get(identity)

    def _make_room(self) -> None:
        """Forget the circuit unused for longest; one with a probe under way only if all have."""
        if len(self._circuits) < self.max_circuits:
            return
        idle = (identity for identity, circuit in self._circuits.items() if not circuit.probing)
        del self._circuits[next(idle, next(iter(self._circuits)))]

    def __repr__(self) -> str:
        now = self.clock.monotonic()
        states = [circuit.state(now).value for circuit in self._circuits.values()]
        counts = " ".join(f"{state}={states.count(state)}" for state in sorted(set(states)))
        return f"<{type(self).__name__} {counts or 'all at rest'}>"


@lru_cache(maxsize=1024)
def _of_whole(source: str) -> CircuitIdentity:
    return CircuitIdentity(source, CircuitScope.SOURCE)


def _part(key: ResourceKey, scope: CircuitScope) -> str:
    """Return what tells the circuits of one source apart within a scope."""
    if scope is CircuitScope.NAMESPACE:
        return key.namespace
    if scope is CircuitScope.SUBJECT:
        return key.subject or f"{key.namespace}:{key.name}"
    return str(key)


def _refusal(identity: CircuitIdentity, circuit: Circuit, now: float) -> CircuitOpenError:
    if circuit.probing:
        outlook = "the one call that probes it is under way"
    else:
        outlook = f"it may be probed in {circuit.wait(now):.3g} s"
    return CircuitOpenError(
        f"circuit {identity} is open after {circuit.failures} failures in a row; {outlook}"
    )
