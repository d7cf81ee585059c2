"""From the arguments of a builder to its working parts, with every rule between them checked."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from coalestra.cache.access import access_to
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.publication import PublicationRules
from coalestra.cache.publisher import PublisherParts, ResourcePublisher, require_authority_aware
from coalestra.concurrency.capacity import CapacityController
from coalestra.concurrency.copying import PayloadCopier, PayloadCopies
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.authority import AuthorityPolicyResolver, SourceAuthorityPolicy
from coalestra.core.clock import Clock, SystemClock
from coalestra.core.freshness import FreshnessPolicy, ObservationPolicy, PolicyResolver
from coalestra.core.protocols import AsyncCache, EventSink, MetricsSink, Source
from coalestra.core.timeouts import SourceTimeoutGuarantee
from coalestra.core.validation import instance
from coalestra.observability.buffering import ObservabilitySinks, buffer_sinks
from coalestra.observability.reporting import reporter_for
from coalestra.orchestration.chains import Chains, Link
from coalestra.orchestration.closing import Closing
from coalestra.orchestration.engine import Engine
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.settings import BuilderSettings
from coalestra.resilience.backoff import RetryPolicy
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver, SourceResiliencePolicy


@dataclasses.dataclass(frozen=True)
class BuilderArguments:
    """The collaborators that an application hands to a builder; None stands for the default."""

    sources: Iterable[Source]
    default_policy: FreshnessPolicy | None = None
    policy_resolver: PolicyResolver | None = None
    authority_policy: SourceAuthorityPolicy | None = None
    authority_resolver: AuthorityPolicyResolver | None = None
    cache: AsyncCache | None = None
    retry_policy: RetryPolicy | None = None
    circuit_breaker: CircuitBreaker | None = None
    default_resilience: SourceResiliencePolicy | None = None
    source_resilience: Mapping[str, SourceResiliencePolicy] | None = None
    resilience_resolver: ResiliencePolicyResolver | None = None
    clock: Clock | None = None
    metrics: MetricsSink | None = None
    events: EventSink | None = None
    observation_policy: ObservationPolicy | None = None
    payload_copier: PayloadCopier | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            instance(name, getattr(self, name), kind, optional=True)
        if self.authority_policy is not None and self.authority_resolver is not None:
            raise ValueError(
                "authority_policy and authority_resolver were both given; give the resolver alone, "
                "with the policy as its default"
            )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> BuilderArguments:
        """Return the collaborators among the arguments of a call."""
        return cls(**{field.name: arguments[field.name] for field in dataclasses.fields(cls)})


_KINDS: Mapping[str, type] = {
    "default_policy": FreshnessPolicy,
    "authority_policy": SourceAuthorityPolicy,
    "retry_policy": RetryPolicy,
    "circuit_breaker": CircuitBreaker,
    "default_resilience": SourceResiliencePolicy,
    "source_resilience": Mapping,
    "resilience_resolver": ResiliencePolicyResolver,
    "observation_policy": ObservationPolicy,
}


@dataclasses.dataclass(frozen=True)
class Assembly:
    """The working parts of one builder."""

    engine: Engine
    publisher: ResourcePublisher
    sinks: ObservabilitySinks
    closing: Closing
    default_cache: AsyncMemoryCache | None
    policies: Any
    authority: Any
    retry_policy: RetryPolicy


def assemble(given: BuilderArguments, settings: BuilderSettings) -> Assembly:
    """Put a builder's parts together.

    Raises:
        TypeError, ValueError: for a source, cache or combination that cannot work; names the rule.
    """
    chains = Chains(
        given.sources,
        memoize=settings.cache_source_support,
        max_entries=settings.source_support_cache_max_entries,
    )
    require_safe_timeouts(chains.links, settings)
    cache, default_cache = _caches(given, settings)
    sinks = buffer_sinks(
        given.metrics,
        given.events,
        buffer=settings.buffer_observability,
        max_pending=settings.observability_max_pending,
        overflow=settings.observability_overflow,
    )
    equipment = _equipment(given, settings, chains, cache, sinks)
    engine = Engine(equipment, contextvars.copy_context())
    managed: list[Any] = []
    if settings.manage_lifecycle:
        managed = [*(link.source for link in chains.links), cache, given.metrics, given.events]
    return Assembly(
        engine=engine,
        publisher=_publisher(equipment, sinks, engine),
        sinks=sinks,
        closing=Closing(
            engine,
            (equipment.copies,),
            () if default_cache is None else (default_cache,),
            sinks,
            equipment.threads,
            [each for each in managed if each is not None],
        ),
        default_cache=default_cache,
        policies=equipment.policies,
        authority=equipment.authority,
        retry_policy=equipment.resilience.default.retry,
    )


def _equipment(
    given: BuilderArguments,
    settings: BuilderSettings,
    chains: Chains,
    cache: AsyncCache,
    sinks: ObservabilitySinks,
) -> Equipment:
    """Return what the engine works with."""
    clock = given.clock if given.clock is not None else SystemClock()
    authority = given.authority_resolver or AuthorityPolicyResolver(given.authority_policy)
    require_authority_aware(cache, authority)
    threads = WorkerThreads()
    copies = PayloadCopies(
        "builder",
        copier=given.payload_copier,
        run_in_thread=settings.run_payload_copies_in_thread,
        max_concurrency=settings.max_copy_concurrency,
        threads=threads,
    )
    pending = settings.max_pending_tasks or settings.max_concurrency
    breaker = given.circuit_breaker or CircuitBreaker(clock=clock)
    return Equipment(
        clock=clock,
        chains=chains,
        policies=given.policy_resolver
        or PolicyResolver(given.default_policy or FreshnessPolicy(1.0, 10.0)),
        authority=authority,
        observation=given.observation_policy or ObservationPolicy(),
        capacity=_capacity(chains.links, settings),
        breaker=breaker,
        resilience=_resilience(given, breaker),
        access=access_to(cache, copies, pending),
        copies=copies,
        report=reporter_for(sinks.metrics, sinks.events),
        threads=threads,
        max_concurrency=settings.max_concurrency,
        max_pending_tasks=pending,
        transport_grace_seconds=settings.source_transport_timeout_grace_seconds,
    )


def require_safe_timeouts(links: Iterable[Link], settings: BuilderSettings) -> None:
    """Raise `ValueError` for a source that does not say if it blocks, or blocks unsafely."""
    for link in links:
        guarantee: SourceTimeoutGuarantee = link.guarantee
        status = guarantee.status.value
        if not guarantee.declaration_present and settings.require_source_timeout_declarations:
            raise ValueError(
                f"source {link.name!r} is {status}: it does not say whether it blocks; set "
                "blocking_io on it, or pass require_source_timeout_declarations=False"
            )
        if guarantee.unsafe and not settings.allow_unsafe_blocking_sources:
            raise ValueError(
                f"source {link.name!r} is {status}: a blocking source must be offloaded and "
                "declare a transport_timeout_seconds below its timeout_seconds, or pass "
                "allow_unsafe_blocking_sources=True"
            )


def _caches(
    given: BuilderArguments, settings: BuilderSettings
) -> tuple[AsyncCache, AsyncMemoryCache | None]:
    """Return the cache to use, and the default one if that is it."""
    own = settings.cache_run_payload_copies_in_thread, settings.cache_max_copy_concurrency
    if given.cache is not None:
        if own != (None, 4):
            raise ValueError(
                "cache_run_payload_copies_in_thread and cache_max_copy_concurrency are settings "
                "of the default cache; with a cache of your own, set them there"
            )
        return given.cache, None
    default = AsyncMemoryCache(
        payload_copier=given.payload_copier,
        run_payload_copies_in_thread=own[0],
        max_copy_concurrency=own[1],
    )
    return default, default


def _capacity(links: Iterable[Link], settings: BuilderSettings) -> CapacityController:
    limits = dict(settings.source_concurrency or {})
    names = {link.name for link in links}
    for name in limits:
        if name not in names:
            raise ValueError(
                f"source_concurrency names {name!r}, but there is no such source; known are "
                f"{', '.join(sorted(names))}"
            )
    capacity = CapacityController(global_limit=settings.max_concurrency, source_limits=limits)
    for link in links:
        if link.name not in limits:
            capacity.register_source(link.name, getattr(link.source, "max_concurrency", None))
    return capacity


def _resilience(given: BuilderArguments, breaker: CircuitBreaker) -> ResiliencePolicyResolver:
    if given.resilience_resolver is not None:
        return given.resilience_resolver
    default = given.default_resilience or SourceResiliencePolicy(
        retry=given.retry_policy or RetryPolicy(), circuit=breaker.default_policy
    )
    return ResiliencePolicyResolver(default, given.source_resilience)


def _publisher(
    equipment: Equipment, sinks: ObservabilitySinks, engine: Engine
) -> ResourcePublisher:
    return ResourcePublisher.from_parts(
        PublisherParts(
            access=equipment.access,
            copies=equipment.copies,
            rules=PublicationRules(
                equipment.clock, equipment.policies, equipment.observation, equipment.authority
            ),
            metrics=sinks.metrics,
            events=sinks.events,
            reporter=equipment.report,
            max_pending_tasks=equipment.max_pending_tasks,
            check_open=engine.require_open,
        )
    )
