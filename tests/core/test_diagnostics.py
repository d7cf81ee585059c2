"""Diagnostics are counted in the open and handed out frozen."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest

from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import DiagnosticsRecorder, Snapshot, SnapshotDiagnostics, snapshot_of
from coalestra.core.values import SnapshotValue


def reported(recorder: DiagnosticsRecorder, **facts: Any) -> SnapshotDiagnostics:
    """What the diagnostics of a snapshot say that was made while this was counted."""
    return snapshot_of("id", 1.0, EMPTY, EMPTY, recorder.counted(**facts)).diagnostics


def test_every_counter_of_a_recorder_is_reported() -> None:
    recorder = DiagnosticsRecorder()
    told_by_the_values = {"stale_values", "observation_skew_ms"}
    names = [item.name for item in dataclasses.fields(SnapshotDiagnostics)][:-2]
    counters = [name for name in names if name not in told_by_the_values]
    for number, name in enumerate(counters, 1):
        setattr(recorder, name, number)
    frozen = reported(recorder)
    assert [getattr(frozen, name) for name in counters] == list(range(1, len(counters) + 1))


def test_what_is_no_counter_cannot_be_counted() -> None:
    with pytest.raises(AttributeError):
        DiagnosticsRecorder().cache_hit += 1


def test_a_fresh_recorder_reports_default_diagnostics() -> None:
    assert reported(DiagnosticsRecorder()) == SnapshotDiagnostics()
    assert snapshot_of("id", 1.0, EMPTY).diagnostics == SnapshotDiagnostics()


def test_what_is_reported_counts_no_further() -> None:
    recorder = DiagnosticsRecorder()
    recorder.source_calls += 2
    recorder.source_calls_by_source["rest"] = 2
    snapshot = snapshot_of("id", 1.0, EMPTY, EMPTY, recorder.counted(cache_hits=7))
    recorder.source_calls += 1
    recorder.source_calls_by_source["rest"] = 3
    frozen = snapshot.diagnostics
    assert (frozen.source_calls, dict(frozen.source_calls_by_source)) == (2, {"rest": 2})
    assert frozen.cache_hits == 7
    assert reported(recorder).source_calls_by_source == {"rest": 3}


def resources(*observed: float) -> FrozenDict[ResourceKey, SnapshotValue[int]]:
    keys = [ResourceKey("n", "k", str(number)) for number in range(len(observed))]
    return FrozenDict(
        {
            key: SnapshotValue(key, 1, "rest", at, at, 0.0, at < 2.0, False, 0.0)
            for key, at in zip(keys, observed, strict=True)
        }
    )


def test_the_values_of_a_snapshot_tell_how_many_are_stale_and_how_far_apart_they_lie() -> None:
    frozen = snapshot_of("id", 9.0, resources(1.0, 4.5, 1.5)).diagnostics
    assert (frozen.stale_values, frozen.observation_skew_ms) == (2, 3500.0)
    alone = snapshot_of("id", 9.0, resources(3.0)).diagnostics
    assert (alone.stale_values, alone.observation_skew_ms) == (0, 0.0)


def test_diagnostics_are_put_together_once_and_survive_whatever_is_done_to_their_snapshot() -> None:
    for touch in (False, True):
        snapshot = snapshot_of("id", 9.0, resources(1.0, 3.0))
        if touch:
            assert snapshot.diagnostics is snapshot.diagnostics
        for twin in (pickle.loads(pickle.dumps(snapshot)), copy.deepcopy(snapshot)):
            assert twin == snapshot
            assert twin.diagnostics == snapshot.diagnostics
        assert dataclasses.replace(snapshot, snapshot_id="other").diagnostics.stale_values == 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            snapshot.diagnostics = SnapshotDiagnostics()  # type: ignore[misc]


def test_a_snapshot_has_no_attribute_that_is_none_of_its_own() -> None:
    for snapshot in (snapshot_of("id", 9.0, EMPTY), Snapshot("id", 9.0, {})):
        assert not hasattr(snapshot, "diagnostic")
        with pytest.raises(AttributeError, match="'unknown'"):
            snapshot.unknown  # type: ignore[attr-defined]  # noqa: B018


def test_the_json_form_has_every_field_under_its_name() -> None:
    told = SnapshotDiagnostics(retries=2, source_calls_by_source={"rest": 3}).to_dict()
    assert list(told) == [field.name for field in dataclasses.fields(SnapshotDiagnostics)]
    assert (told["retries"], told["source_calls_by_source"]) == (2, {"rest": 3})
    assert json.loads(json.dumps(told)) == told
