"""How many submissions may be under way, and which they are."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from typing import Any

from coalestra.core.errors import SubmissionBacklogFullError


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
