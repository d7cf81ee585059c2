"""Waiting for capacity and looking into the cache are counted once, and by what ended them."""

from __future__ import annotations

import asyncio

from coalestra import InMemoryMetrics, Snapshot, SnapshotBuilder
from tests.orchestration.scripted import Batch, Derived, builder, key
from tests.support import Gate, begun


async def one_slot_taken() -> tuple[
    Gate, InMemoryMetrics, SnapshotBuilder, asyncio.Future[Snapshot]
]:
    gate, metrics = Gate(), InMemoryMetrics()
    batch = Batch("batch", before=gate.pass_)
    building = builder(
        batch, source_concurrency={"batch": 1}, metrics=metrics, buffer_observability=False
    )
    holding = await begun(building.build([key("batch", "1")]), gate)
    return gate, metrics, building, holding


async def test_a_deadline_that_strikes_in_the_queue_for_capacity_is_counted_as_such() -> None:
    gate, metrics, building, holding = await one_slot_taken()
    await building.build([key("batch", "2")], strict=False, deadline_seconds=1)
    counted = metrics.counter
    waited = {"source": "batch", "reason": "snapshot_deadline"}
    assert counted("source_capacity_timeout_total", **waited) == 1
    ended = {"source": "batch", "status": "deadline_exceeded"}
    assert counted("source_batch_call_total", **ended) == 1
    assert (await building.health_snapshot()).deadline_exceeded_count == 1
    gate.open()
    await holding


async def test_a_caller_who_leaves_the_queue_before_any_deadline_is_no_timeout() -> None:
    gate, metrics, building, holding = await one_slot_taken()
    leaving = asyncio.ensure_future(building.build([key("batch", "2")], deadline_seconds=9))
    await asyncio.sleep(1)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    waited = {"source": "batch", "reason": "snapshot_deadline"}
    assert metrics.counter("source_capacity_timeout_total", **waited) == 0
    gate.open()
    await holding


async def test_a_warm_build_with_derived_keys_counts_one_read_of_the_cache() -> None:
    top = Derived("top", needs=lambda k: [key("batch")])
    building = builder(Batch("batch"), top)
    await building.build([key("top"), key("batch")])
    warm = (await building.build([key("top"), key("batch")])).diagnostics
    assert (warm.cache_hits, warm.cache_batch_reads) == (2, 1)
