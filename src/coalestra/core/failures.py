"""Failures of sources as records, and the JSON shapes in which errors are reported.

Law: whatever a source put into a message, a report holds it as one line of bounded length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from coalestra.core.validation import integer

ERROR_DIAGNOSTICS_SCHEMA = "coalestra.error-diagnostics"
"""The name of the JSON schema that every ``to_dict`` of an error follows."""

ERROR_DIAGNOSTICS_SCHEMA_VERSION = 1
"""The version of that schema; it grows when a reader of the older one would misread."""

MAX_MESSAGE_LENGTH = 300
"""How many characters of a message are shown unless the caller asks for another number."""

_CUT = "..."
_EMPTY = "<no message>"


class SerializedSourceFailure(TypedDict):
    """One source's failure as JSON."""

    schema: str
    schema_version: int
    source: str
    error_type: str
    message: str
    attempts: int


class SerializedResourceError(TypedDict):
    """The error of one resource as JSON; ``failures`` is empty if no source was to blame."""

    schema: str
    schema_version: int
    error_type: str
    resource: str
    message: str
    failures: list[SerializedSourceFailure]


class SerializedSnapshotBuildError(TypedDict):
    """The error of a whole build as JSON; the two ``partial_snapshot`` flags are always equal."""

    schema: str
    schema_version: int
    error_type: str
    message: str
    errors: list[SerializedResourceError]
    partial_snapshot_available: bool
    has_partial_snapshot: bool


def folded_message(message: str, max_length: int = MAX_MESSAGE_LENGTH) -> str:
    """Return ``message`` in one line of at most ``max_length`` characters.

    White space of any kind becomes single spaces, a cut shows as a trailing ``...``, and an
    empty message says that it is empty.

    Raises:
        TypeError, ValueError: unless ``max_length`` is an int of at least 1.
    """
    integer("max_message_length", max_length, minimum=1)
    line = " ".join(message.split()) or _EMPTY
    if len(line) <= max_length:
        return line
    return (line[: max(0, max_length - len(_CUT))] + _CUT)[:max_length]


def message_of(error: BaseException) -> str:
    """Return ``str(error)``, or what went wrong with it: a foreign ``__str__`` may raise."""
    try:
        return str(error)
    except Exception as unreadable:
        return f"<message unreadable: {type(unreadable).__name__}>"


@dataclass(frozen=True, slots=True)
class SourceFailure:
    """Why one source gave no value for a resource.

    Attributes:
        source: the name of the source.
        error_type: the name of the exception type, or of the rule that was broken.
        message: the text of the error, as long as it was.
        attempts: how many calls were made, retries included; 0 if none was.
    """

    source: str
    error_type: str
    message: str
    attempts: int = 1

    @classmethod
    def of(cls, source: str, error: BaseException, attempts: int = 1) -> SourceFailure:
        """Record ``error``, raised by or on behalf of ``source``."""
        return cls(source, type(error).__name__, message_of(error), attempts)

    def format(self, *, max_message_length: int = MAX_MESSAGE_LENGTH) -> str:
        """Return the failure as one line: ``source: Type(message; attempts=N)``."""
        message = folded_message(self.message, max_message_length)
        return f"{self.source}: {self.error_type}({message}; attempts={self.attempts})"

    def to_dict(self, *, max_message_length: int = MAX_MESSAGE_LENGTH) -> SerializedSourceFailure:
        """Return the failure as JSON-safe data."""
        return {
            "schema": ERROR_DIAGNOSTICS_SCHEMA,
            "schema_version": ERROR_DIAGNOSTICS_SCHEMA_VERSION,
            "source": self.source,
            "error_type": self.error_type,
            "message": folded_message(self.message, max_message_length),
            "attempts": self.attempts,
        }
