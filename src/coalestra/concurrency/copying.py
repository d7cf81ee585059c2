"""Payload isolation: copies with the meaning of ``copy.deepcopy``, made the cheapest safe way.

Inside the library a payload is *sealed*: one private copy, together with the knowledge of how to
open it, that is to make one more copy for a reader. What is brief is sealed and opened here and
now, the rest in threads. Laws:

1. Whatever a copier raises, of whatever type, is the failure of that payload: a
   `PayloadIsolationError` that names its type. What ends a program is passed on as well.
2. At most ``max_concurrency`` copies of a component are in threads at a time; the others wait,
   first come first served.
3. Whoever stops waiting for a copy leaves at once. The slot stays taken until the thread has ended,
   since a thread cannot be stopped; it is given back in the callback of that end, so that nothing
   hangs on a task that somebody could cancel. Each event loop has slots of its own: it neither
   waits for those of one that was closed, nor is woken from their threads.
4. After ``close`` nothing starts; waiters are told so, and ``drain`` waits for what is running. Who
   waits for what is running longer than that is told so, too.
5. Every copy that was started is active, or counts once as completed or as failed.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from coalestra._endings import pass_on
from coalestra._lockfree import Changes
from coalestra.concurrency import sealing
from coalestra.concurrency.capacity import WaitQueue, can_be_woken
from coalestra.concurrency.deadline import CutOff, CutOffExpired, Deadline
from coalestra.concurrency.pace import Pace, side_by_side
from coalestra.concurrency.sealing import FLAT, Seal, Sealed, seal_anyhow, seal_flat
from coalestra.concurrency.threads import Job, WorkerThreads, threads_of_context
from coalestra.core import errors
from coalestra.core.errors import PayloadCopySubsystemClosedError, PayloadIsolationError
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.health import PayloadCopyHealth
from coalestra.core.validation import flag, integer, number, plain_function
from coalestra.core.values import SnapshotValue

__all__ = ["PayloadCopier", "PayloadIsolator", "deepcopy_payload"]


T = TypeVar("T")

PayloadCopier = Callable[[Any], Any]
"""Returns a copy of a payload that shares nothing mutable with it."""


def deepcopy_payload(value: T) -> T:
    """Return what ``copy.deepcopy(value)`` returns, only sooner; immutable objects stay the same.

    Raises whatever the classes inside ``value`` raise on being copied.
    """
    copied: T = sealing.copy_anyhow(value)
    return copied


def isolated(copier: Callable[[Any], T], value: Any, context: str) -> T:
    """Return ``copier(value)``; whatever it raises is the cause of a `PayloadIsolationError`."""
    try:
        return copier(value)
    except BaseException as error:
        pass_on(error)
        raise not_isolated(value, context, error) from error


def not_isolated(value: Any, context: str, cause: BaseException) -> PayloadIsolationError:
    """Return the error for a payload that could not be copied."""
    named = type(value).__qualname__
    return PayloadIsolationError(context=context, value_type=named, cause=cause)


class PayloadIsolator:
    """Copies payloads and snapshot values at once, where they are.

    What cannot be copied raises `PayloadIsolationError`, which names its type and the ``context``.

    Args:
        copier: replaces the default copier, for payloads (metadata is always deep-copied).
    """

    def __init__(self, copier: PayloadCopier | None = None) -> None:
        plain_function("copier", copier, optional=True)
        self._copier: PayloadCopier = deepcopy_payload if copier is None else copier

    def __repr__(self) -> str:
        return f"PayloadIsolator({'' if self.uses_default_copier else repr(self._copier)})"

    @property
    def uses_default_copier(self) -> bool:
        """Whether payloads are copied as ``copy.deepcopy`` would."""
        return self._copier is deepcopy_payload

    def copy(self, value: T, *, context: str) -> T:
        """Return a copy of a payload."""
        copied: T = isolated(self._copier, value, context)
        return copied

    def copy_metadata(self, metadata: Mapping[str, Any], *, context: str) -> dict[str, Any]:
        """Return a deep copy of metadata as a new dictionary."""
        return isolated(deepcopy_payload, dict(metadata), context)

    def clone_snapshot_value(
        self,
        value: SnapshotValue[T],
        *,
        context: str,
        fetched_at: float | None = None,
        age_seconds: float | None = None,
        stale: bool | None = None,
        from_cache: bool | None = None,
        latency_ms: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SnapshotValue[T]:
        """Return an isolated copy of a value, with the given facts in place of its own."""
        changes: dict[str, Any] = {
            "fetched_at": fetched_at,
            "age_seconds": age_seconds,
            "stale": stale,
            "from_cache": from_cache,
            "latency_ms": latency_ms,
        }
        kept = value.metadata if metadata is None else metadata
        return dataclasses.replace(
            value,
            value=self.copy(value.value, context=context),
            metadata=self.copy_metadata(kept, context=context),
            **{name: fact for name, fact in changes.items() if fact is not None},
        )


OFFLOADED: Final = object()
"""What ``PayloadCopies.open_now`` returns for a payload that must be opened with ``await``."""

_SHARED = Seal.SHARED


class SealedMetadata(FrozenDict[str, Any]):
    """Metadata kept by the library that holds something mutable: each reader needs a copy."""

    __slots__ = ()


@dataclasses.dataclass(slots=True)
class _Spell:
    """How often something lasted how long, in milliseconds."""

    count: int = 0
    total_ms: float = 0.0
    longest_ms: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more, of so many seconds."""
        milliseconds = seconds * 1000.0
        self.count += 1
        self.total_ms += milliseconds
        self.longest_ms = max(self.longest_ms, milliseconds)

    @property
    def average_ms(self) -> float:
        """The mean; 0.0 while there is none."""
        return self.total_ms / self.count if self.count else 0.0


class PayloadCopies:
    """All copying of one component: what is brief happens at once, the rest in bounded threads.

    What cannot be copied raises `PayloadIsolationError`, which names its type and the ``context``,
    and whatever needs a copy after ``close`` raises `PayloadCopySubsystemClosedError`.

    Args:
        component: the name in errors and health.
        copier: replaces the default copier, for every payload (not for metadata).
        run_in_thread: True always, False never, None where it takes long (with a ``copier``
            of one's own: never). Immutable payloads need no copy and so no thread.
        max_concurrency: the most copies in threads at a time.
        threads: the threads to use; by default those of whoever asks for a copy.

    Attributes:
        uses_default_copier: False if the application brought its own.
        completed: how many have been made without a thread; whoever opens a trifle counts it.
        closed: whether new copies are refused.
        is_direct: whether what is brief is copied here and now, as the library does it.
    """

    def __init__(
        self,
        component: str,
        *,
        copier: PayloadCopier | None = None,
        run_in_thread: bool | None = None,
        max_concurrency: int = 4,
        threads: WorkerThreads | None = None,
    ) -> None:
        plain_function("payload_copier", copier, optional=True)
        flag("run_payload_copies_in_thread", run_in_thread, optional=True)
        self.component: str = component
        self.max_concurrency: int = integer("max_copy_concurrency", max_concurrency, minimum=1)
        self.uses_default_copier: bool = copier is None or copier is deepcopy_payload
        self.run_in_thread: bool = (
            self.uses_default_copier if run_in_thread is None else run_in_thread
        )
        self.closed: bool = False
        self._copier: PayloadCopier | None = None
        self._sealer: Callable[[Any], Sealed] = seal_anyhow
        if copier is not None and not self.uses_default_copier:
            seal, self._copier = Seal("custom", copier, brief=not self.run_in_thread), copier
            self._sealer = lambda value: (copier(value), seal)
        self._always_threads = run_in_thread is True
        self.is_direct: bool = self.uses_default_copier and not self._always_threads
        self._threads = threads
        self._slots = WaitQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._taken: dict[object, tuple[WaitQueue, str]] = {}
        self._jobs: dict[Job[Any], None] = {}
        self._changes = Changes()
        self._waits = _Spell()
        self._durations = _Spell()
        self.completed: int = 0
        self._failed = 0
        self._timeouts = self._capacity_timeouts = 0
        self._peak_active = self._peak_waiting = 0
        self._shutdown_timeouts = self._active_at_timeout = 0

    @property
    def active(self) -> int:
        """How many copies are in threads at this moment."""
        for job in self._jobs.copy():
            job.hear()
        return len(self._jobs)

    def __repr__(self) -> str:
        kind = "default" if self.uses_default_copier else "custom"
        return (
            f"<PayloadCopies {self.component!r} copier={kind} "
            f"{'closed' if self.closed else 'open'} active={self.active}/{self.max_concurrency} "
            f"waiting={len(self._slots)}>"
        )

    # Here and now -------------------------------------------------------------------------------

    def seal_now(self, value: Any, *, context: str) -> Sealed | None:
        """Seal a payload without waiting; None if it takes ``await seal(...)``.

        Closed, it refuses immutable payloads too.
        """
        if self.is_direct:
            sealed = seal_flat(value)
            if sealed is not None:
                if sealed[1] is not _SHARED:
                    self.completed += 1
                return sealed
        self._require_open()
        if self.run_in_thread and self._copier is not None:
            return None
        try:
            sealed = (sealing.seal_briefly if self.run_in_thread else self._sealer)(value)
        except BaseException as error:
            raise self._failure(value, context, error) from error
        if sealed is None or (self._always_threads and sealed[1] is not _SHARED):
            return None
        self.completed += sealed[1] is not _SHARED
        return sealed

    def open_now(self, payload: Any, seal: Seal, *, context: str) -> Any:
        """Return one reader's copy of a sealed payload; `OFFLOADED` if it takes ``await open``."""
        if seal is _SHARED:
            return payload
        if self.is_direct and seal.brief:
            try:
                copied = seal.opener(payload)
            except BaseException as error:
                raise self._failure(payload, context, error) from error
            self.completed += 1
            return copied
        self._require_open()
        if self._always_threads or (self.run_in_thread and not seal.brief):
            return OFFLOADED
        return self._copied(self._copier or seal.opener, payload, context)

    def open_here(self, payload: Any, seal: Seal, *, context: str) -> Any:
        """Return one reader's copy of a sealed payload without a thread, however long it takes."""
        if seal is _SHARED:
            return payload
        self._require_open()
        return self._copied(self._copier or seal.opener, payload, context)

    def seal_metadata_now(
        self, metadata: Mapping[str, Any], *, context: str
    ) -> FrozenDict[str, Any]:
        """Return metadata to keep. It is small by nature, so this never takes a thread."""
        if not metadata:
            return EMPTY
        payload, seal = self._copied(seal_anyhow, dict(metadata), f"metadata of {context}")
        return FrozenDict(payload) if seal is FLAT[dict] else SealedMetadata(payload)

    def open_metadata_now(
        self, metadata: FrozenDict[str, Any], *, context: str
    ) -> FrozenDict[str, Any]:
        """Return one reader's copy of metadata that ``seal_metadata_now`` returned."""
        if type(metadata) is FrozenDict:
            return metadata
        opened = self._copied(deepcopy_payload, dict(metadata), f"metadata of {context}")
        return FrozenDict(opened)

    def _copied(self, copier: Callable[[Any], T], value: Any, context: str) -> T:
        try:
            copied = copier(value)
        except BaseException as error:
            raise self._failure(value, context, error) from error
        self.completed += 1
        return copied

    def _failure(self, value: Any, context: str, error: BaseException) -> PayloadIsolationError:
        self._failed += 1
        pass_on(error)
        return not_isolated(value, context, error)

    async def each(
        self, several: Collection[T], copy: Callable[[T], Awaitable[object]], pace: Pace
    ) -> None:
        """Copy several things, begun in order; those that take a thread, side by side."""

        async def one(each: T) -> None:
            await copy(each)
            await pace.keep()

        limit = self.max_concurrency if self.run_in_thread else 1
        if limit > 1 and len(several) > 1:
            await side_by_side(several, one, limit)
        else:
            for each in several:
                await one(each)

    # In threads ---------------------------------------------------------------------------------

    async def seal(self, value: Any, *, context: str) -> Sealed:
        """Seal a payload in a thread: one that ``seal_now`` returned None for."""
        return await self._in_thread(self._sealer, value, context, None)

    async def open(
        self, payload: Any, seal: Seal, *, context: str, deadline: Deadline | None = None
    ) -> Any:
        """Open a payload in a thread: one that ``open_now`` has not opened.

        Raises `SnapshotDeadlineExceededError` if ``deadline`` comes first.
        """
        return await self._in_thread(self._copier or seal.opener, payload, context, deadline)

    async def _in_thread(
        self, copier: Callable[[Any], T], value: Any, context: str, deadline: Deadline | None
    ) -> T:
        self._require_open()
        give_back = None
        try:
            if deadline is not None and deadline.expired:
                raise CutOffExpired(deadline.loop_time)
            with CutOff(None) if deadline is None else deadline.cut_off():
                give_back = await self._take_slot(context)
                job = await self._ended(partial(copier, value), give_back)
        except CutOffExpired:
            assert deadline is not None
            raise self._late(deadline, has_slot=give_back is not None) from None
        try:
            return job.outcome()
        except BaseException as error:
            raise not_isolated(value, context, error) from error

    async def _take_slot(self, context: str) -> Callable[[], None]:
        """Take a slot; return what gives it back, once however often it is called."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._slots = loop, WaitQueue()
        slots, slot = self._slots, object()
        give_back, taken = partial(self._give_back, slot), (slots, context)
        if len(self._holders()) < self.max_concurrency:
            self._taken[slot] = taken
        else:
            began = loop.time()
            self._peak_waiting = max(self._peak_waiting, len(slots) + 1)
            try:
                await slots.wait(give_back, partial(self._taken.setdefault, slot, taken))
            finally:
                self._waits.add(loop.time() - began)
            if self.closed:
                give_back()
                self._require_open()
        self._peak_active = max(self._peak_active, len(self._taken))
        return give_back

    def _give_back(self, slot: object) -> None:
        """Hand a slot on, or tell those who wait for the end; in a thread if its loop is closed."""
        taken = self._taken.pop(slot, None)
        if taken is not None and not taken[0].wake_next():
            self._changes.tell()

    def _holders(self) -> list[str]:
        return [context for slots, context in self._taken.copy().values() if slots is self._slots]

    def standing(self, context: str) -> str:
        """How a copy under way for `context` stands, in words: made, or waiting for others."""
        holders = self._holders()
        waits = context not in holders and len(holders) >= self.max_concurrency
        return self._waiting() if waits else "being copied"

    def _waiting(self) -> str:
        holders = Counter(self._holders()).items()
        held = ", ".join(f"{who!r} ({count})" for who, count in holders)
        return f"waiting for a copy thread, held by {held}"

    async def _ended(self, work: Callable[[], T], give_back: Callable[[], None]) -> Job[T]:
        """Use the slot that was taken for one piece of work, and wait for its end."""
        clock = asyncio.get_running_loop().time
        began = clock()

        def on_end(job: Job[T]) -> None:
            error = job.error
            self._jobs.pop(job, None)
            if error is None:
                self._durations.add(clock() - began)
            else:
                self._failed += 1
            give_back()
            if error is not None:
                pass_on(error)

        try:
            threads = threads_of_context() if self._threads is None else self._threads
            job = threads.start(work, f"copy:{self.component}", on_end, or_here=True)
        except BaseException:
            give_back()
            raise
        if not job.ended.done():
            self._jobs[job] = None
        await job.ended
        return job

    def _late(self, deadline: Deadline, *, has_slot: bool) -> errors.SnapshotDeadlineExceededError:
        self._timeouts += 1
        self._capacity_timeouts += not has_slot
        stood = "being copied" if has_slot else self._waiting()
        return errors.SnapshotDeadlineExceededError(
            f"the deadline of {deadline.budget_seconds:g} seconds passed while a payload of "
            f"component {self.component!r} was {stood}"
        )

    def count_timeouts(self, number: int) -> None:
        """Count copies whose caller has stopped waiting, as its own time was up."""
        self._timeouts += number

    # Health and the end -------------------------------------------------------------------------

    def health(self) -> PayloadCopyHealth:
        """Return the state and the counts, of copies without a thread too."""
        active = self.active
        completed = self.completed + self._durations.count
        return PayloadCopyHealth(
            run_in_thread=self.run_in_thread,
            max_concurrency=self.max_concurrency,
            active_copies=active,
            waiting_for_capacity=len(self._slots),
            peak_active_copies=self._peak_active,
            peak_waiting_for_capacity=self._peak_waiting,
            started_count=completed + self._failed + active,
            completed_count=completed,
            failure_count=self._failed,
            timeout_count=self._timeouts,
            capacity_timeout_count=self._capacity_timeouts,
            capacity_wait_count=self._waits.count,
            average_wait_ms=self._waits.average_ms,
            max_wait_ms=self._waits.longest_ms,
            average_duration_ms=self._durations.average_ms,
            max_duration_ms=self._durations.longest_ms,
            accepting_copies=not self.closed,
            shutdown_started=self.closed,
            shutdown_complete=self.closed and not active,
            shutdown_incomplete=bool(self.closed and active and self._shutdown_timeouts),
            shutdown_timeout_count=self._shutdown_timeouts,
            active_at_last_shutdown_timeout=self._active_at_timeout,
        )

    def close(self) -> None:
        """Refuse new copies, and everybody who still waits for a thread."""
        self.is_direct = False
        self.closed = True
        while self._slots.wake_next(self._closed()):
            pass

    async def aclose(self, timeout_seconds: float | None) -> None:
        """Refuse new copies and wait for running ones, for ``timeout_seconds`` (None: no limit).

        Raises `PayloadCopyShutdownTimeoutError` if some are still running then.
        """
        number("timeout_seconds", timeout_seconds, minimum=0.0, optional=True)
        self.close()
        active = await self.drain(timeout_seconds)
        if active and timeout_seconds is not None:
            raise errors.PayloadCopyShutdownTimeoutError(
                timeout_seconds=timeout_seconds, active_components={self.component: active}
            )

    async def drain(self, timeout_seconds: float | None) -> int:
        """Wait until no copy runs, for ``timeout_seconds`` at most; return how many still do."""
        if not await self._changes.until(lambda: not self.active, timeout_seconds):
            self._shutdown_timeouts += 1
            self._active_at_timeout = self.active
            for job in self._jobs.copy():
                if can_be_woken(job.ended):
                    job.ended.set_exception(self._closed())
        return self.active

    def _require_open(self) -> None:
        if self.closed:
            raise self._closed()

    def _closed(self) -> PayloadCopySubsystemClosedError:
        return PayloadCopySubsystemClosedError(component=self.component)
