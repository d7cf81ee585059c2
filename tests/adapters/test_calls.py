"""However a function is written, the adapters of all three kinds call it right."""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import pytest

from coalestra import SnapshotBuilder
from coalestra.concurrency.threads import WorkerThreads, current_threads
from coalestra.core.values import SourcePayload
from tests.adapters.sample_calls import KINDS, PRICE, adapter, answering, call, payload_in
from tests.support import ThreadGate, begun, settle
from tests.support.running import without_collector

pytestmark = pytest.mark.parametrize("kind", KINDS)


def plain(kind: str, seen: list[threading.Thread]) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        seen.append(threading.current_thread())
        return answering(kind, "value")

    return function


class Service:
    """An object whose call is async."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def __call__(self, *_: Any) -> Any:
        return answering(self.kind, "value")


@pytest.mark.parametrize("in_thread", [True, False])
async def test_every_form_of_async_callable_is_awaited(kind: str, in_thread: bool) -> None:
    async def function(prefix: str, *_: Any) -> Any:
        return answering(kind, "value")

    forms: list[Callable[..., Any]] = [
        Service(kind),
        functools.partial(function, "prefix"),
        functools.partial(functools.partial(Service(kind))),
        lambda *arguments: function("prefix", *arguments),
        lambda *_: Eventually(answering(kind, "value")),
    ]
    for form in forms:
        answer = await call(adapter(kind, form, run_sync_in_thread=in_thread))
        assert payload_in(kind, answer) == SourcePayload("value")


class Eventually:
    """An awaitable that is no coroutine."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self.value


async def test_what_a_thread_returned_to_be_awaited_is_awaited_on_the_loop(kind: str) -> None:
    called: list[threading.Thread] = []
    awaited: list[threading.Thread] = []

    async def value() -> Any:
        awaited.append(threading.current_thread())
        return answering(kind, "value")

    def function(*_: Any) -> Awaitable[Any]:
        called.append(threading.current_thread())
        return value()

    await call(adapter(kind, function))
    assert called[0] is not threading.current_thread()
    assert awaited == [threading.current_thread()]


async def test_a_payload_is_passed_on_as_it_is(kind: str) -> None:
    payload = SourcePayload("value", observed_at=5.0, metadata={"page": 3})
    answer = await call(adapter(kind, lambda *_: answering(kind, payload)))
    assert payload_in(kind, answer) is payload


class Strange(BaseException):
    """Nothing that belongs into a source."""


FORBIDDEN = (StopIteration, asyncio.CancelledError, GeneratorExit, Strange)


FORMS = pytest.mark.parametrize("form", ["in a thread", "here", "awaited"])


def raising(kind: str, form: str, error: BaseException) -> Any:
    """A source whose function raises an error."""

    def plain(*_: Any) -> Any:
        raise error

    async def awaited(*_: Any) -> Any:
        await asyncio.sleep(0)
        raise error

    function = awaited if form == "awaited" else plain
    return adapter(kind, function, run_sync_in_thread=form == "in a thread")


@pytest.mark.parametrize("kind_of_error", FORBIDDEN)
@FORMS
async def test_an_error_that_would_end_more_than_the_call_fails_the_call_alone(
    kind: str, form: str, kind_of_error: type[BaseException]
) -> None:
    well = adapter("single", lambda *_: "value", name="well", priority=1)
    async with SnapshotBuilder([raising(kind, form, kind_of_error("odd")), well]) as building:
        assert (await building.build([PRICE]))[PRICE].source == "well"
        assert (await building.health_snapshot()).sources["rest"].failed_attempt_count


async def test_a_coroutine_that_is_closed_ends_as_it_is_told(kind: str) -> None:
    """Its ``GeneratorExit`` is not the function's, and no error of the source."""
    closed: list[bool] = []

    async def function(*_: Any) -> Any:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            closed.append(True)

    coroutine = call(adapter(kind, function))
    coroutine.send(None)
    await asyncio.create_task(closing(coroutine))
    assert closed == [True]


async def closing(coroutine: Any) -> None:
    """Close a coroutine from another task than the one that ran it."""
    coroutine.close()


@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
@FORMS
def test_what_ends_the_program_reaches_it(
    kind: str, form: str, kind_of_error: type[BaseException]
) -> None:
    error = kind_of_error(3)

    async def main() -> None:
        async with SnapshotBuilder([raising(kind, form, error)]) as building:
            await building.build([PRICE], strict=False)
            await asyncio.Event().wait()

    with pytest.raises(kind_of_error) as ended:
        asyncio.run(main())
    assert ended.value is error


@pytest.mark.parametrize("kind_of_error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_in_a_thread_reaches_it_though_its_caller_has_left(
    kind: str, kind_of_error: type[BaseException]
) -> None:
    """The caller's time was up, for instance."""
    error, gate = kind_of_error(3), ThreadGate()

    def function(*_: Any) -> Any:
        gate.pass_()
        raise error

    async def main() -> None:
        task = await begun(call(adapter(kind, function)))
        gate.wait_arrived()
        task.cancel()
        gate.open()
        await asyncio.wait([task])
        await settle()

    with pytest.raises(kind_of_error) as ended:
        asyncio.run(main())
    assert ended.value is error


class Payload:
    """Something that a function has in its hands."""


@pytest.mark.real_loop  # the virtual one looks at the frames of threads
@pytest.mark.parametrize("leaves", [True, False])
async def test_an_error_keeps_nothing_alive_but_what_it_leads_to(kind: str, leaves: bool) -> None:
    """Also if its caller has left: only the collector would find a cycle, and it comes late."""
    gate, alive = ThreadGate(), weakref.WeakSet[Payload]()

    def function(*_: Any) -> Any:
        payload = Payload()
        alive.add(payload)
        gate.pass_()
        raise ValueError("too late")

    threads = WorkerThreads()
    token = current_threads.set(threads)
    try:
        with without_collector():
            task = await begun(call(adapter(kind, function)))
            gate.wait_arrived()
            if leaves:
                task.cancel()
            gate.open()
            await asyncio.wait([task])
            if not leaves:
                assert isinstance(task.exception(), ValueError)
            del task
            threads.close()
            assert not alive
    finally:
        current_threads.reset(token)


async def test_a_coroutine_that_a_cancelled_thread_still_returns_is_closed(kind: str) -> None:
    gate = ThreadGate()
    left: list[Any] = []

    async def value() -> None:
        pass

    def function(*_: Any) -> Any:
        gate.pass_()
        left.append(value())
        return left[0]

    task = await begun(call(adapter(kind, function)))
    task.cancel()
    await settle()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left[0].cr_frame is None


async def test_a_function_that_cancels_the_task_it_runs_in_has_cancelled_it(kind: str) -> None:
    def function(*_: Any) -> Any:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return Eventually(answering(kind, 1))

    task = asyncio.create_task(call(adapter(kind, function, run_sync_in_thread=False)))
    with pytest.raises(asyncio.CancelledError):
        await task
