"""Every setting of a builder: what it takes, what it refuses, and that the message names it."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import FrozenInstanceError
from functools import partial
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    AuthorityPolicyResolver,
    BufferedEventSink,
    BufferedMetricsSink,
    BufferOverflowPolicy,
    BuilderSettings,
    CallableBatchSource,
    CallableDerivedSource,
    CallableSource,
    CircuitBreaker,
    FreshnessPolicy,
    InMemoryMetrics,
    KeyNormalizer,
    LoggingEventSink,
    NullMetrics,
    ObservationPolicy,
    PolicyResolver,
    ResiliencePolicyResolver,
    ResourceKey,
    ResourcePublisher,
    RetryPolicy,
    SnapshotBuilder,
    SnapshotRequest,
    SnapshotRequirement,
    SnapshotSource,
    SourceAuthorityPolicy,
    SourceResiliencePolicy,
    deepcopy_payload,
)
from coalestra.concurrency import CapacityController
from coalestra.core import SystemClock
from tests.contracts.caches import SingleKeyCache
from tests.orchestration.scripted import Batch, Derived, Single, key
from tests.support import ManualClock

NAN, INF = math.nan, math.inf
NOT_NUMBERS: tuple[Any, ...] = ("1", b"1", [1], object(), 1j)
COUNT = ((1, 2, 10**6), (0, -1), (True, False, 1.0, 1.5, NAN, INF, *NOT_NUMBERS))
FLAG = ((True, False), (), (0, 1, 1.0, "yes", (), object()))
SECONDS = ((0, 0.0, 0.5, 3600), (-1, -0.001, NAN, INF, -INF), (True, False, *NOT_NUMBERS))

Table = Mapping[str, tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]]


def optional(
    rule: tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]],
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The same rule, with None among the good values."""
    return (None, *rule[0]), rule[1], rule[2]


def required(
    rule: tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]],
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The same rule, with None among what is of the wrong type."""
    return rule[0], rule[1], (None, *rule[2])


def kind(good: Any, *more: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """A collaborator of one kind, or None."""
    return (None, good, *more), (), (0, True, "text", object())


class NoTracer:
    """Follows nothing."""

    def begin(self, kind: str, attributes: Any, *, parent: Any = None, link: Any = None) -> None:
        """Begin nothing."""

    enter = end = joined = begin


SIMPLE: Table = {
    "max_concurrency": required(COUNT), "max_pending_tasks": optional(COUNT),
    "source_concurrency": ((None, {}, {"s": 1}, {"s": 99}),
        ({"s": 0}, {"s": -1}, {"unknown": 1}, {"": 1}),
        (1, True, "s", ["s"], {"s": True}, {"s": 1.5}, {"s": None}, {1: 1})),
    "cache_source_support": required(FLAG), "source_support_cache_max_entries": optional(COUNT),
    "manage_lifecycle": required(FLAG), "run_payload_copies_in_thread": optional(FLAG),
    "max_copy_concurrency": required(COUNT), "cache_run_payload_copies_in_thread": optional(FLAG),
    "cache_max_copy_concurrency": required(COUNT),
    "copy_shutdown_timeout_seconds": required(SECONDS), "buffer_observability": optional(FLAG),
    "observability_max_pending": required(COUNT),
    "observability_overflow": (tuple(BufferOverflowPolicy), (), (None, 0, True, object())),
    "observability_shutdown_timeout_seconds": required(SECONDS),
    "observability_drain_on_shutdown": required(FLAG),
    "require_source_timeout_declarations": required(FLAG),
    "allow_unsafe_blocking_sources": required(FLAG),
    "source_transport_timeout_grace_seconds": required(SECONDS),
    "trace": ((False, True, 0, 0.25, 1), (-0.1, 1.1, float("nan")), (None, "text", object())),
}  # fmt: skip
COLLABORATORS: Table = {
    "default_policy": kind(FreshnessPolicy(1, 2)),
    "policy_resolver": ((None, PolicyResolver(FreshnessPolicy(1, 2))), (), (0, "text", object())),
    "authority_policy": kind(SourceAuthorityPolicy()),
    "authority_resolver": (
        (None, AuthorityPolicyResolver(SourceAuthorityPolicy())),
        (),
        (0, "text", object()),
    ),
    "cache": ((None, AsyncMemoryCache(), SingleKeyCache()), (), (0, "text", {}, object())),
    "retry_policy": kind(RetryPolicy()),
    "circuit_breaker": kind(CircuitBreaker()),
    "default_resilience": kind(SourceResiliencePolicy()),
    "source_resilience": (
        (None, {}, {"s": SourceResiliencePolicy()}, {"unknown": SourceResiliencePolicy()}),
        ({"": SourceResiliencePolicy()},),
        (0, "text", ["s"], {"s": RetryPolicy()}, {"s": None}),
    ),
    "resilience_resolver": kind(ResiliencePolicyResolver(SourceResiliencePolicy())),
    "clock": ((None, SystemClock(), ManualClock()), (), (0, "text", object())),
    "metrics": ((None, NullMetrics()), (), (0, "text", object())),
    "events": ((None, LoggingEventSink()), (), (0, "text", object())),
    "tracer": ((None, NoTracer()), (), (0, "text", object())),
    "observation_policy": kind(ObservationPolicy()),
    "payload_copier": ((None, deepcopy_payload, lambda value: value), (), (0, "text", {})),
}
ALL: Table = {**SIMPLE, **COLLABORATORS}


def made(**settings: Any) -> SnapshotBuilder:
    return SnapshotBuilder([Single("s")], **settings)


def test_every_parameter_of_the_builder_has_its_line_in_the_table() -> None:
    parameters = set(inspect.signature(SnapshotBuilder).parameters)
    assert parameters == {"sources", *ALL}


@pytest.mark.parametrize("name", ALL)
def test_good_values_are_taken_and_others_refused_by_the_name_of_the_parameter(name: str) -> None:
    good, wrong_values, wrong_types = ALL[name]
    for value in good:
        made(**{name: value})
    for error, values in ((ValueError, wrong_values), (TypeError, wrong_types)):
        for value in values:
            with pytest.raises(error, match=name):
                made(**{name: value})


@pytest.mark.parametrize("called", [
    SnapshotBuilder, CallableSource, CallableBatchSource, CallableDerivedSource, ResourcePublisher,
    BuilderSettings,
])  # fmt: skip
def test_an_unknown_argument_is_refused_in_the_name_of_what_was_called(called: Any) -> None:
    """Not of the record that has its arguments."""
    with pytest.raises(TypeError, match=rf"^{called.__name__}\.__init__\(\) .*argument"):
        called(no_such=1)


@pytest.mark.parametrize("name", ALL)
def test_settings_are_attributes_under_their_own_names(name: str) -> None:
    default = inspect.signature(SnapshotBuilder).parameters[name].default
    expected = {"max_pending_tasks": 8, "run_payload_copies_in_thread": True}
    if name in SIMPLE:
        assert getattr(made(), name) == expected.get(name, default)
    for value in ALL[name][0]:
        if value is not None:
            found = getattr(made(**{name: value}), name)
            assert getattr(found, "downstream", found) == value  # a sink may be buffered


def test_defaults_stand_where_nothing_was_given() -> None:
    building = made()
    assert isinstance(building.cache, AsyncMemoryCache)
    assert isinstance(building.publisher, ResourcePublisher)
    assert isinstance(building.capacity, CapacityController)
    assert isinstance(building.circuit_breaker, CircuitBreaker)
    assert isinstance(building.clock, SystemClock)
    assert building.policy_resolver.resolve(key("s")) == FreshnessPolicy(1.0, 10.0)
    assert building.authority_resolver.rank_for(key("s"), "s") == 0
    assert building.observation_policy == ObservationPolicy()
    assert building.retry_policy == RetryPolicy()
    assert building.resilience_resolver.default.retry == RetryPolicy()
    assert building.closed is False


def test_every_argument_is_an_attribute_that_cannot_be_changed() -> None:
    building = made(default_policy=FreshnessPolicy(3, 4))
    assert building.default_policy == FreshnessPolicy(3, 4)
    for name in inspect.signature(SnapshotBuilder).parameters:
        known = getattr(building, name)
        with pytest.raises(FrozenInstanceError, match=name):
            setattr(building, name, None)
        assert getattr(building, name) is known


def test_policies_given_alone_are_found_in_their_resolvers() -> None:
    fresh, rank = FreshnessPolicy(3, 4), SourceAuthorityPolicy({"s": 7})
    retry = RetryPolicy(max_attempts=5)
    building = made(default_policy=fresh, authority_policy=rank, retry_policy=retry)
    assert building.policy_resolver.resolve(key("s")) is fresh
    assert building.authority_resolver.rank_for(key("s"), "s") == 7
    assert building.retry_policy is retry
    assert building.resilience_resolver.default.retry is retry


async def test_sinks_are_read_back_as_used_so_possibly_buffered() -> None:
    events, metrics = LoggingEventSink(), InMemoryMetrics()
    forced = made(events=events, metrics=metrics, buffer_observability=True)
    assert isinstance(forced.events, BufferedEventSink)
    assert isinstance(forced.metrics, BufferedMetricsSink)
    assert forced.events.downstream is events
    assert forced.metrics.downstream is metrics
    await forced.aclose()
    plain = made(events=events, metrics=metrics, buffer_observability=False)
    assert (plain.events, plain.metrics) == (events, metrics)


# Settings that do not go together


@pytest.mark.parametrize("setting, kind", [
    ("policy_resolver", PolicyResolver), ("authority_resolver", AuthorityPolicyResolver),
    ("resilience_resolver", ResiliencePolicyResolver), ("circuit_breaker", CircuitBreaker),
    ("observation_policy", ObservationPolicy), ("retry_policy", RetryPolicy),
    ("clock", SystemClock),
])  # fmt: skip
def test_what_is_given_is_taken_however_empty_it_may_look(setting: str, kind: Any) -> None:
    empty = type("Empty", (kind,), {"__bool__": lambda _: False})
    resolvers = setting in ("policy_resolver", "resilience_resolver")
    default = {"policy_resolver": FreshnessPolicy(1, 2)}.get(setting, SourceResiliencePolicy())
    given = empty(default) if resolvers else empty()
    assert getattr(SnapshotBuilder([], **{setting: given}), setting) is given


def test_authority_policy_and_resolver_exclude_each_other() -> None:
    policy = SourceAuthorityPolicy({"s": 1})
    with pytest.raises(ValueError, match=r"authority_policy.*authority_resolver"):
        made(authority_policy=policy, authority_resolver=AuthorityPolicyResolver(policy))


POLICY, RETRIES, RESILIENCE = FreshnessPolicy(1, 2), RetryPolicy(), SourceResiliencePolicy()


@pytest.mark.parametrize("used, unused", [
    ({"policy_resolver": PolicyResolver(POLICY)}, {"default_policy": POLICY}),
    ({"default_resilience": RESILIENCE}, {"retry_policy": RETRIES}),
    ({"resilience_resolver": ResiliencePolicyResolver()}, {"retry_policy": RETRIES}),
    ({"resilience_resolver": ResiliencePolicyResolver()}, {"default_resilience": RESILIENCE}),
    ({"resilience_resolver": ResiliencePolicyResolver()}, {"source_resilience": {"s": RESILIENCE}}),
], ids=str)  # fmt: skip
def test_what_another_argument_takes_the_place_of_is_told_and_not_just_ignored(
    used: dict[str, Any], unused: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It has always been taken, so it is not refused; alone, either is fine."""
    made(**used)
    made(**unused)
    assert not caplog.messages
    made(**used, **unused)
    (name,), (other,) = unused, used
    assert caplog.messages == [f"{name} is not used, as {other} takes its place"]


def test_a_limit_of_a_source_that_there_is_not_says_which_there_are() -> None:
    """A misspelt name would be without effect; that there is no source at all is said, too."""
    with pytest.raises(ValueError, match="source_concurrency names 'S', .* known are s$"):
        made(source_concurrency={"S": 1})
    with pytest.raises(ValueError, match="known are none"):
        SnapshotBuilder([], source_concurrency={"S": 1})


def test_a_misspelt_name_of_source_among_policies_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Others may be those of a whole application, and are nothing to speak of."""
    policies = {"orders": RESILIENCE, "Prices": RESILIENCE}
    SnapshotBuilder([Single("prices")], source_resilience=policies)
    told = "source_resilience names 'Prices', but there is no such source; is 'prices' meant?"
    assert caplog.messages == [told]
    SnapshotBuilder([Single("prices")], source_resilience={**policies, "prices": RESILIENCE})
    assert caplog.messages == [told]


def test_a_circuit_policy_that_another_one_takes_the_place_of_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A breaker keeps the circuits in any case; its thresholds are what would be without effect."""
    strict = CircuitBreaker(failure_threshold=1)
    made(circuit_breaker=strict)
    made(default_resilience=SourceResiliencePolicy(circuit=strict.default_policy))
    made(circuit_breaker=CircuitBreaker(), default_resilience=RESILIENCE)
    assert not caplog.messages
    made(circuit_breaker=strict, default_resilience=RESILIENCE)
    made(circuit_breaker=strict, resilience_resolver=ResiliencePolicyResolver())
    assert len(caplog.messages) == 2
    assert all("the policy of circuit_breaker is not used" in each for each in caplog.messages)


@pytest.mark.parametrize(
    "settings", [{"cache_run_payload_copies_in_thread": False}, {"cache_max_copy_concurrency": 2}]
)
def test_settings_of_the_default_cache_are_refused_with_ones_own(settings: dict[str, Any]) -> None:
    made(**settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        made(cache=AsyncMemoryCache(), **settings)


def test_the_settings_of_the_default_cache_reach_it() -> None:
    cache = made(cache_run_payload_copies_in_thread=False, cache_max_copy_concurrency=2).cache
    assert isinstance(cache, AsyncMemoryCache)
    assert (cache.run_payload_copies_in_thread, cache.max_copy_concurrency) == (False, 2)


def test_authority_rules_need_a_cache_that_compares_authority() -> None:
    policy = SourceAuthorityPolicy({"s": 1})
    made(authority_policy=policy, cache=AsyncMemoryCache())
    with pytest.raises(ValueError, match="authority"):
        made(authority_policy=policy, cache=SingleKeyCache())


# Sources


class Bare:
    """What every source must have, and no more; it does not say whether it blocks."""

    name, priority, timeout_seconds = "bare", 1, None

    def supports(self, key: Any) -> bool:
        return True

    async def fetch(self, key: Any, context: Any) -> Any:
        return key.subject


@pytest.mark.parametrize("sources", [None, 1, Single("s")])
def test_sources_must_be_an_iterable(sources: Any) -> None:
    with pytest.raises(TypeError, match="sources"):
        SnapshotBuilder(sources)


@pytest.mark.parametrize("wrong", [print, Single, None, "rest"])
def test_what_is_no_source_is_shown_with_what_to_do(wrong: Any) -> None:
    rule = "each source must be an object with a name, got .* of type .*; wrap a function in"
    with pytest.raises(TypeError, match=rule):
        SnapshotBuilder([Single("s"), wrong])


def test_what_a_source_leaves_to_the_protocol_that_it_derives_from_it_does_not_have() -> None:
    """There it does nothing, and would give None for every key, or support none."""

    class Idle(SnapshotSource):
        name, priority, timeout_seconds, blocking_io = "idle", 1, None, False

    with pytest.raises(TypeError, match=r"source 'idle' has no supports\(key\) method; add one"):
        SnapshotBuilder([Idle()])  # type: ignore[abstract]  # that is the point

    class Eager(Idle):
        def supports(self, key: ResourceKey) -> bool:
            return True

    with pytest.raises(TypeError, match="source 'idle' offers none of fetch, fetch_many, or"):
        SnapshotBuilder([Eager()])  # type: ignore[abstract]  # that is the point


def test_the_repr_of_a_builder_names_its_sources_in_order() -> None:
    assert repr(SnapshotBuilder([])) == "<SnapshotBuilder open: no sources>"
    named = SnapshotBuilder([Single("low", priority=1), Single("high", priority=2)])
    assert repr(named) == "<SnapshotBuilder open: high > low>"


def test_sources_may_come_from_any_iterable_and_be_none_at_all() -> None:
    assert SnapshotBuilder([]).sources == ()
    assert len(SnapshotBuilder(Single(name) for name in "ab").sources) == 2


def test_two_sources_of_one_name_are_a_value_error_that_says_which() -> None:
    with pytest.raises(ValueError, match="twin"):
        SnapshotBuilder([Single("twin"), Batch("twin")])


@pytest.mark.parametrize("attribute", ["name", "priority", "supports"])
async def test_a_source_needs_what_every_source_has_and_no_more(attribute: str) -> None:
    facts = {**vars(Bare), "blocking_io": False}
    whole: Any = type("Whole", (), facts)()
    assert (await SnapshotBuilder([whole]).build([key("x", "1")])).value(key("x", "1")) == "1"
    del facts[attribute]
    lacking: Any = type("Lacking", (), facts)()
    with pytest.raises((TypeError, ValueError), match=attribute):
        SnapshotBuilder([lacking])


@pytest.mark.parametrize("attribute, wrong", [
    ("timeout_seconds", 0), ("timeout_seconds", NAN), ("timeout_seconds", True),
    ("queue_timeout_seconds", -1), ("queue_timeout_seconds", "1"), ("max_concurrency", 0),
    ("max_concurrency", True), ("max_batch_size", 0), ("max_batch_size", 1.5),
    ("priority", "high"), ("priority", True), ("resilience_policy", RetryPolicy()),
])  # fmt: skip
def test_wrong_attributes_of_a_source_are_named(attribute: str, wrong: Any) -> None:
    source = Batch("b")
    setattr(source, attribute, wrong)
    with pytest.raises((TypeError, ValueError), match=attribute):
        SnapshotBuilder([source])


# Timeout declarations


def blocking(**more: Any) -> CallableSource:
    settings: dict[str, Any] = {"blocking_io": True, "transport_timeout_seconds": 1.0, **more}
    return CallableSource(
        name="blocking", priority=1, supports=lambda key: True, fetcher=lambda key, context: 1,
        **settings,
    )  # fmt: skip


def test_an_undeclared_source_is_refused_unless_declarations_are_not_required() -> None:
    with pytest.raises(ValueError, match=r"bare.*undeclared"):
        SnapshotBuilder([Bare()])
    SnapshotBuilder([Bare()], require_source_timeout_declarations=False)


@pytest.mark.parametrize("more, status", [
    ({"run_sync_in_thread": False}, "unsafe_not_offloaded"),
    ({"transport_timeout_seconds": None}, "unsafe_timeout_missing"),
    ({"timeout_seconds": 1.0}, "unsafe_timeout_not_within_source"),
    ({"timeout_seconds": 0.5}, "unsafe_timeout_not_within_source"),
])  # fmt: skip
async def test_an_unsafe_source_is_refused_unless_allowed_and_then_health_is_critical(
    more: dict[str, Any], status: str
) -> None:
    with pytest.raises(ValueError, match=f"blocking.*{status}"):
        SnapshotBuilder([blocking(**more)])
    building = SnapshotBuilder([blocking(**more)], allow_unsafe_blocking_sources=True)
    health = await building.health_snapshot()
    assert health.unsafe_blocking_source_count == 1
    assert health.source_timeout_guarantees["blocking"].status.value == status
    assert health.assess().severity.value == "critical"
    await building.aclose()


# Arguments of calls


@pytest.mark.parametrize("argument, wrong", [
    ("metadata", 1), ("metadata", ["a"]), ("snapshot_id", 1), ("snapshot_id", ""), ("strict", 1),
    *[("trace", wrong) for wrong in (1, "yes", 0.5)],
    *[("deadline_seconds", wrong) for wrong in (0, -1, NAN, INF, True, "1", [1])],
])  # fmt: skip
async def test_wrong_arguments_are_named_by_a_build_and_by_a_session(
    argument: str, wrong: Any
) -> None:
    settings: dict[str, Any] = {argument: wrong}
    with pytest.raises((TypeError, ValueError), match=argument):
        await made().build([key("s")], **settings)
    if argument != "strict":  # which a session takes at each stage
        with pytest.raises((TypeError, ValueError), match=argument):
            made().session(**settings)


@pytest.mark.parametrize("method, arguments", [
    ("resolve", ["strict", "retry_errors"]), ("resolve_request", ["retry_errors"]),
    ("try_request", ["retry_errors"]), ("try_requests", ["retry_errors"]),
    ("revalidate", ["strict", "force_refresh", "consistency_policy", "acceptance_policy"]),
])  # fmt: skip
async def test_arguments_of_a_session_of_the_wrong_type_are_named(
    method: str, arguments: list[str]
) -> None:
    session, request = made().session(), SnapshotRequest(required=[key("s")])
    await session.resolve([key("s")])
    asked = {"resolve_request": request, "try_request": request, "try_requests": [request]}
    for argument in arguments:
        with pytest.raises(TypeError, match=argument):
            await getattr(session, method)(asked.get(method, [key("s")]), **{argument: 1})


async def test_metadata_that_cannot_be_copied_is_named_with_what_to_do() -> None:
    """Every unit of work has its own; a client or a lock is no metadata."""
    building, metadata = made(), {"lock": threading.Lock()}
    must = r"^metadata must be copyable, got one that is not \(cannot pickle.*context variable$"
    with pytest.raises(TypeError, match=must) as raised:
        await building.build([key("s")], metadata=metadata)
    assert isinstance(raised.value.__cause__, TypeError)
    with pytest.raises(TypeError, match=must):
        building.session(metadata=metadata)
    with pytest.raises(TypeError, match=must):
        await building.try_requests([SnapshotRequest(required=[key("s")])], metadata=metadata)


async def test_a_build_of_nothing_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="keys"):
        await made().build([])


def asking(building: SnapshotBuilder) -> Iterator[Callable[[Any], Any]]:
    """Everything that takes keys, as a function of these."""
    session, publisher, cache = building.session(), building.publisher, AsyncMemoryCache()
    yield from (building.build, session.resolve, session.revalidate, publisher.invalidate_many)
    yield from (cache.invalidate_many, lambda keys: cache.get_many(keys, now=1.0, policies={}))
    yield lambda keys: SnapshotRequest(required=keys)
    yield lambda keys: SnapshotRequest(optional=keys)
    yield SnapshotRequirement.any_of


async def asked(ask: Callable[[Any], Any], keys: Any) -> None:
    outcome = ask(keys)
    if inspect.isawaitable(outcome):
        await outcome


NO_KEYS: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "a collection of ResourceKey, got None"),
    "a number": (lambda: 5, "a collection of ResourceKey, got 5"),
    "a request": (lambda: SnapshotRequest(required=[key("x")]), "a collection of ResourceKey"),
    "a single key": (lambda: key("s"), r"a collection of .*; put a single one in a list"),
    "a text": (lambda: "text", "a ResourceKey, got 't' of type str"),
    "texts": (lambda: [key("s"), "s"], "a ResourceKey, got 's' of type str"),
    "what has no hash": (lambda: [[key("s")]], r"a ResourceKey, got \[ResourceKey.* of type list"),
    "what has no hash, once": (lambda: iter([[]]), r"a ResourceKey, got \[\] of type list"),
}


@pytest.mark.parametrize("keys, must", NO_KEYS.values(), ids=NO_KEYS)
async def test_what_are_no_keys_is_shown_by_everything_that_takes_keys(
    keys: Callable[[], Any], must: str
) -> None:
    """With the name of the argument, and never by what Python says of hashes."""
    for ask in asking(made()):
        with pytest.raises(TypeError, match=f"^(keys|required|optional) must be {must}"):
            await asked(ask, keys())


async def test_what_is_raised_while_keys_are_gone_through_is_left_as_it_is() -> None:
    def keys() -> Iterator[ResourceKey]:
        yield key("x")
        raise TypeError("a mistake of their own")

    for ask in asking(made()):
        with pytest.raises(TypeError, match="^a mistake of their own$"):
            await asked(ask, keys())


@pytest.mark.parametrize("argument, wrong", [
    ("cancel_refreshes", 1), ("copy_shutdown_timeout_seconds", -1),
    ("copy_shutdown_timeout_seconds", NAN), ("copy_shutdown_timeout_seconds", True),
    ("observability_shutdown_timeout_seconds", -1),
    ("observability_shutdown_timeout_seconds", INF),
    ("observability_shutdown_timeout_seconds", "1"),
])  # fmt: skip
async def test_wrong_arguments_of_aclose_are_told_and_close_none(argument: str, wrong: Any) -> None:
    building = made()
    settings: dict[str, Any] = {argument: wrong}
    with pytest.raises((TypeError, ValueError), match=argument):
        await building.aclose(**settings)
    assert not building.closed


class Late:
    """A clock, a resolver, an event sink and a metrics sink whose answers have to be awaited."""

    coalestra_non_blocking = True

    async def answer(self, *_: object, **__: object) -> Any:
        """Answer later."""

    now = monotonic = resolve = emit = increment = observe = answer


LATE: Any = Late()


def late_source(method: str) -> Derived:
    """A source that would tell only once it is asked for a key that it cannot say at once."""
    source = Derived("d", needs=lambda _: ())
    setattr(source, method, LATE.answer)
    return source


@pytest.mark.parametrize("make, name", [
    (lambda: made(payload_copier=LATE.answer), "payload_copier"),
    (lambda: made(clock=LATE), r"now\(\) of clock"),
    (lambda: made(default_policy=None, policy_resolver=LATE), r"resolve\(\) of policy_resolver"),
    (lambda: made(events=LATE), r"emit\(\) of events"),
    (lambda: made(metrics=LATE), r"increment\(\) of metrics"),
    (lambda: BufferedEventSink(LATE), r"emit\(\) of downstream"),
    (lambda: BufferedMetricsSink(LATE), r"increment\(\) of downstream"),
    (lambda: AsyncMemoryCache(payload_copier=LATE.answer), "payload_copier"),
    (lambda: PolicyResolver(FreshnessPolicy(1, 1), dynamic=LATE.answer), "dynamic"),
    (lambda: AuthorityPolicyResolver(dynamic=LATE.answer), "dynamic"),
    (lambda: KeyNormalizer(name=LATE.answer), "name"),
    (lambda: RetryPolicy(retry_on=partial(LATE.answer)), "retry_on"),
    (lambda: SnapshotBuilder([late_source("supports")]), r"supports\(\) of source 'd'"),
    (lambda: SnapshotBuilder([late_source("dependencies")]), r"dependencies\(\) of source 'd'"),
])  # fmt: skip
def test_what_must_answer_at_once_is_no_coroutine(make: Callable[[], Any], name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name} must be .*a plain function"):
        make()


async def test_a_predicate_that_would_be_true_of_everything_invalidates_nothing() -> None:
    cache = AsyncMemoryCache()
    building = made(cache=cache)
    await building.build([key("s")])
    with pytest.raises(TypeError, match="predicate must be a plain function"):
        await cache.invalidate_matching(LATE.answer)
    with pytest.raises(TypeError, match="predicate must answer at once, got an awaitable"):
        await cache.invalidate_matching(lambda it: LATE.answer(it, "hidden"))
    assert await cache.size() == 1
