"""Authority: the rank of a source, by policy and key."""

from __future__ import annotations

import math
from typing import Any

import pytest

from coalestra import AsyncMemoryCache, CallableBatchSource, SnapshotBuilder
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import AuthorityPolicyResolver, SourceAuthorityPolicy

KEY, OTHER = ResourceKey("n", "a"), ResourceKey("n", "b")
POLICY = SourceAuthorityPolicy({"exchange": 10, "guess": -5}, default_rank=1)


class Ranks(AuthorityPolicyResolver):
    """Ranks that hang on the key, by a rule of the application's own."""

    def rank_for(self, key: ResourceKey, source: str) -> int:
        return 7 if key == KEY else 3


class Chosen(AuthorityPolicyResolver):
    """Policies that hang on the key, chosen by a rule of the application's own."""

    def resolve(self, key: ResourceKey) -> SourceAuthorityPolicy:
        return SourceAuthorityPolicy(default_rank=7 if key == KEY else 3)


class Provider:
    """What `AuthorityPolicyProvider` asks for, and no more."""

    resolve, rank_for = Chosen.resolve, Ranks.rank_for


def test_a_source_has_its_own_rank_or_the_default() -> None:
    assert [POLICY.rank_for(name) for name in ("exchange", "guess", "other")] == [10, -5, 1]
    assert SourceAuthorityPolicy().rank_for("anyone") == 0


def test_ranks_are_kept_apart_from_what_was_given() -> None:
    given = {"exchange": 10}
    policy = SourceAuthorityPolicy(given)
    given["exchange"] = 0
    assert policy.rank_for("exchange") == 10
    with pytest.raises(TypeError):
        policy.source_ranks["exchange"] = 0  # type: ignore[index]


@pytest.mark.parametrize("arguments, error, name", [
    (([("a", 1)],), TypeError, "source_ranks"), (({1: 1},), TypeError, "source_ranks key"),
    (({"": 1},), ValueError, "source_ranks key"),
    (({"a": 1.0},), TypeError, r"source_ranks\['a'\]"),
    (({"a": True},), TypeError, r"source_ranks\['a'\]"), (({}, None), TypeError, "default_rank"),
])  # fmt: skip
def test_a_policy_is_checked(arguments: Any, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name} must be"):
        SourceAuthorityPolicy(*arguments)


def test_an_override_goes_before_the_dynamic_answer_and_that_before_the_default() -> None:
    resolver = AuthorityPolicyResolver(
        SourceAuthorityPolicy(default_rank=1),
        {KEY: SourceAuthorityPolicy(default_rank=2)},
        lambda key: SourceAuthorityPolicy(default_rank=3) if key == OTHER else None,
    )
    keys = KEY, OTHER, ResourceKey("n", "c")
    assert [resolver.rank_for(key, "any") for key in keys] == [2, 3, 1]
    assert resolver.resolve(KEY).default_rank == 2


@pytest.mark.parametrize("resolver, ruled", [
    (AuthorityPolicyResolver(), False),
    (AuthorityPolicyResolver(SourceAuthorityPolicy({})), False),
    (AuthorityPolicyResolver(POLICY), True), (AuthorityPolicyResolver(None, {KEY: POLICY}), True),
    (AuthorityPolicyResolver(None, None, lambda key: None), True), (Ranks(), True),
    (Chosen(), True),
])  # fmt: skip
def test_there_are_rules_as_soon_as_a_rank_may_differ_from_zero(
    resolver: AuthorityPolicyResolver, ruled: bool
) -> None:
    assert resolver.has_rules is ruled


def test_a_resolver_without_rules_ranks_everybody_zero() -> None:
    assert AuthorityPolicyResolver().rank_for(KEY, "anyone") == 0


@pytest.mark.parametrize("arguments, name", [
    (({"a": 1},), "default"), ((POLICY, {KEY: 5}), r"overrides\[n:a\]"),
    ((POLICY, {}, POLICY), "dynamic"),
])  # fmt: skip
def test_a_resolver_is_checked(arguments: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be"):
        AuthorityPolicyResolver(*arguments)


@pytest.mark.parametrize("kind", [Ranks, Chosen, Provider])
async def test_a_fetched_value_has_the_rank_that_a_resolver_of_ones_own_gives_it(
    kind: type[Any],
) -> None:
    source = CallableBatchSource(
        name="any",
        priority=1,
        supports=lambda key: True,
        fetcher=lambda keys, context: dict.fromkeys(keys, 1),
    )
    builder = SnapshotBuilder([source], authority_resolver=kind())
    snapshot = await builder.build([KEY, OTHER])
    assert [value.authority_rank for value in snapshot.values()] == [7, 3]
    event = await builder.publisher.publish(KEY, 2, source="any")
    assert event.value.authority_rank == 7
    await builder.aclose()


@pytest.mark.parametrize("rank", [None, "7", 7.0, math.nan, True])
async def test_a_rank_that_is_none_is_an_error_before_anything_is_written(rank: Any) -> None:
    class Odd(AuthorityPolicyResolver):
        def rank_for(self, key: ResourceKey, source: str) -> int:
            return rank  # type: ignore[no-any-return]  # what must not work

    cache = AsyncMemoryCache()
    builder = SnapshotBuilder([], cache=cache, authority_resolver=Odd())
    with pytest.raises(TypeError, match="^rank must be an integer, got"):
        await builder.publisher.publish(KEY, 1, source="any")
    assert await cache.size() == 0
    await builder.aclose()
