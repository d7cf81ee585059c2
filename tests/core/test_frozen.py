"""A frozen dictionary is a dictionary in everything but change."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import coalestra
from coalestra.adapters import AdapterSettings
from coalestra.core.frozen import EMPTY, FrozenDict, record
from tests.support import PUBLIC

CHANGES: list[Callable[[Any], Any]] = [
    lambda d: d.__setitem__("a", 2), lambda d: d.__delitem__("a"), lambda d: d.__ior__({"b": 1}),
    lambda d: d.clear(), lambda d: d.pop("a"), lambda d: d.pop("z", None), lambda d: d.popitem(),
    lambda d: d.setdefault("b", 1), lambda d: d.setdefault("a"), lambda d: d.update({"b": 1}),
    lambda d: d.update(b=1),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_refused_and_changes_nothing(change: Callable[[Any], Any]) -> None:
    frozen = FrozenDict({"a": 1})
    with pytest.raises(TypeError, match="read-only"):
        change(frozen)
    assert frozen == {"a": 1}


def test_it_keeps_no_tie_to_what_it_was_made_from() -> None:
    given = {"a": 1}
    frozen = FrozenDict(given)
    given["a"] = 2
    assert frozen["a"] == 1


def test_it_reads_compares_prints_and_serialises_as_a_dictionary() -> None:
    frozen = FrozenDict({"a": [1], "b": None})
    assert frozen == {"a": [1], "b": None}
    assert frozen.__eq__({"a": [1], "b": None}) is True
    assert repr(frozen) == "{'a': [1], 'b': None}"
    assert json.dumps(frozen) == '{"a": [1], "b": null}'
    assert {**frozen} == frozen
    assert (frozen.get("z", 7), list(frozen), len(frozen)) == (7, ["a", "b"], 2)


def test_copy_and_union_give_dictionaries_that_can_be_changed() -> None:
    frozen = FrozenDict({"a": 1})
    for plain in (frozen.copy(), frozen | {"b": 2}):
        assert type(plain) is dict
    assert frozen == {"a": 1}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_one_comes_back_frozen(protocol: int) -> None:
    restored = pickle.loads(pickle.dumps(FrozenDict({"a": [1]}), protocol))
    assert restored == {"a": [1]}
    assert type(restored) is FrozenDict


def test_a_deep_copy_is_frozen_and_shares_no_mutable_value() -> None:
    frozen = FrozenDict({"a": [1]})
    twin = copy.deepcopy(frozen)
    assert twin == frozen
    assert type(twin) is FrozenDict
    assert twin["a"] is not frozen["a"]
    assert copy.copy(frozen) is frozen


def test_a_deep_copy_follows_values_that_lead_back_to_it() -> None:
    inside: list[Any] = []
    frozen = FrozenDict({"inside": inside})
    inside.append(frozen)
    twin = copy.deepcopy(frozen)
    assert twin["inside"][0] is twin
    assert twin is not frozen


def test_the_shared_empty_one_is_empty() -> None:
    assert EMPTY == {}


RECORDS = [
    kind
    for kind in (getattr(coalestra, name) for name in PUBLIC)
    if isinstance(kind, type) and "__dataclass_fields__" in vars(kind)
    if not issubclass(kind, AdapterSettings)  # a source may declare something else at any time
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda kind: kind.__name__)
def test_every_public_record_refuses_every_change_with_the_same_error(record: type) -> None:
    made: Any = object.__new__(record)
    names = [field.name for field in dataclasses.fields(record)]
    for name in (*names, "unknown", "__orig_class__"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"assign to field '{name}'"):
            setattr(made, name, 1)
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"delete field '{name}'"):
            delattr(made, name)


@record
class Record:
    field: int


class Derived(Record):
    def __init__(self, field: int, more: Any) -> None:
        super().__init__(field)
        self.more = more


def test_what_derives_from_a_record_may_have_attributes_of_its_own() -> None:
    derived = Derived(1, 2)
    derived.more = 3
    assert (derived.field, derived.more) == (1, 3)
    del derived.more
    with pytest.raises(dataclasses.FrozenInstanceError):
        derived.field = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del derived.field


@pytest.mark.parametrize("copied", [
    copy.copy, copy.deepcopy,
    *(lambda it, at=at: pickle.loads(pickle.dumps(it, at)) for at in range(2, 6)),
])  # fmt: skip
def test_a_copy_of_what_derives_from_a_record_has_the_attributes_of_its_own(
    copied: Callable[[Any], Any],
) -> None:
    derived = Derived(1, ["a"])
    twin = copied(derived)
    assert (type(twin), twin, twin.more) == (Derived, derived, ["a"])
    assert (twin.more is derived.more) is (copied is copy.copy)
