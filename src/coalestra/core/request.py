"""What an application asks for in one go, what it must be like, and what came of it."""

from __future__ import annotations

import enum
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from coalestra.core import errors, policies
from coalestra.core.errors import SnapshotBuildError, SnapshotConsistencyError
from coalestra.core.frozen import EMPTY, FrozenDict, frozen, record
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.policies import FreshnessPolicy, FreshnessPolicyProvider
from coalestra.core.serialization import json_safe
from coalestra.core.snapshot import Snapshot
from coalestra.core.validation import flag, instance, integer, mapping, number, refusal, text
from coalestra.core.values import SnapshotValue, grounds_of

__all__ = [
    "RequestOutcome", "RequestResult", "ResourceAcceptanceRule", "SnapshotAcceptancePolicy",
    "SnapshotAcceptanceReason", "SnapshotAcceptanceViolation", "SnapshotConsistencyPolicy",
    "SnapshotRequest", "SnapshotRequirement",
]  # fmt: skip

# Whether values are good enough for what they were asked for -------------------------------------


@record
class ResourceAcceptanceRule:
    """What one value must be like.

    Attributes:
        max_age_seconds: how long ago it may have been observed; None for any time.
        allow_stale: whether it may be older than its time to live.
        minimum_authority_rank: the rank its source must have at least; None for any rank.
        max_oldest_age_seconds: how long ago the oldest of all that it was derived from, on any
            level, may have been observed; None for any time.
        allow_resting_on_stale: whether anything that it was derived from may be stale.

    Of a value that was not derived, the last two judge the value itself.
    """

    max_age_seconds: float | None = None
    allow_stale: bool = True
    minimum_authority_rank: int | None = None
    max_oldest_age_seconds: float | None = field(default=None, kw_only=True)
    allow_resting_on_stale: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("max_age_seconds", "max_oldest_age_seconds"):
            number(name, getattr(self, name), minimum=0, optional=True)
        flag("allow_resting_on_stale", self.allow_resting_on_stale)
        flag("allow_stale", self.allow_stale)
        integer("minimum_authority_rank", self.minimum_authority_rank, optional=True)

    @property
    def has_constraints(self) -> bool:
        """Whether there is any value that it would refuse."""
        return not (
            self.allow_stale
            and self.max_age_seconds is None
            and self.minimum_authority_rank is None
            and self.judges_nothing_below
        )

    @property
    def judges_nothing_below(self) -> bool:
        """Whether what a value was derived from may be anything."""
        return self.allow_resting_on_stale and self.max_oldest_age_seconds is None


@record(init=False)
class SnapshotRequirement:
    """That so many out of several resources are there and acceptable.

    Attributes:
        keys: the alternatives, each once.
        minimum_count: how many of them it takes.
        name: what to call it in violations; may be empty.

    Raises:
        ValueError: without keys, or unless the count is from 1 to their number.
    """

    keys: tuple[ResourceKey, ...]
    minimum_count: int
    name: str = ""

    def __init__(self, keys: Iterable[ResourceKey], *, minimum_count: int, name: str = "") -> None:
        alternatives = tuple(distinct_keys("keys", keys))
        if not alternatives:
            raise ValueError(refusal("keys", "at least one key", alternatives))
        if integer("minimum_count", minimum_count, minimum=1) > len(alternatives):
            rule = f"at most the number of different keys ({len(alternatives)})"
            raise ValueError(refusal("minimum_count", rule, minimum_count))
        object.__setattr__(self, "keys", alternatives)
        object.__setattr__(self, "minimum_count", minimum_count)
        object.__setattr__(self, "name", text("name", name, empty=True))

    @classmethod
    def all_of(cls, keys: Iterable[ResourceKey], *, name: str = "") -> SnapshotRequirement:
        """Return the requirement of every one of ``keys``."""
        wanted = distinct_keys("keys", keys)
        return cls(wanted, minimum_count=max(1, len(wanted)), name=name)

    @classmethod
    def any_of(cls, keys: Iterable[ResourceKey], *, name: str = "") -> SnapshotRequirement:
        """Return the requirement of any one of ``keys``."""
        return cls(keys, minimum_count=1, name=name)

    @classmethod
    def at_least(
        cls, minimum_count: int, keys: Iterable[ResourceKey], *, name: str = ""
    ) -> SnapshotRequirement:
        """Return the requirement of ``minimum_count`` of ``keys``."""
        return cls(keys, minimum_count=minimum_count, name=name)


@record
class SnapshotAcceptancePolicy:
    """What the values of a request must be like, one by one and together.

    Attributes:
        default_rule: for required resources without a rule of their own.
        resource_rules: rules by key, for required and optional resources alike; read-only.
        requirements: what must hold of several resources together.
        include_optional_resources: whether the default rule is for optional ones too.

    Raises:
        ValueError: if it would accept everything.
    """

    default_rule: ResourceAcceptanceRule = field(default_factory=ResourceAcceptanceRule)
    resource_rules: Mapping[ResourceKey, ResourceAcceptanceRule] = field(default_factory=FrozenDict)
    requirements: tuple[SnapshotRequirement, ...] = ()
    include_optional_resources: bool = False

    def __post_init__(self) -> None:
        instance("default_rule", self.default_rule, ResourceAcceptanceRule)
        instance("requirements", self.requirements, (Iterable,))
        flag("include_optional_resources", self.include_optional_resources)
        rules = FrozenDict(mapping("resource_rules", self.resource_rules))
        for key, rule in rules.items():
            instance("resource_rules key", key, ResourceKey)
            instance(f"resource_rules[{key.display}]", rule, ResourceAcceptanceRule)
        requirements = tuple(self.requirements)
        for requirement in requirements:
            instance("requirements", requirement, SnapshotRequirement)
        object.__setattr__(self, "resource_rules", rules)
        object.__setattr__(self, "requirements", requirements)
        judging = (self.default_rule, *rules.values())
        if not requirements and not any(rule.has_constraints for rule in judging):
            raise ValueError(
                "acceptance policy must refuse something, got no constraint in default_rule, "
                "resource_rules or requirements; leave the policy out instead"
            )

    @property
    def referenced_keys(self) -> frozenset[ResourceKey]:
        """The keys that its rules and requirements name."""
        named = (requirement.keys for requirement in self.requirements)
        return frozenset(self.resource_rules).union(*named)

    def rule_for(self, key: ResourceKey) -> ResourceAcceptanceRule:
        """Return the rule of ``key``: its own, else the default."""
        rules = self.resource_rules
        return rules.get(key, self.default_rule) if rules else self.default_rule


class SnapshotAcceptanceReason(str, enum.Enum):
    """Which kind of rule a violation breaks."""

    STALE = "stale"
    TOO_OLD = "too_old"
    OLDEST_TOO_OLD = "oldest_too_old"
    RESTS_ON_STALE = "rests_on_stale"
    INSUFFICIENT_AUTHORITY = "insufficient_authority"
    REQUIREMENT_UNSATISFIED = "requirement_unsatisfied"


_Reason = SnapshotAcceptanceReason


@record
class SnapshotAcceptanceViolation:
    """One rule that a snapshot breaks, with the facts; those that do not belong to it are None.

    Attributes:
        reason: the kind of rule.
        keys: the resources concerned.
        message: what is wrong, as a sentence.
        key: the resource, if it is about a single one.
        requirement_name: the requirement, if the value was refused as one of its alternatives,
            or if it is the requirement itself.
        current_age_seconds: the age of the value when it was judged, or of its oldest input.
        max_age_seconds: the age it may have.
        stale: whether it is older than its time to live.
        authority_rank: the rank of its source.
        minimum_authority_rank: the rank it takes.
        accepted_count: how many alternatives are there and acceptable.
        required_count: how many it takes.
        input_key: the resource below it that is too old or stale; itself if it was not derived.
    """

    reason: SnapshotAcceptanceReason
    keys: tuple[ResourceKey, ...]
    message: str
    key: ResourceKey | None = None
    requirement_name: str = ""
    current_age_seconds: float | None = None
    max_age_seconds: float | None = None
    stale: bool | None = None
    authority_rank: int | None = None
    minimum_authority_rank: int | None = None
    accepted_count: int | None = None
    required_count: int | None = None
    input_key: ResourceKey | None = None


def _broken(
    key: ResourceKey, reason: SnapshotAcceptanceReason, must: str, **facts: Any
) -> SnapshotAcceptanceViolation:
    """Return what is wrong with the value of one key, which is something that it must do or be."""
    return SnapshotAcceptanceViolation(
        reason, (key,), f"{key.display} must {must}", key=key, **facts
    )


_PER_SLICE = 128


# Judging a snapshot by an acceptance policy ------------------------------------------------------
#
# Laws:
#
# 1. A value is judged by its age now, never by a lesser one than it was delivered with.
# 2. A missing value breaks no rule; it only does not count for a requirement.
# 3. An alternative that a requirement can do without is not reported for its sake.


def violations_of(
    policy: SnapshotAcceptancePolicy,
    request_required: Collection[ResourceKey],
    request_optional: Collection[ResourceKey],
    snapshot: Mapping[ResourceKey, SnapshotValue[Any]],
    now: float,
    freshness: FreshnessPolicyProvider | None = None,
) -> Generator[None, None, tuple[SnapshotAcceptanceViolation, ...]]:
    """Return all that ``policy`` has against ``snapshot``: single values first, then requirements.

    It is found out in slices. ``now`` is wall-clock seconds since the epoch. With ``freshness``, a
    value that went stale since it was delivered counts as stale.
    """
    values: Mapping[ResourceKey, SnapshotValue[Any]] = getattr(snapshot, "resources", snapshot)
    trial = _Trial(policy, values, now, freshness, policies.policy_of_all(freshness))
    clear = trial.is_clear()
    for requirement in policy.requirements if clear else ():
        clear = clear and values.keys() >= {*requirement.keys}
        yield
    if clear:
        return ()
    every, rules = policy.include_optional_resources, policy.resource_rules
    judged = (*request_required, *(key for key in request_optional if every or key in rules))
    found: list[SnapshotAcceptanceViolation] = []
    for place, key in enumerate(judged):
        found += trial.against(key)
        if not place % _PER_SLICE:
            yield
    reported = {(violation.key, violation.reason) for violation in found}
    for requirement in policy.requirements:
        for violation in (yield from trial.against_requirement(requirement)):
            if violation.key is None or (violation.key, violation.reason) not in reported:
                reported.add((violation.key, violation.reason))
                found.append(violation)
    return tuple(found)


@record
class _Trial:
    """One snapshot under one policy, at one moment."""

    policy: SnapshotAcceptancePolicy
    values: Mapping[ResourceKey, SnapshotValue[Any]]
    now: float
    freshness: FreshnessPolicyProvider | None
    common: FreshnessPolicy | None

    def is_clear(self) -> bool:
        """Whether the extremes of all values show that no rule speaks against any of them.

        It may be that nothing does, and this cannot tell.
        """
        rule, values = self.policy.default_rule, self.values.values()
        if type(self.policy) is not SnapshotAcceptancePolicy or self.policy.resource_rules:
            return False  # a policy of the application's may have rules of its own
        if not values or not rule.has_constraints:
            return True
        if not (rule.judges_nothing_below or all(not v.dependency_versions for v in values)):
            return False
        lowest = rule.minimum_authority_rank
        if lowest is not None and min([value.authority_rank for value in values]) < lowest:
            return False
        told = max([value.age_seconds for value in values])
        age = max(told, self.now - min([value.observed_at for value in values]))
        limits = rule.max_age_seconds, rule.max_oldest_age_seconds
        if any(most is not None and age > most for most in limits):
            return False
        return (rule.allow_stale and rule.allow_resting_on_stale) or self._all_are_fresh(age)

    def _all_are_fresh(self, age: float) -> bool:
        """Whether values of at most this age are fresh for sure."""
        values = self.values.values()
        if any(value.stale or value.dependency_versions for value in values):
            return False
        if self.freshness is None:
            return True
        return self.common is not None and not policies.gone_stale(age, self.common.ttl_seconds)

    def against(self, key: ResourceKey) -> Iterator[SnapshotAcceptanceViolation]:
        """What speaks against the value of one key; nothing if it has none."""
        rule = self.policy.rule_for(key)
        value = self.values.get(key) if rule.has_constraints else None
        if value is None:
            return
        age = max(0.0, value.age_seconds, self.now - value.observed_at)
        most, lowest = rule.max_age_seconds, rule.minimum_authority_rank
        if not rule.allow_stale and self._is_stale(value, age):
            must = f"be fresh, got a stale value observed {age:g} s ago"
            yield _broken(key, _Reason.STALE, must, current_age_seconds=age, stale=True)
        if most is not None and age > most:
            must = f"be at most {most:g} s old, got {age:g} s"
            ages = {"current_age_seconds": age, "max_age_seconds": most}
            yield _broken(key, _Reason.TOO_OLD, must, **ages)
        if not rule.judges_nothing_below:
            yield from self._broken_below(value, rule)
        if lowest is not None and (rank := value.authority_rank) < lowest:
            must = f"have an authority rank of at least {lowest}, got {rank} "
            must += f"from source {value.source}"
            ranks = {"authority_rank": rank, "minimum_authority_rank": lowest}
            yield _broken(key, _Reason.INSUFFICIENT_AUTHORITY, must, **ranks)

    def _broken_below(
        self, value: SnapshotValue[Any], rule: ResourceAcceptanceRule
    ) -> Iterator[SnapshotAcceptanceViolation]:
        """What speaks against all that it was derived from, or against itself if it was not."""
        key, limit = value.key, rule.max_oldest_age_seconds
        ahead = value.observed_at - value.oldest_observed_at
        age = max(value.age_seconds + ahead, self.now - value.oldest_observed_at)
        if limit is not None and age > limit:
            oldest = value.oldest_key
            must = f"rest on nothing that is more than {limit:g} s old, got "
            must += f"{oldest.display} observed {age:g} s ago"
            ages = {"current_age_seconds": age, "max_age_seconds": limit}
            yield _broken(key, _Reason.OLDEST_TOO_OLD, must, **ages, input_key=oldest)
        if rule.allow_resting_on_stale:
            return
        grounds = grounds_of(value.dependency_versions)
        if grounds is None:
            culprit, stale = key, self._is_stale(value, age)
        else:
            culprit = grounds.perishing
            stale = value.rests_on_stale or self.now > grounds.stale_at
        if stale:
            must = f"rest on fresh values, got {culprit.display}, which is stale"
            yield _broken(key, _Reason.RESTS_ON_STALE, must, stale=True, input_key=culprit)

    def _is_stale(self, value: SnapshotValue[Any], age: float) -> bool:
        if value.stale or self.freshness is None:
            return value.stale
        grounds = grounds_of(value.dependency_versions)
        if grounds is not None and grounds.inherited_at is not None:  # kept since it was derived
            if self.now > grounds.fresh_until:
                return True
            age = self.now - value.fetched_at
        common = self.common
        ttl = policies.ttl_of(self.freshness, value.key) if common is None else common.ttl_seconds
        return policies.gone_stale(age, ttl)

    def against_requirement(
        self, requirement: SnapshotRequirement
    ) -> Generator[None, None, list[SnapshotAcceptanceViolation]]:
        """What speaks against a requirement, and then against its rejected alternatives."""
        rejected: list[SnapshotAcceptanceViolation] = []
        accepted = 0
        for place, key in enumerate(requirement.keys):
            broken = list(self.against(key))
            rejected += broken
            accepted += key in self.values and not broken
            if not place % _PER_SLICE:
                yield
        if accepted >= requirement.minimum_count:
            return []
        name = requirement.name
        titled = f"requirement {name!r}" if name else "a requirement"
        unsatisfied = SnapshotAcceptanceViolation(
            _Reason.REQUIREMENT_UNSATISFIED,
            requirement.keys,
            f"{titled} must have {requirement.minimum_count} acceptable of "
            f"{len(requirement.keys)} resources, got {accepted}",
            requirement_name=name,
            accepted_count=accepted,
            required_count=requirement.minimum_count,
        )
        found = [unsatisfied]
        for place, violation in enumerate(rejected):
            found.append(replace(violation, requirement_name=name))
            if not place % _PER_SLICE:
                yield
        return found


# Whether they were observed close enough in time, and the request itself -------------------------

_observation = attrgetter("observed_at")


@record
class SnapshotConsistencyPolicy:
    """How far apart the values of a request may have been observed.

    Attributes:
        max_observation_skew_seconds: the longest time between the oldest and the newest.
        include_optional_resources: whether optional resources take part, where resolved.
    """

    max_observation_skew_seconds: float
    include_optional_resources: bool = False

    def __post_init__(self) -> None:
        number("max_observation_skew_seconds", self.max_observation_skew_seconds, minimum=0)
        flag("include_optional_resources", self.include_optional_resources)


def inconsistency_of(
    policy: SnapshotConsistencyPolicy,
    required: Collection[ResourceKey],
    optional: Collection[ResourceKey],
    snapshot: Mapping[ResourceKey, SnapshotValue[Any]],
) -> SnapshotConsistencyError | None:
    """Return what ``policy`` has against the values of a request; keys without one do not count."""
    asked = (*required, *optional) if policy.include_optional_resources else required
    found: Mapping[ResourceKey, SnapshotValue[Any]] = getattr(snapshot, "resources", snapshot)
    values = [value for key in asked if (value := found.get(key)) is not None]
    if len(values) < 2:
        return None
    oldest = min(values, key=_observation)
    newest = max(values, key=_observation)
    allowed = policy.max_observation_skew_seconds
    # Added, not subtracted: the same rounding as in a time that somebody computed by adding.
    if newest.observed_at <= oldest.observed_at + allowed:
        return None
    return SnapshotConsistencyError(
        keys=tuple(value.key for value in values),
        oldest_key=oldest.key,
        oldest_observed_at=oldest.observed_at,
        newest_key=newest.key,
        newest_observed_at=newest.observed_at,
        observation_skew_seconds=newest.observed_at - oldest.observed_at,
        max_observation_skew_seconds=allowed,
        snapshot=snapshot,
    )


@dataclass(frozen=True, init=False)
class SnapshotRequest:
    """The resources that a snapshot must have, those it may do without, and the rules for both.

    Attributes:
        required: the keys that must be resolved, each once, in the order given.
        optional: the keys that may fail.
        consistency_policy: how far apart the values may have been observed; None for any time.
        acceptance_policy: what the values must be like; None for no rules.

    Raises:
        ValueError: without keys, with a key in both groups, or with a policy that names a key
            outside the request.
    """

    required: tuple[ResourceKey, ...] = ()
    optional: tuple[ResourceKey, ...] = ()
    consistency_policy: SnapshotConsistencyPolicy | None = None
    acceptance_policy: SnapshotAcceptancePolicy | None = None

    def __init__(
        self,
        *,
        required: Iterable[ResourceKey] = (),
        optional: Iterable[ResourceKey] = (),
        consistency_policy: SnapshotConsistencyPolicy | None = None,
        acceptance_policy: SnapshotAcceptancePolicy | None = None,
    ) -> None:
        instance("consistency_policy", consistency_policy, SnapshotConsistencyPolicy, optional=True)
        instance("acceptance_policy", acceptance_policy, SnapshotAcceptancePolicy, optional=True)
        object.__setattr__(self, "required", tuple(distinct_keys("required", required)))
        object.__setattr__(self, "optional", tuple(distinct_keys("optional", optional)))
        object.__setattr__(self, "consistency_policy", consistency_policy)
        object.__setattr__(self, "acceptance_policy", acceptance_policy)
        if not self.keys:
            raise ValueError("a request must have at least one key in required or optional")
        both = [key for key in self.optional if key in self._required]
        if both:
            raise ValueError(
                f"required and optional must have no key in common, got {errors.listed(both)} in "
                "both; leave it in one of them"
            )
        named = () if acceptance_policy is None else acceptance_policy.referenced_keys
        foreign = set(named).difference(self.keys) if named else ()
        if foreign:
            raise ValueError(
                "acceptance_policy must name keys of the request only, got "
                f"{errors.listed(sorted(foreign))}; ask for it, or leave it out of the policy"
            )

    @cached_property
    def keys(self) -> tuple[ResourceKey, ...]:
        """All keys: the required ones, then the optional ones."""
        return self.required + self.optional

    @cached_property
    def _required(self) -> frozenset[ResourceKey]:
        return frozenset(self.required)

    def is_required(self, key: ResourceKey) -> bool:
        """Whether ``key`` is one of the required ones."""
        return key in self._required


# What came of a request that does not raise ------------------------------------------------------

_SCHEMA = {"schema": "coalestra.request-result", "schema_version": 1}


class RequestOutcome(str, enum.Enum):
    """Whether a request has what it asked for: in full, in part, or not so that it will do.

    ``ACCEPTED``: every key has a value, none of them is stale, and the policies hold. An optional
    key may be absent: that something does not exist is an answer, too.
    ``DEGRADED``: the policies hold, but an optional key failed, or some value is stale.
    ``REJECTED``: a required key has no value, a policy does not hold, or something else went wrong.
    """

    ACCEPTED = "accepted"
    DEGRADED = "degraded"
    REJECTED = "rejected"


@dataclass(frozen=True, repr=False)
class RequestResult:
    """What came of a request, where it does not raise.

    Attributes:
        request: what was asked for.
        snapshot: what was read, also if it was turned down; None if there is none.
        error: why it was turned down, as the form that raises has it; else None.
    """

    request: SnapshotRequest
    snapshot: Snapshot | None
    error: Exception | None = None

    def __post_init__(self) -> None:
        instance("request", self.request, SnapshotRequest)
        instance("snapshot", self.snapshot, Snapshot, optional=self.error is not None)
        instance("error", self.error, Exception, optional=True)

    @cached_property
    def outcome(self) -> RequestOutcome:
        """Whether the request has what it asked for."""
        if self.error is not None:
            return RequestOutcome.REJECTED
        # That something does not exist is an answer.
        absent = [e for e in self.errors.values() if isinstance(e, errors.ResourceAbsentError)]
        answered = len(self._values) + len(absent) == len(self.request.keys)
        full = answered and not self.stale_keys
        return RequestOutcome.ACCEPTED if full else RequestOutcome.DEGRADED

    @cached_property
    def reason(self) -> str:
        """Why the outcome is what it is, as one sentence."""
        if isinstance(self.error, SnapshotBuildError):
            return errors.message_of(self.error)
        if self.error is not None:
            return f"the request failed with {errors.told(self.error)}"
        lacks = []
        if self.errors:
            without = errors.counted(len(self.errors), "value")
            lacks.append(f"without {without}: {errors.described(self.errors)}")
        if self.stale_keys:
            stale = [self._values[key] for key in self.stale_keys]
            first = stale[: errors.MAX_RESOURCES_SHOWN]
            ages = [f"{each.key.display} [{each.age_seconds:g} s old]" for each in first]
            number = errors.counted(len(stale), "stale value")
            lacks.append(f"with {number}: {errors.enumerated(ages, len(stale), 'value')}")
        return f"accepted {', and '.join(lacks) or 'in full'}"

    @cached_property
    def errors(self) -> Mapping[ResourceKey, Exception]:
        """Why keys of the request have no value, or one that was refused; read-only."""
        refused = self.error.errors if isinstance(self.error, SnapshotBuildError) else EMPTY
        failed = EMPTY if self.snapshot is None else self.snapshot.errors
        found = {**refused, **failed}  # what kept a value from being there says more
        return frozen({key: found[key] for key in self.request.keys if key in found})

    @property
    def violations(self) -> tuple[SnapshotAcceptanceViolation, ...]:
        """Every rule and requirement of the acceptance policy that is broken."""
        error = self.error
        return error.violations if isinstance(error, errors.SnapshotAcceptanceError) else ()

    @cached_property
    def stale_keys(self) -> tuple[ResourceKey, ...]:
        """The keys of the request whose values were stale when they were delivered."""
        return tuple(key for key, value in self._values.items() if value.stale)

    @cached_property
    def _values(self) -> Mapping[ResourceKey, SnapshotValue[Any]]:
        found = EMPTY if self.snapshot is None else self.snapshot.resources
        return {key: found[key] for key in self.request.keys if key in found}

    def require_accepted(self) -> Snapshot:
        """Return the snapshot, in full or degraded.

        Raises:
            Exception: `error`, if the request is rejected.
        """
        if self.error is None:
            assert self.snapshot is not None
            return self.snapshot
        try:
            # Without the traceback of an earlier call, which would grow by that of this one.
            raise BaseException.with_traceback(self.error, None)
        finally:
            del self  # whom the traceback leads to, and who leads to the traceback

    def to_dict(self, *, include_values: bool = False) -> dict[str, Any]:
        """Return the result as JSON-safe data; see the reference of data for its keys.

        Args:
            include_values: whether the payloads that were read and their metadata are in it.
        """
        flag("include_values", include_values)
        read = None
        if self.snapshot is not None:
            read = self.snapshot.to_dict(include_values=include_values)
        return {
            **_SCHEMA,
            "outcome": self.outcome.value,
            "reason": errors.folded_message(self.reason),
            "required": [key.canonical for key in self.request.required],
            "optional": [key.canonical for key in self.request.optional],
            "stale": [key.canonical for key in self.stale_keys],
            "error_type": None if self.error is None else errors.type_name(self.error),
            "errors": {k.canonical: errors.described_error(k, e) for k, e in self.errors.items()},
            "violations": [_as_data(violation) for violation in self.violations],
            "snapshot": read,
        }

    def __repr__(self) -> str:
        return f"<RequestResult {self.outcome.value}: {self.reason}>"


def _as_data(violation: SnapshotAcceptanceViolation) -> dict[str, Any]:
    facts = {each.name: getattr(violation, each.name) for each in fields(violation)}
    facts["keys"] = [key.canonical for key in violation.keys]
    facts["message"] = errors.folded_message(violation.message)
    keys = {name: key.canonical for name, key in facts.items() if isinstance(key, ResourceKey)}
    return {**json_safe(facts), **keys}
