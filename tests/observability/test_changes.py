"""What begins to fail is logged once, what works again too, and no handler can do any harm."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coalestra import BufferedEventSink
from coalestra.core.errors import SourceFailure
from coalestra.observability import LOGGER, ChangeLog, Condition
from tests.support.elsewhere import PATIENCE, in_a_child, needs_fork
from tests.support.running import no_more_threads, until_logged


class Kept(logging.Handler):
    """Keeps what it is given, after passing through `before`."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.before = before
        self.records: list[logging.LogRecord] = []

    def handle(self, record: logging.LogRecord) -> bool:  # past the lock of handlers
        self.before()
        self.records.append(record)
        return True

    @property
    def lines(self) -> list[str]:
        return [f"{record.levelname} {record.getMessage()}" for record in self.records]


@pytest.fixture(name="kept")
def _kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    handler, level = Kept(), LOGGER.level
    monkeypatch.setattr(LOGGER, "handlers", [handler])  # and none of those that pytest puts there
    monkeypatch.setattr(LOGGER, "propagate", False)
    LOGGER.setLevel(logging.INFO)
    yield handler
    LOGGER.setLevel(level)


class Ticks:
    seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


def log(ticks: Ticks | None = None) -> ChangeLog:
    return ChangeLog(ticks=ticks or Ticks())


def written(changes: ChangeLog) -> int:
    """Wait until all lines are written; return how many are not."""
    return asyncio.run(changes.end(5.0, drain=True))


FAILED = "WARNING source 'a' fails: ConnectionError"
WORKS = "INFO source 'a' works again"


def test_what_went_wrong_is_in_exc_info_with_where_it_was_raised(kept: Kept) -> None:
    def fetch() -> None:
        raise ConnectionError("no\nroute\x1b[31m")

    changes = log()
    try:
        fetch()
    except ConnectionError as error:
        changes.failed("source 'a'", SourceFailure.of("a", error))
    written(changes)
    (record,) = kept.records
    assert record.exc_info is not None
    assert record.exc_info[0] is ConnectionError
    assert isinstance(record.exc_info[1], ConnectionError)
    text = logging.Formatter("%(message)s").format(record)
    assert text.startswith(
        "source 'a' fails: ConnectionError\nTraceback (most recent call last):\n"
    )
    assert __file__ in text
    assert ", in fetch" in text
    assert text.endswith("\nConnectionError: no route\\x1b[31m")


def test_a_record_keeps_neither_the_error_nor_a_frame_alive(kept: Kept) -> None:
    class Payload(ConnectionError):
        pass

    def fetch() -> None:
        payload = Payload("held")
        seen.append(weakref.ref(payload))
        raise payload

    seen: list[weakref.ref[Any]] = []
    changes = log()
    try:
        fetch()
    except Payload as error:
        changes.failed("source 'a'", SourceFailure.of("a", error))
    written(changes)
    gc.collect()
    assert seen[0]() is None
    assert kept.records[0].exc_info is not None
    assert isinstance(kept.records[0].exc_info[1], Payload)


class Odd(Exception):
    def __new__(cls, *arguments: Any) -> Odd:
        if len(arguments) != 2:
            raise RuntimeError("two, please")
        return super().__new__(cls, *arguments)

    def __str__(self) -> str:
        raise RuntimeError("unreadable")


def test_an_error_that_cannot_be_made_again_is_told_all_the_same(kept: Kept) -> None:
    changes = log()
    changes.failed("source 'a'", Odd(1, 2))
    written(changes)
    (record,) = kept.records
    assert kept.lines == ["WARNING source 'a' fails: Odd"]
    assert record.exc_info is not None
    assert "Odd: <message unreadable" in str(record.exc_text)


def test_what_flaps_is_said_ten_times_and_then_once_a_minute(kept: Kept) -> None:
    ticks = Ticks()
    changes = log(ticks)

    def flap(times: int) -> int:
        before = len(kept.lines)
        for _ in range(times):
            changes.failed("source 'a'", ConnectionError())
            changes.works("source 'a'")
        written(changes)
        return len(kept.lines) - before

    assert flap(50) == 10
    ticks.seconds += 59
    assert flap(50) == 0
    ticks.seconds += 1
    assert flap(50) == 1
    ticks.seconds += 3_600
    assert flap(50) == 10


def test_what_stays_as_it_is_is_said_in_the_end_though_it_had_flapped(kept: Kept) -> None:
    ticks = Ticks()
    changes = log(ticks)
    for _ in range(5):
        changes.failed("source 'a'", ConnectionError())
        changes.works("source 'a'")
    changes.failed("source 'a'", ConnectionError())
    written(changes)
    assert kept.lines[-1] == WORKS
    ticks.seconds += 60
    changes.failed("source 'a'", ConnectionError())
    written(changes)
    assert kept.lines[-1] == FAILED


@pytest.mark.parametrize("handler", [None, logging.NullHandler(), Kept()])
def test_nothing_is_done_where_nobody_listens(
    kept: Kept, handler: logging.Handler | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "handlers", [])  # pytest has put its own there by now
    if handler is not None:
        handler.setLevel(logging.ERROR)
        LOGGER.addHandler(handler)
    changes, others = log(), set(threading.enumerate())
    changes.failed("source 'a'", ConnectionError())
    assert (set(threading.enumerate()) - others, changes.pending) == (set(), 0)
    assert not changes.troubled
    LOGGER.addHandler(kept)
    changes.failed("source 'a'", ConnectionError())
    written(changes)
    assert kept.lines == [FAILED], "whoever listens later hears of the next failure"


def test_a_recovery_that_nobody_wants_to_hear_of_ends_the_trouble_all_the_same(kept: Kept) -> None:
    LOGGER.setLevel(logging.WARNING)
    changes = log()
    for _ in range(2):
        changes.failed("source 'a'", ConnectionError())
        changes.works("source 'a'")
        assert not changes.troubled
    written(changes)
    assert kept.lines == [FAILED, FAILED]


def test_a_factory_of_records_that_raises_is_borne(kept: Kept) -> None:
    def refuse(*_: Any, **__: Any) -> logging.LogRecord:
        raise ValueError("no record")

    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(refuse)
    try:
        changes = log()
        changes.failed("source 'a'", ConnectionError())
        assert written(changes) == 0
    finally:
        logging.setLogRecordFactory(before)
    assert kept.lines == []


def test_lines_that_wait_for_a_blocked_handler_are_bounded(kept: Kept) -> None:
    released, entered = threading.Event(), threading.Event()

    def block() -> None:
        entered.set()
        assert released.wait(30)

    kept.before = block
    changes = log()
    for number in range(300):
        changes.failed(f"source {number}", ConnectionError())
    assert entered.wait(30)
    assert changes.pending == 100
    assert asyncio.run(changes.end(0.01, drain=True)) == 100, "in time, though nothing moves"
    assert asyncio.run(changes.end(0.01, drain=False)) == 1, "what is being written is left"
    released.set()
    assert written(changes) == 0
    assert len(kept.lines) == 1


def test_the_thread_that_writes_ends_with_its_work_and_is_a_daemon(kept: Kept) -> None:
    seen: list[threading.Thread] = []
    kept.before = lambda: seen.append(threading.current_thread())
    changes = log()
    for _ in range(2):
        changes.failed("source 'a'", ConnectionError())
        changes.works("source 'a'")
        written(changes)
    assert len(kept.lines) == 4
    for thread in seen:
        thread.join(PATIENCE)
        assert (thread.daemon, thread.is_alive()) == (True, False)


def test_without_threads_the_end_writes_itself(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    no_more_threads(monkeypatch)
    changes = log()
    changes.failed("source 'a'", ConnectionError())
    assert (kept.lines, changes.pending) == ([], 1)
    assert written(changes) == 0
    assert kept.lines == [FAILED]


@needs_fork
def test_a_forked_child_writes_its_own_lines_without_its_parents_thread(kept: Kept) -> None:
    released = threading.Event()
    kept.before = lambda: released.wait(30)
    changes = log()
    changes.failed("source 'a'", ConnectionError())

    def in_the_child() -> None:
        kept.before = lambda: None
        changes.works("source 'a'")
        assert written(changes) == 0
        assert kept.lines == [WORKS]

    in_a_child(in_the_child)
    released.set()
    assert written(changes) == 0


def test_a_silent_log_says_nothing(kept: Kept) -> None:
    changes = ChangeLog(silent=True)
    changes.failed("source 'a'", ConnectionError())
    assert (kept.lines, repr(changes)) == ([], "<ChangeLog troubled=[] pending=0>")


def test_a_subject_is_one_line_whatever_a_source_is_called(kept: Kept) -> None:
    assert Condition("a\nb\udc00").subject.isprintable()


# Sinks behind a buffer say it themselves, in their own thread ----------------------------------


class Broken:
    def emit(self, event_type: str, **payload: Any) -> None:
        raise ConnectionError("broken pipe")


def test_a_handler_that_blocks_holds_up_the_buffer_and_nobody_else(kept: Kept) -> None:
    released = threading.Event()
    kept.before = lambda: released.wait(30)
    with BufferedEventSink(Broken()) as buffer:
        buffer.emit("e")
        buffer.emit("e")
        assert not buffer.flush(0.05)
        released.set()
        assert buffer.flush(5)


def test_a_line_that_comes_as_the_writer_leaves_is_written_too(kept: Kept) -> None:
    changes = log()

    class Role(dict[str, threading.Thread]):
        def pop(self, *arguments: Any) -> Any:
            changes.works("wire")  # nobody starts another writer, as there still is one
            return super().pop(*arguments)

    changes._lines._role = Role()
    changes.failed("wire", OSError())
    for _ in range(2):
        until_logged()
    assert kept.lines == ["WARNING wire fails: OSError", "INFO wire works again"]
