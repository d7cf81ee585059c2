"""Notes of what a unit of work does, while it does it, and the trace that is made of them.

Laws:

1. What nobody asked to be traced costs one look at an attribute that is None.
2. Notes are facts with the time at which they were made; nothing is decided by them. They hold no
   payload, no metadata, no exception and no flight, so that a trace that is kept keeps nothing else
   alive. There is room for so many, however long a unit of work goes on; the rest is counted.
3. A trace is made when somebody looks at it, of what was noted by the time it speaks of.
4. A tracer's failure is counted, logged once, and ends nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from math import inf
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from coalestra._endings import pass_on, running_loop
from coalestra.core import trace as records
from coalestra.core.errors import (
    ResourceResolutionError,
    SourceFailure,
    folded_message,
    message_of,
    type_name,
)
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import Tracer
from coalestra.core.snapshot import FetchContext
from coalestra.core.trace import Foundation, KeyTrace, Obtained, Trace, Wait, WaitReason
from coalestra.core.values import Revision, SnapshotValue
from coalestra.observability import ChangeLog
from coalestra.orchestration.readings import Failure, Reading

MOST_KEYS = 1_000
"""How many keys a trace has room for; of more it says how many there were."""
MOST_STAGES = 500
"""How many stages a trace has room for, the latest ones; of more it says how many there were."""
MOST_ATTEMPTS = 100
"""How many attempts of a call a trace has room for: the first and the latest ones."""
MOST_INPUTS = 1_000
"""Of how many revisions below a value a trace has room to tell: the oldest and the latest."""
MOST_KEPT = 32
"""How many traces of the recent past a builder keeps."""


def _now() -> float:
    """Return the time of the event loop; outside of one, of the clock that loops go by."""
    loop = running_loop()
    return time.monotonic() if loop is None else loop.time()


class Tracing:
    """Which units of work a builder traces, what follows them, and the traces of the recent past.

    `rate` is the share of units of work that are recorded unless their caller says otherwise.
    """

    def __init__(self, rate: float, tracer: Tracer | None, log: ChangeLog) -> None:
        self.rate: float = rate
        self.tracer: Any = tracer  # there is one wherever there is a span
        self.off: bool = not rate and tracer is None  # unless a caller says otherwise
        self.failures: int = 0
        self._log = log
        self._recent: dict[WorkTrace, Trace] = {}

    def begin(
        self,
        kind: str,
        context: FetchContext,
        asked: bool | None = None,
        parent: WorkTrace | None = None,
    ) -> WorkTrace | None:
        """Return the notes of a new unit of work, or None if nobody wants any."""
        recording = bool(self.rate and random.random() < self.rate) if asked is None else asked
        recording = recording or (parent is not None and parent.recording)
        if not recording and self.tracer is None:
            return None
        above = None if parent is None else parent.snapshot_id
        return WorkTrace(self, kind, context.snapshot_id, context.requested_at, above, recording)

    def keep(self, work: WorkTrace) -> None:
        """Keep what was recorded so far, in the place of what was kept of the same before."""
        trace = work.recorded()
        if trace is not None:
            self._recent.pop(work, None)
            self._recent[work] = trace
            if len(self._recent) > MOST_KEPT:
                del self._recent[next(iter(self._recent))]

    def recent(self) -> tuple[Trace, ...]:
        """Return the traces of the recent past, the latest last."""
        return tuple(self._recent.copy().values())  # in one step: any thread may ask

    def tell(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return what a method of the tracer returns, or None if it fails."""
        try:
            return method(*arguments, **named)
        except BaseException as error:
            self.failures += 1
            # Once: that another method of it succeeds does not say that it works again.
            self._log.failed(f"tracer {type(self.tracer).__name__}", error)
            pass_on(error)
            return None

    def __repr__(self) -> str:
        return f"<Tracing rate={self.rate} tracer={self.tracer!r} kept={len(self._recent)}>"


R = TypeVar("R", records.AttemptTrace, records.CallTrace, KeyTrace, records.StageTrace, Wait)


_UNDER_WAY = {"outcome": "under_way", "obtained": Obtained.FAILED}
_FOUND = ("source", "version", "rests_on", "omitted_inputs")
_AT_END = (*_FOUND, "error_type", "error", "pause_seconds")
"""What only an end brings: before it, a record has its own defaults of these."""


@dataclass(slots=True, eq=False)
class _Stretch:
    """What began at one time, and has ended at another or goes on."""

    _: KW_ONLY
    start: float = field(default_factory=_now)
    end: float = inf

    def told(self, record: type[R], began: float, until: float, **more: Any) -> R:
        """Return the record of what was noted by `until`, in seconds since `began`.

        What is not told in `more` is kept here under the same name.
        """
        names = [name for name in record.__match_args__ if name not in more]
        facts: dict[str, Any] = more | {name: getattr(self, name) for name in names}
        if self.end > until:
            facts |= {name: getattr(record, name) for name in _AT_END if hasattr(record, name)}
            facts |= {name: it for name, it in _UNDER_WAY.items() if name in facts}
        facts |= {"start": self.start - began, "end": min(self.end, until) - began}
        return record(**facts)


@dataclass(slots=True, eq=False)
class _Wait(_Stretch):
    """What is noted of one stretch of waiting; see `Wait`."""

    reason: WaitReason
    detail: str


class _Waits(list[_Wait]):
    """Stretches of waiting, the last of which may still go on."""

    __slots__ = ()

    def begin(self, reason: WaitReason, detail: str = "") -> None:
        """Note that a wait begins, and with it ends the one before."""
        self.end()
        self.append(_Wait(reason, detail))

    def end(self) -> None:
        """Note that the wait is over, if there is one."""
        if self and self[-1].end == inf:
            self[-1].end = _now()


@dataclass(slots=True, eq=False)
class _Try(_Stretch):
    """What attempts and calls have in common: an outcome, and the error that it was."""

    _: KW_ONLY
    outcome: str = ""
    error_type: str | None = None
    error: str | None = None

    def settle(self, outcome: str, error: BaseException | None) -> None:
        """Note how it has ended."""
        self.end, self.outcome = _now(), outcome
        self.error_type, self.error = _said(error)


@dataclass(slots=True, eq=False)
class AttemptLog(_Try):
    """What is noted of one attempt; see `AttemptTrace`."""

    number: int
    called: float | None = None
    holders: tuple[tuple[str, int], ...] = ()
    pause_seconds: float | None = None
    span: Any = None

    def traced(self, began: float, until: float) -> records.AttemptTrace:
        """Return what was noted by `until`, in seconds since `began`."""
        called = None if self.called is None or self.called > until else self.called - began
        return self.told(records.AttemptTrace, began, until, called=called)


@dataclass(slots=True, eq=False)
class CallLog(_Try):
    """What is noted of one call, and told to the tracer: one span for each attempt."""

    tracing: Tracing
    parent: Any
    snapshot_id: str
    source: str
    kind: str
    keys: int
    attempts: list[AttemptLog] = field(default_factory=list)

    @property
    def span(self) -> Any:
        """The span of the latest attempt, for those who have waited for it."""
        return self.attempts[-1].span if self.attempts else None

    def attempt(self, number: int) -> None:
        """Note that an attempt begins."""
        self.attempts.append(AttemptLog(number))
        del self.attempts[1 : 1 - MOST_ATTEMPTS]

    def caught_up(self, number: int, called: float) -> None:
        """Note an attempt that had begun, and called its source, before anything was noted."""
        self.start = called
        self.attempts.append(AttemptLog(number, called, start=called))

    def waits(self, holders: Mapping[str, int]) -> None:
        """Note that the attempt waits for capacity, and who has it."""
        self.attempts[-1].holders = tuple(holders.items())

    def called(self, run: Callable[..., Any]) -> None:
        """Note that the source is being called; `run` runs something in the context of the call."""
        attempt, tracing = self.attempts[-1], self.tracing
        attempt.called = _now()
        if tracing.tracer is None:
            return
        attributes = {
            "source": self.source,
            "source_kind": self.kind,
            "snapshot_id": self.snapshot_id,
            "keys": self.keys,
            "attempt": attempt.number,
            "waited_seconds": attempt.called - attempt.start,
        }
        attempt.span = tracing.tell(tracing.tracer.begin, "call", attributes, parent=self.parent)
        if attempt.span is not None:
            tracing.tell(run, tracing.tracer.enter, attempt.span)

    def ended(self, outcome: str, error: BaseException | None = None) -> None:
        """Note how the attempt has ended, once."""
        attempt = self.attempts[-1] if self.attempts else None
        if attempt is not None and attempt.end == inf:
            attempt.settle(outcome, error)
            if attempt.span is not None:
                tell, tracer = self.tracing.tell, self.tracing.tracer
                tell(tracer.end, attempt.span, {"outcome": outcome}, error)

    def rests(self, seconds: float) -> None:
        """Note that another attempt follows after a pause."""
        self.attempts[-1].pause_seconds = seconds

    def over(self, outcome: str, error: BaseException | None = None) -> None:
        """Note that the call is over, once."""
        if self.end == inf:
            self.ended(outcome, error)
            self.settle(outcome, error)

    def traced(self, began: float, until: float) -> records.CallTrace:
        """Return what was noted by `until`, in seconds since `began`."""
        begun = [each for each in self.attempts if each.start <= until]
        attempts = tuple([each.traced(began, until) for each in begun])
        return self.told(records.CallTrace, began, until, attempts=attempts)


@dataclass(slots=True, eq=False)
class FlightLog:
    """What is noted of one flight, for all traces of those who wait for it."""

    snapshot_id: str
    calls: list[CallLog] = field(default_factory=list)
    refusals: list[records.SourceRefusal] = field(default_factory=list)
    waits: _Waits = field(default_factory=_Waits)

    def refused(self, failure: SourceFailure, status: str) -> None:
        """Note that a source brought nothing for the key."""
        self.refusals.append(_refusal(failure, _now(), status))


def _refusal(failure: SourceFailure, at: float, status: str) -> records.SourceRefusal:
    said = failure.error_type, folded_message(failure.message)
    return records.SourceRefusal(failure.source, at, status, *said)


Found = tuple[str | None, str | None, tuple[Foundation, ...], int]
"""Of a value its source, its version, what it rests on, and on how many more."""


@dataclass(slots=True, eq=False)
class KeyLog(_Stretch):
    """What is noted of one key for one who waits for it; see `KeyTrace`."""

    key: ResourceKey
    requested: bool
    obtained: Obtained | None = None
    flight: FlightLog | None = None
    joined: str | None = None
    waits: _Waits = field(default_factory=_Waits)
    refresh: str | None = None
    found: Found = (None, None, (), 0)
    error_type: str | None = None
    error: str | None = None
    blamed: tuple[records.SourceRefusal, ...] = ()

    def cached(self, how: Obtained, scheduled: bool | None) -> None:
        """Note that the cache had a value of use; if that is being refreshed, whether by us."""
        self.obtained = how
        if scheduled is not None:
            self.refresh = "scheduled" if scheduled else "under_way"
        self.handed()

    def flies(self, flight: FlightLog, *, joined: bool) -> None:
        """Note that a flight acquires the key, and whether another unit of work had begun it."""
        self.waits.end()
        self.end, self.obtained = inf, None
        self.flight, self.joined = flight, flight.snapshot_id if joined else None
        if joined:
            self.waits.begin(WaitReason.FLIGHT, flight.snapshot_id)

    def handed(self) -> None:
        """Note that waiting is over."""
        self.waits.end()
        self.end = _now()

    def settled(self, reading: Reading | None, failure: Failure | None, *, pinned: bool) -> None:
        """Note what has been come to."""
        if self.end == inf:
            self.handed()
        if reading is None:
            self.obtained, self.found = Obtained.FAILED, (None, None, (), 0)
            error = None if failure is None else failure.make()
            self.error_type, self.error = _said(error)
            if self.flight is not None and isinstance(error, ResourceResolutionError):
                self.blamed = tuple([_refusal(f, self.end, "failure") for f in error.failures])
            return
        self.found = _facts(reading.revision)
        self.error_type, self.error = _said(reading.fallback)
        if reading.fallback is not None:
            self.obtained = Obtained.FALLBACK
        elif self.obtained is None:
            known = pinned and self.flight is None
            self.obtained = Obtained.PINNED if known else self._how(reading)

    def _how(self, reading: Reading) -> Obtained:
        if reading.from_cache:
            return Obtained.CACHE if self.flight is None else Obtained.PUBLISHED
        calls = () if self.flight is None else self.flight.calls
        kind = calls[-1].kind if calls else "derived" if reading.revision.dependencies else ""
        return Obtained.DERIVED if kind == "derived" else Obtained.FETCHED

    def came_to(self, until: float) -> str | None:
        """Return the version, or else the error, that it has come to by `until`, if it has."""
        return (self.found[1] or self.error) if self.end <= until else None

    def traced(self, began: float, until: float, calls: dict[CallLog, int]) -> KeyTrace:
        """Return what was noted by `until`; `calls` numbers the calls, and learns of new ones."""
        flight = self.flight or _NO_FLIGHT
        both = sorted([*self.waits, *flight.waits], key=attrgetter("start"))
        waits = [each for each in both if each.start <= until]
        mine = [call for call in flight.calls if call.start <= until]
        known = min(until, self.end)
        refusals = [each for each in flight.refusals if each.at <= known]
        tried = {each.source for each in refusals}  # the rest this reader's deadline has cut short
        refusals += [e for e in self.blamed if e.source not in tried and e.at <= known]
        return self.told(
            KeyTrace,
            began,
            until,
            **dict(zip(_FOUND, self.found, strict=True)),
            obtained=self.obtained or Obtained.FAILED,
            waits=tuple([each.told(Wait, began, until) for each in waits]),
            calls=tuple([calls.setdefault(call, len(calls)) for call in mine]),
            refusals=tuple([replace(each, at=each.at - began) for each in refusals]),
        )


_NO_FLIGHT = FlightLog("")
"""Stands for the flight of a key that none acquired; nothing is written into it."""


class WarmKey(NamedTuple):
    """What is noted of a key that was in memory with all others: how, when, and what was found."""

    obtained: Obtained
    start: float
    key: ResourceKey
    found: Found
    requested: bool = True  # what derived values need is looked for one by one

    def came_to(self, _until: float) -> str | None:
        """Return the version of the value that was found."""
        return self.found[1]

    def traced(self, began: float, *_: object) -> KeyTrace:
        """Return it, in seconds since `began`."""
        at, found = self.start - began, dict[str, Any](zip(_FOUND, self.found, strict=True))
        return KeyTrace(self.key, self.obtained, at, at, **found)


def _said(error: BaseException | None) -> tuple[str | None, str | None]:
    """Return the type and the text of an error, if there is one."""
    return (None, None) if error is None else (type_name(error), folded_message(message_of(error)))


@dataclass(slots=True, eq=False)
class StageLog(_Stretch):
    """What is noted of one stage; see `StageTrace`."""

    name: str
    keys: int
    span: Any = None
    resolved: int = 0
    failed: int = 0
    error: BaseException | None = None


@dataclass(eq=False, repr=False)
class WorkTrace:
    """What is noted of one unit of work: its stages, and each key that it looks for.

    Without `recording` nothing is kept of the keys; there is a tracer to be told of spans then.
    """

    tracing: Tracing
    kind: str
    snapshot_id: str
    started_at: float
    parent: str | None
    recording: bool
    span: Any = None
    _began: float = field(default_factory=_now)
    _stages: list[StageLog] = field(default_factory=list)
    _stages_begun: int = 0
    _entries: list[KeyLog | WarmKey] = field(default_factory=list)
    _latest: dict[ResourceKey, int] | None = None
    _untold: set[int] = field(default_factory=set)
    _joins: dict[ResourceKey, tuple[Any, FlightLog, float]] = field(default_factory=dict)

    # Stages -----------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str, keys: int, variables: Context) -> Iterator[StageLog]:
        """Note the stage that the block is, for so many keys; keep what came of it.

        Its span is current in the block, which may ask a cache, and in `variables`, the context in
        which the unit of work calls sources.
        """
        log, leave = self.begin_stage(name, keys, variables), None
        if log.span is not None:
            leave = self.tracing.tell(self.tracing.tracer.enter, log.span)
        try:
            yield log
        except BaseException as error:
            log.error = error
            raise
        finally:
            self.end_stage(log)
            if leave is not None:
                self.tracing.tell(leave)

    def begin_stage(
        self, name: str, keys: int, variables: Context, link: Any = None, **more: Any
    ) -> StageLog:
        """Note that a stage begins, for so many keys."""
        log, tracer = self._new_stage(name, keys), self.tracing.tracer
        if tracer is not None:
            facts = {"snapshot_id": self.snapshot_id, "keys": keys, **more}
            if self.parent is not None:
                facts["parent_snapshot_id"] = self.parent
            self.span = log.span = self.tracing.tell(tracer.begin, name, facts, link=link)
            if self.span is not None:
                self.tracing.tell(variables.run, tracer.enter, self.span)
        return log

    def end_stage(self, log: StageLog) -> None:
        """Note that a stage has ended, and keep what was recorded."""
        log.end = _now()
        error, log.error = log.error, None
        if log.span is not None:
            for key in [key for key, (waiting, *_) in self._joins.items() if waiting is log.span]:
                self._tell_join(key)  # it has given up
            facts = {"resolved": log.resolved, "failed": log.failed}
            self.tracing.tell(self.tracing.tracer.end, log.span, facts, error)
        self.tracing.keep(self)

    def refreshed(self, succeeded: bool) -> None:
        """Note that a key of a refresh has ended, and with the last one the whole."""
        log = self._stages[0]
        log.resolved += succeeded
        log.failed += not succeeded
        if log.resolved + log.failed == log.keys:
            self.end_stage(log)

    @contextmanager
    def delivering(self, keys: int) -> Iterator[None]:
        """Note the copying of values for the reader, which the block is."""
        log = self._new_stage("delivery", keys)
        try:
            yield
        finally:
            log.end = _now()

    def _new_stage(self, name: str, keys: int) -> StageLog:
        log = StageLog(name, keys)
        self._stages.append(log)
        self._stages_begun += 1
        del self._stages[:-MOST_STAGES]
        return log

    # Keys -------------------------------------------------------------------------------------

    def look(self, keys: Iterable[ResourceKey], *, requested: bool) -> dict[ResourceKey, KeyLog]:
        """Return what is noted of keys that somebody looks for.

        What derivations need is noted once, unless it had failed.
        """
        logs: dict[ResourceKey, KeyLog] = {}
        latest, entries = self._places, self._entries
        for key in keys if self.recording else ():
            place = latest.get(key)
            known = None if place is None else entries[place]
            if requested or known is None or known.obtained is Obtained.FAILED:
                log = self._begin(key, requested=requested)
                if log is not None:
                    logs[key] = log
        return logs

    def shown(
        self, values: Mapping[ResourceKey, SnapshotValue[Any]], pins: Mapping[ResourceKey, Reading]
    ) -> None:
        """Note what a session shows that was never looked for, but read out of sight."""
        for key, value in values.items() if self.recording else ():
            place, pin = self._places.get(key), pins.get(key)
            known = None if place is None else self._entries[place]
            if known is not None and known.found[1] == value.version:
                if isinstance(known, KeyLog):
                    known.requested = True
            elif pin is not None and pin.revision.version == value.version:
                log = self._begin(key, requested=True)
                if log is not None:
                    log.obtained, log.end = Obtained.PINNED, log.start
                    log.found = _facts(pin.revision)

    def _begin(self, key: ResourceKey, *, requested: bool) -> KeyLog | None:
        """Begin the story of a key; where there is no room, in the place of its last one."""
        entries, place = self._entries, self._places.get(key)
        if len(entries) < MOST_KEYS:
            place = len(entries)
        elif place is None:
            self._untold.add(hash(key))
            return None
        elif not isinstance(entries[place], KeyLog):
            return None
        log = KeyLog(key, requested)
        entries[place : place + 1] = [log]
        self._places[key] = place
        return log

    @property
    def _places(self) -> dict[ResourceKey, int]:
        """Where the latest story of each key is; a build that finds all in memory never asks."""
        if self._latest is None:
            self._latest = {each.key: place for place, each in enumerate(self._entries)}
        return self._latest

    def warm(self, revisions: Iterable[Revision], *, near: bool) -> None:
        """Note that all keys of a stage were in memory."""
        if self.recording:
            how, now = Obtained.NEAR_CACHE if near else Obtained.CACHE, _now()
            rest = iter(revisions)
            told = islice(rest, MOST_KEYS - len(self._entries))
            self._entries += [WarmKey(how, now, each.key, _facts(each)) for each in told]
            self._latest = None
            self._untold.update([hash(revision.key) for revision in rest])

    def flies(
        self, log: KeyLog | None, key: ResourceKey, flight: FlightLog, *, joined: bool, waiting: Any
    ) -> None:
        """Note that a flight acquires the key, and which span waits if another had begun it."""
        if waiting is not None:
            self._joins.setdefault(key, (waiting, flight, _now()))
        if log is not None:
            log.flies(flight, joined=joined)

    def handed(self, log: KeyLog | None, key: ResourceKey) -> None:
        """Note that the flight of a key has ended for this unit of work."""
        if log is not None:
            log.handed()
        if key in self._joins:
            self._tell_join(key)

    def _tell_join(self, key: ResourceKey) -> None:
        """Tell the tracer of a wait for another's flight that is over."""
        span, flight, since = self._joins.pop(key)
        facts = {
            "snapshot_id": flight.snapshot_id,
            "resource_namespace": key.namespace,
            "resource_name": key.name,
        }
        call = flight.calls[-1].span if flight.calls else None
        self.tracing.tell(self.tracing.tracer.joined, span, call, _now() - since, facts)

    # The trace --------------------------------------------------------------------------------

    def recorded(
        self,
        values: Mapping[ResourceKey, SnapshotValue[Any]] = EMPTY,
        errors: Mapping[ResourceKey, Exception] = EMPTY,
    ) -> Trace | None:
        """Return the trace by now, if there is to be one, of a snapshot of these."""
        if not self.recording:
            return None
        until = _now()
        noted = len(self._entries), self._stages_begun, len(self._untold)
        made = partial(self._records, until, values, errors, *noted)
        about = self.snapshot_id, self.kind, self.parent, self.started_at
        return records.pending_trace(made, *about, until - self._began)

    def _records(
        self,
        until: float,
        values: Mapping[ResourceKey, SnapshotValue[Any]],
        errors: Mapping[ResourceKey, Exception],
        entries: int,
        stages_begun: int,
        untold: int,
    ) -> dict[str, Any]:
        """Return the records of what had been noted at one moment, as things were then.

        A key that was read more than once has the story of the value that was delivered, or none;
        one that was not delivered that of its error, else the latest of which it was asked for.
        """
        began = self._began
        stories: dict[ResourceKey, list[KeyLog | WarmKey]] = {}
        for story in self._entries[:entries]:
            if story.start <= until:
                stories.setdefault(story.key, []).append(story)
        keys: dict[ResourceKey, KeyTrace] = {}
        calls: dict[CallLog, int] = {}
        for key, mine in stories.items():
            if key in values:
                version, stands_in = values[key].version, "fallback_error" in values[key].metadata
                fitting = [each for each in mine if each.came_to(until) == version]
                # One that was fetched may be kept, and stand in for a newer one, later on; and it
                # may take the place of what another stage was about to read.
                fitting.sort(
                    key=lambda each: (
                        (each.obtained is Obtained.FALLBACK) is not stands_in,
                        each.obtained is Obtained.PINNED,
                    )
                )
            else:
                error = _said(errors.get(key))[1]
                asked = [each for each in reversed(mine) if each.requested] or mine[::-1]
                fitting = [
                    each for each in asked if error and each.came_to(until) == error
                ] or asked
            if fitting:
                keys[key] = fitting[0].traced(began, until, calls)
        stages = [each for each in self._stages if each.start <= until]
        return {
            "stages": tuple([each.told(records.StageTrace, began, until) for each in stages]),
            "keys": FrozenDict(keys),
            "calls": tuple([call.traced(began, until) for call in calls]),
            "omitted_keys": untold + len(stories) - len(keys),
            "omitted_stages": stages_begun - len(stages),
        }

    def __repr__(self) -> str:
        return f"<WorkTrace {self.kind} {self.snapshot_id} keys={len(self._entries)}>"


def _facts(revision: Revision) -> Found:
    below = revision.dependencies
    if not below:
        return revision.source, revision.version, (), 0
    omitted = max(0, len(below) - MOST_INPUTS)
    if omitted:
        ordered, half = sorted(below, key=attrgetter("observed_at")), MOST_INPUTS // 2
        below = (*ordered[:half], *ordered[-half:])
    rests_on = [_foundation(r.key, r.version, r.source, r.observed_at) for r in below]
    return revision.source, revision.version, tuple(rests_on), omitted


_foundation = lru_cache(maxsize=4_096)(Foundation)
"""Makes one record of a revision, however many values of however many traces rest on it."""
