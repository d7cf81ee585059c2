"""Errors about a whole snapshot: what a strict build, a request or a session raises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from coalestra.core.errors_root import CoalestraError
from coalestra.core.errors_source import (
    MAX_FAILURES_SHOWN,
    MAX_RESOURCES_SHOWN,
    counted,
    described,
    enumerated,
    serialized_error,
)
from coalestra.core.failures import (
    ERROR_DIAGNOSTICS_SCHEMA,
    ERROR_DIAGNOSTICS_SCHEMA_VERSION,
    MAX_MESSAGE_LENGTH,
    SerializedSnapshotBuildError,
    folded_message,
)
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey

if TYPE_CHECKING:
    from coalestra.core.acceptance import SnapshotAcceptanceViolation


class SnapshotBuildError(CoalestraError):
    """A snapshot lacks what it must have.

    Attributes:
        errors: the error of each resource that is to blame, by key.
        snapshot: the snapshot of everything else, or None if there was no time to deliver one.
    """

    def __init__(
        self, errors: Mapping[ResourceKey, Exception], *, snapshot: Any | None = None
    ) -> None:
        self.errors: Mapping[ResourceKey, Exception] = FrozenDict(errors)
        self.snapshot = snapshot
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        if not self.errors:
            return "the snapshot could not be built"
        return f"cannot resolve {counted(len(self.errors), 'resource')}: {described(self.errors)}"

    def to_dict(
        self, *, max_message_length: int = MAX_MESSAGE_LENGTH
    ) -> SerializedSnapshotBuildError:
        """Return the error, with that of every resource, as JSON-safe data.

        Args:
            max_message_length: how many characters of each message to keep; at least 1.

        Raises:
            TypeError, ValueError: for another ``max_message_length``.
        """
        partial = self.snapshot is not None
        return {
            "schema": ERROR_DIAGNOSTICS_SCHEMA,
            "schema_version": ERROR_DIAGNOSTICS_SCHEMA_VERSION,
            "error_type": type(self).__name__,
            "message": folded_message(str(self), max_message_length),
            "errors": [
                serialized_error(key, error, max_message_length)
                for key, error in self.errors.items()
            ],
            "partial_snapshot_available": partial,
            "has_partial_snapshot": partial,
        }


class SnapshotConsistencyError(SnapshotBuildError):
    """The values of a request were observed too far apart to be used together.

    All resources were resolved, so ``errors`` is empty.

    Attributes:
        keys: the resources that were compared.
        oldest_key, oldest_observed_at: the earliest observation, in seconds since the epoch.
        newest_key, newest_observed_at: the latest one.
        observation_skew_seconds: how far these two lie apart.
        max_observation_skew_seconds: how far they may.
        snapshot: the complete snapshot.
    """

    def __init__(
        self,
        *,
        keys: tuple[ResourceKey, ...],
        oldest_key: ResourceKey,
        oldest_observed_at: float,
        newest_key: ResourceKey,
        newest_observed_at: float,
        observation_skew_seconds: float,
        max_observation_skew_seconds: float,
        snapshot: Any | None = None,
    ) -> None:
        self.keys: tuple[ResourceKey, ...] = tuple(keys)
        self.oldest_key = oldest_key
        self.oldest_observed_at = oldest_observed_at
        self.newest_key = newest_key
        self.newest_observed_at = newest_observed_at
        self.observation_skew_seconds = observation_skew_seconds
        self.max_observation_skew_seconds = max_observation_skew_seconds
        super().__init__({}, snapshot=snapshot)

    def _sentence(self) -> str:
        return (
            f"{counted(len(self.keys), 'resource')} must be observed within "
            f"{self.max_observation_skew_seconds:g} s of each other, got "
            f"{self.observation_skew_seconds:g} s between {self.oldest_key} (oldest) and "
            f"{self.newest_key} (newest)"
        )


class ResourceAcceptanceError(CoalestraError):
    """A resource has a value that the request's acceptance policy refuses.

    Attributes:
        key: the resource.
        violations: every rule that its value breaks or helps to break.
    """

    def __init__(
        self, key: ResourceKey, violations: tuple[SnapshotAcceptanceViolation, ...]
    ) -> None:
        self.key = key
        self.violations: tuple[SnapshotAcceptanceViolation, ...] = tuple(violations)
        super().__init__(f"{key} is not acceptable: {_listed(self.violations, MAX_FAILURES_SHOWN)}")


class SnapshotAcceptanceError(SnapshotBuildError):
    """A snapshot has what was asked for, but not in the quality that was.

    Attributes:
        violations: every broken rule and requirement.
        errors: a ``ResourceAcceptanceError`` for each resource that a violation names.
        snapshot: the snapshot that was refused.
    """

    def __init__(
        self,
        *,
        violations: tuple[SnapshotAcceptanceViolation, ...],
        snapshot: Any | None = None,
    ) -> None:
        self.violations: tuple[SnapshotAcceptanceViolation, ...] = tuple(violations)
        super().__init__(_by_resource(self.violations), snapshot=snapshot)

    def _sentence(self) -> str:
        number = counted(len(self.violations), "violation")
        return f"snapshot not acceptable, {number}: {_listed(self.violations, MAX_RESOURCES_SHOWN)}"


def _listed(violations: tuple[SnapshotAcceptanceViolation, ...], limit: int) -> str:
    shown = [folded_message(violation.message) for violation in violations[:limit]]
    return enumerated(shown, len(violations), "violation")


def _by_resource(
    violations: Iterable[SnapshotAcceptanceViolation],
) -> dict[ResourceKey, Exception]:
    concerned: dict[ResourceKey, list[SnapshotAcceptanceViolation]] = {}
    for violation in violations:
        for key in violation.keys:
            concerned.setdefault(key, []).append(violation)
    return {key: ResourceAcceptanceError(key, tuple(own)) for key, own in concerned.items()}
