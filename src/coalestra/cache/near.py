"""What is kept in memory of a cache that has to be awaited, for as long as that can be trusted.

Laws:

1. It serves only while it is trusted. Where the cache tells of changes, that is while all news that
   have arrived have been taken in, and none may be missing; else for a short time after reading.
   While news may be missing nobody joins a reading that has begun before, either.
2. What was read before a change of its key is never put in after it: whoever reads or writes keeps
   a `Filling` open meanwhile, which learns of the changes.
3. After a time even a trusted entry is looked up again.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from coalestra.cache.calls import has
from coalestra.cache.store import EntryStore, Listeners
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.protocols import AsyncCache
from coalestra.core.results import CacheLookup
from coalestra.core.validation import integer, number, require_methods
from coalestra.core.values import Revision, SnapshotValue

# A cache of one's own with a memory in front -----------------------------------------------------


class NearCache:
    """Any cache, with its values kept in memory as well: a warm read waits for nothing.

    What other processes change is seen after ``near_seconds`` at the latest; if the cache tells of
    changes (`TellingCache`), at once. What this process changes it sees at once in any case.
    `RedisCache` has such a memory by itself.

    Args:
        cache: the cache; it stays the application's.
        near_entries: how many entries are kept in memory.
        near_seconds: after so long an entry is looked up in the cache again.

    Raises:
        TypeError, ValueError: for a cache without the methods of one, or a number out of bounds.
    """

    def __init__(
        self, cache: AsyncCache, *, near_entries: int = 10_000, near_seconds: float = 1.0
    ) -> None:
        require_methods("cache", cache, "get", "set", "invalidate", "clear")
        self.cache: AsyncCache = cache
        self.near_entries: int = integer("near_entries", near_entries, minimum=1)
        self.near_seconds: float = number("near_seconds", near_seconds, above=0)

    def __repr__(self) -> str:
        return f"NearCache({self.cache!r})"

    def __getattr__(self, name: str) -> Any:
        # All that the cache itself can do, such as `get_many`, `stats` or `aclose`.
        if name.startswith("_") or name == "cache":
            raise AttributeError(name)
        return getattr(self.cache, name)

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        """Ask the cache itself."""
        return await self.cache.get(key, now=now, policy=policy)

    async def set(self, value: SnapshotValue[Any], **terms: Any) -> None:
        """Store in the cache itself."""
        await self.cache.set(value, **terms)

    async def invalidate(self, key: ResourceKey) -> None:
        """Remove from the cache itself."""
        await self.cache.invalidate(key)

    async def clear(self) -> None:
        """Empty the cache itself."""
        await self.cache.clear()


# The memory --------------------------------------------------------------------------------------

_SPARE_DUE = 1000


class Filling:
    """One reading or writing under way: what has changed since it began."""

    __slots__ = ("changed", "void")

    def __init__(self) -> None:
        self.changed: dict[ResourceKey, str | None] = {}
        self.void: bool = False

    def allows(self, revision: Revision) -> bool:
        """Whether a revision may still be put in."""
        if self.void:
            return False
        return self.changed.get(revision.key, revision.version) == revision.version


class Near:
    """The memory in front of one cache on one event loop; it hears the cache's news, if it tells.

    Args:
        cache: the cache.
        entries, seconds: how many are kept, 0 for none, and for how long without being looked up
            again.
        listeners: who hears of what others have changed.
        on_their_way: values that count as held until they are written; of no use once changed.
    """

    def __init__(
        self,
        cache: Any,
        entries: int,
        seconds: float,
        listeners: Listeners,
        on_their_way: MutableMapping[ResourceKey, Revision],
    ) -> None:
        self.store: EntryStore = EntryStore(max(1, entries))
        self._serves = entries > 0
        self._on_their_way = on_their_way
        self._seconds = seconds
        self._listeners = listeners
        self._fillings: set[Filling] = set()
        self._due: OrderedDict[ResourceKey, float] = OrderedDict()
        self._caught_up: Callable[[], bool] | None = None
        self._was_caught_up = False
        if has(cache, "subscribe", "unsubscribe", "caught_up"):
            self._caught_up = cache.caught_up
            cache.subscribe(self)

    def __repr__(self) -> str:
        return f"<Near {self.store!r}>"

    @property
    def is_behind(self) -> bool:
        """Whether the cache tells of changes, and some may be missing at this moment."""
        return self._caught_up is not None and not self._caught_up()

    def trusted(self) -> EntryStore | None:
        """Return the entries, if they can be trusted at this moment."""
        if self.is_behind:
            if self._was_caught_up:  # before the first news nobody has heard of anything
                self._on_their_way.clear()
                self._listeners.tell(lambda each: each.cut_off())
            return None
        self._was_caught_up = True
        if not self._serves:
            return None
        if self._due:
            now = time.monotonic()
            while self._due and next(iter(self._due.values())) <= now:
                self.store.drop(self._due.popitem(last=False)[:1])
        return self.store

    @contextmanager
    def filling(self) -> Iterator[Filling]:
        """Read or write, and learn meanwhile of the changes."""
        filling = Filling()
        self._fillings.add(filling)
        try:
            yield filling
        finally:
            self._fillings.discard(filling)

    def put(self, filling: Filling, revision: Revision) -> None:
        """Keep what was read or written, unless it has changed since."""
        if not filling.allows(revision) or not self._serves:
            return
        held = self.store.peek(revision.key)
        if held is None or held.version != revision.version:
            self.store.put(revision, force=True)
        self._due[revision.key] = time.monotonic() + self._seconds
        self._due.move_to_end(revision.key)
        if len(self._due) > 2 * len(self.store) + _SPARE_DUE:  # most have left it since
            self._due = OrderedDict((k, due) for k, due in self._due.items() if k in self.store)

    def wrote(self, filling: Filling, revision: Revision) -> None:
        """Keep what this process has stored; what others of it have read before is not kept."""
        certain = filling.allows(revision)  # else who knows which of the two came last
        self.drop({revision.key: revision.version if certain else None})
        self.put(filling, revision)

    def drop(self, versions: Mapping[ResourceKey, str | None]) -> None:
        """Forget keys that this process changes; only these versions may be put in after it."""
        for filling in self._fillings:
            filling.changed.update(versions)
        self.store.drop(versions)

    # News -------------------------------------------------------------------------------------

    def changed(self, key: ResourceKey, version: str | None) -> None:
        """Learn that the key's value is of this version now; None for none."""
        for filling in self._fillings:
            filling.changed[key] = version
        held = self.store.peek(key)
        if version is None or held is None or held.version != version:
            self.store.drop((key,))
            self._on_their_way.pop(key, None)
            self._listeners.tell(lambda each: each.invalidating({key: version}))

    def missed(self) -> None:
        """Learn that anything may have changed."""
        for filling in self._fillings:
            filling.void = True
        self._due.clear()
        self._on_their_way.clear()
        self.store.clear()
        self._listeners.tell(lambda each: each.invalidating_where(lambda _: True))
