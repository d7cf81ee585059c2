"""What the users of one foreign cache object share: turns per key, and the news."""

from __future__ import annotations

import asyncio
import weakref

from coalestra.cache.lanes import KeyLanes
from coalestra.cache.listening import Listeners
from coalestra.core.protocols import AsyncCache


class Channel:
    """The lanes and listeners of one cache on one event loop.

    A publisher made by the application and a builder over the same cache object meet here, so the
    builder hears of what the publisher does. It holds cache and loop, so neither identity can be
    taken by another object while the channel lives.
    """

    __slots__ = ("__weakref__", "cache", "lanes", "listeners", "loop")

    def __init__(self, cache: AsyncCache, loop: asyncio.AbstractEventLoop) -> None:
        self.cache: AsyncCache = cache
        self.loop: asyncio.AbstractEventLoop = loop
        self.lanes: KeyLanes = KeyLanes()
        self.listeners: Listeners = Listeners()

    def __repr__(self) -> str:
        return f"Channel({type(self.cache).__name__}, {self.lanes!r}, {self.listeners!r})"


_channels: weakref.WeakValueDictionary[tuple[int, int], Channel] = weakref.WeakValueDictionary()


def channel_of(cache: AsyncCache) -> Channel:
    """Return the channel of ``cache`` on the running loop; it lives while somebody uses it."""
    loop = asyncio.get_running_loop()
    identity = (id(cache), id(loop))
    channel = _channels.get(identity)
    if channel is None:
        channel = _channels[identity] = Channel(cache, loop)
    return channel
