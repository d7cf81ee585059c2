"""The farm: three sources and a radio behind one builder, and what it does with them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coalestra import (
    BuilderHealthAssessment,
    FreshnessPolicy,
    PolicyResolver,
    ResourceAcceptanceRule,
    SnapshotAcceptancePolicy,
    SnapshotBuilder,
)
from farm.forecast import ForecastClient, ForecastService
from farm.keys import FIELDS, moisture, need, rain, valve
from farm.planner import planner_source
from farm.registry import Registry

MINUTE, HOUR = 60.0, 3600.0

FRESHNESS = {
    "farm": FreshnessPolicy(ttl_seconds=24 * HOUR, max_stale_seconds=48 * HOUR),
    "weather": FreshnessPolicy(ttl_seconds=15 * MINUTE, max_stale_seconds=6 * HOUR),
    "probe": FreshnessPolicy(ttl_seconds=2 * HOUR, max_stale_seconds=12 * HOUR),
    "plan": FreshnessPolicy(ttl_seconds=1 * MINUTE, max_stale_seconds=1 * MINUTE),
}
ONLY_FRESH = SnapshotAcceptancePolicy(default_rule=ResourceAcceptanceRule(allow_stale=False))


class SkippingClock:
    """The system's time, plus what was skipped: an hour passes in no time."""

    def __init__(self) -> None:
        self.skipped_seconds = 0.0

    def now(self) -> float:
        return time.time() + self.skipped_seconds

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped_seconds


@dataclass(frozen=True)
class Watering:
    """What was done: where, on the strength of which moisture, what was planned and given."""

    field: str
    moisture_seen: float
    planned_mm: float
    given_mm: float


class Farm:
    """Everything comes together here; most of an application would only see `builder`."""

    def __init__(self, directory: Path) -> None:
        self.clock = SkippingClock()
        self.registry = Registry(directory / "farm.sqlite")
        self.service = ForecastService(north=4.0, south=2.0, east=6.0)
        self.forecast = ForecastClient(self.service.server_port)
        self.builder = SnapshotBuilder(
            [self.registry.source(), self.forecast.source(), planner_source()],
            policy_resolver=PolicyResolver(
                default=FRESHNESS["plan"], dynamic=lambda key: FRESHNESS[key.namespace]
            ),
            clock=self.clock,
        )

    async def hear(self, **readings: float) -> None:
        """Wait for the radio, which reports what the probes measured from a thread of its own."""
        await asyncio.to_thread(self._radio, asyncio.get_running_loop(), readings)

    def _radio(self, loop: asyncio.AbstractEventLoop, readings: Mapping[str, float]) -> None:
        for field, mm in readings.items():
            publication = self.builder.publisher.publish(
                moisture(field), mm, source="probes", observed_at=self.clock.now()
            )
            asyncio.run_coroutine_threadsafe(publication, loop).result(timeout=5.0)

    async def water_the_driest(self, **heard_meanwhile: float) -> Watering:
        """Decide in two stages, look again, and only then act."""
        async with self.builder.session(deadline_seconds=5.0) as session:
            needs = await session.resolve([need(field) for field in FIELDS])
            driest = max(FIELDS, key=lambda field: needs.value(need(field), float))
            await self.hear(**heard_meanwhile)
            # The second stage sees the world of the first, whatever was heard in between ...
            decided = await session.resolve([moisture(driest), rain(driest), valve(driest)])
            # ... so look again before acting, and act on nothing that is past its time.
            latest = await session.revalidate(
                [moisture(driest), rain(driest)], acceptance_policy=ONLY_FRESH
            )
        given = latest.value(need(driest), float)
        self.registry.open_valve(latest.value(valve(driest), str), given)
        return Watering(driest, decided.value(moisture(driest)), decided.value(need(driest)), given)

    async def assess(self) -> BuilderHealthAssessment:
        return (await self.builder.health_snapshot()).assess()

    def stop_service(self) -> None:
        self.service.stop()

    def start_service(self, **rain_mm: float) -> None:
        self.service = ForecastService(**rain_mm)
        self.forecast.port = self.service.server_port

    async def close(self) -> None:
        try:
            await self.builder.aclose()
        finally:
            self.service.stop()
