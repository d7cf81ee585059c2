"""Payloads, updates, values and revisions: what they keep, refuse and compare."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import pickle
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from coalestra.core import values
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import FetchContext
from coalestra.core.values import (
    CacheLookup,
    CacheWriteResult,
    CacheWriteStatus,
    PublishResult,
    PublishStatus,
    ResourceUpdate,
    Revision,
    SnapshotValue,
    SourcePayload,
    new_id,
    next_version,
)
from tests.support.elsewhere import in_a_child, needs_fork

KEY, BASE = ResourceKey("n", "a"), ResourceKey("n", "b")


def value(**changes: Any) -> SnapshotValue[Any]:
    facts: dict[str, Any] = {
        "key": KEY, "value": [1], "source": "rest", "observed_at": 10.0, "fetched_at": 11.0,
        "age_seconds": 1.0, "stale": False, "from_cache": False, "latency_ms": 2.0,
    }  # fmt: skip
    return SnapshotValue(**{**facts, **changes})


class TestPayload:
    def test_it_has_a_value_and_nothing_else_to_say_by_default(self) -> None:
        payload = SourcePayload(5)
        assert (payload.value, payload.observed_at, payload.metadata) == (5, None, {})

    @pytest.mark.parametrize("arguments, error, name", [
        *[((5, time), ValueError, "observed_at") for time in (math.nan, math.inf, -math.inf)],
        ((5, True), TypeError, "observed_at"), ((5, "1"), TypeError, "observed_at"),
        ((5, 1, 2), TypeError, "metadata"),
    ])  # fmt: skip
    def test_it_is_checked(self, arguments: Any, error: type[Exception], name: str) -> None:
        with pytest.raises(error, match=f"^{name} must be"):
            SourcePayload(*arguments)


class TestUpdate:
    def test_it_keeps_what_it_was_given(self) -> None:
        update = ResourceUpdate(KEY, 5, "feed", 1.0, {"a": 1})
        assert (update.key, update.value, update.source) == (KEY, 5, "feed")
        assert (update.observed_at, update.metadata) == (1.0, {"a": 1})
        assert ResourceUpdate(KEY, 5, "feed").observed_at is None

    @pytest.mark.parametrize("arguments, error, name", [
        (("n:a", 5, "feed"), TypeError, "key"), ((KEY, 5, None), TypeError, "source"),
        ((KEY, 5, " "), ValueError, "source"),
        ((KEY, 5, "feed", math.nan), ValueError, "observed_at"),
        ((KEY, 5, "feed", True), TypeError, "observed_at"),
        ((KEY, 5, "feed", 1.0, [1]), TypeError, "metadata"),
    ])  # fmt: skip
    def test_it_is_checked(self, arguments: Any, error: type[Exception], name: str) -> None:
        with pytest.raises(error, match=f"^{name} must be"):
            ResourceUpdate(*arguments)

    def test_a_dataclass_made_of_it_is_checked_too(self) -> None:
        @dataclasses.dataclass(frozen=True)
        class Tick(ResourceUpdate[int]):
            sequence: int = 0

        tick = Tick(KEY, 5, "feed", metadata={"a": 1}, sequence=3)
        assert (tick.sequence, type(tick.metadata)) == (3, FrozenDict)
        with pytest.raises(ValueError, match="^source must be"):
            Tick(KEY, 5, "")


class TestValue:
    def test_all_fourteen_fields_come_in_order(self) -> None:
        given = (KEY, 5, "s", 1.0, 2.0, 3.0, True, True, 4.0, 2, {"a": 1}, 7, "v", {BASE: "w"})
        made: SnapshotValue[int] = SnapshotValue(*given)
        names = [field.name for field in dataclasses.fields(SnapshotValue)]
        assert tuple(getattr(made, name) for name in names) == given
        assert not hasattr(made, "__dict__")

    def test_defaults_are_one_attempt_no_rank_and_a_version_of_its_own(self) -> None:
        made = value()
        assert (made.attempts, made.authority_rank) == (1, 0)
        assert (made.metadata, made.dependency_versions) == ({}, {})
        assert made.version != value().version

    @pytest.mark.parametrize(
        "change",
        [{"value": [2]}, {"stale": True}, {"attempts": 2}, {"metadata": {"a": 1}}, {"key": BASE}],
    )
    def test_all_but_rank_version_and_dependencies_counts_for_equality(self, change: Any) -> None:
        assert value() == value(authority_rank=9, version="v", dependency_versions={BASE: "w"})
        assert value() != value(**change)

    @pytest.mark.parametrize("name", ["observed_at", "fetched_at", "age_seconds", "latency_ms"])
    @pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf, 10**400])
    def test_a_time_that_is_not_finite_is_a_value_error(self, name: str, time: float) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be a finite number"):
            value(**{name: time})

    @pytest.mark.parametrize("name", ["observed_at", "fetched_at", "age_seconds", "latency_ms"])
    @pytest.mark.parametrize("time", [None, True, "1.0", Decimal(1), datetime(2024, 1, 1)])
    def test_a_time_that_is_no_number_is_a_type_error(self, name: str, time: Any) -> None:
        with pytest.raises(TypeError, match=f"^{name} must be a finite number"):
            value(**{name: time})

    def test_replacing_a_field_keeps_the_version(self) -> None:
        made = value()
        changed = dataclasses.replace(made, stale=True)
        assert (changed.stale, changed.version) == (True, made.version)


@pytest.mark.parametrize("kind, name, facts", [
    (SourcePayload, "metadata", (5,)), (ResourceUpdate, "metadata", (KEY, 5, "feed")),
    (SnapshotValue, "metadata", (KEY, 1, "rest", 1.0, 1.0, 0.0, False, False, 0.0)),
    (SnapshotValue, "dependency_versions", (KEY, 1, "s", 1.0, 1.0, 0.0, False, False, 0.0)),
    (FetchContext, "metadata", (1.0,)),
])  # fmt: skip
def test_a_mapping_is_kept_frozen_and_apart(kind: Any, name: str, facts: Any) -> None:
    given = {"a": 1}
    made = kind(*facts, **{name: given})
    given["a"] = 2
    kept = getattr(made, name)
    assert (kept, type(kept)) == ({"a": 1}, FrozenDict)
    assert getattr(kind(*facts, **{name: kept}), name) is kept
    assert getattr(kind(*facts), name) == {}
    with pytest.raises(TypeError, match=f"^{name} must be a mapping"):
        kind(*facts, **{name: [1]})


class Secret:
    def __repr__(self) -> str:
        raise AssertionError("a payload must not be asked for its text")


@pytest.mark.parametrize("record", [
    SourcePayload(Secret(), 1.0, {"a": Secret()}),
    ResourceUpdate(KEY, Secret(), "feed", 1.0, {"a": Secret()}),
    value(value=Secret(), metadata={"a": Secret()}),
    CacheLookup(value(value=Secret()), True, False, 1.0),
    CacheWriteResult(CacheWriteStatus.STORED, value(value=Secret()), value(value=Secret())),
    PublishResult(PublishStatus.PUBLISHED, value(value=Secret())),
], ids=lambda record: type(record).__name__)  # fmt: skip
def test_no_representation_shows_a_payload(record: Any) -> None:
    text = repr(record)
    assert text.startswith(f"{type(record).__name__}(")
    assert "value=<Secret>" in text


def test_a_representation_shows_the_provenance() -> None:
    for fact in ("source='rest'", "observed_at=10.0", "value=<list>", "name='a'", "stale=False"):
        assert fact in repr(value())
    assert len(repr(value(dependency_versions={BASE: "v" * 9_000}))) < 1_500


def test_generic_records_can_be_made_with_the_type_of_their_value() -> None:
    assert SourcePayload[int](1) == SourcePayload(1)
    assert ResourceUpdate[int](KEY, 1, "feed") == ResourceUpdate(KEY, 1, "feed")
    given: tuple[Any, ...] = (KEY, 1, "rest", 1.0, 1.0, 0.0, False, False, 0.0)
    assert SnapshotValue[int](*given) == SnapshotValue(*given)


@pytest.mark.parametrize("age", [math.nan, math.inf, -math.inf])
def test_the_age_in_an_answer_of_a_cache_is_finite(age: float) -> None:
    with pytest.raises(ValueError, match="^age_seconds must be a finite number"):
        CacheLookup(value(), True, False, age)
    with pytest.raises(TypeError, match="^age_seconds must be a finite number"):
        CacheLookup(value(), True, False, True)


@pytest.mark.parametrize("thing", [
    SourcePayload([1], 1.0, {"a": [1]}), ResourceUpdate(KEY, [1], "feed", 1.0, {"a": [1]}),
    value(metadata={"a": [1]}, dependency_versions={BASE: "w"}),
], ids=lambda thing: type(thing).__name__)  # fmt: skip
class TestCopies:
    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_a_pickled_one_comes_back_the_same(self, thing: Any, protocol: int) -> None:
        self._same(thing, pickle.loads(pickle.dumps(thing, protocol)))

    def test_a_deep_copy_is_the_same_and_shares_nothing_mutable(self, thing: Any) -> None:
        twin = copy.deepcopy(thing)
        self._same(thing, twin)
        assert twin.value is not thing.value
        assert twin.metadata["a"] is not thing.metadata["a"]

    def _same(self, thing: Any, twin: Any) -> None:
        assert type(twin) is type(thing)
        for field in dataclasses.fields(thing):
            assert getattr(twin, field.name) == getattr(thing, field.name)
        assert type(twin.metadata) is FrozenDict

    def test_it_is_known_by_its_own_type_once_it_is_made(self, thing: Any) -> None:
        kind = type(thing)
        assert isinstance(thing, kind)
        assert not [each for each in gc.get_objects() if type(each).__name__.endswith("Draft")]


@pytest.mark.parametrize("kind", [SourcePayload, SnapshotValue])
def test_the_types_built_by_draft_cannot_be_subclassed(kind: type) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} is final"):
        type("Special", (kind,), {})


class TestVersions:
    def test_no_two_are_the_same(self) -> None:
        assert len({next_version() for _ in range(1_000)}) == 1_000

    @needs_fork
    @pytest.mark.parametrize("issue", [next_version, new_id])
    def test_a_forked_child_issues_none_of_its_parents(
        self, issue: Callable[[], str], tmp_path: Path
    ) -> None:
        issue()
        issued = tmp_path / "issued"
        in_a_child(lambda: issued.write_text(" ".join(issue() for _ in range(50))))
        theirs = set(issued.read_text().split())
        ours = {issue() for _ in range(50)}
        assert len(theirs) == 50
        assert not theirs & ours
        assert {version.split("-")[0] for version in theirs} != {
            version.split("-")[0] for version in ours
        }


def test_a_value_is_the_same_where_threads_run_freely(monkeypatch: pytest.MonkeyPatch) -> None:
    revision = TestRevision().revision(
        dependency_versions=FrozenDict({BASE: "w"}), metadata=FrozenDict(a=1)
    )
    presented = []
    for free_threaded in (False, True):
        monkeypatch.setattr(values, "FREE_THREADED", free_threaded)
        presented.append(revision.presented([1], revision.metadata, 2.5, True, True))
    one, other = presented
    assert type(one) is type(other) is SnapshotValue
    for field in dataclasses.fields(one):
        assert getattr(one, field.name) == getattr(other, field.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.stale = False  # type: ignore[misc]


class TestRevision:
    def revision(self, **changes: Any) -> Revision:
        facts: dict[str, Any] = {
            "key": KEY, "payload": 5, "seal": "open", "source": "rest", "observed_at": 1.0,
            "fetched_at": 2.0, "version": "v1",
        }  # fmt: skip
        return Revision(**{**facts, **changes})

    def test_it_is_equal_to_nothing_but_itself(self) -> None:
        one, other = self.revision(), self.revision()
        assert one == one
        assert one != other
        assert {one: 1}[one] == 1

    def test_its_representation_names_key_version_and_source(self) -> None:
        derived = self.revision(dependency_versions=FrozenDict({BASE: "w"}))
        assert repr(self.revision()) == "<Revision n:a v1 from rest>"
        assert repr(derived) == "<Revision n:a v1 from rest, derived from 1>"
