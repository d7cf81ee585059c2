"""A service with a cache of its own, in a SQLite file: what it knows survives a restart.

A cache is any object with `get`, `set`, `invalidate` and `clear`. The service lives twice, in two
processes. Every sentence after "ok" has been checked; the program fails at the first that is wrong.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from coalestra import (
    CacheLookup,
    CallableDerivedSource,
    CallableSource,
    FetchContext,
    FreshnessPolicy,
    PublishStatus,
    ResourceKey,
    Snapshot,
    SnapshotBuilder,
    SnapshotValue,
)

EURO, POUND = ResourceKey("bank", "rate", "EUR"), ResourceKey("bank", "rate", "GBP")
INDEX = ResourceKey("index", "basket")
KEPT = ("value", "source", "observed_at", "fetched_at", "latency_ms", "attempts", "version")


class SqliteCache:
    """Keeps values that JSON can express, one row for each key."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def get(self, key: ResourceKey, *, now: float, policy: FreshnessPolicy) -> CacheLookup:
        found = await self._do("SELECT entry FROM entries WHERE key = ?", text_of(key))
        if not found:
            return CacheLookup(None, fresh=False, usable_stale=False)
        fields, made_from = json.loads(found[0][0])
        age = max(0.0, now - fields["observed_at"])
        fresh = age <= policy.ttl_seconds
        value = SnapshotValue(
            key=key,
            age_seconds=age,
            stale=not fresh,
            from_cache=True,
            dependency_versions={ResourceKey(*json.loads(text)): v for text, v in made_from},
            **fields,
        )
        return CacheLookup(value, fresh, not fresh and age <= policy.max_stale_seconds, age)

    async def set(self, value: SnapshotValue[Any]) -> None:
        """Write a value down, and the versions, which keep derived values valid."""
        fields = {name: getattr(value, name) for name in KEPT} | {"metadata": {**value.metadata}}
        made_from = [(text_of(key), version) for key, version in value.dependency_versions.items()]
        entry = json.dumps([fields, made_from])
        await self._do("REPLACE INTO entries VALUES (?, ?)", text_of(value.key), entry)

    async def invalidate(self, key: ResourceKey) -> None:
        await self._do("DELETE FROM entries WHERE key = ?", text_of(key))

    async def clear(self) -> None:
        await self._do("DELETE FROM entries")

    async def _do(self, statement: str, *arguments: str) -> list[tuple[str]]:
        # In a thread, since SQLite blocks.
        def run() -> list[tuple[str]]:
            with closing(sqlite3.connect(self._file, timeout=5.0)) as db, db:
                db.execute("CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, entry TEXT)")
                return db.execute(statement, arguments).fetchall()

        return await asyncio.to_thread(run)


def text_of(key: ResourceKey) -> str:
    return json.dumps([key.namespace, key.name, key.subject, key.qualifiers])


class Service:
    """Rates from a bank, and an index derived from them; `made` counts what was not on file."""

    def __init__(self, file: Path) -> None:
        self.made = 0
        bank = CallableSource(
            name="bank", priority=1, supports=lambda key: key != INDEX, fetcher=self.rate
        )
        index = CallableDerivedSource(
            name="index", priority=1, supports=lambda key: key == INDEX,
            dependencies=lambda key: (EURO, POUND), deriver=self.average,
        )  # fmt: skip
        hour = FreshnessPolicy(ttl_seconds=3600.0, max_stale_seconds=7200.0)
        self.builder = SnapshotBuilder([bank, index], default_policy=hour, cache=SqliteCache(file))

    async def rate(self, key: ResourceKey, context: FetchContext) -> float:
        self.made += 1
        return {"EUR": 1.0, "GBP": 1.5}[key.subject]

    async def average(self, key: ResourceKey, rates: Snapshot, context: FetchContext) -> float:
        self.made += 1
        return (rates.value(EURO, float) + rates.value(POUND, float)) / 2

    async def live(self, to_make: int) -> list[str]:
        """Read everything, and learn if nothing is new; return the versions that were read."""
        async with self.builder as builder:
            first = await builder.build([INDEX, EURO, POUND])
            tell(f"{to_make} of 3 values had to be made", self.made == to_make)
            if not to_make:
                await self.learn(builder)
        return [value.version for value in first.values()]

    async def learn(self, builder: SnapshotBuilder) -> None:
        late = await builder.publisher.publish(EURO, 9.0, source="tape", observed_at=1.0)
        tell("an old rate is not put on file", late.status is PublishStatus.IGNORED_OLDER)
        await builder.publisher.publish(EURO, 2.0, source="wire")
        again = await builder.build([INDEX, POUND])
        tell("a new rate makes a new index", again.value(INDEX, float) == 1.75)
        tell("the other rate is the one on file", again[POUND].from_cache and self.made == 1)


def live(file: Path, to_make: int) -> list[str]:
    return asyncio.run(Service(file).live(to_make))


def tell(sentence: str, is_so: bool) -> None:
    """Print what the reader is told, or end the program if it is not so."""
    if not is_so:
        raise SystemExit(f"NOT AS TOLD: {sentence}")
    print(f"ok  {sentence}", flush=True)


def main() -> None:
    versions = []
    with tempfile.TemporaryDirectory() as directory:
        for to_make in (3, 0):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                life = process.submit(live, Path(directory, "cache.sqlite"), to_make)
                versions.append(life.result())
    tell("what the second life found is what the first left", versions[0] == versions[1])


if __name__ == "__main__":
    main()
