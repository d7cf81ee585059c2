"""A source that computes a resource from others with a function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias, cast

from coalestra.adapters.settings import (
    AdapterSettings,
    CallableAdapter,
    as_payload,
    invocation_of,
    plain,
)
from coalestra.core.context import FetchContext
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import Snapshot
from coalestra.core.values import SourcePayload
from coalestra.resilience.policies import SourceResiliencePolicy

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
