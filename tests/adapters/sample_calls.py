"""Keys, contexts and callables that the tests of the adapters share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coalestra.adapters import CallableBatchSource, CallableDerivedSource, CallableSource
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext, Snapshot

PRICE = ResourceKey("market", "price", "BTC")
VOLUME = ResourceKey("market", "volume", "BTC")
CONTEXT = FetchContext(requested_at=1_700_000_000.0)
NO_DEPENDENCIES = Snapshot("s", 1_700_000_000.0, {})

KINDS = ("single", "batch", "derived")


def everything(_: ResourceKey) -> bool:
    return True


def nothing(_: ResourceKey) -> tuple[ResourceKey, ...]:
    return ()


def adapter(
    kind: str, function: Callable[..., Any], **settings: Any
) -> CallableSource | CallableBatchSource | CallableDerivedSource:
    """A source of one kind around ``function``; settings replace the usual ones."""
    common: dict[str, Any] = {"name": "rest", "priority": 10, "supports": everything, **settings}
    if kind == "single":
        return CallableSource(**{"fetcher": function, **common})
    if kind == "batch":
        return CallableBatchSource(**{"fetcher": function, **common})
    return CallableDerivedSource(**{"deriver": function, "dependencies": nothing, **common})


async def call(source: CallableSource | CallableBatchSource | CallableDerivedSource) -> Any:
    """What the source answers for PRICE."""
    if isinstance(source, CallableBatchSource):
        return await source.fetch_many((PRICE,), CONTEXT)
    if isinstance(source, CallableDerivedSource):
        return await source.derive(PRICE, NO_DEPENDENCIES, CONTEXT)
    return await source.fetch(PRICE, CONTEXT)


def answering(kind: str, value: Any) -> Any:
    """``value`` in the form that a function of this kind returns."""
    return {PRICE: value} if kind == "batch" else value


def payload_in(kind: str, answer: Any) -> Any:
    """The payload for PRICE in what a source of this kind answered."""
    return answer[PRICE] if kind == "batch" else answer
