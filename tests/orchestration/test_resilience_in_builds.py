"""Failing sources are retried, then left alone, by the policy that applies (section 10)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coalestra import (
    CircuitBreaker,
    CircuitBreakerPolicy,
    CircuitScope,
    FetchContext,
    FreshnessPolicy,
    InMemoryMetrics,
    ResiliencePolicyResolver,
    ResourceKey,
    ResourceResolutionError,
    RetryPolicy,
    Snapshot,
    SnapshotBuilder,
    SourceFailure,
    SourcePayload,
    SourceResiliencePolicy,
)
from coalestra.concurrency import pace
from tests.orchestration.scripted import (
    Batch,
    Derived,
    Scripted,
    Single,
    builder,
    held_at,
    key,
    latency,
    tuned,
)
from tests.orchestration.stock import Stock
from tests.support import Gate, LoopClock, ThreadGate, VirtualLoop, begun, no_leaks, settle

X = key("x")
DOWN = ConnectionError("down")
RECOVERY = 10.0


def retrying(attempts: int, delay: float = 1.0) -> SourceResiliencePolicy:
    """Retry after 1, 2, 4 ... times `delay` exactly, and never open a circuit."""
    return SourceResiliencePolicy(
        RetryPolicy(attempts, delay, max_delay_seconds=100.0, jitter_ratio=0),
        CircuitBreakerPolicy(enabled=False),
    )


def breaking(
    threshold: int = 1, scope: CircuitScope = CircuitScope.SOURCE, attempts: int = 1
) -> SourceResiliencePolicy:
    """Open a circuit after `threshold` failures."""
    return SourceResiliencePolicy(
        RetryPolicy(attempts, 1.0, jitter_ratio=0), CircuitBreakerPolicy(scope, threshold, RECOVERY)
    )


def stock(policy: SourceResiliencePolicy | None, answer: Any = DOWN, **more: Any) -> Stock:
    """A source of `x` that fails unless told otherwise."""
    return tuned(Stock("x", {"x": answer}, **more), resilience_policy=policy)


def failures(snapshot: Snapshot, of: ResourceKey = X) -> tuple[SourceFailure, ...]:
    error = snapshot.errors[of]
    assert isinstance(error, ResourceResolutionError)
    return error.failures


async def failing() -> None:
    raise DOWN


async def attempt(building: SnapshotBuilder, *keys: ResourceKey, **how: Any) -> Snapshot:
    return await building.build(keys or [X], strict=False, **how)


async def circuits(building: SnapshotBuilder) -> dict[str, tuple[str, int]]:
    """The circuits that are not at rest: state and failures in a row, by name."""
    view = await building.circuit_breaker.snapshot()
    return {str(name): (one.state.value, one.failures) for name, one in view.items()}


async def timed(awaited: Awaitable[Any]) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await awaited
    return loop.time() - began


# Retries


class Teapot(Exception):
    """An error of a client of somebody else's."""


def retrying_on(retry_on: Any, attempts: int = 3) -> SourceResiliencePolicy:
    return SourceResiliencePolicy(
        RetryPolicy(attempts, 1.0, jitter_ratio=0, retry_on=retry_on),
        CircuitBreakerPolicy(enabled=False),
    )


@pytest.mark.parametrize("kind", [Single, Batch, Derived])
async def test_a_policy_says_which_errors_are_tried_again(kind: type[Scripted]) -> None:
    calls: list[Any] = []

    async def fails(*asked: Any) -> Any:
        calls.append(asked)
        raise Teapot("short and stout") if len(calls) < 3 else DOWN

    source = tuned(
        Derived("x", needs=lambda _: []) if kind is Derived else kind("x"),
        resilience_policy=retrying_on(Teapot, 9),
    )
    setattr(source, {Single: "fetch", Batch: "fetch_many"}.get(kind, "derive"), fails)
    building = builder(source)
    snapshot = await attempt(building)
    (failure,) = failures(snapshot)
    assert (failure.error_type, failure.attempts) == ("ConnectionError", 3)
    assert snapshot.diagnostics.retries == 2


async def _same_again(*asked: Any) -> Any:
    raise DOWN


@pytest.mark.parametrize("fetch, retry_on, error, attempts", [
    (_same_again, None, "ConnectionError", 3), (latency(50), (), "SourceTimeoutError", 1),
])  # fmt: skip
async def test_an_error_raised_again_tells_of_each_attempt_and_a_time_out_is_tried_if_asked_for(
    fetch: Any, retry_on: Any, error: str, attempts: int
) -> None:
    source = tuned(Single("x", fetch=fetch, timeout=2.0), resilience_policy=retrying_on(retry_on))
    (failure,) = failures(await attempt(builder(source)))
    assert (failure.error_type, failure.attempts) == (error, attempts)


@pytest.mark.parametrize(
    "fault", [ValueError("broken"), asyncio.CancelledError(), GeneratorExit(), BaseException()]
)
async def test_a_predicate_that_raises_leaves_the_error_of_the_source(fault: BaseException) -> None:
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: told.append(context))

    def says(error: BaseException) -> bool:
        raise fault

    source = stock(retrying_on(says), Teapot("418"))
    building = builder(source)
    (failure,) = failures(await attempt(building))
    assert (failure.error_type, failure.message, failure.attempts) == ("Teapot", "418", 1)
    (context,) = told
    assert context["exception"] is fault
    assert context["message"] == "coalestra: retry_on of source 'x' failed"
    source.change(x=1)
    assert (await attempt(building))[X].value == 1


def test_what_ends_the_program_is_not_tried_again_whatever_the_policy_says() -> None:
    async def interrupts(k: ResourceKey, context: FetchContext) -> Any:
        raise KeyboardInterrupt

    source = tuned(Single("x", fetch=interrupts), resilience_policy=retrying_on(Exception))
    building = builder(source, clock=None)
    loop = asyncio.new_event_loop()
    try:
        task = loop.create_task(attempt(building))
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(task)
        (failure,) = failures(loop.run_until_complete(task))
        assert (failure.error_type, failure.attempts) == ("SourceProtocolError", 1)
        loop.run_until_complete(building.aclose())
    finally:
        loop.close()


async def test_a_retry_that_would_begin_at_the_deadline_or_later_is_not_started() -> None:
    source = stock(retrying(5))
    building = builder(source)
    assert await timed(attempt(building, deadline_seconds=3)) == pytest.approx(1)
    assert len(source.calls) == 2
    (failure,) = failures(await attempt(building, deadline_seconds=1))
    assert (failure.error_type, failure.attempts) == ("ConnectionError", 1)


async def test_a_deadline_between_two_tries_ends_the_waiting_and_the_retry() -> None:
    source = stock(retrying(2, 5.0))
    building = builder(source)
    patient = asyncio.ensure_future(attempt(building, deadline_seconds=60))
    await asyncio.sleep(1)
    hasty = await attempt(building, deadline_seconds=2)
    (failure,) = failures(hasty)
    assert (failure.error_type, failure.attempts) == ("SnapshotDeadlineExceededError", 1)
    assert failures(await patient)[0].attempts == 2


async def test_nobody_left_means_no_further_retry() -> None:
    source = stock(retrying(2, 5.0))
    building = builder(source)
    session = building.session()
    task = asyncio.ensure_future(session.resolve([X]))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(100)
    assert len(source.calls) == 1
    assert session.snapshot().diagnostics.retries == 0


# Circuits of every scope


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("kind", [Single, Batch])
async def test_a_retry_goes_on_though_the_try_before_ends_only_now(
    kind: type[Scripted], limit: int
) -> None:
    """A thread, like whatever ignores its cancellation, ends when it will, and with its slot."""
    ends, answers = Gate(), Gate()

    async def answer(*_: Any) -> Any:
        if len(source.calls) == 1:
            with contextlib.suppress(asyncio.CancelledError):
                await Gate().pass_()
            await ends.pass_()
        else:
            await answers.pass_()
        return ""

    how: dict[str, Any] = {"fetch": answer} if kind is Single else {"before": answer}
    source = tuned(kind("x", timeout=1.0, **how), resilience_policy=retrying(2))
    building = builder(source, max_concurrency=limit)
    task = await begun(attempt(building))
    await asyncio.sleep(2.1)
    assert len(source.calls) == limit
    ends.open()
    await settle()
    answers.open()
    assert (await task).value(X) == ""
    assert len(source.calls) == 2


async def test_a_circuit_that_opens_does_not_stop_the_retries_of_a_call_under_way() -> None:
    source = stock(breaking(1, attempts=2))
    building = builder(source)
    task = await begun(attempt(building, key("x", "first")))
    await building.circuit_breaker.record_failure("x", policy=breaking(1).circuit)
    await task
    assert len(source.calls) == 2


# The probe


async def opened(building: SnapshotBuilder, *keys: ResourceKey) -> None:
    """Open the circuits of some keys, and let the time to recover go by."""
    await attempt(building, *keys)
    assert {state for state, _ in (await circuits(building)).values()} == {"open"}
    await asyncio.sleep(RECOVERY)
    assert {state for state, _ in (await circuits(building)).values()} == {"half_open"}


async def test_a_batch_is_one_probe_with_all_its_keys() -> None:
    source = Batch("x", answer=answering(up := set()))
    tuned(source, resilience_policy=breaking())
    building = builder(source)
    keys = [key("x", str(number)) for number in range(9)]
    await opened(building, *keys)
    up.update(keys)
    assert list(await attempt(building, *keys)) == keys
    assert await circuits(building) == {}


async def test_a_probe_cut_off_by_the_deadline_opens_the_circuit_again_without_counting() -> None:
    source = stock(breaking())
    building = builder(source)
    await opened(building)
    source.before = Gate().pass_
    await attempt(building, deadline_seconds=2)
    assert await circuits(building) == {"x": ("open", 1)}


async def test_a_worker_cancelled_from_outside_fails_its_keys_and_reopens_the_circuit() -> None:
    source = stock(breaking())
    building = builder(source)
    await opened(building)
    source.before = Gate().pass_
    probe = await begun(attempt(building))
    (worker,) = (task for task in asyncio.all_tasks() if task.get_name() == "coalestra x")
    worker.cancel()
    (failure,) = failures(await probe)
    assert failure.error_type == "SourceUnavailableError"
    assert "cancelled" in failure.message
    assert await circuits(building) == {"x": ("open", 1)}


@pytest.mark.parametrize("steps", range(3))
async def test_a_worker_cancelled_before_it_asks_again_leaves_nobody_waiting(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large batch rests once more before it is asked for."""
    monkeypatch.setattr("coalestra.orchestration.calls._KEYS_AT_ONCE", 1)
    source = Batch("x", before=failing)
    building = builder(tuned(source, resilience_policy=retrying(2)))
    task = await begun(attempt(building, A1, B1))
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    again = loop.time() + 1

    def workers() -> list[asyncio.Task[Any]]:
        here = loop.time() >= again
        return [each for each in asyncio.all_tasks() if here and each.get_name() == "coalestra x"]

    def strike() -> None:
        for worker in workers():
            worker.cancel()

    loop.interrupt_when(workers, lambda: loop.interrupt(steps, strike))
    assert set((await task).errors) == {A1, B1}


@pytest.mark.parametrize("by", ["queue timeout", "deadline"])
async def test_a_call_never_made_leaves_the_count_alone_and_the_probe_free(by: str) -> None:
    source = stock(breaking(2))
    if by == "queue timeout":
        source.queue_timeout_seconds = 2.0
    building = builder(source, max_concurrency=1)
    await attempt(building)
    lease = await building.capacity.acquire("other")
    how = {"deadline_seconds": 2} if by == "deadline" else {}
    await attempt(building, **how)
    assert await circuits(building) == {"x": ("closed", 1)}
    lease.release()
    await attempt(building)
    await asyncio.sleep(RECOVERY)
    lease = await building.capacity.acquire("other")
    await attempt(building, **how)
    assert await circuits(building) == {"x": ("half_open", 2)}
    lease.release()
    source.change(x=1)
    assert (await attempt(building)).value(X) == 1
    assert await circuits(building) == {}


async def test_who_leaves_a_batch_let_through_frees_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many circuits are asked in slices; the source is called when all have been."""
    source = Batch("x", answer=answering(up := set()))
    tuned(source, resilience_policy=breaking(1, CircuitScope.RESOURCE))
    building = builder(source)
    keys = [key("x", str(number)) for number in range(9)]
    await opened(building, *keys)
    monkeypatch.setattr(pace, "SLICE_SECONDS", 0.0)
    leaving = asyncio.ensure_future(attempt(building, *keys))
    loop, known = asyncio.get_running_loop(), building.circuit_breaker.circuits.values()
    assert isinstance(loop, VirtualLoop)
    loop.interrupt_when(lambda: any(each.probing for each in known), leaving.cancel)
    await asyncio.wait([leaving])
    await settle()
    assert (leaving.cancelled(), len(source.calls)) == (True, 1)
    up.update(keys)
    assert list(await attempt(building, *keys)) == keys


async def test_a_retry_that_waits_too_long_for_capacity_counts_the_failure_before() -> None:
    source = stock(breaking(5, attempts=2))
    source.queue_timeout_seconds = 2.0
    building = builder(source, max_concurrency=1)
    task = await begun(attempt(building))
    lease = await building.capacity.acquire("other")
    (failure,) = failures(await task)
    assert (failure.error_type, failure.attempts) == ("SourceQueueTimeoutError", 1)
    assert await circuits(building) == {"x": ("closed", 1)}
    lease.release()


@pytest.mark.parametrize("by", ["leaving", "a deadline"])
@pytest.mark.parametrize("waits", [False, True])
async def test_a_failure_counts_though_its_readers_go_before_a_retry(by: str, waits: bool) -> None:
    """A source that is down is left alone, however impatient its readers are."""
    source = stock(breaking(2, attempts=2))
    building = builder(source, max_concurrency=1)
    for state in (("closed", 1), ("open", 2)):
        patient = asyncio.ensure_future(attempt(building, deadline_seconds=50))
        how = {"deadline_seconds": 1.5 if waits else 0.7} if by == "a deadline" else {}
        going = [patient, asyncio.ensure_future(attempt(building, **how))]
        await settle()
        lease = await building.capacity.acquire("other")
        await asyncio.sleep(1.2 if waits else 0.5)
        for task in going if by == "leaving" else going[:1]:
            task.cancel()
        await asyncio.wait(going)
        assert await circuits(building) == {"x": state}
        lease.release()
    assert len(source.calls) == 2
    assert (await building.health_snapshot()).sources["x"].last_error == "ConnectionError"


async def test_a_failure_counts_though_its_readers_go_as_inputs_are_copied_for_a_retry() -> None:
    gate = ThreadGate()
    gate.open()

    def copied(payload: Any) -> Any:
        gate.pass_()
        return payload

    source = Derived("x", needs=lambda k: [key("input")], before=failing)
    tuned(source, resilience_policy=breaking(2, attempts=2))
    settings = {"payload_copier": copied, "run_payload_copies_in_thread": True}
    building = builder(source, Single("input"), **settings)
    leaving = await begun(attempt(building))
    gate = ThreadGate()
    await asyncio.sleep(1.0)
    leaving.cancel()
    await asyncio.wait([leaving])
    gate.open()
    assert (len(source.calls), await circuits(building)) == (1, {"x": ("closed", 1)})


async def test_a_circuit_that_opens_while_a_call_waits_for_capacity_keeps_it_out() -> None:
    source = stock(breaking(), before=(gate := Gate()).pass_)
    building = builder(source, max_concurrency=1)
    first = await begun(attempt(building, key("x", "first")))
    second = await begun(attempt(building, key("x", "second")))
    gate.open()
    await first
    assert failures(await second, key("x", "second"))[0].error_type == "CircuitOpenError"
    assert len(source.calls) == 1


# Batches over several circuits


def answering(up: set[ResourceKey]) -> Callable[[ResourceKey], Any]:
    """Answer for the keys that are up; an outdated value for all others."""

    def answer(k: ResourceKey) -> Any:
        return k.subject if k in up else SourcePayload("old", observed_at=0.0)

    return answer


A1, A2, B1, B2 = (ResourceKey("test", name, subject) for subject in "ab" for name in ("x", "y"))


@pytest.mark.parametrize("again", [False, True])
async def test_a_batch_is_not_made_for_keys_that_open_circuits_have_sent_elsewhere(
    again: bool,
) -> None:
    """Who waits for those at the next source does not wait for what is left of the batch."""
    policy = breaking(1, CircuitScope.RESOURCE)
    source = tuned(Batch("x", before=Gate().pass_), resilience_policy=policy)
    building = builder(source, Single("next", "x", fetch=held_at(gate := Gate()), priority=1))
    leases = [await building.capacity.acquire("other") for _ in range(8)]
    leaving = await begun(attempt(building, A1, B1))
    staying = await begun(attempt(building, A1))
    leaving.cancel()
    await settle()
    late = await begun(attempt(building, B1)) if again else leaving
    await building.circuit_breaker.record_failure("x", key=A1, policy=policy.circuit)
    for lease in leases:
        lease.release()
    await settle()
    late.cancel()
    await settle()
    assert len(source.calls) == again
    assert (await building.health_snapshot()).capacity["__global__"].in_use == 1
    gate.open()
    await staying


async def test_a_batch_that_an_open_circuit_keeps_out_is_no_failed_call() -> None:
    source, metrics = Batch("x", answer=answering(set())), InMemoryMetrics()
    tuned(source, resilience_policy=breaking())
    building = builder(source, metrics=metrics)
    for _ in range(2):
        await attempt(building)
    assert len(source.calls) == 1
    assert metrics.counter("source_batch_call_total", source="x", status="failure") == 0


async def test_open_groups_are_left_out_of_a_batch() -> None:
    up = {A1, A2}
    source = Batch("s", "x", "y", answer=answering(up))
    tuned(source, resilience_policy=breaking(1, CircuitScope.SUBJECT))
    building = builder(source)
    await attempt(building, B1)
    up.update({B1, B2})
    snapshot = await attempt(building, A1, B1, A2, B2)
    assert source.calls == [(B1,), (A1, A2)]
    assert list(snapshot) == [A1, A2]
    assert {failures(snapshot, k)[0].error_type for k in (B1, B2)} == {"CircuitOpenError"}
    await asyncio.sleep(RECOVERY)
    assert list(await attempt(building, B1, B2)) == [B1, B2]
    assert await circuits(building) == {}


# Which policy applies


async def test_the_builder_takes_policies_by_name_and_a_default_too() -> None:
    declared = stock(retrying(5))
    named = {"source_resilience": {"x": retrying(3)}, "default_resilience": retrying(6)}
    await attempt(builder(declared, **named))
    assert len(declared.calls) == 3
    for setting, calls in (
        ({"default_resilience": retrying(6)}, 6),
        ({"retry_policy": retrying(7).retry}, 7),
    ):
        source = stock(None)
        await attempt(builder(source, **setting))
        assert len(source.calls) == calls


@pytest.mark.parametrize("batch", [False, True])
async def test_a_resolver_that_raises_fails_that_source_and_not_the_build(batch: bool) -> None:
    def choose(name: str) -> SourceResiliencePolicy | None:
        if name == "x":
            raise LookupError("no policy today")
        return None

    source: Any = Batch("x", priority=20) if batch else Single("x", priority=20)
    resolver = ResiliencePolicyResolver(dynamic=choose)
    keys = [key("x", "a"), key("x", "b")]
    spared = await attempt(
        builder(source, Single("spare", "x"), resilience_resolver=resolver), *keys
    )
    assert {value.source for value in spared.values()} == {"spare"}
    alone = builder(source, resilience_resolver=resolver)
    snapshot = await attempt(alone, *keys)
    (failure,) = failures(snapshot, keys[1])
    assert (failure.error_type, failure.attempts) == ("LookupError", 0)
    assert "no policy today" in failure.message
    assert source.calls == []


@dataclasses.dataclass
class Always:
    """A resolver that is none of the library's, and has but the method that is called."""

    answer: Any

    def resolve(self, source: str, *, declared: SourceResiliencePolicy | None = None) -> Any:
        return self.answer


async def test_a_resolver_needs_no_more_than_to_resolve() -> None:
    source = stock(None)
    await attempt(builder(source, resilience_resolver=Always(retrying(5))))
    assert len(source.calls) == 5


async def test_a_resolver_without_an_answer_is_told_what_it_owes() -> None:
    source = stock(None)
    snapshot = await attempt(builder(source, resilience_resolver=Always(None)))
    (failure,) = failures(snapshot)
    assert failure.message.startswith(
        "resilience policy must be a SourceResiliencePolicy, got None"
    )
    assert source.calls == []


@pytest.mark.expects_leaks  # that the clock was wrong is told to the loop
async def test_a_clock_that_fails_as_one_circuit_is_told_hides_nothing_from_the_others() -> None:
    class Clock(LoopClock):
        left = -1

        def monotonic(self) -> float:
            self.left -= 1
            if not self.left:
                raise LookupError("no time")
            return super().monotonic()

    async def before() -> None:
        if clock.left < -100:
            raise DOWN
        clock.left = 1  # as the first of the circuits is told

    clock, keys = Clock(), [key("x", "a"), key("x", "b")]
    source = tuned(
        Batch("x", before=before), resilience_policy=breaking(scope=CircuitScope.RESOURCE)
    )
    breaker = CircuitBreaker(clock=clock)
    building = builder(source, circuit_breaker=breaker, default_policy=FreshnessPolicy(0, 0))
    clock.left = -1000
    assert len((await attempt(building, *keys)).errors) == 2
    await asyncio.sleep(RECOVERY)
    clock.left = -1
    assert len(await attempt(building, *keys)) == 2
    await asyncio.sleep(1.0)
    assert len(await attempt(building, *keys)) == 2
    await no_leaks(building)
