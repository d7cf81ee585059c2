"""Whether a derived entry still rests on the current revisions of what it was made from.

An entry is current when each dependency version it recorded is the version stored now, and those
entries are current themselves. Answers are kept on the revisions (``Revision.checked``) and stay
good until an entry that somebody's answer relied on is replaced or removed, so a run of questions
costs each entry and each edge once. Walking is iterative: chains may be very deep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision

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
