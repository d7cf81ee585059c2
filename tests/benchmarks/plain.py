"""The floor: what a plain dictionary and a loop need for the same work, and nothing more.

Each function looks up, compares ages, copies the payload by the cheapest means that is exact for
it, and makes a slotted record with the provenance that a reader would want. There is no
coalescing, no deadline, no capacity, no retry, no write order and no validity of derived values.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

from coalestra import ResourceKey

Copier = Callable[[Any], Any]
LIFETIME_SECONDS = 3600.0
_NOTHING: dict[Any, Any] = {}
_versions = itertools.count()


class Entry:
    """What a plain cache keeps for a key."""

    __slots__ = (
        "attempts", "authority_rank", "dependency_versions", "fetched_at", "latency_ms", "metadata",
        "observed_at", "source", "value", "version",
    )  # fmt: skip

    def __init__(self, value: Any, observed_at: float, fetched_at: float) -> None:
        self.value = value
        self.source = "plain"
        self.observed_at = observed_at
        self.fetched_at = fetched_at
        self.latency_ms = 0.0
        self.attempts = 1
        self.metadata = _NOTHING
        self.authority_rank = 0
        self.version = next(_versions)
        self.dependency_versions = _NOTHING


class Record:
    """What a plain reader gets: the facts of a `SnapshotValue`, in a slotted record."""

    __slots__ = (
        "age_seconds", "attempts", "authority_rank", "dependency_versions", "fetched_at",
        "from_cache", "key", "latency_ms", "metadata", "observed_at", "source", "stale", "value",
        "version",
    )  # fmt: skip

    def __init__(
        self, key: ResourceKey, entry: Entry, value: Any, age: float, from_cache: bool
    ) -> None:
        self.key = key
        self.value = value
        self.source = entry.source
        self.observed_at = entry.observed_at
        self.fetched_at = entry.fetched_at
        self.age_seconds = age
        self.stale = False
        self.from_cache = from_cache
        self.latency_ms = entry.latency_ms
        self.attempts = entry.attempts
        self.metadata = entry.metadata
        self.authority_rank = entry.authority_rank
        self.version = entry.version
        self.dependency_versions = entry.dependency_versions


Entries = dict[ResourceKey, Entry]


def same(value: Any) -> Any:
    """Copy what cannot change."""
    return value


def copy_of_dicts(value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Copy a dictionary of flat dictionaries."""
    return {key: inner.copy() for key, inner in value.items()}


def filled(values: Iterable[tuple[ResourceKey, Any]], copier: Copier) -> Entries:
    """Return a cache that holds copies of the values."""
    now = time.time()
    return {key: Entry(copier(value), now, now) for key, value in values}


def read(
    entries: Entries, keys: Iterable[ResourceKey], copier: Copier
) -> dict[ResourceKey, Record]:
    """Return records of what is in the cache and young enough."""
    now = time.time()
    records = {}
    for key in keys:
        entry = entries.get(key)
        if entry is None:
            continue
        age = now - entry.observed_at
        if age <= LIFETIME_SECONDS:
            records[key] = Record(key, entry, copier(entry.value), age, True)
    return records


def read_flat(entries: Entries, keys: Iterable[ResourceKey]) -> dict[ResourceKey, Record]:
    """Do the same for flat dictionaries: ``dict.copy`` called as a method is the quickest."""
    now = time.time()
    records = {}
    for key in keys:
        entry = entries.get(key)
        if entry is None:
            continue
        age = now - entry.observed_at
        if age <= LIFETIME_SECONDS:
            records[key] = Record(key, entry, entry.value.copy(), age, True)
    return records


def read_shared(entries: Entries, keys: Iterable[ResourceKey]) -> dict[ResourceKey, Record]:
    """Do the same for values that cannot change, without a copy."""
    now = time.time()
    records = {}
    for key in keys:
        entry = entries.get(key)
        if entry is None:
            continue
        age = now - entry.observed_at
        if age <= LIFETIME_SECONDS:
            records[key] = Record(key, entry, entry.value, age, True)
    return records


def keep(entries: Entries, key: ResourceKey, value: Any, copier: Copier, now: float) -> Record:
    """Put a fetched value into the cache and return a record with a copy of its own."""
    entry = entries[key] = Entry(copier(value), now, now)
    return Record(key, entry, copier(value), 0.0, False)


def publish(
    entries: Entries, key: ResourceKey, value: Any, observed_at: float, copier: Copier
) -> Record | None:
    """Put an event into the cache unless a newer one is there; return its record if it was."""
    now = time.time()
    known = entries.get(key)
    if known is not None and known.observed_at >= observed_at:
        return None
    entry = entries[key] = Entry(copier(value), observed_at, now)
    return Record(key, entry, copier(value), max(0.0, now - observed_at), False)
