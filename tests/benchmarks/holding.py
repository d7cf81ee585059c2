"""The lines that ask how long others on the event loop have to wait.

The collector of garbage is off meanwhile: what it adds depends on everything that is alive, and is
told by the lines that time work with it and without. A hold is the processor's time of the thread,
so that other programs on a busy machine do not count.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Collection, Coroutine
from time import thread_time, time
from typing import Any

from coalestra import (
    CallableBatchSource,
    CallableDerivedSource,
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    ResourceAcceptanceRule,
    ResourceKey,
    ResourceUpdate,
    RetryPolicy,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
    SourceResiliencePolicy,
)
from tests.benchmarks import plain
from tests.benchmarks.reading import warm
from tests.benchmarks.stock import POLICY, batch_source, builder_of, keys_of, price
from tests.benchmarks.subjects import FLOOR, OURS, Subjects
from tests.benchmarks.workshop import Work, Workshop


class Heartbeat:
    """Asks for a turn of the event loop over and over, and remembers the longest wait for one."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._last = 0.0
        self._beating = False

    async def watch(self, work: Work) -> float:
        """Do the work; return the longest that it kept anybody else waiting, in seconds."""
        self.longest = 0.0
        self._beating = True
        self._last = thread_time()
        self._beat()
        await asyncio.sleep(0)
        await work()
        self._note()
        self._beating = False
        return self.longest

    def _beat(self) -> None:
        if self._beating:
            self._note()
            asyncio.get_running_loop().call_soon(self._beat)

    def _note(self) -> None:
        now = thread_time()
        self.longest = max(self.longest, now - self._last)
        self._last = now


def longest_hold(shop: Workshop) -> Subjects:
    """Read many cached keys while a heartbeat asks for every turn of the loop."""
    keys = keys_of(shop.scale.size(10_000))
    ours = warm(shop, keys, price)
    entries = plain.filled(((key, price(key)) for key in keys), dict.copy)

    async def plainly() -> None:
        plain.read_flat(entries, keys)

    return {OURS: lambda: _held(shop, ours), FLOOR: lambda: _held(shop, plainly)}


def _held(shop: Workshop, work: Work) -> float:
    gc.collect()
    gc.disable()
    try:
        return shop.run(Heartbeat().watch(work))
    finally:
        gc.enable()


Prepare = Callable[[list[ResourceKey]], Coroutine[Any, Any, Work]]


def _holds(prepare: Prepare) -> Callable[[Workshop], Subjects]:
    """Return what makes the subject of a line whose work needs a new start for every sample."""

    def subjects(shop: Workshop) -> Subjects:
        keys = keys_of(shop.scale.size(10_000))
        return {OURS: lambda: _held(shop, shop.run(prepare(keys)))}

    return subjects


async def _cold(keys: list[ResourceKey]) -> Work:
    builder = builder_of(_ready(keys))
    return lambda: builder.build(keys)


def _ready(keys: list[ResourceKey]) -> CallableBatchSource:
    """Return a source that takes no time of the loop itself."""
    answers = {key: price(key) for key in keys}

    async def fetch(asked: Collection[ResourceKey], context: FetchContext) -> Any:
        return answers

    return _batch(fetch)


async def _strike(keys: list[ResourceKey]) -> Work:
    async def hang(asked: Collection[ResourceKey], context: FetchContext) -> Any:
        await asyncio.sleep(60)

    builder = builder_of(_batch(hang))
    return lambda: builder.build(keys, strict=False, deadline_seconds=0.1)


async def _failing(keys: list[ResourceKey], scope: CircuitScope = CircuitScope.SOURCE) -> Work:
    async def fail(asked: Collection[ResourceKey], context: FetchContext) -> Any:
        raise ConnectionError("down")

    once = SourceResiliencePolicy(
        retry=RetryPolicy(max_attempts=1), circuit=CircuitBreakerPolicy(scope=scope)
    )
    builder = SnapshotBuilder([_batch(fail)], default_policy=POLICY, default_resilience=once)
    return lambda: builder.build(keys, strict=False)


async def _failing_by_resource(keys: list[ResourceKey]) -> Work:
    return await _failing(keys, CircuitScope.RESOURCE)


async def _one_over_many(keys: list[ResourceKey]) -> Work:
    total = ResourceKey("market", "total")
    builder = builder_of(_ready(keys), _derived("total", lambda _: keys))
    return lambda: builder.build([total])


async def _many_derived(keys: list[ResourceKey]) -> Work:
    def needs(key: ResourceKey) -> list[ResourceKey]:
        return [ResourceKey("market", "price", key.subject)]

    builder = builder_of(_ready(keys), _derived("double", needs))
    doubles = [ResourceKey("market", "double", key.subject) for key in keys]
    return lambda: builder.build(doubles)


async def _revalidated(keys: list[ResourceKey]) -> Work:
    session = builder_of(batch_source(price)).session()
    await session.resolve(keys)
    return lambda: session.revalidate(keys)


async def _invalidated(keys: list[ResourceKey]) -> Work:
    builder = builder_of(batch_source(price))
    await builder.build(keys)
    return lambda: builder.publisher.invalidate_many(keys)


async def _published(keys: list[ResourceKey]) -> Work:
    builder = builder_of(batch_source(price))
    updates = [ResourceUpdate(key, price(key), "feed") for key in keys]
    return lambda: builder.publisher.publish_many(updates)


async def _replaced(keys: list[ResourceKey]) -> Work:
    policy = FreshnessPolicy(ttl_seconds=1.0, max_stale_seconds=1_000.0)
    builder = SnapshotBuilder([_ready(keys)], default_policy=policy)
    then = time() - 100.0
    updates = [ResourceUpdate(key, price(key), "feed", observed_at=then) for key in keys]
    await builder.publisher.publish_many(updates)
    return lambda: builder.build(keys)


async def _requested(keys: list[ResourceKey]) -> Work:
    builder = builder_of(batch_source(price))
    await builder.build(keys)
    rule = ResourceAcceptanceRule(max_age_seconds=1_000.0)
    request = SnapshotRequest(
        required=keys,
        consistency_policy=SnapshotConsistencyPolicy(1_000.0),
        acceptance_policy=SnapshotAcceptancePolicy(default_rule=rule),
    )
    return lambda: builder.build_request(request)


async def _many_callers(keys: list[ResourceKey]) -> Work:
    builder = builder_of(batch_source(price))
    callers = asyncio.gather(*(builder.build(keys[:1]) for _ in keys))  # which takes a while itself
    await asyncio.sleep(0)
    return lambda: callers


def _batch(fetcher: Any) -> CallableBatchSource:
    return CallableBatchSource(
        name="batch", priority=1, supports=lambda key: key.name == "price", fetcher=fetcher
    )


def _derived(
    name: str, needs: Callable[[ResourceKey], Collection[ResourceKey]]
) -> CallableDerivedSource:
    return CallableDerivedSource(
        name=name, priority=1, supports=lambda key: key.name == name, dependencies=needs,
        deriver=lambda key, known, context: len(known), run_sync_in_thread=False,
    )  # fmt: skip


HOLDS = {
    "cold": ("cold", _holds(_cold)),
    "deadline": ("a deadline that strikes", _holds(_strike)),
    "failing": ("all of them failing", _holds(_failing)),
    "circuits": ("all of them failing, a circuit for each", _holds(_failing_by_resource)),
    "inputs": ("one derivation over all of them", _holds(_one_over_many)),
    "derived": ("as many derivations", _holds(_many_derived)),
    "revalidate": ("a session that revalidates", _holds(_revalidated)),
    "invalidate": ("invalidated", _holds(_invalidated)),
    "publish": ("published", _holds(_published)),
    "replace": ("fetched in place of stale ones", _holds(_replaced)),
    "request": ("a request with policies", _holds(_requested)),
    "callers": ("as many callers of one key", _holds(_many_callers)),
}
"""What may hold the loop, by the name of its line: what is done, and by whom."""
