"""Caches: the memory cache, publishing into a cache, and one view over any cache."""

from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.publisher import ResourcePublisher

__all__ = ["AsyncMemoryCache", "ResourcePublisher"]
