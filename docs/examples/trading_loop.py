"""A trading loop in plain threads: prices stream in, and each order is decided on one moment.

Two threads publish thousands of prices, late ones among them. The loop decides in a session, looks
again just before it acts, and leaves an order alone if the price has run away or is not known any
more. What the broker says of a position outranks what the books remember. Every sentence after "ok"
has been checked; the program fails at the first that does not hold.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from coalestra import (
    CallableDerivedSource,
    CallableSource,
    FetchContext,
    FreshnessPolicy,
    PublishStatus,
    ResourceAcceptanceRule,
    ResourceKey,
    Snapshot,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotBuildError,
    SourceAuthorityPolicy,
    SubmissionBacklogFullError,
    SyncSnapshotBuilder,
)

SYMBOLS, OPENING, TICKS, ORDER = ("ACME", "EMCA"), 100.0, 2000, 10
PRICE = {symbol: ResourceKey("market", "price", symbol) for symbol in SYMBOLS}
POSITION = {symbol: ResourceKey("account", "position", symbol) for symbol in SYMBOLS}
RISK = {symbol: ResourceKey("risk", "exposure", symbol) for symbol in SYMBOLS}
RECENT = SnapshotAcceptancePolicy(default_rule=ResourceAcceptanceRule(max_age_seconds=30.0))


def read_books(key: ResourceKey, context: FetchContext) -> int:
    return 0  # stands for a database, which blocks


def expose(key: ResourceKey, known: Snapshot, context: FetchContext) -> float:
    return known.value(POSITION[key.subject], int) * known.value(PRICE[key.subject], float)


def make_builder() -> SnapshotBuilder:
    books = CallableSource(
        name="books",
        priority=100,
        supports=lambda key: key.namespace == "account",
        fetcher=read_books,
        timeout_seconds=5.0,
        blocking_io=True,
        transport_timeout_seconds=2.0,
    )
    risk = CallableDerivedSource(
        name="risk",
        priority=100,
        supports=lambda key: key.namespace == "risk",
        dependencies=lambda key: (PRICE[key.subject], POSITION[key.subject]),
        deriver=expose,
        run_sync_in_thread=False,  # quick arithmetic needs no thread
    )
    return SnapshotBuilder(
        [books, risk],  # prices have no source: they are only ever published
        default_policy=FreshnessPolicy(ttl_seconds=60.0, max_stale_seconds=60.0),
        authority_policy=SourceAuthorityPolicy({"broker": 200, "books": 100}),
    )


class Desk:
    """The loop, the streams and the broker; one facade serves all of their threads."""

    def __init__(self, sync: SyncSnapshotBuilder) -> None:
        self.sync = sync
        self.filled: Counter[str] = Counter()
        self.newest: dict[str, float] = dict.fromkeys(SYMBOLS, OPENING)
        self.mixed_up = 0

    def stream(self, symbol: str) -> None:
        """Publish prices out of order without ever waiting; drop those that find no room."""
        start, submit = time.time() - 1.0, self.sync.publisher.submit_publish
        for tick in random.sample(range(1, TICKS + 1), TICKS):
            quote, seen = OPENING + tick / TICKS, start + tick / TICKS
            try:
                submit(PRICE[symbol], quote, source="stream", observed_at=seen)
            except SubmissionBacklogFullError:
                continue  # the next price says more than this one
            self.newest[symbol] = max(self.newest[symbol], quote)

    def trade(self, symbol: str, meanwhile: Callable[[], object] = lambda: None) -> str:
        """Decide, look again, act; return what came of it."""
        price, position, risk = parts = (PRICE[symbol], POSITION[symbol], RISK[symbol])
        with self.sync.session(deadline_seconds=10.0) as session:
            decided = session.resolve(parts)
            with ThreadPoolExecutor() as another:
                another.submit(meanwhile)
            try:
                latest = session.revalidate([price, position], acceptance_policy=RECENT)
            except SnapshotBuildError as error:
                return "unknown" if price in error.errors else "failed"
        for moment in (decided, latest):
            self.mixed_up += moment[risk].value != moment[price].value * moment[position].value
        if latest[price].value > decided[price].value * 1.05:
            return "withheld"
        self.filled[symbol] += ORDER
        self.sync.publisher.publish(position, self.filled[symbol], source="broker")
        return "filled"


def tell(sentence: str, is_so: bool) -> None:
    """Print what the reader is told, or end the program if it is not so."""
    if not is_so:
        raise SystemExit(f"NOT AS TOLD: {sentence}")
    print(f"ok  {sentence}")


def main() -> None:
    with SyncSnapshotBuilder(make_builder(), max_pending_submissions=256) as sync:
        desk, publisher, opening = Desk(sync), sync.publisher, time.time() - 2.0
        for key in PRICE.values():
            publisher.publish(key, OPENING, source="stream", observed_at=opening)
        with ThreadPoolExecutor() as pool:
            streams = pool.map(desk.stream, SYMBOLS)
            outcomes = Counter(desk.trade(symbol) for _ in range(20) for symbol in SYMBOLS)
        publisher.flush(timeout_seconds=10.0)
        tell("the streams end well", [*streams] == [None, None])
        tell("forty orders are filled while prices stream in", outcomes == {"filled": 40})
        tell("no moment mixed an old price with a new exposure", desk.mixed_up == 0)
        last = sync.build([*PRICE.values(), *POSITION.values()])
        newest = {symbol: last.value(key) for symbol, key in PRICE.items()} == desk.newest
        tell("the newest price has won, whatever the order of arrival", newest)
        filled = {symbol: last.value(key) for symbol, key in POSITION.items()} == desk.filled
        tell("the positions are the broker's", filled)
        late = publisher.publish(POSITION["ACME"], 0, source="books")
        tell("the books cannot replace them", late.status is PublishStatus.IGNORED_LOWER_AUTHORITY)
        jump = partial(publisher.publish, PRICE["ACME"], 120.0, source="stream")
        outcome = desk.trade("ACME", jump)
        tell("a price that runs away between decision and deed is noticed", outcome == "withheld")
        gap = partial(publisher.invalidate, PRICE["ACME"], reason="gap in the stream")
        outcome = desk.trade("ACME", gap)
        tell("nothing is done on a price that is no longer known", outcome == "unknown")


if __name__ == "__main__":
    main()
