"""What a look at a builder finds, and how it is told as JSON.

Laws:

1. To look changes nothing: no source is asked, nothing is counted, no entry counts as used.
2. Subjects, qualifiers and texts of errors are shown if asked for, values if asked for; else a
   subject is a short code, the same one for as long as the page lives and another one on the next.
3. Rates are differences of counters, told for the time between the two readings and no other.
4. Everything is bounded, and what is left out is counted.
"""

from __future__ import annotations

import asyncio
import reprlib
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import islice
from typing import Any, TypeVar

from coalestra.cache.memory import AsyncMemoryCache
from coalestra.concurrency.capacity import GLOBAL
from coalestra.core.health import BuilderHealth, FlightSnapshot
from coalestra.core.keys import AS_IT_IS, ResourceKey
from coalestra.core.serialization import json_safe
from coalestra.core.trace import Trace
from coalestra.core.validation import readable
from coalestra.core.values import Revision, SnapshotValue
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.sources import kind_of
from coalestra.sync import SyncSnapshotBuilder

AnyBuilder = SnapshotBuilder | SyncSnapshotBuilder
T = TypeVar("T")

RATE_SECONDS = 10.0
"""Rates and latencies are told for about so long before now."""
BASELINE_SECONDS = 60.0
"""A counter of failures that has grown within this time is a finding."""
PATIENCE_SECONDS = 3.0
_MOST_FLIGHTS = 50
_MOST_ENTRIES = 300
_MOST_KINDS = 80
_MOST_EDGES = 300
_MOST_INPUTS = 1_000
_MOST_VALUES = 50
_NEWEST_TOLD, _NEWEST_KEPT, _NOTABLE = 20, 100, 15
_NOTABLE_SECONDS = 900.0


class Names:
    """Shows keys in full, or with a code in place of subject and qualifiers.

    A code says that two are the same, and cannot be turned back: it hangs on a secret of its own.
    """

    __slots__ = ("_secret", "show")

    def __init__(self, *, show: bool) -> None:
        self.show: bool = show
        self._secret = secrets.token_bytes(16)

    def key(self, key: ResourceKey) -> ResourceKey:
        """Return the key to be shown for a key."""
        if self.show or not (key.subject or key.qualifiers):
            return key
        parts = repr((key.subject, key.qualifiers)).encode("utf-8", "surrogatepass")
        code = blake2b(parts, digest_size=5, key=self._secret).hexdigest()
        return ResourceKey(key.namespace, key.name, f"#{code}", normalizer=AS_IT_IS)

    def trace(self, trace: Trace) -> Trace:
        """Return the trace to be shown for a trace."""
        if self.show:
            return trace
        keys, calls = {}, []
        for found in trace.keys.values():
            refusals = tuple([replace(each, message="") for each in found.refusals])
            below = tuple([replace(each, key=self.key(each.key)) for each in found.rests_on])
            key = self.key(found.key)
            keys[key] = replace(found, key=key, error=None, refusals=refusals, rests_on=below)
        for call in trace.calls:
            attempts = tuple([replace(each, error=None) for each in call.attempts])
            calls.append(replace(call, error=None, attempts=attempts))
        return replace(trace, keys=keys, calls=tuple(calls))


def kind_name(key: ResourceKey) -> str:
    """Return the kind of resource that a key is of."""
    return readable(f"{key.namespace}:{key.name}")


def trace_id(trace: Trace) -> str:
    """Return what a trace is called in an address: ids of snapshots may hold anything."""
    parts = repr((trace.snapshot_id, trace.kind, trace.started_at)).encode("utf-8", "replace")
    return blake2b(parts, digest_size=6).hexdigest()


@dataclass(frozen=True)
class Look:
    """What was found at one moment.

    `at` is wall-clock seconds since the epoch. `waited` is how long the builder's loop, if it is
    another one, took to answer, in seconds; None if it did not. `entries` are some entries of the
    memory cache, those used last; none if the cache is another one, or its loop did not answer.
    """

    at: float
    health: BuilderHealth
    holders: Mapping[str, int]
    flights: tuple[FlightSnapshot, ...]
    waited: float | None
    entries: Sequence[Revision] = ()


def own_of(builder: AnyBuilder) -> SnapshotBuilder:
    """Return the builder itself, if it is on a loop of its own."""
    return builder.builder if isinstance(builder, SyncSnapshotBuilder) else builder


async def _look_inside(
    builder: SnapshotBuilder, asked: float
) -> tuple[BuilderHealth, float, Sequence[Revision]]:
    """Return what only the builder's loop can see, and how long it took to answer."""
    waited, cache = time.perf_counter() - asked, builder.cache
    health = await builder.health_snapshot()
    entries = cache.store.newest(_MOST_ENTRIES) if type(cache) is AsyncMemoryCache else ()
    return health, waited, entries


async def look_at(builder: AnyBuilder) -> Look:
    """Look at a builder; what does not answer in time is told of as far as it can be seen.

    Raises:
        Exception: whatever is raised by what the builder was given, such as its clock.
    """
    own, inside = own_of(builder), None
    waited: float | None = None
    try:
        looking = _asked(builder, partial(_look_inside, asked=time.perf_counter()))
    except RuntimeError:  # it is closed, and so its loop is over
        waited = 0.0
    else:
        inside = looking.result() if await done_in_time(looking) else None
    health, waited, entries = inside or (own.health_snapshot_nowait(), waited, ())
    if isinstance(builder, SyncSnapshotBuilder):
        health = replace(
            health,
            closed=health.closed or builder.closed,
            pending_submissions=builder.pending_submissions,
            max_pending_submissions=builder.max_pending_submissions,
        )
    flights = own.flights_under_way(limit=_MOST_FLIGHTS)
    return Look(own.clock.now(), health, own.capacity.holders(), flights, waited, entries)


def _asked(
    builder: AnyBuilder, work: Callable[[SnapshotBuilder], Coroutine[Any, Any, T]]
) -> asyncio.Future[T]:
    """Have something done on the builder's own loop."""
    if isinstance(builder, SyncSnapshotBuilder):
        return asyncio.wrap_future(builder.submit(work))
    return asyncio.ensure_future(work(builder))


async def done_in_time(looking: asyncio.Future[Any]) -> bool:
    """Wait for what looks, and cancel it if it takes too long; return whether it has an outcome."""
    try:
        await asyncio.wait((looking,), timeout=PATIENCE_SECONDS)
    finally:
        looking.cancel()
    return looking.done() and not looking.cancelled()


async def look_into_cache(builder: AnyBuilder) -> tuple[SnapshotValue[Any], ...] | None:
    """Return copies of the values used last; None if the cache is not the library's own in memory.

    Raises:
        TimeoutError: the builder's loop, or a copy, took too long.
        Exception: what copying raised, or `RuntimeError` of a closed builder.
    """
    cache = own_of(builder).cache
    if type(cache) is not AsyncMemoryCache:
        return None
    looking = _asked(builder, lambda _: cache.newest(_MOST_VALUES))
    if not await done_in_time(looking):
        raise TimeoutError(f"the cache did not answer within {PATIENCE_SECONDS:g} s")
    return looking.result()


class Story:
    """The health of the last minute, and what was learnt on the way, told as JSON-safe data.

    Of older looks nothing else is kept, so that no value lives longer for having been seen. It is
    told off the event loop: traces may be many and large.
    """

    def __init__(self, builder: AnyBuilder, names: Names) -> None:
        own = own_of(builder)
        self._builder = own
        self._names = names
        self._sources = {each.name: (each, kind_of(each).value) for each in own.sources}
        self._past: deque[tuple[float, BuilderHealth]] = deque()
        self._traced: float = float(own.trace)
        self._graph = Graph()
        self.traces: Traces = Traces()

    def told(self, look: Look, now: float, late: float) -> dict[str, Any]:
        """Take in a look and return the state to be shown.

        It was taken `now`, on a monotonic clock, and so many seconds `late`, as the loop was held.
        """
        health, past = look.health, self._past
        while past and past[0][0] < now - BASELINE_SECONDS:
            past.popleft()
        recent = [each for each in past if each[0] >= now - RATE_SECONDS * 1.2]
        then, before = recent[0] if recent else (now, None)
        since = past[0][1] if past else None
        past.append((now, health))
        self._graph.learn(look.entries, self.traces.take(self._builder.recent_traces()))
        return {
            "at": look.at,
            "loop": {"late_ms": late * 1000, "answers": look.waited is not None},
            "waited_ms": None if look.waited is None else look.waited * 1000,
            "verdict": {"closed": health.closed, **health.assess(previous=since).to_dict()},
            "seconds": now - then,
            "sources": self._told_sources(look, before, now - then),
            "capacity": {**json_safe(health.capacity[GLOBAL]), "holders": [*look.holders.items()]},
            "cache": _told_cache(health, before),
            "flights": {
                "count": health.singleflight_in_flight,
                "shown": [
                    {**json_safe(each), "key": self._names.key(each.key).display}
                    for each in look.flights
                ],
            },
            "refreshes": health.background_refreshes,
            "submissions": [health.pending_submissions, health.max_pending_submissions],
            "graph": self._graph.told(self._sources),
            "tracing": self._traced,
            "traces": self.traces.told(look.at),
        }

    def _told_sources(
        self, look: Look, before: BuilderHealth | None, seconds: float
    ) -> list[dict[str, Any]]:
        health = look.health
        circuits: dict[str, list[Any]] = {name: [] for name in self._sources}
        for identity, circuit in health.circuits.items():
            told = {"scope": identity.scope.value, **json_safe(circuit)}
            circuits.setdefault(identity.source, []).append(told)
        return [
            {
                "name": name,
                "kind": kind,
                "priority": source.priority,
                "timeout_seconds": getattr(source, "timeout_seconds", None),
                **json_safe(health.sources[name]),
                **_rates(health.sources[name], before and before.sources[name], seconds),
                "circuits": circuits[name],
                "slots": json_safe(health.capacity.get(name)),
                "holding": look.holders.get(name, 0),
                "unfinished": health.unfinished_source_calls.get(name, 0),
            }
            for name, (source, kind) in self._sources.items()
        ]


def _rates(fared: Any, before: Any | None, seconds: float) -> dict[str, Any]:
    """What a source was asked between two looks, a second and a failing second; its latency."""
    if before is None or seconds <= 0:
        return {"rate": None, "failing": None, "latency_ms": None}
    attempts = fared.attempt_count - before.attempt_count
    took = fared.total_latency_ms - before.total_latency_ms
    return {
        "rate": attempts / seconds,
        "failing": (fared.failed_attempt_count - before.failed_attempt_count) / seconds,
        "latency_ms": took / attempts if attempts > 0 else None,
    }


def _told_cache(health: BuilderHealth, before: BuilderHealth | None) -> dict[str, Any]:
    now, then = _reads(health.cache), None if before is None else _reads(before.cache)
    fresh, reads = (now[0] - then[0], now[1] - then[1]) if now and then else (None, None)
    return {
        "left_alone": health.cache_left_alone,
        "calls": health.cache_call_count,
        "failures": health.cache_failure_count,
        "timeouts": health.cache_timeout_count,
        "stats": json_safe(health.cache),
        "fresh": fresh,
        "reads": reads,
    }


def _reads(stats: Any) -> tuple[int, int] | None:
    """Return how many reads of a cache found something fresh, and how many there were."""
    hits, misses = getattr(stats, "hits", None), getattr(stats, "misses", None)
    if not isinstance(hits, int) or not isinstance(misses, int):
        return None
    fresh = getattr(stats, "fresh_hits", hits)
    return fresh if isinstance(fresh, int) else hits, hits + misses


class Traces:
    """The traces that were seen: the newest, and of a quarter of an hour the slowest and worst.

    A busy builder keeps its last few for less than a second: what is shown must still be there when
    somebody wants to see more of it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Trace, dict[str, Any]]] = {}  # with what is told of each

    def take(self, traces: Iterable[Trace]) -> list[Trace]:
        """Take in what a builder has kept; return what was not known before."""
        new = {name: each for each in traces if self.find(name := trace_id(each)) is not each}
        # In one step: another thread may look for one.
        self._kept = self._kept | {name: (each, _summary(each)) for name, each in new.items()}
        return [*new.values()]

    def find(self, name: str) -> Trace | None:
        """Return the trace of this name, if it is kept."""
        return self._kept.get(name, (None,))[0]

    def told(self, now: float) -> list[dict[str, Any]]:
        """Let go of what is of no interest any more, and tell of the rest, the newest first."""
        told = {name: summary for name, (_, summary) in self._kept.items()}
        order = sorted(told, key=lambda name: -told[name]["started_at"])
        lately = [name for name in order if now - told[name]["started_at"] < _NOTABLE_SECONDS]
        slowest = sorted(lately, key=lambda name: -told[name]["seconds"])
        trouble = {name: (told[name]["failed"], told[name]["stale"]) for name in lately}
        troubled = [name for name in lately if any(trouble[name])]
        worst = sorted(troubled, key=trouble.__getitem__, reverse=True)
        notable = {*slowest[:_NOTABLE], *worst[:_NOTABLE]}
        kept, shown = notable | {*order[:_NEWEST_KEPT]}, notable | {*order[:_NEWEST_TOLD]}
        self._kept = {name: self._kept[name] for name in order if name in kept}
        return [told[name] for name in self._kept if name in shown]


def _summary(trace: Trace) -> dict[str, Any]:
    counts = Counter(
        "absent" if found.error_type == "ResourceAbsentError" else found.obtained.value
        for found in trace.keys.values()
    )
    return {
        "id": trace_id(trace),
        "kind": trace.kind,
        "snapshot_id": readable(trace.snapshot_id),
        "parent": trace.parent_snapshot_id and readable(trace.parent_snapshot_id),
        "started_at": trace.started_at,
        "seconds": trace.duration_seconds,
        "keys": len(trace.keys) + trace.omitted_keys,
        "requested": sum(found.requested for found in trace.keys.values()),
        "calls": len(trace.calls),
        "obtained": counts,
        "failed": counts["failed"],
        "stale": counts["stale"] + counts["fallback"],
        "absent": counts["absent"],
    }


def told_values(
    values: Iterable[SnapshotValue[Any]], names: Names, now: float, show_values: bool
) -> list[dict[str, Any]]:
    """Return the values of a cache to be shown at ``now``, in wall-clock seconds.

    Not on an event loop: the ``repr`` of a value may take any time.
    """
    told = []
    for value in values:
        shown: dict[str, Any] = {
            "key": names.key(value.key).display,
            "source": readable(value.source),
            "observed_at": value.observed_at,
            "age_seconds": max(0.0, now - value.observed_at),
            "derived_from": len(value.dependency_versions),
        }
        if show_values:
            shown["value"] = _shown(value.value)
        told.append(shown)
    return told


def _shown(value: object) -> str:
    try:
        text = _SHORT.repr(value)
    except BaseException as error:  # a value's own; it is not asked for on the event loop
        text = f"<{type(value).__name__}: its repr raised {type(error).__name__}>"
    return text if len(text) <= 300 else f"{text[:297]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 12


class Graph:
    """Which kinds of resources were seen to come from which sources, and to rest on which others.

    It is learnt from entries of the memory cache and from traces: what has not been read for a
    while, or is kept in a cache elsewhere and in no trace, is not in it.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, set[str]] = {}
        self._edges: dict[tuple[str, str], None] = {}
        self._omitted: set[str] = set()
        self._seen: set[str] = set()

    def learn(self, entries: Iterable[Revision], traces: Iterable[Trace]) -> None:
        """Take in what new entries and new traces show."""
        by_version = {entry.version: entry for entry in entries}
        for version in by_version.keys() - self._seen:
            entry = by_version[version]
            self._note(entry.key, entry.source, entry.dependency_versions)
        self._seen = set(by_version)
        for trace in traces:
            for found in trace.keys.values():
                self._note(found.key, found.source, (each.key for each in found.rests_on))

    def _note(self, key: ResourceKey, source: str | None, rests_on: Iterable[ResourceKey]) -> None:
        kind = kind_name(key)
        sources = self._place(kind)
        if sources is None:
            return
        if source is not None and len(sources) < _MOST_KINDS:
            sources.add(source)
        for other in {kind_name(each) for each in islice(rests_on, _MOST_INPUTS)} - {kind}:
            if self._place(other) is not None and len(self._edges) < _MOST_EDGES:
                self._edges[other, kind] = None

    def _place(self, kind: str) -> set[str] | None:
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            if len(self._omitted) < 10 * _MOST_KINDS:
                self._omitted.add(kind)
            return None
        return self._kinds.setdefault(kind, set())

    def told(self, sources: Mapping[str, tuple[Any, str]]) -> dict[str, Any]:
        """Return kinds and edges; what rests on something comes after it in ``[from, to]``."""
        return {
            "kinds": [
                {
                    "name": kind,
                    "sources": sorted(served),
                    "derived": any(sources.get(each, ("", ""))[1] == "derived" for each in served),
                }
                for kind, served in sorted(self._kinds.items())
            ],
            "edges": sorted(map(list, self._edges)),
            "omitted": len(self._omitted),
        }
