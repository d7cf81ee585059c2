"""Which resilience policy applies to a source."""

from __future__ import annotations

from typing import Any

import pytest

from coalestra.resilience import (
    CircuitBreakerPolicy,
    ResiliencePolicyResolver,
    RetryPolicy,
    SourceResiliencePolicy,
)


def policy(attempts: int) -> SourceResiliencePolicy:
    return SourceResiliencePolicy(retry=RetryPolicy(max_attempts=attempts))


DEFAULT, BY_NAME, DYNAMIC, DECLARED = (policy(attempts) for attempts in (1, 2, 3, 4))


def dynamic(source: str) -> SourceResiliencePolicy | None:
    return DYNAMIC if source in ("named", "dynamic") else None


@pytest.mark.parametrize("source,declared,chosen", [
    ("named", DECLARED, BY_NAME), ("dynamic", DECLARED, DYNAMIC), ("other", DECLARED, DECLARED),
    ("other", None, DEFAULT),
])  # fmt: skip
def test_a_name_beats_the_dynamic_choice_beats_the_declared_policy_beats_the_default(
    source: str, declared: SourceResiliencePolicy | None, chosen: SourceResiliencePolicy
) -> None:
    """In this order."""
    resolver = ResiliencePolicyResolver(DEFAULT, {"named": BY_NAME}, dynamic)
    assert resolver.resolve(source, declared=declared) is chosen


def test_without_anything_the_defaults_of_both_policies_apply() -> None:
    """Two attempts, three failures."""
    resolver = ResiliencePolicyResolver()
    assert resolver.default == SourceResiliencePolicy(RetryPolicy(), CircuitBreakerPolicy())
    assert resolver.resolve("any") is resolver.default


def test_later_changes_to_the_given_mapping_do_not_reach_the_resolver() -> None:
    """It keeps its own."""
    overrides = {"a": BY_NAME}
    resolver = ResiliencePolicyResolver(DEFAULT, overrides)
    overrides.clear()
    assert resolver.resolve("a") is BY_NAME


@pytest.mark.parametrize("arguments,name", [
    ({"default": 3}, "default"), ({"overrides": {"a": None}}, "overrides"),
    ({"overrides": {1: BY_NAME}}, "overrides"), ({"dynamic": "no"}, "dynamic"),
])  # fmt: skip
def test_arguments_of_a_wrong_type_are_refused(arguments: dict[str, Any], name: str) -> None:
    """At construction, not at the first call."""
    with pytest.raises(TypeError, match=name):
        ResiliencePolicyResolver(**arguments)


def test_a_dynamic_resolver_that_returns_something_else_is_refused() -> None:
    """So is a source that declares something else."""
    wrong: Any = lambda source: "strict"  # noqa: E731
    with pytest.raises(TypeError, match="dynamic"):
        ResiliencePolicyResolver(dynamic=wrong).resolve("a")
    declared: Any = "strict"
    with pytest.raises(TypeError, match="declared"):
        ResiliencePolicyResolver().resolve("a", declared=declared)


@pytest.mark.parametrize("field", ["retry", "circuit"])
def test_a_policy_is_made_of_policies(field: str) -> None:
    """Refused by name otherwise."""
    wrong: Any = {field: 3}
    with pytest.raises(TypeError, match=field):
        SourceResiliencePolicy(**wrong)


def test_the_resolver_tells_about_itself() -> None:
    """Every stateful object can be looked into."""
    text = repr(ResiliencePolicyResolver(DEFAULT, {"b": BY_NAME, "a": BY_NAME}, dynamic))
    assert text.startswith("ResiliencePolicyResolver(default=SourceResiliencePolicy(")
    assert text.endswith("2 overrides, dynamic)")
