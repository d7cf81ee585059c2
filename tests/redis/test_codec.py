"""The codec: what comes back is exactly what was written, or it is refused by name."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import uuid
from collections import namedtuple
from decimal import Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coalestra.core.frozen import FrozenDict
from coalestra.redis import MessagePackCodec, Model, UnreadableEntryError, UnstorableValueError
from tests.support.running import without_collector


class Side(enum.Enum):
    BUY = "b"
    SELL = "s"


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    LOW = 1


class Unit(str, enum.Enum):
    KILO = "kg"

    @property
    def name(self) -> str:
        return "a kilo"


class Whole(NamedTuple("Whole", [("x", int)])):
    """Is not made of what it holds."""

    def __new__(cls, text: str) -> Whole:
        return super().__new__(cls, int(text) + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    side: Side
    price: Decimal
    total: Decimal = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", self.price * 2)


class Point(NamedTuple):
    x: int
    y: int


class Quote(msgspec.Struct):
    bid: float


class Money:
    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return hash(self.cents)


MODELS: list[type[Any] | Model] = [
    *(Side, Rights, Level, Unit, Order, Point, Whole, Quote),
    Model(Money, "money", dump=lambda money: money.cents, load=Money),
]
CODEC = MessagePackCodec(MODELS)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with the same types at every depth."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(key, name) and same(item, thing)
            for (key, item), (name, thing) in zip(one.items(), other.items(), strict=True)
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (set, frozenset)):
        return {(type(each), each) for each in one} == {(type(each), each) for each in other}
    if isinstance(one, float):
        return math.copysign(1, one) == math.copysign(1, other) and repr(one) == repr(other)
    if isinstance(one, Decimal):
        return str(one) == str(other)
    if isinstance(one, (dt.datetime, dt.time)):
        return (one, one.fold, one.tzinfo) == (other, other.fold, other.tzinfo)
    return bool(one == other)


zones = st.sampled_from(
    [None, dt.timezone.utc, dt.timezone(dt.timedelta(hours=-3.5), "X"), ZoneInfo("Europe/Berlin")]
)
atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])), st.binary(), st.decimals(), st.uuids(),
    st.datetimes(timezones=zones), st.dates(), st.times(), st.timedeltas(),
    st.sampled_from([Side.SELL, Rights.READ | Rights.WRITE, Level.LOW, Point(1, 2), Money(3)]),
)  # fmt: skip
hashable = st.recursive(
    atoms.filter(lambda each: not isinstance(each, Decimal) or not each.is_nan()),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(atoms, lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    st.dictionaries(hashable, inner, max_size=3), st.sets(hashable, max_size=3),
    st.tuples(inner, inner),
), max_leaves=20)  # fmt: skip


@example([Unit.KILO, Whole("7")])
@given(values)
def test_what_was_written_comes_back_with_the_same_types(value: Any) -> None:
    assert same(CODEC.decode(CODEC.encode(value)), value)


@pytest.mark.parametrize("value", [
    *(2**63, 2**64, -(2**63) - 1, 10**400, -0.0, math.inf, bytearray(b"x")),
    dt.datetime(2020, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    dt.time(1, 2, tzinfo=dt.timezone(dt.timedelta(seconds=-61))), uuid.UUID(int=1),
    Order(Side.BUY, Decimal("1.50")), FrozenDict({"a": (1,)}), {1: "one", "1": "text", (1,): {2}},
    [Quote(1.5)],
], ids=repr)  # fmt: skip
def test_the_corners_come_back_too(value: Any) -> None:
    assert same(CODEC.decode(CODEC.encode(value)), value)


@pytest.mark.parametrize("value,place,name", [
    (object(), "value", "builtins.object"),
    ({"a": [1, (2, object())]}, "value['a'][1][1]", "builtins.object"),
    ({1: {2: 3j}}, "value[1][2]", "builtins.complex"),
    (type("str", (str,), {})("x"), "value", "tests.redis.test_codec.str"),
    ("half \ud800", "value", "builtins.str"),
])  # fmt: skip
def test_an_unknown_type_is_refused_by_name_and_place(value: Any, place: str, name: str) -> None:
    with pytest.raises(UnstorableValueError) as caught:
        CODEC.encode(value)
    assert (caught.value.place, caught.value.type_name) == (place, name)


class Shy:
    def __repr__(self) -> str:
        raise RuntimeError("not today")


@pytest.mark.parametrize("depth", range(100, 1_000, 50))
def test_an_unknown_type_is_refused_at_whatever_depth(depth: int) -> None:
    value: Any = object()
    for _ in range(depth):
        value = {"k": value}
    # What other tests left has no room to be finalized at the end of the stack.
    with without_collector(), pytest.raises(UnstorableValueError):
        CODEC.encode(value)


def test_a_refusal_is_short_and_asks_no_key_that_cannot_be_shown() -> None:
    for keys in (["x" * 1_000_000], ["x" * 150] * 5, [Shy()]):
        value: Any = object()
        for key in keys:
            value = {key: value}
        with pytest.raises(UnstorableValueError) as caught:
            CODEC.encode(value)
        assert len(str(caught.value)) < 600


def test_the_refusal_names_the_remedy() -> None:
    with pytest.raises(UnstorableValueError, match=r"register it, RedisCache\(\.\.\., models=\["):
        MessagePackCodec().encode(Side.BUY)


def test_a_value_within_itself_is_refused() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(UnstorableValueError, match="contains itself"):
        CODEC.encode(ring)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\xd4\x63a", b"\x92\x01", CODEC.encode(1) + b"x"], ids=repr
)
def test_damaged_bytes_are_unreadable(data: bytes) -> None:
    with pytest.raises(UnreadableEntryError):
        CODEC.decode(data)


def test_bytes_that_name_an_unregistered_model_are_unreadable_and_call_nothing() -> None:
    with pytest.raises(UnreadableEntryError, match="Side"):
        MessagePackCodec().decode(CODEC.encode(Side.BUY))


def test_a_named_tuple_of_before_its_last_fields_has_their_defaults() -> None:
    kind: Any = namedtuple  # which mypy reads as a declaration
    before, now, longer = kind("P", "x"), kind("P", "x y", defaults=[2]), kind("P", "x y")
    written = MessagePackCodec([before]).encode(before(1))
    assert MessagePackCodec([now]).decode(written) == now(1)
    with pytest.raises(UnreadableEntryError):
        MessagePackCodec([longer]).decode(written)


def test_a_model_that_has_lost_a_field_is_unreadable() -> None:
    other = Model(
        Order, Model.of(Order).name, dump=lambda _: {"gone": 1}, load=Model.of(Order).load
    )
    with pytest.raises(UnreadableEntryError, match="gone"):
        CODEC.decode(MessagePackCodec([other]).encode(Order(Side.BUY, Decimal(1))))


@pytest.mark.parametrize("models, error, said", [
    ([Side, Side], ValueError, "twice"), ([Money], TypeError, r"Model\(kind, name, dump"),
    (Order, TypeError, "models must be an Iterable"), (5, TypeError, "models must be an Iterable"),
])  # fmt: skip
def test_what_are_no_models_is_refused_with_the_remedy(
    models: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        MessagePackCodec(models)
