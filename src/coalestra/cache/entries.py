"""The entry store: cached revisions by key, without awaiting.

Laws:

1. What ``find`` returns is within max stale of the reader's policy and, if derived, rests on the
   revisions stored now.
2. ``put`` follows the write order; an outdated derived entry defends nothing.
3. The least recently written or found entry leaves first.
4. Listeners hear of every change except evictions and expiries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from coalestra.cache.listening import CacheListener, Listeners
from coalestra.cache.quiet import QuietEntries
from coalestra.cache.tally import Tally
from coalestra.cache.validity import UNCHECKED, Currency
from coalestra.cache.write_order import decide
from coalestra.core.freshness import FreshnessPolicy, FreshnessPolicyProvider
from coalestra.core.keys import ResourceKey
from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision

if TYPE_CHECKING:
    from coalestra.core.cache_stats import CacheStats

_STORED = CacheWriteStatus.STORED


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
