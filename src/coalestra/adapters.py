"""Sources made from functions: plain or async, called here or in a worker thread.

Whatever they raise is the builder's to judge, as of any source.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, TypeAlias, cast

from coalestra.concurrency.pace import Pace
from coalestra.concurrency.threads import threads_of_context
from coalestra.core import validation
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext, Snapshot
from coalestra.core.validation import flag, instance, integer, number, ruled, text
from coalestra.core.values import SourcePayload
from coalestra.resilience import SourceResiliencePolicy

SupportsFunction: TypeAlias = Callable[[ResourceKey], bool]
"""Says whether a source can answer for a key; plain and quick."""


@dataclass(kw_only=True, eq=False, repr=False)
class AdapterSettings:
    """What all adapters are told; apart from the methods, some of which have a setting's name."""

    name: str = field(metadata=validation.rule(text))
    priority: int = field(metadata=validation.rule(integer))
    supports: SupportsFunction
    timeout_seconds: float | None = ruled(None, number, above=0, optional=True)
    queue_timeout_seconds: float | None = ruled(None, number, above=0, optional=True)
    max_concurrency: int | None = ruled(None, integer, minimum=1, optional=True)
    resilience_policy: SourceResiliencePolicy | None = ruled(
        None, instance, SourceResiliencePolicy, optional=True
    )
    cache_supports: bool = ruled(True, flag)
    run_sync_in_thread: bool = ruled(True, flag)
    blocking_io: bool = ruled(False, flag)
    transport_timeout_seconds: float | None = ruled(None, number, above=0, optional=True)

    def __post_init__(self) -> None:
        validation.check_fields(self)
        seconds = self.transport_timeout_seconds
        if seconds is not None and not self.blocking_io:
            name, wanted = "transport_timeout_seconds", "None unless blocking_io is True"
            remedy = "set blocking_io=True if the callable blocks"
            raise ValueError(validation.refusal(name, wanted, seconds, remedy))


class CallableAdapter(AdapterSettings):
    """A source made from functions; every setting is an attribute under its parameter's name.

    A plain function runs in a worker thread, unless ``run_sync_in_thread`` is False; a coroutine
    function never does.

    Attributes:
        name: the source's name, unique in a builder.
        priority: sources with a higher one are asked first.
        timeout_seconds: the longest a call may take; None: no limit of its own.
        queue_timeout_seconds: the longest a call may wait for capacity; None: as long as a call
            may take.
        max_concurrency: how many calls may run at once; None: no limit of its own.
        resilience_policy: retries and circuit of this source; None: the builder's.
        cache_supports: whether answers of ``supports`` may be remembered.
        run_sync_in_thread: whether a plain function leaves the event loop.
        blocking_io: whether the function waits for a network, a disk or the like.
        transport_timeout_seconds: the longest its transport lets it wait.
        blocking_io_offloaded (bool): whether calls leave the event loop: True for a plain function
            that runs in a worker thread.
    """

    _called: ClassVar[str] = "fetcher"
    """The setting that is the function that gives values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        function = validation.callable_(self._called, getattr(self, self._called))
        self._function: Callable[..., Any] = function
        self._in_thread = self.run_sync_in_thread and not validation.is_coroutine_function(function)
        self.blocking_io_offloaded: bool = self._in_thread
        self._supports = self._given("supports")

    def _given(self, method: str) -> Callable[[ResourceKey], Any]:
        """Take away the plain function that is given under the name of a method."""
        function: Callable[[ResourceKey], Any] = vars(self).pop(method)
        return validation.plain_function(method, function)

    async def _call(self, *arguments: Any) -> Any:
        """Return what the function returns, awaited if it is awaitable."""
        if self._in_thread:
            run = threads_of_context().run
            result = await run(self._function, *arguments, label=self.name)
        else:
            result = self._function(*arguments)
        if type(result) is not SourcePayload and validation.is_awaitable(result):
            return await result
        return result

    def supports(self, key: ResourceKey) -> bool:
        """Return whether this source can answer for `key`: what the function says, as a bool."""
        answer: bool = self._supports(key)
        if answer is True or answer is False:
            return answer
        return bool(validation.at_once(f"supports of source {self.name!r}", answer))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, priority={self.priority!r})"


def as_payload(value: Any) -> SourcePayload[Any]:
    """Return `value` as a payload: itself if it is one already."""
    return value if type(value) is SourcePayload else SourcePayload(value)


BatchSupportsFunction: TypeAlias = SupportsFunction
"""The same for a batch source."""

DerivedSupportsFunction: TypeAlias = SupportsFunction
"""The same for a derived source."""

FetcherFunction: TypeAlias = Callable[[ResourceKey, FetchContext], Any]
"""Returns the value for a key, a `SourcePayload` of it, or an awaitable of either."""


@dataclass(kw_only=True, eq=False, repr=False)
class CallableSource(CallableAdapter):
    """Asks a plain or async function for one resource at a time. See `CallableAdapter`."""

    fetcher: FetcherFunction

    async def fetch(self, key: ResourceKey, context: FetchContext) -> SourcePayload[Any]:
        """Return what the fetcher returns for `key`, as a payload."""
        return as_payload(await self._call(key, context))


BatchFetcherFunction: TypeAlias = Callable[[Collection[ResourceKey], FetchContext], Any]
"""Returns a mapping of keys to values or payloads, or an awaitable of it; keys may be left out."""


@dataclass(kw_only=True, eq=False, repr=False)
class CallableBatchSource(CallableAdapter):
    """Asks a plain or async function for many resources at once. See `CallableAdapter`.

    ``max_batch_size`` bounds the keys of one call; None: no bound.
    """

    fetcher: BatchFetcherFunction
    max_batch_size: int | None = ruled(None, integer, minimum=1, optional=True)

    async def fetch_many(
        self, keys: Collection[ResourceKey], context: FetchContext
    ) -> Mapping[ResourceKey, SourcePayload[Any]]:
        """Return what the fetcher returns for `keys`, every value as a payload."""
        result = await self._call(keys, context)
        if type(result) is dict and _PAYLOADS_ONLY.issuperset(map(type, result.values())):
            return result.copy()
        if not isinstance(result, Mapping):  # which the builder refuses
            return cast("Mapping[ResourceKey, SourcePayload[Any]]", result)
        return await _as_payloads(result, len(keys) + 1)


_VALUES_BETWEEN_LOOKS = 64
_PAYLOADS_ONLY = frozenset({SourcePayload})


async def _as_payloads(
    values: Mapping[ResourceKey, Any], most: int
) -> dict[ResourceKey, SourcePayload[Any]]:
    """Return values as payloads, so many at `most`: among one more than asked for, one is odd."""
    payloads: dict[ResourceKey, SourcePayload[Any]] = {}
    pace = Pace()
    # The function may keep its mapping and change it while others run in between.
    rest = iter(tuple(islice(values.items(), most)))
    while part := tuple(islice(rest, _VALUES_BETWEEN_LOOKS)):
        for key, value in part:
            payloads[key] = as_payload(value)
        if pace.due:
            await pace.rest()
    return payloads


DependenciesFunction: TypeAlias = Callable[[ResourceKey], Iterable[ResourceKey]]
"""Returns the keys that a derived resource is computed from; plain and quick."""

DeriverFunction: TypeAlias = Callable[[ResourceKey, Snapshot, FetchContext], Any]
"""Returns the value for a key from its dependencies, a payload of it, or an awaitable of either."""


@dataclass(kw_only=True, eq=False, repr=False)
class DerivedSettings(AdapterSettings):
    """What a derived source is told besides."""

    dependencies: DependenciesFunction
    deriver: DeriverFunction
    inherit_freshness: bool = ruled(False, flag)


class CallableDerivedSource(CallableAdapter, DerivedSettings):
    """Has a plain or async function compute a resource from others. See `CallableAdapter`.

    With ``inherit_freshness`` a value is as old as the oldest of its dependencies, and stale if one
    of them is; how long it is kept, its own policy says, from when it was derived.
    """

    _called = "deriver"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._dependencies = self._given("dependencies")

    def dependencies(self, key: ResourceKey) -> Collection[ResourceKey]:
        """Return the keys that `key` is computed from; the builder checks that they are keys."""
        name = f"dependencies of source {self.name!r}"
        declared = validation.at_once(name, self._dependencies(key))
        if isinstance(declared, (tuple, list, Collection)) or not isinstance(declared, Iterable):
            return declared
        return tuple(declared)

    async def derive(
        self, key: ResourceKey, dependencies: Snapshot, context: FetchContext
    ) -> SourcePayload[Any]:
        """Return what the deriver computes for `key` from `dependencies`, as a payload."""
        return as_payload(await self._call(key, dependencies, context))


# What Python says of a wrong argument names the class that was called.
DerivedSettings.__init__.__qualname__ = f"{CallableDerivedSource.__qualname__}.__init__"

__all__ = [
    "BatchFetcherFunction", "BatchSupportsFunction", "CallableBatchSource", "CallableDerivedSource",
    "CallableSource", "DependenciesFunction", "DerivedSupportsFunction", "DeriverFunction",
    "FetcherFunction", "SupportsFunction",
]  # fmt: skip
