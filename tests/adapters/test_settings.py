"""Settings are checked once, read back under their names, and say what they imply."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from coalestra.adapters import CallableBatchSource, CallableDerivedSource, CallableSource
from coalestra.core.health import SourceTimeoutGuaranteeStatus, inspect_source_timeout_guarantee
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import BatchSnapshotSource, DerivedSource, SnapshotSource
from coalestra.core.values import SourcePayload
from coalestra.resilience import SourceResiliencePolicy
from tests.adapters.sample_calls import CONTEXT, KINDS, PRICE, VOLUME, adapter, everything, nothing
from tests.support import VirtualLoop

SETTINGS: dict[str, Any] = {
    "name": "rest", "priority": -3, "timeout_seconds": 2.0, "queue_timeout_seconds": 1,
    "max_concurrency": 4, "resilience_policy": SourceResiliencePolicy(), "cache_supports": False,
    "run_sync_in_thread": True, "blocking_io": True, "transport_timeout_seconds": 1.5,
}  # fmt: skip

DEFAULTS: dict[str, Any] = {
    "timeout_seconds": None, "queue_timeout_seconds": None, "max_concurrency": None,
    "resilience_policy": None, "cache_supports": True, "run_sync_in_thread": True,
    "blocking_io": False, "transport_timeout_seconds": None,
}  # fmt: skip


def function(*_: Any) -> Any:
    return 1


async def async_function(*_: Any) -> Any:
    return 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_an_attribute_with_the_default_of_the_contract(kind: str) -> None:
    for given, expected in ((SETTINGS, SETTINGS), ({}, DEFAULTS)):
        made = adapter(kind, function, **given)
        assert {name: getattr(made, name) for name in expected} == expected


def test_functions_and_the_batch_size_can_be_read_back_too() -> None:
    single = CallableSource(name="a", priority=1, supports=everything, fetcher=function)
    batch = CallableBatchSource(
        name="b", priority=1, supports=everything, fetcher=function, max_batch_size=50
    )
    derived = CallableDerivedSource(
        name="c", priority=1, supports=everything, dependencies=nothing, deriver=function
    )
    readings: list[Any] = [single.fetcher, batch.fetcher, derived.deriver]
    assert readings == [function, function, function]
    assert batch.max_batch_size == 50


@pytest.mark.parametrize("name, value, error", [
    ("name", 5, TypeError), ("name", " ", ValueError), ("priority", 1.5, TypeError),
    ("priority", True, TypeError), ("supports", None, TypeError),
    ("supports", async_function, TypeError), ("timeout_seconds", "2", TypeError),
    ("timeout_seconds", True, TypeError), ("timeout_seconds", 0, ValueError),
    ("timeout_seconds", math.nan, ValueError), ("timeout_seconds", math.inf, ValueError),
    ("queue_timeout_seconds", "2", TypeError), ("queue_timeout_seconds", -1, ValueError),
    ("max_concurrency", 2.0, TypeError), ("max_concurrency", 0, ValueError),
    ("resilience_policy", object(), TypeError), ("cache_supports", 1, TypeError),
    ("run_sync_in_thread", None, TypeError), ("blocking_io", "yes", TypeError),
    ("transport_timeout_seconds", 0, ValueError), ("transport_timeout_seconds", 1.0, ValueError),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_setting_is_refused(kind: str, name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name} must be ") as caught:
        adapter(kind, function, **{name: value})
    needs_io = (name, value) == ("transport_timeout_seconds", 1.0)
    assert ("set blocking_io=True" in str(caught.value)) is needs_io


@pytest.mark.parametrize("kind, called, settings, error, match", [
    ("single", 5, {}, TypeError, "fetcher must be a callable"),
    ("batch", 5, {}, TypeError, "fetcher must be a callable"),
    ("derived", 5, {}, TypeError, "deriver must be a callable"),
    ("batch", function, {"max_batch_size": 0}, ValueError, "max_batch_size must be "),
    ("batch", function, {"max_batch_size": 1.0}, TypeError, "max_batch_size must be "),
    ("batch", function, {"max_batch_size": True}, TypeError, "max_batch_size must be "),
    ("derived", function, {"dependencies": 5}, TypeError, "dependencies must be a "),
    ("derived", function, {"dependencies": async_function}, TypeError, "dependencies must be "),
])  # fmt: skip
def test_what_one_kind_alone_takes_is_checked_too(
    kind: str, called: Any, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"^{match}"):
        adapter(kind, called, **settings)


@pytest.mark.parametrize("called, in_thread, offloaded", [
    (function, True, True), (function, False, False), (async_function, True, False),
    (functools.partial(async_function, 1), True, False),
    (functools.partial(function, 1), True, True),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_work_is_offloaded_if_it_is_plain_and_may_go_to_a_thread(
    kind: str, called: Any, in_thread: bool, offloaded: bool
) -> None:
    source = adapter(kind, called, run_sync_in_thread=in_thread, blocking_io=True)
    assert source.blocking_io_offloaded is offloaded


@pytest.mark.parametrize("settings, status", [
    ({}, SourceTimeoutGuaranteeStatus.NON_BLOCKING),
    ({"blocking_io": True}, SourceTimeoutGuaranteeStatus.UNSAFE_TIMEOUT_MISSING),
    (SETTINGS, SourceTimeoutGuaranteeStatus.PROTECTED),
    ({**SETTINGS, "run_sync_in_thread": False}, SourceTimeoutGuaranteeStatus.UNSAFE_NOT_OFFLOADED),
    ({**SETTINGS, "transport_timeout_seconds": 2.0},
        SourceTimeoutGuaranteeStatus.UNSAFE_TIMEOUT_NOT_WITHIN_SOURCE),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_declares_how_it_blocks(
    kind: str, settings: dict[str, Any], status: SourceTimeoutGuaranteeStatus
) -> None:
    source = adapter(kind, function, **settings)
    assert inspect_source_timeout_guarantee(source).status is status


def test_each_adapter_is_a_source_of_its_kind_only() -> None:
    kinds = (SnapshotSource, BatchSnapshotSource, DerivedSource)
    for kind, protocol in zip(KINDS, kinds, strict=True):
        source = adapter(kind, function)
        assert [isinstance(source, each) for each in kinds] == [each is protocol for each in kinds]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer, expected", [(1, True), ("", False), (None, False), (True, True)])
def test_supports_answers_a_truth_whatever_was_said(kind: str, answer: Any, expected: bool) -> None:
    assert adapter(kind, function, supports=lambda _: answer).supports(PRICE) is expected


@pytest.mark.parametrize("kind", KINDS)
def test_supports_must_not_turn_out_to_be_async(kind: str) -> None:
    source = adapter(kind, function, supports=lambda _: async_function())
    with pytest.raises(TypeError, match="supports of source 'rest' must answer at once"):
        source.supports(PRICE)


def test_dependencies_are_passed_on_and_generators_collected() -> None:
    def keys(key: ResourceKey) -> Iterator[ResourceKey]:
        yield VOLUME
        yield key

    source = adapter("derived", function, dependencies=keys)
    assert isinstance(source, CallableDerivedSource)
    assert source.dependencies(PRICE) == (VOLUME, PRICE)


@pytest.mark.parametrize("declared", [[VOLUME], 5, PRICE])
def test_what_is_no_collection_of_keys_is_for_the_builder_to_judge(declared: Any) -> None:
    source = adapter("derived", function, dependencies=lambda _: declared)
    assert isinstance(source, CallableDerivedSource)
    assert source.dependencies(PRICE) is declared


async def test_a_batch_result_that_is_no_mapping_is_for_the_builder_to_judge() -> None:
    source = adapter("batch", lambda *_: [1, 2])
    assert isinstance(source, CallableBatchSource)
    answer: Any = await source.fetch_many((PRICE,), CONTEXT)
    assert answer == [1, 2]


class Rows(Mapping[ResourceKey, int]):
    """A mapping that is no dict."""

    def __getitem__(self, key: ResourceKey) -> int:
        return 7

    def __iter__(self) -> Iterator[ResourceKey]:
        return iter((PRICE, VOLUME))

    def __len__(self) -> int:
        return 2


async def test_every_value_of_any_mapping_becomes_a_payload() -> None:
    source = adapter("batch", lambda *_: Rows())
    assert isinstance(source, CallableBatchSource)
    answer = await source.fetch_many((PRICE, VOLUME), CONTEXT)
    assert answer == {PRICE: SourcePayload(7), VOLUME: SourcePayload(7)}


async def test_a_large_batch_does_not_hold_the_loop() -> None:
    keys = [ResourceKey("n", "v", str(number)) for number in range(30_000)]
    source = adapter("batch", lambda asked, _: dict.fromkeys(asked, 1), run_sync_in_thread=False)
    assert isinstance(source, CallableBatchSource)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    before = loop.steps
    answer = await source.fetch_many(keys, CONTEXT)
    assert len(answer) == 30_000
    assert loop.steps > before


async def test_a_mapping_that_changes_while_it_is_taken_over_does_no_harm() -> None:
    kept = {ResourceKey("n", "v", str(number)): 1 for number in range(30_000)}

    async def fetch(*_: Any) -> Any:
        asyncio.get_running_loop().call_soon(kept.clear)
        return kept

    source = adapter("batch", fetch)
    assert isinstance(source, CallableBatchSource)
    assert len(await source.fetch_many(tuple(kept), CONTEXT)) == 30_000
    assert not kept


def test_the_representations_name_the_source() -> None:
    assert repr(adapter("single", function)) == "CallableSource(name='rest', priority=10)"
