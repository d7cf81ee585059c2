"""The snapshot builder: configuration, and the calls that applications make."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import Any, TypeVar

from coalestra.cache.access import CacheAccess
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.publisher import (
    PublisherParts,
    ResourcePublisher,
    require_authority_aware,
)
from coalestra.concurrency.capacity import CapacityController, CapacitySnapshot
from coalestra.concurrency.copying import PayloadCopier, PayloadCopies
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.errors import SnapshotBuildError
from coalestra.core.health import BuilderHealth, PayloadCopyHealth
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    AuthorityPolicyResolver,
    FreshnessPolicy,
    ObservationPolicy,
    PolicyResolver,
    SourceAuthorityPolicy,
)
from coalestra.core.protocols import AsyncCache, Clock, EventSink, MetricsSink, Source, SystemClock
from coalestra.core.request import SnapshotRequest
from coalestra.core.snapshot import Snapshot
from coalestra.core.timeouts import SourceTimeoutGuarantee
from coalestra.core.validation import flag, instance, number, require_methods, text
from coalestra.observability.reports import ObservabilitySinks, buffer_sinks
from coalestra.observability.sinks import BufferOverflowPolicy
from coalestra.orchestration.closing import Closing
from coalestra.orchestration.parts import BuilderSettings, Equipment
from coalestra.orchestration.session import SnapshotSession
from coalestra.orchestration.singleflight import Engine
from coalestra.orchestration.sources import Chains, Link, timeout_guarantees
from coalestra.orchestration.unit import Judge, distinct, open_unit
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver, SourceResiliencePolicy
from coalestra.resilience.retry import RetryPolicy

# The collaborators that an application hands to a builder, checked before anything is made -------


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


# From the arguments of a builder to its working parts, with every rule between them checked ------


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
    observation = given_or(given.observation_policy, ObservationPolicy)
    report = sinks.reporter()
    failed = None if report is None else report.cache_failed
    return Equipment(
        clock=clock,
        chains=chains,
        policies=_policies(given),
        authority=authority,
        observation=observation,
        capacity=_capacity(chains.links, settings),
        breaker=breaker,
        resilience=_resilience(given, breaker),
        access=CacheAccess(cache, copies, pending, observation, failed),
        copies=copies,
        report=report,
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

    return ResourcePublisher.from_parts(
        PublisherParts(
            access=equipment.access,
            copies=equipment.copies,
            clock=equipment.clock,
            policy_resolver=equipment.policies,
            observation_policy=equipment.observation,
            authority_resolver=equipment.authority,
            metrics=sinks.metrics,
            events=sinks.events,
            reporter=equipment.report,
            max_pending_tasks=equipment.max_pending_tasks,
            check_open=engine.enter,
        )
    )


# Collecting a builder's health: state only, without asking any source ----------------------------


async def collect_health(
    engine: Engine,
    sinks: ObservabilitySinks,
    copies: Mapping[str, PayloadCopyHealth],
    unfinished: Mapping[str, int],
) -> BuilderHealth:
    """Return the health of the builder that `engine` belongs to."""
    equipment = engine.equipment
    capacity = await equipment.capacity.snapshot()
    guarantees = timeout_guarantees(equipment.chains.links)
    counters = equipment.counters
    violations = dict(counters.transport_violations)
    return BuilderHealth(
        closed=engine.closed,
        background_refreshes=engine.refresher.active,
        singleflight_in_flight=engine.in_flight,
        source_support_cache_entries=equipment.chains.entries,
        capacity=capacity,
        cache=await _cache_stats(equipment.access.cache),
        circuits=equipment.breaker.groups(),
        sources={
            link.name: link.health(equipment.clock.monotonic()) for link in equipment.chains.links
        },
        active_dispatch_workers=engine.workers,
        waiting_for_capacity=sum(each.waiting for each in capacity.values()),
        queue_timeout_count=counters.queue_timeouts,
        source_timeout_count=counters.source_timeouts,
        deadline_exceeded_count=counters.deadlines_exceeded,
        revalidation_attempt_count=counters.revalidation_attempts,
        revalidation_failure_count=counters.revalidation_failures,
        source_timeout_guarantees=guarantees,
        blocking_source_count=sum(each.blocking_io for each in guarantees.values()),
        protected_blocking_source_count=sum(each.protected for each in guarantees.values()),
        unsafe_blocking_source_count=sum(each.unsafe for each in guarantees.values()),
        undeclared_source_timeout_count=sum(
            not each.declaration_present for each in guarantees.values()
        ),
        source_transport_timeout_violation_count=sum(violations.values()),
        source_transport_timeout_violations=violations,
        **_copy_facts(copies),
        unfinished_source_calls=unfinished,
        **_observability_facts(sinks, 0 if equipment.report is None else equipment.report.failures),
    )


async def _cache_stats(cache: Any) -> Any | None:
    """Return what the cache says of itself, or None if it says nothing."""
    stats = getattr(cache, "stats", None)
    if not inspect.iscoroutinefunction(stats):
        return None
    try:
        return await stats()
    except Exception:
        return None


def _copy_facts(components: Mapping[str, PayloadCopyHealth]) -> dict[str, Any]:
    each = components.values()
    return {
        "payload_copy_components": components,
        "active_payload_copies": sum(one.active_copies for one in each),
        "waiting_for_copy_capacity": sum(one.waiting_for_capacity for one in each),
        "payload_copy_started_count": sum(one.started_count for one in each),
        "payload_copy_completed_count": sum(one.completed_count for one in each),
        "payload_copy_failure_count": sum(one.failure_count for one in each),
        "payload_copy_timeout_count": sum(one.timeout_count for one in each),
        "payload_copy_capacity_timeout_count": sum(one.capacity_timeout_count for one in each),
        "payload_copy_shutdown_incomplete": any(one.shutdown_incomplete for one in each),
        "payload_copy_shutdown_timeout_count": sum(one.shutdown_timeout_count for one in each),
        "payload_copy_active_at_last_shutdown_timeout": sum(
            one.active_at_last_shutdown_timeout for one in each
        ),
    }


def _observability_facts(sinks: ObservabilitySinks, unbuffered: int) -> dict[str, Any]:
    buffers = sinks.stats()
    each = buffers.values()
    return {
        "observability_buffers": buffers,
        "observability_pending": sum(one.pending for one in each),
        "observability_peak_pending": sum(one.peak_pending for one in each),
        "observability_dropped_count": sum(one.dropped for one in each),
        "observability_failure_count": sum(one.failures for one in each) + unbuffered,
        "observability_shutdown_incomplete": any(
            one.closed and one.worker_alive and one.shutdown_timeout_count for one in each
        ),
        "observability_shutdown_timeout_count": sum(one.shutdown_timeout_count for one in each),
    }


# The configuration of a snapshot builder, and the parts that it is made of -----------------------


class ConfiguredBuilder:
    """What a builder is made of: its settings and parts, under the names of its arguments."""

    max_concurrency: int
    max_pending_tasks: int
    source_concurrency: Mapping[str, int] | None
    cache_source_support: bool
    source_support_cache_max_entries: int | None
    manage_lifecycle: bool
    run_payload_copies_in_thread: bool
    max_copy_concurrency: int
    cache_run_payload_copies_in_thread: bool | None
    cache_max_copy_concurrency: int
    copy_shutdown_timeout_seconds: float
    buffer_observability: bool | None
    observability_max_pending: int
    observability_overflow: BufferOverflowPolicy
    observability_shutdown_timeout_seconds: float
    observability_drain_on_shutdown: bool
    require_source_timeout_declarations: bool
    allow_unsafe_blocking_sources: bool
    source_transport_timeout_grace_seconds: float

    def __init__(self, parts: Assembly, settings: BuilderSettings) -> None:
        vars(self).update(vars(settings))
        self.run_payload_copies_in_thread = parts.engine.equipment.copies.run_in_thread
        self.parts = parts

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources, in the order in which they are asked."""
        return tuple(link.source for link in self.parts.engine.equipment.chains.links)

    @property
    def cache(self) -> AsyncCache:
        """The cache that values are kept in."""
        return self.parts.engine.equipment.access.cache

    @property
    def publisher(self) -> ResourcePublisher:
        """Writes events straight into the cache."""
        return self.parts.publisher

    @property
    def capacity(self) -> CapacityController:
        """The limits on source operations under way at once."""
        return self.parts.engine.equipment.capacity

    @property
    def circuit_breaker(self) -> CircuitBreaker:
        """The circuits of the sources."""
        return self.parts.engine.equipment.breaker

    @property
    def policy_resolver(self) -> PolicyResolver:
        """The freshness policies by key."""
        policies: Any = self.parts.engine.equipment.policies
        resolver: PolicyResolver = policies
        return resolver

    @property
    def authority_resolver(self) -> AuthorityPolicyResolver:
        """The authority policies by key."""
        authority: Any = self.parts.engine.equipment.authority
        resolver: AuthorityPolicyResolver = authority
        return resolver

    @property
    def resilience_resolver(self) -> ResiliencePolicyResolver:
        """The retry and circuit policies by source name."""
        return self.parts.engine.equipment.resilience

    @property
    def observation_policy(self) -> ObservationPolicy:
        """How far in the future an observation may be dated."""
        return self.parts.engine.equipment.observation

    @property
    def retry_policy(self) -> RetryPolicy:
        """How calls are repeated where no policy of the source says otherwise."""
        return self.parts.engine.equipment.resilience.default.retry

    @property
    def metrics(self) -> MetricsSink:
        """The metrics sink as used, so possibly within a buffer."""
        return self.parts.sinks.metrics

    @property
    def events(self) -> EventSink:
        """The event sink as used, so possibly within a buffer."""
        return self.parts.sinks.events

    @property
    def clock(self) -> Clock:
        """The clock that ages, deadlines and circuits go by."""
        return self.parts.engine.equipment.clock

    # Looking in -------------------------------------------------------------------------------

    async def health_snapshot(self) -> BuilderHealth:
        """Return the state of the builder and its counters, without asking any source."""
        copies = {"builder": self.parts.engine.equipment.copies.health()}
        if self.parts.default_cache is not None:
            copies["cache"] = self.parts.default_cache.copy_health_snapshot()
        return await collect_health(
            self.parts.engine, self.parts.sinks, copies, self.parts.closing.unfinished
        )

    async def capacity_snapshot(self) -> dict[str, CapacitySnapshot]:
        """Return the state of every capacity limit, the builder's own under ``__global__``."""
        return await self.capacity.snapshot()

    def clear_source_support_cache(self) -> None:
        """Forget which keys the sources said to support."""
        self.parts.engine.equipment.chains.forget()

    async def wait_for_refreshes(self) -> None:
        """Wait for the background refreshes that are scheduled at this moment."""
        await self.parts.engine.refresher.wait()


# The end of a snapshot builder -------------------------------------------------------------------


class ClosableBuilder(ConfiguredBuilder):
    """A configured builder that can be closed, once, in bounded time."""

    @property
    def closed(self) -> bool:
        """Whether the builder takes no more work."""
        return self.parts.engine.closed

    async def aclose(
        self,
        *,
        cancel_refreshes: bool = False,
        copy_shutdown_timeout_seconds: float | None = None,
        observability_shutdown_timeout_seconds: float | None = None,
    ) -> None:
        """Close the builder: end what is under way, then copies, then sinks, then what it manages.

        Every stage runs even if one fails. Closing again does nothing, or waits for the closing
        that is under way.

        Args:
            cancel_refreshes: give up background refreshes instead of waiting for them.
            copy_shutdown_timeout_seconds: how long to wait for running copies, and for sources that
                do not end; the builder's setting by default.
            observability_shutdown_timeout_seconds: how long to wait for buffers to empty; the
                builder's setting by default.

        Raises:
            RuntimeError: the builder has work under way on another event loop.
            SourceTimeoutError: a source still runs in a thread, or ignores its cancellation.
            PayloadCopyShutdownTimeoutError: copies still run.
            ObservabilityShutdownTimeoutError: a buffer has not been emptied.
        """
        flag("cancel_refreshes", cancel_refreshes)
        copy_timeout = number(
            "copy_shutdown_timeout_seconds", copy_shutdown_timeout_seconds, minimum=0, optional=True
        )
        observability_timeout = number(
            "observability_shutdown_timeout_seconds",
            observability_shutdown_timeout_seconds,
            minimum=0,
            optional=True,
        )
        self.parts.engine.attach()
        closing = self.parts.closing
        task = closing.begun
        if task is None:
            task = closing.task = asyncio.get_running_loop().create_task(
                closing.close(
                    cancel_refreshes=cancel_refreshes,
                    copy_timeout=_first(copy_timeout, self.copy_shutdown_timeout_seconds),
                    observability_timeout=_first(
                        observability_timeout, self.observability_shutdown_timeout_seconds
                    ),
                    drain=self.observability_drain_on_shutdown,
                ),
                name="coalestra closing",
            )
        elif task.done():
            return
        await asyncio.shield(task)

    async def wait_for_payload_copy_shutdown(self) -> None:
        """Wait, however long, until no payload copy of a closed builder is running."""
        await self.parts.closing.wait_for_copies()

    async def wait_for_observability_shutdown(self) -> None:
        """Wait, however long, until the buffers of a closed builder are empty."""
        await self.parts.closing.wait_for_observability()

    async def wait_for_background_shutdown(self) -> None:
        """Wait, however long, for both payload copies and buffers of a closed builder."""
        await self.parts.closing.wait_for_copies()
        await self.parts.closing.wait_for_observability()


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


# The snapshot builder: configuration, and the calls that applications make -----------------------


class SnapshotBuilder(ClosableBuilder):
    """Builds consistent, immutable snapshots of resources from prioritized, read-only sources.

    Make one per process and event loop, and keep it: cache, circuits, capacity and requests under
    way are shared by everything it builds. Close it with `aclose`, or use it with ``async with``.

    Args:
        sources: where resources come from. Higher `priority` is asked first.
        default_policy: how fresh values must be; 1 s to live and 10 s of staleness by default.
        policy_resolver: policies by key, instead of `default_policy`.
        authority_policy: which source's revisions may replace which others' in the cache.
        authority_resolver: the same by key, instead of `authority_policy`.
        cache: where values are kept; an `AsyncMemoryCache` of its own by default.
        retry_policy: how failed calls are repeated, unless a resilience setting says otherwise.
        circuit_breaker: the circuits; one with its own clock and default policy by default.
        default_resilience: retry and circuit policy of sources that nothing else covers.
        source_resilience: policies by source name.
        resilience_resolver: policies by source name, instead of all three before it.
        clock: tells the time; the system's by default.
        metrics: takes counts and observations.
        events: takes events.
        observation_policy: how far in the future an observation may be dated.
        payload_copier: copies payloads, instead of `copy.deepcopy` semantics.

    The other arguments are described at `BuilderSettings`, and are attributes of the same name.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value, two do not go together, or a source does not
            declare safe timeouts. The message names the argument or the source, and the remedy.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        *,
        default_policy: FreshnessPolicy | None = None,
        policy_resolver: PolicyResolver | None = None,
        authority_policy: SourceAuthorityPolicy | None = None,
        authority_resolver: AuthorityPolicyResolver | None = None,
        cache: AsyncCache | None = None,
        retry_policy: RetryPolicy | None = None,
        circuit_breaker: CircuitBreaker | None = None,
        default_resilience: SourceResiliencePolicy | None = None,
        source_resilience: Mapping[str, SourceResiliencePolicy] | None = None,
        resilience_resolver: ResiliencePolicyResolver | None = None,
        clock: Clock | None = None,
        metrics: MetricsSink | None = None,
        events: EventSink | None = None,
        max_concurrency: int = 8,
        max_pending_tasks: int | None = None,
        source_concurrency: Mapping[str, int] | None = None,
        observation_policy: ObservationPolicy | None = None,
        cache_source_support: bool = True,
        source_support_cache_max_entries: int | None = 100_000,
        manage_lifecycle: bool = False,
        payload_copier: PayloadCopier | None = None,
        run_payload_copies_in_thread: bool | None = None,
        max_copy_concurrency: int = 4,
        cache_run_payload_copies_in_thread: bool | None = None,
        cache_max_copy_concurrency: int = 4,
        copy_shutdown_timeout_seconds: float = 5.0,
        buffer_observability: bool | None = None,
        observability_max_pending: int = 10_000,
        observability_overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
        observability_shutdown_timeout_seconds: float = 5.0,
        observability_drain_on_shutdown: bool = True,
        require_source_timeout_declarations: bool = True,
        allow_unsafe_blocking_sources: bool = False,
        source_transport_timeout_grace_seconds: float = 0.05,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        settings = BuilderSettings.of(arguments)
        super().__init__(assemble(BuilderArguments(arguments), settings), settings)

    # Building ---------------------------------------------------------------------------------

    async def build(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> Snapshot:
        """Return one snapshot of `keys`.

        Args:
            keys: what is needed; at least one.
            strict: raise if any key has no value; else the snapshot says so in `errors`.
            deadline_seconds: how long it may take, all in all.
            metadata: told to the sources in their context.
            snapshot_id: an id of your own; a fresh unique one by default.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the partial snapshot.
            ValueError: no keys.
            RuntimeError: the builder is closed, or busy on another event loop.
        """
        flag("strict", strict)
        wanted = distinct(keys)
        if not wanted:
            raise ValueError("keys must name at least one resource, got none")
        unit = open_unit(self.parts.engine, deadline_seconds, metadata, snapshot_id, lasting=False)
        snapshot = await unit.single_stage(wanted)
        failed = bool(snapshot.errors) and strict
        self._report_build(snapshot, failed=failed, strict=strict)
        if failed:
            raise SnapshotBuildError(
                snapshot.errors, snapshot=None if unit.undelivered else snapshot
            )
        return snapshot

    async def build_request(
        self,
        request: SnapshotRequest,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> Snapshot:
        """Return one snapshot for a request: its required keys have values, and its policies hold.

        Args are those of `build`.

        Raises:
            SnapshotBuildError: a required key failed; it holds the partial snapshot.
            SnapshotConsistencyError: observations lie too far apart.
            SnapshotAcceptanceError: values are not acceptable.
            RuntimeError: the builder is closed, or busy on another event loop.
        """
        instance("request", request, SnapshotRequest)
        unit = open_unit(self.parts.engine, deadline_seconds, metadata, snapshot_id, lasting=False)
        snapshot = await unit.single_stage(distinct(request.keys))
        failed = {k: e for k, e in snapshot.errors.items() if request.is_required(k)}
        judge = Judge(
            self.parts.engine.equipment, request.consistency_policy, request.acceptance_policy
        )
        try:
            if failed:
                raise SnapshotBuildError(failed, snapshot=snapshot)
            judge.judge(snapshot, request.required, request.optional)
        except SnapshotBuildError:
            self._report_build(snapshot, failed=True, strict=True)
            raise
        self._report_build(snapshot, failed=False, strict=True)
        return snapshot

    def _report_build(self, snapshot: Snapshot, *, failed: bool, strict: bool) -> None:
        report = self.parts.engine.equipment.report
        if report is not None:
            report.snapshot_built(
                snapshot.snapshot_id, snapshot.diagnostics, build_failed=failed, strict=strict
            )

    def session(
        self,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> SnapshotSession:
        """Open a session: a unit of work in several stages. Args are those of `build`.

        Raises:
            RuntimeError: the builder is closed.
        """
        return SnapshotSession(
            open_unit(self.parts.engine, deadline_seconds, metadata, snapshot_id, lasting=True)
        )

    async def __aenter__(self) -> SnapshotBuilder:
        self.parts.engine.require_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<SnapshotBuilder {state}: {self.parts.engine.equipment.chains!r}>"


_ARGUMENTS = frozenset(
    name for record in (BuilderArguments, BuilderSettings) for name in record.__annotations__
)
