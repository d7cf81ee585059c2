"""Event sinks that come with the library, and the record of one event."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from coalestra.core.validation import instance


@dataclasses.dataclass(frozen=True, slots=True)
class EventRecord:
    """One event as it was emitted.

    Attributes:
        event_type: what happened, such as ``snapshot_built``.
        payload: the particulars, in a dictionary of the record's own.
    """

    event_type: str
    payload: dict[str, Any]


class LoggingEventSink:
    """Writes each event to a logger, at level INFO.

    A log record has the attributes ``event_type`` and ``event_payload`` for structured
    formatters. Log handlers may write to files or networks, so a builder puts this sink behind
    a buffer unless told otherwise.

    Args:
        logger: where to write; the logger ``coalestra`` by default.

    Raises:
        TypeError: ``logger`` is neither None nor a logger.
    """

    __slots__ = ("logger",)

    def __init__(self, logger: logging.Logger | None = None) -> None:
        instance("logger", logger, logging.Logger, optional=True)
        self.logger: logging.Logger = logging.getLogger("coalestra") if logger is None else logger

    def emit(self, event_type: str, **payload: Any) -> None:
        """Log one event."""
        extra = {"event_type": event_type, "event_payload": payload}
        self.logger.info("%s %s", event_type, payload, extra=extra)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.logger!r})"
