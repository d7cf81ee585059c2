"""A source whose answers a test changes as it goes, and a chain of keys derived from them."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from coalestra import FetchContext, ResourceKey, Snapshot, SnapshotBuilder, SnapshotSession
from tests.orchestration.scripted import Derived, Single, builder, key

BASE, OTHER = key("base"), key("other")
MIDDLE, TOP = key("middle"), key("top")


class Stock(Single):
    """Answers with what `values` holds by name: a payload, or an exception to raise.

    `before` is passed through by every call, once it has read its answer.
    """

    def __init__(
        self,
        name: str,
        values: Mapping[str, Any],
        *,
        before: Callable[[], Awaitable[None]] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(name, *values, fetch=self._answer, **more)
        self.values = dict(values)
        self.before = before

    async def _answer(self, key: ResourceKey, context: FetchContext) -> Any:
        answer = self.values[key.name]
        if self.before is not None:
            await self.before()
        if isinstance(answer, Exception):
            raise copy.copy(answer)
        return answer

    def change(self, **values: Any) -> None:
        """Answer otherwise from now on."""
        self.values.update(values)


class Shop:
    """A builder over `base` and `other`, with `middle` derived from `base` and `top` from it."""

    def __init__(self, **settings: Any) -> None:
        self.stock = Stock("stock", {"base": 1, "other": 10})
        self.middle = Derived("middle", needs=lambda key: [BASE])
        self.top = Derived("top", needs=lambda key: [MIDDLE])
        self.builder: SnapshotBuilder = builder(self.stock, self.middle, self.top, **settings)

    async def session(self, *keys: ResourceKey, **more: Any) -> SnapshotSession:
        """Open a session that has resolved these keys."""
        session = self.builder.session(**more)
        if keys:
            await session.resolve(keys)
        return session

    async def publish(self, key: ResourceKey, value: Any) -> None:
        """Publish an event, a second later than anything before."""
        await asyncio.sleep(1)
        await self.builder.publisher.publish(key, value, source="stream")


def shown(snapshot: Snapshot) -> dict[ResourceKey, Any]:
    """What a snapshot says, without provenance."""
    return {key: value.value for key, value in snapshot.items()}
