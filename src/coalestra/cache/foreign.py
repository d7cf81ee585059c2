"""A cache that is not the library's own: awaited, slow, fallible, and an edge to copy values at.

Laws:

1. Every call to it has a time limit, and whatever it raises belongs to the keys that it was about:
   one that cannot be read is a miss, one that cannot be written is told. Where a call for many keys
   fails, they are tried one by one.
2. A cache that failed too often in a row is left alone for a while: reads are misses at once,
   values are not stored. What an application asked for, a publication or an invalidation, is tried
   all the same, and raises if it was not done.
3. Writes and invalidations of one key run one after the other, in the order they were asked for,
   among all users of the cache object on one event loop.
4. A value on its way into the cache counts as held, for all of them. A later revision or an
   invalidation ends that, and then it is not written any more.
5. What is held is judged as in the memory cache: the write order, the tolerated future, and for
   what is derived the revisions held now. A mismatch is a miss, whoever should have seen it.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Hashable,
    Iterable,
    Mapping,
)
from typing import Any, Final, Generic, NamedTuple, TypeVar

from coalestra.cache.memory import open_value, revision_of, seal_value
from coalestra.cache.store import (
    UNCHECKED,
    CacheListener,
    Currency,
    Listeners,
    Outcome,
    best_per_key,
    decide,
    future_tolerance,
)
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.core.errors import (
    CacheCircuitOpenError,
    CacheTimeoutError,
    CacheUnavailableError,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, ObservationPolicy
from coalestra.core.protocols import AsyncCache
from coalestra.core.results import CacheLookup, CacheWriteResult, CacheWriteStatus
from coalestra.core.validation import integer, number
from coalestra.core.values import Revision, SnapshotValue

# Many calls, few tasks: each bounded, each alone with its failure --------------------------------

_I = TypeVar("_I", bound=Hashable)
_T = TypeVar("_T")


def _never() -> None:
    """Refuse nothing."""


def _untold(_error: BaseException | None) -> None:
    """Take no notice."""


async def call_each(
    items: Collection[_I],
    call: Callable[[_I], Awaitable[_T]],
    *,
    width: int,
    seconds: float,
    refused: Callable[[], Exception | None] = _never,
    ended: Callable[[BaseException | None], None] = _untold,
) -> tuple[dict[_I, _T], dict[_I, BaseException]]:
    """Make a call for every item, at most ``width`` at a time; return results and failures.

    A call that takes longer than ``seconds`` is cancelled and counts as failed by a
    `CacheTimeoutError`; should it not end, it is left behind. ``refused`` is asked before each call
    and may give an error instead, ``ended`` is told how each ended. Nothing is raised but the
    caller's own cancellation.
    """
    crew = _Crew(items, call, refused, ended)
    await crew.work_off(min(width, len(items)), seconds)
    return crew.results, crew.failures


class _Shift(Generic[_I]):
    """What one worker is at: an item since some time, or nothing; ``over`` if it is given up."""

    __slots__ = ("began", "items", "over")

    def __init__(self, now: float) -> None:
        self.began: float = now
        self.items: tuple[_I, ...] = ()
        self.over: bool = False


class _Crew(Generic[_I, _T]):
    """The workers of one `call_each`; one whose call does not end, or ends it, is replaced."""

    def __init__(
        self,
        items: Iterable[_I],
        call: Callable[[_I], Awaitable[_T]],
        refused: Callable[[], Exception | None],
        ended: Callable[[BaseException | None], None],
    ) -> None:
        self.results: dict[_I, _T] = {}
        self.failures: dict[_I, BaseException] = {}
        self._rest = iter(items)
        self._call = call
        self._refused = refused
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._busy: dict[asyncio.Task[None], _Shift[_I]] = {}

    async def work_off(self, width: int, seconds: float) -> None:
        """Work until no item is left, with so many workers."""
        busy, loop = self._busy, self._loop
        for _ in range(width):
            self._hire()
        try:
            while busy:
                end = min(shift.began for shift in busy.values()) + seconds
                left = max(0.0, end - loop.time())
                await asyncio.wait(busy, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task, shift in tuple(busy.items()):
                    if task.done():
                        self._dismiss(task, _ending_of(task))
                    elif loop.time() >= shift.began + seconds:
                        self._dismiss(task, CacheTimeoutError(seconds))
        finally:
            for task in tuple(busy):
                busy.pop(task).over = True
                _leave_behind(task)

    def _hire(self) -> None:
        shift: _Shift[_I] = _Shift(self._loop.time())
        self._busy[self._loop.create_task(self._work(shift), name="coalestra cache call")] = shift

    def _dismiss(self, task: asyncio.Task[None], error: BaseException) -> None:
        shift = self._busy.pop(task)
        shift.over = True
        _leave_behind(task)
        for item in shift.items:  # its call ended the worker, or has not ended
            self._fail(item, error)
            self._hire()

    async def _work(self, shift: _Shift[_I]) -> None:
        for item in self._rest:
            refusal = self._refused()
            if refusal is not None:
                self.failures[item] = refusal
                continue
            shift.items, shift.began = (item,), self._loop.time()
            try:
                result = await self._call(item)
            except Exception as error:
                if shift.over:
                    return
                self._fail(item, error)
            else:
                if shift.over:
                    return
                self.results[item] = result
                self._ended(None)
            shift.items = ()

    def _fail(self, item: _I, error: BaseException) -> None:
        self.failures[item] = error
        self._ended(error)


_left_behind: set[asyncio.Task[None]] = set()
"""Calls that were cancelled; some may not care. Nobody else refers to them."""


def _leave_behind(task: asyncio.Task[None]) -> None:
    if task.done() or task.get_loop().is_closed():
        return
    task.cancel()
    _left_behind.add(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[None]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()  # seen


def _ending_of(task: asyncio.Task[None]) -> BaseException:
    error = None if task.cancelled() else task.exception()
    return asyncio.CancelledError() if error is None else error


# Turns per key: operations on the same key run one after the other, in the order they asked ------
#
# An operation queues for all its keys in one step and runs when it is the first for each of them,
# so operations over several keys cannot block each other in a circle. Nothing is kept for an idle
# key.


class KeyLanes:
    """First-in, first-out turns for any number of keys."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[ResourceKey, Turn] = {}

    def __repr__(self) -> str:
        return f"KeyLanes({len(self._last)} busy)"

    def __len__(self) -> int:
        return len(self._last)

    def turn(self, keys: Iterable[ResourceKey]) -> Turn:
        """Queue for ``keys`` at once; enter the turn with ``async with``, without delay."""
        queued = Turn(self, tuple(keys))
        ahead = {self._last[key] for key in queued.keys if key in self._last}
        for other in ahead:
            other.followers.append(queued)
        queued.waits_for = len(ahead)
        self._last.update(dict.fromkeys(queued.keys, queued))
        return queued

    def end(self, turn: Turn) -> None:
        """Let those behind ``turn`` move up."""
        ended = [turn]
        while ended:
            done = ended.pop()
            for key in done.keys:
                if self._last.get(key) is done:
                    del self._last[key]
            for follower in done.followers:
                follower.waits_for -= 1
                if not follower.waits_for and follower.begin():
                    ended.append(follower)


class Turn:
    """One operation's place in the lanes of its keys."""

    __slots__ = ("_abandoned", "_lanes", "_start", "followers", "keys", "waits_for")

    def __init__(self, lanes: KeyLanes, keys: tuple[ResourceKey, ...]) -> None:
        self.keys: tuple[ResourceKey, ...] = keys
        self.waits_for: int = 0
        self.followers: list[Turn] = []
        self._lanes = lanes
        self._start: asyncio.Future[None] | None = None
        self._abandoned = False

    def __repr__(self) -> str:
        return f"Turn({len(self.keys)} keys, behind {self.waits_for})"

    def begin(self) -> bool:
        """Start whoever waits for the turn; return True if nobody does any more."""
        start = self._start
        if start is not None and not start.done() and not start.get_loop().is_closed():
            start.set_result(None)
        return self._abandoned

    async def __aenter__(self) -> None:
        if not self.waits_for:
            return
        self._start = asyncio.get_running_loop().create_future()
        try:
            await self._start
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lanes.end(self)

    def _abandon(self) -> None:
        if self.waits_for:
            self._abandoned = True
        else:
            self._lanes.end(self)


# What the users of one foreign cache object share ------------------------------------------------


class Channel:
    """The lanes and listeners of one cache on one event loop, and the values on their way into it.

    A publisher made by the application and a builder over the same cache object meet here, so the
    builder hears of what the publisher does. It holds cache and loop, so neither identity can be
    taken by another object while the channel lives.
    """

    __slots__ = ("__weakref__", "cache", "lanes", "listeners", "loop", "on_their_way")

    def __init__(self, cache: AsyncCache, loop: asyncio.AbstractEventLoop) -> None:
        self.cache: AsyncCache = cache
        self.loop: asyncio.AbstractEventLoop = loop
        self.lanes: KeyLanes = KeyLanes()
        self.listeners: Listeners = Listeners()
        self.on_their_way: dict[ResourceKey, Revision] = {}

    def __repr__(self) -> str:
        return f"Channel({type(self.cache).__name__}, {self.lanes!r}, {self.listeners!r})"


_channels: weakref.WeakValueDictionary[tuple[int, int], Channel] = weakref.WeakValueDictionary()


def channel_of(cache: AsyncCache) -> Channel:
    """Return the channel of ``cache`` on the running loop; it lives while somebody uses it."""
    loop = asyncio.get_running_loop()
    identity = (id(cache), id(loop))
    channel = _channels.get(identity)
    if channel is None:
        channel = _channels[identity] = Channel(cache, loop)
    return channel


# The calls that a cache offers, used as widely as it allows --------------------------------------

DEFAULT_TIMEOUT_SECONDS: Final = 1.0
"""How long one call may take, unless the cache has ``timeout_seconds`` of its own."""

_FAILURES_IN_A_ROW = 5
_RECOVERY_SECONDS = 5.0
_ANY_AGE = FreshnessPolicy(math.inf, math.inf)
_ALL: Final = "all keys"

Found = dict[ResourceKey, SnapshotValue[Any]]
Failures = dict[ResourceKey, Exception]
Policies = Mapping[ResourceKey, FreshnessPolicy]


class _Circuit:
    """Keeps a cache that fails from costing every call its time limit; times are the loop's.

    Open from the last of too many failures in a row, it lets one call through every so often.
    """

    __slots__ = ("failures", "until")

    def __init__(self) -> None:
        self.failures = 0
        self.until = 0.0

    def admits(self, now: float) -> bool:
        """Whether a call may be made; one that finds out if the cache is back is the only one."""
        if self.failures < _FAILURES_IN_A_ROW:
            return True
        if now < self.until:
            return False
        self.until = now + _RECOVERY_SECONDS
        return True

    def failed(self, now: float) -> None:
        """Take in a failure."""
        self.failures += 1
        self.until = now + _RECOVERY_SECONDS


class CacheCalls:
    """Reads, offers and removals over one cache, for any number of keys; none of them raises.

    Nothing here keeps writers apart: comparing and setting without an atomic method is safe only
    while the caller holds the keys' lanes.

    Attributes:
        cache: the cache; what it can do is looked up once, by attribute.
        carries_many: whether one call can carry many keys.
        is_atomic: whether it compares and stores in one step.
        validates_dependencies, validates_order: what it promises to check itself.
        counts: calls, failures and timeouts among them, and calls refused as it is left alone.
    """

    __slots__ = (
        "_limit",
        "_offers_many",
        "_offers_one",
        "_reading",
        "_seconds",
        "_tells_policies",
        "_told",
        "_writing",
        "cache",
        "carries_many",
        "counts",
        "is_atomic",
        "validates_dependencies",
        "validates_order",
    )

    def __init__(
        self, cache: Any, limit: int, told: Callable[[str, Exception], None] | None
    ) -> None:
        self.cache: Any = cache
        self.carries_many: bool = _has(cache, "get_many", "set_many", "invalidate_many")
        self._offers_many = self.carries_many and _has(cache, "set_many_if_newer")
        self._offers_one = _has(cache, "set_if_newer")
        self.is_atomic: bool = self._offers_many or self._offers_one
        self.validates_dependencies: bool = _says(cache, "validates_dependency_versions")
        self.validates_order: bool = _says(cache, "validates_write_order")
        self.counts: dict[str, int] = dict.fromkeys(("calls", "failures", "timeouts", "refused"), 0)
        self._tells_policies = _says(cache, "accepts_policies")
        self._seconds = _limit_of(cache)
        self._limit = limit
        self._told = told
        self._reading = _Circuit()
        self._writing = _Circuit()

    def __repr__(self) -> str:
        named = [name for name in ("carries_many", "is_atomic") if getattr(self, name)]
        return f"CacheCalls({type(self.cache).__name__}: {', '.join(named) or 'single keys'})"

    @property
    def is_left_alone(self) -> bool:
        """Whether the cache has failed too often in a row to be asked just now."""
        return max(self._reading.failures, self._writing.failures) >= _FAILURES_IN_A_ROW

    async def get(
        self, keys: Collection[ResourceKey], now: float, policies: Policies, horizon: float
    ) -> Found:
        """Return what the cache holds and calls usable, if dated no later than ``horizon``."""

        async def many() -> Any:
            found = await self.cache.get_many(keys, now=now, policies=policies)
            return {key: found.get(key) for key in keys}

        async def one(key: ResourceKey) -> Any:
            return await self.cache.get(key, now=now, policy=policies[key])

        answers, failures = await self._many_or_each(self._reading, "get", keys, many, one)
        values: Found = {}
        for key in keys:
            try:
                value = _usable(answers.get(key), key)
            except Exception as error:
                failures[key] = error
            else:
                if value is not None and value.observed_at <= horizon:
                    values[key] = value
        self.tell("read", failures)
        return values

    async def held(self, keys: Collection[ResourceKey], now: float) -> Found:
        """Return what the cache holds for ``keys``, however old or new."""
        return await self.get(keys, now, dict.fromkeys(keys, _ANY_AGE), math.inf)

    async def store(self, values: Found, policies: Policies, *, insist: bool) -> Failures:
        """Store values whatever is there."""

        async def many() -> Any:
            await self.cache.set_many(tuple(values.values()), **self._policies(policies, values))
            return dict.fromkeys(values)

        async def one(key: ResourceKey) -> Any:
            await self.cache.set(values[key], **self._policy(policies, key))

        _, failures = await self._many_or_each(self._writing, "set", values, many, one, insist)
        return failures

    async def offer(
        self, values: Found, policies: Policies, *, force: bool, replace_equal: bool, insist: bool
    ) -> tuple[dict[ResourceKey, CacheWriteResult], Failures]:
        """Let the cache store what its own comparison prefers."""
        terms: dict[str, Any] = {"force": force, "replace_equal": replace_equal}

        async def many() -> Any:
            chosen = tuple(values.values())
            results = await self.cache.set_many_if_newer(
                chosen, **terms, **self._policies(policies, values)
            )
            return {key: _result(results[key], key) for key in values}

        async def one(key: ResourceKey) -> Any:
            value = values[key]
            if self._offers_one:
                result = await self.cache.set_if_newer(
                    value, **terms, **self._policy(policies, key)
                )
            else:
                several = self._policies(policies, (key,))
                results = await self.cache.set_many_if_newer((value,), **terms, **several)
                result = results[key]
            return _result(result, key)

        many_at_once = many if self._offers_many else None
        return await self._many_or_each(
            self._writing, "set_if_newer", values, many_at_once, one, insist
        )

    async def remove(self, keys: Collection[ResourceKey], *, insist: bool) -> Failures:
        """Remove ``keys`` from the cache."""

        async def many() -> Any:
            await self.cache.invalidate_many(keys)
            return dict.fromkeys(keys)

        _, failures = await self._many_or_each(
            self._writing, "invalidate", keys, many, self.cache.invalidate, insist
        )
        return failures

    async def stats(self) -> Any | None:
        """Return what the cache says of itself; None if it says nothing, or fails to."""
        if not _has(self.cache, "stats"):
            return None
        calls = await call_each(
            (_ALL,), lambda _: self.cache.stats(), width=1, seconds=self._seconds
        )
        return calls[0].get(_ALL)

    def tell(self, operation: str, failures: Mapping[ResourceKey, Exception]) -> None:
        """Report failures that the library goes on without; refusals are only counted."""
        if self._told is not None:
            for error in {id(error): error for error in failures.values()}.values():
                if not isinstance(error, CacheCircuitOpenError):
                    self._told(operation, error)

    def _policies(self, policies: Policies, keys: Iterable[ResourceKey]) -> dict[str, Any]:
        if not self._tells_policies:
            return {}
        return {"policies": {key: policies[key] for key in keys}}

    def _policy(self, policies: Policies, key: ResourceKey) -> dict[str, Any]:
        return {"policy": policies[key]} if self._tells_policies else {}

    async def _many_or_each(
        self,
        circuit: _Circuit,
        operation: str,
        keys: Collection[ResourceKey],
        many: Callable[[], Awaitable[Any]] | None,
        one: Callable[[ResourceKey], Awaitable[Any]],
        insist: bool = False,
    ) -> tuple[dict[ResourceKey, Any], Failures]:
        """Make one call for all keys; if there is none, or it fails, one for each."""
        if not keys:
            return {}, {}
        if many is not None and self.carries_many:
            made = many
            results, failures = await self._calls(
                circuit, f"{operation} of many", (_ALL,), lambda _: made(), insist
            )
            if not failures:
                return results[_ALL], {}
            error = failures[_ALL]
            if isinstance(error, (CacheTimeoutError, CacheCircuitOpenError)):
                return {}, dict.fromkeys(keys, error)
        return await self._calls(circuit, operation, keys, one, insist)

    async def _calls(
        self,
        circuit: _Circuit,
        operation: str,
        items: Collection[_I],
        call: Callable[[_I], Awaitable[_T]],
        insist: bool,
    ) -> tuple[dict[_I, _T], dict[_I, Exception]]:
        loop, counts, name = asyncio.get_running_loop(), self.counts, type(self.cache).__name__
        free = self._limit if insist else 0

        def refused() -> Exception | None:
            nonlocal free
            free -= 1
            if free >= 0 or circuit.admits(loop.time()):
                counts["calls"] += 1
                return None
            counts["refused"] += 1
            return CacheCircuitOpenError(
                f"{operation}: {name} failed {_FAILURES_IN_A_ROW} times in a row, and is left "
                f"alone for up to {_RECOVERY_SECONDS:g} s"
            )

        def ended(error: BaseException | None) -> None:
            if error is None:
                circuit.failures = self._reading.failures = 0
                return
            circuit.failed(loop.time())
            counts["failures"] += 1
            counts["timeouts"] += isinstance(error, CacheTimeoutError)

        results, raised = await call_each(
            items, call, width=self._limit, seconds=self._seconds, refused=refused, ended=ended
        )
        return results, {
            item: _as_exception(error, operation, name) for item, error in raised.items()
        }


def _has(cache: Any, *methods: str) -> bool:
    try:
        return all(callable(getattr(cache, name, None)) for name in methods)
    except Exception:
        return False


def _says(cache: Any, promise: str) -> bool:
    try:
        return getattr(cache, promise, False) is True
    except Exception:
        return False


def _limit_of(cache: Any) -> float:
    own = getattr(cache, "timeout_seconds", None)
    if own is None:
        return DEFAULT_TIMEOUT_SECONDS
    seconds: float = number("timeout_seconds of the cache", own)
    if seconds <= 0:
        raise ValueError(f"timeout_seconds of the cache must be more than 0, got {seconds:g}")
    return seconds


def _as_exception(error: BaseException, operation: str, name: str) -> Exception:
    if isinstance(error, Exception):
        return error
    own = CacheUnavailableError(f"{operation} of {name} ended in {type(error).__qualname__}")
    own.__cause__ = error
    return own


def _usable(lookup: object, key: ResourceKey) -> SnapshotValue[Any] | None:
    """Return the value of a lookup that may be used; raises for one that cannot be trusted."""
    if lookup is None:
        return None
    if not isinstance(lookup, CacheLookup):
        raise _odd(key, f"a {type(lookup).__qualname__} instead of a CacheLookup")
    if lookup.value is None or not (lookup.fresh or lookup.usable_stale):
        return None
    return _sound(lookup.value, key)


def _result(result: object, key: ResourceKey) -> CacheWriteResult:
    if not isinstance(result, CacheWriteResult):
        raise _odd(key, f"a {type(result).__qualname__} instead of a CacheWriteResult")
    if result.status is not _STORED:
        _sound(result.value, key)
    return result


def _sound(value: object, key: ResourceKey) -> SnapshotValue[Any]:
    if type(value) is not SnapshotValue:
        raise _odd(key, f"a {type(value).__qualname__} instead of a SnapshotValue")
    if value.key != key:
        raise _odd(key, f"a value of {value.key}; store and return values under their own key")
    for name in ("observed_at", "fetched_at", "latency_ms"):
        number(f"{name} of the cached value of {key}", getattr(value, name))
    for name in ("attempts", "authority_rank"):
        integer(f"{name} of the cached value of {key}", getattr(value, name))
    versions = value.dependency_versions
    if type(value.version) is not str or not all(
        type(each) is ResourceKey and type(version) is str for each, version in versions.items()
    ):
        raise _odd(key, "versions that are no text")
    return value


def _odd(key: ResourceKey, answer: str) -> CacheUnavailableError:
    return CacheUnavailableError(f"the cache answered {key} with {answer}")


# The view over a cache that is not the library's own ---------------------------------------------

_STORED = CacheWriteStatus.STORED
_READ = "cache read"
_WRITE = "cache write"

Outcomes = dict[ResourceKey, Outcome]


def _unheard(_outcomes: Outcomes) -> None:
    """Stand in for one who does not want to know."""


def _any(_revision: Revision) -> bool:
    return True


class _Terms(NamedTuple):
    """On which terms revisions are offered, at ``now`` by the wall clock."""

    policies: Policies
    now: float
    force: bool = False
    replace_equal: bool = False
    insist: bool = False


class ForeignCache:
    """Reads and writes sealed revisions through any cache.

    Attributes:
        subscribers: who hears of changes through this view; held weakly.
        calls: the calls to the cache, with what it can do and what became of them.
        copying: the keys of what has been read and is being copied in at this moment.
    """

    __slots__ = ("_channel", "_copies", "_tasks", "_tolerance", "calls", "copying", "subscribers")

    def __init__(
        self,
        cache: AsyncCache,
        copies: PayloadCopies,
        max_pending_tasks: int,
        observation: ObservationPolicy,
        failed: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self.calls: CacheCalls = CacheCalls(cache, max_pending_tasks, failed)
        self.subscribers: Listeners = Listeners()
        self.copying: dict[ResourceKey, None] = {}
        self._copies = copies
        self._tolerance = future_tolerance(observation)
        self._channel: Channel | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"ForeignCache({self.calls!r})"

    def channel(self) -> Channel:
        """Return what all users of the cache share on the running event loop."""
        channel = self._channel
        if channel is None or channel.loop is not asyncio.get_running_loop():
            if channel is not None:
                channel.listeners.unsubscribe(self.subscribers)
                self._tasks.clear()
            channel = self._channel = channel_of(self.calls.cache)
            channel.listeners.subscribe(self.subscribers)
        return channel

    # Reading ------------------------------------------------------------------------------------

    async def read(
        self, keys: Collection[ResourceKey], now: float, policies: Policies
    ) -> dict[ResourceKey, Revision]:
        """Return the usable entries among ``keys``, in their order; never raises.

        Derived ones are joined to what they rest on, and left out if that is no longer current. The
        cache is rid of them, unless it should have left them out itself.
        """
        on_their_way = self.channel().on_their_way
        known = {key: on_their_way[key] for key in keys if key in on_their_way}
        rest = [key for key in keys if key not in known]
        values = await self.calls.get(rest, now, policies, now + self._tolerance)
        known.update(await self._sealed(values))
        outdated = await self._outdated(known, keys, now, self._sealed)
        for key in outdated:
            if on_their_way.get(key) is known[key]:
                del on_their_way[key]
        held = {key: known[key] for key in outdated if key in values or key not in keys}
        if held and not self.calls.validates_dependencies:
            self._behind(self._remove_outdated(held, now))
        return {key: known[key] for key in keys if key in known and key not in outdated}

    async def _outdated(
        self,
        known: dict[ResourceKey, Revision],
        absent: Iterable[ResourceKey],
        now: float,
        make: Callable[[Found], Awaitable[dict[ResourceKey, Revision]]],
    ) -> list[ResourceKey]:
        """Add to ``known`` all that it rests on, level by level; return what is outdated of it.

        What is ``absent`` and not known is not held.
        """
        on_their_way = self.channel().on_their_way
        asked = {*known, *absent}
        level: Collection[Revision] = known.values()
        while True:
            wanted = [key for revision in level for key in revision.dependency_versions]
            wanted = [key for key in dict.fromkeys(wanted) if key not in asked]
            if not wanted:
                break
            asked.update(wanted)
            found = {key: on_their_way[key] for key in wanted if key in on_their_way}
            rest = [key for key in wanted if key not in found]
            found.update(await make(await self.calls.held(rest, now)))
            known.update(found)
            level = found.values()
        if not any(revision.dependency_versions for revision in known.values()):
            return []
        for revision in known.values():
            revision.checked = UNCHECKED
        holds = Currency(known).holds
        return [key for key, revision in known.items() if not holds(revision)]

    async def _remove_outdated(self, outdated: Mapping[ResourceKey, Revision], now: float) -> None:
        """Remove entries found outdated, unless they have been replaced in the meantime."""
        async with self.channel().lanes.turn(outdated):
            held = await self.calls.held(tuple(outdated), now)
            same = [key for key, value in held.items() if value.version == outdated[key].version]
            self.calls.tell("invalidate", await self.calls.remove(same, insist=False))

    async def _sealed(self, values: Found) -> dict[ResourceKey, Revision]:
        """Copy values in; one that cannot be copied is told and left out."""
        revisions: dict[ResourceKey, Revision] = {}
        pace = Pace()
        for key, value in values.items():
            self.copying[key] = None
            try:
                revisions[key] = await seal_value(self._copies, value, _READ)
            except Exception as error:
                self.calls.tell("read", {key: error})
            finally:
                self.copying.pop(key, None)
            await pace.keep()
        return revisions

    # Writing ------------------------------------------------------------------------------------

    async def publish(
        self,
        revisions: Collection[Revision],
        policies: Policies,
        now: float,
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Outcomes:
        """Offer the best revision per key; return what became of each.

        Raises:
            CacheUnavailableError: not all could be written; or what the cache raised.
        """
        terms = _Terms(policies, now, force, replace_equal, insist=True)
        outcomes, failures = await self._write(best_per_key(revisions), terms)
        for error in failures.values():
            raise error
        return outcomes

    def holds(self, revision: Revision) -> bool:
        """Whether a value on its way still counts as held."""
        return self.channel().on_their_way.get(revision.key) is revision

    def hold(self, revision: Revision, now: float, *, replace_equal: bool) -> Outcome:
        """Let a value that is being written behind count as held from now on.

        One that may not replace what is on its way already does not count.
        """
        channel = self.channel()
        current = channel.on_their_way.get(revision.key)
        horizon = now + self._tolerance
        status = decide(revision, current, replace_equal=replace_equal, horizon=horizon)
        if current is not None and status is not _STORED:
            return status, current, current
        channel.on_their_way[revision.key] = revision
        channel.listeners.revised({revision.key: revision}, self.subscribers)
        return _STORED, revision, current

    def write_behind(
        self,
        revisions: Collection[Revision],
        policies: Policies,
        now: float,
        *,
        wanted: Callable[[Revision], bool],
        replace_equal: bool = False,
        ended: Callable[[Outcomes], None] = _unheard,
    ) -> None:
        """Offer values to the cache, those still ``wanted`` when their turn has come.

        Failures are told. ``ended`` learns the outcomes, whatever happens.
        """

        def done(task: asyncio.Task[tuple[Outcomes, Failures]]) -> None:
            outcomes: Outcomes = {}
            if not task.cancelled() and task.exception() is None:
                outcomes, failures = task.result()
                self.calls.tell("write", failures)
            for revision in revisions:
                if channel.on_their_way.get(revision.key) is revision:
                    del channel.on_their_way[revision.key]
            ended(outcomes)

        channel = self.channel()
        terms = _Terms(policies, now, replace_equal=replace_equal)
        self._behind(self._write(best_per_key(revisions), terms, wanted)).add_done_callback(done)

    async def _write(
        self,
        revisions: Mapping[ResourceKey, Revision],
        terms: _Terms,
        wanted: Callable[[Revision], bool] = _any,
    ) -> tuple[Outcomes, Failures]:
        channel = self.channel()
        outcomes: Outcomes = {}
        async with channel.lanes.turn(revisions):
            offered = {key: each for key, each in revisions.items() if wanted(each)}
            failures = await self._offer(offered, terms, outcomes)
            self._tell(channel, offered, outcomes, None if terms.insist else self.subscribers)
        return outcomes, failures

    def _tell(
        self,
        channel: Channel,
        offered: Mapping[ResourceKey, Revision],
        outcomes: Outcomes,
        teller: CacheListener | None,
    ) -> None:
        """Tell of what readers see now and did not see before.

        What was fetched is no news to the ``teller``, who has settled its flight.
        """
        changes: dict[ResourceKey, Revision | None] = {}
        known: dict[ResourceKey, Revision | None] = {}
        for key, (status, current, _) in outcomes.items():
            waiting = channel.on_their_way.get(key)
            was_held = waiting is offered[key]
            if (status is _STORED) is not was_held:
                (known if status is _STORED else changes)[key] = current
            if was_held or decide(current, waiting) is _STORED:
                channel.on_their_way.pop(key, None)
        if changes:
            channel.listeners.revised(changes)
        if known:
            channel.listeners.revised(known, teller)

    async def _offer(
        self, offered: Mapping[ResourceKey, Revision], terms: _Terms, outcomes: Outcomes
    ) -> Failures:
        """Write what may be written; enter what became of each, and return what failed."""
        calls, horizon = self.calls, terms.now + self._tolerance
        values, failures = await self._opened(offered)
        looked_at = [key for key in values if self._looks_first(offered[key], terms)]
        held = await calls.held(looked_at, terms.now)
        results: dict[ResourceKey, CacheWriteResult] = {}
        for key, current in held.items():
            status = decide(
                offered[key],
                revision_of(current),
                force=terms.force,
                replace_equal=terms.replace_equal,
                horizon=horizon,
            )
            if status is not _STORED:
                results[key] = CacheWriteResult(status, current, current)
        for key in await self._outdated_among(results, terms.now):
            del results[key]
        rest = {key: value for key, value in values.items() if key not in results}
        if calls.is_atomic:
            await self._compare_there(offered, rest, terms, results, failures)
        else:
            await self._store(rest, held, terms, results, failures)
        outcomes.update(await self._outcomes(offered, results, terms))
        return failures

    def _looks_first(self, revision: Revision, terms: _Terms) -> bool:
        """Whether the library compares before it offers a value.

        A cache that compares would take an undated fetch for as new as the end of its reading. One
        that knows better tells undated values by their equal times, which may be by chance.
        """
        if terms.force or not self.calls.is_atomic:
            return not self.calls.is_atomic
        if revision.dated:
            return revision.observed_at == revision.fetched_at
        return revision.attempts > 0 and not self.calls.validates_order

    async def _store(
        self,
        values: Found,
        held: Found,
        terms: _Terms,
        results: dict[ResourceKey, CacheWriteResult],
        failures: Failures,
    ) -> None:
        failed = await self.calls.store(values, terms.policies, insist=terms.insist)
        failures.update(failed)
        for key, value in values.items():
            if key not in failed:
                results[key] = CacheWriteResult(_STORED, value, held.get(key))

    async def _compare_there(
        self,
        offered: Mapping[ResourceKey, Revision],
        values: Found,
        terms: _Terms,
        results: dict[ResourceKey, CacheWriteResult],
        failures: Failures,
    ) -> None:
        """Let the cache compare; where it cannot know the write order, have the last word."""
        calls, policies, insist = self.calls, terms.policies, terms.insist

        def replaces_equal(key: ResourceKey) -> bool:
            by_arrival = not offered[key].attempts or not calls.validates_order
            return terms.replace_equal or (not offered[key].dated and by_arrival)

        refused: Failures = {}
        for equal in (False, True):
            some = {key: value for key, value in values.items() if replaces_equal(key) is equal}
            got, failed = await calls.offer(
                some, policies, force=terms.force, replace_equal=equal, insist=insist
            )
            results.update(got)
            refused.update(failed)
        lost = {key: results[key] for key in values if key in results and not results[key].stored}
        horizon = terms.now + self._tolerance
        again = {
            key
            for key, result in lost.items()
            if decide(offered[key], revision_of(result.value), horizon=horizon) is _STORED
        }
        again.update(await self._outdated_among(lost, terms.now))
        got, failed = await calls.offer(
            {key: values[key] for key in again},
            policies,
            force=True,
            replace_equal=True,
            insist=insist,
        )
        results.update(got)
        refused.update(failed)
        await self._replace_unreadable(offered, values, refused, terms, results, failures)

    async def _replace_unreadable(
        self,
        offered: Mapping[ResourceKey, Revision],
        values: Found,
        refused: Failures,
        terms: _Terms,
        results: dict[ResourceKey, CacheWriteResult],
        failures: Failures,
    ) -> None:
        """Write over an entry that the cache cannot compare with as it cannot read it."""
        tried = [
            key
            for key, error in refused.items()
            if not isinstance(error, (CacheTimeoutError, CacheCircuitOpenError))
        ]
        failures.update(refused)
        readable = await self.calls.held(tried, terms.now)
        unreadable = {key: values[key] for key in tried if key not in readable}
        # Insisting, as all that could not be compared may have made the cache look dead.
        insisting = _Terms(terms.policies, terms.now, insist=True)
        await self._store(unreadable, {}, insisting, results, failures)
        for key in unreadable:
            if key in results:
                del failures[key]

    async def _outdated_among(
        self, results: Mapping[ResourceKey, CacheWriteResult], now: float
    ) -> list[ResourceKey]:
        """Return where what stayed is outdated: it must not keep a newer revision out."""
        stayed = {key: revision_of(result.value) for key, result in results.items()}
        if not any(each.dependency_versions for each in stayed.values()):
            return []
        outdated = await self._outdated(dict(stayed), (), now, _bare)
        return [key for key in outdated if key in stayed]

    async def _outcomes(
        self,
        offered: Mapping[ResourceKey, Revision],
        results: Mapping[ResourceKey, CacheWriteResult],
        terms: _Terms,
    ) -> Outcomes:
        lost = {key: result.value for key, result in results.items() if not result.stored}
        before: Found = {}
        if terms.insist:  # somebody wants to know
            previous = {key: result.previous for key, result in results.items() if result.stored}
            before = {key: value for key, value in previous.items() if type(value) is SnapshotValue}
        current = await self._sealed(lost)
        replaced = await self._sealed(before)
        outcomes: Outcomes = {}
        for key, result in results.items():
            now_held = current.get(key, offered[key])
            was_held = replaced.get(key) if result.stored else now_held
            outcomes[key] = (result.status, now_held, was_held)
        return outcomes

    async def _opened(self, revisions: Mapping[ResourceKey, Revision]) -> tuple[Found, Failures]:
        values: Found = {}
        failures: Failures = {}
        pace = Pace()
        for key, revision in revisions.items():
            try:
                values[key] = await open_value(self._copies, revision, _WRITE)
            except Exception as error:
                failures[key] = error
            await pace.keep()
        return values, failures

    # Invalidating and ending --------------------------------------------------------------------

    async def invalidate(self, keys: Collection[ResourceKey]) -> None:
        """Remove ``keys``. Listeners hear of it before the first await, and again afterwards.

        Raises:
            CacheUnavailableError: not all could be removed; or what the cache raised.
        """
        unique = tuple(dict.fromkeys(keys))
        channel = self.channel()
        for key in unique:
            channel.on_their_way.pop(key, None)
        channel.listeners.invalidating(unique)
        async with channel.lanes.turn(unique):
            try:
                failures = await self.calls.remove(unique, insist=True)
            finally:
                channel.listeners.revised(dict.fromkeys(unique))
        for error in failures.values():
            raise error

    async def drain(self, timeout_seconds: float) -> None:
        """Wait until what is on its way is written, for so long at most; then give it up."""
        self.channel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_seconds)
        for task in tuple(self._tasks):
            task.cancel()

    def _behind(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work, name="coalestra cache write")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _bare(values: Found) -> dict[ResourceKey, Revision]:
    """Return revisions that can only be compared."""
    return {key: revision_of(value) for key, value in values.items()}
