"""The public face of the circuits: the same steps, as coroutines, by source and key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from types import MappingProxyType

from coalestra.core.errors import CircuitOpenError
from coalestra.core.frozen import immutable
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import Clock, SystemClock
from coalestra.core.validation import flag, instance, integer, number

# The rules of a circuit as a pure state machine: no clock, no lock, no waiting -------------------
#
# A circuit is CLOSED while calls go through, OPEN while they are refused, and HALF_OPEN once the
# recovery time is over: then one call, the probe, decides.
#
# =========  ==================  ============  =======================  ====================
# state      success             failure       abandoned (cancelled)    skipped (never made)
# =========  ==================  ============  =======================  ====================
# CLOSED     count is 0          count + 1;    --                       --
#                                at the limit
#                                OPEN
# OPEN       --                  --            --                       --
# HALF_OPEN  CLOSED, count is 0  OPEN again    OPEN again, if it was    the probe is free
#                                              the probe                again
# =========  ==================  ============  =======================  ====================
#
# What arrives while OPEN comes from calls that began before it opened. It tells nothing new.


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


@immutable
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


# A look at one circuit ---------------------------------------------------------------------------


@immutable
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


# Every circuit that has anything to remember, driven synchronously -------------------------------


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


# The public face of the circuits: the same steps, as coroutines, by source and key ---------------


class CircuitBreaker(Circuits):
    """Stops calling a source that keeps failing, and tries it again after a while.

    Closed, it lets calls through; open, after `failure_threshold` failures in a row, it refuses
    them; half-open, `recovery_timeout_seconds` later, it lets one probe through, which decides.

    Args:
        failure_threshold: of the default policy.
        recovery_timeout_seconds: of the default policy.
        clock: whose monotonic seconds count; by default the system's.
        default_policy: in place of the one made of the two numbers.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or outside of its range.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 3,
        recovery_timeout_seconds: float = 10.0,
        clock: Clock | None = None,
        default_policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        instance("default_policy", default_policy, CircuitBreakerPolicy, optional=True)
        from_numbers = CircuitBreakerPolicy(
            failure_threshold=failure_threshold, recovery_timeout_seconds=recovery_timeout_seconds
        )
        super().__init__(default_policy or from_numbers, clock=clock)

    async def before_call(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> CircuitIdentity:
        """Let a call through and return its circuit; a half-open one admits a single probe.

        Report afterwards, once: `record_success`, `record_failure`, `record_abandoned` or
        `record_skipped`.

        Raises:
            CircuitOpenError: if the circuit is open, or its probe is under way.
            ValueError: if the policy's scope needs a key and there is none.
        """
        return self.admit(source, key, policy or self.default_policy)

    async def record_success(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call that returned something fresh: the count of failures begins anew."""
        self.succeed(*self._resolve(source, key, policy))

    async def record_failure(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call that failed, once for all its retries; a failed probe reopens."""
        self.fail(*self._resolve(source, key, policy))

    async def record_abandoned(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call that was cancelled under way: a probe so ended reopens the circuit."""
        self.abandon(*self._resolve(source, key, policy))

    async def record_skipped(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call never made, for want of time or capacity: it frees the probe, no more."""
        self.skip(*self._resolve(source, key, policy))

    async def state_for(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> CircuitState:
        """Return the state of the circuit that a call would belong to."""
        identity, _ = self._resolve(source, key, policy)
        return self.state_of(identity)

    async def reset(
        self,
        source: str | None = None,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Close circuits as if nothing had failed.

        Args:
            source: the source whose circuits to close; None for all of them.
            key: with a source, close only the circuit that this key belongs to.
            policy: tells by its scope which circuit that is.

        Raises:
            ValueError: if there is a key but no source.
        """
        if source is None and key is not None:
            raise ValueError(f"source must be given together with a key, got None and {key}")
        if source is None or key is None:
            self.forget_source(source)
        else:
            identity, _ = self._resolve(source, key, policy)
            self.forget(identity)

    async def snapshot(self) -> Mapping[CircuitIdentity, CircuitSnapshot]:
        """Return the figures of every circuit that has failures or is not closed."""
        return MappingProxyType(self.view())

    def _resolve(
        self, source: str, key: ResourceKey | None, policy: CircuitBreakerPolicy | None
    ) -> tuple[CircuitIdentity, CircuitBreakerPolicy]:
        chosen = policy or self.default_policy
        return self.identity_for(source, key=key, scope=chosen.scope), chosen
