"""Publishing events into a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from coalestra.cache.access import CacheAccess, access_to
from coalestra.cache.closing import close_copies
from coalestra.cache.publication import PublicationRules
from coalestra.cache.publishing import Publishing
from coalestra.concurrency.copying import PayloadCopier, PayloadCopies
from coalestra.core import validation
from coalestra.core.authority import AuthorityPolicyResolver
from coalestra.core.clock import Clock
from coalestra.core.freshness import FreshnessPolicyProvider, ObservationPolicy
from coalestra.core.frozen import EMPTY
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import AsyncCache, AuthorityAwareCache, EventSink, MetricsSink
from coalestra.core.published import PublishResult
from coalestra.core.values import ResourceUpdate
from coalestra.observability.reporting import Reporter, reporter_for


def _nothing_to_check() -> None:
    """Stand in for a check that never refuses."""


@dataclasses.dataclass(frozen=True)
class PublisherParts:
    """What a publisher works with; a builder fills this in to share its own parts.

    ``check_open`` is called first by every operation and raises if nothing may be published any
    more. ``owns_copies`` says whether closing the publisher closes the copies.
    """

    access: CacheAccess
    copies: PayloadCopies
    rules: PublicationRules
    metrics: MetricsSink
    events: EventSink
    reporter: Reporter | None
    max_pending_tasks: int
    check_open: Callable[[], object] = _nothing_to_check
    owns_copies: bool = False


class ResourcePublisher:
    """Writes what happened into a cache, by the write order: an event never undoes a later one.

    ``lock_stripes`` is accepted for compatibility and has no effect: writers of one key take
    turns, however many keys there are. ``max_pending_tasks`` bounds the tasks used with a cache
    that has single-key methods only.
    """

    def __init__(
        self,
        *,
        cache: AsyncCache,
        clock: Clock,
        policy_resolver: FreshnessPolicyProvider,
        metrics: MetricsSink,
        events: EventSink,
        observation_policy: ObservationPolicy | None = None,
        lock_stripes: int = 64,
        payload_copier: PayloadCopier | None = None,
        run_payload_copies_in_thread: bool | None = None,
        max_copy_concurrency: int = 4,
        authority_resolver: AuthorityPolicyResolver | None = None,
        max_pending_tasks: int = 8,
    ) -> None:
        validation.integer("lock_stripes", lock_stripes, minimum=1)
        validation.integer("max_pending_tasks", max_pending_tasks, minimum=1)
        validation.instance(
            "observation_policy", observation_policy, ObservationPolicy, optional=True
        )
        require_authority_aware(cache, authority_resolver)
        copies = PayloadCopies(
            "publisher",
            copier=payload_copier,
            run_in_thread=run_payload_copies_in_thread,
            max_concurrency=max_copy_concurrency,
        )
        self._parts = PublisherParts(
            access=access_to(cache, copies, max_pending_tasks),
            copies=copies,
            rules=PublicationRules(
                clock,
                policy_resolver,
                observation_policy or ObservationPolicy(),
                authority_resolver,
            ),
            metrics=metrics,
            events=events,
            reporter=reporter_for(metrics, events),
            max_pending_tasks=max_pending_tasks,
            owns_copies=True,
        )
        self._publishing = _publishing(self._parts)

    @classmethod
    def from_parts(cls, parts: PublisherParts) -> ResourcePublisher:
        """Return a publisher over parts that somebody else owns."""
        publisher = cls.__new__(cls)
        publisher._parts = parts
        publisher._publishing = _publishing(parts)
        return publisher

    def __repr__(self) -> str:
        return f"ResourcePublisher({self._parts.access!r})"

    @property
    def cache(self) -> AsyncCache:
        """The cache published into."""
        return self._parts.access.cache

    @property
    def clock(self) -> Clock:
        """The clock that stamps publications."""
        return self._parts.rules.clock

    @property
    def metrics(self) -> MetricsSink:
        """The sink of counters."""
        return self._parts.metrics

    @property
    def events(self) -> EventSink:
        """The sink of events."""
        return self._parts.events

    @property
    def max_pending_tasks(self) -> int:
        """The most tasks used at a time with a cache that has single-key methods only."""
        return self._parts.max_pending_tasks

    async def publish(
        self,
        key: ResourceKey,
        value: Any,
        *,
        source: str,
        observed_at: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        replace_equal: bool = False,
    ) -> PublishResult:
        """Publish one value; ``observed_at`` (wall seconds) None means now.

        ``force`` writes whatever is there; ``replace_equal`` replaces a value of the same rank
        and time. The result tells what became of it, with copies of what the cache holds now and
        held before. Raises ValueError for a time that is not finite, `SourceProtocolError` for
        one too far in the future, `PayloadIsolationError` for a value that cannot be copied.
        """
        told = EMPTY if metadata is None else metadata
        update = ResourceUpdate(key, value, source, observed_at, told)
        return await self.publish_update(update, force=force, replace_equal=replace_equal)

    async def publish_update(
        self, update: ResourceUpdate[Any], *, force: bool = False, replace_equal: bool = False
    ) -> PublishResult:
        """Publish one update; see `publish`."""
        validation.instance("update", update, ResourceUpdate)
        results = await self._publish((update,), force, replace_equal)
        return results[update.key]

    async def publish_many(
        self,
        updates: Collection[ResourceUpdate[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, PublishResult]:
        """Publish the best update per key, whatever their order; see `publish`.

        Between updates of equal rank and time the later one counts. If one update is unfit,
        nothing is written.
        """
        captured = tuple(updates)
        for update in captured:
            if type(update) is not ResourceUpdate:
                validation.instance("updates", update, ResourceUpdate)
        return await self._publish(captured, force, replace_equal)

    async def invalidate(self, key: ResourceKey, *, reason: str = "") -> None:
        """Remove ``key`` from the cache, so that the next reader fetches it."""
        await self.invalidate_many((key,), reason=reason)

    async def invalidate_many(self, keys: Collection[ResourceKey], *, reason: str = "") -> None:
        """Remove ``keys`` from the cache; ``reason`` goes into the events."""
        self._parts.check_open()
        validation.text("reason", reason, empty=True)
        unique = tuple(dict.fromkeys(keys))
        for key in unique:
            validation.instance("keys", key, ResourceKey)
        if unique:
            await self._publishing.invalidate(unique, reason)

    async def aclose(self, *, timeout_seconds: float | None = 5.0) -> None:
        """Refuse new publications and wait for running copies; shared parts are left alone.

        Raises `PayloadCopyShutdownTimeoutError` if copies still run after ``timeout_seconds``
        (None: no limit).
        """
        if self._parts.owns_copies:
            await close_copies(self._parts.copies, timeout_seconds)

    async def _publish(
        self, updates: tuple[ResourceUpdate[Any], ...], force: bool, replace_equal: bool
    ) -> dict[ResourceKey, PublishResult]:
        self._parts.check_open()
        validation.flag("force", force)
        validation.flag("replace_equal", replace_equal)
        return await self._publishing.publish(updates, force=force, replace_equal=replace_equal)


def require_authority_aware(cache: AsyncCache, resolver: AuthorityPolicyResolver | None) -> None:
    """Raise ValueError if ``resolver`` has rules that the cache does not promise to enforce."""
    if resolver is None or not resolver.has_rules:
        return
    if isinstance(cache, AuthorityAwareCache) and cache.validates_source_authority is True:
        return
    raise ValueError(
        "authority rules need a cache whose writes compare authority, got "
        f"{type(cache).__name__}; let it compare authority_rank and declare "
        "validates_source_authority = True"
    )


def _publishing(parts: PublisherParts) -> Publishing:
    return Publishing(parts.access, parts.copies, parts.rules, parts.reporter)
