"""An application can ask what the installed version offers before it starts."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

import pytest

from coalestra import __version__
from coalestra.core.capability import CoalestraCapabilities, capabilities, require_capabilities
from coalestra.core.errors import CapabilityRequirementError
from tests.release.contract import DEFAULTS, FEATURES, SCHEMAS


def test_the_capabilities_are_those_of_this_version() -> None:
    assert capabilities().to_dict() == {
        "schema": "coalestra.capabilities", "schema_version": 1, "package_version": __version__,
        "api_stability": "0.6", "python_requires": ">=3.10", "stability": "beta",
        "features": sorted(FEATURES), "schemas": SCHEMAS, "defaults": DEFAULTS,
    }  # fmt: skip


def test_the_capabilities_can_be_dumped_pickled_and_not_changed() -> None:
    found = capabilities()
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert pickle.loads(pickle.dumps(found)) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.stability = "stable"  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.schemas["capabilities"] = 2  # type: ignore[index]


def test_a_feature_is_supported_by_its_exact_name() -> None:
    assert capabilities().supports("snapshot_requests")
    assert not capabilities().supports("snapshot_request")


def test_requirements_that_are_met_return_the_capabilities() -> None:
    assert require_capabilities() is capabilities()
    assert (require_capabilities(
        features=["snapshot_requests", "payload_copy_health"], schemas={"builder_health": 1},
    ) is capabilities())  # fmt: skip


def test_requirements_that_are_not_met_are_named_all_at_once() -> None:
    with pytest.raises(CapabilityRequirementError) as caught:
        require_capabilities(
            features=["warp", "snapshot_requests", "beam", "warp"],
            schemas={"builder_health": 2, "error_diagnostics": 1, "tides": 1},
        )
    assert caught.value.missing_features == ("warp", "beam")
    assert caught.value.schema_mismatches == {"builder_health": (2, 1), "tides": (1, None)}


def test_a_newer_schema_satisfies_an_older_requirement() -> None:
    newer = CoalestraCapabilities("9.9", schemas={"builder_health": 3})
    newer.require(schemas={"builder_health": 2})
    with pytest.raises(CapabilityRequirementError, match="'builder_health' must be version 4"):
        newer.require(schemas={"builder_health": 4})


@pytest.mark.parametrize("wrong, kind", [
    ({"features": "snapshot_requests"}, TypeError), ({"features": 3}, TypeError),
    ({"features": [3]}, TypeError), ({"schemas": ["builder_health"]}, TypeError),
    ({"schemas": {"builder_health": True}}, TypeError),
    ({"schemas": {"builder_health": "1"}}, TypeError),
    ({"schemas": {"builder_health": 0}}, ValueError), ({"schemas": {3: 1}}, TypeError),
])  # fmt: skip
def test_a_wrong_requirement_is_named(wrong: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=next(iter(wrong))):
        require_capabilities(**wrong)
