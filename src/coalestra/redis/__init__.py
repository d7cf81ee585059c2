"""One cache for many processes, on Redis or Valkey: needs the extra ``redis``."""

try:
    import msgspec  # noqa: F401
    import redis.asyncio  # noqa: F401
except ImportError as error:
    raise ImportError(
        "coalestra.redis must have the packages redis and msgspec, which cannot both be imported; "
        "install this package with its extra: python -m pip install '.[redis]'"
    ) from error

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
    "MessagePackCodec", "Model", "RedisCache", "RedisCacheHealth", "SharedCacheLeftAloneError",
    "SharedCacheUnavailableError", "UnreadableEntryError", "UnstorableValueError", "ValueCodec",
]  # fmt: skip
