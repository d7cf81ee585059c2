"""A builder for threads that have no event loop: one loop in a thread of its own, and thin facades.

Laws:

1. What is handed to the loop ends: it is done, fails, or is told that it came too late. What was
   accepted begins in the order in which it was accepted.
2. The last operation, closing, is accepted once; after it nothing is.
3. The thread ends when every task on its loop has ended, and then closes the loop. So it does once
   nobody can use it any more, closed or not.
4. No lock is held and no place is lost where a signal handler, a finalizer or a fork may strike.
   While the interpreter ends, nobody waits: the loop's thread does not run any more.
5. Closing has one budget of time for all of its stages.
6. What ends a program (``SystemExit``, ``KeyboardInterrupt``) leaves the loop running and goes to
   the threads that wait for it, which are where the program is.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import dataclasses
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import CancelledError, Future, InvalidStateError
from functools import partial, wraps
from itertools import islice
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from coalestra._endings import PROGRAM_ENDS
from coalestra._lockfree import LONGEST_WAIT_SECONDS, Changes
from coalestra.cache.access import KeyLanes
from coalestra.cache.publisher import ResourcePublisher
from coalestra.concurrency.copying import PayloadIsolator
from coalestra.core import errors
from coalestra.core.frozen import FrozenDict
from coalestra.core.health import BuilderHealth
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.request import RequestResult, SnapshotRequest
from coalestra.core.snapshot import Snapshot
from coalestra.core.trace import Trace
from coalestra.core.validation import callable_, flag, instance, integer, number, text, wrong_type
from coalestra.core.values import PublishResult, ResourceUpdate
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.closing import MOMENT_SECONDS, gives_way, insist
from coalestra.orchestration.session import Several, SnapshotSession

__all__ = ["SyncResourcePublisher", "SyncSnapshotBuilder", "SyncSnapshotSession"]

THREAD_NAME = "coalestra-sync-loop"

UNWIND_SECONDS = 1.0
"""How long cancelled work may clean up before closing goes on without it; never longer than the
time that closing has in all."""

K = TypeVar("K")
T = TypeVar("T")
P = ParamSpec("P")

Work = Callable[[], Awaitable[T]]
"""An async function that takes nothing, called on the loop."""


@dataclasses.dataclass(eq=False, repr=False)
class Operation(Generic[T]):
    """Some work that runs as a task of a loop thread, once it was accepted.

    Attributes:
        loop, operations: where it belongs to; it is among the latter from when it is on its way
            until it has ended, or was given up before it began.
        future: the outcome, for any thread. Cancelling it cancels the task; the future tells its
            waiters at once, without waiting for the task to end.
        backlog: where it has a place until it has ended; None if a thread only waits for it.
        last: whether it ends the loop; if it is cancelled before its first step it begins again.
        accepted: whether it is on its way to the loop.
        task: on the loop, once it has begun.
    """

    loop: asyncio.AbstractEventLoop
    operations: dict[Operation[Any], None]
    backlog: SubmissionBacklog | None = None
    _: dataclasses.KW_ONLY
    last: bool = False
    accepted: bool = False
    task: asyncio.Task[T] | None = None
    future: Future[T] = dataclasses.field(default_factory=Future)
    _changes: Changes = dataclasses.field(default_factory=Changes)
    _started: bool = False
    _told: bool = False

    def __post_init__(self) -> None:
        # Not held by its future: what came of it would be held by the circle of the two.
        self.future.add_done_callback(partial(_tell, weakref.ref(self)))

    def begin(self, work: Work[T]) -> None:
        """Start the task, on the loop, once; of what was given up it ends in its first step."""
        if self.task is None:
            self.task = self.loop.create_task(self._perform(work))
            self.task.add_done_callback(partial(self._task_ended, work if self.last else None))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait in a thread until the future tells; return whether it does."""
        return self._changes.wait_for(lambda: self._told, seconds)

    def discard(self) -> None:
        """Cancel it, from any thread, whether it has begun, is about to begin, or never will."""
        self.future.cancel()
        if self.task is None and self._end():
            self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """Tell who waits of an error that is not its own, and cancel it; on the loop."""
        with contextlib.suppress(InvalidStateError):  # it was cancelled, or has told something
            self.future.set_exception(error)
        if self.task is not None:
            self.task.cancel()

    def settle(self) -> None:
        """End it as its loop ends: cancelled, unless its task has an outcome that was not told."""
        if self.task is None:
            self.discard()
        else:
            self._task_ended(None, self.task)

    async def _perform(self, work: Work[T]) -> T:
        if self.task is None:  # where tasks are eager this is within its making
            await asyncio.sleep(0)
        self._started = True
        if self.future.cancelled():  # while the loop was busy with something else
            raise asyncio.CancelledError
        del self  # whom the traceback of an error would lead to, and who has the error
        return await work()

    def _task_ended(self, again: Work[T] | None, task: asyncio.Task[T]) -> None:
        if again is not None and task.cancelled() and not self._started:
            self.task = None
            self.begin(again)
            return
        if not self._end():
            return  # it was settled as its loop ended
        error = None if task.cancelled() else task.exception()
        if task.cancelled():
            self.future.cancel()
        told = self.future.done() and not self.future.cancelled()  # of something else
        if told or not self.future.set_running_or_notify_cancel():
            return
        if error is None:
            self.future.set_result(task.result())
        else:
            self.future.set_exception(error)

    def _end(self) -> bool:
        """Have everything taken back, before the future tells; return False if it was before."""
        is_first = self.operations.pop(self, self) is None
        if self.backlog is not None:
            self.backlog.leave(self)
        return is_first

    def __repr__(self) -> str:
        return f"<Operation begun={self.task is not None} done={self.future.done()}>"


def _tell(operation: weakref.ref[Operation[Any]], future: Future[Any]) -> None:
    """Wake who waits, and pass a cancellation on to the task, from whatever thread it comes."""
    if (told := operation()) is not None:
        told._told = True
        told._changes.tell()
        if told.backlog is not None:
            told.backlog.told(told)
        if told.task is not None and future.cancelled():
            with contextlib.suppress(RuntimeError):  # the loop is closed, so the task has ended
                told.loop.call_soon_threadsafe(told.task.cancel)


class LoopThread:
    """A daemon thread that runs one event loop for as long as it is needed.

    Messages call the object that blocks on it by the name of its `owner`. It is a `RuntimeError` if
    the system cannot start another thread.
    """

    def __init__(self, *, name: str, owner: str) -> None:
        self._owner = owner
        self._process = os.getpid()
        self._operations: dict[Operation[Any], None] = {}
        # The last operation stands here, under the one name that the first to come takes.
        self._last: dict[str, Operation[None]] = {}
        self._drained = self._stopped = self._overdue = False
        self._unwound_by = 0.0
        self._changes = Changes()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._live, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # there is no thread
            self._loop.close()
            raise
        except BaseException:  # it was interrupted, so there may be one
            self._loop.call_soon_threadsafe(self.stop, 0.0)
            raise

    @property
    def closing(self) -> bool:
        """Whether the last operation has been accepted."""
        return bool(self._last)

    @property
    def finished(self) -> bool:
        """Whether the last operation is over."""
        last = self._last.get("last")
        return last is not None and last.future.done()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that has the thread."""
        return os.getpid() != self._process

    def __repr__(self) -> str:
        alive = not self.forked and self._thread.is_alive()
        begun = sum(each.task is not None for each in self._operations.copy())
        about = f"alive={alive} closing={self.closing} operations={begun}"
        return f"<LoopThread {self._thread.name} {about}>"

    # For other threads ------------------------------------------------------------------------

    def require_running(self) -> None:
        """Raise RuntimeError where the thread does not run: in a fork, or as Python ends."""
        if self.forked:
            raise RuntimeError(
                f"{self._owner} must be used in the process that made it ({self._process}), got "
                f"process {os.getpid()}; its event loop thread does not survive a fork, so create "
                "a new builder in the forked process"
            )
        if sys.is_finalizing():
            raise RuntimeError(
                f"{self._owner} must not be used while the interpreter ends, as its event loop "
                "thread does not run any more; close it before"
            )

    def require_usable(self) -> None:
        """Raise RuntimeError if nothing can be accepted: closed, or without its thread."""
        self.require_running()
        if self.closing:
            raise errors.BuilderClosedError(self._owner)

    def require_other_thread(self, call: str) -> None:
        """Raise RuntimeError in the loop's own thread, which would wait for itself for ever."""
        if threading.current_thread() is self._thread and not self.forked:
            raise RuntimeError(
                f"{call} of {self._owner} must not be called on its own event loop thread, got "
                f"{self._thread.name!r}, which would wait for itself for ever; await the async "
                "builder there, or let a calling source run in a worker thread"
            )

    def operation(self, backlog: SubmissionBacklog | None = None) -> Operation[Any]:
        """Return an operation that has yet to be started; see `Operation`."""
        return Operation(self._loop, self._operations, backlog)

    def start(self, operation: Operation[T], prepare: Callable[[], Work[T]]) -> Operation[T]:
        """Accept an operation, in a copy of the caller's context, and return it.

        It is to do the work that `prepare` returns, once there is a place for it. If nothing can be
        accepted any more it is discarded, and a RuntimeError raised.
        """
        try:
            self.require_usable()
            if operation.backlog is not None:
                operation.backlog.enter(operation)
            work = prepare()
            self.require_usable()  # it may have been closed meanwhile
            self._enqueue(operation, work)
        except BaseException:  # an interrupt may come when it is on its way already
            operation.discard()
            raise
        return operation

    def _enqueue(self, operation: Operation[T], work: Work[T]) -> None:
        # Known first: either the end of the thread finds it here, or is seen by what follows.
        self._operations[operation] = None
        variables = contextvars.copy_context()
        try:
            self._loop.call_soon_threadsafe(self._begin, operation, work, context=variables)
        except RuntimeError:  # the loop is closed
            raise errors.BuilderClosedError(self._owner) from None
        operation.accepted = True
        if self._loop.is_closed():
            operation.settle()

    def run(
        self, call: str, work: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do `work` on the loop and wait for it; breaking the wait off cancels the work.

        Messages call the method that waits by the name of its `call`, such as ``build()``. Raises
        what the work does, and a RuntimeError if nothing can be accepted, in the loop's own thread,
        or when closing cut the work short.
        """
        self.require_other_thread(call)
        operation: Operation[T] = self.operation()
        try:
            self.start(operation, lambda: partial(work, *args, **kwargs))
            operation.wait()
        except BaseException:  # this thread was interrupted, by Ctrl-C for instance
            operation.discard()
            raise
        try:
            return operation.future.result()
        except CancelledError:
            if self.closing:
                raise errors.BuilderClosedError(self._owner) from None
            raise
        finally:
            del operation  # whose error's traceback leads here

    def finish(self, work: Work[None]) -> Operation[None]:
        """Accept the last operation; return the one accepted first if this is not the first."""
        operation: Operation[None] = Operation(self._loop, self._operations, last=True)
        last = self._last.setdefault("last", operation)
        # Once is enough, but an interrupt may have come between the two lines.
        if not last.accepted and not self.forked:
            with contextlib.suppress(errors.BuilderClosedError):
                self._enqueue(last, work)
        return last

    def join(self, seconds: float) -> bool:
        """Wait for the end of the thread once it was stopped; return whether it has come.

        It has not while tasks remain that ignore their cancellation; the thread ends with them.
        """
        over = self._loop.is_closed
        self._changes.wait_for(lambda: over() or self._overdue, seconds)
        if over():
            self._thread.join(seconds)  # it has a few steps left
        return over()

    # On the loop ------------------------------------------------------------------------------

    def _begin(self, operation: Operation[T], work: Work[T]) -> None:
        if (self._drained or self._stopped) and not operation.last:
            operation.settle()  # accepted at the very moment of closing
        else:
            operation.begin(work)

    async def drain(self, until: float, unwinding_seconds: float) -> None:
        """Wait for all operations but the last, until then on the loop's clock.

        Those that take longer are cancelled, and have so many seconds to clean up.
        """
        now = self._loop.time
        while (working := self._working()) and now() < until:
            await asyncio.wait(working, timeout=until - now())
        self._drained = True
        late = self._working()
        for operation in late.values():
            operation.future.cancel()
        if late:
            await asyncio.wait(late, timeout=unwinding_seconds)

    async def end(self) -> None:
        """End the thread, which nobody can use any more, when all that was accepted is done."""
        until = self._loop.time() + LONGEST_WAIT_SECONDS
        try:
            await insist(lambda: self.drain(until, UNWIND_SECONDS))
        finally:
            self.stop()

    def _working(self) -> dict[asyncio.Task[Any], Operation[Any]]:
        operations = self._operations.copy()
        return {each.task: each for each in operations if each.task and not each.last}

    def stop(self, unwinding_seconds: float = UNWIND_SECONDS) -> None:
        """End the thread as soon as every task has ended; those that have not are cancelled."""
        self._stopped = True
        self._unwound_by = self._loop.time() + unwinding_seconds
        self._loop.stop()

    # The thread -------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            while not self._stopped:
                self._run(self._loop.run_forever)
            while asyncio.all_tasks(self._loop):
                self._run(lambda: self._loop.run_until_complete(self._unwind()))
            self._run(lambda: self._loop.run_until_complete(self._loop.shutdown_asyncgens()))
        finally:
            self._loop.close()
            for operation in self._operations.copy():
                operation.settle()
            self._changes.tell()

    def _run(self, run: Callable[[], object]) -> None:
        """Run the loop until it is stopped, or broken off by what is meant for the program."""
        try:
            run()
        except asyncio.CancelledError:  # of a task that is told of by whoever waits for it
            return
        except BaseException as error:
            working = self._working()
            if any(t.done() and not t.cancelled() and t.exception() is error for t in working):
                return  # so is this
            waiting = [operation for operation in working.values() if operation.backlog is None]
            if isinstance(error, PROGRAM_ENDS) and waiting:
                for operation in waiting:
                    operation.fail(_copied(error))
                return
            message = "an error that broke the event loop of a sync snapshot builder off"
            with contextlib.suppress(*PROGRAM_ENDS):  # of a handler that would end the program
                self._loop.call_exception_handler({"message": message, "exception": error})

    async def _unwind(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if not others:
            return
        left_seconds = max(0.0, self._unwound_by - self._loop.time())
        _, left = await asyncio.wait(others, timeout=left_seconds)
        if left:
            self._overdue = True
            self._changes.tell()
            await asyncio.wait(left)


def _copied(error: BaseException) -> BaseException:
    """Return an error for one more thread to raise; the same if it cannot be copied."""
    try:
        copied = copy.copy(error)
    except BaseException:  # its class takes other arguments than it keeps, for instance
        return error
    return copied if isinstance(copied, type(error)) else error


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class SubmissionBacklog:
    """A bounded number of places for operations, for any thread; nobody waits for one."""

    limit: int
    _places: dict[Operation[Any], None] = dataclasses.field(default_factory=dict)
    _untold: dict[Operation[Any], None] = dataclasses.field(default_factory=dict)
    _changes: Changes = dataclasses.field(default_factory=Changes)

    @property
    def pending(self) -> int:
        """How many places are taken."""
        return min(len(self._places), self.limit)

    def enter(self, operation: Operation[Any]) -> None:
        """Take a place for an operation, until it leaves; raise at once if all are taken."""
        places = self._places
        places[operation] = self._untold[operation] = None
        # Of those that came at the same time to the last place, the first one has it.
        if len(places) > self.limit and operation not in islice(places.copy(), self.limit):
            self.leave(operation)
            raise errors.SubmissionBacklogFullError(limit=self.limit, pending=self.pending)

    def leave(self, operation: Operation[Any]) -> None:
        """Give a place back; twice does no harm."""
        self._places.pop(operation, None)
        self._changes.tell()

    def told(self, operation: Operation[Any]) -> None:
        """Let no flush wait for its future any more; its place was given back before."""
        self._untold.pop(operation, None)
        self._changes.tell()

    def flush(self, timeout_seconds: float | None) -> None:
        """Wait until what is accepted now is done; TimeoutError if that takes longer than so."""
        left = [each for each in self._places.copy() | self._untold.copy() if each.accepted]
        accepted = len(left)

        def under_way(operation: Operation[Any]) -> bool:
            return operation in self._places or operation in self._untold

        def done() -> bool:
            while left and not under_way(left[-1]):
                left.pop()
            return not left

        if not self._changes.wait_for(done, timeout_seconds):
            pending = sum(map(under_way, left))
            raise TimeoutError(
                f"submissions accepted before the flush must be done within {timeout_seconds:g} s, "
                f"got {pending} of {accepted} still pending; allow more time"
            )

    def __repr__(self) -> str:
        return f"<SubmissionBacklog {self.pending}/{self.limit}>"


_Errand = tuple[tuple[ResourceKey, ...], Work[T]]
"""The keys that something for the publisher to do concerns, and what it is."""

_Update = ResourceUpdate[Any]


class SyncResourcePublisher:
    """Writes events into a builder's cache; its methods are for any thread.

    ``publish*`` and ``invalidate*`` wait for the outcome. ``submit_*`` return a future at once;
    by then values, metadata and collections have been copied, so that later changes do not
    matter. A bounded number of submissions may be under way. Cancelling a future takes its
    submission back, unless it was done already. Once the builder is closed, in a forked process,
    and where a call would wait on the loop's own thread, it raises a `RuntimeError`.
    """

    def __init__(
        self,
        publisher: ResourcePublisher,
        thread: LoopThread,
        backlog: SubmissionBacklog,
        isolator: PayloadIsolator,
        lifeline: object = None,
    ) -> None:
        self._lifeline = lifeline
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
        told = {} if metadata is None else metadata
        update = ResourceUpdate(key, value, source, observed_at, told)
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
        return self._wait("publish_many()", self._many(updates, force, replace_equal))

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
        """
        number("timeout_seconds", timeout_seconds, minimum=0, optional=True)
        self._thread.require_running()
        self._thread.require_other_thread("flush()")
        self._backlog.flush(timeout_seconds)

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
        """
        told = {} if metadata is None else metadata
        update = ResourceUpdate(key, value, source, observed_at, told)
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
        return self._submit(lambda: self._many(updates, force, replace_equal, self._captured))

    def submit_invalidate(self, key: ResourceKey, *, reason: str = "") -> Future[None]:
        """Submit the removal of `key`; see `submit_publish`."""
        return self._submit(lambda: self._removal((key,), reason))

    def submit_invalidate_many(
        self, keys: Collection[ResourceKey], *, reason: str = ""
    ) -> Future[None]:
        """Submit the removal of `keys` as one; see `submit_publish`."""
        return self._submit(lambda: self._removal(keys, reason))

    # What both kinds do: an errand is checked and made in the thread that has it ---------------

    def _one(self, update: _Update, force: bool, replace_equal: bool) -> _Errand[PublishResult]:
        instance("update", update, ResourceUpdate)
        publish = self._publisher.publish_update
        return (update.key,), partial(publish, update, **_terms(force, replace_equal))

    def _many(
        self,
        updates: Iterable[_Update],
        force: bool,
        replace_equal: bool,
        taken: Callable[[_Update], _Update] = lambda update: update,
    ) -> _Errand[Mapping[ResourceKey, PublishResult]]:
        several = tuple(map(taken, instance("updates", updates, Iterable)))
        for update in several:
            instance("updates", update, ResourceUpdate)
        publish = self._publisher.publish_many
        keys = tuple(dict.fromkeys(update.key for update in several))
        return keys, partial(publish, several, **_terms(force, replace_equal))

    def _removal(self, keys: Iterable[ResourceKey], reason: str) -> _Errand[None]:
        text("reason", reason, empty=True)
        unique = tuple(distinct_keys("keys", keys))
        return unique, partial(self._publisher.invalidate_many, unique, reason=reason)

    def _captured(self, update: _Update) -> _Update:
        instance("update", update, ResourceUpdate)
        copies, context = self._isolator, "a submission"
        try:
            value = copies.copy(update.value, context=context)
            metadata = copies.copy_metadata(update.metadata, context=context)
            # Anew, as a class of the application's may be made of something else.
            return ResourceUpdate(update.key, value, update.source, update.observed_at, metadata)
        except errors.PayloadIsolationError as error:
            # What is no ordinary exception is meant for this thread, such as what a handler raised.
            if error.__cause__ is None or isinstance(error.__cause__, Exception):
                raise
            raise error.__cause__ from None

    def _wait(self, call: str, errand: _Errand[T]) -> T:
        return self._thread.run(call, self._in_turn, errand)

    def _submit(self, capture: Callable[[], _Errand[T]]) -> Future[T]:
        operation: Operation[T] = self._thread.operation(self._backlog)
        self._thread.start(operation, lambda: partial(self._in_turn, capture()))
        return operation.future

    async def _in_turn(self, errand: _Errand[T]) -> T:
        keys, work = errand
        async with self._lanes.turn(keys):
            return await work()


def _terms(force: bool, replace_equal: bool) -> dict[str, bool]:
    return {
        "force": flag("force", force),
        "replace_equal": flag("replace_equal", replace_equal),
    }


def blocking(
    of: str,
    method: Callable[Concatenate[Any, P], Awaitable[T]],
    first: str = "",
    read: Callable[[str, Any], object] = distinct_keys,
) -> Callable[Concatenate[Any, P], T]:
    """Return a method that has an async one done on the loop, and waits for what it returns.

    The ``method``, of the object in the attribute ``of``, also says how it is called, what it means
    and what it raises. If its ``first`` argument is named, that is ``read`` in the caller's thread.
    """
    name, call = method.__name__, f"{method.__name__}()"

    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        if first and args:
            args = read(first, args[0]), *args[1:]
        elif first in kwargs:
            kwargs[first] = read(first, kwargs[first])
        return self._thread.run(call, getattr(getattr(self, of), name), *args, **kwargs)

    made: Callable[Concatenate[Any, P], T] = cast(Any, wraps(method)(wait))
    made.__qualname__ = f"Sync{method.__qualname__}"
    return made


class SeveralBlocking(Protocol[P]):
    """What takes requests by name, or in order, and returns the results in the same form."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a mapping is taken for one
        self, requests: Mapping[K, SnapshotRequest], *args: P.args, **kwargs: P.kwargs
    ) -> Mapping[K, RequestResult]: ...

    @overload
    def __call__(
        self, requests: Iterable[SnapshotRequest], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[RequestResult, ...]: ...


def several_blocking(of: str, method: Several[P]) -> SeveralBlocking[P]:
    """Return the same for a method that takes several requests, however they are given."""
    made = blocking(of, cast(Any, method), "requests", _collected)
    return cast("SeveralBlocking[P]", made)


def _collected(_name: str, requests: Any) -> Any:
    if isinstance(requests, Mapping):
        return FrozenDict(requests)
    return tuple(requests) if isinstance(requests, Iterable) else requests


class SyncSnapshotSession:
    """Several stages of one piece of work that share an id, a deadline and pinned values.

    Each method waits for its outcome; see `SnapshotSession` for what it means and raises.
    """

    def __init__(
        self, session: SnapshotSession, thread: LoopThread, lifeline: object = None
    ) -> None:
        self._lifeline = lifeline
        self._session = session
        self._thread = thread

    def __repr__(self) -> str:
        return f"<SyncSnapshotSession {self.snapshot_id!r} closed={self.closed}>"

    def __enter__(self) -> SyncSnapshotSession:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with gives_way(error):
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

    resolve = blocking("_session", SnapshotSession.resolve, "keys")
    """Resolve further keys and return everything requested so far."""

    resolve_request = blocking("_session", SnapshotSession.resolve_request)
    """Resolve a request and return everything requested so far."""

    try_request = blocking("_session", SnapshotSession.try_request)
    """Return what comes of a request."""

    try_requests = several_blocking("_session", SnapshotSession.try_requests)
    """Return what comes of each of many requests."""

    revalidate = blocking("_session", SnapshotSession.revalidate, "keys")
    """Replace pinned values and what was derived from them, all or none."""

    def snapshot(self) -> Snapshot:
        """Return everything requested so far, copied within the session's deadline."""
        return self._thread.run("snapshot()", self._session.snapshot_async)

    def close(self) -> None:
        """Close the session; nothing to do if it is closed, also by its builder, or in a fork."""
        if self.closed or self._thread.forked or sys.is_finalizing():
            return
        with contextlib.suppress(errors.BuilderClosedError):
            self._thread.run("close()", self._session.close)


class _Lifeline:
    """What everybody holds who can still use a thread, and its thread does not."""


class SyncSnapshotBuilder:
    """A `SnapshotBuilder` on an event loop in a thread of its own; its methods are for any thread.

    Keep one for the life of the application. The thread of one that is forgotten without being
    closed ends when what was accepted is done; the builder itself is not closed then. A method that
    waits refuses to be called on the loop's own thread, and in a forked process, with a
    `RuntimeError`; so does everything once the builder is closed. Breaking a wait off (Ctrl-C)
    cancels what it waits for.

    Attributes:
        builder: the builder on the loop; not in use by another one.
        publisher: publishes into the builder's cache.
        close_builder: whether closing closes the builder as well.
        shutdown_timeout_seconds: how long closing waits for accepted work, before it cancels what
            is left.
        max_pending_submissions: how many of the publisher's submissions may be under way.
    """

    def __init__(
        self,
        builder: SnapshotBuilder,
        *,
        close_builder: bool = True,
        shutdown_timeout_seconds: float = 5.0,
        max_pending_submissions: int = 1024,
    ) -> None:
        if not (callable(getattr(builder, "aclose", None)) and hasattr(builder, "publisher")):
            raise wrong_type("builder", "a SnapshotBuilder", builder)
        self.builder = builder
        self.close_builder: bool = flag("close_builder", close_builder)
        number("shutdown_timeout_seconds", shutdown_timeout_seconds, minimum=0)
        self.shutdown_timeout_seconds: float = shutdown_timeout_seconds
        integer("max_pending_submissions", max_pending_submissions, minimum=1)
        self._backlog = SubmissionBacklog(max_pending_submissions)
        isolator = PayloadIsolator(getattr(builder, "payload_copier", None))
        self._lingering: asyncio.Task[None] | None = None
        self._thread = LoopThread(name=THREAD_NAME, owner="the sync snapshot builder")
        self._lifeline = _Lifeline()
        self._forgotten = weakref.finalize(self._lifeline, self._thread.finish, self._thread.end)
        self._forgotten.atexit = False
        self.publisher: SyncResourcePublisher = SyncResourcePublisher(
            builder.publisher, self._thread, self._backlog, isolator, self._lifeline
        )

    def __repr__(self) -> str:
        return f"<SyncSnapshotBuilder closed={self.closed} {self._backlog!r} over {self.builder!r}>"

    def __enter__(self) -> SyncSnapshotBuilder:
        self._thread.require_usable()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with gives_way(error):
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

    build = blocking("builder", SnapshotBuilder.build, "keys")
    """Resolve `keys` and return their snapshot."""

    build_request = blocking("builder", SnapshotBuilder.build_request)
    """Resolve a request and return its snapshot."""

    try_request = blocking("builder", SnapshotBuilder.try_request)
    """Return what comes of a request."""

    try_requests = several_blocking("builder", SnapshotBuilder.try_requests)
    """Return what comes of each of many requests."""

    wait_for_refreshes = blocking("builder", SnapshotBuilder.wait_for_refreshes)
    """Wait for the background refreshes that have been scheduled."""

    def session(
        self,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
        trace: bool | None = None,
    ) -> SyncSnapshotSession:
        """Open a session; its deadline runs from now. See `SnapshotBuilder.session`."""

        async def opened() -> SyncSnapshotSession:
            session = self.builder.session(
                deadline_seconds=deadline_seconds,
                metadata=metadata,
                snapshot_id=snapshot_id,
                trace=trace,
            )
            return SyncSnapshotSession(session, self._thread, self._lifeline)

        return self._thread.run("session()", opened)

    def health_snapshot(self) -> BuilderHealth:
        """Return the builder's health, together with the backlog of submissions."""
        return self._with_backlog(
            self._thread.run("health_snapshot()", self.builder.health_snapshot)
        )

    def health_snapshot_nowait(self) -> BuilderHealth:
        """Return the same at once, on any thread; see `SnapshotBuilder.health_snapshot_nowait`."""
        return self._with_backlog(self.builder.health_snapshot_nowait())

    def _with_backlog(self, health: BuilderHealth) -> BuilderHealth:
        return dataclasses.replace(
            health,
            pending_submissions=self._backlog.pending,
            max_pending_submissions=self._backlog.limit,
        )

    def submit(self, work: Callable[[SnapshotBuilder], Awaitable[T]]) -> Future[T]:
        """Start ``work(builder)`` on the event loop of the builder's thread; never waits.

        For what has no blocking method of its own: an async function that does not block.
        Cancelling the future cancels the work.
        """
        callable_("work", work)
        operation: Operation[T] = self._thread.operation()
        return self._thread.start(operation, lambda: partial(work, self.builder)).future

    def recent_traces(self) -> tuple[Trace, ...]:
        """Return the last traces at once, on any thread; see `SnapshotBuilder.recent_traces`."""
        return self.builder.recent_traces()

    def flush_submissions(self, *, timeout_seconds: float | None = None) -> None:
        """Wait for the submissions accepted before; see `SyncResourcePublisher.flush`."""
        self.publisher.flush(timeout_seconds=timeout_seconds)

    def close(self) -> None:
        """Refuse new work, finish what was accepted, close the builder and end the thread.

        All of it has ``shutdown_timeout_seconds``: accepted work and background refreshes that take
        longer are cancelled, and copies and sinks are not waited for any more. What was cancelled
        may clean up for as long again, but no longer than a second.

        Calls that come while another thread closes wait for the same closing and share its outcome;
        later ones do nothing. In a forked process, and while the interpreter ends, there is nothing
        to close.

        Raises:
            PayloadCopyShutdownTimeoutError, ObservabilityShutdownTimeoutError: if copies or sinks
                are late. The thread lives on until they have ended, and then ends by itself.
            RuntimeError: on the thread of the loop.
            TimeoutError: if the loop is held, so that nothing on it can be ended.
            Exception: what closing the builder raised.
        """
        thread = self._thread
        if thread.forked:
            return
        thread.require_other_thread("close()")
        was_over = thread.finished
        closing = thread.finish(self._close_all)
        self._forgotten.detach()  # or what closing raises would keep all of this alive
        if sys.is_finalizing():
            return
        patience = self.shutdown_timeout_seconds + 2 * UNWIND_SECONDS
        if not closing.wait(patience):
            raise TimeoutError(
                f"closing must be over within {self.shutdown_timeout_seconds:g} s, got an event "
                f"loop thread that is still held after {patience:g} s; let sources that block run "
                "in worker threads"
            )
        if self._lingering is None:
            thread.join(UNWIND_SECONDS * 2)
        error = None if closing.future.cancelled() else closing.future.exception()
        if error is not None and not was_over:
            raise error

    async def _close_all(self) -> None:
        until = asyncio.get_running_loop().time() + self.shutdown_timeout_seconds
        unwinding = min(UNWIND_SECONDS, self.shutdown_timeout_seconds)
        try:
            await insist(lambda: self._thread.drain(until, unwinding))
            await insist(lambda: self._end_builder(until))
        except BaseException:
            health = self.builder.health_snapshot_nowait()
            if health.payload_copy_shutdown_incomplete or health.observability_shutdown_incomplete:
                self._lingering = asyncio.create_task(self._outlive_late_workers(unwinding))
            raise
        finally:
            if self._lingering is None:
                self._thread.stop(unwinding)

    async def _end_builder(self, until: float) -> None:
        builder = self.builder
        now, in_time = asyncio.get_running_loop().time, True
        if not builder.closed:
            waiting = asyncio.ensure_future(builder.wait_for_refreshes())
            done, _ = await asyncio.wait([waiting], timeout=max(0.0, until - now()))
            in_time = bool(done)
            waiting.cancel()
        if self.close_builder:
            left = max(MOMENT_SECONDS, until - now())
            await builder.aclose(cancel_refreshes=not in_time, shutdown_timeout_seconds=left)

    async def _outlive_late_workers(self, unwinding: float) -> None:
        try:
            await self.builder.wait_for_payload_copy_shutdown()
            await self.builder.wait_for_observability_shutdown()
        finally:
            self._thread.stop(unwinding)
