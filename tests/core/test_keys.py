"""Keys: one resource has one key, and a key costs its hash and its text once."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalestra.core import keys as module
from coalestra.core.keys import (
    CASE_INSENSITIVE_KEY_NORMALIZER,
    LEGACY_KEY_NORMALIZER,
    PRESERVE_KEY_NORMALIZER,
    KeyNormalizer,
    ResourceKey,
    distinct_keys,
)

KEY = ResourceKey("market", "price", "BTC", {"venue": "x", "depth": 5})

parts = st.text(min_size=1, max_size=5).map(str.strip).filter(bool)
keys = st.builds(
    ResourceKey, parts, parts, st.text(max_size=5),
    st.dictionaries(parts, st.text(max_size=3), max_size=3),
)  # fmt: skip


@pytest.mark.parametrize("make, parts, normalizer", [
    (ResourceKey, ("Market", "Price", "btc", (("Venue", "Xy"),)), PRESERVE_KEY_NORMALIZER),
    (ResourceKey.legacy, ("market", "price", "BTC", (("venue", "Xy"),)), LEGACY_KEY_NORMALIZER),
])  # fmt: skip
def test_keys_are_stripped_and_keep_their_case_or_have_that_of_before(
    make: Callable[..., ResourceKey], parts: Any, normalizer: KeyNormalizer
) -> None:
    """A legacy key has lower-case names, and subjects in upper case."""
    key = make(" Market ", "\tPrice", " btc\n", {" Venue ": " Xy "})
    assert (key.namespace, key.name, key.subject, key.qualifiers) == parts
    assert key.normalizer is normalizer


def test_the_case_insensitive_normalizer_folds_all_five_parts() -> None:
    key = ResourceKey("STRASSE", "A", "Straße", {"Q": "ß"}, normalizer=_folding())
    assert key == ResourceKey("straße", "a", "STRASSE", {"q": "SS"}, normalizer=_folding())
    assert key.qualifiers == (("q", "ss"),)


def _folding() -> KeyNormalizer:
    return CASE_INSENSITIVE_KEY_NORMALIZER


def test_qualifiers_may_be_pairs_and_are_kept_as_sorted_strings() -> None:
    pairs = [("z", 1), ("a", None), ["m", True]]
    expected = (("a", "None"), ("m", "True"), ("z", "1"))
    assert ResourceKey("n", "k", "", iter(pairs)).qualifiers == expected  # type: ignore[arg-type]
    assert ResourceKey("n", "k", "", []).qualifiers == ()
    assert ResourceKey("n", "k", "", {}).qualifiers == ()


@pytest.mark.parametrize("arguments, part", [
    (("", "k"), "namespace"), ((" ", "k"), "namespace"), (("n", ""), "name"),
    (("n", "\n"), "name"), (("n", "k", "", {" ": 1}), "qualifier name"),
])  # fmt: skip
def test_an_empty_part_is_a_value_error_that_names_it(arguments: Any, part: str) -> None:
    with pytest.raises(ValueError, match=f"^{part} must be a non-empty string"):
        ResourceKey(*arguments)


def test_a_qualifier_name_given_twice_after_normalizing_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"different names, got 'a' twice"):
        ResourceKey("n", "k", "", [("a", 1), (" a", 1)])
    with pytest.raises(ValueError, match="different names"):
        ResourceKey.legacy("n", "k", "", {"A": 1, "a": 1})


@pytest.mark.parametrize("arguments, part", [
    ((1, "k"), "namespace"), (("n", None), "name"), (("n", b"k"), "name"),
    (("n", "k", 7), "subject"), (("n", "k", "", "ab"), "qualifiers"),
    (("n", "k", "", 5), "qualifiers"), (("n", "k", "", ["ab"]), "qualifiers"),
    (("n", "k", "", [("a", 1, 2)]), "qualifiers"), (("n", "k", "", {1: 2}), "qualifier name"),
])  # fmt: skip
@pytest.mark.parametrize("normalizer", [None, LEGACY_KEY_NORMALIZER])
def test_a_part_of_another_type_is_a_type_error_that_names_it(
    arguments: Any, part: str, normalizer: KeyNormalizer | None
) -> None:
    with pytest.raises(TypeError, match=f"^{part} must be "):
        ResourceKey(*arguments, normalizer=normalizer)


def test_a_normalizer_must_be_one_and_its_transforms_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"^normalizer must be a KeyNormalizer"):
        ResourceKey("n", "k", normalizer=str.strip)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^subject must be a callable"):
        KeyNormalizer(subject="upper")  # type: ignore[arg-type]


def test_a_transform_that_returns_no_string_is_a_type_error() -> None:
    broken = KeyNormalizer(name=lambda value: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"^normalized name must be a string"):
        ResourceKey("n", "k", normalizer=broken)


def test_a_normalizer_can_be_asked_part_by_part() -> None:
    legacy = LEGACY_KEY_NORMALIZER
    assert legacy.normalize_namespace(" A") == "a"
    assert legacy.normalize_name("B ") == "b"
    assert legacy.normalize_subject(" c") == "C"
    assert legacy.normalize_qualifier(" D", 1.5) == ("d", "1.5")


def test_parts_out_of_a_string_subclass_are_plain_strings() -> None:
    class Name(str):
        __slots__ = ()

    for normalizer in (None, KeyNormalizer(namespace=Name, name=Name, qualifier_value=Name)):
        key = ResourceKey(Name("n"), Name("k"), "", [(Name("a"), Name("b"))], normalizer=normalizer)
        found = {type(part) for part in (key.namespace, key.name, *key.qualifiers[0])}
        assert found == {str}


@pytest.mark.parametrize("key, text", [
    (ResourceKey("n", "k"), "n:k"), (ResourceKey("n", "k", "s"), "n:k:s"),
    (ResourceKey("n", "k", "", {"a": 1}), "n:k?a=1"),
    (ResourceKey("n", "k", "s", {"b": "x y", "a": "&=é"}), "n:k:s?a=%26%3D%C3%A9&b=x+y"),
])  # fmt: skip
def test_the_text_has_colons_and_encoded_qualifiers(key: ResourceKey, text: str) -> None:
    assert str(key) == text
    assert str(key) is str(key)


@given(st.dictionaries(st.text(min_size=1).map(str.strip).filter(bool), st.text(), min_size=1))
def test_qualifiers_are_encoded_as_in_the_query_of_a_url(qualifiers: dict[str, str]) -> None:
    """The standard library's encoding, without loading what it takes to parse addresses."""
    key = ResourceKey("a", "b", "c", qualifiers, normalizer=KeyNormalizer())
    assert str(key) == f"a:b:c?{urlencode(key.qualifiers)}"


def test_equality_and_hash_ignore_the_normalizer() -> None:
    plain = ResourceKey("market", "price", "BTC")
    legacy = ResourceKey.legacy("MARKET", "Price", "btc")
    assert plain == legacy
    assert hash(plain) == hash(legacy)
    assert {plain: 1}[legacy] == 1


@pytest.mark.parametrize("other", [
    ResourceKey("other", "price", "BTC", KEY.qualifiers),
    ResourceKey("market", "other", "BTC", KEY.qualifiers),
    ResourceKey("market", "price", "ETH", KEY.qualifiers), ResourceKey("market", "price", "BTC"),
    ("market", "price", "BTC", KEY.qualifiers), str(KEY),
])  # fmt: skip
def test_a_key_is_equal_to_nothing_that_differs_in_a_part(other: object) -> None:
    assert other != KEY
    assert KEY.__eq__(other) in (False, NotImplemented)


@given(keys, keys)
def test_keys_are_ordered_and_equal_as_their_parts_are(a: ResourceKey, b: ResourceKey) -> None:
    def fields(key: ResourceKey) -> tuple[Any, ...]:
        return key.namespace, key.name, key.subject, key.qualifiers

    assert (a == b) == (fields(a) == fields(b))
    assert (a < b) == (fields(a) < fields(b))
    assert (a >= b) == (fields(a) >= fields(b))
    assert a != b or hash(a) == hash(b)


@given(keys)
def test_a_key_made_of_the_parts_of_another_is_equal_to_it(key: ResourceKey) -> None:
    assert ResourceKey(key.namespace, key.name, key.subject, key.qualifiers) == key
    assert pickle.loads(pickle.dumps(key)) == key


@pytest.mark.parametrize("name", ["namespace", "qualifiers", "_hash", "other"])
def test_a_key_cannot_be_changed(name: str) -> None:
    with pytest.raises((AttributeError, TypeError)):
        setattr(KEY, name, "x")
    with pytest.raises((AttributeError, TypeError)):
        delattr(KEY, name)


ODD = "a\nb\x1b[31m\u2028\u202e\udcff"
"""A line break, an escape sequence, a line separator, a change of direction, half a pair."""


@pytest.mark.parametrize("position", range(5))
def test_no_text_of_a_key_raises_and_that_for_people_is_one_printable_line(position: int) -> None:
    texts = ["n", "k", "s", "q", "v"]
    texts[position] = ODD
    namespace, name, subject, qualifier, value = texts
    key = ResourceKey(namespace, name, subject, {qualifier: value})
    assert str(key).startswith(f"{namespace}:{name}:{subject}?")
    assert key.display.isprintable()
    assert key.display is key.display
    assert re.fullmatch(r"[!-~]+", key.canonical)
    assert repr(key).isprintable()
    assert ResourceKey(namespace, name, subject, {qualifier: value}) == eval(
        repr(key), {"ResourceKey": ResourceKey}
    )


def test_half_of_a_surrogate_pair_is_encoded_like_any_other_character() -> None:
    key = ResourceKey("files", "size", "", {"file": "report-\udcff.csv"})
    assert str(key) == key.canonical == "files:size?file=report-%ED%B3%BF.csv"


@pytest.mark.parametrize("position", range(5))
def test_the_text_for_people_and_the_repr_are_short_however_long_the_key(position: int) -> None:
    texts = ["n", "k", "s", "q", "v"]
    texts[position] = "x" * 10_000_000
    namespace, name, subject, qualifier, value = texts
    key = ResourceKey(namespace, name, subject, {qualifier: value})
    assert len(key.display) <= 200
    assert len(repr(key)) <= 1000
    assert re.search(r"\.\.\. \(\d+ characters, [0-9a-f]{8}\)$", key.display)


def test_long_keys_that_begin_alike_are_told_apart_for_people() -> None:
    first, second = (ResourceKey("n", "k", "x" * 300 + end) for end in "ab")
    assert first.display != second.display
    assert first.display == ResourceKey("n", "k", first.subject).display


def test_a_plain_key_reads_the_same_in_all_its_texts() -> None:
    key = ResourceKey("market", "price", "BTC-EUR", {"venue": "x y"})
    assert str(key) == key.display == key.canonical == "market:price:BTC-EUR?venue=x+y"
    assert ResourceKey("n", "k", "Zürich / 北京").display == "n:k:Zürich / 北京"


tricky = st.text(alphabet="ab:?&=%+ \n\udcff", max_size=4)
named = tricky.map(str.strip).filter(bool)


tricky_keys = st.builds(
    ResourceKey, named, named, tricky, st.dictionaries(named, tricky, max_size=2)
)


@given(tricky_keys, tricky_keys)
def test_the_canonical_text_is_one_keys_alone(one: ResourceKey, other: ResourceKey) -> None:
    assert (one.canonical == other.canonical) == (one == other)


@pytest.mark.parametrize("one, other", [
    (("a", "b:c"), ("a", "b", "c")), (("a", "b", "c?d=e"), ("a", "b", "c", {"d": "e"})),
    (("a:b", "c"), ("a", "b:c")), (("a", "b?c=d"), ("a", "b", "", {"c": "d"})),
])  # fmt: skip
def test_keys_of_one_text_differ_canonically(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert str(ResourceKey(*one)) == str(ResourceKey(*other))
    assert ResourceKey(*one).canonical != ResourceKey(*other).canonical


def test_a_key_is_the_same_where_threads_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for free_threaded in (False, True):
        monkeypatch.setattr(module, "FREE_THREADED", free_threaded)
        made.append(ResourceKey(" n ", "k", "s", {"q": "v"}))
    one, other = made
    assert one == other
    assert (hash(one), str(one), repr(one)) == (hash(other), str(other), repr(other))
    assert one.normalizer is other.normalizer
    assert type(other) is ResourceKey


def test_a_key_is_a_frozen_ordered_dataclass_of_four_fields() -> None:
    names = [field.name for field in dataclasses.fields(ResourceKey)]
    assert names == ["namespace", "name", "subject", "qualifiers"]
    assert dataclasses.replace(KEY, subject="ETH") == ResourceKey(
        "market", "price", "ETH", KEY.qualifiers
    )
    assert repr(ResourceKey("n", "k", "s")) == (
        "ResourceKey(namespace='n', name='k', subject='s', qualifiers=())"
    )
    assert not hasattr(KEY, "__dict__")


def test_keys_cannot_be_subclassed() -> None:
    with pytest.raises(TypeError, match="ResourceKey is final"):
        type("Special", (ResourceKey,), {})


def test_copies_of_a_key_are_the_key() -> None:
    assert copy.copy(KEY) is KEY
    assert copy.deepcopy([KEY])[0] is KEY


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_key_keeps_its_normalizer_and_is_not_normalized_again(protocol: int) -> None:
    grown = KeyNormalizer(subject=_grown)
    key = pickle.loads(pickle.dumps(ResourceKey("n", "k", "s", normalizer=grown), protocol))
    assert key.subject == "s+"
    assert key.normalizer == grown
    assert (hash(key), str(key)) == (hash(ResourceKey("n", "k", "s+")), "n:k:s+")


def _grown(value: str) -> str:
    return f"{value}+"


def test_a_key_pickled_in_another_process_is_found_in_this_one() -> None:
    script = (
        "import pickle, sys; from coalestra.core.keys import ResourceKey;"
        "sys.stdout.buffer.write(pickle.dumps(ResourceKey('n', 'k', 's', {'a': 1})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=True
    )
    assert pickle.loads(done.stdout) in {ResourceKey("n", "k", "s", {"a": 1})}


def test_a_hash_is_computed_once() -> None:
    class Counting(tuple):  # type: ignore[type-arg]
        hashed = 0

        def __hash__(self) -> int:
            Counting.hashed += 1
            return 1

    key = ResourceKey("n", "k", "s")
    first = hash(key)
    assert first == hash(("n", "k", "s", ()))
    object.__setattr__(key, "_parts", Counting(("n", "k", "s", ())))
    assert (hash(key), Counting.hashed) == (first, 0)


class TestQualifiers:
    def test_one_is_found_by_its_normalized_name(self) -> None:
        key = ResourceKey.legacy("n", "k", "", {"Venue": "x"})
        assert key.qualifier(" VENUE ") == "x"
        assert key.qualifier("depth") is None
        assert key.qualifier("depth", "5") == "5"

    def test_new_ones_replace_old_ones_of_the_same_name_and_the_last_one_counts(self) -> None:
        key = KEY.with_qualifiers({"depth": 7}, side="bid")
        assert key.qualifiers == (("depth", "7"), ("side", "bid"), ("venue", "x"))
        assert KEY.with_qualifiers({"depth": 7}, depth=8).qualifier("depth") == "8"
        assert KEY.with_qualifiers() == KEY

    def test_two_new_ones_of_one_name_are_a_value_error(self) -> None:
        with pytest.raises(ValueError, match="different names"):
            ResourceKey.legacy("n", "k").with_qualifiers(A=1, a=2)

    def test_named_ones_are_left_out_or_all_and_unknown_names_do_not_matter(self) -> None:
        assert KEY.without_qualifiers("depth", "unknown").qualifiers == (("venue", "x"),)
        assert KEY.without_qualifiers() == ResourceKey("market", "price", "BTC")

    @pytest.mark.parametrize(
        "change", [lambda key: key.with_qualifiers(B=1), lambda key: key.without_qualifiers("a")]
    )
    def test_it_keeps_the_normalizer(self, change: Callable[[ResourceKey], ResourceKey]) -> None:
        changed = change(ResourceKey.legacy("n", "k", "s", {"a": 1}))
        assert changed.normalizer is LEGACY_KEY_NORMALIZER
        assert changed.with_qualifiers(C=1).qualifier("c") == "1"

    def test_the_other_parts_are_not_normalized_again(self) -> None:
        key = ResourceKey("n", "k", "s", normalizer=KeyNormalizer(subject=_grown))
        assert key.with_qualifiers(a=1).subject == "s+"
        assert key.without_qualifiers().subject == "s+"


def test_a_key_normalized_anew_keeps_the_new_normalizer() -> None:
    key = ResourceKey("N", "K", "s").normalized(LEGACY_KEY_NORMALIZER)
    assert (key.namespace, key.name, key.subject) == ("n", "k", "S")
    assert key.normalizer is LEGACY_KEY_NORMALIZER
    for wrong in (None, str.lower):  # there is no default for what it is all about
        with pytest.raises(TypeError, match="normalizer must be a KeyNormalizer"):
            key.normalized(wrong)  # type: ignore[arg-type]  # that is the point


def test_distinct_keys_come_once_and_in_order() -> None:
    a, b = ResourceKey("n", "a"), ResourceKey("n", "b")
    assert list(distinct_keys("keys", iter([b, a, ResourceKey("n", "b")]))) == [b, a]


@pytest.mark.parametrize("wrong", ["n:k", [KEY, "n:k"], KEY, None, 5])
def test_distinct_keys_refuse_anything_but_keys(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^wanted must be "):
        distinct_keys("wanted", wrong)


def test_a_key_with_a_part_replaced_is_brought_into_the_form_of_its_own_normalizer() -> None:
    legacy = ResourceKey("Market", "Price", "abc", {"Venue": "x"}, normalizer=LEGACY_KEY_NORMALIZER)
    other = dataclasses.replace(legacy, subject=" xyz ")
    assert other == ResourceKey("market", "price", "XYZ", {"venue": "x"})
    assert other.normalizer is LEGACY_KEY_NORMALIZER
    assert dataclasses.replace(ResourceKey("a", "b"), name=" C ") == ResourceKey("a", "C")
    assert [field.name for field in dataclasses.fields(legacy)] == list(ResourceKey.__match_args__)
