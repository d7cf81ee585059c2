"""The builder without a loop: every call waits for what the async one would return."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import math
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest.mock import patch

import pytest

from coalestra.core.errors import BuilderClosedError, SnapshotBuildError, SourceProtocolError
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.request import RequestOutcome, SnapshotRequest
from coalestra.core.snapshot import FetchContext
from coalestra.observability import InMemoryMetrics, LoggingEventSink
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.session import SnapshotSession
from coalestra.sync import (
    THREAD_NAME,
    SyncResourcePublisher,
    SyncSnapshotBuilder,
    SyncSnapshotSession,
)
from tests.support.elsewhere import PATIENCE, in_a_child, in_thread, outcome, wait_until
from tests.support.running import without_collector
from tests.sync.sources import Prices, builder, source
from tests.sync.steps import PRICE, VOLUME, Door

pytestmark = pytest.mark.concurrency


@pytest.fixture
def prices() -> Prices:
    return Prices()


@pytest.fixture
def sync(prices: Prices) -> Iterator[SyncSnapshotBuilder]:
    with SyncSnapshotBuilder(builder(prices)) as facade:
        yield facade


def test_what_it_is_made_of_can_be_read_back(prices: Prices) -> None:
    made = builder(prices)
    with SyncSnapshotBuilder(
        made, close_builder=False, shutdown_timeout_seconds=2, max_pending_submissions=7
    ) as sync:
        assert sync.builder is made
        assert isinstance(sync.publisher, SyncResourcePublisher)
        assert sync.close_builder is False
        assert sync.shutdown_timeout_seconds == 2
        assert sync.max_pending_submissions == sync.publisher.max_pending_submissions == 7
        assert sync.pending_submissions == 0
        assert not sync.closed
    assert sync.closed
    assert not made.closed


@pytest.mark.parametrize("name, value, error", [
    ("builder", None, TypeError), ("builder", object(), TypeError),
    ("close_builder", 1, TypeError), ("shutdown_timeout_seconds", "5", TypeError),
    ("shutdown_timeout_seconds", True, TypeError), ("shutdown_timeout_seconds", -1, ValueError),
    ("shutdown_timeout_seconds", math.nan, ValueError),
    ("shutdown_timeout_seconds", math.inf, ValueError),
    ("max_pending_submissions", 1.0, TypeError), ("max_pending_submissions", True, TypeError),
    ("max_pending_submissions", 0, ValueError),
])  # fmt: skip
def test_a_bad_setting_is_refused_by_name_and_starts_no_thread(
    prices: Prices, name: str, value: Any, error: type[Exception]
) -> None:
    arguments: dict[str, Any] = {"builder": builder(prices), name: value}
    with pytest.raises(error, match=f"^{name} must be "):
        SyncSnapshotBuilder(**arguments)


def test_a_snapshot_is_built_on_the_loops_thread(sync: SyncSnapshotBuilder, prices: Prices) -> None:
    snapshot = sync.build(
        (key for key in [PRICE]),
        deadline_seconds=10,
        metadata={"tenant": "a"},
        snapshot_id="cycle-1",
    )
    assert snapshot.value(PRICE, dict) == {"price": 1}
    assert snapshot.snapshot_id == "cycle-1"
    assert prices.contexts[0].metadata == {"tenant": "a"}
    assert prices.contexts[0].deadline_at is not None
    assert prices.threads[0].name == "coalestra-sync-loop"
    assert prices.threads[0].daemon


def test_keys_are_read_where_they_are_given(sync: SyncSnapshotBuilder) -> None:
    read_in: list[threading.Thread] = []

    def keys() -> Iterator[ResourceKey]:
        read_in.append(threading.current_thread())
        yield PRICE

    sync.build(keys())
    sync.build(keys=keys())
    with sync.session() as session:
        session.resolve(keys())
        session.revalidate(keys=keys())
    assert read_in == [threading.current_thread()] * 4


def test_a_blocking_method_says_what_the_async_one_says(sync: SyncSnapshotBuilder) -> None:
    for blocking, method in (
        (SyncSnapshotBuilder.build, SnapshotBuilder.build),
        (SyncSnapshotBuilder.try_requests, SnapshotBuilder.try_requests),
        (SyncSnapshotSession.revalidate, SnapshotSession.revalidate),
    ):
        assert inspect.signature(blocking) == inspect.signature(method)
        assert inspect.getdoc(blocking) == inspect.getdoc(method)
        assert not inspect.iscoroutinefunction(blocking)
    assert "SyncSnapshotBuilder.build" in repr(SyncSnapshotBuilder.build)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'keys'"):
        sync.build()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'stict'"):
        sync.build([PRICE], stict=False)  # type: ignore[call-arg]


def test_a_request_that_does_not_raise_says_what_came_of_it(sync: SyncSnapshotBuilder) -> None:
    result = sync.try_request(
        SnapshotRequest(required=[PRICE]), deadline_seconds=10, metadata={}, snapshot_id="cycle-3"
    )
    assert result.outcome is RequestOutcome.ACCEPTED
    assert result.require_accepted().snapshot_id == "cycle-3"
    with pytest.raises(TypeError, match="request must be a SnapshotRequest"):
        sync.try_request(PRICE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deadline_seconds"):
        sync.try_request(SnapshotRequest(required=[PRICE]), deadline_seconds=-1)


def test_a_rejected_request_is_a_result_in_another_thread_too() -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no price")

    request = SnapshotRequest(required=[PRICE])
    with SyncSnapshotBuilder(builder(fail)) as sync, sync.session() as session:
        for result in (
            sync.try_request(request),
            session.try_request(request, retry_errors=True),
            outcome(in_thread(lambda: sync.try_request(request))),
            *sync.try_requests([request]),
            *session.try_requests([request]),
        ):
            assert result.outcome is RequestOutcome.REJECTED
            with pytest.raises(SnapshotBuildError, match="cannot resolve 1 resource"):
                result.require_accepted()


def test_many_requests_come_back_in_the_form_they_were_given(sync: SyncSnapshotBuilder) -> None:
    price, volume = (SnapshotRequest(required=[key]) for key in (PRICE, VOLUME))
    read_in: list[threading.Thread] = []

    def lazily() -> Iterator[SnapshotRequest]:
        read_in.append(threading.current_thread())
        yield from (volume, price)

    lazy: Any = lazily()
    with sync.session() as session:
        for several in (sync.try_requests, session.try_requests):
            named = several({"v": volume, "p": price}, max_concurrency=1)
            assert list(named) == ["v", "p"]
            assert VOLUME in named["v"].require_accepted()
            in_order = several([price, volume])
            assert [each.request for each in in_order] == [price, volume]
            assert several([]) == ()
            with pytest.raises(TypeError, match=r"requests\[0\]"):
                several([PRICE])  # type: ignore[list-item]
            with pytest.raises(ValueError, match="max_concurrency"):
                several([price], max_concurrency=0)
    assert [each.request for each in sync.try_requests(lazy)] == [volume, price]
    assert read_in == [threading.current_thread()]


def test_a_build_that_is_not_strict_returns_the_errors() -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("no price")

    with SyncSnapshotBuilder(builder(fail)) as sync:
        assert PRICE in sync.build([PRICE], strict=False).errors
        with pytest.raises(SnapshotBuildError, match="no price"):
            sync.build([PRICE])


def test_what_is_published_is_what_builds_return(sync: SyncSnapshotBuilder, prices: Prices) -> None:
    sync.publisher.publish(PRICE, {"price": 100}, source="stream")
    assert sync.build([PRICE]).value(PRICE) == {"price": 100}
    future = sync.publisher.submit_publish(PRICE, {"price": 101}, source="stream", force=True)
    sync.flush_submissions(timeout_seconds=10)
    assert future.done()
    assert sync.build([PRICE]).value(PRICE) == {"price": 101}
    sync.publisher.invalidate(PRICE, reason="gap")
    assert sync.build([PRICE]).value(PRICE) == {"price": 1}


def test_health_tells_the_backlog_too(sync: SyncSnapshotBuilder) -> None:
    health = sync.health_snapshot()
    assert (health.pending_submissions, health.max_pending_submissions) == (0, 1024)
    assert not health.closed
    assert sync.health_snapshot_nowait() == health


class Payload:
    alive: ClassVar[weakref.WeakSet[Payload]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)

    def __deepcopy__(self, _memo: Any) -> Payload:
        return Payload()


async def give(key: ResourceKey, _context: FetchContext) -> Payload:
    if key == VOLUME:
        raise LookupError("no volume")
    return Payload()


def test_nothing_of_what_a_call_came_to_waits_for_a_collection() -> None:
    policy = FreshnessPolicy(0.0, 0.0)  # nothing is of use in the cache
    with SyncSnapshotBuilder(builder(give, default_policy=policy)) as sync:
        with without_collector():
            sync.build([PRICE])
            for _ in range(2):
                with contextlib.suppress(SnapshotBuildError):
                    sync.build([PRICE, VOLUME])
            sync.publisher.publish(PRICE, Payload(), source="s")
            sync.publisher.submit_publish(PRICE, Payload(), source="s").result(PATIENCE)
            with contextlib.suppress(SourceProtocolError):
                late = time.time() + 1_000
                sync.publisher.publish(PRICE, Payload(), source="s", observed_at=late)
            sync.submit(lambda made: made.build([PRICE])).result(PATIENCE)
            with sync.session() as session:
                session.resolve([PRICE])
            del session
            sync.publisher.invalidate(PRICE)
            wait_until(lambda: not Payload.alive)


def test_many_threads_build_side_by_side(sync: SyncSnapshotBuilder, prices: Prices) -> None:
    keys = [ResourceKey("market", "price", str(number)) for number in range(20)]

    def work() -> int:
        return sum(len(sync.build([key, PRICE])) for key in keys)

    assert [outcome(future) for future in [in_thread(work) for _ in range(8)]] == [40] * 8
    assert prices.calls == 21


def test_a_source_that_calls_back_on_the_loop_gets_an_error_and_not_a_deadlock() -> None:
    facades: list[SyncSnapshotBuilder] = []

    def recursive(*_: Any) -> Any:
        return facades[0].build([VOLUME])

    made = SnapshotBuilder([source(recursive, run_sync_in_thread=False)])
    with SyncSnapshotBuilder(made) as sync:
        facades.append(sync)
        with pytest.raises(SnapshotBuildError, match=r"build\(\) .* on its own event loop thread"):
            sync.build([PRICE])


def test_a_source_in_a_worker_thread_may_call_back() -> None:
    facades: list[SyncSnapshotBuilder] = []

    def recursive(key: ResourceKey, _: Any) -> Any:
        return 1 if key == VOLUME else facades[0].build([VOLUME]).value(VOLUME)

    with SyncSnapshotBuilder(builder(recursive)) as sync:
        facades.append(sync)
        assert sync.build([PRICE]).value(PRICE) == 1


def test_a_closed_facade_refuses_every_call(sync: SyncSnapshotBuilder) -> None:
    session = sync.session()
    sync.close()
    for call in (
        lambda: sync.build([PRICE]),
        lambda: sync.build_request(SnapshotRequest(required=[PRICE])),
        lambda: sync.try_request(SnapshotRequest(required=[PRICE])),
        lambda: sync.try_requests([]),
        lambda: session.try_request(SnapshotRequest(required=[PRICE])),
        lambda: session.try_requests([]),
        sync.session,
        sync.health_snapshot,
        sync.wait_for_refreshes,
        sync.__enter__,
        lambda: session.resolve([PRICE]),
        lambda: sync.publisher.publish(PRICE, 1, source="stream"),
        lambda: sync.publisher.submit_invalidate(PRICE),
    ):
        with pytest.raises(BuilderClosedError, match="is closed"):
            call()


def test_a_forked_process_is_told_to_make_its_own(sync: SyncSnapshotBuilder) -> None:
    def refused() -> None:
        with pytest.raises(RuntimeError, match="does not survive a fork, so create a new builder"):
            sync.build([PRICE])
        sync.close()

    in_a_child(refused)
    assert sync.build([PRICE]).value(PRICE) == {"price": 1}


def test_a_forked_process_can_make_its_own(sync: SyncSnapshotBuilder) -> None:
    def build() -> None:
        with SyncSnapshotBuilder(builder(Prices())) as own:
            own.build([PRICE])

    in_a_child(build)


def test_a_session_keeps_what_it_has_read(sync: SyncSnapshotBuilder) -> None:
    with sync.session(
        deadline_seconds=10, metadata={"tenant": "a"}, snapshot_id="cycle-42"
    ) as session:
        assert session.snapshot_id == "cycle-42"
        assert session.created_at > 0
        assert session.resolve([PRICE], strict=False, retry_errors=True).value(PRICE) == {
            "price": 1
        }
        sync.publisher.publish(PRICE, {"price": 100}, source="stream")
        assert session.snapshot().value(PRICE) == {"price": 1}
        assert list(session.resolve_request(SnapshotRequest(required=[VOLUME]))) == [PRICE, VOLUME]
        assert session.revalidate([PRICE]).value(PRICE) == {"price": 100}
        assert session.revalidate([PRICE], force_refresh=True).value(PRICE) != {"price": 100}
        assert "cycle-42" in repr(session)
        assert not session.closed
    assert session.closed
    session.close()


def test_a_session_in_a_forked_process_has_nothing_to_close(sync: SyncSnapshotBuilder) -> None:
    def refused() -> None:
        with pytest.raises(RuntimeError, match="create a new builder"):
            session.resolve([PRICE])
        session.close()

    with sync.session() as session:
        in_a_child(refused)


def test_sources_see_the_context_variables_of_the_caller() -> None:
    tenant = contextvars.ContextVar("tenant", default="none")
    with SyncSnapshotBuilder(builder(lambda *_: tenant.get())) as sync:
        tenant.set("a")
        assert sync.build([PRICE]).value(PRICE) == "a"
        assert outcome(in_thread(lambda: sync.build([VOLUME]))).value(VOLUME) == "none"


def test_the_representation_tells_the_state(sync: SyncSnapshotBuilder) -> None:
    assert repr(sync).startswith(
        "<SyncSnapshotBuilder closed=False <SubmissionBacklog 0/1024> over "
    )


def test_work_of_any_kind_is_handed_to_the_loop_without_waiting(sync: SyncSnapshotBuilder) -> None:
    async def work(builder: SnapshotBuilder) -> tuple[object, str]:
        return builder, threading.current_thread().name

    assert sync.submit(work).result(PATIENCE) == (sync.builder, THREAD_NAME)


def test_work_that_cannot_be_called_is_refused_by_name(sync: SyncSnapshotBuilder) -> None:
    work: Any = None
    with pytest.raises(TypeError, match="^work must be a callable"):
        sync.submit(work)


def test_handed_over_work_can_be_cancelled_and_is_refused_after_closing(prices: Prices) -> None:
    door = Door()

    async def work(builder: SnapshotBuilder) -> None:
        await door.pass_()

    with SyncSnapshotBuilder(builder(prices)) as sync:
        handed = sync.submit(work)
        assert door.reached.wait(PATIENCE)
        assert handed.cancel()
    with pytest.raises(BuilderClosedError):
        sync.submit(work)


def test_what_an_application_tests_with_in_its_place_can_be_put_there(
    sync: SyncSnapshotBuilder,
) -> None:
    """Methods of a builder, its facades and sinks can be replaced, as by ``mock.patch.object``."""
    metrics, events = InMemoryMetrics(), LoggingEventSink()
    building = builder(Prices(), metrics=metrics, events=events)
    for whole, method in (
        (sync, "build"), (sync.publisher, "submit_publish"), (sync.session(), "resolve"),
        (building, "build"), (building.publisher, "publish"), (building.session(), "resolve"),
        (building.cache, "get_many"), (metrics, "increment"), (events, "emit"),
    ):  # fmt: skip
        with patch.object(whole, method) as stand_in:
            assert getattr(whole, method) is stand_in
    assert sync.build([PRICE]).value(PRICE) == {"price": 1}
