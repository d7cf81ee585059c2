"""Diagnostics are counted in the open and handed out frozen."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from coalestra.core.snapshot import DiagnosticsRecorder, SnapshotDiagnostics


def test_every_counter_of_a_recorder_comes_out_frozen() -> None:
    recorder = DiagnosticsRecorder()
    counters = [item.name for item in dataclasses.fields(SnapshotDiagnostics)][:-2]
    for number, name in enumerate(counters, 1):
        setattr(recorder, name, number)
    frozen = dataclasses.astuple(recorder.freeze())
    assert frozen[:-2] == tuple(range(1, len(frozen) - 1))


def test_what_is_no_counter_cannot_be_counted() -> None:
    with pytest.raises(AttributeError):
        DiagnosticsRecorder().cache_hit += 1


def test_a_fresh_recorder_freezes_into_default_diagnostics() -> None:
    assert DiagnosticsRecorder().freeze() == SnapshotDiagnostics()


def test_freezing_hands_out_a_copy_that_counts_no_further() -> None:
    recorder = DiagnosticsRecorder()
    recorder.source_calls += 2
    recorder.source_calls_by_source["rest"] = 2
    frozen = recorder.freeze()
    recorder.source_calls += 1
    recorder.source_calls_by_source["rest"] = 3
    assert (frozen.source_calls, dict(frozen.source_calls_by_source)) == (2, {"rest": 2})
    assert recorder.freeze().source_calls_by_source == {"rest": 3}


def test_diagnostics_cannot_be_changed() -> None:
    frozen = SnapshotDiagnostics(source_calls_by_source={"rest": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.cache_hits = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        frozen.source_calls_by_source["rest"] = 2  # type: ignore[index]


def test_diagnostics_survive_pickling_and_copying() -> None:
    frozen = SnapshotDiagnostics(cache_hits=3, source_latency_ms_by_source={"rest": 1.5})
    assert pickle.loads(pickle.dumps(frozen)) == frozen
    assert copy.deepcopy(frozen) == frozen
    assert dataclasses.replace(frozen, cache_hits=4).cache_hits == 4
