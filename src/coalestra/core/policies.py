"""How old a value may be, and whose word counts more: the policies, and which holds for a key."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, Generic, Protocol, TypeVar

from coalestra.core import validation
from coalestra.core.frozen import FrozenDict, record
from coalestra.core.keys import ResourceKey

__all__ = [
    "AuthorityPolicyProvider", "AuthorityPolicyResolver", "AuthorityResolver", "FreshnessPolicy",
    "FreshnessPolicyProvider", "FreshnessResolver", "ObservationPolicy", "PolicyResolver",
    "RefreshMode", "SourceAuthorityPolicy",
]  # fmt: skip

# Which policy holds for a key, or a source: what all kinds of policies have in common ------------

K = TypeVar("K")
P = TypeVar("P")


class KeyedPolicies(Generic[K, P]):
    """The override of a key, else the answer of a function, else a default."""

    __slots__ = ("_kind", "default", "dynamic", "overrides")

    def __init__(
        self,
        kind: type[P],
        default: P,
        overrides: Mapping[K, P] | None,
        dynamic: Callable[[K], P | None] | None,
    ) -> None:
        self._kind: type[P] = kind
        self.default: P = validation.instance("default", default, kind)
        self.overrides: Mapping[K, P] = FrozenDict(
            validation.mapping("overrides", overrides, optional=True)
        )
        self.dynamic = validation.plain_function("dynamic", dynamic, optional=True)
        for key, policy in self.overrides.items():
            validation.instance(f"overrides[{self._named(key)}]", policy, kind)

    def _named(self, key: Any) -> str:
        """Return how errors name a key; `TypeError` if it is none."""
        return str(validation.instance("overrides key", key, ResourceKey).display)

    def _chosen(self, key: K) -> P | None:
        """Return the policy that was chosen for ``key``, if any; raises what ``dynamic`` raises."""
        override = self.overrides.get(key)
        if override is not None or self.dynamic is None:
            return override
        return validation.instance("dynamic result", self.dynamic(key), self._kind, optional=True)

    def resolve(self, key: K) -> P:
        """Return the policy of ``key``; raises what the dynamic resolver raises."""
        if not self.overrides and self.dynamic is None:
            return self.default
        chosen = self._chosen(key)
        return self.default if chosen is None else chosen

    def __repr__(self) -> str:
        dynamic = ", dynamic" if self.dynamic is not None else ""
        name = type(self).__name__
        return f"{name}(default={self.default!r}, {len(self.overrides)} overrides{dynamic})"


def policy_of_all(policies: object) -> Any:
    """Return the policy that all keys have in common by these policies; None if they may differ.

    Those of a class of the application's, which answers in another way, may.
    """
    kind = type(policies)
    if kind is not PolicyResolver and (
        getattr(kind, "resolve", None) is not KeyedPolicies.resolve
        or getattr(kind, "rank_for", _rank_for) is not _rank_for
    ):
        return None
    keyed: Any = policies
    return None if keyed.overrides or keyed.dynamic is not None else keyed.default


# How old a value may be: the policies, and the rules that judge by them --------------------------
#
# Ages are seconds since the value was observed, by the wall clock, and never negative.


class RefreshMode(str, enum.Enum):
    """When a cached value is replaced, and who waits for that."""

    BLOCKING = "blocking"
    """Once it is stale; the reader waits for the new one."""
    STALE_WHILE_REVALIDATE = "stale_while_revalidate"
    """Once it is stale; the reader gets the stale one while a refresh runs in the background."""
    REFRESH_AHEAD = "refresh_ahead"
    """Shortly before it goes stale, in the background; a stale one is waited for."""


@record
class FreshnessPolicy:
    """How long a value is fresh, how long it is of use, and how it is renewed.

    Attributes:
        ttl_seconds: the age up to which it is fresh; may be infinite.
        max_stale_seconds: the age up to which it is usable at all, so at least ``ttl_seconds``;
            may be infinite.
        allow_stale_on_error: whether a stale value may stand in when every source fails.
        refresh_mode: when and how it is renewed.
        refresh_ahead_seconds: how long before the end of ``ttl_seconds`` to begin; only with
            ``RefreshMode.REFRESH_AHEAD``, and not more than a finite ``ttl_seconds``.
    """

    ttl_seconds: float
    max_stale_seconds: float = 0.0
    allow_stale_on_error: bool = True
    refresh_mode: RefreshMode = RefreshMode.BLOCKING
    refresh_ahead_seconds: float = 0.0

    def __post_init__(self) -> None:
        ttl = validation.span("ttl_seconds", self.ttl_seconds)
        stale = validation.span("max_stale_seconds", self.max_stale_seconds)
        validation.flag("allow_stale_on_error", self.allow_stale_on_error)
        validation.choice("refresh_mode", self.refresh_mode, RefreshMode)
        ahead = validation.number("refresh_ahead_seconds", self.refresh_ahead_seconds, minimum=0)
        if stale < ttl:
            raise ValueError(
                f"max_stale_seconds must be at least ttl_seconds ({ttl:g}), got {stale:g}; both "
                "are ages since observation, so give the sum of the fresh and the stale time"
            )
        if ahead and self.refresh_mode is not RefreshMode.REFRESH_AHEAD:
            raise ValueError(
                f"refresh_ahead_seconds must be 0 with refresh_mode {self.refresh_mode.name}, got "
                f"{ahead:g}; it belongs to REFRESH_AHEAD"
            )
        if ahead > ttl:
            raise ValueError(
                f"refresh_ahead_seconds must be at most ttl_seconds ({ttl:g}), got {ahead:g}"
            )

    def should_refresh_ahead(self, age_seconds: float) -> bool:
        """Whether a value of this age is due for renewal; never if it does not go stale."""
        return (
            self.refresh_mode is RefreshMode.REFRESH_AHEAD
            and age_seconds >= self.ttl_seconds - self.refresh_ahead_seconds
        )


def quiet_seconds(policy: FreshnessPolicy) -> float:
    """Return up to which age a value is fresh and nothing is due; negative if something may be."""
    if policy.refresh_mode is not RefreshMode.REFRESH_AHEAD:
        return policy.ttl_seconds
    if type(policy) is not FreshnessPolicy:
        return -math.inf  # one of the application's may say in another way what is due
    due = policy.ttl_seconds - policy.refresh_ahead_seconds
    return math.nextafter(due, -math.inf) if due > 0 else -math.inf


def gone_stale(age_seconds: float, ttl_seconds: float | None) -> bool:
    """Whether what was fresh when it was read for somebody is so no longer, as far as is known.

    A time to live of zero says that a value must be read anew for everyone, not that nothing ever
    is fresh.
    """
    return ttl_seconds is not None and age_seconds > ttl_seconds > 0.0


@record
class ObservationPolicy:
    """What to do about observations that are ahead of the clock.

    Attributes:
        future_tolerance_seconds: how far ahead is put down to clocks that differ.
        reject_future_observations: whether anything further ahead is refused.
    """

    future_tolerance_seconds: float = validation.ruled(1.0, validation.number, minimum=0)
    reject_future_observations: bool = validation.ruled(True, validation.flag)

    def __post_init__(self) -> None:
        validation.check_fields(self)


class FutureObservation(ValueError):
    """An observation is further ahead of the clock than the policy tolerates.

    Internal: whoever judges turns it into an error that also names the source.
    """


def judge_observation(observed_at: float, now: float, policy: ObservationPolicy) -> float:
    """Return by how many seconds an observation is ahead of the clock; 0.0 if it is not.

    One that the policy refuses is a `FutureObservation`.
    """
    if observed_at <= now:
        return 0.0
    tolerance = policy.future_tolerance_seconds
    if policy.reject_future_observations and observed_at > now + tolerance:
        remedy = "compare the clocks, or raise future_tolerance_seconds"
        if observed_at > 100 * now > 0:
            remedy = "give seconds since the epoch, not milliseconds"
        raise FutureObservation(
            f"observed_at must be at most {tolerance:g} s ahead of the clock, got "
            f"{observed_at - now:g} s ahead; {remedy}"
        )
    return observed_at - now


FreshnessResolver = Callable[[ResourceKey], "FreshnessPolicy | None"]
"""What chooses a policy for a key at run time; None leaves it to the default."""


class FreshnessPolicyProvider(Protocol):
    """Whoever knows the policy of every key."""

    def resolve(self, key: ResourceKey) -> FreshnessPolicy:
        """Return the policy of ``key``."""


def policy_for(policies: FreshnessPolicyProvider, key: ResourceKey) -> FreshnessPolicy:
    """Return the policy of ``key``; raises what it raises, or `TypeError` if that is none."""
    policy = policies.resolve(key)
    if type(policy) is not FreshnessPolicy:
        validation.instance("policy", policy, FreshnessPolicy)
    return policy


def quiet_for(policies: FreshnessPolicyProvider, key: ResourceKey) -> float:
    """Return the `quiet_seconds` of ``key``; negative too if its policy cannot be told."""
    try:
        return quiet_seconds(policies.resolve(key))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # it is asked again by whoever can tell of it
        return -math.inf


def ttl_of(policies: FreshnessPolicyProvider, key: ResourceKey) -> float | None:
    """Return how long the value of ``key`` counts as fresh; None if its policy cannot be told."""
    try:
        return policies.resolve(key).ttl_seconds
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return None


class PolicyResolver(KeyedPolicies[ResourceKey, FreshnessPolicy]):
    """The freshness policy of every key: its override, else the dynamic answer, else the default.

    Attributes:
        default: the policy of everything that is not mentioned.
        overrides: policies by key; read-only.
        dynamic: asked for keys without an override, or None.

    Raises:
        TypeError: for anything of another type, also what ``dynamic`` returns.
    """

    __slots__ = ()

    def __init__(
        self,
        default: FreshnessPolicy,
        overrides: Mapping[ResourceKey, FreshnessPolicy] | None = None,
        dynamic: FreshnessResolver | None = None,
    ) -> None:
        super().__init__(FreshnessPolicy, default, overrides, dynamic)


# Whose word counts more, when values of one resource compete for its place in the cache ----------


@record
class SourceAuthorityPolicy:
    """The rank of each source; a value replaces those of lower rank, whatever their age.

    Attributes:
        source_ranks: ranks by name of source; read-only.
        default_rank: the rank of every other source.
    """

    source_ranks: Mapping[str, int] = field(default_factory=FrozenDict)
    default_rank: int = 0

    def __post_init__(self) -> None:
        ranks = FrozenDict(validation.mapping("source_ranks", self.source_ranks))
        for source, rank in ranks.items():
            validation.text("source_ranks key", source)
            validation.integer(f"source_ranks[{source!r}]", rank)
        validation.integer("default_rank", self.default_rank)
        object.__setattr__(self, "source_ranks", ranks)

    def rank_for(self, source: str) -> int:
        """Return the rank of the source of this name."""
        return self.source_ranks.get(source, self.default_rank)


AuthorityResolver = Callable[[ResourceKey], "SourceAuthorityPolicy | None"]
"""What chooses a policy for a key at run time; None leaves it to the default."""


class AuthorityPolicyProvider(Protocol):
    """Whoever knows the ranks of sources for every key."""

    def resolve(self, key: ResourceKey) -> SourceAuthorityPolicy:
        """Return the policy of ``key``."""

    def rank_for(self, key: ResourceKey, source: str) -> int:
        """Return the rank of the source of this name, for ``key``."""


def rank_of(authority: AuthorityPolicyProvider, key: ResourceKey, source: str) -> int:
    """Return the rank of a source for ``key``; raises as `policy_for` does."""
    return validation.integer("rank", authority.rank_for(key, source))


_NO_RULES = SourceAuthorityPolicy()


class AuthorityPolicyResolver(KeyedPolicies[ResourceKey, SourceAuthorityPolicy]):
    """The authority policy of every key, chosen as by a `PolicyResolver`."""

    __slots__ = ()

    def __init__(
        self,
        default: SourceAuthorityPolicy | None = None,
        overrides: Mapping[ResourceKey, SourceAuthorityPolicy] | None = None,
        dynamic: AuthorityResolver | None = None,
    ) -> None:
        chosen = _NO_RULES if default is None else default
        super().__init__(SourceAuthorityPolicy, chosen, overrides, dynamic)

    @property
    def has_rules(self) -> bool:
        """Whether any value can have another rank than 0."""
        return bool(policy_of_all(self) != _NO_RULES)

    def rank_for(self, key: ResourceKey, source: str) -> int:
        """Return the rank of the source of this name, for ``key``."""
        return self.resolve(key).rank_for(source)


_rank_for = AuthorityPolicyResolver.rank_for
