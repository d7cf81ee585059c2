"""Publishing events into a cache: judged, sealed, written in one step, and told."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from coalestra.cache.access import CacheAccess, Terms
from coalestra.cache.memory import open_value, show_value
from coalestra.cache.store import Outcome, best_per_key
from coalestra.concurrency.copying import PayloadCopier, PayloadCopies
from coalestra.concurrency.pace import Pace, side_by_side
from coalestra.concurrency.sealing import PORTION
from coalestra.core.errors import SourceProtocolError
from coalestra.core.frozen import EMPTY, FrozenDict, filled
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
from coalestra.core.validation import (
    check_fields,
    flag,
    instance,
    integer,
    require_methods,
    rule,
    ruled,
    text,
)
from coalestra.core.values import (
    CacheWriteStatus,
    PublishResult,
    PublishStatus,
    ResourceUpdate,
    Revision,
    SnapshotValue,
    check_update,
    next_number,
    number_of,
    unseen_result,
    version_of,
)
from coalestra.observability import Reporter, reporter_for

_IN = "published value"
_OUT = "publish result"
_MANY = 1_024
"""What is held of more keys is looked at in slices, before it is replaced in one step."""
_STORED = CacheWriteStatus.STORED
_PUBLISHED = PublishStatus.PUBLISHED
_PUBLISHED_MARK: FrozenDict[str, Any] = FrozenDict({"published": True})


def _report(reporter: Reporter, force: bool, offered: Revision, outcome: Outcome) -> None:
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


def _told(status: CacheWriteStatus) -> PublishStatus:
    return _PUBLISHED if status is _STORED else PublishStatus(status.value)


def _may_be_overtaken(made: Sequence[Revision]) -> bool:
    """Whether anything else was made since the first of these was."""
    return bool(made) and next_number() > number_of(made[0].version) + len(made)


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
    after = await open_value(copies, current, _OUT, now, policy, current is not offered)
    if previous is None:
        return PublishResult(_told(status), after)
    before = await open_value(copies, previous, _OUT, now, policy, True)
    return PublishResult(_told(status), after, before)


@dataclass(eq=False, repr=False)
class _Results(Mapping[ResourceKey, PublishResult]):
    """What became of several events; the results of trifles are made for those who look."""

    copies: PayloadCopies
    offered: Mapping[ResourceKey, Revision]
    policy_of: Callable[[ResourceKey], FreshnessPolicy]
    now: float
    outcomes: dict[Revision, Outcome]
    results: dict[Revision, PublishResult] = field(default_factory=dict)

    async def complete(
        self, report: Callable[[Revision, Outcome], object] | None, pace: Pace
    ) -> None:
        """Report all, then copy those that are no trifles."""
        if report is not None:
            for offered, outcome in self.outcomes.items():
                report(offered, outcome)
                await pace.keep()
        direct, became = self.copies.is_direct, self.outcomes.items()

        async def show(offered: Revision) -> None:
            # What was replaced is let go one by one.
            outcome, policy = self.outcomes.pop(offered), self.policy_of(offered.key)
            self.results[offered] = await _result(self.copies, offered, outcome, policy, self.now)
            del outcome
            await pace.keep()

        large = [each for each, what in became if not (direct and _is_trifle(what))]
        await side_by_side(large, show, self.copies.max_concurrency)

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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PublisherArguments:
    """What an application hands to a publisher; its attributes are described there."""

    cache: AsyncCache = field(metadata=rule(require_methods, "get", "set", "invalidate", "clear"))
    clock: Clock = field(metadata=rule(require_methods, "now", plain=True))
    policy_resolver: FreshnessPolicyProvider = field(
        metadata=rule(require_methods, "resolve", plain=True)
    )
    metrics: MetricsSink = field(metadata=rule(require_methods, "increment", "observe", plain=True))
    events: EventSink = field(metadata=rule(require_methods, "emit", plain=True))
    observation_policy: ObservationPolicy | None = ruled(
        None, instance, ObservationPolicy, optional=True
    )
    lock_stripes: int = ruled(64, integer, minimum=1)
    payload_copier: PayloadCopier | None = None
    run_payload_copies_in_thread: bool | None = None
    max_copy_concurrency: int = 4
    authority_resolver: AuthorityPolicyResolver | None = ruled(
        None, require_methods, "resolve", "rank_for", optional=True, plain=True
    )
    max_pending_tasks: int = ruled(8, integer, minimum=1)

    def __post_init__(self) -> None:
        check_fields(self)
        require_authority_aware(self.cache, self.authority_resolver)


class ResourcePublisher(PublisherArguments):
    """Writes what happened into a cache, by the write order: an event never undoes a later one.

    ``lock_stripes`` is accepted for compatibility and has no effect: writers of one key take
    turns, however many keys there are. ``max_pending_tasks`` bounds the tasks used with a cache
    that has single-key methods only.

    Attributes:
        cache: the cache published into.
        clock: stamps publications.
        metrics, events: are told of them.
    """

    observation_policy: ObservationPolicy

    def __post_init__(self) -> None:
        super().__post_init__()
        copies = PayloadCopies(
            "publisher",
            copier=self.payload_copier,
            run_in_thread=self.run_payload_copies_in_thread,
            max_concurrency=self.max_copy_concurrency,
        )
        if self.observation_policy is None:
            object.__setattr__(self, "observation_policy", ObservationPolicy())
        reporter, observation = reporter_for(self.metrics, self.events), self.observation_policy
        failed = None if reporter is None else reporter.cache_failed
        access = CacheAccess(self.cache, copies, self.max_pending_tasks, observation, failed)
        self._begin_with(access, reporter, lambda: None, owns_copies=True)

    @classmethod
    def sharing(
        cls,
        access: CacheAccess,
        reporter: Reporter | None,
        check_open: Callable[[], object],
        **arguments: Any,
    ) -> ResourcePublisher:
        """Return a publisher over what a builder has, with these of its arguments.

        ``check_open`` is called first by every operation and raises if nothing may be published
        any more.
        """
        own = {"cache": access.cache, "max_pending_tasks": access.calls.limit}
        publisher = filled(cls, arguments | own)
        publisher._begin_with(access, reporter, check_open, owns_copies=False)
        return publisher

    def _begin_with(
        self,
        access: CacheAccess,
        reporter: Reporter | None,
        check_open: Callable[[], object],
        *,
        owns_copies: bool,
    ) -> None:
        self._access = access
        self._reporter = reporter
        self._check_open = check_open
        self._owns_copies = owns_copies
        self._now = checked(self.clock).now
        ranks: AuthorityPolicyProvider | None = self.authority_resolver
        if type(ranks) is AuthorityPolicyResolver and not ranks.has_rules:
            ranks = None  # they are all 0
        self._ranks = ranks

    def __repr__(self) -> str:
        return f"ResourcePublisher({self._access!r})"

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
        told, access = EMPTY if metadata is None else metadata, self._access
        check_update(key, source, observed_at, told)
        now, store = self._begin(force, replace_equal), access.store
        policy = policy_for(self.policy_resolver, key)
        revision = self._revision_of(key, value, source, observed_at, told, now)
        if store is None or revision.seal is None:
            return (await self._publish((key,), (revision,), now, force, replace_equal))[key]
        outcome = store.put(revision, now=now, force=force, replace_equal=replace_equal)
        if self._reporter is not None:
            _report(self._reporter, force, revision, outcome)
        copies = access.copies
        if copies.is_direct and _is_trifle(outcome):
            return _unseen(copies, revision, outcome, policy, now)
        return await _result(copies, revision, outcome, policy, now)

    async def publish_update(
        self, update: ResourceUpdate[Any], *, force: bool = False, replace_equal: bool = False
    ) -> PublishResult:
        """Publish one update; see `publish`."""
        instance("update", update, ResourceUpdate)
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
        captured = tuple(instance("updates", updates, Iterable))
        for update in captured:
            if type(update) is not ResourceUpdate:
                instance("updates", update, ResourceUpdate)
        now, began = self._begin(force, replace_equal), next_number()
        made = (
            self._revision_of(
                each.key, each.value, each.source, each.observed_at, each.metadata, now, began
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
        self._check_open()
        text("reason", reason, empty=True)
        unique = distinct_keys("keys", keys)
        if not unique:
            return
        failures = await self._access.invalidate(unique)
        if self._reporter is not None:
            pace = Pace()
            for key in unique:
                if key not in failures:
                    self._reporter.tell("resource_invalidated", resource=key, reason=reason)
                    await pace.keep()
        self._access.raise_first(failures)

    async def aclose(self, *, timeout_seconds: float | None = 5.0) -> None:
        """Refuse new publications and wait for running copies; shared parts are left alone.

        Raises `PayloadCopyShutdownTimeoutError` if copies still run after ``timeout_seconds``
        (None: no limit).
        """
        if self._owns_copies:
            await self._access.copies.aclose(timeout_seconds)

    def _revision_of(
        self,
        key: ResourceKey,
        value: Any,
        source: str,
        observed_at: float | None,
        metadata: Mapping[str, Any],
        now: float,
        began: int = 0,
    ) -> Revision:
        """Return the revision that an event makes at ``now``; without a seal if that takes waiting.

        Those of one publication have ``began`` together, so of two the later one wins all keys.
        Raises `SourceProtocolError` if it was observed further in the future than allowed.
        """
        ranks, number, dated = self._ranks, next_number(), observed_at is not None
        told, copies = _PUBLISHED_MARK, self._access.copies
        source = str.__str__(source)  # as it is read, also where it is an enum's
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
        rank = 0 if ranks is None else rank_of(ranks, key, source)
        return Revision(
            key, payload, seal, source, observed_at, now, version_of(number), 0.0, 0,
            told, rank, EMPTY, (), dated, began or number,
        )  # fmt: skip

    def _begin(self, force: bool, replace_equal: bool) -> float:
        """Check what is asked for; return the time at which it is published."""
        self._check_open()
        if type(force) is not bool or type(replace_equal) is not bool:
            flag("force", force)
            flag("replace_equal", replace_equal)
        return self._now()

    async def _seal(self, revision: Revision) -> None:
        sealed = await self._access.copies.seal(revision.payload, context=_IN)
        revision.payload, revision.seal = sealed

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
        pace, access, held = Pace(), self._access, None
        report = None if self._reporter is None else partial(_report, self._reporter, force)
        policies: dict[ResourceKey, FreshnessPolicy] = {}
        common, judged, weighed = policy_of_all(self.policy_resolver), list[Revision](), 0
        for revision in made:
            judged.append(revision)
            if common is None:
                policies[revision.key] = policy_for(self.policy_resolver, revision.key)
            weighed += 0 if revision.seal is None else revision.seal.weight
            if weighed >= PORTION:
                weighed = 0
                await pace.keep()
        slow = [each for each in judged if each.seal is None]
        await side_by_side(slow, self._seal, access.copies.max_concurrency)
        best = best_per_key(judged)
        await pace.keep()
        moment = self._now()
        if access.store is not None:
            rules: dict[str, Any] = {"now": moment, "force": force, "replace_equal": replace_equal}
            if len(best) > _MANY:
                held = await pace.through(access.store.weigh(best, **rules))
            outcomes = access.store.put_many(best, held=held, **rules)
        else:
            policies = policies or dict.fromkeys(best, common)
            late = _may_be_overtaken(judged)
            terms = Terms(policies, moment, force, replace_equal, insist=True, late=late)
            # So that no fetch slips in between an event and its writing; not before payloads are
            # sealed, which may take any time: readers would wait for that.
            listeners = access.listeners
            listeners.tell(lambda each: each.announced(keys))
            try:
                written, failures = await access.write(best, terms)
                await pace.keep()
            finally:
                listeners.tell(lambda each: each.concluded(keys))
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


# What Python says of a wrong argument names the class that was called.
PublisherArguments.__init__.__qualname__ = f"{ResourcePublisher.__qualname__}.__init__"


def require_authority_aware(cache: AsyncCache, resolver: AuthorityPolicyResolver | None) -> None:
    """Raise ValueError if ``resolver`` has rules that the cache does not promise to enforce."""
    if resolver is None or not getattr(resolver, "has_rules", True):
        return
    if getattr(cache, "validates_source_authority", False) is True:
        return
    raise ValueError(
        "authority rules need a cache whose writes compare authority, got "
        f"{type(cache).__name__}; let it compare authority_rank and declare "
        "validates_source_authority = True"
    )
