"""The read model of a web shop: a page made of three services, with honest status codes.

=======  =======================  ====================================================
price    required, may be old     a shop shows yesterday's price rather than no page
stock    required, of 30 s ago    else the shop would sell what it does not have
rating   optional                 the page is good without it
=======  =======================  ====================================================

A server on loopback answers each request from one snapshot. Every sentence after "ok" has been
checked; the program fails at the first that does not hold.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

from coalestra import (
    CallableBatchSource,
    FetchContext,
    FreshnessPolicy,
    RequestOutcome,
    ResourceAbsent,
    ResourceAbsentError,
    ResourceAcceptanceRule,
    ResourceKey,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotRequest,
)

Keys = Collection[ResourceKey]
FACTS: dict[str, dict[str, float]] = {
    "price": {"lamp": 49.0, "chair": 129.0},
    "stock": {"lamp": 3, "chair": 12},
    "rating": {"lamp": 4.5, "chair": 3.9},
}


class SkippingClock:
    """The system's time, plus what was skipped."""

    skipped_seconds = 0.0

    def now(self) -> float:
        return time.time() + self.skipped_seconds

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped_seconds


class Shop:
    """The services, the builder over them, and the page that a visitor gets."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.down: set[str] = set()
        self.clock = SkippingClock()
        self.builder = SnapshotBuilder(
            [self.service(name) for name in FACTS],
            default_policy=FreshnessPolicy(ttl_seconds=5.0, max_stale_seconds=3600.0),
            clock=self.clock,
        )

    def service(self, name: str) -> CallableBatchSource:
        async def ask(keys: Keys, context: FetchContext) -> dict[ResourceKey, Any]:
            self.calls[name] += 1
            if name in self.down:
                raise ConnectionError(f"the {name} service is down")
            none = ResourceAbsent("no such product")
            return {key: FACTS[name].get(key.subject, none) for key in keys}

        return CallableBatchSource(
            name=name, priority=1, supports=lambda key: key.name == name, fetcher=ask
        )

    async def page(self, product: str) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of the page of a product."""
        price, stock, rating = keys = [ResourceKey("shop", name, product) for name in FACTS]
        not_too_old = ResourceAcceptanceRule(max_age_seconds=30.0)
        request = SnapshotRequest(
            required=[price, stock],
            optional=[rating],
            acceptance_policy=SnapshotAcceptancePolicy(resource_rules={stock: not_too_old}),
        )
        result = await self.builder.try_request(request, deadline_seconds=2.0)
        if result.violations:
            return 409, {"refused": [violation.message for violation in result.violations]}
        if result.outcome is RequestOutcome.REJECTED:
            absent = isinstance(result.errors.get(price), ResourceAbsentError)
            return (404, {"unknown": product}) if absent else (503, result.to_dict())
        snapshot = result.require_accepted()
        facts = {key.name: snapshot.maybe_value(key) for key in keys}
        return 200, {**facts, "old": [key.name for key in snapshot.stale_keys]}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
        status, body = await self.page(path.removeprefix("/products/"))
        writer.write(f"HTTP/1.0 {status} -\r\n\r\n{json.dumps(body)}".encode())
        writer.close()
        await writer.wait_closed()


async def get(port: int, product: str) -> tuple[int, dict[str, Any]]:
    """Ask for the page of a product as a browser would."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET /products/{product} HTTP/1.0\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    return int(head.split()[1]), json.loads(body)


def tell(sentence: str, is_so: bool) -> None:
    """Print what the reader is told, or end the program if it is not so."""
    if not is_so:
        raise SystemExit(f"NOT AS TOLD: {sentence}")
    print(f"ok  {sentence}")


async def visit(shop: Shop, port: int) -> None:
    pages = await asyncio.gather(*(get(port, "lamp") for _ in range(50)))
    good = (200, {"price": 49.0, "stock": 3, "rating": 4.5, "old": []})
    tell("200: fifty visitors at once get the same page", all(page == good for page in pages))
    tell("each service was called once for all of them", set(shop.calls.values()) == {1})
    tell("404: there is no moon in the shop", (await get(port, "moon"))[0] == 404)
    shop.down = {"price", "rating"}
    shop.clock.skipped_seconds += 60.0
    old = (200, {**good[1], "old": ["price", "rating"]})
    tell("200: with two services down, the page says what is old", await get(port, "lamp") == old)
    tell("503: a chair without a price has no page", (await get(port, "chair"))[0] == 503)
    shop.down = {"stock"}
    shop.clock.skipped_seconds += 60.0
    status, page = await get(port, "lamp")
    tell("409: nothing is sold from the stock of a minute ago", status == 409)
    print(f"    {page['refused'][0]}")


async def main() -> None:
    shop = Shop()
    async with shop.builder, await asyncio.start_server(shop.serve, "127.0.0.1", 0) as server:
        await visit(shop, server.sockets[0].getsockname()[1])


if __name__ == "__main__":
    asyncio.run(main())
