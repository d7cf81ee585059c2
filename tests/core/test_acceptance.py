"""Acceptance: rules for single values, requirements for several, judged at the given moment."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from coalestra.concurrency.pace import at_once
from coalestra.core.errors import SnapshotAcceptanceError, not_accepted
from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy, PolicyResolver
from coalestra.core.request import (
    ResourceAcceptanceRule,
    SnapshotAcceptancePolicy,
    SnapshotAcceptanceReason,
    SnapshotAcceptanceViolation,
    SnapshotRequirement,
    violations_of,
)
from coalestra.core.snapshot import Snapshot
from coalestra.core.values import Dependencies, Grounds, SnapshotValue

A, B, C = (ResourceKey("n", name) for name in "abc")
NOW = 1_700_000_000.0
FRESH = ResourceAcceptanceRule(allow_stale=False)
YOUNG = ResourceAcceptanceRule(max_age_seconds=5.0)
RANKED = ResourceAcceptanceRule(minimum_authority_rank=3)
ANYTHING = ResourceAcceptanceRule()


def value(key: ResourceKey, **changes: Any) -> SnapshotValue[Any]:
    facts: dict[str, Any] = {
        "key": key, "value": 1, "source": "rest", "observed_at": NOW, "fetched_at": NOW,
        "age_seconds": 0.0, "stale": False, "from_cache": False, "latency_ms": 0.0,
    }  # fmt: skip
    return SnapshotValue(**{**facts, **changes})


def old(key: ResourceKey) -> SnapshotValue[Any]:
    return value(key, observed_at=NOW - 9.0)


def found(
    policy: SnapshotAcceptancePolicy,
    *values: SnapshotValue[Any],
    required: tuple[ResourceKey, ...] = (A, B, C),
    optional: tuple[ResourceKey, ...] = (),
    freshness: PolicyResolver | None = None,
) -> list[tuple[Any, ...]]:
    snapshot = Snapshot("id", NOW, {each.key: each for each in values})
    violations = at_once(violations_of(policy, required, optional, snapshot, NOW, freshness))
    return [
        (each.reason.value, each.key, each.requirement_name) if each.requirement_name
        else (each.reason.value, each.key)
        for each in violations
    ]  # fmt: skip


def only(
    policy: SnapshotAcceptancePolicy, *values: SnapshotValue[Any]
) -> SnapshotAcceptanceViolation:
    snapshot = Snapshot("id", NOW, {each.key: each for each in values})
    (violation,) = at_once(violations_of(policy, tuple(snapshot), (), snapshot, NOW))
    return violation


class TestManyAtOnce:
    def test_what_is_told_by_the_extremes_of_all_is_what_is_told_key_by_key(self) -> None:
        chance = random.Random(7)
        freshness = (None, PolicyResolver(FreshnessPolicy(4.0, 100.0)))
        clear = 0
        for _ in range(1_000):
            rule = ResourceAcceptanceRule(
                chance.choice((None, 3.0, 8.0)),
                chance.random() < 0.5,
                chance.choice((None, 1, 3)),
                max_oldest_age_seconds=chance.choice((None, None, 3.0, 8.0)),
                allow_resting_on_stale=chance.random() < 0.8,
            )
            few = chance.choice(((), (A,), (A, B), (A, B, C)))
            kinds = (SnapshotRequirement.any_of, SnapshotRequirement.all_of)
            wanted = tuple(kind(few) for kind in kinds) if few else ()
            if not (rule.has_constraints or wanted):
                continue
            values = [value(
                key, observed_at=NOW - chance.choice((0.0, 2.0, 6.0)),
                age_seconds=chance.choice((0.0, 5.0)), stale=chance.random() < 0.2,
                authority_rank=chance.choice((0, 2, 5)),
                dependency_versions=chance.choice(({}, {}, {}, {C: "v"})),
            ) for key in chance.sample((A, B, C), chance.randint(0, 3))]  # fmt: skip
            at_once, one_by_one = (
                SnapshotAcceptancePolicy(rule, requirements=wanted),
                SnapshotAcceptancePolicy(rule, {ResourceKey("n", "other"): ANYTHING}, wanted),
            )
            for known in freshness:
                told = found(at_once, *values, freshness=known)
                assert told == found(one_by_one, *values, freshness=known)
                clear += not told
        assert 200 < clear < 1_000


class TestRules:
    def test_a_good_value_passes_every_rule(self) -> None:
        rule = ResourceAcceptanceRule(5.0, False, 3)
        good = value(A, observed_at=NOW - 5.0, authority_rank=3)
        assert found(SnapshotAcceptancePolicy(rule), good) == []

    @pytest.mark.parametrize("rule, broken_by, reason, message, facts", [
        (FRESH, value(A, stale=True, observed_at=NOW - 2.0), "stale",
            "n:a must be fresh, got a stale value observed 2 s ago",
            {"current_age_seconds": 2.0, "stale": True}),
        (YOUNG, old(A), "too_old", "n:a must be at most 5 s old, got 9 s",
            {"current_age_seconds": 9.0, "max_age_seconds": 5.0}),
        (RANKED, value(A, authority_rank=2), "insufficient_authority",
            "n:a must have an authority rank of at least 3, got 2 from source rest",
            {"authority_rank": 2, "minimum_authority_rank": 3}),
    ])  # fmt: skip
    def test_a_broken_rule_is_reported_with_what_was_asked_and_what_is(
        self, rule: Any, broken_by: Any, reason: str, message: str, facts: dict[str, Any]
    ) -> None:
        violation = only(SnapshotAcceptancePolicy(rule), broken_by)
        why = SnapshotAcceptanceReason(reason)
        assert violation == SnapshotAcceptanceViolation(why, (A,), message, key=A, **facts)

    def test_a_value_may_break_several_rules_at_once(self) -> None:
        policy = SnapshotAcceptancePolicy(ResourceAcceptanceRule(5.0, False, 3))
        assert found(policy, value(A, stale=True, age_seconds=9.0)) == [
            ("stale", A),
            ("too_old", A),
            ("insufficient_authority", A),
        ]

    def test_a_value_is_never_younger_than_when_it_was_delivered(self) -> None:
        policy = SnapshotAcceptancePolicy(YOUNG)
        assert found(policy, value(A, age_seconds=6.0, observed_at=NOW + 60.0)) == [("too_old", A)]
        assert found(policy, value(A, age_seconds=1.0, observed_at=NOW + 60.0)) == []

    def test_a_value_that_went_stale_since_delivery_counts_as_stale(self) -> None:
        policy = SnapshotAcceptancePolicy(FRESH)
        delivered = value(A, observed_at=NOW - 3.0, age_seconds=0.0)
        assert found(policy, delivered) == []
        for ttl, expected in ((2.9, [("stale", A)]), (3.0, [])):
            freshness = PolicyResolver(FreshnessPolicy(ttl, 60.0))
            assert found(policy, delivered, freshness=freshness) == expected

    @pytest.mark.parametrize("until, verdict", [(NOW - 1.0, [("stale", A)]), (NOW + 1.0, [])])
    def test_a_value_that_inherits_counts_as_stale_as_soon_as_an_input_does(
        self, until: float, verdict: list[tuple[str, ResourceKey]]
    ) -> None:
        grounds = Grounds(B, NOW - 9.0, B, until, inherited_at=NOW - 9.0, fresh_until=until)
        derived = value(A, dependency_versions=Dependencies({B: "1"}, grounds))
        policy = SnapshotAcceptancePolicy(FRESH)
        lasting = PolicyResolver(FreshnessPolicy(99.0, 99.0))
        assert found(policy, derived, freshness=lasting) == verdict

    def test_what_must_be_read_anew_for_everyone_is_fresh_for_whom_it_was_read(self) -> None:
        freshness = PolicyResolver(FreshnessPolicy(0.0, 60.0))
        delivered = value(A, observed_at=NOW - 0.5, age_seconds=0.0)
        assert found(SnapshotAcceptancePolicy(FRESH), delivered, freshness=freshness) == []

    def test_a_value_that_was_stale_stays_stale(self) -> None:
        freshness = PolicyResolver(FreshnessPolicy(math.inf, math.inf))
        assert found(
            SnapshotAcceptancePolicy(FRESH), value(A, stale=True), freshness=freshness
        ) == [("stale", A)]

    def test_a_missing_value_breaks_no_rule(self) -> None:
        assert found(SnapshotAcceptancePolicy(YOUNG, {A: FRESH})) == []


class TestWhichRule:
    def test_the_default_is_for_required_values_only(self) -> None:
        policy = SnapshotAcceptancePolicy(YOUNG)
        assert found(policy, old(A), old(B), required=(A,), optional=(B,)) == [("too_old", A)]

    def test_the_default_is_for_optional_ones_too_if_they_are_included(self) -> None:
        policy = SnapshotAcceptancePolicy(YOUNG, include_optional_resources=True)
        values = old(A), old(B)
        assert found(policy, *values, required=(A,), optional=(B,)) == [
            ("too_old", A),
            ("too_old", B),
        ]

    def test_a_rule_of_its_own_always_applies(self) -> None:
        policy = SnapshotAcceptancePolicy(resource_rules={B: YOUNG})
        assert found(policy, old(A), old(B), required=(A,), optional=(B,)) == [("too_old", B)]

    def test_a_rule_of_its_own_replaces_the_default(self) -> None:
        policy = SnapshotAcceptancePolicy(YOUNG, {A: ANYTHING})
        assert found(policy, old(A), old(B)) == [("too_old", B)]
        assert (policy.rule_for(A), policy.rule_for(B)) == (ANYTHING, YOUNG)


class TestRequirements:
    POLICY = SnapshotAcceptancePolicy(
        YOUNG, requirements=(SnapshotRequirement.at_least(2, [A, B, C], name="prices"),)
    )

    def judged(self, *values: SnapshotValue[Any]) -> list[tuple[Any, ...]]:
        return found(self.POLICY, *values, required=(), optional=(A, B, C))

    def test_enough_acceptable_alternatives_satisfy_it_whatever_the_others_are(self) -> None:
        assert self.judged(value(A), value(B), old(C)) == []
        assert self.judged(value(A), value(B)) == []

    def test_if_it_fails_its_rejected_alternatives_are_reported_too(self) -> None:
        assert self.judged(value(A), old(B), old(C)) == [
            ("requirement_unsatisfied", None, "prices"),
            ("too_old", B, "prices"),
            ("too_old", C, "prices"),
        ]

    def test_missing_alternatives_do_not_count_and_are_not_reported(self) -> None:
        assert self.judged(value(A)) == [("requirement_unsatisfied", None, "prices")]

    def test_the_violation_has_the_counts(self) -> None:
        policy = SnapshotAcceptancePolicy(requirements=(SnapshotRequirement.all_of([A, B]),))
        assert only(policy, value(A)) == SnapshotAcceptanceViolation(
            SnapshotAcceptanceReason.REQUIREMENT_UNSATISFIED,
            (A, B),
            "a requirement must have 2 acceptable of 2 resources, got 1",
            accepted_count=1,
            required_count=2,
        )

    def test_an_alternative_that_breaks_its_own_rule_is_reported_once(self) -> None:
        policy = SnapshotAcceptancePolicy(
            resource_rules={B: YOUNG},
            requirements=(
                SnapshotRequirement.all_of([A, B], name="one"),
                SnapshotRequirement.all_of([B, C], name="two"),
            ),
        )
        assert found(policy, value(A), old(B), value(C)) == [
            ("too_old", B),
            ("requirement_unsatisfied", None, "one"),
            ("requirement_unsatisfied", None, "two"),
        ]

    def test_an_alternative_of_two_failed_requirements_is_reported_for_the_first(self) -> None:
        policy = SnapshotAcceptancePolicy(YOUNG, requirements=(
            SnapshotRequirement.any_of([B], name="one"),
            SnapshotRequirement.any_of([B, C], name="two"),
        ))  # fmt: skip
        assert found(policy, old(B), required=(), optional=(B, C)) == [
            ("requirement_unsatisfied", None, "one"),
            ("too_old", B, "one"),
            ("requirement_unsatisfied", None, "two"),
        ]


class TestMaking:
    def test_a_requirement_counts_each_key_once(self) -> None:
        requirement = SnapshotRequirement.all_of(iter([A, B, A]), name="pair")
        assert requirement == SnapshotRequirement([A, B], minimum_count=2, name="pair")
        assert SnapshotRequirement.any_of([A, B]).minimum_count == 1
        assert SnapshotRequirement.at_least(2, [A, B, C]).minimum_count == 2

    @pytest.mark.parametrize(
        "make, error, name",
        [
            (lambda: SnapshotRequirement.all_of([]), ValueError, "keys"),
            (lambda: SnapshotRequirement.any_of([]), ValueError, "keys"),
            (lambda: SnapshotRequirement.at_least(0, [A]), ValueError, "minimum_count"),
            (lambda: SnapshotRequirement.at_least(2, [A, A]), ValueError, "minimum_count"),
            (lambda: SnapshotRequirement.at_least(True, [A]), TypeError, "minimum_count"),
            (lambda: SnapshotRequirement.any_of("n:a"), TypeError, "keys"),  # type: ignore[arg-type]
            (lambda: SnapshotRequirement.any_of([A], name=1), TypeError, "name"),  # type: ignore[arg-type]
            (lambda: ResourceAcceptanceRule(-1), ValueError, "max_age_seconds"),
            (lambda: ResourceAcceptanceRule(math.inf), ValueError, "max_age_seconds"),
            (lambda: ResourceAcceptanceRule(True), TypeError, "max_age_seconds"),
            (lambda: ResourceAcceptanceRule(allow_stale=0), TypeError, "allow_stale"),  # type: ignore[arg-type]
            *[
                (
                    lambda bound=bound: ResourceAcceptanceRule(max_oldest_age_seconds=bound),
                    ValueError,
                    "max_oldest_age_seconds",
                )
                for bound in (-1.0, math.nan)
            ],
            (
                lambda: ResourceAcceptanceRule(allow_resting_on_stale=0),  # type: ignore[arg-type]
                TypeError,
                "allow_resting_on_stale",
            ),
            (
                lambda: ResourceAcceptanceRule(minimum_authority_rank=1.0),  # type: ignore[arg-type]
                TypeError,
                "minimum_authority_rank",
            ),
            (lambda: SnapshotAcceptancePolicy(YOUNG, [A]), TypeError, "resource_rules"),  # type: ignore[arg-type]
            (lambda: SnapshotAcceptancePolicy(YOUNG, {"a": YOUNG}), TypeError, "resource_rules"),  # type: ignore[dict-item]
            (lambda: SnapshotAcceptancePolicy(YOUNG, {A: 5}), TypeError, "resource_rules"),  # type: ignore[dict-item]
            (lambda: SnapshotAcceptancePolicy(YOUNG, {}, (A,)), TypeError, "requirements"),  # type: ignore[arg-type]
            (lambda: SnapshotAcceptancePolicy(YOUNG, {}, 5), TypeError, "requirements"),  # type: ignore[arg-type]
            (lambda: SnapshotAcceptancePolicy(5), TypeError, "default_rule"),  # type: ignore[arg-type]
            (SnapshotAcceptancePolicy, ValueError, "acceptance policy"),
            (
                lambda: SnapshotAcceptancePolicy(resource_rules={A: ANYTHING}),
                ValueError,
                "acceptance policy",
            ),
        ],
    )
    def test_everything_is_checked(self, make: Any, error: type[Exception], name: str) -> None:
        with pytest.raises(error, match=f"^{name}.* must"):
            make()

    @pytest.mark.parametrize("rule", [FRESH, YOUNG, RANKED, ResourceAcceptanceRule(0)])
    def test_a_rule_that_refuses_any_has_constraints(self, rule: ResourceAcceptanceRule) -> None:
        assert rule.has_constraints
        assert not ANYTHING.has_constraints

    def test_a_policy_references_the_keys_of_its_rules_and_requirements(self) -> None:
        policy = SnapshotAcceptancePolicy(
            resource_rules={A: YOUNG}, requirements=(SnapshotRequirement.any_of([B, C]),)
        )
        assert policy.referenced_keys == {A, B, C}
        assert SnapshotAcceptancePolicy(YOUNG).referenced_keys == frozenset()

    def test_a_policy_keeps_no_tie_to_what_it_was_made_of(self) -> None:
        rules, requirements = {A: YOUNG}, [SnapshotRequirement.any_of([B])]
        policy = SnapshotAcceptancePolicy(YOUNG, rules, requirements)  # type: ignore[arg-type]
        rules.clear()
        requirements.clear()
        assert policy.referenced_keys == {A, B}


def test_very_many_violations_are_found_and_told_in_slices() -> None:
    keys = [ResourceKey("n", "k", str(place)) for place in range(1_000)]
    snapshot = Snapshot("id", NOW, {key: old(key) for key in keys})
    rule = ResourceAcceptanceRule(max_age_seconds=1.0)
    every = SnapshotRequirement.all_of(keys, name="every")
    policy = SnapshotAcceptancePolicy(rule, requirements=(every,))
    judging = violations_of(policy, keys[:500], (), snapshot, NOW)
    violations = at_once(judging)
    assert len(violations) == 500 + 1 + 500
    assert (
        len(list(violations_of(policy, keys[:500], (), snapshot, NOW))) >= (500 + 2 * 1_000) / 128
    )
    made = not_accepted(violations, snapshot)
    assert len(list(made)) >= (1_001 + 1_000) / 128
    error = at_once(not_accepted(violations, snapshot))
    same = SnapshotAcceptanceError(violations=violations, snapshot=snapshot)
    assert str(error) == str(same)
    assert error.to_dict() == same.to_dict()
    assert (error.violations, error.snapshot) == (violations, snapshot)
    assert error.__cause__ is error.errors[keys[0]]


def test_requirements_that_many_values_meet_are_judged_in_slices() -> None:
    keys = [ResourceKey("n", "k", str(place)) for place in range(200)]
    snapshot = Snapshot("id", NOW, {key: value(key) for key in keys})
    requirements = tuple(SnapshotRequirement.any_of(keys[place:]) for place in range(200))
    policy = SnapshotAcceptancePolicy(requirements=requirements)
    judging = violations_of(policy, keys, (), snapshot, NOW)
    assert len(list(judging)) == 200
