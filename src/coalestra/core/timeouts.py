"""What a source declares about blocking, and whether that keeps its calls within their time.

A thread that blocks cannot be stopped. A source that blocks is therefore only safe if its calls
run in a thread and its own transport gives up before the library does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from coalestra.core.frozen import immutable
from coalestra.core.validation import flag, number

__all__ = [
    "SourceTimeoutGuarantee", "SourceTimeoutGuaranteeStatus", "inspect_source_timeout_guarantee",
]  # fmt: skip

_ABSENT = object()


class SourceTimeoutGuaranteeStatus(str, Enum):
    """How far a source's declaration goes."""

    UNDECLARED = "undeclared"
    """It has no ``blocking_io`` attribute."""
    NON_BLOCKING = "non_blocking"
    """It never blocks the thread that calls it."""
    PROTECTED = "protected"
    """It blocks, in a thread, and its transport gives up before the source timeout."""
    UNSAFE_NOT_OFFLOADED = "unsafe_not_offloaded"
    """It blocks the event loop."""
    UNSAFE_TIMEOUT_MISSING = "unsafe_timeout_missing"
    """It blocks, and its transport may do so for ever."""
    UNSAFE_TIMEOUT_NOT_WITHIN_SOURCE = "unsafe_timeout_not_within_source"
    """It blocks, and its transport may do so for as long as the source timeout, or longer."""


_Status = SourceTimeoutGuaranteeStatus


@immutable
@dataclass(frozen=True, slots=True)
class SourceTimeoutGuarantee:
    """What one source declares about blocking, and what follows from it.

    Attributes:
        source: the name of the source.
        status: the verdict.
        declaration_present: whether the source says if it blocks.
        blocking_io: whether it says that it does.
        blocking_io_offloaded: whether it says that this happens in a thread.
        transport_timeout_seconds: after how long its transport gives up, or None.
        source_timeout_seconds: how long the library lets a call take, or None for any time.
    """

    source: str
    status: SourceTimeoutGuaranteeStatus
    declaration_present: bool
    blocking_io: bool
    blocking_io_offloaded: bool
    transport_timeout_seconds: float | None
    source_timeout_seconds: float | None

    @property
    def protected(self) -> bool:
        """Whether the source blocks and is guarded against blocking for too long."""
        return self.status is _Status.PROTECTED

    @property
    def safe(self) -> bool:
        """Whether the source is known to keep to its time: it never blocks, or is protected."""
        return self.status in (_Status.NON_BLOCKING, _Status.PROTECTED)

    @property
    def unsafe(self) -> bool:
        """Whether the source says that it blocks, without being protected."""
        return self.blocking_io and not self.protected


def inspect_source_timeout_guarantee(source: Any) -> SourceTimeoutGuarantee:
    """Read and judge what ``source`` declares about blocking; nothing is called.

    Reads ``blocking_io``, ``blocking_io_offloaded`` (False if absent),
    ``transport_timeout_seconds`` and ``timeout_seconds`` (None if absent), both in seconds.

    Raises:
        ValueError: for a timeout that is not above 0, and for a transport timeout of a source
            that does not declare ``blocking_io=True``.
    """
    name = str(getattr(source, "name", type(source).__name__))
    where = f"of source {name!r}"
    declared = getattr(source, "blocking_io", _ABSENT)
    blocking = False if declared is _ABSENT else flag(f"blocking_io {where}", declared)
    offloaded = flag(
        f"blocking_io_offloaded {where}", getattr(source, "blocking_io_offloaded", False)
    )
    transport, timeout = (
        number(f"{setting} {where}", getattr(source, setting, None), above=0, optional=True)
        for setting in ("transport_timeout_seconds", "timeout_seconds")
    )
    if transport is not None and not blocking:
        raise ValueError(
            f"transport_timeout_seconds {where} must be None unless blocking_io is True, got "
            f"{transport!r}; declare blocking_io=True or leave the transport timeout out"
        )
    status = _Status.UNDECLARED
    if declared is not _ABSENT:
        status = _judge(blocking, offloaded, transport, timeout)
    return SourceTimeoutGuarantee(
        name, status, declared is not _ABSENT, blocking, offloaded, transport, timeout
    )


def _judge(
    blocking: bool, offloaded: bool, transport: float | None, timeout: float | None
) -> SourceTimeoutGuaranteeStatus:
    if not blocking:
        return _Status.NON_BLOCKING
    if not offloaded:
        return _Status.UNSAFE_NOT_OFFLOADED
    if transport is None:
        return _Status.UNSAFE_TIMEOUT_MISSING
    if timeout is not None and transport >= timeout:
        return _Status.UNSAFE_TIMEOUT_NOT_WITHIN_SOURCE
    return _Status.PROTECTED
