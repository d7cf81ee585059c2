"""One call to one source, for one key or a batch of them: its attempts, its time, its circuits.

A call is made of one or more *attempts*. Each waits for capacity, calls the source and is cut off
when its time is up. What an attempt comes to is decided synchronously, in the line or the callback
that learns of it; the worker that awaits the source only acts. So a source that ignores its
cancellation delays nobody: its keys go on at once, and only its slot stays taken until it really
ends.

==============  ==========================  =====================  =======================
a call that     ends its step by            if nobody waits        if wanted for longer
==============  ==========================  =====================  =======================
is queued       a worker                    it ends                waits longer
prepares        copies of its inputs        it ends                waits longer
waits for       a slot, its queue timeout,  it ends                waits longer
capacity        the cutoff
runs            the source, its timeout,    it goes on if it has   runs longer
                the cutoff *                a bound, else it ends
rests           a timer, for a new attempt  it ends                rests on
takes in        having handed over all,     it goes on             may copy for longer
                the cutoff *
is over         --                          --                     --
==============  ==========================  =====================  =======================

The cutoff is the latest deadline that anybody ever had for any of its keys. (*) If the policy lets
the call finish late, the timeout of the source takes its place.

Laws:

1. Settlement: every key of a call is handed over or refused, once, whatever is raised by whomever,
   of whatever type. `Call.end` is where the keys are settled that still are in it, and nothing
   leaves `Call.run` before. If its worker is lost, even before its first step, `Lane.ended` sees to
   that, being called by the loop when the task is done.
2. Circuits hear of a call once, in the turn in which they let it through. What the source answered
   counts, not what became of the answer.
3. A call sees the context variables of the build that started it, each attempt in a copy of its
   own: nothing that it sets reaches another one.
4. A worker whose cancellation was asked for, by whomever, serves no further call.
5. Leading: what is queued behind a call that was answered at once may be asked for in the same
   step, under its slot, and counts as its own call all the same. A key that cannot be told from one
   called alone stays with the leader; one whose source waits, fails, gives what takes a thread, or
   uses a builder is a call of its own from the beginning of its step, and goes on with the slot.
   Which it is, is decided once (`Following`), when that step is over at the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import inspect
import math
import types
import weakref
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from coalestra._endings import PROGRAM_ENDS, pass_on, running_loop, running_task
from coalestra.cache.store import Held
from coalestra.concurrency.capacity import CapacityLease
from coalestra.concurrency.deadline import CutOff, CutOffExpired, OwnCancellation
from coalestra.concurrency.pace import Slices, portions
from coalestra.concurrency.sealing import PORTION, Sealed
from coalestra.concurrency.threads import current_threads
from coalestra.core.errors import (
    CircuitOpenError,
    ResourceAbsent,
    SnapshotDeadlineExceededError,
    SourceFailure,
    SourceProtocolError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
    legible,
    type_name,
    without_frames,
)
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FutureObservation, judge_observation, policy_of_all, rank_of
from coalestra.core.snapshot import DiagnosticsRecorder, FetchContext, Snapshot
from coalestra.core.validation import instance
from coalestra.core.values import Revision, SourcePayload, next_number, next_version
from coalestra.orchestration.deliveries import DEPENDENCY, Deliveries
from coalestra.orchestration.flights import (
    Flight,
    Fresh,
    Gather,
    Liveness,
    Parts,
    Phase,
    Work,
    call_served,
    current_call,
)
from coalestra.orchestration.sources import Link, SourceKind
from coalestra.orchestration.tracing import CallLog
from coalestra.resilience import CircuitIdentity, CircuitScope, Outcome, SourceResiliencePolicy

_BATCH, _DERIVED = SourceKind.BATCH, SourceKind.DERIVED
_READY, _CALLING = Phase.READY, Phase.CALLING
_SUCCESS, _FAILURE, _ABANDONED = Outcome.SUCCESS, Outcome.FAILURE, Outcome.ABANDONED

_UNDECIDED = SourceResiliencePolicy()
"""Stands for the policy of a call that has not begun yet."""

_KEYS_AT_ONCE = 1_024
"""Of a large batch, so many keys are gone through before others may have a turn."""

_HOLDERS_SHOWN = 3
"""How many sources that hold slots a message names."""

_WORKERS_AT_ONCE = 64
"""So many workers are started before others may have a turn."""

_CALLS_BETWEEN_LOOKS = 4
"""Calls that never wait would otherwise all be made in one step of the event loop."""

_QUIET_SECONDS = 0.05
"""How long no worker is started after one was cancelled from outside."""


class Progress(enum.Enum):
    """Where an attempt stands, in words: for a message afterwards, and for now."""

    PREPARING = "its dependencies were being copied", "its dependencies are being copied"
    WAITING = "it waited for capacity", "waiting for capacity"
    RUNNING = "its source was running", "its source is running"
    TAKING_IN = "the answer of its source was ", "the answer of its source is being copied"


class StaleSourceData(Exception):
    """A source answered with a value older than the policy's time to live."""


# What a source returned: how it is awaited, and what it holds for each key ------------------------


_OMITTED = object()
"""Stands for a key that a batch source left out of its answer."""


def _first_step(link: Link, awaitable: Any) -> tuple[Any, Any]:
    """Begin what a source returned: return it with what it waits for, or None with its answer."""
    steps = awaitable
    try:
        if type(steps) is types.CoroutineType:
            return steps, steps.send(None)
        if not inspect.isawaitable(awaitable):
            raise SourceProtocolError(
                f"source {link.name!r} returned {type(awaitable).__qualname__} where an awaitable "
                "is needed; make the method async, or use a callable adapter"
            )
        steps = getattr(awaitable, "__await__", lambda: awaitable)()
        return steps, _sender(steps)(None)
    except StopIteration as stop:
        return None, stop.value


def _begin(
    serving: Callable[[], Call | None],
    link: Link,
    key: ResourceKey,
    inputs: tuple[Snapshot, ...],
    context: FetchContext,
) -> tuple[Any, Any]:
    """Ask a source for one key, in the name of what it is served for, and take its first step."""
    current_call.set(serving)
    ask = link.source.derive if link.kind is _DERIVED else link.source.fetch
    return _first_step(link, ask(key, *inputs, context))


@types.coroutine
def _further_steps(steps: Any, item: Any, run: Callable[..., Any]) -> Generator[Any, Any, Any]:
    """Await what a source has begun, each step by the `run` of its call's context."""
    send = _sender(steps)
    try:
        while True:
            try:
                sent = yield item
            except BaseException as error:
                item = run(_thrown_into, steps, error)
            else:
                item = run(send, sent)
    except StopIteration as stop:
        return stop.value


def _sender(steps: Any) -> Callable[[Any], Any]:
    return getattr(steps, "send", None) or (lambda _nothing: next(steps))


def _thrown_into(steps: Any, error: BaseException) -> Any:
    """Do as ``yield from`` does: close or tell what is awaited, as far as it can be told."""
    try:
        if isinstance(error, GeneratorExit):
            getattr(steps, "close", _nothing)()
            raise error
        if not hasattr(steps, "throw"):
            raise error
        return steps.throw(error)
    finally:
        del error  # its traceback leads here


def _nothing() -> None:
    """Close what has nothing to close."""


_Answers = tuple[deque[tuple[Flight, Any]], list[Flight]]
"""What a batch holds for its flights, and those that it holds nothing for."""


def _answers(link: Link, flights: Collection[Flight], result: Any) -> Slices[_Answers]:
    """Return what a batch holds; raise `SourceProtocolError` if it is malformed."""
    if isinstance(result, ResourceAbsent):
        return deque([(flight, result) for flight in flights]), []
    if not isinstance(result, Mapping):
        raise SourceProtocolError(
            f"fetch_many of source {link.name!r} must return a mapping of the requested keys, got "
            f"{type(result).__qualname__}"
        )
    get, answers, omitted = result.get, deque[tuple[Flight, Any]](), list[Flight]()
    for part in portions(flights, _KEYS_AT_ONCE):
        held = [(flight, get(flight.key, _OMITTED)) for flight in part]
        lacking = [flight for flight, value in held if value is _OMITTED]
        if lacking:
            omitted += lacking
            held = [each for each in held if each[1] is not _OMITTED]
        answers += held
        if len(part) == _KEYS_AT_ONCE:
            yield
    if len(result) != len(answers):
        _refuse_unrequested(link, {flight.key for flight in flights}, result)
    return answers, omitted


def _refuse_unrequested(link: Link, asked: Collection[ResourceKey], result: Iterable[Any]) -> None:
    for key in islice(result, len(asked) + 1):  # where one is; there may be no end
        if key not in asked:
            named = key.display if isinstance(key, ResourceKey) else f"a {type(key).__qualname__}"
            raise SourceProtocolError(
                f"fetch_many of source {link.name!r} returned {named}, which was not requested; "
                "return requested keys only"
            )


# One attempt: capacity, the budget of time, the call itself, and the instant that cuts it off ----


Begun = tuple[Any, Any] | BaseException
"""What a first step came to: what the source waits for, or None, and its answer; or its error."""


class Attempt:
    """One attempt of a call. `over` is set the moment its outcome is known.

    That may be before the source has ended. `bound` is when the present step ends by itself, on
    the loop's clock, whoever waits; `late` is until when it may go on past the cutoff.
    """

    progress: Progress = Progress.PREPARING
    over: bool = False
    began: float = math.nan
    ticks: float = math.nan
    _cut: CutOff | None = None
    _bound: float = math.inf
    _late: float = -math.inf
    prompt: bool = True
    _lease: CapacityLease | None = None
    _inputs: tuple[Snapshot, ...] = ()
    _begun: Begun | None = None
    _run: Callable[..., Any]

    def __init__(self, call: Call, worker: Worker) -> None:
        self.call: Call = call
        self.worker: Worker = worker

    async def run(self) -> None:
        """Make the attempt, or what is left of it; return when the source has really ended."""
        try:
            if self._begun is None and not await self._prepare():
                return
            answer = await self._ask()
        finally:
            self.let_go()
        if answer is not None:
            await self.call.take_in(self, answer[0])

    async def _prepare(self) -> bool:
        """Get what the source needs, a slot, and the leave of its circuits; False if ended."""
        call = self.call
        name = call.link.name
        if call.link.kind is _DERIVED:
            (flight,) = call.flights
            readings = {} if flight.gather is None else flight.gather.in_order()
            context, inherits = flight.sponsor.context, call.link.inherits
            preparing = call.dispatch.deliveries.inputs(context, readings, inherits=inherits)
            inputs, call.rests_on = await preparing
            self._inputs = (inputs,)
        self.progress = Progress.WAITING
        lease = call.parts.capacity.try_acquire(name)
        if lease is None and call.urgent:
            lease = call.parts.capacity.beyond(name)
        self._lease = lease or await self._wait_for_capacity(name)
        if self._lease is None:
            return False
        call.slots += 1
        refusal = self._refusal() if call.link.protected else None
        if refusal is not None:
            call.end(refusal)
            return False
        if call.must_ask_circuits():
            await call.enter_circuits()
            if self.over or not call.flights:
                return False
        call.count_attempt()
        number = next_number()
        for flight in call.flights:
            flight.began = number
        call.timeout_seconds = call.link.timeout_seconds
        self.set_off(asyncio.get_running_loop().time(), call.parts.clock.monotonic())
        self._run = call.work.variables.copy().run
        call.report_start(self._run)
        return True

    # Its time ----------------------------------------------------------------------------------

    @property
    def goes_on(self) -> bool:
        """Whether it goes on though nobody waits: what it brings may still find a taker."""
        if self.progress is Progress.RUNNING:
            return self._end() is not None
        return self.progress is Progress.TAKING_IN

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of the worker that makes it."""
        return None if self.worker.task is None else self.worker.task.get_loop()

    @property
    def elapsed_seconds(self) -> float:
        """How long the source has been running, on the builder's clock."""
        return self.call.parts.clock.monotonic() - self.ticks

    def _end(self) -> float | None:
        end = min(self._bound, max(self.call.cutoff, self._late))
        return None if end == math.inf else end

    def cut_off(self, bound: float, on_expire: Callable[[], None] | None = None) -> CutOff:
        """Return what ends the present step at its bound, or at the cutoff of the call."""
        self._bound = bound
        self._cut = CutOff(self._end(), on_expire, looks=True)
        return self._cut

    def extend(self) -> None:
        """Move the instant that ends the step: some key is wanted for longer."""
        if self._cut is not None:
            self._cut.move(self._end())

    def hurry(self) -> None:
        """Wait for capacity no longer, and go without: who holds it waits for this attempt."""
        if self._cut is not None and self.progress is Progress.WAITING:
            self._bound = asyncio.get_running_loop().time()
            self._cut.move(self._end())

    def abandon(self) -> Exception | None:
        """End the attempt, as nobody waits for it; return the error if it waited too long."""
        call, waited = self.call, self.progress is Progress.WAITING and self._cut is not None
        prepared = self.progress is Progress.PREPARING and call.link.kind is _DERIVED
        self.write_off()
        task = self.worker.task
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        if call.cutoff > asyncio.get_running_loop().time():
            return None
        if prepared:
            copies = call.parts.copies
            copies.count_timeouts(1)
            return SnapshotDeadlineExceededError(
                f"the deadline{call.of_deadline()} passed while what source {call.link.name!r} "
                f"derives from was {copies.standing(DEPENDENCY)}; raise the deadline or derive "
                "from less"
            )
        return self._late_in_queue() if waited else None

    def write_off(self) -> None:
        """Decide the attempt now, though its worker may take its time to end.

        The call is that worker's no longer: it may be in the hands of another by then.
        """
        self.over = True
        self.worker.leave()
        self.worker.call = None

    # Capacity ----------------------------------------------------------------------------------

    async def _wait_for_capacity(self, name: str) -> CapacityLease | None:
        """Wait for a lease; return None, the call having ended, when that took too long."""
        call = self.call
        clock = asyncio.get_running_loop().time
        began, timeout = clock(), call.link.queue_timeout_seconds
        if call.log is not None:
            call.log.waits(call.parts.capacity.holders())
        if call.parts.report is not None:
            call.parts.report.tell("source_call_queued", **call.facts, keys=len(call.flights))
        bound, struck = math.inf if timeout is None else began + timeout, -math.inf
        try:
            # Again if somebody who has more time came at the very moment when it was up.
            while (self._end() or math.inf) > struck:
                try:
                    with self.cut_off(bound):
                        return await call.parts.capacity.acquire(name)
                except CutOffExpired as expired:
                    struck = expired.when
                    if call.urgent and call.cutoff > clock():
                        return call.parts.capacity.beyond(name)
            late = call.urgent or call.cutoff < self._bound
            call.end(self._late_in_queue() if late else self._impatient(timeout))
            return None
        finally:
            self._cut = None
            if call.parts.report is not None:
                waited_ms = (clock() - began) * 1000
                call.parts.report.observe("source_capacity_wait_ms", waited_ms, source=name)

    def _late_in_queue(self) -> Exception:
        self._report_timeout("snapshot_deadline")
        return SnapshotDeadlineExceededError(
            f"the deadline{self.call.of_deadline()} passed while waiting for "
            f"{self.call.lane.capacity}; raise max_concurrency or the deadline"
        )

    def _impatient(self, timeout: float | None) -> Exception:
        self.call.parts.counters.queue_timeout_count += 1
        self._report_timeout("queue_timeout")
        return SourceQueueTimeoutError(
            f"waited {timeout:g} s for {self.call.lane.capacity}; raise its max_concurrency, the "
            "builder's max_concurrency, or queue_timeout_seconds"
        )

    def _report_timeout(self, reason: str) -> None:
        report, name = self.call.parts.report, self.call.link.name
        if report is not None:
            report.count("source_capacity_timeout_total", source=name, reason=reason)

    def _refusal(self) -> Exception | None:
        """Return why a blocking call must not be started, as it could outlive its budget."""
        call, link = self.call, self.call.link
        declared = link.guarantee.transport_timeout_seconds or 0.0
        timeout = math.inf if link.timeout_seconds is None else link.timeout_seconds
        late = call.policy.finish_late and timeout < math.inf
        remaining = math.inf if late else call.remaining()
        left = min(remaining, timeout)
        if declared < left:
            return None
        by_deadline = remaining < timeout
        link.deadline_cuts += by_deadline
        report = call.parts.report
        if report is not None:
            reason = "snapshot_deadline" if by_deadline else "source_timeout"
            counted = {"source": link.name, "reason": reason}
            report.count("source_transport_budget_rejection_total", **counted)
            for flight in call.flights:
                report.tell(
                    "source_transport_budget_rejected",
                    **call.facts,
                    resource=flight.key,
                    transport_timeout_seconds=declared,
                    available_budget_seconds=left,
                )
        kind = SnapshotDeadlineExceededError if by_deadline else SourceTimeoutError
        limit = "the deadline" if by_deadline else "timeout_seconds"
        return kind(
            f"source {link.name!r} was not called: its transport timeout of {declared:g} s does "
            f"not fit into the {max(0.0, left):g} s left; lower it, or raise {limit}"
        )

    # The call ----------------------------------------------------------------------------------

    def resume(self, begun: Begun, run: Callable[..., Any]) -> Attempt:
        """Go on from what the first step of the source came to, each further one by `run`."""
        self._begun, self._run = begun, run
        return self

    def take_over(self, lease: CapacityLease) -> None:
        """Be what the worker makes next, with a slot that is held already."""
        self._lease, self.worker.begun = lease, self
        self.call.slots += 1

    def let_go(self) -> None:
        """Give back the slot, as the source has really ended."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
            self.call.slots -= 1

    def set_off(self, began: float, ticks: float) -> None:
        """Have called the source at these instants."""
        self.began, self.ticks, self.progress = began, ticks, Progress.RUNNING
        timeout = self.call.timeout_seconds
        self._bound = math.inf
        if timeout is not None:
            self._bound = began + timeout
            if self.call.policy.finish_late:
                self._late = self._bound

    async def _ask(self) -> tuple[Any] | None:
        """Return what the source answered, or None when the call has learned of its failure."""
        try:
            steps, answer = self._first_step()
            if steps is not None:  # it waits for something, so it takes watching
                self.prompt = False
                with CutOff(self._end(), self._expire, looks=True) as self._cut:
                    answer = await _further_steps(steps, answer, self._run)
        except CutOffExpired:
            return None
        except BaseException as error:
            if _comes_from_outside(error, self.worker):
                raise
            if not isinstance(error, ResourceAbsent):
                self._fail(error)
                return None
            answer = error
        finally:
            self._cut = None
        if self.over:
            return None
        if self.call.link.protected:
            self._watch_transport("completed_late")
        return (answer,)

    def _first_step(self) -> tuple[Any, Any]:
        """Let the source take its first step, unless it has."""
        begun, self._begun = self._begun, None
        if begun is None:
            return self._run(self._begin)  # type: ignore[no-any-return]  # as `_begin` returns it
        if isinstance(begun, BaseException):
            try:
                raise begun
            finally:
                del begun  # its traceback leads here
        return begun

    def _begin(self) -> tuple[Any, Any]:
        """Call the source, and take its first step."""
        link, context, flights = self.call.link, self.call.work.context, self.call.flights
        if link.kind is _BATCH:
            current_call.set(weakref.ref(self.call))
            keys = tuple([flight.key for flight in flights])
            return _first_step(link, link.source.fetch_many(keys, context))
        (flight,) = flights
        return _begin(weakref.ref(self.call), link, flight.key, self._inputs, context)

    def _fail(self, error: BaseException) -> None:
        if self.over:
            if isinstance(error, PROGRAM_ENDS):
                pass_on(error)
            else:
                without_frames(error)  # nobody will see it, and it would keep alive what failed
            return
        self.over = True
        self.worker.closing |= isinstance(error, GeneratorExit)  # a task may have passed it on
        self._watch_transport("failed_late")
        self.call.failed(self, error)

    def _expire(self) -> None:
        """Decide at once what a call that ran out of time comes to; its worker may take longer."""
        if self.over:
            return
        call, name = self.call, self.call.link.name
        self.write_off()
        if max(call.cutoff, self._late) < self._bound:
            call.link.deadline_cuts += 1
            error: Exception = SnapshotDeadlineExceededError(
                f"the deadline{call.of_deadline()} passed while source {name!r} was running; raise "
                "the deadline or lower the source timeout"
            )
        else:
            call.parts.counters.source_timeout_count += 1
            timeout = self._bound - self.began
            error = SourceTimeoutError(f"source {name!r} did not answer within {timeout:g} s")
        try:
            self._watch_transport("coalestra_timeout")
        finally:
            call.failed(self, error)

    def _watch_transport(self, outcome: str) -> None:
        """Count a blocking call that outlived the transport timeout it declares."""
        call, link = self.call, self.call.link
        declared = link.guarantee.transport_timeout_seconds
        if not link.protected or declared is None:
            return
        elapsed, grace = self.elapsed_seconds, call.parts.transport_grace_seconds
        if outcome != "coalestra_timeout" and elapsed <= declared + grace:
            return
        violations = call.parts.counters.source_transport_timeout_violations
        violations[link.name] = violations.get(link.name, 0) + 1
        report, counted = call.parts.report, {"source": link.name, "outcome": outcome}
        if report is not None:
            report.count("source_transport_timeout_violation_total", **counted)
            for flight in call.flights:
                report.tell(
                    "source_transport_timeout_violated",
                    **call.facts,
                    outcome=outcome,
                    resource=flight.key,
                    declared_transport_timeout_seconds=declared,
                    observed_elapsed_seconds=elapsed,
                    grace_seconds=grace,
                )

    def __repr__(self) -> str:
        return f"<Attempt {self.call.link.name} {self.progress.name.lower()} over={self.over}>"


class Following:
    """One key that a source is asked for in the wake of another, in the same step.

    Most are answered at once, and the call of the `leader` has the answer. It becomes a call of its
    own as soon as it needs one: when the source waits, fails, or itself asks for something. Of two
    threads that want to know which it is, the first decides, by what it puts into `_decided`.
    """

    __slots__ = ("_call", "_decided", "_whom", "began", "rests_on", "ticks", "turn")

    def __init__(
        self,
        leader: Call,
        worker: Worker,
        flight: Flight,
        rests_on: FrozenDict[ResourceKey, str],
    ) -> None:
        self._whom: tuple[Call, Flight, Worker] | None = leader, flight, worker
        self._decided: dict[str, Attempt | None] = {}
        self._call: weakref.ref[Call] | None = None
        self.rests_on: FrozenDict[ResourceKey, str] = rests_on
        self.began: float = asyncio.get_running_loop().time()
        self.ticks: float = leader.parts.clock.monotonic()
        self.turn: int = leader.parts.breaker.turn
        flight.began = next_number()

    def call(self) -> Call | None:
        """Return the call that it is, from now on if it was none; None if it is none, or is over.

        What its source has begun may ask, in any thread.
        """
        whom, decided = self._whom, self._decided
        if whom is not None:
            attempt = decided["as"] if "as" in decided else self._decide(self._own_of(*whom))
            if attempt is not None:
                if running_loop() is attempt.loop:  # another thread may be too late to
                    attempt.call.join()
                return attempt.call
        return None if self._call is None else self._call()

    def led(self) -> bool:
        """Have no call from now on, as the source has taken its step, unless it has one by now."""
        if self._decide(None) is not None:
            return False
        self._whom = None  # who still knows of this keeps nothing alive
        return True

    def own(self, leader: Call, flight: Flight, worker: Worker) -> Attempt:
        """Be a call of its own; return the attempt that is under way."""
        made = self._own_of(leader, flight, worker)
        attempt = self._decide(made) or made  # it was led, and its answer is of no use
        self._call, self._whom = weakref.ref(attempt.call), None
        self._decided["as"] = None
        attempt.call.join()
        return attempt

    def _decide(self, attempt: Attempt | None) -> Attempt | None:
        """Return what it is: the attempt of a call of its own, or None for led; once for all."""
        return self._decided.setdefault("as", attempt)

    def _own_of(self, leader: Call, flight: Flight, worker: Worker) -> Attempt:
        return Call(leader.lane, ()).follow(self, flight, worker, leader)


class Call:
    """A call that carries one key, or a batch of keys, to one source, retries included.

    `flights` are those of its keys that are not settled yet, `fresh` those that the source has
    answered with something fresh. `rests_on` are the versions of its inputs, if it derives. `asked`
    is what its source waits for, of whatever builder and event loop. `slots` says how many its
    attempts hold, also once it is over.
    """

    policy: SourceResiliencePolicy = _UNDECIDED
    timeout_seconds: float | None = None
    attempts: int = 0
    slots: int = 0
    answered_at: float = math.nan
    latency_ms: float = math.nan
    log: CallLog | None = None
    rests_on: FrozenDict[ResourceKey, str] = EMPTY
    _liveness: Liveness | None = None
    _attempt: Attempt | None = None
    _retry: asyncio.TimerHandle | None = None
    _answered: bool = False
    _failure: SourceFailure | None = None
    _unusable: SourceFailure | None = None
    _over: bool = False
    _left: bool = False
    _asked: Sequence[Flight] = ()
    _groups: dict[CircuitIdentity, tuple[int, list[Flight]]] | None = None
    _turn: int = 0
    _slow: list[tuple[Flight, Any]] | None = None

    def __init__(self, lane: Lane, flights: Iterable[Flight]) -> None:
        self.lane: Lane = lane
        self.link: Link = lane.link
        self.work: Work = lane.work
        self._record: DiagnosticsRecorder = lane.work.record
        self.dispatch: Dispatch = lane.dispatch
        self.parts: Parts = lane.dispatch.parts
        self.flights: dict[Flight, None] = dict.fromkeys(flights)
        self.fresh: set[Flight] = set()
        self.asked: dict[Gather, None] = {}
        self.cutoff: float = Flight.join_call(self.flights, self)

    @property
    def doing(self) -> str:
        """What the call is at, to be put behind a sentence."""
        attempt = self._attempt
        if attempt is not None and attempt.progress is Progress.WAITING:
            return f": it waited for {self.lane.capacity}"
        was = "it rested between two attempts" if attempt is None else attempt.progress.value[0]
        if attempt is not None and attempt.progress is Progress.TAKING_IN:
            was += self._taken_in
        return f": {was}"

    @property
    def _taken_in(self) -> str:
        return self.parts.copies.standing(self.link.context)

    @property
    def standing(self) -> str:
        """Where the call stands, in a few words."""
        attempt = self._attempt
        if attempt is not None:
            return str(attempt.progress.value[1])
        return "resting between two attempts" if self.attempts else "waiting for its turn"

    @property
    def facts(self) -> dict[str, Any]:
        """What every event of the call tells of it."""
        return {"source": self.link.name, "snapshot_id": self.snapshot_id}

    @property
    def running_seconds(self) -> float | None:
        """How long its source has been running, on the builder's clock; None if it is not."""
        attempt = self._attempt
        if attempt is None or attempt.progress is not Progress.RUNNING:
            return None
        return max(0.0, attempt.elapsed_seconds)

    def note(self) -> CallLog:
        """Return what is noted of the call from now on, for traces."""
        if self.log is None:
            work, link, keys = self.work, self.link, len(self.flights)
            self.log = CallLog(
                self.parts.tracing,
                next(iter(self.flights)).span_of(work),
                work.context.snapshot_id,
                link.name,
                link.kind.value,
                keys,
            )
            if self._attempt is not None and not math.isnan(self._attempt.began):
                self.log.caught_up(self.attempts, self._attempt.began)
            elif self._attempt is not None:
                self.log.attempt(self.attempts + 1)
                if self._attempt.progress is Progress.WAITING:
                    self.log.waits(self.parts.capacity.holders())
        return self.log

    # What flights tell the call ---------------------------------------------------------------

    def extend(self, cutoff: float) -> None:
        """Give the call more time: a flight of it is now wanted until `cutoff`."""
        if cutoff > self.cutoff and not self._over:
            self.cutoff = cutoff
            if self._attempt is not None:
                self._attempt.extend()

    def hurry(self) -> None:
        """Wait for no slot any longer: a call under way, which holds one, waits for this one."""
        if self._attempt is not None:
            self._attempt.hurry()

    @property
    def urgent(self) -> bool:
        """Whether a call under way waits for this one."""
        return any(flight.urgent for flight in self.flights)

    @property
    def snapshot_id(self) -> str:
        """The id of the snapshot that the call is made for."""
        return self.work.context.snapshot_id

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that an attempt of the call is under way on."""
        return None if self._attempt is None else self._attempt.loop

    def upon(self, loop: asyncio.AbstractEventLoop) -> Call | None:
        """Return the call upon a loop that waits for what its source asks for.

        If that is not this one, it is the last of those upon whose behalf this one is made.
        """
        call: Call | None = self
        while call is not None and call.keys_under_way and call.loop is not None:
            if call.loop is loop:
                return call
            call = call_served(call.work.variables)
        return None

    def ask(self, *gathers: Gather) -> None:
        """Note what its source waits for, upon whatever loop; tell its lane, upon that of its own.

        A worker of the lane waits then, and what is queued there may be what it waits for.
        """
        self.asked.update(dict.fromkeys(gathers))
        loop = self.loop
        if loop is not None and loop is not running_loop():
            with contextlib.suppress(RuntimeError):  # it has been closed
                loop.call_soon_threadsafe(self.lane.waits)
        elif loop is not None:
            self.lane.waits()

    @property
    def keys_under_way(self) -> Collection[Flight]:
        """The flights that are not settled yet, none if the call is over."""
        return () if self._over else tuple(self.flights)

    @property
    def keeps_others_waiting(self) -> bool:
        """Whether its source must not queue for anything: who has no slot may wait for it."""
        return self.slots > 0 or bool(self.keys_under_way)

    def unwanted(self) -> None:
        """Learn that nobody waits for one of the flights any more; see the table."""
        attempt = self._attempt
        # Whether it is wanted comes last: for very many that leave, to find nobody takes a while.
        if self._over or (attempt is not None and attempt.goes_on) or self._wanted():
            return
        failed: BaseException | None = None
        asks = attempt is not None and attempt.progress is Progress.RUNNING
        if self._failure is not None and self.attempts and not asks:
            failed = self._failure.exception  # that of the attempt before, which counts
        late = None if attempt is None else attempt.abandon()
        self._left = True
        left = f"nobody waits for source {self.link.name!r} any more"
        if failed is None:
            self.end(late or SourceUnavailableError(left), _ABANDONED)
        else:
            self.end(late or failed)

    def lost(self) -> None:
        """Learn that the worker has ended, however that came about."""
        if not self._over:
            self.end(SourceUnavailableError(f"the call of source {self.link.name!r} was lost"))

    def forget(self) -> None:
        """Learn that the event loop has ended, and with it whoever waited; tell the circuits."""
        over, self._over = self._over, True
        if not over:
            with contextlib.suppress(Exception):  # of a clock: nobody is left to be told
                for _ in self._tell_circuits(_ABANDONED):
                    pass

    def _wanted(self) -> bool:
        if self._liveness is None:
            self._liveness = Liveness(self.flights)
        return self._liveness.alive

    # Its time ---------------------------------------------------------------------------------

    def remaining(self) -> float:
        """Return the seconds until nobody wants an answer any more."""
        if self.cutoff == math.inf:
            return self.cutoff
        remaining = self.cutoff - asyncio.get_running_loop().time()
        deadline = self.work.deadline
        if deadline is not None and self.work.cutoff == self.cutoff:
            remaining = min(remaining, deadline.remaining())
        return remaining

    def of_deadline(self) -> str:
        """Return how long the deadline gave, for messages."""
        deadline = self.work.deadline
        return "" if deadline is None else f" of {deadline.budget_seconds:g} s"

    # One attempt after the other --------------------------------------------------------------

    def follow(self, following: Following, flight: Flight, worker: Worker, leader: Call) -> Attempt:
        """Be under way already, in the wake of another call, but for what `join` does.

        Return the attempt that is made.
        """
        if flight.phase is _CALLING:
            self.flights, self.cutoff = {flight: None}, flight.cutoff
        self.policy, self.timeout_seconds = leader.policy, leader.timeout_seconds
        self._turn, self.rests_on = following.turn, following.rests_on
        self._asked = tuple(self.flights) if self.policy.circuit.enabled else ()
        self._attempt = Attempt(self, worker)
        self._attempt.set_off(following.began, following.ticks)
        return self._attempt

    def join(self) -> None:
        """Count the attempt that is under way, and let the flight know of its call; once."""
        if not self.attempts:
            self.flights = {each: None for each in self.flights if each.phase is _CALLING}
            self.extend(Flight.join_call(self.flights, self))
            self.count_attempt()

    async def run(self, worker: Worker, begun: Attempt | None = None) -> None:
        """Make one attempt, or what is left of it; return when the source has really ended."""
        self._retry = None
        if begun is None and (self._over or not self.flights):
            return
        attempt = self._attempt = begun or Attempt(self, worker)
        if self.log is not None and begun is None:
            self.log.attempt(self.attempts + 1)
        try:
            if not self.attempts:
                chosen = self.parts.resilience.resolve(
                    self.link.name, declared=self.link.declared_resilience
                )
                self.policy = instance("resilience policy", chosen, SourceResiliencePolicy)
                if self.parts.breaker.circuits:
                    await self._pass_open_circuits()
            if begun is not None or (self.flights and not self._over):
                await attempt.run()
        except BaseException as error:
            if not _comes_from_outside(error, worker):
                self.end(error)
            elif isinstance(error, GeneratorExit):
                raise
            elif not attempt.over:
                self.dispatch.be_quiet()
                by_others = f"source {self.link.name!r} was cancelled from outside"
                self.end(SourceUnavailableError(by_others), _ABANDONED)
                raise
        if not self._over and self._attempt is attempt:
            self.lost()

    def failed(self, attempt: Attempt, error: BaseException) -> None:
        """Decide whether a failed attempt is followed by another, and arrange for it."""
        self._attempt = None
        ends_program = isinstance(error, PROGRAM_ENDS)
        error = self._own(error)
        try:
            if self.log is not None:
                self.log.ended(_outcome_of(error, _FAILURE), error)
            loop = asyncio.get_running_loop()
            self._count_latency((loop.time() - attempt.began) * 1000)
            self.link.failed_attempts += 1
            retry = self.policy.retry
            more = self.attempts < retry.max_attempts and not ends_program and self._wanted()
            if more and self._retries(error):
                delay = retry.delay_for_attempt(self.attempts)
                self._failure_of(error)  # which stands if it comes to no other attempt
                # What was asked here may have closed the builder; so may who is told.
                if delay + self._needed_seconds < self.remaining() and not self._over:
                    self._retry = loop.call_later(delay, self.lane.again, self)
                    if self.log is not None:
                        self.log.rests(delay)
                    if self.parts.report is not None:
                        self.parts.report.tell(
                            "source_call_retried",
                            **self.facts,
                            attempt=self.attempts,
                            delay_seconds=delay,
                            error_type=error,
                            error=error,
                        )
        finally:
            if self._retry is None:
                late = isinstance(error, SnapshotDeadlineExceededError)
                self.end(error, _ABANDONED if late else _FAILURE)

    @property
    def _needed_seconds(self) -> float:
        """How much time an attempt must have left, or it is refused before it is made."""
        late = self.policy.finish_late and self.timeout_seconds is not None
        declared = self.link.guarantee.transport_timeout_seconds
        return 0.0 if late or declared is None or not self.link.protected else declared

    def _retries(self, error: BaseException) -> bool:
        """Whether the policy retries an error: not if it cannot say so."""
        try:
            return self.policy.retry.retries(error)
        except BaseException as fault:
            _tell_loop(fault, f"retry_on of source {self.link.name!r} failed")
            return False

    def _own(self, error: BaseException) -> BaseException:
        """Return what is not meant for keys as the source's own failure.

        It is a cancellation that nobody asked for, or what ends the program: that is passed on.
        """
        name, error = self.link.name, legible(error)
        if isinstance(error, asyncio.CancelledError):
            own: Exception = SourceUnavailableError(f"source {name!r} cancelled itself")
        elif isinstance(error, PROGRAM_ENDS):
            pass_on(error)
            kind = type_name(error)
            own = SourceProtocolError(f"source {name!r} raised {kind}, which ends the program")
        else:
            return error
        own.__cause__ = error
        return own

    def end(self, error: BaseException, outcome: Outcome = _FAILURE) -> None:
        """Refuse every key that is still in the call, and tell its circuits; once."""
        if self._over:
            pass_on(error)
            return
        error = self._own(error)
        self._over = True
        self._attempt = self._liveness = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        try:
            if self.log is not None:
                self.log.over(_outcome_of(error, outcome), error)
            self._count_end(error, outcome)
        finally:
            self.work_off(self._ending(error, outcome))

    def _ending(self, error: BaseException, outcome: Outcome) -> Iterator[None]:
        """Tell the circuits, and refuse the keys, one after the other."""
        try:
            yield from self._tell_circuits(outcome)
        except GeneratorExit:  # its loop was dropped
            raise
        except BaseException as broken:
            _tell_loop(broken)
        status = "abandoned" if self._is_given_up(error, outcome) else "failure"
        for flight in tuple(self.flights):
            try:
                if self._is_wanted_anew(flight):
                    self.flights.pop(flight)
                    flight.leave_call()
                    self.dispatch.ready(self.link, (flight,))
                elif flight in self.flights:
                    self.refuse(flight, error, status)
            except BaseException as broken:
                _tell_loop(broken)
            yield

    def _is_given_up(self, error: BaseException, outcome: Outcome) -> bool:
        """Whether it has ended as nobody waits, in time: its source has not failed."""
        late = isinstance(error, SnapshotDeadlineExceededError)
        return self._left and outcome is _ABANDONED and not late

    def _is_wanted_anew(self, flight: Flight) -> bool:
        """Whether somebody waits for a key who came when the call had ended for want of time."""
        came = flight.waiters and (self._left or flight.cutoff > self.cutoff)
        return bool(came) and flight in self.flights and flight.call is self

    def work_off(self, steps: Iterator[None]) -> None:
        """Take small steps; others have a turn whenever a slice of time is used up."""
        pace, endings = self.parts.pace, self.dispatch.endings
        if steps not in endings:
            endings[steps] = self
            self.dispatch.hold(self.work)
        pace.begin()
        try:
            for _ in steps:
                if pace.due:
                    asyncio.get_running_loop().call_soon(self.work_off, steps)
                    return
        except BaseException as broken:
            _tell_loop(broken)
        if endings.pop(steps, None) is not None:
            self.dispatch.release(self.work)

    def refuse(self, flight: Flight, error: BaseException, status: str) -> None:
        """Report that the source has failed for a key."""
        self.flights.pop(flight, None)
        if flight.call is self:
            flight.leave_call()
            self.dispatch.refused(flight, self._failure_of(error), status)
        if self.log is not None and status == "circuit_open" and not self.flights:
            self.log.over(status, error)

    def _failure_of(self, error: BaseException) -> SourceFailure:
        """Return the record of an error, one for all keys that it is the error of."""
        failure, attempts = self._failure, self.attempts
        if failure is None or failure.exception is not error or failure.attempts != attempts:
            try:
                failure = SourceFailure.of(self.link.name, error, attempts)
            except BaseException as fault:  # whatever an error refuses, its keys go on
                _tell_loop(fault)
                failure = SourceFailure(self.link.name, "Exception", "unreadable", attempts)
            self._failure = failure
        return failure

    # Its circuits: a batch may touch several, each with a group of its keys ---------------------

    async def _pass_open_circuits(self) -> None:
        """Refuse the keys whose circuit is open, so that they need not wait for capacity."""
        policy, breaker = self.policy.circuit, self.parts.breaker
        if policy.enabled:
            await self._ask_circuits(lambda identity, _: breaker.refusal(identity, policy))

    def must_ask_circuits(self) -> bool:
        """Take part in the circuits, before the first attempt; False if they are all at rest."""
        if self.attempts or not self.policy.circuit.enabled:
            return False
        breaker = self.parts.breaker
        self._turn = breaker.turn
        self._asked = tuple(self.flights)
        return bool(breaker.circuits)

    async def enter_circuits(self) -> None:
        """Ask the circuits that are not at rest, and refuse the keys that they keep out."""
        self._groups = {}
        await self._ask_circuits(self._enter)

    def _enter(self, identity: CircuitIdentity, group: list[Flight]) -> Exception | None:
        try:
            turn = self.parts.breaker.admit(identity, self.policy.circuit)
        except CircuitOpenError as error:
            return error
        if self._groups is not None:
            self._groups[identity] = turn, group
        return None

    async def _ask_circuits(
        self, ask: Callable[[CircuitIdentity, list[Flight]], Exception | None]
    ) -> None:
        """Ask the circuit of each group for leave, and refuse the keys of those that give none."""
        groups: dict[CircuitIdentity, list[Flight]] = {}
        pace = self.parts.pace
        pace.begin()
        self.dispatch.hold(self.work)
        try:
            for _ in self._grouping(tuple(self.flights), groups):
                await pace.keep()
            for identity, group in groups.items():
                if self._over:
                    return
                refusal = ask(identity, group)
                if refusal is not None:
                    for flight in group:
                        self.refuse(flight, refusal, "circuit_open")
                        await pace.keep()
                await pace.keep()
        finally:
            self.dispatch.release(self.work)
        self._liveness = None  # who was found to wait may do so elsewhere by now
        if self.flights:
            self.unwanted()

    def _grouping(
        self, flights: Sequence[Flight], groups: dict[CircuitIdentity, list[Flight]]
    ) -> Iterator[None]:
        """Enter the flights into `groups` by circuit, one after the other."""
        breaker, scope, name = self.parts.breaker, self.policy.circuit.scope, self.link.name
        if scope is CircuitScope.SOURCE:
            groups[breaker.identity_for(name, scope=scope)] = list(flights)
            return
        for flight in flights:
            identity = breaker.identity_for(name, key=flight.key, scope=scope)
            groups.setdefault(identity, []).append(flight)
            yield

    @property
    def _circuits_need_not_know(self) -> bool:
        """Whether telling the circuits of success would change nothing."""
        if not self._asked:
            return True
        if self._groups is not None or self.parts.breaker.circuits:
            return False
        whole = self.policy.circuit.scope is CircuitScope.SOURCE
        return bool(self.fresh) if whole else len(self.fresh) == len(self._asked)

    def _tell_of_refused(self, flight: Flight, turn: int) -> None:
        """Tell the circuit, and the log, of an answer in the wake of its own that is of no use."""
        if self._unusable is not None:
            self.parts.log.failed(f"source {self.link.name!r}", self._unusable)
            self._unusable = None
        breaker, policy = self.parts.breaker, self.policy.circuit
        identity = breaker.identity_for(self.link.name, key=flight.key, scope=policy.scope)
        try:
            breaker.report(identity, _FAILURE, policy, turn)
        except BaseException as error:  # of its clock
            _tell_loop(error)

    def _tell_circuits(self, outcome: Outcome) -> Iterator[None]:
        """Tell each circuit, once, how its keys fared: one fresh value makes it a success."""
        if self._circuits_need_not_know:
            return
        breaker, policy, groups = self.parts.breaker, self.policy.circuit, self._groups
        if groups is None:
            at_rest: dict[CircuitIdentity, list[Flight]] = {}
            yield from self._grouping(self._asked, at_rest)
            groups = {identity: (self._turn, group) for identity, group in at_rest.items()}
        self._asked = ()
        outcome = outcome if self.attempts else Outcome.SKIPPED  # nobody was asked
        for identity, (turn, group) in groups.items():
            fared = outcome if self.fresh.isdisjoint(group) else _SUCCESS
            try:
                breaker.report(identity, fared, policy, turn)
            except BaseException as error:  # of its clock: the other circuits are told all the same
                _tell_loop(error)
            yield

    # What the source answered, handed over key by key ------------------------------------------

    async def take_in(self, attempt: Attempt, answer: Any) -> None:
        """Hand over what the source answered, without holding the loop for long."""
        attempt.progress = Progress.TAKING_IN
        parts, link, flights = self.parts, self.link, tuple(self.flights)
        if self.log is not None:
            self.log.ended("success")
        ended_at = self._ended()
        self.latency_ms = (ended_at - attempt.ticks) * 1000
        self._count_latency(self.latency_ms)
        many = len(flights) > PORTION
        if many:
            await parts.pace.keep()  # the source may have had its time in this turn
        answers, omitted = deque([(flights[0], answer)]), list[Flight]()
        if link.kind is _BATCH:
            answers, omitted = await parts.pace.through(_answers(link, flights, answer))
            self._count_batch_end("success")
        del flights  # so that each may go as soon as it is settled
        self._answered = True
        self._count_answer(ended_at)
        if omitted:
            await self._refuse_omitted(omitted)
        if len(answers) > 1:
            await self._hand_over_all(answers)
        elif answers:
            self._hand_over(*answers[0], worker=attempt.worker if attempt.prompt else None)
        slow, self._slow = self._slow, None
        if slow is not None:
            await self._copy_in_threads(attempt, slow)
        if self._over:
            return
        if self.flights:
            self.lost()
            return
        self._over, self._attempt, self._liveness = True, None, None
        if self.log is not None:
            self.log.over("success")
        if self._unusable is not None and not self.fresh:
            parts.log.failed(f"source {link.name!r}", self._unusable)
        elif parts.log.troubled:
            parts.log.works(f"source {link.name!r}")
        if many or not self._circuits_need_not_know:
            self.work_off(self._concluding())

    def _concluding(self) -> Iterator[None]:
        """Tell the circuits; then let go of the flights, as many at once would hold the loop."""
        yield from self._tell_circuits(_FAILURE)
        self._asked = ()
        while self.fresh:
            for _ in range(min(len(self.fresh), PORTION)):
                self.fresh.pop()
            yield

    def _hand_over(
        self,
        flight: Flight,
        value: Any,
        sealed: Sealed | None = None,
        worker: Worker | None = None,
    ) -> None:
        """Hand over one value, unless sealing it takes a thread.

        If a `worker` is given, it makes the calls along with it that are answered at once.
        """
        made: deque[Fresh] = deque()
        by_key: dict[ResourceKey, Revision] = {}
        self._make(deque([(flight, value)]), made, by_key, sealed)
        if worker is not None and made and self._may_lead():
            self._lead(worker, made, by_key)
        self._deliver(made, self.dispatch.store(self, made, by_key, None))

    # What it takes along: calls that are answered at once travel together ----------------------

    def _may_lead(self) -> bool:
        """Whether the source may be asked for what is queued behind, in the same step.

        Not if anybody follows what it does, or its circuits have to be asked each time.
        """
        return (
            self.link.kind is not _BATCH
            and self.attempts == 1
            and self.log is None
            and self.parts.report is None
            and self._groups is None
            and not self.link.protected
        )

    def _lead(
        self, worker: Worker, made: deque[Fresh], by_key: dict[ResourceKey, Revision]
    ) -> None:
        """Ask for the keys that are queued behind, as long as the source answers each at once.

        Nobody else has a turn meanwhile, so that one slot does for all of them, and their values
        are handed over together. What takes longer goes on as a call of its own.
        """
        lane, breaker, pace, count, before = self.lane, self.parts.breaker, self.parts.pace, 0, 0.0
        lease = self.parts.capacity.try_acquire(self.link.name) if lane.queued else None
        self._asked = ()  # its own answer was fresh
        try:
            while lease is not None and count < PORTION and not (breaker.circuits or self._over):
                flight = None if worker.interrupted else lane.next_flight()
                if flight is None:
                    break
                prepared = self._prepared(worker, flight)
                if prepared is None:
                    lane.put_back(flight)
                    break
                attempt = self._ask_for(worker, flight, *prepared, made, by_key)
                if attempt is not None:
                    attempt.take_over(lease)
                    lease = None
                    break
                count += 1
                before += self.latency_ms
                if not count % _CALLS_BETWEEN_LOOKS and pace.due:
                    break
        finally:
            if lease is not None:
                lease.release()
            if count:
                self._count_calls(count)
                self._count_latency(before, count)

    def _prepared(
        self, worker: Worker, flight: Flight
    ) -> tuple[Following, tuple[Snapshot, ...]] | None:
        """Return how one more key is asked for, and what it is derived from, if it is.

        None if that takes waiting, or fails: then it is left to a call of its own.
        """
        inputs: tuple[Snapshot, ...] = ()
        rests_on: FrozenDict[ResourceKey, str] = EMPTY
        try:
            if self.link.kind is _DERIVED:
                gather, context = flight.gather, flight.sponsor.context
                readings = {} if gather is None else gather.in_order()
                found = self.dispatch.deliveries.inputs_at_hand(
                    context, readings, inherits=self.link.inherits
                )
                if found is None:
                    return None
                inputs, rests_on = (found[0],), found[1]
            return Following(self, worker, flight, rests_on), inputs
        except BaseException as error:
            pass_on(error)
            return None

    def _ask_for(
        self,
        worker: Worker,
        flight: Flight,
        following: Following,
        inputs: tuple[Snapshot, ...],
        made: deque[Fresh],
        by_key: dict[ResourceKey, Revision],
    ) -> Attempt | None:
        """Ask for one more key; return the attempt that is under way if this is not the end."""
        run = self.work.variables.copy().run
        try:
            begun = run(_begin, following.call, self.link, flight.key, inputs, self.work.context)
            if following.led() and begun[0] is None:
                ended_at = self._ended()
                self.latency_ms = (ended_at - following.ticks) * 1000
                if flight.phase is not _CALLING:
                    return None  # nobody waits for it any more
                self.extend(Flight.join_call((flight,), self))
                self.flights[flight], self.rests_on = None, following.rests_on
                self._count_answer(ended_at)
                self._make(deque([(flight, begun[1])]), made, by_key)
                if self._slow is None:
                    if flight not in self.fresh:
                        self._tell_of_refused(flight, following.turn)
                    return None
                self._slow = None
        except BaseException as error:
            self.flights.pop(flight, None)
            return following.own(self, flight, worker).resume(error, run)
        self.flights.pop(flight, None)
        return following.own(self, flight, worker).resume(begun, run)

    async def _hand_over_all(self, answers: deque[tuple[Flight, Any]]) -> None:
        """Hand over many values, after readers of the memory cache see all of them in one step."""
        pace, many = self.parts.pace, len(answers) > _KEYS_AT_ONCE
        pace.begin()
        made: deque[Fresh] = deque()
        by_key: dict[ResourceKey, Revision] = {}
        self.dispatch.hold(self.work)  # what is refused goes on together
        try:
            while answers:
                self._make(answers, made, by_key)
                await pace.keep()
        finally:
            self.dispatch.release(self.work)
        stored: Collection[Revision] | None = ()
        store, held = self.parts.access.store, None
        if len(made) > 1 and store is not None:
            if many:
                held = await pace.through(store.weigh(by_key, now=self.parts.clock.now()))
                await pace.rest()  # all at once takes a while
            self._record.cache_batch_writes += 1
            stored = self.dispatch.store(self, made, by_key, held)
        while made:
            if held is not None:
                del held.known[-PORTION:]  # to let go of all of it at once takes a while, too
            self._deliver([made.popleft() for _ in range(min(len(made), PORTION))], stored)
            await pace.keep()

    async def _refuse_omitted(self, flights: Sequence[Flight]) -> None:
        """Let the keys that were left out go on, together, to where they are served next."""
        error = SourceUnavailableError(f"source {self.link.name!r} left the key out of its answer")
        self.dispatch.hold(self.work)
        try:
            for flight in flights:
                self.refuse(flight, error, "failure")
                await self.parts.pace.keep()
        finally:
            self.dispatch.release(self.work)

    async def _copy_in_threads(self, attempt: Attempt, slow: Sequence[tuple[Flight, Any]]) -> None:
        """Seal the values that take a thread, side by side, until the cutoff."""
        pairs = iter(slow)
        loop = asyncio.get_running_loop()
        helpers = [
            loop.create_task(self._copy_each(pairs), name=f"coalestra {self.link.name}")
            for _ in range(min(len(slow), self.parts.copies.max_concurrency) - 1)
        ]
        for task in helpers:
            self.dispatch.tasks.add(task)
            task.add_done_callback(self.dispatch.tasks.discard)
        try:
            with attempt.cut_off(math.inf, partial(self._copy_late, attempt)):
                await self._copy_each(pairs)
                if helpers:
                    await asyncio.wait(helpers)
        except CutOffExpired:
            pass  # `_copy_late` has decided
        finally:
            for task in helpers:
                task.cancel()

    async def _copy_each(self, pairs: Iterator[tuple[Flight, Any]]) -> None:
        copies, this = self.parts.copies, running_task()
        for flight, value in pairs:
            if flight.call is not self:
                continue
            try:
                payload = value.value if type(value) is SourcePayload else value
                sealed = await copies.seal(payload, context=self.link.context)
            except BaseException as error:
                # The collector ends what its loop has left, while another task runs or none.
                if issubclass(type(error), asyncio.CancelledError) or running_task() is not this:
                    raise
                self._refuse_value(flight, error)
            else:
                self._hand_over(flight, value, sealed)

    def _copy_late(self, attempt: Attempt) -> None:
        """Decide at once what becomes of the values whose copies took too long."""
        attempt.write_off()
        self.parts.copies.count_timeouts(len(self.flights))
        self.end(
            SnapshotDeadlineExceededError(
                f"the deadline{self.of_deadline()} passed while the answer of source "
                f"{self.link.name!r} was {self._taken_in}; raise the deadline or return less"
            )
        )

    def _refuse_value(self, flight: Flight, error: BaseException) -> None:
        error = legible(error)
        pass_on(error)
        self.fresh.discard(flight)
        future = isinstance(error.__cause__, FutureObservation)
        self._record.future_timestamp_rejections += future
        self._unusable = self._failure_of(error)
        self.refuse(flight, error, "invalid_timestamp" if future else "failure")

    def _make(
        self,
        answers: deque[tuple[Flight, Any]],
        made: deque[Fresh],
        by_key: dict[ResourceKey, Revision],
        sealed: Sealed | None = None,
    ) -> None:
        """Make revisions of values, as many as may be made before a look at the clock."""
        parts, link, answered_at = self.parts, self.link, self.answered_at
        source, context, rank = link.name, link.context, self.lane.rank
        latency_ms, attempts, rests_on = self.latency_ms, self.attempts, self.rests_on
        seal_now, left = parts.copies.seal_now, PORTION
        while answers and left > 0:
            flight, value = answers.popleft()
            left -= 1
            if flight.call is not self:
                continue
            try:
                payload, metadata, observed_at, dated = value, EMPTY, answered_at, False
                if type(value) is SourcePayload:
                    payload = value.value
                    if value.metadata or value.observed_at is not None:
                        metadata, observed_at, dated = self._said_of(flight.key, value)
                if payload is ResourceAbsent or isinstance(payload, ResourceAbsent):
                    self._refuse_absent(flight, payload)
                    continue
                stale = dated and answered_at - observed_at > flight.policy.ttl_seconds
                if not stale:
                    self.fresh.add(flight)
                found = sealed or seal_now(payload, context=context)
                if found is None:
                    self._put_aside(flight, value)
                    continue
                revision = Revision(
                    flight.key,
                    found[0],
                    found[1],
                    source,
                    observed_at,
                    answered_at,
                    next_version(),
                    latency_ms,
                    attempts,
                    metadata,
                    rank_of(parts.authority, flight.key, source) if rank is None else rank,
                    rests_on,
                    () if flight.gather is None else flight.gather.revisions(),
                    dated,
                    flight.began,
                )
            except BaseException as error:
                self._refuse_value(flight, error)
                continue
            if stale:
                self._refuse_stale(flight, revision)
                continue
            made.append((flight, revision))
            by_key[flight.key] = revision
            left -= found[1].weight

    def _put_aside(self, flight: Flight, value: Any) -> None:
        """Let a value be copied in a thread, and made with the seal of that."""
        self._slow = self._slow or []
        self._slow.append((flight, value))

    def _deliver(self, values: Iterable[Fresh], stored: Collection[Revision] | None) -> None:
        """Let flights have their values, of which the memory cache has those `stored`, or all."""
        rest = here = [each for each in values if each[0].call is self]
        if stored:
            self.dispatch.delivered([each for each in here if each[1] in stored], True)
            rest = [each for each in here if each[1] not in stored]
        self.dispatch.delivered(rest, stored is None)
        for flight, _ in here:  # by now: of what an interrupt has kept from them, `end` takes care
            self.flights.pop(flight, None)

    def _said_of(
        self, key: ResourceKey, value: SourcePayload[Any]
    ) -> tuple[FrozenDict[str, Any], float, bool]:
        """Return what a source said of a value, with how far its date is ahead, if it may be.

        That is metadata, when it was observed, and whether the source said so.
        """
        metadata, observed_at = value.metadata, self.answered_at
        if value.observed_at is not None:
            observed_at = float(value.observed_at)
            try:
                skew = judge_observation(observed_at, self.answered_at, self.parts.observation)
            except FutureObservation as error:
                raise SourceProtocolError(
                    f"source {self.link.name!r}, {key.display}: {error}"
                ) from error
            if skew:
                metadata = {**metadata, "clock_skew_seconds": skew}
        sealed = self.parts.copies.seal_metadata_now(metadata, context=self.link.context)
        return sealed, observed_at, value.observed_at is not None

    def _refuse_absent(self, flight: Flight, answer: ResourceAbsent | type[ResourceAbsent]) -> None:
        """Note that the source has answered, that there is none."""
        self.fresh.add(flight)
        self._record.absent_answers += 1
        self.refuse(flight, answer() if isinstance(answer, type) else answer, "absent")

    def _refuse_stale(self, flight: Flight, revision: Revision) -> None:
        """Keep a value that is too old to count: it may stand in when all else fails."""
        age, ttl = revision.fetched_at - revision.observed_at, flight.policy.ttl_seconds
        try:
            flight.keep_stale(revision)
        finally:
            text = f"the value is {age:g} s old, the policy allows {ttl:g} s"
            error = StaleSourceData(text)
            self._unusable = self._failure_of(error)
            self.refuse(flight, error, "stale")

    # What it counts for, in the diagnostics of its unit of work and in the metrics ----------------

    def count_attempt(self) -> None:
        """Count an attempt, and with the first one the call.

        That is for a reader who is left once the one who queued it has gone.
        """
        if self.work.over and self.flights:
            self._record = next(iter(self.flights)).living_sponsor().record
        if not self.attempts:
            self._count_calls(1)
            if self.link.kind is _BATCH:
                self._record.batch_calls += 1
                if self.parts.report is not None:
                    size = len(self.flights)
                    self.parts.report.observe("source_batch_size", size, source=self.link.name)
        else:
            self._record.retries += 1
        self.attempts += 1

    def _count_calls(self, count: int) -> None:
        record, name = self._record, self.link.name
        record.source_calls += count
        by_source = record.source_calls_by_source
        by_source[name] = by_source.get(name, 0) + count
        if self.link.kind is _DERIVED:
            record.derived_calls += count

    def report_start(self, run: Callable[..., Any]) -> None:
        """Report that the source is asked; `run` runs something in the context of the call."""
        report = self.parts.report
        if self.log is not None:
            self.log.called(run)
        if report is not None:
            told = {"keys": len(self.flights), "attempt": self.attempts}
            report.tell("source_call_started", **self.facts, **told)

    def _count_latency(self, latency_ms: float, attempts: int = 1) -> None:
        """Add what attempts took, in milliseconds."""
        name, by_source = self.link.name, self._record.source_latency_ms_by_source
        by_source[name] = by_source.get(name, 0.0) + latency_ms
        self.link.attempts += attempts
        self.link.latency_ms += latency_ms
        if self.parts.report is not None:
            self.parts.report.observe("source_fetch_latency_ms", latency_ms, source=name)

    def _ended(self) -> float:
        """Return when the source has answered, in monotonic seconds; the wall clock is read first.

        Else the reading would seem to have begun later than it did, and than an event in between.
        """
        self.answered_at = self.parts.clock.now()
        return self.parts.clock.monotonic()

    def _count_answer(self, ended_at: float) -> None:
        """Note when the source answered, and whether that was too late."""
        link = self.link
        link.succeeded_at = ended_at
        late = self.cutoff != math.inf and self.cutoff < asyncio.get_running_loop().time()
        link.deadline_cuts = link.deadline_cuts + 1 if late else 0

    def _count_batch_end(self, status: str) -> None:
        """Count how a batch call ended; other calls are counted by their keys alone."""
        if self.parts.report is not None and self.link.kind is _BATCH:
            counted = {"source": self.link.name, "status": status}
            self.parts.report.count("source_batch_call_total", **counted)

    def _count_end(self, error: BaseException, outcome: Outcome) -> None:
        status = "failure"
        if isinstance(error, SnapshotDeadlineExceededError):
            now = asyncio.get_running_loop().time()
            ahead = any(flight.cutoff > now for flight in self.flights)
            self.parts.counters.deadline_exceeded_count += ahead  # if not, the waiters have counted
            status = "deadline_exceeded"
        elif isinstance(error, SourceQueueTimeoutError):
            status = "queue_timeout"
        if self._answered or not self.flights or self._is_given_up(error, outcome):
            return
        if self.attempts and outcome is _FAILURE:
            self.link.failed_at = self.parts.clock.monotonic()
            self.link.last_error = type_name(error)
            self.parts.log.failed(f"source {self.link.name!r}", self._failure_of(error))
        self._count_batch_end(status)

    def __repr__(self) -> str:
        return f"<Call {self.link.name} keys={len(self.flights)} attempts={self.attempts}>"


def _outcome_of(error: BaseException, outcome: Outcome) -> str:
    """Return what a trace calls the end of a call that an error stands for."""
    if isinstance(error, SnapshotDeadlineExceededError):
        return "deadline"
    if isinstance(error, (SourceTimeoutError, SourceQueueTimeoutError)):
        return "timeout"
    return "abandoned" if outcome is _ABANDONED else "failure"


def _tell_loop(error: BaseException, what: str = "the end of a call failed") -> None:
    """Report what went wrong in settling, which goes on all the same."""
    pass_on(error)
    context = {"message": f"coalestra: {what}", "exception": error}
    asyncio.get_running_loop().call_exception_handler(context)


class Worker:
    """A task that works off the queue of a lane. `gone`: the lane has stopped counting on it.

    `begun` is an attempt that it has to go on with at once.
    """

    task: asyncio.Task[Any] | None = None
    call: Call | None = None
    begun: Attempt | None = None
    closing: bool = False
    gone: bool = False
    _requests: OwnCancellation | None = None

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    @property
    def interrupted(self) -> bool:
        """Whether its end was asked for. Else a cancellation is the own of whoever raises it."""
        return self.closing or (self._requests is not None and self._requests.asked)

    @property
    def runs(self) -> bool:
        """Whether its task takes a step just now, and its coroutine is not merely being closed."""
        return running_task() is self.task

    async def run(self) -> None:
        """Serve the lane; the coroutine of the task."""
        task = self.task = asyncio.current_task()
        if task is not None:
            self._requests = OwnCancellation(task)
            try:
                await self._lane.serve(self)
            finally:
                self._requests.end()

    def leave(self) -> None:
        """Let another take its place, as this one ends, or may take its time to end."""
        if not self.gone:
            self.gone = True
            self._lane.left(self)


def _comes_from_outside(error: BaseException, worker: Worker) -> bool:
    """Whether an error is how a worker is ended. Whatever is plugged in may raise the same."""
    kind = type(error)  # asking the error itself may fail
    if issubclass(kind, GeneratorExit):
        return not worker.runs  # its loop has ended, and with it whoever waited
    return issubclass(kind, asyncio.CancelledError) and worker.interrupted


def _is_urgent(queued: Call | Flight | list[Flight]) -> bool:
    """Whether what is queued is waited for by a call under way."""
    return any(f.urgent for f in queued) if isinstance(queued, list) else queued.urgent


class Lane:
    """Makes calls of ready flights and works them off, at most `limit` side by side.

    A worker is a task in the context of the work. One whose call was cut off but does not end is
    written off: another takes its place, while the old one keeps its slot until it really ends.
    `rank` is the authority of its source, if that is the same for every key.
    """

    def __init__(self, dispatch: Dispatch, work: Work, link: Link, limit: int) -> None:
        self.dispatch: Dispatch = dispatch
        self.work: Work = work
        self.link: Link = link
        self.limit: int = limit
        policy = policy_of_all(dispatch.parts.authority)
        self.rank: int | None = None if policy is None else policy.rank_for(link.name)
        self._queue: deque[Call | Flight | list[Flight]] = deque()
        self._workers = 0
        self._calls: set[Call] = set()
        self._hurried = 0
        self._more: asyncio.Handle | None = None

    @property
    def capacity(self) -> str:
        """In words, what calls to its source wait for, and who has it."""
        name, capacity = self.link.name, self.dispatch.parts.capacity
        holders = capacity.holders()
        limit = capacity.limit_for(name)
        if limit is not None and holders.get(name, 0) >= limit:
            holders = {name: holders[name]}
        shown = [f"{who!r} ({count})" for who, count in islice(holders.items(), _HOLDERS_SHOWN)]
        more = ", ..." if len(holders) > _HOLDERS_SHOWN else ""
        held = f", held by {', '.join(shown)}{more}" if shown else ""
        return f"capacity of source {name!r}{held}"

    @property
    def doing(self) -> str:
        """What a flight is at that is queued here, to be put behind a sentence."""
        return f": it was queued for {self.capacity}"

    def add(self, flights: list[Flight]) -> None:
        """Queue calls for the flights: for a batch source in chunks of its size, else one each."""
        queued: Sequence[Flight | list[Flight]] = flights
        if self.link.kind is _BATCH:
            size = self.link.max_batch_size or len(flights)
            if len(flights) > size:
                self.work.record.batch_chunks += -(-len(flights) // size)
            starts = range(0, len(flights), size)
            queued = [flights[start : start + size] for start in starts]
        if [flight for flight in flights if flight.urgent]:
            self._put_first([each for each in queued if _is_urgent(each)])
            queued = [each for each in queued if not _is_urgent(each)]
        self._queue.extend(queued)
        self.staff()

    def again(self, call: Call) -> None:
        """Queue a call once more, for its next attempt."""
        if call.urgent:
            self._put_first((call,))
        else:
            self._queue.append(call)
        self.staff()

    def _put_first(self, queued: Sequence[Call | Flight | list[Flight]]) -> None:
        """Queue what workers may be waiting for before all that is there."""
        self._queue.extendleft(reversed(queued))
        self._make_room()

    def waits(self) -> None:
        """Learn that the source of a call waits for what it has asked for, and so a worker."""
        if self._queue and _is_urgent(self._queue[0]):
            self._make_room()
            self.staff()

    def _make_room(self) -> None:
        """Let there be one worker more if too many wait for what is queued, or for a slot."""
        if len(self._calls) >= self.limit + self._hurried:
            waiting = [call for call in self._calls if call.asked or not call.urgent]
            self._hurried += len(self._calls) - len(waiting) < self.limit

    def hurry(self, flight: Flight) -> None:
        """Make the call of a queued flight next, by a worker more than there may be."""
        for queued in self._queue:
            waits = flight in queued if isinstance(queued, list) else queued is flight
            if waits or queued is flight.call:
                self._queue.remove(queued)
                self._queue.appendleft(queued)
                self._hurried += 1
                self.staff()
                return

    def left(self, worker: Worker) -> None:
        """Count a worker as gone."""
        self._workers -= 1
        if not self._workers:
            self._hurried = 0
        if worker.call is not None:
            self._calls.discard(worker.call)
        self.staff()

    def staff(self) -> None:
        """Start as many workers as the queue keeps busy; the rest of very many in later turns."""
        # Looked at anew each time: an eager task may have worked the queue off by now.
        most, started = self.limit + self._hurried, 0
        while self._workers < min(most, len(self._calls) + len(self._queue)):
            if self._more is not None or (self.dispatch.quiet_until and self._is_quiet()):
                return
            started += 1
            worker = Worker(self)
            self._workers += 1
            try:
                # A copy, as a context cannot be entered twice, and an eager task may come back.
                task = self.work.variables.copy().run(self._start, worker)
            except BaseException:
                self._workers -= not worker.gone
                raise
            self.dispatch.workers.add(task)
            task.add_done_callback(partial(self._ended, worker))
            if started == _WORKERS_AT_ONCE:
                self._more = asyncio.get_running_loop().call_soon(self._staff_on, worker, task)

    def _staff_on(self, last: Worker, task: asyncio.Task[None]) -> None:
        self._more = None
        if not last.gone and (last.interrupted or task.cancelled()):
            self.dispatch.be_quiet()  # the program ends, and would not know of what is started now
        self.staff()

    def _start(self, worker: Worker) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        return loop.create_task(worker.run(), name=f"coalestra {self.link.name}")

    async def serve(self, worker: Worker) -> None:
        """Make one call after the other while there are any; what a worker does."""
        pace = self.dispatch.parts.pace
        pace.begin()
        while (self._queue and not worker.gone) or worker.begun is not None:
            begun, worker.begun = worker.begun, None
            call = self._next() if begun is None else begun.call
            if call is None:
                continue
            worker.call = call
            self._calls.add(call)
            if begun is None and len(call.flights) > _KEYS_AT_ONCE:
                await pace.rest()  # it took a while to make
            await call.run(worker, begun)
            if worker.begun is None and worker.gone:
                return
            worker.call = None
            self._calls.discard(call)
            if worker.begun is not None:
                continue
            if worker.interrupted:
                self.dispatch.be_quiet()
                break
            if pace.due:
                await pace.rest()
        worker.leave()

    @property
    def queued(self) -> bool:
        """Whether anything waits for a worker."""
        return bool(self._queue)

    def put_back(self, flight: Flight) -> None:
        """Have a flight be the next one again."""
        self._queue.appendleft(flight)

    def next_flight(self) -> Flight | None:
        """Take the next flight off the queue that nobody follows, unless something else is next."""
        while self._queue:
            flight = self._queue[0]
            if not isinstance(flight, Flight) or flight.log is not None:
                break
            self._queue.popleft()
            if self._still_here(flight):
                return flight
        return None

    def _next(self) -> Call | None:
        """Return the next call, of those of its keys that have not gone elsewhere meanwhile."""
        queued = self._queue.popleft()
        if isinstance(queued, Call):
            return queued
        flights = self._still_here(queued)
        return Call(self, flights) if flights else None

    def _still_here(self, queued: Flight | list[Flight]) -> Sequence[Flight]:
        link = self.link
        if isinstance(queued, list):
            return [f for f in queued if f.phase is _CALLING and f.call is None and f.link is link]
        here = queued.phase is _CALLING and queued.call is None and queued.link is link
        return (queued,) if here else ()

    def _ended(self, worker: Worker, task: asyncio.Task[None]) -> None:
        """See to what a worker leaves behind, however it ended, and even if it never began."""
        self.dispatch.workers.discard(task)
        if not worker.gone and task.cancelled():
            self.dispatch.be_quiet()
        begun = worker.begun
        calls = worker.call, None if begun is None else begun.call
        worker.leave()
        worker.call = worker.begun = None
        if begun is not None:
            begun.let_go()
        for call in calls:
            if call is not None:
                call.lost()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _tell_loop(error)

    def _is_quiet(self) -> bool:
        """Whether no worker may be started yet; if so, see to it that they are later."""
        loop, queue = asyncio.get_running_loop(), self._queue
        if loop.time() >= self.dispatch.quiet_until:
            return False
        while queue and not (isinstance(queue[0], Call) or self._still_here(queue[0])):
            queue.popleft()
        if queue:
            self.dispatch.staff_later(self)
        return True

    def __repr__(self) -> str:
        return f"<Lane {self.link.name} queued={len(self._queue)} workers={self._workers}>"


# Dispatch: ready keys are grouped by source and handed to the lanes of their unit of work --------


Storing = Callable[
    [Call, Collection[Fresh], dict[ResourceKey, Revision], Held | None],
    Collection[Revision] | None,
]


class Dispatch:
    """Makes the keys that become ready for one source in one step travel together.

    While a unit of work is on hold, more of its keys are on their way, and none is sent. After a
    worker was cancelled from outside, as at the end of a program, it is quiet for a while: what is
    started then would be destroyed before it has begun. `tasks` are those that copy in threads, or
    read an awaited cache; `endings` is what calls that are over have yet to tell of.
    """

    def __init__(
        self,
        parts: Parts,
        refused: Callable[[Flight, SourceFailure, str], None],
        delivered: Callable[[Sequence[Fresh], bool], None],
        store: Storing,
    ) -> None:
        """Report here what becomes of keys.

        `refused` is told that a source failed for a key, and with which status; `delivered` takes
        fresh values, and whether they are stored. `store` lets readers of the memory cache see
        several values before they are delivered, in place of what is known to be held, and returns
        which they see, or None for all.
        """
        self.parts: Parts = parts
        self.deliveries: Deliveries = Deliveries(parts)
        self.refused: Callable[[Flight, SourceFailure, str], None] = refused
        self.delivered: Callable[[Sequence[Fresh], bool], None] = delivered
        self.store: Storing = store
        self.workers: set[asyncio.Task[Any]] = set()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.endings: dict[Iterator[None], Call] = {}
        self.quiet_until: float = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._resting: dict[Lane, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def close(self) -> None:
        """Start no worker any more."""
        self.quiet_until = math.inf
        self._resting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def be_quiet(self) -> None:
        """Start no worker for a while."""
        if self.quiet_until != math.inf:
            self.quiet_until = asyncio.get_running_loop().time() + _QUIET_SECONDS

    def end_quiet(self) -> None:
        """Start workers again, as somebody has come who was not ended with the program.

        A source may have cancelled its own task, which is how clients time themselves out.
        """
        if self.quiet_until != math.inf:
            self.quiet_until = 0.0
            self._staff_all()

    def staff_later(self, lane: Lane) -> None:
        """Let a lane start workers when the quiet is over."""
        if self.quiet_until != math.inf:
            self._resting[lane] = None
            if self._timer is None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_at(self.quiet_until, self._staff_all)

    def _staff_all(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lanes, self._resting = self._resting, {}
        for lane in lanes:
            lane.staff()

    def hold(self, work: Work) -> None:
        """Hold back the calls of a unit of work: more keys for them are on their way."""
        self._loop = self._loop or asyncio.get_running_loop()
        work.planning += 1

    def release(self, work: Work) -> None:
        """Take back one `hold`; after the last one the calls are made, at the end of this step.

        What the collector ends as its loop has is not heard: the work may go on upon another one.
        """
        if self._loop is not None and self._loop.is_closed():
            return
        work.planning -= 1
        if not work.planning and work.ready:
            self._flush_soon(work)

    def ready(self, link: Link, flights: Sequence[Flight]) -> None:
        """Group flights of one sponsor with others that are ready for the same source by then."""
        work = flights[0].living_sponsor()
        Flight.be_ready(flights)
        work.ready.setdefault(link, []).extend(flights)
        self._flush_soon(work)

    def hurry(self, flight: Flight) -> None:
        """Let a flight queue for nothing, as a call under way waits for it."""
        if flight.call is not None:
            flight.call.hurry()
        if flight.lane is not None:
            flight.lane.hurry(flight)

    def _flush_soon(self, work: Work) -> None:
        if not work.flushing:
            asyncio.get_running_loop().call_soon(self._flush, work)
            work.flushing = True

    def _flush(self, work: Work) -> None:
        """Hand the groups to their lanes, unless more keys for them are on their way."""
        work.flushing = False
        if work.planning:
            return
        ready, work.ready = work.ready, {}
        for link, flights in ready.items():
            waiting = [flight for flight in flights if flight.phase is _READY]
            try:
                lane = self._lane(work, link)
                Flight.queue(waiting, lane)
                lane.add(waiting)
            except BaseException as error:
                pass_on(error)
                failure = SourceFailure.of(link.name, error, 0)
                for flight in waiting:
                    self.refused(flight, failure, "failure")

    def _lane(self, work: Work, link: Link) -> Lane:
        known = work.lanes.get(link)
        lane = None if known is None else known()
        if lane is None:
            parts = self.parts
            limit = parts.max_pending_tasks
            if link.kind is _BATCH:
                limit = parts.max_concurrency
            work.variables.run(current_threads.set, parts.threads)
            lane = Lane(self, work, link, limit)
            work.lanes[link] = weakref.ref(lane)  # so that the two are no circle
        return lane

    def __repr__(self) -> str:
        return f"<Dispatch workers={len(self.workers)} tasks={len(self.tasks)}>"
