"""Flights, those who wait for them, and what all of these share.

A `Flight` is one key on its way through its chain of sources, shared by everyone who needs
the key. A `Gather` is somebody who waits for a set of keys: a stage of a build, or a derivation.
Both are plain state, which `SingleFlight` and `Dispatch` move; a flight goes on like this:

=========  ======================  ================================================  ============
a flight   has, besides its key    leaves by                                         if nobody
that is                                                                              waits
=========  ======================  ================================================  ============
choosing   --                      `wait_for`, `be_ready`; end of the chain          it ends
gathering  `gather`                `be_ready`: all there; `choose`: something failed it ends
ready      `link`                  `queue`, at the end of the step                   it ends
calling    `lane`, then `call`     `offer`: a value to store; `choose`: it failed    see `Call`
writing    `offered`               being stored, superseded, or not to be stored     it goes on
settled    `settlement`            --                                                --
=========  ======================  ================================================  ============

`FlightBoard.take_off` settles it, also what is given up, or whose step failed, from where it is;
`FlightBoard.land` does so, quicker, for one gather and a value that is stored when it comes.
`gather` stays while what was gathered is being derived.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard

from coalestra.cache.access import CacheAccess
from coalestra.concurrency.capacity import CapacityController
from coalestra.concurrency.copying import PayloadCopies
from coalestra.concurrency.deadline import Deadline
from coalestra.concurrency.pace import Pace, Slices
from coalestra.concurrency.threads import WorkerThreads
from coalestra.concurrency.waits_for import WaitsFor
from coalestra.core.errors import (
    DependencyResolutionError,
    ResourceResolutionError,
    SnapshotDeadlineExceededError,
    SourceFailure,
    message_of,
    type_name,
)
from coalestra.core.frozen import EMPTY
from coalestra.core.health import FlightSnapshot
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    AuthorityPolicyProvider,
    FreshnessPolicy,
    FreshnessPolicyProvider,
    ObservationPolicy,
    RefreshMode,
    rank_of,
)
from coalestra.core.protocols import Clock, Lease
from coalestra.core.snapshot import DiagnosticsRecorder, FetchContext
from coalestra.core.trace import Obtained
from coalestra.core.values import CacheWriteStatus, Revision
from coalestra.observability import ChangeLog, Reporter
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
    pin_all,
)
from coalestra.orchestration.sources import Chains, Link
from coalestra.orchestration.tracing import FlightLog, KeyLog, Tracing, WorkTrace
from coalestra.resilience import CircuitBreaker, ResiliencePolicyResolver

if TYPE_CHECKING:
    from coalestra.orchestration.calls import Call, Lane
    from coalestra.orchestration.singleflight import Crowd


class Phase(enum.Enum):
    """Where a flight stands. `SETTLED` is the only phase that it never leaves."""

    CHOOSING = "choosing the next source"
    GATHERING = "waiting for dependencies"
    READY = "ready for a source"
    CALLING = "being fetched"
    WRITING = "being written to the cache"
    SETTLED = "settled"


_CHOOSING, _GATHERING, _READY, _CALLING, _WRITING, _SETTLED = Phase


class Liveness:
    """Finds out cheaply, again and again, whether anyone still waits for any of many things.

    It remembers one that was wanted, and looks for another only when that one no longer is.
    """

    __slots__ = ("_members", "_rest", "_witness")

    def __init__(self, members: Collection[Flight | Read]) -> None:
        self._members = members
        self._rest: Iterator[Flight | Read] = iter(())
        self._witness: Flight | Read | None = None

    @property
    def alive(self) -> bool:
        """Whether anyone waits for any of them."""
        if self._witness is not None and self._witness.waiters:
            return True
        return self._find(self._rest) or self._find(iter(tuple(self._members)))

    def _find(self, rest: Iterator[Flight | Read]) -> bool:
        self._rest = rest
        self._witness = next((each for each in rest if each.waiters), None)
        return self._witness is not None


@dataclass(eq=False)
class Counters:
    """Cumulative counts since the builder was made, under their names in `BuilderHealth`."""

    queue_timeout_count: int = 0
    source_timeout_count: int = 0
    deadline_exceeded_count: int = 0
    revalidation_attempt_count: int = 0
    revalidation_failure_count: int = 0
    source_transport_timeout_violations: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class Parts:
    """What everything below shares for the life of a builder."""

    clock: Clock
    chains: Chains
    policies: FreshnessPolicyProvider
    authority: AuthorityPolicyProvider
    observation: ObservationPolicy
    capacity: CapacityController
    breaker: CircuitBreaker
    resilience: ResiliencePolicyResolver
    access: CacheAccess
    copies: PayloadCopies
    report: Reporter | None
    log: ChangeLog
    threads: WorkerThreads
    tracing: Tracing
    max_concurrency: int
    max_pending_tasks: int
    transport_grace_seconds: float
    pace: Pace
    counters: Counters = field(default_factory=Counters)


class Work:
    """The context, deadline, counters and lanes that the stages of one unit of work share.

    While stages wait, one timer watches the deadline for all of them. Once it is `over`, struck by
    its deadline or `closed` and no stage left, nothing is started in its name any more. `since` is
    when a session began, in the numbers of `next_number`.
    """

    loop: asyncio.AbstractEventLoop | None = None
    timer: asyncio.TimerHandle | None = None
    planning: int = 0
    flushing: bool = False
    closed: bool = False
    over: bool = False
    since: int = 0

    def __init__(
        self,
        context: FetchContext,
        deadline: Deadline | None = None,
        trace: WorkTrace | None = None,
        variables: contextvars.Context | None = None,
    ) -> None:
        self.context: FetchContext = context
        self.trace: WorkTrace | None = trace
        self.deadline: Deadline | None = deadline
        self.record: DiagnosticsRecorder = DiagnosticsRecorder()
        self.view: View = View()
        self.variables: contextvars.Context = (
            contextvars.copy_context() if variables is None else variables
        )
        self.lanes: dict[Link, weakref.ref[Lane]] = {}
        self.begun: list[Flight] = []
        self.ready: dict[Link, list[Flight]] = {}
        self.stages: dict[Gather, Callable[[Any], None]] = {}

    @property
    def cutoff(self) -> float:
        """The deadline on the event loop's clock, or infinity."""
        return math.inf if self.deadline is None else self.deadline.loop_time

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self.deadline.expired

    def settle_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Go on upon an event loop; what was under way upon another one has ended with that."""
        if self.loop is not None and self.loop is not loop:
            self.lanes, self.ready, self.stages, self.begun = {}, {}, {}, []
            self.timer, self.planning, self.flushing = None, 0, False
        self.loop = loop

    def enter(self, stage: Gather, strike: Callable[[Any], None]) -> None:
        """Watch the deadline, if there is one, for a stage that begins to wait."""
        self.stages[stage] = strike
        if self.deadline is not None and self.timer is None:
            self.timer = asyncio.get_running_loop().call_at(self.cutoff, self._strike)

    def leave(self, stage: Gather) -> None:
        """Stop watching for a stage that has ended."""
        self.stages.pop(stage, None)
        if not self.stages:
            self.over |= self.closed
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    def close(self) -> None:
        """Begin no further stage; what is under way still comes to its end."""
        self.closed = True
        self.over |= not self.stages

    def _strike(self) -> None:
        self.timer = None
        self.over = True
        for stage, strike in tuple(self.stages.items()):
            strike(stage)

    def __repr__(self) -> str:
        return (
            f"<Work {self.context.snapshot_id} stages={len(self.stages)} lanes={len(self.lanes)}>"
        )


# Flights and those who wait for them -------------------------------------------------------------


current_call: contextvars.ContextVar[Callable[[], Call | None] | None] = contextvars.ContextVar(
    "coalestra_current_call", default=None
)
"""Gives the call that a source is serving, and keeps nothing of it: what the source has begun may
outlive the builder."""


def call_served(variables: Mapping[contextvars.ContextVar[Any], Any] | None = None) -> Call | None:
    """Return the call that a source is serving, as seen from within the source.

    Who uses a builder there waits on behalf of that call.
    """
    serving = current_call.get() if variables is None else variables.get(current_call)
    return None if serving is None else serving()


_NOBODY: dict[Gather, bool] = {}


class Flight:
    """The one flight that acquires a key; any number of gathers wait for it.

    `cutoff` is the latest deadline any waiter ever had. `cacheable` turns false when the key is
    invalidated under way; `event` is what was published for it meanwhile. `offered` is the value
    on its way to the cache. `pins` is set for a private
    derivation, which serves one unit of work alone and is never joined by others. `missed` says
    that the cache had nothing of use for the key, `joinable` that newcomers find the flight on the
    board, `linked` that it waits for other flights, or others wait for it. `since` is how much news
    had been told when what it has taken in was last known to be current. `began` is the number of
    its call, 0 before that; `stored` says that its value is in the memory cache already. `lease` is
    the right to store what it acquires, if the cache gives such; `log` is kept for traces.
    `absent_until` is until when it may be remembered, in monotonic seconds, that there is none.
    """

    __slots__ = (
        "__dict__", "__weakref__", "_shares_waiters", "began", "cacheable", "cached", "call",
        "cutoff", "event", "forced", "gather", "joinable", "key", "lane", "lease", "link",
        "linked", "log", "phase", "pins", "policy", "position", "settlement", "since", "sponsor",
        "urgent", "waiters",
    )  # fmt: skip

    # Few flights ever have these; the others are slots, as all of them are asked for those.
    failures: tuple[SourceFailure, ...] = ()
    cycle: tuple[ResourceKey, ...] | None = None
    candidate: Revision | None = None
    offered: Revision | None = None
    crowd: Crowd | None = None
    missed: bool = False
    nesting: bool = False
    absent_until: float = math.inf

    def __init__(
        self, key: ResourceKey, policy: FreshnessPolicy, sponsor: Work, since: int = 0
    ) -> None:
        self.key: ResourceKey = key
        self.policy: FreshnessPolicy = policy
        self.sponsor: Work = sponsor
        self.since: int = since
        self.phase: Phase = _CHOOSING
        self.waiters: dict[Gather, bool] = _NOBODY
        self._shares_waiters: bool = True
        self.position: int = 0
        self.began: int = 0
        self.cutoff: float = -math.inf
        self.cacheable: bool = True
        self.joinable: bool = False
        self.linked: bool = False
        self.urgent: bool = False
        self.forced: bool = False
        self.link: Link | None = None
        self.gather: Gather | None = None
        self.call: Call | None = None
        self.lane: Lane | None = None
        self.settlement: Settlement | None = None
        self.cached: Revision | None = None
        self.event: Revision | None = None
        self.lease: Lease | None = None
        self.log: FlightLog | None = None
        self.pins: Pins | None = None

    @property
    def has_begun(self) -> bool:
        """Whether it has read anything, so that it may be without what there is news of since."""
        return bool(self.began) or self.gather is not None

    # Phases: nobody but these, and the board's `take_off` and `land`, writes `phase` ------------

    def choose(self) -> None:
        """Go back to the chain, for its next source."""
        self.phase = _CHOOSING
        self.gather = None

    def wait_for(self, gather: Gather) -> None:
        """Wait for the dependencies that `gather` collects."""
        self.phase = _GATHERING
        self.gather = gather

    @staticmethod
    def be_ready(flights: Iterable[Flight]) -> None:
        """Let flights wait for the end of the step, to travel together to the same source."""
        for flight in flights:
            flight.phase = _READY

    @staticmethod
    def queue(flights: Iterable[Flight], lane: Lane) -> None:
        """Let flights wait in a lane for a worker that calls the source."""
        for flight in flights:
            flight.phase = _CALLING
            flight.lane = lane

    @staticmethod
    def join_call(flights: Iterable[Flight], call: Call) -> float:
        """Let flights be the keys that `call` is made for; return until when any is wanted."""
        cutoff = -math.inf
        for flight in flights:
            flight.call = call
            if flight.cutoff > cutoff:
                cutoff = flight.cutoff
            if flight.log is not None:
                flight.log.calls.append(call.note())
        return cutoff

    def leave_call(self) -> None:
        """Be refused by the source; `choose` follows."""
        self.call = None

    def keep_stale(self, revision: Revision) -> None:
        """Keep a stale answer as a candidate to stand in: the newest one."""
        known = self.candidate
        if known is None or known.observed_at < revision.observed_at:
            self.candidate = revision

    def offer(self, revision: Revision) -> None:
        """Have a value that is on its way to the cache."""
        self.phase = _WRITING
        self.call = None
        self.offered = revision

    def wait(self, gather: Gather, joined: bool) -> None:
        """Let `gather` wait for the flight; `joined` if another unit of work had started it."""
        if self._shares_waiters:
            self.waiters, self._shares_waiters = self.waiters.copy(), False
        self.waiters[gather] = joined

    def leave(self, gather: Gather) -> None:
        """Let `gather` wait no longer."""
        if self._shares_waiters:
            self.waiters, self._shares_waiters = self.waiters.copy(), False
        self.waiters.pop(gather, None)

    def note(self) -> FlightLog:
        """Return what is noted of the flight from now on, for the trace of one who waits for it."""
        if self.log is None:
            self.log = FlightLog(self.sponsor.context.snapshot_id)
            if self.call is not None:
                self.log.calls.append(self.call.note())
        return self.log

    def living_sponsor(self) -> Work:
        """Return the work to act for: the first that waits, directly or through derived keys.

        The work that started the flight keeps it for as long as it lives. What lies between the two
        is found to be acted for as well, or each flight of a chain would look through all of it.
        """
        if self.sponsor.over:
            below: dict[Flight, Flight | None] = {self: None}
            stack = [self]
            while stack:
                flight: Flight | None = stack.pop()
                for gather in () if flight is None else flight.waiters:
                    owner = gather.owner
                    work = gather.work if owner is None else owner.sponsor
                    if not work.over:
                        while flight is not None:
                            flight.sponsor, flight = work, below[flight]
                        return work
                    if owner is not None and owner not in below:
                        below[owner] = flight
                        stack.append(owner)
        return self.sponsor

    def span_of(self, work: Work) -> Any:
        """Return the span of the stage of `work` that waits, if a tracer follows it."""
        latest = None if work.trace is None else work.trace.span
        if latest is None:
            return None
        spans = (gather.span for gather in self.waiters if gather.work is work)
        near = next((span for span in spans if span is not None), None)
        if near is not None:  # which has it from who waits for it in turn
            return near
        return next((stage.span for stage in self._stages() if stage.work is work), latest)

    def _stages(self) -> Iterator[Gather]:
        """Yield what waits on nobody's behalf, directly or through derived keys."""
        seen, stack = {id(self)}, [self]
        while stack:
            for gather in stack.pop().waiters:
                owner = gather.owner
                if owner is None:
                    yield gather
                elif id(owner) not in seen:
                    seen.add(id(owner))
                    stack.append(owner)

    def view(self) -> FlightSnapshot:
        """Return where it stands now."""
        call, waiting = self.call, self.waiters
        return FlightSnapshot(
            self.key,
            self.phase.value if call is None or self.phase is not _CALLING else call.standing,
            None if call is None or self.link is None else self.link.name,
            sum([gather.size for gather in waiting]),
            bool(waiting) and all(gather.refresh for gather in waiting),
            0 if call is None else call.attempts,
            None if call is None else call.running_seconds,
        )

    def __repr__(self) -> str:
        return f"<Flight {self.key.display} {self.phase.value}, waiters={len(self.waiters)}>"


Fresh = tuple[Flight, Revision]
"""A flight and the value that its source has answered with."""


class ReadGroup:
    """The reads that go to the cache together, and the task that carries them.

    `changed` are the keys of which there has been news meanwhile: a revision, or None for gone.
    `hurried` has the timers of those who cannot wait for long. `forced` reads are made to get a
    lease on the key, whatever the cache has.
    """

    __slots__ = ("changed", "forced", "hurried", "liveness", "reads", "task")

    def __init__(self, forced: bool = False) -> None:
        self.forced: bool = forced
        self.changed: dict[ResourceKey, Revision | None] = {}
        self.hurried: dict[Gather, asyncio.TimerHandle] = {}
        self.reads: list[Read] = []
        self.liveness: Liveness = Liveness(self.reads)
        self.task: asyncio.Task[Any] | None = None


class Read:
    """One key on its way out of a cache that has to be awaited, shared by everyone who asks.

    `flight` is an acquisition of the key that was under way meanwhile, whatever became of it.
    `rounds` counts the answers before it that were outdated when they came. `unlike` is a version
    that is of no use, `cached` what may stand in at the deadline, `lease` what the cache gave
    instead of a value, for the flight that follows. One that `waits` for whoever has the lease has
    been answered; who could not wait for an answer any longer has one `given_up`.
    """

    flight: Flight | None = None
    given_up: bool = False
    waits: bool = False
    rounds: int = 0
    unlike: str | None = None
    cached: Revision | None = None
    event: None = None
    candidate: None = None
    lease: Lease | None = None

    def __init__(self, key: ResourceKey, policy: FreshnessPolicy, group: ReadGroup) -> None:
        self.key: ResourceKey = key
        self.policy: FreshnessPolicy = policy
        self.group: ReadGroup = group
        self.waiters: dict[Gather, None] = {}

    def has_use_of(self, revision: Revision | None) -> TypeGuard[Revision]:
        """Whether that will do; beside a lease to acquire the key with, it can but stand in."""
        return revision is not None and self.lease is None and revision.version != self.unlike

    def was_fit(self, revision: Revision, now: float) -> bool:
        """Whether a cache that gives leases has given none on it, as it serves for its age."""
        policy = self.policy
        behind = policy.refresh_mode is RefreshMode.STALE_WHILE_REVALIDATE
        most = policy.max_stale_seconds if behind else policy.ttl_seconds
        return self.unlike is None and age_of(revision, now) <= most

    def __repr__(self) -> str:
        return f"<Read {self.key.display} waiters={len(self.waiters)}>"


class Gather:
    """A set of keys that somebody waits for, and what has become of each so far.

    A stage waits for its keys under the pins of its session. A derived acquisition (`owner`)
    waits for its dependencies; one that is shared has the pins of all whom it serves in `under`, by
    identity. Once every key has a reading or a failure, `done` is called, and it is `over`, as it
    is if nobody waits any more.
    `within` is the call from whose source the stage was begun; whatever is waited for on its behalf
    is `urgent`: it must not wait for the slot that the call holds. `logs` are kept for traces;
    `span` is that of the stage, if a tracer follows it.
    It is `open` while its keys are being looked for or its readings judged. `told` is how often
    others had written by then. While they are looked for the calls of its work are held back, and
    `alone` stands for the waiters of each flight that it starts, until others join. With `renews`,
    what is stale or due is waited for, as a refresh inherits its freshness. One that `pins_beneath`
    is told with what `beneath` has `below` its readings, if it was asked.
    """

    forced: frozenset[ResourceKey] = frozenset()
    private: frozenset[ResourceKey] = frozenset()
    refresh: bool = False
    renews: bool = False
    within: Call | None = None
    logs: Mapping[ResourceKey, KeyLog] = EMPTY
    span: Any = None
    open: bool = False
    struck: bool = False
    over: bool = False
    rounds: int = 0
    agreed: tuple[int, int] | None = None
    told: int = 0
    alone: dict[Gather, bool] | None = None
    under: dict[int, Pins] = EMPTY
    pins_beneath: bool = False
    below: dict[ResourceKey, Reading] | None = None

    def __init__(
        self,
        work: Work,
        keys: Iterable[ResourceKey],
        pins: Pins,
        done: Callable[[Gather], None],
        demand: Demand | None = None,
        owner: Flight | None = None,
    ) -> None:
        self.work: Work = work
        self.keys: dict[ResourceKey, None] = dict.fromkeys(keys)
        self.base: Pins = pins
        self.pins: Pins = pins
        if demand is not None:
            self.forced, self.private, self.refresh = demand.forced, demand.private, demand.refresh
        self.owner: Flight | None = owner
        self.urgent: bool = owner is not None and owner.urgent
        self.readings: dict[ResourceKey, Reading] = {}
        self.failures: dict[ResourceKey, Failure] = {}
        self.pending: dict[Flight | Read, None] = {}
        self.done: Callable[[Gather], None] = done

    @property
    def cutoff(self) -> float:
        """The latest instant, on the loop's clock, at which anyone still wants the keys."""
        return self.work.cutoff if self.owner is None else self.owner.cutoff

    @property
    def size(self) -> int:
        """How many it stands for."""
        return 1

    @property
    def agrees(self) -> bool:
        """Whether the readings were found to agree with the pins as they are now."""
        return self.agreed == self.base.stamp

    def in_order(self) -> dict[ResourceKey, Reading]:
        """Return the readings in the order of the keys."""
        readings = self.readings
        return readings if len(readings) == 1 else {key: readings[key] for key in self.keys}

    def failed(self) -> list[Failure]:
        """Return the failures in the order of the keys, whichever of them came first."""
        failures = self.failures
        return [failures[key] for key in self.keys if key in failures]

    def revisions(self) -> tuple[Revision, ...]:
        """Return the revisions that have been read."""
        return tuple([reading.revision for reading in self.readings.values()])

    def taken(self) -> list[Settlement]:
        """Return what it has read, and what it has yet to be handed that is known already."""
        ended = [each.settlement for each in self.pending if isinstance(each, Flight)]
        return [*self.readings.values(), *[each for each in ended if each is not None]]

    def serve(self, those: Mapping[int, Pins]) -> None:
        """Serve those pins as well, each of them by its identity."""
        if self.under:
            self.under.update(those)
        else:
            self.under = dict(those)

    def trace_flight(self, flight: Flight, *, joined: bool) -> None:
        """Note for the trace of its work, if there is one, that it waits for a flight."""
        trace, key = self.work.trace, flight.key
        if trace is not None:
            waiting = self.span if joined else None
            trace.flies(self.logs.get(key), key, flight.note(), joined=joined, waiting=waiting)

    def accepts_stale(self, key: ResourceKey) -> bool:
        """Whether a stale value may stand in for a failed `key`."""
        return not self.refresh and not (self.forced and key in self.forced)

    def yield_to_pins(self) -> None:
        """Give up readings of what was pinned otherwise meanwhile: what is pinned stands."""
        self.agreed = self.base.stamp
        if self.base:
            for key, reading in self.readings.items():
                pin = self.base.get(key, reading)
                if pin.revision is not reading.revision:
                    self.readings[key] = pin
                    if key in self.logs:
                        self.logs[key].obtained = Obtained.PINNED

    def drop_odd(self) -> Slices[None]:
        """Let fail, as at the deadline, what does not agree with the rest of what was read."""
        odd: Collection[ResourceKey] = ()
        self.agreed = None
        while not self.agrees:
            self.yield_to_pins()
            odd = yield from at_odds(self.readings, self.base)
        for key in odd:
            del self.readings[key]
            self.failures[key] = late(key, self.work.deadline, None)

    def settle_pins(self) -> None:
        """Hold fast to what has been read so far, so that what is derived anew agrees with it.

        A stage does so on a copy of its session's pins: they change only when the stage is over.
        """
        if self.owner is None:
            self.copy_pins()
        elif self.pins is NO_PINS:
            self.base = self.pins = Pins()
        pin_all(self.pins, self.readings)

    def copy_pins(self) -> None:
        """Let what is derived for a stage agree with the pins of its session, as they are now."""
        self.pins = Pins(self.base, self.base.demand)

    def tell(self) -> None:
        """Tell who waits, once, what it has come to."""
        if not self.over:
            self.end()
            self.done(self)

    def end(self) -> None:
        """Be over, with what it has come to."""
        self.over = True
        for key, log in self.logs.items():
            reading, failure = self.readings.get(key), self.failures.get(key)
            log.settled(reading, failure, pinned=key in self.base)

    def receive(self, key: ResourceKey, settlement: Settlement, joined: bool) -> Reading | None:
        """Take what a flight ended with; return the reading, if it came to one.

        `joined` says that another unit of work had started the flight.
        """
        if isinstance(settlement, Reading):
            reading = settlement
        elif settlement.stale is not None and self.accepts_stale(key):
            reading = settlement.stale
        else:
            self.failures[key] = settlement.failure
            return None
        if joined:
            reading = reading.joined()
        if self.forced and key in self.forced:
            derived = reading.revision.dependency_versions
            if not derived or key in self.private:  # else it has to agree with the pins first
                # What was read first stands: others are derived from it by now.
                reading = self.pins.setdefault(key, reading)
                if reading.revision.dependency_versions:
                    pin_all(self.pins, {key: reading})
        self.readings[key] = reading
        return reading

    def __repr__(self) -> str:
        for_whom = "stage" if self.owner is None else str(self.owner.key)
        return f"<Gather for {for_whom}: {len(self.readings)} of {len(self.keys)}>"


_graphs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, WaitsFor[Any]] = (
    weakref.WeakKeyDictionary()
)


class FlightBoard:
    """Keeps at most one flight per key for newcomers to join, and never lets a cycle in.

    `flights` are those that may be joined; `deriving` those that have dependencies of their own.
    Only these can be part of a cycle, so only who waits for one of them is entered in the relation.
    Flights out of sight, hidden or private, are kept aside: news of their key concerns them too.
    """

    def __init__(self, report: Reporter | None) -> None:
        self._report = report
        self.flights: dict[ResourceKey, Flight] = {}
        self.deriving: dict[Flight, None] = {}
        self.aside: dict[ResourceKey, dict[Flight, None]] = {}
        self._graph: WaitsFor[Any] | None = None
        self._nested: dict[Call, int] = {}

    def start(self, gather: Gather, flights: Collection[Flight]) -> None:
        """Put up new flights, and let `gather`, which brought them about, wait for them."""
        board, cutoff, alone = self.flights, gather.cutoff, gather.alone
        gather.pending.update(dict.fromkeys(flights))  # first: whatever strikes, it leaves them
        for flight in flights:
            board[flight.key] = flight
            flight.joinable = True
            flight.cutoff = cutoff
            if alone is None:
                flight.wait(gather, joined=False)
            else:
                flight.waiters = alone
        if gather.urgent or gather.work.trace is not None:
            for flight in flights:
                flight.urgent = gather.urgent
                gather.trace_flight(flight, joined=False)

    def join(self, gather: Gather, flight: Flight) -> None:
        """Let `gather` wait for `flight`; a wait that would close a cycle fails instead."""
        if flight.nesting or flight in self.deriving:
            cycle = self._link(gather, flight)
            if cycle is not None:
                gather.failures[flight.key] = Failure.of_cycle(flight.key, cycle)
                return
        flight.wait(gather, self.note_join(gather, flight))
        gather.pending[flight] = None
        if flight.cutoff != math.inf:
            self.extend(flight, gather.cutoff)

    def note_join(self, gather: Gather, flight: Flight) -> bool:
        """Note that `gather` gets what a flight brings; return whether that is another's."""
        joined = flight.sponsor is not gather.work
        if joined:
            gather.work.record.coalesced_requests += 1
            if self._report is not None:
                mine, its = gather.work.context, flight.sponsor.context
                ids = {"snapshot_id": mine.snapshot_id, "joined_snapshot_id": its.snapshot_id}
                self._report.tell("resource_joined", resource=flight.key, **ids)
        if gather.work.trace is not None:
            gather.trace_flight(flight, joined=joined)
        return joined

    def derive(self, flight: Flight) -> None:
        """Let a flight begin to have dependencies: from now on a cycle can go through it.

        None can yet, as it waits for nobody.
        """
        self.deriving[flight] = None
        for gather in flight.waiters:
            self._link(gather, flight)

    def nest(self, call: Call) -> None:
        """Let a call wait for what its source asks for, and the flights of the call for it."""
        nested = self._nested.get(call, 0)
        self._nested[call] = nested + 1
        if not nested:
            for flight in call.keys_under_way:
                flight.nesting = flight.linked = True
                for gather in flight.waiters:
                    self._link(gather, flight)
                self._waits.add(flight, call)

    @property
    def _waits(self) -> WaitsFor[Any]:
        """Who waits for whom, over all builders of the event loop: sources may use each other's."""
        if self._graph is None:
            for loop in [reference() for reference in _graphs.keyrefs()]:
                if loop is not None and loop.is_closed():
                    _graphs.pop(loop, None)  # what waited there leads back to it, and keeps it
            self._graph = _graphs.setdefault(asyncio.get_running_loop(), WaitsFor())
        return self._graph

    def unnest(self, call: Call) -> None:
        """Take back one `nest`; after the last one the call waits for nothing any more."""
        self._nested[call] -= 1
        if not self._nested[call]:
            del self._nested[call]
            self._waits.discard(call)

    def _link(self, gather: Gather, flight: Flight) -> tuple[ResourceKey, ...] | None:
        """Enter that `gather` waits for `flight`; return the keys of the cycle that would close."""
        waiter = gather.within if gather.owner is None else gather.owner
        if waiter is None:
            return None
        if gather.owner is not None:
            gather.owner.linked = True
        flight.linked = True
        cycle = self._waits.add(waiter, flight)
        if cycle is None:
            return None
        path = [member.key for member in cycle if isinstance(member, Flight)]
        return tuple(path if path[0] == path[-1] and len(path) > 1 else [*path, path[0]])

    def extend(self, flight: Flight, cutoff: float) -> None:
        """Keep a flight, and what it waits for, wanted until `cutoff`."""
        stack = [flight]
        while stack:
            each = stack.pop()
            if cutoff <= each.cutoff:
                continue
            each.cutoff = cutoff
            if each.call is not None:
                each.call.extend(cutoff)
            if each.gather is not None:
                stack += [one for one in each.gather.pending if isinstance(one, Flight)]

    def leave(self, gather: Gather, flight: Flight) -> None:
        """Let `gather` wait no longer."""
        gather.pending.pop(flight, None)
        flight.leave(gather)
        waiter = gather.within if gather.owner is None else gather.owner
        if waiter is not None and flight.linked:
            self._waits.remove(waiter, flight)

    def hide(self, flight: Flight, *, cacheable: bool) -> None:
        """Keep newcomers from joining a flight, and from those that wait for its value."""
        stack = [flight]
        seen: set[int] = set()
        while stack:
            each = stack.pop()
            hidden = each.pins is None and not each.joinable
            if id(each) in seen or (hidden and (cacheable or not each.cacheable)):
                continue  # and so is whoever waits for it
            seen.add(id(each))
            if each.joinable:
                del self.flights[each.key]
                each.joinable = False
                self.set_aside(each)
            if not cacheable:
                each.cacheable = False
            stack += [waiter.owner for waiter in each.waiters if waiter.owner is not None]

    @property
    def busy(self) -> bool:
        """Whether there is any flight."""
        return bool(self.flights or self.aside)

    def set_aside(self, flight: Flight) -> None:
        """Keep a flight that newcomers cannot join, until it ends."""
        self.aside.setdefault(flight.key, {})[flight] = None

    def under_way(self, key: ResourceKey) -> list[Flight]:
        """Return every flight of `key`, whether it may be joined or not."""
        flights = list(self.aside.get(key, ())) if self.aside else []
        joinable = self.flights.get(key)
        if joinable is not None:
            flights.append(joinable)
        return flights

    def take_off(self, flight: Flight, settlement: Settlement) -> dict[Gather, bool]:
        """End a flight; return who has waited for it, and whether they had joined.

        It removes only itself, never a successor under the same key.
        """
        if flight.joinable:
            del self.flights[flight.key]
            flight.joinable = False
            if not self.flights:
                self.flights.clear()  # one that has held many keys would keep room for as many
        elif flight.key in self.aside:
            aside = self.aside[flight.key]
            aside.pop(flight, None)
            if not aside:
                del self.aside[flight.key]
        if flight.pins is not None and flight.pins.private.get(flight.key) is flight:
            del flight.pins.private[flight.key]
        if flight.linked:
            self._waits.discard(flight)
        if self.deriving:
            self.deriving.pop(flight, None)
        flight.phase = _SETTLED
        flight.settlement = settlement
        flight.gather = flight.call = None
        waiters = flight.waiters
        flight.waiters = _NOBODY
        return waiters

    def land(self, values: Iterable[Fresh], news: int, complete: list[Gather]) -> list[Fresh]:
        """Hand stored values to whoever started their flights, where that is all there is to do.

        `news` is how much has been told. Return those of which there is more to be said; the
        gathers that wait for nothing more are then `complete`.
        """
        board, others = self.flights, []
        for each in values:
            flight, revision = each
            if (
                not flight.joinable  # there was news of it, or it is private
                or not flight._shares_waiters
                or flight.linked
                or (flight.gather is not None and flight.since < news)
                or flight.log is not None
            ):
                others.append(each)
                continue
            (gather,) = flight.waiters
            key, pending = flight.key, gather.pending
            reading = Reading(revision, flight.policy.ttl_seconds)
            del board[key]
            flight.joinable = False
            if gather.forced:
                gather.receive(key, reading, joined=False)
            else:
                gather.readings[key] = reading
            # Up to here an interrupt leaves it to be settled otherwise.
            if flight.gather is not None:
                flight.gather = None
                del self.deriving[flight]
            flight.phase, flight.settlement = _SETTLED, reading
            flight.call, flight.waiters = None, _NOBODY
            del pending[flight]
            if not pending:
                complete.append(gather)
        if not board:
            board.clear()  # one that has held many keys would keep room for as many
        return others

    def __repr__(self) -> str:
        return f"<FlightBoard flights={len(self.flights)} aside={len(self.aside)}>"


# Circles over several event loops, or over refreshes that a source waits for ---------------------
#
# What one loop decides in a step may close a circle with what another one decides at the same time.
# So these are not kept out, but found: by whoever waits in one, who looks again and again.


LOOK_SECONDS = 0.1
"""How often who may wait in a circle that he cannot see come about looks for one."""


def circle_of(call: Call, gather: Gather) -> tuple[Flight, ...]:
    """Return over which flights a gather waits for the very call whose source waits for it.

    Whatever belongs to another thread is copied in one step before it is looked at.
    """
    came_from: dict[Flight, Flight | None] = {}
    stack: list[tuple[Flight | None, Gather]] = [(None, gather)]
    while stack:
        before, waiting = stack.pop()
        for flight in waiting.pending.copy():
            if not isinstance(flight, Flight) or flight in came_from:
                continue
            came_from[flight] = before
            its, inputs = flight.call, flight.gather
            if its is call:
                way = [flight]
                while (before := came_from[way[-1]]) is not None:
                    way.append(before)
                return tuple(reversed(way))
            if inputs is not None:
                stack.append((flight, inputs))
            if its is not None:
                stack += [(flight, each) for each in its.asked.copy()]
    return ()


# How a flight ends: which value its waiters get, by rules without any waiting --------------------


_LOST_TO_NEWER = (CacheWriteStatus.IGNORED_OLDER, CacheWriteStatus.IGNORED_DUPLICATE)


def age_of(revision: Revision, now: float) -> float:
    """Return how long ago a revision was observed, in seconds."""
    return max(0.0, now - revision.observed_at)


def _is_fresh(revision: Revision, policy: FreshnessPolicy, now: float) -> bool:
    """Whether a revision is fresh, and so is all that it inherits its freshness from."""
    grounds = revision.grounds
    inherited = grounds is None or now <= grounds.fresh_until
    return inherited and age_of(revision, now) <= policy.ttl_seconds


def after_write(
    flight: Flight, status: CacheWriteStatus, current: Revision, parts: Parts
) -> Reading:
    """Return the end of a flight whose value was offered to the cache.

    A value that lost to a higher authority gives way to the winner as long as the policy lets that
    be used; one that lost to a newer or an equal observation gives way as long as the winner is
    fresh.
    """
    own = current if flight.offered is None else flight.offered
    policy = flight.policy
    if status is CacheWriteStatus.STORED:
        return Reading(own, policy.ttl_seconds)
    if current.version != own.version and _agrees(current, flight):
        now = parts.clock.now()
        stale = not _is_fresh(current, policy, now)
        usable = (
            status not in _LOST_TO_NEWER
            and age_of(current, now) <= policy.max_stale_seconds
            and policy.allow_stale_on_error
            and not flight.forced
        )
        if usable or not stale:
            notes = {"superseded_source": own.source}
            return Reading(current, policy.ttl_seconds, stale=stale, from_cache=True, notes=notes)
    return Reading(own, policy.ttl_seconds)


def instead_of_event(flight: Flight, own: Revision, parts: Parts) -> Reading:
    """Return the end of a flight whose value must not be written to the cache.

    If something was published for the key meanwhile, and is fresh, that is what the waiters get.
    """
    event = _event(flight, parts, {"superseded_source": own.source})
    return Reading(own, flight.policy.ttl_seconds) if event is None else event


def _event(flight: Flight, parts: Parts, notes: dict[str, Any] | None = None) -> Reading | None:
    """Return what was published for the key of a flight under way, if it is fresh."""
    event = flight.event
    store = parts.access.store
    if event is not None and store is not None:
        event = store.peek(flight.key) or event
    if event is None or not _agrees(event, flight):
        return None
    if not _is_fresh(event, flight.policy, parts.clock.now()):
        return None
    return Reading(event, flight.policy.ttl_seconds, from_cache=True, notes=notes)


def _agrees(other: Revision, flight: Flight) -> bool:
    """Whether `other` may take the place of a flight's value: pins allow no other derivation."""
    return flight.pins is None or not other.dependency_versions


def after_failures(flight: Flight, failure: Failure | None, parts: Parts) -> Settlement:
    """Return the end of a flight that no source gave a fresh value for: an event may do.

    `failure` is why, unless that is what its sources have said. Nothing stale stands in for what
    does not exist.
    """
    event = _event(flight, parts)
    if event is not None:
        return event
    if failure is None and flight.cycle is not None:
        failure = Failure.of_cycle(flight.key, flight.cycle)
    elif failure is None:
        failure = Failure.of_sources(flight.key, flight.failures)
    if failure.absent and absence_stands(flight, parts):
        return Failed(failure)
    return Failed(failure, stale_candidate(flight, failure, parts))


def absence_stands(flight: Flight, parts: Parts) -> bool:
    """Whether no value of the key is known that the absence has to give way to.

    That is one that came later, or whose authority is higher than that of all who deny it.
    """
    store = parts.access.store
    held = flight.cached if store is None else store.peek(flight.key)
    if flight.event is not None:
        return False
    if held is None:
        return True
    ranks = [rank_of(parts.authority, flight.key, denier.source) for denier in flight.failures]
    newer = flight.began and held.began > flight.began
    return held.authority_rank <= max(ranks) and not newer


def stale_candidate(awaited: Flight | Read, failure: Failure, parts: Parts) -> Reading | None:
    """Return the newest value that may stand in for a failed key, stale or not, or None."""
    policy = awaited.policy
    now, most = parts.clock.now(), policy.max_stale_seconds
    known = (awaited.event, awaited.cached, awaited.candidate)
    usable = [one for one in known if one is not None and age_of(one, now) <= most]
    if not usable:
        return None
    newest = max(usable, key=lambda revision: revision.observed_at)
    stale = not _is_fresh(newest, policy, now)
    if stale and not policy.allow_stale_on_error:
        return None
    reading = Reading(newest, policy.ttl_seconds, newest is not awaited.candidate, stale)
    if stale:
        error = reading.fallback = failure.make()
        notes = {"fallback_error_type": type_name(error), "fallback_error": message_of(error)}
        reading.notes = notes
    return reading


_LOWEST_SAID = 8


def doing(flight: Flight, known: dict[Call | Lane, str]) -> str:
    """Return what a flight, or the first that it waits for, is at, to be put behind a sentence.

    What is `known` of calls and lanes is not put into words again.
    """
    lowest, way = flight, 0
    while lowest.phase is _GATHERING and lowest.gather is not None and way < _LOWEST_SAID:
        awaited = next((f for f in lowest.gather.pending if isinstance(f, Flight)), None)
        if awaited is None:
            break
        lowest, way = awaited, way + 1
    whom = lowest.lane if lowest.call is None and lowest.phase is _CALLING else lowest.call
    what = ""
    if whom is not None:
        what = known.get(whom) or known.setdefault(whom, whom.doing)
    return f": it waited for {lowest.key.display}{what}" if way else what


def late(
    key: ResourceKey, deadline: Deadline | None, flight: Flight | None, was: str = ""
) -> Failure:
    """Return the failure of a key whose deadline passed, with what its sources had said so far.

    `was` is what it was at; see `doing`.
    """
    source = None if flight is None or flight.link is None else flight.link.name
    failures = () if flight is None else flight.failures
    tries: int | None = 0
    if flight is not None and ended_late(flight):
        tries = None  # that is said already
    elif flight is not None and flight.call is not None:
        tries = flight.call.attempts
    elif failures and failures[-1].source == source and _is_late(failures[-1]):
        failures = failures[:-1]  # what it is derived from was late, as it is itself
    # A closure over as much would be nine objects for each of very many keys.
    return Failure(key, partial(_late_error, key, deadline, source, failures, tries, was))


def _late_error(
    key: ResourceKey,
    deadline: Deadline | None,
    source: str | None,
    failures: tuple[SourceFailure, ...],
    tries: int | None,
    was: str,
) -> Exception:
    budget = "" if deadline is None else f" of {deadline.budget_seconds:g} s"
    text = f"the deadline{budget} passed before {key.display} was resolved{was}"
    if source is None:
        return SnapshotDeadlineExceededError(text)
    if tries is not None:
        last = SourceFailure(source, SnapshotDeadlineExceededError.__name__, text, tries)
        failures = (*failures, last)
    return ResourceResolutionError(key, failures)


def _is_late(failure: SourceFailure) -> bool:
    """Whether a deadline is why, or why inputs failed, as far as a few steps down show that."""
    failures = [failure]
    for each in failures:
        if each.error_type == SnapshotDeadlineExceededError.__name__:
            return True
        if isinstance(each.exception, DependencyResolutionError) and len(failures) < _LOWEST_SAID:
            below = islice(each.exception.errors.values(), _LOWEST_SAID)
            lower = [e.failures for e in below if isinstance(e, ResourceResolutionError)]
            failures += [each[-1] for each in lower if each]
    return False


def ended_late(flight: Flight) -> bool:
    """Whether its source has said already, in this very instant, that its deadline passed."""
    if flight.link is None or flight.call is not None or not flight.failures:
        return False
    last, late_error = flight.failures[-1], SnapshotDeadlineExceededError.__name__
    return (last.source, last.error_type) == (flight.link.name, late_error)
