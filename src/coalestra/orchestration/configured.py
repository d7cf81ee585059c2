"""The configuration of a snapshot builder, and the parts that it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coalestra.concurrency.capacity import CapacityController, CapacitySnapshot
from coalestra.core.authority import AuthorityPolicyResolver
from coalestra.core.clock import Clock
from coalestra.core.freshness import ObservationPolicy, PolicyResolver
from coalestra.core.protocols import AsyncCache, EventSink, MetricsSink, Source
from coalestra.observability.overflow import BufferOverflowPolicy
from coalestra.orchestration.assembly import Assembly
from coalestra.orchestration.settings import BuilderSettings
from coalestra.resilience.backoff import RetryPolicy
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver

if TYPE_CHECKING:
    from coalestra.cache.publisher import ResourcePublisher
    from coalestra.core.health import BuilderHealth


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
        from coalestra.orchestration.health import collect_health

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
