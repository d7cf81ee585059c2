"""One of several worker processes that are scraped as one; does a line of JSON after the other."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from coalestra import CallableSource, CircuitBreakerPolicy, ResourceKey, SnapshotBuilder
from coalestra.core.policies import FreshnessPolicy
from coalestra.prometheus import HealthCollector, PrometheusMetrics
from coalestra.resilience import RetryPolicy, SourceResiliencePolicy
from tests.support.workers import say


class Worker:
    """A builder, and what has been asked of it."""

    def __init__(self) -> None:
        self.down = False
        self.gate = asyncio.Event()
        self.held: list[asyncio.Task[Any]] = []
        source = CallableSource(
            name="x", priority=1, supports=lambda key: True, fetcher=self.fetch, max_concurrency=4,
            resilience_policy=SourceResiliencePolicy(retry=RetryPolicy(max_attempts=1),
                circuit=CircuitBreakerPolicy(failure_threshold=1)),
        )  # fmt: skip
        self.builder = SnapshotBuilder(
            [source],
            default_policy=FreshnessPolicy(1000.0, 1000.0),
            metrics=PrometheusMetrics("shop"),
        )
        # As rarely as never: `renew` does it, so that nobody has to wait.
        self.collector = HealthCollector({"shop": self.builder}, interval_seconds=1e6)

    async def fetch(self, key: ResourceKey, context: Any) -> str:
        if key.name == "held":
            await self.gate.wait()
        if self.down:
            raise ConnectionError("down")
        return "fine"

    async def build(self, *subjects: str) -> None:
        """Build snapshots one after the other."""
        for subject in subjects:
            await self.builder.build([ResourceKey("shop", "free", subject)], strict=False)

    async def fail(self) -> None:
        """Have a call fail."""
        self.down = True
        await self.build("failing")
        self.down = False

    async def hold(self, count: int) -> None:
        """Begin builds that do not end."""
        keys = [ResourceKey("shop", "held", str(number)) for number in range(count)]
        self.held = [asyncio.ensure_future(self.builder.build([key])) for key in keys]
        for _ in range(20):
            await asyncio.sleep(0)

    async def release(self) -> None:
        """Let them end."""
        self.gate.set()
        await asyncio.gather(*self.held)

    async def renew(self) -> None:
        """Copy health into the gauges."""
        self.collector.watch("shop", self.builder)

    async def close(self) -> None:
        """Close the builder."""
        await self.builder.aclose()


async def main() -> None:
    """Do what the lines say, and answer each."""
    worker = Worker()
    for line in sys.stdin:
        what, terms, _ = json.loads(line)
        await getattr(worker, what)(*terms)
        say({})


if __name__ == "__main__":
    asyncio.run(main())
