"""What a derived key rests on: asking for its dependencies, and handing them to the derivation."""

from __future__ import annotations

import asyncio
from typing import Any

from coalestra.core.errors import (
    DependencyResolutionError,
    SourceProtocolError,
    SourceUnavailableError,
)
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.snapshot import Snapshot, snapshot_of
from coalestra.core.values import SnapshotValue
from coalestra.orchestration.chains import Link
from coalestra.orchestration.deliveries import Deliveries
from coalestra.orchestration.flights import Acquisition, Gather
from coalestra.orchestration.lookups import Lookups
from coalestra.orchestration.pins import NO_PINS, hold
from coalestra.orchestration.scheduler import Scheduler

_CONTEXT = "derived dependency"


class Derivations:
    """Lets derived flights wait for their dependencies, and makes snapshots of those."""

    def __init__(self, scheduler: Scheduler, lookups: Lookups, deliveries: Deliveries) -> None:
        self._scheduler = scheduler
        self._lookups = lookups
        self._deliveries = deliveries
        scheduler.derive = self.gather_dependencies
        scheduler.inputs = self.inputs
        scheduler.inputs_now = self.inputs_now

    def gather_dependencies(self, flight: Acquisition, link: Link) -> None:
        """Ask for what `flight` is derived from; it goes on when all of it is settled."""
        try:
            keys = _dependencies(link, flight.key)
        except Exception as error:
            self._scheduler.refused(flight, error, "failure", 0)
            return
        pins = NO_PINS if flight.pins is None else flight.pins
        work = flight.living_sponsor()
        gather = Gather(work, keys, pins, demand=pins.demand, owner=flight)
        flight.gather = gather
        gather.done = self._gathered
        self._lookups.open(gather)

    def _gathered(self, gather: Gather) -> None:
        flight = gather.owner
        if flight is None or flight.gather is not gather:
            return
        if not gather.failures:
            if flight.pins is not None:
                hold(flight.pins, gather.readings)
            self._scheduler.dispatch.ready(flight)
            return
        cycles = [f.cycle for f in gather.failures.values() if f.cycle is not None]
        if cycles:
            flight.cycle = cycles[0]
        name = "" if flight.link is None else flight.link.name
        errors = {key: failure.make() for key, failure in gather.failures.items()}
        error = DependencyResolutionError(flight.key, name, errors)
        self._scheduler.refused(flight, error, "failure", 0)

    def inputs_now(self, flight: Acquisition) -> Snapshot | None:
        """Return what `inputs` returns, without waiting; None if a copy takes a thread."""
        gather, values = flight.gather, {}
        if gather is not None:
            for key in gather.keys:
                value = self._deliveries.value_now(gather.readings[key], _CONTEXT)
                if value is None:
                    return None
                values[key] = value
        return _input_of(flight, values)

    async def inputs(self, flight: Acquisition) -> Snapshot:
        """Return the dependencies of a derived key, copied for its derivation alone."""
        gather, values = flight.gather, {}
        if gather is not None:
            for key in gather.keys:
                reading = gather.readings[key]
                values[key] = await self._deliveries.value(reading, _CONTEXT, None)
        return _input_of(flight, values)


def _input_of(flight: Acquisition, values: dict[ResourceKey, SnapshotValue[Any]]) -> Snapshot:
    context = flight.sponsor.context
    return snapshot_of(context.snapshot_id, context.requested_at, FrozenDict(values))


def _dependencies(link: Link, key: ResourceKey) -> tuple[ResourceKey, ...]:
    try:
        declared = link.source.dependencies(key)
    except asyncio.CancelledError as error:
        raise SourceUnavailableError(f"source {link.name!r} cancelled itself") from error
    try:
        keys = tuple(dict.fromkeys(declared))
    except TypeError:
        keys = (declared,)
    for each in keys:
        if not isinstance(each, ResourceKey):
            raise SourceProtocolError(
                f"dependencies() of source {link.name!r} for {key} must be ResourceKeys, got "
                f"{type(each).__qualname__}"
            )
    return keys
