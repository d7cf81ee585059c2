"""The records that a buffer has accepted, and what became of them: no thread, lock or clock.

Laws:
    Records leave in the order in which they came. Each one that came ends in exactly one of
    ``delivered``, ``failures`` and ``dropped``, and so does each one that found no room.
"""

from __future__ import annotations

import dataclasses
import queue
from collections import deque
from typing import Generic, TypeVar

from coalestra.core.validation import choice, integer
from coalestra.observability.overflow import BufferOverflowPolicy

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class BufferedSinkStats:
    """The state of one buffer at one moment; counts are since it was made.

    Attributes:
        enqueued: records accepted.
        delivered: records that the downstream sink took.
        dropped: records lost to a full or closed buffer, or discarded as it closed.
        failures: deliveries that raised.
        pending: records accepted and not settled; the one in delivery does not count when that
            would make more than ``max_pending``.
        closed: whether new records are refused.
        max_pending: how many records may wait.
        peak_pending: the most that were ever pending.
        worker_alive: whether what is accepted will be delivered: the worker thread runs, or will
            start with the first record. False once it has ended.
        shutdown_timeout_count: calls of ``close`` that ran out of time.
    """

    enqueued: int
    delivered: int
    dropped: int
    failures: int
    pending: int
    closed: bool
    max_pending: int = 0
    peak_pending: int = 0
    worker_alive: bool = False
    shutdown_timeout_count: int = 0


class Backlog(Generic[R]):
    """A bounded line of records, at most one of them in delivery, with its counts.

    Args:
        max_pending: how many records may wait (at least 1); the one in delivery does not.
        overflow: what happens to one more.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``max_pending`` is below 1.
    """

    __slots__ = (
        "_delivered",
        "_dropped",
        "_enqueued",
        "_failures",
        "_in_delivery",
        "_peak",
        "_waiting",
        "max_pending",
        "overflow",
    )

    def __init__(self, max_pending: int, overflow: BufferOverflowPolicy) -> None:
        self.max_pending: int = integer("max_pending", max_pending, minimum=1)
        self.overflow: BufferOverflowPolicy = choice("overflow", overflow, BufferOverflowPolicy)
        self._waiting: deque[R] = deque()
        # Records are numbered from 1 as they are accepted; 0 stands for none.
        self._in_delivery = 0
        self._enqueued = self._delivered = self._dropped = self._failures = self._peak = 0

    def accept(self, record: R) -> bool:
        """Let a record wait, making room for it if the policy says so.

        Returns:
            Whether it was accepted.

        Raises:
            queue.Full: there is no room, and the policy is to raise.
        """
        if len(self._waiting) >= self.max_pending and not self._make_room():
            return False
        self._waiting.append(record)
        self._enqueued += 1
        self._peak = max(self._peak, self.pending)
        return True

    def _make_room(self) -> bool:
        self._dropped += 1
        if self.overflow is BufferOverflowPolicy.RAISE:
            raise queue.Full(
                f"{self.max_pending} records wait for delivery; raise max_pending, or choose an "
                "overflow policy that drops"
            )
        if self.overflow is BufferOverflowPolicy.DROP_NEWEST:
            return False
        self._waiting.popleft()
        return True

    def turn_away(self) -> None:
        """Count a record that came when none is accepted any more."""
        self._dropped += 1

    def take(self) -> R:
        """Return the record that waited longest; it is in delivery until it is settled."""
        self._in_delivery = self._first_waiting
        return self._waiting.popleft()

    def settle(self, *, failed: bool) -> None:
        """Count what became of the record in delivery."""
        self._in_delivery = 0
        self._failures += failed
        self._delivered += not failed

    def discard(self) -> None:
        """Drop everything that waits."""
        self._dropped += len(self._waiting)
        self._waiting.clear()

    def disown(self) -> None:
        """Forget everything that is pending without counting it: somebody else delivers it."""
        self._waiting.clear()
        self._in_delivery = 0

    @property
    def empty(self) -> bool:
        """Whether no record waits; one may be in delivery."""
        return not self._waiting

    @property
    def newest(self) -> int:
        """The number of the record accepted last."""
        return self._enqueued

    @property
    def oldest_unsettled(self) -> int:
        """The number of the oldest pending record; if there is none, of the next to come."""
        return self._in_delivery or self._first_waiting

    @property
    def pending(self) -> int:
        """How many records take room: those that wait, and the one in delivery while it can."""
        return min(len(self._waiting) + (self._in_delivery > 0), self.max_pending)

    @property
    def _first_waiting(self) -> int:
        return self._enqueued - len(self._waiting) + 1

    def stats(
        self, *, closed: bool, worker_alive: bool, shutdown_timeout_count: int
    ) -> BufferedSinkStats:
        """Return the counts, together with what only the owner of the line knows."""
        return BufferedSinkStats(
            enqueued=self._enqueued,
            delivered=self._delivered,
            dropped=self._dropped,
            failures=self._failures,
            pending=self.pending,
            closed=closed,
            max_pending=self.max_pending,
            peak_pending=self._peak,
            worker_alive=worker_alive,
            shutdown_timeout_count=shutdown_timeout_count,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.pending}/{self.max_pending} {self.overflow.value}>"
