"""What all users of a cache that has to be awaited share on one event loop.

That is turns per key, the values on their way into the cache, who hears of changes, and what is
kept of it in memory. Laws of that memory:

1. It serves only while it is trusted. Where the cache tells of changes, that is while all news that
   have arrived have been taken in, and none may be missing; else for a short time after reading.
2. What was read before a change of its key is never put in after it: whoever reads or writes keeps
   a `Filling` open meanwhile, which learns of the changes.
3. After a time even a trusted entry is looked up again.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from coalestra.cache.calls import has
from coalestra.cache.store import UNCHECKED, EntryStore, Listeners, Outcome
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.protocols import AsyncCache
from coalestra.core.validation import integer, number, require_methods
from coalestra.core.values import CacheLookup, CacheWriteStatus, Revision, SnapshotValue


class NearCache:
    """Any cache, with its values kept in memory as well: a warm read waits for nothing.

    What other processes change is seen after ``near_seconds`` at the latest; if the cache tells of
    changes (`TellingCache`), at once. What this process changes it sees at once in any case.
    `RedisCache` has such a memory by itself.

    Args:
        cache: the cache; it stays the application's.
        near_entries: how many entries are kept in memory.
        near_seconds: after so long an entry is looked up in the cache again.
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


class KeyLanes:
    """First-in, first-out turns for any number of keys; nothing is kept for an idle one."""

    def __init__(self) -> None:
        self._last: dict[ResourceKey, asyncio.Future[None]] = {}

    def __repr__(self) -> str:
        return f"KeyLanes({len(self._last)} busy)"

    def __len__(self) -> int:
        return len(self._last)

    @asynccontextmanager
    async def turn(
        self, keys: Collection[ResourceKey], after: Collection[ResourceKey] = ()
    ) -> AsyncIterator[None]:
        """Hold all of ``keys`` once those who came before have let go of each, and of ``after``.

        It queues for all of them in one step, so that operations over several keys cannot block
        each other in a circle. Who breaks the wait off keeps the place until it would have come.
        """
        over = asyncio.get_running_loop().create_future()
        ahead = {self._last[key] for key in (*keys, *after) if key in self._last}
        self._last.update(dict.fromkeys(keys, over))

        def passed(ended: asyncio.Future[None] | None = None) -> None:
            ahead.discard(ended)
            if not ahead and not over.get_loop().is_closed():
                for key in keys:
                    if self._last.get(key) is over:
                        del self._last[key]
                over.set_result(None)

        try:
            if ahead:
                await asyncio.wait(ahead)
                ahead.clear()
            yield
        finally:
            passed()
            for each in tuple(ahead):
                each.add_done_callback(passed)


_SPARE_DUE = 1000


@dataclass(slots=True, eq=False)
class Filling:
    """One reading or writing under way, and how many changes there had been when it began."""

    began: int
    void: bool = False


class Channel:
    """What the users of one cache object have in common on one event loop.

    A publisher made by the application and a builder over the same cache meet here, so the builder
    hears of what the publisher does, and both of what the cache tells, if it does. It holds cache
    and loop, so neither identity can be taken by another object while the channel lives.

    Attributes:
        listeners: who hears of changes.
        on_their_way: values that count as held until they are written; of no use once changed.
        store: what is kept in memory; see `trusted`.
    """

    def __init__(self, cache: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        self.lanes: KeyLanes = KeyLanes()
        self.listeners: Listeners = Listeners()
        self.on_their_way: dict[ResourceKey, Revision] = {}
        entries = getattr(cache, "near_entries", 0)
        self._seconds = getattr(cache, "near_seconds", 0.0)
        counts = type(entries) is int and type(self._seconds) in (int, float)
        self._serves = counts and entries > 0 and self._seconds > 0
        self.store: EntryStore = EntryStore(entries if self._serves else 1)
        self._cache = cache
        self._fillings: dict[Filling, None] = {}
        # What has changed since the oldest of them began, the latest last: the how manieth change.
        self._changed: OrderedDict[ResourceKey, tuple[int, str | None]] = OrderedDict()
        self._changes = 0
        self._due: OrderedDict[ResourceKey, float] = OrderedDict()
        self._tells = has(cache, "subscribe", "unsubscribe", "caught_up")
        self._hears = False
        if self._tells:
            with suppress(Exception):  # what it tells is missed then, all the time
                cache.subscribe(self)
                self._hears = True

    def __repr__(self) -> str:
        return f"Channel({type(self._cache).__name__}, {self.lanes!r}, {self.listeners!r})"

    @property
    def is_behind(self) -> bool:
        """Whether the cache tells of changes, and some may be missing at this moment."""
        try:
            return self._tells and not (self._hears and self._cache.caught_up())
        except Exception:  # it does not know
            return True

    @property
    def waiting(self) -> Mapping[ResourceKey, Revision]:
        """The values on their way, as long as others cannot have replaced them unheard."""
        return {} if self.is_behind else self.on_their_way

    def trusted(self) -> EntryStore | None:
        """Return the entries, if they can be trusted at this moment."""
        if self.is_behind or not self._serves:
            return None
        if self._due:
            now = time.monotonic()
            gone = [key for key, _ in takewhile(lambda due: due[1] <= now, self._due.items())]
            if gone:
                self.store.drop(gone)
                for key in gone:
                    del self._due[key]
        return self.store

    @contextmanager
    def filling(self) -> Iterator[Filling]:
        """Read or write, and learn meanwhile of the changes."""
        filling = Filling(self._changes)
        self._fillings[filling] = None
        try:
            yield filling
        finally:
            del self._fillings[filling]
            oldest = next(iter(self._fillings), Filling(self._changes)).began
            while self._changed and next(iter(self._changed.values()))[0] <= oldest:
                self._changed.popitem(last=False)

    def _note(self, versions: Mapping[ResourceKey, str | None]) -> None:
        """Let those who read or write at this moment know what has changed."""
        if self._fillings:
            self._changes += 1
            for key, version in versions.items():
                self._changed[key] = self._changes, version
                self._changed.move_to_end(key)

    def _allows(self, filling: Filling, revision: Revision) -> bool:
        """Whether a revision may still be put in."""
        number, version = self._changed.get(revision.key, (0, None))
        return not filling.void and (number <= filling.began or version == revision.version)

    def put(self, filling: Filling, revisions: Iterable[Revision]) -> None:
        """Keep what was read or written, unless it has changed since."""
        if not self._serves:
            return
        allowed = [each for each in revisions if self._allows(filling, each)]
        new: dict[ResourceKey, Revision] = {}
        for each in allowed:
            held = self.store.peek(each.key)
            if held is None or held.version != each.version:
                new[each.key] = each
                each.checked = UNCHECKED  # it may have been here before
        self.store.put_many(new, force=True)
        due = time.monotonic() + self._seconds
        for each in allowed:
            self._due[each.key] = due
            self._due.move_to_end(each.key)
        if len(self._due) > 2 * len(self.store) + _SPARE_DUE:  # most have left it since
            self._due = OrderedDict((k, due) for k, due in self._due.items() if k in self.store)

    def wrote(self, filling: Filling, outcomes: Collection[Outcome]) -> None:
        """Keep what this process has stored, or found; what others of it read before is not kept.

        What has changed meanwhile is not, either: who knows which of the two came last.
        """
        if not self._serves:
            return
        stored = [current for status, current, _ in outcomes if status is CacheWriteStatus.STORED]
        certain = {each.key: self._allows(filling, each) for each in stored}
        self.drop({each.key: each.version if certain[each.key] else None for each in stored})
        self.put(filling, [current for _, current, _ in outcomes])

    def drop(self, versions: Mapping[ResourceKey, str | None]) -> None:
        """Forget keys that this process changes; only these versions may be put in after it."""
        if self._serves:
            self._note(versions)
            self.store.drop(versions)

    def invalidate(self, versions: Mapping[ResourceKey, str | None]) -> None:
        """Forget keys that are invalidated now, and tell; see `CacheListener.invalidating`."""
        self.drop(versions)
        for key in versions:
            self.on_their_way.pop(key, None)
        self.listeners.tell(lambda each: each.invalidating(versions))

    # News -------------------------------------------------------------------------------------

    def changed(self, key: ResourceKey, version: str | None) -> None:
        """Learn that the key's value is of this version now; None for none."""
        held = self.store.peek(key)
        if version is None or held is None or held.version != version:
            self.invalidate({key: version})
        self._note({key: version})

    def missed(self) -> None:
        """Learn that anything may have changed."""
        for filling in self._fillings:
            filling.void = True
        self._due.clear()
        self.on_their_way.clear()
        self.store.clear()
        self.listeners.tell(lambda each: each.invalidating_where(lambda _: True))


_channels: weakref.WeakValueDictionary[tuple[int, int], Channel] = weakref.WeakValueDictionary()


def channel_of(cache: AsyncCache, loop: asyncio.AbstractEventLoop) -> Channel:
    """Return the channel of ``cache`` on ``loop``; it lives while somebody uses it."""
    identity = (id(cache), id(loop))
    channel = _channels.get(identity)
    if channel is None:
        channel = _channels[identity] = Channel(cache, loop)
    return channel
