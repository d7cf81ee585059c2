"""The snapshot builder: what it is given, how its parts are put together, and its public calls."""

from __future__ import annotations

import contextvars
import dataclasses
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from coalestra.cache.access import CacheAccess
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.publisher import ResourcePublisher, require_authority_aware
from coalestra.concurrency.capacity import CapacityController, CapacitySnapshot
from coalestra.concurrency.copying import PayloadCopier, PayloadCopies
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core import protocols, validation
from coalestra.core.health import BuilderHealth, FlightSnapshot
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.policies import (
    AuthorityPolicyResolver,
    FreshnessPolicy,
    ObservationPolicy,
    PolicyResolver,
    SourceAuthorityPolicy,
)
from coalestra.core.protocols import AsyncCache, Clock, EventSink, MetricsSink, Source, Tracer
from coalestra.core.request import RequestResult, SnapshotRequest
from coalestra.core.snapshot import Snapshot
from coalestra.core.trace import Trace
from coalestra.core.validation import choice, flag, instance, integer, number, ruled, text
from coalestra.observability import LOGGER, BufferOverflowPolicy, ObservabilitySinks
from coalestra.orchestration import session as sessions
from coalestra.orchestration.closing import Closing, Limits, gives_way
from coalestra.orchestration.flights import Parts, Work
from coalestra.orchestration.session import Requests, Results, SnapshotSession, Terms
from coalestra.orchestration.singleflight import Engine
from coalestra.orchestration.sources import Chains, Link
from coalestra.orchestration.tracing import Tracing
from coalestra.resilience import (
    CircuitBreaker,
    CircuitBreakerPolicy,
    ResiliencePolicyResolver,
    RetryPolicy,
    SourceResiliencePolicy,
)


def _rate(name: str, value: Any) -> object:
    return value if type(value) is bool else number(name, value, minimum=0, maximum=1)


def _limits(name: str, value: Any) -> None:
    instance(name, value, Mapping, optional=True)
    for source, limit in (value or {}).items():
        text(f"{name} key", source)
        integer(f"{name}[{source!r}]", limit, minimum=1)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BuilderSettings:
    """The simple settings of a builder, checked, and fixed for its life. Times are seconds.

    Attributes:
        max_concurrency: calls of sources at once, over all builds, sessions and refreshes.
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
    run_payload_copies_in_thread: bool | None = ruled(None, flag, optional=True)
    max_copy_concurrency: int = ruled(4, integer, minimum=1)
    cache_run_payload_copies_in_thread: bool | None = ruled(None, flag, optional=True)
    cache_max_copy_concurrency: int = ruled(4, integer, minimum=1)
    copy_shutdown_timeout_seconds: float = ruled(5.0, number, minimum=0)
    buffer_observability: bool | None = ruled(None, flag, optional=True)
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
        validation.check_fields(self)
        if self.max_pending_tasks is None:
            object.__setattr__(self, "max_pending_tasks", self.max_concurrency)


_IN_PLACE_OF = {
    "policy_resolver": ("default_policy",),
    "default_resilience": ("retry_policy",),
    "resilience_resolver": ("retry_policy", "default_resilience", "source_resilience"),
}
"""Arguments of a builder, and those that say nothing any more where one of them is given."""


def _one_of(kind: type[Any]) -> Any:
    return ruled(None, instance, kind, optional=True)


def _with_methods(*methods: str, plain: bool = True) -> Any:
    return ruled(None, validation.require_methods, *methods, optional=True, plain=plain)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class BuilderArguments(BuilderSettings):
    """All that an application hands to a builder; None stands for the default."""

    sources: Iterable[Source] = dataclasses.field(kw_only=False)
    default_policy: FreshnessPolicy | None = _one_of(FreshnessPolicy)
    policy_resolver: PolicyResolver | None = _with_methods("resolve")
    authority_policy: SourceAuthorityPolicy | None = _one_of(SourceAuthorityPolicy)
    authority_resolver: AuthorityPolicyResolver | None = _with_methods("resolve", "rank_for")
    cache: AsyncCache | None = _with_methods("get", "set", "invalidate", "clear", plain=False)
    retry_policy: RetryPolicy | None = _one_of(RetryPolicy)
    circuit_breaker: CircuitBreaker | None = _one_of(CircuitBreaker)
    default_resilience: SourceResiliencePolicy | None = _one_of(SourceResiliencePolicy)
    source_resilience: Mapping[str, SourceResiliencePolicy] | None = _one_of(Mapping)
    resilience_resolver: ResiliencePolicyResolver | None = _with_methods("resolve")
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
        for chosen, others in _IN_PLACE_OF.items():
            for name in others if getattr(self, chosen) is not None else ():
                if getattr(self, name) is not None:
                    LOGGER.warning("%s is not used, as %s takes its place", name, chosen)


def _require_safe_timeouts(links: Iterable[Link], settings: BuilderArguments) -> None:
    """Raise `ValueError` for a source that does not say if it blocks, or blocks unsafely."""
    for link in links:
        guarantee = link.guarantee
        status = guarantee.status.value
        if not guarantee.declaration_present and settings.require_source_timeout_declarations:
            raise ValueError(
                f"source {link.name!r} is {status}: it does not say whether it blocks; set "
                "blocking_io on it, or pass require_source_timeout_declarations=False"
            )
        if guarantee.unsafe and not settings.allow_unsafe_blocking_sources:
            raise ValueError(
                f"source {link.name!r} is {status}: a blocking source must run in a thread "
                "(blocking_io_offloaded) and declare a transport_timeout_seconds below its "
                "timeout_seconds, or pass allow_unsafe_blocking_sources=True"
            )


def _default_cache(given: BuilderArguments) -> AsyncMemoryCache | None:
    """Return the default cache, unless another one is given."""
    own = given.cache_run_payload_copies_in_thread, given.cache_max_copy_concurrency
    if given.cache is None:
        return AsyncMemoryCache(
            payload_copier=given.payload_copier,
            run_payload_copies_in_thread=own[0],
            max_copy_concurrency=own[1],
        )
    if own != (None, 4):
        raise ValueError(
            "cache_run_payload_copies_in_thread and cache_max_copy_concurrency are settings "
            "of the default cache; with a cache of your own, set them there"
        )
    return None


def _require_known(links: Iterable[Link], settings: BuilderArguments) -> None:
    """Raise `ValueError` for a limit of a source that there is not, and tell of misspelt policies.

    Policies may be those of a whole application, of whose sources a builder has a few.
    """
    known, named = {link.name for link in links}, set(settings.source_resilience or ())
    for name in settings.source_concurrency or ():
        if name not in known:
            raise ValueError(
                f"source_concurrency names {name!r}, but there is no such source; known are "
                f"{', '.join(sorted(known)) or 'none'}"
            )
    for name in sorted(named - known):
        for meant in get_close_matches(name, known - named, 1):
            told = "source_resilience names %r, but there is no such source; is %r meant?"
            LOGGER.warning(told, name, meant)


def _capacity(links: Iterable[Link], settings: BuilderArguments) -> CapacityController:
    limits = settings.source_concurrency or {}
    capacity = CapacityController(global_limit=settings.max_concurrency, source_limits=limits)
    for link in links:
        if link.name not in limits:
            capacity.register_source(link.name, getattr(link.source, "max_concurrency", None))
    return capacity


_COPY_SUMS = (
    "started_count", "completed_count", "failure_count", "timeout_count", "capacity_timeout_count",
    "shutdown_timeout_count", "active_at_last_shutdown_timeout",
)  # fmt: skip
"""Counts of every component that copies, and with ``payload_copy_`` before it of all of them."""


class SnapshotBuilder(BuilderArguments):
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
        tracer: follows units of work while they are under way.
        observation_policy: how far in the future an observation may be dated.
        payload_copier: copies payloads, instead of `copy.deepcopy` semantics.

    The other arguments are described at `BuilderSettings`. Each is an attribute of its name, which
    has the default if it was not given, and cannot be changed.

    Attributes:
        sources: the sources, in the order in which they are asked.
        publisher: writes events straight into the cache.
        capacity: the limits on calls under way at once.
        metrics, events: the sinks as used, so possibly within a buffer.

    Raises:
        ValueError: an argument has a wrong value, two do not go together, or a source does not
            declare safe timeouts. The message names the argument or the source, and the remedy.

    What asks for values raises a `RuntimeError` if the builder is closed, or busy on another event
    loop, and a `TypeError` or `ValueError` for a wrong argument.
    """

    sources: tuple[Source, ...]
    default_policy: FreshnessPolicy
    policy_resolver: PolicyResolver
    authority_resolver: AuthorityPolicyResolver
    cache: AsyncCache
    retry_policy: RetryPolicy
    circuit_breaker: CircuitBreaker
    default_resilience: SourceResiliencePolicy
    resilience_resolver: ResiliencePolicyResolver
    clock: Clock
    metrics: MetricsSink
    events: EventSink
    observation_policy: ObservationPolicy

    def __post_init__(self) -> None:
        """Choose the parts, check that they go together, and put them together."""
        super().__post_init__()
        chains = Chains(
            self.sources,
            memoize=self.cache_source_support,
            max_entries=self.source_support_cache_max_entries,
        )
        _require_known(chains.links, self)
        _require_safe_timeouts(chains.links, self)
        default_cache = _default_cache(self)
        sources = tuple(link.source for link in chains.links)
        managed = (*sources, default_cache or self.cache, self.metrics, self.events)
        closed = {id(each): each for each in managed if each is not None and self.manage_lifecycle}
        self._sinks = ObservabilitySinks(
            self.metrics,
            self.events,
            buffer=self.buffer_observability,
            max_pending=self.observability_max_pending,
            overflow=self.observability_overflow,
        )
        self._use(sources=sources, metrics=self._sinks.metrics, events=self._sinks.events)
        self._use_unless_given(cache=default_cache, clock=protocols.SystemClock())
        self._use_unless_given(default_policy=FreshnessPolicy(1.0, 10.0))
        self._use_unless_given(
            policy_resolver=PolicyResolver(self.default_policy),
            authority_resolver=AuthorityPolicyResolver(self.authority_policy),
            observation_policy=ObservationPolicy(),
            circuit_breaker=CircuitBreaker(clock=self.clock),
            retry_policy=RetryPolicy(),
        )
        require_authority_aware(self.cache, self.authority_resolver)
        resilience = SourceResiliencePolicy(self.retry_policy, self.circuit_breaker.default_policy)
        self._use_unless_given(default_resilience=resilience)
        resolver = ResiliencePolicyResolver(self.default_resilience, self.source_resilience)
        self._use_unless_given(resilience_resolver=resolver)
        used = getattr(self.resilience_resolver, "default", self.default_resilience)
        if self.circuit_breaker.default_policy not in (used.circuit, CircuitBreakerPolicy()):
            LOGGER.warning("the policy of circuit_breaker is not used, as another takes its place")
        self._use(retry_policy=used.retry)
        self.capacity: CapacityController = _capacity(chains.links, self)
        parts = self._parts(chains)
        self._engine = Engine(parts, contextvars.copy_context())
        self._closing = Closing(self._engine, default_cache, self._sinks, [*closed.values()])
        self.publisher: ResourcePublisher = ResourcePublisher.sharing(
            parts.access,
            parts.report,
            self._engine.enter,
            clock=self.clock,
            policy_resolver=self.policy_resolver,
            observation_policy=self.observation_policy,
            authority_resolver=self.authority_resolver,
            metrics=self.metrics,
            events=self.events,
        )

    def _use(self, **chosen: Any) -> None:
        """Have attributes tell what is used, instead of what was given."""
        for name, value in chosen.items():
            object.__setattr__(self, name, value)

    def _use_unless_given(self, **defaults: Any) -> None:
        self._use(**{name: each for name, each in defaults.items() if getattr(self, name) is None})

    def _parts(self, chains: Chains) -> Parts:
        """Return what the engine works with."""
        threads = WorkerThreads()
        copies = PayloadCopies(
            "builder",
            copier=self.payload_copier,
            run_in_thread=self.run_payload_copies_in_thread,
            max_concurrency=self.max_copy_concurrency,
            threads=threads,
        )
        # As it is, now that it is known which copier it is about.
        self._use(run_payload_copies_in_thread=copies.run_in_thread)
        pending = self.max_pending_tasks or self.max_concurrency
        report = self._sinks.reporter()
        access = CacheAccess(
            self.cache,
            copies,
            pending,
            self.observation_policy,
            None if report is None else report.cache_failed,
            self._sinks.log,
        )
        return Parts(
            clock=protocols.checked(self.clock),
            chains=chains,
            policies=self.policy_resolver,
            authority=self.authority_resolver,
            observation=self.observation_policy,
            capacity=self.capacity,
            breaker=self.circuit_breaker,
            resilience=self.resilience_resolver,
            access=access,
            copies=copies,
            report=report,
            log=self._sinks.log,
            threads=threads,
            tracing=Tracing(float(self.trace), self.tracer, self._sinks.sink_log),
            pace=access.calls.pace,
            max_concurrency=self.max_concurrency,
            max_pending_tasks=pending,
            transport_grace_seconds=self.source_transport_timeout_grace_seconds,
        )

    async def build(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
        trace: bool | None = None,
    ) -> Snapshot:
        """Return one snapshot of `keys`.

        Args:
            keys: what is needed; at least one.
            strict: raise if any key has no value; else the snapshot says so in `errors`.
            deadline_seconds: how long it may take, all in all.
            metadata: told to the sources in their context.
            snapshot_id: an id of your own; a fresh unique one by default.
            trace: whether the snapshot tells how it came about; as the builder's setting says by
                default.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the partial snapshot.
            ValueError: no keys.
        """
        if type(strict) is not bool:
            flag("strict", strict)
        wanted = distinct_keys("keys", keys)
        if not wanted:
            raise ValueError("keys must name at least one resource, got none")
        if deadline_seconds is None and metadata is None and snapshot_id is None and trace is None:
            crowd = self._engine.crowd_of(wanted, self._open_work)
            if crowd is not None:
                return await sessions.together(self._engine, crowd, strict)
            warm = self._engine.warm_reads.snapshot(wanted, strict=strict)
            terms = None
        else:
            terms = Terms.of(self._engine, deadline_seconds, metadata, trace)
            warm = terms.at_hand(wanted, snapshot_id, strict=strict)
        if warm is not None:
            return warm
        opened = (terms or Terms.of(self._engine, None, None, None)).open(snapshot_id)
        return sessions.accepted(*await opened.answer(wanted, strict=strict))

    def _open_work(self) -> Work:
        return Terms.of(self._engine, None, None, None).open().work

    async def build_request(
        self,
        request: SnapshotRequest,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
        trace: bool | None = None,
    ) -> Snapshot:
        """Return one snapshot for a request: its required keys have values, and its policies hold.

        Args are those of `build`.

        Raises:
            SnapshotBuildError: a required key failed; it holds the partial snapshot.
            SnapshotConsistencyError: observations lie too far apart.
            SnapshotAcceptanceError: values are not acceptable.
        """
        instance("request", request, SnapshotRequest)
        terms = Terms.of(self._engine, deadline_seconds, metadata, trace)
        return sessions.accepted(*await terms.answer(request, snapshot_id))

    async def try_request(
        self,
        request: SnapshotRequest,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
        trace: bool | None = None,
    ) -> RequestResult:
        """Return what comes of a request, whatever that is, where `build_request` would raise.

        A deadline, a source that is down and an error of a policy are told by the result; raised
        is what is wrong with an argument, and that the builder is closed, before or meanwhile.

        Args are those of `build`.
        """
        instance("request", request, SnapshotRequest)
        self._engine.enter()
        terms = Terms.of(self._engine, deadline_seconds, metadata, trace)
        return sessions.result_of(request, *await terms.answer(request, snapshot_id))

    @sessions.in_same_form
    async def try_requests(
        self,
        requests: Requests,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        trace: bool | None = None,
        max_concurrency: int | None = None,
    ) -> Results:
        """Return what comes of each of many requests, in their order, or by the names they have.

        Each has a snapshot and an outcome of its own, and shares calls with the others as builds
        do. Cancelling the caller cancels all of them.

        Args:
            requests: any number of them, or a mapping from names to them.
            deadline_seconds: how long all of them together may take; who is late says so.
            metadata: told to the sources in their context.
            trace: whether the snapshots tell how they came about.
            max_concurrency: how many are under way at once; `max_pending_tasks` by default.

        Raises what `try_request` raises.
        """
        self._engine.enter()
        terms = Terms.of(self._engine, deadline_seconds, metadata, trace)
        return await sessions.several(
            self._engine.parts,
            requests,
            lambda request: terms.for_another().answer(request),
            max_concurrency,
            terms.known,
        )

    def session(
        self,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
        trace: bool | None = None,
    ) -> SnapshotSession:
        """Open a session; its deadline runs from now. Args are those of `build`."""
        terms = Terms.of(self._engine, deadline_seconds, metadata, trace)
        return SnapshotSession(terms.open(snapshot_id, lasting=True))

    def recent_traces(self) -> tuple[Trace, ...]:
        """Return the last 32 traces of builds, sessions and refreshes, the latest last."""
        return self._engine.parts.tracing.recent()

    # Looking in -------------------------------------------------------------------------------

    async def health_snapshot(self) -> BuilderHealth:
        """Return the state of the builder and its counters, without asking any source."""
        return self._health(await self._engine.parts.access.stats())

    def health_snapshot_nowait(self) -> BuilderHealth:
        """Return the same at once, from any thread: ``cache`` is None if it has to be awaited."""
        store = self._engine.parts.access.store
        return self._health(None if store is None else store.stats())

    def _health(self, cache_stats: Any) -> BuilderHealth:
        """Return the state of a builder and its counters; any thread may ask for it."""
        engine, parts = self._engine, self._engine.parts
        cache, calls = parts.access.cache, parts.access.calls.counts
        components = {"builder": parts.copies.health()}
        if isinstance(cache, AsyncMemoryCache):
            components["cache"] = cache.copy_health_snapshot()
        capacity, buffers = parts.capacity.view(), self._sinks.stats()
        links = parts.chains.links
        guarantees = {link.name: link.guarantee for link in links}
        violations = parts.counters.source_transport_timeout_violations.copy()
        unbuffered = parts.tracing.failures + (0 if parts.report is None else parts.report.failures)
        copies, blocking, sinks = components.values(), guarantees.values(), buffers.values()
        return BuilderHealth(
            closed=engine.closed,
            background_refreshes=engine.flights.refresher.active,
            failing_refreshes=len(engine.flights.refresher.failing),
            singleflight_in_flight=len(engine.flights.board.flights),
            source_support_cache_entries=parts.chains.entries,
            capacity=capacity,
            cache=cache_stats,
            cache_left_alone=parts.access.calls.is_left_alone,
            cache_call_count=calls["calls"],
            cache_failure_count=calls["failures"],
            cache_timeout_count=calls["timeouts"],
            circuits=parts.breaker.counted(),
            sources={link.name: link.health(parts.clock.monotonic()) for link in links},
            active_dispatch_workers=engine.workers,
            waiting_for_capacity=sum(each.waiting for each in capacity.values()),
            **{**vars(parts.counters), "source_transport_timeout_violations": violations},
            source_timeout_guarantees=guarantees,
            blocking_source_count=sum(each.blocking_io for each in blocking),
            protected_blocking_source_count=sum(each.protected for each in blocking),
            unsafe_blocking_source_count=sum(each.unsafe for each in blocking),
            undeclared_source_timeout_count=sum(not each.declaration_present for each in blocking),
            source_transport_timeout_violation_count=sum(violations.values()),
            payload_copy_components=components,
            active_payload_copies=sum(each.active_copies for each in copies),
            waiting_for_copy_capacity=sum(each.waiting_for_capacity for each in copies),
            payload_copy_shutdown_incomplete=any(each.shutdown_incomplete for each in copies),
            **{f"payload_copy_{it}": sum(getattr(one, it) for one in copies) for it in _COPY_SUMS},
            unfinished_source_calls=self._closing.unfinished,
            observability_buffers=buffers,
            observability_pending=sum(each.pending for each in sinks),
            observability_peak_pending=sum(each.peak_pending for each in sinks),
            observability_dropped_count=sum(each.dropped for each in sinks),
            observability_failure_count=sum(each.failures for each in sinks) + unbuffered,
            observability_shutdown_incomplete=any(
                each.closed and each.worker_alive and each.shutdown_timeout_count for each in sinks
            ),
            observability_shutdown_timeout_count=sum(each.shutdown_timeout_count for each in sinks),
        )

    async def capacity_snapshot(self) -> dict[str, CapacitySnapshot]:
        """Return the state of every capacity limit, the builder's own under ``__global__``."""
        return await self.capacity.snapshot()

    def flights_under_way(self, *, limit: int = 100) -> tuple[FlightSnapshot, ...]:
        """Return where the acquisitions under way stand, the oldest first; so many at most."""
        integer("limit", limit, minimum=1)
        flights = self._engine.flights.board.flights.copy().values()
        return tuple([flight.view() for flight in islice(flights, min(limit, len(flights)))])

    def clear_source_support_cache(self) -> None:
        """Forget which keys the sources said to support."""
        self._engine.parts.chains.forget()

    async def wait_for_refreshes(self) -> None:
        """Wait for the background refreshes that are scheduled at this moment."""
        self._engine.attach()
        await self._engine.flights.refresher.wait()

    # The end ----------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the builder takes no more work."""
        return self._engine.closed

    async def aclose(
        self,
        *,
        cancel_refreshes: bool = False,
        copy_shutdown_timeout_seconds: float | None = None,
        observability_shutdown_timeout_seconds: float | None = None,
        shutdown_timeout_seconds: float | None = None,
    ) -> None:
        """Close the builder: end what is under way, then copies, then sinks, then what it manages.

        Every stage runs even if one fails. Closing again does nothing, or waits for the closing
        that is under way. Cancelling the caller leaves the closing going on; it ends in time.

        Args:
            cancel_refreshes: give up background refreshes instead of waiting for them.
            copy_shutdown_timeout_seconds: how long to wait for running copies, for background
                refreshes, and for sources that do not end; the builder's setting by default. Each
                managed part has as long to close, or as long as the buffers if that is longer.
            observability_shutdown_timeout_seconds: how long to wait for buffers to empty; the
                builder's setting by default.
            shutdown_timeout_seconds: how long all of it together may take; no limit by default. A
                stage that comes when the time is used up has a tenth of a second.

        Raises:
            RuntimeError: the builder has work under way on another event loop.
            SourceTimeoutError: a background refresh had to be cancelled, or a call to a source, or
                the cache, still runs: in a thread, or as it ignores its cancellation.
            PayloadCopyShutdownTimeoutError: copies still run.
            ObservabilityShutdownTimeoutError: a buffer has not been emptied.
            TimeoutError: a managed part did not close in time.
            Exception: what the closing of a managed part raised.
        """
        total = number(
            "shutdown_timeout_seconds", shutdown_timeout_seconds, minimum=0, optional=True
        )
        limits = Limits(
            self._seconds("copy_shutdown_timeout_seconds", copy_shutdown_timeout_seconds),
            self._seconds(
                "observability_shutdown_timeout_seconds", observability_shutdown_timeout_seconds
            ),
            math.inf if total is None else total,
            flag("cancel_refreshes", cancel_refreshes),
            self.observability_drain_on_shutdown,
        )
        self._engine.attach()
        await self._closing.close(limits)

    def _seconds(self, name: str, given: float | None) -> float:
        """Return how long a stage of closing may take: as given, or else by the setting."""
        checked = number(name, given, minimum=0, optional=True)
        seconds: float = getattr(self, name) if checked is None else checked
        return seconds

    async def wait_for_payload_copy_shutdown(self) -> None:
        """Wait, however long, until no payload copy of a closed builder is running."""
        await self._closing.wait_for_copies()

    async def wait_for_observability_shutdown(self) -> None:
        """Wait, however long, until the buffers of a closed builder are empty."""
        await self._closing.wait_for_observability()

    async def wait_for_background_shutdown(self) -> None:
        """Wait, however long, for both payload copies and buffers of a closed builder."""
        await self._closing.wait_for_copies()
        await self._closing.wait_for_observability()

    async def __aenter__(self) -> SnapshotBuilder:
        self._engine.require_open()
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        with gives_way(error):
            await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        names = [link.name for link in self._engine.parts.chains.links]
        return f"<SnapshotBuilder {state}: {' > '.join(names) or 'no sources'}>"


# What Python says of a wrong argument names the class that was called.
BuilderArguments.__init__.__qualname__ = f"{SnapshotBuilder.__qualname__}.__init__"
