"""One cache for many processes, on Redis or Valkey: needs the extra ``redis``."""

from coalestra.redis.cache import RedisCache, RedisCacheHealth
from coalestra.redis.codec import (
    MessagePackCodec,
    Model,
    UnreadableEntryError,
    UnstorableValueError,
    ValueCodec,
)
from coalestra.redis.server import SharedCacheLeftAloneError, SharedCacheUnavailableError

__all__ = [
    "MessagePackCodec",
    "Model",
    "RedisCache",
    "RedisCacheHealth",
    "SharedCacheLeftAloneError",
    "SharedCacheUnavailableError",
    "UnreadableEntryError",
    "UnstorableValueError",
    "ValueCodec",
]
