"""A source that fetches many resources with one call of a function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import Any, TypeAlias, cast

from coalestra.adapters.settings import (
    AdapterSettings,
    CallableAdapter,
    invocation_of,
)
from coalestra.concurrency.pace import Pace
from coalestra.core.context import FetchContext
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import integer
from coalestra.core.values import SourcePayload
from coalestra.resilience.policies import SourceResiliencePolicy

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
