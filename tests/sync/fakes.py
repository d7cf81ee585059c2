"""A publisher whose every operation waits at a door of its own."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

from coalestra.core.keys import ResourceKey
from coalestra.core.values import PublishResult, PublishStatus, ResourceUpdate, SnapshotValue
from tests.sync.steps import PRICE, Door

RESULT = PublishResult(PublishStatus.PUBLISHED, SnapshotValue(
    key=PRICE, value=1, source="stream", observed_at=0.0, fetched_at=0.0, age_seconds=0.0,
    stale=False, from_cache=False, latency_ms=0.0,
))  # fmt: skip


class RecordingPublisher:
    """Writes down what it was told to do, in the order in which it began.

    ``doors`` hold the operations on a value (or reason) until they are opened.
    """

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.arguments: list[dict[str, Any]] = []
        self.doors: dict[Any, Door] = {}
        self.error: Exception | None = None
        self.threads: set[threading.Thread] = set()

    def door(self, label: Any) -> Door:
        return self.doors.setdefault(label, Door())

    async def _work(self, label: Any) -> None:
        self.begun.append(label)
        self.threads.add(threading.current_thread())
        if label in self.doors:
            await self.doors[label].pass_()
        if self.error is not None:
            raise self.error

    async def publish_update(self, update: ResourceUpdate[Any], **flags: Any) -> PublishResult:
        self.arguments.append({"update": update, **flags})
        await self._work(update.value)
        return RESULT

    async def publish_many(
        self, updates: Collection[ResourceUpdate[Any]], **flags: Any
    ) -> Mapping[ResourceKey, PublishResult]:
        self.arguments.append({"updates": updates, **flags})
        await self._work(tuple(update.value for update in updates))
        return {update.key: RESULT for update in updates}

    async def invalidate_many(self, keys: Collection[ResourceKey], *, reason: str = "") -> None:
        self.arguments.append({"keys": keys, "reason": reason})
        await self._work(reason)
