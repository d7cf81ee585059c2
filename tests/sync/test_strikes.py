"""Signal handlers, finalizers, forks and the end of the interpreter may strike anywhere.

Wherever they do, nobody waits for ever and no place is lost. The strikes come between the lines of
the library, in the thread that runs them, as real ones do.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.sync import SyncSnapshotBuilder
from tests.support.elsewhere import PATIENCE, in_a_child, in_thread, needs_fork, outcome
from tests.support.strikes import (
    Struck,
    at_every_line,
    in_an_interpreter_of_its_own,
    lines_of,
    raise_struck,
    traced,
)
from tests.sync.sources import Prices, builder
from tests.sync.steps import PRICE, VOLUME


@pytest.fixture
def facade() -> Iterator[SyncSnapshotBuilder]:
    with SyncSnapshotBuilder(SnapshotBuilder([]), max_pending_submissions=10_000) as made:
        yield made


def test_a_handler_may_submit_and_read_wherever_it_strikes(facade: SyncSnapshotBuilder) -> None:
    submit = facade.publisher.submit_publish
    handled: list[Any] = []

    def strike() -> None:
        handled.append(submit(VOLUME, 2, source="signal"))
        facade.publisher.flush(timeout_seconds=PATIENCE)

    lines = at_every_line(lambda: submit(PRICE, 1, source="main"), strike)
    facade.publisher.flush(timeout_seconds=PATIENCE)
    assert lines > 20
    assert [future.done() for future in handled] == [True] * lines
    assert facade.pending_submissions == 0


def test_a_handler_may_build_wherever_it_strikes_a_build() -> None:
    with SyncSnapshotBuilder(builder(Prices())) as facade:
        lines = at_every_line(
            lambda: facade.build([PRICE]), lambda: facade.build([VOLUME], deadline_seconds=PATIENCE)
        )
    assert lines > 20


def test_a_handler_raising_at_any_line_of_one_takes_no_place(facade: SyncSnapshotBuilder) -> None:
    at_every_line(
        lambda: facade.publisher.submit_publish(PRICE, 1, source="main"),
        raise_struck,
        errors=(Struck,),
    )
    facade.publisher.flush(timeout_seconds=PATIENCE)
    gc.collect()
    assert facade.pending_submissions == 0


def test_a_handler_that_raises_at_any_line_of_a_build_leaves_nothing_behind() -> None:
    with SyncSnapshotBuilder(builder(Prices())) as facade:
        at_every_line(lambda: facade.build([PRICE]), raise_struck, errors=(Struck,))
        facade.build([PRICE])
        assert "operations=0" in repr(facade._thread)


CALLS: dict[str, Callable[[SyncSnapshotBuilder], object]] = {
    "submit": lambda facade: facade.publisher.submit_publish(PRICE, 1, source="main"),
    "publish": lambda facade: facade.publisher.publish(PRICE, 1, source="main"),
    "build": lambda facade: facade.build([PRICE]),
    "flush": lambda facade: facade.publisher.flush(timeout_seconds=PATIENCE),
    "close": lambda facade: facade.close(),
}


@pytest.mark.parametrize("call", [
    pytest.param(each, marks=pytest.mark.slow) if each == "publish" else each for each in CALLS
])  # fmt: skip
@pytest.mark.parametrize("raises", [True, False])
def test_a_handler_may_close_wherever_it_strikes(call: str, raises: bool) -> None:
    def opened() -> SyncSnapshotBuilder:
        return SyncSnapshotBuilder(builder(Prices()), shutdown_timeout_seconds=PATIENCE)

    def struck(number: int) -> None:
        facade, left = opened(), [number]

        def at_line() -> None:
            left[0] -= 1
            if left[0] == 0:
                facade.close()
                if raises:
                    raise Struck

        with contextlib.suppress(Struck, RuntimeError):
            traced(lambda: CALLS[call](facade), at_line)
        facade.close()
        assert facade.closed

    with opened() as example:
        lines = lines_of(lambda: CALLS[call](example))
    for number in range(1, lines + 1):
        outcome(in_thread(lambda number=number: struck(number)))  # type: ignore[misc]


def test_another_thread_may_submit_while_a_handler_holds_one(facade: SyncSnapshotBuilder) -> None:
    """No lock is held where a handler may strike: it may wait for who submits elsewhere."""
    submit = facade.publisher.submit_publish

    def elsewhere() -> object:
        return outcome(in_thread(lambda: outcome(submit(VOLUME, 2, source="other"))))

    at_every_line(lambda: submit(PRICE, 1, source="main"), elsewhere)


@needs_fork
def test_a_child_forked_at_any_line_is_refused_and_may_close() -> None:
    in_an_interpreter_of_its_own(fork_at_every_line)


def fork_at_every_line() -> None:
    with SyncSnapshotBuilder(SnapshotBuilder([]), max_pending_submissions=10_000) as facade:

        def submit() -> object:
            return facade.publisher.submit_publish(PRICE, 1, source="main")

        def refused() -> None:
            with pytest.raises(RuntimeError, match="create a new builder"):
                submit()
            facade.close()

        at_every_line(submit, lambda: in_a_child(refused))


def test_a_thread_that_has_the_number_of_an_ended_loop_thread_is_not_taken_for_it() -> None:
    """Systems give the number of a thread that has ended to a later one."""
    facade = SyncSnapshotBuilder(SnapshotBuilder([]))
    ended = facade._thread._thread
    facade.close()

    def call() -> None:
        ended._ident = threading.get_ident()  # type: ignore[attr-defined]
        facade.close()
        with pytest.raises(RuntimeError, match="is closed"):
            facade.build([PRICE])

    outcome(in_thread(call))


# What a program leaves behind in __del__ is only run, and only has its globals and builtins, if no
# thread holds on to any function of the program.
PROGRAM = """
import atexit, faulthandler, os, types
from coalestra import *
faulthandler.dump_traceback_later(50, exit=True)
KEY = ResourceKey("test", "value")
def say(text, write=os.write):
    write(1, text.encode())
def facade():
    source = CallableSource(name="s", priority=1, supports=lambda k: True, fetcher=lambda k, c: 1)
    builder = SnapshotBuilder([source], events=LoggingEventSink(), manage_lifecycle=True)
    return SyncSnapshotBuilder(builder, shutdown_timeout_seconds=1.0)
"""

ENDINGS = {
    "closed in __del__": """
class Service:
    def __init__(self):
        self.market = facade()
        self.market.build([KEY])
    def __del__(self):
        self.market.close()
service = Service()
""",
    "used in __del__": """
class Service:
    def __init__(self):
        self.market, self.key, self.say = facade(), KEY, say
        self.session = self.market.session()
    def __del__(self):
        for call in (
            lambda: self.market.build([self.key]),
            lambda: self.market.publisher.submit_publish(self.key, 1, source="s"),
            lambda: self.market.publisher.flush(),
            lambda: self.market.health_snapshot(),
        ):
            try:
                call()
            except RuntimeError as error:
                if "while the interpreter ends" not in str(error):
                    self.say(str(error))
            else:
                self.say("not refused")
        self.session.close()
        self.market.close()
        self.market.close()
        self.say("done")
service = Service()
""",
    "left by a suspended generator": """
def prices():
    with facade() as market, market.session() as session:
        while True:
            yield session.resolve([KEY]).value(KEY)
feed = prices()
next(feed)
""",
    "used and closed at exit": """
market = facade()
def end():
    market.build([KEY])
    market.close()
    say("done")
atexit.register(end)
market.build([KEY])
""",
    "a buffered sink closed in __del__": """
class Service:
    def __init__(self):
        self.seen, self.say = [], say
        self.sink = BufferedEventSink(types.SimpleNamespace(emit=self.seen.append))
        self.sink.emit("first")
        assert self.sink.flush()
    def __del__(self):
        self.sink.emit("last")
        self.sink.flush()
        self.sink.close()
        self.say("done" if self.seen == ["first", "last"] else str(self.seen))
service = Service()
""",
    "a buffered sink first used at exit": """
class Sink:
    seen = []
    def emit(self, event_type, **payload):
        self.seen.append(event_type)
sink = BufferedEventSink(Sink())
def end():
    for _ in range(80):
        sink.emit("record")
    sink.close()
    say("done" if len(Sink.seen) == 80 else str(len(Sink.seen)))
atexit.register(end)
""",
}


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them at once, as each takes a moment to begin."""
    started = {name: subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM + program], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) for name, program in ENDINGS.items()}  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", list(ENDINGS))
def test_a_program_ends_though_it_ends_with_the_interpreter(
    name: str, programs: dict[str, subprocess.Popen[str]]
) -> None:
    text, _ = programs[name].communicate(timeout=60)
    assert programs[name].returncode == 0, text
    assert text.strip() == ("done" if "say" in ENDINGS[name] else "")
