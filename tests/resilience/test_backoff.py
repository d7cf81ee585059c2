"""Retries: which errors, and how long in between."""

from __future__ import annotations

import asyncio
import concurrent.futures
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalestra.core.errors import (
    CircuitOpenError,
    ResourceAbsent,
    SnapshotDeadlineExceededError,
    SourceProtocolError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
)
from coalestra.resilience import TRANSIENT_ERRORS, RetryPolicy


@pytest.mark.parametrize("error", [
    SourceUnavailableError("down"), SourceTimeoutError("slow"), TimeoutError(),
    asyncio.TimeoutError(), concurrent.futures.TimeoutError(), ConnectionResetError(),
    OSError("disk"),
], ids=lambda error: type(error).__module__ + "." + type(error).__name__)  # fmt: skip
def test_what_may_pass_by_itself_is_retried(error: Exception) -> None:
    """The three time-outs of Python 3.10 are all time-outs."""
    assert RetryPolicy().retries(error)


@pytest.mark.parametrize("error", [
    CircuitOpenError("open"), SnapshotDeadlineExceededError("late"),
    SourceQueueTimeoutError("full"), SourceProtocolError("wrong"), ValueError(), KeyError(),
    asyncio.CancelledError(), KeyboardInterrupt(),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_what_another_try_cannot_mend_is_not_retried(error: BaseException) -> None:
    """Errors of the program, and those about waiting itself."""
    assert not RetryPolicy().retries(error)


class Teapot(Exception):
    """An error of a client of somebody else's."""


class SmallTeapot(Teapot):
    """One of its kinds."""


class Judge:
    """A predicate that is an object."""

    def __call__(self, error: Exception) -> bool:
        return "again" in str(error)

    async def later(self, error: Exception) -> bool:
        return True


@pytest.mark.parametrize("retry_on", [
    Teapot, (Teapot,), [KeyError, Teapot], {Teapot}, frozenset({Teapot, OSError}),
    lambda error: isinstance(error, Teapot), Judge(),
], ids=lambda retry_on: type(retry_on).__name__)  # fmt: skip
def test_what_is_retried_is_told_by_types_or_by_a_predicate(retry_on: Any) -> None:
    """Kinds of a type included."""
    policy = RetryPolicy(retry_on=retry_on)
    assert policy.retries(SmallTeapot("try again"))
    assert not policy.retries(ValueError("no"))
    assert hash(policy) == hash(RetryPolicy(retry_on=policy.retry_on))
    assert policy == RetryPolicy(retry_on=policy.retry_on) != RetryPolicy()


def test_what_is_told_takes_the_place_of_the_default_which_has_a_name() -> None:
    """So that a policy can narrow the default as well as widen it."""
    assert not RetryPolicy(retry_on=Teapot).retries(ConnectionResetError())
    both = RetryPolicy(retry_on=(*TRANSIENT_ERRORS, Teapot))
    assert both.retries(ConnectionResetError())
    assert both.retries(Teapot())
    assert not RetryPolicy(retry_on=()).retries(ConnectionResetError())
    assert RetryPolicy(retry_on=None) == RetryPolicy()


@pytest.mark.parametrize("retry_on", [Exception, SourceUnavailableError, lambda error: True])
@pytest.mark.parametrize(
    "final",
    [CircuitOpenError, ResourceAbsent, SnapshotDeadlineExceededError, SourceQueueTimeoutError],
)
def test_nothing_makes_it_wait_again_in_the_same_place(retry_on: Any, final: Any) -> None:
    """Whatever the policy says; a predicate is not even asked."""
    assert not RetryPolicy(retry_on=retry_on).retries(final("no"))


@pytest.mark.parametrize("retry_on", [
    503, "ValueError", ["ValueError"], int, object(), ValueError("an instance"), (ValueError, int),
    (ValueError, None), BaseException, KeyboardInterrupt, asyncio.CancelledError, Judge().later,
    iter([ValueError]), True,
], ids=lambda retry_on: type(retry_on).__name__)  # fmt: skip
def test_what_no_error_can_be_compared_with_is_refused_by_name(retry_on: Any) -> None:
    """When the policy is made, not when a source has failed."""
    with pytest.raises(TypeError, match=r"^retry_on must be a subclass of Exception, several"):
        RetryPolicy(retry_on=retry_on)


def test_a_predicate_has_to_answer_at_once() -> None:
    """What it returned instead is closed, so that nobody warns of it."""

    async def later() -> bool:
        return True

    with pytest.raises(TypeError, match="retry_on must answer at once"):
        RetryPolicy(retry_on=lambda error: later()).retries(Teapot())  # type: ignore[arg-type,return-value]  # wrong on purpose


def test_what_is_retried_is_named_by_keyword_only() -> None:
    """More such settings may come."""
    with pytest.raises(TypeError, match="positional"):
        RetryPolicy(2, 0.0, 1.0, 0.0, Teapot)  # type: ignore[call-arg]  # wrong on purpose


def test_without_jitter_the_delay_doubles_up_to_its_limit() -> None:
    """From the base, with the first attempt; without overflowing, and not from nothing."""
    policy = RetryPolicy(base_delay_seconds=0.1, max_delay_seconds=0.5, jitter_ratio=0.0)
    delays = [policy.delay_for_attempt(attempt) for attempt in (1, 2, 3, 4, 5, 1_000_000)]
    assert delays == [0.1, 0.2, 0.4, 0.5, 0.5, 0.5]  # to the last bit, as it was asked for
    plain = RetryPolicy(jitter_ratio=0.0)
    assert [plain.delay_for_attempt(attempt) for attempt in (1, 2, 3)] == [0.05, 0.1, 0.2]
    assert RetryPolicy(base_delay_seconds=0).delay_for_attempt(9) == 0.0


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 5), st.floats(0, 5))
def test_a_delay_stays_within_its_jitter_and_below_its_limit(
    attempt: int, jitter: float, base: float, longest: float
) -> None:
    """Whatever the dice say."""
    policy = RetryPolicy(base_delay_seconds=base, max_delay_seconds=longest, jitter_ratio=jitter)
    plain = min(base * 2 ** (attempt - 1), longest)
    delay = policy.delay_for_attempt(attempt)
    assert plain * (1 - jitter) - 1e-9 <= delay <= min(plain * (1 + jitter), longest) + 1e-9


def test_jitter_goes_both_ways_alike() -> None:
    """Symmetric around the plain delay where the limit is far."""
    random.seed(7)
    policy = RetryPolicy(base_delay_seconds=1, max_delay_seconds=100, jitter_ratio=0.5)
    delays = [policy.delay_for_attempt(1) for _ in range(4_000)]
    assert sum(delays) / len(delays) == pytest.approx(1.0, abs=0.02)
    assert min(delays) < 0.52
    assert max(delays) > 1.48


def test_at_the_limit_delays_stay_spread_out() -> None:
    """Many callers that wait the longest delay must not come back all at once."""
    random.seed(7)
    policy = RetryPolicy(base_delay_seconds=1, max_delay_seconds=1, jitter_ratio=0.5)
    delays = [policy.delay_for_attempt(5) for _ in range(1_000)]
    assert len(set(delays)) > 990
    assert max(delays) <= 1.0


NUMBERS = ("max_attempts", "base_delay_seconds", "max_delay_seconds", "jitter_ratio")


@pytest.mark.parametrize("field, value, error", [
    ("max_attempts", 0, ValueError), ("base_delay_seconds", -0.1, ValueError),
    ("max_delay_seconds", -1, ValueError), ("jitter_ratio", 1.1, ValueError),
    ("jitter_ratio", -0.1, ValueError), ("base_delay_seconds", float("nan"), ValueError),
    ("max_delay_seconds", float("inf"), ValueError),
    *[(field, value, TypeError) for field in NUMBERS for value in (True, "1", None)],
])  # fmt: skip
def test_a_wrong_value_is_refused_by_name(field: str, value: Any, error: type[Exception]) -> None:
    """Neither NaN nor infinity is a delay, and a bool is not a number."""
    with pytest.raises(error, match=field):
        RetryPolicy(**{field: value})


@pytest.mark.parametrize("attempt", [0, -1])
def test_attempts_count_from_one(attempt: int) -> None:
    """There is no attempt before the first."""
    with pytest.raises(ValueError, match="attempt"):
        RetryPolicy().delay_for_attempt(attempt)
