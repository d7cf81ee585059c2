"""Which derived values of a foreign cache rest on dependencies that are no longer current."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from coalestra.cache.calls import CacheCalls
from coalestra.core.keys import ResourceKey
from coalestra.core.values import SnapshotValue

Values = Mapping[ResourceKey, SnapshotValue[Any]]


async def read_dependencies(
    calls: CacheCalls, values: Values, absent: Collection[ResourceKey], now: float
) -> dict[ResourceKey, SnapshotValue[Any]]:
    """Return ``values`` and everything in the cache that they rest on, directly or not.

    One read per level of derivation. ``absent`` keys are known not to be there.
    """
    known = dict(values)
    asked = {*values, *absent}
    level: Iterable[SnapshotValue[Any]] = values.values()
    while True:
        wanted = dict.fromkeys(
            key for value in level for key in value.dependency_versions if key not in asked
        )
        if not wanted:
            return known
        asked.update(wanted)
        found = await calls.get_any_age(tuple(wanted), now)
        known.update(found)
        level = found.values()


def outdated_among(known: Values) -> set[ResourceKey]:
    """Return the keys of ``known`` with a dependency, direct or not, of another version.

    ``known`` must hold every dependency that exists. Linear in entries and dependencies.
    """
    dependents: dict[ResourceKey, list[ResourceKey]] = defaultdict(list)
    outdated: list[ResourceKey] = []
    for key, value in known.items():
        for dependency, version in value.dependency_versions.items():
            dependents[dependency].append(key)
            current = known.get(dependency)
            if current is None or current.version != version:
                outdated.append(key)
    reached = set(outdated)
    while outdated:
        for dependent in dependents.get(outdated.pop(), ()):
            if dependent not in reached:
                reached.add(dependent)
                outdated.append(dependent)
    return reached
