"""Flights and those who wait for them.

An `Acquisition` is one key on its way through its chain of sources, shared by everyone who needs
the key. A `Gather` is somebody who waits for a set of keys: a stage of a build, or a derivation.
Both are plain state; the scheduler moves them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from typing import Protocol

from coalestra.core.errors import SourceFailure
from coalestra.core.freshness import FreshnessPolicy
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.orchestration.chains import Link
from coalestra.orchestration.interest import Interest
from coalestra.orchestration.phases import Phase
from coalestra.orchestration.pins import NO_DEMAND, NO_PINS, Demand, Pins, hold
from coalestra.orchestration.readings import Failure, Reading, Settlement
from coalestra.orchestration.work import Work


class Call(Protocol):
    """The call to a source that a flight takes part in, as far as a flight cares."""

    def extend(self) -> None:
        """Learn that a flight of the call is wanted for longer."""

    def unwanted(self) -> None:
        """Learn that nobody waits for one of the flights any more."""


class Acquisition:
    """The one flight that acquires a key; any number of gathers wait for it.

    `cutoff` is the latest deadline that any waiter ever had. `cacheable` turns false when the key
    is invalidated under way; `event` is what was published for it meanwhile. `offered` is the
    value on its way to the cache, `dated` if its source said when. `pins` is set for a private
    derivation, which serves one unit of work alone and is never joined by others. `missed` says
    that the cache had nothing of use for the key, `joinable` that newcomers find the flight on the
    board, `linked` that it waits for other flights, or others wait for it.
    """

    __slots__ = (
        "attempt",
        "began",
        "cacheable",
        "cached",
        "candidate",
        "cutoff",
        "cycle",
        "dated",
        "event",
        "failures",
        "forced",
        "gather",
        "joinable",
        "key",
        "link",
        "linked",
        "missed",
        "offered",
        "phase",
        "pins",
        "policy",
        "position",
        "settlement",
        "sponsor",
        "waiters",
    )

    def __init__(
        self,
        key: ResourceKey,
        policy: FreshnessPolicy,
        sponsor: Work,
        *,
        forced: bool = False,
        pins: Pins | None = None,
    ) -> None:
        self.key: ResourceKey = key
        self.policy: FreshnessPolicy = policy
        self.sponsor: Work = sponsor
        self.forced: bool = forced
        self.pins: Pins | None = pins
        self.waiters: dict[Gather, bool] = {}
        self.cutoff: float = -math.inf
        self.phase: Phase = Phase.CHOOSING
        self.position: int = 0
        self.link: Link | None = None
        self.failures: tuple[SourceFailure, ...] = ()
        self.cycle: tuple[ResourceKey, ...] | None = None
        self.cached: Revision | None = None
        self.candidate: Revision | None = None
        self.event: Revision | None = None
        self.offered: Revision | None = None
        self.dated: bool = False
        self.cacheable: bool = True
        self.began: bool = False
        self.missed: bool = False
        self.joinable: bool = False
        self.linked: bool = False
        self.gather: Gather | None = None
        self.attempt: Call | None = None
        self.settlement: Settlement | None = None

    @property
    def wanted(self) -> bool:
        """Whether anyone still waits."""
        return bool(self.waiters)

    def offers(self, revision: Revision) -> bool:
        """Whether `revision` is the value that the flight itself brings to the cache."""
        return self.offered is revision

    def living_sponsor(self) -> Work:
        """Return the work to act for: the first that waits, directly or through derived keys.

        The work that started the flight keeps it for as long as it lives.
        """
        if not self.sponsor.over:
            return self.sponsor
        seen = {id(self)}
        stack = [self]
        while stack:
            for gather in stack.pop().waiters:
                owner = gather.owner
                if owner is None:
                    if not gather.work.over:
                        self.sponsor = gather.work
                        return gather.work
                elif id(owner) not in seen:
                    seen.add(id(owner))
                    stack.append(owner)
        return self.sponsor

    def __repr__(self) -> str:
        return f"<Acquisition {self.key} {self.phase.value}, waiters={len(self.waiters)}>"


class ReadGroup:
    """The reads that go to the cache together, and the task that carries them.

    `changed` are the keys of which there has been news meanwhile.
    """

    __slots__ = ("changed", "interest", "reads", "task")

    def __init__(self) -> None:
        self.changed: set[ResourceKey] = set()
        self.reads: list[Read] = []
        self.interest: Interest = Interest(self.reads)
        self.task: asyncio.Task[None] | None = None


class Read:
    """One key on its way out of a cache that has to be awaited, shared by everyone who asks.

    `flight` is an acquisition of the key that was under way meanwhile, whatever became of it.
    `rounds` counts the answers before it that were outdated when they came.
    """

    __slots__ = ("flight", "group", "key", "policy", "rounds", "waiters")

    def __init__(self, key: ResourceKey, policy: FreshnessPolicy, group: ReadGroup) -> None:
        self.key: ResourceKey = key
        self.policy: FreshnessPolicy = policy
        self.group: ReadGroup = group
        self.waiters: dict[Gather, None] = {}
        self.flight: Acquisition | None = None
        self.rounds: int = 0

    def __repr__(self) -> str:
        return f"<Read {self.key} waiters={len(self.waiters)}>"

    @property
    def wanted(self) -> bool:
        """Whether anyone still waits."""
        return bool(self.waiters)


class Gather:
    """A set of keys that somebody waits for, and what has become of each so far.

    A stage waits for its keys under the pins of its session. A derived acquisition (`owner`)
    waits for its dependencies. Once every key has a reading or a failure, `done` is called, once.
    """

    __slots__ = (
        "done",
        "failures",
        "forced",
        "keys",
        "open",
        "owner",
        "pending",
        "agreed",
        "base",
        "pins",
        "private",
        "readings",
        "refresh",
        "rounds",
        "strike",
        "work",
    )

    def __init__(
        self,
        work: Work,
        keys: Iterable[ResourceKey],
        pins: Pins,
        *,
        demand: Demand | None = None,
        owner: Acquisition | None = None,
    ) -> None:
        self.work: Work = work
        self.keys: dict[ResourceKey, None] = dict.fromkeys(keys)
        self.base: Pins = pins
        self.pins: Pins = pins
        insisted = NO_DEMAND if demand is None else demand
        self.forced: frozenset[ResourceKey] = insisted.forced
        self.private: frozenset[ResourceKey] = insisted.private
        self.refresh: bool = insisted.refresh
        self.owner: Acquisition | None = owner
        self.readings: dict[ResourceKey, Reading] = {}
        self.failures: dict[ResourceKey, Failure] = {}
        self.pending: dict[ResourceKey, Acquisition | Read] = {}
        self.open: bool = False
        self.rounds: int = 0
        self.agreed: tuple[int, int] | None = None
        self.done: Callable[[Gather], None] = _nobody
        self.strike: Callable[[], None] = nothing

    @property
    def cutoff(self) -> float:
        """The latest instant, on the loop's clock, at which anyone still wants the keys."""
        return self.work.cutoff if self.owner is None else self.owner.cutoff

    @property
    def agrees(self) -> bool:
        """Whether the readings were found to agree with the pins as they are now."""
        return self.agreed == self.base.stamp

    @property
    def complete(self) -> bool:
        """Whether every key has come to a reading or a failure."""
        return not self.open and not self.pending

    def accepts_stale(self, key: ResourceKey) -> bool:
        """Whether a stale value may stand in for a failed `key`."""
        return not self.refresh and not (self.forced and key in self.forced)

    def yield_to_pins(self) -> None:
        """Give up readings of what was pinned otherwise meanwhile: what is pinned stands."""
        self.agreed = self.base.stamp
        for key in self.readings.keys() & self.base.keys():
            pin = self.base[key]
            if pin.revision is not self.readings[key].revision:
                self.readings[key] = pin

    def settle_pins(self) -> None:
        """Hold fast to what has been read so far, so that what is derived anew agrees with it.

        A stage does so on a copy of its session's pins: they change only when the stage is over.
        """
        if self.owner is None:
            self.pins = Pins(self.base, self.base.demand)
        elif self.pins is NO_PINS:
            self.base = self.pins = Pins()
        hold(self.pins, self.readings)

    def receive(self, key: ResourceKey, settlement: Settlement, joined: bool) -> None:
        """Take what a flight ended with; `joined` says that another unit of work had started it."""
        if isinstance(settlement, Reading):
            reading = settlement
        elif settlement.stale is not None and self.accepts_stale(key):
            reading = settlement.stale
        else:
            self.failures[key] = settlement.failure
            return
        reading = reading.noted(coalesced_request=True) if joined else reading
        self.readings[key] = reading
        if self.forced and key in self.forced:
            self.pins[key] = reading

    def __repr__(self) -> str:
        for_whom = "stage" if self.owner is None else str(self.owner.key)
        return f"<Gather for {for_whom}: {len(self.readings)} of {len(self.keys)}>"


def _nobody(_gather: Gather) -> None:
    """Stand in until somebody wants to know."""


def nothing() -> None:
    """Stand in until the gather has been opened."""
