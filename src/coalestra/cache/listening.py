"""What a cache tells those who have work under way for its keys."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from coalestra.cache.write_order import Ranked
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision


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
