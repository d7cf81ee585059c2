"""The circuit breaker: which circuit a call belongs to, and what is remembered."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable
from typing import Any

import pytest

from coalestra.core.errors import CircuitOpenError
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import SystemClock
from coalestra.resilience import (
    CircuitBreaker,
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    CircuitSnapshot,
    CircuitState,
    Outcome,
)
from tests.support import ManualClock, Panic

BTC = ResourceKey("market", "price", "BTC")
ETH = ResourceKey("market", "price", "ETH")
CONFIG = ResourceKey("app", "config")


def breaker_at(clock: ManualClock) -> CircuitBreaker:
    return CircuitBreaker(failure_threshold=2, recovery_timeout_seconds=10.0, clock=clock)


async def open_it(breaker: CircuitBreaker, source: str = "rest", **how: Any) -> None:
    for _ in range(2):
        await breaker.before_call(source, **how)
        await breaker.record_failure(source, **how)


async def test_of_a_hundred_callers_at_a_half_open_circuit_one_gets_through() -> None:
    """All ask at the same moment."""
    clock = ManualClock()
    breaker = breaker_at(clock)
    await open_it(breaker)
    clock.advance(10)
    answers = await asyncio.gather(
        *(breaker.before_call("rest") for _ in range(100)), return_exceptions=True
    )
    assert sum(isinstance(answer, CircuitIdentity) for answer in answers) == 1
    refusals = [answer for answer in answers if isinstance(answer, CircuitOpenError)]
    assert "the one call that probes it is under way" in str(refusals[0])
    await breaker.record_success("rest")
    await breaker.before_call("rest")


async def test_a_cancelled_probe_reopens_and_a_skipped_one_frees_its_place() -> None:
    """Two ways to end without a result."""
    clock = ManualClock()
    breaker = breaker_at(clock)
    await open_it(breaker)
    clock.advance(10)
    await breaker.before_call("rest")
    await breaker.record_skipped("rest")
    await breaker.before_call("rest")
    await breaker.record_abandoned("rest")
    assert await breaker.state_for("rest") is CircuitState.OPEN
    assert await breaker.snapshot() == {
        CircuitIdentity("rest", CircuitScope.SOURCE): CircuitSnapshot(
            CircuitState.OPEN, 2, clock.monotonic(), False
        )
    }


@pytest.mark.parametrize("scope,key,part", [
    (CircuitScope.SOURCE, BTC, ""), (CircuitScope.NAMESPACE, BTC, "market"),
    (CircuitScope.SUBJECT, BTC, "BTC"), (CircuitScope.SUBJECT, CONFIG, ("app", "config")),
    (CircuitScope.RESOURCE, BTC, BTC),
])  # fmt: skip
def test_the_scope_decides_which_keys_share_a_circuit(
    scope: CircuitScope, key: ResourceKey, part: Hashable
) -> None:
    """A key without a subject falls back to its namespace and name."""
    breaker = CircuitBreaker()
    identity = breaker.identity_for("rest", key=key, scope=scope)
    assert identity == CircuitIdentity("rest", scope, part)


@pytest.mark.parametrize(
    "scope", [CircuitScope.NAMESPACE, CircuitScope.SUBJECT, CircuitScope.RESOURCE]
)
async def test_a_scope_below_the_source_needs_a_key(scope: CircuitScope) -> None:
    """Nothing else tells the circuits apart."""
    breaker = CircuitBreaker(default_policy=CircuitBreakerPolicy(scope=scope))
    with pytest.raises(ValueError, match="key"):
        await breaker.before_call("rest")


def test_the_name_of_a_scope_is_none() -> None:
    """It would be taken for that of single resources."""
    scope: Any = "namespace"
    with pytest.raises(TypeError, match="scope must be a CircuitScope"):
        CircuitBreaker().identity_for("rest", key=BTC, scope=scope)


async def test_a_disabled_policy_lets_everything_through_and_counts_nothing() -> None:
    """Also through a circuit that another policy has opened."""
    breaker = breaker_at(ManualClock())
    off = CircuitBreakerPolicy(failure_threshold=1, enabled=False)
    await open_it(breaker, policy=off)
    assert len(breaker) == 0
    await open_it(breaker)
    identity = await breaker.before_call("rest", policy=off)
    assert breaker.refusal(identity, off) is None
    await breaker.record_success("rest", policy=off)
    await breaker.record_abandoned("rest", policy=off)
    await breaker.record_skipped("rest", policy=off)
    assert await breaker.state_for("rest") is CircuitState.OPEN


def few(clock: ManualClock, policy: CircuitBreakerPolicy) -> CircuitBreaker:
    """A breaker that remembers two circuits."""
    breaker = CircuitBreaker(default_policy=policy, clock=clock)
    breaker.max_circuits = 2
    return breaker


async def test_of_more_circuits_than_may_be_kept_the_longest_unused_is_forgotten() -> None:
    """Keys that failed once and never came back would stay for ever otherwise."""
    breaker = few(ManualClock(), CircuitBreakerPolicy(failure_threshold=2))
    for name in ("first", "second", "first", "third"):
        await breaker.record_failure(name)
    assert {identity.source for identity in await breaker.snapshot()} == {"first", "third"}


async def test_a_circuit_whose_probe_is_under_way_is_not_forgotten_before_others() -> None:
    """There would be a second probe."""
    clock = ManualClock()
    policy = CircuitBreakerPolicy(failure_threshold=1, recovery_timeout_seconds=1)
    breaker = few(clock, policy)
    await breaker.record_failure("first")
    clock.advance(1)
    await breaker.before_call("first")
    for name in ("second", "third"):
        await breaker.record_failure(name)
    assert {identity.source for identity in await breaker.snapshot()} == {"first", "third"}


async def test_peeking_does_not_take_the_probe() -> None:
    """A planner may look before it decides."""
    clock = ManualClock()
    breaker = breaker_at(clock)
    identity = breaker.identity_for("rest")
    policy = breaker.default_policy
    assert breaker.refusal(identity, policy) is None
    await open_it(breaker)
    assert "may be probed in 10 s" in str(breaker.refusal(identity, policy))
    clock.advance(10)
    assert breaker.refusal(identity, policy) is None
    await breaker.before_call("rest")
    assert "is under way" in str(breaker.refusal(identity, policy))


async def test_resetting_closes_one_circuit_all_of_a_source_or_everything() -> None:
    """As if nothing had failed."""
    breaker = breaker_at(ManualClock())
    policy = CircuitBreakerPolicy(scope=CircuitScope.SUBJECT, failure_threshold=2)
    for source in ("a", "b"):
        for key in (BTC, ETH):
            await open_it(breaker, source, key=key, policy=policy)
    await breaker.reset("a", key=BTC, policy=policy)
    assert [str(identity) for identity in await breaker.snapshot()] == [
        "a:subject:ETH",
        "b:subject:BTC",
        "b:subject:ETH",
    ]
    await breaker.reset("a")
    assert {identity.source for identity in await breaker.snapshot()} == {"b"}
    await breaker.reset()
    assert await breaker.snapshot() == {}
    with pytest.raises(ValueError, match="source"):
        await breaker.reset(key=BTC)


def test_the_defaults_are_three_failures_ten_seconds_and_the_systems_clock() -> None:
    """Of the whole source."""
    breaker = CircuitBreaker()
    assert breaker.default_policy == CircuitBreakerPolicy(CircuitScope.SOURCE, 3, 10.0, True)
    assert isinstance(breaker.clock, SystemClock)
    assert repr(breaker) == "<CircuitBreaker all at rest>"
    assert breaker, "a breaker is not taken for none because nothing has failed yet"


def test_a_given_default_policy_replaces_the_one_made_of_numbers() -> None:
    """It says everything."""
    policy = CircuitBreakerPolicy(failure_threshold=7)
    clock = ManualClock()
    breaker = CircuitBreaker(failure_threshold=1, default_policy=policy, clock=clock)
    assert breaker.default_policy is policy
    assert breaker.clock is clock


@pytest.mark.parametrize("field,value,error", [
    ("failure_threshold", 0, ValueError), ("failure_threshold", True, TypeError),
    ("recovery_timeout_seconds", -1, ValueError),
    ("recovery_timeout_seconds", float("nan"), ValueError),
    ("default_policy", "strict", TypeError), ("clock", 5.0, TypeError),
])  # fmt: skip
def test_wrong_settings_are_refused_by_name(field: str, value: Any, error: type[Exception]) -> None:
    """The message names the parameter."""
    with pytest.raises(error, match=field):
        CircuitBreaker(**{field: value})


async def test_it_tells_how_many_circuits_are_in_which_state() -> None:
    """Every stateful object can be looked into."""
    clock = ManualClock()
    breaker = breaker_at(clock)
    await open_it(breaker, "a")
    await open_it(breaker, "b")
    await breaker.record_failure("c")
    assert repr(breaker) == "<CircuitBreaker closed=1 open=2>"


REPORTS = ["record_success", "record_failure", "record_abandoned", "record_skipped"]


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("how", ["with a ticket", "from the task of the call"])
async def test_a_call_from_before_the_opening_decides_nothing(report: str, how: str) -> None:
    """Neither while the circuit is open, nor for the probe, nor when it has closed again."""
    clock = ManualClock()
    breaker = breaker_at(clock)
    begun, ends = asyncio.Event(), [asyncio.Event() for _ in range(3)]

    async def call(end: asyncio.Event) -> None:
        ticket = await breaker.before_call("rest")
        begun.set()
        await end.wait()
        given = {"ticket": ticket} if how == "with a ticket" else {}
        await getattr(breaker, report)("rest", **given)

    async def one_ends(number: int) -> CircuitSnapshot | None:
        ends[number].set()
        await calls[number]
        return (await breaker.snapshot()).get(breaker.identity_for("rest"))

    calls = [asyncio.ensure_future(call(end)) for end in ends]
    await begun.wait()
    await open_it(breaker)
    assert await one_ends(0) == CircuitSnapshot(CircuitState.OPEN, 2, clock.monotonic(), False)
    opened_at = clock.monotonic()
    clock.advance(10)
    probe = await breaker.before_call("rest")
    assert await one_ends(1) == CircuitSnapshot(CircuitState.HALF_OPEN, 2, opened_at, True)
    await breaker.record_success("rest", ticket=probe)
    assert await one_ends(2) is None
    await breaker.record_failure("rest")
    assert len(breaker) == 1, "what comes after that counts"


async def test_a_call_from_before_a_reset_does_not_open_the_circuit_again() -> None:
    """It has failed in what is over."""
    breaker = CircuitBreaker(failure_threshold=1)
    ticket = await breaker.before_call("rest")
    await breaker.record_failure("rest")
    await breaker.reset("rest")
    await breaker.record_failure("rest", ticket=ticket)
    assert await breaker.state_for("rest") is CircuitState.CLOSED


@pytest.mark.parametrize("scope,one,other", [
    (CircuitScope.RESOURCE, ResourceKey("a", "b:c"), ResourceKey("a", "b", "c")),
    (CircuitScope.RESOURCE, ResourceKey("a:b", "c"), ResourceKey("a", "b:c")),
    (CircuitScope.SUBJECT, ResourceKey("a", "b:c"), ResourceKey("a:b", "c")),
    (CircuitScope.SUBJECT, ResourceKey("a", "b"), ResourceKey("x", "y", "a:b")),
])  # fmt: skip
async def test_keys_that_read_alike_have_circuits_of_their_own(
    scope: CircuitScope, one: ResourceKey, other: ResourceKey
) -> None:
    """A part of a source is what it is, not how it is written."""
    breaker = CircuitBreaker()
    policy = CircuitBreakerPolicy(scope=scope, failure_threshold=1)
    await breaker.record_failure("s", key=one, policy=policy)
    assert await breaker.state_for("s", key=one, policy=policy) is CircuitState.OPEN
    assert await breaker.state_for("s", key=other, policy=policy) is CircuitState.CLOSED
    await breaker.record_failure("s", key=other, policy=policy)
    assert len(await breaker.snapshot()) == 2


async def test_circuits_are_counted_by_source_and_scope_without_naming_any_part() -> None:
    """For those who must not see the keys."""
    clock = ManualClock()
    breaker = breaker_at(clock)
    policy = CircuitBreakerPolicy(scope=CircuitScope.RESOURCE, failure_threshold=2)
    assert breaker.counted() == {}
    await open_it(breaker, key=ETH, policy=policy)
    clock.advance(8)
    await open_it(breaker, key=BTC, policy=policy)
    clock.advance(2)
    other = CircuitBreakerPolicy(scope=CircuitScope.RESOURCE, failure_threshold=3)
    for _ in range(3):
        await breaker.record_failure("rest", key=ResourceKey("a", "b"), policy=other)
    clock.advance(1)
    await breaker.record_failure("rest", key=CONFIG, policy=policy)
    await breaker.record_failure("rest")
    counted = {
        str(identity): (
            each.count,
            each.failures,
            each.seconds_since_opened,
            each.seconds_until_probe,
        )
        for identity, each in breaker.counted().items()
    }
    assert counted == {
        "rest:resource:half_open": (1, 2, 11, 0),
        "rest:resource:open": (2, 3, 1, 7),
        "rest:resource:closed": (1, 1, None, 0),
        "rest": (1, 1, None, 0),
    }
    assert {each.state.value for each in breaker.counted().values()} == {
        "closed",
        "half_open",
        "open",
    }


def test_counting_circuits_runs_no_code_of_their_names_in_which_others_could_come_between() -> None:
    """Health is read by any thread, while the loop's own adds circuits and forgets them."""

    class Part:
        hashed = 0

        def __hash__(self) -> int:
            Part.hashed += 1
            return 1

    breaker = CircuitBreaker()
    identity = CircuitIdentity("rest", CircuitScope.SUBJECT, Part())
    breaker.report(identity, Outcome.FAILURE, CircuitBreakerPolicy())
    Part.hashed = 0
    (counted,) = breaker.counted()
    assert str(counted) == "rest:subject:closed"
    assert Part.hashed == 0


def test_a_breaker_works_outside_of_any_task() -> None:
    """Nothing waits, so that any other loop, or none, may drive it."""
    breaker = CircuitBreaker(failure_threshold=1, clock=ManualClock())
    with pytest.raises(StopIteration) as admitted:
        breaker.before_call("rest").send(None)
    with pytest.raises(StopIteration):
        breaker.record_failure("rest", ticket=admitted.value.value).send(None)
    with pytest.raises(CircuitOpenError, match=r"after 1 failure in a row; .* in 10 s"):
        breaker.before_call("rest").send(None)


async def test_what_is_no_policy_source_or_key_is_refused_by_name() -> None:
    breaker: Any = CircuitBreaker()
    for odd in (5, 0, "strict"):
        with pytest.raises(TypeError, match="policy must be a CircuitBreakerPolicy"):
            await breaker.before_call("rest", policy=odd)
        with pytest.raises(TypeError, match="policy must be a CircuitBreakerPolicy"):
            await breaker.record_failure("rest", policy=odd)
    for told in (breaker.before_call, breaker.record_success, breaker.state_for):
        with pytest.raises(TypeError, match="source must be a non-empty string"):
            await told(None)
        with pytest.raises(TypeError, match="key must be a ResourceKey"):
            await told("rest", key="a:b", policy=CircuitBreakerPolicy(CircuitScope.NAMESPACE))


class FailingClock(ManualClock):
    """Says what it is told to, or raises that."""

    says: float | BaseException | None = None

    def monotonic(self) -> float:
        if isinstance(self.says, BaseException):
            raise self.says
        return super().monotonic() if self.says is None else self.says


@pytest.mark.parametrize("outcome", Outcome)
@pytest.mark.parametrize("says", [math.nan, math.inf, LookupError("no time"), Panic()], ids=repr)
async def test_a_probe_whose_end_the_clock_knows_no_time_of_lets_the_next_one_through(
    outcome: Outcome, says: float | BaseException
) -> None:
    """Or the source would be left alone for ever."""
    clock, policy = FailingClock(), CircuitBreakerPolicy(failure_threshold=1)
    breaker = CircuitBreaker(clock=clock, default_policy=policy)
    circuit = breaker.identity_for("rest")
    breaker.report(circuit, Outcome.FAILURE, policy)
    clock.advance(policy.recovery_timeout_seconds)
    turn = breaker.admit(circuit, policy)
    clock.says = says
    with pytest.raises((ValueError, LookupError, Panic)):
        breaker.report(circuit, outcome, policy, turn)
    clock.says = None
    turn = breaker.admit(circuit, policy)
    breaker.report(circuit, Outcome.SUCCESS, policy, turn)
    assert not breaker.circuits


@pytest.mark.parametrize("says", [math.nan, math.inf, LookupError("no time")], ids=repr)
async def test_a_failure_at_no_known_time_opens_none_for_ever(says: float | BaseException) -> None:
    clock, policy = FailingClock(), CircuitBreakerPolicy(failure_threshold=1)
    breaker = CircuitBreaker(clock=clock, default_policy=policy)
    clock.says = says
    with pytest.raises((ValueError, LookupError)):
        await breaker.record_failure("rest")
    clock.says = None
    assert not breaker.circuits
    await breaker.before_call("rest")
