"""What sources return, applications publish, caches answer, and snapshots hold."""

from __future__ import annotations

import enum
import os
from binascii import b2a_base64
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import count
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, final

from coalestra.core.frozen import EMPTY, FREE_THREADED, FrozenDict, draft_of, empty, frozen, record
from coalestra.core.keys import ResourceKey
from coalestra.core.serialization import json_safe, utc_text
from coalestra.core.validation import concealed, flag, instance, mapping, number, text

__all__ = [
    "CacheLookup", "CacheStats", "CacheWriteResult", "CacheWriteStatus", "PublishResult",
    "PublishStatus", "RefreshState", "ResourceUpdate", "SnapshotValue", "SourcePayload",
]  # fmt: skip

T = TypeVar("T")

_process = ""
_ids: deque[str] = deque()
next_number: Callable[[], int] = count(1).__next__
"""Returns the next number of this process: what asks earlier has the smaller one."""


def _enter_process() -> None:
    # Eight characters: with these, ten million versions take no more than 64 bytes each.
    global _process  # noqa: PLW0603 - read for every revision there is
    _process = b2a_base64(os.urandom(6), newline=False).decode()
    _ids.clear()


_enter_process()
if hasattr(os, "register_at_fork"):  # a forked child counts on from the same number
    os.register_at_fork(after_in_child=_enter_process)


def new_id() -> str:
    """Return 32 hexadecimal digits that are no other snapshot's, in this process or any other."""
    try:
        return _ids.pop()
    except IndexError:  # randomness is cheaper by the kilobyte
        digits = os.urandom(4096).hex()
        _ids.extend([digits[start : start + 32] for start in range(32, len(digits), 32)])
        return digits[:32]


def version_of(number: int) -> str:
    """Return the version that a number stands for; no other process has the same."""
    return f"{_process}{number}"


def next_version() -> str:
    """Return a name for a new revision; no other one has it, in this process or any other."""
    return f"{_process}{next_number()}"


def number_of(version: str) -> int:
    """Return the number behind a version that was made in this process; 0 for any other."""
    digits = version[len(_process) :]
    return int(digits) if version.startswith(_process) and digits.isdecimal() else 0


@final
@record(final=True, init=False, repr=False)
class SourcePayload(Generic[T]):
    """What a source returns when it has more to say than the bare value.

    Attributes:
        value: the value.
        observed_at: when it was true, in wall-clock seconds since the epoch; None for the moment
            at which the call ends.
        metadata: anything worth knowing about it; read-only.
    """

    value: T
    observed_at: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=empty)

    def __init__(
        self, value: T, observed_at: float | None = None, metadata: Mapping[str, Any] = EMPTY
    ) -> None:
        if observed_at is not None and (
            type(observed_at) is not float or not isfinite(observed_at)
        ):
            number("observed_at", observed_at)
        if type(metadata) is not FrozenDict:
            metadata = frozen(mapping("metadata", metadata))
        _set_value(self, value)
        _set_observed_at(self, observed_at)
        _set_metadata(self, metadata)

    def __repr__(self) -> str:
        return concealed(self, "value", "metadata")


# A source makes one for every key: this takes half the time of ``object.__setattr__``.
_members: Any = SourcePayload
_set_value = _members.value.__set__
_set_observed_at = _members.observed_at.__set__
_set_metadata = _members.metadata.__set__


def check_update(key: object, source: object, observed_at: object, metadata: object) -> None:
    """Raise TypeError or ValueError for what cannot make a `ResourceUpdate`."""
    if type(key) is not ResourceKey:
        instance("key", key, ResourceKey)
    if type(source) is not str or not source or source.isspace():
        text("source", source)
    if observed_at is not None and (type(observed_at) is not float or not isfinite(observed_at)):
        number("observed_at", observed_at)
    if type(metadata) is not FrozenDict:
        mapping("metadata", metadata)


@record(repr=False)
class ResourceUpdate(Generic[T]):
    """A value that an application publishes, because it learnt of it without asking.

    Attributes:
        key: the resource.
        value: its new value.
        source: who says so; counts for authority.
        observed_at: when it was true, in wall-clock seconds since the epoch; None for now.
        metadata: anything worth knowing about it; read-only.
    """

    key: ResourceKey
    value: T
    source: str
    observed_at: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=empty)

    def __post_init__(self) -> None:
        check_update(self.key, self.source, self.observed_at, self.metadata)
        if type(self.metadata) is not FrozenDict:
            object.__setattr__(self, "metadata", frozen(self.metadata))

    def __repr__(self) -> str:
        return concealed(self, "value", "metadata")


# What a derived value was made from ---------------------------------------------------------------


class Grounds(NamedTuple):
    """What lies below a derived value, on whatever level.

    Attributes:
        oldest, oldest_at: what was observed longest ago, and when, in wall-clock seconds.
        perishing, stale_at: what is the first to go stale, and when: before all times if it was
            stale when it was used.
        inherited_at: when the oldest of the direct inputs was observed, if the value inherits their
            freshness; else None.
        fresh_until: then also until when all of them are fresh; else after all times.
    """

    oldest: ResourceKey
    oldest_at: float
    perishing: ResourceKey
    stale_at: float
    inherited_at: float | None
    fresh_until: float


class Dependencies(FrozenDict[ResourceKey, str]):
    """The versions that a value was derived from, with what is known of all that lies below."""

    __slots__ = ("grounds",)

    def __init__(self, versions: Mapping[ResourceKey, str], grounds: Grounds) -> None:
        super().__init__(versions)
        self.grounds = grounds

    def __deepcopy__(self, _memo: dict[int, Any]) -> Dependencies:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Dependencies, (dict(self), self.grounds)


def grounds_of(versions: Mapping[ResourceKey, str]) -> Grounds | None:
    """Return what lies below the value that was derived from ``versions``; None if unknown."""
    return versions.grounds if type(versions) is Dependencies else None


_PER_SLICE = 512


def dependencies_on(
    inputs: Iterable[tuple[Revision, float]], *, inherits: bool
) -> Generator[None, None, FrozenDict[ResourceKey, str]]:
    """Return what a value rests on that is derived from ``inputs``, in slices of a few hundred.

    These are revisions, and until when, in wall-clock seconds, each is fresh by itself; the value
    may inherit that.
    """
    versions: dict[ResourceKey, str] = {}
    oldest = perishing = None
    oldest_at = stale_at = inherited_at = fresh_until = inf
    for revision, until in inputs:
        key = first = last = revision.key
        at = seen_at = revision.observed_at
        soonest = until
        versions[key] = revision.version
        below = grounds_of(revision.dependency_versions)
        if below is not None:
            if below.inherited_at is not None:
                seen_at, until = min(at, below.inherited_at), min(until, below.fresh_until)
            if below.oldest_at <= at:
                first, at = below.oldest, below.oldest_at
            if below.stale_at <= soonest:
                last, soonest = below.perishing, below.stale_at
        if oldest is None or at < oldest_at:
            oldest, oldest_at = first, at
        if perishing is None or soonest < stale_at:
            perishing, stale_at = last, soonest
        if seen_at < inherited_at:
            inherited_at = seen_at
        if until < fresh_until:
            fresh_until = until
        if not len(versions) % _PER_SLICE:
            yield
    if oldest is None or perishing is None:
        return EMPTY
    seen = (inherited_at, fresh_until) if inherits else (None, inf)
    return Dependencies(versions, Grounds(oldest, oldest_at, perishing, stale_at, *seen))


class RefreshState(str, enum.Enum):
    """What is being done about a value that was served although, or before, it is stale."""

    NONE = "none"
    """Nothing, as nothing is due."""
    UNDER_WAY = "under_way"
    """It is being refreshed in the background."""
    FAILING = "failing"
    """The last refresh of this very value failed: its sources are down, or spared by a circuit.

    The next one is tried all the same.
    """


_ROUNDING_SECONDS = 1e-6
"""A time that is put together from two others may be off by less than this."""


@final
@record(final=True, repr=False)
class SnapshotValue(Generic[T]):
    """A value with its provenance.

    Attributes:
        key: the resource.
        value: its value, this reader's own.
        source: the name of the source it came from.
        observed_at: when it was true, in wall-clock seconds since the epoch; of a value that
            inherits its freshness, when the oldest of its inputs was.
        fetched_at: when it was got, in wall-clock seconds since the epoch.
        age_seconds: how long before its delivery it was observed; never negative.
        stale: whether that is longer than its time to live, or one of the inputs that it inherits
            its freshness from is stale.
        from_cache: whether it was in the cache already.
        latency_ms: how long getting it from the source took.
        attempts: how many calls that took; 0 if it was published.
        metadata: what the source and the library say about it; read-only.
        authority_rank: how much its source counts when values compete. Not compared.
        version: an opaque name of this revision, the same in all its copies. Not compared.
        dependency_versions: the versions it was derived from, by key; empty unless it was
            derived. Not compared.
    """

    key: ResourceKey
    value: T
    source: str
    observed_at: float
    fetched_at: float
    age_seconds: float
    stale: bool
    from_cache: bool
    latency_ms: float
    attempts: int = 1
    metadata: Mapping[str, Any] = field(default_factory=empty)
    authority_rank: int = field(default=0, compare=False)
    version: str = field(default_factory=next_version, compare=False)
    dependency_versions: Mapping[ResourceKey, str] = field(default_factory=empty, compare=False)

    def __post_init__(self) -> None:
        for name in ("metadata", "dependency_versions"):
            given = getattr(self, name)
            if not isinstance(given, FrozenDict):
                _WRITE[name](self, frozen(mapping(name, given)))
        for name in ("observed_at", "fetched_at", "age_seconds", "latency_ms"):
            number(name, getattr(self, name))

    def __repr__(self) -> str:
        return concealed(self, "value", "metadata")

    @property
    def ordered_at(self) -> float:
        """When it counts in the write order: as dated, else when its reading began; wall seconds.

        A value that its source did not date is as of the end of its reading for freshness, but
        what it knows may be as old as the beginning.
        """
        return self.observed_at if self.dated else self.fetched_at - self.latency_ms / 1000

    @property
    def dated(self) -> bool:
        """Whether ``observed_at`` is what its source or publisher said, as far as can be told."""
        grounds = grounds_of(self.dependency_versions)
        inherited = grounds is not None and grounds.inherited_at == self.observed_at
        return self.observed_at != self.fetched_at and not inherited

    @property
    def inherits_freshness(self) -> bool:
        """Whether it is as old as the oldest of its inputs, and stale if one is."""
        grounds = grounds_of(self.dependency_versions)
        return grounds is not None and grounds.inherited_at is not None

    @property
    def oldest_observed_at(self) -> float:
        """When the oldest of all that it rests on was observed, on any level; wall-clock seconds.

        Of a value that was not derived, this is ``observed_at``; so it is where a cache of one's
        own was asked past the builder, and does not tell.
        """
        grounds = grounds_of(self.dependency_versions)
        return self.observed_at if grounds is None else min(self.observed_at, grounds.oldest_at)

    @property
    def oldest_key(self) -> ResourceKey:
        """Which resource that was: its own, unless something older lies below it."""
        grounds = grounds_of(self.dependency_versions)
        if grounds is None or grounds.oldest_at > self.observed_at:
            return self.key
        return grounds.oldest

    @property
    def rests_on_stale(self) -> bool:
        """Whether something that it was derived from, on any level, is stale: then, or by now.

        Now is when it was delivered. Of a value that was not derived, this is ``stale``.
        """
        grounds = grounds_of(self.dependency_versions)
        if grounds is None:
            return self.stale
        return self.observed_at + self.age_seconds - grounds.stale_at > _ROUNDING_SECONDS

    @property
    def stale_key(self) -> ResourceKey | None:
        """Which resource that was, the first to go stale; None if ``rests_on_stale`` is False."""
        if not self.rests_on_stale:
            return None
        grounds = grounds_of(self.dependency_versions)
        return self.key if grounds is None else grounds.perishing

    @property
    def refresh(self) -> RefreshState:
        """What is being done in the background to renew it, as of when it was read."""
        if "refresh_scheduled" not in self.metadata:
            return RefreshState.NONE
        failing = "refresh_error_type" in self.metadata
        return RefreshState.FAILING if failing else RefreshState.UNDER_WAY

    def to_dict(self, *, include_value: bool = False) -> dict[str, Any]:
        """Return where the value comes from as JSON-safe data, times as ISO texts in UTC.

        Args:
            include_value: whether ``value`` and ``metadata`` are in it. What is no JSON, such as a
                ``Decimal``, is named by its type.
        """
        oldest_at = self.oldest_observed_at
        told = {
            "key": self.key.canonical,
            "resource": self.key.display,
            "source": self.source,
            "observed_at": utc_text(self.observed_at),
            "fetched_at": utc_text(self.fetched_at),
            "age_seconds": self.age_seconds,
            "stale": self.stale,
            "oldest_key": self.oldest_key.canonical,
            "oldest_observed_at": utc_text(oldest_at),
            "oldest_age_seconds": self.age_seconds + (self.observed_at - oldest_at),
            "rests_on_stale": self.rests_on_stale,
            "stale_key": None if self.stale_key is None else self.stale_key.canonical,
            "refresh": self.refresh.value,
            "from_cache": self.from_cache,
            "latency_ms": self.latency_ms,
            "attempts": self.attempts,
            "authority_rank": self.authority_rank,
            "version": self.version,
            "dependency_versions": {k.canonical: v for k, v in self.dependency_versions.items()},
        }
        if flag("include_value", include_value):
            told |= {"value": json_safe(self.value), "metadata": json_safe(self.metadata)}
        return told


_Draft = draft_of(SnapshotValue)
_WRITE: Any = {
    each.name: getattr(SnapshotValue, each.name).__set__ for each in fields(SnapshotValue)
}
"""What writes a field of a value, past its being frozen."""


def redated(value: SnapshotValue[T], observed_at: float) -> SnapshotValue[T]:
    """Give a value that nobody has seen yet another date, and return it."""
    _WRITE["observed_at"](value, observed_at)
    return value


# One revision of a resource as the library keeps it: sealed, shared, never handed out ------------


@dataclass(slots=True, eq=False, repr=False)
class Revision:
    """A sealed value with its provenance; equal to nothing but itself.

    What has the name of an attribute of `SnapshotValue` is what that says.

    Attributes:
        payload: the value in its sealed form; only ``seal`` knows how to open it.
        seal: how to open it.
        metadata: sealed too.
        dependencies: the very revisions it was derived from, where they are known.
        dated: whether its source or publisher said when it was true.
        began: the number of this process at which its reading began, or it was published; 0 if
            that is not known.
        checked: the run of answers of its store in which it was last found to rest on current
            revisions, or what is below 0. It may be written, as may `vouched`.
        vouched: what a builder whose derivations take it in last knew of news of what it rests on.
    """

    key: ResourceKey
    payload: Any
    seal: Any
    source: str
    observed_at: float
    fetched_at: float
    version: str
    latency_ms: float = 0.0
    attempts: int = 1
    metadata: FrozenDict[str, Any] = field(default_factory=empty)
    authority_rank: int = 0
    dependency_versions: FrozenDict[ResourceKey, str] = field(default_factory=empty)
    dependencies: tuple[Revision, ...] = ()
    dated: bool = True
    began: int = 0
    checked: int = -1
    vouched: object = None

    @property
    def grounds(self) -> Grounds | None:
        """What lies below it; None if it was not derived, or that is not known."""
        return grounds_of(self.dependency_versions)

    @property
    def ordered_at(self) -> float:
        """When it counts in the write order; see `SnapshotValue.ordered_at`."""
        return self.observed_at if self.dated else self.fetched_at - self.latency_ms / 1000

    def presented(
        self,
        payload: Any,
        metadata: FrozenDict[str, Any],
        age_seconds: float,
        stale: bool,
        from_cache: bool,
    ) -> SnapshotValue[Any]:
        """Return the value that one reader gets, around a payload and metadata of his own.

        One is made for every key that is read, so it is filled in as a draft where that is faster.
        """
        if FREE_THREADED:
            made: SnapshotValue[Any] = object.__new__(SnapshotValue)
            own: dict[str, Any] = {**locals(), "value": payload}
            for name, write in _WRITE.items():
                write(made, own[name] if name in own else getattr(self, name))
            return made
        draft: Any = _Draft()
        draft.key = self.key
        draft.value = payload
        draft.source = self.source
        draft.observed_at = self.observed_at
        draft.fetched_at = self.fetched_at
        draft.age_seconds = age_seconds
        draft.stale = stale
        draft.from_cache = from_cache
        draft.latency_ms = self.latency_ms
        draft.attempts = self.attempts
        draft.metadata = metadata
        draft.authority_rank = self.authority_rank
        draft.version = self.version
        draft.dependency_versions = self.dependency_versions
        draft.__class__ = SnapshotValue
        value: SnapshotValue[Any] = draft
        return value

    def __repr__(self) -> str:
        rests_on = len(self.dependency_versions)
        derived = f", derived from {rests_on}" if rests_on else ""
        return f"<Revision {self.key.display} {self.version} from {self.source}{derived}>"


@record
class CacheStats:
    """The counts of a cache since it was made.

    Attributes:
        size: how many entries there are now.
        max_entries: how many there may be, or None for any number.
        hits, misses: answers with and without a value.
        fresh_hits, stale_hits: the hits, by freshness.
        sets: values stored.
        invalidations: entries removed on request, or for resting on something outdated.
        evictions: entries removed to make room.
        expirations: entries removed for their age.
    """

    size: int
    max_entries: int | None
    hits: int
    misses: int
    fresh_hits: int
    stale_hits: int
    sets: int
    invalidations: int
    evictions: int
    expirations: int


class CacheWriteStatus(str, enum.Enum):
    """What became of a value offered to a cache."""

    STORED = "stored"
    IGNORED_OLDER = "ignored_older"
    IGNORED_DUPLICATE = "ignored_duplicate"
    IGNORED_LOWER_AUTHORITY = "ignored_lower_authority"


@record
class CacheLookup:
    """What a cache has for a key.

    Attributes:
        value: the cached value, or None.
        fresh: whether it is within its time to live.
        usable_stale: whether it is older, but may still be used in need.
        age_seconds: its age since it was observed, or None without a value.
    """

    value: SnapshotValue[Any] | None
    fresh: bool
    usable_stale: bool
    age_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.age_seconds is not None:
            number("age_seconds", self.age_seconds)


@record
class CacheWriteResult:
    """What a cache did with a value.

    Attributes:
        status: what became of it.
        value: what the cache holds now: the value if it was stored, else the one that stayed.
        previous: what it held before, or None.
    """

    status: CacheWriteStatus
    value: SnapshotValue[Any]
    previous: SnapshotValue[Any] | None = None

    @property
    def stored(self) -> bool:
        """Whether the value was stored."""
        return self.status is CacheWriteStatus.STORED


class PublishStatus(str, enum.Enum):
    """What became of a published value."""

    PUBLISHED = "published"
    IGNORED_OLDER = "ignored_older"
    IGNORED_DUPLICATE = "ignored_duplicate"
    IGNORED_LOWER_AUTHORITY = "ignored_lower_authority"


class _Unseen:
    """What a result has instead of values, until somebody looks at one of them."""

    __slots__ = ("_look",)


@record
class PublishResult(_Unseen):
    """What became of a published value; small values are copied when somebody looks at them.

    Attributes:
        status: whether it was published, or why not.
        value: what readers get now: the value if it was published, else the one that stayed.
        previous: what they would have got before, or None.
    """

    status: PublishStatus
    value: SnapshotValue[Any]
    previous: SnapshotValue[Any] | None = None

    @property
    def published(self) -> bool:
        """Whether the value was published."""
        return self.status is PublishStatus.PUBLISHED

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name not in ("value", "previous"):
                raise AttributeError(f"a result has no attribute {name!r}", name=name, obj=self)
            look = self._look
            if look is not None:  # else another thread has just looked
                value, previous = look()
                _RESULT["value"](self, value)
                _RESULT["previous"](self, previous)
                _RESULT["_look"](self, None)
            return object.__getattribute__(self, name)


_RESULT: Any = {
    name: getattr(PublishResult, name).__set__ for name in ("status", "value", "previous", "_look")
}


def unseen_result(
    status: PublishStatus, look: Callable[[], tuple[SnapshotValue[Any], SnapshotValue[Any] | None]]
) -> PublishResult:
    """Return a result whose values ``look`` returns once somebody asks for one: few do."""
    made = object.__new__(PublishResult)
    _RESULT["status"](made, status)
    _RESULT["_look"](made, look)
    return made
