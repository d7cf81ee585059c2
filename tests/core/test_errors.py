"""Every error keeps its facts, says them in a bounded sentence, and survives copying."""

from __future__ import annotations

import builtins
import copy
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest

from coalestra.core import errors as tree
from coalestra.core.errors import (
    BuilderClosedError,
    CacheCircuitOpenError,
    CacheTimeoutError,
    CacheUnavailableError,
    CapabilityRequirementError,
    CircuitOpenError,
    CoalestraError,
    DependencyCycleError,
    DependencyResolutionError,
    ObservabilityShutdownTimeoutError,
    PayloadCopyShutdownTimeoutError,
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    ResourceAbsent,
    ResourceAbsentError,
    ResourceAcceptanceError,
    ResourceResolutionError,
    SessionClosedError,
    SnapshotAcceptanceError,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotDeadlineExceededError,
    SourceFailure,
    SourceProtocolError,
    SourceQueueTimeoutError,
    SourceTimeoutError,
    SourceUnavailableError,
    SubmissionBacklogFullError,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotAcceptanceReason, SnapshotAcceptanceViolation

PRICE = ResourceKey("market", "price", "BTC")
DEPTH = ResourceKey("market", "depth", "BTC")
REFUSED = SourceFailure("rest", "SourceUnavailableError", "refused", 2)
TOO_OLD = SnapshotAcceptanceViolation(
    SnapshotAcceptanceReason.TOO_OLD, (PRICE,), "price is 9 s old, at most 5 s", key=PRICE
)
UNMET = SnapshotAcceptanceViolation(
    SnapshotAcceptanceReason.REQUIREMENT_UNSATISFIED,
    (PRICE, DEPTH),
    "only 1 of 2",
    requirement_name="both",
)


def consistency_error() -> SnapshotConsistencyError:
    return SnapshotConsistencyError(
        keys=(PRICE, DEPTH), oldest_key=PRICE, oldest_observed_at=100.0, newest_key=DEPTH,
        newest_observed_at=103.5, observation_skew_seconds=3.5, max_observation_skew_seconds=2.0,
        snapshot="partial",
    )  # fmt: skip


SAMPLES: list[tuple[CoalestraError, str]] = [
    (SourceUnavailableError("down for repair"), "down for repair"),
    (SourceTimeoutError("too slow"), "too slow"),
    (SnapshotDeadlineExceededError("budget of 2 s"), "budget of 2 s"),
    (SourceQueueTimeoutError("no slot"), "no slot"), (CircuitOpenError("left alone"), "left alone"),
    (SourceProtocolError("not a mapping"), "not a mapping"),
    (SessionClosedError("closed"), "closed"),
    (ResourceResolutionError(PRICE, (REFUSED,)),
        "cannot resolve market:price:BTC: rest: SourceUnavailableError(refused; attempts=2)"),
    (ResourceAbsent("no such row", final=True, ttl_seconds=2), "no such row"),
    (ResourceAbsentError(PRICE, (SourceFailure("rest", "ResourceAbsent", "no such row"),)),
        "market:price:BTC does not exist: rest: ResourceAbsent(no such row; attempts=1)"),
    (DependencyCycleError((PRICE, DEPTH, PRICE)),
        "dependencies must not form a cycle, got market:price:BTC -> market:depth:BTC -> "
        "market:price:BTC; remove one of these dependencies"),
    (DependencyResolutionError(PRICE, "mid", {DEPTH: SourceTimeoutError("slow")}),
        "source 'mid' cannot derive market:price:BTC: market:depth:BTC [SourceTimeoutError(slow)]"),
    (SnapshotBuildError({PRICE: ResourceResolutionError(PRICE, (REFUSED,))}, snapshot="partial"),
        "cannot resolve 1 resource: market:price:BTC "
        "[rest: SourceUnavailableError(refused; attempts=2)]"),
    (consistency_error(),
        "2 resources must be observed within 2 s of each other, got 3.5 s between "
        "market:price:BTC (oldest) and market:depth:BTC (newest)"),
    (ResourceAcceptanceError(PRICE, (TOO_OLD,)),
        "market:price:BTC is not acceptable: price is 9 s old, at most 5 s"),
    (SnapshotAcceptanceError(violations=(TOO_OLD, UNMET), snapshot="refused"),
        "snapshot not acceptable, 2 violations: price is 9 s old, at most 5 s; only 1 of 2"),
    (CacheUnavailableError("cancelled itself"), "cancelled itself"),
    (CacheCircuitOpenError("left alone"), "left alone"),
    (CacheTimeoutError(1.0),
        "a call to the cache must end within 1 s, and did not; find out why it is slow, or give "
        "the cache timeout_seconds of its own"),
    (BuilderClosedError(),
        "the snapshot builder is closed and takes no more work; create a new one"),
    (PayloadIsolationError(context="cache write", value_type="socket", cause=TypeError("no")),
        "payloads must be copyable, got socket while copying for cache write: TypeError(no); "
        "return plain data, or copy it in payload_copier"),
    (PayloadCopySubsystemClosedError(component="cache"),
        "payload copying of the cache is closed and takes no more copies"),
    (PayloadCopyShutdownTimeoutError(
        timeout_seconds=5.0, active_components={"builder": 2, "cache": 1}),
        "payload copies must end within 5 s of closing, got 3 still active (builder: 2, cache: 1); "
        "allow more time with copy_shutdown_timeout_seconds or copy less at once"),
    (ObservabilityShutdownTimeoutError(
        timeout_seconds=0.5, pending_components={"events": 7, "metrics": 2}),
        "observability must be delivered within 0.5 s of closing, got 9 records still pending "
        "(events: 7, metrics: 2); allow more time with observability_shutdown_timeout_seconds "
        "or do not drain"),
    (ObservabilityShutdownTimeoutError(timeout_seconds=5.0, pending_components={"events": 1}),
        "observability must be delivered within 5 s of closing, got 1 record still pending "
        "(events: 1); allow more time with observability_shutdown_timeout_seconds or do not drain"),
    (SubmissionBacklogFullError(limit=8, pending=8),
        "at most 8 submissions may be pending, got 8; submit more slowly, flush, or raise "
        "max_pending_submissions"),
    (CapabilityRequirementError(missing_features=("time_travel",),
        schema_mismatches={"builder_health": (2, 1), "tides": (1, None)}),
        "the installed coalestra does not satisfy the application: feature 'time_travel' is "
        "missing; schema 'builder_health' must be version 2 or later, is version 1; schema "
        "'tides' must be version 1 or later, is absent; install another version"),
]  # fmt: skip
KINDS = pytest.mark.parametrize(
    "error", [pytest.param(error, id=type(error).__name__) for error, _ in SAMPLES]
)


def pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda error: pickle.loads(pickle.dumps(error, protocol))


TWINS = [*map(pickled, range(6)), copy.copy, copy.deepcopy]


def facts_of(error: BaseException) -> dict[str, str]:
    """What an error knows; nested errors are compared by what they say."""
    return {name: repr(fact) for name, fact in vars(error).items()}


@pytest.mark.parametrize(
    "error, sentence",
    [pytest.param(error, sentence, id=type(error).__name__) for error, sentence in SAMPLES],
)
def test_every_error_says_its_facts_in_one_sentence(error: CoalestraError, sentence: str) -> None:
    assert str(error) == sentence


def test_every_kind_of_error_has_a_sample_here() -> None:
    listed = {getattr(tree, name) for name in tree.__all__ if not name.isupper()}
    kinds = {kind for kind in listed if issubclass(kind, CoalestraError)}
    assert kinds - {CoalestraError} == {type(error) for error, _ in SAMPLES}


@KINDS
def test_every_error_survives_pickling_and_copying_with_its_facts(error: CoalestraError) -> None:
    for twin in TWINS:
        other = twin(error)
        assert other is not error
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert facts_of(other) == facts_of(error)


def test_a_copied_error_keeps_its_cause_and_grows_its_own_traceback() -> None:
    cause = ValueError("deep down")
    with pytest.raises(PayloadIsolationError) as caught:
        raise PayloadIsolationError(context="delivery", value_type="Lock") from cause
    twin = copy.copy(caught.value)
    assert twin.__cause__ is cause
    assert twin.__suppress_context__
    assert caught.value.__traceback__ is not None
    assert twin.__traceback__ is None


def test_a_copied_error_keeps_the_context_it_was_raised_in() -> None:
    with pytest.raises(SourceProtocolError) as caught:
        try:
            raise KeyError("first")
        except KeyError:
            raise SourceProtocolError("second")  # noqa: B904 - the context is what is tested
    twin = copy.copy(caught.value)
    assert isinstance(twin.__context__, KeyError)
    assert not twin.__suppress_context__


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes from 3.11 on")
def test_a_note_on_a_copy_of_an_error_is_on_that_copy_alone() -> None:
    error: Any = SourceUnavailableError("down")
    error.add_note("raised in fetch")
    one, other = copy.copy(error), copy.copy(error)
    one.add_note("while request 7 was served")
    assert one.__notes__ == ["raised in fetch", "while request 7 was served"]
    assert other.__notes__ == error.__notes__ == ["raised in fetch"]


def test_a_note_travels_with_a_pickled_error() -> None:
    error = SourceUnavailableError("down")
    error.hint = "call again"  # type: ignore[attr-defined]
    assert vars(pickle.loads(pickle.dumps(error))) == {"hint": "call again"}


@pytest.mark.parametrize("kind, parents", [
    (SourceTimeoutError, {SourceUnavailableError}),
    (SnapshotDeadlineExceededError, {SourceTimeoutError, SourceUnavailableError}),
    (SourceQueueTimeoutError, {SourceTimeoutError, SourceUnavailableError}),
    (CircuitOpenError, {SourceUnavailableError}), (SnapshotConsistencyError, {SnapshotBuildError}),
    (SnapshotAcceptanceError, {SnapshotBuildError}), (BuilderClosedError, {RuntimeError}),
])  # fmt: skip
def test_an_error_is_caught_as_what_it_is_a_case_of(
    kind: type[Exception], parents: set[type[Exception]]
) -> None:
    assert parents <= set(kind.__mro__)


@pytest.mark.parametrize(
    "kind", [SourceProtocolError, SessionClosedError, ResourceResolutionError, CoalestraError]
)
def test_what_no_retry_can_help_is_not_an_unavailable_source(kind: type[Exception]) -> None:
    assert not issubclass(kind, SourceUnavailableError)


def test_a_key_that_no_source_supports_says_so() -> None:
    error = ResourceResolutionError(PRICE, ())
    assert str(error) == "cannot resolve market:price:BTC: no compatible source"
    assert error.failures == ()
    assert error.format_failures(max_failures=1) == "no compatible source"


A, B = ResourceKey("n", "a"), ResourceKey("n", "b")


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def test_the_cause_of_a_resolution_error_is_what_the_last_source_raised() -> None:
    first, last = raised(OSError("a")), raised(KeyError("b"))
    failures = (
        SourceFailure.of("one", first),
        SourceFailure.of("two", last),
        SourceFailure("three", "StaleSourceData", "too old"),
    )
    error = ResourceResolutionError(A, failures)
    assert error.__cause__ is last
    assert error.failures[0].exception is first
    assert ResourceResolutionError(A, failures[2:]).__cause__ is None
    never_raised = CircuitOpenError("open")
    left_alone = SourceFailure.of("x", never_raised)
    assert ResourceResolutionError(A, (left_alone,)).__cause__ is never_raised
    if sys.version_info >= (3, 11):
        one, two = error.__notes__
        assert one.startswith(f"one: raised in raised ({__file__}, line ")
        assert two.startswith("two: raised in raised (")


def lower() -> None:
    raise KeyError("the culprit")


@pytest.mark.parametrize("how", ["cause", "context", "group", "none"])
def test_a_failure_tells_where_that_was_raised_that_it_was_raised_from(how: str) -> None:
    """Clients wrap what went wrong; what they hide stays hidden."""
    if how == "group" and sys.version_info < (3, 11):
        pytest.skip("groups came with Python 3.11")

    def upper() -> None:
        try:
            lower()
        except KeyError as error:
            if how == "cause":
                raise ConnectionError("wrapped") from error
            if how == "group":
                raise vars(builtins)["ExceptionGroup"]("wrapped", [error]) from None
            if how == "none":
                raise ConnectionError("wrapped") from None
            raise ConnectionError("wrapped")  # noqa: B904

    with pytest.raises(Exception, match="wrapped") as caught:
        upper()
    failure = SourceFailure.of("one", caught.value)
    text, notes = (
        failure.traceback,
        getattr(ResourceResolutionError(A, (failure,)), "__notes__", []),
    )
    assert "in upper" in text
    before, led, after = text.partition("KeyError('the culprit'), which led to:\n")
    assert bool(led) is (how != "none")
    assert ("in lower" in before) is (how != "none")
    assert "in lower" not in after
    if sys.version_info >= (3, 11):
        assert notes[0].startswith("one: raised in upper (")
        assert [note.partition(", raised in lower (")[0] for note in notes[1:]] == (
            [] if how == "none" else ["one: from KeyError('the culprit')"]
        )


def test_errors_about_many_resources_are_caused_by_the_first() -> None:
    first, second = OSError("a"), OSError("b")
    for error in (
        SnapshotBuildError({A: first, B: second}),
        DependencyResolutionError(A, "sums", {A: first, B: second}),
    ):
        assert error.__cause__ is first
    assert SnapshotBuildError({}).__cause__ is None
    with pytest.raises(SnapshotBuildError) as caught:
        raise SnapshotBuildError({A: first}) from second
    assert caught.value.__cause__ is second


def test_a_resolution_error_names_some_failures_and_counts_the_rest() -> None:
    failures = tuple(SourceFailure(f"s{n}", "KeyError", "x") for n in range(5))
    error = ResourceResolutionError(PRICE, failures)
    assert error.format_failures() == (
        "s0: KeyError(x; attempts=1); s1: KeyError(x; attempts=1); s2: KeyError(x; attempts=1); "
        "and 2 more failures"
    )
    assert error.format_failures(max_failures=4).endswith("; and 1 more failure")
    assert error.format_failures(max_failures=5).count("attempts") == 5
    assert "more" not in error.format_failures(max_failures=5)


def test_a_resolution_error_cuts_long_messages_as_asked() -> None:
    error = ResourceResolutionError(PRICE, (SourceFailure("s", "KeyError", "x" * 50),))
    assert error.format_failures(max_message_length=8) == "s: KeyError(xxxxx...; attempts=1)"


@pytest.mark.parametrize("limit", ["max_failures", "max_message_length"])
def test_a_limit_of_a_text_must_be_a_count(limit: str) -> None:
    error = ResourceResolutionError(PRICE, (REFUSED,))
    with pytest.raises(ValueError, match=limit):
        error.format_failures(**{limit: 0})
    with pytest.raises(TypeError, match=limit):
        error.format_failures(**{limit: True})


def test_a_build_error_names_five_resources_and_three_failures_of_each() -> None:
    failures = tuple(SourceFailure(f"s{n}", "KeyError", "y" * 1000) for n in range(9))
    keys = [ResourceKey("n", f"k{n:04}") for n in range(1000)]
    error = SnapshotBuildError({key: ResourceResolutionError(key, failures) for key in keys})
    text = str(error)
    assert text.startswith("cannot resolve 1000 resources: n:k0000 [s0: KeyError(")
    assert text.endswith("and 6 more failures]; and 995 more resources")
    assert (text.count("[s0"), text.count("s2: "), text.count("s3: ")) == (5, 5, 0)
    assert len(text) < 5 * (3 * 350 + 100)


def test_nested_dependency_errors_do_not_grow_with_their_depth() -> None:
    error: Exception = SourceTimeoutError("slow")
    for depth in range(3000):
        error = DependencyResolutionError(ResourceKey("n", f"k{depth}"), "mid", {PRICE: error})
    assert len(str(error)) < 500
    assert isinstance(error, DependencyResolutionError)
    assert list(error.errors) == [PRICE]


def test_a_long_cycle_is_shown_by_its_ends() -> None:
    path = tuple(ResourceKey("n", f"k{n}") for n in range(10_000))
    error = DependencyCycleError((*path, path[0]))
    assert len(error.path) == 10_001
    assert "n:k4 -> (9991 more) -> n:k9996" in str(error)
    assert str(error).endswith("n:k9999 -> n:k0; remove one of these dependencies")
    named = [key for key in path if hasattr(key, "_display")]
    assert len(named) == 9, "each of them may have an error of its own"


def test_an_error_that_cannot_be_read_does_not_break_the_one_that_reports_it() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    error = SnapshotBuildError({PRICE: Mute()})
    assert "Mute(<message unreadable: RuntimeError>)" in str(error)
    assert error.to_dict()["errors"][0]["message"] == "<message unreadable: RuntimeError>"


@pytest.mark.parametrize(
    "make", [SnapshotBuildError, lambda errors: DependencyResolutionError(DEPTH, "mid", errors)]
)
def test_the_errors_within_an_error_cannot_be_changed_afterwards(
    make: Callable[[dict[ResourceKey, Exception]], SnapshotBuildError | DependencyResolutionError],
) -> None:
    given: dict[ResourceKey, Exception] = {PRICE: SourceTimeoutError("slow")}
    error = make(given)
    given.clear()
    assert list(error.errors) == [PRICE]
    with pytest.raises(TypeError):
        error.errors[DEPTH] = SourceTimeoutError("slow")  # type: ignore[index]


def test_shutdown_errors_add_up_what_is_left() -> None:
    copies = PayloadCopyShutdownTimeoutError(
        timeout_seconds=1.0, active_components={"builder": 2, "cache": 3}
    )
    records = ObservabilityShutdownTimeoutError(
        timeout_seconds=1.0, pending_components={"events": 4}
    )
    assert (copies.active_copies, records.pending_records) == (5, 4)
    assert copies.active_components == {"builder": 2, "cache": 3}
    assert records.pending_components == {"events": 4}
    assert (copies.timeout_seconds, records.timeout_seconds) == (1.0, 1.0)


def test_an_acceptance_error_holds_one_error_for_each_resource_it_names() -> None:
    error = SnapshotAcceptanceError(violations=(TOO_OLD, UNMET), snapshot="refused")
    assert error.violations == (TOO_OLD, UNMET)
    assert error.snapshot == "refused"
    price, depth = error.errors[PRICE], error.errors[DEPTH]
    assert isinstance(price, ResourceAcceptanceError)
    assert isinstance(depth, ResourceAcceptanceError)
    assert (price.key, price.violations) == (PRICE, (TOO_OLD, UNMET))
    assert (depth.key, depth.violations) == (DEPTH, (UNMET,))


def test_a_consistency_error_blames_no_single_resource() -> None:
    error = consistency_error()
    assert error.errors == {}
    assert error.keys == (PRICE, DEPTH)
    assert (error.oldest_key, error.oldest_observed_at) == (PRICE, 100.0)
    assert (error.newest_key, error.newest_observed_at) == (DEPTH, 103.5)
    assert (error.observation_skew_seconds, error.max_observation_skew_seconds) == (3.5, 2.0)
    assert error.snapshot == "partial"


def test_a_resolution_error_is_reported_as_versioned_json() -> None:
    error = ResourceResolutionError(PRICE, (SourceFailure("rest", "OSError", "a\n b", 3),))
    report = error.to_dict()
    assert report == {
        "schema": "coalestra.error-diagnostics", "schema_version": 1,
        "error_type": "ResourceResolutionError", "resource": "market:price:BTC",
        "message": "cannot resolve market:price:BTC: rest: OSError(a b; attempts=3)",
        "failures": [
            {"schema": "coalestra.error-diagnostics", "schema_version": 1, "source": "rest",
                "error_type": "OSError", "message": "a b", "attempts": 3},
        ],
    }  # fmt: skip
    assert json.loads(json.dumps(report)) == report


def test_a_build_error_is_reported_with_every_resource() -> None:
    error = SnapshotBuildError({
        PRICE: ResourceResolutionError(PRICE, (REFUSED,)),
        DEPTH: SnapshotDeadlineExceededError("z" * 400),
    }, snapshot="partial")  # fmt: skip
    report = error.to_dict(max_message_length=20)
    assert [item["resource"] for item in report["errors"]] == [str(PRICE), str(DEPTH)]
    assert [len(item["failures"]) for item in report["errors"]] == [1, 0]
    assert report["errors"][1]["error_type"] == "SnapshotDeadlineExceededError"
    assert report["errors"][1]["message"] == "z" * 17 + "..."
    assert report["message"] == "cannot resolve 2 ..."
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("snapshot, expected", [(None, False), ("partial", True), ({}, True)])
def test_both_names_of_the_partial_snapshot_flag_agree(snapshot: object, expected: bool) -> None:
    report = SnapshotBuildError({}, snapshot=snapshot).to_dict()
    assert report["partial_snapshot_available"] is expected
    assert report["has_partial_snapshot"] is expected


@pytest.mark.parametrize(
    "error",
    [consistency_error(), SnapshotAcceptanceError(violations=(TOO_OLD,), snapshot=None)],
    ids=lambda error: type(error).__name__,
)
def test_policy_errors_are_reported_under_their_own_type(error: SnapshotBuildError) -> None:
    report = error.to_dict()
    assert report["error_type"] == type(error).__name__
    assert report["message"] == str(error)
    assert json.loads(json.dumps(report)) == report


def test_what_ends_the_program_as_an_error_is_read_reaches_it() -> None:
    """Ctrl-C may strike there; whatever else a foreign class raises is nothing to anybody."""

    class Foreign(Exception):
        raises: type[BaseException] = KeyError

        @property
        def exceptions(self) -> tuple[Exception, ...]:
            raise self.raises

    tree.without_frames(Foreign())
    Foreign.raises = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        tree.without_frames(Foreign())
