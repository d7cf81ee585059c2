"""Other libraries of the field, each used as its documentation shows, for work that it does.

None of them copies what it hands out. Keys are strings where the library wants them, made
beforehand. A library that is not installed is left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from coalestra import ResourceKey
from tests.benchmarks.plain import LIFETIME_SECONDS
from tests.benchmarks.stock import Maker, base_of
from tests.benchmarks.subjects import Subjects
from tests.benchmarks.workshop import Work, Workshop


def installed(name: str) -> Any:
    """Return the module of a rival, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class _Store(NamedTuple):
    """A cache: how to read and write one value, and many."""

    name: str
    read: Callable[..., Any]
    read_many: Callable[..., Any]
    write: Callable[..., Any]
    write_many: Callable[..., Any]


class Rivals:
    """Makes the rivals' subjects for one line, from the same keys and payloads."""

    def __init__(
        self, shop: Workshop, keys: Sequence[ResourceKey], make: Maker, units: int | None = None
    ) -> None:
        self._shop = shop
        self._keys = keys
        self._texts = [str(key) for key in keys]
        self._make = make
        self._units = len(keys) if units is None else units

    def _timed(self, work: Work) -> Callable[[], float]:
        return self._shop.timed(work, self._units)

    def _timed_fresh(self, prepare: Callable[[], Work]) -> Callable[[], float]:
        async def prepared() -> Work:
            return prepare()

        return self._shop.timed_fresh(prepared, self._units)

    # Caches -----------------------------------------------------------------------------------

    def _stores(self) -> Iterator[_Store]:
        if aiocache := installed("aiocache"):
            store = aiocache.SimpleMemoryCache()

            def write(pairs: dict[str, Any]) -> Any:
                return store.multi_set(list(pairs.items()))

            yield _Store("aiocache", store.get, store.multi_get, store.set, write)
        if cashews := installed("cashews"):
            cache = cashews.Cache()
            cache.setup("mem://", size=1_000_000, check_interval=0)

            def read(texts: Sequence[str]) -> Any:
                return cache.get_many(*texts)

            yield _Store("cashews", cache.get, read, cache.set, cache.set_many)

    def _pairs(self) -> dict[str, Any]:
        return {text: self._make(key) for text, key in zip(self._texts, self._keys, strict=True)}

    def _filled(self) -> Iterator[_Store]:
        for store in self._stores():
            self._shop.run(_await(_calling(store.write_many, self._pairs())))
            yield store

    def reading(self) -> Subjects:
        """Read values that are cached already, all in one call."""
        return {
            store.name: self._timed(_calling(store.read_many, self._texts))
            for store in self._filled()
        }

    def reading_one(self) -> Subjects:
        """Read one value that is cached already."""
        subjects = {
            store.name: self._timed(_calling(store.read, self._texts[0]))
            for store in self._filled()
        }
        if async_lru := installed("async_lru"):
            memoized = self._memoized(async_lru)
            subjects["async-lru"] = self._timed(_calling(memoized, self._keys[0]))
        return subjects

    def writing_one(self) -> Subjects:
        """Write one value."""
        return {
            store.name: self._timed(_calling(store.write, self._texts[0], self._make(None)))
            for store in self._stores()
        }

    def writing(self) -> Subjects:
        """Write many values in one call."""
        return {
            store.name: self._timed(_calling(store.write_many, self._pairs()))
            for store in self._stores()
        }

    # Functions and loaders --------------------------------------------------------------------

    def _memoized(self, async_lru: Any) -> Any:
        async def fetch(key: ResourceKey) -> Any:
            return self._make(key)

        return async_lru.alru_cache(maxsize=None, ttl=LIFETIME_SECONDS)(fetch)

    def fetching_singly(self) -> Subjects:
        """Fetch keys one by one, once each, and cache them."""

        def prepare() -> Work:
            fetch = self._memoized(async_lru)

            async def work() -> list[Any]:
                return [await fetch(key) for key in self._keys]

            return work

        async_lru = installed("async_lru")
        return {"async-lru": self._timed_fresh(prepare)} if async_lru else {}

    def fetching_in_batches(self) -> Subjects:
        """Fetch keys in one batch call, and cache them."""

        def prepare() -> Work:
            return _calling(self._loader(aiodataloader).load_many, self._keys)

        aiodataloader = installed("aiodataloader")
        return {"aiodataloader": self._timed_fresh(prepare)} if aiodataloader else {}

    def _loader(self, aiodataloader: Any) -> Any:
        async def fetch(keys: Collection[ResourceKey]) -> list[Any]:
            return [self._make(key) for key in keys]

        return aiodataloader.DataLoader(fetch, max_batch_size=len(self._keys))

    def deriving(self) -> Subjects:
        """Derive each key from one that is fetched in a batch."""

        def prepare() -> Work:
            bases = self._loader(aiodataloader)

            async def derive(keys: Collection[ResourceKey]) -> list[Any]:
                inputs = await bases.load_many([base_of(key) for key in keys])
                return [{"mark": value["price"]} for value in inputs]

            return _calling(aiodataloader.DataLoader(derive).load_many, self._keys)

        aiodataloader = installed("aiodataloader")
        return {"aiodataloader": self._timed_fresh(prepare)} if aiodataloader else {}

    def coalescing(self, crowd: Callable[[Work], Work], pause: Callable[[], Any]) -> Subjects:
        """Serve a crowd that asks for one key at once from one fetch."""
        key = self._keys[0]
        subjects: Subjects = {}
        if async_lru := installed("async_lru"):

            def prepare() -> Work:
                async def fetch(key: ResourceKey) -> Any:
                    await pause()
                    return self._make(key)

                return crowd(_calling(async_lru.alru_cache(maxsize=None)(fetch), key))

            subjects["async-lru"] = self._timed_fresh(prepare)
        if aiodataloader := installed("aiodataloader"):
            subjects["aiodataloader"] = self._timed_fresh(
                lambda: crowd(_calling(self._loader(aiodataloader).load, key))
            )
        return subjects


def _calling(function: Callable[..., Any], *arguments: Any) -> Work:
    return lambda: function(*arguments)


async def _await(work: Work) -> None:
    await work()
