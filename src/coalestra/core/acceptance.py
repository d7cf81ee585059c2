"""Whether the values of a snapshot are good enough for what they were asked for."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey, distinct_keys
from coalestra.core.validation import flag, instance, integer, mapping, number, refusal, text


@dataclass(frozen=True, slots=True)
class ResourceAcceptanceRule:
    """What one value must be like.

    Attributes:
        max_age_seconds: how long ago it may have been observed; None for any time.
        allow_stale: whether it may be older than its time to live.
        minimum_authority_rank: the rank its source must have at least; None for any rank.

    Raises:
        TypeError: for another type.
        ValueError: for an age that is negative or not finite.
    """

    max_age_seconds: float | None = None
    allow_stale: bool = True
    minimum_authority_rank: int | None = None

    def __post_init__(self) -> None:
        number("max_age_seconds", self.max_age_seconds, minimum=0, optional=True)
        flag("allow_stale", self.allow_stale)
        integer("minimum_authority_rank", self.minimum_authority_rank, optional=True)

    @property
    def has_constraints(self) -> bool:
        """Whether there is any value that it would refuse."""
        return not (
            self.allow_stale
            and self.max_age_seconds is None
            and self.minimum_authority_rank is None
        )


@dataclass(frozen=True, slots=True, init=False)
class SnapshotRequirement:
    """That so many out of several resources are there and acceptable.

    Attributes:
        keys: the alternatives, each once.
        minimum_count: how many of them it takes.
        name: what to call it in violations; may be empty.

    Raises:
        TypeError: for another type.
        ValueError: without keys, or unless the count is from 1 to their number.
    """

    keys: tuple[ResourceKey, ...]
    minimum_count: int
    name: str = ""

    def __init__(self, keys: Iterable[ResourceKey], *, minimum_count: int, name: str = "") -> None:
        alternatives = distinct_keys("keys", keys)
        if not alternatives:
            raise ValueError(refusal("keys", "at least one key", alternatives))
        integer("minimum_count", minimum_count, minimum=1)
        if minimum_count > len(alternatives):
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


@dataclass(frozen=True, slots=True)
class SnapshotAcceptancePolicy:
    """What the values of a request must be like, one by one and together.

    Attributes:
        default_rule: for required resources without a rule of their own.
        resource_rules: rules by key, for required and optional resources alike; read-only.
        requirements: what must hold of several resources together.
        include_optional_resources: whether the default rule is for optional ones too.

    Raises:
        TypeError: for another type.
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
            instance(f"resource_rules[{key}]", rule, ResourceAcceptanceRule)
        requirements = tuple(self.requirements)
        for requirement in requirements:
            instance("requirements", requirement, SnapshotRequirement)
        object.__setattr__(self, "resource_rules", rules)
        object.__setattr__(self, "requirements", requirements)
        if not self._constrains():
            raise ValueError(
                "acceptance policy must refuse something, got no constraint in default_rule, "
                "resource_rules or requirements; leave the policy out instead"
            )

    def _constrains(self) -> bool:
        rules = (self.default_rule, *self.resource_rules.values())
        return bool(self.requirements) or any(rule.has_constraints for rule in rules)

    @property
    def referenced_keys(self) -> frozenset[ResourceKey]:
        """The keys that its rules and requirements name."""
        named = (requirement.keys for requirement in self.requirements)
        return frozenset(self.resource_rules).union(*named)

    def rule_for(self, key: ResourceKey) -> ResourceAcceptanceRule:
        """Return the rule of ``key``: its own, else the default."""
        return self.resource_rules.get(key, self.default_rule)


class SnapshotAcceptanceReason(str, enum.Enum):
    """Which kind of rule a violation breaks."""

    STALE = "stale"
    TOO_OLD = "too_old"
    INSUFFICIENT_AUTHORITY = "insufficient_authority"
    REQUIREMENT_UNSATISFIED = "requirement_unsatisfied"


@dataclass(frozen=True, slots=True)
class SnapshotAcceptanceViolation:
    """One rule that a snapshot breaks, with the facts; those that do not belong to it are None.

    Attributes:
        reason: the kind of rule.
        keys: the resources concerned.
        message: what is wrong, as a sentence.
        key: the resource, if it is about a single one.
        requirement_name: the requirement, if the value was refused as one of its alternatives,
            or if it is the requirement itself.
        current_age_seconds: the age of the value when it was judged.
        max_age_seconds: the age it may have.
        stale: whether it is older than its time to live.
        authority_rank: the rank of its source.
        minimum_authority_rank: the rank it takes.
        accepted_count: how many alternatives are there and acceptable.
        required_count: how many it takes.
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
