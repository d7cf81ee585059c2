"""What one unit of work did: how each key was obtained, what it waited for, which calls were made.

A trace is a record, made of facts that were noted on the way. All times are seconds since the unit
of work began, on the clock of its event loop; what another unit of work had begun before that has
negative ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from coalestra.core.frozen import FrozenDict, frozen
from coalestra.core.keys import ResourceKey

__all__ = [
    "AttemptTrace",
    "CallTrace",
    "Foundation",
    "KeyTrace",
    "Obtained",
    "SourceRefusal",
    "StageTrace",
    "Trace",
    "Wait",
    "WaitReason",
]


class Obtained(str, Enum):
    """How a unit of work came by the value of a key."""

    CACHE = "cache"
    """Fresh in the cache."""
    NEAR_CACHE = "near_cache"
    """Fresh in the memory that lies before a shared cache."""
    STALE = "stale"
    """Stale in the cache, served while it is refreshed in the background."""
    PINNED = "pinned"
    """Read by an earlier stage of the session."""
    FETCHED = "fetched"
    """From a source, by a call that was made meanwhile."""
    DERIVED = "derived"
    """From a derived source, by a call that was made meanwhile."""
    PUBLISHED = "published"
    """By an event that came, or a newer value that was stored, while it was being acquired."""
    FALLBACK = "fallback"
    """A stale value that stands in, as every source failed or the deadline passed."""
    FAILED = "failed"
    """Not at all."""


class WaitReason(str, Enum):
    """What a key waited for, beside the calls that were made for it."""

    FLIGHT = "flight"
    """For an acquisition that another unit of work had begun."""
    CACHE = "cache"
    """For the answer of a cache that has to be awaited."""
    DEPENDENCIES = "dependencies"
    """For what it is derived from."""
    PUBLICATION = "publication"
    """For the end of a publication of the same key."""
    STORE = "store"
    """For the value to be stored in a cache that has to be awaited."""


@dataclass(frozen=True)
class Wait:
    """One stretch of waiting of a key.

    Attributes:
        reason: what it waited for.
        start, end: from when to when; `end` is that of the trace if it was not over by then.
        detail: for a flight the id of the snapshot it had been begun for, else empty.
    """

    reason: WaitReason
    start: float
    end: float
    detail: str = ""


@dataclass(frozen=True)
class SourceRefusal:
    """That a source brought nothing for a key, and why.

    Attributes:
        source: its name.
        at: when that was known.
        status: ``failure``, ``stale``, ``circuit_open``, ``invalid_timestamp`` or ``absent``.
        error_type, message: what it failed with.
    """

    source: str
    at: float
    status: str
    error_type: str
    message: str


@dataclass(frozen=True)
class Foundation:
    """One revision that a derived value was made from.

    Attributes:
        key: what it is a value of.
        version, source: which one, and where it came from.
        observed_at: when it held true, in wall-clock seconds since the epoch.
    """

    key: ResourceKey
    version: str
    source: str
    observed_at: float


@dataclass(frozen=True)
class KeyTrace:
    """How one key was obtained.

    Attributes:
        key: the key.
        obtained: how its value was come by.
        start, end: from when it was looked for to when the unit of work had it.
        requested: whether it was asked for; else a derived value needed it.
        source: where the value came from; None if there is none.
        version: of the value; None if there is none.
        joined: the id of the snapshot that had begun to acquire it; None if this one did, or
            nobody had to.
        waits: what it waited for beside calls, in order.
        calls: the calls that carried it, as indexes of `Trace.calls`.
        refusals: the sources that were tried in vain.
        rests_on: what a derived value was made from.
        refresh: ``scheduled`` if it set off a refresh, ``under_way`` if one was, else None.
        error_type, error: why it has no value, or what a fallback stands in for; None if neither.
    """

    key: ResourceKey
    obtained: Obtained
    start: float
    end: float
    requested: bool = True
    source: str | None = None
    version: str | None = None
    joined: str | None = None
    waits: tuple[Wait, ...] = ()
    calls: tuple[int, ...] = ()
    refusals: tuple[SourceRefusal, ...] = ()
    rests_on: tuple[Foundation, ...] = ()
    refresh: str | None = None
    error_type: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class AttemptTrace:
    """One attempt of a call.

    Attributes:
        number: 1 for the first.
        start: when it asked for capacity (and before that, for copies of its inputs).
        called: when the source was called; None if it never was.
        end: when its outcome was known.
        outcome: ``success``, ``failure``, ``timeout``, ``deadline``, ``abandoned`` or
            ``under_way``.
        holders: who held the capacity that it waited for, by name of source, with the number of
            slots.
        error_type, error: what it failed with, or None.
        pause_seconds: how long the call then rested before the next attempt; None if it was the
            last.
    """

    number: int
    start: float
    called: float | None
    end: float
    outcome: str
    holders: tuple[tuple[str, int], ...] = ()
    error_type: str | None = None
    error: str | None = None
    pause_seconds: float | None = None


@dataclass(frozen=True)
class CallTrace:
    """One call of a source, for one key or a batch of them.

    Attributes:
        source: its name.
        kind: ``single``, ``batch`` or ``derived``.
        snapshot_id: of the unit of work that made it, which may be another one.
        keys: how many keys it was made for.
        start: when it was made; its first attempt may begin later.
        end: when its last key was settled.
        outcome: that of its last attempt, or ``circuit_open``.
        attempts: its attempts in order; none if it was never let through.
        error_type, error: what it failed with, or None.
    """

    source: str
    kind: str
    snapshot_id: str
    keys: int
    start: float
    end: float
    outcome: str
    attempts: tuple[AttemptTrace, ...] = ()
    error_type: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class StageTrace:
    """One stage of a unit of work, such as a ``resolve`` of a session.

    Attributes:
        name: ``build``, ``resolve``, ``revalidate`` or ``refresh``; ``delivery`` for the copies
            that the reader gets.
        start, end: from when to when.
        keys: how many keys it was for.
    """

    name: str
    start: float
    end: float
    keys: int


@dataclass(frozen=True, repr=False)
class Trace:
    """What one unit of work did.

    Attributes:
        snapshot_id: the id of its snapshot.
        kind: ``build``, ``session`` or ``refresh``.
        parent_snapshot_id: the snapshot that set off a refresh, else None.
        started_at: when it began, in wall-clock seconds since the epoch.
        duration_seconds: how long it had taken when the trace was made.
        stages: in order.
        keys: how each was obtained, in the order in which they were looked for.
        calls: the calls that its keys took part in.
        omitted_keys: how many more keys there were than a trace has room for.
    """

    snapshot_id: str
    kind: str
    parent_snapshot_id: str | None
    started_at: float
    duration_seconds: float
    stages: tuple[StageTrace, ...] = ()
    keys: Mapping[ResourceKey, KeyTrace] = field(default_factory=FrozenDict)
    calls: tuple[CallTrace, ...] = ()
    omitted_keys: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", frozen(self.keys))

    def __repr__(self) -> str:
        return (
            f"Trace({self.kind} {self.snapshot_id}, {self.duration_seconds * 1000:.3f} ms, "
            f"keys={len(self.keys)}, calls={len(self.calls)})"
        )
