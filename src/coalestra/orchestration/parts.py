"""What the engine of one builder works with: fixed collaborators and a few counters."""

from __future__ import annotations

import dataclasses

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
from coalestra.observability import ChangeLog, Reporter
from coalestra.orchestration.sources import Chains
from coalestra.orchestration.tracing import Tracing
from coalestra.resilience import CircuitBreaker, ResiliencePolicyResolver


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
