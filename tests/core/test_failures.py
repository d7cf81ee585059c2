"""A failure is one bounded line, whatever the source wrote into its message."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from coalestra.core.errors import SourceFailure, folded_message, message_of
from tests.support.running import without_collector


@pytest.mark.parametrize("message, line", [
    ("plain", "plain"), ("  two\r\n\tlines\x0b here ", "two lines here"), ("", "<no message>"),
    (" \n\t ", "<no message>"), ("x" * 300, "x" * 300), ("x" * 301, "x" * 297 + "..."),
    ("a " * 5_000_000, "a " * 148 + "a..."), ("\x1b[31mred\0", "\\x1b[31mred\\x00"),
    ("half a \udcff pair", "half a \\udcff pair"),
])  # fmt: skip
def test_a_message_is_folded_into_one_line_of_300_characters(message: str, line: str) -> None:
    assert folded_message(message) == line


@pytest.mark.parametrize(
    "limit, line", [(1, "."), (2, ".."), (3, "..."), (4, "a..."), (6, "abc..."), (7, "abcdefg")]
)
def test_a_cut_message_never_exceeds_its_limit(limit: int, line: str) -> None:
    assert folded_message("abcdefg", limit) == line


def test_a_failure_reads_as_source_type_message_and_attempts() -> None:
    assert SourceFailure("rest", "OSError", "no\nroute", 2).format() == (
        "rest: OSError(no route; attempts=2)"
    )
    assert SourceFailure("rest", "OSError", "").format() == (
        "rest: OSError(<no message>; attempts=1)"
    )
    assert SourceFailure("rest", "OSError", "abcdef").format(max_message_length=5) == (
        "rest: OSError(ab...; attempts=1)"
    )


def test_a_failure_can_be_recorded_from_an_exception() -> None:
    assert SourceFailure.of("rest", KeyError("x"), 3) == SourceFailure("rest", "KeyError", "'x'", 3)


def raise_deeply() -> None:
    payload = Payload()  # noqa: F841 - it is in sight of what is raised
    try:
        raise KeyError("inner")
    except KeyError as inner:
        raise ValueError("outer") from inner


class Payload:
    alive: ClassVar[weakref.WeakSet[Payload]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.alive.add(self)


def caught() -> Exception:
    try:
        raise_deeply()
    except ValueError as error:
        return error
    raise AssertionError


def test_a_failure_keeps_the_exception_and_says_where_it_was_raised() -> None:
    error = caught()
    failure = SourceFailure.of("rest", error)
    assert failure.exception is error
    assert error.__cause__ is not None
    assert [function for _, _, function in failure.places] == ["caught", "raise_deeply"]
    assert f'File "{__file__}", line ' in failure.traceback
    assert 'raise ValueError("outer") from inner' in failure.traceback
    # One exception may fail many keys.
    assert SourceFailure.of("rest", error).traceback == failure.traceback
    assert SourceFailure.of("rest", ValueError("never raised")).traceback == ""
    assert SourceFailure("rest", "ValueError", "outer").exception is None


def test_a_failure_keeps_no_payload_alive_that_the_failed_call_had_in_hand() -> None:
    with without_collector():
        failure = SourceFailure.of("rest", caught())
        assert not Payload.alive
        assert failure.exception is not None
        assert failure.exception.__cause__ is not None
        assert failure.exception.__cause__.__traceback__ is None


def test_the_places_of_a_deep_recursion_are_bounded_and_the_last_ones() -> None:
    def dive(depth: int) -> None:
        if depth:
            dive(depth - 1)
        raise RecursionError

    try:
        dive(200)
    except RecursionError as error:
        failure = SourceFailure.of("rest", error)
    assert len(failure.places) == 20


def test_the_exception_is_neither_compared_printed_pickled_nor_copied() -> None:
    failure = SourceFailure.of("rest", caught())
    bare = SourceFailure("rest", "ValueError", "outer")
    assert failure == bare
    assert (hash(failure), repr(failure)) == (hash(bare), repr(bare))
    assert failure.to_dict() == bare.to_dict()
    assert dataclasses.asdict(failure) == dataclasses.asdict(bare)
    twin = pickle.loads(pickle.dumps(failure))
    assert twin == failure
    assert (twin.exception, twin.traceback) == (None, "")
    assert copy.copy(failure) is copy.deepcopy(failure) is failure


def test_the_name_of_a_source_is_one_line_too() -> None:
    assert SourceFailure("a\nb", "OSError", "x").format() == "a\\nb: OSError(x; attempts=1)"


def test_a_failure_is_reported_with_its_message_cut() -> None:
    report = SourceFailure("rest", "OSError", "a" * 20, 0).to_dict(max_message_length=10)
    assert report == {
        "schema": "coalestra.error-diagnostics", "schema_version": 1, "source": "rest",
        "error_type": "OSError", "message": "aaaaaaa...", "attempts": 0,
    }  # fmt: skip


def test_an_exception_that_cannot_be_read_still_gives_a_message() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    class Frozen(Exception):
        def __str__(self) -> str:
            raise SystemExit

    class Text(str):
        def split(self, *_: Any, **__: Any) -> Any:
            raise LookupError

    class Odd(Exception):
        def __str__(self) -> str:
            return Text("odd")

    assert (type(message_of(Odd())), message_of(Odd())) == (str, "odd")
    assert message_of(Mute()) == "<message unreadable: ValueError>"
    assert message_of(Frozen()) == "<message unreadable: SystemExit>"
    assert message_of(OSError("down")) == "down"


def fetch_price() -> None:
    """Fail as a source does."""
    raise LookupError("no price")


def raised_in_library(code: str) -> BaseException:
    """Return the error of code that runs in a module of the library, as it is caught there."""
    with pytest.raises(LookupError) as caught:
        exec(code, {"__name__": "coalestra.somewhere", "fetch": fetch_price})
    error, ours = caught.value, caught.value.__traceback__
    while ours is not None and ours.tb_frame.f_globals["__name__"] != "coalestra.somewhere":
        ours = ours.tb_next
    return error.with_traceback(ours)


def test_the_places_within_the_library_are_left_out() -> None:
    """They tell an application nothing."""
    failure = SourceFailure.of("rest", raised_in_library("def call():\n    fetch()\ncall()"))
    assert [function for _, _, function in failure.places] == ["fetch_price"]
    assert SourceFailure.of("rest", raised_in_library("raise LookupError")).places == ()


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """An error as applications write them, on which nothing can be set."""

    code: int


class Nameless(type):
    """A class of classes that does not tell their names."""

    def __getattribute__(cls, name: str) -> object:
        if name == "__name__":
            raise LookupError("no name")
        return super().__getattribute__(name)


class Odd(Exception, metaclass=Nameless):
    """Neither its name nor its attributes can be had."""

    def __getattribute__(self, name: str) -> object:
        raise LookupError(name)


@pytest.mark.parametrize("make", [lambda: Frozen(3), lambda: Odd("x")], ids=["frozen", "odd"])
def test_a_failure_is_recorded_of_an_error_that_refuses_all(make: Callable[[], Exception]) -> None:
    error = make()
    try:
        raise error
    except Exception as raised:
        failure = SourceFailure.of("s", raised)
    assert failure.error_type in ("Frozen", "Odd")
    assert BaseException.__dict__["__traceback__"].__get__(error) is None


def test_a_long_chain_of_causes_is_not_gone_through_again_for_each_error() -> None:
    """Who has lost its frames led on to others that have."""
    looks = 0

    class Counted(Exception):
        def __getattribute__(self, name: str) -> object:
            nonlocal looks
            looks += name == "exceptions"
            return super().__getattribute__(name)

    error: Exception = Counted()
    for _ in range(1_000):
        SourceFailure.of("s", error)
        above = Counted()
        above.__cause__ = error
        error = above
    assert looks < 50_000
