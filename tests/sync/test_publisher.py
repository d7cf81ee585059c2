"""Publishing without a loop: captured at once, bounded, in the order of the calls."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, cast

import pytest

from coalestra.cache.publisher import ResourcePublisher
from coalestra.concurrency.copying import PayloadIsolator
from coalestra.core.errors import (
    BuilderClosedError,
    PayloadIsolationError,
    SubmissionBacklogFullError,
)
from coalestra.core.values import ResourceUpdate
from coalestra.sync import LoopThread, SubmissionBacklog, SyncResourcePublisher
from tests.support.elsewhere import error_of, in_thread, outcome
from tests.support.gates import ThreadGate
from tests.sync.fakes import RESULT, RecordingPublisher
from tests.sync.steps import PRICE, VOLUME

pytestmark = pytest.mark.concurrency


@pytest.fixture
def downstream() -> Iterator[RecordingPublisher]:
    recording = RecordingPublisher()
    yield recording
    for door in recording.doors.values():
        door.open()


@pytest.fixture
def publisher(loop_thread: LoopThread, downstream: RecordingPublisher) -> SyncResourcePublisher:
    return make(loop_thread, downstream, limit=100)


def make(
    thread: LoopThread, downstream: RecordingPublisher, *, limit: int
) -> SyncResourcePublisher:
    return SyncResourcePublisher(
        cast(ResourcePublisher, downstream), thread, SubmissionBacklog(limit), PayloadIsolator()
    )


def update(value: Any, key: Any = PRICE) -> ResourceUpdate[Any]:
    return ResourceUpdate(key, value, source="stream")


HANDED_ON = [
    {"update": ResourceUpdate(PRICE, 1, "stream", 5.0, {"a": 1}), "force": False,
        "replace_equal": False},
    {"update": update(2), "force": True, "replace_equal": True},
    {"updates": (update(3),), "force": True, "replace_equal": False},
    {"keys": (PRICE,), "reason": "gap"}, {"keys": (PRICE, VOLUME), "reason": ""},
]  # fmt: skip


def test_waiting_methods_return_what_the_publisher_returned(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher
) -> None:
    assert (
        publisher.publish(PRICE, 1, source="stream", observed_at=5.0, metadata={"a": 1}) is RESULT
    )
    assert publisher.publish_update(update(2), force=True, replace_equal=True) is RESULT
    assert publisher.publish_many([update(3)], force=True) == {PRICE: RESULT}
    publisher.invalidate(PRICE, reason="gap")
    publisher.invalidate_many([PRICE, VOLUME, PRICE])
    assert downstream.arguments == HANDED_ON
    assert {thread.name for thread in downstream.threads} == {"coalestra-sync-loop"}


def test_submitting_methods_do_the_same_and_hand_the_outcome_to_a_future(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher
) -> None:
    one = publisher.submit_publish(PRICE, 1, source="stream", observed_at=5.0, metadata={"a": 1})
    two = publisher.submit_publish_update(update(2), force=True, replace_equal=True)
    many = publisher.submit_publish_many([update(3)], force=True)
    gone: list[Future[None]] = [
        publisher.submit_invalidate(PRICE, reason="gap"),
        publisher.submit_invalidate_many([PRICE, VOLUME, PRICE]),
    ]
    assert outcome(one) is outcome(two) is RESULT
    assert outcome(many) == {PRICE: RESULT}
    assert [outcome(future) for future in gone] == [None, None]
    assert downstream.arguments == HANDED_ON


def test_what_was_submitted_cannot_be_changed_any_more(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher, loop_thread: LoopThread
) -> None:
    door = hold(loop_thread)
    value = {"bids": [1]}
    metadata = {"pages": [1]}
    updates = [ResourceUpdate(PRICE, value, "stream", metadata=metadata)]
    keys = [PRICE]
    publisher.submit_publish(PRICE, value, source="stream", metadata=metadata)
    publisher.submit_publish_update(updates[0])
    publisher.submit_publish_many(updates)
    publisher.submit_invalidate_many(keys)
    value["bids"].append(2)
    metadata["pages"].append(2)
    updates.clear()
    keys.clear()
    door.set()
    publisher.flush(timeout_seconds=10)
    captured = ResourceUpdate(PRICE, {"bids": [1]}, "stream", metadata={"pages": [1]})
    assert [arguments["update"] for arguments in downstream.arguments[:2]] == [captured, captured]
    assert downstream.arguments[2]["updates"] == (captured,)
    assert downstream.arguments[3]["keys"] == (PRICE,)


class PriceUpdate(ResourceUpdate[int]):
    """An update that the application makes of what it knows."""

    def __init__(self, price: int) -> None:
        super().__init__(PRICE, price, "stream", 7.0, {"unit": "EUR"})


def test_an_update_of_a_class_of_the_application_s_is_captured(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher
) -> None:
    """However that is made: its fields are what counts."""
    plain = ResourceUpdate(PRICE, 3, "stream", 7.0, {"unit": "EUR"})
    assert outcome(publisher.submit_publish_update(PriceUpdate(3))) is RESULT
    assert outcome(publisher.submit_publish_many([PriceUpdate(3)])) == {PRICE: RESULT}
    (one,) = downstream.arguments[1]["updates"]
    assert downstream.arguments[0]["update"] == one == plain


def hold(thread: LoopThread) -> threading.Event:
    """Keep the loop itself from doing anything until the event is set."""
    door = threading.Event()

    async def wait() -> None:
        door.wait(10)

    thread.start(thread.operation(), lambda: wait)
    return door


def test_a_value_not_to_be_captured_takes_no_place(publisher: SyncResourcePublisher) -> None:
    with pytest.raises(PayloadIsolationError, match="a submission"):
        publisher.submit_publish(PRICE, threading.Lock(), source="stream")
    assert publisher.pending_submissions == 0


def test_one_key_is_served_in_the_order_of_the_submissions(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher
) -> None:
    slow = downstream.door(1)
    first = publisher.submit_publish(PRICE, 1, source="stream")
    second = publisher.submit_publish(PRICE, 2, source="stream")
    third = publisher.submit_invalidate(PRICE, reason="gap")
    slow.wait_reached()
    outcome(publisher.submit_publish(VOLUME, 4, source="stream"))
    assert downstream.begun == [1, 4]
    assert not second.done()
    slow.open()
    for future in (first, second, third):
        future.result(10)
    assert downstream.begun == [1, 4, 2, "gap"]


def test_a_submission_taken_back_lets_nobody_overtake(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher
) -> None:
    slow = downstream.door(1)
    publisher.submit_publish(PRICE, 1, source="stream")
    second = publisher.submit_publish(PRICE, 2, source="stream")
    third = publisher.submit_publish(PRICE, 3, source="stream")
    slow.wait_reached()
    assert second.cancel()
    outcome(publisher.submit_publish(VOLUME, 4, source="stream"))
    assert not third.done()
    slow.open()
    outcome(third)
    publisher.flush(timeout_seconds=10)
    assert downstream.begun == [1, 4, 3]


def test_a_full_backlog_refuses_before_anything_is_copied(
    loop_thread: LoopThread, downstream: RecordingPublisher
) -> None:
    publisher = make(loop_thread, downstream, limit=2)
    slow = downstream.door(1)
    publisher.submit_publish(PRICE, 1, source="stream")
    publisher.submit_invalidate(PRICE)
    slow.wait_reached()
    with pytest.raises(SubmissionBacklogFullError) as caught:
        publisher.submit_publish(PRICE, threading.Lock(), source="stream")
    assert (caught.value.limit, caught.value.pending) == (2, 2)
    assert (publisher.pending_submissions, publisher.max_pending_submissions) == (2, 2)
    slow.open()
    publisher.flush(timeout_seconds=10)
    assert publisher.pending_submissions == 0
    outcome(publisher.submit_publish(PRICE, 3, source="stream"))


def test_a_place_is_free_at_once(loop_thread: LoopThread, downstream: RecordingPublisher) -> None:
    publisher = make(loop_thread, downstream, limit=1)
    for number in range(200):
        outcome(publisher.submit_publish(PRICE, number, source="stream"))
        assert publisher.pending_submissions == 0


def test_a_flush_waits_until_the_futures_tell(
    publisher: SyncResourcePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do so only when their places are free again, and whoever has flushed may ask them."""
    plain, gate = SubmissionBacklog.leave, ThreadGate()

    def leave(backlog: SubmissionBacklog, operation: Any) -> None:
        plain(backlog, operation)
        gate.pass_()

    monkeypatch.setattr(SubmissionBacklog, "leave", leave)
    future = publisher.submit_publish(PRICE, 1, source="stream")
    gate.wait_arrived()
    assert publisher.pending_submissions == 0
    with pytest.raises(TimeoutError, match="1 of 1 still pending"):
        publisher.flush(timeout_seconds=0)
    gate.open()
    publisher.flush(timeout_seconds=10)
    assert future.done()


def test_a_flush_waits_for_what_was_cancelled_until_it_has_ended(
    publisher: SyncResourcePublisher,
    downstream: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    working, ending = downstream.door("work"), downstream.door("end")

    async def stubborn(_: object, **_flags: Any) -> Any:
        try:
            await working.pass_()
        finally:
            await ending.pass_()

    monkeypatch.setattr(downstream, "publish_update", stubborn)
    future = publisher.submit_publish(PRICE, 1, source="stream")
    working.wait_reached()
    assert future.cancel()
    with pytest.raises(TimeoutError, match="1 of 1 still pending"):
        publisher.flush(timeout_seconds=0)
    ending.open()
    publisher.flush(timeout_seconds=10)


def test_an_error_of_the_publisher_stays_with_its_future(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher
) -> None:
    downstream.error = ValueError("too far in the future")
    failed = publisher.submit_publish(PRICE, 1, source="stream")
    publisher.flush(timeout_seconds=10)
    assert error_of(failed) is downstream.error
    downstream.error = None
    assert outcome(publisher.submit_publish(PRICE, 2, source="stream")) is RESULT


@pytest.mark.parametrize("value, error", [(-1, ValueError), ("1", TypeError), (True, TypeError)])
def test_a_bad_timeout_of_a_flush_is_refused(
    publisher: SyncResourcePublisher, value: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="timeout_seconds must be"):
        publisher.flush(timeout_seconds=value)


@pytest.mark.parametrize("submit", [
    lambda p: p.submit_publish("price", 1, source="stream"),
    lambda p: p.submit_publish(PRICE, 1, source=5),
    lambda p: p.submit_publish(PRICE, 1, source="stream", metadata=0),
    lambda p: p.submit_publish_update({"value": 1}), lambda p: p.submit_publish_many([1]),
    lambda p: p.submit_invalidate("price"), lambda p: p.submit_invalidate(PRICE, reason=None),
    lambda p: p.submit_invalidate_many(PRICE), lambda p: p.publish_many([1]),
    lambda p: p.publish_update(None), lambda p: p.invalidate("price"),
    lambda p: p.submit_publish(PRICE, 1, source="stream", force=1),
    lambda p: p.submit_publish_update(update(1), replace_equal=None),
    lambda p: p.submit_publish_many([update(1)], force="yes"),
])  # fmt: skip
def test_a_wrong_argument_is_refused_at_once(
    publisher: SyncResourcePublisher, submit: Callable[[SyncResourcePublisher], object]
) -> None:
    with pytest.raises(TypeError):
        submit(publisher)
    assert publisher.pending_submissions == 0


def test_empty_collections_are_allowed(publisher: SyncResourcePublisher) -> None:
    assert publisher.publish_many([]) == {}
    assert outcome(publisher.submit_publish_many([])) == {}
    publisher.invalidate_many([])


def test_the_loop_may_not_wait(publisher: SyncResourcePublisher, loop_thread: LoopThread) -> None:
    refusals: list[str] = []

    async def source() -> Future[Any]:
        for wait in (publisher.flush, lambda: publisher.publish(PRICE, 1, source="stream")):
            with pytest.raises(RuntimeError, match="own event loop thread") as caught:
                wait()
            refusals.append(str(caught.value).split()[0])
        return publisher.submit_publish(PRICE, 1, source="stream")

    assert outcome(loop_thread.run("source()", source)) is RESULT
    assert refusals == ["flush()", "publish()"]


def test_a_closed_facade_takes_no_submissions(
    publisher: SyncResourcePublisher, loop_thread: LoopThread
) -> None:
    async def stop() -> None:
        loop_thread.stop()

    outcome(loop_thread.finish(stop).future)
    with pytest.raises(BuilderClosedError):
        publisher.submit_publish(PRICE, 1, source="stream")
    with pytest.raises(BuilderClosedError):
        publisher.invalidate(PRICE)
    publisher.flush()
    assert publisher.pending_submissions == 0


def test_a_facade_closed_while_a_value_is_captured_takes_it_back(
    loop_thread: LoopThread, downstream: RecordingPublisher
) -> None:
    async def stop() -> None:
        loop_thread.stop()

    def close_meanwhile(value: Any) -> Any:
        outcome(loop_thread.finish(stop).future)
        return value

    publisher = SyncResourcePublisher(
        cast(ResourcePublisher, downstream),
        loop_thread,
        SubmissionBacklog(1),
        PayloadIsolator(close_meanwhile),
    )
    with pytest.raises(BuilderClosedError):
        publisher.submit_publish(PRICE, 1, source="stream")
    assert publisher.pending_submissions == 0


def test_many_threads_submit_side_by_side_and_each_keeps_its_order(
    publisher: SyncResourcePublisher, downstream: RecordingPublisher
) -> None:
    def produce(name: str) -> None:
        for number in range(50):
            while True:
                try:
                    publisher.submit_publish(PRICE, (name, number), source="stream")
                except SubmissionBacklogFullError:
                    publisher.flush()
                else:
                    break

    producers = [in_thread(functools.partial(produce, name)) for name in "abcdefgh"]
    for producer in producers:
        outcome(producer)
    publisher.flush(timeout_seconds=10)
    assert len(downstream.begun) == 400
    for name in "abcdefgh":
        assert [n for who, n in downstream.begun if who == name] == list(range(50))


def test_the_representation_tells_the_backlog(publisher: SyncResourcePublisher) -> None:
    assert repr(publisher).startswith("<SyncResourcePublisher <SubmissionBacklog 0/100> over ")
