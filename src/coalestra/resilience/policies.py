"""How calls to a source are retried, and which policies of retry and circuit govern it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from coalestra.core import errors, validation
from coalestra.core.policies import KeyedPolicies
from coalestra.resilience.circuit_breaker import CircuitBreakerPolicy

__all__ = [
    "TRANSIENT_ERRORS", "ResiliencePolicyResolver", "ResilienceResolver", "RetryPolicy",
    "SourceResiliencePolicy",
]  # fmt: skip


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
"""What is retried by default: what says that it may pass, connections and time-outs."""

_FINAL = (
    errors.CircuitOpenError,
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
        answer = on(error)
        if inspect.isawaitable(answer):
            if hasattr(answer, "close"):
                answer.close()
            raise TypeError("retry_on must answer at once, got an awaitable; use a plain function")
        return bool(answer)

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
        return max(0.0, longest - abs(longest - delay))


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
