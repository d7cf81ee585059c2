"""Whatever a record holds, its JSON form can be dumped and gives nothing away."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.serialization import json_safe, utc_text


class Colour(enum.Enum):
    RED = ("r", math.inf)


class Mode(str, enum.Enum):
    FAST = "fast"


class Grade(enum.IntEnum):
    TOP = 3


class Pair(NamedTuple):
    left: int
    right: object


@dataclass
class Inner:
    secret: object
    ratio: float = math.nan


@dataclass(frozen=True)
class Outer:
    inner: Inner
    by_key: dict[Any, Any] = field(default_factory=dict)


class Loud(str):
    def __str__(self) -> str:
        return "LOUD"


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        raise AssertionError("repr may hold secrets")


def plain(value: object) -> bool:
    """Whether a value consists of exact JSON types only."""
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    if type(value) is list:
        return all(plain(item) for item in value)
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (str, int, bool)


UNSPEAKABLE = f"{__name__}.Unspeakable"


@pytest.mark.parametrize("value, expected", [
    (None, None), (True, True), (7, 7), (1.5, 1.5), ("text", "text"), (Loud("quiet"), "quiet"),
    (math.nan, "nan"), (math.inf, "infinity"), (-math.inf, "-infinity"), (Mode.FAST, "fast"),
    (Grade.TOP, 3), (Colour.RED, ["r", "infinity"]), ((1, 2), [1, 2]), (deque([1, 2]), [1, 2]),
    (Pair(1, b"x"), [1, "builtins.bytes"]), ({3, 1, 2}, [1, 2, 3]),
    (frozenset({"b", "a"}), ["a", "b"]), ({8, 0}, [0, 8]), ({0, 8}, [0, 8]),
    (FrozenDict({"a": 1}), {"a": 1}), (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (UserDict({"a": 1}), {"a": 1}), ({1: 2, None: 3, (1, 2): 4}, {"1": 2, "None": 3, "(1, 2)": 4}),
    ({ResourceKey("n", "k", "s"): 1}, {"n:k:s": 1}), ({Loud("quiet"): 1}, {"quiet": 1}),
    (Decimal("1.5"), "decimal.Decimal"), (b"bytes", "builtins.bytes"),
    (ValueError("secret"), "builtins.ValueError"), (Inner, "builtins.type"),
    (Unspeakable(), UNSPEAKABLE), ({Unspeakable(): 1}, {UNSPEAKABLE: 1}),
    (Outer(Inner(Unspeakable()), {Mode.FAST: (Unspeakable(),)}),
        {"inner": {"secret": UNSPEAKABLE, "ratio": "nan"}, "by_key": {"fast": [UNSPEAKABLE]}}),
])  # fmt: skip
def test_a_value_becomes_json_safe(value: Any, expected: Any) -> None:
    """Sets come in one order, whichever they have: the two of 8 and 0 differ in that."""
    found = json_safe(value)
    assert found == expected
    assert plain(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


class Unreadable(list[int]):
    def __iter__(self) -> Any:
        raise OSError("unreadable")


class Unequal(int):
    def bit_length(self) -> int:
        raise OSError("unreadable")


class Torn(dict[str, int]):
    def items(self) -> Any:
        raise OSError("unreadable")


@dataclass
class Lacking:
    never: int = field(init=False)


@pytest.mark.parametrize(
    "value",
    [Unreadable([1]), Unequal(3), Torn(a=1), Lacking(), 10**5_000, -(10**5_000)],
    ids=["list", "int", "dict", "dataclass", "long", "negative"],
)
def test_what_cannot_be_read_or_written_is_named_and_takes_nothing_with_it(value: Any) -> None:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    assert json.loads(json.dumps(json_safe({"a": [value], "b": 1}))) == {"a": [name], "b": 1}


def test_what_contains_itself_is_named_by_its_type() -> None:
    loop: dict[str, Any] = {"items": []}
    loop["items"].append(loop)
    loop["self"] = loop
    assert json_safe(loop) == {"items": ["builtins.dict"], "self": "builtins.dict"}


def test_what_is_shared_is_shown_in_each_place() -> None:
    shared = [1]
    assert json_safe([shared, shared]) == [[1], [1]]


@pytest.mark.parametrize(
    "above", [lambda x: [x, x], lambda x: {"a": x, "b": x}, lambda x: (x,) * 9]
)
def test_what_is_shared_on_every_level_does_not_grow_beyond_all_bounds(above: Any) -> None:
    shared: Any = [1]
    for _ in range(30):
        shared = above(shared)
    text = json.dumps(json_safe(shared))
    assert text.startswith(json.dumps(json_safe(above([]))).partition("[]")[0])
    assert len(text) < 10_000_000


def test_a_large_container_that_stands_in_many_places_is_shown_in_some() -> None:
    large = list(range(30_000))
    shown = json_safe([large] * 100)
    assert shown[:4] == [large] * 4
    assert shown[4:] == ["builtins.list"] * 96


def test_what_is_nested_without_end_is_cut_off() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    text = json.dumps(json_safe(deep))
    assert text == "[" * 32 + '"builtins.list"' + "]" * 32


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.just(Mode.FAST)
)
trees = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner), st.tuples(inner, inner), st.builds(Inner, inner),
    st.dictionaries(st.one_of(st.integers(), st.text(), st.none()), inner),
))  # fmt: skip


@given(trees)
def test_any_tree_becomes_json_and_stays_what_it_is_the_second_time(value: Any) -> None:
    found = json_safe(value)
    assert plain(found)
    json.dumps(found, allow_nan=False)
    assert json_safe(found) == found


@pytest.mark.parametrize("seconds, text", [
    (0.0, "1970-01-01T00:00:00.000000+00:00"),
    (1_700_000_000.25, "2023-11-14T22:13:20.250000+00:00"),
    (-1.5, "1969-12-31T23:59:58.500000+00:00"), (1e300, None), (-1e12, None), (math.inf, None),
    (math.nan, None),
])  # fmt: skip
def test_a_time_becomes_a_text_in_utc_or_none_at_all(seconds: float, text: str | None) -> None:
    assert utc_text(seconds) == text
