"""Calls to a cache that is not the library's own: bounded, counted, each alone with its failure.

Laws:

1. Every call has a time limit, and whatever it raises belongs to the keys that it was about: one
   that cannot be read is a miss, one that cannot be written is told. What makes no sense was not
   read.
2. Where a call for many keys fails, they are tried one by one.
3. A cache that failed too often in a row is left alone for a while: reads are misses at once,
   values are not stored. What an application asked for, a publication or an invalidation, is tried
   all the same, unless that happened while it waited for its turn. Failed reads keep no writes
   away, and a write that succeeds brings reads back. A cache that says whether it ``is_available``
   sees to this itself.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Hashable, Mapping
from functools import partial
from typing import Any, Final, TypeGuard, TypeVar, cast

from coalestra._endings import look_after
from coalestra.concurrency.pace import Pace
from coalestra.core import errors
from coalestra.core.errors import CacheCircuitOpenError, CacheTimeoutError, CacheUnavailableError
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.validation import integer, number, shown, text
from coalestra.core.values import CacheLookup, CacheWriteResult, CacheWriteStatus, SnapshotValue
from coalestra.observability import ChangeLog

_I = TypeVar("_I", bound=Hashable)
_T = TypeVar("_T")


async def call_each(
    items: Collection[_I],
    call: Callable[[_I], Awaitable[_T]],
    *,
    width: int,
    seconds: float | None,
    refused: Callable[[], Exception | None] = lambda: None,
    ended: Callable[[BaseException | None], object] = lambda _: None,
) -> tuple[dict[_I, _T], dict[_I, BaseException]]:
    """Make a call for every item, at most ``width`` at a time.

    Return results and failures, each in the order of the items.

    A call that takes longer than ``seconds`` (None: it may) is cancelled and counts as failed by a
    `CacheTimeoutError`; should it not end, it is left behind. ``refused`` is asked before each call
    and may give an error instead, ``ended`` is told how each ended. Nothing is raised but the
    caller's own cancellation.
    """
    results: dict[_I, _T] = {}
    failures: dict[_I, BaseException] = {}
    rest = iter(items)

    async def made(item: _I) -> _T:
        return await call(item)

    async def work() -> None:
        for item in rest:
            error: BaseException | None = refused()
            if error is None:
                task = asyncio.create_task(made(item), name="coalestra cache call")
                try:
                    await asyncio.wait([task], timeout=seconds)
                finally:
                    leave_behind(task)
                if task.cancelled():
                    error = asyncio.CancelledError()
                else:
                    error = task.exception() if task.done() else CacheTimeoutError(seconds or 0)
                ended(error)
            if error is None:
                results[item] = task.result()
            else:
                failures[item] = error

    workers = min(width, len(items))
    await (work() if workers == 1 else asyncio.gather(*[work() for _ in range(workers)]))
    failures = {item: failures[item] for item in items if item in failures}
    return {item: results[item] for item in items if item in results}, failures


_left_behind: set[asyncio.Task[Any]] = set()
"""Calls that were cancelled; some may not care. Nobody else refers to them."""


def leave_behind(task: asyncio.Task[Any]) -> None:
    """Cancel a call that nobody waits for any more, however it may end; one that is over is not."""
    if task.done():
        if not task.cancelled():
            task.exception()  # seen
    elif not task.get_loop().is_closed():
        task.cancel()
        look_after(task, _left_behind)


DEFAULT_TIMEOUT_SECONDS: Final = 1.0
"""How long one call may take, unless the cache has ``timeout_seconds`` of its own."""

_FAILURES_IN_A_ROW = 5
_RECOVERY_SECONDS = 5.0
_ANY_AGE = FreshnessPolicy(math.inf, math.inf)
_ALL: Final = "all keys"
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

    async def once(
        self,
        operation: str,
        call: Callable[[], Awaitable[_T]],
        *,
        patient: bool = False,
        insist: bool = False,
    ) -> _T:
        """Make a call for whatever number of keys; a ``patient`` one may take any time.

        Raises what the cache raised, or why it was not asked.
        """
        results, failures = await self._calls(
            operation, (_ALL,), lambda _: call(), insist, None if patient else self.seconds
        )
        if not failures:
            return results[_ALL]
        error = failures.pop(_ALL)
        try:
            raise error
        finally:
            del error  # whose traceback leads here

    async def stats(self) -> Any | None:
        """Return what the cache says of itself; None if it says nothing, or fails to."""
        if not has(self.cache, "stats"):
            return None
        results, _ = await call_each(
            (_ALL,), lambda _: self.cache.stats(), width=1, seconds=self.seconds
        )
        return results.get(_ALL)

    def tell(self, operation: str, failures: Mapping[ResourceKey, Exception]) -> None:
        """Report failures that the library goes on without; refusals are only counted."""
        for error in {id(error): error for error in failures.values()}.values():
            if isinstance(error, CacheCircuitOpenError):
                continue
            if self._told is not None:
                self._told(operation, error)
            if self._log is not None:
                self._log.failed(self._subject("read" if operation == "read" else "write"), error)

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
                return await self.once(name, lambda: many(items.keys()), insist=insist), {}
            except (CacheTimeoutError, CacheCircuitOpenError) as error:
                errors.without_frames(error)
                return {}, dict.fromkeys(items, error)
            except Exception:
                pass  # which of them it was is found out
        return await self._calls(method, items, one, insist, self.seconds)

    async def _calls(
        self,
        operation: str,
        items: Collection[_I],
        call: Callable[[_I], Awaitable[_T]],
        insist: bool,
        seconds: float | None,
    ) -> tuple[dict[_I, _T], dict[_I, Exception]]:
        loop, counts, name = asyncio.get_running_loop(), self._counts, type(self.cache).__name__
        kind = "read" if operation in _READS else "write"
        circuit = self._circuits[kind]
        free = self.limit if insist else 0

        def refused() -> Exception | None:
            nonlocal free
            free -= 1
            if free >= 0 or self._guards_itself or circuit.admits(loop.time()):
                counts["calls"] += 1
                return None
            return CacheCircuitOpenError(
                f"{operation}: {name} failed {_FAILURES_IN_A_ROW} times in a row, and is left "
                f"alone for up to {_RECOVERY_SECONDS:g} s"
            )

        def ended(error: BaseException | None) -> None:
            if error is None:
                circuit.failures = self._circuits["read"].failures = 0
                if self._log is not None and self._log.troubled:
                    self._log.works(self._subject(kind))
                return
            circuit.failures += 1
            circuit.failed_at = loop.time()
            circuit.until = circuit.failed_at + _RECOVERY_SECONDS
            counts["failures"] += 1
            counts["timeouts"] += isinstance(error, CacheTimeoutError)

        results, raised = await call_each(
            items, call, width=self.limit, seconds=seconds, refused=refused, ended=ended
        )
        return results, {
            item: _as_exception(error, operation, name) for item, error in raised.items()
        }


def has(cache: Any, *methods: str) -> bool:
    """Whether a cache has all of these methods."""
    return all(callable(_said(cache, name)) for name in methods)


def _said(cache: Any, name: str) -> Any:
    """Return what a cache says of itself by an attribute; None if it says nothing."""
    try:
        return getattr(cache, name, None)
    except Exception:
        return None


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
    return sound(lookup.value, key)


def _result(result: object, key: ResourceKey) -> CacheWriteResult:
    if not isinstance(result, CacheWriteResult):
        raise _odd(key, f"a {type(result).__qualname__} instead of a CacheWriteResult")
    if not isinstance(result.status, CacheWriteStatus):  # a bare text is equal to a member
        raise _odd(key, f"{shown(result.status)} instead of a CacheWriteStatus")
    if result.status is not CacheWriteStatus.STORED:
        sound(result.value, key)
    return result


_CHECKS: Final[Mapping[str, Callable[[str, Any], object]]] = {
    "source": partial(text, empty=True),
    **dict.fromkeys(("observed_at", "fetched_at", "latency_ms"), number),
    **dict.fromkeys(("attempts", "authority_rank"), integer),
}


def sound(value: object, key: ResourceKey) -> SnapshotValue[Any]:
    """Return a value that a cache gave for a key; raises for one that cannot be trusted."""
    if type(value) is not SnapshotValue:
        raise _odd(key, f"a {type(value).__qualname__} instead of a SnapshotValue")
    if type(value.key) is not ResourceKey or value.key != key:
        other = shown(value.key)
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


def is_sound(value: object, key: ResourceKey) -> TypeGuard[SnapshotValue[Any]]:
    """Whether a value that a cache gave for a key can be trusted."""
    try:
        sound(value, key)
    except Exception:
        return False
    return True


def _odd(key: ResourceKey, answer: str) -> CacheUnavailableError:
    return CacheUnavailableError(f"the cache answered {key.display} with {answer}")
