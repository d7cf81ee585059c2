"""What a source answered, handed over key by key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from coalestra.concurrency.seals import PORTION, Sealed
from coalestra.core.errors import SourceUnavailableError
from coalestra.core.revision import Revision
from coalestra.core.values import SourcePayload
from coalestra.orchestration.answers import OMITTED, CallFacts, revision_of, was_future
from coalestra.orchestration.flights import Acquisition, Call
from coalestra.orchestration.work import Work

_HANDING_OVER = 4
"""What it weighs beside the copying of the payload, of a `PORTION`: a few times a warm read."""


class StaleSourceData(Exception):
    """A source answered with a value older than the policy's time to live."""


class Receiver(Protocol):
    """Where fresh and outdated values go."""

    @property
    def delivered(self) -> Callable[[Acquisition, Revision, bool], None]:
        """Take a fresh value, and whether its source dated it."""

    def outdated(self, flight: Acquisition, revision: Revision) -> None:
        """Take a value that is too old to count, but may stand in when all else fails."""

    @property
    def hold(self) -> Callable[[Work], None]:
        """Hold back further calls of a unit of work: keys for them are about to be refused."""

    @property
    def release(self) -> Callable[[Work], None]:
        """Take back one `hold`."""


class Answered(Call, Protocol):
    """The attempt whose call was answered."""

    work: Work
    equipment: Any
    flights: dict[Acquisition, None]

    def refuse(self, flight: Acquisition, error: Exception, status: str) -> None:
        """Report that the source has failed for a key."""


class Harvest:
    """Seals the values of one answer and hands them over, without holding the loop for long."""

    __slots__ = ("_attempt", "_delivered", "_facts", "_receiver", "fresh")

    def __init__(self, attempt: Answered, receiver: Receiver, facts: CallFacts) -> None:
        self._attempt = attempt
        self._receiver = receiver
        self._delivered = receiver.delivered
        self._facts = facts
        self.fresh: set[Acquisition] = set()

    def bring_in_now(self, flight: Acquisition, value: Any) -> bool:
        """Hand over the only value, and return whether that is all; `bring_in` does the rest."""
        if value is OMITTED:
            return False
        return flight.attempt is not self._attempt or self._handed_over(flight, value, None)

    async def bring_in(self, flights: Sequence[Acquisition], values: Sequence[Any]) -> None:
        """Hand over the value of every flight; `fresh` tells which of them were fresh."""
        pairs = zip(flights, values, strict=True)
        omitted = [flight for flight, value in pairs if value is OMITTED]
        if omitted:
            await self._refuse_omitted(omitted)
        attempt = self._attempt
        pace = attempt.equipment.pace
        pace.begin()
        left = PORTION
        for flight, value in zip(flights, values, strict=True):
            if flight.attempt is attempt:
                if not self._handed_over(flight, value, None):
                    await self._seal_in_thread(flight, value)
                left -= _HANDING_OVER
                if flight.offered is not None:
                    left -= flight.offered.seal.weight
                if left <= 0:
                    left = PORTION
                    await pace.keep()

    async def _refuse_omitted(self, flights: Sequence[Acquisition]) -> None:
        """Let the keys that were left out go on, together, to where they are served next."""
        name = self._facts.link.name
        error = SourceUnavailableError(f"source {name!r} left the key out of its answer")
        work = self._attempt.work
        self._receiver.hold(work)
        try:
            pace = self._attempt.equipment.pace
            pace.begin()
            for flight in flights:
                self._attempt.refuse(flight, error, "failure")
                await pace.keep()
        finally:
            self._receiver.release(work)

    async def _seal_in_thread(self, flight: Acquisition, value: Any) -> None:
        payload = value.value if isinstance(value, SourcePayload) else value
        try:
            sealed = await self._attempt.equipment.copies.seal(payload, context=self._facts.context)
        except Exception as error:
            self._refuse(flight, error)
        else:
            if flight.attempt is self._attempt:
                self._handed_over(flight, value, sealed)

    def _refuse(self, flight: Acquisition, error: Exception) -> None:
        future = was_future(error)
        self._attempt.work.record.future_timestamp_rejections += future
        self._attempt.refuse(flight, error, "invalid_timestamp" if future else "failure")

    def _handed_over(self, flight: Acquisition, value: Any, sealed: Sealed | None) -> bool:
        """Report one value; False if sealing it takes a thread."""
        attempt = self._attempt
        try:
            revision = revision_of(attempt.equipment, flight, value, self._facts, sealed)
        except Exception as error:
            self._refuse(flight, error)
            return True
        if revision is None:
            return False
        age = revision.fetched_at - revision.observed_at
        ttl = flight.policy.ttl_seconds
        if age > ttl:
            self._receiver.outdated(flight, revision)
            text = f"the value is {age:g} s old, the policy allows {ttl:g} s"
            attempt.refuse(flight, StaleSourceData(text), "stale")
            return True
        del attempt.flights[flight]
        flight.attempt = None
        self.fresh.add(flight)
        dated = type(value) is SourcePayload and value.observed_at is not None
        self._delivered(flight, revision, dated)
        return True

    def __repr__(self) -> str:
        return f"<Harvest of source {self._facts.link.name} fresh={len(self.fresh)}>"
