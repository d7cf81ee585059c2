"""Calling what an application wrote: plain or async, here or in a worker thread.

Only ordinary exceptions leave a call. An exception that would end a generator, a task or the
process is the callable's mistake, and becomes a `RuntimeError` that says so.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias, TypeVar, cast

from coalestra.concurrency.pace import Pace
from coalestra.concurrency.threads import threads_of_context
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext, Snapshot
from coalestra.core.validation import (
    callable_,
    flag,
    instance,
    integer,
    number,
    refusal,
    text,
    wrong_type,
)
from coalestra.core.values import SourcePayload
from coalestra.resilience.policies import SourceResiliencePolicy

# Calling what an application wrote: plain or async, here or in a worker thread -------------------


T = TypeVar("T")

_NOT_AWAITABLE = frozenset({SourcePayload, bool, dict, float, int, list, str, tuple, type(None)})
"""What callables most often return; for others it takes a closer look."""

_ENDINGS_OF_COROUTINES = (KeyboardInterrupt, GeneratorExit)


class Invocation:
    """One callable of an adapter, and how to call it.

    Attributes:
        role: what messages call it, such as ``fetcher of source 'rest'``.
        in_thread: whether it runs in a worker thread; a coroutine function never does.
    """

    __slots__ = ("_function", "_label", "in_thread", "role")

    def __init__(
        self, function: Callable[..., Any], *, source: str, parameter: str, in_thread: bool
    ) -> None:
        self._function = function
        self._label = source
        self.role: str = f"{parameter} of source {source!r}"
        self.in_thread: bool = in_thread and not is_coroutine_function(function)

    async def call(self, *arguments: Any) -> Any:
        """Return the result, awaited if it is awaitable.

        Raises:
            RuntimeError: in place of an exception that must not leave a source.
            Exception: whatever else the callable raised.
        """
        asked = _requests_to_cancel()
        if self.in_thread:
            result = await self._call_in_thread(arguments)
        else:
            result = self.call_now(*arguments)
        if type(result) in _NOT_AWAITABLE:
            return result
        if inspect.isawaitable(result):
            return await self._awaited(result, asked)
        return result

    def call_now(self, *arguments: Any) -> Any:
        """Call it in this thread and return what it returns, awaitable or not; see `call`."""
        try:
            return self._function(*arguments)
        except BaseException as error:
            self._check(error)
            raise

    def answer_now(self, *arguments: Any) -> Any:
        """Return the result of a callable that has to be plain.

        Raises:
            TypeError: if it returned an awaitable.
        """
        try:
            result = self._function(*arguments)
        except BaseException as error:
            self._check(error)
            raise
        if type(result) in _NOT_AWAITABLE:
            return result
        if inspect.isawaitable(result):
            _discard(result)
            raise TypeError(f"{self.role} must be a plain function, got one that is async")
        return result

    async def _call_in_thread(self, arguments: tuple[Any, ...]) -> Any:
        returned: list[Any] = []
        try:
            await threads_of_context().run(self._deliver, returned, arguments, label=self._label)
        except asyncio.CancelledError:
            for result in returned:
                _discard(result)
            raise
        return returned.pop()

    def _deliver(self, returned: list[Any], arguments: tuple[Any, ...]) -> None:
        returned.append(self.call_now(*arguments))

    async def _awaited(self, awaitable: Awaitable[T], asked: int | None) -> T:
        try:
            return await awaitable
        except asyncio.CancelledError as error:
            # Before Python 3.11 a task does not say who asked, so there the caller has to judge.
            if asked is None or _requests_to_cancel() != asked:
                raise
            raise self._misuse(error) from error
        except (Exception, *_ENDINGS_OF_COROUTINES):
            raise
        except BaseException as error:
            raise self._misuse(error) from error

    def _check(self, error: BaseException) -> None:
        """Raise a `RuntimeError` in place of an exception that must not leave a source."""
        if isinstance(error, Exception):
            if not isinstance(error, StopIteration):
                return
        elif isinstance(error, KeyboardInterrupt) and _on_main_thread():
            return
        raise self._misuse(error) from error

    def _misuse(self, error: BaseException) -> RuntimeError:
        return RuntimeError(
            f"{self.role} may raise ordinary exceptions only, got {type(error).__qualname__}; "
            "catch it there and raise what failed"
        )

    def __repr__(self) -> str:
        return f"<Invocation {self.role} in_thread={self.in_thread}>"


def is_coroutine_function(function: Callable[..., Any]) -> bool:
    """Say whether calling `function` only makes a coroutine, so that nothing blocks yet."""
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        type(function).__call__
    )


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _discard(result: Any) -> None:
    """Close a coroutine that nobody is going to await."""
    if inspect.iscoroutine(result):
        result.close()


if sys.version_info >= (3, 11):

    def _requests_to_cancel() -> int | None:
        task = asyncio.current_task()
        return None if task is None else task.cancelling()

else:

    def _requests_to_cancel() -> int | None:
        return None


# What the three callable adapters have in common: their settings and what these imply ------------


@dataclass(eq=False, repr=False, kw_only=True)
class AdapterSettings:
    """The settings that every callable adapter takes.

    Attributes:
        name: the source's name, unique in a builder.
        priority: sources with a higher one are asked first.
        timeout_seconds: the longest a call may take; None: no limit of its own.
        queue_timeout_seconds: the longest a call may wait for capacity; None: as long as a call
            may take.
        max_concurrency: how many calls may run at once; None: no limit of its own.
        resilience_policy: retries and circuit of this source; None: the builder's.
        cache_supports: whether answers of ``supports`` may be remembered.
        run_sync_in_thread: whether a plain function runs in a worker thread.
        blocking_io: whether the function waits for a network, a disk or the like.
        transport_timeout_seconds: the longest its transport lets it wait.

    Raises:
        TypeError, ValueError: for a bad setting, naming it.
    """

    name: str
    priority: int
    timeout_seconds: float | None
    queue_timeout_seconds: float | None
    max_concurrency: int | None
    resilience_policy: SourceResiliencePolicy | None
    cache_supports: bool
    run_sync_in_thread: bool
    blocking_io: bool
    transport_timeout_seconds: float | None

    def __post_init__(self) -> None:
        text("name", self.name)
        integer("priority", self.priority)
        for setting in ("timeout_seconds", "queue_timeout_seconds", "transport_timeout_seconds"):
            number(setting, getattr(self, setting), above=0, optional=True)
        integer("max_concurrency", self.max_concurrency, minimum=1, optional=True)
        instance("resilience_policy", self.resilience_policy, SourceResiliencePolicy, optional=True)
        for setting in ("cache_supports", "run_sync_in_thread", "blocking_io"):
            flag(setting, getattr(self, setting))
        if self.transport_timeout_seconds is not None and not self.blocking_io:
            raise ValueError(
                refusal(
                    "transport_timeout_seconds",
                    "None unless blocking_io is True",
                    self.transport_timeout_seconds,
                    "set blocking_io=True if the callable blocks",
                )
            )


class CallableAdapter:
    """A source made from functions; every setting is an attribute under its parameter's name.

    Attributes:
        blocking_io_offloaded: whether calls leave the event loop: True for a plain function that
            runs in a worker thread.
    """

    name: str
    priority: int
    timeout_seconds: float | None
    queue_timeout_seconds: float | None
    max_concurrency: int | None
    resilience_policy: SourceResiliencePolicy | None
    cache_supports: bool
    run_sync_in_thread: bool
    blocking_io: bool
    transport_timeout_seconds: float | None
    blocking_io_offloaded: bool

    def __init__(
        self,
        settings: AdapterSettings,
        supports: Callable[[ResourceKey], bool],
        invocation: Invocation,
    ) -> None:
        vars(self).update(vars(settings))
        self._invocation = invocation
        self._supports = plain("supports", supports, source=settings.name)
        self.blocking_io_offloaded = invocation.in_thread

    def supports(self, key: ResourceKey) -> bool:
        """Return whether this source can answer for `key`: what the function says, as a bool."""
        answer = self._supports.answer_now(key)
        return answer if answer is True else bool(answer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, priority={self.priority!r})"


def invocation_of(
    parameter: str, function: Callable[..., Any], settings: AdapterSettings
) -> Invocation:
    """Return how to call `function`; TypeError if it cannot be called."""
    callable_(parameter, function)
    return Invocation(
        function,
        source=settings.name,
        parameter=parameter,
        in_thread=settings.run_sync_in_thread,
    )


def plain(parameter: str, function: Callable[..., Any], *, source: str) -> Invocation:
    """Return how to call a function whose answer is needed at once; TypeError if it is async."""
    callable_(parameter, function)
    if is_coroutine_function(function):
        raise wrong_type(parameter, "a plain function", function, "it must answer without waiting")
    return Invocation(function, source=source, parameter=parameter, in_thread=False)


def as_payload(value: Any) -> SourcePayload[Any]:
    """Return `value` as a payload: itself if it is one already."""
    return value if isinstance(value, SourcePayload) else SourcePayload(value)


# A source that fetches one resource at a time with a function ------------------------------------


SupportsFunction: TypeAlias = Callable[[ResourceKey], bool]
"""Says whether a source can answer for a key; plain and quick."""

FetcherFunction: TypeAlias = Callable[[ResourceKey, FetchContext], Any]
"""Returns the value for a key, a `SourcePayload` of it, or an awaitable of either."""


class CallableSource(CallableAdapter):
    """Asks a plain or async function for one resource at a time.

    A plain function runs in a worker thread, unless ``run_sync_in_thread`` is False. All times
    are seconds; every setting can be read back under its name. See `AdapterSettings` for those
    that all adapters share.
    """

    fetcher: FetcherFunction

    def __init__(
        self,
        *,
        name: str,
        priority: int,
        supports: SupportsFunction,
        fetcher: FetcherFunction,
        timeout_seconds: float | None = None,
        queue_timeout_seconds: float | None = None,
        max_concurrency: int | None = None,
        resilience_policy: SourceResiliencePolicy | None = None,
        cache_supports: bool = True,
        run_sync_in_thread: bool = True,
        blocking_io: bool = False,
        transport_timeout_seconds: float | None = None,
    ) -> None:
        """Make a source of `fetcher`, asked for the keys that `supports` accepts.

        Raises:
            TypeError, ValueError: for a bad setting, naming it.
        """
        settings = AdapterSettings(
            name=name,
            priority=priority,
            timeout_seconds=timeout_seconds,
            queue_timeout_seconds=queue_timeout_seconds,
            max_concurrency=max_concurrency,
            resilience_policy=resilience_policy,
            cache_supports=cache_supports,
            run_sync_in_thread=run_sync_in_thread,
            blocking_io=blocking_io,
            transport_timeout_seconds=transport_timeout_seconds,
        )
        super().__init__(settings, supports, invocation_of("fetcher", fetcher, settings))
        self.fetcher = fetcher

    async def fetch(self, key: ResourceKey, context: FetchContext) -> SourcePayload[Any]:
        """Return what the fetcher returns for `key`, as a payload."""
        return as_payload(await self._invocation.call(key, context))


# A source that fetches many resources with one call of a function --------------------------------


BatchSupportsFunction: TypeAlias = Callable[[ResourceKey], bool]
"""Says whether a batch source can answer for a key; plain and quick."""

BatchFetcherFunction: TypeAlias = Callable[[Collection[ResourceKey], FetchContext], Any]
"""Returns a mapping of keys to values or payloads, or an awaitable of it; keys may be left out."""


class CallableBatchSource(CallableAdapter):
    """Asks a plain or async function for many resources at once.

    A plain function runs in a worker thread, unless ``run_sync_in_thread`` is False. All times
    are seconds; every setting can be read back under its name. ``max_batch_size`` bounds the keys
    of one call (None: no bound). See `AdapterSettings` for what all adapters share.
    """

    fetcher: BatchFetcherFunction
    max_batch_size: int | None

    def __init__(
        self,
        *,
        name: str,
        priority: int,
        supports: BatchSupportsFunction,
        fetcher: BatchFetcherFunction,
        timeout_seconds: float | None = None,
        queue_timeout_seconds: float | None = None,
        max_concurrency: int | None = None,
        max_batch_size: int | None = None,
        resilience_policy: SourceResiliencePolicy | None = None,
        cache_supports: bool = True,
        run_sync_in_thread: bool = True,
        blocking_io: bool = False,
        transport_timeout_seconds: float | None = None,
    ) -> None:
        """Make a source of `fetcher`, asked for the keys that `supports` accepts.

        Raises:
            TypeError, ValueError: for a bad setting, naming it.
        """
        settings = AdapterSettings(
            name=name,
            priority=priority,
            timeout_seconds=timeout_seconds,
            queue_timeout_seconds=queue_timeout_seconds,
            max_concurrency=max_concurrency,
            resilience_policy=resilience_policy,
            cache_supports=cache_supports,
            run_sync_in_thread=run_sync_in_thread,
            blocking_io=blocking_io,
            transport_timeout_seconds=transport_timeout_seconds,
        )
        super().__init__(settings, supports, invocation_of("fetcher", fetcher, settings))
        self.fetcher = fetcher
        self.max_batch_size = integer("max_batch_size", max_batch_size, minimum=1, optional=True)

    async def fetch_many(
        self, keys: Collection[ResourceKey], context: FetchContext
    ) -> Mapping[ResourceKey, SourcePayload[Any]]:
        """Return what the fetcher returns for `keys`, every value as a payload.

        A result that is not a mapping is passed on as it is; the builder refuses it.
        """
        result = await self._invocation.call(keys, context)
        if not isinstance(result, Mapping):
            return cast("Mapping[ResourceKey, SourcePayload[Any]]", result)
        return await _as_payloads(result)


_VALUES_BETWEEN_LOOKS = 64
_PAYLOADS_ONLY = frozenset({SourcePayload})


async def _as_payloads(values: Mapping[ResourceKey, Any]) -> dict[ResourceKey, SourcePayload[Any]]:
    if type(values) is dict and _PAYLOADS_ONLY.issuperset(map(type, values.values())):
        return values.copy()
    payloads: dict[ResourceKey, SourcePayload[Any]] = {}
    pace = Pace()
    # The function may keep its mapping and change it while others run in between.
    rest = iter(tuple(values.items()))
    while part := tuple(islice(rest, _VALUES_BETWEEN_LOOKS)):
        for key, value in part:
            payloads[key] = value if type(value) is SourcePayload else SourcePayload(value)
        if pace.due:
            await pace.rest()
    return payloads


# A source that computes a resource from others with a function -----------------------------------


DerivedSupportsFunction: TypeAlias = Callable[[ResourceKey], bool]
"""Says whether a derived source can answer for a key; plain and quick."""

DependenciesFunction: TypeAlias = Callable[[ResourceKey], Iterable[ResourceKey]]
"""Returns the keys that a derived resource is computed from; plain and quick."""

DeriverFunction: TypeAlias = Callable[[ResourceKey, Snapshot, FetchContext], Any]
"""Returns the value for a key from its dependencies, a payload of it, or an awaitable of either."""


_COLLECTIONS = frozenset({tuple, list, set, frozenset, dict})


class CallableDerivedSource(CallableAdapter):
    """Asks a plain or async function to compute a resource from its dependencies.

    A plain function runs in a worker thread, unless ``run_sync_in_thread`` is False. All times
    are seconds; every setting can be read back under its name, except that ``dependencies`` is
    a method. See `AdapterSettings` for what all adapters share.
    """

    deriver: DeriverFunction

    def __init__(
        self,
        *,
        name: str,
        priority: int,
        supports: DerivedSupportsFunction,
        dependencies: DependenciesFunction,
        deriver: DeriverFunction,
        timeout_seconds: float | None = None,
        queue_timeout_seconds: float | None = None,
        max_concurrency: int | None = None,
        resilience_policy: SourceResiliencePolicy | None = None,
        cache_supports: bool = True,
        run_sync_in_thread: bool = True,
        blocking_io: bool = False,
        transport_timeout_seconds: float | None = None,
    ) -> None:
        """Make a source of `deriver`, asked for the keys that `supports` accepts.

        Raises:
            TypeError, ValueError: for a bad setting, naming it.
        """
        settings = AdapterSettings(
            name=name,
            priority=priority,
            timeout_seconds=timeout_seconds,
            queue_timeout_seconds=queue_timeout_seconds,
            max_concurrency=max_concurrency,
            resilience_policy=resilience_policy,
            cache_supports=cache_supports,
            run_sync_in_thread=run_sync_in_thread,
            blocking_io=blocking_io,
            transport_timeout_seconds=transport_timeout_seconds,
        )
        super().__init__(settings, supports, invocation_of("deriver", deriver, settings))
        self._dependencies = plain("dependencies", dependencies, source=name)
        self.deriver = deriver

    def dependencies(self, key: ResourceKey) -> Collection[ResourceKey]:
        """Return the keys that `key` is computed from; the builder checks that they are keys."""
        declared = self._dependencies.answer_now(key)
        if type(declared) in _COLLECTIONS:
            return cast("Collection[ResourceKey]", declared)
        if isinstance(declared, Iterable) and not isinstance(declared, Collection):
            return tuple(declared)
        return cast("Collection[ResourceKey]", declared)

    async def derive(
        self, key: ResourceKey, dependencies: Snapshot, context: FetchContext
    ) -> SourcePayload[Any]:
        """Return what the deriver computes for `key` from `dependencies`, as a payload."""
        return as_payload(await self._invocation.call(key, dependencies, context))


__all__ = [
    "BatchFetcherFunction",
    "BatchSupportsFunction",
    "CallableBatchSource",
    "CallableDerivedSource",
    "CallableSource",
    "DependenciesFunction",
    "DerivedSupportsFunction",
    "DeriverFunction",
    "FetcherFunction",
    "SupportsFunction",
]
