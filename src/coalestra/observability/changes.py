"""What is logged of its own accord: that something begins to fail, and that it works again.

Laws:

1. A line is written when the state of a subject is another one than was last said of it. Of one
   that changes all the time, ten lines are written at once, and then one a minute.
2. Lines are written in a thread, one after the other. A handler that blocks holds up more lines,
   of which a hundred wait, and nothing else. What a handler raises goes no further.
3. No key is named. What went wrong, and where, is told by ``exc_info`` alone: an exception of the
   same type and text, as whoever keeps records must not keep alive what failed.
4. Where no handler listens, nothing is done, and no thread started.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from coalestra._lockfree import WorkerQueue
from coalestra.core.errors import SourceFailure, folded_message
from coalestra.core.validation import readable

LOGGER = logging.getLogger("coalestra")

_AT_ONCE = 10
_PAUSE_SECONDS = 60.0
_MOST_LINES = 100


def subject_of(kind: str, sink: object) -> str:
    """Return what to call a sink."""
    return f"{kind} sink {type(sink).__name__}"


class Condition:
    """Whether one subject works or fails, as it was last said."""

    __slots__ = ("_left", "_since", "failing", "subject")

    def __init__(self, subject: str) -> None:
        self.subject: str = readable(subject)
        self.failing: bool = False
        self._left = _AT_ONCE
        self._since = 0.0

    def is_news(self, failing: bool, now: float) -> bool:
        """Whether this has to be said, at ``now`` (monotonic seconds); then it counts as said."""
        if failing is self.failing:
            return False
        if not _listened(logging.WARNING if failing else logging.INFO):
            self.failing = self.failing and failing
            return False
        if self._left < _AT_ONCE:
            gained = int((now - self._since) / _PAUSE_SECONDS)
            self._left = min(_AT_ONCE, self._left + gained)
            self._since += gained * _PAUSE_SECONDS
        if not self._left:
            return False
        if self._left == _AT_ONCE:
            self._since = now
        self._left -= 1
        self.failing = failing
        return True


def _listened(level: int) -> bool:
    """Whether a handler of the application's would get a record of this level."""
    if not LOGGER.isEnabledFor(level):
        return False
    logger: logging.Logger | None = LOGGER
    while logger is not None:
        for handler in logger.handlers:
            if handler.level <= level and not isinstance(handler, logging.NullHandler):
                return True
        logger = logger.parent if logger.propagate else None
    return False


def write(line: tuple[str, SourceFailure | None]) -> None:
    """Write that a subject fails, and why, or that it works again; raises no `Exception`."""
    with suppress(Exception):  # of a handler, a filter or a factory of records
        LOGGER.handle(_record_of(*line))


def _record_of(subject: str, failure: SourceFailure | None) -> logging.LogRecord:
    make = partial(LOGGER.makeRecord, LOGGER.name)
    if failure is None:
        return make(logging.INFO, __file__, 0, "%s works again", (subject,), None)
    said, text = (subject, failure.error_type), folded_message(failure.message)
    twin = _twin(failure.exception, text)
    raised = type(twin), twin, None
    record = make(logging.WARNING, __file__, 0, "%s fails: %s", said, raised)
    places = failure.traceback
    head = f"Traceback (most recent call last):\n{places}" if places else ""
    record.exc_text = f"{head}{failure.error_type}: {text}"
    return record


def _twin(error: BaseException | None, text: str) -> BaseException:
    """Return an exception of the type of an error, if that allows it, that tells its text alone."""
    kind: type[BaseException] = Exception if error is None else type(error)
    twin = None
    with suppress(Exception):  # of its ``__new__``
        twin = kind.__new__(kind, text)
    return twin if isinstance(twin, kind) else Exception(text)


class ChangeLog:
    """Says of each subject of a builder that it fails, and that it works again, once per change.

    The thread that writes is a daemon, and ends when there is nothing more to write.

    Args:
        silent: whether nothing is said at all.
        ticks: the monotonic clock.

    Attributes:
        troubled: the subjects of which was last said that they fail.
    """

    def __init__(
        self, *, silent: bool = False, ticks: Callable[[], float] = time.monotonic
    ) -> None:
        self.troubled: dict[str, Condition] = {}
        self._silent = silent
        self._ticks = ticks
        self._conditions: dict[str, Condition] = {}
        self._lines: WorkerQueue[tuple[str, SourceFailure | None]] = WorkerQueue(
            write, _MOST_LINES, drop_oldest=False, name="coalestra-log", lingers=False
        )

    def failed(self, subject: str, error: BaseException | SourceFailure) -> None:
        """Say that a subject fails, and why, unless that was said last."""
        if self._silent or subject in self.troubled:
            return
        condition = self._conditions.get(subject)
        if condition is None:
            condition = self._conditions[subject] = Condition(subject)
        if condition.is_news(True, self._ticks()):
            self.troubled[subject] = condition
            if not isinstance(error, SourceFailure):
                error = SourceFailure.of(subject, error)
            self._lines.put((condition.subject, error))

    def works(self, subject: str) -> None:
        """Say that a subject works again, if it was said that it fails."""
        condition = self.troubled.get(subject)
        if condition is None:
            return
        news = condition.is_news(False, self._ticks())
        if not condition.failing:
            self.troubled.pop(subject, None)  # another thread may have seen the same
        if news:
            self._lines.put((condition.subject, None))

    @property
    def pending(self) -> int:
        """How many lines are not written yet."""
        return self._lines.pending

    async def end(self, seconds: float | None, *, drain: bool) -> int:
        """Wait for so long until all lines are written; return how many are not.

        Without ``drain`` only the one that is being written is waited for.
        """
        if not drain:
            self._lines.drop()
        return await self._lines.until_empty(seconds)

    def __repr__(self) -> str:
        return f"<ChangeLog troubled={list(self.troubled)} pending={self.pending}>"
