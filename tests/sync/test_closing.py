"""Closing drains, cancels what is late, closes the builder and ends the thread; once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import weakref
from concurrent.futures import Future
from typing import Any

import pytest

from coalestra.core.errors import (
    BuilderClosedError,
    ObservabilityShutdownTimeoutError,
    PayloadCopyShutdownTimeoutError,
    SnapshotBuildError,
)
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.snapshot import Snapshot
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.sync import SyncSnapshotBuilder
from tests.support import ThreadGate
from tests.support.elsewhere import PATIENCE, error_of, in_thread, outcome, wait_until
from tests.sync.sources import Prices, builder, source
from tests.sync.steps import PRICE, VOLUME, Door, loop_threads

pytestmark = pytest.mark.concurrency


def test_closing_ends_the_thread_and_the_builder_and_can_be_repeated() -> None:
    made = builder(Prices())
    sync = SyncSnapshotBuilder(made)
    sync.build([PRICE])
    sync.close()
    assert loop_threads() == []
    assert made.closed
    sync.close()


def test_a_builder_that_is_left_open_can_be_used_on_another_loop() -> None:
    made = builder(Prices())
    with SyncSnapshotBuilder(made, close_builder=False) as sync:
        sync.build([PRICE])
    assert not made.closed

    async def use() -> Any:
        async with made:
            return (await made.build([VOLUME])).value(VOLUME)

    assert asyncio.run(use()) == {"price": 2}


def test_a_builder_that_is_closed_already_does_no_harm() -> None:
    builders: list[SnapshotBuilder] = []

    async def close(*_: Any) -> Any:
        closing.append(asyncio.create_task(builders[0].aclose()))
        return 1

    closing: list[asyncio.Task[None]] = []
    made = builder(close)
    builders.append(made)
    sync = SyncSnapshotBuilder(made)
    with contextlib.suppress(BuilderClosedError):
        sync.build([PRICE], strict=False)
    wait_until(lambda: made.closed)
    sync.close()
    assert loop_threads() == []


def test_accepted_submissions_are_done_before_the_end() -> None:
    with SyncSnapshotBuilder(builder(Prices())) as sync:
        futures = [
            sync.publisher.submit_publish(PRICE, number, source="stream", force=True)
            for number in range(100)
        ]
    assert all(outcome(future).published for future in futures)


def under_way(**settings: Any) -> tuple[SyncSnapshotBuilder, Future[Snapshot], Door]:
    """A facade, a build of a thread that is under way on it, and the door at which it waits."""
    prices = Prices()
    door = prices.door = Door()
    sync = SyncSnapshotBuilder(builder(prices), **settings)
    building = in_thread(lambda: sync.build([PRICE]))
    door.wait_reached()
    return sync, building, door


def test_a_call_that_is_under_way_may_end_in_time() -> None:
    sync, building, door = under_way()
    closing = in_thread(sync.close)
    wait_until(lambda: sync.closed)
    door.open()
    assert outcome(building).value(PRICE) == {"price": 1}
    outcome(closing)


def test_a_call_that_takes_too_long_is_told_that_the_facade_was_closed() -> None:
    sync, building, _ = under_way(shutdown_timeout_seconds=0.01)
    sync.close()
    assert isinstance(error_of(building), BuilderClosedError)
    assert loop_threads() == []


def test_threads_that_close_together_wait_for_one_closing() -> None:
    sync, building, door = under_way()
    closings = [in_thread(sync.close) for _ in range(8)]
    wait_until(lambda: sync.closed)
    assert not any(closing.done() for closing in closings)
    door.open()
    for closing in closings:
        outcome(closing)
    outcome(building)
    assert loop_threads() == []


def test_the_loops_own_thread_cannot_close_the_facade() -> None:
    facades: list[SyncSnapshotBuilder] = []
    messages: list[str] = []

    def close(*_: Any) -> Any:
        try:
            facades[0].close()
        except RuntimeError as error:
            messages.append(str(error))
        return 1

    made = SnapshotBuilder([source(close, run_sync_in_thread=False)])
    with SyncSnapshotBuilder(made) as sync:
        facades.append(sync)
        sync.build([PRICE])
        assert not sync.closed
    assert messages[0].startswith("close() of the sync snapshot builder must not be called on")


def one_that_fails_to_close() -> SyncSnapshotBuilder:
    class Session:
        def close(self) -> None:
            raise OSError("already gone")

    prices: Any = source(Prices())
    prices.close = Session().close
    return SyncSnapshotBuilder(SnapshotBuilder([prices], manage_lifecycle=True))


def test_an_error_of_the_builders_closing_is_raised_and_the_thread_ends() -> None:
    sync = one_that_fails_to_close()
    with pytest.raises(OSError, match="already gone"):
        sync.close()
    sync.close()
    assert loop_threads() == []


def test_a_facade_whose_closing_failed_can_be_forgotten() -> None:
    """The error leads to the facade, and must not be held by what waits for the facade's end."""
    sync = one_that_fails_to_close()
    kept = weakref.ref(sync)
    with pytest.raises(OSError, match="already gone"):
        sync.close()
    del sync
    gc.collect()
    assert kept() is None


class Slow:
    """A payload whose copies wait at a gate."""

    gate = ThreadGate()

    def __deepcopy__(self, memo: Any) -> Slow:
        Slow.gate.pass_()
        return self


def test_late_copies_keep_the_thread_until_they_end_and_no_longer() -> None:
    Slow.gate = ThreadGate()
    made = builder(lambda *_: Slow(), copy_shutdown_timeout_seconds=0.01)
    sync = SyncSnapshotBuilder(made, shutdown_timeout_seconds=0.01)
    building = in_thread(lambda: sync.build([PRICE]))
    outcome(in_thread(Slow.gate.wait_arrived))
    with pytest.raises(PayloadCopyShutdownTimeoutError) as caught:
        sync.close()
    assert caught.value.active_copies == 1
    assert isinstance(error_of(building), BuilderClosedError)
    assert len(loop_threads()) == 1
    sync.close()
    Slow.gate.open()
    wait_until(lambda: not loop_threads())


class SlowSink:
    """An event sink that waits at a gate."""

    def __init__(self) -> None:
        self.gate = ThreadGate()

    def emit(self, event_type: str, **_: Any) -> None:
        self.gate.pass_()


def test_late_sinks_keep_the_thread_until_they_end_and_no_longer() -> None:
    events = SlowSink()
    made = builder(Prices(), events=events, observability_shutdown_timeout_seconds=0.01)
    sync = SyncSnapshotBuilder(made, shutdown_timeout_seconds=0.01)
    sync.build([PRICE])
    events.gate.wait_arrived()
    with pytest.raises(ObservabilityShutdownTimeoutError):
        sync.close()
    assert len(loop_threads()) == 1
    events.gate.open()
    wait_until(lambda: not loop_threads())


def test_the_with_block_raises_its_own_error() -> None:
    with pytest.raises(KeyError):
        with SyncSnapshotBuilder(builder(Prices(), default_policy=FreshnessPolicy(1, 2))):
            raise KeyError
    assert loop_threads() == []


def test_an_error_of_the_block_wins_over_one_in_closing(caplog: pytest.LogCaptureFixture) -> None:
    events = SlowSink()
    made = builder(Prices(), events=events)
    with pytest.raises(LookupError, match="the block's own"):
        with SyncSnapshotBuilder(made, shutdown_timeout_seconds=0.01) as sync:
            sync.build([PRICE])
            events.gate.wait_arrived()
            raise LookupError("the block's own")
    assert "closing failed after LookupError: observability must be delivered" in caplog.text
    events.gate.open()
    wait_until(lambda: not loop_threads())


def test_closing_a_facade_whose_loop_is_held_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalestra.sync.UNWIND_SECONDS", 0.01)
    held, entered = threading.Event(), threading.Event()

    def hold(*_: Any) -> int:
        entered.set()
        held.wait(PATIENCE)
        return 1

    made = SnapshotBuilder([source(hold, run_sync_in_thread=False)])
    sync = SyncSnapshotBuilder(made, shutdown_timeout_seconds=0.01)
    building = in_thread(lambda: sync.build([PRICE], strict=False))
    assert entered.wait(PATIENCE)
    with pytest.raises(TimeoutError, match="an event loop thread that is still held"):
        sync.close()
    held.set()
    building.exception(PATIENCE)
    sync.close()
    assert loop_threads() == []


def test_a_source_that_exits_ends_its_build_and_neither_loop_nor_facade() -> None:
    def leave(key: Any, _: Any) -> int:
        if key == PRICE:
            raise SystemExit(3)
        return 1

    with SyncSnapshotBuilder(builder(leave)) as sync:
        assert isinstance(
            error_of(in_thread(lambda: sync.build([PRICE]))), (SystemExit, SnapshotBuildError)
        )
        assert sync.build([VOLUME]).value(VOLUME) == 1
    assert loop_threads() == []


def test_an_application_that_cancels_every_task_of_the_loop_can_close_the_facade() -> None:
    async def cancel_all(*_: Any) -> int:
        for task in asyncio.all_tasks():
            task.cancel()
        return 1

    sync = SyncSnapshotBuilder(builder(cancel_all), shutdown_timeout_seconds=0.5)
    in_thread(lambda: sync.build([PRICE], strict=False)).exception(PATIENCE)
    sync.close()
    assert loop_threads() == []


def test_a_submission_is_copied_by_the_copier_of_the_builder() -> None:
    class Model:
        def __init__(self, items: list[int]) -> None:
            self.items = items

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("use clone()")

        def clone(self) -> Model:
            return Model(list(self.items))

    made = SnapshotBuilder([], payload_copier=Model.clone)
    with SyncSnapshotBuilder(made) as sync:
        mine = Model([1])
        submitted = sync.publisher.submit_publish(PRICE, mine, source="feed")
        mine.items.append(2)
        outcome(submitted)
        assert sync.build([PRICE]).value(PRICE).items == [1]


def test_the_thread_of_a_forgotten_facade_ends_when_what_was_accepted_is_done() -> None:
    door = Door()

    async def work(_builder: SnapshotBuilder) -> int:
        await door.pass_()
        return 42

    made = builder(Prices())
    sync = SyncSnapshotBuilder(made)
    submitted = sync.submit(work)
    door.wait_reached()
    del sync
    assert len(loop_threads()) == 1
    door.open()
    assert outcome(submitted) == 42
    for thread in loop_threads():
        thread.join(PATIENCE)
    assert loop_threads() == []
    assert not made.closed
    again = SyncSnapshotBuilder(made)
    assert again.build([PRICE]).complete
    again.close()


@pytest.mark.parametrize("kept", ["publisher", "session"])
def test_a_facade_is_not_forgotten_as_long_as_somebody_can_use_it(kept: str) -> None:
    held: Any = SyncSnapshotBuilder(builder(Prices()))
    held = held.session() if kept == "session" else held.publisher
    for _ in range(2):
        if kept == "session":
            assert held.resolve([PRICE]).complete
        else:
            assert outcome(held.submit_publish(PRICE, 1, source="s")).published
    del held  # and no thread may be left


def test_work_cancelled_while_it_is_accepted_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread has its turn again only when the loop is closed."""
    sync = SyncSnapshotBuilder(SnapshotBuilder([]), shutdown_timeout_seconds=0)
    loop = sync._thread._loop
    accept = loop.call_soon_threadsafe

    def hold_up(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        accepted = accept(*args, **kwargs)
        outcome(in_thread(sync.close))
        return accepted

    monkeypatch.setattr(loop, "call_soon_threadsafe", hold_up)
    assert sync.submit(lambda _: asyncio.Event().wait()).cancelled()
    assert loop_threads() == []
