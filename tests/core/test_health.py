"""Health is a frozen record whose JSON form holds everything and gives nothing away."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from coalestra.core.health import (
    BuilderHealth,
    PayloadCopyHealth,
    SourceTimeoutGuarantee,
    SourceTimeoutGuaranteeStatus,
)

IDLE = BuilderHealth(False, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Identity:
    source: str
    scope: str

    def __str__(self) -> str:
        return f"{self.source}/{self.scope}"


@dataclasses.dataclass(frozen=True)
class Circuit:
    state: str
    opened_at: float


class Confidential:
    def __repr__(self) -> str:
        raise AssertionError("repr may hold secrets")


def full() -> BuilderHealth:
    guarantee = SourceTimeoutGuarantee(
        "rest", SourceTimeoutGuaranteeStatus.PROTECTED, True, True, True, 1.0, 2.0
    )
    return BuilderHealth(
        closed=False, background_refreshes=1, singleflight_in_flight=2,
        source_support_cache_entries=3, cache=Confidential(),
        circuits={Identity("rest", "all"): Circuit("open", -math.inf)},
        source_timeout_guarantees={"rest": guarantee},
        payload_copy_components={"builder": PayloadCopyHealth(True, 4, average_wait_ms=math.nan)},
    )  # fmt: skip


def test_the_report_can_be_dumped_whatever_is_nested_in_it() -> None:
    report = full().to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["cache"] == f"{__name__}.Confidential"
    assert report["circuits"] == {"rest/all": {"state": "open", "opened_at": "-infinity"}}
    assert report["source_timeout_guarantees"]["rest"]["status"] == "protected"
    assert report["payload_copy_components"]["builder"]["average_wait_ms"] == "nan"


@pytest.mark.parametrize(
    "wrong", [{"previous": {}}, {"assessment_policy": 3}, {"include_assessment": 1}]
)
def test_an_argument_of_another_type_is_refused_by_name(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong)).replace("assessment_policy", "policy")
    with pytest.raises(TypeError, match=name):
        IDLE.to_dict(**wrong)


MAPPINGS = [item.name for item in dataclasses.fields(IDLE) if "Mapping" in str(item.type)]


@pytest.mark.parametrize("name", MAPPINGS)
def test_health_does_not_follow_the_mappings_it_was_made_from(name: str) -> None:
    given: dict[Any, Any] = {"rest": 1}
    changes: dict[str, Any] = {name: given}
    fact = getattr(dataclasses.replace(IDLE, **changes), name)
    given["rest"] = 2
    assert fact == {"rest": 1}
    with pytest.raises(TypeError):
        fact["rest"] = 3
