"""The snapshot builder: configuration, and the calls that applications make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from coalestra.concurrency.copying import PayloadCopier
from coalestra.core.authority import AuthorityPolicyResolver, SourceAuthorityPolicy
from coalestra.core.clock import Clock
from coalestra.core.errors import SnapshotBuildError
from coalestra.core.freshness import FreshnessPolicy, ObservationPolicy, PolicyResolver
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import AsyncCache, EventSink, MetricsSink, Source
from coalestra.core.snapshot import Snapshot
from coalestra.core.validation import flag, instance
from coalestra.observability.overflow import BufferOverflowPolicy
from coalestra.orchestration.arguments import BuilderArguments
from coalestra.orchestration.assembly import assemble
from coalestra.orchestration.lifecycle import ClosableBuilder
from coalestra.orchestration.settings import BuilderSettings
from coalestra.orchestration.unit import distinct, open_unit
from coalestra.resilience.backoff import RetryPolicy
from coalestra.resilience.circuit_breaker import CircuitBreaker
from coalestra.resilience.policies import ResiliencePolicyResolver, SourceResiliencePolicy

if TYPE_CHECKING:
    from coalestra.core.request import SnapshotRequest
    from coalestra.orchestration.session import SnapshotSession


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
            raise SnapshotBuildError(snapshot.errors, snapshot=snapshot)
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
        from coalestra.core.request import SnapshotRequest
        from coalestra.orchestration.judging import Judge

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
        from coalestra.orchestration.session import SnapshotSession

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
