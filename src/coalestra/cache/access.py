"""One cache, as the library uses it: the own one in memory, or any that has to be awaited.

The first is used through its entry store. The other is an edge where values are copied. Its laws,
beside those of the calls to it:

1. Writes and invalidations of one key run one after the other, in the order they were asked for,
   among all users of the cache object on one event loop.
2. A value on its way into the cache counts as held, for all of them. A later revision or an
   invalidation ends that, and then it is not written any more.
3. What is held is judged as in the memory cache: the write order, the tolerated future, and for
   what is derived the revisions held now. A mismatch is a miss, whoever should have seen it.
4. While others may have changed something unheard, only what the cache says counts as held.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections import OrderedDict
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, Final, NamedTuple, TypeVar, cast

from coalestra._endings import look_after, running_loop
from coalestra.cache import store
from coalestra.cache.memory import AsyncMemoryCache, let_go, open_value, revision_of, seal_value
from coalestra.cache.store import EntryStore, Listeners, Outcome, decide
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.deadline import ended_within
from coalestra.concurrency.pace import Pace
from coalestra.core import errors, validation
from coalestra.core.errors import CacheCircuitOpenError, CacheTimeoutError, CacheUnavailableError
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, ObservationPolicy
from coalestra.core.protocols import AsyncCache, Lease, LeasedLookup, is_own
from coalestra.core.validation import number
from coalestra.core.values import (
    CacheLookup,
    CacheWriteResult,
    CacheWriteStatus,
    Revision,
    SnapshotValue,
)
from coalestra.observability import ChangeLog

_STORED = CacheWriteStatus.STORED
_READ = "cache read"
_WRITE = "cache write"

_T = TypeVar("_T")


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
        validation.require_methods("cache", cache, "get", "set", "invalidate", "clear")
        self.cache: AsyncCache = cache
        self.near_entries: int = validation.integer("near_entries", near_entries, minimum=1)
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


# Calls to a cache: bounded, counted, each alone with its failure ---------------------------------
#
# 1. Every call has a time limit, and whatever it raises belongs to the keys that it was about: one
#    that cannot be read is a miss, one that cannot be written is told. What makes no sense was not
#    read.
# 2. Where a call for many keys fails, they are tried one by one.
# 3. A cache that failed too often in a row is left alone for a while: reads are misses at once,
#    values are not stored. What an application asked for, a publication or an invalidation, is
#    tried all the same, unless that happened while it waited for its turn. Failed reads keep no
#    writes away, and a write that succeeds brings reads back. A cache that says whether it
#    ``is_available`` sees to this itself.


_left_behind: set[asyncio.Task[Any]] = set()
"""Calls that were cancelled; some may not care. Nobody else may refer to them."""


DEFAULT_TIMEOUT_SECONDS: Final = 1.0
"""How long one call may take, unless the cache has ``timeout_seconds`` of its own."""

_MOMENT_SECONDS = 0.1
"""How long what is given up at closing may take to end."""

_FAILURES_IN_A_ROW = 5
_RECOVERY_SECONDS = 5.0
_MOST_ROUNDS = 8
_ANY_AGE = FreshnessPolicy(math.inf, math.inf)
_READS: Final = ("get", "get of many", "lease_many")
_MANY: Final = {
    "get": "get_many",
    "set": "set_many",
    "set_if_newer": "set_many_if_newer",
    "invalidate": "invalidate_many",
}
"""The methods for one key, and for many."""

Found = dict[ResourceKey, SnapshotValue[Any]]
Failures = dict[ResourceKey, Exception]
Policies = Mapping[ResourceKey, FreshnessPolicy]


class _Circuit:
    """Keeps a cache that fails from costing every call its time limit; times are the loop's.

    Open from the last of too many failures in a row, it lets one call through every so often.
    """

    failures = 0
    failed_at = -math.inf
    until = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the last so many calls have failed."""
        return self.failures >= _FAILURES_IN_A_ROW

    def admits(self, now: float) -> bool:
        """Whether a call may be made; one that finds out if the cache is back is the only one."""
        if not self.is_open:
            return True
        if now < self.until:
            return False
        self.until = now + _RECOVERY_SECONDS
        return True


class CacheCalls:
    """Reads, offers and removals over one cache, for any number of keys; none of them raises.

    Nothing here keeps writers apart: comparing and setting without an atomic method is safe only
    while the caller holds the keys' lanes.

    Attributes:
        cache: the cache; what it can do is looked up once, by attribute.
        seconds: how long one call may take.
        limit: how many calls there are at a time where each is for one key.
        left_behind: calls that were cancelled, and have not ended yet.
        carries_many: whether one call can carry many keys.
        is_atomic: whether it compares and stores in one step.
        pace: of all who go through many keys for it, so that they share one slice of each turn.
        validates_dependencies, validates_order: what it promises to check itself.
    """

    def __init__(
        self,
        cache: Any,
        limit: int,
        told: Callable[[str, Exception], None] | None,
        log: ChangeLog | None = None,
    ) -> None:
        self.cache: Any = cache
        self.carries_many: bool = has(cache, "get_many", "set_many", "invalidate_many")
        self._offers_many = self.carries_many and has(cache, "set_many_if_newer")
        self._offers_one = has(cache, "set_if_newer")
        self.is_atomic: bool = self._offers_many or self._offers_one
        self.validates_dependencies: bool = _said(cache, "validates_dependency_versions") is True
        self.validates_order: bool = _said(cache, "validates_write_order") is True
        self._counts = dict.fromkeys(("calls", "failures", "timeouts"), 0)
        self._guards_itself = type(_said(cache, "is_available")) is bool
        self._tells_policies = _said(cache, "accepts_policies") is True
        seconds = getattr(cache, "timeout_seconds", None)
        if seconds is None:
            seconds = DEFAULT_TIMEOUT_SECONDS
        self.seconds: float = number("timeout_seconds of the cache", seconds, above=0)
        self.limit: int = limit
        self.pace: Pace = Pace()
        self.left_behind: set[asyncio.Task[Any]] = set()
        self._told = told
        self._log = log
        self._circuits = {"read": _Circuit(), "write": _Circuit()}

    def __repr__(self) -> str:
        named = [name for name in ("carries_many", "is_atomic") if getattr(self, name)]
        return f"CacheCalls({type(self.cache).__name__}: {', '.join(named) or 'single keys'})"

    @property
    def counts(self) -> Mapping[str, int]:
        """How many ``calls`` were made, and of these ``failures`` and ``timeouts``."""
        own = _said(self.cache, "call_counts")
        told = isinstance(own, Mapping) and all(type(own.get(name)) is int for name in self._counts)
        return cast("Mapping[str, int]", own) if told else self._counts

    @property
    def is_left_alone(self) -> bool:
        """Whether the cache has failed too often in a row to be asked just now."""
        if self._guards_itself:
            return _said(self.cache, "is_available") is False
        return any(each.is_open for each in self._circuits.values())

    def gave_up_since(self, asked: float) -> bool:
        """Whether writes keep failing, and one has since then, on the loop's clock.

        What was asked for by then counts as tried: one after the other, each would cost its limit.
        """
        circuit = self._circuits["write"]
        return circuit.is_open and circuit.failed_at > asked

    async def get(
        self, keys: Collection[ResourceKey], now: float, policies: Policies, horizon: float
    ) -> Found:
        """Return what the cache holds and calls usable, if dated no later than ``horizon``."""
        items = dict(zip(keys, keys, strict=True))
        answers, failures = await self._ask("get", items, policies, lambda told, _: told, now=now)
        values: Found = {}
        self.pace.begin()
        for key in keys:
            await self.pace.keep()
            try:
                value = _usable(answers.get(key), key)
            except Exception as error:
                errors.without_frames(error)  # these lead to it, and to all that was read
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
        return (await self._ask("set", values, policies, insist=insist))[1]

    async def offer(
        self, values: Found, policies: Policies, *, force: bool, replace_equal: bool, insist: bool
    ) -> tuple[dict[ResourceKey, CacheWriteResult], Failures]:
        """Let the cache store what its own comparison prefers."""
        terms: Any = {"force": force, "replace_equal": replace_equal, "insist": insist}
        return await self._ask("set_if_newer", values, policies, _result, **terms)

    async def remove(self, keys: Collection[ResourceKey], *, insist: bool) -> Failures:
        """Remove ``keys`` from the cache."""
        items = dict(zip(keys, keys, strict=True))
        return (await self._ask("invalidate", items, {}, insist=insist))[1]

    async def call(
        self,
        operation: str,
        call: Callable[[], Awaitable[_T]],
        *,
        insist: bool = False,
        patient: bool = False,
    ) -> _T:
        """Make a call, if the cache is not left alone; a ``patient`` one may take any time.

        Raises what the cache raised, an `Exception` in any case, or why it was not asked.
        """
        now, name = asyncio.get_running_loop().time, type(self.cache).__name__
        kind = "read" if operation in _READS else "write"
        if not (insist or self._guards_itself or self._circuits[kind].admits(now())):
            raise CacheCircuitOpenError(
                f"{operation}: {name} failed {_FAILURES_IN_A_ROW} times in a row, and is "
                f"left alone for up to {_RECOVERY_SECONDS:g} s"
            )
        self._counts["calls"] += 1
        task, error = await self.made(call, None if patient else self.seconds)
        self._note(kind, error, now())
        if error is None:
            if operation not in ("fulfil_many", "release_many"):  # these may have stored nothing
                self.works(kind)
            return task.result()
        try:
            if isinstance(error, Exception):
                raise error
            raise CacheUnavailableError(
                f"{operation} of {name} ended in {type(error).__qualname__}"
            ) from error
        finally:
            del error, task  # whose traceback leads here

    async def made(
        self, call: Callable[[], Awaitable[_T]], seconds: float | None
    ) -> tuple[asyncio.Task[_T], BaseException | None]:
        """Make a call, for so long at most (None: any time); return its task, and why it failed.

        One that takes longer is cancelled; should it not end, it is left behind.
        """

        async def made() -> _T:
            return await call()

        task = asyncio.create_task(made(), name="coalestra cache call")
        try:
            await ended_within(task, seconds)
        finally:
            if not task.done() and not task.get_loop().is_closed():
                task.cancel()
                look_after(task, _left_behind)
                look_after(task, self.left_behind)
            elif task.done() and not task.cancelled():
                task.exception()  # seen
        if task.cancelled():
            return task, asyncio.CancelledError()
        return task, task.exception() if task.done() else CacheTimeoutError(seconds or 0)

    def tell(self, operation: str, failures: Mapping[ResourceKey, Exception]) -> None:
        """Report failures that the library goes on without; refusals are only counted."""
        for error in {id(error): error for error in failures.values()}.values():
            if isinstance(error, CacheCircuitOpenError):
                continue
            if self._told is not None:
                self._told(operation, error)
            if self._log is not None:
                self._log.failed(self._subject("read" if operation == "read" else "write"), error)

    def works(self, kind: str) -> None:
        """Log that reads or writes work again, if it was said that they fail."""
        if self._log is not None and self._log.troubled:
            self._log.works(self._subject(kind))

    def _subject(self, kind: str) -> str:
        return f"{kind} of cache {type(self.cache).__name__}"

    async def _ask(
        self,
        method: str,
        items: Mapping[ResourceKey, Any],
        policies: Policies,
        check: Callable[[Any, ResourceKey], Any] | None = None,
        *,
        insist: bool = False,
        **terms: Any,
    ) -> tuple[dict[ResourceKey, Any], Failures]:
        """Call a method for all items at once; if that is not offered, or fails, for each.

        What it answers for a key, if it does, is given through ``check``.
        """
        tells = method == "get" or (self._tells_policies and method != "invalidate")

        async def many(keys: Collection[ResourceKey]) -> dict[ResourceKey, Any]:
            more = {"policies": {key: policies[key] for key in keys}} if tells else {}
            call = getattr(self.cache, _MANY[method])
            answers = await call(tuple([items[key] for key in keys]), **terms, **more)
            if check is None:
                return {}
            told = {key: answers.get(key) for key in keys}  # it may be what the cache goes on with
            self.pace.begin()
            for key, answer in told.items():
                await self.pace.keep()
                told[key] = check(answer, key)
            return told

        async def one(key: ResourceKey) -> Any:
            if method == "set_if_newer" and not self._offers_one:
                return (await many((key,)))[key]
            told = {"policy": policies[key]} if tells else {}
            answer = await getattr(self.cache, method)(items[key], **terms, **told)
            return None if check is None else check(answer, key)

        if not items:
            return {}, {}
        if self._offers_many if method == "set_if_newer" else self.carries_many:
            try:
                name = f"{method} of many"
                return await self.call(name, lambda: many(items.keys()), insist=insist), {}
            except (CacheTimeoutError, CacheCircuitOpenError) as error:
                errors.without_frames(error)
                return {}, dict.fromkeys(items, error)
            except Exception:
                pass  # which of them it was is found out
        return await self._each(method, items, one, insist)

    async def _each(
        self,
        operation: str,
        items: Collection[ResourceKey],
        call: Callable[[ResourceKey], Awaitable[Any]],
        insist: bool,
    ) -> tuple[dict[ResourceKey, Any], Failures]:
        """Make a call for every item, so many at a time as the limit says, in their order."""
        results: dict[ResourceKey, Any] = {}
        failures: Failures = {}
        rest, free = iter(items), self.limit if insist else 0

        async def work() -> None:
            nonlocal free
            for key in rest:
                free -= 1
                try:
                    results[key] = await self.call(operation, partial(call, key), insist=free >= 0)
                except Exception as error:
                    errors.without_frames(error)
                    failures[key] = error

        workers = min(self.limit, len(items))
        await (work() if workers == 1 else asyncio.gather(*[work() for _ in range(workers)]))
        failures = {key: failures[key] for key in items if key in failures}
        return {key: results[key] for key in items if key in results}, failures

    def _note(self, kind: str, error: BaseException | None, now: float) -> None:
        """Count how a call ended."""
        circuit = self._circuits[kind]
        if error is None:
            circuit.failures = self._circuits["read"].failures = 0
            return
        circuit.failures += 1
        circuit.failed_at, circuit.until = now, now + _RECOVERY_SECONDS
        self._counts["failures"] += 1
        self._counts["timeouts"] += isinstance(error, CacheTimeoutError)


def has(cache: Any, *methods: str) -> bool:
    """Whether a cache has all of these methods."""
    return all(is_own(_said(cache, name)) for name in methods)


def _said(cache: Any, name: str) -> Any:
    """Return what a cache says of itself by an attribute; None if it says nothing."""
    try:
        return getattr(cache, name, None)
    except Exception:
        return None


def _usable(lookup: object, key: ResourceKey) -> SnapshotValue[Any] | None:
    """Return the value of a lookup that may be used; raises for one that cannot be trusted."""
    if lookup is None:
        return None
    if not isinstance(lookup, CacheLookup):
        raise _odd(key, f"a {type(lookup).__qualname__} instead of a CacheLookup")
    if lookup.value is None or not (lookup.fresh or lookup.usable_stale):
        return None
    return sound(lookup.value, key)


def _result(result: object, key: ResourceKey) -> CacheWriteResult:
    if not isinstance(result, CacheWriteResult):
        raise _odd(key, f"a {type(result).__qualname__} instead of a CacheWriteResult")
    if not isinstance(result.status, CacheWriteStatus):  # a bare text is equal to a member
        raise _odd(key, f"{validation.shown(result.status)} instead of a CacheWriteStatus")
    if result.status is not CacheWriteStatus.STORED:
        sound(result.value, key)
    return result


_CHECKS: Final[Mapping[str, Callable[[str, Any], object]]] = {
    "source": partial(validation.text, empty=True),
    **dict.fromkeys(("observed_at", "fetched_at", "latency_ms"), number),
    **dict.fromkeys(("attempts", "authority_rank"), validation.integer),
}


def sound(value: object, key: ResourceKey) -> SnapshotValue[Any]:
    """Return a value that a cache gave for a key; raises for one that cannot be trusted."""
    if type(value) is not SnapshotValue:
        raise _odd(key, f"a {type(value).__qualname__} instead of a SnapshotValue")
    if type(value.key) is not ResourceKey or value.key != key:
        named = type(value.key) is ResourceKey
        other = value.key.display if named else validation.shown(value.key)
        raise _odd(key, f"a value of {other}; store and return values under their own key")
    try:
        for name, check in _CHECKS.items():
            check(name, getattr(value, name))
    except (TypeError, ValueError) as error:
        raise _odd(key, f"a value whose {error}") from error
    versions = value.dependency_versions
    if type(value.version) is not str or not all(
        type(each) is ResourceKey and type(version) is str for each, version in versions.items()
    ):
        raise _odd(key, "versions that are no text")
    return value


def _odd(key: ResourceKey, answer: str) -> CacheUnavailableError:
    return CacheUnavailableError(f"the cache answered {key.display} with {answer}")


# What all users of a cache share on one event loop -----------------------------------------------
#
# That is turns per key, the values on their way into the cache, who hears of changes, and what is
# kept of it in memory. Laws of that memory:
#
# 1. It serves only while it is trusted. Where the cache tells of changes, that is while all news
#    that have arrived have been taken in, and none may be missing; else for a short time after
#    reading.
# 2. What was read before a change of its key is never put in after it: whoever reads or writes
#    keeps a `Filling` open meanwhile, which learns of the changes.
# 3. After a time even a trusted entry is looked up again.


class KeyLanes:
    """First-in, first-out turns for any number of keys; nothing is kept for an idle one."""

    def __init__(self) -> None:
        self._last: dict[ResourceKey, asyncio.Future[None]] = {}

    def __repr__(self) -> str:
        return f"KeyLanes({len(self._last)} busy)"

    @contextlib.asynccontextmanager
    async def turn(
        self,
        keys: Collection[ResourceKey],
        after: Collection[ResourceKey] = (),
        among: set[asyncio.Future[None]] | None = None,
    ) -> AsyncGenerator[None, None]:
        """Hold all of ``keys`` once those who came before have let go of each, and of ``after``.

        It queues for all of them in one step, so that operations over several keys cannot block
        each other in a circle. Who breaks the wait off keeps the place until it would have come.
        Meanwhile its end is ``among`` those that somebody waits for.
        """
        over = asyncio.get_running_loop().create_future()
        ahead = {self._last[key] for key in (*keys, *after) if key in self._last}
        self._last.update(dict.fromkeys(keys, over))
        if among is not None:
            among.add(over)
            over.add_done_callback(among.discard)

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


_SPARE = 1_000


@dataclass(slots=True, eq=False)
class Filling:
    """One reading or writing under way, and the versions that keys have got since it began."""

    changes: list[Mapping[ResourceKey, str | None]] = field(default_factory=list)

    def allowed(self, revisions: Iterable[Revision]) -> list[Revision]:
        """Return those of revisions whose keys have not changed to something else."""
        now = {key: version for each in self.changes for key, version in each.items()}
        self.changes = [now]
        return [each for each in revisions if now.get(each.key, each.version) == each.version]


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
        self._due: OrderedDict[ResourceKey, float] = OrderedDict()
        self._tells = has(cache, "subscribe", "unsubscribe", "caught_up")
        self._hears = False
        if self._tells:
            with contextlib.suppress(Exception):  # what it tells is missed then, all the time
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

    def waiting(
        self, keys: Iterable[ResourceKey], horizon: float = math.inf
    ) -> dict[ResourceKey, Revision]:
        """Return what of ``keys`` is on its way and dated no later than ``horizon``.

        Only as long as others cannot have replaced it unheard.
        """
        held = {} if self.is_behind else self.on_their_way
        return {k: held[k] for k in keys if k in held and held[k].observed_at <= horizon}

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

    @contextlib.contextmanager
    def filling(self) -> Iterator[Filling]:
        """Read or write, and learn meanwhile of the changes."""
        filling = Filling()
        self._fillings[filling] = None
        try:
            yield filling
        finally:
            self._fillings.pop(filling, None)

    def _note(self, versions: Mapping[ResourceKey, str | None]) -> None:
        """Let those who read or write at this moment know what has changed."""
        for each in self._fillings:
            each.changes.append(versions)
            if len(each.changes) > _SPARE:  # of each key the latest will do
                each.allowed(())

    def put(self, filling: Filling, revisions: Iterable[Revision]) -> None:
        """Keep what was read or written, unless it has changed since."""
        if not self._serves or filling not in self._fillings:
            return
        allowed = filling.allowed(revisions)
        new: dict[ResourceKey, Revision] = {}
        for each in allowed:
            held = self.store.peek(each.key)
            if held is None or held.version != each.version:
                new[each.key] = each
                each.checked = store.UNCHECKED  # it may have been here before
        self.store.put_many(new, force=True)
        due = time.monotonic() + self._seconds
        for each in allowed:
            self._due[each.key] = due
            self._due.move_to_end(each.key)
        if len(self._due) > 2 * len(self.store) + _SPARE:  # most have left it since
            self._due = OrderedDict((k, due) for k, due in self._due.items() if k in self.store)

    def wrote(self, filling: Filling, outcomes: Collection[Outcome]) -> None:
        """Keep what this process has stored, or found; what others of it read before is not kept.

        What has changed meanwhile is not, either: who knows which of the two came last.
        """
        if not self._serves:
            return
        stored = [current for status, current, _ in outcomes if status is _STORED]
        known = {e.key: e.version for e in filling.allowed(stored) if filling in self._fillings}
        self.drop({e.key: known.get(e.key) for e in stored})
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
        self._fillings.clear()  # whatever they have read may be old
        self._due.clear()
        self.on_their_way.clear()
        self.store.clear()
        self.listeners.tell(lambda each: each.invalidating_where(lambda _: True))


_channels: weakref.WeakValueDictionary[tuple[int, int], Channel] = weakref.WeakValueDictionary()
"""By cache and event loop, while somebody uses it."""


# The view ----------------------------------------------------------------------------------------

Outcomes = dict[ResourceKey, Outcome]


class Terms(NamedTuple):
    """On which terms revisions are offered, at ``now`` by the wall clock.

    Who ``insists`` wants to know what was there before, and what failed. With ``leases``, there is
    one for each key. What others of this process may have overtaken since it was made is ``late``.
    """

    policies: Policies
    now: float
    force: bool = False
    replace_equal: bool = False
    insist: bool = False
    leases: Mapping[ResourceKey, Lease] | None = None
    late: bool = False


class Answer(NamedTuple):
    """What a leasing cache has for a key.

    Attributes:
        revision: what is stored, if anything; beside a lease, or while waiting, for use in need.
        lease: the lease on the key, for whoever acquires it.
        waiting: whether another answer follows, once somebody else has acquired it.
    """

    revision: Revision | None
    lease: Lease | None = None
    waiting: bool = False


class CacheAccess:
    """One cache, as the engine and the publisher use it.

    A subclass of `AsyncMemoryCache` has to be awaited, because it may have changed any method.

    Args:
        cache: the cache.
        copies: seal and open values at the edge of a cache that has to be awaited.
        max_pending_tasks: bounds the calls at a time to one with single-key methods only.
        observation: how far ahead of the clock what is held may be dated.
        failed: told of each failure that the library goes on without: the operation, the error.
        log: says when it begins to fail, and when it works again.

    Attributes:
        store: the entry store of the library's own memory cache, which is then used itself; else
            None, and all is read and written through here.
        subscribers: who hears of changes through this view, on any event loop; held weakly.
        leases: whether the cache says who is to acquire a key, and stores for him alone.
        copying: the keys of what has been read and is being copied in at this moment.
        tolerance: how many seconds ahead of the clock what is held may be dated.
    """

    def __init__(
        self,
        cache: AsyncCache,
        copies: PayloadCopies,
        max_pending_tasks: int,
        observation: ObservationPolicy,
        failed: Callable[[str, Exception], None] | None = None,
        log: ChangeLog | None = None,
    ) -> None:
        self.cache: AsyncCache = cache
        self.store: EntryStore | None = cache.store if type(cache) is AsyncMemoryCache else None
        self.subscribers: Listeners = Listeners() if self.store is None else self.store.listeners
        self.calls: CacheCalls = CacheCalls(cache, max_pending_tasks, failed, log)
        self.leases: bool = has(cache, "lease_many", "fulfil_many", "release_many")
        self.copies: PayloadCopies = copies
        self.copying: dict[ResourceKey, None] = {}
        self.tolerance: float = store.future_tolerance(observation)
        if self.store is not None:
            self.store.tolerate(self.tolerance)
        self._channel: Channel | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turns: set[asyncio.Future[None]] = set()
        self._giving_back: dict[Lease, bool] = {}

    def __repr__(self) -> str:
        return f"CacheAccess({self.calls if self.store is None else self.store!r})"

    def channel(self) -> Channel:
        """Return what all users of the cache share on the running event loop."""
        channel, loop = self._channel, asyncio.get_running_loop()
        if channel is None or channel.loop is not loop:
            if channel is not None:
                channel.listeners.unsubscribe(self.subscribers)
                self._giving_back.clear()
                for theirs in (self._tasks, self._turns, self.calls.left_behind):
                    theirs.clear()  # they end by themselves
            identity = (id(self.cache), id(loop))
            self._channel = channel = _channels.get(identity) or Channel(self.cache, loop)
            _channels[identity] = channel
            channel.listeners.subscribe(self.subscribers)
            channel.store.tolerate(self.tolerance)
        return channel

    @property
    def near(self) -> EntryStore | None:
        """The entries that can be used without awaiting at this moment, if there are any."""
        return self.channel().trusted() if self.store is None else self.store

    def is_cut_off(self) -> bool:
        """Whether others may have changed something unheard; values on their way count for nothing.

        Not while the cache is left alone: nobody could be asked instead.
        """
        channel = self.channel()
        if not channel.is_behind or self.calls.is_left_alone:
            return False
        channel.on_their_way.clear()
        return True

    @property
    def listeners(self) -> Listeners:
        """Who hears of changes to the cache on the running event loop, which must be there."""
        return self.channel().listeners if self.store is None else self.subscribers

    def attach(self) -> None:
        """Be used on the running event loop; raises `RuntimeError` if the cache must not be."""
        if self.store is None:
            self.channel()
            check = getattr(self.cache, "check_usable", None)
            if callable(check):
                check()

    async def stats(self) -> Any | None:
        """Return what the cache says of itself; None if it says nothing, or fails to."""
        if self.store is not None:
            return self.store.stats()
        if not has(self.cache, "stats"):
            return None
        task, error = await self.calls.made(self.calls.cache.stats, self.calls.seconds)
        return task.result() if error is None else None

    # Reading ------------------------------------------------------------------------------------

    async def read(
        self, keys: Collection[ResourceKey], now: float, policies: Policies
    ) -> dict[ResourceKey, Revision]:
        """Return the usable entries among ``keys``, in their order; never raises.

        Derived ones are joined to what they rest on, and left out if that is no longer current. The
        cache is rid of them, unless it should have left them out itself.
        """
        channel = self.channel()
        on_their_way = channel.on_their_way
        with channel.filling() as filling:
            horizon = now + self.tolerance
            known = channel.waiting(keys, horizon)
            rest = [key for key in keys if key not in known]
            values = await self.calls.get(rest, now, policies, horizon)
            known.update(await self.sealed(values))
            outdated = dict.fromkeys(await self.outdated(known, keys, now, self.sealed))
            kept = known.keys() - outdated.keys() - on_their_way.keys()
            channel.put(filling, [known[key] for key in known if key in kept])
        for key in outdated:
            if on_their_way.get(key) is known[key]:
                del on_their_way[key]
        held = {key: known[key] for key in outdated if key in values or key not in keys}
        if held and not self.calls.validates_dependencies:
            self._behind(self._remove_outdated(held, now))
        return {key: known[key] for key in keys if key in known and key not in outdated}

    async def outdated(
        self,
        known: dict[ResourceKey, Revision],
        absent: Iterable[ResourceKey],
        now: float,
        make: Callable[[Found], Awaitable[dict[ResourceKey, Revision]]],
    ) -> list[ResourceKey]:
        """Add to ``known`` all that it rests on, level by level; return what is outdated of it.

        What is ``absent`` and not known is not held.
        """
        channel = self.channel()

        async def held(keys: list[ResourceKey]) -> dict[ResourceKey, Revision]:
            found = channel.waiting(keys)
            rest = [key for key in keys if key not in found]
            return found | await make(await self.calls.held(rest, now))

        known.update(await store.with_all_below(known, absent, held))
        return store.outdated_among(known)

    async def _remove_outdated(self, outdated: Mapping[ResourceKey, Revision], now: float) -> None:
        """Remove entries found outdated, unless they have been replaced in the meantime."""
        async with self.channel().lanes.turn(outdated, among=self._turns):
            held = await self.calls.held(tuple(outdated), now)
            same = [key for key, value in held.items() if value.version == outdated[key].version]
            self.calls.tell("invalidate", await self.calls.remove(same, insist=False))

    async def sealed(self, values: Found) -> dict[ResourceKey, Revision]:
        """Copy values in; one that cannot be copied is told and left out."""
        revisions: dict[ResourceKey, Revision] = {}

        async def seal(key: ResourceKey) -> None:
            self.copying[key] = None
            try:
                revisions[key] = await seal_value(self.copies, values[key], _READ)
            except Exception as error:
                self.calls.tell("read", {key: error})
            finally:
                self.copying.pop(key, None)

        self.calls.pace.begin()
        await self.copies.each(values, seal, self.calls.pace)
        return revisions

    # Leases -------------------------------------------------------------------------------------

    async def lease(
        self,
        keys: Collection[ResourceKey],
        now: float,
        policies: Policies,
        *,
        force: bool = False,
        unlike: Mapping[ResourceKey, str] | None = None,
    ) -> AsyncGenerator[Mapping[ResourceKey, Answer], None]:
        """Give what there is for each key, or the lease on it, as it becomes known; never raises.

        ``force`` asks for leases in any case; versions ``unlike`` these are of no use.
        """
        channel = self.channel()
        rest = dict.fromkeys(keys)
        if not (force or unlike):
            waiting = channel.waiting(keys, now + self.tolerance).values()
            # What a derived one rests on may have changed: it is judged once it is there.
            held = [each for each in waiting if not each.dependency_versions]
            for each in held:
                del rest[each.key]
            yield {each.key: Answer(each) for each in held}
        unlike, ahead = unlike or {}, now - channel.loop.time()
        for _ in range(_MOST_ROUNDS):  # it may call one value by ever new versions
            if not rest:
                return
            unfit = dict(unlike)
            asking = self._leased(rest, ahead, policies, force, unfit)
            async with contextlib.aclosing(asking):
                async for answers in asking:
                    yield answers
            unlike, force = dict(unfit.items() - unlike.items()), False
            rest = dict.fromkeys(unlike)

    async def _leased(
        self,
        rest: dict[ResourceKey, None],
        ahead: float,
        policies: Policies,
        force: bool,
        unfit: dict[ResourceKey, str],
    ) -> AsyncGenerator[Mapping[ResourceKey, Answer], None]:
        """Give what the cache answers for the ``rest`` of the keys.

        What has come and is of no use is added to ``unfit``, to be asked for again. The clock of
        who asks is so much ``ahead`` of the loop's: it may take long.
        """
        channel = self.channel()
        arrived, gone = list[Mapping[ResourceKey, LeasedLookup]](), False

        async def next_part() -> Mapping[ResourceKey, LeasedLookup] | None:
            part = await anext(asking, None)  # which may come when nobody waits any more
            if part is not None:
                arrived.append(part)
            if gone:
                self._give_back_all_of(arrived)
            return part

        async def close() -> None:
            await asking.aclose()

        with channel.filling() as filling:
            try:
                asking = self.calls.cache.lease_many(
                    tuple(rest),
                    now=ahead + channel.loop.time(),
                    policies=policies,
                    force=force,
                    unlike=dict(unfit) or None,
                )
                first = True
                while rest:
                    part = await self.calls.call("lease_many", next_part, patient=not first)
                    if part is None:
                        break
                    first = False
                    moment = ahead + channel.loop.time()
                    answers = await self._answers(part, rest, unfit, moment, filling)
                    arrived.clear()
                    for key in part:
                        if key not in answers or not answers[key].waiting:
                            rest.pop(key, None)
                    yield answers
            except Exception as error:
                self.calls.tell("read", dict.fromkeys(rest, error))
            finally:
                gone = True
                self._give_back_all_of(arrived)
                if running_loop() is channel.loop:  # else the collector does so
                    self._behind(self.calls.made(close, self.calls.seconds))
            if rest:
                yield dict.fromkeys(rest, Answer(None))

    async def _answers(
        self,
        part: Mapping[ResourceKey, LeasedLookup],
        asked: Collection[ResourceKey],
        unfit: dict[ResourceKey, str],
        now: float,
        filling: Filling,
    ) -> dict[ResourceKey, Answer]:
        """Seal what a leasing cache gave, join what is derived, and keep what is current.

        What the cache takes for good, and nobody can use, is left out and entered as `unfit`; who
        has the lease replaces it.
        """
        values: Found = {}
        horizon = now + self.tolerance
        for key, told in part.items():
            try:
                value = told.lookup.value
                if value is not None and sound(value, key).observed_at <= horizon:
                    values[key] = value
            except Exception as error:
                self.calls.tell("read", {key: error})
        revisions = await self.sealed(values)
        for key in store.outdated_among(revisions):
            del revisions[key]
        kept = [k for k in revisions if not part[k].waiting and part[k].lease is None]
        self.channel().put(filling, [revisions[key] for key in kept])
        answers: dict[ResourceKey, Answer] = {}
        for key, told in part.items():
            if key not in asked:
                continue
            value = told.lookup.value
            if key not in revisions and isinstance(value, SnapshotValue):
                if told.lease is not None:
                    told.lease.replaces = value.version
                elif not told.waiting and unfit.get(key) != value.version:
                    unfit[key] = value.version
                    continue
            answers[key] = Answer(revisions.get(key), told.lease, told.waiting)
        return answers

    def give_back(self, lease: Lease | None, *, failed: bool) -> None:
        """Let go of a lease, if there is one, without a value; ``failed`` if tried in vain."""
        if lease is not None:
            if not self._giving_back:
                loop = asyncio.get_running_loop()
                loop.call_soon(lambda: self._behind(self._give_back()))
            self._giving_back[lease] = failed

    def _give_back_all_of(self, parts: Iterable[Mapping[ResourceKey, LeasedLookup]]) -> None:
        for part in parts:
            for told in part.values() if isinstance(part, Mapping) else ():
                self.give_back(getattr(told, "lease", None), failed=False)

    def _give_back(self) -> Coroutine[Any, Any, None]:
        """Take what is to be given back, here and now; who does it may be cancelled before."""
        given, self._giving_back = self._giving_back, {}
        return self._release(given)

    async def _release(self, given: Mapping[Lease, bool]) -> None:
        for failed in (False, True):
            leases = tuple([lease for lease, value in given.items() if value is failed])
            if leases:
                try:
                    release = partial(self.calls.cache.release_many, leases, failed=failed)
                    await self.calls.call("release_many", release, insist=True)
                except Exception as error:
                    self.calls.tell("write", {leases[0].key: error})

    # Writing ------------------------------------------------------------------------------------

    def raise_first(self, failures: Failures) -> None:
        """Raise the first of the failures of what an application asked for; tell of the others.

        They are let go, as the traceback leads to whoever has them.
        """
        first = next(iter(failures.values()), None)
        self.calls.tell("write", {k: each for k, each in failures.items() if each is not first})
        failures.clear()
        if first is not None:
            try:
                raise first
            finally:
                del first

    def holds(self, revision: Revision) -> bool:
        """Whether a value on its way still counts as held."""
        return self.channel().on_their_way.get(revision.key) is revision

    def hold(self, revision: Revision, now: float, *, replace_equal: bool = False) -> Outcome:
        """Let a value that is being written behind count as held from now on.

        One that may not replace what is on its way already does not count. What is derived gives
        way there: it may be outdated, and is then to defend nothing.
        """
        channel = self.channel()
        current = channel.on_their_way.get(revision.key)
        if current is not None and not current.dependency_versions:
            horizon = now + self.tolerance
            status = decide(revision, current, replace_equal=replace_equal, horizon=horizon)
            if status is not _STORED:
                return status, current, current
        channel.on_their_way[revision.key] = revision
        channel.drop({revision.key: revision.version})
        channel.listeners.revised({revision.key: revision}, self.subscribers)
        return _STORED, revision, current

    def write_behind(
        self,
        revisions: Collection[Revision],
        terms: Terms,
        *,
        wanted: Callable[[Revision], bool],
        ended: Callable[[Outcomes], object] = lambda _: None,
    ) -> None:
        """Offer values to the cache, those still ``wanted`` when their turn has come.

        Failures are told. ``ended`` learns the outcomes, whatever happens.
        """

        def done(task: asyncio.Task[tuple[Outcomes, Failures]]) -> None:
            outcomes: Outcomes = {}
            if task.cancelled():  # what has been stored under a lease has ended it
                for lease in (terms.leases or {}).values():
                    self.give_back(lease, failed=False)
            elif task.exception() is None:
                outcomes, failures = task.result()
                self.calls.tell("write", failures)
            for revision in revisions:
                if channel.on_their_way.get(revision.key) is revision:
                    del channel.on_their_way[revision.key]
            ended(outcomes)

        channel, best = self.channel(), store.best_per_key(revisions)
        self._behind(self.write(best, terms, wanted)).add_done_callback(done)

    async def write(
        self,
        revisions: Mapping[ResourceKey, Revision],
        terms: Terms,
        wanted: Callable[[Revision], bool] = lambda _: True,
    ) -> tuple[Outcomes, Failures]:
        """Offer values in their turn; return what became of each, and the failures."""
        channel = self.channel()
        asked = channel.loop.time()
        # A cache may refuse what rests on something that it does not hold yet.
        below = {key for each in revisions.values() for key in each.dependency_versions}
        async with channel.lanes.turn(revisions, below, among=self._turns):
            if self._giving_back and terms.leases is None:
                # Or nobody would be told that those were in vain; who waits for it may leave.
                await asyncio.wait((self._behind(self._give_back()),))
            offered = {key: each for key, each in revisions.items() if wanted(each)}
            insist = terms.insist and not self.calls.gave_up_since(asked)
            write, outcomes = _Write(self, offered, terms, insist), Outcomes()
            try:
                with channel.filling() as filling:
                    outcomes = await write.run()
                    await self.calls.pace.keep()
                    teller = None if terms.insist else self.subscribers
                    self._tell(channel, offered, outcomes, teller)
                    channel.wrote(filling, outcomes.values())
            finally:  # who knows whether the others have been written
                channel.drop({key: None for key in offered if key not in outcomes})
        return outcomes, write.failures

    def _tell(
        self,
        channel: Channel,
        offered: Mapping[ResourceKey, Revision],
        outcomes: Outcomes,
        teller: Listeners | None,
    ) -> None:
        """Tell of what readers see now and did not see before.

        What was fetched is no news to the ``teller``, who has settled its flight.
        """
        changes: dict[ResourceKey, Revision | None] = {}
        known: dict[ResourceKey, Revision | None] = {}
        for key, (status, current, _) in outcomes.items():
            waiting = channel.on_their_way.get(key)
            was_held = waiting is offered[key]
            if status is _STORED and not was_held:
                known[key] = current
            elif was_held and status is not _STORED:
                # One that was refused, and comes back, says that nothing else is there.
                changes[key] = None if current.version == offered[key].version else current
            if was_held or decide(current, waiting) is _STORED:
                channel.on_their_way.pop(key, None)
        if changes:
            channel.listeners.revised(changes)
        if known:
            channel.listeners.revised(known, teller)

    # Invalidating and ending --------------------------------------------------------------------

    async def invalidate(self, keys: Collection[ResourceKey]) -> Failures:
        """Remove ``keys``; return why some could not be.

        Listeners hear of it before the first await, and again afterwards.
        """
        if self.store is not None:
            await let_go(self.store.drop(keys))
            return {}
        gone = dict.fromkeys(keys)
        channel = self.channel()
        channel.invalidate(gone)
        asked = channel.loop.time()
        async with channel.lanes.turn(gone, among=self._turns):
            try:
                insist = not self.calls.gave_up_since(asked)
                return await self.calls.remove(tuple(gone), insist=insist)
            finally:
                channel.drop(gone)
                channel.listeners.revised(gone)

    async def drain(self, timeout_seconds: float) -> set[asyncio.Task[Any]]:
        """Wait until what is on its way is written, for so long or a moment; then give it up.

        Return the calls that go on though they were cancelled.
        """
        if self.store is None:
            self.channel()  # drops those of another loop
        now = asyncio.get_running_loop().time
        await asyncio.sleep(0)  # for what is given back at this moment, as by writes that end
        for seconds in (timeout_seconds, 0.0):
            until = now() + max(seconds, _MOMENT_SECONDS)
            while (busy := self._tasks | self._turns | self.calls.left_behind) and now() < until:
                await asyncio.wait(busy, timeout=until - now())
            for task in tuple(self._tasks):
                task.cancel()
        return self.calls.left_behind.copy()

    def _behind(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work, name="coalestra cache write")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass(eq=False)
class _Write:
    """One group of revisions on its way into the cache, whose lanes are held meanwhile.

    Attributes:
        failures: why keys could not be written.
    """

    cache: CacheAccess
    offered: Mapping[ResourceKey, Revision]
    terms: Terms
    insist: bool
    failures: Failures = field(default_factory=dict)
    values: Found = field(default_factory=dict)
    results: dict[ResourceKey, CacheWriteResult] = field(default_factory=dict)

    async def run(self) -> Outcomes:
        """Write what may be written; return what became of all but the failures."""
        self.cache.calls.pace.begin()
        await self._open()
        if self.terms.leases is None:
            await self._compare()
        else:
            await self._fulfil(self.terms.leases)
        return await self._outcomes()

    async def _compare(self) -> None:
        """Offer values; where the cache cannot know the write order, have the last word."""
        terms, atomic = self.terms, self.cache.calls.is_atomic
        looked_at = [key for key in self.values if self._looks_first(self.offered[key])]
        held = await self.cache.calls.held(looked_at, terms.now)
        for key, current in held.items():
            await self.cache.calls.pace.keep()
            status = self._status(key, current)
            if status is not _STORED and not terms.force and self._is_known(key, current):
                self.results[key] = CacheWriteResult(status, current, current)
        rest = [key for key in self.values if key not in self.results]
        if atomic:
            for equal in (False, True):
                some = [key for key in rest if self._replaces_equal(key) is equal]
                await self._offer(some, force=terms.force, replace_equal=equal)
        else:
            await self._store(rest, held, insist=self.insist)
        again = set()
        for key, stayed in self._lost().items():
            await self.cache.calls.pace.keep()
            if stayed.version == self.values[key].version:  # a call that failed had stored it
                self.results[key] = CacheWriteResult(_STORED, stayed)
            elif self._status(key, stayed) is _STORED:
                again.add(key)
        again.update(await self._outdated())
        if atomic:
            await self._offer(again, force=True, replace_equal=True)
            await self._replace_unreadable()
        else:
            await self._store(again, held, insist=self.insist)

    async def _fulfil(self, leases: Mapping[ResourceKey, Lease]) -> None:
        """Store what was acquired under leases; give those back of what cannot be stored."""
        terms = self.terms
        for key, lease in leases.items():
            if key not in self.values:
                self.cache.give_back(lease, failed=key in self.failures)
        if not self.values:
            return
        offered = {leases[key]: value for key, value in self.values.items()}
        try:
            how = {"policies": terms.policies, "replace_equal": terms.replace_equal}
            fulfil = partial(self.cache.calls.cache.fulfil_many, offered, **how)
            answers = await self.cache.calls.call("fulfil_many", fulfil, insist=True)
            told = {key: answers.get(key) for key in self.values}
        except Exception as error:
            errors.without_frames(error)
            told = dict.fromkeys(self.values, error)
        for key, result in told.items():
            try:
                if isinstance(result, Exception):
                    raise result
                self.results[key] = _result(result, key)
            except Exception as error:
                errors.without_frames(error)
                self.failures[key] = error
                self.cache.give_back(leases[key], failed=True)  # which it may not have come to
        if not self.failures:
            self.cache.calls.works("write")
        horizon = terms.now + self.cache.tolerance
        future = [
            key
            for key, stayed in self._lost().items()
            if stayed.observed_at > horizon and self._status(key, stayed) is _STORED
        ]
        for key in {*future, *await self._outdated()}:
            del self.results[key]  # what is of no use takes nobody's place

    async def _open(self) -> None:
        copies = self.cache.copies

        async def open_one(key: ResourceKey) -> None:
            try:
                self.values[key] = await open_value(copies, self.offered[key], _WRITE)
            except Exception as error:
                errors.without_frames(error)
                self.failures[key] = error

        await copies.each(self.offered, open_one, self.cache.calls.pace)

    def _looks_first(self, revision: Revision) -> bool:
        """Whether the library compares before it offers a value.

        A cache that compares would take an undated fetch for as new as the end of its reading. One
        that knows better tells undated values by their equal times, which may be by chance, and
        takes an event for as new as its writing.
        """
        if self.terms.force or not self.cache.calls.is_atomic:
            return not self.cache.calls.is_atomic
        if revision.dated:
            return revision.observed_at == revision.fetched_at
        if self.cache.calls.validates_order:
            return self.terms.late and not revision.attempts
        return revision.attempts > 0

    def _is_known(self, key: ResourceKey, current: SnapshotValue[Any]) -> bool:
        """Whether the order of two values is known here, as that of events of this process is."""
        to_be_dated = self.cache.calls.validates_order and not self.offered[key].dated
        return not to_be_dated or revision_of(current).began > 0

    def _status(self, key: ResourceKey, current: SnapshotValue[Any]) -> CacheWriteStatus:
        """Say what becomes of a value; what is read in place of one too old for use replaces it."""
        offered, terms = self.offered[key], self.terms
        oldest = -math.inf
        if offered.attempts and key in terms.policies:
            oldest = terms.now - terms.policies[key].max_stale_seconds
        if current.observed_at < min(oldest, offered.observed_at):
            return _STORED
        equal, horizon = terms.replace_equal, terms.now + self.cache.tolerance
        return decide(offered, revision_of(current), replace_equal=equal, horizon=horizon)

    async def _store(self, keys: Iterable[ResourceKey], held: Found, *, insist: bool) -> None:
        values = {key: self.values[key] for key in keys}
        failed = await self.cache.calls.store(values, self.terms.policies, insist=insist)
        self.failures.update(failed)
        for key, value in values.items():
            await self.cache.calls.pace.keep()
            if key not in failed:
                self.results[key] = CacheWriteResult(_STORED, value, held.get(key))

    def _replaces_equal(self, key: ResourceKey) -> bool:
        """Whether ``key`` is offered in place of an equal one: known, or found, to come later."""
        revision, told = self.offered[key], self.results.get(key)
        if told is not None:
            equal = told.status is CacheWriteStatus.IGNORED_DUPLICATE
            return equal and self._status(key, told.value) is _STORED
        return self.terms.replace_equal or (self._looks_first(revision) and not revision.dated)

    async def _offer(
        self, keys: Iterable[ResourceKey], *, force: bool, replace_equal: bool
    ) -> None:
        values = {key: self.values[key] for key in keys}
        how = {"force": force, "replace_equal": replace_equal, "insist": self.insist}
        results, failed = await self.cache.calls.offer(values, self.terms.policies, **how)
        self.results.update(results)
        self.failures.update(failed)

    async def _replace_unreadable(self) -> None:
        """Write over an entry that the cache cannot compare with as it cannot read it."""
        away = CacheTimeoutError, CacheCircuitOpenError
        failed = self.failures.items()
        tried = [key for key, e in failed if key in self.values and not isinstance(e, away)]
        readable = await self.cache.calls.held(tried, self.terms.now)
        unreadable = [key for key in tried if key not in readable]
        # Insisting, as all that could not be compared may have made the cache look dead.
        await self._store(unreadable, {}, insist=True)
        for key in unreadable:
            if key in self.results:
                del self.failures[key]

    def _lost(self) -> Found:
        """Return what has stayed in the cache, by key."""
        return {key: each.value for key, each in self.results.items() if not each.stored}

    async def _outdated(self) -> list[ResourceKey]:
        """Return where what stayed is outdated: it must not keep a newer revision out."""
        stayed = await _bare(self._lost())
        outdated = await self.cache.outdated(dict(stayed), (), self.terms.now, _bare)
        return [key for key in outdated if key in stayed]

    async def _outcomes(self) -> Outcomes:
        results, before = self.results, Found()
        for key, result in results.items() if self.insist else ():
            await self.cache.calls.pace.keep()
            if result.previous is not None and result.stored:
                with contextlib.suppress(Exception):  # one that cannot be trusted is none
                    before[key] = sound(result.previous, key)
        current = await self.cache.sealed(self._lost())
        for key in await self.cache.outdated(current, (), self.terms.now, self.cache.sealed):
            del current[key]
        replaced = await self.cache.sealed(before)
        for key in await self.cache.outdated(replaced, (), self.terms.now, self.cache.sealed):
            del replaced[key]
        outcomes: Outcomes = {}
        for key, result in results.items():
            await self.cache.calls.pace.keep()
            now_held = current.get(key, self.offered[key])
            was_held = replaced.get(key) if result.stored else now_held
            outcomes[key] = (result.status, now_held, was_held)
        return outcomes


async def _bare(values: Found) -> dict[ResourceKey, Revision]:
    """Return revisions that can only be compared."""
    revisions, pace = {}, Pace()
    for key, value in values.items():
        await pace.keep()
        revisions[key] = revision_of(value)
    return revisions
