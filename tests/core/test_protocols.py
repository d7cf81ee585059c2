"""Sources, caches and sinks are told by what they have; records and contexts say what they mean."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import pickle
from types import SimpleNamespace
from typing import Any, get_origin

import pytest

from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import (
    AtomicAsyncCache,
    AuthorityAwareCache,
    BatchAsyncCache,
    BatchAtomicAsyncCache,
    BatchSizedSource,
    BatchSnapshotSource,
    BlockingSourceTimeoutConfigured,
    ConcurrencyLimitedSource,
    DerivedSource,
    ResilienceConfiguredSource,
    SnapshotSource,
    SourceBase,
)
from coalestra.core.snapshot import FetchContext
from coalestra.core.values import (
    CacheWriteResult,
    CacheWriteStatus,
    PublishResult,
    PublishStatus,
    SnapshotValue,
)

SOURCE = {"name": "rest", "priority": 1, "timeout_seconds": None, "supports": bool}
SINGLE = dict.fromkeys(("get", "set", "invalidate", "clear"), print)
BATCH = dict.fromkeys(("get_many", "set_many", "invalidate_many"), print)


MEMBERS: list[tuple[Any, dict[str, Any]]] = [
    (SourceBase, SOURCE), (SnapshotSource, {**SOURCE, "fetch": print}),
    (BatchSnapshotSource, {**SOURCE, "fetch_many": print}),
    (DerivedSource, {**SOURCE, "dependencies": print, "derive": print}),
    (BatchSizedSource, {"max_batch_size": 5}), (ConcurrencyLimitedSource, {"max_concurrency": 5}),
    (ResilienceConfiguredSource, {"resilience_policy": None}),
    (BlockingSourceTimeoutConfigured,
        {"blocking_io": True, "blocking_io_offloaded": True, "transport_timeout_seconds": 1.0}),
    (AtomicAsyncCache, {**SINGLE, "set_if_newer": print}), (BatchAsyncCache, BATCH),
    (BatchAtomicAsyncCache, {**BATCH, "set_many_if_newer": print}),
    (AuthorityAwareCache, {"validates_source_authority": True}),
]  # fmt: skip


@pytest.mark.parametrize("protocol, members", MEMBERS)
def test_an_object_is_what_it_has_all_the_members_of(protocol: Any, members: Any) -> None:
    assert isinstance(SimpleNamespace(**members), protocol)
    for missing in members:
        rest = {name: value for name, value in members.items() if name != missing}
        assert not isinstance(SimpleNamespace(**rest), protocol)


@pytest.mark.parametrize("protocol, members", MEMBERS)
def test_a_class_that_derives_from_a_protocol_sets_what_it_declares(
    protocol: Any, members: dict[str, Any]
) -> None:
    """When it is made, by itself or as a dataclass, which takes nothing for a default."""
    kind: Any = type("Own", (protocol,), {})
    own = kind()
    for name, value in members.items():
        setattr(own, name, value)
    assert {name: getattr(own, name) for name in members} == members
    declared = [(name, Any) for name, value in members.items() if not callable(value)]
    record = dataclasses.make_dataclass("Record", declared, bases=(protocol,))
    assert [each.default for each in dataclasses.fields(record)] == [
        dataclasses.MISSING for _ in declared
    ]
    made = record(*(members[name] for name, _ in declared))
    assert isinstance(made, protocol)


def test_every_name_the_core_exports_is_there_once_and_documented() -> None:
    core = importlib.import_module("coalestra.core")
    assert len(core.__all__) == len(set(core.__all__))
    for name in core.__all__:
        exported = getattr(core, name)
        if get_origin(exported) is None and isinstance(exported, type):
            assert exported.__doc__, name


VALUE = SnapshotValue(ResourceKey("n", "a"), 1, "rest", 1.0, 1.0, 0.0, False, False, 0.0)


@pytest.mark.parametrize("status", CacheWriteStatus)
def test_a_value_is_stored_only_with_the_status_that_says_so(status: CacheWriteStatus) -> None:
    assert CacheWriteResult(status, VALUE).stored is (status.value == "stored")


@pytest.mark.parametrize("status", PublishStatus)
def test_a_value_is_published_only_with_the_status_that_says_so(status: PublishStatus) -> None:
    assert PublishResult(status, VALUE).published is (status.value == "published")


class TestPublishResult:
    RESULT = PublishResult(PublishStatus.PUBLISHED, VALUE)

    def test_copies_of_it_are_equal_to_it(self) -> None:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(self.RESULT, protocol)) == self.RESULT
        assert copy.deepcopy(self.RESULT) == self.RESULT
        replaced = dataclasses.replace(self.RESULT, previous=VALUE)
        assert replaced == PublishResult(PublishStatus.PUBLISHED, VALUE, VALUE)

    def test_a_class_of_ones_own_may_be_made_of_it(self) -> None:
        class Noted(PublishResult):
            note = "mine"

        noted = Noted(PublishStatus.PUBLISHED, VALUE)
        assert (type(noted), noted.note, noted.published) == (Noted, "mine", True)


class TestContext:
    @pytest.mark.parametrize("settings, error, name", [
        ({"requested_at": math.nan}, ValueError, "requested_at"),
        ({"requested_at": True}, TypeError, "requested_at"),
        ({"requested_at": 1.0, "deadline_at": math.inf}, ValueError, "deadline_at"),
        ({"requested_at": 1.0, "deadline_monotonic": "1"}, TypeError, "deadline_monotonic"),
        ({"requested_at": 1.0, "metadata": [1]}, TypeError, "metadata"),
        ({"requested_at": 1.0, "snapshot_id": None}, TypeError, "snapshot_id"),
    ])  # fmt: skip
    def test_it_is_checked(
        self, settings: dict[str, Any], error: type[Exception], name: str
    ) -> None:
        with pytest.raises(error, match=f"^{name} must be"):
            FetchContext(**settings)
