"""Sources of every kind: order, support, answers, dependencies, declared timeouts (section 3)."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

from coalestra import (
    CallableBatchSource,
    CallableSource,
    FetchContext,
    InMemoryMetrics,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SourceFailure,
    SourcePayload,
    SourceResiliencePolicy,
    SourceUnavailableError,
)
from coalestra.core.snapshot import DiagnosticsRecorder
from coalestra.orchestration.sources import Chains
from tests.orchestration.scripted import (
    ONCE,
    Batch,
    Derived,
    Scripted,
    Single,
    builder,
    held_at,
    key,
)
from tests.orchestration.stock import BASE, shown
from tests.support import EPOCH, Gate, ThreadGate, begun, settle

K = key("x")


async def failures_of(
    building: SnapshotBuilder, wanted: ResourceKey, **more: Any
) -> tuple[SourceFailure, ...]:
    """What the sources of a key that must fail had to say."""
    snapshot = await building.build([wanted], strict=False, **more)
    error = snapshot.error_for(wanted)
    assert isinstance(error, ResourceResolutionError), repr(error)
    return error.failures


def types(failures: Iterable[SourceFailure]) -> list[tuple[str, str]]:
    """Which source failed with which type of error."""
    return [(each.source, each.error_type) for each in failures]


# Order and kind


async def test_sources_are_asked_by_priority_and_ties_in_the_order_given() -> None:
    asked: list[str] = []

    def named(name: str, priority: int) -> Single:
        async def fetch(key: ResourceKey, context: FetchContext) -> Any:
            asked.append(name)
            raise SourceUnavailableError("down")

        return Single(name, "x", fetch=fetch, priority=priority)

    building = builder(
        named("low", -1), named("tie 1", 5), named("tie 2", 5), named("high", 9), named("tie 3", 5)
    )
    failures = await failures_of(building, K)
    assert asked == ["high", "tie 1", "tie 2", "tie 3", "low"]
    assert [each.source for each in failures] == asked


class Everything(Scripted):
    """Can be asked in every way, and says which was chosen."""

    async def fetch(self, key: ResourceKey, context: FetchContext) -> str:
        return "single"

    async def fetch_many(self, keys: Any, context: FetchContext) -> dict[ResourceKey, str]:
        return dict.fromkeys(keys, "batch")


async def test_half_of_a_derived_source_is_none() -> None:
    class Half(Everything):
        def dependencies(self, key: ResourceKey) -> tuple[ResourceKey, ...]:
            return ()

    assert (await builder(Half("x")).build([K])).value(K) == "batch"


# Support


class Choosy(Single):
    """Counts what it is asked to support, and answers with `says`."""

    def __init__(self, name: str, *names: str, says: Callable[[], Any] | None = None) -> None:
        super().__init__(name, *names)
        self.says = says
        self.asked: list[ResourceKey] = []

    def supports(self, key: ResourceKey) -> Any:
        self.asked.append(key)
        return super().supports(key) if self.says is None else self.says()


async def ask_anew(building: SnapshotBuilder, *keys: ResourceKey) -> Snapshot:
    """Build with nothing cached."""
    await building.cache.clear()
    return await building.build(keys)


async def test_support_is_asked_once_for_a_key_whatever_the_answer() -> None:
    no, yes = Choosy("no", "other"), Choosy("yes", "x")
    building = builder(no, yes)
    first = await ask_anew(building, K)
    second = await ask_anew(building, K)
    assert (len(no.asked), len(yes.asked)) == (1, 1)
    assert (first.diagnostics.support_cache_misses, first.diagnostics.support_cache_hits) == (2, 0)
    assert (second.diagnostics.support_cache_misses, second.diagnostics.support_cache_hits) == (
        0,
        2,
    )


@pytest.mark.parametrize("by", ["builder", "source"])
async def test_support_is_asked_every_time_if_builder_or_source_says_so(by: str) -> None:
    class Fickle(Choosy):
        cache_supports = by != "source"

    source = Fickle("x")
    building = builder(source, cache_source_support=by != "builder")
    for _ in range(3):
        snapshot = await ask_anew(building, K)
    assert len(source.asked) == 3
    assert snapshot.diagnostics.support_cache_misses == 0


async def test_the_answers_of_all_sources_count_towards_the_bound() -> None:
    first, second = Choosy("none", "x", says=lambda: False), Choosy("x")
    building = builder(first, second, source_support_cache_max_entries=3)
    one, two = key("x", "1"), key("x", "2")
    await ask_anew(building, one)
    assert (await building.health_snapshot()).source_support_cache_entries == 2
    await ask_anew(building, two)
    assert (await building.health_snapshot()).source_support_cache_entries == 2
    await ask_anew(building, two)
    assert (first.asked, second.asked) == ([one, two], [one, two])
    building.clear_source_support_cache()
    assert (await building.health_snapshot()).source_support_cache_entries == 0
    await ask_anew(building, two)
    assert second.asked == [one, two, two]


def test_a_source_that_has_itself_asked_while_it_is_asked_is_counted_once() -> None:
    """As one may whose build in an eager task looks for the same key."""
    record, variables = DiagnosticsRecorder(), contextvars.copy_context()
    first = iter((True,))

    class Again(Single):
        def supports(self, key: ResourceKey) -> bool:
            if next(first, False):
                assert chains.supports(link, [K], record, variables) == [True]
            return True

    chains = Chains([Again("again")], max_entries=1)
    (link,) = chains.links
    asked = [K, key("x", "more"), key("x", "most")]
    for keys in (asked, asked[-1:]):
        assert all(chains.supports(link, keys, record, variables))
    assert (chains.entries, record.support_cache_hits) == (1, 1)


@pytest.mark.parametrize("answer, supported", [(1, True), ("yes", True), (0, False), (None, False)])
async def test_support_may_be_any_truth(answer: Any, supported: bool) -> None:
    building = builder(Choosy("x", says=lambda: answer))
    snapshot = await building.build([K], strict=False)
    assert (K in snapshot) is supported


async def coroutine() -> bool:
    return True


def future() -> asyncio.Future[bool]:
    return asyncio.get_running_loop().create_future()


class Untraceable(Exception):
    def with_traceback(self, tb: object) -> Any:
        raise LookupError("has a traceback of its own")


def raising(error: BaseException) -> Callable[[], Any]:
    def says() -> Any:
        raise error

    return says


@pytest.mark.parametrize("says, error_type", [
    (raising(RuntimeError("bug")), "RuntimeError"),
    (raising(asyncio.CancelledError()), "SourceUnavailableError"),
    (raising(Untraceable()), "Untraceable"), (coroutine, "SourceProtocolError"),
    (future, "SourceProtocolError"),
])  # fmt: skip
async def test_support_that_raises_or_has_to_be_awaited_fails_that_source_for_that_key(
    says: Callable[[], Any], error_type: str
) -> None:
    odd = Choosy("odd", says=says)
    failures = await failures_of(builder(odd), K)
    assert types(failures) == [("odd", error_type)]
    assert failures[0].attempts == 0
    healthy = Single("healthy", "x", priority=1)
    building = builder(Choosy("odd", says=says), healthy)
    assert (await building.build([K]))[K].source == "healthy"


async def test_support_that_raised_is_asked_again() -> None:
    source = Choosy("x", says=raising(RuntimeError("bug")))
    building = builder(source)
    assert types(await failures_of(building, K)) == [("x", "RuntimeError")]
    source.says = None
    assert K in await building.build([K])


# Batches


class Answering(Batch):
    """A batch source that answers with what `reply` makes of the keys."""

    def __init__(self, name: str, *names: str, reply: Callable[[Any], Any], **more: Any) -> None:
        super().__init__(name, *names, **more)
        self.reply = reply

    async def fetch_many(self, keys: Any, context: FetchContext) -> Any:
        self.calls.append(tuple(keys))
        return self.reply(keys)


class Endless(Mapping[ResourceKey, Any]):
    """An answer without end, as a lazy one may be by mistake."""

    def __getitem__(self, key: ResourceKey) -> Any:
        return 1

    def __len__(self) -> int:
        return sys.maxsize

    def __iter__(self) -> Iterator[ResourceKey]:
        return (key("x", str(number)) for number in itertools.count())


async def test_keys_left_out_of_a_batch_go_on_to_the_next_source() -> None:
    partly = Answering(
        "partly", "x", priority=2, reply=lambda keys: {k: 1 for k in keys if k.subject == "a"}
    )
    rest = Batch("rest", "x", priority=1, answer=lambda k: 2)
    a, b, c = (key("x", each) for each in "abc")
    snapshot = await builder(partly, rest).build([a, b, c])
    assert shown(snapshot) == {a: 1, b: 2, c: 2}
    assert rest.calls == [(b, c)]


@pytest.mark.parametrize("reply", [
    lambda keys: {**dict.fromkeys(keys, 1), key("x", "unasked"): 1},
    lambda keys: {**dict.fromkeys(keys, 1), "x": 1}, lambda keys: [1 for _ in keys],
    lambda keys: None, lambda keys: Endless(),
], ids=["unrequested key", "no key", "list", "None", "endless"])  # fmt: skip
async def test_a_malformed_batch_answer_fails_the_whole_call(reply: Callable[[Any], Any]) -> None:
    odd = Answering("odd", "x", reply=reply)
    keys = [key("x", "a"), key("x", "b")]
    snapshot = await builder(odd).build(keys, strict=False)
    for each in keys:
        error = snapshot.error_for(each)
        assert isinstance(error, ResourceResolutionError)
        assert types(error.failures) == [("odd", "SourceProtocolError")]
        assert "odd" in error.failures[0].message
    assert len(odd.calls) == 1


async def test_an_answer_without_end_is_refused_through_an_adapter_too() -> None:
    source = CallableBatchSource(
        name="odd", priority=1, supports=lambda k: True, fetcher=lambda keys, context: Endless(),
        run_sync_in_thread=False,
    )  # fmt: skip
    assert types(await failures_of(builder(source), K)) == [("odd", "SourceProtocolError")]


async def test_chunks_hold_no_more_than_the_batch_size_and_run_within_capacity() -> None:
    gate = Gate()
    source = Batch("x", before=gate.pass_)
    source.max_batch_size = 3
    building = builder(source, source_concurrency={"x": 2})
    keys = [key("x", str(i)) for i in range(8)]
    reader = await begun(building.build(keys), gate, 2)
    await settle()
    assert gate.arrived == 2
    gate.open()
    snapshot = await reader
    assert len(snapshot) == 8
    assert (snapshot.diagnostics.batch_chunks, snapshot.diagnostics.batch_calls) == (3, 3)
    whole = await building.build([key("x", "whole")])
    assert (whole.diagnostics.batch_chunks, whole.diagnostics.batch_calls) == (0, 1)
    assert [len(call) for call in source.calls] == [3, 3, 2, 1]
    assert [each for call in source.calls[:3] for each in call] == keys


# Derived


async def test_dependencies_may_be_cached_fetched_batched_or_derived() -> None:
    needs = [key("cached"), key("fetched"), key("batched"), key("derived")]
    cached = Single("cached")
    building = builder(
        cached, Single("fetched"), Batch("batched"),
        Derived("derived", needs=lambda k: [key("fetched")]), Derived("x", needs=lambda k: needs),
    )  # fmt: skip
    await building.build([key("cached")])
    snapshot = await building.build([K])
    assert snapshot.value(K) == ("", "", "", ("",))
    assert list(snapshot) == [K]
    assert set(snapshot[K].dependency_versions) == set(needs)
    assert len(cached.calls) == 1


@pytest.mark.parametrize("declared", [BASE, [BASE, BASE]], ids=["bare", "twice"])
async def test_one_key_named_alone_or_twice_is_one_dependency(declared: Any) -> None:
    source: Any = Derived("x", needs=lambda k: [])
    source.dependencies = lambda k: declared
    assert (await builder(source, Single("base")).build([K])).value(K) == ("",)


@pytest.mark.parametrize(
    "declared",
    [lambda: ("base",), lambda: [BASE, None], lambda: 5, lambda: [[]], lambda: "base", coroutine,
        itertools.count],
    ids=["text", "None among keys", "number", "unhashable", "bare text", "coroutine", "endless"],
)  # fmt: skip
async def test_a_dependency_that_is_no_key_is_a_protocol_error(declared: Any) -> None:
    source: Any = Derived("x", needs=lambda k: [])
    source.dependencies = lambda k: declared()
    failures = await failures_of(builder(source, Single("base")), K)
    assert types(failures) == [("x", "SourceProtocolError")]
    assert "ResourceKey" in failures[0].message


def broken_by(error: BaseException) -> Callable[[], Iterator[ResourceKey]]:
    def declare() -> Iterator[ResourceKey]:
        yield BASE
        raise error

    return declare


@pytest.mark.parametrize("declare, error_type", [
    (raising(RuntimeError("bug")), "RuntimeError"), (raising(TypeError("bug")), "TypeError"),
    (raising(asyncio.CancelledError()), "SourceUnavailableError"),
    (broken_by(RuntimeError("bug")), "RuntimeError"), (broken_by(TypeError("bug")), "TypeError"),
    (broken_by(asyncio.CancelledError()), "SourceUnavailableError"),
])  # fmt: skip
async def test_dependencies_that_raise_fail_the_source_and_the_next_is_tried(
    declare: Callable[[], Any], error_type: str
) -> None:
    source: Any = Derived("d", "x", needs=lambda k: [])
    source.dependencies = lambda k: declare()
    assert types(await failures_of(builder(source, Single("base")), K)) == [("d", error_type)]
    second = Single("second", "x", priority=1)
    assert (await builder(source, second).build([K]))[K].source == "second"


async def test_dependencies_that_are_thought_of_meanwhile_see_the_variables_of_the_build() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen = []

    def declare(key: ResourceKey) -> Iterator[ResourceKey]:
        seen.append(variable.get())
        variable.set(f"set for {key.subject}")
        yield BASE

    source: Any = Derived("x", needs=lambda k: [])
    source.dependencies = declare
    variable.set("of the build")
    await builder(source, Single("base")).build([key("x", "1"), key("x", "2")])
    assert (seen, variable.get()) == (["of the build"] * 2, "of the build")


async def test_a_key_of_a_cycle_may_come_from_another_source() -> None:
    loop = Derived("loop", "x", needs=lambda k: [K], priority=2)
    building = builder(loop, Single("way out", "x", priority=1))
    assert (await building.build([K]))[K].source == "way out"


# Observations from the future


def dated(ahead: float) -> Callable[[ResourceKey, FetchContext], Any]:
    async def fetch(key: ResourceKey, context: FetchContext) -> SourcePayload[str]:
        return SourcePayload("v", observed_at=EPOCH + ahead, metadata={"own": 1})

    return fetch


@pytest.mark.parametrize("kind", ["single", "batch"])
async def test_an_observation_too_far_ahead_is_rejected_for_the_next_source(kind: str) -> None:
    early: Scripted = Single("early", "x", fetch=dated(1.5))
    if kind == "batch":
        payload = SourcePayload("v", observed_at=EPOCH + 1.5)
        early = Batch("early", "x", answer=lambda k: payload)
    failures = await failures_of(builder(early), K)
    assert types(failures) == [("early", "SourceProtocolError")]
    second = Single("second", "x", priority=1)
    metrics = InMemoryMetrics()
    building = builder(early, second, metrics=metrics)
    snapshot = await building.build([K])
    assert snapshot[K].source == "second"
    assert snapshot.diagnostics.future_timestamp_rejections == 1
    assert metrics.counter("source_fetch_total", source="early", status="invalid_timestamp") == 1


@pytest.mark.parametrize("ahead", [0.5, 1.0])
async def test_an_observation_within_tolerance_is_accepted_with_its_skew(ahead: float) -> None:
    value = (await builder(Single("x", fetch=dated(ahead))).build([K]))[K]
    assert (value.age_seconds, value.stale, value.observed_at) == (0, False, EPOCH + ahead)
    assert value.metadata == {"own": 1, "clock_skew_seconds": pytest.approx(ahead)}


async def test_no_observation_is_dated_as_of_its_fetch_and_leaves_no_skew() -> None:
    async def fetch(key: ResourceKey, context: FetchContext) -> SourcePayload[str]:
        await asyncio.sleep(2)
        return SourcePayload("v", metadata={"own": 1})

    value = (await builder(Single("x", fetch=fetch)).build([K]))[K]
    assert value.observed_at == value.fetched_at == EPOCH + 2
    assert dict(value.metadata) == {"own": 1}


# Custom sources and adapters


class Plain:
    """No more than what every source must have."""

    name = "plain"
    priority = 1
    timeout_seconds = None
    blocking_io = False

    def supports(self, key: ResourceKey) -> bool:
        return key == K

    async def fetch(self, key: ResourceKey, context: FetchContext) -> str:
        await asyncio.sleep(3_600)
        return "patience"


async def test_a_method_that_does_not_return_an_awaitable_is_a_protocol_error() -> None:
    class Hasty(Plain):
        def fetch(self, key: ResourceKey, context: FetchContext) -> Any:
            return "now"

    failures = await failures_of(builder(Hasty()), K)
    assert types(failures) == [("plain", "SourceProtocolError")]


# Timeout declarations


def blocking(fetcher: Callable[..., Any] = lambda k, context: 1, **more: Any) -> CallableSource:
    """A blocking source whose transport gives up after a second, and the library after three."""
    settings: dict[str, Any] = {
        "blocking_io": True, "transport_timeout_seconds": 1.0, "timeout_seconds": 3.0,
        "resilience_policy": ONCE, **more,
    }  # fmt: skip
    return CallableSource(
        name="blocking", priority=1, supports=lambda k: k.name == "x", fetcher=fetcher, **settings
    )


def test_a_transport_timeout_of_a_source_that_does_not_block_is_an_error() -> None:
    source: Any = Single("x")
    source.transport_timeout_seconds = 1.0
    with pytest.raises(ValueError, match="transport_timeout_seconds"):
        SnapshotBuilder([source])


# Transport budgets


def labels_of(metrics: InMemoryMetrics, name: str, label: str, *values: str) -> list[int]:
    """The counts of source `blocking` by the values of one label."""
    return [metrics.counter(name, source="blocking", **{label: each}) for each in values]


@pytest.mark.parametrize("metrics", [InMemoryMetrics, None])
@pytest.mark.parametrize("deadline", [None, 2.0])
async def test_a_call_that_could_outlive_a_source_timeout_lowered_since_is_refused(
    metrics: Any, deadline: float | None
) -> None:
    called: list[ResourceKey] = []
    source = blocking(lambda k, context: called.append(k))
    sink = metrics and metrics()
    building = builder(source, metrics=sink)
    source.timeout_seconds = 0.5
    failures = await failures_of(building, K, deadline_seconds=deadline)
    assert types(failures) == [("blocking", "SourceTimeoutError")]
    assert failures[0].message.endswith("the 0.5 s left; lower it, or raise timeout_seconds")
    assert called == []
    if sink is not None:
        name = "source_transport_budget_rejection_total"
        assert labels_of(sink, name, "reason", "snapshot_deadline", "source_timeout") == [0, 1]


@pytest.mark.parametrize("late", [False, True])
async def test_a_blocking_call_that_would_find_too_little_time_is_not_tried_again(
    late: bool,
) -> None:
    """What it has failed with stands, unless it may outlive the deadline."""
    called: list[ResourceKey] = []

    def fail(k: ResourceKey, context: FetchContext) -> None:
        called.append(k)
        raise ConnectionError("down")

    retry = RetryPolicy(2, 1.5, max_delay_seconds=1.5, jitter_ratio=0)
    policy = SourceResiliencePolicy(retry, finish_late=late)
    building = builder(blocking(fail, resilience_policy=policy))
    failures = await failures_of(building, K, deadline_seconds=2.0)
    assert types(failures) == [("blocking", "ConnectionError")]
    assert len(called) == 1 + late


async def test_a_call_is_made_as_long_as_one_who_joined_has_time_for_it() -> None:
    gate = Gate()
    busy = Single("busy", fetch=lambda k, context: gate.pass_(), priority=2)
    building = builder(blocking(timeout_seconds=20.0), busy, max_concurrency=1)
    holder = await begun(building.build([key("busy")]), gate)
    short = await begun(building.build([K], deadline_seconds=1.5, strict=False))
    long = await begun(building.build([K], deadline_seconds=10))
    await asyncio.sleep(1)
    gate.open()
    assert (await long).value(K) == 1
    await asyncio.gather(holder, short)


# Transport violations


async def violated(
    source: CallableSource, gate: ThreadGate, seconds: float, **more: Any
) -> tuple[SnapshotBuilder, InMemoryMetrics, Snapshot]:
    """Build with a call that takes `seconds`."""
    metrics = InMemoryMetrics()
    building = builder(source, metrics=metrics, **more)
    reader = asyncio.ensure_future(building.build([K], strict=False))
    while not gate.arrived:
        await settle()
    await asyncio.sleep(seconds)
    gate.open()
    return building, metrics, await reader


OUTCOMES = ("completed_late", "failed_late", "coalestra_timeout")
VIOLATIONS = "source_transport_timeout_violation_total"


@pytest.mark.parametrize("fails, seconds, grace, outcome", [
    (False, 0.9, None, None), (False, 1.04, None, None), (False, 1.1, None, "completed_late"),
    (False, 1.1, 0.5, None), (False, 1.6, 0.5, "completed_late"), (True, 0.9, None, None),
    (True, 1.5, None, "failed_late"), (False, 4, None, "coalestra_timeout"),
    (False, 4, 60.0, "coalestra_timeout"),
])  # fmt: skip
async def test_a_call_that_ends_beyond_the_grace_is_a_violation_and_one_cut_off_is_always(
    fails: bool, seconds: float, grace: float | None, outcome: str | None
) -> None:
    gate = ThreadGate()

    def fetcher(k: ResourceKey, context: FetchContext) -> Any:
        gate.pass_()
        if fails:
            raise OSError("reset")

    more = {} if grace is None else {"source_transport_timeout_grace_seconds": grace}
    building, metrics, snapshot = await violated(blocking(fetcher), gate, seconds, **more)
    cut_off = outcome == "coalestra_timeout"
    error = snapshot.error_for(K)
    if isinstance(error, ResourceResolutionError):
        kind = "SourceTimeoutError" if cut_off else "OSError"
        assert types(error.failures) == [("blocking", kind)]
    assert (K in snapshot) is not (fails or cut_off), "late, but in time for its readers"
    counts = [int(each == outcome) for each in OUTCOMES]
    assert labels_of(metrics, VIOLATIONS, "outcome", *OUTCOMES) == counts
    health = await building.health_snapshot()
    assert health.source_transport_timeout_violation_count == sum(counts)
    assert health.source_transport_timeout_violations == ({"blocking": 1} if outcome else {})
    assert health.source_timeout_count == cut_off
    assert health.protected_blocking_source_count == health.blocking_source_count == 1
    await settle()


# What a source declares is asked for anew --------------------------------------------------------


@pytest.mark.parametrize("kind", [Single, Batch])
@pytest.mark.parametrize("setting, value", [
    ("timeout_seconds", math.nan), ("queue_timeout_seconds", math.nan),
    ("queue_timeout_seconds", "5"), ("max_batch_size", -1),
])  # fmt: skip
async def test_what_a_source_declares_later_and_cannot_be_meant_fails_its_keys_by_name(
    kind: Any, setting: str, value: Any
) -> None:
    """A timer that is set for NaN stops the others of the event loop as well."""
    gate = Gate()
    source = kind("x")
    building = builder(source, Single("held", fetch=held_at(gate)), max_concurrency=1)
    holding = await begun(building.build([key("held")]), gate)
    setattr(source, setting, value)
    waiting = await begun(building.build([K], strict=False))
    gate.open()
    error = (await waiting).error_for(K)
    if setting == "max_batch_size" and kind is Single:
        assert error is None
    else:
        assert f"{setting} of source 'x' must be " in str(error)
    await holding
