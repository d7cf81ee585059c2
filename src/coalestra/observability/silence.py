"""The sinks of whoever wants to hear nothing: they discard what they get."""

from __future__ import annotations

from typing import Any


class NullEventSink:
    """Discards every event. With it, the library does not even put events together."""

    __slots__ = ()

    coalestra_non_blocking = True

    def emit(self, event_type: str, **payload: Any) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class NullMetrics:
    """Discards every count and observation. With it, the library builds no labels."""

    __slots__ = ()

    coalestra_non_blocking = True

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Do nothing."""

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Do nothing."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
