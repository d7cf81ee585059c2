"""Retries, circuits and the policies that govern them.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
    from coalestra.resilience.backoff import RetryPolicy
    from coalestra.resilience.circuit import (
        CircuitBreakerPolicy,
        CircuitIdentity,
        CircuitScope,
        CircuitState,
    )
    from coalestra.resilience.circuit_breaker import CircuitBreaker
    from coalestra.resilience.circuit_snapshot import CircuitSnapshot
    from coalestra.resilience.policies import (
        ResiliencePolicyResolver,
        ResilienceResolver,
        SourceResiliencePolicy,
    )
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "backoff": ("RetryPolicy",),
            "circuit": (
                "CircuitBreakerPolicy",
                "CircuitIdentity",
                "CircuitScope",
                "CircuitState",
            ),
            "circuit_breaker": ("CircuitBreaker",),
            "circuit_snapshot": ("CircuitSnapshot",),
            "policies": (
                "ResiliencePolicyResolver",
                "ResilienceResolver",
                "SourceResiliencePolicy",
            ),
        },
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
