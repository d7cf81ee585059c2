"""What a builder is told, and what its engine works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from coalestra.cache.access import CacheAccess
from coalestra.concurrency.capacity import CapacityController
from coalestra.concurrency.copying import PayloadCopier, PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.policies import (
    AuthorityPolicyProvider,
    AuthorityPolicyResolver,
    FreshnessPolicy,
    FreshnessPolicyProvider,
    ObservationPolicy,
    PolicyResolver,
    SourceAuthorityPolicy,
)
from coalestra.core.protocols import AsyncCache, Clock, EventSink, MetricsSink, Source, Tracer
from coalestra.core.validation import (
    check_fields,
    choice,
    flag,
    instance,
    integer,
    number,
    require_methods,
    ruled,
    text,
)
from coalestra.observability.changes import ChangeLog
from coalestra.observability.reports import Reporter
from coalestra.observability.sinks import BufferOverflowPolicy
from coalestra.orchestration.sources import Chains
from coalestra.orchestration.tracing import Tracing
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import (
    ResiliencePolicyResolver,
    RetryPolicy,
    SourceResiliencePolicy,
)

# What a builder is told: its settings and collaborators, with their defaults and rules ------------


def _rate(name: str, value: Any) -> object:
    return value if type(value) is bool else number(name, value, minimum=0, maximum=1)


def _flag_or_none(name: str, value: Any) -> object:
    return None if value is None else flag(name, value)


def _limits(name: str, value: Any) -> None:
    instance(name, value, Mapping, optional=True)
    for source, limit in (value or {}).items():
        text(f"{name} key", source)
        integer(f"{name}[{source!r}]", limit, minimum=1)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BuilderSettings:
    """The simple settings of a builder, checked, and fixed for its life. Times are seconds.

    Attributes:
        max_concurrency: source operations at once, over all builds, sessions and refreshes.
        max_pending_tasks: workers for one source's single or derived keys; `max_concurrency` if
            None.
        source_concurrency: limits by source name; they win over what a source declares.
        cache_source_support: whether answers of `supports` are remembered.
        source_support_cache_max_entries: how many; None for any number.
        manage_lifecycle: whether closing the builder closes its sources, cache and sinks too.
        run_payload_copies_in_thread: True always, False never, None when it pays.
        max_copy_concurrency: threads that copy payloads at once.
        cache_run_payload_copies_in_thread: the same for the default cache's own copies.
        cache_max_copy_concurrency: the same for the default cache's own copies.
        copy_shutdown_timeout_seconds: how long closing waits for running copies.
        buffer_observability: True buffers every sink, False none, None those that may block.
        observability_max_pending: records that may wait in a buffer.
        observability_overflow: what gives way when a buffer is full.
        observability_shutdown_timeout_seconds: how long closing waits for buffers to empty.
        observability_drain_on_shutdown: whether closing delivers what waits, or discards it.
        require_source_timeout_declarations: whether sources must say if they block.
        allow_unsafe_blocking_sources: whether blocking sources without a safe timeout are let in.
        source_transport_timeout_grace_seconds: what a call may take beyond its transport timeout
            before it counts as a violation.
        trace: whether units of work are traced unless told otherwise, or the share of them that is.
    """

    max_concurrency: int = ruled(8, integer, minimum=1)
    max_pending_tasks: int | None = ruled(None, integer, minimum=1, optional=True)
    source_concurrency: Mapping[str, int] | None = ruled(None, _limits)
    cache_source_support: bool = ruled(True, flag)
    source_support_cache_max_entries: int | None = ruled(100_000, integer, minimum=1, optional=True)
    manage_lifecycle: bool = ruled(False, flag)
    run_payload_copies_in_thread: bool | None = ruled(None, _flag_or_none)
    max_copy_concurrency: int = ruled(4, integer, minimum=1)
    cache_run_payload_copies_in_thread: bool | None = ruled(None, _flag_or_none)
    cache_max_copy_concurrency: int = ruled(4, integer, minimum=1)
    copy_shutdown_timeout_seconds: float = ruled(5.0, number, minimum=0)
    buffer_observability: bool | None = ruled(None, _flag_or_none)
    observability_max_pending: int = ruled(10_000, integer, minimum=1)
    observability_overflow: BufferOverflowPolicy = ruled(
        BufferOverflowPolicy.DROP_OLDEST, choice, BufferOverflowPolicy
    )
    observability_shutdown_timeout_seconds: float = ruled(5.0, number, minimum=0)
    observability_drain_on_shutdown: bool = ruled(True, flag)
    require_source_timeout_declarations: bool = ruled(True, flag)
    allow_unsafe_blocking_sources: bool = ruled(False, flag)
    source_transport_timeout_grace_seconds: float = ruled(0.05, number, minimum=0)
    trace: bool | float = ruled(False, _rate)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_pending_tasks is None:
            object.__setattr__(self, "max_pending_tasks", self.max_concurrency)


def _one_of(kind: type[Any]) -> Any:
    return ruled(None, instance, kind, optional=True)


def _with_methods(*methods: str, plain: bool = True) -> Any:
    return ruled(None, require_methods, *methods, optional=True, plain=plain)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BuilderArguments(BuilderSettings):
    """All that an application hands to a builder; None stands for the default."""

    sources: Iterable[Source] = dataclasses.field(kw_only=False)
    default_policy: FreshnessPolicy | None = _one_of(FreshnessPolicy)
    policy_resolver: PolicyResolver | None = _with_methods("resolve")
    authority_policy: SourceAuthorityPolicy | None = _one_of(SourceAuthorityPolicy)
    authority_resolver: AuthorityPolicyResolver | None = _one_of(AuthorityPolicyResolver)
    cache: AsyncCache | None = _with_methods("get", "set", "invalidate", "clear", plain=False)
    retry_policy: RetryPolicy | None = _one_of(RetryPolicy)
    circuit_breaker: CircuitBreaker | None = _one_of(CircuitBreaker)
    default_resilience: SourceResiliencePolicy | None = _one_of(SourceResiliencePolicy)
    source_resilience: Mapping[str, SourceResiliencePolicy] | None = _one_of(Mapping)
    resilience_resolver: ResiliencePolicyResolver | None = _one_of(ResiliencePolicyResolver)
    clock: Clock | None = _with_methods("now", "monotonic")
    metrics: MetricsSink | None = None
    events: EventSink | None = None
    tracer: Tracer | None = _with_methods("begin", "enter", "end", "joined")
    observation_policy: ObservationPolicy | None = _one_of(ObservationPolicy)
    payload_copier: PayloadCopier | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("sources", self.sources, Iterable)
        for source, policy in (self.source_resilience or {}).items():
            text("source_resilience key", source)
            instance(f"source_resilience[{source!r}]", policy, SourceResiliencePolicy)
        if self.authority_policy is not None and self.authority_resolver is not None:
            raise ValueError(
                "authority_policy and authority_resolver were both given; give the resolver alone, "
                "with the policy as its default"
            )


# What the engine of one builder works with: fixed collaborators and a few counters ---------------


@dataclasses.dataclass(eq=False)
class Counters:
    """Cumulative counts since the builder was made, under their names in `BuilderHealth`."""

    queue_timeout_count: int = 0
    source_timeout_count: int = 0
    deadline_exceeded_count: int = 0
    revalidation_attempt_count: int = 0
    revalidation_failure_count: int = 0
    source_transport_timeout_violations: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Parts:
    """The parts that every stage of the engine shares for the life of a builder."""

    clock: Clock
    chains: Chains
    policies: FreshnessPolicyProvider
    authority: AuthorityPolicyProvider
    observation: ObservationPolicy
    capacity: CapacityController
    breaker: CircuitBreaker
    resilience: ResiliencePolicyResolver
    access: CacheAccess
    copies: PayloadCopies
    report: Reporter | None
    log: ChangeLog
    threads: WorkerThreads
    tracing: Tracing
    max_concurrency: int
    max_pending_tasks: int
    transport_grace_seconds: float
    pace: Pace
    counters: Counters = dataclasses.field(default_factory=Counters)
