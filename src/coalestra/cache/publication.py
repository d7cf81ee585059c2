"""From an event to what is offered to the cache: judged, ranked and stamped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coalestra.core.authority import AuthorityPolicyProvider
from coalestra.core.clock import Clock
from coalestra.core.errors import SourceProtocolError
from coalestra.core.freshness import (
    FreshnessPolicy,
    FreshnessPolicyProvider,
    FutureObservation,
    ObservationPolicy,
    judge_observation,
)
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.revision import Revision
from coalestra.core.values import ResourceUpdate, next_version


@dataclasses.dataclass(slots=True)
class Publication:
    """One event with all that decides its fate; ``value`` and ``metadata`` are still the caller's.

    Times are wall-clock seconds.
    """

    key: ResourceKey
    value: Any
    source: str
    observed_at: float
    published_at: float
    metadata: Mapping[str, Any]
    authority_rank: int
    policy: FreshnessPolicy

    def revision(self, payload: Any, seal: Any, metadata: FrozenDict[str, Any]) -> Revision:
        """The revision of this event around its sealed payload and metadata."""
        return Revision(
            self.key,
            payload,
            seal,
            self.source,
            self.observed_at,
            self.published_at,
            next_version(),
            0.0,
            0,
            metadata,
            self.authority_rank,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PublicationRules:
    """What an event is judged by: the clock, and the policies for its key and source."""

    clock: Clock
    policy_resolver: FreshnessPolicyProvider
    observation_policy: ObservationPolicy
    authority_resolver: AuthorityPolicyProvider | None = None

    def judge(self, update: ResourceUpdate[Any], now: float) -> Publication:
        """Return the publication of ``update`` at ``now``.

        Raises `SourceProtocolError` if it was observed further in the future than allowed.
        """
        observed_at = now if update.observed_at is None else float(update.observed_at)
        metadata = {**update.metadata, "published": True}
        try:
            skew = judge_observation(observed_at, now, self.observation_policy)
        except FutureObservation as rejection:
            raise SourceProtocolError(
                f"{update.source} published {update.key} with a time in the future: {rejection}"
            ) from rejection
        if skew:
            metadata["clock_skew_seconds"] = skew
        return Publication(
            update.key,
            update.value,
            update.source,
            observed_at,
            now,
            metadata,
            self._rank(update),
            self.policy_resolver.resolve(update.key),
        )

    def _rank(self, update: ResourceUpdate[Any]) -> int:
        resolver = self.authority_resolver
        return 0 if resolver is None else resolver.rank_for(update.key, update.source)
