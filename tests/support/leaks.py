"""What must be at rest once the work is over."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from tests.support.gates import Gate
from tests.support.virtual_loop import VirtualLoop

T = TypeVar("T")

_AT_REST = (
    "background_refreshes", "singleflight_in_flight", "active_dispatch_workers",
    "waiting_for_capacity", "active_payload_copies", "waiting_for_copy_capacity",
)  # fmt: skip


_looked_after: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "looked_after", default=None
)


def look_after(builder: Any) -> None:
    """See that a builder is at rest when the async test ends that has made it."""
    builders = _looked_after.get()
    if builders is not None:
        builders.append(builder)


def look_after_none() -> None:
    """Let go of the builders made so far: the test is about what lets go of them."""
    (_looked_after.get() or []).clear()


async def at_rest_in_the_end(test: Awaitable[object]) -> None:
    """Run a test, and look at every builder that it has made."""
    builders: list[Any] = []
    _looked_after.set(builders)
    await test
    for builder in builders:
        await no_leaks(builder)


async def settle() -> None:
    """Wait until nothing more can happen unless (virtual) time moves."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, VirtualLoop):
        await loop.settled()
        return
    for _ in range(100):
        await asyncio.sleep(0)


async def begun(
    work: Coroutine[Any, Any, T], gate: Gate | None = None, arrivals: int = 1
) -> asyncio.Task[T]:
    """Begin some work, and wait until it has come to the gate, or needs (virtual) time to go on."""
    task = asyncio.ensure_future(work)
    await (settle() if gate is None else gate.wait_arrived(arrivals))
    return task


async def no_leaks(builder: Any) -> None:
    """Assert that a builder at rest holds no slot, waiter, flight, refresh, probe or copy."""
    await settle()
    health = await builder.health_snapshot()
    held: dict[str, Any] = {name: getattr(health, name) for name in _AT_REST}
    for name, limiter in health.capacity.items():
        held[f"slots of {name}"] = limiter.in_use
        held[f"waiting for {name}"] = limiter.waiting
    for identity, circuit in health.circuits.items():
        held[f"probe of {identity}"] = circuit.half_open_probe_active
    held = {name: count for name, count in held.items() if count}
    assert not held, f"still held at rest: {held}"
