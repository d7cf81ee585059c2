"""The spans of real builds: what hangs below what, what is linked, and how each of them ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import Metric
from opentelemetry.trace import StatusCode

from coalestra import (
    CacheLookup,
    CallableSource,
    FetchContext,
    FreshnessPolicy,
    RefreshMode,
    ResourceKey,
    RetryPolicy,
    SnapshotBuilder,
    SourceResiliencePolicy,
    SourceUnavailableError,
    SyncSnapshotBuilder,
)
from coalestra.opentelemetry import OpenTelemetryMetrics, OpenTelemetryTracer
from tests.contracts.caches import SingleKeyCache
from tests.opentelemetry.memory import Meters, Spans, attributes, told
from tests.orchestration.scripted import Batch, Derived, Single, builder, key, latency, tuned
from tests.support import Gate, begun, settle

A, B, D = key("a", "SECRET"), key("b", "SECRET"), key("d", "SECRET")
SWR = FreshnessPolicy(10.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
TWICE = SourceResiliencePolicy(retry=RetryPolicy(max_attempts=2, base_delay_seconds=1.0))


def traced(spans: Spans, *sources: Any, **settings: Any) -> SnapshotBuilder:
    """A builder whose spans can be looked at."""
    return builder(*sources, tracer=OpenTelemetryTracer(spans.provider), **settings)


def client(spans: Spans) -> trace.Tracer:
    """What a client library makes its own spans with."""
    return spans.provider.get_tracer("client")


# What hangs below what ------------------------------------------------------------------------


async def test_spans_of_clients_are_below_attempts_and_those_below_requests(spans: Spans) -> None:
    calls = 0

    async def fetch(key: ResourceKey, context: FetchContext) -> int:
        nonlocal calls
        calls += 1
        with client(spans).start_as_current_span("GET"):
            await asyncio.sleep(1)
        if calls == 1:
            raise SourceUnavailableError("SECRET is down")
        return 1

    derived = Derived("d", needs=lambda _: [A, B])
    used = traced(
        spans, tuned(Single("a", fetch=fetch), resilience_policy=TWICE), Batch("b"), derived
    )
    with client(spans).start_as_current_span("request"):
        await used.build([D], snapshot_id="s1")
        assert trace.get_current_span().is_recording(), "the request's own span is current again"
    assert spans.tree() == [
        "request", "  build snapshot", "    derive d", "    fetch a", "      GET", "    fetch a",
        "      GET", "    fetch_many b",
    ]  # fmt: skip
    first, second = spans.named("fetch a")
    assert attributes(first) == {
        "coalestra.source.name": "a", "coalestra.source.kind": "single",
        "coalestra.snapshot.id": "s1", "coalestra.keys.requested": 1, "coalestra.call.attempt": 1,
        "coalestra.capacity.wait_time": 0.0, "coalestra.outcome": "failure",
        "error.type": "coalestra.core.errors.SourceUnavailableError",
    }  # fmt: skip
    assert first.instrumentation_scope is not None
    assert (first.instrumentation_scope.name, bool(first.instrumentation_scope.version)) == (
        "coalestra",
        True,
    )
    assert first.status.status_code is StatusCode.ERROR
    assert "in fetch" in attributes(first.events[0])["exception.stacktrace"]
    assert attributes(second)["coalestra.call.attempt"] == 2
    assert attributes(second)["coalestra.outcome"] == "success"
    assert second.status.status_code is StatusCode.UNSET
    assert attributes(spans.one("build snapshot")) == {
        "coalestra.snapshot.id": "s1",
        "coalestra.keys.requested": 1,
        "coalestra.keys.resolved": 1,
        "coalestra.keys.failed": 0,
    }
    assert "SECRET" not in told(spans)


async def test_a_source_in_a_thread_has_its_span_as_the_current_one(spans: Spans) -> None:
    def fetch(key: ResourceKey, context: FetchContext) -> int:
        with client(spans).start_as_current_span("SELECT"):
            return 1

    source = CallableSource(name="db", priority=1, supports=lambda key: True, fetcher=fetch)
    async with traced(spans, source) as used:
        await used.build([A])
    assert spans.tree() == ["build snapshot", "  fetch db", "    SELECT"]


async def test_what_a_cache_asks_its_server_is_below_the_stage_cold_or_warm(spans: Spans) -> None:
    class Traced(SingleKeyCache):
        async def get(
            self, key: ResourceKey, *, now: float, policy: FreshnessPolicy
        ) -> CacheLookup:
            with client(spans).start_as_current_span("GET"):
                return await super().get(key, now=now, policy=policy)

    used = traced(spans, Single("a"), cache=Traced())
    with client(spans).start_as_current_span("request"):
        await used.build([A])
        spans.exporter.clear()
        await used.build([A])
    assert {line for line in spans.tree() if "GET" in line} == {"    GET"}


async def test_each_stage_of_a_session_hangs_below_what_asked_for_it(spans: Spans) -> None:
    used = traced(spans, Single("a"), Single("b"))
    with client(spans).start_as_current_span("opening"):
        session = used.session()
    with client(spans).start_as_current_span("first"):
        await session.resolve([A])
    with client(spans).start_as_current_span("second"):
        await session.resolve([B])
        await session.revalidate([A], force_refresh=True)
    await session.close()
    assert spans.tree() == [
        "first", "  resolve snapshot", "    fetch a", "opening", "second", "  resolve snapshot",
        "    fetch b", "  revalidate snapshot", "    fetch a",
    ]  # fmt: skip


async def test_waiting_for_capacity_is_told_with_the_call(spans: Spans) -> None:
    used = traced(spans, Single("a", fetch=latency(2)), max_concurrency=1)
    await asyncio.gather(used.build([A]), used.build([key("a", "other")]))
    waits = [attributes(span)["coalestra.capacity.wait_time"] for span in spans.named("fetch a")]
    assert waits == [0.0, pytest.approx(2.0)]


def test_a_thread_that_uses_the_facade_has_the_build_below_its_own_span(spans: Spans) -> None:
    with SyncSnapshotBuilder(traced(spans, Single("a"))) as facade:
        with client(spans).start_as_current_span("job"):
            facade.build([A])
            with facade.session() as session:
                session.resolve([A])
    assert spans.tree() == ["job", "  build snapshot", "    fetch a", "  resolve snapshot"]


# What is linked -------------------------------------------------------------------------------


async def test_a_refresh_is_a_trace_linked_to_the_build_that_set_it_off(spans: Spans) -> None:
    with client(spans).start_as_current_span("start of the program"):
        used = traced(spans, Single("a"), default_policy=SWR)
    await used.build([A])
    await asyncio.sleep(20)
    with client(spans).start_as_current_span("request"):
        await used.build([A], snapshot_id="cause")
        await used.wait_for_refreshes()
    refresh = spans.one("refresh resources")
    assert refresh.parent is None
    assert [link.context for link in refresh.links] == [spans.named("build snapshot")[1].context]
    assert attributes(refresh)["coalestra.snapshot.parent_id"] == "cause"
    assert attributes(refresh)["coalestra.reason"] == "stale_while_revalidate"
    assert attributes(refresh)["coalestra.keys.resolved"] == 1
    assert "  fetch a" in spans.tree()[-4:]
    assert "SECRET" not in told(spans)


async def test_readers_who_joined_are_linked_to_the_call_that_served_them(spans: Spans) -> None:
    used = traced(spans, Batch("b", before=lambda: asyncio.sleep(2)))
    keys = [key("b", str(number)) for number in range(50)]
    first = await begun(used.build(keys, snapshot_id="first"))
    with client(spans).start_as_current_span("late"):
        await used.build(keys)
    await first
    join = spans.one("join flight")
    assert [link.context for link in join.links] == [spans.one("fetch_many b").context]
    assert attributes(join) == {
        "coalestra.flight.snapshot_id": "first",
        "coalestra.resource.namespace": "test",
        "coalestra.resource.name": "b",
        "coalestra.keys.requested": 50,
        "coalestra.flight.wait_time": pytest.approx(2.0, abs=0.2),
    }
    assert spans.tree()[-3:] == ["late", "  build snapshot", "    join flight"]


# How it ended ---------------------------------------------------------------------------------


async def test_a_call_that_takes_too_long_failed_and_says_whose_time_was_up(spans: Spans) -> None:
    slow = latency(5)
    used = traced(spans, Single("a", fetch=slow), Single("b", fetch=slow, timeout=1.0))
    await used.build([A], deadline_seconds=2.0, strict=False)
    await used.build([B], strict=False)
    outcomes = {
        span.name: (attributes(span)["coalestra.outcome"], attributes(span)["error.type"])
        for span in (*spans.named("fetch a"), *spans.named("fetch b"))
    }
    errors = "coalestra.core.errors"
    assert outcomes == {
        "fetch a": ("deadline", f"{errors}.SnapshotDeadlineExceededError"),
        "fetch b": ("timeout", f"{errors}.SourceTimeoutError"),
    }


async def test_what_was_called_off_has_ended_but_not_failed(spans: Spans) -> None:
    used = traced(spans, Single("a", fetch=latency(5)))
    build = await begun(used.build([A]))
    build.cancel()
    await settle()
    await used.aclose()
    assert attributes(spans.one("build snapshot"))["coalestra.outcome"] == "cancelled"
    assert attributes(spans.one("fetch a"))["coalestra.outcome"] == "abandoned"
    assert {span.status.status_code for span in spans.ended} == {StatusCode.UNSET}


# Metrics beside spans -------------------------------------------------------------------------


async def test_the_exemplar_of_a_duration_leads_to_its_trace(meters: Meters, spans: Spans) -> None:
    """Also if several builds share the source, and have to wait for each other."""
    gate = Gate()

    async def fetch(key: ResourceKey, context: FetchContext) -> int:
        await gate.pass_()
        await asyncio.sleep({"quick": 0.002, "slow": 3.0}[key.subject])
        return 1

    sink = OpenTelemetryMetrics(meters.provider)
    used = traced(spans, Single("a", fetch=fetch), metrics=sink, max_concurrency=1)
    first = await begun(used.build([key("a", "slow")]), gate)
    second = await begun(used.build([key("a", "quick")]))
    gate.open()
    await asyncio.gather(first, second)
    slow, quick = (span.context.trace_id for span in spans.named("fetch a") if span.context)
    read = meters.metrics()  # once: a reader forgets the exemplars that it has read
    assert exemplars(read["coalestra.source.fetch.duration"]) == {3.0: slow, 0.002: quick}
    assert exemplars(read["coalestra.source.capacity.wait_time"]) == {3.0: quick}


def exemplars(metric: Metric) -> dict[float, int | None]:
    """The ids of traces by the value that they are examples of."""
    points: Any = metric.data.data_points
    return {round(each.value, 3): each.trace_id for point in points for each in point.exemplars}
