"""Without any sink, the logger `coalestra` tells once of whatever begins to fail or works again."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from coalestra import (
    FetchContext,
    FreshnessPolicy,
    LoggingEventSink,
    ObservabilityShutdownTimeoutError,
    RefreshMode,
    ResourceKey,
    SourcePayload,
)
from tests.contracts.caches import BatchCache, LeasingCache
from tests.orchestration.scripted import Derived, Single, builder, down, key
from tests.support import EPOCH, ManualClock, ThreadGate

A, B = key("a"), key("b")
Records = list[logging.LogRecord]


class World:
    """A source of two keys that fails as it is told, and what was logged meanwhile."""

    def __init__(self, records: Records, **settings: Any) -> None:
        self.records = records
        self.error: Exception | None = None
        self.source = Single("wire", "a", "b", fetch=self._fetch)
        self.clock = ManualClock()
        settings.setdefault("default_policy", FreshnessPolicy(10, 1_000))
        self.builder = builder(self.source, clock=self.clock, **settings)

    async def _fetch(self, k: ResourceKey, context: FetchContext) -> Any:
        if isinstance(self.error, Exception):
            raise self.error
        return k.name

    async def read(self, *keys: ResourceKey, error: Exception | None = None) -> None:
        self.error = error
        self.clock.advance(60)
        await self.builder.build(keys or [A], strict=False)
        await self.builder.wait_for_refreshes()

    async def lines(self) -> list[str]:
        """What was logged, once all of it has been written."""
        await self.builder.aclose()
        return [f"{record.levelname} {record.getMessage()}" for record in self.records]


class Keeping(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: Records = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture(name="records")
def _records() -> Iterator[list[logging.LogRecord]]:
    logger, handler = logging.getLogger("coalestra"), Keeping()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(level)


FAILED, WORKS = "WARNING source 'wire' fails: ConnectionError", "INFO source 'wire' works again"


async def test_a_source_that_fails_and_works_again_is_named_once_each(records: Records) -> None:
    world = World(records)
    for error in (None, ConnectionError("x"), ConnectionError("y"), None, None, OSError("z")):
        await world.read(error=error)
    assert await world.lines() == [FAILED, WORKS, "WARNING source 'wire' fails: OSError"]
    (kind, raised, _) = records[0].exc_info or (None, None, None)
    assert (kind, str(raised)) == (ConnectionError, "x")
    assert "in _fetch" in str(records[0].exc_text)
    assert records[1].exc_info is None


async def test_no_key_is_named(records: Records) -> None:
    secret = key("a", "iban-42")
    world = World(records, default_policy=FreshnessPolicy(
        10, 1_000, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE
    ))  # fmt: skip
    await world.read(secret)
    await world.read(secret, error=ConnectionError("no route"))
    await world.lines()
    assert len(records) == 2
    formatter = logging.Formatter()
    assert "iban" not in "".join(formatter.format(record) for record in records)


async def test_what_answers_with_nothing_of_use_fails_too(records: Records) -> None:
    answers: list[Any] = [SourcePayload(1, observed_at=EPOCH), 1, SourcePayload(1, EPOCH + 1e6), 1]

    async def fetch(k: ResourceKey, context: FetchContext) -> Any:
        return answers.pop(0)

    clock = ManualClock(EPOCH + 100)
    async with builder(
        Single("wire", "a", fetch=fetch), clock=clock, default_policy=FreshnessPolicy(10, 1_000)
    ) as building:
        for number in range(4):
            await building.build([key("a", str(number))], strict=False)
    assert [record.getMessage() for record in records] == [
        "source 'wire' fails: StaleSourceData",
        "source 'wire' works again",
        "source 'wire' fails: SourceProtocolError",
        "source 'wire' works again",
    ]


async def test_a_failed_dependency_is_no_failure_of_what_derives_from_it(records: Records) -> None:
    derived = Derived("sum", needs=lambda k: [A])
    async with builder(Single("wire", "a", fetch=down), derived) as building:
        await building.build([key("sum")], strict=False)
    assert [record.getMessage() for record in records] == ["source 'wire' fails: ConnectionError"]


async def test_a_source_that_cannot_say_what_it_serves_fails(records: Records) -> None:
    class Unsure(Single):
        def supports(self, key: ResourceKey) -> bool:
            raise ValueError("who knows")

    async with builder(Unsure("unsure"), Single("a")) as building:
        await building.build([A])
    assert [record.getMessage() for record in records] == ["source 'unsure' fails: ValueError"]


async def test_refreshes_in_the_background_are_told_apart(records: Records) -> None:
    world = World(records, default_policy=FreshnessPolicy(
        10, 1_000, refresh_mode=RefreshMode.STALE_WHILE_REVALIDATE
    ))  # fmt: skip
    await world.read()
    for error in (ConnectionError(), ConnectionError(), None):
        await world.read(error=error)
    lines = await world.lines()
    assert lines[:2] == [FAILED, "WARNING background refresh fails: ConnectionError"]
    assert sorted(lines[2:]) == ["INFO background refresh works again", WORKS]


class Cache(BatchCache):
    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    async def _travel(self, call: str) -> None:
        await super()._travel(call)
        if self.error is not None:
            raise self.error


async def test_a_cache_is_told_by_reads_and_writes(records: Records) -> None:
    cache = Cache()
    async with builder(Single("a"), cache=cache) as building:
        for number, error in enumerate((None, OSError("disk"), OSError("disk"), None, None)):
            cache.error = error
            await building.build([key("a", str(number))])
            await asyncio.sleep(1)
    assert sorted(f"{each.levelname} {each.getMessage()}" for each in records) == [
        "INFO read of cache Cache works again",
        "INFO write of cache Cache works again",
        "WARNING read of cache Cache fails: OSError",
        "WARNING write of cache Cache fails: OSError",
    ]


class Refusing(LeasingCache):
    """Answers, but stores nothing that it does not know."""

    async def fulfil_many(self, values: Any, **terms: Any) -> Any:
        odd = {each.key: TypeError("unknown") for each in values if "odd" in each.key.subject}
        return odd or await super().fulfil_many(values, **terms)


async def test_a_cache_that_stores_nothing_does_not_work_again(records: Records) -> None:
    async with builder(Single("a"), cache=Refusing()) as building:
        for subject in ("odd 1", "odd 2", "even", "odd 3"):
            await building.build([key("a", subject)])
            await asyncio.sleep(1)
    assert [f"{each.levelname} {each.getMessage()}" for each in records] == [
        "WARNING write of cache Refusing fails: TypeError",
        "INFO write of cache Refusing works again",
        "WARNING write of cache Refusing fails: TypeError",
    ]


class Sink:
    """A sink that is called directly."""

    coalestra_non_blocking = True

    def __init__(self) -> None:
        self.broken = False

    def emit(self, event_type: str, **payload: Any) -> None:
        if self.broken:
            raise ConnectionError("broken pipe")

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        self.emit(metric)

    def observe(self, metric: str, value: float, **labels: str) -> None:
        self.emit(metric)


@pytest.mark.parametrize("kind", ["event", "metrics"])
@pytest.mark.parametrize("buffered", [False, True])
async def test_a_sink_that_fails_is_named_once(records: Records, kind: str, buffered: bool) -> None:
    sink = Sink()
    sinks: dict[str, Any] = {"events" if kind == "event" else "metrics": sink}
    world = World(records, buffer_observability=buffered, **sinks)
    for broken in (False, True, True, False):
        sink.broken = broken
        await world.read()
        for buffer in world.builder._sinks.buffers.values():
            buffer.flush(5)
    assert await world.lines() == [
        f"WARNING {kind} sink Sink fails: ConnectionError",
        f"INFO {kind} sink Sink works again",
    ]


@pytest.mark.parametrize("buffered", [False, True])
async def test_an_event_sink_that_logs_says_it_instead(records: Records, buffered: bool) -> None:
    world = World(records, events=LoggingEventSink(), buffer_observability=buffered)
    await world.read(error=ConnectionError())
    await world.lines()
    assert [r for r in records if not hasattr(r, "event_type")] == []
    assert len([r for r in records if r.levelno == logging.WARNING]) >= 1


class Blocking(logging.Handler):
    """Holds up whoever gives it a record."""

    def __init__(self, gate: ThreadGate) -> None:
        super().__init__()
        self.gate = gate
        self.threads: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.threads.add(threading.current_thread().name)
        self.gate.pass_()


async def test_a_handler_that_blocks_takes_no_build_with_it(records: Records) -> None:
    gate = ThreadGate()
    handler = Blocking(gate)
    logger = logging.getLogger("coalestra")
    logger.addHandler(handler)
    try:
        world = World(records)
        for error in (ConnectionError(), None) * 3:
            await world.read(error=error)
        assert len(world.source.calls) == 6
        with pytest.raises(ObservabilityShutdownTimeoutError, match="log") as caught:
            await world.builder.aclose()
        assert caught.value.pending_components["log"] >= 1
        gate.open()
    finally:
        logger.removeHandler(handler)
    assert threading.main_thread().name not in handler.threads


async def test_a_handler_that_raises_takes_no_build_with_it(records: Records) -> None:
    class Raising(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            raise ValueError("no disk")

    handler = Raising()
    logger = logging.getLogger("coalestra")
    logger.addHandler(handler)
    try:
        world = World(records)
        for error in (ConnectionError(), None) * 3:
            await world.read(error=error)
        await world.builder.aclose()
    finally:
        logger.removeHandler(handler)
    assert len(world.source.calls) == 6


async def test_without_a_listener_no_thread_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("coalestra")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    world = World([])
    before = set(threading.enumerate())
    await world.read(error=ConnectionError())
    assert not {each.name for each in threading.enumerate() if each not in before}


def test_a_builder_that_is_used_by_one_loop_after_the_other_logs_in_each(records: Records) -> None:
    async def read(world: World, error: Exception | None) -> None:
        await world.read(error=error)
        await asyncio.sleep(0.05)

    world = World(records)
    for error in (ConnectionError(), None, ConnectionError()):
        asyncio.run(read(world, error))
    lines = asyncio.run(world.lines())
    assert lines == [FAILED, WORKS, FAILED]
