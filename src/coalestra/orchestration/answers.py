"""From what a source returned to sealed revisions, or to the rule that it broke."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from coalestra.concurrency.seals import Sealed
from coalestra.core.errors import SourceProtocolError
from coalestra.core.freshness import FutureObservation, judge_observation
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.core.values import SourcePayload, next_version
from coalestra.orchestration.chains import Link, SourceKind
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition

OMITTED = object()
"""Stands for a key that a batch source left out of its answer."""


class Watched:
    """Awaits what a source returned, and tells whose a cancellation was: its own or not."""

    __slots__ = ("_awaitable", "interrupted")

    def __init__(self, link: Link, awaitable: Any) -> None:
        if not inspect.isawaitable(awaitable):
            raise SourceProtocolError(
                f"source {link.name!r} returned {type(awaitable).__qualname__} where an awaitable "
                "is needed; make the method async, or use a callable adapter"
            )
        self._awaitable = awaitable
        self.interrupted: bool = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = _steps(self._awaitable)
        try:
            item = next(steps)
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    steps.close()
                    raise
                except BaseException as error:
                    self.interrupted |= isinstance(error, asyncio.CancelledError)
                    item = steps.throw(error)
                else:
                    item = next(steps) if sent is None else steps.send(sent)
        except StopIteration as stop:
            return stop.value


def _steps(awaitable: Any) -> Any:
    steps = getattr(awaitable, "__await__", None)
    return awaitable if steps is None else steps()


def by_flight(
    link: Link, flights: Sequence[Acquisition], result: Any
) -> list[tuple[Acquisition, Any]]:
    """Return what the answer holds for each flight; raise `SourceProtocolError` if malformed."""
    if link.kind is not SourceKind.BATCH:
        return [(flights[0], result)]
    if not isinstance(result, Mapping):
        raise SourceProtocolError(
            f"fetch_many of source {link.name!r} must return a mapping of the requested keys, got "
            f"{type(result).__qualname__}"
        )
    asked = {flight.key for flight in flights}
    for key in result:
        if key not in asked:
            raise SourceProtocolError(
                f"fetch_many of source {link.name!r} returned {_named(key)}, which was not "
                "requested; return requested keys only"
            )
    return [(flight, result.get(flight.key, OMITTED)) for flight in flights]


def _named(key: object) -> str:
    return str(key) if isinstance(key, ResourceKey) else f"a {type(key).__qualname__}"


class CallFacts:
    """What is the same for every key of one answered call."""

    __slots__ = ("attempts", "context", "latency_ms", "link")

    def __init__(self, link: Link, attempts: int, latency_ms: float) -> None:
        self.link: Link = link
        self.context: str = f"payload of {link.name}"
        self.attempts: int = attempts
        self.latency_ms: float = latency_ms


def revision_of(
    equipment: Equipment, flight: Acquisition, value: Any, facts: CallFacts, sealed: Sealed | None
) -> Revision | None:
    """Return the sealed revision of one value, or None if sealing it takes a thread.

    In that case seal the payload there, and call again with what it was `sealed` to.

    Raises:
        SourceProtocolError: the observation lies too far in the future.
        PayloadIsolationError: the value cannot be copied.
    """
    link = facts.link
    payload = value if isinstance(value, SourcePayload) else SourcePayload(value)
    now = equipment.clock.now()
    dated = payload.observed_at is not None
    observed_at = now if payload.observed_at is None else payload.observed_at
    metadata = payload.metadata
    skew = _accepted_skew(equipment, link, flight.key, observed_at, now) if dated else 0.0
    if skew:
        metadata = {**metadata, "clock_skew_seconds": skew}
    copies = equipment.copies
    sealed = sealed or copies.seal_now(payload.value, context=facts.context)
    if sealed is None:
        return None
    gather = flight.gather
    used = () if gather is None else tuple(r.revision for r in gather.readings.values())
    return Revision(
        flight.key,
        sealed[0],
        sealed[1],
        link.name,
        observed_at,
        now,
        next_version(),
        facts.latency_ms,
        facts.attempts,
        copies.seal_metadata_now(metadata, context=facts.context) if metadata else EMPTY,
        equipment.authority.rank_for(flight.key, link.name),
        FrozenDict({r.key: r.version for r in used}) if used else EMPTY,
        used,
    )


def _accepted_skew(
    equipment: Equipment, link: Link, key: ResourceKey, observed_at: float, now: float
) -> float:
    try:
        return judge_observation(observed_at, now, equipment.observation)
    except FutureObservation as error:
        raise SourceProtocolError(f"source {link.name!r}, {key}: {error}") from error


def was_future(error: BaseException) -> bool:
    """Whether `error` says that a value was dated too far in the future."""
    return isinstance(error.__cause__, FutureObservation)
