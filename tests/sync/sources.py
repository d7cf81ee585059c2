"""Builders and sources for the tests that run the whole thing."""

from __future__ import annotations

import threading
from typing import Any

from coalestra.adapters import CallableSource
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext
from coalestra.orchestration.builder import SnapshotBuilder
from tests.sync.steps import Door


class Prices:
    """A source that answers with a number one higher each time; ``door`` holds its answers."""

    def __init__(self) -> None:
        self.calls = 0
        self.answers = 0
        self.door: Door | None = None
        self.contexts: list[FetchContext] = []
        self.threads: list[threading.Thread] = []

    async def __call__(self, key: ResourceKey, context: FetchContext) -> Any:
        self.contexts.append(context)
        self.threads.append(threading.current_thread())
        self.calls += 1
        number = self.calls
        if self.door is not None:
            await self.door.pass_()
        self.answers += 1
        return {"price": number}


def source(function: Any, **settings: Any) -> CallableSource:
    return CallableSource(**{
        "name": "rest", "priority": 10, "supports": lambda _: True, "fetcher": function, **settings,
    })  # fmt: skip


def builder(function: Any, **settings: Any) -> SnapshotBuilder:
    """A builder with one source around ``function``."""
    return SnapshotBuilder([source(function)], **settings)
