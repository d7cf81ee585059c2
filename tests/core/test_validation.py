"""Checks return the value, or raise with the name of the parameter, the rule and the value."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock, create_autospec

import pytest

from coalestra.core.validation import (
    callable_,
    choice,
    flag,
    instance,
    integer,
    mapping,
    number,
    plain_function,
    shown,
    span,
    text,
)


class Size(str, enum.Enum):
    SMALL = "small"
    LARGE = "large"


async def answer_later() -> None:
    """Answer when it is awaited."""


class Later:
    """Can be called, and answers when that is awaited."""

    async def __call__(self) -> None:
        """Answer."""

    async def answer(self) -> None:
        """Answer."""


ACCEPTED: list[tuple[Callable[..., Any], Any, dict[str, Any]]] = [
    (number, 0, {}), (number, -1.5, {}), (number, 0, {"minimum": 0}), (number, 1e-9, {"above": 0}),
    (number, 1, {"maximum": 1}), (number, None, {"optional": True}), (span, 0, {}),
    (span, math.inf, {}), (integer, -3, {}), (integer, 1, {"minimum": 1}),
    (integer, None, {"optional": True}), (flag, False, {}), (text, "a", {}),
    (flag, None, {"optional": True}),
    (text, "", {"empty": True}), (instance, "a", {"kinds": str}),
    (instance, None, {"kinds": str, "optional": True}), (instance, 1, {"kinds": (str, int)}),
    (mapping, {"a": 1}, {}), (callable_, len, {}), (plain_function, len, {}),
    (plain_function, None, {"optional": True}), (callable_, None, {"optional": True}),
    (choice, Size.LARGE, {"kind": Size}),
]  # fmt: skip

WRONG_TYPE: list[tuple[Callable[..., Any], Any, dict[str, Any]]] = [
    (number, True, {}), (number, "1", {}), (number, None, {}), (span, True, {}), (span, None, {}),
    (integer, True, {}), (integer, 1.0, {}), (integer, None, {}), (flag, 1, {}), (flag, None, {}),
    (text, b"a", {}), (text, None, {"empty": True}), (instance, 1, {"kinds": str}),
    (instance, None, {"kinds": str}), (mapping, [("a", 1)], {}), (mapping, None, {}),
    (callable_, 1, {}), (callable_, None, {}), (plain_function, None, {}),
    (plain_function, answer_later, {}), (plain_function, partial(partial(answer_later)), {}),
    (plain_function, Later(), {}), (plain_function, Later().answer, {}),
    (choice, "large", {"kind": Size}),
]  # fmt: skip

WRONG_VALUE: list[tuple[Callable[..., Any], Any, dict[str, Any]]] = [
    (number, math.nan, {}), (number, math.inf, {}), (number, 10**400, {}),
    (number, -0.1, {"minimum": 0}), (number, 0, {"above": 0}), (number, 1.1, {"maximum": 1}),
    (span, math.nan, {}), (span, -math.inf, {}), (span, -1, {}), (span, 10**400, {}),
    (integer, 0, {"minimum": 1}), (text, "", {}), (text, " \t", {}),
]  # fmt: skip


@pytest.mark.parametrize("check, value, rule", ACCEPTED)
def test_what_obeys_passes(check: Callable[..., Any], value: Any, rule: dict[str, Any]) -> None:
    assert check("limit", value, **rule) is value


@pytest.mark.parametrize("error, wrong", [
    *((TypeError, each) for each in WRONG_TYPE), *((ValueError, each) for each in WRONG_VALUE),
])  # fmt: skip
def test_another_type_or_value_is_an_error_of_that_kind_that_names_the_parameter(
    error: type[Exception], wrong: tuple[Callable[..., Any], Any, dict[str, Any]]
) -> None:
    check, value, rule = wrong
    of_type = ".* of type" if error is TypeError else ""
    with pytest.raises(error, match=rf"^limit must be .*, got {of_type}"):
        check("limit", value, **rule)


@pytest.mark.parametrize("make", [Mock, MagicMock, create_autospec])
def test_what_stands_in_for_a_plain_function_in_tests_is_one(make: Callable[..., Any]) -> None:
    """To ask ``inspect`` about a mock of a function fails, or says that it is a coroutine's."""

    def answer(value: int) -> int:
        return value

    stand_in = make(spec=answer)
    assert plain_function("copier", stand_in) is stand_in
    assert plain_function("copier", partial(stand_in, 1)).func is stand_in
    for later in (AsyncMock(), AsyncMock(spec=answer), partial(AsyncMock(), 1)):
        with pytest.raises(TypeError, match="copier must be a plain function"):
            plain_function("copier", later)


def test_an_optional_mapping_that_is_missing_becomes_an_empty_one() -> None:
    assert mapping("limits", None, optional=True) == {}


@pytest.mark.parametrize("call, sentence", [
    (lambda: number("delay", -1, minimum=0, maximum=2, optional=True),
        "delay must be a finite number of at least 0 and of at most 2, or None, got -1"),
    (lambda: number("delay", 0, above=0), "delay must be a finite number above 0, got 0"),
    (lambda: span("ttl", "1"), "ttl must be a number of at least 0, got '1' of type str"),
    (lambda: span("ttl", timedelta(minutes=1)),
        "ttl must be a number of at least 0, got datetime.timedelta(seconds=60) of type "
        "timedelta; give its total_seconds()"),
    (lambda: number("at", datetime(2026, 1, 1)),
        "at must be a finite number, got datetime.datetime(2026, 1, 1, 0, 0) of type "
        "datetime; give its timestamp()"),
    (lambda: integer("limit", True, minimum=1),
        "limit must be an integer of at least 1, got True of type bool"),
    (lambda: text("name", " "), "name must be a non-empty string, got ' '"),
    (lambda: instance("size", 1, (Size, str), optional=True),
        "size must be a Size or a str or None, got 1 of type int"),
    (lambda: choice("size", "large", Size),
        "size must be a Size, got 'large' of type str; choose from SMALL, LARGE"),
])  # fmt: skip
def test_the_sentence_has_rule_value_and_remedy(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == sentence


def test_a_long_or_unprintable_value_cannot_spoil_the_message() -> None:
    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert len(shown("x" * 10_000)) < 100
    assert len(shown([["x" * 10_000] * 50] * 50)) <= 200
    assert len(shown(10**5_000)) < 100
    assert "Unprintable" in shown(Unprintable())
    assert "Unprintable" in shown([Unprintable()])


@pytest.mark.parametrize("error", [BaseException(), GeneratorExit(), SystemExit(), MemoryError()])
def test_whatever_a_representation_raises_the_sentence_is_said(error: BaseException) -> None:
    class Panicking:
        def __repr__(self) -> str:
            raise error

    with pytest.raises(TypeError, match="^limit must be a finite number, got <Panicking"):
        number("limit", Panicking())
