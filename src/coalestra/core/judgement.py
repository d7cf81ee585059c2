"""Judging a snapshot by an acceptance policy.

Laws:

1. A value is judged by its age now, never by a lesser one than it was delivered with.
2. A missing value breaks no rule; it only does not count for a requirement.
3. An alternative that a requirement can do without is not reported for its sake.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from coalestra.core.acceptance import (
    SnapshotAcceptancePolicy,
    SnapshotAcceptanceReason,
    SnapshotAcceptanceViolation,
    SnapshotRequirement,
)
from coalestra.core.freshness import FreshnessPolicyProvider, age_of
from coalestra.core.keys import ResourceKey
from coalestra.core.values import SnapshotValue

_Violations = tuple[SnapshotAcceptanceViolation, ...]


def violations_of(
    policy: SnapshotAcceptancePolicy,
    request_required: Collection[ResourceKey],
    request_optional: Collection[ResourceKey],
    snapshot: Mapping[ResourceKey, SnapshotValue[Any]],
    now: float,
    freshness: FreshnessPolicyProvider | None = None,
) -> _Violations:
    """Return all that ``policy`` has against ``snapshot``: single values first, then requirements.

    ``now`` is wall-clock seconds since the epoch. With ``freshness``, a value that went stale since
    it was delivered counts as stale.
    """
    court = _Court(policy, snapshot, now, freshness)
    judged_optional = (
        key
        for key in request_optional
        if policy.include_optional_resources or key in policy.resource_rules
    )
    judged = (*request_required, *judged_optional)
    found = [violation for key in judged for violation in court.against(key)]
    reported = {(violation.key, violation.reason) for violation in found}
    for requirement in policy.requirements:
        for violation in court.against_requirement(requirement):
            if violation.key is None or (violation.key, violation.reason) not in reported:
                reported.add((violation.key, violation.reason))
                found.append(violation)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Court:
    """One snapshot under one policy, at one moment."""

    policy: SnapshotAcceptancePolicy
    snapshot: Mapping[ResourceKey, SnapshotValue[Any]]
    now: float
    freshness: FreshnessPolicyProvider | None

    def against(self, key: ResourceKey) -> _Violations:
        """What speaks against the value of one key; nothing if it has none."""
        rule = self.policy.rule_for(key)
        value = self.snapshot.get(key)
        if value is None or not rule.has_constraints:
            return ()
        age = max(value.age_seconds, age_of(value.observed_at, self.now))
        return tuple(self._broken(value, age))

    def _broken(
        self, value: SnapshotValue[Any], age: float
    ) -> Iterator[SnapshotAcceptanceViolation]:
        key, rule = value.key, self.policy.rule_for(value.key)
        if not rule.allow_stale and self._is_stale(value, age):
            yield SnapshotAcceptanceViolation(
                SnapshotAcceptanceReason.STALE,
                (key,),
                f"{key} must be fresh, got a stale value observed {age:g} s ago",
                key=key,
                current_age_seconds=age,
                stale=True,
            )
        if rule.max_age_seconds is not None and age > rule.max_age_seconds:
            yield SnapshotAcceptanceViolation(
                SnapshotAcceptanceReason.TOO_OLD,
                (key,),
                f"{key} must be at most {rule.max_age_seconds:g} s old, got {age:g} s",
                key=key,
                current_age_seconds=age,
                max_age_seconds=rule.max_age_seconds,
            )
        lowest = rule.minimum_authority_rank
        if lowest is not None and value.authority_rank < lowest:
            yield SnapshotAcceptanceViolation(
                SnapshotAcceptanceReason.INSUFFICIENT_AUTHORITY,
                (key,),
                f"{key} must have an authority rank of at least {lowest}, got "
                f"{value.authority_rank} from source {value.source}",
                key=key,
                authority_rank=value.authority_rank,
                minimum_authority_rank=lowest,
            )

    def _is_stale(self, value: SnapshotValue[Any], age: float) -> bool:
        if value.stale or self.freshness is None:
            return value.stale
        return age > self.freshness.resolve(value.key).ttl_seconds

    def against_requirement(
        self, requirement: SnapshotRequirement
    ) -> Iterator[SnapshotAcceptanceViolation]:
        """What speaks against a requirement, and then against its rejected alternatives."""
        present = [key for key in requirement.keys if key in self.snapshot]
        rejected = {key: broken for key in present if (broken := self.against(key))}
        accepted = len(present) - len(rejected)
        if accepted >= requirement.minimum_count:
            return
        name = requirement.name
        titled = f"requirement {name!r}" if name else "a requirement"
        yield SnapshotAcceptanceViolation(
            SnapshotAcceptanceReason.REQUIREMENT_UNSATISFIED,
            requirement.keys,
            f"{titled} must have {requirement.minimum_count} acceptable of "
            f"{len(requirement.keys)} resources, got {accepted}",
            requirement_name=name,
            accepted_count=accepted,
            required_count=requirement.minimum_count,
        )
        for broken in rejected.values():
            for violation in broken:
                yield replace(violation, requirement_name=name)
