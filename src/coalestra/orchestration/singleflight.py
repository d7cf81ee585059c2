"""Single flight: every key of a builder on its one way through cache and sources.

Laws:

1. A key has at most one flight to join. News of the key or of what it rests on, a newcomer while
   news may be missing, or a demand for a value read from now on, takes a flight that has begun out
   of sight; it then ends for its own waiters.
2. A flight waits for nothing but its own dependencies, and for them without a task, slot or frame.
3. A settled key reaches its waiters at once, whatever else they wait for.
4. What a waiter's deadline or cancellation ends is that waiter's waiting, nothing else.
5. Whatever is raised, by whomever, in whichever step: the flight or the waiter that the step was
   about is settled, once. `SingleFlight.broken` is where that is seen to.
6. A deadline ends its reader even if all of this is wrong: `Stage` is told by a timer of its own.
7. That there is no such thing is an answer as well. It is remembered for as long as its sources
   have said, gives way to any news of the key, and is never remembered of what is derived.

Everything here decides synchronously, on the event loop, in steps of one `Agenda`; what has to be
awaited (calls, an awaited cache, copies) is done elsewhere and reports back.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from coalestra._endings import PROGRAM_ENDS, pass_on
from coalestra.cache.store import Held, decide
from coalestra.concurrency.pace import Pace, at_once, portions
from coalestra.core.errors import (
    BuilderClosedError,
    DependencyCycleError,
    DependencyResolutionError,
    ResourceAbsent,
    ResourceResolutionError,
    SnapshotDeadlineExceededError,
    SourceFailure,
    SourceUnavailableError,
    described,
    folded_message,
    legible,
    message_of,
    type_name,
)
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, RefreshMode, policy_for, policy_of_all
from coalestra.core.protocols import Clock
from coalestra.core.snapshot import FetchContext
from coalestra.core.trace import Obtained, WaitReason
from coalestra.core.validation import flag, span
from coalestra.core.values import CacheWriteStatus, Revision, SnapshotValue, new_id, number_of
from coalestra.orchestration.calls import Call, Dispatch, Lane
from coalestra.orchestration.deliveries import Copies, Deliveries, WarmReads
from coalestra.orchestration.flights import (
    LOOK_SECONDS,
    Flight,
    FlightBoard,
    Fresh,
    Gather,
    Parts,
    Phase,
    Read,
    Work,
    absence_stands,
    after_failures,
    after_write,
    call_served,
    circle_of,
    doing,
    ended_late,
    instead_of_event,
    late,
    stale_candidate,
)
from coalestra.orchestration.foreign_cache import SHARE, CacheReads, CacheWrites
from coalestra.orchestration.readings import (
    NO_PINS,
    Demand,
    Failed,
    Failure,
    Pins,
    Reading,
    Settlement,
    View,
    at_odds,
    beneath,
    lineage,
    pin_all,
)
from coalestra.orchestration.sources import Link, SourceKind, dependencies_of

_STEPS_BETWEEN_LOOKS = 4
_KEYS_PER_STEP = 64
_KEYS_AT_ONCE = 1_024
_WAITERS_PER_STEP = 256
_MOST_READS = 8
"""How often a derivation asks an awaited cache for one key while news of it keeps coming."""
_MOST_NEWS = 10_000
"""How many keys news is remembered of while something is derived; then all of it is suspect."""
_MOST_ABSENT = 10_000
"""How many keys are remembered to be absent."""
_MOST_FAILING = 1_000
"""Of how many keys it is remembered that their last refresh has failed."""
_SPARE_ROUNDS = 64
"""Rounds of deriving anew that changes from outside may cost, beyond one for each key."""

_WOKEN_SECONDS = 0.000_01
_WOKEN_AT_ONCE = 16
"""What a reader of one key does at least as soon as it is told."""

_LOOKED_AT = 1_000
"""Among how many flights a circle is looked for in that time; among more, less often."""

_GRACE_SECONDS = 0.25
"""How long the ends of very many keys may take at a deadline; then the reader is told anyway."""

_ANEW = Demand(refresh=True)
_SETTLED = Phase.SETTLED
_STORED = CacheWriteStatus.STORED

Wanted = tuple[ResourceKey, FreshnessPolicy, Revision | None]
"""A key that has to be acquired, its policy, and what the cache has of it, which may stand in."""

Subject = Flight | Gather
"""What a step is about, and what is settled if the step fails."""

Steps = Iterator[None]
Step = Callable[..., Steps | None]


def _the_rest(_subject: Subject, rest: Steps) -> Steps:
    return rest


class Agenda:
    """Runs small synchronous steps without recursion and without holding the event loop.

    A step may add further steps. They run after it, in order, so a chain of ten thousand
    settling keys needs no stack. A long one is a generator: what follows a `yield` is a step of its
    own, at the end of the list. When the steps of a turn of the event loop have used up a slice of
    time the rest continues in a later turn. `broken` is told of a step that failed, and what it was
    about.
    """

    __slots__ = ("_broken", "_handle", "_pace", "_running", "_steps")

    def __init__(self, broken: Callable[[Subject, BaseException], None]) -> None:
        self._pace = Pace()
        self._steps: deque[tuple[Step, Subject, tuple[Any, ...]]] = deque()
        self._running = False
        self._handle: asyncio.Handle | None = None
        self._broken = broken

    def add(self, step: Step, subject: Subject, *arguments: Any) -> None:
        """Put a step at the end, and run the list now unless it is being run already."""
        self._steps.append((step, subject, arguments))
        if not self._running and self._handle is None:
            self.run()

    def run(self) -> None:
        """Run steps until none is left or the slice of time is used up."""
        if self._running:
            return
        steps, pace = self._steps, self._pace
        looks = _STEPS_BETWEEN_LOOKS
        try:
            self._running = True
            if self._handle is not None:  # the turn is another one, though an interrupt hid its end
                self._handle.cancel()
                self._handle = None
                pace.turn_over()
            due = not pace.begin()
            while steps and not due:
                step, subject, arguments = steps.popleft()
                try:
                    rest = step(subject, *arguments)
                    if rest is not None and next(rest, self) is not self:
                        steps.append((_the_rest, subject, (rest,)))
                        looks = 1  # a slice of much, which may have taken a while
                except BaseException as error:
                    self._broken(subject, error)
                looks -= 1
                if not looks:
                    looks, due = _STEPS_BETWEEN_LOOKS, pace.due
        finally:
            self._running = False
            if steps:
                self._handle = asyncio.get_running_loop().call_soon(self.run)

    def leave_room(self, tasks: int = 1) -> None:
        """Take up less time in this turn: tasks were woken that go on in the next one."""
        self._pace.leave_room(tasks * _WOKEN_SECONDS)

    async def finish(self) -> None:
        """Let the list be run to its end, in slices."""
        while self._steps:
            await asyncio.sleep(0)
            self._running = False  # no step is being run, though an interrupt may have left it so
            self.run()

    def __repr__(self) -> str:
        return f"<Agenda steps={len(self._steps)} running={self._running}>"


# What flights have to know of besides themselves --------------------------------------------------


class Absences:
    """Which keys are remembered to be absent, each until its instant in monotonic seconds.

    Of very many, those that were noted first are forgotten.
    """

    def __init__(self, clock: Clock) -> None:
        self._monotonic = clock.monotonic
        self.keys: OrderedDict[ResourceKey, tuple[float, Failure]] = OrderedDict()

    def get(self, key: ResourceKey) -> Failure | None:
        """Return that there is no such key, if that may still be remembered."""
        until, failure = self.keys.get(key, (-math.inf, None))
        if failure is not None and until <= self._monotonic():
            del self.keys[key]
            return None
        return failure

    def keep(self, key: ResourceKey, until: float, failure: Failure) -> None:
        """Remember that there is none."""
        if until > self._monotonic():
            self.keys[key] = until, failure
            if len(self.keys) > _MOST_ABSENT:
                self.keys.popitem(last=False)

    def forget(self, keys: Iterable[ResourceKey]) -> None:
        """Learn that what has been said of these keys may be so no longer."""
        if self.keys:
            for key in keys:
                self.keys.pop(key, None)


class News:
    """Which keys there has been news of while anything was derived, and what is older than that.

    `count` says how much. What a flight has taken in `since` some count is old if there has been
    other news of it, or of anything that it rests on.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self._changed: dict[ResourceKey, tuple[int, str | None]] = {}
        self._voucher: tuple[int, int] = 0, 0

    def clear(self) -> None:
        """Forget of which keys: nobody will ask."""
        self._changed.clear()

    def note(self, versions: Iterable[tuple[ResourceKey, str | None]]) -> bool:
        """Take note of what is current now; return False if that is more than is remembered."""
        self.count += 1
        for key, version in versions:
            self._changed[key] = (self.count, version)
        if len(self._changed) <= _MOST_NEWS:
            return True
        self._changed.clear()
        return False

    def overtakes(self, flight: Flight) -> bool:
        """Look at all that a flight has taken in, or waits for, and was not known to be current."""
        since, told = flight.since, self.count
        if self._voucher != (since, told):
            self._voucher = since, told
        stack, seen = [flight], {flight}
        while stack:
            gather = stack.pop().gather
            if gather is None:
                continue
            taken = gather.taken()
            revisions = [each.revision for each in taken if isinstance(each, Reading)]
            # What failed, or did not exist, may rest on any of it.
            failed = gather.failures or len(revisions) < len(taken)
            if failed or self._concerns(revisions):
                self._voucher = 0, 0
                return True
            for awaited in gather.pending:
                if isinstance(awaited, Flight) and awaited.since < told and awaited not in seen:
                    seen.add(awaited)
                    stack.append(awaited)
        self._drop_old_stand_ins([each for each in seen if each.cached is not None], since)
        for each in seen:
            if each.since >= since:
                each.since = told
        return False

    def _is_of(self, revision: Revision, since: int) -> bool:
        told, version = self._changed.get(revision.key, (0, None))
        return told > since and revision.version != version

    def _concerns(self, revisions: Iterable[Revision]) -> bool:
        """Whether there is news of any of them, or of what they rest on; each is asked about once.

        One that is vouched for has been found current before, with all that it rests on.
        """
        voucher, (since, _), stack = self._voucher, self._voucher, list(revisions)
        while stack:
            revision = stack.pop()
            if revision.vouched is voucher:
                continue
            revision.vouched = voucher
            if self._is_of(revision, since):
                return True
            stack += revision.dependencies
        return False

    def _drop_old_stand_ins(self, flights: Collection[Flight], since: int) -> None:
        """Let nothing stand in for newcomers that rests on what there has been news of."""
        old: dict[Revision, bool] = {}
        stack = [each.cached for each in flights if each.cached is not None]
        while stack:
            revision = stack.pop()
            if revision in old:
                continue
            below = [each for each in revision.dependencies if each not in old]
            if below:
                stack += revision, *below
                continue
            rests_on_old = any(old[each] for each in revision.dependencies)
            old[revision] = rests_on_old or self._is_of(revision, since)
        for flight in flights:
            if flight.cached is not None and old[flight.cached]:
                flight.cached = None


class Publications:
    """How many publications of each key are under way, and the flights that wait for their outcome.

    A flight waits for those that had begun when its value was there, but not for long.
    """

    def __init__(self) -> None:
        self.under_way: dict[ResourceKey, int] = {}
        self._held_back: dict[ResourceKey, dict[Flight, tuple[int, asyncio.TimerHandle]]] = {}

    def begin(self, keys: Iterable[ResourceKey]) -> None:
        """Learn that publications begin."""
        for key in keys:
            self.under_way[key] = self.under_way.get(key, 0) + 1

    def end(self, keys: Iterable[ResourceKey]) -> list[Flight]:
        """Learn that publications have ended; return which flights need wait no longer."""
        freed: list[Flight] = []
        for key in keys:
            left = self.under_way.pop(key, 1) - 1
            if left:
                self.under_way[key] = left
            held = self._held_back.pop(key, None) or {}
            for flight, (before, timer) in tuple(held.items()):
                if before > 1 and left:
                    held[flight] = before - 1, timer
                else:  # those that began after it was read are none of its business
                    del held[flight]
                    timer.cancel()
                    freed.append(flight)
            if held:
                self._held_back[key] = held
        return freed

    def hold_back(self, flight: Flight, timer: asyncio.TimerHandle) -> None:
        """Let a flight wait, until the timer tells it to do so no longer."""
        held = self._held_back.setdefault(flight.key, {})
        held[flight] = self.under_way[flight.key], timer

    def let_go(self, flight: Flight) -> None:
        """Hold a flight back no longer."""
        self._held_back.get(flight.key, {}).pop(flight, None)

    def forget(self) -> Collection[Flight]:
        """Forget what is held back, and return it: it will not be written any more."""
        held = {
            each: timer for some in self._held_back.values() for each, (_, timer) in some.items()
        }
        for timer in held.values():
            timer.cancel()
        self._held_back.clear()
        return held


class SingleFlight:
    """Looks for keys, starts and joins their flights, advances them, and tells who waits.

    It listens to the cache, so that a read never undoes newer knowledge.
    """

    def __init__(self, parts: Parts, variables: contextvars.Context) -> None:
        self.parts = parts
        self.agenda: Agenda = Agenda(self.broken)
        self.board: FlightBoard = FlightBoard(parts.report)
        self.dispatch: Dispatch = Dispatch(
            parts, self.refused, self.delivered, self._store_together
        )
        self.deliveries: Deliveries = self.dispatch.deliveries
        self.hold: Callable[[Work], None] = self.dispatch.hold
        self.release: Callable[[Work], None] = self.dispatch.release
        self.reads: CacheReads = CacheReads(parts, self._cache_answered, self.dispatch.tasks)
        self.writes: CacheWrites = CacheWrites(parts, self._fit, self._written)
        self.refresher: Refresher = Refresher(self, variables)
        self._store = parts.access.store
        self._leases = parts.access.leases
        self.publications: Publications = Publications()
        self._renewed: dict[ResourceKey, str] = {}
        self._absent = Absences(parts.clock)
        self._news = News()
        self._told: int = 0
        parts.access.subscribers.subscribe(self)

    def broken(self, subject: Subject, error: BaseException) -> None:
        """Settle what a step was about that failed: nobody waits for ever for an error of ours."""
        try:
            self._report_broken(subject, error)
        finally:
            if isinstance(subject, Flight):
                self.settle(subject, Failed(Failure.of_error(subject.key, error)))
            else:
                self._end_broken(subject, error)

    def _end_broken(self, gather: Gather, error: BaseException) -> None:
        if gather.alone is not None:
            self._looked(gather)
        self._leave_all(gather)
        for key in gather.keys:
            if key not in gather.readings and key not in gather.failures:
                gather.failures[key] = Failure.of_error(key, error)
        self._tell(gather)
        owner = gather.owner
        if owner is not None and owner.gather is gather and owner.phase is Phase.GATHERING:
            self.settle(owner, Failed(Failure.of_error(owner.key, error)))

    def _report_broken(self, subject: Subject, error: BaseException) -> None:
        if isinstance(error, PROGRAM_ENDS):
            pass_on(error)
            return
        context = {"message": f"coalestra: a step for {subject!r} failed", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)

    # Look: what is pinned, then the cache, then a flight ----------------------------------------

    def look(self, gather: Gather) -> None:
        """Begin to look for every key of a gather; its `done` is called when all are settled."""
        gather.open, gather.told = True, self._told
        gather.alone = {gather: False}
        self.hold(gather.work)
        if gather.work.trace is not None:
            self.note(gather)
        if gather.keys and self._store is not None and not (gather.forced or gather.refresh):
            gather.work.record.cache_batch_reads += 1
        self.agenda.add(self._look_on, gather)

    @staticmethod
    def note(gather: Gather) -> None:
        """Begin to keep notes of every key of a gather, if anybody wants any."""
        trace, owner = gather.work.trace, gather.owner
        if trace is not None:
            gather.logs = trace.look(gather.keys, requested=owner is None)
            if gather.span is None:
                gather.span = trace.span if owner is None else owner.span_of(gather.work)

    def _look_on(self, gather: Gather) -> Steps:
        """Look for keys, until the gather is struck; then conclude what is complete, make calls.

        Much is looked for in portions, and the flights of what memory lacks begin in steps.
        """
        keys = gather.keys if gather.open else ()  # or who waited has gone before it was his turn
        comes_now = gather.owner is None and gather.within is None  # not for who came before
        if comes_now and self._store is None and self.parts.access.is_cut_off():
            self._hide_what_has_begun()
        pins = gather.pins
        plain = not (pins or pins.private or gather.forced or gather.refresh)
        size = _KEYS_AT_ONCE if plain else _KEYS_PER_STEP
        for part in portions(keys, size):
            missed = self._look_for(gather, part, plain)
            for wanted in portions(missed, _KEYS_PER_STEP) if missed else ():
                if self._store is None:
                    for key, policy, _ in wanted:
                        self._ask_cache(gather, key, policy)
                else:
                    self._missed(gather, wanted)
                if len(wanted) == _KEYS_PER_STEP:
                    yield
                    if not gather.open:
                        break
            if len(part) == size:
                yield
            if not gather.open:
                break
        self._looked(gather)

    def _look_for(self, gather: Gather, keys: Collection[ResourceKey], plain: bool) -> list[Wanted]:
        """Take what is pinned or in memory; return what has to be looked for elsewhere."""
        common: FreshnessPolicy | None = policy_of_all(self.parts.policies)
        now, near = self.parts.clock.now(), self.parts.access.near
        if plain and common is not None and (near is None or near.lacks(keys)):
            return [(key, common, None) for key in keys]
        missed: list[Wanted] = []
        past: list[Wanted] = []
        pins, apart = gather.pins, {*gather.pins.private, *gather.pins.own}
        for key in keys:
            if not plain and key in pins:
                gather.readings[key] = pins[key]
                continue
            policy = self._policy(gather, key) if common is None else common
            if policy is None:
                continue
            if apart and key in apart:
                self._acquire_privately(gather, key, policy)
            elif gather.refresh or (gather.forced and key in gather.forced):
                past.append((key, policy, None))
            else:
                revision = None if near is None else near.find(key, now, policy)
                if revision is None or not self._serve(gather, policy, revision, now):
                    missed.append((key, policy, revision))
        if past:
            self._bypass(gather, past)
        return missed

    def _looked(self, gather: Gather) -> None:
        gather.open, gather.alone = False, None
        self.release(gather.work)
        self._check(gather)

    def _policy(self, gather: Gather, key: ResourceKey) -> FreshnessPolicy | None:
        """Return the policy of a key; if there is none to be had, the key fails."""
        try:
            return policy_for(self.parts.policies, key)
        except BaseException as error:
            gather.failures[key] = Failure.of_error(key, error, "freshness policy")
            pass_on(error)
            return None

    def _bypass(self, gather: Gather, wanted: Collection[Wanted]) -> None:
        """Acquire what may not come from the cache; it may grant leases for that."""
        if self.parts.report is not None:
            told = {"reason": "force_refresh", "snapshot_id": gather.work.context.snapshot_id}
            for key, _, _ in wanted:
                if key in gather.forced:
                    self.parts.report.tell("cache_bypassed", resource=key, **told)
        if not self._leases:
            self._force(gather, wanted)
            return
        for key, policy, _ in wanted:  # another process may be at it, or have renewed it already
            unlike = None if key in gather.forced else self._renewed.pop(key, None)
            self.reads.ask_for_lease(gather, key, policy, unlike)

    def _force(self, gather: Gather, wanted: Collection[Wanted]) -> None:
        """Acquire keys past the cache: privately what must agree with pins, else with others."""
        others: list[Wanted] = []
        for each in wanted:
            key, policy, _ = each
            if key in gather.pins:
                gather.readings[key] = gather.pins[key]
            elif gather.private and key in gather.private:
                self._acquire_privately(gather, key, policy)
            else:
                others.append(each)
        self._acquire(gather, others)

    def _refresh(self, revision: Revision, mode: RefreshMode, work: Work) -> dict[str, Any]:
        """Schedule a refresh of a revision, unless one is under way; return what to say of it."""
        said = self.refresher.notes(revision)
        scheduled = self.refresher.schedule(revision, mode.value, work)
        if scheduled and self._leases:
            self._renewed[revision.key] = revision.version
        return {"refresh_scheduled": scheduled, **said}

    def _serve(
        self, gather: Gather, policy: FreshnessPolicy, revision: Revision, now: float
    ) -> bool:
        """Take a cached revision if the policy lets a reader have it; schedule a refresh if due."""
        key, work = revision.key, gather.work
        age = max(0.0, now - revision.observed_at)
        until = self.deliveries.fresh_until(revision)
        stale = age > policy.ttl_seconds or now > until
        mode = policy.refresh_mode
        notes: dict[str, Any] | None = None
        if stale:
            if mode is not RefreshMode.STALE_WHILE_REVALIDATE or age > policy.max_stale_seconds:
                return False
            if gather.renews:
                return False
            if self._absent.get(key) is not None:
                return False
            notes = {"refresh_mode": mode.value, **self._refresh(revision, mode, work)}
        elif mode is RefreshMode.REFRESH_AHEAD and (
            policy.should_refresh_ahead(age) or now >= until - policy.refresh_ahead_seconds
        ):
            if gather.renews:
                return False
            notes = self._refresh(revision, mode, work)
        work.record.cache_hits += 1
        if self.parts.report is not None:
            how, snapshot_id = mode.value if stale else "fresh", work.context.snapshot_id
            facts = {"resource": key, "freshness": how, "snapshot_id": snapshot_id}
            self.parts.report.tell("cache_hit", **facts)
        if gather.logs and key in gather.logs:
            refreshed = None if notes is None else notes["refresh_scheduled"]
            gather.logs[key].cached(self._how(stale), refreshed)
        gather.readings[key] = Reading(revision, policy.ttl_seconds, True, stale, notes)
        return True

    def _how(self, stale: bool) -> Obtained:
        if stale:
            return Obtained.STALE
        return Obtained.CACHE if self.parts.access.near is self._store else Obtained.NEAR_CACHE

    def _missed(self, gather: Gather, wanted: Collection[Wanted]) -> None:
        """Acquire what the cache has nothing of use of, unless there is known to be none."""
        if self._absent.keys:
            wanted = [each for each in wanted if not self._is_absent(gather, each[0])]
        self._count_misses(gather, [key for key, _, _ in wanted])
        self._acquire(gather, wanted)

    def _count_misses(self, gather: Gather, keys: Collection[ResourceKey]) -> None:
        gather.work.record.cache_misses += len(keys)
        if self.parts.report is not None:
            for key in keys:
                self.parts.report.count("cache_access_total", key, status="miss")

    def _is_absent(self, gather: Gather, key: ResourceKey) -> bool:
        """Let a key fail for `gather` that is known to be absent."""
        absent = self._absent.get(key)
        if absent is None:
            return False
        gather.failures[key] = absent
        gather.work.record.cache_hits += 1
        if self.parts.report is not None:
            self.parts.report.count("cache_access_total", key, status="absent")
        if gather.work.trace is not None:
            gather.work.trace.handed(gather.logs.get(key), key)
        return True

    def _ask_cache(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> None:
        """Read a cache that has to be awaited, unless a flight has done so in vain."""
        flight = self._joinable(key)
        if flight is not None and flight.missed:
            self._missed(gather, ((key, policy, None),))
            return
        read = self.reads.ask(gather, key, policy)
        if flight is not None:
            read.flight = flight

    def _cache_answered(self, read: Read, revision: Revision | None) -> None:
        """Pass on what an awaited cache held: a reading, or the way to the sources."""
        waiters, read.waiters = read.waiters, {}
        for gather in waiters:
            gather.pending.pop(read, None)
            try:
                self._take_from_cache(gather, read, revision)
            except BaseException as error:
                gather.failures[read.key] = Failure.of_error(read.key, error)
                self._report_broken(gather, error)
            self._check(gather)

    def _take_from_cache(self, gather: Gather, read: Read, revision: Revision | None) -> None:
        key, now = read.key, self.parts.clock.now()
        flight = read.flight
        settlement = None if flight is None else flight.settlement
        if read.group.forced:
            self._force(gather, ((key, read.policy, None),))
            self._pass_lease(gather, read)
        elif read.rounds < _MOST_READS and _is_outdated(gather, read, revision):
            self.reads.ask(gather, key, read.policy).rounds = read.rounds + 1
        elif read.has_use_of(revision) and self._serve(gather, read.policy, revision, now):
            return
        elif flight and (
            isinstance(settlement, Reading)
            or (settlement and settlement.failure.absent and not read.group.changed)
        ):
            self._count_misses(gather, (key,))
            joined = self.board.note_join(gather, flight)
            if gather.work.trace is not None:
                gather.work.trace.handed(gather.logs.get(key), key)
            self._hand(gather, flight, settlement, joined)
        elif self._leases and read.has_use_of(revision) and read.was_fit(revision, now):
            self.reads.ask_for_lease(gather, key, read.policy, revision.version)
        else:
            old = _has_changed(read, revision)  # it must not stand in for newcomers
            known = self.board.flights.get(key)
            begun = known is not None and known.has_begun
            self._missed(gather, ((key, read.policy, None if old else revision),))
            flight = self.board.flights.get(key)
            if flight is not None and not read.given_up and key not in read.group.changed:
                flight.missed = True
            if flight is not known or not begun:  # else it may be older than the lease
                self._pass_lease(gather, read)

    def _pass_lease(self, gather: Gather, read: Read) -> None:
        """Give the lease that the cache gave to the flight that acquires the key.

        One that it has already is given back: the cache has taken that away for this one.
        """
        flight = gather.pins.private.get(read.key) or self.board.flights.get(read.key)
        if flight is not None and read.lease is not None:
            flight.lease, read.lease = read.lease, flight.lease

    # Join and leave ---------------------------------------------------------------------------

    def shared(self, key: ResourceKey) -> Flight | None:
        """Return the flight that whoever needs a key, whatever its value, may join unseen."""
        return None if key in self._absent.keys else self._joinable(key)

    def _joinable(self, key: ResourceKey) -> Flight | None:
        """Return the flight that newcomers may join; one that took in old news is none."""
        flight = self.board.flights.get(key)
        return None if flight is None or self._is_behind(flight) else flight

    def _acquire(self, gather: Gather, wanted: Collection[Wanted]) -> None:
        """Let `gather` wait for the flights of keys; start those that there are none to join of."""
        if gather.under and gather.owner is not None:
            keys = [key for key, _, _ in wanted]
            those = {id(pins): pins for pins in gather.under.values() if self._lacks(pins, keys)}
            if those and self._leave_to_pins(gather.owner, those):
                return
        flights, work, told, begun = self.board.flights, gather.work, self._news.count, []
        for key, policy, cached in wanted:
            flight = flights.get(key)
            if flight is not None and self._join(gather, flight, cached):
                flight.policy = policy  # which may be another one by now
                continue
            flight = Flight(key, policy, work, told)
            if cached is not None:
                flight.cached = cached
            begun.append(flight)
        if gather.forced:
            for flight in begun:
                flight.forced = flight.key in gather.forced
        if begun:
            self.board.start(gather, begun)
            if gather.owner is not None and len(gather.keys) == 1:
                self._later(work, begun)
            else:  # what was missed together is decided together
                self._proceed(begun)
        if self._store is None:
            for key, _, _ in wanted:
                read = self.reads.find(key)
                if read is not None:
                    read.flight = flights.get(key)

    def _join(self, gather: Gather, flight: Flight, cached: Revision | None) -> bool:
        """Let `gather` wait for a flight under way, unless that may bring what is too old."""
        if self._is_behind(flight):
            return False
        key = flight.key
        forced = bool(gather.forced) and key in gather.forced
        same_errand = flight.forced and flight.sponsor is gather.work  # else it has to be read anew
        if forced and flight.began and not same_errand:
            self.board.hide(flight, cacheable=False)
            self.refresher.outdate((key,))
            return False
        way = self._way_to_pinned(gather.base, flight, gather.pins.own) if gather.base else None
        if way:
            self._derive_apart(gather, flight, way)
            return True
        if cached is not None:
            flight.cached = cached
        flight.forced = flight.forced or forced
        self._wait_for(gather, flight)
        return True

    def _wait_for(self, gather: Gather, flight: Flight) -> None:
        self.board.join(gather, flight)
        if gather.urgent:
            self._hurry((flight,))

    def _acquire_privately(
        self,
        gather: Gather,
        key: ResourceKey,
        policy: FreshnessPolicy,
        cached: Revision | None = None,
    ) -> None:
        """Let `gather` wait for a derivation of `key` that agrees with its pins."""
        known = gather.pins.private.get(key)
        if known is not None:
            self._wait_for(gather, known)
            return
        flight = Flight(key, policy, gather.work, self._news.count)
        flight.pins, flight.cached = gather.pins, cached
        flight.cacheable = flight.forced = key in gather.forced
        gather.pins.private[key] = flight
        self.board.set_aside(flight)
        self._wait_for(gather, flight)
        self._later(flight.living_sponsor(), (flight,))

    def hurry(self, gather: Gather) -> None:
        """Let all that is waited for queue for nothing, now and later."""
        gather.urgent = True
        self._hurry(gather.pending)

    def _hurry(self, awaited: Iterable[Flight | Read]) -> None:
        """Let flights, and what they wait for, queue for nothing: who has a slot waits for them."""
        stack, seen = list(awaited), set(awaited)
        while stack:
            flight = stack.pop()
            if isinstance(flight, Read):
                continue
            flight.urgent = True
            if flight.link is not None:
                self.dispatch.hurry(flight)
            if flight.gather is not None:
                flight.gather.urgent = True
                more = [each for each in flight.gather.pending if each not in seen]
                seen.update(more)
                stack += more

    def _leave_all(self, gather: Gather) -> None:
        gather.open = False
        for awaited in tuple(gather.pending):
            self._leave(gather, awaited)

    def _leave(self, gather: Gather, awaited: Flight | Read) -> None:
        """Let `gather` wait no longer. What nobody waits for is given up, or runs to its bound."""
        if isinstance(awaited, Read):
            self.reads.leave(gather, awaited)
            return
        self.board.leave(gather, awaited)
        if not awaited.waiters:
            self.agenda.add(self._unwanted, awaited)

    def _unwanted(self, flight: Flight) -> None:
        if flight.phase is _SETTLED or flight.waiters:
            return
        if flight.call is not None:
            flight.call.unwanted()
        elif flight.phase is not Phase.WRITING:
            self._drop(flight)

    def _drop(self, flight: Flight) -> None:
        gather = flight.gather
        self.settle(flight, Failed(Failure.given_up(flight.key)))
        if gather is not None:
            self.abandon(gather)

    # Advance ----------------------------------------------------------------------------------

    def _later(self, work: Work, flights: Sequence[Flight]) -> None:
        """Let flights go on after the steps at hand, with what else of the work does by then.

        Each of many derived keys may begin one. The calls of the work are held back meanwhile.
        """
        first = not work.begun
        work.begun += flights
        if first:
            self.hold(work)
            self.agenda.add(self._go_on_together, flights[0], work)

    def _go_on_together(self, _first: Flight, work: Work) -> Steps:
        flights, work.begun = work.begun, []
        try:
            for part in portions(flights, _KEYS_PER_STEP):
                try:
                    self._go_on(part)
                except BaseException as error:
                    for flight in part:
                        self.broken(flight, error)
                if len(part) == _KEYS_PER_STEP:
                    yield
        finally:
            self.release(work)

    def _go_on(self, flights: Iterable[Flight]) -> None:
        """Go back to the chains of flights; those that are as far in them proceed together."""
        alike: dict[int, list[Flight]] = {}
        for flight in flights:
            if flight.waiters:
                if flight.failures:  # a source has refused it
                    flight.choose()
                    self.board.deriving.pop(flight, None)
                alike.setdefault(flight.position, []).append(flight)
            elif flight.phase is not _SETTLED:
                ending = Failure.of_sources(flight.key, flight.failures)
                if ending.absent and not self._choose((flight,))[0]:
                    self._keep_absence(flight, ending)  # said too late for whoever asked
                self._drop(flight)
        for here in alike.values():
            self._proceed(here)

    def _proceed(self, flights: Sequence[Flight]) -> None:
        """Send flights, which are as far in their chains, on to the next source of each."""
        flights = self._in_time(flights)
        if not flights:
            return
        chosen, rest = self._choose(flights)
        for link, all_served in chosen.items():
            served = self._in_time(all_served)
            if link.kind is SourceKind.DERIVED:
                self._each(self._derive, served, link)
            elif served:
                self._be_ready(link, served)
        self._each(self._end_of_chain, self._in_time(rest), False)

    def _in_time(self, flights: Sequence[Flight]) -> Sequence[Flight]:
        """End the flights whose time is over, as it may be once sources were asked about them."""
        if not flights or flights[0].sponsor.deadline is None:
            return flights
        now = asyncio.get_running_loop().time()
        over = [flight for flight in flights if flight.cutoff <= now]
        if not over:
            return flights
        self._each(self._end_of_chain, over, True)
        return [flight for flight in flights if flight.cutoff > now]

    def _each(self, do: Callable[..., None], several: Iterable[Subject], *arguments: Any) -> None:
        """Do something with each of several; one for which that fails is broken, not the others."""
        for each in several:
            try:
                do(each, *arguments)
            except BaseException as error:
                self.broken(each, error)

    def _be_ready(self, link: Link, flights: Sequence[Flight]) -> None:
        """Hand over flights of one sponsor that are ready for a source."""
        try:
            self.dispatch.ready(link, flights)
        except BaseException as error:
            for flight in flights:
                self.broken(flight, error)

    def _end_of_chain(self, flight: Flight, over: bool) -> None:
        """Settle a flight that has no source left, or, if it is `over`, no time."""
        failure = late(flight.key, flight.sponsor.deadline, flight) if over else None
        ending = after_failures(flight, failure, self.parts)
        if isinstance(ending, Failed) and ending.stale is not None:
            self._keep_candidate(flight, ending.stale)
        elif isinstance(ending, Failed) and ending.failure.absent:
            self._keep_absence(flight, ending.failure)
        self.settle(flight, ending)

    def _choose(
        self, flights: Sequence[Flight]
    ) -> tuple[dict[Link, list[Flight]], Sequence[Flight]]:
        """Return which sources serve flights next, and for which flights there is none left."""
        chains, work, rest = self.parts.chains, flights[0].sponsor, flights
        chosen: dict[Link, list[Flight]] = {}
        for position, link in enumerate(chains.links[flights[0].position :], flights[0].position):
            keys = [flight.key for flight in rest]
            answers = chains.supports(link, keys, work.record, work.variables)
            served, others = [], []
            for flight, answer in zip(rest, answers, strict=True):
                flight.position = position + 1
                if answer is True:
                    flight.link = link
                    served.append(flight)
                else:
                    others.append(flight)
                    if answer is not False:
                        self._each(self._note, (flight,), self._not_called(link, answer), "failure")
            if served:
                chosen[link] = served
            rest = others
            if not rest:
                break
        return chosen, rest

    def refused(self, flight: Flight, failure: SourceFailure, status: str) -> None:
        """Take note that a source failed for a key, and let the key go on to the next one.

        If its call was abandoned, as nobody waits for it, the key is given up.
        """
        if status == "abandoned" and not flight.waiters:
            self._drop(flight)
            return
        self._each(self._note, (flight,), failure, status)
        if not flight.waiters or isinstance(failure.exception, SnapshotDeadlineExceededError):
            self.board.hide(flight, cacheable=True)  # who comes by now, with time, begins anew
        self._later(flight.living_sponsor(), (flight,))

    def _note(self, flight: Flight, failure: SourceFailure, status: str) -> None:
        flight.failures += (failure,)
        if isinstance(failure.exception, ResourceAbsent):
            status = "absent"
            self._note_absence(flight, failure.exception)
        if flight.log is not None:
            flight.log.refused(failure, status)
        if self.parts.report is not None:
            source, snapshot_id = failure.source, flight.sponsor.context.snapshot_id
            self.parts.report.source_failed(flight.key, source, failure, snapshot_id, status)

    # Absent: what sources have said there is none of ------------------------------------------

    def _note_absence(self, flight: Flight, answer: ResourceAbsent) -> None:
        """Take note of for how long there is none; not of what is derived from what may change.

        What a subclass makes of that is left alone if it makes no sense.
        """
        final, seconds = False, 0.0
        try:
            final = flag("final", answer.final)
            seconds = span("ttl_seconds", answer.ttl_seconds or 0.0)
        except BaseException as error:
            self._report_broken(flight, error)
        if flight.gather is not None:
            seconds = 0.0
            self._is_behind(flight)
        until = self.parts.clock.monotonic() + seconds
        flight.absent_until = min(flight.absent_until, until)
        if final:
            flight.position = len(self.parts.chains.links)

    def _keep_absence(self, flight: Flight, failure: Failure) -> None:
        """Let it be known that there is none, unless something newer is known of the key."""
        key = flight.key
        if (
            not flight.cacheable
            or key in self.publications.under_way
            or not absence_stands(flight, self.parts)
        ):
            return
        if self._store is not None and key in self._store:
            self._store.drop((key,))
        self._absent.keep(key, flight.absent_until, failure)

    def _not_called(self, link: Link, error: BaseException) -> SourceFailure:
        """Return the failure of a source that was asked something else than to be called."""
        pass_on(error)
        failure = SourceFailure.of(link.name, error, 0)
        self.parts.log.failed(f"source {link.name!r}", failure)
        return failure

    # Derive: what a key rests on --------------------------------------------------------------

    def _derive(self, flight: Flight, link: Link) -> None:
        """Ask for what `flight` is derived from; it goes on when all of it is settled."""
        try:
            keys = dependencies_of(link, flight.key, flight.sponsor.variables)
        except BaseException as raised:
            error = legible(raised)
            if isinstance(error, DependencyCycleError):
                flight.cycle = error.path
            self.refused(flight, self._not_called(link, error), "failure")
            return
        pins = NO_PINS if flight.pins is None else flight.pins
        work = flight.living_sponsor()
        gather = Gather(work, keys, pins, self._gathered, pins.demand, flight)
        for each in flight.waiters if flight.pins is None else ():
            if each.base or each.under:
                its = {id(each.base): each.base} if each.base else each.under
                gather.serve(its)
        gather.renews = link.inherits and any(
            each.refresh or each.renews for each in flight.waiters
        )
        flight.wait_for(gather)
        flight.since = self._news.count
        if flight.log is not None:
            flight.log.waits.begin(WaitReason.DEPENDENCIES)
        self.board.derive(flight)
        self.look(gather)

    def _gathered(self, gather: Gather) -> None:
        flight = gather.owner
        if flight is None or flight.gather is not gather:
            return
        if flight.log is not None:
            flight.log.waits.end()
        if not gather.failures:
            if flight.pins is not None:
                pin_all(flight.pins, gather.readings)
                peek = None if self._store is None else self._store.peek
                if peek and not all(peek(each.key) is each for each in gather.revisions()):
                    flight.cacheable = False  # what was pinned is current no longer
            if flight.link is not None:
                self._be_ready(flight.link, (flight,))
            return
        cycles = (failure.cycle for failure in gather.failures.values())
        flight.cycle = next(filter(None, cycles), flight.cycle)
        work = flight.living_sponsor()
        self.hold(work)
        self.agenda.add(self._underived, flight, gather, work)

    def _underived(self, flight: Flight, gather: Gather, work: Work) -> Steps:
        """Refuse a flight with the error of each dependency that failed; many take a while."""
        errors: dict[ResourceKey, Exception] = {}
        name = "" if flight.link is None else flight.link.name
        try:
            for part in portions(gather.failed(), _KEYS_PER_STEP):
                errors.update((failure.key, failure.make()) for failure in part)
                if len(part) == _KEYS_PER_STEP:
                    yield
            if flight.gather is not gather:
                return
            error: Exception = DependencyResolutionError(flight.key, name, errors)
            if all(failure.absent for failure in gather.failures.values()):
                cause, error = error, ResourceAbsent(f"derived from {described(errors)}")
                error.__cause__ = cause
            self.refused(flight, SourceFailure.of(name, error, 0), "failure")
        finally:
            self.release(work)

    # What is pinned is not asked for again: who would have to wait for that derives on his own --

    def _leave_to_pins(self, flight: Flight, those: Mapping[int, Pins]) -> bool:
        """Let all derive apart who have pinned what `flight` would have to wait for, by `those`.

        Return whether nobody else waits; then it is given up.
        """
        leaving: list[tuple[Gather, Flight]] = []
        way, alone = {flight: flight.key}, True
        for each in (above := [flight]):
            for gather in each.waiters:
                owner = gather.owner
                if id(gather.base) in those and not gather.struck:
                    leaving.append((gather, each))
                elif owner is None or gather.base:
                    alone = False
                elif owner not in way:
                    way[owner] = owner.key
                    above.append(owner)
        if alone:
            self.board.hide(flight, cacheable=True)
        for each in way:
            if each.gather is not None and alone:
                self.abandon(each.gather)
            elif each.gather is not None:
                under = each.gather.under.items()
                each.gather.under = {of: pins for of, pins in under if of not in those}
        for gather, each in leaving:
            self._leave(gather, each)
            self._derive_apart(gather, each, way.values())
        return alone

    def _lacks(self, pins: Pins, keys: Collection[ResourceKey]) -> bool:
        """Whether to acquire `keys` is to acquire anything that is pinned, or to wait for it."""
        under_way = map(self.board.flights.get, keys)
        return not pins.keys().isdisjoint(keys) or any(
            each is not None and self._way_to_pinned(pins, each) for each in under_way
        )

    def _way_to_pinned(
        self, pins: Pins, flight: Flight, own: Collection[ResourceKey] = ()
    ) -> list[ResourceKey]:
        """Return the keys from a flight down to one that waits for what is pinned, if any does.

        `own` are known to be such keys. If none does, all those are told whose pins they serve, for
        what they have yet to acquire; who is told already need not be looked at again.
        """
        above: dict[Flight, Flight | None] = {flight: None}
        told: list[Gather] = []
        for each in (below := [flight]):
            gather = each.gather
            if gather is None or id(pins) in gather.under:
                continue
            told.append(gather)
            for one in gather.pending:
                if not isinstance(one, Flight) or one in above:
                    continue
                above[one] = each
                below.append(one)
                if one.key in pins or one.key in own:
                    way, at = [each.key], above[each]
                    while at is not None:
                        way.append(at.key)
                        at = above[at]
                    return way
        for gather in told:
            gather.serve({id(pins): pins})
        return []

    def _derive_apart(self, gather: Gather, flight: Flight, way: Collection[ResourceKey]) -> None:
        """Let `gather` wait for a private derivation in place of `flight`, as of all on the way."""
        if gather.owner is None and gather.pins is gather.base:
            gather.copy_pins()
        gather.pins.own.update(way)
        self._acquire_privately(gather, flight.key, flight.policy, flight.cached)

    # Offer: a fetched value on its way to the cache, where it may lose to newer knowledge -------

    def delivered(self, values: Sequence[Fresh], stored: bool) -> None:
        """Take fresh values of flights; `stored` ones are seen by readers of the memory cache."""
        known_of = self._absent.keys or self.publications.under_way or self.refresher.failing
        if stored and self.parts.report is None and not known_of:
            complete: list[Gather] = []
            try:
                values = self.board.land(values, self._news.count, complete)
            except BaseException as error:
                for flight, _ in values:
                    self.broken(flight, error)
                values = ()
            self._each(self._check, complete)
        for flight, revision in values:
            self._each(self._take, (flight,), revision, stored)

    def _take(self, flight: Flight, revision: Revision, stored: bool) -> None:
        report, key = self.parts.report, flight.key
        if report is not None and flight.link is not None:
            snapshot_id = flight.sponsor.context.snapshot_id
            report.resource_resolved(revision, flight.link.kind.value, snapshot_id)
        self._is_behind(flight)
        self.refresher.failing.pop(key, None)
        self._absent.forget((key,))
        if key in self.publications.under_way:
            self._hold_back(flight, revision)
        elif stored and flight.cacheable and flight.event is None:
            self.settle(flight, Reading(revision, flight.policy.ttl_seconds))
        else:
            flight.offer(revision)
            self._offer(flight)

    def _hold_back(self, flight: Flight, revision: Revision) -> None:
        """Let a value wait for the publications that are under way, but not for long."""
        flight.offer(revision)
        if flight.log is not None:
            flight.log.waits.begin(WaitReason.PUBLICATION)
        loop = asyncio.get_running_loop()
        left = [(gather.cutoff - loop.time()) * SHARE for gather in flight.waiters]
        seconds = min([self.parts.access.calls.seconds, *left])
        timer = loop.call_later(seconds, self._outwait, flight)
        self.publications.hold_back(flight, timer)

    def _outwait(self, flight: Flight) -> None:
        """Give what was held back for too long to those who wait, and store it nowhere."""
        self.publications.let_go(flight)
        flight.cacheable = False
        self.agenda.add(self._offer, flight)

    def _store_together(
        self,
        call: Call,
        made: Collection[Fresh],
        by_key: dict[ResourceKey, Revision],
        held: Held | None,
    ) -> Collection[Revision] | None:
        """Write the values of one answer to the memory cache in one step.

        Return which it took, or None if it took all. `held` is what is known to give way to them.

        What there has been news of meanwhile, or was settled, is left to its delivery.
        """
        store, now = self._store, self.parts.clock.now()
        publishing = self.publications.under_way
        if store is None:
            return ()
        news = publishing or self.board.aside  # where all flights are that there was any of
        special = [None for flight, _ in made if flight.forced or flight.call is not call]
        if not news and not special and store.enter_many(by_key, held, teller=self):
            self._told += held is not None  # who has read one of them before looks again
            return None
        self._told += len(made) > 1
        fit: dict[bool, dict[ResourceKey, Revision]] = {False: {}, True: {}}
        for flight, revision in made:
            if (
                flight.call is call
                and flight.cacheable
                and flight.event is None
                and flight.key not in publishing
            ):
                fit[flight.forced][flight.key] = revision
        stored: set[Revision] = set()
        for forced, revisions in fit.items():
            outcomes = store.put_many(revisions, now=now, replace_equal=forced, teller=self)
            stored.update([new for status, new, _ in outcomes if status is _STORED])
        return stored

    def _offer(self, flight: Flight) -> None:
        """Write a value to the cache, unless something newer is known of its key."""
        revision, store = flight.offered, self._store
        if revision is None or not self._fit(flight):
            return
        if store is None:
            if flight.log is not None:
                flight.log.waits.begin(WaitReason.STORE)
            self.writes.add(flight, revision)
            return
        now, replace = self.parts.clock.now(), flight.forced
        status, current, _ = store.put(revision, now=now, replace_equal=replace, teller=self)
        self._written(flight, status, current)

    def _fit(self, flight: Flight) -> bool:
        """Whether the value of a flight may be written; if not, the flight ends without that."""
        offered, event = flight.offered, flight.event
        if offered is None or flight.phase is _SETTLED:
            return False
        published_here = event is not None and not event.attempts and number_of(event.version)
        # Else it may have been there before: what it has come out behind was written only now.
        if not flight.cacheable or (published_here and not offered.dated):
            self.settle(flight, instead_of_event(flight, offered, self.parts))
            return False
        if event is None:
            return True
        # The event counts even if the cache has had to make room and holds it no longer.
        status = decide(offered, event, replace_equal=flight.forced)
        if status is _STORED:
            return True
        held = None if self._store is None else self._store.peek(flight.key)
        self._written(flight, status, held or event)
        return False

    def _written(self, flight: Flight, status: CacheWriteStatus, current: Revision) -> None:
        """End a flight with what was written, or with what its value has lost to."""
        try:
            if flight.phase is not _SETTLED:
                self.settle(flight, after_write(flight, status, current, self.parts))
        except BaseException as error:  # of its clock; others have been written with it
            self.broken(flight, error)

    def _keep_candidate(self, flight: Flight, stale: Reading) -> None:
        """Cache a stale answer that readers are about to get, so that it can stand in again."""
        revision = stale.revision
        if revision is not flight.candidate or not flight.cacheable or flight.event is not None:
            return
        if not any(gather.accepts_stale(flight.key) for gather in flight.waiters):
            return
        if self._store is not None:
            self._store.put(revision, now=self.parts.clock.now(), teller=self)
        else:
            self.writes.add_stale(flight, revision)

    # Settle and tell --------------------------------------------------------------------------

    def settle(self, flight: Flight, settlement: Settlement) -> None:
        """End a flight, once, and tell everyone who waits for it."""
        if flight.phase is _SETTLED:
            return
        waiters = self.board.take_off(flight, settlement)
        if type(settlement) is Reading:
            self.reads.part_with(flight.key)
        if flight.log is not None:
            flight.log.waits.end()
            for gather in waiters:
                if gather.work.trace is not None:
                    gather.work.trace.handed(gather.logs.get(flight.key), flight.key)
        if flight.lease is not None:  # it has stored nothing
            lease, flight.lease = flight.lease, None
            in_vain = isinstance(settlement, Failed) and bool(flight.failures)
            self.parts.access.give_back(lease, failed=in_vain)
        if flight.pins is not None and type(settlement) is Reading:
            flight.pins.setdefault(flight.key, settlement)
        if len(waiters) <= _WAITERS_PER_STEP:
            for gather, joined in waiters.items():
                self._hand(gather, flight, settlement, joined)
        else:
            self.agenda.add(self._hand_on, flight, settlement, waiters.items())

    def _hand_on(
        self, flight: Flight, settlement: Settlement, waiters: Collection[tuple[Gather, bool]]
    ) -> Steps:
        """Tell very many waiters portion by portion; one who has left meanwhile is passed over."""
        for part in portions(waiters, _WAITERS_PER_STEP):
            for gather, joined in part:
                if flight in gather.pending:
                    self._hand(gather, flight, settlement, joined)
            yield

    def _hand(self, gather: Gather, flight: Flight, settlement: Settlement, joined: bool) -> None:
        """Give a gather what a flight ended with, and whether it had joined that flight."""
        gather.pending.pop(flight, None)
        key = flight.key
        try:
            if joined or gather.forced or type(settlement) is not Reading:
                self._receive(gather, key, settlement, joined)
            else:
                gather.readings[key] = settlement
        except BaseException as error:
            if key not in gather.readings:
                gather.failures[key] = Failure.of_error(key, error)
            self._report_broken(gather, error)
        if not gather.pending and not gather.open:
            self.agenda.add(self._conclude, gather)

    def _receive(
        self, gather: Gather, key: ResourceKey, settlement: Settlement, joined: bool
    ) -> None:
        """Let a gather take what became of a key, and report what stands in."""
        reading, report = gather.receive(key, settlement, joined), self.parts.report
        if reading is not None and reading.fallback is not None and report is not None:
            if reading.from_cache:
                report.count("cache_access_total", key, status="stale_fallback")
            facts = {"error_type": reading.fallback, "snapshot_id": gather.work.context.snapshot_id}
            report.tell("stale_fallback_used", resource=key, **facts)

    def _check(self, gather: Gather) -> None:
        """Conclude a gather that waits for nothing more, as one does that was given up meanwhile.

        What is plugged in may have closed the builder while flights were begun for it.
        """
        if gather.over:
            self._leave_all(gather)
        elif not gather.pending and not gather.open:
            self.agenda.add(self._conclude, gather)

    def _conclude(self, gather: Gather) -> Steps | None:
        """Tell the one who waits, after readings at odds with the others were derived anew."""
        if gather.open or gather.pending or gather.struck or gather.over:
            return None
        if gather.told != self._told and len(gather.keys) > 1 and gather.rounds < _SPARE_ROUNDS:
            return self._take_news(gather)
        alone = len(gather.readings) == 1 and not gather.base and not gather.pins_beneath
        if not (alone or gather.agrees):
            gather.yield_to_pins()
            readings = gather.readings.values()
            if [each for each in readings if each.revision.dependency_versions]:
                return self._judge(gather)
        self._tell(gather)
        return None

    def _take_news(self, gather: Gather) -> Steps:
        """Take what is fresh in the place of what was read, or failed, before it was written.

        So what was written together is seen together, though some of it has come by a flight.
        """
        gather.open, gather.told, gather.agreed = True, self._told, None
        gather.rounds += 1
        if gather.owner is not None and gather.owner.pins is None:
            gather.base = gather.pins = NO_PINS  # which it has made of what it had read by then
        now, near, news = self.parts.clock.now(), self.parts.access.near, list[ResourceKey]()
        if near is not None:
            read = [each.revision for each in gather.readings.values()]
            written = (*near.replaced(read), *gather.failures)
            stays = (gather.base, gather.forced)
            news = [k for k in written if k in near and not any(k in each for each in stays)]
        for part in portions(news, _KEYS_PER_STEP):
            for key in part:
                policy = self._policy(gather, key)
                revision = None if near is None or policy is None else near.find(key, now, policy)
                if policy is None:
                    gather.readings.pop(key, None)
                elif (
                    revision is not None
                    and now - revision.observed_at <= policy.ttl_seconds
                    and self._serve(gather, policy, revision, now)
                ):
                    gather.failures.pop(key, None)
            if len(part) == _KEYS_PER_STEP:
                yield
            if not gather.open:
                return
        gather.open = False
        self._check(gather)

    def _judge(self, gather: Gather) -> Steps:
        """Look for the readings in what its unit of work has seen; if that fails, judge them."""
        odd: Collection[ResourceKey] = ()
        gather.open = True  # nobody else is to judge it meanwhile
        if len(gather.readings) > _KEYS_AT_ONCE:
            yield
        readings, work = tuple(gather.readings.values()), gather.work
        if gather.base or not (yield from work.view.covers(readings)):
            odd = yield from at_odds(gather.readings, gather.base)
            if not (odd or gather.base):
                work.view = View()  # what follows goes with these, not with what was seen before
                yield from work.view.covers(readings)
        below = None
        if gather.pins_beneath and not odd:
            below = yield from beneath(gather.readings, gather.base, gather.work.since)
        if not gather.open:
            return
        gather.open = False
        if not gather.agrees:
            self._check(gather)  # more has been pinned meanwhile
        elif odd:
            self._derive_anew(gather, odd)
        else:
            gather.below = below
            self._tell(gather)

    def _tell(self, gather: Gather) -> None:
        gather.tell()
        if gather.owner is None:
            self.agenda.leave_room()

    def _derive_anew(self, gather: Gather, odd: Collection[ResourceKey]) -> None:
        """Replace derived readings that rest on other revisions than the rest of the gather.

        What comes of it is judged again. Each round leaves the lowest of the keys in agreement, so
        many more rounds than keys mean that something changes as fast as it is derived.
        """
        gather.agreed = None
        gather.rounds += 1
        for key in odd:
            del gather.readings[key]
        if gather.rounds > len(gather.keys) + _SPARE_ROUNDS:
            why = "what it is derived from kept changing"
            gather.failures.update((key, Failure.given_up(key, why)) for key in odd)
            self._check(gather)
            return
        gather.settle_pins()
        gather.open = True
        for key in odd:
            policy = self._policy(gather, key)
            if policy is not None:
                self._acquire_privately(gather, key, policy)
        gather.open = False
        self._check(gather)

    def refuse_circle(self, gather: Gather, circle: Sequence[Flight]) -> None:
        """Fail what a gather waits for in vain, as that waits for it."""
        path = tuple([flight.key for flight in (*circle, circle[0])])
        gather.failures[path[0]] = Failure.of_cycle(path[0], path)
        self._leave(gather, circle[0])
        self._check(gather)

    def abandon(self, gather: Gather) -> None:
        """End the waiting without an outcome: the one who waited has gone."""
        gather.over, gather.open = True, False
        for log in gather.logs.values():
            if log.obtained is None:  # or else who comes next would have no story of its own
                log.settled(None, None, pinned=False)
        self.agenda.add(self._leave_on, gather)

    def _leave_on(self, gather: Gather) -> Steps:
        for part in portions(tuple(gather.pending), _KEYS_PER_STEP):
            for awaited in part:
                self._leave(gather, awaited)
            yield

    def strike(self, gather: Gather) -> None:
        """End the waiting at the deadline: what is ready, a stale value, or else a failure."""
        self.parts.counters.deadline_exceeded_count += 1
        gather.open, gather.struck = False, True
        self.agenda.add(self._strike_on, gather)

    def _strike_on(self, gather: Gather) -> Steps:
        """Leave what is waited for, so that calls that end for that say so; then end the rest."""
        pending: dict[ResourceKey, Flight | Read] = {each.key: each for each in gather.pending}
        ends: dict[ResourceKey, Failure] = {}
        known: dict[Call | Lane, str] = {}
        for part in portions(pending.values(), _KEYS_PER_STEP):
            for awaited in part:
                if isinstance(awaited, Flight):
                    was = doing(awaited, known)
                    ends[awaited.key] = late(awaited.key, gather.work.deadline, awaited, was)
            for awaited in part:
                self._leave(gather, awaited)
            yield
        for keys in portions(gather.keys, _KEYS_PER_STEP):
            for key in keys:
                if key not in gather.readings and key not in gather.failures:
                    self._strike_key(gather, key, pending.pop(key, None), ends.get(key))
            if len(keys) == _KEYS_PER_STEP:
                yield
        if gather.told != self._told and gather.readings:
            yield from self._take_news(gather)
        yield from gather.drop_odd()
        self._tell(gather)

    def _strike_key(
        self,
        gather: Gather,
        key: ResourceKey,
        awaited: Flight | Read | None,
        failure: Failure | None,
    ) -> None:
        """End a key at the deadline, with how it stood then unless its call has said so itself."""
        flight = awaited if isinstance(awaited, Flight) else None
        settlement = None if flight is None else flight.settlement
        if not isinstance(settlement, Reading):
            if failure is None or (flight is not None and ended_late(flight)):
                failure = late(key, gather.work.deadline, flight)
            stale = None
            if awaited is not None and gather.accepts_stale(key):
                stale = stale_candidate(awaited, failure, self.parts)
            settlement = Failed(failure, stale)
        joined = flight is not None and flight.sponsor is not gather.work
        self._receive(gather, key, settlement, joined)

    # News: what the cache tells of other writers ------------------------------------------------

    def revised(self, changes: Mapping[ResourceKey, Revision | None]) -> None:
        """Learn what is current now; of what a flight has written nobody tells."""
        self._told += 1
        for key, revision in changes.items() if self.board.busy else ():
            self._tell_flights(key, revision)
        self._absent.forget(changes)
        self.refresher.outdate(changes)
        if self._store is None:
            self.reads.hide(changes)
        news = changes.items()
        self._note_news((key, None if new is None else new.version) for key, new in news)

    def _tell_flights(self, key: ResourceKey, revision: Revision | None) -> None:
        for flight in self.board.under_way(key):
            if revision is not None and revision.dependency_versions:
                continue  # news of its inputs is told by themselves
            if revision is None or not flight.has_begun:
                flight.cached = revision  # what is gone must not stand in for newcomers
            else:
                flight.event = revision
                self.board.hide(flight, cacheable=True)

    def announced(self, keys: Collection[ResourceKey]) -> None:
        """Learn that publications begin: what was fetched meanwhile waits for their outcome."""
        self.publications.begin(keys)

    def concluded(self, keys: Collection[ResourceKey]) -> None:
        """Learn that publications have ended: values held back go to the cache, or give way."""
        for flight in self.publications.end(keys):
            self.agenda.add(self._offer, flight)

    def invalidating(self, versions: Mapping[ResourceKey, str | None]) -> None:
        """Learn that keys are invalidated: what was read before is not cached nor joined."""
        if self.board.busy:
            for key in versions:
                for flight in self.board.under_way(key):
                    self._invalidate(flight)
        self._absent.forget(versions)
        self.refresher.outdate(versions)
        self.reads.hide(dict.fromkeys(versions))
        self._note_news(versions.items())

    def _invalidate(self, flight: Flight) -> None:
        """Forget what a flight knows from before; its value, too, unless it is still to be read."""
        if flight.has_begun:
            self.board.hide(flight, cacheable=False)
        else:
            flight.cached = flight.candidate = flight.event = None

    def invalidating_where(self, matches: Callable[[ResourceKey], bool]) -> None:
        """Learn that all matching keys are invalidated, also those that derivations rest on."""
        gathers = [flight.gather for flight in self.board.deriving if flight.gather is not None]
        known = [each for gather in gathers for each in gather.taken()]
        taken = lineage(each.revision for each in known if isinstance(each, Reading))
        under_way = [*self.board.flights, *self.board.aside, *self.refresher.keys]
        under_way += [revision.key for revision in taken.values()]
        under_way += [*self.refresher.failing, *self._absent.keys]
        self.invalidating({key: None for key in under_way if matches(key)})

    def _hide_what_has_begun(self) -> None:
        """Let nobody who comes from now on join what has begun to read: news may be missing."""
        for flight in tuple(self.board.flights.values()):
            if flight.has_begun:
                self.board.hide(flight, cacheable=True)
        self._absent.keys.clear()
        self.reads.hide({})

    def _note_news(self, versions: Iterable[tuple[ResourceKey, str | None]]) -> None:
        """Remember news for those who may want to join a derivation that has read before it."""
        if not self.board.deriving:  # who else would ask?
            self._news.clear()
        elif not self._news.note(versions):
            for flight in tuple(self.board.deriving):
                self.board.hide(flight, cacheable=False)

    def _is_behind(self, flight: Flight) -> bool:
        """Whether a flight has taken in what there was news of since, or waits for one that has.

        If so, newcomers must not join it, and its value is not cached.
        """
        if self._news.count <= flight.since:
            return False
        if not (flight.joinable or flight.cacheable):
            return True
        if not self._news.overtakes(flight):
            return False
        self.board.hide(flight, cacheable=False)
        return True

    def forget(self) -> None:
        """Start nothing any more, and tell the circuits of calls: the event loop has ended."""
        self.parts.access.subscribers.unsubscribe(self)
        self.refresher.closed = True
        self.dispatch.close()
        self.publications.forget()
        for flight in [*self.board.flights.values(), *chain(*self.board.aside.values())]:
            if flight.call is not None:
                flight.call.forget()

    def __repr__(self) -> str:
        return f"<SingleFlight flights={len(self.board.flights)} {self.dispatch!r}>"


def _is_outdated(gather: Gather, read: Read, revision: Revision | None) -> bool:
    """Whether a derivation would take in what there has been news of since it asked.

    Others may have joined it after the news.
    """
    if gather.owner is None:
        return False
    if revision is None and read.flight is not None:
        settlement = read.flight.settlement
        revision = settlement.revision if isinstance(settlement, Reading) else None
    return _has_changed(read, revision)


def _has_changed(read: Read, revision: Revision | None) -> bool:
    """Whether there has been news of a revision, or what it rests on, since it was asked for."""
    changed = read.group.changed
    if not changed or revision is None:
        return False
    return any(each.key in changed for each in lineage((revision,)).values())


class Stage(Gather):
    """A gather that a task waits for: until all is known, or the deadline strikes.

    `done` is called in the very step in which that is so.
    """

    _future: asyncio.Future[None] | None = None
    _error: BaseException | None = None
    _timer: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None

    def tell(self) -> None:
        """Let the task go on, once."""
        if not self.over:
            self.end()
            try:
                self.done(self)
            except BaseException as error:
                self._error = error
            self._wake()

    def insist(self, seconds: float) -> None:
        """Be told in so many seconds at the latest, even if the engine never gets there."""
        if not self.over:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._tell_anyway)

    def _tell_anyway(self) -> None:
        settled = {**self.readings, **self.failures}  # which asks no key for its hash
        for key in set(self.keys).difference(settled):
            self.failures[key] = late(key, self.work.deadline, None)
        at_once(self.drop_odd())
        self.tell()

    def fail(self, error: BaseException) -> None:
        """End the waiting with an error."""
        self.over = True
        self._error = error
        self._wake()

    def look_out(
        self, look: Callable[[tuple[Flight, ...]], None], seen: tuple[Flight, ...]
    ) -> None:
        """Have a look at what it waits for after a while, and be told what was seen before."""
        seconds = LOOK_SECONDS * (1 + len(self.pending) // _LOOKED_AT)  # to look at many costs more
        self._look = asyncio.get_running_loop().call_later(seconds, look, seen)

    def close(self) -> None:
        """Leave no timer behind."""
        for timer in (self._timer, self._look):
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        """Wait until the stage is over; raise what it failed with."""
        if not self.over:
            self._future = asyncio.get_running_loop().create_future()
            await self._future
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class Crowd(Stage):
    """Builds of one key that have joined its flight, and need nothing else: they wait as one.

    `tasks` are those who wait, each for a future of its own.
    """

    def __init__(self, work: Work, flight: Flight, agenda: Agenda) -> None:
        super().__init__(work, (flight.key,), NO_PINS, lambda _: None)
        self._agenda = agenda
        self.tasks: dict[asyncio.Future[None], None] = {}
        self._made: list[SnapshotValue[Any]] = []

    @property
    def size(self) -> int:
        """How many wait."""
        return len(self.tasks)

    def enter(self) -> asyncio.Future[None]:
        """Return what one more has to await."""
        told = asyncio.get_running_loop().create_future()
        self.tasks[told] = None
        return told

    def _wake(self) -> None:
        self._agenda.add(Crowd._wake_all, self)

    def _wake_all(self) -> Steps:
        for part in portions(self.tasks.copy(), _WOKEN_AT_ONCE):
            for future in part:
                if not future.done():
                    future.set_result(None)
            self._agenda.leave_room(len(part))
            yield

    async def copies(self, deliveries: Deliveries) -> Copies:
        """Return what one of them gets.

        The first of those who were woken together copies a trifle for all of these.

        Raises:
            RuntimeError: if the builder was closed before anything was known.
        """
        if self._error is not None:
            raise BuilderClosedError
        for key, reading in self.readings.items():
            if not self._made:
                self._made = deliveries.alike(reading, min(len(self.tasks) + 1, _WOKEN_AT_ONCE))
            if self._made:
                return FrozenDict({key: self._made.pop()}), {}
        return await deliveries.values(self.readings, None)


@dataclass(slots=True, eq=False)
class Refresh:
    """One revision on its way to be renewed, set off by one unit of work, its `parent`.

    Who waits for its end waits for `ended`.
    """

    key: ResourceKey
    version: str
    reason: str
    parent: Work
    gather: Gather | None = None
    urgent: bool = False
    ended: asyncio.Future[None] | None = None


@dataclass(eq=False, repr=False)
class Refresher:
    """Refreshes in the background: one for each key at a time, on nobody's deadline.

    They share flights, capacity and retries with everybody else. Those that one unit of work asks
    for in one step, for one reason, travel together. They run with the context variables of the
    builder's making and without the metadata of the request that set them off. What a refresh of a
    key keeps away is another one, until the key is invalidated: then the one under way brings what
    nobody wants, however long it takes.

    `failing` are the keys whose last refresh has failed, each with the version that it was to
    renew and what to say of it, until a source has given a value.
    """

    flights: SingleFlight
    variables: contextvars.Context
    failing: dict[ResourceKey, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    closed: bool = False
    _running: dict[Refresh, None] = field(default_factory=dict)
    _current: dict[ResourceKey, Refresh] = field(default_factory=dict)
    _next: dict[tuple[Work, str], list[Refresh]] = field(default_factory=dict)

    @property
    def keys(self) -> Collection[ResourceKey]:
        """The keys of which a refresh under way keeps further ones away."""
        return self._current.keys()

    @property
    def active(self) -> int:
        """How many refreshes are under way."""
        return len(self._running)

    def notes(self, revision: Revision) -> Mapping[str, Any]:
        """Return what there is to say to who gets a revision whose last refresh has failed."""
        version, said = self.failing.get(revision.key, ("", {}))
        return said if version == revision.version else {}

    def schedule(self, revision: Revision, reason: str, parent: Work) -> bool:
        """Refresh a revision soon; False if that is under way already."""
        key = revision.key
        if self.closed or key in self._current:
            return False
        refresh = self._current[key] = Refresh(key, revision.version, reason, parent)
        self._running[refresh] = None
        if (parent, reason) not in self._next:
            self._next[parent, reason] = []
            asyncio.get_running_loop().call_soon(self._start, parent, reason)
        self._next[parent, reason].append(refresh)
        parent.record.refresh_scheduled += 1
        if (report := self.flights.parts.report) is not None:
            facts = {"reason": reason, "snapshot_id": parent.context.snapshot_id}
            report.tell("resource_refresh_scheduled", resource=key, **facts)
        return True

    def outdate(self, keys: Collection[ResourceKey]) -> None:
        """Let keys be refreshed anew: what is under way has read what was before."""
        if self._current or self.failing:
            for key in keys:
                self._current.pop(key, None)
                self.failing.pop(key, None)

    def _start(self, parent: Work, reason: str) -> None:
        group = [each for each in self._next.pop((parent, reason), ()) if each in self._running]
        try:
            if group:
                self._begin(group, parent, reason)
        except BaseException:
            for refresh in group:  # or it would keep all others away
                self._end(refresh)
            raise

    def _begin(self, group: Collection[Refresh], parent: Work, reason: str) -> None:
        parts = self.flights.parts
        context = FetchContext(
            requested_at=parts.clock.now(),
            metadata={
                "background_refresh": True,
                "refresh_reason": reason,
                "parent_snapshot_id": parent.context.snapshot_id,
            },
            snapshot_id=new_id(),
        )
        trace = parts.tracing.begin("refresh", context, None, parent.trace)
        variables = self.variables if trace is None else self.variables.copy()
        work = Work(context, variables=variables, trace=trace)
        if parts.report is not None:
            told = {"kind": "refresh", "snapshot_id": context.snapshot_id}
            parts.report.tell("snapshot_started", **told)
        if trace is not None:
            link = None if parent.trace is None else parent.trace.span
            trace.begin_stage("refresh", len(group), variables, link, reason=reason)
        for refresh in group:
            done = partial(self._done, refresh)
            refresh.gather = Gather(work, (refresh.key,), Pins(), done, demand=_ANEW)
            refresh.gather.urgent = refresh.urgent
        for refresh in group:
            if refresh.gather is not None:
                self.flights.look(refresh.gather)

    def _done(self, refresh: Refresh, gather: Gather) -> None:
        key, record, parts = refresh.key, refresh.parent.record, self.flights.parts
        self._end(refresh)
        reading, version = gather.readings.get(key), refresh.version
        absent = reading is None and gather.failures[key].absent
        error = None if reading is not None or absent else gather.failures[key].make()
        grounds = None if reading is None else reading.revision.grounds
        why = ""
        if reading and reading.stale:
            why = f"what {reading.revision.source!r} has said of it outranks what is fresh"
        elif reading and grounds and grounds.fresh_until < parts.clock.now():
            why = f"{grounds.perishing.display} is"
        if reading and why:
            version = reading.revision.version
            reading = None
            error = SourceUnavailableError(f"{key.display} is still stale, as {why}")
        if gather.work.trace is not None:
            gather.work.trace.refreshed(reading is not None or absent)
        record.refresh_completed += reading is not None or absent
        record.refresh_failed += reading is None and not absent
        self.failing.pop(key, None)
        if error is not None:
            said = {"refresh_error_type": type_name(error)}
            said["refresh_error"] = folded_message(message_of(error))
            self.failing[key] = version, said
            if len(self.failing) > _MOST_FAILING:
                del self.failing[next(iter(self.failing))]
            last = error.failures[-1:] if isinstance(error, ResourceResolutionError) else ()
            parts.log.failed("background refresh", *(last or (error,)))
        elif parts.log.troubled:
            parts.log.works("background refresh")
        if (report := parts.report) is None:
            return
        facts: dict[str, Any] = {
            "resource": key,
            "reason": refresh.reason,
            "snapshot_id": gather.work.context.snapshot_id,
            "parent_snapshot_id": refresh.parent.context.snapshot_id,
        }
        if reading is not None:
            report.tell("resource_refresh_completed", **facts, source=reading.revision.source)
        elif error is None:
            report.count("resource_refresh_total", key, status="absent")
        else:
            report.tell("resource_refresh_failed", **facts, error_type=error, error=error)

    def _end(self, refresh: Refresh) -> None:
        refresh.gather = None
        self._running.pop(refresh, None)
        if self._current.get(refresh.key) is refresh:
            del self._current[refresh.key]
        if refresh.ended is not None and not refresh.ended.done():
            refresh.ended.set_result(None)

    async def wait(self) -> None:
        """Wait for the refreshes that are under way or scheduled at this moment.

        A source that asks for this does not wait for what waits for it, and what it waits for
        needs no slot.
        """
        call, awaited = call_served(), [*self._running]
        asked: dict[Gather, None] = {}
        try:
            while awaited := [each for each in awaited if self._keeps(call, each)]:
                if call is not None:
                    asked |= {each.gather: None for each in awaited if each.gather is not None}
                    call.ask(*asked)
                ended = [self._end_of(each, call) for each in awaited]
                await asyncio.wait(ended, timeout=None if call is None else LOOK_SECONDS)
        finally:
            if call is not None:
                for gather in asked:
                    call.asked.pop(gather, None)

    def _keeps(self, call: Call | None, refresh: Refresh) -> bool:
        """Whether a refresh is under way, and does not wait, by now, for a call that waits."""
        gather = refresh.gather
        waits = call is not None and gather is not None and circle_of(call, gather)
        return refresh in self._running and not waits

    def _end_of(self, refresh: Refresh, call: Call | None) -> asyncio.Future[None]:
        """Return what tells the end of a refresh, which a call under way may be waiting for."""
        if call is not None and call.keeps_others_waiting and not refresh.urgent:
            refresh.urgent = True
            if refresh.gather is not None:
                self.flights.hurry(refresh.gather)
        refresh.ended = refresh.ended or asyncio.get_running_loop().create_future()
        return refresh.ended

    def cancel(self) -> None:
        """Give up every refresh."""
        self._next.clear()
        for refresh in tuple(self._running):
            if refresh.gather is not None:
                self.flights.abandon(refresh.gather)
                if refresh.gather.work.trace is not None:
                    refresh.gather.work.trace.refreshed(False)
            if (report := self.flights.parts.report) is not None:
                report.count("resource_refresh_total", refresh.key, status="cancelled")
            self._end(refresh)

    def __repr__(self) -> str:
        return f"<Refresher active={len(self._running)} closed={self.closed}>"


def _elsewhere() -> RuntimeError:
    return RuntimeError(
        "this builder has work under way on another event loop; use one builder per "
        "loop, or a SyncSnapshotBuilder to share one between threads"
    )


class Engine:
    """Runs the stages of units of work on one event loop, from the first one to the end."""

    def __init__(self, parts: Parts, variables: contextvars.Context) -> None:
        self.parts = parts
        self._variables = variables
        self.flights: SingleFlight = SingleFlight(parts, variables)
        self.warm_reads: WarmReads = WarmReads(parts)
        followed = parts.report is not None or not parts.tracing.off
        self._joining_store = None if followed else parts.access.store
        self._stages: dict[Stage, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = 0
        self._moves: dict[asyncio.AbstractEventLoop | None, asyncio.AbstractEventLoop] = {}
        self.closed: bool = False

    async def run(self, stage: Stage) -> None:
        """Wait until every key of a stage has a reading or a failure, or its deadline strikes.

        Raises:
            RuntimeError: if the builder is closed, before or meanwhile.
        """
        loop, flights, work = self.enter(), self.flights, stage.work
        work.settle_on(loop)
        self._stages[stage] = None
        call = call_served()
        if call is not None and call.keeps_others_waiting:
            self._run_for(call, stage, loop)
        elif flights.dispatch.quiet_until:
            flights.dispatch.end_quiet()
        try:
            if self._loop is not loop:  # another thread came before the stage was seen
                raise _elsewhere()
            if work.expired:
                flights.note(stage)
                self._strike(stage)
            else:
                work.enter(stage, self._strike)
                flights.look(stage)
            await stage.wait()
        finally:
            self._stages.pop(stage, None)
            work.leave(stage)
            stage.close()
            if not stage.over and not loop.is_closed():
                flights.abandon(stage)
            if stage.within is not None:
                flights.board.unnest(stage.within)
            if call is not None:
                call.asked.pop(stage, None)

    def _run_for(self, call: Call, stage: Stage, loop: asyncio.AbstractEventLoop) -> None:
        """Let a stage be awaited by the source of a call, perhaps upon another loop.

        It queues for no slot: who holds that may wait, on its own loop, for the one of the call.
        """
        stage.urgent = True
        own = call.upon(loop)
        if own is not None:
            stage.within = own
            self.flights.board.nest(own)
        call.ask(stage)
        if own is not call:
            stage.look_out(partial(self._look_for_circle, call, stage), ())

    def _look_for_circle(self, call: Call, stage: Stage, seen: tuple[Flight, ...]) -> None:
        """Break the circle over several loops that a stage waits in; seen twice, it is one."""
        circle = circle_of(call, stage)
        if circle and circle == seen and not stage.open:
            self.flights.refuse_circle(stage, circle)
        if not stage.over:
            stage.look_out(partial(self._look_for_circle, call, stage), circle)

    def crowd_of(
        self, keys: Collection[ResourceKey], open_work: Callable[[], Work]
    ) -> Crowd | None:
        """Return those who wait for the flight of a single key together, for one more to join.

        None if there is no flight to join, or anybody follows what each of them does.

        Raises:
            RuntimeError: if the builder is closed.
        """
        self.require_open()
        if not self.flights.board.flights or len(keys) != 1:
            return None
        store = self._joining_store
        if store is None or call_served() or asyncio.get_running_loop() is not self._loop:
            return None
        (key,) = keys
        flight = self.flights.shared(key)
        if flight is None or not store.lacks(keys):
            return None
        crowd = flight.crowd
        if crowd is None or crowd.over:
            crowd = flight.crowd = Crowd(open_work(), flight, self.flights.agenda)
            self._stages[crowd] = None
            self.flights.board.join(crowd, flight)
        return crowd

    def leave(self, crowd: Crowd, future: asyncio.Future[None]) -> None:
        """Wait no longer; what nobody waits for any more is given up."""
        del crowd.tasks[future]
        if not crowd.tasks:
            self._stages.pop(crowd, None)
            crowd.work.close()
            if not crowd.over and not future.get_loop().is_closed():
                self.flights.abandon(crowd)

    def _strike(self, stage: Stage) -> None:
        """End the waiting of a stage at its deadline, whatever the engine makes of that."""
        try:
            self.flights.strike(stage)
        except BaseException as error:
            self.flights.broken(stage, error)
        stage.insist(_GRACE_SECONDS)

    # The event loop ---------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """How many workers are under way to call sources."""
        return sum(not task.done() for task in self.flights.dispatch.workers.copy())

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        dispatch, refreshes = self.flights.dispatch, self.flights.refresher.active
        return bool(self._stages or dispatch.workers or dispatch.tasks or refreshes)

    def enter(self) -> asyncio.AbstractEventLoop:
        """Begin something on the running event loop, make that loop the engine's own, return it.

        Raises:
            RuntimeError: if the builder is closed, or has work under way on another loop.
        """
        self.require_open()
        return self.attach()

    def attach(self) -> asyncio.AbstractEventLoop:
        """Make the running event loop the engine's own, with flights of its own, and return it.

        Raises:
            RuntimeError: if another loop still has work of this builder under way.
        """
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return loop
        self.parts.access.attach()
        # Only one moves it at a time, and says so before it looks whether anything is under way.
        # After one whose loop was closed, as an interrupt had ended it half-way, comes the next.
        mover = self._moves.setdefault(None, loop)
        while mover is not loop and mover.is_closed():
            mover = self._moves.setdefault(mover, loop)
        if mover is not loop:
            raise _elsewhere()
        before, self._loop = self._loop, loop
        try:
            if before is not None:
                self._leave(before)
        except BaseException:
            self._loop = before
            raise
        finally:
            self._moves.clear()
        self._process = os.getpid()
        return loop

    def _leave(self, before: asyncio.AbstractEventLoop) -> None:
        if before.is_closed() or self._process != os.getpid():  # which has no loop of its parent's
            self.parts.capacity.forget()
            self.parts.threads.hear()
        elif self.busy:
            raise _elsewhere()
        self.flights.forget()
        self.flights = SingleFlight(self.parts, self._variables)
        self._stages.clear()
        if self.closed:
            self.flights.forget()

    def require_open(self) -> None:
        """Raise `RuntimeError` once the builder is closed."""
        if self.closed:
            raise BuilderClosedError

    # The end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Refuse new stages, and end those under way with an error."""
        self.closed = True
        self.flights.refresher.closed = True
        for stage in tuple(self._stages):
            self.flights.abandon(stage)
            stage.fail(BuilderClosedError())

    async def stop(self, timeout_seconds: float) -> Mapping[str, int]:
        """End every task; return how many calls of each source, or to the cache, still run then.

        A source that runs in a thread, or ignores its cancellation, cannot be ended from outside.
        What waits for a thread leaves it behind then: a program that has cancelled all tasks at
        once will not do so again, and could not end.
        """
        self.flights.refresher.cancel()
        self.parts.access.subscribers.unsubscribe(self.flights)
        self.flights.dispatch.close()
        now = asyncio.get_running_loop().time
        until = now() + timeout_seconds
        running = {*self.flights.dispatch.workers, *self.flights.dispatch.tasks}
        for task in running:
            task.cancel()
        if running:
            _, running = await asyncio.wait(running, timeout=timeout_seconds)
        await self.flights.agenda.finish()
        endings = self.flights.dispatch.endings
        while endings:
            await asyncio.sleep(0)
            for steps, call in tuple(endings.items()):
                call.work_off(steps)
            await self.flights.agenda.finish()
        for flight in self.flights.publications.forget():
            self.flights.settle(flight, Failed(Failure.given_up(flight.key)))
        running |= await self.parts.access.drain(until - now())
        left: dict[str, int] = {}
        for task in running:
            name = task.get_name().removeprefix("coalestra ")
            left[name] = left.get(name, 0) + 1
        self.parts.threads.let_go()
        for task in running:
            task.cancel()
        return left

    def __repr__(self) -> str:
        return f"<Engine stages={len(self._stages)} {self.flights!r} closed={self.closed}>"
