"""Independent work overlaps, ready keys travel together, none waits in a circle (2, 4 to 7)."""

from __future__ import annotations

import asyncio

import pytest

from coalestra import AsyncMemoryCache, DependencyCycleError, FetchContext, ResourceKey
from coalestra.concurrency import pace
from coalestra.concurrency.pace import Pace
from coalestra.orchestration.singleflight import Agenda
from tests.orchestration.scripted import Batch, Derived, Single, builder, key, latency
from tests.support import Gate, begun, settle, taking
from tests.support.virtual_loop import VirtualLoop, callback_of

pytestmark = pytest.mark.concurrency


async def test_a_build_takes_as_long_as_its_longest_chain() -> None:
    base = Single("base", fetch=latency(2))
    middle = Derived("middle", needs=lambda k: [key("base")])
    other = Single("other", fetch=latency(3))
    building = builder(base, middle, other)
    with taking(3):
        await building.build([key("middle"), key("other"), key("base")])


async def test_a_slow_key_does_not_hold_back_the_fallback_of_another() -> None:
    async def fetch(key: ResourceKey, context: FetchContext) -> str:
        if key.subject == "fails":
            raise ConnectionError("down")
        await asyncio.sleep(5)
        return "slow"

    second = Single("second", "x", fetch=latency(5), priority=1)
    building = builder(Single("first", "x", fetch=fetch), second)
    with taking(5):
        snapshot = await building.build([key("x", "slow"), key("x", "fails")])
    assert snapshot[key("x", "fails")].source == "second"


async def test_a_hundred_derived_keys_over_a_hundred_bases_make_one_batch_call() -> None:
    bases = Batch("base")
    derived = Derived("derived", needs=lambda k: [key("base", k.subject)])
    building = builder(bases, derived)
    snapshot = await building.build([key("derived", str(i)) for i in range(100)])
    assert [len(call) for call in bases.calls] == [100]
    assert snapshot.diagnostics.batch_calls == 1
    assert snapshot.diagnostics.derived_calls == 100


@pytest.mark.parametrize("builds", [2, 3])
async def test_a_cycle_closed_over_several_builds_is_an_error_for_all(builds: int) -> None:
    gate = Gate()

    # Each ring key first waits behind a gated fallback, so that all builds are under way when the
    # circle closes.
    class Failing(Single):
        async def fetch(self, k: ResourceKey, context: FetchContext) -> str:
            await gate.pass_()
            raise ConnectionError("try the derived source")

    first = Failing("first", "ring", priority=20)
    ring = Derived("ring", needs=lambda k: [key("ring", str((int(k.subject) + 1) % builds))])
    building = builder(first, ring)
    tasks = [
        asyncio.ensure_future(building.build([key("ring", str(i))], strict=False))
        for i in range(builds)
    ]
    await gate.wait_arrived(builds)
    gate.open()
    for i, snapshot in enumerate(await asyncio.gather(*tasks)):
        error = snapshot.errors[key("ring", str(i))]
        assert isinstance(error, DependencyCycleError)
        assert len(error.path) == builds + 1


async def test_a_cycle_is_found_that_closes_when_a_key_turns_to_a_derived_source() -> None:
    gate = Gate()

    class Failing(Single):
        async def fetch(self, k: ResourceKey, context: FetchContext) -> str:
            if k.subject == "late":
                await gate.pass_()
            raise ConnectionError("try the derived source")

    late, early = key("ring", "late"), key("ring", "early")
    ring = Derived("ring", needs=lambda k: [early if k == late else late])
    building = builder(Failing("first", "ring", priority=20), ring)
    waiting = await begun(building.build([early, late], strict=False), gate)
    await settle()
    gate.open()
    errors = (await waiting).errors
    assert all(isinstance(errors[each], DependencyCycleError) for each in (early, late))


async def test_nothing_is_derived_from_its_own_value_of_before() -> None:
    own = key("own")
    building = builder(Derived("own", needs=lambda k: [key("base"), k]), Single("base"))
    await building.publisher.publish(own, "told", source="stream")
    session = building.session()
    await session.resolve([own])
    again = await session.revalidate([own], force_refresh=True, strict=False)
    await building.publisher.invalidate(own)
    for snapshot in (again, await building.build([own], strict=False)):
        error = snapshot.errors[own]
        assert isinstance(error, DependencyCycleError)
        assert error.path == (own, own)


async def test_a_chain_of_thousands_of_derived_keys_resolves_cold_and_warm() -> None:
    end = 3_000

    def needs(k: ResourceKey) -> list[ResourceKey]:
        step = int(k.subject)
        return [key("base") if step == end else key("chain", str(step + 1))]

    class Link(Derived):
        async def derive(self, k: ResourceKey, dependencies: object, context: object) -> int:
            self.calls.append(k)
            return int(k.subject)

    chain = Link("chain", needs=needs)
    building = builder(Single("base"), chain, cache=AsyncMemoryCache(max_entries=None))
    top = key("chain", "1")
    assert (await building.build([top])).value(top) == 1
    assert len(chain.calls) == end
    warm = await building.build([top])
    assert warm[top].from_cache
    assert len(chain.calls) == end


async def test_a_failure_at_the_end_of_a_long_chain_reaches_its_top() -> None:
    def needs(k: ResourceKey) -> list[ResourceKey]:
        return [key("chain", str(int(k.subject) + 1))] if k.subject != "1500" else [key("nobody")]

    building = builder(Derived("chain", needs=needs))
    snapshot = await building.build([key("chain", "1")], strict=False)
    assert key("chain", "1") in snapshot.errors


async def test_a_diamond_of_thirty_layers_takes_linear_work_cold_and_warm() -> None:
    def needs(k: ResourceKey) -> list[ResourceKey]:
        layer = int(k.subject[1:])
        if layer == 30:
            return [key("base")]
        return [key("diamond", f"a{layer + 1}"), key("diamond", f"b{layer + 1}")]

    class Node(Derived):
        async def derive(self, k: ResourceKey, dependencies: object, context: object) -> str:
            self.calls.append(k)
            return k.subject

    nodes = Node("diamond", needs=needs)
    building = builder(Single("base"), nodes)
    top = key("diamond", "a0")
    await building.build([top])
    assert len(nodes.calls) == 61
    await building.build([top])
    assert len(nodes.calls) == 61


@pytest.mark.parametrize("lost", ["the end of a turn", "the next turn", "the end of a step"])
async def test_what_an_interrupt_has_left_behind_keeps_no_builder_from_closing(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may strike between any two lines, also those that see to it that more is done later."""
    monkeypatch.setattr(pace, "SLICE_SECONDS", -0.5)
    gate = Gate()
    building = builder(Batch("x", before=gate.pass_))
    running = await begun(building.build([key("x", str(n)) for n in range(1_000)]), gate)
    agenda = building._engine.flights.agenda
    running.cancel()
    await asyncio.wait([running])
    assert agenda._steps, "there is more to do than fits into a turn"
    if lost == "the end of a step":
        agenda._running = True
    else:
        hit = Pace.turn_over if lost == "the end of a turn" else Agenda.run
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        pending = [each for each in loop._ready if method_of(each) is hit]
        assert pending
        for handle in pending:
            handle.cancel()
    await building.aclose()
    assert (await building.health_snapshot()).singleflight_in_flight == 0


def method_of(handle: asyncio.Handle) -> object:
    return getattr(callback_of(handle), "__func__", None)
