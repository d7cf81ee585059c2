"""Turns per key: operations on the same key run one after the other, in the order they asked.

An operation queues for all its keys in one step and runs when it is the first for each of them, so
operations over several keys cannot block each other in a circle. Nothing is kept for an idle key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from coalestra.core.keys import ResourceKey


class KeyLanes:
    """First-in, first-out turns for any number of keys."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last: dict[ResourceKey, Turn] = {}

    def __repr__(self) -> str:
        return f"KeyLanes({len(self._last)} busy)"

    def __len__(self) -> int:
        return len(self._last)

    def turn(self, keys: Iterable[ResourceKey]) -> Turn:
        """Queue for ``keys`` at once; enter the turn with ``async with``, without delay."""
        queued = Turn(self, tuple(keys))
        ahead = {self._last[key] for key in queued.keys if key in self._last}
        for other in ahead:
            other.followers.append(queued)
        queued.waits_for = len(ahead)
        self._last.update(dict.fromkeys(queued.keys, queued))
        return queued

    def end(self, turn: Turn) -> None:
        """Let those behind ``turn`` move up."""
        ended = [turn]
        while ended:
            done = ended.pop()
            for key in done.keys:
                if self._last.get(key) is done:
                    del self._last[key]
            for follower in done.followers:
                follower.waits_for -= 1
                if not follower.waits_for and follower.begin():
                    ended.append(follower)


class Turn:
    """One operation's place in the lanes of its keys."""

    __slots__ = ("_abandoned", "_lanes", "_start", "followers", "keys", "waits_for")

    def __init__(self, lanes: KeyLanes, keys: tuple[ResourceKey, ...]) -> None:
        self.keys: tuple[ResourceKey, ...] = keys
        self.waits_for: int = 0
        self.followers: list[Turn] = []
        self._lanes = lanes
        self._start: asyncio.Future[None] | None = None
        self._abandoned = False

    def __repr__(self) -> str:
        return f"Turn({len(self.keys)} keys, behind {self.waits_for})"

    def begin(self) -> bool:
        """Start whoever waits for the turn; return True if nobody does any more."""
        if self._start is not None and not self._start.done():
            self._start.set_result(None)
        return self._abandoned

    async def __aenter__(self) -> None:
        if not self.waits_for:
            return
        self._start = asyncio.get_running_loop().create_future()
        try:
            await self._start
        except BaseException:
            self._abandon()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._lanes.end(self)

    def _abandon(self) -> None:
        if self.waits_for:
            self._abandoned = True
        else:
            self._lanes.end(self)
