"""Finding many entries at once, if nothing has to be done about any of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

from coalestra.cache.tally import Tally
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision


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
