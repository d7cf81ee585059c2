"""One unit of work: what every stage of a build, a session or a refresh shares."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from coalestra.concurrency.deadline import Deadline
from coalestra.core.context import FetchContext
from coalestra.core.diagnostics import DiagnosticsRecorder


class Stage(Protocol):
    """Somebody who waits within a unit of work, and is struck by its deadline."""

    @property
    def strike(self) -> Callable[[], None]:
        """End the waiting: the deadline has passed."""


class Intake(Protocol):
    """Where keys that are ready for one source are handed in."""

    def add(self, flights: Sequence[Any]) -> None:
        """Take flights that are ready for a call."""


class Work:
    """The context, deadline, counters and lanes that the stages of one unit of work share.

    While stages wait, one timer watches the deadline for all of them.
    """

    __slots__ = (
        "closed",
        "context",
        "deadline",
        "flushing",
        "lanes",
        "planning",
        "ready",
        "record",
        "stages",
        "struck",
        "timer",
        "variables",
    )

    def __init__(
        self,
        context: FetchContext,
        *,
        deadline: Deadline | None = None,
        variables: contextvars.Context | None = None,
    ) -> None:
        self.context: FetchContext = context
        self.deadline: Deadline | None = deadline
        self.record: DiagnosticsRecorder = DiagnosticsRecorder()
        self.variables: contextvars.Context = (
            contextvars.copy_context() if variables is None else variables
        )
        self.lanes: dict[int, Intake] = {}
        self.ready: dict[int, list[Any]] = {}
        self.stages: dict[Stage, None] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.planning: int = 0
        self.flushing: bool = False
        self.struck: bool = False
        self.closed: bool = False

    @property
    def cutoff(self) -> float:
        """The deadline on the event loop's clock, or infinity."""
        return math.inf if self.deadline is None else self.deadline.loop_time

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and self.deadline.expired

    @property
    def over(self) -> bool:
        """Whether nothing may be started in the name of this work any more."""
        return self.closed or self.struck

    def enter(self, stage: Stage) -> None:
        """Watch the deadline, if there is one, for a stage that begins to wait."""
        if self.deadline is None:
            return
        self.stages[stage] = None
        if self.timer is None:
            self.timer = asyncio.get_running_loop().call_at(self.cutoff, self._strike)

    def leave(self, stage: Stage) -> None:
        """Stop watching for a stage that has ended."""
        if self.deadline is None:
            return
        self.stages.pop(stage, None)
        if not self.stages and self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _strike(self) -> None:
        self.timer = None
        self.struck = True
        for stage in tuple(self.stages):
            stage.strike()

    def __repr__(self) -> str:
        return (
            f"<Work {self.context.snapshot_id} stages={len(self.stages)} lanes={len(self.lanes)}>"
        )
