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
    SnapshotDeadlineExceededError,
    SourceProtocolError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
)
from coalestra.resilience.retry import RetryPolicy, retryable


@pytest.mark.parametrize(
    "error",
    [
        SourceUnavailableError("down"),
        SourceTimeoutError("slow"),
        TimeoutError(),
        asyncio.TimeoutError(),
        concurrent.futures.TimeoutError(),
        ConnectionResetError(),
        OSError("disk"),
    ],
    ids=lambda error: type(error).__module__ + "." + type(error).__name__,
)
def test_what_may_pass_by_itself_is_retried(error: Exception) -> None:
    """The three time-outs of Python 3.10 are all time-outs."""
    assert retryable(error)


@pytest.mark.parametrize(
    "error",
    [
        CircuitOpenError("open"),
        SnapshotDeadlineExceededError("late"),
        SourceQueueTimeoutError("full"),
        SourceProtocolError("wrong"),
        ValueError(),
        KeyError(),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_another_try_cannot_mend_is_not_retried(error: BaseException) -> None:
    """Errors of the program, and those about waiting itself."""
    assert not retryable(error)


def test_without_jitter_the_delay_doubles_up_to_its_limit() -> None:
    """From the base, with the first attempt."""
    policy = RetryPolicy(base_delay_seconds=0.1, max_delay_seconds=0.5, jitter_ratio=0.0)
    delays = [policy.delay_for_attempt(attempt) for attempt in (1, 2, 3, 4, 5)]
    assert delays == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


def test_a_very_late_attempt_still_has_a_delay() -> None:
    """Doubling must not overflow."""
    assert RetryPolicy(jitter_ratio=0).delay_for_attempt(1_000_000) == 1.0


def test_no_base_delay_is_no_delay() -> None:
    """Zero times anything."""
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


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_attempts", 0),
        ("base_delay_seconds", -0.1),
        ("max_delay_seconds", -1),
        ("jitter_ratio", 1.1),
        ("jitter_ratio", -0.1),
        ("base_delay_seconds", float("nan")),
        ("max_delay_seconds", float("inf")),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: Any) -> None:
    """Neither NaN nor infinity is a delay."""
    with pytest.raises(ValueError, match=field):
        RetryPolicy(**{field: value})


@pytest.mark.parametrize(
    "field", ["max_attempts", "base_delay_seconds", "max_delay_seconds", "jitter_ratio"]
)
@pytest.mark.parametrize("value", [True, "1", None])
def test_a_value_of_the_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    """A bool is not a number."""
    with pytest.raises(TypeError, match=field):
        RetryPolicy(**{field: value})


@pytest.mark.parametrize("attempt", [0, -1])
def test_attempts_count_from_one(attempt: int) -> None:
    """There is no attempt before the first."""
    with pytest.raises(ValueError, match="attempt"):
        RetryPolicy().delay_for_attempt(attempt)
