"""The entry store: cached revisions by key, without awaiting, in the write order.

Laws of the write order, for revisions of one key; `decide` is the one place that knows them:

1. A forced write always wins.
2. A higher authority rank wins, whatever was observed when; a lower one loses.
3. Between equal ranks, what arrived later wins if neither is dated. An event arrives when it is
   published, a fetch when its reading *begins*: it knows nothing later than that.
4. Else the later date wins, an undated one counting as of its arrival. What is held and lies
   further in the future than is tolerated has no date to win by: the clock was set back.
5. At the same date an undated event wins, as it has arrived later. Anything else is a duplicate,
   and loses unless the writer asked to replace equals.

Laws of the store:

1. What it finds is within max stale of the reader's policy, not further in the future than is
   tolerated and, if derived, rests on the revisions stored now.
2. What one call writes becomes visible in one step. An outdated derived entry defends nothing.
3. The least recently written or found entry leaves first.
4. Listeners hear of every change except evictions and expiries, in the step that makes it.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from itertools import count, islice
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from coalestra.concurrency.pace import Slices, portions
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    FreshnessPolicy,
    FreshnessPolicyProvider,
    ObservationPolicy,
    policy_for,
    policy_of_all,
    quiet_for,
    quiet_seconds,
)
from coalestra.core.values import CacheStats, CacheWriteStatus, Revision, SnapshotValue, number_of

# The write order: which revision of a resource may replace which ---------------------------------

Outcome = tuple[CacheWriteStatus, Revision, Revision | None]
"""What became of a revision that was offered: its status, what is current now, what was before."""

_KEYS_PER_SLICE = 512

_STORED = CacheWriteStatus.STORED
_LOWER = CacheWriteStatus.IGNORED_LOWER_AUTHORITY
_OLDER = CacheWriteStatus.IGNORED_OLDER
_DUPLICATE = CacheWriteStatus.IGNORED_DUPLICATE


def decide(
    candidate: Revision,
    current: Revision | None,
    *,
    force: bool = False,
    replace_equal: bool = False,
    horizon: float = math.inf,
) -> CacheWriteStatus:
    """Say what becomes of ``candidate`` when ``current`` is what the cache holds.

    ``horizon`` is the wall-clock instant beyond which a date lies too far in the future.
    """
    if current is None or force:
        return _STORED
    rank, held = candidate.authority_rank, current.authority_rank
    if rank != held:
        return _STORED if rank > held else _LOWER
    if not candidate.dated and not current.dated:
        arrived = _arrived_later(candidate, current)
        if arrived is not None:
            return _STORED if arrived else _OLDER
    at, held_at = candidate.ordered_at, current.ordered_at
    if held_at > horizon or at > held_at:
        return _STORED
    if at < held_at:
        return _OLDER
    is_event = not candidate.dated and not candidate.attempts
    return _STORED if replace_equal or is_event else _DUPLICATE


def _arrived_later(candidate: Revision, current: Revision) -> bool | None:
    """Whether an undated candidate arrived later than an undated current; None if unknown."""
    began = candidate.began
    if not began:
        return None
    if current.began:
        return None if began == current.began else began > current.began
    # Of what came back from a cache only the end of its reading is known, if it was read here.
    ended = number_of(current.version)
    return True if ended and began > ended else None


def best_per_key(candidates: Collection[Revision]) -> dict[ResourceKey, Revision]:
    """Reduce a batch to its best candidate per key, later ones winning ties."""
    best = {candidate.key: candidate for candidate in candidates}
    if len(best) < len(candidates):
        best.clear()
        for candidate in candidates:
            known = best.get(candidate.key)
            if decide(candidate, known, replace_equal=True) is _STORED:
                best[candidate.key] = candidate
    return best


def future_tolerance(policy: ObservationPolicy) -> float:
    """Return by how many seconds an observation may be ahead of the clock; infinity for any."""
    return policy.future_tolerance_seconds if policy.reject_future_observations else math.inf


# What a cache tells those who have work under way for its keys -----------------------------------


class CacheListener(Protocol):
    """Hears of every change of knowledge, synchronously and in order.

    Calls come from the event loop that made the change, after the cache is consistent again. Every
    ``announced`` is followed by one ``concluded`` with the same keys, whether it succeeded,
    failed or was cancelled; in between, ``revised`` tells of those keys that it did replace.
    """

    def revised(self, changes: Mapping[ResourceKey, Revision | None]) -> None:
        """These are current now, in one step; None after an invalidation."""

    def announced(self, keys: Collection[ResourceKey]) -> None:
        """Publications begin whose outcome is open; a fetch already running must not undo them."""

    def concluded(self, keys: Collection[ResourceKey]) -> None:
        """Announced publications have ended; what they replaced has been told by ``revised``."""

    def invalidating(self, versions: Mapping[ResourceKey, str | None]) -> None:
        """These keys are invalidated now, whether or not the cache holds them.

        Another process may have written them: then the cache has these versions, else None.
        """

    def invalidating_where(self, matches: Callable[[ResourceKey], bool]) -> None:
        """Every key for which ``matches`` is true is invalidated now, held or not."""


class Listeners:
    """Listeners of one cache, and groups of such, held weakly: it keeps no builder alive."""

    __slots__ = ("__weakref__", "references")

    def __init__(self) -> None:
        self.references: tuple[weakref.ref[CacheListener | Listeners], ...] = ()

    def __repr__(self) -> str:
        return f"Listeners({len(self.references)})"

    def subscribe(self, listener: CacheListener | Listeners) -> None:
        """Add a listener; the caller must keep a reference to it. Twice is once."""
        self.unsubscribe(listener)
        self.references += (weakref.ref(listener, self._forget),)

    def unsubscribe(self, listener: CacheListener | Listeners) -> None:
        """Remove a listener; an unknown one is ignored."""
        self.references = tuple(each for each in self.references if each() is not listener)

    def tell(self, news: Callable[[CacheListener], object]) -> None:
        """Tell news to all listeners, and to those of other groups."""
        for reference in self.references:
            listener = reference()
            if isinstance(listener, Listeners):
                listener.tell(news)
            elif listener is not None:
                news(listener)

    def revised(
        self, changes: Mapping[ResourceKey, Revision | None], teller: object = None
    ) -> None:
        """Tell what is current now to all listeners but ``teller``, who knows."""
        for reference in self.references:
            listener = reference()
            if listener is not None and listener is not teller:
                listener.revised(changes)

    def _forget(self, dead: weakref.ref[CacheListener | Listeners]) -> None:
        self.references = tuple(each for each in self.references if each is not dead)


# Whether a derived entry still rests on the current revisions of what it was made from -----------

UNCHECKED: Final = -1
_WALKING: Final = -2
_OUTDATED: Final = -3
_OF_NO_USE: Final = (_WALKING, _OUTDATED)
_checked: Final = attrgetter("checked")
_runs: Final = count()  # no two mappings share one, though they may share revisions

_Held = TypeVar("_Held", Revision, SnapshotValue[Any])


class Currency:
    """Judges the entries of one mapping, whose owner reports every revision that leaves it.

    An entry is current when each dependency version it recorded is the version held now, and those
    entries are current themselves. Answers are kept on the revisions (``Revision.checked``): the
    number of the run in which it was found current. A run lasts until an entry that somebody's
    answer relied on is replaced or removed, so its questions cost each entry and each edge once.
    Walking is iterative: chains may be very deep. Entries found current are joined to what they
    rest on (``Revision.dependencies``).
    """

    __slots__ = ("_entries", "_run")

    def __init__(self, entries: Mapping[ResourceKey, Revision]) -> None:
        self._entries = entries
        self._run = next(_runs)

    def removed(self, *revisions: Revision) -> None:
        """Learn that revisions have left the mapping; answers that relied on them are void."""
        if self._run in map(_checked, revisions):
            self._run = next(_runs)

    def holds(self, revision: Revision) -> bool:
        """Say whether ``revision``, which is held, is current."""
        if revision.checked == self._run or not revision.dependency_versions:
            return True
        return revision.checked != _OUTDATED and self._walk(revision)

    def _walk(self, revision: Revision) -> bool:
        entries, run, path = self._entries, self._run, [_entered(revision)]
        while path:
            walked, remaining = path[-1]
            for key, version in remaining:
                below = entries.get(key)
                if below is None or below.version != version or below.checked in _OF_NO_USE:
                    for each, _ in path:
                        each.checked = _OUTDATED
                    return False
                if below.checked != run and below.dependency_versions:
                    path.append(_entered(below))
                    break
                below.checked = run
            else:
                path.pop()
                walked.checked = run
                if not walked.dependencies:
                    walked.dependencies = tuple(entries[key] for key in walked.dependency_versions)
        return True


def _entered(revision: Revision) -> tuple[Revision, Iterator[tuple[ResourceKey, str]]]:
    revision.checked = _WALKING
    return revision, iter(revision.dependency_versions.items())


def outdated_among(known: Mapping[ResourceKey, Revision]) -> list[ResourceKey]:
    """Return the keys of what does not rest on current revisions; ``known`` is all there is."""
    # Whose are also in a store, that one needs the answers to know what is void without them.
    answers = [(revision, revision.checked) for revision in known.values()]
    for revision, _ in answers:
        revision.checked = UNCHECKED
    holds = Currency(known).holds
    outdated = [key for key, revision in known.items() if not holds(revision)]
    for revision, checked in answers:
        revision.checked = checked
    return outdated


async def with_all_below(
    known: Mapping[ResourceKey, _Held],
    absent: Iterable[ResourceKey],
    held: Callable[[list[ResourceKey]], Awaitable[Mapping[ResourceKey, _Held]]],
) -> dict[ResourceKey, _Held]:
    """Return ``known`` with all that it rests on and is ``held``: one question for each level.

    What is ``absent`` and not known is not held.
    """
    asked = {*known, *absent}
    level = every = dict(known)
    while True:
        below = (key for each in level.values() for key in each.dependency_versions)
        wanted = [key for key in dict.fromkeys(below) if key not in asked]
        if not wanted:
            return every
        asked.update(wanted)
        level = dict(await held(wanted))
        every.update(level)


class Held(NamedTuple):
    """What is held of keys, in their order, to be replaced; None of those of which nothing is.

    It `was` so when the store had counted that. `known` may be let go of bit by bit.
    """

    was: tuple[int, ...]
    known: list[Revision | None]


class EntryStore:
    """A bounded, least-recently-used map of sealed revisions; every method is synchronous.

    Attributes:
        max_entries: how many are kept; None for any number.
        listeners: who hears of changes.
        tolerance: how many seconds ahead of the clock an entry may be dated: what the most tolerant
            of its users lets in.
    """

    def __init__(self, max_entries: int | None = None) -> None:
        self.max_entries: int | None = max_entries
        self.listeners: Listeners = Listeners()
        self.tolerance: float = future_tolerance(ObservationPolicy())
        self._recency: OrderedDict[ResourceKey, Revision] | None = None
        self._entries: dict[ResourceKey, Revision] = {}
        if max_entries is not None:
            self._entries = self._recency = OrderedDict()
        self._currency = Currency(self._entries)
        self._misses = self._fresh_hits = self._stale_hits = self._sets = 0
        self._invalidations = self._evictions = self._expirations = 0

    def __repr__(self) -> str:
        bound = "unbounded" if self.max_entries is None else f"max {self.max_entries}"
        return f"EntryStore({len(self._entries)} entries, {bound})"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[ResourceKey]:
        return iter(self._entries)

    def tolerate(self, seconds: float) -> None:
        """Hold what a user lets in who takes what is so far ahead of the clock."""
        self.tolerance = max(self.tolerance, seconds)

    # Reading ------------------------------------------------------------------------------------

    def find(self, key: ResourceKey, now: float, policy: FreshnessPolicy) -> Revision | None:
        """Return the usable entry of ``key``, counting a hit or a miss.

        ``now`` is wall-clock seconds. An entry beyond the policy's max stale, or resting on
        dependencies that are no longer current, is dropped. One from too far in the future is of no
        use, but stays: the clock may come back.
        """
        revision = self._entries.get(key)
        if revision is not None:
            age = now - revision.observed_at
            if age > policy.max_stale_seconds:
                self._expirations += 1
                self._discard(revision)
            elif revision.dependency_versions and not self._currency.holds(revision):
                self._invalidations += 1
                self._discard(revision)
            elif age >= -self.tolerance:
                if self._recency is not None:
                    self._recency.move_to_end(revision.key)
                if age <= policy.ttl_seconds:
                    self._fresh_hits += 1
                else:
                    self._stale_hits += 1
                return revision
        self._misses += 1
        return None

    def find_all_fresh(
        self, keys: Iterable[ResourceKey], now: float, policies: FreshnessPolicyProvider
    ) -> list[Revision] | None:
        """Return the entries of all ``keys``, or None if one of them needs the look of ``find``.

        That is one that is missing, is derived, is not quiet by its policy, or is from the future.
        Nothing is dropped or counted: ``count_fresh`` counts what was of use.
        """
        found = []
        common: FreshnessPolicy | None = policy_of_all(policies)
        longest = 0.0 if common is None else quiet_seconds(common)
        get, earliest = self._entries.get, -self.tolerance
        for key in keys:
            revision = get(key)
            if revision is None:
                return None
            if common is None:
                longest = quiet_for(policies, key)
            age = now - revision.observed_at
            if age > longest or age < earliest or revision.dependency_versions:
                return None
            found.append(revision)
        return found

    def count_fresh(self, revisions: Collection[Revision]) -> None:
        """Count entries as found fresh, and as used last."""
        self._fresh_hits += len(revisions)
        if self._recency is not None:
            move = self._recency.move_to_end
            for revision in revisions:
                try:
                    move(revision.key)  # the very key of the entry, which needs no comparison
                except KeyError:  # it has left meanwhile
                    continue

    def lacks(self, keys: Collection[ResourceKey]) -> bool:
        """Whether there is no entry of any of ``keys``; if so, a miss is counted for each."""
        lacking = not self._entries or self._entries.keys().isdisjoint(keys)
        self._misses += lacking * len(keys)
        return lacking

    def peek(self, key: ResourceKey) -> Revision | None:
        """Return the current entry of ``key`` whatever its age, counting and moving nothing."""
        revision = self._entries.get(key)
        return revision if revision is None or self._currency.holds(revision) else None

    def newest(self, limit: int) -> list[Revision]:
        """Return up to ``limit`` entries, those used last first, counting and moving nothing."""
        return list(islice(reversed(self._entries.values()), min(limit, len(self))))

    @property
    def state(self) -> tuple[int, ...]:
        """Differs from what it was if anything was written or removed since."""
        return self._sets, self._invalidations, self._evictions, self._expirations

    def replaced(self, revisions: Iterable[Revision]) -> list[ResourceKey]:
        """Return the keys of those that were not derived, and in whose place another one is now."""
        get = self._entries.get
        plain = [each for each in revisions if not each.dependency_versions]
        return [each.key for each in plain if get(each.key, each) is not each]

    # Writing ------------------------------------------------------------------------------------

    def put(
        self,
        revision: Revision,
        *,
        now: float = math.inf,
        force: bool = False,
        replace_equal: bool = False,
        teller: CacheListener | None = None,
    ) -> Outcome:
        """Offer a sealed revision at ``now`` (wall seconds; not given, all dates held count).

        All listeners but ``teller`` hear of it if it was stored.
        """
        outcome = self._put(revision, now + self.tolerance, force, replace_equal)
        if outcome[0] is _STORED and self.listeners.references:
            changes = {revision.key: revision}
            self.listeners.revised(changes, teller)
        return outcome

    def put_many(
        self,
        revisions: dict[ResourceKey, Revision],
        *,
        now: float = math.inf,
        force: bool = False,
        replace_equal: bool = False,
        held: Held | None = None,
        teller: CacheListener | None = None,
    ) -> list[Outcome]:
        """Offer new sealed revisions by their keys, in one step; see ``put`` and ``weigh``."""
        if self.enter_many(revisions, held, teller=teller):
            if held is None:
                return [(_STORED, new, None) for new in revisions.values()]
            pairs = zip(revisions.values(), held.known, strict=True)
            return [(_STORED, new, old) for new, old in pairs]
        put, horizon, holds = self._put, now + self.tolerance, self._currency.holds
        before, offered = map(self._entries.get, revisions), list(revisions.values())
        # By place, as asking keys for their hash would take longer than all else.
        derived = {n: e for n, e in enumerate(before) if e and e.dependency_versions and holds(e)}
        outcomes = [put(revision, horizon, force, replace_equal) for revision in offered]
        # What one rests on may have been put after it: then it has defended nothing.
        while again := [n for n, e in derived.items() if outcomes[n][1] is e and not holds(e)]:
            for n in again:
                outcomes[n] = put(offered[n], horizon, force, replace_equal)
        for n, replaced in derived.items():
            if outcomes[n][2] is not replaced:
                outcomes[n] = (*outcomes[n][:2], replaced)
        listening = self.listeners.references
        if len(listening) > 1 or (listening and listening[0]() is not teller):
            stored = [new for status, new, _ in outcomes if status is _STORED]
            all_of_them = len(stored) == len(revisions)
            changes = revisions if all_of_them else {new.key: new for new in stored}
            if changes:
                self.listeners.revised(changes, teller)
        return outcomes

    def weigh(
        self,
        revisions: dict[ResourceKey, Revision],
        *,
        now: float,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Slices[Held | None]:
        """Find out whether very many revisions replace all that is held of their keys; see ``put``.

        Return what they replace, for ``put_many`` to do so in little time, or None: some of it
        stays, is derived, or there is nothing to replace.
        """
        get, horizon, held = self._entries.get, now + self.tolerance, Held(self.state, [])
        if self._entries.keys().isdisjoint(revisions.keys()):
            return None
        for part in portions(revisions.values(), _KEYS_PER_SLICE):
            for revision in part:
                current = get(revision.key)
                if current is not None and (
                    current.dependency_versions
                    or decide(
                        revision, current, force=force, replace_equal=replace_equal, horizon=horizon
                    )
                    is not _STORED
                ):
                    return None
                held.known.append(current)
            yield
        return held

    def enter_many(
        self,
        revisions: dict[ResourceKey, Revision],
        held: Held | None = None,
        *,
        teller: CacheListener | None = None,
    ) -> bool:
        """Do as ``put_many``, in less time, if just ``held`` is held of their keys.

        Return whether that is so. None of them may have been here before.
        """
        entries, known = self._entries, () if held is None else held.known
        before = [each for each in known if each is not None]
        if held is not None and before:
            if self.state != held.was and list(map(entries.get, revisions)) != known:
                return False  # somebody has written meanwhile
            for each in before:
                del entries[each.key]  # the new one goes to the end, under its own key object
            self._currency.removed(*before)
        elif not entries.keys().isdisjoint(revisions.keys()):
            return False
        entries.update(revisions)
        self._make_room()
        self._sets += len(revisions)
        if revisions:
            self.listeners.revised(revisions, teller)
        return True

    def _put(self, revision: Revision, horizon: float, force: bool, replace_equal: bool) -> Outcome:
        entries = self._entries
        previous = current = entries.get(revision.key)
        if current is not None:
            if current.dependency_versions and not self._currency.holds(current):
                self._invalidations += 1
                previous = None
            elif not force:
                status = decide(revision, current, replace_equal=replace_equal, horizon=horizon)
                if status is not _STORED:
                    return status, current, current
            del entries[current.key]  # the new one goes to the end, under its own key object
            if current.checked != UNCHECKED:
                self._currency.removed(current)
        entries[revision.key] = revision
        revision.checked = UNCHECKED
        self._sets += 1
        if self.max_entries is not None and len(entries) > self.max_entries:
            self._make_room()
        return _STORED, revision, previous

    def _make_room(self) -> None:
        if self._recency is not None:
            while len(self._recency) > (self.max_entries or 0):
                _, oldest = self._recency.popitem(last=False)
                self._currency.removed(oldest)
                self._evictions += 1

    # Removing -----------------------------------------------------------------------------------

    def drop(self, keys: Iterable[ResourceKey]) -> list[Revision]:
        """Invalidate ``keys`` in one step; return what was stored. All are told to listeners."""
        told: dict[ResourceKey, str | None] = dict.fromkeys(keys)
        self.listeners.tell(lambda each: each.invalidating(told))
        return self._remove(told)

    def drop_where(self, matches: Callable[[ResourceKey], bool]) -> list[Revision]:
        """Invalidate every key that matches, in one step; return what was stored."""
        held = [key for key in self._entries if matches(key)]
        self.listeners.tell(lambda each: each.invalidating_where(matches))
        return self._remove(held)

    def clear(self) -> list[Revision]:
        """Invalidate every key there is; return what was stored."""
        return self.drop_where(lambda _key: True)

    def drop_useless(
        self, keys: Iterable[ResourceKey], now: float, policy_resolver: FreshnessPolicyProvider
    ) -> list[Revision]:
        """Drop those of ``keys`` that are beyond max stale, or outdated; return the dropped."""
        dropped = []
        for key in keys:
            revision = self._entries.get(key)
            if revision is None:
                continue
            longest = policy_for(policy_resolver, key).max_stale_seconds
            expired = now - revision.observed_at > longest
            if expired or not self._currency.holds(revision):
                self._expirations += expired
                self._invalidations += not expired
                self._discard(revision)
                dropped.append(revision)
        return dropped

    def stats(self) -> CacheStats:
        """Counts since creation, and the size now."""
        return CacheStats(
            size=len(self._entries),
            max_entries=self.max_entries,
            hits=self._fresh_hits + self._stale_hits,
            misses=self._misses,
            fresh_hits=self._fresh_hits,
            stale_hits=self._stale_hits,
            sets=self._sets,
            invalidations=self._invalidations,
            evictions=self._evictions,
            expirations=self._expirations,
        )

    def _discard(self, revision: Revision) -> None:
        del self._entries[revision.key]
        self._currency.removed(revision)

    def _remove(self, keys: Iterable[ResourceKey]) -> list[Revision]:
        popped = [self._entries.pop(key, None) for key in keys]
        dropped = [revision for revision in popped if revision is not None]
        self._currency.removed(*dropped)
        self._invalidations += len(dropped)
        return dropped
