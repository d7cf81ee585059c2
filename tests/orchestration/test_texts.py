"""Keys and messages are not to be trusted: every text for people is printable, short, and true."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
from typing import Any

import pytest

from coalestra import (
    CircuitBreakerPolicy,
    CircuitScope,
    FreshnessPolicy,
    InMemoryMetrics,
    LoggingEventSink,
    ResourceAcceptanceRule,
    ResourceKey,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
    SnapshotConsistencyPolicy,
    SnapshotRequest,
    SourceAuthorityPolicy,
    SourcePayload,
    SourceResiliencePolicy,
)
from coalestra.core.errors import CoalestraError
from coalestra.observability import EventRecord
from tests.orchestration.scripted import Batch, Derived, Single, builder

ODD = "a\nb\x1b[31m\u2028\udcff"
LONG = "x" * 1_000_000
MOST = 3_000
"""Characters of a text that names five resources with three failures each."""


def named(part: str) -> tuple[ResourceKey, ResourceKey, ResourceKey]:
    """A key that is read, one that is derived from it, and one that depends on itself."""
    read = ResourceKey(part, part, part, {part: part})
    return read, ResourceKey("derived", part, part), ResourceKey("circle", part, part)


class Texts:
    """Everything that is said to people while something is going on."""

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self.said: list[str] = []
        self.metrics = InMemoryMetrics()

    def emit(self, event_type: str, **payload: Any) -> None:
        self.say(event_type, payload)

    def say(self, what: str, told: Any) -> None:
        """Keep every string within what is told."""
        if isinstance(told, str):
            self.said.append(f"{what}: {told}")
        elif isinstance(told, dict):
            for name, value in told.items():
                self.say(f"{what}.{name}", value)
        elif isinstance(told, (list, tuple, set, frozenset)):
            for value in told:
                self.say(what, value)

    def fail(self, error: BaseException) -> None:
        """Keep what an error says of itself, and of those within it."""
        self.say(type(error).__name__, str(error))
        self.say(f"repr of {type(error).__name__}", repr(error))
        if isinstance(error, CoalestraError) and hasattr(error, "to_dict"):
            self.say(type(error).__name__, error.to_dict())
        self.say("notes", list(getattr(error, "__notes__", ())))
        for within in getattr(error, "errors", {}).values():
            self.fail(within)

    async def of(self, doing: Any) -> None:
        """Await something, and keep what it fails with."""
        try:
            snapshot = await doing
        except (CoalestraError, ValueError, TypeError) as error:
            self.fail(error)
        else:
            self.say("repr", repr(snapshot))
            for failed in getattr(snapshot, "errors", {}).values():
                self.fail(failed)

    def odd(self) -> list[str]:
        """What was said that is not one printable line of a bounded length."""
        labels = repr(self.metrics.snapshot())
        said = [*self.said, *labels.split("'")]
        return [text[:200] for text in said if not text.isprintable() or len(text) > MOST]


def building(texts: Texts, part: str) -> SnapshotBuilder:
    read, derived, circle = named(part)

    async def fetch(key: ResourceKey, context: Any) -> Any:
        raise ValueError(f"cannot read {part}")

    async def fetch_many(keys: Any, context: Any) -> Any:
        return {ResourceKey("never", "asked", part): 1}

    reader = Single("reader", part, priority=30, fetch=fetch)
    reader.resilience_policy = SourceResiliencePolicy(
        circuit=CircuitBreakerPolicy(CircuitScope.RESOURCE, 2)
    )
    readers = Batch("readers", part, priority=20)
    readers.fetch_many = fetch_many  # type: ignore[method-assign]  # it answers at random
    deriver = Derived(
        "deriver", part, priority=40, needs=lambda key: [read] if key == derived else [circle]
    )
    deriver.supports = lambda key: key in (derived, circle)  # type: ignore[method-assign]
    return builder(
        reader, readers, deriver, events=texts, metrics=texts.metrics,
        default_policy=FreshnessPolicy(10.0, 1_000.0),
    )  # fmt: skip


@pytest.mark.parametrize("part", [ODD, LONG], ids=["odd", "long"])
async def test_whatever_a_key_is_called_no_text_is_long_or_unprintable(part: str) -> None:
    texts = Texts()
    builder = building(texts, part)
    keys = named(part)
    read, _, circle = keys
    strict = SnapshotAcceptancePolicy(ResourceAcceptanceRule(max_age_seconds=1, allow_stale=False))
    close = SnapshotConsistencyPolicy(0.5)
    for _ in range(3):  # the circuits open
        await texts.of(builder.build(keys))
        await texts.of(builder.build(keys, strict=False))
    await texts.of(builder.build(keys, deadline_seconds=0.001))
    now = builder.clock.now()
    for observed_at in (now - 20.0, now - 30.0, now + 60.0):
        await texts.of(
            builder.publisher.publish(read, part, source="feed", observed_at=observed_at)
        )
    async with builder.session() as session:
        await texts.of(session.resolve([read]))
        await texts.of(session.revalidate([read], acceptance_policy=strict))
        await texts.of(session.revalidate([circle]))
        await texts.of(session.revalidate([read], force_refresh=True))
    other = ResourceKey("plain", part)
    await builder.publisher.publish(other, 1, source="feed")
    request = SnapshotRequest(required=[read, other], consistency_policy=close)
    await texts.of(builder.build_request(request))
    await texts.of(builder.publisher.invalidate(read, reason="gone"))
    texts.say("health", (await builder.health_snapshot()).to_dict())
    with pytest.raises(TypeError) as caught:
        (await builder.build([other])).value(other, str)
    texts.fail(caught.value)
    await builder.aclose()
    assert len(texts.said) > 100
    assert texts.odd() == []


@pytest.mark.parametrize("first", ["a", "b"])
async def test_errors_are_named_in_the_order_of_the_keys_whichever_failed_first(first: str) -> None:
    down = False

    async def fetch(key: ResourceKey, context: object) -> str:
        await asyncio.sleep(0 if key.name == first else 1)
        if down:
            raise LookupError("lost")
        return key.name

    keys = [ResourceKey("test", name) for name in "ab"]
    wanted = ResourceKey("test", "wanted")
    building = builder(
        Single("s", "a", "b", fetch=fetch), Derived("d", "wanted", needs=lambda _: keys)
    )
    async with building.session() as session:
        await session.resolve(keys)
        down = True
        revalidated = await session.revalidate(keys, strict=False, force_refresh=True)
    assert [*revalidated.errors] == keys
    await building.publisher.invalidate_many(keys)
    failed = (await building.build([wanted], strict=False)).errors[wanted]
    assert str(failed).index("test:a") < str(failed).index("test:b")


async def test_a_log_of_events_holds_a_line_for_each(caplog: pytest.LogCaptureFixture) -> None:
    read, *_ = named(ODD)
    with caplog.at_level(logging.INFO, "coalestra"):
        async with builder(Single("reader"), events=LoggingEventSink()) as building:
            await building.build([read], strict=False)
            await building.publisher.publish(read, 1, source="feed")
    assert caplog.messages
    assert [line for line in caplog.messages if "\n" in line or "\x1b" in line] == []


async def test_no_text_shows_a_payload() -> None:
    """Neither what is read nor what is told of it is anybody's business but the reader's."""

    class Card:
        def __repr__(self) -> str:
            raise AssertionError("a payload was asked for its text")

        __str__ = __repr__

    texts = Texts()
    key = ResourceKey("shop", "card")

    async def fetch(_key: ResourceKey, context: Any) -> Any:
        return SourcePayload(Card(), metadata={"number": Card()})

    events: list[EventRecord] = []
    building = builder(Single("s", "card", fetch=fetch), events=texts, metrics=texts.metrics)
    snapshot = await building.build([key])
    for told in (snapshot, snapshot[key], dict(snapshot), list(snapshot.items()), events):
        texts.say("repr", repr(told))
    result = await building.publisher.publish(key, Card(), source="feed")
    texts.say("repr", repr(result))
    with pytest.raises(TypeError, match="one of type Card"):
        snapshot.value(key, int)
    json.dumps((await building.health_snapshot()).to_dict())
    await asyncio.sleep(0)


class Feed(str, enum.Enum):
    """Names of sources as an application may keep them; what ``format`` makes of one varies."""

    REST = "rest"
    STREAM = "stream"


async def test_a_name_that_is_an_enum_is_read_as_the_string_that_it_is() -> None:
    """In values, errors, health and diagnostics, on every Python."""

    async def fetch(asked: ResourceKey, context: Any) -> Any:
        return {"good": 1}[asked.subject]

    good, bad = ResourceKey("test", "rest", "good"), ResourceKey("test", "rest", "bad")
    building = builder(
        Single(Feed.REST, fetch=fetch), authority_policy=SourceAuthorityPolicy({Feed.REST: 3})
    )
    snapshot = await building.build([good, bad], strict=False, snapshot_id=Feed.STREAM)
    assert snapshot[good].authority_rank == 3
    assert "cannot resolve test:rest:bad: rest: KeyError" in str(snapshot.errors[bad])
    published = await building.publisher.publish(good, 2, source=Feed.STREAM, force=True)
    names = [snapshot.snapshot_id, snapshot[good].source, published.value.source]
    names += [
        *snapshot.diagnostics.source_calls_by_source,
        *(await building.health_snapshot()).sources,
    ]
    assert [(type(name), str(name)) for name in names] == [
        (str, name) for name in ("stream", "rest", "stream", "rest", "rest")
    ]
