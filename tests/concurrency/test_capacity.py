"""Capacity: limits hold, order holds, and no slot is ever lost or doubled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coalestra.concurrency.capacity import CapacityController, CapacityLimiter, CapacitySnapshot
from tests.support import settle

pytestmark = pytest.mark.concurrency


# The limiter ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "2", None])
def test_a_limit_that_is_no_whole_number_above_zero_is_refused(limit: Any) -> None:
    """A limiter without slots would block for ever."""
    with pytest.raises(ValueError if type(limit) is int else TypeError, match="limit"):
        CapacityLimiter(limit)


async def test_no_more_than_limit_hold_a_slot_at_once() -> None:
    """And all of them do at some moment."""
    limiter, inside, most = CapacityLimiter(3), 0, 0

    async def work() -> None:
        nonlocal inside, most
        async with limiter.slot():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(1)
            inside -= 1

    await asyncio.gather(*(work() for _ in range(10)))
    assert most == 3
    assert await limiter.snapshot() == CapacitySnapshot(limit=3, in_use=0, waiting=0)


async def test_a_release_too_many_is_refused_and_changes_nothing() -> None:
    """Otherwise the limiter would grow."""
    limiter = CapacityLimiter(1)
    with pytest.raises(RuntimeError, match="more often"):
        limiter.release()
    await limiter.acquire()
    assert not limiter.try_acquire()


# The controller ------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [5, [("a", 1)], {None: 1}, {"a": 1.5}])
def test_limits_that_are_none_are_refused_by_name(limits: Any) -> None:
    with pytest.raises(TypeError, match="source_limits"):
        CapacityController(global_limit=1, source_limits=limits)


def test_a_limited_source_may_not_be_named_like_the_global_limit() -> None:
    """Its figures would hide the global ones."""
    with pytest.raises(ValueError, match="__global__"):
        CapacityController(global_limit=1, source_limits={"__global__": 1})


async def test_releasing_a_lease_twice_gives_its_slots_back_once() -> None:
    """A second release might free somebody else's slot."""
    controller = CapacityController(global_limit=2, source_limits={"a": 2})
    first, second = await controller.acquire("a"), await controller.acquire("a")
    first.release()
    first.release()
    assert [lease.released for lease in (first, second)] == [True, False]
    assert controller.view() == {
        "__global__": CapacitySnapshot(2, 1, 0),
        "a": CapacitySnapshot(2, 1, 0),
    }
    second.release()


async def test_capacity_tells_about_itself() -> None:
    """Every stateful object can be looked into."""
    controller = CapacityController(global_limit=2, source_limits={"a": 1})
    lease = await controller.acquire("a")
    assert repr(lease) == "<CapacityLease 'a' held>"
    assert "limit=2 in_use=1 waiting=0" in repr(controller)
    lease.release()
    assert repr(lease) == "<CapacityLease 'a' released>"


async def test_who_holds_the_slots_is_known_by_source() -> None:
    """Who waits in vain needs to know whom for; a released or forgotten lease counts no more."""
    controller = CapacityController(global_limit=4)
    leases = [await controller.acquire(source) for source in ("price", "reviews", "reviews")]
    assert controller.holders() == {"reviews": 2, "price": 1}
    assert list(controller.holders()) == ["reviews", "price"]
    leases[0].release()
    assert controller.holders() == {"reviews": 2}
    controller.forget()
    assert controller.holders() == {}
    own = await controller.acquire("price")
    leases[1].release()
    assert controller.holders() == {"price": 1}
    own.release()


@pytest.mark.parametrize("waited", [False, True])
async def test_who_is_handed_a_slot_of_its_source_is_not_overtaken_globally(waited: bool) -> None:
    controller = CapacityController(global_limit=1, source_limits={"a": 1})
    first = await controller.acquire("b" if waited else "a")
    if waited:
        second = asyncio.ensure_future(controller.acquire("a"))
        await settle()
        first.release()
        first = await second
    waiting = []
    for _ in range(2):
        waiting.append(asyncio.ensure_future(controller.acquire("a")))
        await settle()
    first.release()
    assert controller.try_acquire("b") is None
    lease = await waiting[0]
    waiting[1].cancel()
    lease.release()
    await asyncio.wait(waiting)
    assert controller.view()["__global__"].in_use == controller.view()["a"].in_use == 0
    assert controller.holders() == {}
