"""One try of a call: capacity, budget, the call itself, and the instant that cuts it off.

What a try comes to is decided synchronously, in the callback or the line that learns of it; the
worker that awaits the source only acts. So a source that ignores its cancellation delays nobody:
when its time is up its keys go on at once, and only its slot stays taken until it really ends.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import deque
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Mapping,
    Sequence,
    Set,
)
from types import CoroutineType
from typing import Any, Protocol

from coalestra.concurrency.capacity import CapacityLease
from coalestra.concurrency.deadline import CutOff, CutOffExpired
from coalestra.concurrency.sealing import PORTION, Sealed
from coalestra.concurrency.threads import current_threads
from coalestra.core.errors import (
    CircuitOpenError,
    SnapshotDeadlineExceededError,
    SourceProtocolError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
)
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    FutureObservation,
    SourceAuthorityPolicy,
    judge_observation,
    policy_of_all,
)
from coalestra.core.snapshot import DiagnosticsRecorder, Snapshot
from coalestra.core.values import Revision, SourcePayload, next_number, next_version
from coalestra.observability.reports import Reporter
from coalestra.orchestration.flights import Acquisition, Call, Intake, Interest, Phase, Work
from coalestra.orchestration.parts import Equipment
from coalestra.orchestration.sources import Link, SourceKind
from coalestra.resilience.circuit_breaker import (
    CircuitBreaker,
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitScope,
    Outcome,
)
from coalestra.resilience.policies import SourceResiliencePolicy
from coalestra.resilience.retry import retryable

# What a call counts for: in the diagnostics of its unit of work, and in the metrics --------------


class Tally:
    """Counts one call to one source, whatever the number of its tries."""

    __slots__ = ("_link", "_record", "_report")

    def __init__(self, link: Link, record: DiagnosticsRecorder, report: Reporter | None) -> None:
        self._link = link
        self._record = record
        self._report = report

    def called(self, keys: int) -> None:
        """Count a call for so many keys."""
        record, link = self._record, self._link
        record.source_calls += 1
        by_source = record.source_calls_by_source
        by_source[link.name] = by_source.get(link.name, 0) + 1
        record.derived_calls += link.kind is SourceKind.DERIVED
        if link.kind is SourceKind.BATCH:
            record.batch_calls += 1
            if self._report is not None:
                self._report.batch_size(link.name, keys)

    def took(self, latency_ms: float) -> None:
        """Add what one try took, in milliseconds."""
        by_source = self._record.source_latency_ms_by_source
        by_source[self._link.name] = by_source.get(self._link.name, 0.0) + latency_ms
        if self._report is not None:
            self._report.fetch_latency(self._link.name, latency_ms)

    def batch_ended(self, status: str) -> None:
        """Count how a batch call ended; other calls are counted by their keys alone."""
        if self._report is not None and self._link.kind is SourceKind.BATCH:
            self._report.batch_call(self._link.name, status)

    def __repr__(self) -> str:
        return f"<Tally of source {self._link.name}>"


# From what a source returned to sealed revisions, or to the rule that it broke -------------------


OMITTED = object()
"""Stands for a key that a batch source left out of its answer."""


class Watched:
    """Awaits what a source returned, and tells whose a cancellation was: its own or not."""

    __slots__ = ("_awaitable", "interrupted")

    def __init__(self, link: Link, awaitable: Any) -> None:
        if type(awaitable) is not CoroutineType and not inspect.isawaitable(awaitable):
            raise SourceProtocolError(
                f"source {link.name!r} returned {type(awaitable).__qualname__} where an awaitable "
                "is needed; make the method async, or use a callable adapter"
            )
        self._awaitable = awaitable
        self.interrupted: bool = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = _steps(self._awaitable)
        try:
            item = next(steps)
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    steps.close()
                    raise
                except BaseException as error:
                    self.interrupted |= isinstance(error, asyncio.CancelledError)
                    item = steps.throw(error)
                else:
                    item = next(steps) if sent is None else steps.send(sent)
        except StopIteration as stop:
            return stop.value


def _steps(awaitable: Any) -> Any:
    steps = getattr(awaitable, "__await__", None)
    return awaitable if steps is None else steps()


def values_of(link: Link, flights: Sequence[Acquisition], result: Any) -> list[Any]:
    """Return what the answer holds for each flight; raise `SourceProtocolError` if malformed."""
    if link.kind is not SourceKind.BATCH:
        return [result]
    if not isinstance(result, Mapping):
        raise SourceProtocolError(
            f"fetch_many of source {link.name!r} must return a mapping of the requested keys, got "
            f"{type(result).__qualname__}"
        )
    get = result.get
    values = [get(flight.key, OMITTED) for flight in flights]
    if len(result) != len([True for value in values if value is not OMITTED]):
        _refuse_unrequested(link, {flight.key for flight in flights}, result)
    return values


def _refuse_unrequested(link: Link, asked: Collection[ResourceKey], result: Iterable[Any]) -> None:
    for key in result:
        if key not in asked:
            raise SourceProtocolError(
                f"fetch_many of source {link.name!r} returned {_named(key)}, which was not "
                "requested; return requested keys only"
            )


def _named(key: object) -> str:
    return str(key) if isinstance(key, ResourceKey) else f"a {type(key).__qualname__}"


class CallFacts:
    """What is the same for every key of one answered call.

    `answered_at` is when the answer came, in wall-clock seconds; `rank` is the authority of its
    source, or None if that differs from key to key.
    """

    __slots__ = ("answered_at", "attempts", "context", "latency_ms", "link", "rank")

    def __init__(self, equipment: Equipment, link: Link, attempts: int, latency_ms: float) -> None:
        self.link: Link = link
        self.context: str = link.context
        self.attempts: int = attempts
        self.latency_ms: float = latency_ms
        self.answered_at: float = equipment.clock.now()
        policy: SourceAuthorityPolicy | None = policy_of_all(equipment.authority)
        self.rank: int | None = None if policy is None else policy.rank_for(link.name)


def revision_of(
    equipment: Equipment, flight: Acquisition, value: Any, facts: CallFacts, sealed: Sealed | None
) -> Revision | None:
    """Return the sealed revision of one value, or None if sealing it takes a thread.

    In that case seal the payload there, and call again with what it was `sealed` to.

    Raises:
        SourceProtocolError: the observation lies too far in the future.
        PayloadIsolationError: the value cannot be copied.
    """
    key, link, context = flight.key, facts.link, facts.context
    observed_at = answered_at = facts.answered_at
    metadata: Mapping[str, Any] = EMPTY
    payload, dated = value, False
    if type(value) is SourcePayload:
        payload, metadata = value.value, value.metadata
        if value.observed_at is not None:
            observed_at, dated = value.observed_at, True
            skew = _accepted_skew(equipment, link, key, observed_at, answered_at)
            if skew:
                metadata = {**metadata, "clock_skew_seconds": skew}
    copies = equipment.copies
    if sealed is None:
        sealed = copies.seal_now(payload, context=context)
        if sealed is None:
            return None
    gather, rank = flight.gather, facts.rank
    used = () if gather is None else tuple([r.revision for r in gather.readings.values()])
    return Revision(
        key,
        sealed[0],
        sealed[1],
        link.name,
        observed_at,
        answered_at,
        next_version(),
        facts.latency_ms,
        facts.attempts,
        copies.seal_metadata_now(metadata, context=context) if metadata else EMPTY,
        equipment.authority.rank_for(key, link.name) if rank is None else rank,
        FrozenDict({r.key: r.version for r in used}) if used else EMPTY,
        used,
        dated,
        flight.began,
    )


def _accepted_skew(
    equipment: Equipment, link: Link, key: ResourceKey, observed_at: float, now: float
) -> float:
    try:
        return judge_observation(observed_at, now, equipment.observation)
    except FutureObservation as error:
        raise SourceProtocolError(f"source {link.name!r}, {key}: {error}") from error


def was_future(error: BaseException) -> bool:
    """Whether `error` says that a value was dated too far in the future."""
    return isinstance(error.__cause__, FutureObservation)


# How much time a call has: until its source's timeout, or until nobody wants its answer ----------


class Budgeted:
    """A call to a source, as far as its time is concerned."""

    __slots__ = ()

    link: Link
    work: Work
    equipment: Equipment
    flights: dict[Acquisition, None]

    def cutoff(self) -> float:
        """Return the latest instant, on the loop's clock, at which anyone wants an answer."""
        latest = -math.inf
        for flight in self.flights:
            if flight.cutoff > latest:
                latest = flight.cutoff
        return latest

    def remaining(self) -> float:
        """Return the seconds until nobody wants an answer any more."""
        cutoff = self.cutoff()
        if cutoff == math.inf:
            return cutoff
        remaining = cutoff - asyncio.get_running_loop().time()
        work = self.work
        if work.deadline is not None and work.cutoff == cutoff:
            remaining = min(remaining, work.deadline.remaining())
        return remaining

    def limit(self, began: float) -> float | None:
        """Return when to cut a call off that `began` then, on the loop's clock; None for never."""
        timeout = self.link.timeout_seconds
        cutoff = self.cutoff()
        end = cutoff if timeout is None else min(began + timeout, cutoff)
        return None if end == math.inf else end

    def deadline_comes_first(self, began: float, timeout: float | None) -> bool:
        """Whether a wait that `began` then ends by a deadline rather than by its own timeout."""
        return timeout is None or self.cutoff() < began + timeout

    def of_deadline(self) -> str:
        """Return how long the deadline gave, for messages."""
        deadline = self.work.deadline
        return "" if deadline is None else f" of {deadline.budget_seconds:g} s"

    def refusal(self) -> Exception | None:
        """Return why a blocking call must not be started, as it could outlive its budget."""
        link = self.link
        declared = link.guarantee.transport_timeout_seconds
        if not link.guarantee.protected or declared is None:
            return None
        remaining = self.remaining()
        timeout = math.inf if link.timeout_seconds is None else link.timeout_seconds
        left = min(remaining, timeout)
        if declared < left:
            return None
        by_deadline = remaining < timeout
        report = self.equipment.report
        if report is not None:
            reason = "snapshot_deadline" if by_deadline else "source_timeout"
            keys = [flight.key for flight in self.flights]
            report.transport_budget_rejected(keys, link.name, reason, declared, left)
        kind = SnapshotDeadlineExceededError if by_deadline else SourceTimeoutError
        return kind(
            f"source {link.name!r} was not called: its transport timeout of {declared:g} s does "
            f"not fit into the {max(0.0, left):g} s left"
        )

    def watch_transport(self, elapsed: float, outcome: str) -> None:
        """Count a blocking call that outlived the transport timeout it declares.

        `elapsed` is seconds; `outcome` is completed_late, failed_late or coalestra_timeout.
        """
        link = self.link
        declared = link.guarantee.transport_timeout_seconds
        if not link.guarantee.protected or declared is None:
            return
        equipment = self.equipment
        grace = equipment.transport_grace_seconds
        if outcome != "coalestra_timeout" and elapsed <= declared + grace:
            return
        violations = equipment.counters.transport_violations
        violations[link.name] = violations.get(link.name, 0) + 1
        if equipment.report is not None:
            keys = [flight.key for flight in self.flights]
            equipment.report.transport_violated(keys, link.name, outcome, declared, elapsed, grace)


# The circuits that the keys of one call belong to ------------------------------------------------


class Admission:
    """Asks the circuits of a call for leave, and tells each of them once how the call went.

    A batch may touch several circuits. Its keys are grouped by circuit; the groups of open ones are
    left out of the call. What is told counts only in the turn in which the call was admitted.
    """

    __slots__ = ("_breaker", "_groups", "_policy", "_source", "_turn", "_unasked")

    def __init__(self, breaker: CircuitBreaker, source: str, policy: CircuitBreakerPolicy) -> None:
        self._breaker = breaker
        self._source = source
        self._policy = policy
        self._groups: dict[CircuitIdentity, tuple[int, list[Acquisition]]] = {}
        self._unasked: Sequence[Acquisition] = ()
        self._turn = 0

    def open_now(self, flights: Sequence[Acquisition]) -> list[tuple[Acquisition, Exception]]:
        """Return the flights whose circuit is open, without taking part in any circuit."""
        refused: list[tuple[Acquisition, Exception]] = []
        if self._policy.enabled and len(self._breaker):
            for identity, group in self._by_circuit(flights).items():
                error = self._breaker.refusal(identity, self._policy)
                if error is not None:
                    refused += [(flight, error) for flight in group]
        return refused

    def enter(self, flights: Sequence[Acquisition]) -> list[tuple[Acquisition, Exception]]:
        """Take part in the circuits, just before the call; return the flights that may not.

        A half-open circuit admits a single call, the probe.
        """
        refused: list[tuple[Acquisition, Exception]] = []
        if not self._policy.enabled:
            return refused
        self._turn = self._breaker.turn
        if not len(self._breaker):
            self._unasked = flights  # nobody knows of a circuit that is not at rest
            return refused
        for identity, group in self._by_circuit(flights).items():
            try:
                turn = self._breaker.admit(identity, self._policy)
            except CircuitOpenError as error:
                refused += [(flight, error) for flight in group]
            else:
                self._groups[identity] = turn, group
        return refused

    def close(self, fresh: Set[Acquisition]) -> None:
        """Tell each circuit how its keys fared: one fresh value makes its group a success."""
        whole = self._policy.scope is CircuitScope.SOURCE and not len(self._breaker)
        if whole and not fresh.isdisjoint(self._unasked):
            self._unasked = ()
            return
        for identity, (turn, flights) in self._taken():
            outcome = Outcome.FAILURE if fresh.isdisjoint(flights) else Outcome.SUCCESS
            self._breaker.report(identity, outcome, self._policy, turn)

    def abandon(self) -> None:
        """Tell each circuit that the call was given up: a probe has shown nothing, and reopens."""
        for identity, (turn, _) in self._taken():
            self._breaker.report(identity, Outcome.ABANDONED, self._policy, turn)

    def _by_circuit(
        self, flights: Sequence[Acquisition]
    ) -> dict[CircuitIdentity, list[Acquisition]]:
        if not flights:
            return {}
        if self._policy.scope is CircuitScope.SOURCE:
            return {self._identity(flights[0]): list(flights)}
        groups: dict[CircuitIdentity, list[Acquisition]] = {}
        for flight in flights:
            groups.setdefault(self._identity(flight), []).append(flight)
        return groups

    def _identity(self, flight: Acquisition) -> CircuitIdentity:
        return self._breaker.identity_for(self._source, key=flight.key, scope=self._policy.scope)

    def _taken(self) -> list[tuple[CircuitIdentity, tuple[int, list[Acquisition]]]]:
        unasked = self._by_circuit(self._unasked).items()
        groups = {**self._groups, **{name: (self._turn, group) for name, group in unasked}}
        self._groups, self._unasked = {}, ()
        return list(groups.items())

    def __repr__(self) -> str:
        return f"<Admission {self._source} circuits={len(self._groups)}>"


# What a source answered, handed over key by key --------------------------------------------------


_HANDING_OVER = 4
"""What it weighs beside the copying of the payload, of a `PORTION`: a few times a warm read."""


class StaleSourceData(Exception):
    """A source answered with a value older than the policy's time to live."""


class Receiver(Protocol):
    """Where fresh and outdated values go."""

    @property
    def delivered(self) -> Callable[[Acquisition, Revision, bool], None]:
        """Take a fresh value, and whether its source dated it."""

    def outdated(self, flight: Acquisition, revision: Revision) -> None:
        """Take a value that is too old to count, but may stand in when all else fails."""

    @property
    def hold(self) -> Callable[[Work], None]:
        """Hold back further calls of a unit of work: keys for them are about to be refused."""

    @property
    def release(self) -> Callable[[Work], None]:
        """Take back one `hold`."""


class Answered(Call, Protocol):
    """The attempt whose call was answered."""

    work: Work
    equipment: Any
    flights: dict[Acquisition, None]

    def refuse(self, flight: Acquisition, error: Exception, status: str) -> None:
        """Report that the source has failed for a key."""


class Harvest:
    """Seals the values of one answer and hands them over, without holding the loop for long."""

    __slots__ = ("_attempt", "_delivered", "_facts", "_receiver", "fresh")

    def __init__(self, attempt: Answered, receiver: Receiver, facts: CallFacts) -> None:
        self._attempt = attempt
        self._receiver = receiver
        self._delivered = receiver.delivered
        self._facts = facts
        self.fresh: set[Acquisition] = set()

    def bring_in_now(self, flight: Acquisition, value: Any) -> bool:
        """Hand over the only value, and return whether that is all; `bring_in` does the rest."""
        if value is OMITTED:
            return False
        return flight.attempt is not self._attempt or self._handed_over(flight, value, None)

    async def bring_in(self, flights: Sequence[Acquisition], values: Sequence[Any]) -> None:
        """Hand over the value of every flight; `fresh` tells which of them were fresh."""
        pairs = zip(flights, values, strict=True)
        omitted = [flight for flight, value in pairs if value is OMITTED]
        if omitted:
            await self._refuse_omitted(omitted)
        attempt = self._attempt
        pace = attempt.equipment.pace
        pace.begin()
        left = PORTION
        for flight, value in zip(flights, values, strict=True):
            if flight.attempt is attempt:
                if not self._handed_over(flight, value, None):
                    await self._seal_in_thread(flight, value)
                left -= _HANDING_OVER
                if flight.offered is not None:
                    left -= flight.offered.seal.weight
                if left <= 0:
                    left = PORTION
                    await pace.keep()

    async def _refuse_omitted(self, flights: Sequence[Acquisition]) -> None:
        """Let the keys that were left out go on, together, to where they are served next."""
        name = self._facts.link.name
        error = SourceUnavailableError(f"source {name!r} left the key out of its answer")
        work = self._attempt.work
        self._receiver.hold(work)
        try:
            pace = self._attempt.equipment.pace
            pace.begin()
            for flight in flights:
                self._attempt.refuse(flight, error, "failure")
                await pace.keep()
        finally:
            self._receiver.release(work)

    async def _seal_in_thread(self, flight: Acquisition, value: Any) -> None:
        payload = value.value if isinstance(value, SourcePayload) else value
        try:
            sealed = await self._attempt.equipment.copies.seal(payload, context=self._facts.context)
        except Exception as error:
            self._refuse(flight, error)
        else:
            if flight.attempt is self._attempt:
                self._handed_over(flight, value, sealed)

    def _refuse(self, flight: Acquisition, error: Exception) -> None:
        future = was_future(error)
        self._attempt.work.record.future_timestamp_rejections += future
        self._attempt.refuse(flight, error, "invalid_timestamp" if future else "failure")

    def _handed_over(self, flight: Acquisition, value: Any, sealed: Sealed | None) -> bool:
        """Report one value; False if sealing it takes a thread."""
        attempt = self._attempt
        try:
            revision = revision_of(attempt.equipment, flight, value, self._facts, sealed)
        except Exception as error:
            self._refuse(flight, error)
            return True
        if revision is None:
            return False
        age = revision.fetched_at - revision.observed_at
        ttl = flight.policy.ttl_seconds
        if age > ttl:
            self._receiver.outdated(flight, revision)
            text = f"the value is {age:g} s old, the policy allows {ttl:g} s"
            attempt.refuse(flight, StaleSourceData(text), "stale")
            return True
        del attempt.flights[flight]
        flight.attempt = None
        self.fresh.add(flight)
        dated = type(value) is SourcePayload and value.observed_at is not None
        self._delivered(flight, revision, dated)
        return True

    def __repr__(self) -> str:
        return f"<Harvest of source {self._facts.link.name} fresh={len(self.fresh)}>"


# One try of a call: capacity, budget, the call itself, and the instant that cuts it off ----------


_BATCH, _DERIVED = SourceKind.BATCH, SourceKind.DERIVED


class Shift:
    """A worker's time at a lane, and its task. `gone`: the lane has stopped counting on it."""

    __slots__ = ("busy", "gone", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = asyncio.current_task()
        self.busy: bool = False
        self.gone: bool = False


class Caller(Protocol):
    """The attempt that a try belongs to."""

    link: Link
    work: Work
    equipment: Equipment
    flights: dict[Acquisition, None]

    def cutoff(self) -> float:
        """Return the latest instant, on the loop's clock, at which anyone wants an answer."""

    def limit(self, began: float) -> float | None:
        """Return when to cut a call off that `began` then, on the loop's clock."""

    def deadline_comes_first(self, began: float, timeout: float | None) -> bool:
        """Whether a wait that `began` then ends by a deadline rather than by its own timeout."""

    def of_deadline(self) -> str:
        """Return how long the deadline gave, for messages."""

    def refusal(self) -> Exception | None:
        """Return why a blocking call must not be started, as it could outlive its budget."""

    def watch_transport(self, elapsed: float, outcome: str) -> None:
        """Count a blocking call that outlived the transport timeout it declares."""

    def begin(self) -> bool:
        """Take part in the circuits and count the try; False if no key may be called for."""

    def failed(self, this: Try, error: Exception) -> None:
        """Learn that the source was called and failed."""

    def skipped(self, error: Exception) -> None:
        """Learn that the source could not be called."""

    def written_off(self, shift: Shift) -> None:
        """Learn that the worker may take its time to end."""


class Try:
    """One try to call a source for the flights of an attempt.

    `over` is set the moment the outcome is known, which may be before the source has ended.
    """

    __slots__ = (
        "_caller",
        "_cut",
        "_patience",
        "_shift",
        "began",
        "calling",
        "inputs",
        "over",
        "ticks",
    )

    def __init__(self, caller: Caller, shift: Shift) -> None:
        self._caller = caller
        self._shift = shift
        self._cut: CutOff | None = None
        self._patience = math.inf
        self.inputs: tuple[Any, ...] = ()
        self.over: bool = False
        self.calling: bool = False
        self.began: float = math.nan
        self.ticks: float = math.nan

    @property
    def bounded(self) -> bool:
        """Whether the running call ends by itself at some instant."""
        return self.calling and self._caller.limit(self.began) is not None

    @property
    def elapsed_seconds(self) -> float:
        """How long the call has been running, on the builder's clock."""
        return self._caller.equipment.clock.monotonic() - self.ticks

    def extend(self) -> None:
        """Move the instant that cuts the call off: some key is wanted for longer."""
        if self._cut is not None:
            self._cut.move(self._caller.limit(self.began) if self.calling else self._queue_end())

    def abandon(self) -> Exception | None:
        """End the try, as nobody wants its answer; return the error if it waited too long."""
        self.over = True
        queued = self._cut is not None and not self.calling
        if self._shift.task is not None and self._shift.task is not asyncio.current_task():
            self._shift.task.cancel()
        if queued and self._caller.cutoff() <= asyncio.get_running_loop().time():
            return self._late_in_queue()
        return None

    async def answer(self) -> tuple[Any] | None:
        """Return what the source answered, or None if the caller has been told of a failure."""
        caller = self._caller
        lease = caller.equipment.capacity.try_acquire(caller.link.name) or await self._slot()
        if lease is None:
            return None
        try:
            refusal = caller.refusal()
            if refusal is not None:
                caller.skipped(refusal)
            elif caller.begin():
                return await self._call()
            return None
        finally:
            lease.release()

    # Capacity ---------------------------------------------------------------------------------

    async def _slot(self) -> CapacityLease | None:
        """Wait for a lease on the capacity of the source; return None when that took too long."""
        capacity = self._caller.equipment.capacity
        name = self._caller.link.name
        began = asyncio.get_running_loop().time()
        timeout = self._caller.link.queue_timeout_seconds
        self._patience = math.inf if timeout is None else began + timeout
        try:
            with CutOff(self._queue_end()) as self._cut:
                return await capacity.acquire(name)
        except CutOffExpired:
            late = self._caller.cutoff() < self._patience
            self._caller.skipped(self._late_in_queue() if late else self._impatient(timeout))
            return None
        finally:
            self._cut = None
            self._report_wait(began)

    def _queue_end(self) -> float | None:
        end = min(self._patience, self._caller.cutoff())
        return None if end == math.inf else end

    def _report_wait(self, began: float) -> None:
        report = self._caller.equipment.report
        if report is not None:
            waited = asyncio.get_running_loop().time() - began
            report.capacity_wait(self._caller.link.name, waited * 1000)

    def _late_in_queue(self) -> Exception:
        self._report_timeout("snapshot_deadline")
        return SnapshotDeadlineExceededError(
            f"the deadline{self._caller.of_deadline()} passed while waiting for capacity of "
            f"source {self._caller.link.name!r}; raise max_concurrency or the deadline"
        )

    def _impatient(self, timeout: float | None) -> Exception:
        self._caller.equipment.counters.queue_timeouts += 1
        self._report_timeout("queue_timeout")
        return SourceQueueTimeoutError(
            f"waited {timeout:g} s for capacity of source {self._caller.link.name!r}; raise its "
            "max_concurrency, the builder's max_concurrency, or queue_timeout_seconds"
        )

    def _report_timeout(self, reason: str) -> None:
        report = self._caller.equipment.report
        if report is not None:
            report.capacity_timeout(self._caller.link.name, reason)

    # The call ---------------------------------------------------------------------------------

    async def _call(self) -> tuple[Any] | None:
        caller = self._caller
        self.began = asyncio.get_running_loop().time()
        self.ticks = caller.equipment.clock.monotonic()
        self.calling = True
        watched: Watched | None = None
        end = self._caller.limit(self.began)
        try:
            if end is None:
                watched = Watched(caller.link, self._invoke())
                answer = await watched
            else:
                with CutOff(end, self._expire) as self._cut:
                    watched = Watched(caller.link, self._invoke())
                    answer = await watched
        except CutOffExpired:
            return None
        except asyncio.CancelledError:
            if self.over or (watched is not None and watched.interrupted):
                raise
            self._fail(SourceUnavailableError(f"source {caller.link.name!r} cancelled itself"))
            return None
        except Exception as error:
            self._fail(error)
            return None
        finally:
            self.calling = False
            self._cut = None
        if self.over:
            return None
        if caller.link.guarantee.protected:
            caller.watch_transport(self.elapsed_seconds, "completed_late")
        return (answer,)

    def _invoke(self) -> Any:
        caller = self._caller
        link, context = caller.link, caller.work.context
        if link.kind is _BATCH:
            keys = tuple([flight.key for flight in caller.flights])
            return link.source.fetch_many(keys, context)
        key = next(iter(caller.flights)).key
        if link.kind is _DERIVED:
            return link.source.derive(key, *self.inputs, context)
        return link.source.fetch(key, context)

    def _fail(self, error: Exception) -> None:
        if not self.over:
            self.over = True
            self._caller.watch_transport(self.elapsed_seconds, "failed_late")
            self._caller.failed(self, error)

    def _expire(self) -> None:
        """Decide at once what a call that ran out of time comes to; its worker may take longer."""
        if self.over:
            return
        self.over = True
        caller = self._caller
        timeout = caller.link.timeout_seconds
        by_deadline = self._caller.deadline_comes_first(self.began, timeout)
        self._caller.watch_transport(self.elapsed_seconds, "coalestra_timeout")
        caller.written_off(self._shift)
        name = caller.link.name
        if by_deadline:
            error: Exception = SnapshotDeadlineExceededError(
                f"the deadline{self._caller.of_deadline()} passed while source {name!r} was "
                "running; raise the deadline or lower the source timeout"
            )
        else:
            caller.equipment.counters.source_timeouts += 1
            text = f"source {name!r} did not answer within {caller.link.timeout_seconds:g} s"
            error = SourceTimeoutError(text)
        caller.failed(self, error)

    def __repr__(self) -> str:
        return f"<Try {self._caller.link.name} calling={self.calling} over={self.over}>"


# One call to one source for one or many keys: circuits, tries, and what becomes of each key ------


_NOBODY: frozenset[Acquisition] = frozenset()


class Seat(Protocol):
    """What an attempt needs of the lane that it stands in."""

    link: Link
    work: Work
    tally: Tally

    def again(self, attempt: Any) -> None:
        """Queue the attempt for another try."""

    def write_off(self, shift: Shift) -> None:
        """Stop counting on the worker of a call that was cut off."""


class Desk(Receiver, Protocol):
    """Where an attempt reports what has become of its keys."""

    equipment: Equipment

    def refused(self, flight: Acquisition, error: Exception, status: str, attempts: int) -> None:
        """Take note that the source failed for a key."""

    def inputs(self, flight: Acquisition) -> Awaitable[Snapshot]:
        """Return the dependency snapshot of a derived key."""

    def inputs_now(self, flight: Acquisition) -> Snapshot | None:
        """Return it without waiting, or None if that cannot be."""


class Attempt(Budgeted):
    """A call that carries one key, or a batch of keys, to one source, retries included."""

    __slots__ = (
        "_admission",
        "_desk",
        "_interest",
        "_retry",
        "_seat",
        "_tally",
        "_try",
        "equipment",
        "flights",
        "link",
        "policy",
        "tries",
        "work",
    )

    def __init__(self, desk: Desk, seat: Seat, flights: Sequence[Acquisition]) -> None:
        self._desk = desk
        self._seat = seat
        self.link: Link = seat.link
        self.work: Work = seat.work
        self.equipment: Equipment = desk.equipment
        self.flights: dict[Acquisition, None] = dict.fromkeys(flights)
        self._interest = Interest(self.flights)
        self.policy: SourceResiliencePolicy = desk.equipment.resilience.resolve(
            self.link.name, declared=self.link.declared_resilience
        )
        self._admission = Admission(desk.equipment.breaker, self.link.name, self.policy.circuit)
        self._tally = seat.tally
        self._retry: asyncio.TimerHandle | None = None
        self._try: Try | None = None
        self.tries: int = 0
        for flight in self.flights:
            flight.attempt = self

    # What flights tell the call ---------------------------------------------------------------

    def extend(self) -> None:
        """Give the call more time: a flight of it is now wanted for longer."""
        if self._try is not None:
            self._try.extend()

    def unwanted(self) -> None:
        """End the call if nobody waits for any of its keys and nothing else bounds it.

        A running call that has a bound goes on to it: its value is worth caching, and may still
        find a taker.
        """
        if self._interest.alive:
            return
        if self._try is not None and self._try.bounded:
            return
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        this, self._try = self._try, None
        late = None if this is None else this.abandon()
        self._admission.abandon()
        left = f"nobody waits for source {self.link.name!r} any more"
        self._end(late or SourceUnavailableError(left))

    # One try after the other ------------------------------------------------------------------

    async def run(self, shift: Shift) -> None:
        """Make one try and report on it; return when the source has really ended."""
        self._retry = None
        if not self.flights:
            return
        this = self._try = Try(self, shift)
        try:
            if not self.tries and not self._pass_open_circuits():
                return
            if self.link.kind is SourceKind.DERIVED and not await self._prepare(this):
                return
            answer = await this.answer()
            if answer is not None:
                await self._take(answer[0], this.elapsed_seconds * 1000)
        except asyncio.CancelledError:
            if not this.over:
                this.over = True
                self._admission.abandon()
                self._end(
                    SourceUnavailableError(f"source {self.link.name!r} was cancelled from outside")
                )
                raise
            _absorb_cancellation()
        except Exception as error:
            if not this.over:
                self.skipped(error)
        finally:
            if self._try is this:
                self._try = None

    async def _prepare(self, this: Try) -> bool:
        """Give a derivation its inputs; False if they cannot be had."""
        flight = next(iter(self.flights))
        try:
            inputs = self._desk.inputs_now(flight) or await self._desk.inputs(flight)
        except Exception as error:
            self.skipped(error)
            return False
        this.inputs = (inputs,)
        return True

    def begin(self) -> bool:
        """Take part in the circuits and count the try; False if no key may be called for."""
        if not self.tries:
            for flight, error in self._admission.enter(tuple(self.flights)):
                self.refuse(flight, error, "circuit_open")
            if not self.flights:
                return False
            self._tally.called(len(self.flights))
        self.tries += 1
        number = next_number()
        for flight in self.flights:
            flight.began = number
        return True

    def _pass_open_circuits(self) -> bool:
        """Refuse the keys whose circuit is open now, so that they need not wait for capacity."""
        for flight, error in self._admission.open_now(tuple(self.flights)):
            self.refuse(flight, error, "circuit_open")
        return bool(self.flights)

    # How it ends ------------------------------------------------------------------------------

    def written_off(self, shift: Shift) -> None:
        """Let the lane take on another worker in place of this one."""
        self._seat.write_off(shift)

    def failed(self, this: Try, error: Exception) -> None:
        """Decide whether a failed try is followed by another, and arrange for it."""
        if self._try is this:
            self._try = None
        loop = asyncio.get_running_loop()
        self._tally.took((loop.time() - this.began) * 1000)
        retry = self.policy.retry
        if self._interest.alive and self.tries < retry.max_attempts and retryable(error):
            delay = retry.delay_for_attempt(self.tries)
            if delay < self.remaining():
                self.work.record.retries += 1
                self._retry = loop.call_later(delay, self._seat.again, self)
                return
        if isinstance(error, SnapshotDeadlineExceededError):
            self._admission.abandon()
        else:
            self._admission.close(_NOBODY)
        self._end(error)

    def skipped(self, error: Exception) -> None:
        """End the call because the source could not be called, now or again.

        Circuits hear of tries that were made; before the first one they have not been entered.
        """
        self._admission.close(_NOBODY)
        self._end(error)

    def _end(self, error: Exception) -> None:
        """Report one failure for every key of the call."""
        link = self.link
        link.failed_at, link.last_error = self.equipment.clock.monotonic(), type(error).__name__
        status = "failure"
        if isinstance(error, SnapshotDeadlineExceededError):
            now = asyncio.get_running_loop().time()
            ahead = any(flight.cutoff > now for flight in self.flights)
            self.equipment.counters.deadlines_exceeded += ahead  # if not, the waiters have counted
            status = "deadline_exceeded"
        elif isinstance(error, SourceQueueTimeoutError):
            status = "queue_timeout"
        self._tally.batch_ended(status)
        for flight in tuple(self.flights):
            self.refuse(flight, error, "failure")

    def refuse(self, flight: Acquisition, error: Exception, status: str) -> None:
        """Report that the source has failed for a key."""
        self.flights.pop(flight, None)
        if flight.attempt is self:
            flight.attempt = None
            self._desk.refused(flight, error, status, self.tries)

    async def _take(self, answer: Any, latency_ms: float) -> None:
        self._tally.took(latency_ms)
        flights = tuple(self.flights)
        try:
            values = values_of(self.link, flights, answer)
        except Exception as error:
            self._admission.close(_NOBODY)
            self._end(error)
            return
        self._tally.batch_ended("success")
        self.link.succeeded_at = self.equipment.clock.monotonic()
        facts = CallFacts(self.equipment, self.link, self.tries, latency_ms)
        harvest = Harvest(self, self._desk, facts)
        if len(values) > 1 or not harvest.bring_in_now(flights[0], values[0]):
            await harvest.bring_in(flights, values)
        self._admission.close(harvest.fresh)

    def __repr__(self) -> str:
        return f"<Attempt {self.link.name} keys={len(self.flights)} tries={self.tries}>"


def _absorb_cancellation() -> None:
    """Forget a cancellation that the engine itself asked for, so that the worker can go on."""
    uncancel = getattr(asyncio.current_task(), "uncancel", None)
    if uncancel is not None:
        uncancel()


# The calls of one unit of work to one source: a queue, and a bounded number of workers -----------


_CALLS_BETWEEN_LOOKS = 8
"""Calls that never wait would otherwise all be made in one step of the event loop."""


class Lane:
    """Turns ready flights into attempts and works them off, at most `limit` side by side.

    A worker is a task in the context of the work, so that a source sees the context variables of
    the build that called it. A worker whose call was cut off but does not end is written off:
    another takes its place, while the old one keeps its slot until it really ends.
    """

    __slots__ = (
        "_busy",
        "_make",
        "_pace",
        "_queue",
        "_tasks",
        "_workers",
        "limit",
        "link",
        "tally",
        "work",
    )

    def __init__(
        self,
        work: Work,
        link: Link,
        limit: int,
        make: Callable[[Lane, Sequence[Acquisition]], Attempt],
        equipment: Equipment,
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self.work: Work = work
        self.link: Link = link
        self.limit: int = limit
        self.tally: Tally = Tally(link, work.record, equipment.report)
        self._pace = equipment.pace
        self._make = make
        self._tasks = tasks
        self._queue: deque[Attempt] = deque()
        self._workers = 0
        self._busy = 0

    def add(self, flights: Sequence[Acquisition]) -> None:
        """Queue calls for the flights: for a batch source in chunks of its size, else one each."""
        size = 1
        if self.link.kind is SourceKind.BATCH:
            size = self.link.max_batch_size or len(flights)
            if len(flights) > size:
                self.work.record.batch_chunks += -(-len(flights) // size)
        parts = [flights[start : start + size] for start in range(0, len(flights), size)]
        self._queue.extend([self._make(self, part) for part in parts])
        self._staff()

    def again(self, attempt: Attempt) -> None:
        """Queue a call once more, for its next try."""
        self._queue.append(attempt)
        self._staff()

    def write_off(self, shift: Shift) -> None:
        """Count a worker as gone: its call was cut off and may take its time to end."""
        if not shift.gone:
            shift.gone = True
            self._busy -= 1
            self._workers -= 1
            self._staff()

    def _staff(self) -> None:
        # Looked at anew each time: an eager task may have worked the queue off by now.
        while self._workers < min(self.limit, self._busy + len(self._queue)):
            self._workers += 1
            # A copy, as a context cannot be entered twice, and an eager task may come back here.
            task = self.work.variables.copy().run(self._start)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _start(self) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        return loop.create_task(self._serve(), name=f"coalestra {self.link.name}")

    async def _serve(self) -> None:
        shift = Shift()
        pace = self._pace
        pace.begin()
        left = _CALLS_BETWEEN_LOOKS
        try:
            while self._queue and not shift.gone:
                shift.busy = True
                self._busy += 1
                await self._queue.popleft().run(shift)
                if not shift.gone:
                    shift.busy = False
                    self._busy -= 1
                    left -= 1
                    if not left:
                        left = _CALLS_BETWEEN_LOOKS
                        await pace.keep()
        finally:
            if not shift.gone:
                shift.gone = True
                self._busy -= shift.busy
                self._workers -= 1
                if self._queue:
                    self._staff()

    def __repr__(self) -> str:
        return f"<Lane {self.link.name} queued={len(self._queue)} workers={self._workers}>"


# Dispatch: ready keys are grouped by source and handed to the lanes of their unit of work --------


_READY = Phase.READY
_CALLING = Phase.CALLING


class Dispatch:
    """Makes the keys that become ready for one source in one step travel together.

    While a unit of work is on hold, more of its keys are on their way, and none is sent.
    """

    def __init__(self, desk: Desk, refused: Callable[[Acquisition, Exception], None]) -> None:
        self._desk = desk
        self._refused = refused
        self.workers: set[asyncio.Task[Any]] = set()

    def hold(self, work: Work) -> None:
        """Hold back the calls of a unit of work: more keys for them are on their way."""
        work.planning += 1

    def release(self, work: Work) -> None:
        """Take back one `hold`; after the last one the calls are made, at the end of this step."""
        work.planning -= 1
        if not work.planning and work.ready:
            self._flush_soon(work)

    def ready(self, flight: Acquisition) -> None:
        """Group a flight with the others that are ready for the same source in this step."""
        work = flight.sponsor
        if work.closed or work.struck:
            work = flight.living_sponsor()
        link = flight.link
        if link is None:
            return
        flight.phase = _READY
        group = work.ready.get(link.index)
        if group is None:
            group = work.ready[link.index] = []
        group.append(flight)
        if not work.flushing:
            self._flush_soon(work)

    def _flush_soon(self, work: Work) -> None:
        if not work.flushing:
            work.flushing = True
            asyncio.get_running_loop().call_soon(self._flush, work)

    def _flush(self, work: Work) -> None:
        """Hand the groups to their lanes, unless more keys for them are on their way."""
        work.flushing = False
        if work.planning:
            return
        ready, work.ready = work.ready, {}
        for index, flights in ready.items():
            waiting = [flight for flight in flights if flight.phase is _READY]
            for flight in waiting:
                flight.phase = _CALLING
            try:
                self._lane(work, index).add(waiting)
            except Exception as error:
                for flight in waiting:
                    self._refused(flight, error)

    def _lane(self, work: Work, index: int) -> Intake:
        lane = work.lanes.get(index)
        if lane is None:
            equipment = self._desk.equipment
            link = equipment.chains.links[index]
            limit = equipment.max_pending_tasks
            if link.kind is SourceKind.BATCH:
                limit = equipment.max_concurrency
            work.variables.run(current_threads.set, equipment.threads)
            lane = work.lanes[index] = Lane(
                work, link, limit, self._attempt, equipment, self.workers
            )
        return lane

    def _attempt(self, lane: Lane, flights: Sequence[Acquisition]) -> Attempt:
        return Attempt(self._desk, lane, flights)

    def __repr__(self) -> str:
        return f"<Dispatch workers={len(self.workers)}>"
