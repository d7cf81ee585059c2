"""A snapshot is an immutable mapping that also knows what it lacks."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from coalestra.concurrency.pace import at_once
from coalestra.core.errors import (
    CoalestraError,
    DependencyCycleError,
    PayloadIsolationError,
    ResourceAbsentError,
    ResourceResolutionError,
    SnapshotDeadlineExceededError,
    SourceFailure,
    SourceUnavailableError,
    folded_message,
)
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext, Snapshot, SnapshotDiagnostics, snapshot_of
from coalestra.core.trace import KeyTrace, Obtained, Trace, pending_trace
from coalestra.core.values import Revision, SnapshotValue, dependencies_on

A, B, C = (ResourceKey("n", name) for name in "abc")


def value(key: ResourceKey, payload: Any, *, stale: bool = False) -> SnapshotValue[Any]:
    return SnapshotValue(key, payload, "rest", 1.0, 1.0, 0.0, stale, False, 0.0)


ERROR = LookupError("c")
SNAPSHOT = Snapshot(
    "id-1", 9.0, {B: value(B, "b", stale=True), A: value(A, 1)}, {C: ERROR}, SnapshotDiagnostics()
)


def test_it_is_a_mapping_in_the_order_of_the_request() -> None:
    assert isinstance(SNAPSHOT, Mapping)
    assert (list(SNAPSHOT), len(SNAPSHOT)) == ([B, A], 2)
    assert (A in SNAPSHOT, C in SNAPSHOT) == (True, False)
    assert SNAPSHOT[A].value == 1
    assert [item.value for item in SNAPSHOT.values()] == ["b", 1]
    assert SNAPSHOT.get(C) is None
    with pytest.raises(KeyError):
        SNAPSHOT[C]


def test_a_value_is_given_bare_and_of_the_expected_type() -> None:
    assert SNAPSHOT.value(A) == 1
    assert SNAPSHOT.value(A, int) == 1
    assert SNAPSHOT.maybe_value(B, str) == "b"


def test_a_missing_value_is_a_key_error_or_none() -> None:
    with pytest.raises(KeyError):
        SNAPSHOT.value(C)
    with pytest.raises(KeyError):
        SNAPSHOT.value(C, int)
    assert SNAPSHOT.maybe_value(C) is None
    assert SNAPSHOT.maybe_value(C, int) is None


def test_the_key_error_of_a_failed_key_is_told_to_come_of_its_failure() -> None:
    error = SourceUnavailableError("down")
    snapshot = Snapshot("id", 1.0, {}, {C: error})
    for look in (snapshot.value, snapshot.__getitem__):
        with pytest.raises(KeyError) as caught:
            look(C)
        assert caught.value.args == (C,)
        assert caught.value.__cause__ is error


def test_a_value_of_another_type_is_a_type_error_that_names_the_key() -> None:
    for read in (SNAPSHOT.value, SNAPSHOT.maybe_value):
        with pytest.raises(TypeError) as caught:
            read(A, str)
        assert str(caught.value) == "value of n:a must be a str, got one of type int"


def test_the_error_about_a_type_names_every_type_that_would_do_and_never_the_payload() -> None:
    snapshot = Snapshot("id", 1.0, {A: value(A, {"card": "4111"})})
    kinds: tuple[tuple[Any, str], ...] = (((int, str), "an int or a str"), (int | str, "int | str"))
    for kind, said in kinds:
        with pytest.raises(TypeError) as caught:
            snapshot.value(A, kind)
        assert said in str(caught.value)
        assert "4111" not in str(caught.value)


@pytest.mark.parametrize("kind", [list[int], "int", (str, None), 5])
def test_what_is_no_type_is_not_taken_for_a_value_of_the_wrong_one(kind: Any) -> None:
    for read in (SNAPSHOT.value, SNAPSHOT.maybe_value):
        with pytest.raises(
            TypeError, match="^expected_type must be a type, or several of them, got"
        ):
            read(A, kind)


@pytest.mark.parametrize("wrong, error, rule", [
    *[({"created_at": x}, ValueError, "a finite") for x in (math.nan, math.inf, -math.inf)],
    *[({"created_at": x}, TypeError, "a finite number") for x in (None, True, "1")],
    *[({"resources": x}, TypeError, "a mapping") for x in (None, 5, "x", [A])],
    *[({"errors": x}, TypeError, "a mapping") for x in (5, "x", [A])],
])  # fmt: skip
def test_what_is_no_time_and_no_mapping_is_refused_by_name(
    wrong: dict[str, Any], error: type[Exception], rule: str
) -> None:
    arguments: dict[str, Any] = {"created_at": 1.0, "resources": {}, **wrong}
    with pytest.raises(error, match=f"^{next(iter(wrong))} must be {rule}"):
        Snapshot("id", **arguments)


def test_what_a_caller_tells_sources_is_not_printed() -> None:
    context = FetchContext(1.0, metadata={"token": "secret"})
    assert "secret" not in repr(context)
    assert "requested_at=1.0" in repr(context)


def test_a_value_that_is_none_is_not_a_missing_one() -> None:
    snapshot = Snapshot("id", 1.0, {A: value(A, None)})
    assert snapshot.value(A) is None
    with pytest.raises(TypeError):
        snapshot.maybe_value(A, int)


def test_errors_are_found_by_key_and_make_it_incomplete() -> None:
    assert SNAPSHOT.error_for(C) is ERROR
    assert SNAPSHOT.error_for(A) is None
    assert not SNAPSHOT.complete
    assert Snapshot("id", 1.0, {}).complete


def test_stale_keys_are_those_of_stale_values() -> None:
    assert SNAPSHOT.stale_keys == (B,)


def test_it_cannot_be_changed_through_anything_it_was_made_of() -> None:
    resources, errors = {A: value(A, 1)}, {B: Exception()}
    snapshot = Snapshot("id", 1.0, resources, errors)
    resources.clear()
    errors.clear()
    assert (len(snapshot), snapshot.complete) == (1, False)
    with pytest.raises(TypeError):
        snapshot.resources[A] = value(A, 2)  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.errors = {}  # type: ignore[misc]


def test_frozen_mappings_are_taken_over_as_they_are() -> None:
    resources = FrozenDict({A: value(A, 1)})
    assert Snapshot("id", 1.0, resources).resources is resources


@pytest.mark.parametrize("record", [
    SNAPSHOT, Snapshot("id", 1.0, {A: value(A, [1])}), FetchContext(1.0, 2.0, 3.0, {"a": 1}, "id"),
    SNAPSHOT.diagnostics,
    SnapshotDiagnostics(cache_hits=3, source_latency_ms_by_source={"rest": 1.5}), SNAPSHOT[A],
])  # fmt: skip
def test_every_record_of_a_snapshot_can_be_copied_pickled_and_replaced(record: Any) -> None:
    alike = [copy.copy(record), dataclasses.replace(record)]
    if record is not SNAPSHOT:  # its errors are equal to nothing but themselves
        alike += [copy.deepcopy(record), pickle.loads(pickle.dumps(record))]
    for twin in alike:
        assert type(twin) is type(record)
        assert twin == record
        with pytest.raises(dataclasses.FrozenInstanceError):
            twin.unknown = 1


def test_its_representation_counts_and_shows_no_payload() -> None:
    assert repr(SNAPSHOT) == "Snapshot(snapshot_id='id-1', resources=2, errors=1, stale=1)"


class Opaque:
    def __repr__(self) -> str:
        raise AssertionError("repr may hold secrets")


def test_its_json_form_tells_where_values_come_from_and_not_what_they_are() -> None:
    secret = value(A, {"card": "4111"})
    told = Snapshot("id", 9.0, {A: secret, B: value(B, "b", stale=True)}).to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert "4111" not in json.dumps(told)
    assert (told["schema"], told["schema_version"]) == ("coalestra.snapshot", 1)
    assert (told["snapshot_id"], told["created_at"]) == ("id", "1970-01-01T00:00:09.000000+00:00")
    assert (told["complete"], list(told["resources"])) == (True, ["n:a", "n:b"])
    assert told["resources"]["n:b"]["stale"] is True
    assert told["diagnostics"]["observation_skew_ms"] == 0.0


def test_its_json_form_has_the_payloads_and_metadata_if_asked_for() -> None:
    held = {"at": math.nan, "who": Opaque()}
    shown = SnapshotValue(A, held, "rest", 1.0, 1.0, 0.0, False, False, 0.0, metadata={"etag": "x"})
    told = Snapshot("id", 9.0, {A: shown}).to_dict(include_values=True)["resources"]["n:a"]
    assert told["value"] == {"at": "nan", "who": f"{__name__}.Opaque"}
    assert told["metadata"] == {"etag": "x"}
    assert told == shown.to_dict(include_value=True)
    with pytest.raises(TypeError, match="^include_values must be"):
        Snapshot("id", 9.0, {}).to_dict(include_values=1)  # type: ignore[arg-type]


def test_keys_with_one_text_have_an_entry_each_in_the_json_form() -> None:
    first, second = ResourceKey("n", "a:b"), ResourceKey("n", "a", "b")
    assert str(first) == str(second)
    told = Snapshot("id", 9.0, {first: value(first, 1)}, {second: ERROR}).to_dict()
    assert (list(told["resources"]), list(told["errors"])) == ([first.canonical], ["n:a:b"])
    assert told["complete"] is False


def failed(*kinds: str) -> ResourceResolutionError:
    return ResourceResolutionError(A, tuple(SourceFailure("rest", kind, "no", 2) for kind in kinds))


@pytest.mark.parametrize("error, kind, reason, failures", [
    (ERROR, "LookupError", "failure", 0), (failed(), "ResourceResolutionError", "unsupported", 0),
    (failed("ValueError", "CircuitOpenError"), "ResourceResolutionError", "circuit_open", 2),
    (failed("StaleSourceData"), "ResourceResolutionError", "stale", 1),
    (failed("SnapshotDeadlineExceededError"), "ResourceResolutionError", "deadline", 1),
    (SnapshotDeadlineExceededError("late"), "SnapshotDeadlineExceededError", "deadline", 0),
    (DependencyCycleError((A, B, A)), "DependencyCycleError", "dependency_cycle", 0),
    (PayloadIsolationError(context="delivery", value_type="x.Y"), "PayloadIsolationError",
        "payload", 0),
    (CoalestraError("else"), "CoalestraError", "failure", 0),
])  # fmt: skip
def test_an_error_in_the_json_form_has_type_message_and_a_word_for_the_reason(
    error: Exception, kind: str, reason: str, failures: int
) -> None:
    told = Snapshot("id", 9.0, {}, {A: error}).to_dict()["errors"]["n:a"]
    assert (told["resource"], told["type"], told["reason"]) == ("n:a", kind, reason)
    assert told["message"] == folded_message(str(error))
    assert len(told["failures"]) == failures


# What was done for it ----------------------------------------------------------------------------


def with_trace(trace: Any) -> Snapshot:
    """A snapshot as the engine makes one that was traced."""
    snapshot = snapshot_of("b1", 9.0, SNAPSHOT.resources, SNAPSHOT.errors)  # type: ignore[arg-type]
    vars(snapshot)["_trace"] = trace
    return snapshot


A_TRACE = Trace("b1", "build", None, 9.0, 0.1, keys={A: KeyTrace(A, Obtained.CACHE, 0.0, 0.001)})


def test_a_snapshot_has_a_trace_only_if_it_was_traced() -> None:
    assert SNAPSHOT.trace is None
    assert snapshot_of("b1", 9.0, FrozenDict()).trace is None
    assert with_trace(A_TRACE).trace is A_TRACE


def test_what_was_noted_becomes_a_trace_once_when_somebody_asks() -> None:
    made: list[Mapping[ResourceKey, KeyTrace]] = []

    def records() -> dict[str, Any]:
        made.append(A_TRACE.keys)
        rest: dict[str, Any] = {"stages": (), "calls": (), "omitted_keys": 0, "omitted_stages": 0}
        return {"keys": made[-1], **rest}

    snapshot = with_trace(pending_trace(records, "b1", "build", None, 9.0, 0.1))
    assert made == []
    assert snapshot.trace is snapshot.trace
    assert snapshot.trace == A_TRACE
    assert len(made) == 1


def test_a_trace_goes_with_copies_and_pickles_of_its_snapshot() -> None:
    first = with_trace(A_TRACE)
    for twin in (copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert twin.trace == A_TRACE
        assert twin.resources == SNAPSHOT.resources


def test_a_traced_snapshot_explains_its_keys_by_the_trace() -> None:
    traced = with_trace(A_TRACE)
    age = "It was observed 0 ms before it was delivered."
    assert traced.explain(A) == f"{A_TRACE.explain(A)} {age}"
    needed = replace(A_TRACE, keys={C: KeyTrace(C, Obtained.FAILED, 0.0, 0.001)})
    assert with_trace(needed).explain(C) == needed.explain(C)


def test_a_key_that_the_trace_had_no_room_for_is_explained_by_its_value() -> None:
    text = with_trace(A_TRACE).explain(B)
    assert text.startswith("n:b was acquired (from 'rest', version ")
    assert text.endswith("The trace had no room for more.")


def told(**facts: Any) -> str:
    """What a snapshot without a trace says of a value, without its first and last sentence."""
    given: dict[str, Any] = {
        "value": "secret", "source": "rest", "observed_at": 1.0, "fetched_at": 1.0,
        "age_seconds": 2.0, "stale": False, "from_cache": False, "latency_ms": 12.0,
        "version": "v1", **facts,
    }  # fmt: skip
    text = Snapshot("id", 9.0, {A: SnapshotValue(A, **given)}).explain(A)
    assert text.endswith(" Built with trace=True, it tells more.")
    assert "secret" not in text
    return text.removesuffix(" Built with trace=True, it tells more.")


def test_without_a_trace_a_value_tells_what_it_knows_itself() -> None:
    assert told() == (
        "n:a was acquired (from 'rest', version v1). Its source took 1 attempt and 12.0 ms. It was "
        "observed 2.00 s before it was delivered."
    )
    assert told(from_cache=True, stale=True, attempts=3) == (
        "n:a was in the cache (from 'rest', version v1). Its source took 3 attempts and 12.0 ms. "
        "It was observed 2.00 s before it was delivered and is stale, as that is too long."
    )
    assert "It was published." in told(attempts=0)
    assert "It rests on 2 values: n:b, n:c." in told(dependency_versions={B: "v2", C: "v3"})
    for fact, sentence in (
        (
            {"fallback_error_type": "TimeoutError", "fallback_error": "late\n"},
            "It stands in for what failed: TimeoutError: late.",
        ),
        ({"coalesced_request": True}, "It was being acquired for another unit of work already."),
        ({"refresh_scheduled": True}, "It set off a refresh in the background."),
        ({"refresh_scheduled": False}, "A refresh of it was under way already."),
        (
            {"refresh_scheduled": True, "refresh_error_type": "OSError", "refresh_error": "gone"},
            "The last refresh of it has failed: OSError: gone.",
        ),
    ):
        assert sentence in told(metadata=fact)


def derived(until: float, *, inherits: bool) -> str:
    """What is said of a value, 2 s old, that rests on one of 9 s which is fresh until then."""
    facts: dict[str, Any] = {"observed_at": 91.0, "fetched_at": 91.0, "version": "v"}
    below = Revision(B, 1, None, "rest", **facts)
    rests = at_once(dependencies_on([(below, until)], inherits=inherits))
    times = {"observed_at": 91.0} if inherits else {}
    age = 9.0 if inherits else 2.0
    stale = inherits and until < 100.0
    given = {"observed_at": 98.0, "fetched_at": 98.0, "age_seconds": age, "stale": stale, **times}
    return told(dependency_versions=rests, **given)


def test_a_derived_value_tells_what_is_old_or_stale_below_it() -> None:
    assert derived(200.0, inherits=False).endswith(
        "It was observed 2.00 s before it was delivered. The oldest of what it rests on is n:b."
    )
    assert "n:b, which it rests on, is stale." in derived(95.0, inherits=False)
    assert "delivered and is stale, as n:b below it is." in derived(95.0, inherits=True)
    assert "stale" not in derived(200.0, inherits=True)


def test_without_a_trace_an_error_tells_what_it_knows_itself() -> None:
    assert SNAPSHOT.explain(C) == (
        "n:c has no value: LookupError: c. Built with trace=True, it tells more."
    )
    failures = (SourceFailure("a", "OSError", "no route", 2), SourceFailure("b", "Gone", "x", 0))
    failed = Snapshot("id", 9.0, {}, {C: ResourceResolutionError(C, failures)})
    assert failed.explain(C) == (
        "n:c has no value, as no source had one. 'a' failed in 2 attempts: OSError: no route. 'b' "
        "was not called: Gone: x. Built with trace=True, it tells more."
    )
    absence = (SourceFailure("a", "ResourceAbsent", "delisted"),)
    absent = Snapshot("id", 9.0, {}, {C: ResourceAbsentError(C, absence)})
    assert absent.explain(C).startswith(
        "n:c has no value, as it does not exist. 'a' said that there is none: ResourceAbsent: del"
    )
    nobody = Snapshot("id", 9.0, {}, {C: ResourceResolutionError(C, ())})
    assert "n:c has no value: ResourceResolutionError: cannot resolve n:c: no" in nobody.explain(C)


def test_what_was_not_asked_for_is_a_key_error() -> None:
    for snapshot in (SNAPSHOT, with_trace(A_TRACE)):
        with pytest.raises(TypeError, match="key must be a ResourceKey, got 'n:d'"):
            snapshot.explain("n:d")  # type: ignore[arg-type]  # that is the point
        with pytest.raises(KeyError, match="n:d was not asked for"):
            snapshot.explain(ResourceKey("n", "d"))
