"""Names and messages: one for each key, and never too long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coalestra import KeyNormalizer, ResourceKey
from coalestra.redis import scripts

AS_IT_IS = KeyNormalizer(str, str, str, str, str)
keys = st.builds(
    ResourceKey, st.text(min_size=1), st.text(min_size=1), st.text(),
    st.dictionaries(st.text(min_size=1), st.text(), max_size=3), normalizer=st.just(AS_IT_IS),
)  # fmt: skip


@given(keys)
def test_a_key_is_told_by_its_text_alone(key: ResourceKey) -> None:
    assert scripts.key_of(key.canonical) == key


@given(keys, keys)
def test_different_keys_have_different_names(one: ResourceKey, other: ResourceKey) -> None:
    assert (scripts.name_of("p", one) == scripts.name_of("p", other)) is (one == other)


prefixes = st.text("ab:.-", min_size=1, max_size=4)
plain_keys = st.builds(
    ResourceKey, st.text("ab", min_size=1), st.text("ab", min_size=1), st.text("ab")
)


@given(prefixes, plain_keys, prefixes, plain_keys)
def test_names_under_different_prefixes_differ(
    one: str, its: ResourceKey, other: str, others: ResourceKey
) -> None:
    mine, yours = scripts.name_of(one, its), scripts.name_of(other, others)
    assert (mine == yours) is ((one, its) == (other, others))
    assert yours.startswith(scripts.head_of(one)) is (one == other)


def test_a_long_key_has_a_short_name_of_its_own() -> None:
    names = {scripts.name_of("p", ResourceKey("n", "x", f"{'s' * 5000}{n}")) for n in range(100)}
    assert len(names) == 100
    assert max(map(len, names)) < scripts.MOST_NAME_BYTES + 10


@given(keys, st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_a_message_says_what_was_put_into_it(key: ResourceKey, version: str) -> None:
    size = len(version.encode())
    data = b"s%03d" % size + version.encode() + key.canonical.encode()
    assert scripts.message_of(data) == (scripts.STORED, version, key.canonical)
