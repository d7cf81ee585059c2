"""Copying a payload at once, and what it means when that fails."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from coalestra.concurrency.sealing import seal_anyhow
from coalestra.core.errors import PayloadIsolationError
from coalestra.core.validation import callable_
from coalestra.core.values import SnapshotValue

T = TypeVar("T")

PayloadCopier = Callable[[Any], Any]
"""Returns a copy of a payload that shares nothing mutable with it."""


def deepcopy_payload(value: T) -> T:
    """Return what ``copy.deepcopy(value)`` returns, only sooner; immutable objects stay the same.

    Raises whatever the classes inside ``value`` raise on being copied.
    """
    copied: T = seal_anyhow(value)[0]
    return copied


FAILURES = (Exception, asyncio.CancelledError)
"""What a copier may raise; a cancellation it raises itself is a failure like any other."""


def not_isolated(value: Any, context: str) -> PayloadIsolationError:
    """Return the error for a payload that could not be copied."""
    return PayloadIsolationError(context=context, value_type=type(value).__qualname__)


def isolated(copier: Callable[[Any], T], value: Any, context: str) -> T:
    """Return ``copier(value)``; a failure becomes ``PayloadIsolationError`` with it as cause."""
    try:
        return copier(value)
    except FAILURES as error:
        raise not_isolated(value, context) from error


class PayloadIsolator:
    """Copies payloads and snapshot values at once, where they are.

    Args:
        copier: replaces the default copier, for payloads (metadata is always deep-copied).
    """

    def __init__(self, copier: PayloadCopier | None = None) -> None:
        callable_("copier", copier, optional=True)
        self._copier: PayloadCopier = deepcopy_payload if copier is None else copier

    def __repr__(self) -> str:
        return f"PayloadIsolator({'' if self.uses_default_copier else repr(self._copier)})"

    @property
    def uses_default_copier(self) -> bool:
        """Whether payloads are copied as ``copy.deepcopy`` would."""
        return self._copier is deepcopy_payload

    def copy(self, value: T, *, context: str) -> T:
        """Return a copy of a payload.

        Raises:
            PayloadIsolationError: if that is impossible; names ``context`` and the type.
        """
        copied: T = isolated(self._copier, value, context)
        return copied

    def copy_metadata(self, metadata: Mapping[str, Any], *, context: str) -> dict[str, Any]:
        """Return a deep copy of metadata as a new dictionary.

        Raises:
            PayloadIsolationError: if that is impossible; names ``context`` and the type.
        """
        return isolated(deepcopy_payload, dict(metadata), context)

    def clone_snapshot_value(
        self,
        value: SnapshotValue[T],
        *,
        context: str,
        fetched_at: float | None = None,
        age_seconds: float | None = None,
        stale: bool | None = None,
        from_cache: bool | None = None,
        latency_ms: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> SnapshotValue[T]:
        """Return an isolated copy of a value, with the given facts in place of its own.

        Raises:
            PayloadIsolationError: if payload or metadata cannot be copied.
        """
        changes: dict[str, Any] = {
            "fetched_at": fetched_at,
            "age_seconds": age_seconds,
            "stale": stale,
            "from_cache": from_cache,
            "latency_ms": latency_ms,
        }
        kept = value.metadata if metadata is None else metadata
        return dataclasses.replace(
            value,
            value=self.copy(value.value, context=context),
            metadata=self.copy_metadata(kept, context=context),
            **{name: fact for name, fact in changes.items() if fact is not None},
        )
