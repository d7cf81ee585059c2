"""Freshness: what the policies allow, and how ages are judged by them."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest

from coalestra.core.keys import ResourceKey
from coalestra.core.policies import (
    FreshnessPolicy,
    FutureObservation,
    ObservationPolicy,
    PolicyResolver,
    RefreshMode,
    gone_stale,
    judge_observation,
)

AHEAD = RefreshMode.REFRESH_AHEAD
KEY, OTHER = ResourceKey("n", "a"), ResourceKey("n", "b")
NOW = 1_700_000_000.0


@pytest.mark.parametrize("settings", [
    (0,), (5.0, 5), (5.0, math.inf), (math.inf, math.inf), (5.0, 5.0, True, AHEAD, 5.0),
    (math.inf, math.inf, True, AHEAD, 9.0),
])  # fmt: skip
def test_a_policy_may_have_any_bounds_in_order(settings: Any) -> None:
    assert dataclasses.astuple(FreshnessPolicy(*settings))[: len(settings)] == settings


@pytest.mark.parametrize("error, settings, said", [
    (ValueError, (5.0,), "max_stale_seconds"), (ValueError, (5.0, 4.9), "max_stale_seconds"),
    (ValueError, (-1.0,), "ttl_seconds"), (ValueError, (math.nan, 1), "ttl_seconds"),
    (ValueError, (0, math.nan), "max_stale_seconds"),
    (ValueError, (5, 9, True, RefreshMode.BLOCKING, 1), "refresh_ahead"),
    (ValueError, (5, 9, True, AHEAD, 6), "refresh_ahead_seconds"),
    (ValueError, (math.inf, math.inf, True, AHEAD, math.inf), "refresh_ahead_seconds"),
    (TypeError, (True,), "ttl_seconds must be"), (TypeError, ("5",), "ttl_seconds must be"),
    (TypeError, (0, None), "max_stale_seconds must be"),
    (TypeError, (0, 0, 1), "allow_stale_on_error must be"),
    (TypeError, (0, 0, True, "blocking"), "refresh_mode must be"),
    (TypeError, (0, 0, True, AHEAD, True), "refresh_ahead_seconds must be"),
])  # fmt: skip
def test_a_setting_out_of_bounds_or_of_another_type_is_refused_by_name(
    error: type[Exception], settings: Any, said: str
) -> None:
    with pytest.raises(error, match=f"^{said}"):
        FreshnessPolicy(*settings)


@pytest.mark.parametrize(
    "age, ttl, stale",
    [(5.0, 5.0, False), (5.1, 5.0, True), (9.0, math.inf, False), (0.1, 0.0, False)],
)
def test_a_value_goes_stale_beyond_its_time_to_live_unless_it_is_read_anew_for_everyone(
    age: float, ttl: float, stale: bool
) -> None:
    assert gone_stale(age, ttl) is stale


class TestRefreshAhead:
    POLICY = FreshnessPolicy(5.0, 9.0, refresh_mode=AHEAD, refresh_ahead_seconds=2.0)

    @pytest.mark.parametrize("age, due", [(0.0, False), (2.9, False), (3.0, True), (8.0, True)])
    def test_it_is_due_from_the_beginning_of_its_window(self, age: float, due: bool) -> None:
        assert self.POLICY.should_refresh_ahead(age) is due

    def test_it_is_never_due_for_an_infinite_time_to_live(self) -> None:
        policy = FreshnessPolicy(math.inf, math.inf, refresh_mode=AHEAD, refresh_ahead_seconds=2.0)
        assert not policy.should_refresh_ahead(1e300)

    @pytest.mark.parametrize("mode", [RefreshMode.BLOCKING, RefreshMode.STALE_WHILE_REVALIDATE])
    def test_it_is_never_due_in_another_mode(self, mode: RefreshMode) -> None:
        assert not FreshnessPolicy(5.0, 9.0, refresh_mode=mode).should_refresh_ahead(6.0)


class TestObservations:
    POLICY = ObservationPolicy(future_tolerance_seconds=1.5)

    @pytest.mark.parametrize("observed_at", [NOW - 100.0, NOW])
    def test_one_that_is_not_ahead_has_no_skew(self, observed_at: float) -> None:
        assert judge_observation(observed_at, NOW, self.POLICY) == 0.0

    @pytest.mark.parametrize("skew", [0.25, 1.5])
    def test_one_within_tolerance_is_accepted_with_its_skew(self, skew: float) -> None:
        assert judge_observation(NOW + skew, NOW, self.POLICY) == skew

    def test_the_bound_of_the_tolerance_does_not_depend_on_rounding(self) -> None:
        policy = ObservationPolicy(future_tolerance_seconds=0.2)
        for step in range(1_000):
            now = NOW + step * 0.37
            assert judge_observation(now + 0.2, now, policy) > 0.0

    def test_one_further_ahead_is_refused_with_the_facts(self) -> None:
        with pytest.raises(FutureObservation) as caught:
            judge_observation(NOW + 2.0, NOW, self.POLICY)
        error = caught.value
        assert str(error) == (
            "observed_at must be at most 1.5 s ahead of the clock, got 2 s ahead; "
            "compare the clocks, or raise future_tolerance_seconds"
        )
        assert str(pickle.loads(pickle.dumps(error))) == str(error)

    def test_milliseconds_are_told_for_what_they_are(self) -> None:
        with pytest.raises(FutureObservation, match="; give seconds since the epoch, not millis"):
            judge_observation(NOW * 1000, NOW, self.POLICY)

    def test_one_further_ahead_is_accepted_if_the_policy_rejects_none(self) -> None:
        policy = ObservationPolicy(0.0, reject_future_observations=False)
        assert judge_observation(NOW + 60.0, NOW, policy) == 60.0

    @pytest.mark.parametrize("settings, error", [
        ((-1.0,), ValueError), ((math.inf,), ValueError), ((math.nan,), ValueError),
        ((True,), TypeError), ((1.0, 1), TypeError),
    ])  # fmt: skip
    def test_a_policy_is_checked(self, settings: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            ObservationPolicy(*settings)


class TestPolicyResolver:
    DEFAULT, MINE, DYNAMIC = (FreshnessPolicy(0.0, stale) for stale in (1.0, 2.0, 3.0))

    def test_the_default_holds_where_nothing_else_does(self) -> None:
        assert PolicyResolver(self.DEFAULT).resolve(KEY) is self.DEFAULT

    def test_an_override_goes_before_the_dynamic_answer(self) -> None:
        resolver = PolicyResolver(self.DEFAULT, {KEY: self.MINE}, lambda key: self.DYNAMIC)
        assert resolver.resolve(KEY) is self.MINE
        assert resolver.resolve(OTHER) is self.DYNAMIC

    def test_a_dynamic_answer_of_none_leaves_it_to_the_default(self) -> None:
        assert PolicyResolver(self.DEFAULT, dynamic=lambda key: None).resolve(KEY) is self.DEFAULT

    def test_overrides_are_kept_apart_from_what_was_given(self) -> None:
        given = {KEY: self.MINE}
        resolver = PolicyResolver(self.DEFAULT, given)
        given.clear()
        assert resolver.resolve(KEY) is self.MINE
        assert resolver.overrides == {KEY: self.MINE}

    @pytest.mark.parametrize("arguments, name", [
        ((None,), "default"), ((DEFAULT, [1]), "overrides"),
        ((DEFAULT, {"n:a": DEFAULT}), "overrides key"),
        ((DEFAULT, {KEY: 5.0}), r"overrides\[n:a\]"), ((DEFAULT, None, 5), "dynamic"),
    ])  # fmt: skip
    def test_anything_of_another_type_is_a_type_error(self, arguments: Any, name: str) -> None:
        with pytest.raises(TypeError, match=f"^{name} must be"):
            PolicyResolver(*arguments)

    def test_a_dynamic_answer_of_another_type_is_a_type_error(self) -> None:
        resolver = PolicyResolver(self.DEFAULT, dynamic=lambda key: 5.0)  # type: ignore[arg-type, return-value]
        with pytest.raises(TypeError, match=r"^dynamic result must be a FreshnessPolicy"):
            resolver.resolve(KEY)

    def test_its_representation_tells_what_it_goes_by(self) -> None:
        text = repr(PolicyResolver(self.DEFAULT, {KEY: self.MINE}, lambda key: None))
        assert text.startswith("PolicyResolver(default=FreshnessPolicy(")
        assert text.endswith("1 overrides, dynamic)")


@dataclasses.dataclass(frozen=True)
class Labelled(FreshnessPolicy):
    label: str = ""


def test_a_default_of_a_derived_type_asks_nobody_else_to_be_of_that_type() -> None:
    plain, special = FreshnessPolicy(1.0, 2.0), Labelled(3.0, 4.0, label="slow")
    resolver = PolicyResolver(special, {KEY: plain}, lambda k: plain if k == OTHER else None)
    assert resolver.resolve(KEY) is resolver.resolve(OTHER) is plain
    assert resolver.resolve(ResourceKey("n", "c")) is special
    assert PolicyResolver(plain, {KEY: special}).resolve(KEY) is special
