"""A source's declaration about blocking is judged by one table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coalestra.core.health import SourceTimeoutGuarantee, inspect_source_timeout_guarantee


def source(**declared: Any) -> Any:
    return SimpleNamespace(name="rest", **declared)


def blocking(**declared: Any) -> Any:
    return source(blocking_io=True, **declared)


TABLE = [
    (source(), "undeclared"), (source(timeout_seconds=1.0), "undeclared"),
    (source(blocking_io=False), "non_blocking"),
    (source(blocking_io=False, blocking_io_offloaded=True), "non_blocking"),
    (blocking(), "unsafe_not_offloaded"),
    (blocking(blocking_io_offloaded=False, transport_timeout_seconds=1), "unsafe_not_offloaded"),
    (blocking(blocking_io_offloaded=True), "unsafe_timeout_missing"),
    (blocking(blocking_io_offloaded=True, timeout_seconds=2.0), "unsafe_timeout_missing"),
    (blocking(blocking_io_offloaded=True, transport_timeout_seconds=1.0), "protected"),
    (blocking(blocking_io_offloaded=True, transport_timeout_seconds=1.0, timeout_seconds=1.5),
        "protected"),
    (blocking(blocking_io_offloaded=True, transport_timeout_seconds=1.5, timeout_seconds=1.5),
        "unsafe_timeout_not_within_source"),
    (blocking(blocking_io_offloaded=True, transport_timeout_seconds=2.0, timeout_seconds=1.5),
        "unsafe_timeout_not_within_source"),
]  # fmt: skip


@pytest.mark.parametrize("declared, status", TABLE)
def test_each_declaration_has_one_verdict(declared: Any, status: str) -> None:
    found = inspect_source_timeout_guarantee(declared)
    assert found.status.value == status
    assert found.protected is (status == "protected")
    assert found.safe is (status in ("protected", "non_blocking"))
    assert found.unsafe is status.startswith("unsafe")
    assert found.declaration_present is (status != "undeclared")


def test_a_guarantee_repeats_what_was_declared() -> None:
    found = inspect_source_timeout_guarantee(
        blocking(blocking_io_offloaded=True, transport_timeout_seconds=1.0, timeout_seconds=2.0)
    )
    assert found == SourceTimeoutGuarantee("rest", found.status, True, True, True, 1.0, 2.0)


def test_a_source_without_a_name_is_called_by_its_type() -> None:
    assert inspect_source_timeout_guarantee(SimpleNamespace()).source == "SimpleNamespace"


@pytest.mark.parametrize(
    "declared", [source(transport_timeout_seconds=1.0), source(blocking_io=False)]
)
def test_a_transport_timeout_is_only_for_sources_that_block(declared: Any) -> None:
    declared.transport_timeout_seconds = 1.0
    with pytest.raises(ValueError, match="transport_timeout_seconds of source 'rest' must be None"):
        inspect_source_timeout_guarantee(declared)


@pytest.mark.parametrize("setting", ["transport_timeout_seconds", "timeout_seconds"])
@pytest.mark.parametrize("value, kind", [
    (0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    (True, TypeError), ("1", TypeError),
])  # fmt: skip
def test_a_timeout_is_a_positive_number(setting: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"{setting} of source 'rest'"):
        inspect_source_timeout_guarantee(blocking(**{setting: value}))


@pytest.mark.parametrize("setting", ["blocking_io", "blocking_io_offloaded"])
def test_a_declaration_must_be_yes_or_no(setting: str) -> None:
    with pytest.raises(TypeError, match=f"{setting} of source 'rest'"):
        inspect_source_timeout_guarantee(source(**{setting: "yes"}))
