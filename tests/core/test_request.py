"""A request says what must be there, what may be, and under which rules."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from coalestra.core.acceptance import (
    ResourceAcceptanceRule,
    SnapshotAcceptancePolicy,
    SnapshotRequirement,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotConsistencyPolicy, SnapshotRequest

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


@pytest.mark.parametrize(
    "policy",
    [
        SnapshotAcceptancePolicy(resource_rules={C: FRESH}),
        SnapshotAcceptancePolicy(requirements=(SnapshotRequirement.any_of([A, C]),)),
    ],
)
def test_a_policy_that_names_another_key_is_a_value_error(
    policy: SnapshotAcceptancePolicy,
) -> None:
    with pytest.raises(ValueError, match="^acceptance_policy must name keys of the request only"):
        SnapshotRequest(required=[A], optional=[B], acceptance_policy=policy)
    assert SnapshotRequest(required=[A, C], acceptance_policy=policy).acceptance_policy is policy


def test_many_wrong_keys_are_not_all_named() -> None:
    many = [ResourceKey("n", str(number)) for number in range(10, 22)]
    with pytest.raises(ValueError, match="n:14 and 7 more in both"):
        SnapshotRequest(required=many, optional=many)


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"required": ["n:a"]}, "required"),
        ({"optional": A}, "optional"),
        ({"required": [A], "consistency_policy": 5.0}, "consistency_policy"),
        ({"required": [A], "acceptance_policy": FRESH}, "acceptance_policy"),
    ],
)
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
