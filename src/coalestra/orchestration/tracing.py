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

import asyncio
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import Context
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from coalestra._endings import pass_on
from coalestra.core.errors import SourceFailure, folded_message, message_of, type_name
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import Tracer
from coalestra.core.snapshot import FetchContext
from coalestra.core.trace import (
    AttemptTrace,
    CallTrace,
    Foundation,
    KeyTrace,
    Obtained,
    SourceRefusal,
    StageTrace,
    Trace,
    Wait,
    WaitReason,
)
from coalestra.core.values import Revision, SnapshotValue
from coalestra.observability.changes import ChangeLog
from coalestra.orchestration.readings import Failure, Reading

MOST_KEYS = 1_000
"""How many keys a trace has room for; of more it says how many there were."""

MOST_STAGES = 500
"""How many stages a trace has room for, the latest ones; of more it says how many there were."""

MOST_KEPT = 32
"""How many traces of the recent past a builder keeps."""


def _now() -> float:
    """Return the time of the event loop; outside of one, of the clock that loops go by."""
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


class Tracing:
    """Which units of work a builder traces, what follows them, and the traces of the recent past.

    `rate` is the share of units of work that are recorded unless their caller says otherwise.
    """

    def __init__(self, rate: float, tracer: Tracer | None, log: ChangeLog) -> None:
        self.rate: float = rate
        self.tracer: Tracer | None = tracer
        self.off: bool = not rate and tracer is None  # unless a caller says otherwise
        self.failures: int = 0
        self._log = log
        self._recent: OrderedDict[WorkTrace, Recorded] = OrderedDict()

    def begin(
        self,
        kind: str,
        context: FetchContext,
        asked: bool | None = None,
        parent: WorkTrace | None = None,
    ) -> WorkTrace | None:
        """Return the notes of a new unit of work, or None if nobody wants any."""
        recording = self._chosen() if asked is None else asked
        if parent is not None and parent.recording:
            recording = True
        if not recording and self.tracer is None:
            return None
        return WorkTrace(self, kind, context, recording, parent)

    def _chosen(self) -> bool:
        return self.rate > 0 and (self.rate >= 1 or random.random() < self.rate)

    def keep(self, trace: WorkTrace) -> None:
        """Keep what was recorded so far, in the place of what was kept of the same before."""
        recorded = trace.recorded()
        if recorded is not None:
            self._recent[trace] = recorded
            self._recent.move_to_end(trace)
            while len(self._recent) > MOST_KEPT:
                self._recent.popitem(last=False)

    def recent(self) -> tuple[Trace, ...]:
        """Return the traces of the recent past, the latest last."""
        return tuple(recorded() for recorded in tuple(self._recent.values()))

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


# What is noted of a call, of a flight and of a key ------------------------------------------------


class AttemptLog:
    """What was noted of one attempt; see `AttemptTrace`."""

    __slots__ = (
        "called",
        "end",
        "error",
        "holders",
        "number",
        "outcome",
        "pause",
        "span",
        "start",
    )

    def __init__(self, number: int, start: float, called: float | None = None) -> None:
        self.number: int = number
        self.start: float = start
        self.called: float | None = called
        self.end: float | None = None
        self.outcome: str = ""
        self.holders: tuple[tuple[str, int], ...] = ()
        self.error: tuple[str, str] | None = None
        self.pause: float | None = None
        self.span: Any = None


class CallLog:
    """What is noted of one call, and told to the tracer: one span for each attempt."""

    __slots__ = (
        "_parent",
        "_tracing",
        "attempts",
        "end",
        "error",
        "keys",
        "kind",
        "outcome",
        "snapshot_id",
        "source",
        "start",
    )

    def __init__(
        self,
        tracing: Tracing,
        parent: Any,
        snapshot_id: str,
        source: str,
        kind: str,
        keys: int,
    ) -> None:
        self._tracing = tracing
        self._parent = parent
        self.snapshot_id: str = snapshot_id
        self.source: str = source
        self.kind: str = kind
        self.keys: int = keys
        self.start: float = _now()
        self.end: float | None = None
        self.outcome: str = ""
        self.error: tuple[str, str] | None = None
        self.attempts: list[AttemptLog] = []

    @property
    def span(self) -> Any:
        """The span of the latest attempt, for those who have waited for it."""
        return self.attempts[-1].span if self.attempts else None

    def attempt(self, number: int) -> None:
        """Note that an attempt begins."""
        self.attempts.append(AttemptLog(number, _now()))

    def caught_up(self, number: int, called: float) -> None:
        """Note an attempt that had begun, and called its source, before anything was noted."""
        self.start = called
        self.attempts.append(AttemptLog(number, called, called))

    def waits(self, holders: Mapping[str, int]) -> None:
        """Note that the attempt waits for capacity, and who has it."""
        self.attempts[-1].holders = tuple(holders.items())

    def called(self, run: Callable[..., Any]) -> None:
        """Note that the source is being called; `run` runs something in the context of the call."""
        attempt = self.attempts[-1]
        attempt.called = _now()
        tracer = self._tracing.tracer
        if tracer is None:
            return
        attributes = {
            "source": self.source,
            "source_kind": self.kind,
            "snapshot_id": self.snapshot_id,
            "keys": self.keys,
            "attempt": attempt.number,
            "waited_seconds": attempt.called - attempt.start,
        }
        attempt.span = self._tracing.tell(tracer.begin, "call", attributes, parent=self._parent)
        if attempt.span is not None:
            self._tracing.tell(run, tracer.enter, attempt.span)

    def ended(self, outcome: str, error: BaseException | None = None) -> None:
        """Note how the attempt has ended, once."""
        attempt = self.attempts[-1] if self.attempts else None
        if attempt is None or attempt.end is not None:
            return
        attempt.end, attempt.outcome = _now(), outcome
        attempt.error = None if error is None else _said(error)
        tracer = self._tracing.tracer
        if tracer is not None and attempt.span is not None:
            self._tracing.tell(tracer.end, attempt.span, {"outcome": outcome}, error)

    def rests(self, seconds: float) -> None:
        """Note that another attempt follows after a pause."""
        self.attempts[-1].pause = seconds

    def over(self, outcome: str, error: BaseException | None = None) -> None:
        """Note that the call is over, once."""
        if self.end is None:
            self.ended(outcome, error)
            self.end, self.outcome = _now(), outcome
            self.error = None if error is None else _said(error)

    def traced(self, began: float, until: float) -> CallTrace:
        """Return what was noted by `until`, in seconds since `began`."""
        over = self.end is not None and self.end <= until
        attempts = [each for each in self.attempts if each.start <= until]
        return CallTrace(
            source=self.source,
            kind=self.kind,
            snapshot_id=self.snapshot_id,
            keys=self.keys,
            start=self.start - began,
            end=_clipped(self.end, until) - began,
            outcome=self.outcome if over else "under_way",
            attempts=tuple(_attempt_traced(each, began, until) for each in attempts),
            error_type=self.error[0] if over and self.error else None,
            error=self.error[1] if over and self.error else None,
        )


def _attempt_traced(log: AttemptLog, began: float, until: float) -> AttemptTrace:
    over = log.end is not None and log.end <= until
    called = log.called is not None and log.called <= until
    return AttemptTrace(
        number=log.number,
        start=log.start - began,
        called=log.called - began if called and log.called is not None else None,
        end=_clipped(log.end, until) - began,
        outcome=log.outcome if over else "under_way",
        holders=log.holders,
        error_type=log.error[0] if over and log.error else None,
        error=log.error[1] if over and log.error else None,
        pause_seconds=log.pause if over else None,
    )


class _Waits:
    """Stretches of waiting, the last of which may still go on."""

    __slots__ = ("_stretches",)

    def __init__(self) -> None:
        self._stretches: list[tuple[WaitReason, str, float, float | None]] = []

    def begin(self, reason: WaitReason, detail: str = "") -> None:
        """Note that a wait begins, and with it ends the one before."""
        self.end()
        self._stretches.append((reason, detail, _now(), None))

    def end(self) -> None:
        """Note that the wait is over, if there is one."""
        if self._stretches and self._stretches[-1][3] is None:
            reason, detail, start, _ = self._stretches[-1]
            self._stretches[-1] = reason, detail, start, _now()

    def traced(self, began: float, until: float) -> Iterator[Wait]:
        """Return the waits that had begun by `until`, in seconds since `began`."""
        for reason, detail, start, end in self._stretches:
            if start <= until:
                yield Wait(reason, start - began, _clipped(end, until) - began, detail)


class FlightLog:
    """What is noted of one flight, for all traces of those who wait for it."""

    __slots__ = ("calls", "refusals", "snapshot_id", "waits")

    def __init__(self, snapshot_id: str) -> None:
        self.snapshot_id: str = snapshot_id
        self.calls: list[CallLog] = []
        self.refusals: list[tuple[float, str, str, str, str]] = []
        self.waits: _Waits = _Waits()

    def refused(self, failure: SourceFailure, status: str) -> None:
        """Note that a source brought nothing for the key."""
        text = folded_message(failure.message)
        self.refusals.append((_now(), failure.source, status, failure.error_type, text))


class KeyLog:
    """What is noted of one key for one who waits for it; see `KeyTrace`."""

    __slots__ = (
        "end",
        "error",
        "flight",
        "found",
        "joined",
        "key",
        "obtained",
        "refresh",
        "requested",
        "start",
        "waits",
    )

    def __init__(self, key: ResourceKey, requested: bool) -> None:
        self.key: ResourceKey = key
        self.requested: bool = requested
        self.start: float = _now()
        self.end: float | None = None
        self.obtained: Obtained | None = None
        self.flight: FlightLog | None = None
        self.joined: bool = False
        self.waits: _Waits = _Waits()
        self.refresh: str | None = None
        self.found: tuple[str, str, tuple[Foundation, ...]] | None = None
        self.error: tuple[str, str] | None = None

    def tells_of(self, version: str | None) -> bool:
        """Whether this is how the version was come by."""
        return self.found is not None and self.found[1] == version

    def asks(self) -> None:
        """Note that a cache is asked which has to be awaited."""
        self.waits.begin(WaitReason.CACHE)

    def cached(self, how: Obtained, scheduled: bool | None) -> None:
        """Note that the cache had a value of use; if that is being refreshed, whether by us."""
        self.obtained = how
        if scheduled is not None:
            self.refresh = "scheduled" if scheduled else "under_way"
        self.handed()

    def flies(self, flight: FlightLog, *, joined: bool) -> None:
        """Note that a flight acquires the key, and whether another unit of work had begun it."""
        self.waits.end()
        self.end = self.obtained = None
        self.flight, self.joined = flight, joined
        if joined:
            self.waits.begin(WaitReason.FLIGHT, flight.snapshot_id)

    def handed(self) -> None:
        """Note that waiting is over."""
        self.waits.end()
        self.end = _now()

    def settled(self, reading: Reading | None, failure: Failure | None, *, pinned: bool) -> None:
        """Note what has been come to."""
        if self.end is None:
            self.handed()
        if reading is None:
            self.obtained, self.found = Obtained.FAILED, None
            self.error = None if failure is None else _said(failure.make())
            return
        self.found = _facts(reading.revision)
        self.error = None if reading.fallback is None else _said(reading.fallback)
        if self.error is not None:
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

    def traced(self, began: float, until: float, calls: dict[CallLog, int]) -> KeyTrace:
        """Return what was noted by `until`; `calls` numbers the calls, and learns of new ones."""
        flight = self.flight
        waits = list(self.waits.traced(began, until))
        mine: list[CallLog] = []
        if flight is not None:
            waits += flight.waits.traced(began, until)
            mine = [call for call in flight.calls if call.start <= until]
        source, version, rests_on = self.found or (None, None, ())
        return KeyTrace(
            key=self.key,
            obtained=self.obtained or Obtained.FAILED,
            start=self.start - began,
            end=_clipped(self.end, until) - began,
            requested=self.requested,
            source=source,
            version=version,
            joined=flight.snapshot_id if flight is not None and self.joined else None,
            waits=tuple(sorted(waits, key=lambda wait: wait.start)),
            calls=tuple(calls.setdefault(call, len(calls)) for call in mine),
            refusals=tuple(
                SourceRefusal(source, at - began, status, error_type, text)
                for at, source, status, error_type, text in (flight.refusals if flight else ())
                if at <= until
            ),
            rests_on=rests_on,
            refresh=self.refresh,
            error_type=None if self.error is None else self.error[0],
            error=None if self.error is None else self.error[1],
        )


class WarmKey(NamedTuple):
    """What is noted of a key that was in memory with all others: how, when, and what was found."""

    obtained: Obtained
    start: float
    key: ResourceKey
    source: str
    version: str
    rests_on: tuple[Foundation, ...]

    @property
    def requested(self) -> bool:
        """Always: what derived values need is looked for one by one."""
        return True

    def tells_of(self, version: str | None) -> bool:
        """Whether this is how the version was come by."""
        return self.version == version

    def traced(self, began: float, *_: object) -> KeyTrace:
        """Return it, in seconds since `began`."""
        how, at, key, source, version, rests_on = self
        at -= began
        return KeyTrace(key, how, at, at, source=source, version=version, rests_on=rests_on)


def _clipped(end: float | None, until: float) -> float:
    return until if end is None or end > until else end


def _said(error: BaseException) -> tuple[str, str]:
    return type_name(error), folded_message(message_of(error))


# What is noted of a unit of work ------------------------------------------------------------------


class Noted(NamedTuple):
    """How far the notes of a unit of work had come at one moment, and what was delivered then."""

    warm: int
    entries: int
    stages: int
    omitted: int
    until: float
    values: Mapping[ResourceKey, SnapshotValue[Any]]


class Recorded:
    """What a unit of work had noted at one moment; called, it makes the trace, once."""

    __slots__ = ("_noted", "_trace")

    def __init__(self, work: WorkTrace, noted: Noted) -> None:
        self._noted: tuple[WorkTrace, Noted] | None = work, noted
        self._trace: Trace | None = None

    def __call__(self) -> Trace:
        """Return the trace."""
        noted = self._noted
        if self._trace is None and noted is not None:
            work, moment = noted
            self._trace = work.traced(moment)
            self._noted = None
        assert self._trace is not None
        return self._trace

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self(),)


def _itself(trace: Trace) -> Trace:
    return trace


class StageLog:
    """What is noted of one stage; see `StageTrace`."""

    def __init__(self, name: str, keys: int) -> None:
        self.name: str = name
        self.keys: int = keys
        self.span: Any = None
        self.start: float = _now()
        self.end: float | None = None
        self.resolved: int = 0
        self.failed: int = 0
        self.error: BaseException | None = None


class WorkTrace:
    """What is noted of one unit of work: its stages, and each key that it looks for.

    Without `recording` nothing is kept of the keys; there is a tracer to be told of spans then.
    """

    def __init__(
        self,
        tracing: Tracing,
        kind: str,
        context: FetchContext,
        recording: bool,
        parent: WorkTrace | None,
    ) -> None:
        self._tracing = tracing
        self._kind = kind
        self.snapshot_id: str = context.snapshot_id
        self._started_at = context.requested_at
        self._parent: str | None = None if parent is None else parent.snapshot_id
        self._began = _now()
        self._stages: list[StageLog] = []
        self._stages_begun = 0
        self._entries: list[KeyLog] = []
        self._warm: list[WarmKey] = []
        self._known: dict[ResourceKey, KeyLog | WarmKey] = {}
        self._untold: set[int] = set()
        self._joins: dict[ResourceKey, tuple[Any, FlightLog, float]] = {}
        self.recording: bool = recording
        self.span: Any = None

    # Stages -----------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str, keys: int, variables: Context) -> Iterator[StageLog]:
        """Note the stage that the block is, for so many keys; keep what came of it.

        Its span is current in the block, which may ask a cache, and in `variables`, the context in
        which the unit of work calls sources.
        """
        log = self.begin_stage(name, keys, variables)
        tracer, leave = self._tracing.tracer, None
        if tracer is not None and log.span is not None:
            leave = self._tracing.tell(tracer.enter, log.span)
        try:
            yield log
        except BaseException as error:
            self.end_stage(log, error)
            raise
        else:
            self.end_stage(log)
        finally:
            if leave is not None:
                self._tracing.tell(leave)

    def begin_stage(
        self, name: str, keys: int, variables: Context, link: Any = None, **more: Any
    ) -> StageLog:
        """Note that a stage begins, for so many keys."""
        log = self._new_stage(name, keys)
        tracer = self._tracing.tracer
        if tracer is not None:
            facts = {"snapshot_id": self.snapshot_id, "keys": keys, **more}
            if self._parent is not None:
                facts["parent_snapshot_id"] = self._parent
            self.span = log.span = self._tracing.tell(tracer.begin, name, facts, link=link)
            if self.span is not None:
                self._tracing.tell(variables.run, tracer.enter, self.span)
        return log

    def end_stage(self, log: StageLog, error: BaseException | None = None) -> None:
        """Note that a stage has ended, and keep what was recorded."""
        log.end = _now()
        error, log.error = error or log.error, None
        tracer, span = self._tracing.tracer, log.span
        if tracer is not None and span is not None:
            for key in [key for key, (waiting, *_) in self._joins.items() if waiting is span]:
                self._tell_join(key)  # it has given up
            facts = {"resolved": log.resolved, "failed": log.failed}
            self._tracing.tell(tracer.end, span, facts, error)
        self._tracing.keep(self)

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
        for key in keys if self.recording else ():
            known = self._known.get(key)
            if requested or known is None or known.obtained is Obtained.FAILED:
                log = self._begin(key, requested=requested)
                if log is not None:
                    logs[key] = log
        return logs

    def shown(
        self,
        values: Mapping[ResourceKey, SnapshotValue[Any]],
        pins: Mapping[ResourceKey, Reading],
    ) -> None:
        """Note what a session shows that was never looked for, but read out of sight."""
        for key, value in values.items() if self.recording else ():
            known, pin = self._known.get(key), pins.get(key)
            if known is not None and known.tells_of(value.version):
                if isinstance(known, KeyLog):
                    known.requested = True
            elif pin is not None and pin.revision.version == value.version:
                log = self._begin(key, requested=True)
                if log is not None:
                    log.obtained, log.end = Obtained.PINNED, log.start
                    log.found = _facts(pin.revision)

    def _begin(self, key: ResourceKey, *, requested: bool) -> KeyLog | None:
        """Begin the story of a key; where there is no room, in the place of its last one."""
        known, log = self._known.get(key), KeyLog(key, requested)
        if self._room > 0:
            self._entries.append(log)
        elif isinstance(known, KeyLog):
            self._entries[self._entries.index(known)] = log
        else:
            if known is None:
                self._untold.add(hash(key))
            return None
        self._known[key] = log
        return log

    @property
    def _room(self) -> int:
        return MOST_KEYS - len(self._entries) - len(self._warm)

    def warm(self, revisions: Iterable[Revision], *, near: bool) -> None:
        """Note that all keys of a stage were in memory."""
        if self.recording:
            how, now = Obtained.NEAR_CACHE if near else Obtained.CACHE, _now()
            rest = iter(revisions)
            for revision in islice(rest, self._room):
                warm = WarmKey(how, now, revision.key, *_facts(revision))
                self._warm.append(warm)
                self._known[revision.key] = warm
            self._untold.update([hash(revision.key) for revision in rest])

    def flies(
        self,
        log: KeyLog | None,
        key: ResourceKey,
        flight: FlightLog,
        *,
        joined: bool,
        waiting: Any,
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
        tracer = self._tracing.tracer
        if tracer is None:
            return
        facts = {
            "snapshot_id": flight.snapshot_id,
            "resource_namespace": key.namespace,
            "resource_name": key.name,
        }
        call = flight.calls[-1].span if flight.calls else None
        self._tracing.tell(tracer.joined, span, call, _now() - since, facts)

    # The trace --------------------------------------------------------------------------------

    def recorded(self, values: Mapping[ResourceKey, SnapshotValue[Any]] = EMPTY) -> Recorded | None:
        """Return what has been noted by now, if anything is, of a snapshot with these values."""
        if not self.recording:
            return None
        done = len(self._warm), len(self._entries), self._stages_begun, len(self._untold)
        return Recorded(self, Noted(*done, _now(), values))

    def traced(self, noted: Noted) -> Trace:
        """Return the trace of what was noted by one moment, as things were then.

        A key that was read more than once has the story of the version that was delivered, or none.
        """
        began, until, values = self._began, noted.until, noted.values
        stories: dict[ResourceKey, KeyLog | WarmKey] = {}
        delivered: dict[ResourceKey, str] = {}
        noted_by_then: list[KeyLog | WarmKey] = [*self._warm[: noted.warm]]
        noted_by_then += self._entries[: noted.entries]
        for story in noted_by_then:
            key, told = story.key, stories.get(story.key)
            if told is None and key in values:
                delivered[key] = values[key].version
            version = delivered.get(key)
            better = story.requested or story.tells_of(version)
            if story.start <= until and (told is None or (better and not told.tells_of(version))):
                stories[key] = story
        told_of = [
            each
            for key, each in stories.items()
            if key not in delivered or each.tells_of(delivered[key])
        ]
        calls: dict[CallLog, int] = {}
        keys = {each.key: each.traced(began, until, calls) for each in told_of}
        stages = [each for each in self._stages if each.start <= until]
        return Trace(
            snapshot_id=self.snapshot_id,
            kind=self._kind,
            parent_snapshot_id=self._parent,
            started_at=self._started_at,
            duration_seconds=until - began,
            stages=tuple(
                StageTrace(
                    each.name, each.start - began, _clipped(each.end, until) - began, each.keys
                )
                for each in stages
            ),
            keys=FrozenDict(keys),
            calls=tuple(call.traced(began, until) for call in calls),
            omitted_keys=noted.omitted + len(stories) - len(keys),
            omitted_stages=noted.stages - len(stages),
        )

    def __repr__(self) -> str:
        return f"<WorkTrace {self._kind} {self.snapshot_id} keys={len(self._entries)}>"


def _facts(revision: Revision) -> tuple[str, str, tuple[Foundation, ...]]:
    rests_on = tuple(
        [_foundation(r.key, r.version, r.source, r.observed_at) for r in revision.dependencies]
    )
    return revision.source, revision.version, rests_on


_foundation = lru_cache(maxsize=4_096)(Foundation)
"""Makes one record of a revision, however many values of however many traces rest on it."""
