"""Circuits and retries: when a source that fails is left alone, and when it is tried again.

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

Laws:

1. A call carries the *turn* in which it was admitted: a number that grows whenever any circuit
   changes its state. What it reports counts only while its circuit is in the state that admitted
   it; so a half-open circuit is decided by its probe, whatever older calls come to.
2. A circuit at rest, closed and without failures, is not stored. Of the others so many are kept as
   `max_circuits` says.
3. A step is one plain call: no lock, no waiting. Time is read from one monotonic clock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from coalestra._endings import running_task
from coalestra.core import errors, validation
from coalestra.core.errors import CircuitOpenError
from coalestra.core.frozen import record
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import KeyedPolicies
from coalestra.core.protocols import Clock, SystemClock, checked

__all__ = [
    "TRANSIENT_ERRORS", "CircuitBreaker", "CircuitBreakerPolicy", "CircuitIdentity", "CircuitScope",
    "CircuitSnapshot", "CircuitState", "ResiliencePolicyResolver", "ResilienceResolver",
    "RetryPolicy", "SourceResiliencePolicy",
]  # fmt: skip


class CircuitScope(str, Enum):
    """Which calls of a source share a circuit."""

    SOURCE = "source"
    """All of them."""
    NAMESPACE = "namespace"
    """Those for keys of one namespace."""
    SUBJECT = "subject"
    """Those for one subject; for one namespace and name where keys have no subject."""
    RESOURCE = "resource"
    """Those for one key."""


class CircuitState(str, Enum):
    """Whether a circuit lets calls through: all, none, or a single probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


_CLOSED, _OPEN, _HALF_OPEN = CircuitState.CLOSED, CircuitState.OPEN, CircuitState.HALF_OPEN


class Outcome(Enum):
    """What a call that was let through came to."""

    SUCCESS = "it returned something fresh"
    FAILURE = "it failed, or returned only what is stale"
    ABANDONED = "it was cancelled under way"
    SKIPPED = "it was not made after all"


@record
class CircuitIdentity:
    """Which circuit: a source, a scope, and which part of the source within the scope.

    Attributes:
        source: the name of the source.
        scope: which of its calls share the circuit.
        discriminator: the part: "" for the whole source, a namespace, a subject, the namespace and
            name of keys without a subject, or a key. Different parts are never equal, though their
            texts may be.
        turn: when a call was admitted; `CircuitBreaker.before_call` sets it. It is not compared.
    """

    source: str
    scope: CircuitScope
    discriminator: Hashable = ""
    turn: int | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        if self.scope is CircuitScope.SOURCE:
            return self.source
        part = self.discriminator
        text = ":".join(part) if isinstance(part, tuple) else str(part)
        return f"{self.source}:{self.scope.value}" + (f":{text}" if text else "")


@dataclass(frozen=True)
class CircuitBreakerPolicy:
    """When a circuit opens and how long it stays so.

    Attributes:
        scope: which calls share a circuit.
        failure_threshold: failures in a row that open it; at least 1.
        recovery_timeout_seconds: how long it then refuses calls.
        enabled: if False every call is let through and nothing is counted.
    """

    scope: CircuitScope = validation.ruled(CircuitScope.SOURCE, validation.instance, CircuitScope)
    failure_threshold: int = validation.ruled(3, validation.integer, minimum=1)
    recovery_timeout_seconds: float = validation.ruled(10.0, validation.number, minimum=0)
    enabled: bool = validation.ruled(True, validation.flag)

    def __post_init__(self) -> None:
        validation.check_fields(self)


@record
class CircuitSnapshot:
    """A circuit at one moment, or several in the same state put together.

    The last three are not compared.

    Attributes:
        state: whether it lets calls through.
        failures: failures in a row; the most of several.
        opened_at: when it opened last, on the clock's monotonic scale; 0.0 if it never did.
        half_open_probe_active: whether the one probe is under way.
        seconds_since_opened: how long ago it opened last; None if it never did.
        seconds_until_probe: when an open circuit may be probed; 0.0 in any other state.
        count: how many circuits this tells of.
    """

    state: CircuitState
    failures: int
    opened_at: float
    half_open_probe_active: bool
    seconds_since_opened: float | None = field(default=None, compare=False)
    seconds_until_probe: float = field(default=0.0, compare=False)
    count: int = field(default=1, compare=False)

    @property
    def open(self) -> int:
        """How many of the circuits are open."""
        return self.count if self.state is _OPEN else 0

    @property
    def half_open(self) -> int:
        """How many of them are half-open."""
        return self.count if self.state is _HALF_OPEN else 0


_Call = tuple[CircuitIdentity, CircuitBreakerPolicy]

# One circuit: the table above --------------------------------------------------------------------


@dataclass(slots=True, eq=False, repr=False)
class Circuit:
    """The state of one circuit. Time comes in as an argument, in seconds of one monotonic clock.

    `turn` is that of its last change of state; `opened_at` is None while it is closed.
    """

    turn: int = 0
    failures: int = 0
    opened_at: float | None = None
    probe_at: float = 0.0
    probing: bool = False

    def state(self, now: float) -> CircuitState:
        """Return the state at `now`: an open circuit turns half-open by the passing of time."""
        if self.opened_at is None:
            return _CLOSED
        return _HALF_OPEN if self.probing or now >= self.probe_at else _OPEN

    def refuses(self, now: float) -> bool:
        """Whether a call would be refused at `now`."""
        return self.probing or self.state(now) is _OPEN

    def admit(self, now: float, turn: int) -> bool:
        """Let a call through; return whether it is the probe, with which a new `turn` begins."""
        if self.state(now) is not _HALF_OPEN:
            return False
        self.probing, self.turn = True, turn
        return True

    def report(self, outcome: Outcome, now: float, turn: int, policy: CircuitBreakerPolicy) -> bool:
        """Take in what a call came to; return whether a new `turn` has begun."""
        state = self.state(now)
        if state is _OPEN:
            return False
        half_open = state is _HALF_OPEN
        if outcome is Outcome.SUCCESS:
            self.opened_at, self.failures, self.probing = None, 0, False
            self.turn = turn if half_open else self.turn
            return half_open
        if outcome is Outcome.SKIPPED:
            self.probing = False
            return False
        if outcome is Outcome.FAILURE:
            self.failures += 1
            opens = half_open or self.failures >= policy.failure_threshold
        else:
            opens = self.probing
        if opens:
            self.opened_at, self.probe_at = now, now + policy.recovery_timeout_seconds
            self.probing, self.turn = False, turn
        return opens

    def view(self, now: float, *others: Circuit) -> CircuitSnapshot:
        """Return the figures at `now`, with those of `others` in the same state."""
        together, state = (self, *others), self.state(now)
        opened = [each.opened_at for each in together if each.opened_at is not None]
        soonest = min(each.probe_at for each in together)
        return CircuitSnapshot(
            state,
            failures=max(each.failures for each in together),
            opened_at=max(opened, default=0.0),
            half_open_probe_active=any(each.probing for each in together),
            seconds_since_opened=max(0.0, now - max(opened)) if opened else None,
            seconds_until_probe=max(0.0, soonest - now) if state is _OPEN else 0.0,
            count=len(together),
        )

    def __repr__(self) -> str:
        state = self.state(-math.inf).value
        return f"<Circuit {state} failures={self.failures} probing={self.probing}>"


MAX_CIRCUITS = 10_000
"""How many circuits that are not at rest are remembered."""

_MAX_RECOVERED = 1_000
"""For how many circuits it is remembered since when they are at rest again."""


class CircuitBreaker:
    """Stops calling a source that keeps failing, and tries it again after a while.

    Closed, it lets calls through; open, after `failure_threshold` failures in a row, it refuses
    them; half-open, `recovery_timeout_seconds` later, it lets one probe through, which decides.

    Args:
        failure_threshold: of the default policy: how many failures in a row open a circuit.
        recovery_timeout_seconds: of the default policy: how long it refuses calls then.
        clock: whose monotonic seconds count; by default the system's.
        default_policy: in place of the one made of the two numbers.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 3,
        recovery_timeout_seconds: float = 10.0,
        clock: Clock | None = None,
        default_policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        validation.instance("default_policy", default_policy, CircuitBreakerPolicy, optional=True)
        validation.require_methods("clock", clock, "monotonic", optional=True, plain=True)
        from_numbers = CircuitBreakerPolicy(
            failure_threshold=failure_threshold, recovery_timeout_seconds=recovery_timeout_seconds
        )
        self.clock: Clock = SystemClock() if clock is None else clock
        self.default_policy: CircuitBreakerPolicy = default_policy or from_numbers
        self.max_circuits: int = MAX_CIRCUITS
        self.turn: int = 0
        # Plain, least used first, as other threads can copy these in one step.
        self.circuits: dict[CircuitIdentity, Circuit] = {}
        self._recovered: OrderedDict[CircuitIdentity, int] = OrderedDict()
        self._admitted: WeakKeyDictionary[Any, dict[CircuitIdentity, int]] = WeakKeyDictionary()

    def __len__(self) -> int:
        """Count the circuits that are not at rest."""
        return len(self.circuits)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        now = checked(self.clock).monotonic()
        states = [circuit.state(now).value for circuit in self.circuits.copy().values()]
        counts = " ".join(f"{state}={states.count(state)}" for state in sorted(set(states)))
        return f"<{type(self).__name__} {counts or 'all at rest'}>"

    def identity_for(
        self, source: str, *, key: ResourceKey | None = None, scope: CircuitScope | None = None
    ) -> CircuitIdentity:
        """Return which circuit a call for a key of a source belongs to.

        By default the scope is that of the default policy; every one but SOURCE needs the key.
        """
        scope = self.default_policy.scope if scope is None else scope
        if scope is CircuitScope.SOURCE:
            return _of_whole(source)
        validation.instance("scope", scope, CircuitScope)
        if key is None:
            raise ValueError(
                f"key must be given for a circuit of scope {scope.value!r}, got None; "
                "pass the key that the call is for"
            )
        part: Hashable = key
        if scope is CircuitScope.NAMESPACE:
            part = key.namespace
        elif scope is CircuitScope.SUBJECT:
            part = key.subject or (key.namespace, key.name)
        return CircuitIdentity(source, scope, part)

    # What the engine does, step by step --------------------------------------------------------

    def refusal(
        self, identity: CircuitIdentity, policy: CircuitBreakerPolicy
    ) -> CircuitOpenError | None:
        """Return the error of a call that would be refused now, else None; changes nothing."""
        circuit = self.circuits.get(identity) if self.circuits and policy.enabled else None
        if circuit is None or not circuit.refuses(now := checked(self.clock).monotonic()):
            return None
        if circuit.probing:
            outlook = "the one call that probes it is under way"
        else:
            outlook = f"it may be probed in {circuit.probe_at - now:.3g} s"
        name = validation.readable(str(identity))
        failed = errors.counted(circuit.failures, "failure")
        return CircuitOpenError(f"circuit {name} is open after {failed} in a row; {outlook}")

    def admit(self, identity: CircuitIdentity, policy: CircuitBreakerPolicy) -> int:
        """Let a call through and return its turn, with which it must `report` once.

        A half-open circuit admits its only probe. One that would refuse is a `CircuitOpenError`.
        """
        refused = self.refusal(identity, policy)
        if refused is not None:
            raise refused
        circuit = self.circuits.get(identity) if policy.enabled else None
        if circuit is not None:
            self._use(identity, circuit)
            self.turn += circuit.admit(checked(self.clock).monotonic(), self.turn + 1)
        return self.turn

    def report(
        self,
        identity: CircuitIdentity,
        outcome: Outcome,
        policy: CircuitBreakerPolicy,
        turn: int | None = None,
    ) -> None:
        """Take in, once for all its retries, what a call came to that was admitted in a `turn`.

        Without one the call counts as admitted now.
        """
        circuit = self.circuits.get(identity) if policy.enabled else None
        if circuit is None:
            if outcome is not Outcome.FAILURE or not policy.enabled:
                return
            since = self._recovered.get(identity, 0)
            if turn is not None and turn < since:
                return
            circuit = Circuit(since)
        elif turn is not None and turn < circuit.turn:
            return
        try:
            now = checked(self.clock).monotonic()
        except BaseException:
            circuit.probing = False  # or nobody would ever be let through again
            raise
        if outcome is Outcome.FAILURE:
            self._use(identity, circuit)
        self.turn += circuit.report(outcome, now, self.turn + 1, policy)
        if circuit.opened_at is None and not circuit.failures:
            self._put_to_rest(identity, circuit.turn)

    def _use(self, identity: CircuitIdentity, circuit: Circuit) -> None:
        if self.circuits.pop(identity, None) is None and len(self.circuits) >= self.max_circuits:
            # One unused for longest gives way; one with a probe under way only if all have one.
            idle = (each for each, known in self.circuits.items() if not known.probing)
            del self.circuits[next(idle, next(iter(self.circuits)))]
        self.circuits[identity] = circuit

    def _put_to_rest(self, identity: CircuitIdentity, turn: int) -> None:
        del self.circuits[identity]
        if turn:
            self._recovered[identity] = turn
            if len(self._recovered) > _MAX_RECOVERED:
                self._recovered.popitem(last=False)

    def counted(self) -> dict[CircuitIdentity, CircuitSnapshot]:
        """Return the figures of all circuits by source, scope and state, naming no part of it."""
        groups: dict[tuple[str, CircuitScope, str], list[Circuit]] = {}
        now = checked(self.clock).monotonic()
        for identity, circuit in self.circuits.copy().items():  # in one step, for any thread
            source, scope = identity.source, identity.scope
            part = "" if scope is CircuitScope.SOURCE else circuit.state(now).value
            groups.setdefault((source, scope, part), []).append(circuit)
        return {
            CircuitIdentity(*group): first.view(now, *others)
            for group, (first, *others) in groups.items()
        }

    # The same steps by source and key, as coroutines -------------------------------------------

    async def state_for(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> CircuitState:
        """Return the state of a circuit now."""
        identity, _ = self._resolve(source, key, policy)
        circuit = self.circuits.get(identity)
        return _CLOSED if circuit is None else circuit.state(checked(self.clock).monotonic())

    async def before_call(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> CircuitIdentity:
        """Let a call through and return its circuit; a half-open one admits a single probe.

        Report afterwards, once: `record_success`, `record_failure`, `record_abandoned` or
        `record_skipped`, with what this returned as the `ticket` or from the same task. A report
        from an older state of the circuit then counts for nothing.

        Raises:
            CircuitOpenError: if the circuit is open, or its probe is under way.
        """
        identity, chosen = self._resolve(source, key, policy)
        turn = self.admit(identity, chosen)
        self._turns_of_task()[identity] = turn
        return replace(identity, turn=turn)

    async def record_success(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
        ticket: CircuitIdentity | None = None,
    ) -> None:
        """Report a call that returned something fresh: the count of failures begins anew."""
        self._record(Outcome.SUCCESS, self._resolve(source, key, policy), ticket)

    async def record_failure(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
        ticket: CircuitIdentity | None = None,
    ) -> None:
        """Report a call that failed, once for all its retries; a failed probe reopens."""
        self._record(Outcome.FAILURE, self._resolve(source, key, policy), ticket)

    async def record_abandoned(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
        ticket: CircuitIdentity | None = None,
    ) -> None:
        """Report a call that was cancelled under way: a probe so ended reopens the circuit."""
        self._record(Outcome.ABANDONED, self._resolve(source, key, policy), ticket)

    async def record_skipped(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
        ticket: CircuitIdentity | None = None,
    ) -> None:
        """Report a call that was not made after all: the probe is free for another call."""
        self._record(Outcome.SKIPPED, self._resolve(source, key, policy), ticket)

    async def reset(
        self,
        source: str | None = None,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Close circuits as if nothing had failed: one, all of a source, or every one."""
        if key is not None and source is None:
            raise ValueError("source must be given together with key, got None; name the source")
        one = None if source is None or key is None else self._resolve(source, key, policy)[0]
        for identity in tuple(self.circuits):
            if identity == one if one is not None else source in (None, identity.source):
                self.turn += 1
                self._put_to_rest(identity, self.turn)

    async def snapshot(self) -> Mapping[CircuitIdentity, CircuitSnapshot]:
        """Return the figures of every circuit that has failures or is not closed, by its name."""
        now = checked(self.clock).monotonic()
        return MappingProxyType({name: each.view(now) for name, each in self.circuits.items()})

    def _record(self, outcome: Outcome, call: _Call, ticket: CircuitIdentity | None) -> None:
        identity, chosen = call
        known = self._turns_of_task().pop(identity, None)
        self.report(identity, outcome, chosen, known if ticket is None else ticket.turn)

    def _turns_of_task(self) -> dict[CircuitIdentity, int]:
        """Return in which turns the running task was admitted; outside of one, nothing is known."""
        task = running_task()
        return {} if task is None else self._admitted.setdefault(task, {})

    def _resolve(
        self, source: str, key: ResourceKey | None, policy: CircuitBreakerPolicy | None
    ) -> _Call:
        validation.text("source", source)
        validation.instance("key", key, ResourceKey, optional=True)
        validation.instance("policy", policy, CircuitBreakerPolicy, optional=True)
        chosen = policy or self.default_policy
        return self.identity_for(source, key=key, scope=chosen.scope), chosen


@lru_cache(maxsize=1024)
def _of_whole(source: str) -> CircuitIdentity:
    return CircuitIdentity(source, CircuitScope.SOURCE)


# How often a call is made, and which policy governs the calls of a source ------------------------

_LARGEST_EXPONENT = 1000
"""Doubling more often would overflow a float; the cap on the delay holds long before."""

# Python 3.10 has three timeout errors that are one from 3.11 on.
TRANSIENT_ERRORS: tuple[type[Exception], ...] = (
    errors.SourceUnavailableError,
    OSError,
    TimeoutError,
    asyncio.TimeoutError,
    concurrent.futures.TimeoutError,
)
"""What is retried by default: what says that it may pass, any `OSError`, and timeouts."""

_FINAL = (
    CircuitOpenError,
    errors.ResourceAbsent,
    errors.SnapshotDeadlineExceededError,
    errors.SourceQueueTimeoutError,
)
"""What waiting in the same place cannot mend: no policy retries it."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often a source is asked, and how long to wait in between.

    Attributes:
        max_attempts: calls in all, the first included; at least 1.
        base_delay_seconds: the wait after the first failure; it doubles with each further one.
        max_delay_seconds: no wait is longer.
        jitter_ratio: the part, 0 to 1, by which a wait is varied at random up and down.
        retry_on: which errors are retried: an exception type or several, or a plain, quick function
            that is given the error and says so. In place of `TRANSIENT_ERRORS`, which None stands
            for: name these as well to go on retrying them.

    An open circuit, a deadline, too long a queue and what is absent are never retried.
    """

    max_attempts: int = validation.ruled(2, validation.integer, minimum=1)
    base_delay_seconds: float = validation.ruled(0.05, validation.number, minimum=0)
    max_delay_seconds: float = validation.ruled(1.0, validation.number, minimum=0)
    jitter_ratio: float = validation.ruled(0.1, validation.number, minimum=0, maximum=1)
    retry_on: type[Exception] | Collection[type[Exception]] | Callable[[Any], bool] | None = field(
        default=None, kw_only=True
    )

    def __post_init__(self) -> None:
        validation.check_fields(self)
        object.__setattr__(self, "retry_on", _checked(self.retry_on))

    def retries(self, error: BaseException) -> bool:
        """Return whether a source that raised `error` is asked again while attempts are left.

        Raises:
            TypeError: if the function that says so returned an awaitable.
            BaseException: whatever else it raised.
        """
        on: Any = TRANSIENT_ERRORS if self.retry_on is None else self.retry_on
        if isinstance(error, _FINAL):
            return False
        if isinstance(on, (type, tuple)):
            return isinstance(error, on)
        return bool(validation.at_once("retry_on", on(error)))

    def delay_for_attempt(self, attempt: int) -> float:
        """Return the seconds to wait after the failure of an attempt; the first is number 1.

        Jitter that would exceed the longest wait is mirrored below it, so that many callers at the
        limit stay spread out.
        """
        validation.integer("attempt", attempt, minimum=1)
        exponent = min(attempt - 1, _LARGEST_EXPONENT)
        longest = float(self.max_delay_seconds)
        delay = min(self.base_delay_seconds * 2.0**exponent, longest)
        # Imported with the first retry: most programs that load this module never get there.
        import random

        delay *= 1.0 + random.uniform(-self.jitter_ratio, self.jitter_ratio)
        return delay if delay <= longest else max(0.0, 2 * longest - delay)


def _checked(retry_on: Any) -> Any:
    """Return types in a form that `isinstance` takes, and anything else as it is."""
    several = isinstance(retry_on, Collection) and not isinstance(retry_on, type)
    kinds = tuple(retry_on) if several else (retry_on,)
    if all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
        return kinds if several else retry_on
    plain = callable(retry_on) and not isinstance(retry_on, type)
    if retry_on is None or (plain and not validation.is_coroutine_function(retry_on)):
        return retry_on
    rule = "a subclass of Exception, several of them, or a plain function of the error"
    raise validation.wrong_type("retry_on", rule, retry_on)


@dataclass(frozen=True)
class SourceResiliencePolicy:
    """How calls to a source are retried, and when they stop.

    Attributes:
        retry: which failed calls are made again, and when.
        circuit: when the source is left alone.
        finish_late: whether a call that is under way when the deadlines of all its readers have
            passed goes on for as long as the ``timeout_seconds`` of its source allow, to fill the
            cache. It keeps its slot. A source without a timeout is cut off all the same.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    circuit: CircuitBreakerPolicy = field(default_factory=CircuitBreakerPolicy)
    finish_late: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        validation.instance("retry", self.retry, RetryPolicy)
        validation.instance("circuit", self.circuit, CircuitBreakerPolicy)
        validation.flag("finish_late", self.finish_late)


ResilienceResolver = Callable[[str], SourceResiliencePolicy | None]
"""Chooses a policy by the name of a source; None leaves the choice to what comes next."""


class ResiliencePolicyResolver(KeyedPolicies[str, SourceResiliencePolicy]):
    """Chooses the policy of a source: by name, else dynamically, else as declared, else default.

    Attributes:
        default: for sources that nothing else covers.
        overrides: policies by source name; they win.
        dynamic: asked next, with the name of the source; or None.
    """

    __slots__ = ()

    def __init__(
        self,
        default: SourceResiliencePolicy | None = None,
        overrides: Mapping[str, SourceResiliencePolicy] | None = None,
        dynamic: ResilienceResolver | None = None,
    ) -> None:
        chosen = SourceResiliencePolicy() if default is None else default
        super().__init__(SourceResiliencePolicy, chosen, overrides, dynamic)

    def _named(self, key: Any) -> str:
        return repr(validation.text("overrides key", key))

    def resolve(
        self, source: str, *, declared: SourceResiliencePolicy | None = None
    ) -> SourceResiliencePolicy:
        """Return the policy for a source of this name, which may declare one itself."""
        chosen = self._chosen(source)
        if chosen is None and declared is not None:
            chosen = validation.instance("declared", declared, SourceResiliencePolicy)
        return self.default if chosen is None else chosen
