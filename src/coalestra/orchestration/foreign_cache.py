"""Reads and writes of a cache that has to be awaited, grouped by the step in which they are asked.

Laws:

1. A read ends for each who waits: with what the cache held, or with nothing if it failed, took too
   long, or was overtaken by an invalidation. Who has a deadline gives it half of the time left.
2. A value is not held back by a cache that takes its time to store it: it is given to those who
   wait, and counts as held from then on.
3. A read is shared by all who ask until there is news of any key: what a derived entry rests on is
   not known before it has been read.
4. Where the cache gives leases, a read ends with a value, or with the lease for the flight that
   follows; in between it waits, for as long as its readers do. What was acquired without a lease is
   given to those who wait and stored nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from coalestra._endings import look_after
from coalestra.cache.access import Answer, Outcomes, Terms
from coalestra.cache.store import best_per_key, decide
from coalestra.concurrency.pace import portions
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.protocols import Lease
from coalestra.core.trace import WaitReason
from coalestra.core.values import CacheWriteStatus, Revision
from coalestra.orchestration.flights import Flight, Gather, Parts, Read, ReadGroup, Work

_STORED = CacheWriteStatus.STORED
SHARE = 0.5
"""How much of the time that a reader has left the cache may take."""
_QUICK_SECONDS = 0.01
"""What a cache that has stored within so long says of the write order is waited for."""
_STEPS_OF_GRACE = 16
"""So often the loop goes round besides: a busy one may be late, and the cache not slow at all."""
_ANSWERS_BETWEEN_LOOKS = 32
_ANSWERS_AT_ONCE = 1_024


@dataclass(eq=False, repr=False)
class CacheReads:
    """Carries questions to the cache in groups, and each answer to everyone who asked.

    `answered` is called with each read and what the cache held.
    """

    parts: Parts
    answered: Callable[[Read, Revision | None], None]
    tasks: set[asyncio.Task[Any]]
    _open: dict[ResourceKey, Read] = field(default_factory=dict)
    _next: dict[bool, ReadGroup] = field(default_factory=dict)
    _groups: dict[ReadGroup, None] = field(default_factory=dict)

    def ask(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> Read:
        """Let `gather` wait for what the cache holds of `key`; return the read to wait for."""
        read = self._open.get(key)
        if read is None:
            read = self._open[key] = self._begin(key, policy, forced=False)
        read.policy = policy  # which may be another one by now
        self._wait(gather, read)
        group = read.group
        if gather.cutoff != math.inf and gather not in group.hurried:
            # It goes on without the cache while there is time left for its sources.
            loop = asyncio.get_running_loop()
            seconds = (gather.cutoff - loop.time()) * SHARE
            group.hurried[gather] = loop.call_later(seconds, self._go_on, gather, group)
        return read

    def ask_for_lease(
        self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy, unlike: str | None
    ) -> None:
        """Let `gather` wait for the lease on `key`, or a value of another version than `unlike`.

        Without a version it is the lease that has to be got.
        """
        read = self._begin(key, policy, forced=unlike is None)
        read.unlike = unlike
        self._wait(gather, read)

    def _begin(self, key: ResourceKey, policy: FreshnessPolicy, forced: bool) -> Read:
        group = self._next.get(forced)
        if group is None:
            group = self._next[forced] = ReadGroup(forced)
            self._groups[group] = None
            asyncio.get_running_loop().call_soon(self._send, group)
        read = Read(key, policy, group)
        group.reads.append(read)
        return read

    @staticmethod
    def _wait(gather: Gather, read: Read) -> None:
        read.waiters[gather] = None
        gather.pending[read] = None
        if gather.logs and read.key in gather.logs:
            gather.logs[read.key].waits.begin(WaitReason.CACHE)

    def find(self, key: ResourceKey) -> Read | None:
        """Return the read of `key` that newcomers would share."""
        return self._open.get(key)

    def leave(self, gather: Gather, read: Read) -> None:
        """Let `gather` wait no longer; a group of reads that nobody waits for is given up."""
        gather.pending.pop(read, None)
        read.waiters.pop(gather, None)
        if not read.waiters and read.group.task is not None and not read.group.liveness.alive:
            self._close(read.group.reads)
            read.group.task.cancel()

    def hide(self, changes: Mapping[ResourceKey, Revision | None]) -> None:
        """Keep newcomers from sharing reads that began before news of some keys."""
        self._open.clear()
        for group in self._groups:
            group.changed.update(changes)

    def part_with(self, key: ResourceKey) -> None:
        """Keep newcomers from sharing a read that began before the latest value of a key."""
        self._open.pop(key, None)

    def _go_on(self, gather: Gather, group: ReadGroup) -> None:
        for read in group.reads:
            if gather in read.waiters and not read.waits:
                self.parts.copies.count_timeouts(read.key in self.parts.access.copying)
                del read.waiters[gather], gather.pending[read]
                alone = Read(read.key, read.policy, group)
                alone.waiters[gather] = None
                alone.flight, alone.given_up = read.flight, True
                self.answered(alone, None)

    def _send(self, group: ReadGroup) -> None:
        """Send what is asked by now, once who was the first to ask has asked for everything.

        So what was written together is seen together; of very much, only what goes in one call.
        """
        waits = any(gather.open for read in group.reads[:1] for gather in read.waiters)
        if waits and len(group.reads) < _ANSWERS_AT_ONCE:
            asyncio.get_running_loop().call_soon(self._send, group)
            return
        del self._next[group.forced]
        work = self._read(group)
        task = asyncio.get_running_loop().create_task(work, name="coalestra cache read")
        group.task = task
        look_after(task, self.tasks)
        task.add_done_callback(partial(self._done, group))

    async def _read(self, group: ReadGroup) -> None:
        """Ask the cache, and pass on what it answers as soon as it does."""
        reads: dict[ResourceKey, list[Read]] = defaultdict(list)
        for read in group.reads:
            if read.waiters:
                reads[read.key].append(read)
        self._close(read for read in group.reads if not read.waiters)
        if not reads:
            return
        access, now = self.parts.access, self.parts.clock.now()
        if access.calls.carries_many:
            for work in {gather.work for read in group.reads for gather in read.waiters}:
                work.record.cache_batch_reads += 1
        policies = {key: same[-1].policy for key, same in reads.items()}
        unlike = {read.key: read.unlike for read in group.reads if read.unlike is not None}
        if not self.parts.access.leases:
            found = await access.read(policies, now, policies)
            for keys in portions(policies, _ANSWERS_AT_ONCE):
                await self._pass_on(group, reads, {key: Answer(found.get(key)) for key in keys})
            return
        asking = access.lease(policies, now, policies, force=group.forced, unlike=unlike)
        async with contextlib.aclosing(asking):
            async for answers in asking:
                await self._pass_on(group, reads, dict(answers))

    async def _pass_on(
        self,
        group: ReadGroup,
        reads: Mapping[ResourceKey, list[Read]],
        rest: dict[ResourceKey, Answer],
    ) -> None:
        """Answer the reads of a group in portions; leases that reach nobody are given back."""
        pace = self.parts.pace
        pace.begin()
        try:
            while rest:
                for key in tuple(islice(rest, _ANSWERS_BETWEEN_LOOKS)):
                    self._take(group, reads.get(key, ()), rest.pop(key))
                await pace.keep()
        finally:
            for answer in rest.values():
                self.parts.access.give_back(answer.lease, failed=False)

    def _take(self, group: ReadGroup, reads: Iterable[Read], answer: Answer) -> None:
        """Answer all reads of one key; the lease goes to the first that has use for it.

        Who gives leases knows himself whether a value has been invalidated meanwhile.
        """
        lease = answer.lease
        for read in reads:
            if answer.waiting:
                read.cached, read.waits = answer.revision, True
                continue
            self._close((read,))
            if read.waiters:
                read.lease = lease
                gone = not self.parts.access.leases and group.changed.get(read.key, read) is None
                self.answered(read, None if gone else answer.revision)
                lease, read.lease = read.lease, None
        self.parts.access.give_back(lease, failed=False)

    def _done(self, group: ReadGroup, _task: asyncio.Task[None]) -> None:
        """Answer everyone who still waits, however the reading ended."""
        self._groups.pop(group, None)
        self._close(group.reads)
        for timer in group.hurried.values():
            timer.cancel()
        for read in group.reads:
            if read.waiters:
                self.answered(read, None)
        group.reads.clear()  # which lead back to it, and would keep all that was read alive
        group.task = None  # as does what it was cancelled with

    def _close(self, reads: Iterable[Read]) -> None:
        """Keep newcomers from sharing reads that are over, or will not be made."""
        for read in reads:
            if self._open.get(read.key) is read:
                del self._open[read.key]

    def __repr__(self) -> str:
        return f"<CacheReads open={len(self._open)}>"


@dataclass(eq=False, repr=False)
class CacheWrites:
    """Carries the values of flights to the cache in groups.

    `written` settles a flight by what became of its value, as soon as that is known. If the cache
    is not quick, the flight is settled with its value and that counts as held from then on; only a
    forced one waits where ranks differ, as what the cache holds has not been looked at. `fit` says
    whether the value of a flight may still be written, and settles the flight if not.
    """

    parts: Parts
    fit: Callable[[Flight], bool]
    written: Callable[[Flight, CacheWriteStatus, Revision], None]
    _slow: bool = False
    _now: float = math.nan
    _next: dict[Revision, Flight] = field(default_factory=dict)
    _held: dict[Revision, Lease] = field(default_factory=dict)
    _writers: set[Work] = field(default_factory=set)

    def add(self, flight: Flight, revision: Revision) -> None:
        """Write the value that a flight offers, together with the others of this step."""
        access = self.parts.access
        if flight.lease is None and access.leases:
            self._settle(flight, revision, alone=True)
            return
        if not self._next:
            self._now = self.parts.clock.now()  # which may raise, and later nobody would be told
            asyncio.get_running_loop().call_soon(self._send)
        if access.calls.carries_many and flight.sponsor not in self._writers:
            self._writers.add(flight.sponsor)
            flight.sponsor.record.cache_batch_writes += 1
        self._next[revision] = flight
        if flight.lease is not None:
            # From here on it is the write's: a flight that is settled gives its own back.
            self._held[revision], flight.lease = flight.lease, None
        if self._slow:
            self._settle(flight, revision)

    def add_stale(self, flight: Flight, revision: Revision) -> None:
        """Write a stale value, for which nobody waits."""
        access, now = self.parts.access, self.parts.clock.now()
        if flight.lease is None and access.leases:
            return
        if access.hold(revision, now)[0] is _STORED:
            leases = {} if flight.lease is None else {revision.key: flight.lease}
            terms = Terms({revision.key: flight.policy}, now, leases=leases or None)
            flight.lease = None  # it is the write's
            access.write_behind((revision,), terms, wanted=access.holds)

    def _send(self) -> None:
        loop, access = asyncio.get_running_loop(), self.parts.access
        group, held = self._next, self._held
        self._next, self._held, self._writers = {}, {}, set()
        for forced in (False, True):
            part = {offered: each for offered, each in group.items() if each.forced is forced}
            if part:
                best = best_per_key(part).values() if held else ()
                leases = {each.key: held.pop(each) for each in best if each in held}
                terms = Terms(
                    {flight.key: flight.policy for flight in part.values()},
                    self._now,
                    replace_equal=forced,
                    leases=leases if access.leases else None,
                )
                timer = loop.call_later(_QUICK_SECONDS, self._overdue, part)
                access.write_behind(
                    part,
                    terms,
                    wanted=partial(self._wanted, part),
                    ended=partial(self._ended, part, timer),
                )
        for lease in held.values():  # of another value of the same key, which gives way
            access.give_back(lease, failed=False)

    def _wanted(self, part: Mapping[Revision, Flight], revision: Revision) -> bool:
        flight = part[revision]
        settled = flight.settlement is not None
        return self.parts.access.holds(revision) if settled else self.fit(flight)

    def _overdue(self, part: Mapping[Revision, Flight], grace: int = _STEPS_OF_GRACE) -> None:
        late = [each for each in part.items() if each[1].settlement is None]
        if late and grace:
            asyncio.get_running_loop().call_soon(self._overdue, part, grace - 1)
            return
        self._slow |= bool(late)
        for revision, flight in late:
            if flight.settlement is None and self.fit(flight):
                self._settle(flight, revision)

    def _settle(self, flight: Flight, revision: Revision, *, alone: bool = False) -> None:
        """Settle a flight whose value has not been written, if nothing else can be known of it.

        What is got ``alone``, without a lease, is not going to be.
        """
        cached, equal = flight.cached, flight.forced
        if equal and not alone and getattr(self.parts.authority, "has_rules", True):
            return
        status, current = _STORED, revision
        if cached is not None and not cached.dependency_versions:
            status = decide(revision, cached, replace_equal=equal)
        if cached is not None and status is not _STORED:
            current = cached
        elif not alone:
            now = self.parts.clock.now()
            status, current, _ = self.parts.access.hold(revision, now, replace_equal=equal)
        self.written(flight, status, current)

    def _ended(
        self, part: Mapping[Revision, Flight], timer: asyncio.TimerHandle, outcomes: Outcomes
    ) -> None:
        """Settle those flights that are not settled yet, whatever became of the writing."""
        self._slow = self._slow and timer.when() <= asyncio.get_running_loop().time()
        timer.cancel()
        for revision, flight in part.items():
            if flight.settlement is None:
                status, current, _ = outcomes.get(flight.key, (_STORED, revision, None))
                self.written(flight, status, current)

    def __repr__(self) -> str:
        return f"<CacheWrites waiting={len(self._next)} slow={self._slow}>"
