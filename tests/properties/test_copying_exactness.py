"""Sealed copies against ``copy.deepcopy``, over arbitrary object graphs."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import pathlib
import re
import uuid
from typing import Any, NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from coalestra.concurrency.sealing import seal_anyhow, seal_briefly
from tests.support.examples import times


class Side(enum.Enum):
    BUY = "buy"
    SELL = "sell"


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlots:
    left: Any
    right: Any


class Plain:
    """Attributes in a dictionary."""


class Slotted:
    __slots__ = ("left", "right")
    left: Any
    right: Any


class Mixed(Slotted):
    """Attributes in slots and in a dictionary."""


class Marked(str):
    """A string that can carry more than its characters."""


class OwnCopy:
    """Has its own idea of a copy: counts how many generations old it is."""

    def __init__(self, held: Any) -> None:
        self.held = held
        self.generation = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        twin = OwnCopy(None)
        memo[id(self)] = twin
        twin.held = copy.deepcopy(self.held, memo)
        twin.generation = self.generation
        return twin


class Doubled(Slotted):
    """Has the same names in slots and in its dictionary."""

    def __init__(self, left: Any) -> None:
        self.left = left
        vars(self)["left"] = [left]


@dataclasses.dataclass(unsafe_hash=True)
class Named:
    """Can be a key, and changed."""

    name: Any


CHANGEABLE = (
    dict, list, set, bytearray, collections.deque, Plain, Slotted, Marked, OwnCopy, Named, Frozen,
)  # fmt: skip
"""What can be changed; a frozen one with a dictionary can fill itself."""
UTC = datetime.timezone.utc

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.decimals(),
    st.uuids(),
    st.datetimes(timezones=st.sampled_from([None, UTC])),
    st.sampled_from(
        [Side.BUY, int, len, ..., NotImplemented, range(3), datetime.date(2024, 5, 6), 2j]
    ),
    st.frozensets(st.integers(0, 3), max_size=2),
    st.tuples(st.integers(), st.text(max_size=2)),
    st.builds(Point, st.integers(), st.sampled_from(Side)),
    st.builds(Frozen, st.integers(), st.tuples(st.decimals())),
    st.builds(FrozenSlots, st.integers(), st.uuids()),
    st.sampled_from([pathlib.PurePosixPath("/a"), pathlib.Path("b"), re.compile("c")]),
    st.ip_addresses(),
    st.fractions(),
    st.timezones(),
)
KEYS = st.one_of(st.text(max_size=3), st.integers(0, 3), st.booleans(), st.tuples(st.integers()))

KNOWN = ["list", "dict", "tuple", "set", "bytearray", "plain", "slotted", "mixed", "doubled"]
UNKNOWN = ["own copy", "ordered", "default", "deque", "marked", "frozen", "frozen and filled"]
UNKNOWN += ["frozen slots", "point", "set of it", "keyed", "set of names"]


def _new(kind: str, draw: Any, earlier: list[Any]) -> Any:
    """One node; those that cannot change later get earlier nodes to hold right away."""
    held = draw(st.sampled_from(earlier)) if earlier else None
    makers: dict[str, Any] = {
        "list": list, "dict": dict,
        "tuple": lambda: (held, draw(LEAVES), draw(st.sampled_from([held, 1]))),
        "set": lambda: set(draw(st.lists(KEYS, max_size=3))),
        "bytearray": lambda: bytearray(draw(st.binary(max_size=3))), "plain": Plain,
        "slotted": Slotted, "mixed": Mixed, "doubled": lambda: Doubled(held),
        "own copy": lambda: OwnCopy(held), "ordered": collections.OrderedDict,
        "default": lambda: collections.defaultdict(list),
        "deque": lambda: collections.deque([held]), "marked": lambda: Marked("m"),
        "frozen": lambda: Frozen(held, 1), "frozen and filled": lambda: filled(Frozen(1, 2), held),
        "frozen slots": lambda: FrozenSlots(held, 1), "point": lambda: Point(held, held),
        "set of it": lambda: {OwnCopy(held)},
        "keyed": lambda: {Named(1): held, Named(2): Named(1), "plain": 3},
        "set of names": lambda: {Named(1), Named((2,)), 3},
    }  # fmt: skip
    return makers[kind]()


def filled(frozen: Frozen, held: Any) -> Frozen:
    """Past its own guard."""
    object.__setattr__(frozen, "_lazily", [held])
    return frozen


def _fill(node: Any, draw: Any, nodes: list[Any]) -> None:
    """Put leaves and nodes, itself and later ones too, into a node that can change."""
    some = draw(st.lists(st.one_of(LEAVES, st.sampled_from(nodes)), max_size=4))
    if type(node) is list:
        node.extend(some)
    elif isinstance(node, dict):
        node.update((draw(KEYS), item) for item in some)
    elif isinstance(node, (Plain, Marked, Mixed)):
        vars(node).update(zip("abcd", some, strict=False))
    if isinstance(node, Slotted) and some:
        node.left = some[0]


@st.composite
def graphs(draw: Any, kinds: list[str]) -> Any:
    nodes: list[Any] = []
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=9)):
        nodes.append(_new(kind, draw, nodes))
    for node in nodes:
        _fill(node, draw, nodes)
    return draw(st.sampled_from([nodes[-1], nodes, {"all": nodes}]))


def contents(node: Any) -> list[Any]:
    """What an object holds, in order; nothing for a leaf."""
    held: list[Any] = []
    if isinstance(node, dict):
        held += [part for item in node.items() for part in item]
    elif isinstance(node, (list, tuple, collections.deque)):
        held += node
    elif isinstance(node, (set, frozenset)):
        held += sorted(node, key=repr) if _only_plain_keys(node) else list(node)
    if isinstance(node, Slotted):
        held += [getattr(node, name, "unset") for name in ("left", "right")]
    if isinstance(node, FrozenSlots):
        held += [node.left, node.right]
    attributes = {} if isinstance(node, (type, enum.Enum)) else getattr(node, "__dict__", {})
    return held + [part for item in attributes.items() for part in item]


def _only_plain_keys(node: Any) -> bool:
    return not any(isinstance(item, (OwnCopy, Named)) for item in node)


def mutable_parts(root: Any) -> dict[int, Any]:
    """Every object below ``root`` that can change, by identity."""
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    todo = [root]
    while todo:
        node = todo.pop()
        if id(node) in seen or isinstance(node, type) or callable(node):
            continue
        seen[id(node)] = node
        if isinstance(node, CHANGEABLE):
            found[id(node)] = node
        todo += contents(node)
    return found


def topology(root: Any) -> list[Any]:
    """What is where, by type and value, and which places are one and the same mutable object."""
    numbers: dict[int, int] = {}
    rows: list[Any] = []
    mutable = mutable_parts(root)

    def look(node: Any) -> Any:
        held = [] if isinstance(node, type) or callable(node) else contents(node)
        if id(node) in mutable or (held and mutable_parts(node)):
            if id(node) not in numbers:
                numbers[id(node)] = len(numbers)
                own = repr(node) if isinstance(node, (bytearray, str)) else ""
                rows.append((numbers[id(node)], type(node), own))
                rows.append([look(part) for part in held])
            return numbers[id(node)]
        return type(node), repr(node)

    rows.append(look(root))
    return rows


@times(3)
@given(st.one_of(LEAVES, graphs(KNOWN), graphs(KNOWN + UNKNOWN)))
def test_every_sealed_and_every_opened_copy_is_what_deepcopy_makes(value: Any) -> None:
    expected = topology(copy.deepcopy(value))
    payload, seal = seal_anyhow(value)
    assert topology(payload) == expected
    assert topology(seal.opener(payload)) == expected
    assert topology(seal.opener(payload)) == expected


@times(3)
@given(st.one_of(LEAVES, graphs(KNOWN), graphs(KNOWN + UNKNOWN)))
def test_no_two_copies_share_an_object_that_can_change(value: Any) -> None:
    payload, seal = seal_anyhow(value)
    copies = [value, payload, seal.opener(payload), seal.opener(payload)]
    together = [mutable_parts(each) for each in copies]
    assert len(set().union(*together)) == sum(len(parts) for parts in together)


@given(graphs(KNOWN))
def test_graphs_of_known_types_never_need_a_thread(value: Any) -> None:
    sealed = seal_briefly(value)
    assert sealed is not None
    assert sealed[1].brief


@given(graphs(KNOWN))
def test_sealing_leaves_the_original_as_it_was(value: Any) -> None:
    before = topology(value)
    payload, seal = seal_anyhow(value)
    for opened in (payload, seal.opener(payload)):
        for part in mutable_parts(opened).values():
            if isinstance(part, (dict, list, set, bytearray)):
                part.clear()
    assert topology(value) == before


def test_the_comparison_itself_tells_aliasing_apart() -> None:
    row: list[int] = []
    assert topology([row, row]) != topology([[], []])
    assert topology([row, 1]) != topology([row, True])
    assert topology([decimal.Decimal("1.0")]) != topology([decimal.Decimal("1.00")])
    assert topology([uuid.UUID(int=1)]) == topology([uuid.UUID(int=1)])
