"""What the virtual loop has to know about threads: may one of them still send it something?

Virtual time stands still while a thread works on something the loop was promised. It may move
again once every such thread is *parked*: held at a ``ThreadGate``, or blocked on a lock for
``BLOCKED_SECONDS`` of real time, so that only the test (or a timer) can set it going. A thread that
has been notified, or is starting or ending, is never parked, however long a busy machine takes to
give it a processor.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

BLOCKED_SECONDS = 0.05
"""A thread that sat at the same lock for so long (in real seconds) counts as parked."""

_WAITING_MODULES = frozenset(
    {"threading", "queue", "selectors", "concurrent.futures._base", "coalestra._lockfree"}
)
_WORKER_LOOPS = frozenset(
    {("concurrent.futures.thread", "_worker"), ("coalestra.concurrency.threads", "_serve")}
)
_WORKER_NAMES = ("coalestra-worker", "asyncio_", "ThreadPoolExecutor")

_parked: dict[int, object] = {}
_parking = threading.Lock()


@contextmanager
def parked_here(place: object) -> Iterator[None]:
    """Mark the calling thread as held at ``place`` until it goes on or ``unpark(place)``."""
    ident = threading.get_ident()
    with _parking:
        _parked[ident] = place
    try:
        yield
    finally:
        with _parking:
            _parked.pop(ident, None)


def unpark(place: object) -> None:
    """Count every thread held at ``place`` as working again, before it has even woken up."""
    with _parking:
        for ident in [ident for ident, held_at in _parked.items() if held_at is place]:
            del _parked[ident]


def parked_threads() -> dict[int, object]:
    """The threads held at this moment: identifier to place."""
    with _parking:
        return dict(_parked)


def threads_held() -> list[str]:
    """Every thread held somewhere, in words."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [
        f"thread {names.get(ident, ident)} held at {place!r}"
        for ident, place in parked_threads().items()
    ]


def library_jobs() -> int:
    """How many calls the library's own worker threads have accepted and not yet reported."""
    module = sys.modules.get("coalestra.concurrency.threads")
    every = () if module is None else tuple(module._instances)
    return sum(sum(threads.busy.values()) for threads in every if threads._running)


class ThreadWatch:
    """One loop's view of the threads beside it."""

    def __init__(self) -> None:
        self._older = weakref.WeakSet(threading.enumerate())
        self._sightings: dict[int, tuple[int, int, float]] = {}

    def look_afresh(self) -> None:
        """Forget who seemed blocked: the loop has run since, and may have released them."""
        self._sightings.clear()

    def working(self, jobs: int) -> list[str]:
        """Name the threads that may still post something; empty once time may move on.

        Args:
            jobs: calls handed to an executor of the loop and not yet answered.
        """
        if threading.active_count() == 1:
            return []
        frames = sys._current_frames()
        del frames[
            threading.get_ident()
        ]  # or this frame, and all that it holds, is part of a cycle
        parked = parked_threads()
        names: list[str] = []
        held = 0
        for thread in threading.enumerate():
            ident = thread.ident
            if ident is None or ident not in frames:
                continue
            is_worker = thread.name.startswith(_WORKER_NAMES)
            if thread in self._older and not is_worker:
                continue
            frame = frames[ident]
            # Who does not wait goes on meanwhile: only his innermost frame is safe to look at.
            waiting = _is_waiting(frame)
            if thread.name == "coalestra-log":
                idle = False  # it lives only while it has something to write
            elif thread.name.endswith("-buffer"):
                idle = waiting and _is_at_rest(frame)
            else:
                idle = _is_idle(_own_frame(frame), is_worker=is_worker)
            if waiting and (_is_starting_or_ending(frame) or _is_released(frame)):
                names.append(thread.name)
            elif idle:
                self._sightings.pop(ident, None)
            elif ident in parked or self._is_blocked(ident, frame):
                held += is_worker
            else:
                names.append(thread.name)
        if not names and (jobs := jobs + library_jobs()) > held:
            names.append(f"{jobs - held} call(s) handed to a thread")
        return names

    def _is_blocked(self, ident: int, frame: FrameType) -> bool:
        """Whether the thread has been waiting at one and the same place for long enough."""
        if not _is_waiting(frame):
            self._sightings.pop(ident, None)
            return False
        now = time.monotonic()
        place, instruction, since = self._sightings.get(ident, (0, 0, now))
        if (place, instruction) != (id(frame), frame.f_lasti):
            since = now
        self._sightings[ident] = (id(frame), frame.f_lasti, since)
        return now - since >= BLOCKED_SECONDS


def _module(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__"))


def _is_waiting(frame: FrameType) -> bool:
    return _module(frame) in _WAITING_MODULES


def _is_starting_or_ending(frame: FrameType) -> bool:
    """Whether the thread is at what comes before its work, or after it, which nothing holds up."""
    current: FrameType | None = frame
    begun = False
    while current is not None and current.f_code.co_name != "_bootstrap_inner":
        begun |= current.f_code.co_name == "run"
        current = current.f_back
    return current is not None and not begun


def _is_released(frame: FrameType) -> bool:
    """Whether what this thread waited for has come, and it only has not gone on yet.

    A condition forgets a waiter as it notifies it, the list of threads forgets one that ends, who
    waits for a change of the library's state has a function that looks at it, and the bell of a
    buffer that has something to do has been rung, or is being rung.
    """
    current: FrameType | None = frame
    while current is not None and _is_waiting(current):
        if current.f_code.co_name == "_work":
            return not _is_at_rest(current)
        current = current.f_back
    current = frame
    while current is not None and _is_waiting(current):
        own = current.f_locals
        if "holds" in own:
            return bool(own["holds"]())
        if isinstance(own.get("self"), threading.Condition) and "waiter" in own:
            return own["waiter"] not in own["self"]._waiters
        if isinstance(own.get("self"), threading.Thread) and current.f_code.co_name == "join":
            return own["self"] not in threading.enumerate()
        current = current.f_back
    return False


def _own_frame(frame: FrameType) -> FrameType | None:
    """The innermost frame that is not part of a lock, a queue or a selector."""
    current: FrameType | None = frame
    while current is not None and _is_waiting(current):
        current = current.f_back
    return current


def _is_idle(frame: FrameType | None, *, is_worker: bool) -> bool:
    """Whether a thread whose own innermost frame this is waits for work to be given to it.

    A worker does so in its loop, and nowhere else. Any other thread of the library (a buffer,
    the loop of the blocking facade) does when it waits in the library's own code.
    """
    if frame is None:
        return True
    if is_worker:
        return (_module(frame), frame.f_code.co_name) in _WORKER_LOOPS
    return _module(frame).startswith("coalestra.") or _module(frame).startswith("asyncio.")


def _is_at_rest(frame: FrameType) -> bool:
    """Whether the thread of a buffer has nothing to do, not even to end or to wake up first."""
    current: FrameType | None = frame
    while current is not None:
        if current.f_code.co_name == "_work":
            queue = current.f_locals["self"]
            ending = queue.closed and not queue._gone
            return not (queue._waiting or queue._turn is not None or ending)
        current = current.f_back
    return False
