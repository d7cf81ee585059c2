"""How many submissions may be under way, and which they are."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import CancelledError, Future, wait
from functools import partial
from typing import Any, Generic, TypeVar

from coalestra.cache.foreign import KeyLanes
from coalestra.cache.publisher import ResourcePublisher
from coalestra.concurrency.copying import PayloadIsolator
from coalestra.core.acceptance import SnapshotAcceptancePolicy
from coalestra.core.errors import BuilderClosedError, SubmissionBacklogFullError
from coalestra.core.frozen import immutable
from coalestra.core.health import BuilderHealth
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotConsistencyPolicy, SnapshotRequest
from coalestra.core.results import PublishResult
from coalestra.core.snapshot import Snapshot
from coalestra.core.validation import flag, instance, integer, number, patience, text, wrong_type
from coalestra.core.values import ResourceUpdate
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.session import SnapshotSession
from coalestra.orchestration.unit import distinct

# How many submissions may be under way, and which they are ---------------------------------------


class Place:
    """One submission's place in the backlog, taken before the submission is even made."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: Future[Any] | None = None


class SubmissionBacklog:
    """A bounded number of places, for any thread. It never makes anybody wait for one.

    Args:
        limit: how many submissions may be under way at once.
    """

    __slots__ = ("_lock", "_places", "limit")

    def __init__(self, limit: int) -> None:
        self.limit: int = limit
        self._lock = threading.Lock()
        self._places: dict[Place, None] = {}

    @property
    def pending(self) -> int:
        """How many places are taken."""
        return len(self._places)

    def take(self) -> Place:
        """Take a place.

        Raises:
            SubmissionBacklogFullError: at once, if all are taken.
        """
        place = Place()
        with self._lock:
            pending = len(self._places)
            if pending >= self.limit:
                raise SubmissionBacklogFullError(limit=self.limit, pending=pending)
            self._places[place] = None
        return place

    def leave(self, place: Place) -> None:
        """Give a place back; twice does no harm."""
        with self._lock:
            self._places.pop(place, None)

    def flush(self, timeout_seconds: float | None) -> None:
        """Wait until what is accepted now is done, whether it succeeds or not.

        Raises:
            TimeoutError: if that takes longer.
        """
        with self._lock:
            accepted = [place.future for place in self._places if place.future is not None]
        late = wait(accepted, timeout_seconds).not_done
        if late:
            raise TimeoutError(
                f"submissions accepted before the flush must be done within {timeout_seconds:g} s, "
                f"got {len(late)} of {len(accepted)} still pending; allow more time"
            )

    def __repr__(self) -> str:
        return f"<SubmissionBacklog {self.pending}/{self.limit}>"


# The life of an event loop in a thread: it runs until it is stopped and every task has ended -----


UNWIND_SECONDS = 1.0
"""How long cancelled work may clean up before closing goes on without it."""


class LoopLife:
    """Runs a loop to its end, which other threads can wait for."""

    __slots__ = ("_ending", "_loop", "_overdue", "_stopped")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stopped = asyncio.Event()
        self._ending = threading.Event()
        self._overdue = False

    def __repr__(self) -> str:
        return f"<LoopLife stopped={self._stopped.is_set()} ending={self._ending.is_set()}>"

    def live(self) -> None:
        """Run the loop in the calling thread and close it in the end."""
        life = self._loop.create_task(self._live())
        while not life.done():
            try:
                self._loop.run_until_complete(life)
            except BaseException:
                # Work that raises SystemExit breaks the loop off; the others still need it.
                continue
        self._loop.close()

    def stop(self) -> None:
        """Cancel the tasks, and end when all have ended; on the loop."""
        self._loop.call_soon(self._stopped.set)

    def wait_for_end(self) -> bool:
        """Wait, in another thread, for the end of all tasks; False if some take too long for it."""
        self._ending.wait()
        return not self._overdue

    async def _live(self) -> None:
        await self._stopped.wait()
        end = self._loop.time() + UNWIND_SECONDS
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            _, left = await asyncio.wait(others, timeout=max(0.0, end - self._loop.time()))
            if left:
                self._overdue = True
                self._ending.set()
                await asyncio.wait(left)
        await self._loop.shutdown_asyncgens()
        self._ending.set()


# One piece of work on an event loop, and the future that stands for it in other threads ----------


T = TypeVar("T")

Work = Callable[[], Awaitable[T]]
"""An async function that takes nothing, called on the loop."""


class Operation(Generic[T]):
    """Runs `work` as a task once it is told to begin.

    Attributes:
        future: the outcome, for any thread. Cancelling it cancels the task, as long as the task
            has not ended; the future tells its waiters at once, without waiting for the task.
    """

    __slots__ = ("_loop", "_on_end", "_task", "_unclaimed", "_work", "future")

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Work[T]) -> None:
        self.future: Future[T] = Future()
        self._loop = loop
        self._work = work
        self._on_end: list[Callable[[], object]] = []
        # Taken once, in one step, by whoever decides what becomes of the operation.
        self._unclaimed = [True]
        self._task: asyncio.Task[T] | None = None

    @property
    def task(self) -> asyncio.Task[T] | None:
        """The task, once it has begun; for the loop's thread."""
        return self._task

    def call_at_end(self, callback: Callable[[], object]) -> None:
        """Have `callback` called on the loop when the work is over, before the future knows."""
        self._on_end.append(callback)

    def begin(self) -> bool:
        """Start the task, on the loop, once; return False if it was given up before."""
        if not self._claim():
            return False
        self._task = self._loop.create_task(self._perform())
        self._task.add_done_callback(self._task_ended)
        if self.future.cancelled():
            self._task.cancel()  # at once, so that the work never begins
        self.future.add_done_callback(self._future_ended)
        return True

    def discard(self) -> None:
        """Cancel it, from any thread, whether it has begun, is about to begin, or never will."""
        self.future.cancel()
        if self._claim():
            self._tell_end()
            self.future.set_running_or_notify_cancel()

    def _claim(self) -> bool:
        try:
            return self._unclaimed.pop()
        except IndexError:
            return False

    async def _perform(self) -> T:
        if self.future.cancelled():  # while the loop was busy with something else
            raise asyncio.CancelledError
        return await self._work()

    def _future_ended(self, future: Future[T]) -> None:
        """Pass a cancellation on to the task, from whatever thread it comes."""
        task = self._task
        if task is None or not future.cancelled():
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed, so the task has ended
            self._loop.call_soon_threadsafe(task.cancel)

    def _task_ended(self, task: asyncio.Task[T]) -> None:
        self._tell_end()
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            self.future.cancel()
        if not self.future.set_running_or_notify_cancel():
            return
        if error is None:
            self.future.set_result(task.result())
        else:
            self.future.set_exception(error)

    def _tell_end(self) -> None:
        for callback in self._on_end:
            callback()
        self._on_end.clear()

    def __repr__(self) -> str:
        begun = self._task is not None
        return f"<Operation begun={begun} done={self.future.done()}>"


# An event loop in a thread of its own, and how other threads put work on it ----------------------
#
# Laws:
#
# 1. What was accepted begins, in the order in which it was accepted.
# 2. The last operation is accepted once; after it nothing is.
# 3. The thread ends only when every task on its loop has ended, and then closes the loop.


class LoopThread:
    """A daemon thread that runs one event loop for as long as it is needed.

    Args:
        name: the name of the thread.
        owner: what messages call the object that blocks on this thread.

    Raises:
        RuntimeError: if the system cannot start another thread.
    """

    __slots__ = (
        "_active",
        "_last",
        "_life",
        "_lock",
        "_loop",
        "_owner",
        "_process",
        "_thread",
    )

    def __init__(self, *, name: str, owner: str) -> None:
        self._owner = owner
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._last: Operation[Any] | None = None
        self._active: dict[Operation[Any], None] = {}
        self._loop = asyncio.new_event_loop()
        self._life = LoopLife(self._loop)
        self._thread = threading.Thread(target=self._life.live, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._loop.close()
            raise

    @property
    def closing(self) -> bool:
        """Whether the last operation has been accepted."""
        return self._last is not None

    @property
    def finished(self) -> bool:
        """Whether the last operation is over."""
        last = self._last
        return last is not None and last.future.done()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that has the thread."""
        return os.getpid() != self._process

    @property
    def alive(self) -> bool:
        """Whether the thread runs, in this process."""
        return not self.forked and self._thread.is_alive()

    def __repr__(self) -> str:
        return (
            f"<LoopThread {self._thread.name} alive={self.alive} closing={self.closing} "
            f"operations={len(self._active)}>"
        )

    # For other threads ------------------------------------------------------------------------

    def require_this_process(self) -> None:
        """Raise RuntimeError in a fork of the process that has the thread."""
        if self.forked:
            raise RuntimeError(
                f"{self._owner} must be used in the process that made it ({self._process}), got "
                f"process {os.getpid()}; its event loop thread does not survive a fork, so create "
                "a new builder in the forked process"
            )

    def require_usable(self) -> None:
        """Raise RuntimeError if nothing can be accepted: closed, or in a forked process."""
        self.require_this_process()
        if self.closing:
            raise BuilderClosedError(self._owner)

    def require_other_thread(self, call: str) -> None:
        """Raise RuntimeError in the loop's own thread, which would wait for itself for ever."""
        if threading.get_ident() == self._thread.ident and not self.forked:
            raise RuntimeError(
                f"{call} of {self._owner} must not be called on its own event loop thread, got "
                f"{self._thread.name!r}, which would wait for itself for ever; await the async "
                "builder there, or let a calling source run in a worker thread"
            )

    def operation(self, work: Work[T]) -> Operation[T]:
        """Return an operation that has yet to be started."""
        return Operation(self._loop, work)

    def start(self, operation: Operation[Any]) -> None:
        """Accept an operation, to run in a copy of the caller's context.

        Raises:
            RuntimeError: if nothing can be accepted any more; the operation is discarded.
        """
        try:
            self.require_usable()
            with self._lock:
                self.require_usable()
                self._enqueue(operation)
        except BaseException:  # an interrupt may come when it is on its way already
            operation.discard()
            raise

    def run(self, call: str, work: Work[T]) -> T:
        """Do `work` on the loop and wait for it; breaking the wait off cancels the work.

        Args:
            call: what messages call the method that waits, such as ``build()``.
            work: what to do.

        Raises:
            RuntimeError: if nothing can be accepted, in the loop's own thread, or when closing
                cut the work short.
            BaseException: whatever the work raised.
        """
        self.require_other_thread(call)
        operation = self.operation(work)
        try:
            self.start(operation)
            operation.future.exception()
        except CancelledError:
            if self.closing:
                raise BuilderClosedError(self._owner) from None
            raise
        except BaseException:  # this thread was interrupted, by Ctrl-C for instance
            operation.discard()
            raise
        return operation.future.result()

    def finish(self, work: Work[None]) -> Operation[None]:
        """Accept the last operation; return the one accepted first if this is not the first."""
        with self._lock:
            last = self._last
            if last is None:
                last = self._last = self.operation(work)
            # Once is enough, but an interrupt may have come between the two lines.
            if not last.future.done():
                with contextlib.suppress(RuntimeError):  # it has just ended, and the loop with it
                    self._enqueue(last)
            return last

    def join(self) -> bool:
        """Wait for the end of the thread once it was stopped.

        Returns:
            False if tasks remain that ignore their cancellation; the thread ends with them.
        """
        if not self._life.wait_for_end():
            return False
        self._thread.join()
        return True

    def _enqueue(self, operation: Operation[Any]) -> None:
        self._loop.call_soon_threadsafe(self._begin, operation, context=contextvars.copy_context())

    # On the loop ------------------------------------------------------------------------------

    def _begin(self, operation: Operation[Any]) -> None:
        if operation.begin():
            self._active[operation] = None
            operation.call_at_end(lambda: self._active.pop(operation))

    async def drain(self, timeout_seconds: float) -> None:
        """Wait for all operations but the last; cancel those that take longer."""
        working = {
            operation.task: operation
            for operation in self._active
            if operation is not self._last and operation.task is not None
        }
        if not working:
            return
        _, late = await asyncio.wait(working, timeout=timeout_seconds)
        for task in late:
            working[task].future.cancel()
        if late:
            await asyncio.wait(late, timeout=UNWIND_SECONDS)

    def stop(self) -> None:
        """End the thread as soon as every task has ended; those that have not are cancelled."""
        self._life.stop()


# How a sync builder comes to its end, once, whoever asks for it ----------------------------------


class Shutdown:
    """Drains the work of a loop thread, closes its builder, and ends the thread.

    Args:
        thread: what to end.
        builder: what works on it.
        close_builder: whether to close the builder.
        timeout_seconds: how long accepted work and refreshes may take.
    """

    __slots__ = ("_builder", "_close_builder", "_lingering", "_thread", "_timeout_seconds")

    def __init__(
        self,
        thread: LoopThread,
        builder: SnapshotBuilder,
        *,
        close_builder: bool,
        timeout_seconds: float,
    ) -> None:
        self._thread = thread
        self._builder = builder
        self._close_builder = close_builder
        self._timeout_seconds = timeout_seconds
        self._lingering: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Shutdown begun={self._thread.closing} lingering={self._lingering is not None}>"

    def wait(self) -> None:
        """Begin, or join the shutdown that has begun; raise what it raised unless it was over.

        An interrupted wait leaves the shutdown going.
        """
        if self._thread.forked:
            return
        self._thread.require_other_thread("close()")
        was_over = self._thread.finished
        ending = self._thread.finish(self._run).future
        error = ending.exception()
        if self._lingering is None:
            self._thread.join()
        if error is not None and not was_over:
            raise error

    async def _run(self) -> None:
        until = asyncio.get_running_loop().time() + self._timeout_seconds
        try:
            await self._thread.drain(self._timeout_seconds)
            await self._end_builder(until)
        except BaseException:
            if await self._has_late_workers():
                self._lingering = asyncio.create_task(self._outlive_late_workers())
            raise
        finally:
            if self._lingering is None:
                self._thread.stop()

    async def _end_builder(self, until: float) -> None:
        builder = self._builder
        in_time = builder.closed or await _within(until, builder.wait_for_refreshes())
        if self._close_builder:
            await builder.aclose(cancel_refreshes=not in_time)

    async def _has_late_workers(self) -> bool:
        health = await self._builder.health_snapshot()
        return health.payload_copy_shutdown_incomplete or health.observability_shutdown_incomplete

    async def _outlive_late_workers(self) -> None:
        try:
            await self._builder.wait_for_payload_copy_shutdown()
            await self._builder.wait_for_observability_shutdown()
        finally:
            self._thread.stop()


async def _within(until: float, waiting: Awaitable[None]) -> bool:
    """Wait until an instant on the loop's clock at most; return whether the wait ended itself."""
    remaining = until - asyncio.get_running_loop().time()
    try:
        await asyncio.wait_for(waiting, max(0.0, remaining))
    except asyncio.TimeoutError:
        return False
    return True


# Publishing from threads that have no event loop: blocking, or submitted and forgotten -----------
#
# Both kinds take turns per key: what concerns one key happens in the order of the calls.


_CONTEXT = "a submission"


@immutable
@dataclasses.dataclass(frozen=True, slots=True)
class _Errand(Generic[T]):
    """Something for the publisher to do, and the keys that it concerns."""

    keys: tuple[ResourceKey, ...]
    work: Work[T]


class SyncResourcePublisher:
    """Writes events into a builder's cache; its methods are for any thread.

    ``publish*`` and ``invalidate*`` wait for the outcome. ``submit_*`` return a future at once;
    by then values, metadata and collections have been copied, so that later changes do not
    matter. A bounded number of submissions may be under way. Cancelling a future takes its
    submission back, unless it was done already.
    """

    __slots__ = ("_backlog", "_isolator", "_lanes", "_publisher", "_thread")

    def __init__(
        self,
        publisher: ResourcePublisher,
        thread: LoopThread,
        backlog: SubmissionBacklog,
        isolator: PayloadIsolator,
    ) -> None:
        """Publish through `publisher` on the loop of `thread`; made by `SyncSnapshotBuilder`."""
        self._publisher = publisher
        self._thread = thread
        self._backlog = backlog
        self._isolator = isolator
        self._lanes = KeyLanes()

    def __repr__(self) -> str:
        return f"<SyncResourcePublisher {self._backlog!r} over {self._publisher!r}>"

    @property
    def pending_submissions(self) -> int:
        """How many submissions are under way."""
        return self._backlog.pending

    @property
    def max_pending_submissions(self) -> int:
        """How many submissions may be under way."""
        return self._backlog.limit

    # Waiting ----------------------------------------------------------------------------------

    def publish(
        self,
        key: ResourceKey,
        value: Any,
        *,
        source: str,
        observed_at: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        replace_equal: bool = False,
    ) -> PublishResult:
        """Publish one value and return what became of it; see `ResourcePublisher.publish`."""
        update = ResourceUpdate(key, value, source, observed_at, _given(metadata))
        return self._wait("publish()", self._one(update, force, replace_equal))

    def publish_update(
        self, update: ResourceUpdate[Any], *, force: bool = False, replace_equal: bool = False
    ) -> PublishResult:
        """Publish one update and return what became of it."""
        return self._wait("publish_update()", self._one(update, force, replace_equal))

    def publish_many(
        self,
        updates: Collection[ResourceUpdate[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, PublishResult]:
        """Publish the best update per key and return what became of them."""
        return self._wait("publish_many()", self._many(tuple(updates), force, replace_equal))

    def invalidate(self, key: ResourceKey, *, reason: str = "") -> None:
        """Remove `key` from the cache."""
        self._wait("invalidate()", self._removal((key,), reason))

    def invalidate_many(self, keys: Collection[ResourceKey], *, reason: str = "") -> None:
        """Remove `keys` from the cache."""
        self._wait("invalidate_many()", self._removal(keys, reason))

    def flush(self, *, timeout_seconds: float | None = None) -> None:
        """Wait until every submission accepted before this call is done.

        Raises:
            TimeoutError: if they take longer than `timeout_seconds` (None: wait for ever).
            RuntimeError: on the facade's own event loop thread, or in a forked process.
        """
        timeout_seconds = patience("timeout_seconds", timeout_seconds)
        self._thread.require_this_process()
        self._thread.require_other_thread("flush()")
        self._backlog.flush(timeout_seconds)

    # Submitting -------------------------------------------------------------------------------

    def submit_publish(
        self,
        key: ResourceKey,
        value: Any,
        *,
        source: str,
        observed_at: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Future[PublishResult]:
        """Submit one value; the future gives what `publish` returns or raises.

        Raises:
            SubmissionBacklogFullError: at once, if too many submissions are under way.
            PayloadIsolationError: if the value or metadata cannot be copied.
            RuntimeError: if the facade is closed or the process forked.
        """
        update = ResourceUpdate(key, value, source, observed_at, _given(metadata))
        return self.submit_publish_update(update, force=force, replace_equal=replace_equal)

    def submit_publish_update(
        self, update: ResourceUpdate[Any], *, force: bool = False, replace_equal: bool = False
    ) -> Future[PublishResult]:
        """Submit one update; see `submit_publish`."""
        return self._submit(lambda: self._one(self._captured(update), force, replace_equal))

    def submit_publish_many(
        self,
        updates: Collection[ResourceUpdate[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Future[Mapping[ResourceKey, PublishResult]]:
        """Submit several updates as one; see `submit_publish`."""
        return self._submit(
            lambda: self._many(tuple(map(self._captured, updates)), force, replace_equal)
        )

    def submit_invalidate(self, key: ResourceKey, *, reason: str = "") -> Future[None]:
        """Submit the removal of `key`; see `submit_publish`."""
        return self._submit(lambda: self._removal((key,), reason))

    def submit_invalidate_many(
        self, keys: Collection[ResourceKey], *, reason: str = ""
    ) -> Future[None]:
        """Submit the removal of `keys` as one; see `submit_publish`."""
        return self._submit(lambda: self._removal(keys, reason))

    # Errands ----------------------------------------------------------------------------------

    def _one(
        self, update: ResourceUpdate[Any], force: bool, replace_equal: bool
    ) -> _Errand[PublishResult]:
        instance("update", update, ResourceUpdate)
        publish = self._publisher.publish_update
        work = partial(publish, update, force=force, replace_equal=replace_equal)
        return _Errand((update.key,), work)

    def _many(
        self, updates: tuple[ResourceUpdate[Any], ...], force: bool, replace_equal: bool
    ) -> _Errand[Mapping[ResourceKey, PublishResult]]:
        for update in updates:
            instance("updates", update, ResourceUpdate)
        publish = self._publisher.publish_many
        work = partial(publish, updates, force=force, replace_equal=replace_equal)
        return _Errand(_distinct(update.key for update in updates), work)

    def _removal(self, keys: Iterable[ResourceKey], reason: str) -> _Errand[None]:
        text("reason", reason, empty=True)
        distinct = _distinct(keys)
        for key in distinct:
            instance("keys", key, ResourceKey)
        return _Errand(distinct, partial(self._publisher.invalidate_many, distinct, reason=reason))

    def _captured(self, update: ResourceUpdate[Any]) -> ResourceUpdate[Any]:
        instance("update", update, ResourceUpdate)
        return dataclasses.replace(
            update,
            value=self._isolator.copy(update.value, context=_CONTEXT),
            metadata=self._isolator.copy_metadata(update.metadata, context=_CONTEXT),
        )

    def _wait(self, call: str, errand: _Errand[T]) -> T:
        return self._thread.run(call, partial(self._in_turn, errand))

    def _submit(self, capture: Callable[[], _Errand[T]]) -> Future[T]:
        self._thread.require_usable()
        place = self._backlog.take()
        try:
            operation = self._thread.operation(partial(self._in_turn, capture()))
            operation.call_at_end(partial(self._backlog.leave, place))
            place.future = operation.future
            self._thread.start(operation)
        except BaseException:
            self._backlog.leave(place)
            raise
        return operation.future

    async def _in_turn(self, errand: _Errand[T]) -> T:
        async with self._lanes.turn(errand.keys):
            return await errand.work()


def _distinct(keys: Iterable[ResourceKey]) -> tuple[ResourceKey, ...]:
    return tuple(dict.fromkeys(keys))


def _given(metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {} if metadata is None else metadata


# A session for threads that have no event loop ---------------------------------------------------


class SyncSnapshotSession:
    """Several stages of one piece of work that share an id, a deadline and pinned values.

    Each method waits for its outcome; see `SnapshotSession` for what it means and raises.
    """

    __slots__ = ("_session", "_thread")

    def __init__(self, session: SnapshotSession, thread: LoopThread) -> None:
        """Work with `session` on the loop of `thread`; made by `SyncSnapshotBuilder.session`."""
        self._session = session
        self._thread = thread

    def __repr__(self) -> str:
        return f"<SyncSnapshotSession {self.snapshot_id!r} closed={self.closed}>"

    def __enter__(self) -> SyncSnapshotSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def snapshot_id(self) -> str:
        """The id that all snapshots of this session carry."""
        return self._session.snapshot_id

    @property
    def created_at(self) -> float:
        """When the session was made, in wall seconds since the epoch."""
        return self._session.created_at

    @property
    def closed(self) -> bool:
        """Whether the session, or the builder that it belongs to, is closed."""
        return self._session.closed or self._thread.closing

    def resolve(
        self, keys: Iterable[ResourceKey], *, strict: bool = True, retry_errors: bool = False
    ) -> Snapshot:
        """Resolve `keys` and return everything requested so far."""
        wanted = distinct(keys)
        return self._thread.run(
            "resolve()",
            lambda: self._session.resolve(wanted, strict=strict, retry_errors=retry_errors),
        )

    def resolve_request(self, request: SnapshotRequest, *, retry_errors: bool = False) -> Snapshot:
        """Resolve a request and return everything requested so far."""
        return self._thread.run(
            "resolve_request()",
            lambda: self._session.resolve_request(request, retry_errors=retry_errors),
        )

    def revalidate(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        force_refresh: bool = False,
        consistency_policy: SnapshotConsistencyPolicy | None = None,
        acceptance_policy: SnapshotAcceptancePolicy | None = None,
    ) -> Snapshot:
        """Replace pinned values and what was derived from them, all or none."""
        wanted = distinct(keys)
        return self._thread.run(
            "revalidate()",
            lambda: self._session.revalidate(
                wanted,
                strict=strict,
                force_refresh=force_refresh,
                consistency_policy=consistency_policy,
                acceptance_policy=acceptance_policy,
            ),
        )

    def snapshot(self) -> Snapshot:
        """Return everything requested so far, copied within the session's deadline."""
        return self._thread.run("snapshot()", self._session.snapshot_async)

    def close(self) -> None:
        """Close the session; nothing to do if it is closed, also by its builder."""
        if self.closed or self._thread.forked:
            return
        with contextlib.suppress(BuilderClosedError):
            self._thread.run("close()", self._session.close)


# A builder for threads that have no event loop ---------------------------------------------------


THREAD_NAME = "coalestra-sync-loop"


class SyncSnapshotBuilder:
    """A `SnapshotBuilder` on an event loop in a thread of its own; its methods are for any thread.

    Keep one for the life of the application. A method that waits refuses to be called on the
    loop's own thread, and in a forked process, with a `RuntimeError`; so does everything once the
    builder is closed. Breaking a wait off (Ctrl-C) cancels what it waits for.

    Attributes:
        builder: the builder on the loop.
        publisher: publishes into the builder's cache.
        close_builder: whether closing closes the builder as well.
        shutdown_timeout_seconds: how long closing waits for accepted work.
    """

    def __init__(
        self,
        builder: SnapshotBuilder,
        *,
        close_builder: bool = True,
        shutdown_timeout_seconds: float = 5.0,
        max_pending_submissions: int = 1024,
    ) -> None:
        """Start the thread.

        Args:
            builder: not in use by another event loop.
            close_builder: close the builder together with this.
            shutdown_timeout_seconds: how long closing waits for accepted work, before it cancels
                what is left.
            max_pending_submissions: how many of the publisher's submissions may be under way.

        Raises:
            TypeError, ValueError: for a bad argument, naming it.
        """
        _require_builder(builder)
        self.builder = builder
        self.close_builder: bool = flag("close_builder", close_builder)
        self.shutdown_timeout_seconds: float = number(
            "shutdown_timeout_seconds", shutdown_timeout_seconds, minimum=0
        )
        self._backlog = SubmissionBacklog(
            integer("max_pending_submissions", max_pending_submissions, minimum=1)
        )
        isolator = PayloadIsolator(getattr(builder, "payload_copier", None))
        self._thread = LoopThread(name=THREAD_NAME, owner="the sync snapshot builder")
        self._shutdown = Shutdown(
            self._thread,
            builder,
            close_builder=close_builder,
            timeout_seconds=shutdown_timeout_seconds,
        )
        self.publisher: SyncResourcePublisher = SyncResourcePublisher(
            builder.publisher, self._thread, self._backlog, isolator
        )

    def __repr__(self) -> str:
        return f"<SyncSnapshotBuilder closed={self.closed} {self._backlog!r} over {self.builder!r}>"

    def __enter__(self) -> SyncSnapshotBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether closing has begun, so that no new work is accepted."""
        return self._thread.closing

    @property
    def pending_submissions(self) -> int:
        """How many of the publisher's submissions are under way."""
        return self._backlog.pending

    @property
    def max_pending_submissions(self) -> int:
        """How many of the publisher's submissions may be under way."""
        return self._backlog.limit

    def build(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> Snapshot:
        """Resolve `keys` and return their snapshot; see `SnapshotBuilder.build`."""
        wanted = distinct(keys)
        return self._thread.run(
            "build()",
            lambda: self.builder.build(
                wanted,
                strict=strict,
                deadline_seconds=deadline_seconds,
                metadata=metadata,
                snapshot_id=snapshot_id,
            ),
        )

    def build_request(
        self,
        request: SnapshotRequest,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> Snapshot:
        """Resolve a request and return its snapshot; see `SnapshotBuilder.build_request`."""
        return self._thread.run(
            "build_request()",
            lambda: self.builder.build_request(
                request,
                deadline_seconds=deadline_seconds,
                metadata=metadata,
                snapshot_id=snapshot_id,
            ),
        )

    def session(
        self,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> SyncSnapshotSession:
        """Open a session; its deadline runs from now. See `SnapshotBuilder.session`."""

        async def opened() -> SyncSnapshotSession:
            session = self.builder.session(
                deadline_seconds=deadline_seconds, metadata=metadata, snapshot_id=snapshot_id
            )
            return SyncSnapshotSession(session, self._thread)

        return self._thread.run("session()", opened)

    def health_snapshot(self) -> BuilderHealth:
        """Return the builder's health, together with the backlog of submissions."""
        health = self._thread.run("health_snapshot()", self.builder.health_snapshot)
        return dataclasses.replace(
            health,
            pending_submissions=self._backlog.pending,
            max_pending_submissions=self._backlog.limit,
        )

    def wait_for_refreshes(self) -> None:
        """Wait for the background refreshes that have been scheduled."""
        self._thread.run("wait_for_refreshes()", self.builder.wait_for_refreshes)

    def flush_submissions(self, *, timeout_seconds: float | None = None) -> None:
        """Wait for the submissions accepted before; see `SyncResourcePublisher.flush`."""
        self.publisher.flush(timeout_seconds=timeout_seconds)

    def close(self) -> None:
        """Refuse new work, finish what was accepted, close the builder and end the thread.

        Accepted work and background refreshes have ``shutdown_timeout_seconds`` to end; then they
        are cancelled. Calls that come while another thread closes wait for the same closing and
        share its outcome; later ones do nothing. In a forked process there is nothing to close.

        Raises:
            PayloadCopyShutdownTimeoutError, ObservabilityShutdownTimeoutError: if copies or sinks
                are late. The thread lives on until they have ended, and then ends by itself.
            RuntimeError: on the thread of the loop.
            Exception: what closing the builder raised.
        """
        self._shutdown.wait()


def _require_builder(builder: object) -> None:
    if not (callable(getattr(builder, "aclose", None)) and hasattr(builder, "publisher")):
        raise wrong_type("builder", "a SnapshotBuilder", builder)


__all__ = ["SyncResourcePublisher", "SyncSnapshotBuilder", "SyncSnapshotSession"]
