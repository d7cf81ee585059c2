"""A nightly batch job over 100,000 accounts, in bounded memory and time.

Each slice of the keys is one snapshot. It asks the ledger, a thousand accounts a call, four calls
at a time, then the archive, one by one, for what the ledger does not know. What nobody knows is a
line in the report, not the end of the job. The program fails at the first "ok" that does not hold.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator

from coalestra import (
    AsyncMemoryCache,
    CallableBatchSource,
    CallableSource,
    CircuitBreakerPolicy,
    FetchContext,
    FreshnessPolicy,
    ResourceKey,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SourceResiliencePolicy,
)

ACCOUNTS, SLICE, CALL = 100_000, 10_000, 1_000
ARCHIVED, LOST, FAILING = 1_000, 10_000, 25  # one in so many accounts, accounts and calls

PATIENT = SourceResiliencePolicy(
    retry=RetryPolicy(max_attempts=3, base_delay_seconds=0.001),
    circuit=CircuitBreakerPolicy(enabled=False),  # a lost account is not a sign of bad health
)


class Bank:
    """The ledger, which hangs up now and then, and the archive."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.failed = self.largest_call = self.at_once = self.most_at_once = 0

    async def ledger(
        self, keys: Collection[ResourceKey], context: FetchContext
    ) -> dict[ResourceKey, int]:
        self.calls["ledger"] += 1
        self.largest_call = max(self.largest_call, len(keys))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0.001)
            if self.calls["ledger"] % FAILING == 0:
                self.failed += 1
                raise ConnectionError("the ledger hung up")
        finally:
            self.at_once -= 1
        numbers = {key: int(key.subject) for key in keys}
        return {key: number % 7 for key, number in numbers.items() if number % ARCHIVED}

    async def archive(self, key: ResourceKey, context: FetchContext) -> int:
        self.calls["archive"] += 1
        if int(key.subject) % LOST == 0:
            raise LookupError(f"no account {key.subject}")
        return 1

    def builder(self) -> SnapshotBuilder:
        """Return a builder over both; its cache remembers no more than two slices."""
        return SnapshotBuilder(
            [
                CallableBatchSource(
                    name="ledger",
                    priority=200,
                    supports=lambda key: key.namespace == "account",
                    fetcher=self.ledger,
                    max_batch_size=CALL,
                    max_concurrency=4,
                    cache_supports=False,  # each account is asked about once
                    resilience_policy=PATIENT,
                ),
                CallableSource(
                    name="archive",
                    priority=100,
                    supports=lambda key: key.namespace == "account",
                    fetcher=self.archive,
                    cache_supports=False,
                    resilience_policy=PATIENT,
                ),
            ],
            default_policy=FreshnessPolicy(ttl_seconds=3600.0, max_stale_seconds=3600.0),
            cache=AsyncMemoryCache(max_entries=2 * SLICE),
        )


def slices() -> Iterator[list[ResourceKey]]:
    """Yield the keys slice by slice; there is no list of them all."""
    for first in range(0, ACCOUNTS, SLICE):
        yield [ResourceKey("account", "balance", str(n)) for n in range(first, first + SLICE)]


class Report:
    """What the job found out, and how many blocks of memory were in use after each slice."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.lost: list[str] = []
        self.retries = 0
        self.blocks: list[int] = []

    def add(self, snapshot: Snapshot) -> None:
        self.answers.update(value.source for value in snapshot.values())
        self.lost += [str(error) for error in snapshot.errors.values()]
        self.retries += snapshot.diagnostics.retries
        gc.collect()
        self.blocks.append(sys.getallocatedblocks())


def tell(sentence: str, is_so: bool) -> None:
    """Print what the reader is told, or end the program if it is not so."""
    if not is_so:
        raise SystemExit(f"NOT AS TOLD: {sentence}")
    print(f"ok  {sentence}")


async def main() -> None:
    bank, report = Bank(), Report()
    began = time.monotonic()
    async with bank.builder() as builder:
        for keys in slices():
            report.add(await builder.build(keys, strict=False, deadline_seconds=20.0))

    print(f"    calls: {dict(bank.calls)}, answers: {dict(report.answers)}")
    lines, lost = report.answers.total() + len(report.lost), ACCOUNTS // LOST
    tell("every account has an answer or a line in the report", lines == ACCOUNTS)
    tell("the archive gave the rest", report.answers["archive"] == ACCOUNTS // ARCHIVED - lost)
    tell("ten accounts are lost, and named", len(report.lost) == lost)
    print(f"    the last of them: {report.lost[-1]}")
    tell("a call that failed was made again", report.retries == bank.failed > 0)
    tell("no call asked for more than a thousand", bank.largest_call == CALL)
    tell("never more than four calls at once", bank.most_at_once == 4)
    half_way, at_the_end = report.blocks[len(report.blocks) // 2], report.blocks[-1]
    tell("the second half needs no more memory than the first", at_the_end < 1.05 * half_way)
    tell("the job takes less than a minute", time.monotonic() - began < 60.0)


if __name__ == "__main__":
    asyncio.run(main())
