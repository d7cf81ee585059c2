"""What real builds report: every counter, observation and event, with exactly those labels (13)."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Coroutine, Iterator
from typing import Any

import pytest

from coalestra import (
    CallableBatchSource,
    FetchContext,
    FreshnessPolicy,
    NullEventSink,
    NullMetrics,
    RefreshMode,
    ResourceAbsent,
    ResourceAcceptanceRule,
    ResourceKey,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotBuildError,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
    SourcePayload,
)
from coalestra._telemetry import COUNTERS, OBSERVATIONS
from coalestra.observability import EventRecord
from tests.contracts.caches import SingleKeyCache
from tests.observability.recording import EVENTS
from tests.orchestration.scripted import (
    Batch,
    Derived,
    Single,
    builder,
    echo,
    held_at,
    key,
    latency,
)
from tests.support import Gate, ThreadGate, begun, settle

X = key("x", "1")
OF_RESOURCE = {"resource_namespace", "resource_name"}


class Seen:
    """Both sinks of a builder; knows the tables, and complains of whatever does not fit them."""

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self.counts: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
        self.observed: dict[tuple[str, str], list[float]] = {}
        self.events: list[EventRecord] = []
        self.faults: list[str] = []

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        self._check(metric, labels)
        series = metric, tuple(sorted(labels.items()))
        self.counts[series] = self.counts.get(series, 0) + value
        for text in labels.values():
            if type(text) is not str or re.search(r"subject|:", text):
                self.faults.append(f"{metric} names a resource, or has no plain text: {labels}")

    def observe(self, metric: str, value: float, **labels: str) -> None:
        self._check(metric, labels)
        (label,) = labels.values()
        self.observed.setdefault((metric, label), []).append(value)

    def _check(self, metric: str, labels: dict[str, str]) -> None:
        *_, known = {**COUNTERS, **OBSERVATIONS}[metric]
        every = {name: values.split() or [labels.get(name, "")] for name, values in known.items()}
        if set(labels) != set(every) or any(labels[name] not in every[name] for name in labels):
            self.faults.append(f"{metric} with {labels}")

    def emit(self, event_type: str, **payload: Any) -> None:
        self.events.append(EventRecord(event_type, payload))
        if set(payload) != set(EVENTS.get(event_type, "?").split()):
            self.faults.append(f"{event_type} with {sorted(payload)}")
        for name, value in payload.items():
            if name != "diagnostics" and type(value) not in (str, int, float, bool, tuple):
                self.faults.append(f"{event_type} has a {name} that is no plain value")

    def count(self, metric: str, **labels: str) -> int:
        """Return a counter; labels of the resource are those of `X` unless given."""
        if COUNTERS[metric][-1].keys() >= OF_RESOURCE:
            labels = {"resource_namespace": "test", "resource_name": "x", **labels}
        return self.counts.get((metric, tuple(sorted(labels.items()))), 0)

    def of(self, event_type: str) -> list[dict[str, Any]]:
        """Return the payloads of all events of one type."""
        return [each.payload for each in self.events if each.event_type == event_type]


seen_here: list[Seen] = []


@pytest.fixture(autouse=True)
def _nothing_is_told_that_is_not_in_the_tables() -> Iterator[None]:
    yield
    told, seen_here[:] = seen_here[:], []
    assert [fault for seen in told for fault in seen.faults] == []


def watched(*sources: Any, **settings: Any) -> tuple[SnapshotBuilder, Seen]:
    """A builder, and everything it reports."""
    seen_here.append(seen := Seen())
    return builder(*sources, metrics=seen, events=seen, **settings), seen


async def down(k: ResourceKey, context: FetchContext) -> Any:
    raise ConnectionError("down\nand out")


def dated(offset: float) -> Any:
    async def fetch(k: ResourceKey, context: FetchContext) -> SourcePayload[str]:
        return SourcePayload("dated", observed_at=context.requested_at + offset)

    return fetch


# Builds and the cache -----------------------------------------------------------------------------


async def test_a_build_reports_itself_its_misses_and_what_it_resolved() -> None:
    building, seen = watched(Single("x"))
    snapshot = await building.build([X])
    assert seen.count("snapshot_build_total", status="success") == 1
    assert seen.observed["snapshot_build_latency_ms", "success"] == [
        snapshot.diagnostics.duration_ms
    ]
    assert seen.count("cache_access_total", status="miss") == 1
    assert seen.count("source_fetch_total", source="x", status="success") == 1
    (built,) = seen.of("snapshot_built")
    differs = built["diagnostics"] != snapshot.diagnostics
    assert built.pop("diagnostics") == snapshot.diagnostics
    assert not differs
    assert built == {
        "snapshot_id": snapshot.snapshot_id, "resources": 1, "resolved": 1, "failed": 0,
        "build_failed": False, "strict": True,
    }  # fmt: skip
    (resolved,) = seen.of("resource_resolved")
    assert (resolved["resource"], resolved["source_kind"]) == (str(X), "single")
    assert len(seen.observed["source_fetch_latency_ms", "x"]) == 1


async def test_a_hit_is_counted_and_told_with_its_freshness() -> None:
    building, seen = watched(Single("x"))
    await building.build([X])
    await building.build([X], snapshot_id="second")
    assert seen.count("cache_access_total", status="fresh") == 1
    (hit,) = seen.of("cache_hit")
    assert hit == {"resource": str(X), "freshness": "fresh", "snapshot_id": "second"}


async def test_a_stage_of_a_session_is_timed_on_its_own() -> None:
    async def slow(k: ResourceKey, context: FetchContext) -> str:
        await asyncio.sleep(float(k.subject))
        if k.subject == "2":
            raise ConnectionError("down")
        return "fine"

    building, seen = watched(Single("x", fetch=slow))
    async with building.session() as session:
        for seconds in ("0.5", "3"):
            await session.resolve([key("x", seconds)])
            await asyncio.sleep(7)
        with pytest.raises(SnapshotBuildError):
            await session.resolve([key("x", "2")])
    metric = "snapshot_session_resolve_latency_ms"
    assert seen.observed[metric, "success"] == pytest.approx([500, 3000])
    assert seen.observed[metric, "error"] == pytest.approx([2000])


@pytest.mark.parametrize("strict", [True, False])
async def test_a_build_that_misses_keys_is_an_error_only_if_it_is_strict(strict: bool) -> None:
    building, seen = watched(Single("x", fetch=down))
    if strict:
        with pytest.raises(SnapshotBuildError):
            await building.build([X], snapshot_id="s")
    else:
        await building.build([X], strict=False, snapshot_id="s")
    assert seen.count("snapshot_build_total", status="error") == strict
    assert [status for _, status in seen.observed if status in ("success", "error")] == [
        "error" if strict else "success"
    ]
    (built,) = seen.of("snapshot_built")
    assert (built["failed"], built["build_failed"], built["strict"]) == (1, strict, strict)
    assert seen.of("source_failed") == [{
        "resource": str(X), "source": "x", "error_type": "ConnectionError", "error": "down and out",
        "snapshot_id": "s",
    }]  # fmt: skip
    assert seen.count("source_fetch_total", source="x", status="failure") == 1


async def test_a_stale_fallback_is_a_cache_access_if_the_cache_had_it() -> None:
    source = Single("x")
    building, seen = watched(source, default_policy=FreshnessPolicy(1, 100))
    await building.build([X])
    await asyncio.sleep(5)
    source.answer = down
    await building.build([X], snapshot_id="s")
    assert seen.count("cache_access_total", status="stale_fallback") == 1
    told = {"resource": str(X), "error_type": "ResourceResolutionError", "snapshot_id": "s"}
    assert seen.of("stale_fallback_used") == [told]
    await asyncio.sleep(200)
    source.answer = dated(-5)
    await building.build([X], snapshot_id="s")
    assert seen.count("source_fetch_total", source="x", status="stale") == 1
    assert seen.count("cache_access_total", status="stale_fallback") == 1
    assert seen.of("stale_fallback_used") == [told, told]


async def test_joiners_are_counted() -> None:
    building, seen = watched(Single("x", fetch=latency(1)))
    await asyncio.gather(*(building.build([X]) for _ in range(3)))
    assert seen.count("singleflight_join_total") == 2


async def test_rejected_payloads_and_open_circuits_have_reports_of_their_own() -> None:
    building, seen = watched(Single("x", fetch=dated(60)))
    for _ in range(4):
        await building.build([X], strict=False)
    assert seen.count("source_fetch_total", source="x", status="invalid_timestamp") == 3
    assert seen.count("source_fetch_total", source="x", status="circuit_open") == 1
    assert len(seen.of("source_payload_rejected")) == 3
    (refused,) = seen.of("source_circuit_open")
    assert (refused["source"], refused["resource"]) == ("x", str(X))
    assert seen.of("source_failed") == []


# Calls --------------------------------------------------------------------------------------------


async def test_batch_calls_are_counted_by_how_they_end() -> None:
    mode: list[Callable[[], Coroutine[Any, Any, None]]] = []

    async def before() -> None:
        if mode:
            await mode[0]()

    async def fail() -> None:
        raise LookupError("down")

    async def hang() -> None:
        await asyncio.sleep(50)

    source = Batch("x", before=before)
    source.queue_timeout_seconds = 3
    building, seen = watched(source, max_concurrency=1)
    await building.build([X, key("x", "2")])
    mode.append(fail)
    await building.build([key("x", "3")], strict=False)
    mode[0] = hang
    await building.build([key("x", "4")], strict=False, deadline_seconds=2)
    await settle()
    holder = await begun(building.build([key("x", "5")]))
    leaving = await begun(building.build([key("x", "8")], deadline_seconds=9))
    await asyncio.sleep(2)
    leaving.cancel()  # before any deadline: that is no timeout
    await settle()
    await building.build([key("x", "6")], strict=False)
    await building.build([key("x", "7")], strict=False, deadline_seconds=1)
    holder.cancel()
    await settle()
    for status in ("success", "failure", "queue_timeout"):
        assert seen.count("source_batch_call_total", source="x", status=status) >= 1, status
    late = seen.count("source_batch_call_total", source="x", status="deadline_exceeded")
    assert late == 2
    assert seen.observed["source_batch_size", "x"][0] == 2
    for reason in ("queue_timeout", "snapshot_deadline"):
        assert seen.count("source_capacity_timeout_total", source="x", reason=reason) == 1, reason
    waits = seen.observed["source_capacity_wait_ms", "x"]
    assert [round(each) for each in waits if each] == [2000, 3000, 1000]
    assert (await building.health_snapshot()).deadline_exceeded_count == late


async def test_a_blocking_call_counts_once_and_each_of_its_keys_has_an_event() -> None:
    """Whether it was not made, as it could outlive the deadline, or outlived its own limit."""
    gate = ThreadGate()

    def fetch(keys: Collection[ResourceKey], context: FetchContext) -> dict[ResourceKey, int]:
        gate.pass_()
        return dict.fromkeys(keys, 1)

    source = CallableBatchSource(
        name="x", priority=1, supports=lambda k: k.name == "x", fetcher=fetch, blocking_io=True,
        transport_timeout_seconds=1.0, timeout_seconds=3.0,
    )  # fmt: skip
    building, seen = watched(source)
    keys = [X, key("x", "2")]
    await building.build(keys, strict=False, deadline_seconds=0.5, snapshot_id="s")
    reading = asyncio.ensure_future(building.build(keys, snapshot_id="s"))
    while not gate.arrived:
        await settle()
    await asyncio.sleep(1.5)
    gate.open()
    await reading
    rejected, violated = {"reason": "snapshot_deadline"}, {"outcome": "completed_late"}
    assert seen.count("source_transport_budget_rejection_total", source="x", **rejected) == 1
    assert seen.count("source_transport_timeout_violation_total", source="x", **violated) == 1
    of_both = {"source": "x", "snapshot_id": "s"}
    limits = {"transport_timeout_seconds": 1.0, "available_budget_seconds": 0.5}
    assert seen.of("source_transport_budget_rejected") == [
        {"resource": str(k), **of_both, **limits} for k in keys
    ]
    took = {
        "declared_transport_timeout_seconds": 1.0,
        "observed_elapsed_seconds": 1.5,
        "grace_seconds": 0.05,
    }
    assert seen.of("source_transport_timeout_violated") == [
        {"resource": str(k), **of_both, **violated, **took} for k in keys
    ]


async def test_what_is_absent_and_a_cache_that_fails_are_told() -> None:
    class Away(SingleKeyCache):
        async def get(self, key: ResourceKey, **_: Any) -> Any:
            raise LookupError("away")

    async def absent(k: ResourceKey, context: FetchContext) -> Any:
        return ResourceAbsent("sold out")

    building, seen = watched(Single("x", fetch=absent), cache=Away())
    await building.build([X], strict=False, snapshot_id="s")
    assert seen.count("source_fetch_total", source="x", status="absent") == 1
    assert seen.of("resource_absent") == [{"resource": str(X), "source": "x", "snapshot_id": "s"}]
    assert seen.count("cache_failure_total", operation="read") == 1
    assert seen.of("cache_failed") == [
        {"operation": "read", "error_type": "LookupError", "error": "away"}
    ]


async def test_every_kind_of_source_is_named() -> None:
    building, seen = watched(
        Single("s"), Batch("b"), Derived("d", needs=lambda k: [key("s"), key("b")])
    )
    await building.build([key("d")])
    kinds = {each["source"]: each["source_kind"] for each in seen.of("resource_resolved")}
    assert kinds == {"s": "single", "b": "batch", "d": "derived"}


# Refreshes, publications --------------------------------------------------------------------------


async def test_refreshes_are_reported_from_beginning_to_end() -> None:
    source = Single("x")
    policy = FreshnessPolicy(1, 100, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building, seen = watched(source, default_policy=policy)
    await building.build([X])
    mode = "stale_while_revalidate"
    for answer in (echo, down, latency(50)):
        await asyncio.sleep(5)
        source.answer = answer
        await building.build([X], snapshot_id="parent")
        if answer in (echo, down):
            await building.wait_for_refreshes()
    await building.aclose(cancel_refreshes=True)
    assert seen.count("cache_access_total", status=mode) == 3
    assert seen.of("cache_hit")[0] == {
        "resource": str(X),
        "freshness": mode,
        "snapshot_id": "parent",
    }
    counts = {"scheduled": 3, "success": 1, "failure": 1, "cancelled": 1}
    for status, count in counts.items():
        assert seen.count("resource_refresh_total", status=status) == count, status
    told = {"resource": str(X), "reason": mode}
    assert seen.of("resource_refresh_scheduled") == [{**told, "snapshot_id": "parent"}] * 3
    (completed,) = seen.of("resource_refresh_completed")
    (of_refresh, *_) = [each for each in seen.of("snapshot_started") if each["kind"] == "refresh"]
    assert completed == {
        **told,
        "source": "x",
        "snapshot_id": of_refresh["snapshot_id"],
        "parent_snapshot_id": "parent",
    }
    (failed,) = seen.of("resource_refresh_failed")
    assert failed["error_type"] == "ResourceResolutionError"


# Sessions and policies ----------------------------------------------------------------------------


async def test_sessions_report_each_stage_and_each_revalidation() -> None:
    source = Single("x")
    building, seen = watched(source)
    async with building.session(snapshot_id="session") as session:
        await session.resolve([X])
        with pytest.raises(SnapshotBuildError):
            await session.resolve([key("unknown")])
        await session.revalidate([X], force_refresh=True)
        source.answer = down
        await session.revalidate([X], strict=False, force_refresh=True)
    for status in ("success", "error"):
        assert seen.count("snapshot_session_resolve_total", status=status) == 1
        assert seen.count("snapshot_session_revalidate_total", status=status) == 1
    resolved = seen.of("snapshot_session_resolved")
    counts = ("requested", "resolved", "failed", "total_resources")
    assert [tuple(each[name] for name in counts) for each in resolved] == [
        (1, 1, 0, 1),
        (1, 0, 1, 2),
    ]
    done, failed = seen.of("snapshot_session_revalidated")
    assert (done["committed"], done["force_refresh"]) == (True, True)
    assert (done["requested"], done["affected"], done["refreshed"], done["failed"]) == (1, 1, 1, 0)
    assert not done["retained_previous"]
    assert (failed["committed"], failed["retained_previous"], failed["failed"]) == (False, True, 1)
    assert seen.count("cache_access_total", status="revalidation_bypass") == 2
    bypassed = {each["reason"] for each in seen.of("cache_bypassed")}
    assert bypassed == {"force_refresh"}


async def test_a_revalidation_that_fails_but_not_by_its_sources_tells_of_as_many_keys() -> None:
    """One cannot be delivered, and another gets its turn too late."""
    gate, taken_in = Gate(opened=True), list[Any]()

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        await gate.pass_()
        return len(source.calls)

    def refuse_again(payload: Any) -> Any:
        if payload == 2 and payload in taken_in:
            raise TypeError("once is enough")
        taken_in.append(payload)
        return payload

    source = Single("x", fetch=fetch)
    building, seen = watched(source, payload_copier=refuse_again)
    async with building.session(deadline_seconds=5) as session:
        await session.resolve([X])
        await session.revalidate([X], strict=False, force_refresh=True)
        gate.close()
        calls = [session.revalidate([X], strict=False, force_refresh=True) for _ in range(2)]
        await asyncio.gather(*calls)
    reported = seen.of("snapshot_session_revalidated")
    assert [(each["committed"], each["failed"]) for each in reported] == [(False, 1)] * 3


async def test_policies_report_what_they_let_through_and_what_they_turn_down() -> None:
    building, seen = watched(Single("x", fetch=dated(-5)), Single("y", fetch=dated(0)))
    keys = [X, key("y", "1")]
    for limit in (10, 2):
        request = SnapshotRequest(
            required=keys,
            consistency_policy=SnapshotConsistencyPolicy(limit),
            acceptance_policy=SnapshotAcceptancePolicy(ResourceAcceptanceRule(max_age_seconds=10)),
        )
        try:
            await building.build_request(request)
        except SnapshotBuildError:
            assert limit == 2
    strict = SnapshotAcceptancePolicy(ResourceAcceptanceRule(max_age_seconds=1))
    with pytest.raises(SnapshotBuildError):
        old = [*keys, key("x", "2")]
        await building.build_request(SnapshotRequest(required=old, acceptance_policy=strict))
    for status in ("success", "error"):
        rule = {"status": status, "rule": "observation_skew"}
        assert seen.count("snapshot_consistency_total", **rule) == 1
        assert seen.count("snapshot_acceptance_total", status=status) == 1
    assert seen.count("snapshot_acceptance_violation_total", reason="too_old") == 2
    (apart,) = seen.of("snapshot_consistency_failed")
    assert (apart["oldest_resource"], apart["newest_resource"]) == (str(X), str(keys[1]))
    assert apart["observation_skew_ms"] == pytest.approx(5000)
    assert (apart["resources"], apart["max_observation_skew_ms"]) == (2, 2000)
    (refused,) = seen.of("snapshot_acceptance_failed")
    assert (refused["violations"], refused["reasons"]) == (2, ("too_old",))


def test_every_event_says_which_build_it_belongs_to_unless_it_belongs_to_none() -> None:
    of_no_build = {"cache_failed", "resource_published", "resource_publish_ignored"}
    without = {name for name, facts in EVENTS.items() if "snapshot_id" not in facts}
    assert without == of_no_build | {"resource_invalidated"}


# Nothing for nobody -------------------------------------------------------------------------------


async def test_with_null_sinks_no_label_or_text_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("nobody listens, and still something was built")

    building = builder(
        Single("s"), Batch("b"), Derived("d", needs=lambda k: [key("s"), key("b")]),
        metrics=NullMetrics(), events=NullEventSink(),
    )  # fmt: skip
    monkeypatch.setattr(ResourceKey, "__str__", refuse)
    for name in ("count", "observe", "tell", "_hand"):
        monkeypatch.setattr(f"coalestra.observability.Reporter.{name}", refuse)
    async with building.session() as session:
        await session.resolve([key("d"), key("s")])
        await session.revalidate([key("d")], force_refresh=True)
    await building.publisher.publish(X, 1, source="stream")
    await building.publisher.invalidate(X)
    await building.build([key("d"), key("s", "2")])


# Diagnostics --------------------------------------------------------------------------------------


async def test_coalesced_and_stale_values_and_refreshes_count_where_they_belong() -> None:
    gate = Gate(opened=True)
    policy = FreshnessPolicy(1, 100, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    building = builder(Single("x", fetch=held_at(gate, "")), default_policy=policy)
    one, two = await asyncio.gather(building.build([X]), building.build([X]))
    assert one.diagnostics.coalesced_requests + two.diagnostics.coalesced_requests == 1
    await asyncio.sleep(5)
    async with building.session() as session:
        stale = (await session.resolve([X])).diagnostics
        assert (stale.stale_values, stale.refresh_scheduled) == (1, 1)
        await building.wait_for_refreshes()
        assert session.snapshot().diagnostics.refresh_completed == 1


async def test_a_warm_build_with_derived_keys_counts_one_read_of_the_cache() -> None:
    building = builder(Single("x"), Derived("top", needs=lambda k: [X]))
    await building.build([key("top"), X])
    warm = (await building.build([key("top"), X])).diagnostics
    assert (warm.cache_hits, warm.cache_batch_reads) == (2, 1)
