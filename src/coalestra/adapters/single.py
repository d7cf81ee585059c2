"""A source that fetches one resource at a time with a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from coalestra.adapters.settings import (
    AdapterSettings,
    CallableAdapter,
    as_payload,
    invocation_of,
)
from coalestra.core.context import FetchContext
from coalestra.core.keys import ResourceKey
from coalestra.core.values import SourcePayload
from coalestra.resilience.policies import SourceResiliencePolicy

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
