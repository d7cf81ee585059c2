"""How a flight ends: which value its waiters get, by rules without any waiting."""

from __future__ import annotations

from typing import Any

from coalestra.core.failures import message_of
from coalestra.core.freshness import FreshnessPolicy
from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.readings import Failed, Failure, Reading, Settlement

_LOST_TO_NEWER = (CacheWriteStatus.IGNORED_OLDER, CacheWriteStatus.IGNORED_DUPLICATE)


def reading_of(
    revision: Revision,
    now: float,
    policy: FreshnessPolicy,
    *,
    from_cache: bool,
    notes: dict[str, Any] | None = None,
) -> Reading:
    """Return a reading of a revision as it stands `now` (wall-clock seconds)."""
    age = max(0.0, now - revision.observed_at)
    stale = age > policy.ttl_seconds
    return Reading(revision, age, stale=stale, from_cache=from_cache, notes=notes)


def after_write(
    flight: Acquisition, status: CacheWriteStatus, current: Revision, equipment: Equipment
) -> Reading:
    """Return the end of a flight whose value was offered to the cache.

    A value that lost to a higher authority gives way to the winner as long as that may be used at
    all; one that lost to a newer or an equal observation gives way as long as the winner is
    fresh.
    """
    own = current if flight.offered is None else flight.offered
    if status is CacheWriteStatus.STORED:
        return Reading(own, max(0.0, own.fetched_at - own.observed_at))
    now = equipment.clock.now()
    policy = flight.policy
    if current.version != own.version and _agrees(current, flight):
        winner = reading_of(
            current, now, policy, from_cache=True, notes={"superseded_source": own.source}
        )
        usable = winner.age <= policy.max_stale_seconds and not (flight.forced and winner.stale)
        if not winner.stale or (usable and status not in _LOST_TO_NEWER):
            return winner
    return Reading(own, max(0.0, own.fetched_at - own.observed_at))


def instead_of_event(flight: Acquisition, own: Revision, equipment: Equipment) -> Reading:
    """Return the end of a flight whose value must not be written to the cache.

    If something was published for the key meanwhile, and is fresh, that is what the waiters get.
    """
    event = _event(flight, equipment, {"superseded_source": own.source})
    if event is not None:
        return event
    return Reading(own, max(0.0, own.fetched_at - own.observed_at))


def _event(
    flight: Acquisition, equipment: Equipment, notes: dict[str, Any] | None = None
) -> Reading | None:
    """Return what was published for the key of a flight under way, if it is fresh."""
    event = flight.event
    store = equipment.access.store
    if event is not None and store is not None:
        event = store.peek(flight.key) or event
    if event is None or not _agrees(event, flight):
        return None
    now = equipment.clock.now()
    reading = reading_of(event, now, flight.policy, from_cache=True, notes=notes)
    return None if reading.stale else reading


def _agrees(other: Revision, flight: Acquisition) -> bool:
    """Whether `other` may take the place of a flight's value: pins allow no other derivation."""
    return flight.pins is None or not other.dependency_versions


def after_failures(flight: Acquisition, equipment: Equipment) -> Settlement:
    """Return the end of a flight that no source gave a fresh value for: an event may do."""
    event = _event(flight, equipment)
    if event is not None:
        return event
    if flight.cycle is not None:
        failure = Failure.of_cycle(flight.key, flight.cycle)
    else:
        failure = Failure.of_sources(flight.key, flight.failures)
    return Failed(failure, stale_candidate(flight, failure, equipment))


def stale_candidate(flight: Acquisition, failure: Failure, equipment: Equipment) -> Reading | None:
    """Return the newest stale value that may stand in for a failed key, or None."""
    policy = flight.policy
    if not policy.allow_stale_on_error:
        return None
    now = equipment.clock.now()
    known = [one for one in (flight.event, flight.cached, flight.candidate) if one is not None]
    usable = [one for one in known if now - one.observed_at <= policy.max_stale_seconds]
    if not usable:
        return None
    newest = max(usable, key=lambda revision: revision.observed_at)
    error = failure.make()
    reading = reading_of(
        newest,
        now,
        policy,
        from_cache=newest is not flight.candidate,
        notes={"fallback_error_type": type(error).__name__, "fallback_error": message_of(error)},
    )
    reading.fallback = error
    return reading
