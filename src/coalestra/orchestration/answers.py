"""From what a source returned to sealed revisions, or to the rule that it broke."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from types import CoroutineType
from typing import Any

from coalestra.concurrency.seals import Sealed
from coalestra.core.authority import SourceAuthorityPolicy
from coalestra.core.errors import SourceProtocolError
from coalestra.core.freshness import FutureObservation, judge_observation
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.keyed_policies import policy_of_all
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
        if type(awaitable) is not CoroutineType and not inspect.isawaitable(awaitable):
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


def values_of(link: Link, flights: Sequence[Acquisition], result: Any) -> list[Any]:
    """Return what the answer holds for each flight; raise `SourceProtocolError` if malformed."""
    if link.kind is not SourceKind.BATCH:
        return [result]
    if not isinstance(result, Mapping):
        raise SourceProtocolError(
            f"fetch_many of source {link.name!r} must return a mapping of the requested keys, got "
            f"{type(result).__qualname__}"
        )
    get = result.get
    values = [get(flight.key, OMITTED) for flight in flights]
    if len(result) != len([True for value in values if value is not OMITTED]):
        _refuse_unrequested(link, {flight.key for flight in flights}, result)
    return values


def _refuse_unrequested(link: Link, asked: Collection[ResourceKey], result: Iterable[Any]) -> None:
    for key in result:
        if key not in asked:
            raise SourceProtocolError(
                f"fetch_many of source {link.name!r} returned {_named(key)}, which was not "
                "requested; return requested keys only"
            )


def _named(key: object) -> str:
    return str(key) if isinstance(key, ResourceKey) else f"a {type(key).__qualname__}"


class CallFacts:
    """What is the same for every key of one answered call.

    `answered_at` is when the answer came, in wall-clock seconds; `rank` is the authority of its
    source, or None if that differs from key to key.
    """

    __slots__ = ("answered_at", "attempts", "context", "latency_ms", "link", "rank")

    def __init__(self, equipment: Equipment, link: Link, attempts: int, latency_ms: float) -> None:
        self.link: Link = link
        self.context: str = link.context
        self.attempts: int = attempts
        self.latency_ms: float = latency_ms
        self.answered_at: float = equipment.clock.now()
        policy: SourceAuthorityPolicy | None = policy_of_all(equipment.authority)
        self.rank: int | None = None if policy is None else policy.rank_for(link.name)


def revision_of(
    equipment: Equipment, flight: Acquisition, value: Any, facts: CallFacts, sealed: Sealed | None
) -> Revision | None:
    """Return the sealed revision of one value, or None if sealing it takes a thread.

    In that case seal the payload there, and call again with what it was `sealed` to.

    Raises:
        SourceProtocolError: the observation lies too far in the future.
        PayloadIsolationError: the value cannot be copied.
    """
    key, link, context = flight.key, facts.link, facts.context
    observed_at = answered_at = facts.answered_at
    metadata: Mapping[str, Any] = EMPTY
    payload = value
    if type(value) is SourcePayload:
        payload, metadata = value.value, value.metadata
        if value.observed_at is not None:
            observed_at = value.observed_at
            skew = _accepted_skew(equipment, link, key, observed_at, answered_at)
            if skew:
                metadata = {**metadata, "clock_skew_seconds": skew}
    copies = equipment.copies
    if sealed is None:
        sealed = copies.seal_now(payload, context=context)
        if sealed is None:
            return None
    gather, rank = flight.gather, facts.rank
    used = () if gather is None else tuple([r.revision for r in gather.readings.values()])
    return Revision(
        key,
        sealed[0],
        sealed[1],
        link.name,
        observed_at,
        answered_at,
        next_version(),
        facts.latency_ms,
        facts.attempts,
        copies.seal_metadata_now(metadata, context=context) if metadata else EMPTY,
        equipment.authority.rank_for(key, link.name) if rank is None else rank,
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
