"""A request raises or says the same in a result; many of them are each on their own."""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coalestra import (
    BuilderClosedError,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    PolicyResolver,
    RefreshMode,
    RequestOutcome,
    RequestResult,
    ResourceAbsent,
    ResourceAbsentError,
    ResourceAcceptanceRule,
    ResourceKey,
    SessionClosedError,
    Snapshot,
    SnapshotAcceptanceError,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
    SnapshotRequirement,
    SourcePayload,
    SourceUnavailableError,
)
from tests.orchestration.scripted import Derived, Single, builder, echo, key, latency
from tests.orchestration.stock import Stock, shown
from tests.support import EPOCH, Gate, LoopClock, Panic, begun, settle

A, B, C = key("a"), key("b"), key("c")
DOWN = SourceUnavailableError("down")
ACCEPTED, DEGRADED, REJECTED = RequestOutcome

Ask = Callable[..., Awaitable[Any]]


async def in_a_build(building: SnapshotBuilder, request: Any, **more: Any) -> Any:
    return await building.try_request(request, **more)


async def in_a_session(building: SnapshotBuilder, request: Any, **more: Any) -> Any:
    async with building.session(**more) as session:
        return await session.try_request(request)


async def raising_build(building: SnapshotBuilder, request: Any) -> Snapshot:
    return await building.build_request(request)


async def raising_session(building: SnapshotBuilder, request: Any) -> Snapshot:
    async with building.session() as session:
        return await session.resolve_request(request)


both = pytest.mark.parametrize("ask", [in_a_build, in_a_session])
raising = pytest.mark.parametrize("ask", [raising_build, raising_session])


def at(seconds: float) -> SourcePayload[str]:
    """A payload observed so many seconds after the epoch of the tests."""
    return SourcePayload("v", observed_at=EPOCH + seconds)


def aged(maximum: float) -> SnapshotAcceptancePolicy:
    return SnapshotAcceptancePolicy(ResourceAcceptanceRule(max_age_seconds=maximum))


class Faulty(SnapshotAcceptancePolicy):
    """A policy that cannot say what its rule is."""

    error: BaseException = ZeroDivisionError("division by zero")

    def rule_for(self, key: ResourceKey) -> ResourceAcceptanceRule:
        raise self.error


def faulty(error: BaseException, *keys: ResourceKey) -> SnapshotRequest:
    """A request whose policy raises."""

    class Raising(Faulty):
        pass

    Raising.error = error
    policy = Raising(ResourceAcceptanceRule(max_age_seconds=1))
    return SnapshotRequest(required=keys or [A], acceptance_policy=policy)


NEAR = SnapshotConsistencyPolicy(5.0)
SCENES: dict[str, tuple[RequestOutcome, SnapshotRequest]] = {
    "all is there": (ACCEPTED, SnapshotRequest(required=[A], optional=[B])),
    "an optional key fails": (DEGRADED, SnapshotRequest(required=[A], optional=[B, C])),
    "all optional keys fail": (DEGRADED, SnapshotRequest(optional=[C])),
    "a required key fails": (REJECTED, SnapshotRequest(required=[A, C], optional=[B])),
    "too far apart": (REJECTED, SnapshotRequest(required=[A, B], consistency_policy=NEAR)),
    "too old": (REJECTED, SnapshotRequest(required=[A, B], acceptance_policy=aged(5))),
    "a requirement fails": (
        REJECTED,
        SnapshotRequest(
            optional=[A, C],
            acceptance_policy=SnapshotAcceptancePolicy(
                requirements=(SnapshotRequirement.all_of([A, C], name="both"),)
            ),
        ),
    ),
    "a policy raises": (REJECTED, faulty(ZeroDivisionError("division by zero"))),
}


def serving(**values: Any) -> SnapshotBuilder:
    """A builder that serves what is given by name."""
    return builder(Stock("stock", values))


def place(metrics: InMemoryMetrics | None = None) -> SnapshotBuilder:
    """Serves `a`, ten seconds old, and `b`, one second old; `c` is down."""
    values = {"a": at(0), "b": at(9), "c": DOWN}
    return builder(Stock("stock", values), metrics=metrics)


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize(
    "ask, raising", [(in_a_build, raising_build), (in_a_session, raising_session)]
)
async def test_a_result_says_what_the_raising_form_says(scene: str, ask: Ask, raising: Ask) -> None:
    outcome, request = SCENES[scene]
    metrics = InMemoryMetrics(), InMemoryMetrics()
    places = [place(each) for each in metrics]
    await asyncio.sleep(10)
    result = await ask(places[0], request)
    other: Any
    (other,) = await asyncio.gather(raising(places[1], request), return_exceptions=True)
    assert result.outcome is outcome
    json.dumps(result.to_dict(), allow_nan=False)
    for counter in ("snapshot_build_total", "snapshot_session_resolve_total"):
        for status in ("success", "error"):
            count, same = (each.counter(counter, status=status) for each in metrics)
            assert count == same
    if outcome is not REJECTED:
        assert result.require_accepted() is result.snapshot
        assert shown(result.snapshot) == shown(other)
        return
    with pytest.raises(type(other)) as caught:
        result.require_accepted()
    assert caught.value is result.error
    assert (type(caught.value), str(caught.value)) == (type(other), str(other))
    if isinstance(other, SnapshotBuildError):
        assert list(result.error.errors) == list(other.errors)
        assert result.error.snapshot is result.snapshot
        assert other.snapshot is not None
        assert shown(result.snapshot) == shown(other.snapshot)
    if isinstance(other, SnapshotAcceptanceError):
        assert result.violations == other.violations


# In the form that raises


async def test_what_a_refused_request_has_read_stays_pinned() -> None:
    stock = Stock("stock", {"a": at(0), "b": at(9)})
    building = builder(stock)
    await asyncio.sleep(10)
    session = building.session()
    request = SnapshotRequest(required=[A, B], consistency_policy=NEAR)
    with pytest.raises(SnapshotConsistencyError):
        await session.resolve_request(request)
    assert list(session.snapshot()) == [A, B]
    await session.resolve([A, B])
    assert len(stock.calls) == 2


@raising
async def test_failed_required_keys_come_first_then_consistency_then_acceptance(ask: Ask) -> None:
    policies: dict[str, Any] = {
        "consistency_policy": SnapshotConsistencyPolicy(1.0),
        "acceptance_policy": aged(2),
    }
    building = serving(a=at(0), b=at(9), c=DOWN)
    await asyncio.sleep(10)
    with pytest.raises(SnapshotBuildError) as first:
        await ask(building, SnapshotRequest(required=[A, B, C], **policies))
    assert type(first.value) is SnapshotBuildError
    assert list(first.value.errors) == [C]
    assert first.value.snapshot is not None
    assert shown(first.value.snapshot) == {A: "v", B: "v"}
    with pytest.raises(SnapshotConsistencyError):
        await ask(building, SnapshotRequest(required=[A, B], optional=[C], **policies))
    with pytest.raises(SnapshotAcceptanceError):
        await ask(building, SnapshotRequest(required=[A], optional=[B, C], **policies))
    assert shown(await ask(building, SnapshotRequest(required=[B], **policies))) == {B: "v"}


# What came of it


@both
async def test_what_does_not_exist_rejects_a_request_only_if_it_is_required(ask: Ask) -> None:
    building = builder(Stock("stock", {"a": 1, "b": ResourceAbsent("no such row")}))
    result = await ask(building, SnapshotRequest(required=[A], optional=[B]))
    assert result.outcome is ACCEPTED
    assert isinstance(result.errors[B], ResourceAbsentError)
    assert result.to_dict()["errors"][B.canonical]["reason"] == "absent"
    result = await ask(building, SnapshotRequest(required=[A, B]))
    assert result.outcome is REJECTED
    assert isinstance(result.errors[B], ResourceAbsentError)


@both
@pytest.mark.parametrize("inherits", [False, True])
async def test_a_derived_value_degrades_a_request_by_stale_inputs(ask: Ask, inherits: bool) -> None:
    stale = FreshnessPolicy(5.0, 100.0, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE)
    lasting = FreshnessPolicy(100.0, 100.0)
    derived = Derived("b", needs=lambda _: [A])
    derived.inherit_freshness = inherits  # type: ignore[attr-defined]  # an ability of its own
    building = builder(
        Stock("stock", {"a": 1}),
        derived,
        default_policy=None,
        policy_resolver=PolicyResolver(lasting, overrides={A: stale}),
    )
    await building.build([A])
    await asyncio.sleep(6)
    result = await ask(building, SnapshotRequest(required=[B]))
    assert result.outcome is (DEGRADED if inherits else ACCEPTED)
    await building.wait_for_refreshes()


async def test_a_result_has_the_id_and_the_metadata_of_its_build() -> None:
    told: list[Any] = []

    async def fetch(_: ResourceKey, context: Any) -> str:
        told.append(context.metadata)
        return ""

    result = await builder(Single("a", fetch=fetch)).try_request(
        SnapshotRequest(required=[A]), snapshot_id="mine", metadata={"user": "ann"}
    )
    assert result.require_accepted().snapshot_id == "mine"
    assert told == [{"user": "ann"}]


# What a policy or a clock raises


async def test_an_error_before_there_is_a_snapshot_is_a_result_without_one() -> None:
    class Broken(LoopClock):
        broken = False

        def now(self) -> float:
            if self.broken:
                raise OSError("no time")
            return super().now()

    clock = Broken()
    session = builder(Stock("stock", {"a": 1}), clock=clock).session()
    await session.resolve([A])
    clock.broken = True
    result = await session.try_request(SnapshotRequest(required=[A]))
    assert (result.outcome, result.snapshot) == (REJECTED, None)
    assert "OSError(no time), raised in now (" in result.reason
    assert not result.errors
    assert result.to_dict()["snapshot"] is None
    with pytest.raises(OSError, match="no time"):
        result.require_accepted()


@both
async def test_a_result_keeps_no_frames_of_an_error_alive(ask: Ask) -> None:
    class Payload:
        pass

    payload = Payload()
    alive = weakref.ref(payload)

    class Holding(SnapshotAcceptancePolicy):
        def rule_for(self, key: ResourceKey) -> ResourceAcceptanceRule:
            held = holder.pop()
            raise ValueError(type(held).__name__)

    holder = [payload]
    del payload
    policy = Holding(ResourceAcceptanceRule(max_age_seconds=1))
    request = SnapshotRequest(required=[A], acceptance_policy=policy)
    result = await ask(serving(a=1), request)
    assert result.error.__traceback__ is None
    assert alive() is None


@both
async def test_the_error_that_a_caller_is_handling_keeps_its_traceback(ask: Ask) -> None:
    try:
        raise KeyError("the caller's own")
    except KeyError as own:
        result = await ask(serving(a=1), faulty(ZeroDivisionError()))
        traces = result.error.__traceback__, own.__traceback__
    assert (traces[0], traces[1] is None) == (None, False)


@both
@pytest.mark.parametrize("error", [Panic, asyncio.CancelledError, GeneratorExit])
async def test_what_is_no_ordinary_exception_goes_on(ask: Ask, error: Any) -> None:
    metrics = InMemoryMetrics()
    building = builder(Stock("stock", {"a": 1}), metrics=metrics)
    with pytest.raises(error):
        await ask(building, faulty(error()))
    total = "snapshot_build_total" if ask is in_a_build else "snapshot_session_resolve_total"
    assert metrics.counter(total, status="error") == 1
    with pytest.raises(error):
        await building.try_requests([faulty(error()), SnapshotRequest(required=[A])])


# Misuse is no result


@both
async def test_a_wrong_argument_raises(ask: Ask) -> None:
    building = serving(a=1)
    request = SnapshotRequest(required=[A])
    for each in (ask, raising_build, raising_session):
        with pytest.raises(TypeError, match="request must be a SnapshotRequest"):
            await each(building, [A])
    with pytest.raises(ValueError, match="deadline_seconds"):
        await ask(building, request, deadline_seconds=0)
    with pytest.raises(TypeError, match="metadata"):
        await ask(building, request, metadata=1)


async def test_a_closed_builder_or_session_raises() -> None:
    building = serving(a=1)
    request = SnapshotRequest(required=[A])
    session, closed = building.session(), building.session()
    await closed.close()
    with pytest.raises(SessionClosedError):
        await closed.try_request(request)
    with pytest.raises(SessionClosedError):
        await closed.try_requests([request])
    await building.aclose()
    for asking in (
        building.try_request(request),
        building.try_requests([request]),
        building.try_requests([]),
        session.try_request(request),
        session.try_requests([request]),
    ):
        with pytest.raises(BuilderClosedError):
            await asking


async def test_a_builder_that_is_busy_on_another_loop_raises() -> None:
    gate = Gate()
    building = builder(Stock("stock", {"a": 1}, before=gate.pass_))
    request = SnapshotRequest(required=[A])
    pending = await begun(building.try_request(request), gate)
    errors: list[BaseException] = []

    def elsewhere() -> None:
        for start in (building.try_request, lambda each: building.try_requests([each])):
            try:
                asyncio.run(start(request))
            except RuntimeError as error:
                errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    await asyncio.to_thread(thread.join)
    assert ["another event loop" in str(error) for error in errors] == [True, True]
    gate.open()
    assert (await pending).outcome is ACCEPTED


# In a session


async def test_a_failed_key_is_tried_again_only_if_told_to() -> None:
    stock = Stock("stock", {"a": DOWN})
    session = builder(stock).session()
    request = SnapshotRequest(required=[A])
    assert (await session.try_request(request)).outcome is REJECTED
    stock.change(a=5)
    assert (await session.try_request(request)).outcome is REJECTED
    with pytest.raises(SnapshotBuildError):
        await session.resolve_request(request)
    (again,) = await session.try_requests([request], retry_errors=True)
    assert shown(again.require_accepted()) == {A: 5}
    assert shown(await session.resolve_request(request, retry_errors=True)) == {A: 5}


async def test_requests_of_a_session_rest_on_one_set_of_values() -> None:
    stock = Stock("stock", {"a": 1, "b": 2})
    building = builder(stock)
    session = building.session()
    first = await session.try_requests({"a": SnapshotRequest(required=[A])})
    stock.change(a=10)
    await building.publisher.invalidate(A)
    results = await session.try_requests(
        {"both": SnapshotRequest(required=[A, B]), "a": SnapshotRequest(required=[A])}
    )
    assert list(results) == ["both", "a"]
    for result in (*first.values(), *results.values()):
        snapshot = result.require_accepted()
        assert snapshot.value(A) == 1
        assert snapshot.snapshot_id == session.snapshot_id


# Many at once


def asking(*subjects: Any, name: str = "x") -> list[SnapshotRequest]:
    """A request for each of the subjects."""
    return [SnapshotRequest(required=[key(name, str(subject))]) for subject in subjects]


def values_of(results: tuple[RequestResult, ...]) -> list[Any]:
    return [next(iter(each.snapshot.values())).value if each.snapshot else None for each in results]


async def test_results_come_in_the_order_of_the_requests_however_they_end() -> None:
    gates = {str(number): Gate() for number in range(4)}

    async def fetch(asked: ResourceKey, context: Any) -> str:
        await gates[asked.subject].pass_()
        return asked.subject

    building = builder(Single("x", fetch=fetch))
    pending = asyncio.ensure_future(building.try_requests(asking(0, 1, 2, 3)))
    for number in "3120":
        await gates[number].wait_arrived()
        gates[number].open()
        await settle()
        assert pending.done() == (number == "0")
    results = await pending
    assert values_of(results) == ["0", "1", "2", "3"]
    assert len({each.snapshot.snapshot_id for each in results if each.snapshot}) == 4


@pytest.mark.parametrize(
    "given, tasks, most", [(2, 8, 2), (1, 8, 1), (100, 8, 10), (None, 8, 8), (None, 3, 3)]
)
@pytest.mark.parametrize("in_session", [False, True])
async def test_no_more_requests_are_under_way_than_may_be(
    given: int | None, tasks: int, most: int, in_session: bool
) -> None:
    gate = Gate()

    async def fetch(asked: ResourceKey, context: Any) -> str:
        await gate.pass_()
        return asked.subject

    building = builder(
        *(Single(f"x{number}", fetch=fetch) for number in range(10)),
        max_concurrency=50,
        max_pending_tasks=tasks,
    )
    requests = [SnapshotRequest(required=[key(f"x{number}")]) for number in range(10)]
    place = building.session() if in_session else building
    pending = await begun(place.try_requests(requests, max_concurrency=given))
    for ended in range(10):
        assert gate.arrived == min(10, most + ended)
        gate.let_through(1)
        await settle()
    assert [each.outcome for each in await pending] == [ACCEPTED] * 10


async def test_each_request_is_on_its_own() -> None:
    """What rejects one, or is wrong with it, does not touch the others."""
    building = builder(Stock("stock", {"a": 1, "b": DOWN, "c": 3}))
    requests = {
        "fine": SnapshotRequest(required=[A]),
        "down": SnapshotRequest(required=[B]),
        "wrong": faulty(LookupError("a mistake"), A),
        "partial": SnapshotRequest(required=[C], optional=[B]),
        "again": SnapshotRequest(required=[A, C]),
    }
    for limit in (1, 2, 5):
        results = await building.try_requests(requests, max_concurrency=limit)
        assert {name: each.outcome.value for name, each in results.items()} == {
            "fine": "accepted",
            "down": "rejected",
            "wrong": "rejected",
            "partial": "degraded",
            "again": "accepted",
        }
        assert isinstance(results["wrong"].error, LookupError)
        assert all(each.snapshot is not None for each in results.values())


async def test_one_deadline_is_for_all_of_them_also_for_those_that_wait_for_room() -> None:
    building = builder(Single("x", fetch=latency(4)))
    began = asyncio.get_running_loop().time()
    results = await building.try_requests(
        asking(1, 2, 3, 4), deadline_seconds=10, max_concurrency=1
    )
    assert asyncio.get_running_loop().time() == began + 10
    assert [each.outcome for each in results] == [ACCEPTED, ACCEPTED, REJECTED, REJECTED]
    for late in results[2:]:
        assert "SnapshotDeadlineExceededError" in late.reason
        assert late.snapshot is not None


async def test_a_request_that_waits_for_room_has_not_begun_though_its_time_runs() -> None:
    told: list[Any] = []

    async def fetch(_: ResourceKey, context: FetchContext) -> str:
        told.append((context.deadline_at, context.metadata["seen"].copy()))
        context.metadata["seen"].append("by me")
        await asyncio.sleep(4)
        return ""

    building = builder(Single("x", fetch=fetch))
    first, second = await building.try_requests(
        asking(1, 2), deadline_seconds=10, metadata={"seen": []}, max_concurrency=1
    )
    assert second.require_accepted().created_at - first.require_accepted().created_at == 4
    assert second.require_accepted().diagnostics.duration_ms == 4_000
    assert told == [(first.require_accepted().created_at + 10, [])] * 2


@pytest.mark.parametrize("requests, message", [
    (asking(1)[0], "requests must be an iterable of SnapshotRequests.*put a single one"),
    (None, "requests must be"), ([*asking(1), A], r"requests\[1\] must be a SnapshotRequest"),
    ({"one": None}, r"requests\['one'\] must be a SnapshotRequest"), ([key("x")], r"requests\[0\]"),
])  # fmt: skip
async def test_anything_but_requests_is_refused_at_once(requests: Any, message: str) -> None:
    source = Single("x", fetch=echo)
    building = builder(source)
    for place in (building, building.session()):
        with pytest.raises(TypeError, match=message):
            await place.try_requests(requests)
    assert not source.calls


@pytest.mark.parametrize("limit, error", [(0, ValueError), (-1, ValueError), (1.0, TypeError),
                                          (True, TypeError)])  # fmt: skip
async def test_a_wrong_limit_is_refused_at_once(limit: Any, error: type[Exception]) -> None:
    source = Single("x", fetch=echo)
    building = builder(source)
    for place in (building, building.session()):
        with pytest.raises(error, match="max_concurrency"):
            await place.try_requests(asking(1), max_concurrency=limit)
    for requests in (asking(1), []):  # whatever there is to ask
        for wrong in ({"deadline_seconds": -1}, {"metadata": "ann"}, {"trace": 1}):
            with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
                await building.try_requests(requests, **wrong)
    assert not source.calls
