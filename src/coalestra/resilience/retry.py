"""When a failed call is tried again, and after how long."""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import dataclass

from coalestra.core.errors import (
    CircuitOpenError,
    SnapshotDeadlineExceededError,
    SourceQueueTimeoutError,
    SourceUnavailableError,
)
from coalestra.core.validation import integer, number

_LARGEST_EXPONENT = 1000
"""Doubling more often would overflow a float; the cap on the delay holds long before."""

# Python 3.10 has three timeout errors that are one from 3.11 on.
_RETRIED = (
    SourceUnavailableError,
    OSError,
    TimeoutError,
    asyncio.TimeoutError,
    concurrent.futures.TimeoutError,
)
_FINAL = (CircuitOpenError, SnapshotDeadlineExceededError, SourceQueueTimeoutError)


def retryable(error: BaseException) -> bool:
    """Whether trying again may help.

    True for an unavailable source and for time-outs, connection and other operating system errors.
    False for what waiting in the same place cannot mend: an open circuit, a deadline, a queue that
    is too long.
    """
    return isinstance(error, _RETRIED) and not isinstance(error, _FINAL)


@dataclass(frozen=True)
class RetryPolicy:
    """How often a source is asked, and how long to wait in between.

    Attributes:
        max_attempts: calls in all, the first included; at least 1.
        base_delay_seconds: the wait after the first failure; it doubles with each further one.
        max_delay_seconds: no wait is longer.
        jitter_ratio: the part, 0 to 1, by which a wait is varied at random up and down.

    Raises:
        TypeError, ValueError: for a field of the wrong type or outside of its range.
    """

    max_attempts: int = 2
    base_delay_seconds: float = 0.05
    max_delay_seconds: float = 1.0
    jitter_ratio: float = 0.1

    def __post_init__(self) -> None:
        integer("max_attempts", self.max_attempts, minimum=1)
        number("base_delay_seconds", self.base_delay_seconds, minimum=0)
        number("max_delay_seconds", self.max_delay_seconds, minimum=0)
        number("jitter_ratio", self.jitter_ratio, minimum=0, maximum=1)

    def delay_for_attempt(self, attempt: int) -> float:
        """Return the seconds to wait after the failure of an attempt; the first is number 1.

        Jitter that would exceed the longest wait is mirrored below it, so that many callers at the
        limit stay spread out.
        """
        integer("attempt", attempt, minimum=1)
        exponent = min(attempt - 1, _LARGEST_EXPONENT)
        longest = float(self.max_delay_seconds)
        delay = min(self.base_delay_seconds * 2.0**exponent, longest)
        # Imported with the first retry: most programs that load this module never get there.
        import random

        delay *= 1.0 + random.uniform(-self.jitter_ratio, self.jitter_ratio)
        return max(0.0, longest - abs(longest - delay))
