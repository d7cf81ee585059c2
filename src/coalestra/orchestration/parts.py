"""What a builder is told, and what its engine works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coalestra.cache.access import CacheAccess
from coalestra.concurrency.capacity import CapacityController
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.policies import (
    AuthorityPolicyProvider,
    FreshnessPolicyProvider,
    ObservationPolicy,
)
from coalestra.core.protocols import Clock
from coalestra.core.validation import (
    check_fields,
    choice,
    flag,
    instance,
    integer,
    number,
    ruled,
    text,
)
from coalestra.observability.changes import ChangeLog
from coalestra.observability.reports import Reporter
from coalestra.observability.sinks import BufferOverflowPolicy
from coalestra.orchestration.sources import Chains
from coalestra.orchestration.tracing import Tracing
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver

# The settings of a builder: their meaning, their defaults and their rules -------------------------


def _rate(name: str, value: Any) -> object:
    return value if type(value) is bool else number(name, value, minimum=0, maximum=1)


def _flag_or_none(name: str, value: Any) -> object:
    return None if value is None else flag(name, value)


def _limits(name: str, value: Any) -> None:
    instance(name, value, Mapping, optional=True)
    for source, limit in (value or {}).items():
        text(f"{name} key", source)
        integer(f"{name}[{source!r}]", limit, minimum=1)


@dataclasses.dataclass(frozen=True, eq=False)
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
    pace: Pace = dataclasses.field(default_factory=Pace)
    counters: Counters = dataclasses.field(default_factory=Counters)
