"""A request says what is required and what is only welcome, and what the values must live up to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coalestra import (
    ResourceAcceptanceError,
    ResourceAcceptanceRule,
    Snapshot,
    SnapshotAcceptanceError,
    SnapshotAcceptancePolicy,
    SnapshotAcceptanceReason,
    SnapshotBuilder,
    SnapshotBuildError,
    SnapshotConsistencyError,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
    SourcePayload,
    SourceUnavailableError,
)
from tests.orchestration.scripted import builder, key
from tests.orchestration.stock import BASE, TOP, Shop, Stock, shown
from tests.support import EPOCH

A, B, C = key("a"), key("b"), key("c")
DOWN = SourceUnavailableError("down")
NEAR = SnapshotConsistencyPolicy(5.0)

Ask = Callable[..., Awaitable[Snapshot]]


async def in_a_build(building: SnapshotBuilder, request: SnapshotRequest, **more: Any) -> Snapshot:
    return await building.build_request(request, **more)


async def in_a_session(
    building: SnapshotBuilder, request: SnapshotRequest, **more: Any
) -> Snapshot:
    async with building.session(**more) as session:
        return await session.resolve_request(request)


both = pytest.mark.parametrize("ask", [in_a_build, in_a_session])


def at(seconds: float, value: Any = "v") -> SourcePayload[Any]:
    """A payload observed so many seconds after the epoch of the tests."""
    return SourcePayload(value, observed_at=EPOCH + seconds)


def serving(**values: Any) -> SnapshotBuilder:
    """A builder that serves what is given by name."""
    return builder(Stock("stock", values))


# The request itself


@both
async def test_anything_but_a_request_is_a_type_error(ask: Ask) -> None:
    with pytest.raises(TypeError, match="request"):
        await ask(serving(a=1), [A])


# Required and optional


@both
async def test_failed_required_keys_raise_with_the_partial_snapshot(ask: Ask) -> None:
    request = SnapshotRequest(required=[A, B], optional=[C])
    with pytest.raises(SnapshotBuildError) as caught:
        await ask(serving(a=1, b=DOWN, c=DOWN), request)
    assert type(caught.value) is SnapshotBuildError
    assert list(caught.value.errors) == [B]
    partial = caught.value.snapshot
    assert partial is not None
    assert shown(partial) == {A: 1}
    assert set(partial.errors) == {B, C}


# In a session


async def test_a_request_in_a_session_reads_only_what_is_not_pinned() -> None:
    shop = Shop()
    session = await shop.session(BASE)
    snapshot = await session.resolve_request(SnapshotRequest(required=[BASE, TOP]))
    assert shown(snapshot) == {BASE: 1, TOP: ((1,),)}
    assert len(shop.stock.calls) == 1


async def test_a_request_retries_failed_keys_only_if_told_to() -> None:
    shop = Shop()
    shop.stock.change(base=DOWN)
    session = await shop.session()
    request = SnapshotRequest(required=[BASE])
    with pytest.raises(SnapshotBuildError):
        await session.resolve_request(request)
    shop.stock.change(base=5)
    with pytest.raises(SnapshotBuildError):
        await session.resolve_request(request)
    assert shown(await session.resolve_request(request, retry_errors=True)) == {BASE: 5}
    with pytest.raises(TypeError, match="retry_errors"):
        await session.resolve_request(request, retry_errors=1)  # type: ignore[arg-type]  # so


async def test_what_a_refused_request_has_read_stays_pinned() -> None:
    stock = Stock("stock", {"a": at(0), "b": at(9)})
    building = builder(stock)
    await asyncio.sleep(10)
    session = building.session()
    request = SnapshotRequest(required=[A, B], consistency_policy=NEAR)
    with pytest.raises(SnapshotConsistencyError):
        await session.resolve_request(request)
    assert list(session.snapshot()) == [A, B]
    await session.resolve([A, B])
    assert len(stock.calls) == 2


# Consistency


@both
async def test_observations_further_apart_raise_with_all_the_facts(ask: Ask) -> None:
    building = serving(a=at(0), b=at(5.5), c=at(3))
    await asyncio.sleep(10)
    request = SnapshotRequest(required=[A, B, C], consistency_policy=NEAR)
    with pytest.raises(SnapshotConsistencyError) as caught:
        await ask(building, request)
    error = caught.value
    assert (error.oldest_key, error.newest_key) == (A, B)
    assert (error.oldest_observed_at, error.newest_observed_at) == (EPOCH, EPOCH + 5.5)
    assert (error.observation_skew_seconds, error.max_observation_skew_seconds) == (5.5, 5.0)
    assert set(error.keys) == {A, B, C}
    assert error.snapshot is not None
    assert len(error.snapshot) == 3


@both
@pytest.mark.parametrize("included", [False, True])
async def test_optional_keys_take_part_in_consistency_only_if_included(
    ask: Ask, included: bool
) -> None:
    building = serving(a=at(9), b=at(0))
    await asyncio.sleep(10)
    policy = SnapshotConsistencyPolicy(5.0, include_optional_resources=included)
    request = SnapshotRequest(required=[A], optional=[B], consistency_policy=policy)
    if included:
        with pytest.raises(SnapshotConsistencyError):
            await ask(building, request)
    else:
        assert len(await ask(building, request)) == 2


# Acceptance


def accepting(**rule: Any) -> SnapshotAcceptancePolicy:
    return SnapshotAcceptancePolicy(ResourceAcceptanceRule(**rule))


@both
async def test_values_older_than_the_rule_allows_are_refused(ask: Ask) -> None:
    building = serving(a=at(0), b=at(9))
    await asyncio.sleep(10)
    request = SnapshotRequest(required=[A, B], acceptance_policy=accepting(max_age_seconds=5))
    with pytest.raises(SnapshotAcceptanceError) as caught:
        await ask(building, request)
    (violation,) = caught.value.violations
    assert violation.reason is SnapshotAcceptanceReason.TOO_OLD
    assert (violation.key, violation.keys) == (A, (A,))
    assert (violation.current_age_seconds, violation.max_age_seconds) == (10, 5)
    assert isinstance(caught.value.errors[A], ResourceAcceptanceError)
    assert isinstance(caught.value, SnapshotBuildError)
    assert caught.value.snapshot is not None
    assert len(caught.value.snapshot) == 2


async def test_age_is_judged_at_the_request_and_not_at_acquisition() -> None:
    shop = Shop()
    session = await shop.session(BASE)
    request = SnapshotRequest(required=[BASE], acceptance_policy=accepting(max_age_seconds=5))
    assert shown(await session.resolve_request(request)) == {BASE: 1}
    await asyncio.sleep(6)
    with pytest.raises(SnapshotAcceptanceError):
        await session.resolve_request(request)


# The order of the checks


@both
async def test_failed_required_keys_come_first_then_consistency_then_acceptance(ask: Ask) -> None:
    policies: dict[str, Any] = {
        "consistency_policy": SnapshotConsistencyPolicy(1.0),
        "acceptance_policy": accepting(max_age_seconds=2),
    }
    building = serving(a=at(0), b=at(9), c=DOWN)
    await asyncio.sleep(10)
    with pytest.raises(SnapshotBuildError) as first:
        await ask(building, SnapshotRequest(required=[A, B, C], **policies))
    assert type(first.value) is SnapshotBuildError
    with pytest.raises(SnapshotConsistencyError):
        await ask(building, SnapshotRequest(required=[A, B], optional=[C], **policies))
    with pytest.raises(SnapshotAcceptanceError):
        await ask(building, SnapshotRequest(required=[A], optional=[B, C], **policies))
    assert shown(await ask(building, SnapshotRequest(required=[B], **policies))) == {B: "v"}
