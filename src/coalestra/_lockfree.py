"""State that threads share without locks, how threads and loops wait for it, and a queue of such.

Laws:

1. No lock is held while code that is not ours may run: signal handlers, finalizers, other threads
   and forked children may use such state wherever they strike, and find it whole.
2. A change is one step of the interpreter that either happens or does not, such as ``setdefault``
   on a dictionary, ``append`` or ``popleft`` on a deque.
3. Who waits has a bell of his own, a queue that only wakes him, and looks at the state again
   whenever it rings. It is known as long as he holds it, so that an interrupt leaves none behind.
   While the interpreter ends nobody waits: no other thread will ever run again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from coalestra._endings import PROGRAM_ENDS

S = TypeVar("S")

LONGEST_WAIT_SECONDS = 4_000_000.0
"""What every system lets a thread wait for at a time; who wants longer waits again."""

SIGNAL_LOOK_SECONDS = 1.0
"""How often the main thread looks up from a wait.

A signal that comes just before the wait, as the thread gets hold of the interpreter, breaks no wait
off: Python handles it at the thread's next step, and without one Ctrl-C would be lost.
"""


def after_fork(begin_afresh: Callable[[Any], object]) -> weakref.WeakSet[Any]:
    """Return a set whose members, whatever is put into it, begin afresh in a forked child."""
    members: weakref.WeakSet[Any] = weakref.WeakSet()

    def forked() -> None:
        for each in tuple(members):
            begin_afresh(each)

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forked)
    return members


class Cell(Generic[S]):
    """One immutable value that changes by steps, none of which is ever lost.

    Each version of the value has room for one successor, so that of two changes of one version
    the second one finds the room taken and is made to the successor instead.
    """

    __slots__ = ("_newest",)

    def __init__(self, value: S) -> None:
        self._newest: dict[str, Any] = {"value": value}

    @property
    def value(self) -> S:
        """The value as it is now."""
        version = self._newest
        while "next" in version:
            version = version["next"]
        value: S = version["value"]
        return value

    def change(self, step: Callable[[S], S]) -> None:
        """Replace the value by what ``step``, which has no effects, makes of it."""
        version = self._newest
        while True:
            while "next" in version:
                version = version["next"]
            changed = {"value": step(version["value"])}
            if version.setdefault("next", changed) is changed:
                self._newest = changed
                return

    def __repr__(self) -> str:
        return f"Cell({self.value!r})"


class Changes:
    """Lets threads and coroutines wait until something holds of state that others change."""

    __slots__ = ("_ringers",)

    def __init__(self) -> None:
        self._ringers: dict[weakref.ref[Callable[[], object]], None] = {}

    def tell(self) -> None:
        """Have everybody who waits look at the state again; call this after a change."""
        for each in self._ringers.copy():
            if (ring := each()) is not None:
                ring()

    def _ring(self, ring: Callable[[], object]) -> None:
        """Call this after a change, too, for as long as somebody holds it."""
        self._ringers[weakref.ref(ring, self._ringers.pop)] = None

    def wait_for(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait in this thread, for so long at most, until ``holds`` returns True.

        It may be called any number of times; returned is what it says in the end.
        """
        if holds():
            return True
        bell: SimpleQueue[None] = SimpleQueue()
        ring = partial(bell.put, None)
        self._ring(ring)
        end = None if seconds is None else time.monotonic() + seconds
        on_main = threading.current_thread() is threading.main_thread()
        longest = SIGNAL_LOOK_SECONDS if on_main else LONGEST_WAIT_SECONDS
        while not holds():
            left = LONGEST_WAIT_SECONDS if end is None else end - time.monotonic()
            if left <= 0 or sys.is_finalizing():
                return holds()
            with contextlib.suppress(Empty):
                bell.get(timeout=min(left, longest))
        return True

    async def until(self, holds: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait on the running loop until ``holds`` returns True; see `wait_for`."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()
        late: list[bool] = []

        def ring() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(woken.set)

        def expire() -> None:
            late.append(True)
            woken.set()

        timer = None if seconds is None else loop.call_later(seconds, expire)
        self._ring(ring)
        try:
            while not holds() and not late:
                await woken.wait()
                woken.clear()
            return holds()
        finally:
            if timer is not None:
                timer.cancel()


R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Entry:
    """A record in the line, or a turn of the worker: something that can be waited for."""

    record: Any = None
    settled: bool = False


@dataclass(eq=False, repr=False)
class WorkerQueue(Generic[R]):
    """Takes records from any thread and hands them to ``deliver`` in a thread of its own.

    1. Accepting a record waits for nothing and holds no lock.
    2. Records leave in the order in which they came, one at a time. Each one ends in exactly one of
       ``delivered``, ``failures`` and ``dropped``, and so does each one that found no room.
    3. One at a time is the worker: a thread of the queue's own, or, where no thread can be started,
       whoever waits for an end. What a delivery raises is counted and goes no further.
    4. A record leaves the line only while a turn of the worker is under way, so that whoever looks
       at both misses none.

    The thread is a daemon and starts with the first record. In a forked child the queue starts
    afresh: what was pending is the parent's to deliver.

    Args:
        deliver: takes one record; it may block, and it may raise.
        max_pending: how many records may wait; the one in delivery does not. Threads that report at
            the very same time may add one each.
        drop_oldest: whether one more takes the place of what waited longest; else it is dropped.
        name: of the worker thread.
        lingers: whether the thread ends with the queue; else whenever nothing is left to do.
        noted: is told what each delivery raised, or None.
    """

    deliver: Callable[[R], object]
    max_pending: int
    _: KW_ONLY
    drop_oldest: bool
    name: str
    lingers: bool
    noted: Callable[[BaseException | None], object] = lambda _: None

    def __post_init__(self) -> None:
        self._waiting: deque[_Entry] = deque()
        self._refused, self._discarded = Cell(0), Cell(0)
        self._delivered = self._failures = self._disowned = 0
        self._peak = self._shutdown_timeouts = 0
        self.closed = self.ended = self._gone = False
        self._at_end: deque[Callable[[], object]] = deque()
        self.begin_afresh()
        _queues.add(self)

    def begin_afresh(self) -> None:
        """Be without a worker and without pending records, as at first and after a fork."""
        self._disowned += len(self._waiting)
        self._waiting.clear()
        self._turn: _Entry | None = None
        self._thread: threading.Thread | None = None
        # Whoever is the worker stands here, under the one name that the first one takes.
        self._role: dict[str, threading.Thread] = {}
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._changes = Changes()

    def put(self, record: R) -> bool:
        """Accept a record; return False if it was dropped."""
        full = len(self._waiting) >= self.max_pending
        if self.closed or (full and not self.drop_oldest):
            self._refused.change(lambda count: count + 1)
            return False
        self._waiting.append(_Entry(record))
        if full:
            self.drop(down_to=self.max_pending)
        self._peak = max(self._peak, self.pending)
        if "worker" in self._role:
            self._wake()
        else:
            self._start()
        if self.ended:  # closed meanwhile, and the worker has gone
            self.drop()
        return True

    def drop(self, *, down_to: int = 0) -> None:
        """Drop what waited longest until no more than so many records wait."""
        while len(self._waiting) > down_to:
            with contextlib.suppress(IndexError):  # the worker took it
                entry = self._waiting.popleft()
                self._discarded.change(lambda count: count + 1)
                entry.settled = True
        self._changes.tell()

    def _start(self) -> None:
        """Start a worker thread unless one is on its way, or none can be had."""
        if sys.is_finalizing() or (self._thread is not None and self._thread.is_alive()):
            return
        stay = {"stay": self.lingers}
        thread = threading.Thread(target=self._work, kwargs=stay, name=self.name, daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # records wait for the next try, or for a flush
            self._thread = None

    # Delivering -------------------------------------------------------------------------------

    def _work(self, end: float | None = None, *, stay: bool = True) -> None:
        """Be the worker, unless somebody is: to the end of the queue, or of what is waiting.

        To the latter unless it is to `stay`, and to an `end` on the monotonic clock at the latest.
        """
        role, me = self._role, threading.current_thread()
        if role.setdefault("worker", me) is not me:
            if self._thread is me:  # whoever is the worker starts another one if need be
                self._thread = None
            return
        try:
            while not (self._waiting and end is not None and time.monotonic() >= end):
                if self._deliver_next():
                    continue
                self.ended = self.closed
                if self.ended and not self._waiting:
                    break
                if not self.ended:
                    if not stay:
                        break
                    self._bell.get()
        finally:
            if not self.ended:
                role.pop("worker", None)
                if self._thread is me:  # so that who comes from now on starts another one
                    self._thread = None
        if self.ended:
            self._run_callbacks()
            self._gone = True
        elif self._waiting:  # came when this was still the worker
            self._start()
        self._changes.tell()

    def _deliver_next(self) -> bool:
        """Deliver the record that waited longest; return False if there is none."""
        turn = self._turn = _Entry()
        entry = None
        try:
            entry = self._waiting.popleft()
            self.deliver(entry.record)
            self._delivered += 1
            self._note(None)
        except BaseException as error:
            if entry is None:  # the line is empty
                return False
            self._failures += 1
            self._note(error)
            if not self._is_own_thread and isinstance(error, PROGRAM_ENDS):
                raise
        finally:
            for each in (turn, entry):
                if each is not None:
                    each.record, each.settled = None, True  # and nothing keeps it alive
            self._turn = None
            self._changes.tell()
        return True

    def _note(self, error: BaseException | None) -> None:
        with contextlib.suppress(BaseException if self._is_own_thread else Exception):
            self.noted(error)

    @property
    def _is_own_thread(self) -> bool:
        """Whether this is the queue's own thread, in which not even an exit has anybody to tell."""
        return threading.current_thread() is self._thread

    def _do_without_thread(self, seconds: float | None) -> None:
        """Deliver in this thread if no other one does or can."""
        if self._thread is None and self._waiting:
            self._start()
        # No other thread runs while the interpreter ends. One that was in the midst of a delivery
        # may hold locks of the sink, so that delivering more could wait for ever.
        gone = sys.is_finalizing() and self._turn is None
        if gone:
            self._role = {}
        if gone or not (self._thread is not None and self._thread.is_alive()):
            self._work(None if seconds is None else time.monotonic() + seconds, stay=False)

    # Waiting and closing ----------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was accepted before has been dealt with; return whether it has been.

        Where no thread can be started, it is delivered here. The worker, which cannot wait for
        itself, returns at once.
        """
        unsettled = [each for each in (self._last_waiting(), self._turn) if each is not None]
        if self._is_worker():
            timeout = 0
        else:
            self._do_without_thread(timeout)
        return self._changes.wait_for(lambda: all(each.settled for each in unsettled), timeout)

    def wait_ended(self, timeout: float | None) -> bool:
        """Wait for the end of a closed queue; return whether it is over. The worker only asks."""
        if self._is_worker():
            return False
        self._do_without_thread(timeout)
        return self._note_end(self._changes.wait_for(lambda: self._gone, timeout))

    async def until_ended(self, timeout: float | None) -> bool:
        """Wait for the end of a closed queue without blocking the loop; see `wait_ended`."""
        self._do_without_thread(timeout)
        return self._note_end(await self._changes.until(lambda: self._gone, timeout))

    async def until_empty(self, timeout: float | None) -> int:
        """Wait until nothing is pending without blocking the loop; return how much is."""
        self._do_without_thread(timeout)
        await self._changes.until(lambda: not self.pending, timeout)
        return self.pending

    def refuse(self, *, discard: bool = False) -> None:
        """Accept no more records, and do not wait; ``discard`` drops what is pending."""
        self.closed = True
        if discard:
            self.drop()
        self._wake()

    def _wake(self) -> None:
        """Have the worker look for records; any number of times is as good as once."""
        if self._bell.empty():
            self._bell.put(None)

    def call_at_end(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called after the last record of a closed queue, by its worker."""
        self._at_end.append(callback)
        if self.ended:
            self._run_callbacks()

    def _run_callbacks(self) -> None:
        while self._at_end:
            with contextlib.suppress(BaseException):  # nobody is left to tell
                self._at_end.popleft()()

    def _note_end(self, ended: bool) -> bool:
        if not ended:
            self._shutdown_timeouts += 1
        elif not sys.is_finalizing():
            worker = self._role.get("worker")
            if worker is not None and worker is not threading.current_thread():
                worker.join(1.0)  # it has a few steps left
        return ended

    def _is_worker(self) -> bool:
        return not self.ended and self._role.get("worker") is threading.current_thread()

    def _last_waiting(self) -> _Entry | None:
        try:
            return self._waiting[-1]
        except IndexError:
            return None

    @property
    def pending(self) -> int:
        """How many records were accepted and are not dealt with."""
        return min(len(self._waiting) + (self._turn is not None), self.max_pending)

    def stats(self) -> dict[str, Any]:
        """Return the counts and the state, by the names of `BufferedSinkStats`."""
        while True:  # until nothing moved while they were read
            settled = self._delivered, self._failures, self._discarded.value
            turn, waiting, pending = self._turn, len(self._waiting), self.pending
            if settled == (self._delivered, self._failures, self._discarded.value):
                break
        delivered, failures, discarded = settled
        return {
            "enqueued": sum(settled) + self._disowned + waiting + (turn is not None),
            "delivered": delivered,
            "dropped": discarded + self._refused.value,
            "failures": failures,
            "pending": pending,
            "closed": self.closed,
            "max_pending": self.max_pending,
            "peak_pending": self._peak,
            "worker_alive": not self.ended and not (self.closed and self._thread is None),
            "shutdown_timeout_count": self._shutdown_timeouts,
        }


_queues: weakref.WeakSet[WorkerQueue[Any]] = after_fork(WorkerQueue.begin_afresh)
