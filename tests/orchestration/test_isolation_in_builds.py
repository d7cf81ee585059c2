"""No two readers ever share a mutable object, whichever way a payload has come (section 12)."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from coalestra import (
    AsyncMemoryCache,
    PayloadCopyShutdownTimeoutError,
    PayloadCopySubsystemClosedError,
    PayloadIsolationError,
    ResourceKey,
    ResourceResolutionError,
    Snapshot,
    SnapshotBuilder,
    SnapshotBuildError,
    SnapshotRequest,
    SourcePayload,
)
from tests.contracts.caches import SingleKeyCache
from tests.orchestration.scripted import Batch, Derived, Single, builder, key
from tests.orchestration.stock import Stock
from tests.support import ThreadGate, begun, settle

K, D = key("k"), key("d")


def mutable() -> dict[str, Any]:
    return {"list": [1], "set": {1}, "nested": {"deep": [1]}}


def spoil(payload: Any) -> None:
    """Change a payload wherever that is possible."""
    payload["list"].append("spoilt")
    payload["set"].add("spoilt")
    payload["nested"]["deep"].clear()
    payload["more"] = "spoilt"


class Keeping(Single):
    """A source that keeps a reference to what it has returned, as payload and as metadata."""

    def __init__(self) -> None:
        super().__init__("k", fetch=self._fetch)
        self.kept: Any = mutable()
        self.metadata: Any = {"tags": ["a"]}

    async def _fetch(self, key: ResourceKey, context: Any) -> Any:
        return SourcePayload(self.kept, metadata=self.metadata)


@pytest.fixture(params=["default copier", "in threads", "custom copier", "custom in threads"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every way in which a builder may copy."""
    ways: dict[str, dict[str, Any]] = {
        "default copier": {}, "in threads": {"run_payload_copies_in_thread": True},
        "custom copier": {"payload_copier": copy.deepcopy},
        "custom in threads": {"payload_copier": copy.deepcopy,
            "run_payload_copies_in_thread": True},
    }  # fmt: skip
    return ways[request.param]


@pytest.fixture(params=["memory cache", "custom cache"])
def cached(request: pytest.FixtureRequest, settings: dict[str, Any]) -> dict[str, Any]:
    """The same, with the default cache and with one of somebody else's."""
    if request.param == "custom cache":
        return {**settings, "cache": SingleKeyCache()}
    return settings


async def test_sources_and_callers_may_change_what_they_have(cached: dict[str, Any]) -> None:
    source = Keeping()
    async with builder(source, **cached) as building:
        first = await building.build([K])
        spoil(source.kept)
        source.metadata["tags"].append("spoilt")
        spoilt = copy.deepcopy(source.kept)
        for snapshot in (first, await building.build([K]), await building.build([K])):
            assert snapshot.value(K) == mutable()
            assert snapshot[K].metadata["tags"] == ["a"]
            spoil(snapshot.value(K))
            snapshot[K].metadata["tags"].append("spoilt")
        assert source.kept == spoilt
        assert source.metadata == {"tags": ["a", "spoilt"]}
        assert len(source.calls) == 1


async def test_a_derivation_may_change_inputs_and_keep_its_output(cached: dict[str, Any]) -> None:
    outputs: list[Any] = []

    class Careless(Derived):
        async def derive(self, key: ResourceKey, dependencies: Snapshot, context: Any) -> Any:
            value = dependencies.value(K)
            result = copy.deepcopy(value)
            spoil(value)
            dependencies[K].metadata["tags"].append("spoilt")
            outputs.append(result)
            return result

    source = Keeping()
    async with builder(source, Careless("d", needs=lambda k: [K]), **cached) as building:
        first = await building.build([D, K])
        spoil(outputs[0])
        second = await building.build([D, K])
        for snapshot in (first, second):
            assert snapshot.value(D) == snapshot.value(K) == mutable()
            assert snapshot[K].metadata["tags"] == ["a"]
        assert source.kept == mutable()


async def test_a_publisher_keeps_what_it_gave_and_what_it_got(cached: dict[str, Any]) -> None:
    async with builder(Single("k"), **cached) as building:
        given, metadata = mutable(), {"tags": ["a"]}
        result = await building.publisher.publish(K, given, source="s", metadata=metadata)
        spoil(given)
        metadata["tags"].append("spoilt")
        assert result.value.value == mutable()
        spoil(result.value.value)
        snapshot = await building.build([K])
        assert snapshot.value(K) == mutable()
        assert snapshot[K].metadata["tags"] == ["a"]
        spoil(snapshot.value(K))
        await asyncio.sleep(1)
        later = await building.publisher.publish(K, "next", source="s")
        assert later.previous is not None
        assert later.previous.value == mutable()


async def test_a_batch_may_return_one_object_for_many_keys(cached: dict[str, Any]) -> None:
    shared = mutable()
    keys = [key("b", str(n)) for n in range(3)]
    async with builder(Batch("b", answer=lambda k: shared), **cached) as building:
        snapshot = await building.build(keys)
        spoil(snapshot.value(keys[0]))
        assert snapshot.value(keys[1]) == snapshot.value(keys[2]) == mutable()
        assert shared == mutable()


async def test_a_custom_cache_may_change_what_it_was_given(settings: dict[str, Any]) -> None:
    cache = SingleKeyCache()
    async with builder(Keeping(), cache=cache, **settings) as building, building.session() as kept:
        first = await kept.resolve([K])
        (held,) = cache.held.values()
        spoil(held.value)
        assert first.value(K) == kept.snapshot().value(K) == mutable()
        spoilt = await building.build([K])
        assert spoilt.value(K) == held.value
        assert spoilt.value(K) is not held.value


# Copiers, threads and their bounds


class Stuck:
    """A copier that passes a gate once it is told to."""

    def __init__(self) -> None:
        self.gate = ThreadGate()
        self.armed = False

    def __call__(self, value: Any) -> Any:
        if self.armed:
            self.gate.pass_()
        return copy.deepcopy(value)


def with_stuck(*sources: Any, **settings: Any) -> tuple[Stuck, SnapshotBuilder]:
    stuck = Stuck()
    building = builder(
        *sources, payload_copier=stuck, run_payload_copies_in_thread=True, **settings
    )
    return stuck, building


# The end


@pytest.mark.parametrize("form", ["build", "try_request", "try_requests"])
async def test_closing_wakes_those_who_wait_for_a_copy_thread(form: str) -> None:
    stuck, building = with_stuck(Stock("k", {"k": [1]}), max_copy_concurrency=1)
    await building.build([K])
    stuck.armed = True
    request = SnapshotRequest(required=[K])
    readers: list[asyncio.Task[Any]] = []
    for _ in range(2):
        asked: dict[str, Any] = {"build": [K], "try_request": request, "try_requests": [request]}
        readers.append(asyncio.ensure_future(getattr(building, form)(asked[form])))
        await settle()
    closing_builder = await begun(building.aclose())
    assert [each.done() for each in readers] == [False, True]
    error = readers[1].exception()
    assert isinstance(error, PayloadCopySubsystemClosedError)
    stuck.gate.open()
    await closing_builder
    await asyncio.gather(*readers, return_exceptions=True)


@pytest.mark.parametrize("form", ["build", "try_request", "resolve", "revalidate"])
async def test_closing_says_which_copies_outlast_it_and_lets_go_who_waits(form: str) -> None:
    stuck, building = with_stuck(Stock("k", {"k": [1]}), copy_shutdown_timeout_seconds=2.0)
    session = building.session()
    await session.resolve([K])
    stuck.armed = True
    unit = building if form in ("build", "try_request") else session
    asked: Any = SnapshotRequest(required=[K]) if form == "try_request" else [K]
    reader = await begun(getattr(unit, form)(asked))
    with pytest.raises(PayloadCopyShutdownTimeoutError) as caught:
        await building.aclose()
    assert caught.value.active_copies == 1
    assert dict(caught.value.active_components) == {"builder": 1}
    with pytest.raises(PayloadCopySubsystemClosedError):
        await reader
    health = await building.health_snapshot()
    assert health.payload_copy_shutdown_incomplete
    assert health.payload_copy_shutdown_timeout_count == 1
    assert health.payload_copy_active_at_last_shutdown_timeout == 1
    stuck.gate.open()
    await building.wait_for_payload_copy_shutdown()
    health = await building.health_snapshot()
    assert not health.payload_copy_shutdown_incomplete
    assert health.payload_copy_components["builder"].shutdown_complete


async def test_who_waits_for_a_copy_thread_is_told_who_has_it() -> None:
    derived = Derived("d", needs=lambda _: [K])
    sources = Stock("k", {"k": [1], "other": [2]}), Stock("large", {"large": [3]}), derived
    stuck, building = with_stuck(*sources, max_copy_concurrency=1)
    await building.build([K])
    stuck.armed = True
    first = await begun(building.build([key("large")], strict=False))
    for waits in (D, key("other"), K):
        error = (await building.build([waits], strict=False, deadline_seconds=3)).errors[waits]
        told = "was waiting for a copy thread, held by 'payload of large' (1)"
        assert told in str(error)
    stuck.gate.open()
    await first


async def test_a_deadline_while_dependencies_are_copied_is_counted_and_told_as_that() -> None:
    stuck, building = with_stuck(Stock("k", {"k": [1]}), Derived("d", needs=lambda _: [K]))
    await building.build([K])
    stuck.armed = True
    error = (await building.build([D], strict=False, deadline_seconds=3)).errors[D]
    assert isinstance(error, ResourceResolutionError)
    assert [each.error_type for each in error.failures] == ["SnapshotDeadlineExceededError"]
    assert "3 s passed while what source 'd' derives from was being copied" in str(error)
    health = await building.health_snapshot()
    assert (health.payload_copy_timeout_count, health.deadline_exceeded_count) == (1, 1)
    stuck.gate.open()


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("payload", ["small", ["large"] * 100])
async def test_what_can_be_copied_no_longer_costs_a_build_no_other_value(
    payload: Any, threads: bool
) -> None:
    broken: list[Any] = []

    def copier(value: Any) -> Any:
        if value in broken:
            raise LookupError("no copy today")
        return copy.deepcopy(value)

    settings = {"payload_copier": copier, "run_payload_copies_in_thread": threads}
    building = builder(Stock("k", {"k": payload, "l": 1}), **settings)
    wanted = [K, key("l")]
    assert (await building.build(wanted)).value(K) == payload
    broken.append(payload)
    for keys in (wanted, wanted[:1]):
        snapshot = await building.build(keys, strict=False)
        assert list(snapshot) == keys[1:]
        assert isinstance(snapshot.errors[K], PayloadIsolationError)
    broken.clear()
    assert (await building.build(wanted)).value(K) == payload


@pytest.mark.parametrize("where", ["payload", "metadata"])
@pytest.mark.parametrize("number", [1, 2, 1_100])
async def test_what_says_no_to_its_next_copy_costs_a_build_or_a_session_no_other_value(
    where: str, number: int
) -> None:
    broken: list[str] = []

    class Moody:
        def __deepcopy__(self, memo: Any) -> Moody:
            if broken:
                raise LookupError(broken[0])
            return Moody()

    async def fetch(asked: ResourceKey, context: Any) -> SourcePayload[Any]:
        if asked.subject:
            return SourcePayload(1)
        own = {"own": Moody()}
        return SourcePayload(own) if where == "payload" else SourcePayload(1, metadata=own)

    keys = [K, *(key("k", str(each)) for each in range(1, number))]
    building = builder(Single("k", fetch=fetch))
    for _ in range(2):
        assert (await building.build(keys)).complete
    session = building.session()
    await session.resolve(keys)
    broken.append("not today")
    for snapshot in (
        *[await building.build(keys, strict=False) for _ in range(2)],
        session.snapshot(),
        await session.snapshot_async(),
    ):
        assert list(snapshot) == keys[1:]
        assert isinstance(snapshot.errors[K], PayloadIsolationError)
    with pytest.raises(SnapshotBuildError):
        await building.build(keys)


@pytest.mark.parametrize("by", ["payload", "copier"])
async def test_what_cannot_be_copied_fails_alone_and_its_error_leads_to_the_line(by: str) -> None:
    def culprit(value: Any, *_: Any) -> Any:
        if value == 1:
            return value
        raise KeyError("no copy")

    value: Any = type("Payload", (), {"__deepcopy__": culprit})()
    copier = culprit if by == "copier" else None
    building = builder(Stock("stock", {"k": value, "other": 1}), payload_copier=copier)
    snapshot = await building.build([K, key("other")], strict=False)
    assert snapshot.value(key("other")) == 1
    error = snapshot.errors[K]
    assert isinstance(error, ResourceResolutionError)
    (failure,) = error.failures
    assert failure.error_type == "PayloadIsolationError"
    assert "Payload" in failure.message
    assert "in culprit" in failure.traceback
    assert (await building.health_snapshot()).payload_copy_failure_count >= 1


async def test_a_session_of_a_closed_builder_makes_no_more_copies() -> None:
    building = builder(Stock("k", {"k": [1]}))
    session = building.session()
    await session.resolve([K])
    await building.aclose()
    with pytest.raises(PayloadCopySubsystemClosedError) as caught:
        session.snapshot()
    assert caught.value.component == "builder"


@pytest.mark.parametrize("kind", [None, AsyncMemoryCache, SingleKeyCache])
async def test_health_knows_the_builder_and_a_memory_cache_as_components(kind: Any) -> None:
    building = builder(Single("k"), cache=kind and kind())
    await building.build([K])
    known = {"builder"} if kind is SingleKeyCache else {"builder", "cache"}
    assert set((await building.health_snapshot()).payload_copy_components) == known
