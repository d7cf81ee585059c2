"""Publishing events into a cache: judged, sealed, written in one step, and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from coalestra.cache.access import CacheAccess
from coalestra.cache.memory import close_copies
from coalestra.cache.store import Listeners, Outcome, best_per_key
from coalestra.concurrency.copying import OFFLOADED, PayloadCopier, PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.sealing import PORTION
from coalestra.core import validation
from coalestra.core.errors import SourceProtocolError
from coalestra.core.frozen import EMPTY, FrozenDict
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
from coalestra.core.protocols import AsyncCache, Clock, EventSink, MetricsSink, now_of
from coalestra.core.results import CacheWriteStatus, PublishResult, PublishStatus
from coalestra.core.values import (
    ResourceUpdate,
    Revision,
    SnapshotValue,
    next_number,
    version_of,
)
from coalestra.observability.reports import Reporter, reporter_for

_IN = "published value"
_OUT = "publish result"
_STORED = CacheWriteStatus.STORED
_PUBLISHED = PublishStatus.PUBLISHED
_STATUS = {
    CacheWriteStatus.STORED: _PUBLISHED,
    CacheWriteStatus.IGNORED_OLDER: PublishStatus.IGNORED_OLDER,
    CacheWriteStatus.IGNORED_DUPLICATE: PublishStatus.IGNORED_DUPLICATE,
    CacheWriteStatus.IGNORED_LOWER_AUTHORITY: PublishStatus.IGNORED_LOWER_AUTHORITY,
}
_PUBLISHED_MARK: FrozenDict[str, Any] = FrozenDict({"published": True})


def _nothing_to_check() -> None:
    """Stand in for a check that never refuses."""


@dataclasses.dataclass(frozen=True)
class PublisherParts:
    """What a publisher works with; a builder fills this in to share its own parts.

    ``check_open`` is called first by every operation and raises if nothing may be published any
    more. ``owns_copies`` says whether closing the publisher closes the copies. An
    ``authority_resolver`` under which every rank is 0 is not kept.
    """

    access: CacheAccess
    copies: PayloadCopies
    clock: Clock
    policy_resolver: FreshnessPolicyProvider
    observation_policy: ObservationPolicy
    authority_resolver: AuthorityPolicyProvider | None
    metrics: MetricsSink
    events: EventSink
    reporter: Reporter | None
    max_pending_tasks: int
    check_open: Callable[[], object] = _nothing_to_check
    owns_copies: bool = False

    def __post_init__(self) -> None:
        resolver = self.authority_resolver
        if type(resolver) is AuthorityPolicyResolver and not resolver.has_rules:
            object.__setattr__(self, "authority_resolver", None)

    def judge(self, update: ResourceUpdate[Any], now: float) -> Revision:
        """Return the revision that an event makes at ``now``, still without its payload.

        Raises `SourceProtocolError` if it was observed further in the future than allowed.
        """
        observed_at, dated = update.observed_at, True
        if observed_at is None:
            observed_at, dated = now, False
        elif observed_at > now:
            self._judge_future(update, observed_at, now)
        rank, resolver = 0, self.authority_resolver
        if resolver is not None:
            rank = resolver.rank_for(update.key, update.source)
        number = next_number()
        return Revision(
            update.key,
            None,
            None,
            update.source,
            float(observed_at),
            now,
            version_of(number),
            0.0,
            0,
            _PUBLISHED_MARK,
            rank,
            EMPTY,
            (),
            dated,
            number,
        )

    def _judge_future(self, update: ResourceUpdate[Any], observed_at: float, now: float) -> None:
        try:
            judge_observation(observed_at, now, self.observation_policy)
        except FutureObservation as rejection:
            raise SourceProtocolError(
                f"{update.source} published {update.key.display} with a time in the future: "
                f"{rejection}"
            ) from rejection


class _Publication:
    """One call that publishes: judge, seal, write in one step, copy the outcome out.

    Before anything is awaited, whatever has been judged so far is announced, so that a fetch under
    way cannot slip in between an event and its writing; ``conclude`` always follows.
    """

    __slots__ = (
        "_announced",
        "_judged",
        "_listeners",
        "_now",
        "_pace",
        "_parts",
        "_policies",
        "outcomes",
    )

    def __init__(self, parts: PublisherParts) -> None:
        self._parts = parts
        self._now = now_of(parts.clock)
        self._pace = Pace()
        self._judged: list[Revision] = []
        self._policies: dict[ResourceKey, FreshnessPolicy] = {}
        self._announced = 0
        self._listeners: Listeners | None = None
        self.outcomes: list[Outcome] = []

    async def judge(self, updates: Sequence[ResourceUpdate[Any]]) -> dict[Revision, Any]:
        """Return the best revision per key and the event that it makes; all must be fit."""
        judge, judged, now = self._parts.judge, self._judged, self._now
        resolve, policies = self._parts.policy_resolver.resolve, self._policies
        for update in updates:
            judged.append(judge(update, now))
            policies[update.key] = resolve(update.key)
            if not len(judged) % PORTION and self._pace.due:
                await self._rest()
        if len(judged) == 1:
            return {judged[0]: updates[0]}
        if self._pace.due:
            await self._rest()
        made_of = dict(zip(judged, updates, strict=True))
        return {revision: made_of[revision] for revision in best_per_key(judged).values()}

    async def seal(self, best: Mapping[Revision, ResourceUpdate[Any]]) -> None:
        """Copy the payloads and the metadata in."""
        copies, now = self._parts.copies, self._now
        for revision, update in best.items():
            sealed = copies.seal_now(update.value, context=_IN)
            if sealed is None:
                self._announce()
                sealed = await copies.seal(update.value, context=_IN)
            revision.payload, revision.seal = sealed
            skew = revision.observed_at - now
            if update.metadata or skew > 0:
                told = {**update.metadata, "published": True}
                if skew > 0:
                    told["clock_skew_seconds"] = skew
                revision.metadata = copies.seal_metadata_now(told, context=_IN)
            if self._pace.due:
                await self._rest()

    async def write(self, best: Collection[Revision], force: bool, replace_equal: bool) -> None:
        """Offer the revisions to the cache, in one step if it is the library's own."""
        access = self._parts.access
        now = self._now if self._listeners is None else now_of(self._parts.clock)
        if access.store is not None and len(best) == 1:
            (revision,) = best
            outcome = access.store.put(revision, now=now, force=force, replace_equal=replace_equal)
            self.outcomes = [outcome]
        elif access.store is not None:
            self.outcomes = access.store.put_many(
                best, now=now, force=force, replace_equal=replace_equal
            )
        elif access.foreign is not None:
            self._announce()
            written = await access.foreign.publish(
                best, self._policies, now, force=force, replace_equal=replace_equal
            )
            self.outcomes = [written[each.key] for each in best]
        if self._pace.due:
            await self._rest()

    def conclude(self) -> None:
        """Declare everything that was announced ended."""
        if self._listeners is not None:
            self._listeners.concluded(self._judged[: self._announced])

    async def results(self) -> dict[ResourceKey, PublishResult]:
        """Return what became of each, with copies of what the cache holds now and held before."""
        results = {}
        copies, pace, policies = self._parts.copies, self._pace, self._policies
        left = PORTION
        for number, (status, current, previous) in enumerate(self.outcomes):
            key = current.key
            ttl, stored = policies[key].ttl_seconds, status is _STORED
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
                left -= previous.seal.weight
                # Large ones are let go one by one, not all at the end.
                self.outcomes[number] = (status, current, None)
                previous = None
            results[key] = PublishResult(_STATUS[status], value, before)
            if left <= 0:
                left = PORTION
                if pace.due:
                    await pace.rest()
        return results

    def _presented(
        self, revision: Revision, payload: Any, ttl_seconds: float, from_cache: bool
    ) -> SnapshotValue[Any]:
        metadata = revision.metadata
        if type(metadata) is not FrozenDict:
            metadata = self._parts.copies.open_metadata_now(metadata, context=_OUT)
        age = max(0.0, self._now - revision.observed_at)
        return revision.presented(payload, metadata, age, age > ttl_seconds, from_cache)

    def _announce(self) -> None:
        news = self._judged[self._announced :]
        if news:
            if self._listeners is None:
                self._listeners = self._parts.access.listeners
            self._announced += len(news)
            self._listeners.announced(news)

    async def _rest(self) -> None:
        self._announce()
        await self._pace.rest()


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
        observation = observation_policy or ObservationPolicy()
        reporter = reporter_for(metrics, events)
        self._parts = PublisherParts(
            access=CacheAccess(
                cache,
                copies,
                max_pending_tasks,
                observation,
                None if reporter is None else reporter.cache_failed,
            ),
            copies=copies,
            clock=clock,
            policy_resolver=policy_resolver,
            observation_policy=observation,
            authority_resolver=authority_resolver,
            metrics=metrics,
            events=events,
            reporter=reporter,
            max_pending_tasks=max_pending_tasks,
            owns_copies=True,
        )

    @classmethod
    def from_parts(cls, parts: PublisherParts) -> ResourcePublisher:
        """Return a publisher over parts that somebody else owns."""
        publisher = cls.__new__(cls)
        publisher._parts = parts
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
        return self._parts.clock

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
            if type(key) is not ResourceKey:
                validation.instance("keys", key, ResourceKey)
        if not unique:
            return
        await self._parts.access.invalidate(unique)
        if self._parts.reporter is not None:
            pace = Pace()
            for key in unique:
                self._parts.reporter.resource_invalidated(key, reason)
                await pace.keep()

    async def aclose(self, *, timeout_seconds: float | None = 5.0) -> None:
        """Refuse new publications and wait for running copies; shared parts are left alone.

        Raises `PayloadCopyShutdownTimeoutError` if copies still run after ``timeout_seconds``
        (None: no limit).
        """
        if self._parts.owns_copies:
            await close_copies(self._parts.copies, timeout_seconds)

    async def _publish(
        self, updates: Sequence[ResourceUpdate[Any]], force: bool, replace_equal: bool
    ) -> dict[ResourceKey, PublishResult]:
        """Offer the best update per key to the cache; nothing is written if one is unfit."""
        parts = self._parts
        parts.check_open()
        validation.flag("force", force)
        validation.flag("replace_equal", replace_equal)
        publication = _Publication(parts)
        try:
            best = await publication.judge(updates)
            await publication.seal(best)
            await publication.write(best, force, replace_equal)
        finally:
            publication.conclude()
        if parts.reporter is not None:
            pace = Pace()
            for revision, outcome in zip(best, publication.outcomes, strict=True):
                _report(parts.reporter, revision, outcome, force)
                await pace.keep()
        return await publication.results()


def _report(reporter: Reporter, revision: Revision, outcome: Outcome, force: bool) -> None:
    status, current, previous = outcome
    if status is _STORED:
        reporter.resource_published(revision, replaced=previous is not None, forced=force)
    else:
        reporter.resource_publish_ignored(revision, current, _STATUS[status])


def require_authority_aware(cache: AsyncCache, resolver: AuthorityPolicyResolver | None) -> None:
    """Raise ValueError if ``resolver`` has rules that the cache does not promise to enforce."""
    if resolver is None or not resolver.has_rules:
        return
    if getattr(cache, "validates_source_authority", False) is True:
        return
    raise ValueError(
        "authority rules need a cache whose writes compare authority, got "
        f"{type(cache).__name__}; let it compare authority_rank and declare "
        "validates_source_authority = True"
    )
