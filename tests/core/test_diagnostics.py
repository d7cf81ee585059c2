"""Diagnostics are counted in the open and handed out frozen."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from coalestra.core.snapshot import DiagnosticsRecorder, SnapshotDiagnostics


def test_the_recorder_counts_exactly_what_the_diagnostics_report() -> None:
    frozen = [(item.name, item.type) for item in dataclasses.fields(SnapshotDiagnostics)]
    counted = DiagnosticsRecorder.__annotations__
    assert list(counted.items()) == frozen[:-2]
    assert list(vars(DiagnosticsRecorder())) == [name for name, _ in frozen[-2:]]


def test_every_counter_of_a_recorder_comes_out_frozen() -> None:
    recorder = DiagnosticsRecorder()
    for number, name in enumerate(DiagnosticsRecorder.__annotations__, 1):
        setattr(recorder, name, number)
    frozen = dataclasses.astuple(recorder.freeze())
    assert frozen[:-2] == tuple(range(1, len(frozen) - 1))


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


def test_overrides_replace_single_counters() -> None:
    recorder = DiagnosticsRecorder()
    recorder.cache_hits = 4
    frozen = recorder.freeze(requested_resources=7, duration_ms=1.5)
    assert (frozen.cache_hits, frozen.requested_resources, frozen.duration_ms) == (4, 7, 1.5)


def test_an_override_of_no_counter_is_refused() -> None:
    with pytest.raises(TypeError, match="cache_hit"):
        DiagnosticsRecorder().freeze(cache_hit=1)


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
