"""A small world of random keys, sources and caches, whose true values are known at any time."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from coalestra import (
    AsyncMemoryCache,
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    NearCache,
    PolicyResolver,
    RefreshMode,
    ResourceAbsent,
    ResourceKey,
    ResourceUpdate,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SnapshotDiagnostics,
    SourceAuthorityPolicy,
    SourcePayload,
    SourceResiliencePolicy,
)
from tests.contracts.caches import FOREIGN, LeasingCache
from tests.orchestration.scripted import Batch, Derived, Single, key
from tests.support import Panic, VirtualLoop

TICK = 1e-6
"""How far the clock moves with every reading, so that no two readings tie."""


PAIR = [key("pair", "one"), key("pair", "two")]
"""Two keys without a source: what is known of them comes from events, of both at once."""


TROUBLE: tuple[Callable[[], BaseException], ...] = (
    lambda: ConnectionError("down"), lambda: LookupError("a fault in a source"),
    asyncio.CancelledError, GeneratorExit, StopAsyncIteration, lambda: Panic("panic"),
)  # fmt: skip
"""What whatever is plugged in may raise."""


class TickingClock:
    """The loop's time; the wall clock never shows the same instant twice."""

    def __init__(self) -> None:
        self._ticks = 0
        self._start = 1_700_000_000.0

    def now(self) -> float:
        self._ticks += 1
        return self._start + asyncio.get_running_loop().time() + self._ticks * TICK

    def jump(self, seconds: float) -> None:
        """Correct the wall clock."""
        self._start += seconds

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


class Pausing:
    """A cache that takes a random moment for each call, and with some a long one.

    Where it is `faulty`, its methods raise anything at all at times.
    """

    def __init__(self, chance: random.Random, faulty: bool) -> None:
        self._chance = chance
        self._faulty = faulty
        self._pauses = chance.choice(((0, 0, 0.01), (0, 0.02, 0.3)))

    async def _pause(self) -> None:
        await asyncio.sleep(self._chance.choice(self._pauses))
        if self._faulty and self._chance.random() < 0.05:
            raise self._chance.choice(TROUBLE)()


class AwaitedCache(Pausing):
    """A cache of one's own, of any abilities; one that judges is right at every read."""

    def __init__(self, chance: random.Random, faulty: bool) -> None:
        super().__init__(chance, faulty)
        few = partial(AsyncMemoryCache, max_entries=6)
        kinds: list[Callable[[], Any]] = [*FOREIGN, AsyncMemoryCache, few]
        self._cache = chance.choice(kinds)()
        judges = isinstance(self._cache, AsyncMemoryCache)
        self.validates_write_order = judges and chance.random() < 0.5

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._cache, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            await self._pause()
            answer = await method(*arguments, **named)
            await self._pause()
            return answer

        return call if asyncio.iscoroutinefunction(method) else method


class GivingLeases(Pausing, LeasingCache):
    """A cache that says who is to acquire a key; news of it ends that."""

    def __init__(self, chance: random.Random, faulty: bool) -> None:
        Pausing.__init__(self, chance, faulty)
        LeasingCache.__init__(self)

    async def _travel(self, call: str) -> None:
        self.calls.append(call)
        await self._pause()

    def _offer(self, value: Any, force: bool, replace_equal: bool) -> Any:
        if not value.attempts:  # an event
            self.leased.pop(value.key, None)
        return super()._offer(value, force, replace_equal)

    async def invalidate_many(self, keys: Collection[ResourceKey]) -> None:
        await super().invalidate_many(keys)
        for k in keys:
            self.leased.pop(k, None)

    async def invalidate(self, key: ResourceKey) -> None:
        await self.invalidate_many([key])


class Calls:
    """The source calls under way; knows which are too many, or should not overlap.

    Two of one key should not, unless the key has changed since one of the two units of work has
    first asked for it, or has taken over from one that had: it asks the last source first. All of
    this goes for the calls `of_one` builder only.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.of_one = True
        self.count = 0
        self._asked: dict[ResourceKey, dict[str, bool]] = {}
        self._changing: Counter[ResourceKey] = Counter()
        self._under_way: dict[tuple[str, ResourceKey], list[list[Any]]] = {}
        self._running: Counter[str] = Counter()
        self.limits: dict[str, int] = {}

    def begin(self, source: str, key: ResourceKey, work: str) -> list[Any]:
        """Note that a key is asked for on behalf of a unit of work."""
        asked = self._asked.setdefault(key, {})
        outdated = source == "backup" and work not in asked and any(asked.values())
        outdated = asked[work] = outdated or asked.get(work, False) or self._changing[key] > 0
        others = self._under_way.setdefault((source, key), [])
        for other in others:
            other[1] |= not (asked[other[0]] or outdated)
        others.append([work, False])
        return others[-1]

    def end(self, source: str, key: ResourceKey, call: list[Any], *, cancelled: bool) -> None:
        """Note the end; one that was just being cancelled when the next began did not overlap."""
        under_way = self._under_way[source, key]
        del under_way[[each is call for each in under_way].index(True)]
        if call[1] and self.of_one and not cancelled:
            self.faults.append(f"{source} was asked for {key} twice at once")

    @contextlib.contextmanager
    def changing(self, *keys: ResourceKey) -> Iterator[None]:
        """Let keys change, or be asked for anew, within the block."""
        self._changing.update(keys)
        try:
            yield
        finally:
            self._changing.subtract(keys)
            for k in keys:
                self._asked.setdefault(k, {}).update(dict.fromkeys(self._asked.get(k, ()), True))

    @contextlib.contextmanager
    def running(self, source: str) -> Iterator[None]:
        """Let a source run within the block, as far as there are slots for it."""
        for name in (source, "all"):
            self._running[name] += 1
            if self.of_one and self._running[name] > self.limits.get(name, math.inf):
                self.faults.append(f"{self._running[name]} calls of {name} at once")
        try:
            yield
        finally:
            self._running.subtract((source, "all"))


class Events:
    """Counts the events that it is told of."""

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def emit(self, event_type: str, **payload: Any) -> None:
        self.count[event_type] += 1


class Spans:
    """A tracer that knows which spans have not ended."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self._count = 0

    def begin(self, kind: str, attributes: Any, *, parent: Any = None, link: Any = None) -> int:
        self._count += 1
        self.open.add(self._count)
        return self._count

    def enter(self, span: int) -> None:
        assert span in self.open

    def end(self, span: int, attributes: Any, error: BaseException | None = None) -> None:
        self.open.remove(span)

    def joined(self, parent: Any, call: Any, seconds: float, attributes: Any) -> None:
        assert seconds >= 0


class World:
    """Random keys over random sources; each base key's truth is a number that only grows."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        chance = self.chance
        self.calm = chance.random() < 0.4
        self.wild = not self.calm and chance.random() < 0.4
        self.jumps = chance.random() < 0.2
        self.vanishes = chance.random() < 0.5
        self.prompt = chance.choice((0.0, 0.5, 0.95))
        self.nests = chance.random() < 0.3
        self.stubborn = chance.choice((0.0, 0.0, 0.7))
        self.odd = not self.calm and chance.random() < 0.3
        self.narrow = not self.calm and chance.random() < 0.3
        self.hold = 0.2 if self.wild and chance.random() < 0.3 else 0.0
        self.held_seconds = 0.0
        self.mutable = not self.hold and chance.random() < 0.3
        self.closes = chance.random() < 0.1
        self.closed = False
        self.seen: dict[str, int] = {}
        self.kept: list[tuple[float, Any]] = []
        self.events = Events() if chance.random() < 0.2 else None
        self.metrics = InMemoryMetrics()
        self.told: dict[str, SnapshotDiagnostics] = {}
        self.clock = TickingClock()
        self.calls = Calls()
        self.bases = [
            *(key("single", str(i)) for i in range(8)),
            *(key("batch", str(i)) for i in range(4)),
        ]
        self.batched = self.bases[-4:]
        self.truth = dict.fromkeys(self.bases, 0)
        self.floor = dict.fromkeys(self.bases, 0)
        self.both = 0
        self.turn = asyncio.Lock()
        self.turns = {k: asyncio.Lock() for k in self.bases}
        self.needs: dict[ResourceKey, list[ResourceKey]] = {}
        asked = self.bases if chance.random() < 0.7 else chance.sample(self.bases, 3)
        for i in range(9):
            known = [*asked, *self.needs]
            self.needs[key("derived", str(i))] = chance.sample(known, chance.randint(1, 3))
        self.keys = [*asked, *self.needs]
        self.lively = chance.sample(asked, len(asked) // 2 + 1)
        self.traced = seed % 3 == 0
        self.spans = Spans()
        self.builders = self._builders()
        aside = Single("aside", "single", "batch", fetch=self.fetch_aside)
        self.aside = SnapshotBuilder([aside], clock=self.clock, max_concurrency=1)

    @property
    def builder(self) -> SnapshotBuilder:
        """The builder, or any of two over one cache."""
        return self.chance.choice(self.builders)

    def _builders(self) -> list[SnapshotBuilder]:
        chance = self.chance
        policy = chance.choice((
            FreshnessPolicy(1_000, 2_000), FreshnessPolicy(2, 2_000),
            FreshnessPolicy(1, 2_000, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE),
            FreshnessPolicy(3, 2_000, refresh_mode=RefreshMode.REFRESH_AHEAD,
                refresh_ahead_seconds=2),
        ))  # fmt: skip
        self.refreshes = policy.refresh_mode is not RefreshMode.BLOCKING
        self.brief = policy.ttl_seconds < 10
        overrides = {}
        if chance.random() < 0.3:
            lasting = FreshnessPolicy(1_000, 2_000)
            overrides = dict.fromkeys(chance.sample(self.keys, 8), lasting)
        retry = RetryPolicy(max_attempts=chance.randint(1, 2), base_delay_seconds=0.1)
        cache: Any = AsyncMemoryCache(max_entries=chance.choice((None, 6)))
        kind = chance.random()
        self.leases = kind < 0.1
        if kind < 0.4:
            cache = (GivingLeases if self.leases else AwaitedCache)(chance, self.wild)
            if chance.random() < 0.3:
                cache = NearCache(cache, near_entries=chance.choice((3, 100)), near_seconds=1_000)
        self.ranked = isinstance(cache, AsyncMemoryCache) and chance.random() < 0.3
        circuit = chance.choice((
            CircuitBreakerPolicy(), CircuitBreakerPolicy(enabled=False),
            CircuitBreakerPolicy(chance.choice([*CircuitScope]), 1, 0.5),
        ))  # fmt: skip
        most = chance.choice((1, 2, 8))
        if not self.nests:
            self.calls.limits["all"] = most
        settings: dict[str, Any] = {
            "cache": cache, "clock": self.clock,
            "policy_resolver": PolicyResolver(policy, overrides), "events": self.events,
            "metrics": self.metrics if self.events else None,
            "default_resilience": SourceResiliencePolicy(retry=retry, circuit=circuit,
                finish_late=chance.random() < 0.5),
            "max_concurrency": most, "max_pending_tasks": chance.choice((1, 2, 100)),
            "run_payload_copies_in_thread": True if self.mutable else None, "trace": self.traced,
            "tracer": self.spans if self.traced else None,
            "authority_policy": SourceAuthorityPolicy({"news": 1}) if self.ranked else None,
        }  # fmt: skip
        self.calls.of_one = self.closes or chance.random() < 0.85
        return [
            SnapshotBuilder(self._sources(), **settings)
            for _ in range(1 if self.calls.of_one else 2)
        ]

    def _sources(self) -> list[Any]:
        world = self

        class Pair(Batch):
            async def fetch_many(
                self, keys: Collection[ResourceKey], context: FetchContext
            ) -> Mapping[ResourceKey, Any]:
                found = await world.read("batch", keys, context)
                return {k: v for k, v in found.items() if not world.fails()}

        async def single(k: ResourceKey, context: FetchContext) -> Any:
            answer = (await world.read("single", [k], context))[k]
            if isinstance(answer, ResourceAbsent):
                raise answer
            return answer

        async def backup(k: ResourceKey, context: FetchContext) -> Any:
            if k in world.needs:
                world.calls.count += 1
                with world.calls.running("backup"):
                    await world.work()
                return {}
            return (await world.read("backup", [k], context))[k]

        class Nested(Derived):
            inherit_freshness = world.chance.random() < 0.2

            async def derive(self, k: ResourceKey, inputs: Snapshot, context: FetchContext) -> Any:
                world.calls.count += 1
                await world.nest(world.bases)
                with world.calls.running("derived"):
                    await world.work()
                derived = {str(each): value.value for each, value in inputs.items()}
                world.keep(derived)
                return derived

        pair = Pair("batch")
        pair.max_batch_size = self.chance.choice((None, 1, 2))
        timeout = None if self.calm else 1.5
        served = ("single", "batch", "derived") if self.odd else ("single", "batch")
        sources: list[Any] = [
            pair,
            Single("single", fetch=single, timeout=timeout),
            Single("backup", *served, fetch=backup, priority=1),
            Nested("derived", needs=self.needed_by),
        ]
        for source in sources:
            source.resilience_policy = None
            if self.odd:
                source.supports = self.oddly(source.supports)
                source.cache_supports = False
            if self.narrow:
                source.timeout_seconds = self.chance.choice((None, 0.15, 1.5))
                source.queue_timeout_seconds = self.chance.choice((None, 0.05, 0.3))
                source.max_concurrency = self.chance.choice((None, 1))
                if source.max_concurrency and not self.nests:
                    self.calls.limits[source.name] = 1
        return sources

    def oddly(self, supports: Callable[[ResourceKey], bool]) -> Callable[[ResourceKey], bool]:
        """Raise at times when asked for support, or deny it."""

        def answer(k: ResourceKey) -> bool:
            if self.chance.random() < 0.05:
                raise self.trouble()
            return supports(k) and self.chance.random() < 0.9

        return answer

    def needed_by(self, k: ResourceKey) -> list[ResourceKey]:
        """Return what a key is derived from; where sources are odd it changes, or is not told."""
        needs = self.needs[k]
        if not self.odd or self.chance.random() < 0.8:
            return needs
        if self.chance.random() < 0.3:
            raise self.trouble()
        return self.chance.sample(needs, self.chance.randint(0, len(needs)))

    def trouble(self) -> BaseException:
        """What a source raises: in a wild world anything at all."""
        return self.chance.choice(TROUBLE)() if self.wild else ConnectionError("down")

    def fails(self) -> bool:
        """Whether something goes wrong just now."""
        return not self.calm and self.chance.random() < 0.2

    def known(self) -> dict[ResourceKey, int]:
        """Return what is known by now of base keys: they were told of, or somebody has seen it.

        What a cache that fails has not stored is not seen again, nor what news outranks, or was
        acquired under a lease that news have ended.
        """
        seen = {} if self.wild or self.ranked or self.leases else self.seen
        return {k: max(number, seen.get(str(k), 0)) for k, number in self.floor.items()}

    def is_absent(self, number: int) -> bool:
        """Whether there is nothing of a base key while its truth is this number."""
        return self.vanishes and number % 2 == 1

    def may_be_absent(self, k: ResourceKey, floor: Mapping[ResourceKey, int]) -> bool:
        """Whether a base key, or one that it is derived from, has not existed at some time since.

        That is since the truth was as told by `floor`.
        """
        if k in self.needs:
            return any(self.may_be_absent(each, floor) for each in self.needs[k])
        numbers = range(floor.get(k, 0), self.truth.get(k, 0) + 1)
        return any(self.is_absent(number) for number in numbers)

    def keep(self, payload: Any) -> None:
        """Hold on to what a source returns, as some do."""
        self.kept.append((asyncio.get_running_loop().time(), payload))

    def spoil_what_sources_keep(self) -> None:
        """Change what sources have returned at an earlier time, and so is copied by now."""
        now = asyncio.get_running_loop().time()
        spoil([payload for at, payload in self.kept if at < now])
        self.kept = [each for each in self.kept if each[0] >= now]

    async def pause(self) -> None:
        """Take a moment, or none."""
        loop = asyncio.get_running_loop()
        for _ in range(self.chance.randint(0, 2)):
            if self.chance.random() < self.hold and isinstance(loop, VirtualLoop):
                seconds = self.chance.choice((0.1, 1, 3))
                self.held_seconds += seconds
                loop.be_busy(seconds)
            await asyncio.sleep(self.chance.choice((0, 0, 0.1, 1)))

    async def work(self) -> None:
        """Take the time that a source takes, none at all where they are prompt; or fail.

        Where they are stubborn a source that is cancelled goes on for a while, as a thread does.
        """
        try:
            if self.chance.random() >= self.prompt:
                await self.pause()
        except asyncio.CancelledError:
            if self.stubborn:
                await asyncio.sleep(self.stubborn)
            raise
        if self.fails():
            raise self.trouble()

    async def nest(self, keys: Sequence[ResourceKey]) -> None:
        """Build within a source, at times, from its own builder or another one."""
        if self.nests and self.chance.random() < 0.4:
            builder = self.chance.choice((self.builder, self.aside))
            if self.chance.random() < 0.2:
                await builder.wait_for_refreshes()
            async with builder.session() as session:
                await session.resolve(self.chance.sample(keys, 2), strict=False)

    async def fetch_aside(self, k: ResourceKey, context: FetchContext) -> Any:
        """Answer for the other builder, by way of the first one at times."""
        await self.nest(self.batched)
        await self.work()
        return str(k)

    async def read(
        self, source: str, keys: Collection[ResourceKey], context: FetchContext
    ) -> dict[ResourceKey, Any]:
        """Answer with the truth as it was when the call began, after a while; or fail."""
        self.calls.count += 1
        calls = {k: self.calls.begin(source, k, context.snapshot_id) for k in keys}
        cancelled = False
        try:
            found = {k: (str(k), self.truth[k]) for k in keys}
            dated = not self.jumps and self.chance.random() < 0.5
            observed_at = self.clock.now() if dated else None
            if source == "single":
                await self.nest(self.batched)
            with self.calls.running(source):
                await self.work()
            lasting = self.chance.choice((None, 1.0, 100.0))
            kinds = (tuple, list) if self.mutable else (tuple,)
            values = {k: self.chance.choice(kinds)(value) for k, value in found.items()}
            self.keep(values)
            return {
                k: ResourceAbsent(ttl_seconds=lasting, final=self.chance.random() < 0.3)
                if self.is_absent(found[k][1])
                else SourcePayload(value, observed_at)
                for k, value in values.items()
            }
        except asyncio.CancelledError:
            cancelled = True
            raise
        finally:
            for k, call in calls.items():
                self.calls.end(source, k, call, cancelled=cancelled)

    async def change_both(self) -> None:
        """Let two keys that have no source change together, so that nobody sees one without."""
        async with self.turn:
            self.both += 1
            updates = [ResourceUpdate(k, self.both, "news") for k in PAIR]
            with contextlib.suppress(*([Exception] if self.wild or self.closed else [])):
                await self.builder.publisher.publish_many(updates)

    async def meddle(self) -> None:
        """Say something of a derived key, or let the memory cache forget what it holds."""
        k = self.chance.choice(list(self.needs))
        cache = self.builder.cache
        with (
            self.calls.changing(*self.bases, *self.needs),
            contextlib.suppress(*([Exception] if self.wild or self.closed else [])),
        ):
            kind = self.chance.random()
            if kind < 0.3:
                await self.builder.publisher.publish(k, {}, source="news")
            elif kind < 0.6 or not isinstance(cache, AsyncMemoryCache):
                await self.builder.publisher.invalidate(k)
            else:
                gone = self.chance.sample(self.bases, 3)
                await cache.invalidate_matching(gone.__contains__)

    def sabotage(self) -> None:
        """Cancel a task of the library's own, as a program does that cancels every task."""
        own = [t for t in asyncio.all_tasks() if t.get_name().startswith("coalestra")]
        if own:
            self.chance.choice(sorted(own, key=lambda task: task.get_name())).cancel()

    def jump(self) -> None:
        """Correct the wall clock, by up to an hour in either direction."""
        self.clock.jump(self.chance.uniform(-3_600, 3_600))

    async def change(self, k: ResourceKey) -> None:
        """Let the truth of a base key grow; tell the builder by the news, or that it is old.

        Of one key this is told in turn: of news and an invalidation that overlap, either may count
        as the last.
        """
        async with self.turns[k]:
            self.truth[k] += 1
            value = self.truth[k]
            try:
                with self.calls.changing(k):
                    if self.chance.random() < 0.5 and not self.is_absent(value):
                        told = (list if self.mutable else tuple)((str(k), value))
                        await self.builder.publisher.publish(k, told, source="news")
                        spoil(told)
                    else:
                        await self.builder.publisher.invalidate(k)
            except Exception:
                if not (self.wild or self.closed):
                    raise
            else:
                self.floor[k] = max(self.floor[k], value)


def facts(payload: Any) -> Iterator[tuple[str, int]]:
    """Yield every base fact that a payload is made of."""
    if isinstance(payload, dict):
        for each in payload.values():
            yield from facts(each)
    else:
        name, number = payload
        yield name, number


def spoil(payload: Any) -> None:
    """Change all of a payload that can be changed: nobody else has it, so nobody may see that."""
    if isinstance(payload, (list, dict)):
        for each in payload.values() if isinstance(payload, dict) else payload:
            spoil(each)
        payload.clear()
