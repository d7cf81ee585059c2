"""One truth for many processes: a cache on Redis or Valkey.

The server decides what is stored (`scripts`), this module what is asked of it:

1. Whatever the number of keys, a question is one round trip; derived entries take one more for
   each level of what they rest on.
2. Who waits for a lease of another process wakes by the news of its key, or by a look at the
   server at least once a second, should the news have been lost.
3. A lease that was asked for, and that nobody received, is given back.
4. A publication or an invalidation is over when all who hear the news of this server can have
   heard it, or it raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from redis.asyncio import Redis, RedisCluster

from coalestra._endings import look_after
from coalestra.cache.memory import MISS, lookup_of, revision_of
from coalestra.cache.store import best_per_key, outdated_among, with_all_below
from coalestra.concurrency.deadline import CutOff, CutOffExpired
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.threads import threads_of_context
from coalestra.core.errors import CoalestraError
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, RefreshMode
from coalestra.core.protocols import CacheNewsListener, Lease, LeasedLookup
from coalestra.core.serialization import qualified_type
from coalestra.core.validation import integer, number, refusal, require_methods, text, wrong_type
from coalestra.core.values import CacheLookup, CacheWriteResult, CacheWriteStatus, SnapshotValue
from coalestra.redis import codec, scripts
from coalestra.redis.codec import MessagePackCodec, Model, UnstorableValueError, ValueCodec
from coalestra.redis.server import (
    Call,
    Client,
    News,
    Server,
    SharedCacheUnavailableError,
    explained,
)
from coalestra.resilience import CircuitState

Policies = Mapping[ResourceKey, FreshnessPolicy]
Value = SnapshotValue[Any]

# What is stored under a name: a value and what is known of it, but for what the server must know -

_FORM: Final = 1
_encode = msgspec.msgpack.Encoder().encode
_Stored = tuple[int | str, str, float, int, int, bytes, bytes, list[tuple[str, str]]]
"""Form (its codec's name, if that is another), source, latency in ms, attempts, rank, payload,
metadata, and what it rests on."""
_decode = msgspec.msgpack.Decoder(_Stored).decode


class _Entry(NamedTuple):
    """What the server answered for one key; ``number`` belongs to the state."""

    state: str
    value: Value | None
    version: str | None
    number: int


_HIT: Final = "h"
_LEASED: Final = "l"
_WAIT: Final = "w"
_GET: Final = "g"
_LEASE: Final = "l"
_FORCE: Final = "f"
_STORED: Final = CacheWriteStatus.STORED
_FOREVER: Final = 1e300
_LONGEST_SECONDS: Final = 1e9
"""The server does not take the milliseconds of all that a float can be."""
_MOST_VERSION_BYTES: Final = 999
"""News tell the length of a version by three digits."""
_MOST_READ_HERE: Final = 32_768
"""So many bytes of a value are read on the event loop: a millisecond or two."""
_LOOK_AGAIN_SECONDS: Final = 1.0
_MOST_RENEWED_SECONDS: Final = 60.0
_MOST_ROUNDS: Final = 8
_MOST_OWN: Final = 10_000
_AGAIN_SECONDS: Final = (0.0, 0.1, 1.0)
_KEYS_IN_ONE_STEP: Final = 50
"""The server does nothing else meanwhile, so that one script takes no more keys than this."""
_NAMES_IN_ONE_CALL: Final = 5_000

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class RedisCacheHealth:
    """How a shared cache is doing, as this process sees it.

    Attributes:
        state: of the circuit: ``closed`` is well, ``open`` leaves the server alone for a moment,
            ``half_open`` tries it again.
        news_connected: whether news of other processes arrive; without, nothing is read from
            memory.
        news_lost: how often that connection was lost.
        calls, failures, timeouts, refused: of the server; timeouts are failures, and refused calls
            were not made.
        leases: how many are held now.
        waiting: how many keys are waited for that another process acquires.
        unreadable: entries that could not be read.
        unstorable: tries to write a value that cannot be; one value may be tried four times.
        clock_offset_seconds: how far the server's clock is ahead of this machine's; None before
            the first answer.
        last_error: what went wrong last, or None.
    """

    state: str
    news_connected: bool
    news_lost: int
    calls: int
    failures: int
    timeouts: int
    refused: int
    leases: int
    waiting: int
    unreadable: int
    unstorable: int
    clock_offset_seconds: float | None
    last_error: str | None


class RedisCache:
    """A cache that processes and machines share, on a Redis or Valkey server of version 7 or later.

    Standalone, behind Sentinel, or a cluster: the client decides. It belongs to one event loop at a
    time, and to the process that made it. `SnapshotBuilder(sources, cache=RedisCache(client))` is
    all it takes. What asks the server raises `SharedCacheUnavailableError` if it cannot be reached,
    or refuses.

    Args:
        client: a client of redis-py for asyncio; it stays the application's. Or a URL
            (``redis://...``), for a client of the cache's own.
        prefix: what the names of all its entries begin with, with ``/`` for each ``:``; caches with
            different prefixes have nothing in common. Letters, digits and ``._-:`` only.
        models: the application's own types that values may hold; see `MessagePackCodec`.
        codec: writes and reads values instead of `MessagePackCodec`.
        near_entries: how many entries are kept in memory as well; 0 for none.
        near_seconds: after so long an entry in memory is looked up again even without news.
        time_limit_seconds: how long one round trip to the server may take.
        lease_seconds: how long the others wait for a process that has died.
        max_value_bytes: how large one value may be, encoded.
        max_lifetime_seconds: when the server drops an entry whose policy lets it live for longer.
    """

    validates_dependency_versions = True
    validates_source_authority = True
    validates_write_order = True
    accepts_policies = True

    def __init__(
        self,
        client: Client | str,
        *,
        prefix: str = "coalestra",
        models: Iterable[type[Any] | Model] = (),
        codec: ValueCodec | None = None,
        near_entries: int = 10_000,
        near_seconds: float = 60.0,
        time_limit_seconds: float = 0.25,
        lease_seconds: float = 5.0,
        max_value_bytes: int = 16 * 1024 * 1024,
        max_lifetime_seconds: float = 7 * 86400.0,
    ) -> None:
        self._owns_client = isinstance(client, str)
        if not re.fullmatch(r"[A-Za-z0-9._:-]+", text("prefix", prefix)):
            raise ValueError(refusal("prefix", "letters, digits and ._-: only", prefix))
        self._prefix = prefix
        self._channel = f"{prefix}:#news"
        self.near_entries: int = integer("near_entries", near_entries, minimum=0)
        self.near_seconds: float = number("near_seconds", near_seconds, above=0)
        self._lease_ms = _milliseconds("lease_seconds", lease_seconds)
        self._most_bytes = integer("max_value_bytes", max_value_bytes, minimum=1)
        self._longest_ms = _milliseconds("max_lifetime_seconds", max_lifetime_seconds)
        self._codec: ValueCodec = MessagePackCodec(models) if codec is None else codec
        require_methods("codec", self._codec, "encode", "decode", plain=True)
        kind = type(self._codec)
        self._form = _FORM if kind is MessagePackCodec else qualified_type(self._codec)
        used = Redis.from_url(client) if isinstance(client, str) else client
        if not isinstance(used, (Redis, RedisCluster)):
            raise wrong_type(
                "client", "a redis.asyncio.Redis or RedisCluster", client, "or give a redis:// URL"
            )
        limit = number("time_limit_seconds", time_limit_seconds, above=0)
        self._server = Server(used, limit, self._demoted)
        self.timeout_seconds: float = max(1.0, 4 * limit)
        self._news = News(used, self._channel, self._heard, self._missed)
        self._made_by = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._listeners: weakref.WeakSet[CacheNewsListener] = weakref.WeakSet()
        self._asking: dict[ResourceKey, set[_Question]] = {}
        self._leases: weakref.WeakKeyDictionary[Lease, float] = weakref.WeakKeyDictionary()
        self._renewal: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._own: OrderedDict[str, None] = OrderedDict()
        self._unreadable = 0
        self._unstorable = 0

    def __repr__(self) -> str:
        return f"RedisCache({self._prefix!r}, {self._server!r}, {self._news!r})"

    def health(self) -> RedisCacheHealth:
        """Return how it is doing."""
        server, news = self._server, self._news
        return RedisCacheHealth(
            state=server.state.value,
            news_connected=news.connected,
            news_lost=news.lost,
            **server.counts,
            leases=len(self._leases),
            waiting=sum(
                any(key in each.parked for each in group) for key, group in self._asking.items()
            ),
            unreadable=self._unreadable,
            unstorable=self._unstorable,
            clock_offset_seconds=server.clock_offset_seconds,
            last_error=server.last_error or news.last_error,
        )

    @property
    def is_available(self) -> bool:
        """Whether the server answers, as far as is known."""
        return self._server.state is CircuitState.CLOSED

    @property
    def call_counts(self) -> Mapping[str, int]:
        """How many ``calls`` were made, ``failures`` and ``timeouts`` of these, and ``refused``."""
        return dict(self._server.counts)

    # Begin and end ----------------------------------------------------------------------------

    def check_usable(self) -> None:
        """Raise `RuntimeError` with the remedy where the cache cannot be used.

        That is in a process that was forked from the one that made it, on a second event loop while
        the first one is still open, and after it was closed.
        """
        if self._closed:
            raise RuntimeError("this RedisCache is closed; make a new one")
        if os.getpid() != self._made_by:
            raise RuntimeError(
                "this RedisCache, or its client, was made before the process was forked; make both "
                "in the worker process: in a startup handler, gunicorn's post_fork or Celery's "
                "worker_process_init"
            )
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError(
                    "this RedisCache belongs to another event loop that is still open; make one "
                    "for each loop, with a client of its own"
                )
            # Let go of what belonged to the one that has ended.
            self._news = News(self._server.client, self._channel, self._heard, self._missed)
            self._asking.clear()
            self._leases.clear()
            self._tasks.clear()
            self._server.begin()
            self._renewal = None
        self._loop = loop

    async def aclose(self) -> None:
        """Give back all leases, end the subscription, and close a client of its own.

        A client that was passed in stays open.
        """
        if self._closed:
            return
        self._closed = True
        if self._renewal is not None:
            self._renewal.cancel()
        if self._loop is asyncio.get_running_loop():
            await self.release_many(tuple(self._leases))
            await self._news.close()
            if self._tasks:  # which may be giving leases back
                await asyncio.wait(self._tasks, timeout=self._server.time_limit_seconds)
            for task in tuple(self._tasks):
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            await self._server.close()
        if self._owns_client:
            await self._server.client.aclose()

    async def _open(self) -> None:
        self.check_usable()
        if not self._news.connected:
            await self._news.start(self._server.time_limit_seconds)

    # News -------------------------------------------------------------------------------------

    def subscribe(self, listener: CacheNewsListener) -> None:
        """Tell ``listener`` of changes from now on; it is held weakly."""
        self._listeners.add(listener)

    def unsubscribe(self, listener: CacheNewsListener) -> None:
        """Tell ``listener`` nothing more."""
        self._listeners.discard(listener)

    def caught_up(self) -> bool:
        """Take in all news that have arrived; return False while some may be missing."""
        return self._news.catch_up()

    def _heard(self, data: bytes) -> None:
        try:
            letter, version, canonical = scripts.message_of(data)
            if version in self._own and not self._asking:
                return
            key = scripts.key_of(canonical) if canonical else None
        except Exception:  # from a version of the library that says more
            key = None
        if key is None:  # all have changed
            self._missed()
            return
        for question in self._asking.get(key, ()):
            question.hear(key, letter)
        if letter in (scripts.STORED, scripts.INVALIDATED) and version not in self._own:
            for listener in tuple(self._listeners):
                listener.changed(key, version or None)

    def _demoted(self) -> None:
        self._news.leave()

    def _missed(self) -> None:
        for key, group in self._asking.items():
            for question in group:
                question.hear(key, scripts.RELEASED)
        for listener in tuple(self._listeners):
            listener.missed()

    # Reading ----------------------------------------------------------------------------------

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        """Return what there is for ``key`` on the server, judged at ``now``."""
        return (await self.get_many((key,), now=now, policies={key: policy}))[key]

    async def get_many(
        self, keys: Collection[ResourceKey], *, now: float, policies: Policies
    ) -> Mapping[ResourceKey, CacheLookup]:
        """Return what there is for each key on the server, in one round trip."""
        await self._open()
        ages = {key: policies[key].max_stale_seconds for key in keys}
        entries = await self.ask(ages, now, _GET)
        values = {key: each.value for key, each in entries.items() if each.value is not None}
        _, outdated = await self.judged(values, tuple(keys), now)
        return {
            key: MISS if key in outdated else lookup_of(values.get(key), now, policies[key])
            for key in keys
        }

    async def lease_many(
        self,
        keys: Collection[ResourceKey],
        *,
        now: float,
        policies: Policies,
        force: bool = False,
        unlike: Mapping[ResourceKey, str] | None = None,
    ) -> AsyncGenerator[Mapping[ResourceKey, LeasedLookup], None]:
        """Give what there is for each key, or the lease on it, as soon as either is known.

        See `LeasingCache.lease_many`.
        """
        ahead, mode = now - time.monotonic(), _FORCE if force else _LEASE
        question = _Question(self, ahead, policies, mode, dict(unlike or {}))
        pending = dict.fromkeys(keys)
        for key in pending:
            self._asking.setdefault(key, set()).add(question)
        try:
            wanted: Collection[ResourceKey] = tuple(pending)
            while pending:
                await self._open()
                known = await question.put(wanted)
                for key, each in known.items():
                    if not each.waiting:
                        pending.pop(key, None)
                yield known
                if not pending:
                    break
                told = await question.news_of(pending)
                alone = {
                    key: LeasedLookup(question.in_need.get(key, MISS))
                    for key, letter in told.items()
                    if letter == scripts.FAILED
                }
                wanted = [key for key in told or pending if key not in alone]
                if alone:
                    for key in alone:
                        del pending[key]
                    yield alone
        finally:
            for key in dict.fromkeys(keys):
                group = self._asking.get(key, set())
                group.discard(question)
                if not group:
                    self._asking.pop(key, None)

    async def ask(
        self,
        ages: Mapping[ResourceKey, float],
        now: float,
        mode: str,
        unlike: Mapping[ResourceKey, str] | None = None,
        token: str = "",
    ) -> dict[ResourceKey, _Entry]:
        """Read keys, or take leases on them; unreadable entries count as missing."""
        others = unlike or {}
        wanted = (
            (key, _bytes(f"{mode}{_plain(min(age, _FOREVER))} {others.get(key, '')}"))
            for key, age in ages.items()
        )
        shared = token, self._lease_ms, _plain(now)
        moment, answers = await self._timed(scripts.READ, wanted, *shared)
        found: dict[ResourceKey, _Entry] = {}
        pace = Pace()
        _all(answers, "the shared cache could not be read")
        for key, told in zip(ages, answers, strict=True):
            await pace.keep()
            found[key] = await self._entry(key, told, moment, now)
        return found

    async def _calls(self, items: Iterable[tuple[Any, ...]]) -> list[Call]:
        """Return the calls of a script for keys, each for as many as it may work on.

        An item is a key and what the script is given for it.
        """
        calls, pace = list[Call](), Pace()
        for part in self._portions(items):
            names = [scripts.name_of(self._prefix, key) for key, *_ in part]
            calls.append(Call(names, [each for _, *own in part for each in own]))
            await pace.keep()
        return calls

    async def _told(self, script: str, items: Iterable[tuple[Any, ...]], *shared: Any) -> list[Any]:
        """Run a script for keys, and return one answer for each call of it."""
        return await self._server.run(script, await self._calls(items), *shared)

    def _portions(self, items: Iterable[_T]) -> Iterator[tuple[_T, ...]]:
        left = iter(items)
        while part := tuple(islice(left, 1 if self._server.is_cluster else _KEYS_IN_ONE_STEP)):
            yield part

    async def _timed(
        self, script: str, items: Iterable[tuple[Any, ...]], *shared: Any
    ) -> tuple[float, list[Any]]:
        """Run a script that answers with its time first; return that, and one answer per name."""
        calls, moment, found = await self._calls(items), 0.0, []
        answers = await self._server.run(script, calls, *shared, timed=True)
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, Exception):
                found += [answer] * len(call.names)
            else:
                moment = float(answer[0])
                found += answer[1:]
        return moment, found

    async def _entry(self, key: ResourceKey, told: bytes, moment: float, now: float) -> _Entry:
        """Return an entry as the server tells it, with times on the reader's clock."""
        state, second, observed, stored, undated, size, rest = told.split(b" ", 6)
        value = version = None
        self._unreadable += state.endswith(b"!")
        if observed != b"-":
            data, version = rest[int(size) :], rest[: int(size)].decode(errors="surrogateescape")
            try:
                observed_at, fetched_at = float(observed), now - (moment - float(stored))
                if undated == b"1":
                    observed_at = now - (moment - observed_at)
                if len(data) > self._most_bytes:
                    raise codec.UnreadableEntryError("it is larger than it may be")
                form, source, latency, attempts, rank, payload, metadata, below = _decode(data)
                if form != self._form:
                    raise codec.UnreadableEntryError(f"it has form {form}, and not {self._form}")
                decode, run = self._codec.decode, threads_of_context().run
                if len(payload) <= _MOST_READ_HERE:
                    content = decode(payload)
                else:
                    content = await run(decode, payload, label="decode", or_here=True)
                value = SnapshotValue(
                    key,
                    content,
                    source,
                    observed_at,
                    fetched_at,
                    max(0.0, now - observed_at),
                    stale=False,
                    from_cache=True,
                    latency_ms=latency,
                    attempts=attempts,
                    metadata=FrozenDict(decode(metadata) if metadata else {}),
                    authority_rank=rank,
                    version=version,
                    dependency_versions=FrozenDict({scripts.key_of(k): v for k, v in below}),
                )
            except Exception:  # whoever has written it, and whatever the codec makes of it
                self._unreadable += 1
        return _Entry(state.decode().rstrip("!"), value, version, int(second))

    async def judged(
        self, values: Mapping[ResourceKey, Value], absent: Collection[ResourceKey], now: float
    ) -> tuple[dict[ResourceKey, Value], set[ResourceKey]]:
        """Return ``values`` with all that they rest on, and the keys that are outdated among it.

        ``absent`` keys that are not in ``values`` are not held.
        """

        async def held(keys: list[ResourceKey]) -> dict[ResourceKey, Value]:
            found = await self.ask(dict.fromkeys(keys, _FOREVER), now, _GET)
            return {key: entry.value for key, entry in found.items() if entry.value is not None}

        complete = await with_all_below(values, absent, held)
        if not any(value.dependency_versions for value in complete.values()):
            return complete, set()
        return complete, set(outdated_among({k: revision_of(v) for k, v in complete.items()}))

    # Leases -----------------------------------------------------------------------------------

    def let_go(self, leases: Collection[Lease]) -> None:
        """Give back leases that nobody has received, or may have been granted unseen."""
        if not self._closed and leases:
            self._behind(self._give_back(leases))

    async def _give_back(self, leases: Collection[Lease]) -> None:
        # A question that was cut off may reach the server after the first of these.
        for pause in _AGAIN_SECONDS:
            await asyncio.sleep(pause)
            await self.release_many(leases)

    def leased(self, key: ResourceKey, token: str, replaces: str | None) -> Lease:
        """Return a lease that was granted, to be renewed from now on for as long as it is held."""
        lease = Lease(key, token, replaces)
        self._leases[lease] = time.monotonic() + _MOST_RENEWED_SECONDS
        if self._renewal is None and self._loop is not None:
            self._renewal = self._loop.call_later(self._lease_ms / 3000, self._renew)
        return lease

    def _renew(self) -> None:
        """Let leases last while somebody works for them, but not for ever."""
        self._renewal = None
        if not self._leases or self._closed or self._loop is None:
            return
        self._renewal = self._loop.call_later(self._lease_ms / 3000, self._renew)
        now = time.monotonic()
        held = [(lease.key, lease.token) for lease, until in self._leases.items() if now < until]
        if held:
            self._behind(self._told(scripts.RENEW, held, self._lease_ms))

    async def fulfil_many(
        self, values: Mapping[Lease, Value], *, policies: Policies, replace_equal: bool = False
    ) -> Mapping[ResourceKey, CacheWriteResult | Exception]:
        """Store what was acquired under leases; see `LeasingCache.fulfil_many`."""
        await self._open()
        results: dict[ResourceKey, CacheWriteResult | Exception] = {}
        items: dict[ResourceKey, bytes] = {}
        pace = Pace()
        try:
            for lease, value in values.items():
                await pace.keep()
                policy, flags = policies.get(value.key), "e" if replace_equal else ""
                if policy and value.fetched_at - value.observed_at > policy.ttl_seconds:
                    flags += "s"
                try:
                    offer = self._offer(value, policy, flags, lease.token, lease.replaces)
                    items[lease.key] = await offer
                    self._leases.pop(lease, None)
                except Exception as error:
                    results[lease.key] = error
                    self._behind(self.release_many((lease,), failed=True))
            if items:
                offered = {value.key: value for value in values.values()}
                results.update((await self._write(offered, items))[0])
        except BaseException:
            self.let_go(tuple(values))
            raise
        away = SharedCacheUnavailableError
        self.let_go([each for each in values if isinstance(results[each.key], away)])
        return results

    async def release_many(self, leases: Collection[Lease], *, failed: bool = False) -> None:
        """Give back leases without a value; see `LeasingCache.release_many`."""
        letter = scripts.FAILED if failed else scripts.RELEASED
        given = tuple(leases)
        for lease in given:
            self._leases.pop(lease, None)
        if given:
            held = ((lease.key, lease.token, lease.key.canonical) for lease in given)
            with contextlib.suppress(CoalestraError):  # they end by themselves
                await self._told(scripts.RELEASE, held, self._channel, letter)

    # Writing ----------------------------------------------------------------------------------

    async def set(self, value: Value, *, policy: FreshnessPolicy | None = None) -> None:
        """Store a value whatever is there; ``policy`` says for how long."""
        await self.set_if_newer(value, force=True, policy=policy)

    async def set_many(
        self, values: Collection[Value], *, policies: Policies | None = None
    ) -> None:
        """Store values whatever is there; ``policies`` say for how long."""
        await self.set_many_if_newer(values, force=True, policies=policies)

    async def set_if_newer(
        self,
        value: Value,
        *,
        force: bool = False,
        replace_equal: bool = False,
        policy: FreshnessPolicy | None = None,
    ) -> CacheWriteResult:
        """Store a value if the write order prefers it to what is there."""
        policies = {} if policy is None else {value.key: policy}
        terms: Any = {"force": force, "replace_equal": replace_equal, "policies": policies}
        return (await self.set_many_if_newer((value,), **terms))[value.key]

    async def set_many_if_newer(
        self,
        values: Collection[Value],
        *,
        force: bool = False,
        replace_equal: bool = False,
        policies: Policies | None = None,
    ) -> Mapping[ResourceKey, CacheWriteResult]:
        """Store those values that the write order prefers to what is there, in one round trip.

        Of several for one key the best one is offered. What is stored ends the leases on its keys.
        When this returns, everybody who hears the news of the server can have heard of it. Raises
        `UnstorableValueError` for a value that cannot be encoded; then nothing is written.
        """
        await self._open()
        flags = ("f" if force else "") + ("e" if replace_equal else "") + "p"
        offered, known = {value.key: value for value in values}, policies or {}
        if len(offered) < len(values):
            best = best_per_key([revision_of(value) for value in values])
            offered = {v.key: v for v in values if v.version == best[v.key].version}
        told: dict[ResourceKey, CacheWriteResult] = {}
        over: dict[ResourceKey, str] = {}
        heard, rest, pace = 0, list(offered), Pace()
        while rest:
            items: dict[ResourceKey, bytes] = {}
            for key in rest:
                policy, loser = known.get(key), over.get(key)
                items[key] = await self._offer(offered[key], policy, flags, "-", loser)
                await pace.keep()
            results, others, unreadable = await self._write(offered, items)
            heard += others
            for key, answer in results.items():
                if isinstance(answer, Exception):
                    raise answer
                told[key] = answer
            # What is derived and outdated, or cannot be read, defends nothing.
            stayed = {} if over else {k: each.value for k, each in told.items() if not each.stored}
            stayed = {key: value for key, value in stayed.items() if key not in unreadable}
            now = max((value.fetched_at for value in stayed.values()), default=0.0)
            _, outdated = await self.judged(stayed, (), now)
            over = unreadable | {k: each.version for k, each in stayed.items() if k in outdated}
            rest = list(over)
        if heard:
            await self._server.barrier()
        return told

    async def _offer(
        self, value: Value, policy: FreshnessPolicy | None, flags: str, token: str, over: str | None
    ) -> bytes:
        """Return what the script is given to offer a value; raises if it cannot be encoded."""
        rests_on = [(key.canonical, version) for key, version in value.dependency_versions.items()]
        try:
            if codec.is_large(value.value):
                payload = await threads_of_context().run(
                    self._codec.encode, value.value, label="encode", or_here=True
                )
            else:
                payload = self._codec.encode(value.value)
            metadata = self._codec.encode(dict(value.metadata)) if value.metadata else b""
        except UnstorableValueError:
            self._unstorable += 1
            raise
        known, reason = (value.source, value.latency_ms, value.attempts, value.authority_rank), ""
        try:
            version = value.version.encode()
            data = _encode((self._form, *known, payload, metadata, rests_on))
        except UnicodeEncodeError:
            reason = "its source or a version has half a surrogate pair, which no encoding has"
        except OverflowError:
            reason = "its authority rank or its attempts take more than 64 bits"
        else:
            if len(data) > self._most_bytes:
                most = f"max_value_bytes is {self._most_bytes:,}"
                reason = f"it takes {len(data):,} bytes, and {most}"
            elif len(version) > _MOST_VERSION_BYTES:
                reason = f"its version takes more than {_MOST_VERSION_BYTES} bytes"
        if reason:
            self._unstorable += 1
            raise UnstorableValueError(qualified_type(value.value), "value", reason)
        if value.observed_at == value.fetched_at:
            flags += "u"
        parts = [_bytes(over or ""), version, value.key.canonical.encode()]
        head = (
            f"{token} {flags or '-'} {int(value.authority_rank)} "
            f"{_plain(value.observed_at)} {int(value.attempts)} {_plain(value.latency_ms)} "
            f"{self._lifetime_ms(value, policy)} "
            f"{' '.join(str(len(part)) for part in parts)}\n"
        )
        return b"".join((head.encode(), *parts, data))

    def _lifetime_ms(self, value: Value, policy: FreshnessPolicy | None) -> int:
        """Return for how long the value may be of use to anybody."""
        if policy is None:
            return self._longest_ms
        age = max(0.0, value.fetched_at - value.observed_at)
        left = min(policy.max_stale_seconds - age, self._longest_ms / 1000)
        return max(1, int(left * 1000) + 1)

    async def _write(
        self, offered: Mapping[ResourceKey, Value], items: Mapping[ResourceKey, bytes]
    ) -> tuple[dict[ResourceKey, CacheWriteResult | Exception], int, dict[ResourceKey, str]]:
        """Offer values; return what became of each, and how many others were told.

        And the versions of what cannot be read, and has stayed nevertheless.
        """
        versions = [value.version for value in offered.values()]
        # Who writes knows what he wrote, unless he does not know whether he did.
        self._own.update(dict.fromkeys(versions))
        while len(self._own) > _MOST_OWN:
            self._own.popitem(last=False)
        try:
            moment, answers = await self._timed(scripts.WRITE, items.items(), self._channel)
        except BaseException:
            for version in versions:
                self._own.pop(version, None)
            raise
        results: dict[ResourceKey, CacheWriteResult | Exception] = {}
        heard, unreadable, pace = 0, dict[ResourceKey, str](), Pace()
        for key, told in zip(items, answers, strict=True):
            await pace.keep()
            value = offered[key]
            if isinstance(told, Exception):
                error = SharedCacheUnavailableError(
                    f"{key.display} was not stored: {explained(told)}"
                )
                error.__cause__ = told
                results[key] = error
                continue
            entry = await self._entry(key, told, moment, value.fetched_at)
            status = CacheWriteStatus(entry.state)
            if status is _STORED:
                heard += entry.number
                results[key] = CacheWriteResult(status, value, entry.value)
            else:
                results[key] = CacheWriteResult(status, entry.value or value, entry.value)
                if entry.value is None and entry.version:
                    unreadable[key] = entry.version
        return results, heard, unreadable

    # Removing ---------------------------------------------------------------------------------

    async def invalidate(self, key: ResourceKey) -> None:
        """Remove what there is for ``key``."""
        await self.invalidate_many((key,))

    async def invalidate_many(self, keys: Collection[ResourceKey]) -> None:
        """Remove what there is for ``keys``, and end their leases.

        When this returns, everybody who hears the news of the server can have heard of it.
        """
        await self._open()
        if every := tuple(keys):
            told = ((key, key.canonical) for key in every)
            answers = await self._told(scripts.INVALIDATE, told, self._channel)
            if sum(_all(answers, "not invalidated")):
                await self._server.barrier()

    async def clear(self) -> None:
        """Remove everything under its prefix, whoever stored it."""
        await self._open()
        names = iter(await self._server.names_of(f"{scripts.head_of(self._prefix)}*"))
        while some := tuple(islice(names, _NAMES_IN_ONE_CALL)):
            calls = [Call(part, ()) for part in self._portions(some)]
            _all(await self._server.run(scripts.UNLINK, calls), "not invalidated")
        await self._server.command("PUBLISH", self._channel, scripts.CLEARED + b"000")
        await self._server.barrier()

    def _behind(self, work: Awaitable[Any]) -> None:
        """Do something that nobody waits for, and that may fail."""
        look_after(asyncio.ensure_future(work), self._tasks)  # failures count where they are raised


@dataclasses.dataclass(eq=False)
class _Question:
    """One call of `RedisCache.lease_many`: what it asks, what it knows, and hears of its keys.

    Attributes:
        ahead: by how much the clock of who asks is ahead of the monotonic one.
        in_need: what is stored for keys that it waits for, though it was not good enough.
        parked: the keys that are being acquired by others, while it waits for news of these.
    """

    cache: RedisCache
    ahead: float
    policies: Policies
    mode: str
    unlike: Mapping[ResourceKey, str]
    parked: Mapping[ResourceKey, Any] = dataclasses.field(default_factory=dict)
    in_need: dict[ResourceKey, CacheLookup] = dataclasses.field(default_factory=dict)
    _news: dict[ResourceKey, bytes] = dataclasses.field(default_factory=dict)
    _woken: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    _unfit: dict[ResourceKey, str] = dataclasses.field(default_factory=dict)
    _left: dict[ResourceKey, float] = dataclasses.field(default_factory=dict)
    _rounds: int = 0

    def hear(self, key: ResourceKey, letter: bytes) -> None:
        """Take note of the news of a key; what is stored when all was in vain is stale."""
        if (self._news.get(key), letter) != (scripts.FAILED, scripts.STORED):
            self._news[key] = letter
        self._woken.set()

    async def news_of(self, keys: Mapping[ResourceKey, Any]) -> dict[ResourceKey, bytes]:
        """Return the news of `keys` as soon as there are some; none when it is time to look."""
        patience = min(_LOOK_AGAIN_SECONDS, *self._left.values()) + 0.01
        self.parked = keys
        try:
            with CutOff(asyncio.get_running_loop().time() + patience):
                while not (told := keys.keys() & self._news.keys()):
                    self._woken.clear()
                    await self._woken.wait()
        except CutOffExpired:
            told = set()
        finally:
            self.parked = {}
        return {key: self._news.pop(key) for key in told}

    async def put(self, keys: Collection[ResourceKey]) -> dict[ResourceKey, LeasedLookup]:
        """Ask for keys; return those that need no waiting, and what derived ones rest on."""
        known: dict[ResourceKey, LeasedLookup] = {}
        self._rounds = 0
        while keys:
            self._rounds += 1
            token = os.urandom(12).hex()
            try:
                keys = await self._put(keys, token, known)
            except BaseException:
                # What was leased on the way has reached nobody.
                leases = [each.lease for each in known.values() if each.lease is not None]
                leases += [Lease(key, token) for key in keys]
                self.cache.let_go(leases)
                raise
        return known

    async def _put(
        self, keys: Collection[ResourceKey], token: str, known: dict[ResourceKey, LeasedLookup]
    ) -> list[ResourceKey]:
        """Ask once; enter what needs no waiting, and return what has to be asked once more."""
        now, ages = self.ahead + time.monotonic(), dict[ResourceKey, float]()
        for key in keys:
            self._news.pop(key, None)
            self._left.pop(key, None)
            # Up to which age a reader takes what is stored, and nobody needs acquire it.
            policy = self.policies[key]
            takes_stale = policy.refresh_mode is RefreshMode.STALE_WHILE_REVALIDATE
            ages[key] = policy.max_stale_seconds if takes_stale else policy.ttl_seconds
        found = await self.cache.ask(ages, now, self.mode, {**self.unlike, **self._unfit}, token)
        values = {
            key: entry.value
            for key, entry in found.items()
            if entry.value is not None and entry.version != self._unfit.get(key)
        }
        complete, outdated = await self.cache.judged(values, keys, now)
        again: list[ResourceKey] = []
        for key, entry in found.items():
            fit = key in values and key not in outdated
            if entry.state == _HIT and key in self._news and self._rounds < _MOST_ROUNDS:
                again.append(key)  # it may have changed since
                continue
            if not fit and entry.version is not None and self._unfit.get(key) != entry.version:
                self._unfit[key] = entry.version
                if entry.state == _HIT and self.mode != _FORCE:
                    again.append(key)
                    continue
            lookup = lookup_of(values[key] if fit else None, now, self.policies[key])
            lease = None
            if entry.state == _WAIT:
                self._left[key], self.in_need[key] = entry.number / 1000, lookup
            elif entry.state == _LEASED:
                replaces = entry.version if entry.version == self._unfit.get(key) else None
                lease = self.cache.leased(key, token, replaces)
            known[key] = LeasedLookup(lookup, lease, waiting=entry.state == _WAIT)
        for key in complete.keys() - found.keys() - outdated - known.keys():
            known[key] = LeasedLookup(CacheLookup(complete[key], False, False), None)
        return again


def _all(answers: list[Any], failed: str) -> list[Any]:
    """Return answers; raises if there is an error among them."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise SharedCacheUnavailableError(f"{failed}: {explained(answer)}") from answer
    return answers


def _plain(seconds: float) -> str:
    """Return a number as the server reads it, whatever its class calls itself, as numpy's do."""
    return repr(float(seconds))


def _bytes(text: str) -> bytes:
    """Return a text as bytes; a version may be damaged."""
    return text.encode(errors="surrogateescape")


def _milliseconds(name: str, seconds: float) -> int:
    """Return a time as the server counts it, if that can have it."""
    return int(number(name, seconds, minimum=0.001, maximum=_LONGEST_SECONDS) * 1000)
