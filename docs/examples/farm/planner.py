"""The planner: the water that a field needs, derived from what three sources say."""

from __future__ import annotations

from coalestra import CallableDerivedSource, FetchContext, ResourceKey, Snapshot
from farm.keys import moisture, rain, target


def ingredients(key: ResourceKey) -> tuple[ResourceKey, ...]:
    return target(key.subject), moisture(key.subject), rain(key.subject)


def plan(key: ResourceKey, known: Snapshot, context: FetchContext) -> float:
    """Compute the need; what it is worth, it inherits from what it is computed from."""
    wanted, held, coming = (known.value(part, float) for part in ingredients(key))
    return max(0.0, wanted - held - coming)


def planner_source() -> CallableDerivedSource:
    return CallableDerivedSource(
        name="planner",
        priority=100,
        supports=lambda key: key.namespace == "plan",
        dependencies=ingredients,
        deriver=plan,
        inherit_freshness=True,  # as old as the oldest ingredient, and stale if one is
        run_sync_in_thread=False,  # quick arithmetic needs no thread
    )
