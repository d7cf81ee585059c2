"""What an application may bring along: sources, caches and sinks, told by their structure."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.snapshot import FetchContext, Snapshot
from coalestra.core.validation import number
from coalestra.core.values import CacheLookup, CacheWriteResult, SnapshotValue, SourcePayload

__all__ = [
    "AsyncCache", "AtomicAsyncCache", "AuthorityAwareCache", "BatchAsyncCache",
    "BatchAtomicAsyncCache", "BatchSizedSource", "BatchSnapshotSource",
    "BlockingSourceTimeoutConfigured", "CacheNewsListener", "Clock", "ConcurrencyLimitedSource",
    "DerivedSource", "EventSink", "Lease", "LeasedLookup", "LeasingCache", "MetricsSink",
    "OrderAwareCache", "PolicyAwareCache", "ResilienceConfiguredSource", "SnapshotSource", "Source",
    "SourceBase", "SystemClock", "TellingCache", "Tracer",
]  # fmt: skip

P = TypeVar("P")


@runtime_checkable
class Clock(Protocol):
    """The two readings of time that the library uses.

    Ages and observation times are wall-clock time, which may be corrected at any moment. Deadlines
    and latencies are monotonic time, which only ever runs forward.
    """

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment; they never run backwards."""


class CheckedClock:
    """A clock of somebody else's, of which no moment is believed that is none.

    NaN and infinity are a `ValueError`: values would be of that date, and circuits open, for ever.
    If its monotonic seconds run back, these go on from where they were: no time took less than 0.
    """

    __slots__ = ("_ahead", "_clock", "_last")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = -math.inf
        self._ahead = 0.0

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""
        return _believed("now", self._clock.now())

    def monotonic(self) -> float:
        """Return seconds since some fixed moment."""
        last = self._last  # as by now: another thread may be told a later moment meanwhile
        seconds = _believed("monotonic", self._clock.monotonic())
        if seconds < last:
            self._ahead += last - seconds
        self._last = seconds
        return seconds + self._ahead

    def __repr__(self) -> str:
        return repr(self._clock)


def _believed(method: str, seconds: float) -> float:
    if type(seconds) is not float:
        seconds = float(number(f"{method}() of the clock", seconds))
    if not math.isfinite(seconds):
        raise ValueError(
            f"{method}() of the clock must be a finite number of seconds, got {seconds!r}; let it "
            "raise instead if it does not know"
        )
    return seconds


class SystemClock:
    """The clock of the machine."""

    __slots__ = ()

    def now(self) -> float:
        """Return the wall-clock time in seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds since some fixed moment; they never run backwards."""
        return time.monotonic()

    def __repr__(self) -> str:
        return "SystemClock()"


def checked(clock: Clock) -> Clock:
    """Return a clock that tells moments only: that of the machine needs no check."""
    return clock if type(clock) is SystemClock else CheckedClock(clock)


def _settable(protocol: type[P]) -> type[P]:
    """Have a protocol declare attributes where it has properties, which no instance can set.

    To type checkers they stay properties, so that a narrower type will do.
    """
    for name, member in [*vars(protocol).items()]:
        if isinstance(member, property):
            delattr(protocol, name)
            protocol.__annotations__[name] = cast(Any, member.fget).__annotations__["return"]
    return protocol


def is_own(method: object) -> bool:
    """Whether this is a method, and not what a protocol leaves to those that derive from it."""
    return callable(method) and getattr(method, "__module__", None) != __name__


# Sources ------------------------------------------------------------------------------------------


@runtime_checkable
@_settable
class SourceBase(Protocol):
    """What every source has."""

    @property
    def name(self) -> str:
        """The name it goes by, unique in a builder."""

    @property
    def priority(self) -> int:
        """When it is asked: the highest first."""

    @property
    def timeout_seconds(self) -> float | None:
        """How long one call may take; None for no limit of its own."""

    def supports(self, key: ResourceKey) -> bool:
        """Whether it can be asked for ``key``; answers at once, and always the same."""


@runtime_checkable
class SnapshotSource(SourceBase, Protocol):
    """A source that is asked for one key at a time."""

    async def fetch(self, key: ResourceKey, context: FetchContext) -> SourcePayload[Any]:
        """Return the value of ``key``, bare or as a payload, or raise."""


@runtime_checkable
class BatchSnapshotSource(SourceBase, Protocol):
    """A source that is asked for many keys in one call."""

    async def fetch_many(
        self, keys: Collection[ResourceKey], context: FetchContext
    ) -> Mapping[ResourceKey, SourcePayload[Any]]:
        """Return the values of ``keys``; those it leaves out go on to the next source."""


@runtime_checkable
class DerivedSource(SourceBase, Protocol):
    """A source that makes a value out of other resources.

    One with ``inherit_freshness = True`` makes values that are as old as the oldest of these, and
    stale if one of them is.
    """

    def dependencies(self, key: ResourceKey) -> Collection[ResourceKey]:
        """Return the keys that the value of ``key`` is made from; answers at once."""

    async def derive(
        self, key: ResourceKey, dependencies: Snapshot, context: FetchContext
    ) -> SourcePayload[Any]:
        """Return the value of ``key``, made from the snapshot of its dependencies, or raise."""


Source = SnapshotSource | BatchSnapshotSource | DerivedSource
"""Any kind of source."""


@runtime_checkable
@_settable
class BatchSizedSource(Protocol):
    """A source that takes only so many keys in one call."""

    @property
    def max_batch_size(self) -> int | None:
        """The most keys in one call; None for any number."""


@runtime_checkable
@_settable
class ConcurrencyLimitedSource(Protocol):
    """A source that takes only so many calls at a time."""

    @property
    def max_concurrency(self) -> int | None:
        """The most calls at a time; None for no limit of its own."""


@runtime_checkable
@_settable
class ResilienceConfiguredSource(Protocol):
    """A source that brings its own rules for retries and circuits."""

    @property
    def resilience_policy(self) -> Any:
        """Its ``SourceResiliencePolicy``; None for the default."""


@runtime_checkable
@_settable
class BlockingSourceTimeoutConfigured(Protocol):
    """A source that declares whether it blocks a thread, and what ends that."""

    @property
    def blocking_io(self) -> bool:
        """Whether its calls block a thread."""

    @property
    def blocking_io_offloaded(self) -> bool:
        """Whether that is a worker thread, not the event loop's."""

    @property
    def transport_timeout_seconds(self) -> float | None:
        """After how long its own transport gives up; None if it does not say."""


# Caches -------------------------------------------------------------------------------------------


class AsyncCache(Protocol):
    """What every cache can do.

    A cache may also have ``validates_dependency_versions = True``, if it removes derived values
    whose dependencies have changed, and ``timeout_seconds``, which each call may take (1 s).
    """

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        """Return what there is for ``key``, judged at ``now`` (wall-clock seconds)."""

    async def set(self, value: SnapshotValue[Any]) -> None:
        """Store ``value`` under its key, whatever is there."""

    async def invalidate(self, key: ResourceKey) -> None:
        """Remove what there is for ``key``, if anything."""

    async def clear(self) -> None:
        """Remove everything."""


@runtime_checkable
class AtomicAsyncCache(AsyncCache, Protocol):
    """A cache that compares and stores in one step."""

    async def set_if_newer(
        self, value: SnapshotValue[Any], *, force: bool = False, replace_equal: bool = False
    ) -> CacheWriteResult:
        """Store ``value`` if the write order prefers it to what is there."""


@runtime_checkable
class BatchAsyncCache(Protocol):
    """A cache that takes many keys in one call."""

    async def get_many(
        self,
        keys: Collection[ResourceKey],
        *,
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
    ) -> Mapping[ResourceKey, CacheLookup]:
        """Return what there is for each key, by its own policy."""

    async def set_many(self, values: Collection[SnapshotValue[Any]]) -> None:
        """Store the values under their keys, whatever is there."""

    async def invalidate_many(self, keys: Collection[ResourceKey]) -> None:
        """Remove what there is for the keys."""


@runtime_checkable
class BatchAtomicAsyncCache(BatchAsyncCache, Protocol):
    """A cache that compares and stores many values in one call."""

    async def set_many_if_newer(
        self,
        values: Collection[SnapshotValue[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, CacheWriteResult]:
        """Store those values that the write order prefers to what is there."""


@runtime_checkable
@_settable
class OrderAwareCache(Protocol):
    """A cache that says whether its comparing writes know the write order by themselves."""

    @property
    def validates_write_order(self) -> bool:
        """Whether they compare `SnapshotValue.ordered_at`, after authority."""


@runtime_checkable
@_settable
class PolicyAwareCache(Protocol):
    """A cache that wants to know the policy of what it stores, to let it expire, say.

    Its ``set`` and ``set_if_newer`` are passed the ``policy`` of the key, its ``set_many`` and
    ``set_many_if_newer`` the ``policies`` by key.
    """

    @property
    def accepts_policies(self) -> bool:
        """Whether it does."""


@runtime_checkable
@_settable
class AuthorityAwareCache(Protocol):
    """A cache that says whether its writes compare authority."""

    @property
    def validates_source_authority(self) -> bool:
        """Whether a value of lower rank never replaces one of higher rank."""


# Caches that several processes share --------------------------------------------------------------
#
# Both protocols are found by structure. A cache that has neither works as before: each process is
# then on its own, and learns what others did when it reads.


class Lease:
    """The right, and the duty, to be the one in all processes who acquires a key.

    It ends when it is used, released, or not renewed in time, and when the key is published to or
    invalidated: then what its holder has fetched is too old to be stored.

    Attributes:
        key: the key.
        token: a name that no other lease has.
        replaces: the version that gives way to whatever the holder stores, as it was found to be
            unreadable or outdated; None if there is none.
    """

    __slots__ = ("__weakref__", "key", "replaces", "token")

    def __init__(self, key: ResourceKey, token: str, replaces: str | None = None) -> None:
        self.key: ResourceKey = key
        self.token: str = token
        self.replaces: str | None = replaces

    def __repr__(self) -> str:
        return f"<Lease on {self.key.display}>"


class LeasedLookup(NamedTuple):
    """What a leasing cache has for a key.

    Attributes:
        lookup: what is stored. Beside a lease it may be of use in need only.
        lease: the lease, if the caller is the one to acquire the key. With neither a value of use
            nor a lease the caller is on his own: he may acquire the key, but not store it.
        waiting: whether somebody else is acquiring the key: the key comes again.
    """

    lookup: CacheLookup
    lease: Lease | None = None
    waiting: bool = False


@runtime_checkable
class LeasingCache(Protocol):
    """A cache that lets one caller in all processes acquire a key, and the others wait for it."""

    def lease_many(
        self,
        keys: Collection[ResourceKey],
        *,
        now: float,
        policies: Mapping[ResourceKey, FreshnessPolicy],
        force: bool = False,
        unlike: Mapping[ResourceKey, str] | None = None,
    ) -> AsyncGenerator[Mapping[ResourceKey, LeasedLookup], None]:
        """Give what there is for each key, or the lease on it, as soon as either is known.

        A key that somebody else holds the lease on comes when he has stored a value, or given the
        lease back; when his lease has run out the caller gets it. The first mapping comes as soon
        as the cache has answered: it has everything that is known at once, and as ``waiting`` what
        is stored of the other keys. It may have entries that were not asked for, but that the
        others rest on.

        Nobody has to wait: the iterator may be closed at any time. If it raises, the keys that have
        not come yet are the caller's own to acquire.

        Args:
            keys: the keys.
            now: the reader's time, in wall-clock seconds.
            policies: what of what is stored is of use, by key.
            force: give leases whatever there is, and take them from those who hold them.
            unlike: versions that are of no use, by key.
        """

    async def fulfil_many(
        self,
        values: Mapping[Lease, SnapshotValue[Any]],
        *,
        policies: Mapping[ResourceKey, FreshnessPolicy],
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, CacheWriteResult | Exception]:
        """Store what was acquired under leases, by the write order, and let them go.

        Under a lease that has ended nothing is stored, unless it is dated and newer than what is
        there. An exception instead of a result is why a value could not be stored.
        """

    async def release_many(self, leases: Collection[Lease], *, failed: bool = False) -> None:
        """Give back leases without a value, at once and without an error.

        If it was tried in vain, and ``failed``, those who wait go on, each on his own.
        """


class CacheNewsListener(Protocol):
    """Hears what becomes of a shared cache, by whomever, in order, from the event loop."""

    def changed(self, key: ResourceKey, version: str | None) -> None:
        """The key's value is now of this version; None after an invalidation."""

    def missed(self) -> None:
        """Anything may have changed, or the news may have been lost."""


@runtime_checkable
class TellingCache(Protocol):
    """A cache that tells of every change, so that its values can be kept in memory as well."""

    def subscribe(self, listener: CacheNewsListener) -> None:
        """Tell ``listener`` from now on; it is held weakly."""

    def unsubscribe(self, listener: CacheNewsListener) -> None:
        """Tell ``listener`` nothing more."""

    def caught_up(self) -> bool:
        """Take in all news that have arrived; return False while some may be missing.

        After True, whatever was changed before this call, by a caller who has been told that it
        was, has been told to the listeners.
        """


class EventSink(Protocol):
    """Where events go.

    A sink with ``coalestra_non_blocking = True`` is called directly; any other from a thread.
    """

    def emit(self, event_type: str, **payload: Any) -> None:
        """Take one event."""


class MetricsSink(Protocol):
    """Where counts and measurements go.

    A sink with ``coalestra_non_blocking = True`` is called directly; any other from a thread.
    """

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Count ``value`` more of something."""

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Take one measurement, in the unit that the name of the metric ends in."""


@runtime_checkable
class Tracer(Protocol):
    """Follows units of work while they are under way, as an exporter of spans does.

    It is called on the event loop of the builder and must not block. What it raises counts as the
    failure of a sink; the work goes on. A *span* is whatever ``begin`` returned; the library hands
    it back and knows nothing else of it.

    =============  ======================================================================
    kind of span   what it stands for, and its attributes at the beginning
    =============  ======================================================================
    ``build``      one build: ``snapshot_id``, ``keys``
    ``resolve``    one stage of a session: ``snapshot_id``, ``keys``
    ``revalidate`` one revalidation of a session: ``snapshot_id``, ``keys``
    ``refresh``    a refresh in the background: ``snapshot_id``, ``parent_snapshot_id``,
                   ``keys``, ``reason``; linked to the span of what set it off
    ``call``       one attempt of a call: ``source``, ``source_kind``, ``snapshot_id``,
                   ``keys``, ``attempt``, ``waited_seconds`` (for capacity)
    =============  ======================================================================

    At the end a call has ``outcome`` (see ``AttemptTrace``), the others ``resolved`` and
    ``failed``, which count keys.
    """

    def begin(
        self, kind: str, attributes: Mapping[str, Any], *, parent: Any = None, link: Any = None
    ) -> Any:
        """Return a new span.

        Without a parent it is begun below whatever is current, but for one with a `link`: it
        begins a trace of its own, and is linked to the span that set it off.
        """

    def enter(self, span: Any) -> Callable[[], object] | None:
        """Make a span current in the present context: a call's, a unit of work's, or its caller's.

        What it returns takes that back, for the caller's context, which lives on; None if nothing
        does.
        """

    def end(
        self, span: Any, attributes: Mapping[str, Any], error: BaseException | None = None
    ) -> None:
        """End a span, once; `error` is what it failed with."""

    def joined(self, parent: Any, call: Any, seconds: float, attributes: Mapping[str, Any]) -> None:
        """Learn that a unit of work has waited for what another one had begun to acquire.

        Args:
            parent: the span of the one that waited.
            call: the span of the call that served it, None if there was none.
            seconds: how long it waited, up to now.
            attributes: ``snapshot_id`` of the one that had begun it, ``resource_namespace`` and
                ``resource_name`` of the key.
        """
