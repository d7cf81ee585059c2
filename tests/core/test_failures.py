"""A failure is one bounded line, whatever the source wrote into its message."""

from __future__ import annotations

import pytest

from coalestra.core.errors import SourceFailure, folded_message, message_of


@pytest.mark.parametrize(
    "message, line",
    [
        ("plain", "plain"),
        ("  two\r\n\tlines\x0b here ", "two lines here"),
        ("", "<no message>"),
        (" \n\t ", "<no message>"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 297 + "..."),
    ],
)
def test_a_message_is_folded_into_one_line_of_300_characters(message: str, line: str) -> None:
    assert folded_message(message) == line


@pytest.mark.parametrize(
    "limit, line", [(1, "."), (2, ".."), (3, "..."), (4, "a..."), (6, "abc..."), (7, "abcdefg")]
)
def test_a_cut_message_never_exceeds_its_limit(limit: int, line: str) -> None:
    assert folded_message("abcdefg", limit) == line


@pytest.mark.parametrize("limit, kind", [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_a_limit_must_be_a_count_of_at_least_one(limit: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="max_message_length"):
        folded_message("abc", limit)


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


def test_a_failure_is_reported_with_its_message_cut() -> None:
    report = SourceFailure("rest", "OSError", "a" * 20, 0).to_dict(max_message_length=10)
    assert report == {
        "schema": "coalestra.error-diagnostics",
        "schema_version": 1,
        "source": "rest",
        "error_type": "OSError",
        "message": "aaaaaaa...",
        "attempts": 0,
    }


def test_an_exception_that_cannot_be_read_still_gives_a_message() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert message_of(Mute()) == "<message unreadable: ValueError>"
    assert message_of(OSError("down")) == "down"
