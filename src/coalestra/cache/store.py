"""The write order: which revision of a resource may replace which.

Laws, for revisions of one key:

1. A forced write always wins.
2. A higher authority rank wins, whatever was observed when.
3. A lower authority rank loses, whatever was observed when.
4. Between equal ranks the later observation wins; equal observations keep what is there, unless
   the writer asked to replace equals.

Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Protocol, TypeVar

from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, FreshnessPolicyProvider
from coalestra.core.results import CacheStats, CacheWriteStatus
from coalestra.core.values import Revision

# The write order: which revision of a resource may replace which ---------------------------------


_STORED = CacheWriteStatus.STORED
_LOWER = CacheWriteStatus.IGNORED_LOWER_AUTHORITY
_OLDER = CacheWriteStatus.IGNORED_OLDER
_DUPLICATE = CacheWriteStatus.IGNORED_DUPLICATE


class Ranked(Protocol):
    """What the write order looks at: a key, an authority rank and an observation time."""

    @property
    def key(self) -> ResourceKey:
        """The resource the candidate is a revision of."""

    @property
    def authority_rank(self) -> int:
        """Higher ranks replace lower ones."""

    @property
    def observed_at(self) -> float:
        """Wall-clock seconds since the epoch at which the value was true."""


_R = TypeVar("_R", bound=Ranked)


def decide(
    candidate: Ranked,
    current: Ranked | None,
    *,
    force: bool = False,
    replace_equal: bool = False,
) -> CacheWriteStatus:
    """Say what becomes of ``candidate`` when ``current`` is what the cache holds."""
    if current is None or force:
        return _STORED
    rank, held = candidate.authority_rank, current.authority_rank
    if rank != held:
        return _STORED if rank > held else _LOWER
    if candidate.observed_at > current.observed_at:
        return _STORED
    if candidate.observed_at < current.observed_at:
        return _OLDER
    return _STORED if replace_equal else _DUPLICATE


def best_of(first: _R, second: _R) -> _R:
    """Choose between two candidates of one batch; the second wins a tie."""
    standing = (first.authority_rank, first.observed_at)
    return second if (second.authority_rank, second.observed_at) >= standing else first


def best_per_key(candidates: Collection[_R]) -> dict[ResourceKey, _R]:
    """Reduce a batch to its best candidate per key, keys in order of first appearance."""
    best = {candidate.key: candidate for candidate in candidates}
    if len(best) < len(candidates):  # the last per key is there; now every other one competes
        for candidate in candidates:
            best[candidate.key] = best_of(best[candidate.key], candidate)
    return best


# What became of one offered revision -------------------------------------------------------------


class Written(NamedTuple):
    """The outcome of a write: its status, what is current now, and what was before.

    A cache that is not the library's own reports ``previous`` only when it was asked for.
    """

    status: CacheWriteStatus
    current: Revision
    previous: Revision | None


# What a cache tells those who have work under way for its keys -----------------------------------


class CacheListener(Protocol):
    """Hears of every change of knowledge, synchronously and in order.

    Calls come from the event loop that made the change, after the cache is consistent again. Every
    ``announced`` is followed by one ``concluded`` with the same keys, whether it succeeded, failed
    or was cancelled; in between, ``revised`` tells of those keys that it did replace. Evictions and
    expiries are not news and are not told.
    """

    def revised(self, key: ResourceKey, revision: Revision | None) -> None:
        """The key's current revision is now ``revision``; None after an invalidation."""

    def announced(self, publications: Sequence[Ranked]) -> None:
        """Publications begin whose outcome is open; a fetch already running must not undo them.

        Their values are being copied or written. An item is no revision yet: it has a key, a rank
        and a time, nothing more.
        """

    def concluded(self, publications: Sequence[Ranked]) -> None:
        """Announced publications have ended; what they replaced has been told by ``revised``."""

    def invalidating(self, keys: Collection[ResourceKey]) -> None:
        """These keys are invalidated now, whether or not the cache holds them."""

    def invalidating_where(self, matches: Callable[[ResourceKey], bool]) -> None:
        """Every key for which ``matches`` is true is invalidated now, held or not."""


class Listeners:
    """Listeners of one cache, held weakly: a cache does not keep its builders alive."""

    __slots__ = ("__weakref__", "references")

    def __init__(self) -> None:
        self.references: tuple[weakref.ref[CacheListener], ...] = ()

    def __repr__(self) -> str:
        return f"Listeners({len(self.references)})"

    def subscribe(self, listener: CacheListener) -> None:
        """Add a listener; the caller must keep a reference to it. Twice is once."""
        self.unsubscribe(listener)
        self.references += (weakref.ref(listener, self._forget),)

    def unsubscribe(self, listener: CacheListener) -> None:
        """Remove a listener; an unknown one is ignored."""
        self.references = tuple(each for each in self.references if each() is not listener)

    def revised(
        self, key: ResourceKey, revision: Revision | None, teller: CacheListener | None = None
    ) -> None:
        """Tell all listeners but ``teller``, who knows, of a key's new current revision."""
        for reference in self.references:
            listener = reference()
            if listener is not None and listener is not teller:
                listener.revised(key, revision)

    def announced(self, publications: Sequence[Ranked]) -> None:
        """Tell all listeners of publications whose outcome is open."""
        for listener in self._alive():
            listener.announced(publications)

    def concluded(self, publications: Sequence[Ranked]) -> None:
        """Tell all listeners that announced publications have ended."""
        for listener in self._alive():
            listener.concluded(publications)

    def invalidating(self, keys: Collection[ResourceKey]) -> None:
        """Tell all listeners of invalidated keys."""
        for listener in self._alive():
            listener.invalidating(keys)

    def invalidating_where(self, matches: Callable[[ResourceKey], bool]) -> None:
        """Tell all listeners of an invalidation given as a rule."""
        for listener in self._alive():
            listener.invalidating_where(matches)

    def _alive(self) -> list[CacheListener]:
        return [each for reference in self.references if (each := reference()) is not None]

    def _forget(self, dead: weakref.ref[CacheListener]) -> None:
        self.references = tuple(each for each in self.references if each is not dead)


# Counting what happens to cached entries ---------------------------------------------------------


class Tally:
    """Plain counters, incremented where things happen."""

    __slots__ = (
        "evictions",
        "expirations",
        "fresh_hits",
        "invalidations",
        "misses",
        "sets",
        "stale_hits",
    )

    def __init__(self) -> None:
        self.misses: int = 0
        self.fresh_hits: int = 0
        self.stale_hits: int = 0
        self.sets: int = 0
        self.invalidations: int = 0
        self.evictions: int = 0
        self.expirations: int = 0

    def __repr__(self) -> str:
        return f"Tally(hits={self.fresh_hits + self.stale_hits}, misses={self.misses})"

    def stats(self, size: int, max_entries: int | None) -> CacheStats:
        """Return the counts together with the size now."""
        return CacheStats(
            size=size,
            max_entries=max_entries,
            hits=self.fresh_hits + self.stale_hits,
            misses=self.misses,
            fresh_hits=self.fresh_hits,
            stale_hits=self.stale_hits,
            sets=self.sets,
            invalidations=self.invalidations,
            evictions=self.evictions,
            expirations=self.expirations,
        )


# Finding many entries at once, if nothing has to be done about any of them -----------------------


class QuietEntries:
    """The entries of one store, looked at without dropping, judging or counting any.

    Looking and counting are two steps, so that whoever finds out that he needs the closer look of
    ``EntryStore.find`` after all does not count twice.
    """

    __slots__ = ("_entries", "_recency", "_tally")

    def __init__(
        self,
        entries: Mapping[ResourceKey, Revision],
        recency: OrderedDict[ResourceKey, Revision] | None,
        tally: Tally,
    ) -> None:
        self._entries = entries
        self._recency = recency
        self._tally = tally

    def find(
        self, keys: Iterable[ResourceKey], now: float, ages: Iterable[float]
    ) -> list[Revision] | None:
        """Return the entries of all ``keys``, or None if one of them needs a closer look.

        That is one that is missing, is derived, or exceeds its age, in seconds, of ``ages``.
        """
        found = []
        get = self._entries.get
        for key, age in zip(keys, ages, strict=False):
            revision = get(key)
            if revision is None or now - revision.observed_at > age or revision.dependency_versions:
                return None
            found.append(revision)
        return found

    def count(self, keys: Collection[ResourceKey]) -> None:
        """Count ``keys`` as found fresh, and as used last."""
        self._tally.fresh_hits += len(keys)
        if self._recency is not None:
            for key in keys:
                if key in self._recency:
                    self._recency.move_to_end(key)

    def __repr__(self) -> str:
        return f"QuietEntries({len(self._entries)} entries)"


# Whether a derived entry still rests on the current revisions of what it was made from -----------
#
# An entry is current when each dependency version it recorded is the version stored now, and those
# entries are current themselves. Answers are kept on the revisions (``Revision.checked``) and stay
# good until an entry that somebody's answer relied on is replaced or removed, so a run of questions
# costs each entry and each edge once. Walking is iterative: chains may be very deep.


UNCHECKED: Final = -1
_WALKING: Final = -2
_OUTDATED: Final = -3

_Step = tuple[Revision, Iterator[tuple[ResourceKey, str]]]


class Currency:
    """Judges the entries of one store, which reports every revision that leaves it.

    The store counts up ``epoch`` with every revision that enters it.
    """

    __slots__ = ("_entries", "_horizon", "epoch")

    def __init__(self, entries: Mapping[ResourceKey, Revision]) -> None:
        self.epoch: int = 0
        self._entries = entries
        self._horizon = 0

    def __repr__(self) -> str:
        return f"Currency(epoch={self.epoch}, answers_since={self._horizon})"

    def removed(self, revision: Revision) -> None:
        """Note that ``revision`` has left the store: answers that relied on it are void."""
        self.epoch += 1
        if revision.checked >= self._horizon:
            self._horizon = self.epoch

    def holds(self, revision: Revision) -> bool:
        """Say whether the stored ``revision`` is current."""
        if revision.checked >= self._horizon or not revision.dependency_versions:
            return True
        if revision.checked == _OUTDATED:
            return False
        return self._walk(revision)

    def _walk(self, revision: Revision) -> bool:
        path = [self._enter(revision)]
        while path:
            walked, remaining = path[-1]
            for key, version in remaining:
                dependency = self._entries.get(key)
                if dependency is None or dependency.version != version:
                    return self._outdated(path)
                if dependency.checked >= self._horizon:
                    continue
                if not dependency.dependency_versions:
                    dependency.checked = self.epoch
                    continue
                if dependency.checked != UNCHECKED and dependency.checked < 0:
                    return self._outdated(path)
                path.append(self._enter(dependency))
                break
            else:
                self._leave(walked)
                path.pop()
        return True

    @staticmethod
    def _enter(revision: Revision) -> _Step:
        revision.checked = _WALKING
        return revision, iter(revision.dependency_versions.items())

    def _leave(self, revision: Revision) -> None:
        revision.checked = self.epoch
        if not revision.dependencies:
            revision.dependencies = tuple(
                self._entries[key] for key in revision.dependency_versions
            )

    @staticmethod
    def _outdated(path: list[_Step]) -> bool:
        for walked, _ in path:
            walked.checked = _OUTDATED
        return False


# The entry store: cached revisions by key, without awaiting --------------------------------------
#
# Laws:
#
# 1. What ``find`` returns is within max stale of the reader's policy and, if derived, rests on the
#    revisions stored now.
# 2. ``put`` follows the write order; an outdated derived entry defends nothing.
# 3. The least recently written or found entry leaves first.
# 4. Listeners hear of every change except evictions and expiries.


class EntryStore:
    """A bounded, least-recently-used map of sealed revisions; every method is synchronous."""

    __slots__ = (
        "_currency",
        "_entries",
        "_listeners",
        "_recency",
        "_tally",
        "max_entries",
        "quiet",
    )

    def __init__(self, max_entries: int | None = None) -> None:
        self.max_entries: int | None = max_entries
        self._recency: OrderedDict[ResourceKey, Revision] | None = None
        self._entries: dict[ResourceKey, Revision] = {}
        if max_entries is not None:
            self._entries = self._recency = OrderedDict()
        self._currency = Currency(self._entries)
        self._listeners = Listeners()
        self._tally = Tally()
        self.quiet: QuietEntries = QuietEntries(self._entries, self._recency, self._tally)

    def __repr__(self) -> str:
        bound = "unbounded" if self.max_entries is None else f"max {self.max_entries}"
        return f"EntryStore({len(self._entries)} entries, {bound}, epoch {self.epoch})"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[ResourceKey]:
        return iter(self._entries)

    @property
    def epoch(self) -> int:
        """A counter that moves with every change of what is stored."""
        return self._currency.epoch

    def subscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` of changes from now on; it is held weakly."""
        self._listeners.subscribe(listener)

    def unsubscribe(self, listener: CacheListener) -> None:
        """Tell ``listener`` nothing more."""
        self._listeners.unsubscribe(listener)

    @property
    def listeners(self) -> Listeners:
        """Those who hear of changes, to announce publications to."""
        return self._listeners

    def find(self, key: ResourceKey, now: float, policy: FreshnessPolicy) -> Revision | None:
        """Return the usable entry of ``key``, counting a hit or a miss.

        ``now`` is wall-clock seconds. An entry beyond the policy's max stale, or resting on
        dependencies that are no longer current, is dropped.
        """
        revision = self._entries.get(key)
        if revision is None:
            self._tally.misses += 1
            return None
        age = now - revision.observed_at
        if age > policy.max_stale_seconds:
            self._tally.expirations += 1
            self._tally.misses += 1
            self._discard(revision)
            return None
        if revision.dependency_versions and not self._currency.holds(revision):
            self._tally.invalidations += 1
            self._tally.misses += 1
            self._discard(revision)
            return None
        if self._recency is not None:
            self._recency.move_to_end(revision.key)
        if age <= policy.ttl_seconds:
            self._tally.fresh_hits += 1
        else:
            self._tally.stale_hits += 1
        return revision

    def peek(self, key: ResourceKey) -> Revision | None:
        """Return the current entry of ``key`` whatever its age, counting and moving nothing."""
        revision = self._entries.get(key)
        if revision is not None and not self._currency.holds(revision):
            return None
        return revision

    def put(
        self,
        revision: Revision,
        *,
        force: bool = False,
        replace_equal: bool = False,
        teller: CacheListener | None = None,
    ) -> tuple[CacheWriteStatus, Revision, Revision | None]:
        """Offer a sealed revision; return the status, what is current now and what was before.

        All listeners but ``teller`` hear of it if it was stored.
        """
        key = revision.key
        previous = current = self._entries.get(key)
        if current is not None:
            if current.dependency_versions and not self._currency.holds(current):
                self._tally.invalidations += 1
                previous = None
            else:
                status = decide(revision, current, force=force, replace_equal=replace_equal)
                if status is not _STORED:
                    return status, current, current
            del self._entries[key]  # the new entry goes to the end, under its own key object
            self._currency.removed(current)
        self._entries[key] = revision
        revision.checked = UNCHECKED
        self._currency.epoch += 1
        self._tally.sets += 1
        if self._recency is not None and len(self._recency) > (self.max_entries or 0):
            self._evict(self._recency)
        listening = self._listeners.references
        if len(listening) > 1 or (listening and listening[0]() is not teller):
            self._listeners.revised(key, revision, teller)
        return _STORED, revision, previous

    def drop(self, keys: Collection[ResourceKey]) -> tuple[ResourceKey, ...]:
        """Invalidate ``keys``; return those that were stored. All are told to listeners."""
        self._listeners.invalidating(keys)
        return self._remove(dict.fromkeys(keys))

    def drop_where(self, matches: Callable[[ResourceKey], bool]) -> tuple[ResourceKey, ...]:
        """Invalidate every key that matches; return those that were stored."""
        held = [key for key in self._entries if matches(key)]
        self._listeners.invalidating_where(matches)
        return self._remove(held)

    def clear(self) -> None:
        """Invalidate every key there is."""
        self.drop_where(_any_key)

    def prune(
        self, now: float, policy_resolver: FreshnessPolicyProvider
    ) -> tuple[ResourceKey, ...]:
        """Drop all entries no reader could use under the resolver's policies; return them."""
        expired = self.drop_expired(list(self._entries), now, policy_resolver)
        return expired + self.drop_outdated(list(self._entries))

    def drop_expired(
        self, keys: Iterable[ResourceKey], now: float, policy_resolver: FreshnessPolicyProvider
    ) -> tuple[ResourceKey, ...]:
        """Drop those of ``keys`` that are beyond max stale; return the dropped."""
        dropped = []
        for key in keys:
            revision = self._entries.get(key)
            if revision is None:
                continue
            if now - revision.observed_at > policy_resolver.resolve(key).max_stale_seconds:
                self._discard(revision)
                dropped.append(key)
        self._tally.expirations += len(dropped)
        return tuple(dropped)

    def drop_outdated(self, keys: Iterable[ResourceKey]) -> tuple[ResourceKey, ...]:
        """Drop those of ``keys`` whose dependencies are no longer current; return the dropped."""
        dropped = []
        for key in keys:
            revision = self._entries.get(key)
            if revision is not None and not self._currency.holds(revision):
                self._discard(revision)
                dropped.append(key)
        self._tally.invalidations += len(dropped)
        return tuple(dropped)

    def stats(self) -> CacheStats:
        """Counts since creation, and the size now."""
        return self._tally.stats(len(self._entries), self.max_entries)

    def _discard(self, revision: Revision) -> None:
        del self._entries[revision.key]
        self._currency.removed(revision)

    def _evict(self, recency: OrderedDict[ResourceKey, Revision]) -> None:
        _, oldest = recency.popitem(last=False)
        self._currency.removed(oldest)
        self._tally.evictions += 1

    def _remove(self, keys: Iterable[ResourceKey]) -> tuple[ResourceKey, ...]:
        removed = []
        for key in keys:
            revision = self._entries.get(key)
            if revision is not None:
                self._discard(revision)
                removed.append(key)
        self._tally.invalidations += len(removed)
        for key in removed:
            self._listeners.revised(key, None)
        return tuple(removed)


def _any_key(_key: ResourceKey) -> bool:
    return True
