"""What a reader holds while it works: readings, failures, and how a flight ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coalestra.core.errors import DependencyCycleError, ResourceResolutionError, SourceFailure
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision


class Reading:
    """One reader's view of a sealed revision: how old it was, and how the reader came by it.

    `notes` is metadata for this reader; `fallback` is the error that a stale value stands in for.
    """

    __slots__ = ("age", "fallback", "from_cache", "notes", "revision", "stale")

    def __init__(
        self,
        revision: Revision,
        age: float,
        *,
        stale: bool = False,
        from_cache: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.revision: Revision = revision
        self.age: float = age
        self.stale: bool = stale
        self.from_cache: bool = from_cache
        self.notes: Mapping[str, Any] | None = notes
        self.fallback: Exception | None = None

    def noted(self, **notes: Any) -> Reading:
        """Return the same reading with more metadata for this reader only."""
        noted = Reading(
            self.revision,
            self.age,
            stale=self.stale,
            from_cache=self.from_cache,
            notes={**(self.notes or {}), **notes},
        )
        noted.fallback = self.fallback
        return noted

    def __repr__(self) -> str:
        return f"<Reading {self.revision.key} age={self.age:.3f} stale={self.stale}>"


class Failure:
    """Why a key has no value, kept as facts.

    Every reader gets an exception of its own, because a raised exception grows a traceback.
    """

    __slots__ = ("cycle", "key", "make")

    def __init__(
        self,
        key: ResourceKey,
        make: Callable[[], Exception],
        *,
        cycle: tuple[ResourceKey, ...] | None = None,
    ) -> None:
        self.key: ResourceKey = key
        self.make: Callable[[], Exception] = make
        self.cycle: tuple[ResourceKey, ...] | None = cycle

    @classmethod
    def of_sources(cls, key: ResourceKey, failures: tuple[SourceFailure, ...]) -> Failure:
        """Return the failure of a key whose every source failed."""
        return cls(key, lambda: ResourceResolutionError(key, failures))

    @classmethod
    def of_cycle(cls, key: ResourceKey, path: tuple[ResourceKey, ...]) -> Failure:
        """Return the failure of a key that takes part in, or depends on, a cycle."""
        return cls(key, lambda: DependencyCycleError(path), cycle=path)

    def __repr__(self) -> str:
        return f"<Failure {self.key}: {self.make()}>"


class Failed:
    """How a flight ended that brought no value: a failure, with the best stale candidate."""

    __slots__ = ("failure", "stale")

    def __init__(self, failure: Failure, stale: Reading | None = None) -> None:
        self.failure: Failure = failure
        self.stale: Reading | None = stale

    def __repr__(self) -> str:
        return f"<Failed {self.failure}>"


Settlement = Reading | Failed
"""How a flight ended: with a reading for everyone, or without."""
