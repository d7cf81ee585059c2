"""How a gather ends: complete and coherent, or at its deadline, or because nobody wants it."""

from __future__ import annotations

from collections.abc import Callable

from coalestra.core.errors import (
    ResourceResolutionError,
    SnapshotDeadlineExceededError,
    SourceFailure,
    SourceUnavailableError,
)
from coalestra.core.keys import ResourceKey
from coalestra.orchestration.cache_reads import CacheReads
from coalestra.orchestration.endings import stale_candidate
from coalestra.orchestration.flights import Acquisition, Gather, Read
from coalestra.orchestration.pins import at_odds
from coalestra.orchestration.readings import Failure
from coalestra.orchestration.scheduler import Scheduler
from coalestra.orchestration.work import Work

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
