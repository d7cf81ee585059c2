"""From the arguments of a builder to its working parts, with every rule between them checked."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from coalestra.cache.access import access_to
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.concurrency.capacity import CapacityController
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.authority import AuthorityPolicyResolver
from coalestra.core.clock import SystemClock
from coalestra.core.freshness import FreshnessPolicy, ObservationPolicy, PolicyResolver
from coalestra.core.protocols import AsyncCache
from coalestra.core.timeouts import SourceTimeoutGuarantee
from coalestra.observability.buffering import ObservabilitySinks, buffer_sinks
from coalestra.orchestration.arguments import BuilderArguments, given_or
from coalestra.orchestration.chains import Chains, Link
from coalestra.orchestration.closing import Closing
from coalestra.orchestration.engine import Engine
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.settings import BuilderSettings
from coalestra.resilience.backoff import RetryPolicy
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver, SourceResiliencePolicy

if TYPE_CHECKING:
    from coalestra.cache.publisher import ResourcePublisher


class Assembly:
    """The working parts of one builder."""

    def __init__(
        self,
        engine: Engine,
        sinks: ObservabilitySinks,
        closing: Closing,
        default_cache: AsyncMemoryCache | None,
    ) -> None:
        self.engine = engine
        self.sinks = sinks
        self.closing = closing
        self.default_cache = default_cache

    @cached_property
    def publisher(self) -> ResourcePublisher:
        """What writes events into the builder's cache; loaded and made when first asked for."""
        return _publisher(self.engine.equipment, self.sinks, self.engine)


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
    )


def _equipment(
    given: BuilderArguments,
    settings: BuilderSettings,
    chains: Chains,
    cache: AsyncCache,
    sinks: ObservabilitySinks,
) -> Equipment:
    """Return what the engine works with."""
    clock = given_or(given.clock, SystemClock)
    authority = given.authority_resolver
    if authority is None:
        authority = AuthorityPolicyResolver(given.authority_policy)
    if authority.has_rules:
        from coalestra.cache.publisher import require_authority_aware

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
    breaker = given_or(given.circuit_breaker, partial(CircuitBreaker, clock=clock))
    return Equipment(
        clock=clock,
        chains=chains,
        policies=_policies(given),
        authority=authority,
        observation=given_or(given.observation_policy, ObservationPolicy),
        capacity=_capacity(chains.links, settings),
        breaker=breaker,
        resilience=_resilience(given, breaker),
        access=access_to(cache, copies, pending),
        copies=copies,
        report=sinks.reporter(),
        threads=threads,
        max_concurrency=settings.max_concurrency,
        max_pending_tasks=pending,
        transport_grace_seconds=settings.source_transport_timeout_grace_seconds,
    )


def _policies(given: BuilderArguments) -> PolicyResolver:
    if given.policy_resolver is not None:
        return given.policy_resolver
    return PolicyResolver(given_or(given.default_policy, lambda: FreshnessPolicy(1.0, 10.0)))


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
    from coalestra.cache.publication import PublicationRules
    from coalestra.cache.publisher import PublisherParts, ResourcePublisher

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
            check_open=engine.enter,
        )
    )
