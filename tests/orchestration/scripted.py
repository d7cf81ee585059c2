"""Sources that do as a test tells them, and count what they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from coalestra import (
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    ResourceKey,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SourceResiliencePolicy,
)
from tests.support import Gate, LoopClock
from tests.support.leaks import look_after

LASTING = FreshnessPolicy(1_000.0, 2_000.0)
ONCE = SourceResiliencePolicy(retry=RetryPolicy(max_attempts=1))


def breaking(
    threshold: int = 1, recovery: float = 30.0, scope: CircuitScope = CircuitScope.SOURCE
) -> SourceResiliencePolicy:
    """One attempt for each call, and a circuit that opens after so many failures."""
    return SourceResiliencePolicy(ONCE.retry, CircuitBreakerPolicy(scope, threshold, recovery))


def key(name: str, subject: str = "") -> ResourceKey:
    """A key of the namespace that all scripted sources serve."""
    return ResourceKey("test", name, subject)


class Scripted:
    """What every scripted source shares: a name, and the keys it serves by their name."""

    blocking_io = False
    queue_timeout_seconds: float | None = None
    max_concurrency: int | None = None
    resilience_policy: SourceResiliencePolicy | None = ONCE

    def __init__(
        self, name: str, *names: str, priority: int = 10, timeout: float | None = None
    ) -> None:
        self.name = name
        self.names = names or (name,)
        self.priority = priority
        self.timeout_seconds = timeout
        self.calls: list[Any] = []

    def supports(self, key: ResourceKey) -> bool:
        return key.name in self.names


Fetch = Callable[[ResourceKey, FetchContext], Awaitable[Any]]


async def echo(key: ResourceKey, context: FetchContext) -> Any:
    """Answer at once with the subject of the key."""
    return key.subject


async def down(key: ResourceKey, context: FetchContext) -> Any:
    """Fail at once."""
    raise ConnectionError("down")


class Single(Scripted):
    """Serves one key at a time, as `fetch` says."""

    def __init__(self, name: str, *names: str, fetch: Fetch = echo, **more: Any) -> None:
        super().__init__(name, *names, **more)
        self.answer = fetch

    async def fetch(self, key: ResourceKey, context: FetchContext) -> Any:
        self.calls.append(key)
        return await self.answer(key, context)


class Batch(Scripted):
    """Serves many keys at a time, after passing through `before`."""

    max_batch_size: int | None = None

    def __init__(
        self,
        name: str,
        *names: str,
        before: Callable[[], Awaitable[None]] | None = None,
        answer: Callable[[ResourceKey], Any] = lambda key: key.subject,
        **more: Any,
    ) -> None:
        super().__init__(name, *names, **more)
        self.before = before
        self.answer = answer

    async def fetch_many(
        self, keys: Collection[ResourceKey], context: FetchContext
    ) -> Mapping[ResourceKey, Any]:
        self.calls.append(tuple(keys))
        if self.before is not None:
            await self.before()
        return {key: self.answer(key) for key in keys}


class Derived(Scripted):
    """Derives the tuple of its dependencies' values."""

    def __init__(
        self,
        name: str,
        *names: str,
        needs: Callable[[ResourceKey], Iterable[ResourceKey]],
        before: Callable[[], Awaitable[None]] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(name, *names, **more)
        self.needs = needs
        self.before = before

    def dependencies(self, key: ResourceKey) -> Collection[ResourceKey]:
        return tuple(self.needs(key))

    async def derive(self, key: ResourceKey, dependencies: Snapshot, context: FetchContext) -> Any:
        self.calls.append(key)
        if self.before is not None:
            await self.before()
        return tuple(value.value for value in dependencies.values())


def latency(seconds: float) -> Fetch:
    """Answer after `seconds` of virtual time."""

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        await asyncio.sleep(seconds)
        return key.subject

    return fetch


def held_at(gate: Gate, answer: Any = 1) -> Fetch:
    """Answer so, once the gate lets the call through."""

    async def fetch(key: ResourceKey, context: FetchContext) -> Any:
        await gate.pass_()
        return answer

    return fetch


def builder(*sources: Any, **settings: Any) -> SnapshotBuilder:
    """A builder on the loop's own time, whose values last; at rest at the end of an async test."""
    settings.setdefault("default_policy", LASTING)
    settings.setdefault("clock", LoopClock())
    building = SnapshotBuilder(sources, **settings)
    look_after(building)
    return building


def mixed() -> SnapshotBuilder:
    """A builder with a source of each kind, each of which waits in the midst of its call."""

    async def wait() -> None:
        await asyncio.sleep(1)

    return builder(
        Single("single", fetch=latency(1)),
        Batch("batch", before=wait),
        Derived("derived", needs=lambda k: [key("single"), key("batch")], before=wait),
        max_concurrency=1,
    )


S = TypeVar("S", bound=Scripted)


def tuned(source: S, **settings: Any) -> S:
    """The source with other settings: any attribute that it has, by name."""
    for name, value in settings.items():
        if not hasattr(source, name):
            raise AttributeError(f"{type(source).__name__} has no setting {name!r}")
        setattr(source, name, value)
    return source
