"""A farm that waters its driest field: the library at work on real input.

=========  =====================================================  =====================
registry   a SQLite database: target moisture and valve           blocking, key by key
forecast   an HTTP service on loopback: how much rain is coming   async, in one batch
probes     moisture, which a radio reports from its own thread    published events
planner    water needed = target - moisture - rain                derived
=========  =====================================================  =====================

The farm decides in two stages, loses its forecast service, and gets it back. "look" says what to
see in the lines below it, "!" marks a value not to be trusted, and every sentence after "ok" has
been checked: the program fails at the first that does not hold. It runs by a clock that can be put
forward, so that an hour passes in no time.

This is the story; the application is in ``farm/``, beginning with ``farm/application.py``.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path

from farm.application import MINUTE, Farm
from farm.keys import FIELDS, moisture, need, rain, target
from farm.printing import chapter, show, show_health, tell

from coalestra import BuilderHealthSeverity, ResourceKey, Snapshot, SnapshotAcceptanceError


async def look(
    farm: Farm, at: str, *aspects: Callable[[str], ResourceKey], shown: str = "south"
) -> Snapshot:
    """Build a snapshot of some aspects of every field, and show those of one."""
    keys = [aspect(field) for aspect in aspects for field in FIELDS]
    snapshot = await farm.builder.build(keys, deadline_seconds=5.0)
    show(snapshot, [aspect(shown) for aspect in aspects], look_at=at)
    return snapshot


async def healthy(farm: Farm) -> bool:
    """Show the state of health, and say whether it is good."""
    verdict = await farm.assess()
    show_health(verdict)
    return verdict.severity is BuilderHealthSeverity.HEALTHY


def pass_time(farm: Farm, minutes: int) -> None:
    farm.clock.skipped_seconds += minutes * MINUTE
    print(f"\n    ... {minutes} minutes pass ...")


async def everything_answers(farm: Farm) -> None:
    chapter("Everything answers")
    await farm.hear(north=22.0, south=18.0, east=21.0)
    at = "each value (here of one field) says who gave it, how old it is, and how it came"
    first = await look(farm, at, need, moisture, rain, target)
    tell("nothing is stale", first.complete and not first.stale_keys)
    tell("one request brought the rain of all three fields", len(farm.service.asked) == 1)
    again = await farm.builder.build(first)
    tell("asked again, no source is called", again.diagnostics.source_calls == 0)
    tell("the builder is healthy", await healthy(farm))


async def a_decision_in_two_stages(farm: Farm) -> None:
    chapter("Water the driest field, while the radio goes on reporting")
    deed = await farm.water_the_driest(south=30.0)
    tell(f"the driest field is {deed.field}: {deed.planned_mm:g} mm short", deed.field == "south")
    tell("meanwhile the radio said 30 mm, but both stages saw 18 mm", deed.moisture_seen == 18.0)
    tell("the look before the deed saw the 30 mm: 8 mm will do", deed.given_mm == 8.0)
    tell("the valve was opened once", farm.registry.waterings() == [("V2", 8.0)])


async def the_forecast_goes(farm: Farm) -> None:
    chapter("The forecast service goes away")
    farm.stop_service()
    pass_time(farm, 40)
    at = "the rain is old and says so, and so does the need that is computed from it"
    snapshot = await look(farm, at, need, rain)
    old = (*map(need, FIELDS), *map(rain, FIELDS))
    tell("the old forecasts, and what rests on them, are stale", snapshot.stale_keys == old)
    try:
        await farm.water_the_driest()
    except SnapshotAcceptanceError as refusal:
        print(f"    refused: {refusal.violations[0].message}")
    tell("so nothing is watered on old news", len(farm.registry.waterings()) == 1)
    tell("the circuit has opened, and health says so", not await healthy(farm))


async def the_forecast_returns(farm: Farm) -> None:
    chapter("The forecast service returns, with more rain for the north")
    farm.start_service(north=9.0, south=2.0, east=6.0)
    at = "the reason is another one: the circuit spares a service that failed"
    await look(farm, at, rain, shown="north")
    tell("it is not asked as long as the circuit is open", farm.service.asked == [])
    pass_time(farm, 5)
    tell("the circuit is ready to try again", not await healthy(farm))
    at = "one call was let through as a probe, and it brought the rain"
    snapshot = await look(farm, at, need, rain, shown="north")
    tell("one request made everything fresh", not snapshot.stale_keys)
    tell("the circuit has closed, and health says so", await healthy(farm))
    deed = await farm.water_the_driest()
    tell(f"the {deed.field} gets its {deed.given_mm:g} mm", deed.given_mm == deed.planned_mm)


async def main() -> None:
    print("How much water do three fields need? The target moisture is in a database, the rain to")
    print(
        "come is known to a service, the moisture is told by a radio; the need is what is missing."
    )
    with tempfile.TemporaryDirectory() as directory:
        farm = Farm(Path(directory))
        try:
            await everything_answers(farm)
            await a_decision_in_two_stages(farm)
            await the_forecast_goes(farm)
            await the_forecast_returns(farm)
        finally:
            await farm.close()


if __name__ == "__main__":
    asyncio.run(main())
