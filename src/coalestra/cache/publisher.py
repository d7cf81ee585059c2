"""Publishing events into a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from coalestra.cache.access import CacheAccess, access_to
from coalestra.cache.memory import close_copies
from coalestra.cache.store import best_per_key
from coalestra.concurrency.copying import OFFLOADED, PayloadCopier, PayloadCopies, Sealed
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.sealing import PORTION
from coalestra.core import validation
from coalestra.core.errors import SourceProtocolError
from coalestra.core.frozen import EMPTY, FrozenDict, immutable
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    AuthorityPolicyProvider,
    AuthorityPolicyResolver,
    FreshnessPolicy,
    FreshnessPolicyProvider,
    FutureObservation,
    ObservationPolicy,
    judge_observation,
)
from coalestra.core.protocols import AsyncCache, AuthorityAwareCache, Clock, EventSink, MetricsSink
from coalestra.core.results import CacheWriteStatus, PublishResult, PublishStatus
from coalestra.core.values import ResourceUpdate, Revision, SnapshotValue, next_version
from coalestra.observability.reports import Reporter, reporter_for

# From an event to what is offered to the cache: judged, ranked and stamped -----------------------


SEALING = "published value"
_PUBLISHED_MARK: FrozenDict[str, Any] = FrozenDict({"published": True})


class Publication:
    """One event on its way into the cache; each stage adds what the next one needs.

    Attributes:
        update: the event; its value and metadata are still the caller's.
        key: the resource it tells of.
        observed_at: when it was true, in wall-clock seconds.
        authority_rank: how much its source counts in the write order.
        policy: what its key's readers may use.
        revision: what is offered to the cache; there once it is sealed.
        status, current, previous: what became of it, see `Written`; there once it is written.
    """

    __slots__ = (
        "authority_rank",
        "current",
        "key",
        "observed_at",
        "policy",
        "previous",
        "revision",
        "status",
        "update",
    )

    revision: Revision
    status: CacheWriteStatus
    current: Revision
    previous: Revision | None

    def __init__(
        self,
        update: ResourceUpdate[Any],
        key: ResourceKey,
        observed_at: float,
        authority_rank: int,
        policy: FreshnessPolicy,
    ) -> None:
        self.update: ResourceUpdate[Any] = update
        self.key: ResourceKey = key
        self.observed_at: float = observed_at
        self.authority_rank: int = authority_rank
        self.policy: FreshnessPolicy = policy

    def __repr__(self) -> str:
        return f"<Publication {self.key} of rank {self.authority_rank} from {self.update.source}>"

    def stamp(self, sealed: Sealed, copies: PayloadCopies, now: float) -> None:
        """Make the revision published at ``now``, around its sealed payload.

        Raises `PayloadIsolationError` if its metadata cannot be copied.
        """
        update, observed_at = self.update, self.observed_at
        metadata = _PUBLISHED_MARK
        if update.metadata or observed_at > now:
            told = {**update.metadata, "published": True}
            if observed_at > now:
                told["clock_skew_seconds"] = observed_at - now
            metadata = copies.seal_metadata_now(told, context=SEALING)
        payload, seal = sealed
        self.revision = Revision(
            self.key,
            payload,
            seal,
            update.source,
            observed_at,
            now,
            next_version(),
            0.0,
            0,
            metadata,
            self.authority_rank,
        )


@immutable
@dataclasses.dataclass(frozen=True, slots=True)
class PublicationRules:
    """What an event is judged by: the clock, and the policies for its key and source.

    An ``authority_resolver`` under which every rank is 0 is not kept.
    """

    clock: Clock
    policy_resolver: FreshnessPolicyProvider
    observation_policy: ObservationPolicy
    authority_resolver: AuthorityPolicyProvider | None = None

    def __post_init__(self) -> None:
        resolver = self.authority_resolver
        if type(resolver) is AuthorityPolicyResolver and not resolver.has_rules:
            object.__setattr__(self, "authority_resolver", None)

    def judge(self, update: ResourceUpdate[Any], now: float) -> Publication:
        """Return the publication of ``update`` at ``now``.

        Raises `SourceProtocolError` if it was observed further in the future than allowed.
        """
        key, observed_at = update.key, now
        if update.observed_at is not None:
            observed_at = float(update.observed_at)
            if observed_at > now:
                self._judge_future(update, observed_at, now)
        rank, resolver = 0, self.authority_resolver
        if resolver is not None:
            rank = resolver.rank_for(key, update.source)
        return Publication(update, key, observed_at, rank, self.policy_resolver.resolve(key))

    def _judge_future(self, update: ResourceUpdate[Any], observed_at: float, now: float) -> None:
        try:
            judge_observation(observed_at, now, self.observation_policy)
        except FutureObservation as rejection:
            raise SourceProtocolError(
                f"{update.source} published {update.key} with a time in the future: {rejection}"
            ) from rejection


# Carrying publications out: announce, seal, write, report, and copy the outcome out --------------


_OUT = "publish result"
_STORED = CacheWriteStatus.STORED
_PUBLISHED = PublishStatus.PUBLISHED
_STATUS = {
    CacheWriteStatus.IGNORED_OLDER: PublishStatus.IGNORED_OLDER,
    CacheWriteStatus.IGNORED_DUPLICATE: PublishStatus.IGNORED_DUPLICATE,
    CacheWriteStatus.IGNORED_LOWER_AUTHORITY: PublishStatus.IGNORED_LOWER_AUTHORITY,
}


class Publishing:
    """The work behind a publisher, over one cache with one component's copies."""

    __slots__ = ("_access", "_copies", "_reporter", "_rules")

    def __init__(
        self,
        access: CacheAccess,
        copies: PayloadCopies,
        rules: PublicationRules,
        reporter: Reporter | None,
    ) -> None:
        self._access = access
        self._copies = copies
        self._rules = rules
        self._reporter = reporter

    def __repr__(self) -> str:
        return f"Publishing({self._access!r})"

    async def publish(
        self, updates: Iterable[ResourceUpdate[Any]], *, force: bool, replace_equal: bool
    ) -> dict[ResourceKey, PublishResult]:
        """Offer the best update per key to the cache; nothing is written if one is unfit."""
        run = _Run(self._access, self._copies, self._rules)
        try:
            best = await run.judge(updates)
            await run.seal(best)
            await run.write(best, force, replace_equal)
        finally:
            run.conclude()
        if self._reporter is not None:
            for publication in best:
                _report(self._reporter, publication, force)
        return await run.results(best)

    async def invalidate(self, keys: Collection[ResourceKey], reason: str) -> None:
        """Remove ``keys`` from the cache."""
        await self._access.invalidate(keys)
        if self._reporter is not None:
            for key in keys:
                self._reporter.resource_invalidated(key, reason)


class _Run:
    """One call of `Publishing.publish`.

    Before anything is awaited, whatever has been judged so far is announced, so that a fetch under
    way cannot slip in between an event and its writing.
    """

    __slots__ = ("_access", "_announced", "_copies", "_judged", "_now", "_pace", "_rules")

    def __init__(self, access: CacheAccess, copies: PayloadCopies, rules: PublicationRules) -> None:
        self._now = rules.clock.now()
        self._access = access
        self._copies = copies
        self._rules = rules
        self._judged: list[Publication] = []
        self._announced = 0
        self._pace = Pace()

    async def judge(self, updates: Iterable[ResourceUpdate[Any]]) -> list[Publication]:
        """Return the best publication per key; raises for the first that is unfit."""
        judge, judged, now = self._rules.judge, self._judged, self._now
        for update in updates:
            judged.append(judge(update, now))
            if not len(judged) % PORTION and self._pace.due:
                await self._breathe()
        return list(best_per_key(judged).values())

    async def seal(self, publications: Iterable[Publication]) -> None:
        """Make a revision of each, with a sealed payload."""
        copies, now = self._copies, self._now
        for each in publications:
            value = each.update.value
            sealed = copies.seal_now(value, context=SEALING)
            if sealed is None:
                self._announce()
                sealed = await copies.seal(value, context=SEALING)
            each.stamp(sealed, copies, now)
            if self._pace.due:
                await self._breathe()

    async def write(
        self, publications: Collection[Publication], force: bool, replace_equal: bool
    ) -> None:
        """Offer the revisions to the cache, and note what became of each."""
        store = self._access.store
        if store is None:
            self._announce()
            revisions = [each.revision for each in publications]
            written = await self._access.write(
                revisions, force=force, replace_equal=replace_equal, want_previous=True
            )
            for each in publications:
                each.status, each.current, each.previous = written[each.key]
            return
        put = store.put
        for number, each in enumerate(publications, 1):
            outcome = put(each.revision, force=force, replace_equal=replace_equal)
            each.status, each.current, each.previous = outcome
            if not number % PORTION and self._pace.due:
                await self._breathe()

    def conclude(self) -> None:
        """Declare everything that was announced ended."""
        if self._announced:
            self._access.conclude(self._judged[: self._announced])

    async def results(
        self, publications: Iterable[Publication]
    ) -> dict[ResourceKey, PublishResult]:
        """Return what became of each, with copies of what the cache holds now and held before."""
        results = {}
        copies, pace = self._copies, self._pace
        left = PORTION
        for each in publications:
            ttl = each.policy.ttl_seconds
            current, previous = each.current, each.previous
            stored = each.status is _STORED
            payload = copies.open_now(current.payload, current.seal, context=_OUT)
            if payload is OFFLOADED:
                payload = await copies.open(current.payload, current.seal, context=_OUT)
            value = self._presented(current, payload, ttl, not stored)
            left -= current.seal.weight
            before = None
            if previous is not None:
                payload = copies.open_now(previous.payload, previous.seal, context=_OUT)
                if payload is OFFLOADED:
                    payload = await copies.open(previous.payload, previous.seal, context=_OUT)
                before = self._presented(previous, payload, ttl, True)
                each.previous = None  # large ones are let go one by one, not all at the end
                left -= previous.seal.weight
            status = _PUBLISHED if stored else _STATUS[each.status]
            results[each.key] = PublishResult(status, value, before)
            if left <= 0:
                left = PORTION
                if pace.due:
                    await pace.rest()
        return results

    def _presented(
        self, revision: Revision, payload: Any, ttl_seconds: float, from_cache: bool
    ) -> SnapshotValue[Any]:
        age = max(0.0, self._now - revision.observed_at)
        metadata = revision.metadata
        if type(metadata) is not FrozenDict:
            metadata = self._copies.open_metadata_now(metadata, context=_OUT)
        return revision.presented(payload, metadata, age, age > ttl_seconds, from_cache)

    def _announce(self) -> None:
        news = self._judged[self._announced :]
        if news:
            self._announced += len(news)
            self._access.announce(news)

    async def _breathe(self) -> None:
        self._announce()
        await self._pace.rest()


def _report(reporter: Reporter, publication: Publication, force: bool) -> None:
    revision, status = publication.revision, publication.status
    if status is _STORED:
        replaced = publication.previous is not None
        reporter.resource_published(revision, replaced=replaced, forced=force)
    else:
        reporter.resource_publish_ignored(revision, publication.current, _STATUS[status])


# Publishing events into a cache ------------------------------------------------------------------


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
