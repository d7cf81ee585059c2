"""The collaborators that an application hands to a builder, checked before anything is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from coalestra.concurrency.copying import PayloadCopier
from coalestra.core.authority import AuthorityPolicyResolver, SourceAuthorityPolicy
from coalestra.core.clock import Clock
from coalestra.core.freshness import FreshnessPolicy, ObservationPolicy, PolicyResolver
from coalestra.core.protocols import AsyncCache, EventSink, MetricsSink, Source
from coalestra.core.validation import instance, require_methods, text
from coalestra.resilience.backoff import RetryPolicy
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver, SourceResiliencePolicy

T = TypeVar("T")


class BuilderArguments:
    """The collaborators that an application hands to a builder; None stands for the default."""

    sources: Iterable[Source]
    default_policy: FreshnessPolicy | None
    policy_resolver: PolicyResolver | None
    authority_policy: SourceAuthorityPolicy | None
    authority_resolver: AuthorityPolicyResolver | None
    cache: AsyncCache | None
    retry_policy: RetryPolicy | None
    circuit_breaker: CircuitBreaker | None
    default_resilience: SourceResiliencePolicy | None
    source_resilience: Mapping[str, SourceResiliencePolicy] | None
    resilience_resolver: ResiliencePolicyResolver | None
    clock: Clock | None
    metrics: MetricsSink | None
    events: EventSink | None
    observation_policy: ObservationPolicy | None
    payload_copier: PayloadCopier | None

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Pick the collaborators out of all arguments of a call, and check them."""
        for name in BuilderArguments.__annotations__:
            setattr(self, name, arguments[name])
        instance("sources", self.sources, Iterable)
        for name, kind in _KINDS.items():
            instance(name, getattr(self, name), kind, optional=True)
        for name, methods in _METHODS.items():
            if getattr(self, name) is not None:
                require_methods(name, getattr(self, name), *methods)
        for source, policy in (self.source_resilience or {}).items():
            text("source_resilience key", source)
            instance(f"source_resilience[{source!r}]", policy, SourceResiliencePolicy)
        if self.authority_policy is not None and self.authority_resolver is not None:
            raise ValueError(
                "authority_policy and authority_resolver were both given; give the resolver alone, "
                "with the policy as its default"
            )


_KINDS: Mapping[str, type] = {
    "default_policy": FreshnessPolicy,
    "authority_policy": SourceAuthorityPolicy,
    "authority_resolver": AuthorityPolicyResolver,
    "retry_policy": RetryPolicy,
    "circuit_breaker": CircuitBreaker,
    "default_resilience": SourceResiliencePolicy,
    "source_resilience": Mapping,
    "resilience_resolver": ResiliencePolicyResolver,
    "observation_policy": ObservationPolicy,
}
_METHODS: Mapping[str, tuple[str, ...]] = {
    "policy_resolver": ("resolve",),
    "cache": ("get", "set", "invalidate", "clear"),
    "clock": ("now", "monotonic"),
}


def given_or(value: T | None, default: Callable[[], T]) -> T:
    """Return what was given, however empty it may look, or else the default."""
    return default() if value is None else value
