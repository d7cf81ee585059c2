"""The scheduler's list of synchronous steps: run in order, never nested, never for long."""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol

from coalestra.cache.store import CacheListener, EntryStore, Ranked, decide
from coalestra.concurrency.pace import SLICE_SECONDS
from coalestra.core.errors import (
    BuilderClosedError,
    DependencyResolutionError,
    ResourceResolutionError,
    SnapshotDeadlineExceededError,
    SourceFailure,
    SourceProtocolError,
    SourceUnavailableError,
)
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, policy_of_all
from coalestra.core.results import CacheWriteStatus
from coalestra.core.snapshot import Snapshot, snapshot_of
from coalestra.core.values import Revision, SnapshotValue
from coalestra.orchestration.calls import Dispatch
from coalestra.orchestration.deliveries import Deliveries, WarmReads
from coalestra.orchestration.flights import (
    Acquisition,
    FlightBoard,
    Gather,
    Phase,
    Read,
    Serving,
    Work,
    after_failures,
    after_write,
    instead_of_event,
    nothing,
    stale_candidate,
)
from coalestra.orchestration.foreign_cache import CacheReads, CacheWrites
from coalestra.orchestration.parts import Equipment
from coalestra.orchestration.readings import (
    NO_PINS,
    Failed,
    Failure,
    Reading,
    Settlement,
    at_odds,
    hold,
    rests_on,
)
from coalestra.orchestration.refresh import Refresher
from coalestra.orchestration.sources import Link, SourceKind

# The scheduler's list of synchronous steps: run in order, never nested, never for long -----------


_STEPS_BETWEEN_LOOKS = 4


class Agenda:
    """Runs small synchronous steps without recursion and without holding the event loop.

    A step may add further steps. They run after it, in order, so a chain of ten thousand
    settling keys needs no stack. When a run has taken `SLICE_SECONDS` the rest continues in a
    later step of the event loop.
    """

    __slots__ = ("_handle", "_running", "_steps", "_watch")

    def __init__(self, watch: Callable[[], float] = time.perf_counter) -> None:
        self._steps: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._running = False
        self._handle: asyncio.Handle | None = None
        self._watch = watch

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        return f"<Agenda steps={len(self._steps)} running={self._running}>"

    def add(self, step: Callable[..., None], *arguments: Any) -> None:
        """Put a step at the end, and run the list now unless it is being run already."""
        self._steps.append((step, arguments))
        if not self._running and self._handle is None:
            self.run()

    def run(self) -> None:
        """Run steps until none is left or the slice of time is used up."""
        if self._running:
            return
        self._running = True
        self._handle = None
        steps = self._steps
        until = self._watch() + SLICE_SECONDS
        looks = _STEPS_BETWEEN_LOOKS
        try:
            while steps:
                step, arguments = steps.popleft()
                try:
                    step(*arguments)
                except Exception as error:
                    _tell_loop(step, error)
                looks -= 1
                if not looks:
                    looks = _STEPS_BETWEEN_LOOKS
                    if self._watch() > until:
                        break
        finally:
            self._running = False
            if steps:
                self._handle = asyncio.get_running_loop().call_soon(self.run)

    def clear(self) -> None:
        """Forget every step: the loop they belonged to is gone."""
        self._steps.clear()
        self._handle = None


def _tell_loop(step: Callable[..., None], error: Exception) -> None:
    """A step must not fail; one that does shall neither stop the others nor pass unseen."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": f"coalestra: {step.__qualname__} failed", "exception": error}
    )


# Fetched values on their way to the cache, where they may lose to newer knowledge ----------------


_WRITING = Phase.WRITING
_SETTLED = Phase.SETTLED


class Censor(CacheListener, Protocol):
    """Whoever knows of the publications under way, which are `open`."""

    open: dict[ResourceKey, int]

    def hold_back(self, flight: Acquisition) -> bool:
        """Keep the value of a flight until its time has come; return whether that is so."""


class Offers:
    """Offers the value of a flight to the cache, and settles the flight by what came of it.

    `news` says whether a value must wait for the end of a publication; it need not be told of what
    is written here.
    """

    def __init__(
        self,
        equipment: Equipment,
        settle: Callable[[Acquisition, Settlement], None],
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self._equipment = equipment
        self._settle = settle
        self._store = equipment.access.store
        self.writes: CacheWrites = CacheWrites(equipment, self._fit, self._written, tasks)
        self.news: Censor

    def take(self, flight: Acquisition, revision: Revision, dated: bool) -> None:
        """Take a fresh value of a flight; `dated` if its source said when it was observed."""
        link = flight.link
        report = self._equipment.report
        if report is not None and link is not None:
            report.resource_resolved(revision, link.kind.value)
        flight.phase = _WRITING
        flight.offered = revision
        flight.dated = dated
        if self.news.open and self.news.hold_back(flight):
            return
        store = self._store
        if store is not None and flight.cacheable and flight.event is None:
            self._put(store, flight, revision)
        else:
            self.make(flight)

    def make(self, flight: Acquisition) -> None:
        """Write a value to the cache, unless something newer is known of its key."""
        if not self._fit(flight) or flight.offered is None:
            return
        if self._store is None:
            self.writes.add(flight)
        else:
            self._put(self._store, flight, flight.offered)

    def _put(self, store: EntryStore, flight: Acquisition, revision: Revision) -> None:
        status, current, _ = store.put(revision, replace_equal=flight.forced, teller=self.news)
        self._settle(flight, after_write(flight, status, current, self._equipment))

    def _fit(self, flight: Acquisition) -> bool:
        """Whether the value of a flight may be written; if not, the flight ends without that."""
        if flight.offered is None or flight.phase is _SETTLED:
            return False
        event = flight.event
        if not flight.cacheable or (event is not None and not flight.dated):
            self._settle(flight, instead_of_event(flight, flight.offered, self._equipment))
            return False
        if event is None:
            return True
        # The event counts even if the cache has had to make room and holds it no longer.
        status = decide(flight.offered, event, replace_equal=flight.forced)
        if status is CacheWriteStatus.STORED:
            return True
        held = None if self._store is None else self._store.peek(flight.key)
        self._written(flight, status, held or event)
        return False

    def _written(self, flight: Acquisition, status: CacheWriteStatus, current: Revision) -> None:
        if flight.phase is not _SETTLED:
            self._settle(flight, after_write(flight, status, current, self._equipment))

    def __repr__(self) -> str:
        return f"<Offers {self.writes!r}>"


# The scheduler: moves every flight of a builder, and never blocks --------------------------------
#
# Laws:
#
# 1. A key has at most one flight to join. A publication or an invalidation of the key, or a demand
#    for a value read from now on, takes the flight out of sight; it then ends for its own waiters.
# 2. A flight waits for nothing but its own dependencies, and for them without a task, slot or
# frame.
# 3. A settled key reaches its waiters in the same step.
# 4. What a waiter's deadline or cancellation ends is that waiter's waiting, nothing else.


_CHOOSING = Phase.CHOOSING
_GATHERING = Phase.GATHERING


class Scheduler:
    """Starts, joins, advances and settles flights.

    `derive` is asked to see to the dependencies of a derived key, `inputs` to make their snapshot,
    `completed` is told of gathers that wait for nothing more, and `abandon` of those that nobody
    wants any longer.
    """

    def __init__(self, equipment: Equipment) -> None:
        self.equipment = equipment
        self.agenda: Agenda = Agenda()
        self.board: FlightBoard = FlightBoard(equipment.report)
        self.dispatch: Dispatch = Dispatch(self, self._not_dispatched)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.offers: Offers = Offers(equipment, self.settle, self.tasks)
        self.hold: Callable[[Work], None] = self.dispatch.hold
        self.release: Callable[[Work], None] = self.dispatch.release
        self.delivered: Callable[[Acquisition, Revision, bool], None] = self.offers.take
        self.derive: Callable[[Acquisition, Link], None]
        self.inputs: Callable[[Acquisition], Awaitable[Snapshot]]
        self.inputs_now: Callable[[Acquisition], Snapshot | None]
        self.completed: Callable[[Gather], None]
        self.abandon: Callable[[Gather], None]

    # Join and leave ---------------------------------------------------------------------------

    def acquire(
        self,
        gather: Gather,
        key: ResourceKey,
        policy: FreshnessPolicy,
        cached: Revision | None = None,
    ) -> None:
        """Let `gather` wait for the flight of `key`; start one if there is none to join."""
        forced = bool(gather.forced) and key in gather.forced
        flight = self.board.flights.get(key)
        if flight is not None and forced and not _serves_forced(flight, gather):
            self.board.hide(flight, cacheable=False)
            flight = None
        if flight is not None:
            if cached is not None:
                flight.cached = cached
            self.board.join(gather, flight)
            return
        flight = Acquisition(key, policy, gather.work, forced=forced)
        flight.cached = cached
        self.board.start(gather, flight)
        self._proceed(flight)

    def acquire_privately(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> None:
        """Let `gather` wait for a derivation of `key` that agrees with its pins."""
        known = gather.pins.private.get(key)
        if known is not None:
            self.board.join(gather, known)
            return
        forced = key in gather.forced
        flight = Acquisition(key, policy, gather.work, forced=forced, pins=gather.pins)
        flight.cacheable = forced
        gather.pins.private[key] = flight
        self.board.set_aside(flight)
        self.board.join(gather, flight)
        self._later(flight)

    def leave(self, gather: Gather, flight: Acquisition) -> None:
        """Let `gather` wait no longer. What nobody waits for is given up, or runs to its bound."""
        self.board.leave(gather, flight)
        if not flight.waiters:
            self.agenda.add(self._unwanted, flight)

    def _unwanted(self, flight: Acquisition) -> None:
        if flight.phase is _SETTLED or flight.waiters:
            return
        if flight.attempt is not None:
            flight.attempt.unwanted()
        elif flight.phase is _WRITING and self.offers.writes.unwanted(flight):
            return
        else:
            self._drop(flight)

    def _drop(self, flight: Acquisition) -> None:
        gather = flight.gather
        error = SourceUnavailableError(f"{flight.key} was given up: nobody waits for it")
        self.settle(flight, Failed(Failure(flight.key, lambda: error)))
        if gather is not None:
            self.abandon(gather)

    # Advance ----------------------------------------------------------------------------------

    def _later(self, flight: Acquisition) -> None:
        """Advance a flight in a step of its own, and hold its work's calls back until then."""
        work = flight.living_sponsor()
        self.dispatch.hold(work)
        self.agenda.add(self._advance, flight, work)

    def _advance(self, flight: Acquisition, work: Work) -> None:
        self._choose(flight)
        self.dispatch.release(work)

    def _choose(self, flight: Acquisition) -> None:
        if flight.phase is _SETTLED:
            return
        if not flight.waiters:
            self._drop(flight)
            return
        flight.phase = _CHOOSING
        flight.gather = None
        self.board.deriving.pop(flight, None)
        self._proceed(flight)

    def _proceed(self, flight: Acquisition) -> None:
        """Send a flight on to the next source of its chain; settle it if there is none."""
        link = self._next_link(flight)
        if link is None or (
            flight.cutoff != math.inf and flight.cutoff <= asyncio.get_running_loop().time()
        ):
            self.settle(flight, after_failures(flight, self.equipment))
        elif link.kind is SourceKind.DERIVED:
            flight.phase = _GATHERING
            self.board.derive(flight)
            self.derive(flight, link)
        else:
            self.dispatch.ready(flight)

    def _next_link(self, flight: Acquisition) -> Link | None:
        chains = self.equipment.chains
        record = flight.sponsor.record
        while flight.position < len(chains.links):
            link = chains.links[flight.position]
            flight.position += 1
            try:
                if chains.supports(link, flight.key, record):
                    flight.link = link
                    return link
            except Exception as error:
                self._note(flight, link, error, "failure", attempts=0)
        return None

    def _not_dispatched(self, flight: Acquisition, error: Exception) -> None:
        self.refused(flight, error, "failure", 0)

    # What attempts report ---------------------------------------------------------------------

    def refused(self, flight: Acquisition, error: Exception, status: str, attempts: int) -> None:
        """Take note that a source failed for a key, and let the key go on to the next one."""
        if flight.link is not None:
            self._note(flight, flight.link, error, status, attempts)
        self._later(flight)

    def _note(
        self, flight: Acquisition, link: Link, error: Exception, status: str, attempts: int
    ) -> None:
        flight.failures += (SourceFailure.of(link.name, error, attempts),)
        if self.equipment.report is not None:
            self.equipment.report.source_failed(flight.key, link.name, error, status)

    def outdated(self, flight: Acquisition, revision: Revision) -> None:
        """Keep a stale value as a candidate, the newest one."""
        known = flight.candidate
        if known is None or known.observed_at < revision.observed_at:
            flight.candidate = revision

    # Settle -----------------------------------------------------------------------------------

    def settle(self, flight: Acquisition, settlement: Settlement) -> None:
        """End a flight, and tell everyone who waits for it."""
        flight.phase = _SETTLED
        flight.settlement = settlement
        flight.gather = flight.attempt = None
        if flight.pins is not None and type(settlement) is Reading:
            flight.pins.setdefault(flight.key, settlement)
        for gather, joined in self.board.take_off(flight).items():
            gather.pending.pop(flight.key, None)
            self.hand(gather, flight.key, settlement, joined)

    def hand(self, gather: Gather, key: ResourceKey, settlement: Settlement, joined: bool) -> None:
        """Give a gather what a flight ended with, and whether it had joined that flight."""
        gather.receive(key, settlement, joined)
        report = self.equipment.report
        if report is not None and key in gather.readings:
            reading = gather.readings[key]
            if reading.fallback is not None:
                report.stale_fallback_used(key, reading.fallback, from_cache=reading.from_cache)
        if not gather.pending and not gather.open:
            self.agenda.add(self.completed, gather)

    def forget(self) -> None:
        """Drop all flights: the event loop that they flew in has ended."""
        self.agenda.clear()
        self.board.clear()
        self.board = FlightBoard(self.equipment.report)
        self.dispatch.workers.clear()
        self.tasks.clear()
        self.offers.writes.forget()

    def __repr__(self) -> str:
        return f"<Scheduler flights={len(self.board.flights)} tasks={len(self.tasks)}>"


def _serves_forced(flight: Acquisition, gather: Gather) -> bool:
    """Whether the value of a flight is sure to be read after this moment, or on the same errand."""
    if flight.event is not None:
        return False
    return not flight.began or (flight.forced and flight.sponsor is gather.work)


# How a gather ends: complete and coherent, or at its deadline, or because nobody wants it --------


_SPARE_ROUNDS = 64
"""Rounds of deriving anew that changes from outside may cost, beyond one for each key."""


class Conclusions:
    """Ends gathers, and tells the one who waits. Each is told once."""

    def __init__(self, scheduler: Scheduler, reads: CacheReads) -> None:
        self._scheduler = scheduler
        self._equipment = scheduler.equipment
        self._reads = reads
        scheduler.completed = self._completed
        scheduler.abandon = self.abandon

    def check(self, gather: Gather) -> None:
        """Conclude a gather that waits for nothing more."""
        if gather.complete:
            self._scheduler.agenda.add(self._completed, gather)

    def _completed(self, gather: Gather) -> None:
        """Tell the one who waits, after readings at odds with the others were derived anew."""
        if not gather.complete:
            return
        alone = len(gather.readings) == 1 and not gather.base
        if not alone and not gather.agrees:
            gather.yield_to_pins()
            odd = at_odds(gather.readings, gather.base)
            if odd:
                self._derive_anew(gather, odd)
                return
        done, gather.done = gather.done, _nobody
        done(gather)

    def _derive_anew(self, gather: Gather, odd: set[ResourceKey]) -> None:
        """Replace derived readings that rest on other revisions than the rest of the gather.

        What comes of it is judged again. Each round leaves the lowest of the keys in agreement, so
        many more rounds than keys mean that something changes as fast as it is derived.
        """
        gather.agreed = None
        gather.rounds += 1
        for key in odd:
            del gather.readings[key]
        if gather.rounds > len(gather.keys) + _SPARE_ROUNDS:
            gather.failures.update((key, _never_agrees(key)) for key in odd)
            self.check(gather)
            return
        gather.settle_pins()
        gather.open = True
        for key in odd:
            try:
                policy = self._equipment.policies.resolve(key)
            except Exception as error:
                gather.failures[key] = Failure(key, always(error))
            else:
                self._scheduler.acquire_privately(gather, key, policy)
        gather.open = False
        self.check(gather)

    def abandon(self, gather: Gather) -> None:
        """End the waiting without an outcome: the one who waited has gone."""
        gather.open = False
        gather.done = _nobody
        self._leave_all(gather)

    def strike(self, gather: Gather) -> None:
        """End the waiting at the deadline: a stale value if one will do, else a failure."""
        gather.open = False
        self._equipment.counters.deadlines_exceeded += 1
        pending = dict(gather.pending)
        self._leave_all(gather)
        for key in gather.keys:
            if key not in gather.readings and key not in gather.failures:
                self._strike_key(gather, key, pending.get(key))
        gather.yield_to_pins()
        for key in at_odds(gather.readings, gather.base):
            del gather.readings[key]
            gather.failures[key] = _late(gather.work, key, None)
        self._finish_now(gather)

    def _strike_key(
        self, gather: Gather, key: ResourceKey, awaited: Acquisition | Read | None
    ) -> None:
        failure = _late(gather.work, key, awaited)
        if isinstance(awaited, Acquisition) and gather.accepts_stale(key):
            stale = stale_candidate(awaited, failure, self._equipment)
            if stale is not None:
                gather.readings[key] = stale
                if self._equipment.report is not None and stale.fallback is not None:
                    self._equipment.report.stale_fallback_used(
                        key, stale.fallback, from_cache=stale.from_cache
                    )
                return
        gather.failures[key] = failure

    def _leave_all(self, gather: Gather) -> None:
        for awaited in tuple(gather.pending.values()):
            if isinstance(awaited, Read):
                self._reads.leave(gather, awaited)
            else:
                self._scheduler.leave(gather, awaited)

    def _finish_now(self, gather: Gather) -> None:
        done, gather.done = gather.done, _nobody
        done(gather)

    def __repr__(self) -> str:
        return f"<Conclusions for {self._scheduler!r}>"


def _never_agrees(key: ResourceKey) -> Failure:
    text = f"{key} could not be derived in agreement with the rest: its dependencies kept changing"
    return Failure(key, lambda: SourceUnavailableError(text))


def _nobody(_gather: Gather) -> None:
    """Stand in for one who has been told already."""


def always(error: Exception) -> Callable[[], Exception]:
    """Return a maker of errors that has only this one."""
    return lambda: error


def _late(work: Work, key: ResourceKey, awaited: Acquisition | Read | None) -> Failure:
    """Return the failure of a key whose deadline passed, with what its sources had said so far."""
    budget = "" if work.deadline is None else f" of {work.deadline.budget_seconds:g} s"
    text = f"the deadline{budget} passed before {key} was resolved"
    if isinstance(awaited, Acquisition) and awaited.link is not None:
        failures = awaited.failures
        if not _ended_late(awaited, awaited.link.name):
            tries = getattr(awaited.attempt, "tries", 0)
            last = SourceFailure(
                awaited.link.name, SnapshotDeadlineExceededError.__name__, text, max(1, tries)
            )
            failures = (*failures, last)
        return Failure(key, lambda: ResourceResolutionError(key, failures))
    return Failure(key, lambda: SnapshotDeadlineExceededError(text))


def _ended_late(flight: Acquisition, source: str) -> bool:
    """Whether the source has said already, in this very instant, that its deadline passed."""
    if flight.attempt is not None or not flight.failures:
        return False
    last = flight.failures[-1]
    return (last.source, last.error_type) == (source, SnapshotDeadlineExceededError.__name__)


# Where a key is looked for first: what is pinned, then the cache, then a flight ------------------


_KEYS_PER_STEP = 64

_MOST_READS = 8
"""How often a derivation asks an awaited cache for one key while news of it keeps coming."""


class Lookups:
    """Opens gathers, and brings them the readings that need no source.

    `refresh` schedules a background refresh of a key for a reason, and says whether it is a new
    one.
    """

    def __init__(
        self, scheduler: Scheduler, refresh: Callable[[ResourceKey, str, Work], bool]
    ) -> None:
        self._scheduler = scheduler
        self._equipment = scheduler.equipment
        self.serving: Serving = Serving(scheduler.equipment, refresh)
        self._served = self.serving.serve
        self.reads: CacheReads = CacheReads(self._equipment, self._answered, scheduler.tasks)
        self.conclusions: Conclusions = Conclusions(scheduler, self.reads)

    # Open -------------------------------------------------------------------------------------

    def open(self, gather: Gather) -> None:
        """Begin to look for every key of a gather; its `done` is called when all are settled."""
        gather.open = True
        self._scheduler.hold(gather.work)
        keys = gather.keys
        if gather.readings:
            keys = {key: None for key in keys if key not in gather.readings}
        past_cache = gather.forced or gather.refresh
        if keys and self._equipment.access.store is not None and not past_cache:
            gather.work.record.cache_batch_reads += 1
        self._scheduler.agenda.add(self._continue, gather, iter(keys))

    def _continue(self, gather: Gather, rest: Iterator[ResourceKey]) -> None:
        part = tuple(islice(rest, _KEYS_PER_STEP)) if gather.open else ()
        now = self._equipment.clock.now()
        if self._is_plain(gather):
            self._look_in_store(gather, part, now)
        else:
            for key in part:
                self._look_for(gather, key, now)
        if len(part) == _KEYS_PER_STEP:
            self._scheduler.agenda.add(self._continue, gather, rest)
            return
        if gather.open:
            gather.open = False
            self.conclusions.check(gather)
        self._scheduler.release(gather.work)

    def _is_plain(self, gather: Gather) -> bool:
        """Whether the memory cache comes first for every key, and nothing is pinned."""
        if gather.pins or gather.pins.private or gather.forced or gather.refresh:
            return False
        return self._equipment.access.store is not None

    def _look_in_store(self, gather: Gather, keys: Iterable[ResourceKey], now: float) -> None:
        """Do as `_look_for`, in one go, for keys of which nothing can be known yet."""
        policies, store = self._equipment.policies, self._equipment.access.store
        common: FreshnessPolicy | None = policy_of_all(policies)
        acquire, record, report = (
            self._scheduler.acquire,
            gather.work.record,
            self._equipment.report,
        )
        for key in keys:
            try:
                policy = policies.resolve(key) if common is None else common
            except Exception as error:
                gather.failures[key] = Failure(key, always(error))
                continue
            revision = None if store is None else store.find(key, now, policy)
            if revision is None or not self._served(
                gather.work, gather.readings, policy, revision, now
            ):
                record.cache_misses += 1
                if report is not None:
                    report.cache_missed(key)
                acquire(gather, key, policy, revision)

    def _look_for(self, gather: Gather, key: ResourceKey, now: float) -> None:
        if gather.pins:
            pin = gather.pins.get(key)
            if pin is not None:
                gather.readings[key] = pin
                return
        try:
            policy = self._equipment.policies.resolve(key)
        except Exception as error:
            gather.failures[key] = Failure(key, always(error))
            return
        store = self._equipment.access.store
        if key in gather.pins.private:
            self._scheduler.acquire_privately(gather, key, policy)
        elif gather.forced and key in gather.forced:
            if self._equipment.report is not None:
                self._equipment.report.cache_bypassed(key, "force_refresh")
            self._acquire_forced(gather, key, policy)
        elif gather.refresh:
            self._acquire(gather, key, policy)
        elif store is None:
            self._ask_cache(gather, key, policy)
        else:
            revision = store.find(key, now, policy)
            if revision is None or not self._served(
                gather.work, gather.readings, policy, revision, now
            ):
                self._missed(gather, key, policy, revision)

    def _acquire_forced(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> None:
        """Derive privately what must agree with pins; share what only has to be new."""
        if key in gather.private:
            self._scheduler.acquire_privately(gather, key, policy)
        else:
            self._acquire(gather, key, policy)

    def _acquire(
        self,
        gather: Gather,
        key: ResourceKey,
        policy: FreshnessPolicy,
        cached: Revision | None = None,
    ) -> None:
        self._scheduler.acquire(gather, key, policy, cached)
        if self._equipment.access.store is not None:
            return
        read = self.reads.find(key)
        if read is not None:
            read.flight = self._scheduler.board.flights.get(key)

    # The cache ------------------------------------------------------------------------------------

    def _missed(
        self,
        gather: Gather,
        key: ResourceKey,
        policy: FreshnessPolicy,
        cached: Revision | None,
    ) -> None:
        gather.work.record.cache_misses += 1
        if self._equipment.report is not None:
            self._equipment.report.cache_missed(key)
        self._acquire(gather, key, policy, cached)

    def _ask_cache(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> None:
        """Read a cache that has to be awaited, unless a flight has done so in vain."""
        flight = self._scheduler.board.flights.get(key)
        if flight is not None and flight.missed:
            self._missed(gather, key, policy, None)
            return
        read = self.reads.ask(gather, key, policy)
        if flight is not None:
            read.flight = flight

    def _answered(self, read: Read, revision: Revision | None) -> None:
        """Pass on what the cache held: a reading, or the way to the sources."""
        now = self._equipment.clock.now()
        waiters, read.waiters = read.waiters, {}
        for gather in waiters:
            gather.pending.pop(read.key, None)
            if read.rounds < _MOST_READS and _is_outdated(gather, read, revision):
                self.reads.ask(gather, read.key, read.policy).rounds = read.rounds + 1
            elif revision is not None and self._served(
                gather.work, gather.readings, read.policy, revision, now
            ):
                self.conclusions.check(gather)
            elif read.flight is not None and _has_value(read.flight):
                settlement = read.flight.settlement
                if settlement is not None:
                    self._scheduler.hand(gather, read.key, settlement, True)
            else:
                self._missed(gather, read.key, read.policy, revision)
                flight = self._scheduler.board.flights.get(read.key)
                if flight is not None:
                    flight.missed = True
                self.conclusions.check(gather)

    def __repr__(self) -> str:
        return f"<Lookups {self.reads!r}>"


def _has_value(flight: Acquisition) -> bool:
    return isinstance(flight.settlement, Reading)


def _is_outdated(gather: Gather, read: Read, revision: Revision | None) -> bool:
    """Whether a derivation would take in what there has been news of since it asked.

    Others may have joined it after the news.
    """
    changed = read.group.changed
    if not changed or gather.owner is None:
        return False
    if revision is None and read.flight is not None:
        settlement = read.flight.settlement
        revision = settlement.revision if isinstance(settlement, Reading) else None
    return revision is not None and rests_on((revision,), lambda each: each.key in changed)


# What a derived key rests on: asking for its dependencies, and handing them to the derivation ----


_CONTEXT = "derived dependency"


class Derivations:
    """Lets derived flights wait for their dependencies, and makes snapshots of those."""

    def __init__(self, scheduler: Scheduler, lookups: Lookups, deliveries: Deliveries) -> None:
        self._scheduler = scheduler
        self._lookups = lookups
        self._deliveries = deliveries
        scheduler.derive = self.gather_dependencies
        scheduler.inputs = self.inputs
        scheduler.inputs_now = self.inputs_now

    def gather_dependencies(self, flight: Acquisition, link: Link) -> None:
        """Ask for what `flight` is derived from; it goes on when all of it is settled."""
        try:
            keys = _dependencies(link, flight.key)
        except Exception as error:
            self._scheduler.refused(flight, error, "failure", 0)
            return
        pins = NO_PINS if flight.pins is None else flight.pins
        work = flight.living_sponsor()
        gather = Gather(work, keys, pins, demand=pins.demand, owner=flight)
        flight.gather = gather
        gather.done = self._gathered
        self._lookups.open(gather)

    def _gathered(self, gather: Gather) -> None:
        flight = gather.owner
        if flight is None or flight.gather is not gather:
            return
        if not gather.failures:
            if flight.pins is not None:
                hold(flight.pins, gather.readings)
            self._scheduler.dispatch.ready(flight)
            return
        cycles = [f.cycle for f in gather.failures.values() if f.cycle is not None]
        if cycles:
            flight.cycle = cycles[0]
        name = "" if flight.link is None else flight.link.name
        errors = {key: failure.make() for key, failure in gather.failures.items()}
        error = DependencyResolutionError(flight.key, name, errors)
        self._scheduler.refused(flight, error, "failure", 0)

    def inputs_now(self, flight: Acquisition) -> Snapshot | None:
        """Return what `inputs` returns, without waiting; None if a copy takes a thread."""
        gather, values = flight.gather, {}
        if gather is not None:
            for key in gather.keys:
                value = self._deliveries.value_now(gather.readings[key], _CONTEXT)
                if value is None:
                    return None
                values[key] = value
        return _input_of(flight, values)

    async def inputs(self, flight: Acquisition) -> Snapshot:
        """Return the dependencies of a derived key, copied for its derivation alone."""
        gather, values = flight.gather, {}
        if gather is not None:
            for key in gather.keys:
                reading = gather.readings[key]
                values[key] = await self._deliveries.value(reading, _CONTEXT, None)
        return _input_of(flight, values)


def _input_of(flight: Acquisition, values: dict[ResourceKey, SnapshotValue[Any]]) -> Snapshot:
    context = flight.sponsor.context
    return snapshot_of(context.snapshot_id, context.requested_at, FrozenDict(values))


def _dependencies(link: Link, key: ResourceKey) -> tuple[ResourceKey, ...]:
    try:
        declared = link.source.dependencies(key)
    except asyncio.CancelledError as error:
        raise SourceUnavailableError(f"source {link.name!r} cancelled itself") from error
    try:
        keys = tuple(dict.fromkeys(declared))
    except TypeError:
        keys = (declared,)
    for each in keys:
        if not isinstance(each, ResourceKey):
            raise SourceProtocolError(
                f"dependencies() of source {link.name!r} for {key} must be ResourceKeys, got "
                f"{type(each).__qualname__}"
            )
    return keys


# What flights learn of publications and invalidations that happen while they are under way -------


class News:
    """Listens to the cache for the scheduler, so that a read never undoes newer knowledge.

    `open` counts, by key, the publications whose outcome is not known yet.
    """

    def __init__(self, scheduler: Scheduler, reads: CacheReads) -> None:
        self._scheduler = scheduler
        self._reads = reads
        self.open: dict[ResourceKey, int] = {}
        self._held: dict[ResourceKey, list[Acquisition]] = {}
        scheduler.offers.news = self

    def revised(self, key: ResourceKey, revision: Revision | None) -> None:
        """Learn of a key's new current revision; one that a flight has written is no news."""
        if revision is not None and self._tell_flights(key, revision):
            return
        self._reads.hide((key,))
        if self._scheduler.board.deriving:
            version = None if revision is None else revision.version
            self._outdate(lambda taken: taken.key == key and taken.version != version)

    def _tell_flights(self, key: ResourceKey, revision: Revision) -> bool:
        """Tell the flights of a key of an event; return whether it is none, but one's own value."""
        board = self._scheduler.board
        flights = board.under_way(key)
        if not flights:
            return False
        if any(each.offered is revision for each in flights):
            return True
        for flight in flights:
            flight.event = revision
            board.hide(flight, cacheable=True)
        return False

    def announced(self, publications: Sequence[Ranked]) -> None:
        """Learn that publications begin: what was fetched meanwhile waits for their outcome."""
        for publication in publications:
            self.open[publication.key] = self.open.get(publication.key, 0) + 1

    def concluded(self, publications: Sequence[Ranked]) -> None:
        """Learn that publications have ended: values held back go to the cache, or give way."""
        for publication in publications:
            key = publication.key
            left = self.open.pop(key, 1) - 1
            if left:
                self.open[key] = left
                continue
            for flight in self._held.pop(key, ()):
                self._scheduler.agenda.add(self._scheduler.offers.make, flight)

    def hold_back(self, flight: Acquisition) -> bool:
        """Keep a fetched value from the cache while a publication of its key is open."""
        if flight.key not in self.open:
            return False
        self._held.setdefault(flight.key, []).append(flight)
        return True

    def invalidating(self, keys: Collection[ResourceKey]) -> None:
        """Learn that keys are invalidated: what was read before is not cached nor joined."""
        for key in keys:
            for flight in self._scheduler.board.under_way(key):
                self._scheduler.board.hide(flight, cacheable=False)
        self._reads.hide(keys)
        gone = frozenset(keys)
        self._outdate(lambda taken: taken.key in gone)

    def invalidating_where(self, matches: Callable[[ResourceKey], bool]) -> None:
        """Learn that all matching keys are invalidated."""
        self.invalidating(self._scheduler.board.matching(matches))
        self._outdate(lambda revision: matches(revision.key))

    def _outdate(self, changed: Callable[[Revision], bool]) -> None:
        """Hide the derivations that have taken in a revision which is no longer current."""
        for flight in tuple(self._scheduler.board.deriving):
            gather = flight.gather
            if gather is not None and gather.readings:
                taken = [reading.revision for reading in gather.readings.values()]
                if rests_on(taken, changed):
                    self._scheduler.board.hide(flight, cacheable=False)

    def __repr__(self) -> str:
        return f"<News open={len(self.open)} held={len(self._held)}>"


# The engine of one builder: its parts put together, its stages, its event loop and its end -------


class Engine:
    """Runs the stages of units of work: brings each gather its readings, or ends it in time."""

    def __init__(self, equipment: Equipment, variables: contextvars.Context) -> None:
        self.equipment = equipment
        self.scheduler: Scheduler = Scheduler(equipment)
        self.deliveries: Deliveries = Deliveries(equipment.copies, equipment.pace)
        self.lookups: Lookups = Lookups(self.scheduler, self._refresh)
        self.warm_reads: WarmReads = WarmReads(equipment)
        self._derivations = Derivations(self.scheduler, self.lookups, self.deliveries)
        self.refresher: Refresher = Refresher(
            equipment, variables, self.lookups.open, self.lookups.conclusions.abandon
        )
        self._news = News(self.scheduler, self.lookups.reads)
        equipment.access.subscribe(self._news)
        self._stages: dict[Gather, asyncio.Future[None] | None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.closed: bool = False

    def _refresh(self, key: ResourceKey, reason: str, parent: Work) -> bool:
        return self.refresher.schedule(key, reason, parent)

    # Stages -----------------------------------------------------------------------------------

    async def run(self, gather: Gather, keep: Callable[[Gather], None]) -> None:
        """Wait until every key of a stage has a reading or a failure, or its deadline strikes.

        `keep` is called in the very step in which that is so.

        Raises:
            RuntimeError: if the builder is closed, before or meanwhile.
        """
        loop = self.enter()
        ended = False

        def done(_gather: Gather) -> None:
            nonlocal ended
            ended = True
            keep(gather)
            future = self._stages.get(gather)
            if future is not None and not future.done():
                future.set_result(None)

        gather.done = done
        gather.strike = partial(self.lookups.conclusions.strike, gather)
        self._stages[gather] = None
        try:
            if gather.work.expired:
                self.lookups.conclusions.strike(gather)
            else:
                gather.work.enter(gather)
                self.lookups.open(gather)
            if not ended:
                future = self._stages[gather] = loop.create_future()
                await future
        finally:
            self._stages.pop(gather, None)
            gather.work.leave(gather)
            gather.strike = nothing
            if not ended and not loop.is_closed():
                self.lookups.conclusions.abandon(gather)

    # The event loop ---------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        scheduler = self.scheduler
        return bool(
            self._stages or scheduler.dispatch.workers or scheduler.tasks or self.refresher.active
        )

    def enter(self) -> asyncio.AbstractEventLoop:
        """Begin something on the running event loop, make that loop the engine's own, return it.

        Raises:
            RuntimeError: if the builder is closed, or has work under way on another loop.
        """
        if self.closed:
            raise BuilderClosedError
        return self.attach()

    def attach(self) -> asyncio.AbstractEventLoop:
        """Make the running event loop the engine's own, and return it.

        Raises:
            RuntimeError: if another loop still has work of this builder under way.
        """
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return loop
        if self._loop is not None:
            if self._loop.is_closed():
                self.equipment.capacity.forget()
            elif self.busy:
                raise RuntimeError(
                    "this builder has work under way on another event loop; use one builder per "
                    "loop, or a SyncSnapshotBuilder to share one between threads"
                )
            self.forget()
        self._loop = loop
        return loop

    def forget(self) -> None:
        """Drop everything that belonged to an event loop which has ended."""
        self.scheduler.forget()
        self.lookups.reads.forget()
        self.refresher.forget()
        self._stages.clear()

    # The end ----------------------------------------------------------------------------------

    def require_open(self) -> None:
        """Raise `RuntimeError` once the builder is closed."""
        if self.closed:
            raise BuilderClosedError

    def close(self) -> None:
        """Refuse new stages, and end those under way with an error."""
        self.closed = True
        self.refresher.closed = True
        for gather, future in tuple(self._stages.items()):
            self.lookups.conclusions.abandon(gather)
            if future is not None and not future.done():
                future.set_exception(BuilderClosedError())

    async def stop(self, timeout_seconds: float) -> Mapping[str, int]:
        """End every task; return how many calls of each source are still running after that long.

        A source that runs in a thread, or ignores its cancellation, cannot be ended from outside.
        """
        self.refresher.cancel()
        self.equipment.access.unsubscribe(self._news)
        scheduler = self.scheduler
        for task in (*scheduler.dispatch.workers, *scheduler.tasks):
            task.cancel()
        running = {*scheduler.dispatch.workers, *scheduler.tasks}
        if running:
            _, running = await asyncio.wait(running, timeout=timeout_seconds)
        left: dict[str, int] = {}
        for task in running:
            name = task.get_name().removeprefix("coalestra ")
            left[name] = left.get(name, 0) + 1
        return left

    def __repr__(self) -> str:
        return f"<Engine stages={len(self._stages)} {self.scheduler!r} closed={self.closed}>"
