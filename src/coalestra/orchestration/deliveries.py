"""From sealed readings to what a reader may keep: one isolated copy for each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from coalestra.concurrency.copying import OFFLOADED, PayloadCopies
from coalestra.concurrency.deadline import Deadline
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.seals import PORTION, Seal
from coalestra.core.errors import PayloadIsolationError, SnapshotDeadlineExceededError
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.values import SnapshotValue
from coalestra.orchestration.readings import Reading

_CONTEXT = "snapshot delivery"
_SHARED = Seal.SHARED


class Deliveries:
    """Makes the copies that readers get."""

    __slots__ = ("_copies", "_pace")

    def __init__(self, copies: PayloadCopies, pace: Pace) -> None:
        self._copies = copies
        self._pace = pace

    def value_now(self, reading: Reading, context: str) -> SnapshotValue[Any] | None:
        """Return a reader's copy made here and now, or None if it takes a thread."""
        revision = reading.revision
        payload = self._copies.open_now(revision.payload, revision.seal, context=context)
        if payload is OFFLOADED:
            return None
        return self._presented(reading, payload, context)

    def value_here(self, reading: Reading, context: str) -> SnapshotValue[Any]:
        """Return a reader's copy made here and now, however large the payload."""
        value = self.value_now(reading, context)
        if value is not None:
            return value
        revision = reading.revision
        payload = self._copies.open_here(revision.payload, revision.seal, context=context)
        return self._presented(reading, payload, context)

    async def value(
        self, reading: Reading, context: str, deadline: Deadline | None
    ) -> SnapshotValue[Any]:
        """Return a reader's copy, made in a thread if it is large."""
        value = self.value_now(reading, context)
        if value is not None:
            return value
        revision = reading.revision
        payload = await self._copies.open(
            revision.payload, revision.seal, context=context, deadline=deadline
        )
        return self._presented(reading, payload, context)

    async def values(
        self, readings: Mapping[ResourceKey, Reading], deadline: Deadline | None
    ) -> tuple[dict[ResourceKey, SnapshotValue[Any]], dict[ResourceKey, Exception]]:
        """Return copies of many readings, and the error for each that cannot be copied.

        Small ones are copied here, in slices; large ones side by side in threads, within
        `deadline`.
        """
        values: dict[ResourceKey, SnapshotValue[Any]] = {}
        errors: dict[ResourceKey, Exception] = {}
        large: dict[ResourceKey, Reading] = {}
        pace = self._pace
        pace.begin()
        left = PORTION
        for key, reading in readings.items():
            revision = reading.revision
            payload, seal = revision.payload, revision.seal
            try:
                if seal is not _SHARED:
                    payload = self._copies.open_now(payload, seal, context=_CONTEXT)
                if payload is OFFLOADED:
                    large[key] = reading
                elif revision.metadata or reading.notes:
                    values[key] = self._presented(reading, payload, _CONTEXT)
                else:
                    values[key] = revision.presented(
                        payload, EMPTY, reading.age, reading.stale, reading.from_cache
                    )
            except PayloadIsolationError as error:
                errors[key] = error
            left -= seal.weight
            if left <= 0:
                left = PORTION
                if await pace.keep():
                    _require_time(deadline)
        if large:
            await self._large(large, deadline, values, errors)
        return values, errors

    async def _large(
        self,
        readings: Mapping[ResourceKey, Reading],
        deadline: Deadline | None,
        values: dict[ResourceKey, SnapshotValue[Any]],
        errors: dict[ResourceKey, Exception],
    ) -> None:
        """Copy large payloads with as many workers as there are threads for it."""
        rest = iter(readings.items())

        async def work() -> None:
            for key, reading in rest:
                try:
                    values[key] = await self.value(reading, _CONTEXT, deadline)
                except PayloadIsolationError as error:
                    errors[key] = error

        workers = min(len(readings), self._copies.max_concurrency)
        await all_or_none(work() for _ in range(workers))

    def _presented(self, reading: Reading, payload: Any, context: str) -> SnapshotValue[Any]:
        revision = reading.revision
        metadata = revision.metadata
        if metadata:
            metadata = self._copies.open_metadata_now(metadata, context=context)
        if reading.notes:
            metadata = FrozenDict({**metadata, **reading.notes}) if metadata else reading.notes
        return revision.presented(payload, metadata, reading.age, reading.stale, reading.from_cache)


def _require_time(deadline: Deadline | None) -> None:
    if deadline is not None and deadline.expired:
        raise SnapshotDeadlineExceededError(
            f"the deadline of {deadline.budget_seconds:g} s passed while the snapshot was copied"
        )


async def all_or_none(coroutines: Iterable[Any]) -> None:
    """Run coroutines side by side; if one fails or the caller is cancelled, end all and wait."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
