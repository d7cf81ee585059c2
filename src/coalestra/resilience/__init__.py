"""Retries, circuits and the policies that govern them.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from __future__ import annotations

from coalestra.resilience.backoff import RetryPolicy
from coalestra.resilience.circuit import (
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    CircuitSnapshot,
    CircuitState,
)
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import (
    ResiliencePolicyResolver,
    ResilienceResolver,
    SourceResiliencePolicy,
)

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
]
