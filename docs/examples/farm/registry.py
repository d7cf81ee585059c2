"""The registry: a SQLite database. Its calls block, so they run in threads and are kept short."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from coalestra import CallableSource, FetchContext, ResourceKey


class Registry:
    """What the farm keeps in its database. No call to it lasts much longer than `seconds`."""

    def __init__(self, path: Path, *, seconds: float = 1.0) -> None:
        self.path, self.seconds = path, seconds
        with self.opened() as db:
            db.execute("CREATE TABLE field (name TEXT PRIMARY KEY, target REAL, valve TEXT)")
            db.execute("CREATE TABLE watering (valve TEXT, mm REAL)")
            fields = [("north", 35.0, "V1"), ("south", 40.0, "V2"), ("east", 30.0, "V3")]
            db.executemany("INSERT INTO field VALUES (?, ?, ?)", fields)

    @contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """Open the database. Waiting for a lock ends in time, and so does a long statement."""
        until = time.monotonic() + self.seconds
        with closing(sqlite3.connect(self.path, timeout=self.seconds)) as db:
            db.set_progress_handler(lambda: time.monotonic() > until, 1_000)
            with db:
                yield db

    def source(self) -> CallableSource:
        """Return the registry as a source, with the time limit that it keeps by itself."""
        return CallableSource(
            name="registry",
            priority=100,
            supports=lambda key: key.namespace == "farm",
            fetcher=self.fetch,  # a plain function, so it is called in a worker thread
            timeout_seconds=2 * self.seconds,
            blocking_io=True,
            transport_timeout_seconds=self.seconds,
        )

    def fetch(self, key: ResourceKey, context: FetchContext) -> object:
        with self.opened() as db:
            row = db.execute("SELECT target, valve FROM field WHERE name = ?", (key.subject,))
            target, valve = row.fetchone()
        return target if key.name == "target" else valve

    def open_valve(self, valve: str, mm: float) -> None:
        """Act: the library only reads, so this is the application's own business."""
        with self.opened() as db:
            db.execute("INSERT INTO watering VALUES (?, ?)", (valve, mm))

    def waterings(self) -> list[tuple[str, float]]:
        with self.opened() as db:
            return db.execute("SELECT valve, mm FROM watering").fetchall()
