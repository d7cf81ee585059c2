"""From an event to what is offered to the cache: judged, ranked and stamped."""

from __future__ import annotations

import dataclasses
from typing import Any

from coalestra.concurrency.copying import PayloadCopies, Sealed
from coalestra.core.authority import AuthorityPolicyProvider, AuthorityPolicyResolver
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
from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.core.values import ResourceUpdate, next_version

SEALING = "published value"
_PUBLISHED: FrozenDict[str, Any] = FrozenDict({"published": True})


class Publication:
    """One event on its way into the cache; each stage adds what the next one needs.

    Attributes:
        update: the event; its value and metadata are still the caller's.
        key: the resource it tells of.
        observed_at: when it was true, in wall-clock seconds.
        authority_rank: how much its source counts in the write order.
        policy: what its key's readers may use.
        revision: what is offered to the cache; there once it is sealed.
        status, current, previous: what became of it, see `Written`; there once it is written.
    """

    __slots__ = (
        "authority_rank",
        "current",
        "key",
        "observed_at",
        "policy",
        "previous",
        "revision",
        "status",
        "update",
    )

    revision: Revision
    status: CacheWriteStatus
    current: Revision
    previous: Revision | None

    def __init__(
        self,
        update: ResourceUpdate[Any],
        key: ResourceKey,
        observed_at: float,
        authority_rank: int,
        policy: FreshnessPolicy,
    ) -> None:
        self.update: ResourceUpdate[Any] = update
        self.key: ResourceKey = key
        self.observed_at: float = observed_at
        self.authority_rank: int = authority_rank
        self.policy: FreshnessPolicy = policy

    def __repr__(self) -> str:
        return f"<Publication {self.key} of rank {self.authority_rank} from {self.update.source}>"

    def stamp(self, sealed: Sealed, copies: PayloadCopies, now: float) -> None:
        """Make the revision published at ``now``, around its sealed payload.

        Raises `PayloadIsolationError` if its metadata cannot be copied.
        """
        update, observed_at = self.update, self.observed_at
        metadata = _PUBLISHED
        if update.metadata or observed_at > now:
            told = {**update.metadata, "published": True}
            if observed_at > now:
                told["clock_skew_seconds"] = observed_at - now
            metadata = copies.seal_metadata_now(told, context=SEALING)
        payload, seal = sealed
        self.revision = Revision(
            self.key,
            payload,
            seal,
            update.source,
            observed_at,
            now,
            next_version(),
            0.0,
            0,
            metadata,
            self.authority_rank,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PublicationRules:
    """What an event is judged by: the clock, and the policies for its key and source.

    An ``authority_resolver`` under which every rank is 0 is not kept.
    """

    clock: Clock
    policy_resolver: FreshnessPolicyProvider
    observation_policy: ObservationPolicy
    authority_resolver: AuthorityPolicyProvider | None = None

    def __post_init__(self) -> None:
        resolver = self.authority_resolver
        if type(resolver) is AuthorityPolicyResolver and not resolver.has_rules:
            object.__setattr__(self, "authority_resolver", None)

    def judge(self, update: ResourceUpdate[Any], now: float) -> Publication:
        """Return the publication of ``update`` at ``now``.

        Raises `SourceProtocolError` if it was observed further in the future than allowed.
        """
        key, observed_at = update.key, now
        if update.observed_at is not None:
            observed_at = float(update.observed_at)
            if observed_at > now:
                self._judge_future(update, observed_at, now)
        rank, resolver = 0, self.authority_resolver
        if resolver is not None:
            rank = resolver.rank_for(key, update.source)
        return Publication(update, key, observed_at, rank, self.policy_resolver.resolve(key))

    def _judge_future(self, update: ResourceUpdate[Any], observed_at: float, now: float) -> None:
        try:
            judge_observation(observed_at, now, self.observation_policy)
        except FutureObservation as rejection:
            raise SourceProtocolError(
                f"{update.source} published {update.key} with a time in the future: {rejection}"
            ) from rejection
