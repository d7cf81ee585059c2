"""One cache, as the library uses it: the own one in memory, or any that has to be awaited.

The first is used through its entry store. The other is an edge where values are copied. Its laws,
beside those of the calls to it:

1. Writes and invalidations of one key run one after the other, in the order they were asked for,
   among all users of the cache object on one event loop.
2. A value on its way into the cache counts as held, for all of them. A later revision or an
   invalidation ends that, and then it is not written any more.
3. What is held is judged as in the memory cache: the write order, the tolerated future, and for
   what is derived the revisions held now. A mismatch is a miss, whoever should have seen it.
4. While others may have changed something unheard, only what the cache says counts as held.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Mapping,
)
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

from coalestra.cache.calls import CacheCalls, Failures, Found, Policies, has, is_sound, sound
from coalestra.cache.memory import AsyncMemoryCache, let_go, open_value, revision_of, seal_value
from coalestra.cache.near import Channel, Filling, channel_of
from coalestra.cache.store import (
    EntryStore,
    Listeners,
    Outcome,
    best_per_key,
    decide,
    future_tolerance,
    outdated_among,
    with_all_below,
)
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.core.errors import CacheCircuitOpenError, CacheTimeoutError, without_frames
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import ObservationPolicy
from coalestra.core.protocols import AsyncCache, Lease, LeasedLookup
from coalestra.core.values import CacheWriteResult, CacheWriteStatus, Revision, SnapshotValue
from coalestra.observability import ChangeLog

_STORED = CacheWriteStatus.STORED
_READ = "cache read"
_WRITE = "cache write"

_T = TypeVar("_T")

Outcomes = dict[ResourceKey, Outcome]


class Terms(NamedTuple):
    """On which terms revisions are offered, at ``now`` by the wall clock.

    Who ``insists`` wants to know what was there before, and what failed. With ``leases``, there is
    one for each key.
    """

    policies: Policies
    now: float
    force: bool = False
    replace_equal: bool = False
    insist: bool = False
    leases: Mapping[ResourceKey, Lease] | None = None


class Answer(NamedTuple):
    """What a leasing cache has for a key.

    Attributes:
        revision: what is stored, if anything; beside a lease, or while waiting, for use in need.
        lease: the lease on the key, for whoever acquires it.
        waiting: whether another answer follows, once somebody else has acquired it.
    """

    revision: Revision | None
    lease: Lease | None = None
    waiting: bool = False


class CacheAccess:
    """One cache, as the engine and the publisher use it.

    A subclass of `AsyncMemoryCache` has to be awaited, because it may have changed any method.

    Args:
        cache: the cache.
        copies: seal and open values at the edge of a cache that has to be awaited.
        max_pending_tasks: bounds the calls at a time to one with single-key methods only.
        observation: how far ahead of the clock what is held may be dated.
        failed: told of each failure that the library goes on without: the operation, the error.
        log: says when it begins to fail, and when it works again.

    Attributes:
        store: the entry store of the library's own memory cache, which is then used itself; else
            None, and all is read and written through here.
        subscribers: who hears of changes through this view, on any event loop; held weakly.
        leases: whether the cache says who is to acquire a key, and stores for him alone.
        copying: the keys of what has been read and is being copied in at this moment.
        tolerance: how many seconds ahead of the clock what is held may be dated.
    """

    def __init__(
        self,
        cache: AsyncCache,
        copies: PayloadCopies,
        max_pending_tasks: int,
        observation: ObservationPolicy,
        failed: Callable[[str, Exception], None] | None = None,
        log: ChangeLog | None = None,
    ) -> None:
        self.cache: AsyncCache = cache
        self.store: EntryStore | None = cache.store if type(cache) is AsyncMemoryCache else None
        self.subscribers: Listeners = Listeners() if self.store is None else self.store.listeners
        self.calls: CacheCalls = CacheCalls(cache, max_pending_tasks, failed, log)
        self.leases: bool = has(cache, "lease_many", "fulfil_many", "release_many")
        self.copies: PayloadCopies = copies
        self.copying: dict[ResourceKey, None] = {}
        self.tolerance: float = future_tolerance(observation)
        if self.store is not None:
            self.store.tolerate(self.tolerance)
        self._channel: Channel | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._giving_back: dict[Lease, bool] = {}

    def __repr__(self) -> str:
        return f"CacheAccess({self.calls if self.store is None else self.store!r})"

    def channel(self) -> Channel:
        """Return what all users of the cache share on the running event loop."""
        channel, loop = self._channel, asyncio.get_running_loop()
        if channel is None or channel.loop is not loop:
            if channel is not None:
                channel.listeners.unsubscribe(self.subscribers)
                self._tasks.clear()
                self._giving_back.clear()  # they end by themselves
            self._channel = channel = channel_of(self.cache, loop)
            channel.listeners.subscribe(self.subscribers)
            channel.store.tolerate(self.tolerance)
        return channel

    @property
    def near(self) -> EntryStore | None:
        """The entries that can be used without awaiting at this moment, if there are any."""
        return self.channel().trusted() if self.store is None else self.store

    def is_cut_off(self) -> bool:
        """Whether others may have changed something unheard; values on their way count for nothing.

        Not while the cache is left alone: nobody could be asked instead.
        """
        channel = self.channel()
        if not channel.is_behind or self.calls.is_left_alone:
            return False
        channel.on_their_way.clear()
        return True

    @property
    def listeners(self) -> Listeners:
        """Who hears of changes to the cache on the running event loop, which must be there."""
        return self.channel().listeners if self.store is None else self.subscribers

    def attach(self) -> None:
        """Be used on the running event loop; raises `RuntimeError` if the cache must not be."""
        if self.store is None:
            self.channel()
            check = getattr(self.cache, "check_usable", None)
            if callable(check):
                check()

    async def stats(self) -> Any | None:
        """Return what the cache says of itself; None if it says nothing, or fails to."""
        return await self.calls.stats() if self.store is None else self.store.stats()

    # Reading ------------------------------------------------------------------------------------

    async def read(
        self, keys: Collection[ResourceKey], now: float, policies: Policies
    ) -> dict[ResourceKey, Revision]:
        """Return the usable entries among ``keys``, in their order; never raises.

        Derived ones are joined to what they rest on, and left out if that is no longer current. The
        cache is rid of them, unless it should have left them out itself.
        """
        channel = self.channel()
        on_their_way = channel.on_their_way
        with channel.filling() as filling:
            waiting = channel.waiting
            known = {key: waiting[key] for key in keys if key in waiting}
            rest = [key for key in keys if key not in known]
            values = await self.calls.get(rest, now, policies, now + self.tolerance)
            known.update(await self.sealed(values))
            outdated = dict.fromkeys(await self.outdated(known, keys, now, self.sealed))
            kept = known.keys() - outdated.keys() - on_their_way.keys()
            channel.put(filling, [known[key] for key in known if key in kept])
        for key in outdated:
            if on_their_way.get(key) is known[key]:
                del on_their_way[key]
        held = {key: known[key] for key in outdated if key in values or key not in keys}
        if held and not self.calls.validates_dependencies:
            self._behind(self._remove_outdated(held, now))
        return {key: known[key] for key in keys if key in known and key not in outdated}

    async def outdated(
        self,
        known: dict[ResourceKey, Revision],
        absent: Iterable[ResourceKey],
        now: float,
        make: Callable[[Found], Awaitable[dict[ResourceKey, Revision]]],
    ) -> list[ResourceKey]:
        """Add to ``known`` all that it rests on, level by level; return what is outdated of it.

        What is ``absent`` and not known is not held.
        """
        on_their_way = self.channel().waiting

        async def held(keys: list[ResourceKey]) -> dict[ResourceKey, Revision]:
            found = {key: on_their_way[key] for key in keys if key in on_their_way}
            rest = [key for key in keys if key not in found]
            return found | await make(await self.calls.held(rest, now))

        known.update(await with_all_below(known, absent, held))
        return outdated_among(known)

    async def _remove_outdated(self, outdated: Mapping[ResourceKey, Revision], now: float) -> None:
        """Remove entries found outdated, unless they have been replaced in the meantime."""
        async with self.channel().lanes.turn(outdated):
            held = await self.calls.held(tuple(outdated), now)
            same = [key for key, value in held.items() if value.version == outdated[key].version]
            self.calls.tell("invalidate", await self.calls.remove(same, insist=False))

    async def sealed(self, values: Found) -> dict[ResourceKey, Revision]:
        """Copy values in; one that cannot be copied is told and left out."""
        revisions: dict[ResourceKey, Revision] = {}
        pace = self.calls.pace
        pace.begin()
        for key, value in values.items():
            self.copying[key] = None
            try:
                revisions[key] = await seal_value(self.copies, value, _READ)
            except Exception as error:
                self.calls.tell("read", {key: error})
            finally:
                self.copying.pop(key, None)
            await pace.keep()
        return revisions

    # Leases -------------------------------------------------------------------------------------

    async def lease(
        self,
        keys: Collection[ResourceKey],
        now: float,
        policies: Policies,
        *,
        force: bool = False,
        unlike: Mapping[ResourceKey, str] | None = None,
    ) -> AsyncGenerator[Mapping[ResourceKey, Answer], None]:
        """Give what there is for each key, or the lease on it, as it becomes known; never raises.

        ``force`` asks for leases in any case; versions ``unlike`` these are of no use.
        """
        channel = self.channel()
        ahead = now - channel.loop.time()  # it may take long
        rest = dict.fromkeys(keys)
        if not (force or unlike):
            waiting = channel.waiting
            on_their_way = [waiting.get(key) for key in keys]
            # What a derived one rests on may have changed: it is judged once it is there.
            held = [each for each in on_their_way if each and not each.dependency_versions]
            for each in held:
                del rest[each.key]
            yield {each.key: Answer(each) for each in held}
        unlike = unlike or {}
        while rest:
            unfit = dict(unlike)
            moment = ahead + channel.loop.time()
            asking = self._leased(rest, moment, policies, force, unfit)
            async with contextlib.aclosing(asking):
                async for answers in asking:
                    yield answers
            unlike, force = dict(unfit.items() - unlike.items()), False
            rest = dict.fromkeys(unlike)

    async def _leased(
        self,
        rest: dict[ResourceKey, None],
        now: float,
        policies: Policies,
        force: bool,
        unfit: dict[ResourceKey, str],
    ) -> AsyncGenerator[Mapping[ResourceKey, Answer], None]:
        """Give what the cache answers for the ``rest`` of the keys.

        What has come and is of no use is added to ``unfit``, to be asked for again.
        """
        channel = self.channel()
        ahead = now - channel.loop.time()
        arrived, gone = list[Mapping[ResourceKey, LeasedLookup]](), False

        async def next_part() -> Mapping[ResourceKey, LeasedLookup] | None:
            part = await anext(asking, None)  # which may come when nobody waits any more
            if part is not None:
                arrived.append(part)
            if gone:
                self._give_back_all_of(arrived)
            return part

        with channel.filling() as filling:
            try:
                asking = self.calls.cache.lease_many(
                    tuple(rest), now=now, policies=policies, force=force, unlike=dict(unfit) or None
                )
                first = True
                while rest:
                    part = await self.calls.once("lease_many", next_part, patient=not first)
                    if part is None:
                        break
                    first = False
                    moment = ahead + channel.loop.time()
                    answers = await self._answers(part, rest, unfit, moment, filling)
                    arrived.clear()
                    for key in part:
                        if key not in answers or not answers[key].waiting:
                            rest.pop(key, None)
                    yield answers
            except Exception as error:
                self.calls.tell("read", dict.fromkeys(rest, error))
            finally:
                gone = True
                self._give_back_all_of(arrived)
            if rest:
                yield dict.fromkeys(rest, Answer(None))

    async def _answers(
        self,
        part: Mapping[ResourceKey, LeasedLookup],
        asked: Collection[ResourceKey],
        unfit: dict[ResourceKey, str],
        now: float,
        filling: Filling,
    ) -> dict[ResourceKey, Answer]:
        """Seal what a leasing cache gave, join what is derived, and keep what is current.

        What the cache takes for good, and nobody can use, is left out and entered as `unfit`; who
        has the lease replaces it.
        """
        values: Found = {}
        horizon = now + self.tolerance
        for key, told in part.items():
            try:
                value = told.lookup.value
                if value is not None and sound(value, key).observed_at <= horizon:
                    values[key] = value
            except Exception as error:
                self.calls.tell("read", {key: error})
        revisions = await self.sealed(values)
        for key in outdated_among(revisions):
            del revisions[key]
        kept = [k for k in revisions if not part[k].waiting and part[k].lease is None]
        self.channel().put(filling, [revisions[key] for key in kept])
        answers: dict[ResourceKey, Answer] = {}
        for key, told in part.items():
            if key not in asked:
                continue
            value = told.lookup.value
            if key not in revisions and isinstance(value, SnapshotValue):
                if told.lease is not None:
                    told.lease.replaces = value.version
                elif not told.waiting and unfit.get(key) != value.version:
                    unfit[key] = value.version
                    continue
            answers[key] = Answer(revisions.get(key), told.lease, told.waiting)
        return answers

    def give_back(self, lease: Lease | None, *, failed: bool) -> None:
        """Let go of a lease, if there is one, without a value; ``failed`` if tried in vain."""
        if lease is not None:
            if not self._giving_back:
                loop = asyncio.get_running_loop()
                loop.call_soon(lambda: self._behind(self._give_back()))
            self._giving_back[lease] = failed

    def _give_back_all_of(self, parts: Iterable[Mapping[ResourceKey, LeasedLookup]]) -> None:
        for part in parts:
            for told in part.values() if isinstance(part, Mapping) else ():
                self.give_back(getattr(told, "lease", None), failed=False)

    def _give_back(self) -> Coroutine[Any, Any, None]:
        """Take what is to be given back, here and now; who does it may be cancelled before."""
        given, self._giving_back = self._giving_back, {}
        return self._release(given)

    async def _release(self, given: Mapping[Lease, bool]) -> None:
        for failed in (False, True):
            leases = [lease for lease, value in given.items() if value is failed]
            if leases:
                try:
                    release = partial(self.calls.cache.release_many, leases, failed=failed)
                    await self.calls.once("release_many", release, insist=True)
                except Exception as error:
                    self.calls.tell("write", {leases[0].key: error})

    # Writing ------------------------------------------------------------------------------------

    def raise_first(self, failures: Failures) -> None:
        """Raise the first of the failures of what an application asked for; tell of the others.

        They are let go, as the traceback leads to whoever has them.
        """
        first = next(iter(failures.values()), None)
        self.calls.tell("write", {k: each for k, each in failures.items() if each is not first})
        failures.clear()
        if first is not None:
            try:
                raise first
            finally:
                del first

    def holds(self, revision: Revision) -> bool:
        """Whether a value on its way still counts as held."""
        return self.channel().on_their_way.get(revision.key) is revision

    def hold(self, revision: Revision, now: float, *, replace_equal: bool = False) -> Outcome:
        """Let a value that is being written behind count as held from now on.

        One that may not replace what is on its way already does not count. What is derived gives
        way there: it may be outdated, and is then to defend nothing.
        """
        channel = self.channel()
        current = channel.on_their_way.get(revision.key)
        if current is not None and not current.dependency_versions:
            horizon = now + self.tolerance
            status = decide(revision, current, replace_equal=replace_equal, horizon=horizon)
            if status is not _STORED:
                return status, current, current
        channel.on_their_way[revision.key] = revision
        channel.drop({revision.key: revision.version})
        channel.listeners.revised({revision.key: revision}, self.subscribers)
        return _STORED, revision, current

    def write_behind(
        self,
        revisions: Collection[Revision],
        terms: Terms,
        *,
        wanted: Callable[[Revision], bool],
        ended: Callable[[Outcomes], object] = lambda _: None,
    ) -> None:
        """Offer values to the cache, those still ``wanted`` when their turn has come.

        Failures are told. ``ended`` learns the outcomes, whatever happens.
        """

        def done(task: asyncio.Task[tuple[Outcomes, Failures]]) -> None:
            outcomes: Outcomes = {}
            if not task.cancelled() and task.exception() is None:
                outcomes, failures = task.result()
                self.calls.tell("write", failures)
            for revision in revisions:
                if channel.on_their_way.get(revision.key) is revision:
                    del channel.on_their_way[revision.key]
            ended(outcomes)

        channel = self.channel()
        self._behind(self.write(best_per_key(revisions), terms, wanted)).add_done_callback(done)

    async def write(
        self,
        revisions: Mapping[ResourceKey, Revision],
        terms: Terms,
        wanted: Callable[[Revision], bool] = lambda _: True,
    ) -> tuple[Outcomes, Failures]:
        """Offer values in their turn; return what became of each, and the failures."""
        channel = self.channel()
        asked = channel.loop.time()
        if self._giving_back and terms.leases is None:
            # Or nobody would be told that those were in vain; who waits for it may leave.
            await asyncio.wait((self._behind(self._give_back()),))
        # A cache may refuse what rests on something that it does not hold yet.
        below = {key for each in revisions.values() for key in each.dependency_versions}
        async with channel.lanes.turn(revisions, below):
            offered = {key: each for key, each in revisions.items() if wanted(each)}
            insist = terms.insist and not self.calls.gave_up_since(asked)
            write, outcomes = _Write(self, offered, terms, insist), Outcomes()
            try:
                with channel.filling() as filling:
                    outcomes = await write.run()
                    await write.pace.keep()
                    teller = None if terms.insist else self.subscribers
                    self._tell(channel, offered, outcomes, teller)
                    channel.wrote(filling, outcomes.values())
            finally:  # who knows whether the others have been written
                channel.drop({key: None for key in offered if key not in outcomes})
        return outcomes, write.failures

    def _tell(
        self,
        channel: Channel,
        offered: Mapping[ResourceKey, Revision],
        outcomes: Outcomes,
        teller: Listeners | None,
    ) -> None:
        """Tell of what readers see now and did not see before.

        What was fetched is no news to the ``teller``, who has settled its flight.
        """
        changes: dict[ResourceKey, Revision | None] = {}
        known: dict[ResourceKey, Revision | None] = {}
        for key, (status, current, _) in outcomes.items():
            waiting = channel.on_their_way.get(key)
            was_held = waiting is offered[key]
            if (status is _STORED) is not was_held:
                (known if status is _STORED else changes)[key] = current
            if was_held or decide(current, waiting) is _STORED:
                channel.on_their_way.pop(key, None)
        if changes:
            channel.listeners.revised(changes)
        if known:
            channel.listeners.revised(known, teller)

    # Invalidating and ending --------------------------------------------------------------------

    async def invalidate(self, keys: Collection[ResourceKey]) -> Failures:
        """Remove ``keys``; return why some could not be.

        Listeners hear of it before the first await, and again afterwards.
        """
        if self.store is not None:
            await let_go(self.store.drop(keys))
            return {}
        gone = dict.fromkeys(keys)
        channel = self.channel()
        channel.invalidate(gone)
        asked = channel.loop.time()
        async with channel.lanes.turn(gone):
            try:
                insist = not self.calls.gave_up_since(asked)
                return await self.calls.remove(tuple(gone), insist=insist)
            finally:
                channel.drop(gone)
                channel.listeners.revised(gone)

    async def drain(self, timeout_seconds: float) -> None:
        """Wait until what is on its way is written, for so long at most; then give it up."""
        if self.store is None:
            self.channel()  # drops those of another loop
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_seconds
        await asyncio.sleep(0)  # for what is given back at this moment, as by writes that end
        while self._tasks and loop.time() < until:
            await asyncio.wait(self._tasks, timeout=until - loop.time())
        for task in tuple(self._tasks):
            task.cancel()

    def _behind(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.get_running_loop().create_task(work, name="coalestra cache write")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


@dataclass(eq=False)
class _Write:
    """One group of revisions on its way into the cache, whose lanes are held meanwhile.

    Attributes:
        failures: why keys could not be written.
    """

    cache: CacheAccess
    offered: Mapping[ResourceKey, Revision]
    terms: Terms
    insist: bool
    failures: Failures = field(default_factory=dict)
    values: Found = field(default_factory=dict)
    results: dict[ResourceKey, CacheWriteResult] = field(default_factory=dict)

    @property
    def pace(self) -> Pace:
        """The pace of all that goes on with the cache."""
        return self.cache.calls.pace

    async def run(self) -> Outcomes:
        """Write what may be written; return what became of all but the failures."""
        self.pace.begin()
        await self._open()
        if self.terms.leases is None:
            await self._compare()
        else:
            await self._fulfil(self.terms.leases)
        return await self._outcomes()

    async def _compare(self) -> None:
        """Offer values; where the cache cannot know the write order, have the last word."""
        terms, atomic = self.terms, self.cache.calls.is_atomic
        looked_at = [key for key in self.values if self._looks_first(self.offered[key])]
        held = await self.cache.calls.held(looked_at, terms.now)
        for key, current in held.items():
            await self.pace.keep()
            status = self._status(key, current)
            if status is not _STORED and not terms.force:
                self.results[key] = CacheWriteResult(status, current, current)
        rest = [key for key in self.values if key not in self.results]
        if atomic:
            for equal in (False, True):
                some = [key for key in rest if self._replaces_equal(self.offered[key]) is equal]
                await self._offer(some, force=terms.force, replace_equal=equal)
        else:
            await self._store(rest, held, insist=self.insist)
        again = set()
        for key, stayed in self._lost().items():
            await self.pace.keep()
            if stayed.version == self.values[key].version:  # a call that failed had stored it
                self.results[key] = CacheWriteResult(_STORED, stayed)
            elif self._status(key, stayed) is _STORED:
                again.add(key)
        again.update(await self._outdated())
        if atomic:
            await self._offer(again, force=True, replace_equal=True)
            await self._replace_unreadable()
        else:
            await self._store(again, held, insist=self.insist)

    async def _fulfil(self, leases: Mapping[ResourceKey, Lease]) -> None:
        """Store what was acquired under leases; give those back of what cannot be stored."""
        terms = self.terms
        for key, lease in leases.items():
            if key not in self.values:
                self.cache.give_back(lease, failed=key in self.failures)
        if not self.values:
            return
        offered = {leases[key]: value for key, value in self.values.items()}
        told: Mapping[ResourceKey, CacheWriteResult | Exception]
        try:
            fulfil = partial(
                self.cache.calls.cache.fulfil_many,
                offered,
                policies=terms.policies,
                replace_equal=terms.replace_equal,
            )
            told = await self.cache.calls.once("fulfil_many", fulfil, insist=True)
        except Exception as error:
            without_frames(error)
            told = dict.fromkeys(self.values, error)
        for key in self.values:
            result = told.get(key)
            if isinstance(result, CacheWriteResult):
                self.results[key] = result
            elif isinstance(result, Exception):
                self.failures[key] = result
        for key in await self._outdated():
            del self.results[key]  # what is outdated takes nobody's place

    async def _open(self) -> None:
        for key, revision in self.offered.items():
            try:
                self.values[key] = await open_value(self.cache.copies, revision, _WRITE)
            except Exception as error:
                without_frames(error)
                self.failures[key] = error
            await self.pace.keep()

    def _looks_first(self, revision: Revision) -> bool:
        """Whether the library compares before it offers a value.

        A cache that compares would take an undated fetch for as new as the end of its reading. One
        that knows better tells undated values by their equal times, which may be by chance.
        """
        if self.terms.force or not self.cache.calls.is_atomic:
            return not self.cache.calls.is_atomic
        if revision.dated:
            return revision.observed_at == revision.fetched_at
        return revision.attempts > 0 and not self.cache.calls.validates_order

    def _status(self, key: ResourceKey, current: SnapshotValue[Any]) -> CacheWriteStatus:
        equal, horizon = self.terms.replace_equal, self.terms.now + self.cache.tolerance
        return decide(self.offered[key], revision_of(current), replace_equal=equal, horizon=horizon)

    async def _store(self, keys: Iterable[ResourceKey], held: Found, *, insist: bool) -> None:
        values = {key: self.values[key] for key in keys}
        failed = await self.cache.calls.store(values, self.terms.policies, insist=insist)
        self.failures.update(failed)
        for key, value in values.items():
            await self.pace.keep()
            if key not in failed:
                self.results[key] = CacheWriteResult(_STORED, value, held.get(key))

    def _replaces_equal(self, revision: Revision) -> bool:
        by_arrival = not revision.attempts or not self.cache.calls.validates_order
        return self.terms.replace_equal or (not revision.dated and by_arrival)

    async def _offer(
        self, keys: Iterable[ResourceKey], *, force: bool, replace_equal: bool
    ) -> None:
        results, failed = await self.cache.calls.offer(
            {key: self.values[key] for key in keys},
            self.terms.policies,
            force=force,
            replace_equal=replace_equal,
            insist=self.insist,
        )
        self.results.update(results)
        self.failures.update(failed)

    async def _replace_unreadable(self) -> None:
        """Write over an entry that the cache cannot compare with as it cannot read it."""
        away = CacheTimeoutError, CacheCircuitOpenError
        tried = [
            key
            for key, error in self.failures.items()
            if key in self.values and not isinstance(error, away)
        ]
        readable = await self.cache.calls.held(tried, self.terms.now)
        unreadable = [key for key in tried if key not in readable]
        # Insisting, as all that could not be compared may have made the cache look dead.
        await self._store(unreadable, {}, insist=True)
        for key in unreadable:
            if key in self.results:
                del self.failures[key]

    def _lost(self) -> Found:
        """Return what has stayed in the cache, by key."""
        return {key: each.value for key, each in self.results.items() if not each.stored}

    async def _outdated(self) -> list[ResourceKey]:
        """Return where what stayed is outdated: it must not keep a newer revision out."""
        stayed = await _bare(self._lost())
        outdated = await self.cache.outdated(dict(stayed), (), self.terms.now, _bare)
        return [key for key in outdated if key in stayed]

    async def _outcomes(self) -> Outcomes:
        results, before = self.results, Found()
        for key, result in results.items() if self.insist else ():
            await self.pace.keep()
            if result.previous is not None and result.stored and is_sound(result.previous, key):
                before[key] = result.previous
        current = await self.cache.sealed(self._lost())
        for key in await self.cache.outdated(current, (), self.terms.now, self.cache.sealed):
            del current[key]
        replaced = await self.cache.sealed(before)
        for key in await self.cache.outdated(replaced, (), self.terms.now, self.cache.sealed):
            del replaced[key]
        outcomes: Outcomes = {}
        for key, result in results.items():
            await self.pace.keep()
            now_held = current.get(key, self.offered[key])
            was_held = replaced.get(key) if result.stored else now_held
            outcomes[key] = (result.status, now_held, was_held)
        return outcomes


async def _bare(values: Found) -> dict[ResourceKey, Revision]:
    """Return revisions that can only be compared."""
    revisions, pace = {}, Pace()
    for key, value in values.items():
        await pace.keep()
        revisions[key] = revision_of(value)
    return revisions
