"""The rules of a circuit as a pure state machine: no clock, no lock, no waiting.

A circuit is CLOSED while calls go through, OPEN while they are refused, and HALF_OPEN once the
recovery time is over: then one call, the probe, decides.

=========  ==================  ============  =======================  ====================
state      success             failure       abandoned (cancelled)    skipped (never made)
=========  ==================  ============  =======================  ====================
CLOSED     count is 0          count + 1;    --                       --
                               at the limit
                               OPEN
OPEN       --                  --            --                       --
HALF_OPEN  CLOSED, count is 0  OPEN again    OPEN again, if it was    the probe is free
                                             the probe                again
=========  ==================  ============  =======================  ====================

What arrives while OPEN comes from calls that began before it opened. It tells nothing new.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coalestra.core.validation import flag, instance, integer, number


class CircuitScope(str, Enum):
    """Which calls of a source share a circuit."""

    SOURCE = "source"
    """All of them."""
    NAMESPACE = "namespace"
    """Those for keys of one namespace."""
    SUBJECT = "subject"
    """Those for one subject; for one ``namespace:name`` where keys have no subject."""
    RESOURCE = "resource"
    """Those for one key."""


class CircuitState(str, Enum):
    """Whether a circuit lets calls through: all, none, or a single probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class CircuitIdentity:
    """The name of one circuit: a source, a scope, and which part of the source within the scope."""

    source: str
    scope: CircuitScope
    discriminator: str = ""

    def __str__(self) -> str:
        if self.scope is CircuitScope.SOURCE:
            return self.source
        return f"{self.source}:{self.scope.value}:{self.discriminator}"


@dataclass(frozen=True)
class CircuitBreakerPolicy:
    """When a circuit opens and how long it stays so.

    Attributes:
        scope: which calls share a circuit.
        failure_threshold: failures in a row that open it; at least 1.
        recovery_timeout_seconds: how long it then refuses calls.
        enabled: if False every call is let through and nothing is counted.

    Raises:
        TypeError, ValueError: for a field of the wrong type or outside of its range.
    """

    scope: CircuitScope = CircuitScope.SOURCE
    failure_threshold: int = 3
    recovery_timeout_seconds: float = 10.0
    enabled: bool = True

    def __post_init__(self) -> None:
        instance("scope", self.scope, CircuitScope)
        integer("failure_threshold", self.failure_threshold, minimum=1)
        number("recovery_timeout_seconds", self.recovery_timeout_seconds, minimum=0)
        flag("enabled", self.enabled)


class Circuit:
    """The state of one circuit. Time comes in as an argument, in seconds of one monotonic clock."""

    __slots__ = ("_failures", "_opened_at", "_probe_at", "_probing", "_state")

    def __init__(self) -> None:
        self._state = CircuitState.CLOSED
        self._failures = 0
        self._opened_at = 0.0
        self._probe_at = 0.0
        self._probing = False

    @property
    def at_rest(self) -> bool:
        """Whether it is as good as new, so that nothing need be remembered."""
        return self._state is CircuitState.CLOSED and not self._failures

    @property
    def failures(self) -> int:
        """How many calls in a row have failed."""
        return self._failures

    @property
    def opened_at(self) -> float:
        """When it opened last; 0.0 if it never did."""
        return self._opened_at

    @property
    def probing(self) -> bool:
        """Whether the one probe is under way."""
        return self._probing

    def state(self, now: float) -> CircuitState:
        """Return the state at `now`: an open circuit turns half-open by the passing of time."""
        if self._state is CircuitState.OPEN and now >= self._probe_at:
            return CircuitState.HALF_OPEN
        return self._state

    def wait(self, now: float) -> float:
        """Return the seconds until an open circuit may be probed; 0.0 in any other state."""
        if self._state is CircuitState.OPEN:
            return max(0.0, self._probe_at - now)
        return 0.0

    def refuses(self, now: float) -> bool:
        """Whether a call would be refused at `now`."""
        return self._probing or self.state(now) is CircuitState.OPEN

    def admit(self, now: float) -> bool:
        """Let a call through, as the probe if half-open; False if it is refused."""
        if self.refuses(now):
            return False
        self._state = self.state(now)
        self._probing = self._state is CircuitState.HALF_OPEN
        return True

    def succeed(self, now: float) -> None:
        """Take in that a call returned something fresh."""
        if self.state(now) is not CircuitState.OPEN:
            self._state = CircuitState.CLOSED
            self._failures = 0
            self._probing = False

    def fail(self, now: float, policy: CircuitBreakerPolicy) -> None:
        """Take in that a call failed."""
        state = self.state(now)
        if state is CircuitState.OPEN:
            return
        self._failures += 1
        if state is CircuitState.HALF_OPEN or self._failures >= policy.failure_threshold:
            self._open(now, policy)

    def abandon(self, now: float, policy: CircuitBreakerPolicy) -> None:
        """Take in that a call was cancelled: a probe lost that way has proved nothing."""
        if self._probing:
            self._open(now, policy)

    def skip(self) -> None:
        """Take in that a call was not made after all."""
        self._probing = False

    def _open(self, now: float, policy: CircuitBreakerPolicy) -> None:
        self._state = CircuitState.OPEN
        self._opened_at = now
        self._probe_at = now + policy.recovery_timeout_seconds
        self._probing = False

    def __repr__(self) -> str:
        return f"<Circuit {self._state.value} failures={self._failures} probing={self._probing}>"
