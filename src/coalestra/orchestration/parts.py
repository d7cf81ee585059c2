"""The settings of a builder: their meaning, their defaults, and one table of rules for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
from coalestra.core.validation import choice, flag, instance, integer, number, text
from coalestra.observability.changes import ChangeLog
from coalestra.observability.reports import Reporter
from coalestra.observability.sinks import BufferOverflowPolicy
from coalestra.orchestration.sources import Chains
from coalestra.orchestration.tracing import Tracing
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver

# The settings of a builder: their meaning, their defaults, and one table of rules for all --------


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

    max_concurrency: int = 8
    max_pending_tasks: int | None = None
    source_concurrency: Mapping[str, int] | None = None
    cache_source_support: bool = True
    source_support_cache_max_entries: int | None = 100_000
    manage_lifecycle: bool = False
    run_payload_copies_in_thread: bool | None = None
    max_copy_concurrency: int = 4
    cache_run_payload_copies_in_thread: bool | None = None
    cache_max_copy_concurrency: int = 4
    copy_shutdown_timeout_seconds: float = 5.0
    buffer_observability: bool | None = None
    observability_max_pending: int = 10_000
    observability_overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST
    observability_shutdown_timeout_seconds: float = 5.0
    observability_drain_on_shutdown: bool = True
    require_source_timeout_declarations: bool = True
    allow_unsafe_blocking_sources: bool = False
    source_transport_timeout_grace_seconds: float = 0.05
    trace: bool | float = False

    def __post_init__(self) -> None:
        for name, check in RULES.items():
            check(name, getattr(self, name))
        if self.max_pending_tasks is None:
            object.__setattr__(self, "max_pending_tasks", self.max_concurrency)


Check = Callable[[str, Any], object]


def _count(name: str, value: Any) -> object:
    return integer(name, value, minimum=1)


def _count_or_none(name: str, value: Any) -> object:
    return integer(name, value, minimum=1, optional=True)


def _seconds(name: str, value: Any) -> object:
    return number(name, value, minimum=0)


def _rate(name: str, value: Any) -> object:
    return value if type(value) is bool else number(name, value, minimum=0, maximum=1)


def _flag_or_none(name: str, value: Any) -> object:
    return None if value is None else flag(name, value)


def _overflow(name: str, value: Any) -> object:
    return choice(name, value, BufferOverflowPolicy)


def _limits(name: str, value: Any) -> object:
    instance(name, value, Mapping, optional=True)
    for source, limit in (value or {}).items():
        text(f"{name} key", source)
        integer(f"{name}[{source!r}]", limit, minimum=1)
    return value


RULES: Mapping[str, Check] = {
    "max_concurrency": _count,
    "max_pending_tasks": _count_or_none,
    "source_concurrency": _limits,
    "cache_source_support": flag,
    "source_support_cache_max_entries": _count_or_none,
    "manage_lifecycle": flag,
    "run_payload_copies_in_thread": _flag_or_none,
    "max_copy_concurrency": _count,
    "cache_run_payload_copies_in_thread": _flag_or_none,
    "cache_max_copy_concurrency": _count,
    "copy_shutdown_timeout_seconds": _seconds,
    "buffer_observability": _flag_or_none,
    "observability_max_pending": _count,
    "observability_overflow": _overflow,
    "observability_shutdown_timeout_seconds": _seconds,
    "observability_drain_on_shutdown": flag,
    "require_source_timeout_declarations": flag,
    "allow_unsafe_blocking_sources": flag,
    "source_transport_timeout_grace_seconds": _seconds,
    "trace": _rate,
}
"""What each setting must be."""


# What the engine of one builder works with: fixed collaborators and a few counters ---------------


class Counters:
    """Cumulative counts since the builder was made, for its health."""

    __slots__ = (
        "deadlines_exceeded",
        "queue_timeouts",
        "revalidation_attempts",
        "revalidation_failures",
        "source_timeouts",
        "transport_violations",
    )

    def __init__(self) -> None:
        self.queue_timeouts: int = 0
        self.source_timeouts: int = 0
        self.deadlines_exceeded: int = 0
        self.revalidation_attempts: int = 0
        self.revalidation_failures: int = 0
        self.transport_violations: dict[str, int] = {}


class Parts:
    """The parts that every stage of the engine shares for the life of a builder."""

    __slots__ = (
        "access",
        "authority",
        "breaker",
        "capacity",
        "chains",
        "clock",
        "copies",
        "counters",
        "log",
        "max_concurrency",
        "max_pending_tasks",
        "observation",
        "pace",
        "policies",
        "report",
        "resilience",
        "threads",
        "tracing",
        "transport_grace_seconds",
    )

    def __init__(
        self,
        *,
        clock: Clock,
        chains: Chains,
        policies: FreshnessPolicyProvider,
        authority: AuthorityPolicyProvider,
        observation: ObservationPolicy,
        capacity: CapacityController,
        breaker: CircuitBreaker,
        resilience: ResiliencePolicyResolver,
        access: CacheAccess,
        copies: PayloadCopies,
        report: Reporter | None,
        log: ChangeLog,
        threads: WorkerThreads,
        tracing: Tracing,
        max_concurrency: int,
        max_pending_tasks: int,
        transport_grace_seconds: float,
    ) -> None:
        self.pace: Pace = Pace()
        self.clock = clock
        self.chains = chains
        self.policies = policies
        self.authority = authority
        self.observation = observation
        self.capacity = capacity
        self.breaker = breaker
        self.resilience = resilience
        self.access = access
        self.copies = copies
        self.report = report
        self.log = log
        self.threads = threads
        self.tracing = tracing
        self.max_concurrency = max_concurrency
        self.max_pending_tasks = max_pending_tasks
        self.transport_grace_seconds = transport_grace_seconds
        self.counters: Counters = Counters()
