"""Tell a cancellation that was asked for here from one that somebody else asked for.

From Python 3.11 on a task counts the requests to cancel it. On 3.10 it does not, so there its
``cancel`` is counted from outside for as long as somebody here needs to know. Only who has bound
the method before (``call_later(1, task.cancel)``) escapes that count, and is still heard unless
the request falls into the very step of one's own.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Protocol


class OwnCancellation(Protocol):
    """One party's requests to cancel a task, kept apart from everybody else's."""

    def request(self) -> None:
        """Cancel the task."""

    def withdraw(self) -> bool:
        """Take the one request back; return whether nobody else has asked since the beginning."""

    def end(self) -> None:
        """Stop telling requests apart."""


if sys.version_info >= (3, 11):

    class _Counted:
        """Reads the count that the task itself keeps."""

        __slots__ = ("_before", "_task")

        def __init__(self, task: asyncio.Task[Any]) -> None:
            self._task = task
            self._before = task.cancelling()

        def request(self) -> None:
            self._task.cancel()

        def withdraw(self) -> bool:
            return self._task.uncancel() <= self._before

        def end(self) -> None:
            pass

else:
    _SHADOWED = "cancel"

    class _Requests:
        """Stands in for one task's ``cancel`` and counts how often it is called."""

        __slots__ = ("_cancel", "count", "parties")

        def __init__(self, task: asyncio.Task[Any]) -> None:
            self._cancel = task.cancel
            self.count = 0
            self.parties = 0

        def __call__(self, msg: Any | None = None) -> bool:
            self.count += 1
            return self._cancel(msg)

    class _Counted:
        """Counts the requests in place of the task, while it is of interest."""

        __slots__ = ("_before", "_requests", "_task")

        def __init__(self, task: asyncio.Task[Any]) -> None:
            present: object = task.cancel
            requests = present if isinstance(present, _Requests) else _Requests(task)
            setattr(task, _SHADOWED, requests)
            requests.parties += 1
            self._task = task
            self._requests = requests
            self._before = requests.count

        def request(self) -> None:
            self._requests()

        def withdraw(self) -> bool:
            requests = self._requests
            requests.count -= 1
            return requests.count <= self._before

        def end(self) -> None:
            self._requests.parties -= 1
            if not self._requests.parties:
                delattr(self._task, _SHADOWED)


def own_cancellation(task: asyncio.Task[Any]) -> OwnCancellation:
    """Begin to tell one's own requests to cancel `task` from those of others."""
    return _Counted(task)
