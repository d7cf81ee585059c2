"""What a source is told about the work it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coalestra.core.drafts import draft_of
from coalestra.core.frozen import FrozenDict
from coalestra.core.validation import mapping, number, text


@dataclass(frozen=True, slots=True)
class FetchContext:
    """The circumstances of one build, session or refresh, for the sources it calls.

    Attributes:
        requested_at: when it began, in wall-clock seconds since the epoch.
        deadline_at: when it must end, in wall-clock seconds since the epoch; None for no deadline.
        deadline_monotonic: the same moment on the clock's monotonic reading, in seconds.
        metadata: what the caller wants sources to know; read-only.
        snapshot_id: the id of the snapshot being made.

    Raises:
        TypeError: for another type.
        ValueError: for a time that is not finite.
    """

    requested_at: float
    deadline_at: float | None = None
    deadline_monotonic: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=FrozenDict)
    snapshot_id: str = ""

    def __post_init__(self) -> None:
        number("requested_at", self.requested_at)
        number("deadline_at", self.deadline_at, optional=True)
        number("deadline_monotonic", self.deadline_monotonic, optional=True)
        text("snapshot_id", self.snapshot_id, empty=True)
        if not isinstance(self.metadata, FrozenDict):
            frozen = FrozenDict(mapping("metadata", self.metadata))
            object.__setattr__(self, "metadata", frozen)


_ContextDraft = draft_of(FetchContext)


def context_of(
    requested_at: float,
    deadline_at: float | None,
    deadline_monotonic: float | None,
    metadata: FrozenDict[str, Any],
    snapshot_id: str,
) -> FetchContext:
    """Return a `FetchContext` of arguments that are known to be good, without judging them."""
    draft: Any = _ContextDraft()
    draft.requested_at = requested_at
    draft.deadline_at = deadline_at
    draft.deadline_monotonic = deadline_monotonic
    draft.metadata = metadata
    draft.snapshot_id = snapshot_id
    draft.__class__ = FetchContext
    context: FetchContext = draft
    return context
