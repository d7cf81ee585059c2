"""What applications read off a builder (section 19)."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    AuthorityPolicyResolver,
    BufferedEventSink,
    BufferedMetricsSink,
    CircuitBreaker,
    FreshnessPolicy,
    InMemoryMetrics,
    LoggingEventSink,
    ObservationPolicy,
    PolicyResolver,
    ResiliencePolicyResolver,
    ResourceKey,
    ResourcePublisher,
    RetryPolicy,
    SnapshotBuilder,
    SourceAuthorityPolicy,
    SourceResiliencePolicy,
)
from coalestra.concurrency import CapacityController
from coalestra.core import SystemClock
from tests.orchestration.scripted import Single, builder, key
from tests.orchestration.stock import Stock
from tests.support import ManualClock

K = key("k")


def test_collaborators_are_read_back_as_they_were_given() -> None:
    policy = FreshnessPolicy(1, 2)
    given: dict[str, Any] = {
        "policy_resolver": PolicyResolver(policy),
        "authority_resolver": AuthorityPolicyResolver(SourceAuthorityPolicy({"k": 1})),
        "cache": AsyncMemoryCache(),
        "circuit_breaker": CircuitBreaker(),
        "resilience_resolver": ResiliencePolicyResolver(SourceResiliencePolicy()),
        "clock": ManualClock(),
        "observation_policy": ObservationPolicy(2.0),
        "metrics": InMemoryMetrics(),
    }
    building = SnapshotBuilder([Single("k")], **given)
    for name, value in given.items():
        if name != "metrics":
            assert getattr(building, name) is value


def test_defaults_stand_where_nothing_was_given() -> None:
    building = SnapshotBuilder([Single("k")])
    assert isinstance(building.cache, AsyncMemoryCache)
    assert isinstance(building.publisher, ResourcePublisher)
    assert isinstance(building.capacity, CapacityController)
    assert isinstance(building.circuit_breaker, CircuitBreaker)
    assert isinstance(building.clock, SystemClock)
    assert building.policy_resolver.resolve(K) == FreshnessPolicy(1.0, 10.0)
    assert building.authority_resolver.rank_for(K, "k") == 0
    assert building.observation_policy == ObservationPolicy()
    assert building.retry_policy == RetryPolicy()
    assert building.resilience_resolver.default.retry == RetryPolicy()
    assert building.closed is False


def test_every_argument_is_an_attribute_that_cannot_be_changed() -> None:
    building = SnapshotBuilder([Single("k")], default_policy=FreshnessPolicy(3, 4))
    assert building.default_policy == FreshnessPolicy(3, 4)
    for name in inspect.signature(SnapshotBuilder).parameters:
        known = getattr(building, name)
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(building, name, None)
        assert getattr(building, name) is known


def test_policies_given_alone_are_found_in_their_resolvers() -> None:
    fresh, rank = FreshnessPolicy(3, 4), SourceAuthorityPolicy({"k": 7})
    retry = RetryPolicy(max_attempts=5)
    building = SnapshotBuilder(
        [Single("k")], default_policy=fresh, authority_policy=rank, retry_policy=retry
    )
    assert building.policy_resolver.resolve(K) is fresh
    assert building.authority_resolver.rank_for(K, "k") == 7
    assert building.retry_policy is retry
    assert building.resilience_resolver.default.retry is retry


def test_the_circuit_breaker_goes_by_the_clock_of_the_builder() -> None:
    clock = ManualClock()
    assert SnapshotBuilder([Single("k")], clock=clock).circuit_breaker.clock is clock


async def test_sinks_are_read_back_as_used_so_possibly_buffered() -> None:
    events, metrics = LoggingEventSink(), InMemoryMetrics()
    forced = SnapshotBuilder(
        [Single("k")], events=events, metrics=metrics, buffer_observability=True
    )
    assert isinstance(forced.events, BufferedEventSink)
    assert isinstance(forced.metrics, BufferedMetricsSink)
    assert forced.events.downstream is events
    assert forced.metrics.downstream is metrics
    await forced.aclose()
    plain = SnapshotBuilder(
        [Single("k")], events=events, metrics=metrics, buffer_observability=False
    )
    assert (plain.events, plain.metrics) == (events, metrics)


async def test_a_custom_source_needs_no_more_than_the_protocol_names() -> None:
    class Minimal:
        name = "minimal"
        priority = 0
        timeout_seconds = None
        blocking_io = False

        def supports(self, key: ResourceKey) -> bool:
            return True

        async def fetch(self, key: ResourceKey, context: Any) -> Any:
            return key.subject

    building = builder(Minimal())
    assert (await building.build([key("x", "1")])).value(key("x", "1")) == "1"
    stock = Stock("k", {"k": 1})
    assert builder(stock).sources == (stock,)
