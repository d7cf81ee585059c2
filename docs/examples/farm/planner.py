"""The planner: the water that a field needs, derived from what three sources say."""

from __future__ import annotations

from coalestra import CallableDerivedSource, FetchContext, ResourceKey, Snapshot, SourcePayload
from farm.keys import moisture, rain, target


def ingredients(key: ResourceKey) -> tuple[ResourceKey, ...]:
    return target(key.subject), moisture(key.subject), rain(key.subject)


def plan(key: ResourceKey, known: Snapshot, context: FetchContext) -> SourcePayload[float]:
    """Compute the need, and note on the side if it rests on a value that is past its time."""
    wanted, held, coming = (known.value(part, float) for part in ingredients(key))
    stale = ", ".join(part.name for part in known.stale_keys)
    return SourcePayload(max(0.0, wanted - held - coming), metadata={"stale_inputs": stale})


def planner_source() -> CallableDerivedSource:
    return CallableDerivedSource(
        name="planner",
        priority=100,
        supports=lambda key: key.namespace == "plan",
        dependencies=ingredients,
        deriver=plan,
        run_sync_in_thread=False,  # quick arithmetic needs no thread
    )
