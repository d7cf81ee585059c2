"""What the cache has, and whether a reader may have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coalestra.core.freshness import FreshnessPolicy, RefreshMode
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.readings import Reading
from coalestra.orchestration.work import Work


class Serving:
    """Serves cached revisions, as far as the policies of their keys let a reader have them.

    `refresh` schedules a background refresh of a key for a reason, and says whether it is a new
    one.
    """

    __slots__ = ("_equipment", "_refresh")

    def __init__(
        self, equipment: Equipment, refresh: Callable[[ResourceKey, str, Work], bool]
    ) -> None:
        self._equipment = equipment
        self._refresh = refresh

    def serve(
        self,
        work: Work,
        readings: dict[ResourceKey, Reading],
        policy: FreshnessPolicy,
        revision: Revision,
        now: float,
    ) -> bool:
        """Take a cached revision if the policy lets a reader have it; schedule a refresh if due."""
        key = revision.key
        age = max(0.0, now - revision.observed_at)
        stale = age > policy.ttl_seconds
        mode = policy.refresh_mode
        notes: dict[str, Any] | None = None
        if stale:
            if mode is not RefreshMode.STALE_WHILE_REVALIDATE or age > policy.max_stale_seconds:
                return False
            notes = {
                "refresh_mode": mode.value,
                "refresh_scheduled": self._refresh(key, mode.value, work),
            }
        elif mode is RefreshMode.REFRESH_AHEAD and policy.should_refresh_ahead(age):
            notes = {"refresh_scheduled": self._refresh(key, mode.value, work)}
        work.record.cache_hits += 1
        if self._equipment.report is not None:
            freshness = mode.value if stale else "fresh"
            self._equipment.report.cache_hit(key, freshness)
        readings[key] = Reading(revision, age, stale=stale, from_cache=True, notes=notes)
        return True

    def __repr__(self) -> str:
        return f"<Serving from {self._equipment.access!r}>"
