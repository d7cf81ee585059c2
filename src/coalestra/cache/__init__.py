"""Caches: the memory cache, publishing into a cache, and one view over any cache."""

from coalestra.cache.access import NearCache
from coalestra.cache.memory import AsyncMemoryCache
from coalestra.cache.publisher import ResourcePublisher
from coalestra.core.values import CacheStats, PublishResult, PublishStatus, ResourceUpdate

__all__ = [
    "AsyncMemoryCache", "CacheStats", "NearCache", "PublishResult", "PublishStatus",
    "ResourcePublisher", "ResourceUpdate",
]  # fmt: skip
