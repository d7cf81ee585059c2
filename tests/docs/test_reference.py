"""The reference pages leave out nothing that the library has, and invent nothing."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from typing import Any

import pytest

import coalestra
from coalestra import Obtained, WaitReason
from coalestra import inspect as live_page
from coalestra._telemetry import COUNTERS, OBSERVATIONS
from coalestra.observability import FAILURES
from coalestra.orchestration.builder import BuilderSettings
from tests.docs import public_names
from tests.docs.pages import ROOT
from tests.observability.recording import EVENTS
from tests.support import PUBLIC
from tests.support.traces import EVERYTHING

REFERENCE = ROOT / "docs" / "reference"


def text_of(page: str) -> str:
    return (REFERENCE / page).read_text(encoding="utf-8")


def first_cells(page: str) -> set[str]:
    """Every name in code type in the first cell of a table row."""
    rows = re.findall(r"^\| ([^|]+) \|", text_of(page), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w]+)`", row)}


def test_every_public_error_has_its_entry() -> None:
    public = {
        name
        for name in PUBLIC
        if inspect.isclass(kind := getattr(coalestra, name)) and issubclass(kind, Exception)
    }
    headings = set(re.findall(r"^### (\w+)$", text_of("errors.md"), re.MULTILINE))
    assert headings == public - {"CoalestraError"}
    tree = {name for name in public if re.search(rf"^[│├└─ ]*{name}\b", text_of("errors.md"), re.M)}
    assert tree == public


def test_every_metric_and_event_that_can_be_reported_has_its_row() -> None:
    metrics = COUNTERS.keys() | OBSERVATIONS.keys()
    assert first_cells("metrics.md") == metrics | EVENTS.keys()
    failures = text_of("metrics.md").partition("and these failures:")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", failures)) == FAILURES


def test_every_count_of_the_diagnostics_is_named() -> None:
    fields = {field.name for field in dataclasses.fields(coalestra.SnapshotDiagnostics)}
    page = text_of("metrics.md").partition("## Diagnostics of a snapshot")[2]
    assert set(re.findall(r"`(\w+)`", page)) == fields


def test_every_key_of_the_json_form_of_a_snapshot_result_or_trace_has_its_row() -> None:
    key = coalestra.ResourceKey("n", "a")
    value = coalestra.SnapshotValue(key, 1, "rest", 1.0, 1.0, 0.0, False, False, 0.0)
    snapshot = coalestra.Snapshot("id", 1.0, {key: value}, {key: ValueError()})
    told = snapshot.to_dict(include_values=True)
    of_value, of_error = told["resources"]["n:a"], told["errors"]["n:a"]
    of_request = coalestra.RequestResult(coalestra.SnapshotRequest(required=[key]), snapshot)
    documented = {*told, *of_value, *of_error, *of_request.to_dict()}
    trace = EVERYTHING.to_dict()
    of_call = trace["calls"][0]
    documented |= {
        *trace,
        *trace["keys"]["risk:exposure:desk-7"],
        *of_call,
        *of_call["attempts"][0],
    }
    assert documented == first_cells("json.md")
    assert all(f"`{each.value}`" in text_of("json.md") for each in (*Obtained, *WaitReason))


def test_every_setting_of_a_builder_has_its_row() -> None:
    parameters = set(inspect.signature(coalestra.SnapshotBuilder).parameters) - {"sources"}
    assert {field.name for field in dataclasses.fields(BuilderSettings)} < parameters
    assert parameters <= first_cells("settings.md")


def test_every_setting_of_sources_and_facades_has_its_row() -> None:
    kinds = (
        coalestra.CallableSource, coalestra.CallableBatchSource, coalestra.CallableDerivedSource,
        coalestra.AsyncMemoryCache, coalestra.SyncSnapshotBuilder,
    )  # fmt: skip
    made: tuple[Any, ...] = (*kinds, live_page.app, live_page.serve)
    parameters = {name for each in made for name in inspect.signature(each).parameters}
    assert parameters - {"builder", "application"} <= first_cells("settings.md")


def test_every_reason_of_health_is_explained() -> None:
    page = (ROOT / "docs" / "how-to" / "health.md").read_text(encoding="utf-8")
    explained = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(explained) == sorted(reason.value for reason in coalestra.BuilderHealthReason)


@pytest.mark.parametrize("package", public_names.PACKAGES)
def test_every_public_name_is_in_one_table_of_the_public_api(package: str) -> None:
    if package == "coalestra.redis":
        pytest.importorskip("redis")
        pytest.importorskip("msgspec")
    if package == "coalestra.prometheus":
        pytest.importorskip("prometheus_client")
    if package == "coalestra.opentelemetry":
        pytest.importorskip("opentelemetry")
    found = public_names.sections(public_names.PAGE.read_text(encoding="utf-8"))
    listed = [name for section in found if section.package == package for name in section.names]
    remedy = "put | `name` | into a table; python -m tests.docs.public_names --write"
    assert sorted(listed) == sorted(importlib.import_module(package).__all__), remedy


def test_a_public_name_without_a_docstring_is_refused() -> None:
    with pytest.raises(ValueError, match="json.decoder must have a docstring"):
        public_names.meaning("json", "decoder")
