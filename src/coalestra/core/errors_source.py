"""Errors about sources and about single resources: what a key may fail with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from coalestra.core.errors_root import CoalestraError
from coalestra.core.failures import (
    ERROR_DIAGNOSTICS_SCHEMA,
    ERROR_DIAGNOSTICS_SCHEMA_VERSION,
    MAX_MESSAGE_LENGTH,
    SerializedResourceError,
    SourceFailure,
    folded_message,
    message_of,
)
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import integer

MAX_FAILURES_SHOWN = 3
"""How many failures of one resource a text names before it counts the rest."""

MAX_RESOURCES_SHOWN = 5
"""How many resources a text names before it counts the rest."""


class SourceUnavailableError(CoalestraError):
    """A source cannot answer just now; asking again may help, so it is retried.

    Sources may raise it themselves. It takes a free message.
    """


class SourceTimeoutError(SourceUnavailableError):
    """A source took, or would have taken, longer than it may."""


class SnapshotDeadlineExceededError(SourceTimeoutError):
    """The time granted to a build, session or request was over before the work was."""


class SourceQueueTimeoutError(SourceTimeoutError):
    """No slot for a source became free in time: the source itself was never asked."""


class CircuitOpenError(SourceUnavailableError):
    """A source has failed so often that it is left alone for a while; it was not asked."""


class SourceProtocolError(CoalestraError):
    """A source broke the rules of being one: the mistake is in the source, so no retry helps."""


class ResourceResolutionError(CoalestraError):
    """No source could give a usable value for a resource.

    Attributes:
        key: the resource.
        failures: one record for each source that was tried, in the order of trying; empty if no
            source supports the key.
    """

    def __init__(self, key: ResourceKey, failures: tuple[SourceFailure, ...]) -> None:
        self.key = key
        self.failures: tuple[SourceFailure, ...] = tuple(failures)
        super().__init__(f"cannot resolve {key}: {self.format_failures()}")

    def format_failures(
        self,
        *,
        max_failures: int = MAX_FAILURES_SHOWN,
        max_message_length: int = MAX_MESSAGE_LENGTH,
    ) -> str:
        """Return the failures in one line, the first ``max_failures`` by name.

        Raises:
            TypeError, ValueError: unless both limits are ints of at least 1.
        """
        integer("max_failures", max_failures, minimum=1)
        if not self.failures:
            return "no compatible source"
        shown = self.failures[:max_failures]
        texts = [failure.format(max_message_length=max_message_length) for failure in shown]
        return enumerated(texts, len(self.failures), "failure")

    def to_dict(self, *, max_message_length: int = MAX_MESSAGE_LENGTH) -> SerializedResourceError:
        """Return the error and every failure as JSON-safe data."""
        return serialized_error(self.key, self, max_message_length)


class DependencyCycleError(CoalestraError):
    """A resource would have to be derived from itself.

    Attributes:
        path: the keys from the resource, along its dependencies, back to itself.
    """

    def __init__(self, path: tuple[ResourceKey, ...]) -> None:
        self.path: tuple[ResourceKey, ...] = tuple(path)
        shown: list[object] = list(self.path)
        hidden = len(shown) - 2 * MAX_RESOURCES_SHOWN
        if hidden > 0:
            shown[MAX_RESOURCES_SHOWN:-MAX_RESOURCES_SHOWN] = [f"({hidden} more)"]
        super().__init__(
            f"dependencies must not form a cycle, got {' -> '.join(map(str, shown))}; "
            "remove one of these dependencies"
        )


class DependencyResolutionError(CoalestraError):
    """A resource cannot be derived because some of what it is derived from failed.

    Attributes:
        key: the resource to derive.
        source: the name of the derived source.
        errors: the error of each dependency that failed, by its key.
    """

    def __init__(
        self, key: ResourceKey, source: str, errors: Mapping[ResourceKey, Exception]
    ) -> None:
        self.key = key
        self.source = source
        self.errors: Mapping[ResourceKey, Exception] = FrozenDict(errors)
        super().__init__(f"source {source!r} cannot derive {key}: {described(self.errors)}")


def enumerated(shown: list[str], total: int, noun: str) -> str:
    """Join the texts that are ``shown`` and say how many of ``total`` are not."""
    hidden = total - len(shown)
    if hidden:
        shown = [*shown, f"and {counted(hidden, f'more {noun}')}"]
    return "; ".join(shown)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def described(errors: Mapping[ResourceKey, Exception]) -> str:
    """Return the first errors by resource, each bounded, and how many more there are."""
    first = islice(errors.items(), MAX_RESOURCES_SHOWN)
    shown = [f"{key} [{_reason(error)}]" for key, error in first]
    return enumerated(shown, len(errors), "resource")


def _reason(error: Exception) -> str:
    if isinstance(error, ResourceResolutionError):
        return error.format_failures()
    return f"{type(error).__name__}({folded_message(message_of(error))})"


def serialized_error(
    key: ResourceKey, error: Exception, max_message_length: int
) -> SerializedResourceError:
    """Return any error of a resource as JSON-safe data."""
    failures = error.failures if isinstance(error, ResourceResolutionError) else ()
    return {
        "schema": ERROR_DIAGNOSTICS_SCHEMA,
        "schema_version": ERROR_DIAGNOSTICS_SCHEMA_VERSION,
        "error_type": type(error).__name__,
        "resource": str(key),
        "message": folded_message(message_of(error), max_message_length),
        "failures": [
            failure.to_dict(max_message_length=max_message_length) for failure in failures
        ],
    }
