"""Retries, circuits and the policies that govern them.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from coalestra.resilience.circuit_breaker import (
    CircuitBreaker,
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    CircuitSnapshot,
    CircuitState,
)
from coalestra.resilience.policies import (
    ResiliencePolicyResolver,
    ResilienceResolver,
    SourceResiliencePolicy,
)
from coalestra.resilience.retry import TRANSIENT_ERRORS, RetryPolicy

__all__ = [
    "CircuitBreaker",
    "CircuitBreakerPolicy",
    "CircuitIdentity",
    "CircuitScope",
    "CircuitSnapshot",
    "CircuitState",
    "ResiliencePolicyResolver",
    "ResilienceResolver",
    "RetryPolicy",
    "SourceResiliencePolicy",
    "TRANSIENT_ERRORS",
]
