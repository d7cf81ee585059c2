"""A request says what must be there, what may be, and under which rules."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import traceback
from typing import Any

import pytest

from coalestra.core.errors import (
    ResourceAbsentError,
    ResourceResolutionError,
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SourceFailure,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.request import (
    RequestOutcome,
    RequestResult,
    ResourceAcceptanceRule,
    SnapshotAcceptancePolicy,
    SnapshotAcceptanceReason,
    SnapshotAcceptanceViolation,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
    SnapshotRequirement,
)
from coalestra.core.snapshot import Snapshot
from coalestra.core.values import SnapshotValue

A, B, C = (ResourceKey("n", name) for name in "abc")
FRESH = ResourceAcceptanceRule(allow_stale=False)


def test_keys_are_the_required_ones_and_then_the_optional_ones_each_once() -> None:
    request = SnapshotRequest(required=iter([B, A, B]), optional=[C, C])
    assert (request.required, request.optional) == ((B, A), (C,))
    assert request.keys == (B, A, C)


def test_only_required_keys_are_required() -> None:
    request = SnapshotRequest(required=[A], optional=[B])
    assert [request.is_required(key) for key in (A, B, C)] == [True, False, False]


def test_a_request_of_optional_keys_alone_is_one() -> None:
    assert SnapshotRequest(optional=[A]).keys == (A,)


def test_a_request_without_keys_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="at least one key in required or optional"):
        SnapshotRequest()


def test_a_key_in_both_groups_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no key in common, got n:b in both"):
        SnapshotRequest(required=[A, B], optional=[B, C])


@pytest.mark.parametrize("policy", [
    SnapshotAcceptancePolicy(resource_rules={C: FRESH}),
    SnapshotAcceptancePolicy(requirements=(SnapshotRequirement.any_of([A, C]),)),
])  # fmt: skip
def test_a_policy_that_names_another_key_is_a_value_error(policy: SnapshotAcceptancePolicy) -> None:
    with pytest.raises(ValueError, match="^acceptance_policy must name keys of the request only"):
        SnapshotRequest(required=[A], optional=[B], acceptance_policy=policy)
    assert SnapshotRequest(required=[A, C], acceptance_policy=policy).acceptance_policy is policy


def test_many_wrong_keys_are_not_all_named() -> None:
    many = [ResourceKey("n", str(number)) for number in range(10, 22)]
    with pytest.raises(ValueError, match="n:14 and 7 more in both"):
        SnapshotRequest(required=many, optional=many)


@pytest.mark.parametrize("settings, name", [
    ({"required": ["n:a"]}, "required"), ({"optional": A}, "optional"),
    ({"required": [A], "consistency_policy": 5.0}, "consistency_policy"),
    ({"required": [A], "acceptance_policy": FRESH}, "acceptance_policy"),
])  # fmt: skip
def test_another_type_is_a_type_error(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be"):
        SnapshotRequest(**settings)


def test_a_request_is_frozen_compares_and_copies() -> None:
    request = SnapshotRequest(required=[A], consistency_policy=SnapshotConsistencyPolicy(1.0))
    assert request.is_required(A)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.required = ()  # type: ignore[misc]
    for twin in (pickle.loads(pickle.dumps(request)), copy.deepcopy(request)):
        assert twin == request
        assert twin.is_required(A)
    assert dataclasses.replace(request, optional=(B,)).keys == (A, B)


# What came of a request


REQUEST = SnapshotRequest(required=[A], optional=[B])
DOWN = ResourceResolutionError(B, (SourceFailure("rest", "ConnectionError", "no\nroute"),))
ABSENT = ResourceAbsentError(B, (SourceFailure("rest", "ResourceAbsent", "no row"),))


def read(key: ResourceKey, *, stale: bool = False, value: Any = 1) -> SnapshotValue[Any]:
    return SnapshotValue(key, value, "rest", 1.0, 1.0, 12.5, stale, False, 0.0)


def snapshot(*values: SnapshotValue[Any], **errors: Exception) -> Snapshot:
    failed = {ResourceKey("n", name): error for name, error in errors.items()}
    return Snapshot("id", 9.0, {each.key: each for each in values}, failed)


def violation(*keys: ResourceKey, message: str = "too old") -> SnapshotAcceptanceViolation:
    reason = SnapshotAcceptanceReason.TOO_OLD
    return SnapshotAcceptanceViolation(
        reason, keys, message, key=keys[0], max_age_seconds=5.0, input_key=C
    )


@pytest.mark.parametrize("found, outcome, reason", [
    (snapshot(read(A), read(B)), "accepted", "accepted in full"),
    (snapshot(read(A), read(B), c=DOWN), "accepted", "accepted in full"),
    (snapshot(read(A), read(B), read(C, stale=True)), "accepted", "accepted in full"),
    (snapshot(read(A), b=DOWN), "degraded",
        "accepted without 1 value: n:b [rest: ConnectionError(no route; attempts=1)]"),
    (snapshot(read(A), b=ABSENT), "accepted",
        "accepted without 1 value: n:b [rest: ResourceAbsent(no row; attempts=1)]"),
    (snapshot(read(A, stale=True), b=ABSENT), "degraded",
        "accepted without 1 value: n:b [rest: ResourceAbsent(no row; attempts=1)], and with "
        "1 stale value: n:a [12.5 s old]"),
    (snapshot(read(A, stale=True), read(B, stale=True)), "degraded",
        "accepted with 2 stale values: n:a [12.5 s old]; n:b [12.5 s old]"),
    (snapshot(read(A, stale=True), b=LookupError("x")), "degraded",
        "accepted without 1 value: n:b [LookupError(x)], and with 1 stale value: "
        "n:a [12.5 s old]"),
])  # fmt: skip
def test_what_is_missing_or_stale_degrades_it(found: Snapshot, outcome: str, reason: str) -> None:
    result = RequestResult(REQUEST, found)
    assert (result.outcome.value, result.reason) == (outcome, reason)
    assert result.require_accepted() is found


@pytest.mark.parametrize("found, error, errors, reason", [
    (snapshot(b=DOWN, a=LookupError("x")), SnapshotBuildError({A: LookupError("x")}), [A, B],
        "cannot resolve 1 resource: n:a [LookupError(x)]"),
    (None, SnapshotBuildError({A: DOWN}), [A], "cannot resolve 1 resource: n:a [rest: Conn"),
    (snapshot(read(A), b=DOWN), SnapshotAcceptanceError(violations=(violation(A),)), [A, B],
        "snapshot not acceptable, 1 violation: too old"),
    (snapshot(read(A), read(B)), ValueError("x"), [], "the request failed with ValueError(x)"),
    (None, ValueError("a\nb"), [], "the request failed with ValueError(a b)"),
])  # fmt: skip
def test_an_error_rejects_a_request(
    found: Snapshot | None, error: Exception, errors: list[ResourceKey], reason: str
) -> None:
    result = RequestResult(REQUEST, found, error)
    assert result.outcome is RequestOutcome.REJECTED
    assert list(result.errors) == errors
    assert result.reason.startswith(reason)
    assert result.violations == getattr(error, "violations", ())
    with pytest.raises(type(error)) as caught:
        result.require_accepted()
    assert caught.value is error


def test_why_a_value_is_missing_is_told_before_that_it_is_missing() -> None:
    refused = SnapshotAcceptanceError(violations=(violation(A, B),))
    result = RequestResult(REQUEST, snapshot(read(A), b=DOWN), refused)
    assert result.errors == {A: refused.errors[A], B: DOWN}
    with pytest.raises(TypeError, match="read-only"):
        result.errors[C] = DOWN  # type: ignore[index]


def test_an_error_with_errors_of_another_kind_is_taken_as_it_is() -> None:
    error: Any = ValueError("x")
    error.errors, error.violations = ["one"], 3
    result = RequestResult(REQUEST, None, error)
    assert (dict(result.errors), result.violations) == ({}, ())


def test_asking_twice_for_what_was_rejected_lengthens_no_traceback() -> None:
    result = RequestResult(REQUEST, None, ValueError("x"))
    lengths = []
    for _ in range(3):
        with pytest.raises(ValueError, match="x") as caught:
            result.require_accepted()
        lengths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert lengths == [2, 2, 2]


def test_an_error_whose_text_cannot_be_read_has_a_reason_all_the_same() -> None:
    class Unreadable(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    result = RequestResult(REQUEST, None, Unreadable())
    assert "Unreadable(<message unreadable: KeyboardInterrupt>)" in result.reason
    json.dumps(result.to_dict())


def test_many_stale_values_are_not_all_named() -> None:
    keys = [ResourceKey("n", str(number)) for number in range(10, 22)]
    stale = snapshot(*(read(key, stale=True) for key in keys))
    reason = RequestResult(SnapshotRequest(required=keys), stale).reason
    assert "with 12 stale values" in reason
    assert reason.endswith("n:14 [12.5 s old]; and 7 more values")


def test_the_json_form_of_a_result_has_no_payload_unless_asked_for() -> None:
    secret = read(A, stale=True, value={"card": "4111", "at": math.nan})
    refused = SnapshotAcceptanceError(violations=(violation(A, message="too\nold"),))
    result = RequestResult(REQUEST, snapshot(secret, b=DOWN), refused)
    told = result.to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert "4111" not in json.dumps(told)
    assert (told["schema"], told["schema_version"]) == ("coalestra.request-result", 1)
    assert (told["outcome"], told["error_type"]) == ("rejected", "SnapshotAcceptanceError")
    assert (told["required"], told["optional"], told["stale"]) == (["n:a"], ["n:b"], ["n:a"])
    assert {key: each["reason"] for key, each in told["errors"].items()} == {
        "n:a": "not_acceptable",
        "n:b": "failure",
    }
    (broken,) = told["violations"]
    assert (broken["reason"], broken["message"], broken["key"], broken["keys"]) == (
        "too_old", "too old", "n:a", ["n:a"],
    )  # fmt: skip
    assert (broken["max_age_seconds"], broken["input_key"]) == (5.0, "n:c")
    assert told["snapshot"]["snapshot_id"] == "id"
    shown = result.to_dict(include_values=True)["snapshot"]["resources"]["n:a"]["value"]
    assert shown == {"card": "4111", "at": "nan"}
    with pytest.raises(TypeError, match="^include_values must be"):
        result.to_dict(include_values=1)  # type: ignore[arg-type]


def test_the_json_form_of_a_result_without_a_snapshot_says_so() -> None:
    told = RequestResult(REQUEST, None, ValueError("x" * 1_000)).to_dict()
    assert (told["snapshot"], told["error_type"], told["errors"]) == (None, "ValueError", {})
    assert len(told["reason"]) == 300
    assert RequestResult(REQUEST, snapshot(read(A), read(B))).to_dict()["error_type"] is None


def test_a_result_is_frozen_compares_and_copies_and_shows_no_payload() -> None:
    result = RequestResult(REQUEST, snapshot(read(A, value="4111"), b=DOWN))
    assert result.outcome is RequestOutcome.DEGRADED
    for name in ("snapshot", "outcome", "reason"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(result, name, None)
    for twin in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert twin.require_accepted().value(A) == "4111"
        assert (twin.outcome, twin.reason) == (result.outcome, result.reason)
    assert repr(result) == f"<RequestResult degraded: {result.reason}>"
    rejected = RequestResult(REQUEST, None, SnapshotConsistencyError(
        keys=(A, B), oldest_key=A, oldest_observed_at=0, newest_key=B, newest_observed_at=9,
        observation_skew_seconds=9, max_observation_skew_seconds=5,
    ))  # fmt: skip
    assert "must be observed within 5 s" in pickle.loads(pickle.dumps(rejected)).reason


@pytest.mark.parametrize("arguments, name", [
    ((REQUEST, None), "snapshot"), ((REQUEST, {}), "snapshot"),
    ((REQUEST, None, KeyboardInterrupt()), "error"), ((REQUEST, None, "down"), "error"),
    ((A, None, ValueError()), "request"),
])  # fmt: skip
def test_a_result_of_another_type_is_a_type_error(arguments: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be"):
        RequestResult(*arguments)
