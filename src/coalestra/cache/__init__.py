"""Caches: the memory cache, publishing into a cache, and one view over any cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
    from coalestra.cache.memory import AsyncMemoryCache
    from coalestra.cache.publisher import ResourcePublisher
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "memory": ("AsyncMemoryCache",),
            "publisher": ("ResourcePublisher",),
        },
    )

__all__ = ["AsyncMemoryCache", "ResourcePublisher"]
