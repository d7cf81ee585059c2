"""Payload isolation: copies with the meaning of ``copy.deepcopy``, made the cheapest safe way.

Inside the library a payload is *sealed*: one private copy, together with the knowledge of how to
open it, that is to make one more copy for a reader.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from coalestra.concurrency.capacity import WaitQueue
from coalestra.concurrency.deadline import CutOff, CutOffExpired, Deadline
from coalestra.concurrency.sealing import FLAT, Seal, Sealed, seal_anyhow, seal_briefly, seal_flat
from coalestra.concurrency.threads import WorkerThreads, threads_of_context
from coalestra.core.errors import (
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    SnapshotDeadlineExceededError,
)
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.health import PayloadCopyHealth
from coalestra.core.validation import callable_, flag, integer
from coalestra.core.values import SnapshotValue

# Copying a payload at once, and what it means when that fails ------------------------------------


T = TypeVar("T")

PayloadCopier = Callable[[Any], Any]
"""Returns a copy of a payload that shares nothing mutable with it."""


def deepcopy_payload(value: T) -> T:
    """Return what ``copy.deepcopy(value)`` returns, only sooner; immutable objects stay the same.

    Raises whatever the classes inside ``value`` raise on being copied.
    """
    copied: T = seal_anyhow(value)[0]
    return copied


FAILURES = (Exception, asyncio.CancelledError)
"""What a copier may raise; a cancellation it raises itself is a failure like any other."""


def not_isolated(value: Any, context: str) -> PayloadIsolationError:
    """Return the error for a payload that could not be copied."""
    return PayloadIsolationError(context=context, value_type=type(value).__qualname__)


def isolated(copier: Callable[[Any], T], value: Any, context: str) -> T:
    """Return ``copier(value)``; a failure becomes ``PayloadIsolationError`` with it as cause."""
    try:
        return copier(value)
    except FAILURES as error:
        raise not_isolated(value, context) from error


class PayloadIsolator:
    """Copies payloads and snapshot values at once, where they are.

    Args:
        copier: replaces the default copier, for payloads (metadata is always deep-copied).
    """

    def __init__(self, copier: PayloadCopier | None = None) -> None:
        callable_("copier", copier, optional=True)
        self._copier: PayloadCopier = deepcopy_payload if copier is None else copier

    def __repr__(self) -> str:
        return f"PayloadIsolator({'' if self.uses_default_copier else repr(self._copier)})"

    @property
    def uses_default_copier(self) -> bool:
        """Whether payloads are copied as ``copy.deepcopy`` would."""
        return self._copier is deepcopy_payload

    def copy(self, value: T, *, context: str) -> T:
        """Return a copy of a payload.

        Raises:
            PayloadIsolationError: if that is impossible; names ``context`` and the type.
        """
        copied: T = isolated(self._copier, value, context)
        return copied

    def copy_metadata(self, metadata: Mapping[str, Any], *, context: str) -> dict[str, Any]:
        """Return a deep copy of metadata as a new dictionary.

        Raises:
            PayloadIsolationError: if that is impossible; names ``context`` and the type.
        """
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
        """Return an isolated copy of a value, with the given facts in place of its own.

        Raises:
            PayloadIsolationError: if payload or metadata cannot be copied.
        """
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


# One component's copies in threads: how many at once, who waits, how it ends, what it counted ----
#
# Laws:
#
# 1. At most ``limit`` copies are in threads at a time; the others wait, first come first served.
# 2. Whoever stops waiting for a copy leaves at once; the slot stays taken until the thread has
# ended,
#    since a thread cannot be stopped.
# 3. After ``close`` nothing starts; waiters are told so, and ``drain`` waits for what is running.


class Spell:
    """How often something lasted how long, in milliseconds."""

    __slots__ = ("count", "longest_ms", "total_ms")

    def __init__(self) -> None:
        self.count: int = 0
        self.total_ms: float = 0.0
        self.longest_ms: float = 0.0

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


class CopyThreads:
    """Bounded copying in threads, with counters and an orderly end."""

    def __init__(self, component: str, limit: int, threads: WorkerThreads | None = None) -> None:
        """Belong to ``component`` (a name for errors) and run ``limit`` copies at most.

        Without ``threads`` of the component's own, use those of whoever asks for a copy.
        """
        self.component = component
        self.limit = limit
        self._threads = threads
        self.active: int = 0
        self.closed: bool = False
        self._slots = WaitQueue()
        self._drainers = WaitQueue()
        self._running: set[asyncio.Task[None]] = set()
        self._waits = Spell()
        self._durations = Spell()
        self._started = 0
        self._failed = 0
        self._timeouts = 0
        self._capacity_timeouts = 0
        self._peak_active = 0
        self._peak_waiting = 0
        self._shutdown_timeouts = 0
        self._active_at_timeout = 0

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return (
            f"<CopyThreads {self.component!r} {state} active={self.active}/{self.limit} "
            f"waiting={len(self._slots)}>"
        )

    async def run(self, work: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Return what ``work`` returns in a thread.

        Raises:
            PayloadCopySubsystemClosedError: if closed, also while waiting for a slot.
            SnapshotDeadlineExceededError: if the deadline came first, whether in the queue or in
                the thread.
            BaseException: whatever ``work`` raised.
        """
        self.require_open()
        if deadline is None:
            await self._take_slot()
            return await self._start(work)
        has_slot = False
        try:
            if deadline.expired:
                raise CutOffExpired(deadline.loop_time)
            with deadline.cut_off():
                await self._take_slot()
                has_slot = True
                return await self._start(work)
        except CutOffExpired:
            self._timeouts += 1
            self._capacity_timeouts += not has_slot
            raise self._late(deadline, has_slot) from None

    def require_open(self) -> None:
        """Raise ``PayloadCopySubsystemClosedError`` once closed."""
        if self.closed:
            raise PayloadCopySubsystemClosedError(component=self.component)

    def close(self) -> None:
        """Refuse new copies and everybody who waits for a slot; running copies go on."""
        self.closed = True
        self._slots.refuse_all(lambda: PayloadCopySubsystemClosedError(component=self.component))

    async def drain(self, timeout_seconds: float | None) -> int:
        """Wait until no copy runs, ``timeout_seconds`` at most; return how many still do."""
        if self.active:
            loop = asyncio.get_running_loop()
            when = None if timeout_seconds is None else loop.time() + timeout_seconds
            try:
                with CutOff(when):
                    while self.active:
                        await self._drainers.wait(_nothing)
            except CutOffExpired:
                self._note_late_shutdown()
        return self.active

    def health(self, *, run_in_thread: bool, inline: int, inline_failed: int) -> PayloadCopyHealth:
        """Return the state, together with the copies made, and failed, without a thread."""
        return PayloadCopyHealth(
            run_in_thread=run_in_thread,
            max_concurrency=self.limit,
            active_copies=self.active,
            waiting_for_capacity=len(self._slots),
            peak_active_copies=self._peak_active,
            peak_waiting_for_capacity=self._peak_waiting,
            started_count=self._started + inline + inline_failed,
            completed_count=self._durations.count + inline,
            failure_count=self._failed + inline_failed,
            timeout_count=self._timeouts,
            capacity_timeout_count=self._capacity_timeouts,
            capacity_wait_count=self._waits.count,
            average_wait_ms=self._waits.average_ms,
            max_wait_ms=self._waits.longest_ms,
            average_duration_ms=self._durations.average_ms,
            max_duration_ms=self._durations.longest_ms,
            accepting_copies=not self.closed,
            shutdown_started=self.closed,
            shutdown_complete=self.closed and not self.active,
            shutdown_incomplete=bool(self.closed and self.active and self._shutdown_timeouts),
            shutdown_timeout_count=self._shutdown_timeouts,
            active_at_last_shutdown_timeout=self._active_at_timeout,
        )

    async def _take_slot(self) -> None:
        if self.active < self.limit:
            self.active += 1
        else:
            await self._wait_for_slot()
            if self.closed:
                self._release()
                self.require_open()
        self._peak_active = max(self._peak_active, self.active)

    async def _wait_for_slot(self) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        self._peak_waiting = max(self._peak_waiting, len(self._slots) + 1)
        try:
            await self._slots.wait(self._release)
        finally:
            self._waits.add(clock() - began)

    def _release(self) -> None:
        """Hand the slot on, or put it back and tell those who wait for the end."""
        if not self._slots.wake_next():
            self.active -= 1
            if not self.active:
                self._drainers.wake_all()

    async def _start(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._started += 1
        task = loop.create_task(self._carry(work, result), name=f"coalestra-copy-{self.component}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await result

    async def _carry(self, work: Callable[[], T], result: asyncio.Future[T]) -> None:
        """Stay with one copy until its thread has ended, whether anybody still waits or not."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            threads = threads_of_context() if self._threads is None else self._threads
            value = await threads.run(work, label=f"copy:{self.component}")
        except asyncio.CancelledError:
            self._failed += 1
            result.cancel()
            raise
        except BaseException as error:
            self._failed += 1
            if not result.done():
                result.set_exception(error)
        else:
            self._durations.add(clock() - began)
            if not result.done():
                result.set_result(value)
        finally:
            self._release()

    def _note_late_shutdown(self) -> None:
        if self.active:
            self._shutdown_timeouts += 1
            self._active_at_timeout = self.active

    def _late(self, deadline: Deadline, has_slot: bool) -> SnapshotDeadlineExceededError:
        phase = "was being copied" if has_slot else "waited for a copy thread"
        return SnapshotDeadlineExceededError(
            f"the deadline of {deadline.budget_seconds:g} seconds passed while a payload of "
            f"component {self.component!r} {phase}"
        )


def _nothing() -> None:
    """Nothing is handed over to those who only wait for the end."""


# Payload isolation: copies with the meaning of ``copy.deepcopy``, made the cheapest safe way -----


__all__ = [
    "OFFLOADED",
    "PayloadCopier",
    "PayloadCopies",
    "PayloadIsolator",
    "Seal",
    "Sealed",
    "deepcopy_payload",
]


class _Offloaded:
    """The one value of its kind."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "OFFLOADED"


OFFLOADED: Final = _Offloaded()
"""What ``PayloadCopies.open_now`` returns for a payload that must be opened with ``await``."""

_SHARED = Seal.SHARED


class SealedMetadata(FrozenDict[str, Any]):
    """Metadata kept by the library that holds something mutable: each reader needs a copy."""

    __slots__ = ()


class PayloadCopies:
    """All copying of one component: what is brief happens at once, the rest in bounded threads.

    Attributes:
        component: the name in errors and health.
        run_in_thread: whether threads are used where copying takes long.
        max_concurrency: how many threads copy at a time.
        uses_default_copier: False if the application brought its own.
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
        """Copy for ``component``.

        Args:
            component: a name.
            copier: replaces the default copier, for every payload (not for metadata).
            run_in_thread: True always, False never, None where it takes long (with a ``copier``
                of one's own: never). Immutable payloads need no copy and so no thread.
            max_concurrency: the most copies in threads at a time.
            threads: the threads to use; by default those of whoever asks for a copy.
        """
        callable_("payload_copier", copier, optional=True)
        if run_in_thread is not None:
            flag("run_payload_copies_in_thread", run_in_thread)
        self.component = component
        self.max_concurrency: int = integer("max_copy_concurrency", max_concurrency, minimum=1)
        self.uses_default_copier: bool = copier is None or copier is deepcopy_payload
        self.run_in_thread: bool = (
            self.uses_default_copier if run_in_thread is None else run_in_thread
        )
        self._copier = None if self.uses_default_copier else copier
        self._own_seal = Seal("custom", copier or deepcopy_payload, brief=not self.run_in_thread)
        self._always_threads = run_in_thread is True
        self._is_direct = self.uses_default_copier and not self._always_threads
        self._threads = CopyThreads(component, self.max_concurrency, threads)
        self._inline = 0
        self._inline_failed = 0

    def __repr__(self) -> str:
        kind = "default" if self.uses_default_copier else "custom"
        return f"<PayloadCopies copier={kind} {self._threads!r}>"

    @property
    def active(self) -> int:
        """How many copies are in threads at this moment."""
        return self._threads.active

    @property
    def closed(self) -> bool:
        """Whether new copies are refused."""
        return self._threads.closed

    def seal_now(self, value: Any, *, context: str) -> Sealed | None:
        """Seal a payload without waiting; None if it takes ``await seal(...)``.

        Raises:
            PayloadIsolationError: if the payload cannot be copied; says ``context``.
            PayloadCopySubsystemClosedError: after ``close``, for immutable payloads too.
        """
        if self._is_direct:
            sealed = seal_flat(value)
            if sealed is not None:
                self._inline += sealed[1] is not _SHARED
                return sealed
        self._threads.require_open()
        if self._copier is not None:
            if self.run_in_thread:
                return None
            return self._copied(self._copier, value, context), self._own_seal
        sealer = seal_briefly if self.run_in_thread else seal_anyhow
        try:
            sealed = sealer(value)
        except FAILURES as error:
            raise self._failure(value, context) from error
        if sealed is None or (self._always_threads and sealed[1] is not _SHARED):
            return None
        self._inline += sealed[1] is not _SHARED
        return sealed

    async def seal(self, value: Any, *, context: str, deadline: Deadline | None = None) -> Sealed:
        """Seal a payload in a thread: one that ``seal_now`` returned None for.

        Raises:
            PayloadIsolationError: if the payload cannot be copied; says ``context``.
            SnapshotDeadlineExceededError: if ``deadline`` comes first.
            PayloadCopySubsystemClosedError: if closed before the copy began.
        """
        if self._copier is not None:
            return await self._in_thread(self._copier, value, context, deadline), self._own_seal
        return await self._in_thread(seal_anyhow, value, context, deadline)

    def open_now(self, payload: Any, seal: Seal, *, context: str) -> Any:
        """Return one reader's copy of a sealed payload; ``OFFLOADED`` if it takes ``await open``.

        Raises:
            PayloadIsolationError: if the payload cannot be copied; says ``context``.
            PayloadCopySubsystemClosedError: after ``close``.
        """
        if seal is _SHARED:
            return payload
        if self._is_direct and seal.brief:
            try:
                copied = seal.opener(payload)
            except FAILURES as error:
                raise self._failure(payload, context) from error
            self._inline += 1
            return copied
        self._threads.require_open()
        if self._always_threads or (self.run_in_thread and not seal.brief):
            return OFFLOADED
        return self._copied(self._copier or seal.opener, payload, context)

    async def open(
        self, payload: Any, seal: Seal, *, context: str, deadline: Deadline | None = None
    ) -> Any:
        """Open a payload in a thread: one that ``open_now`` returned ``OFFLOADED`` for.

        Raises:
            what `seal` raises.
        """
        copier = self._copier or seal.opener
        return await self._in_thread(copier, payload, context, deadline)

    def open_here(self, payload: Any, seal: Seal, *, context: str) -> Any:
        """Return one reader's copy of a sealed payload without a thread, however long it takes.

        Raises:
            PayloadIsolationError, PayloadCopySubsystemClosedError: as `open_now`.
        """
        if seal is _SHARED:
            return payload
        self._threads.require_open()
        return self._copied(self._copier or seal.opener, payload, context)

    def seal_metadata_now(
        self, metadata: Mapping[str, Any], *, context: str
    ) -> FrozenDict[str, Any]:
        """Return metadata to keep. It is small by nature, so this never takes a thread.

        Raises:
            PayloadIsolationError: if a value cannot be copied; says ``context``.
        """
        if not metadata:
            return EMPTY
        payload, seal = self._copied(seal_anyhow, dict(metadata), context)
        return FrozenDict(payload) if seal is FLAT[dict] else SealedMetadata(payload)

    def open_metadata_now(
        self, metadata: FrozenDict[str, Any], *, context: str
    ) -> FrozenDict[str, Any]:
        """Return one reader's copy of metadata that ``seal_metadata_now`` returned.

        Raises:
            PayloadIsolationError: if a value cannot be copied; says ``context``.
        """
        if type(metadata) is FrozenDict:
            return metadata
        return FrozenDict(self._copied(deepcopy_payload, dict(metadata), context))

    def health(self) -> PayloadCopyHealth:
        """Return the state and the counts; copies without a thread are among the completed."""
        return self._threads.health(
            run_in_thread=self.run_in_thread,
            inline=self._inline,
            inline_failed=self._inline_failed,
        )

    def close(self) -> None:
        """Refuse new copies, and everybody who still waits for a thread."""
        self._is_direct = False
        self._threads.close()

    async def drain(self, timeout_seconds: float | None) -> int:
        """Wait until no copy runs, for ``timeout_seconds`` at most; return how many still do."""
        return await self._threads.drain(timeout_seconds)

    def _copied(self, copier: Callable[[Any], T], value: Any, context: str) -> T:
        try:
            copied = copier(value)
        except FAILURES as error:
            raise self._failure(value, context) from error
        self._inline += 1
        return copied

    def _failure(self, value: Any, context: str) -> PayloadIsolationError:
        self._inline_failed += 1
        return not_isolated(value, context)

    async def _in_thread(
        self, copier: Callable[[Any], T], value: Any, context: str, deadline: Deadline | None
    ) -> T:
        return await self._threads.run(partial(isolated, copier, value, context), deadline)
