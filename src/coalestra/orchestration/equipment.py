"""What the engine of one builder works with: fixed collaborators and a few counters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra.cache.access import CacheAccess
from coalestra.concurrency.capacity import CapacityController
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.authority import AuthorityPolicyProvider
from coalestra.core.clock import Clock
from coalestra.core.freshness import FreshnessPolicyProvider, ObservationPolicy
from coalestra.orchestration.chains import Chains
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver

if TYPE_CHECKING:
    from coalestra.observability.reporting import Reporter


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


class Equipment:
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
        "max_concurrency",
        "max_pending_tasks",
        "observation",
        "pace",
        "policies",
        "report",
        "resilience",
        "threads",
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
        threads: WorkerThreads,
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
        self.threads = threads
        self.max_concurrency = max_concurrency
        self.max_pending_tasks = max_pending_tasks
        self.transport_grace_seconds = transport_grace_seconds
        self.counters: Counters = Counters()
