"""Publishing events into a cache: judged, sealed, written in one step, and told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from coalestra.cache.access import CacheAccess, Terms
from coalestra.cache.memory import close_copies, open_value, show_value
from coalestra.cache.store import Outcome, best_per_key
from coalestra.concurrency.copying import OFFLOADED, PayloadCopier, PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.sealing import PORTION
from coalestra.core import validation
from coalestra.core.errors import SourceProtocolError
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.policies import (
    AuthorityPolicyProvider,
    AuthorityPolicyResolver,
    FreshnessPolicy,
    FreshnessPolicyProvider,
    FutureObservation,
    ObservationPolicy,
    judge_observation,
    policy_for,
    policy_of_all,
    rank_of,
)
from coalestra.core.protocols import AsyncCache, Clock, EventSink, MetricsSink, checked
from coalestra.core.values import (
    CacheWriteStatus,
    PublishResult,
    PublishStatus,
    ResourceUpdate,
    Revision,
    SnapshotValue,
    check_update,
    next_number,
    unseen_result,
    version_of,
)
from coalestra.observability.reports import Reporter, reporter_for

_IN = "published value"
_OUT = "publish result"
_STORED = CacheWriteStatus.STORED
_PUBLISHED = PublishStatus.PUBLISHED
_PUBLISHED_MARK: FrozenDict[str, Any] = FrozenDict({"published": True})


@dataclasses.dataclass(frozen=True)
class PublisherParts:
    """What a publisher works with; a builder fills this in to share its own parts.

    ``check_open`` is called first by every operation and raises if nothing may be published any
    more. ``owns_copies`` says whether closing the publisher closes the copies. An
    ``authority_resolver`` under which every rank is 0 is not kept.
    """

    access: CacheAccess
    clock: Clock
    policy_resolver: FreshnessPolicyProvider
    observation_policy: ObservationPolicy
    authority_resolver: AuthorityPolicyProvider | None
    metrics: MetricsSink
    events: EventSink
    reporter: Reporter | None
    check_open: Callable[[], object] = lambda: None
    owns_copies: bool = False
    now: Callable[[], float] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "now", checked(self.clock).now)
        resolver = self.authority_resolver
        if type(resolver) is AuthorityPolicyResolver and not resolver.has_rules:
            object.__setattr__(self, "authority_resolver", None)

    def revision_of(
        self,
        key: ResourceKey,
        value: Any,
        source: str,
        observed_at: float | None,
        metadata: Mapping[str, Any],
        now: float,
    ) -> Revision:
        """Return the revision that an event makes at ``now``; without a seal if that takes waiting.

        Raises `SourceProtocolError` if it was observed further in the future than allowed.
        """
        resolver, number, dated = self.authority_resolver, next_number(), observed_at is not None
        told, copies = _PUBLISHED_MARK, self.access.copies
        observed_at = now if observed_at is None else float(observed_at)
        if observed_at > now:
            try:
                judge_observation(observed_at, now, self.observation_policy)
            except FutureObservation as rejection:
                raise SourceProtocolError(
                    f"{source} published {key.display} with a time in the future: {rejection}"
                ) from rejection
            metadata = {**metadata, "clock_skew_seconds": observed_at - now}
        if metadata:
            told = copies.seal_metadata_now({**metadata, "published": True}, context=_IN)
        payload, seal = copies.seal_now(value, context=_IN) or (value, None)
        rank = 0 if resolver is None else rank_of(resolver, key, source)
        return Revision(
            key, payload, seal, source, observed_at, now, version_of(number), 0.0, 0,
            told, rank, EMPTY, (), dated, number,
        )  # fmt: skip


def _report(reporter: Reporter, force: bool, offered: Revision, outcome: Outcome) -> None:
    """Report what became of a revision."""
    status, current, previous = outcome
    facts = {"resource": offered.key, "source": offered.source}
    if status is _STORED:
        reporter.tell(
            "resource_published",
            **facts,
            observed_at=offered.observed_at,
            replaced=previous is not None,
            forced=force,
            authority_rank=offered.authority_rank,
        )
    else:
        reporter.tell(
            "resource_publish_ignored",
            **facts,
            status=status.value,
            observed_at=offered.observed_at,
            cached_observed_at=current.observed_at,
            candidate_authority_rank=offered.authority_rank,
            cached_authority_rank=current.authority_rank,
        )


# What became of an event, with copies of what is held now and was before -------------------------


def _told(status: CacheWriteStatus) -> PublishStatus:
    return _PUBLISHED if status is _STORED else PublishStatus(status.value)


def _is_trifle(outcome: Outcome) -> bool:
    """Whether what it tells of is copied in next to no time, whenever somebody looks at it.

    What the cache holds is sealed: it never changes, and its copy is the same at any time.
    """
    _, current, previous = outcome
    return current.seal.weight < PORTION and (previous is None or previous.seal.weight < PORTION)


def _unseen(
    copies: PayloadCopies, offered: Revision, outcome: Outcome, policy: FreshnessPolicy, now: float
) -> PublishResult:
    """Return the result of an event that came to trifles; these are copied when looked at."""

    def shown(revision: Revision, from_cache: bool) -> SnapshotValue[Any]:
        # Even if copying has been closed since it was published.
        payload = revision.seal.opener(revision.payload)
        metadata = copies.open_metadata_now(revision.metadata, context=_OUT)
        return show_value(revision, payload, metadata, now, policy, from_cache)

    def look() -> tuple[SnapshotValue[Any], SnapshotValue[Any] | None]:
        after = shown(current, current is not offered)
        return after, None if previous is None else shown(previous, True)

    status, current, previous = outcome
    return unseen_result(_told(status), look)


async def _result(
    copies: PayloadCopies, offered: Revision, outcome: Outcome, policy: FreshnessPolicy, now: float
) -> PublishResult:
    """Return the result of one event; its payloads are copied here and now, or in a thread."""
    status, current, previous = outcome
    payload, before = copies.open_now(current.payload, current.seal, context=_OUT), None
    if payload is OFFLOADED:
        payload = await copies.open(current.payload, current.seal, context=_OUT)
    if previous is not None:
        before = await open_value(copies, previous, _OUT, now, policy, True)
    metadata = copies.open_metadata_now(current.metadata, context=_OUT)
    after = show_value(current, payload, metadata, now, policy, current is not offered)
    return PublishResult(_told(status), after, before)


@dataclasses.dataclass(eq=False, repr=False)
class _Results(Mapping[ResourceKey, PublishResult]):
    """What became of several events; the results of trifles are made for those who look."""

    copies: PayloadCopies
    offered: Mapping[ResourceKey, Revision]
    policy_of: Callable[[ResourceKey], FreshnessPolicy]
    now: float
    outcomes: dict[Revision, Outcome]
    results: dict[Revision, PublishResult] = dataclasses.field(default_factory=dict)

    async def complete(
        self, report: Callable[[Revision, Outcome], object] | None, pace: Pace
    ) -> None:
        """Report all, then copy those that are no trifles."""
        if report is not None:
            for offered, outcome in self.outcomes.items():
                report(offered, outcome)
                await pace.keep()
        is_direct = self.copies.is_direct
        for offered in [
            offered
            for offered, outcome in self.outcomes.items()
            if not (is_direct and _is_trifle(outcome))
        ]:
            # What was replaced is let go one by one.
            outcome, policy = self.outcomes.pop(offered), self.policy_of(offered.key)
            self.results[offered] = await _result(self.copies, offered, outcome, policy, self.now)
            del outcome
            await pace.keep()

    def __getitem__(self, key: ResourceKey) -> PublishResult:
        offered = self.offered[key]
        if offered in self.outcomes:
            outcome, policy = self.outcomes[offered], self.policy_of(offered.key)
            self.results[offered] = _unseen(self.copies, offered, outcome, policy, self.now)
            del self.outcomes[offered]
        return self.results[offered]

    def __iter__(self) -> Iterator[ResourceKey]:
        return iter(self.offered)

    def __len__(self) -> int:
        return len(self.offered)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


@contextmanager
def _announced(access: CacheAccess, keys: Collection[ResourceKey]) -> Iterator[None]:
    """Announce publications, so that no fetch slips in between an event and its writing.

    Not before their payloads are sealed, which may take any time: readers would wait for that.
    """
    listeners = access.listeners
    listeners.tell(lambda each: each.announced(keys))
    try:
        yield
    finally:
        listeners.tell(lambda each: each.concluded(keys))


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
        validation.instance(
            "authority_resolver", authority_resolver, AuthorityPolicyResolver, optional=True
        )
        validation.require_methods("cache", cache, "get", "set", "invalidate", "clear")
        for name, plug, *methods in (
            ("clock", clock, "now"),
            ("policy_resolver", policy_resolver, "resolve"),
            ("metrics", metrics, "increment", "observe"),
            ("events", events, "emit"),
        ):
            validation.require_methods(name, plug, *methods, plain=True)
        require_authority_aware(cache, authority_resolver)
        copies = PayloadCopies(
            "publisher",
            copier=payload_copier,
            run_in_thread=run_payload_copies_in_thread,
            max_concurrency=max_copy_concurrency,
        )
        observation = observation_policy or ObservationPolicy()
        reporter = reporter_for(metrics, events)
        failed = None if reporter is None else reporter.cache_failed
        self._parts = PublisherParts(
            access=CacheAccess(cache, copies, max_pending_tasks, observation, failed),
            clock=clock,
            policy_resolver=policy_resolver,
            observation_policy=observation,
            authority_resolver=authority_resolver,
            metrics=metrics,
            events=events,
            reporter=reporter,
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
        return self._parts.access.calls.limit

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
        parts, told = self._parts, EMPTY if metadata is None else metadata
        check_update(key, source, observed_at, told)
        now, store = self._begin(force, replace_equal), parts.access.store
        policy = policy_for(parts.policy_resolver, key)
        revision = parts.revision_of(key, value, source, observed_at, told, now)
        if store is None or revision.seal is None:
            return (await self._publish((key,), (revision,), now, force, replace_equal))[key]
        outcome = store.put(revision, now=now, force=force, replace_equal=replace_equal)
        if parts.reporter is not None:
            _report(parts.reporter, force, revision, outcome)
        copies = parts.access.copies
        if copies.is_direct and _is_trifle(outcome):
            return _unseen(copies, revision, outcome, policy, now)
        return await _result(copies, revision, outcome, policy, now)

    async def publish_update(
        self, update: ResourceUpdate[Any], *, force: bool = False, replace_equal: bool = False
    ) -> PublishResult:
        """Publish one update; see `publish`."""
        validation.instance("update", update, ResourceUpdate)
        return await self.publish(
            update.key,
            update.value,
            source=update.source,
            observed_at=update.observed_at,
            metadata=update.metadata,
            force=force,
            replace_equal=replace_equal,
        )

    async def publish_many(
        self,
        updates: Collection[ResourceUpdate[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, PublishResult]:
        """Publish the best update per key, whatever their order; see `publish`.

        Between updates of equal rank and time the later one counts. If one update is unfit,
        nothing is written. If a cache of your own fails for some keys, the first error is raised
        and the others are told as ``cache_failed``; all other keys have been published.
        """
        captured = tuple(validation.instance("updates", updates, Iterable))
        for update in captured:
            if type(update) is not ResourceUpdate:
                validation.instance("updates", update, ResourceUpdate)
        now = self._begin(force, replace_equal)
        made = (
            self._parts.revision_of(
                each.key, each.value, each.source, each.observed_at, each.metadata, now
            )
            for each in captured
        )
        keys = [each.key for each in captured]
        return await self._publish(keys, made, now, force, replace_equal)

    async def invalidate(self, key: ResourceKey, *, reason: str = "") -> None:
        """Remove ``key`` from the cache, so that the next reader fetches it."""
        await self.invalidate_many((key,), reason=reason)

    async def invalidate_many(self, keys: Collection[ResourceKey], *, reason: str = "") -> None:
        """Remove ``keys`` from the cache; ``reason`` goes into the events."""
        self._parts.check_open()
        validation.text("reason", reason, empty=True)
        unique = distinct_keys("keys", keys)
        if not unique:
            return
        failures = await self._parts.access.invalidate(unique)
        if self._parts.reporter is not None:
            pace = Pace()
            for key in unique:
                if key not in failures:
                    self._parts.reporter.tell("resource_invalidated", resource=key, reason=reason)
                    await pace.keep()
        self._parts.access.raise_first(failures)

    async def aclose(self, *, timeout_seconds: float | None = 5.0) -> None:
        """Refuse new publications and wait for running copies; shared parts are left alone.

        Raises `PayloadCopyShutdownTimeoutError` if copies still run after ``timeout_seconds``
        (None: no limit).
        """
        if self._parts.owns_copies:
            await close_copies(self._parts.access.copies, timeout_seconds)

    def _begin(self, force: bool, replace_equal: bool) -> float:
        """Check what is asked for; return the time at which it is published."""
        self._parts.check_open()
        if type(force) is not bool or type(replace_equal) is not bool:
            validation.flag("force", force)
            validation.flag("replace_equal", replace_equal)
        return self._parts.now()

    async def _publish(
        self,
        keys: Collection[ResourceKey],
        made: Iterable[Revision],
        now: float,
        force: bool,
        replace_equal: bool,
    ) -> Mapping[ResourceKey, PublishResult]:
        """Offer the best revision per key to the cache; nothing is written if one is unfit.

        What a cache that takes keys one by one did write before it failed is reported all the same.
        """
        parts, pace, access = self._parts, Pace(), self._parts.access
        report = None if parts.reporter is None else partial(_report, parts.reporter, force)
        policies: dict[ResourceKey, FreshnessPolicy] = {}
        common = policy_of_all(parts.policy_resolver)
        judged: list[Revision] = []
        weighed = 0
        for revision in made:
            judged.append(revision)
            if common is None:
                policies[revision.key] = policy_for(parts.policy_resolver, revision.key)
            if revision.seal is None:
                sealed = await access.copies.seal(revision.payload, context=_IN)
                revision.payload, revision.seal = sealed
            weighed += revision.seal.weight
            if weighed >= PORTION:
                weighed = 0
                await pace.keep()
        best = best_per_key(judged)
        await pace.keep()
        moment = parts.now()
        if access.store is not None:
            outcomes = access.store.put_many(
                best, now=moment, force=force, replace_equal=replace_equal
            )
        else:
            policies = policies or dict.fromkeys(best, common)
            terms = Terms(policies, moment, force, replace_equal, insist=True)
            with _announced(access, keys):
                written, failures = await access.write(best, terms)
                await pace.keep()
            await pace.keep()
            if failures and report is not None:
                for key, outcome in written.items():
                    report(best[key], outcome)
            access.raise_first(failures)
            outcomes = [written[key] for key in best]
        await pace.keep()
        policy_of = policies.__getitem__ if common is None else lambda _: common
        became = dict(zip(best.values(), outcomes, strict=True))
        results = _Results(access.copies, best, policy_of, now, became)
        del outcomes, became
        await results.complete(report, pace)
        return results


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
