"""Whose word counts more, when values of one resource compete for its place in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from coalestra.core.frozen import FrozenDict
from coalestra.core.keyed_policies import KeyedPolicies
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import instance, integer, mapping, text


@dataclass(frozen=True, slots=True)
class SourceAuthorityPolicy:
    """The rank of each source; a value replaces those of lower rank, whatever their age.

    Attributes:
        source_ranks: ranks by name of source; read-only.
        default_rank: the rank of every other source.

    Raises:
        TypeError: for names that are not strings or ranks that are not integers.
        ValueError: for an empty name.
    """

    source_ranks: Mapping[str, int] = field(default_factory=FrozenDict)
    default_rank: int = 0

    def __post_init__(self) -> None:
        ranks = FrozenDict(mapping("source_ranks", self.source_ranks))
        for source, rank in ranks.items():
            text("source_ranks key", source)
            integer(f"source_ranks[{source!r}]", rank)
        integer("default_rank", self.default_rank)
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


_NO_RULES = SourceAuthorityPolicy()


class AuthorityPolicyResolver(KeyedPolicies[SourceAuthorityPolicy]):
    """The authority policy of every key: its override, else the dynamic answer, else the default.

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
        default: SourceAuthorityPolicy | None = None,
        overrides: Mapping[ResourceKey, SourceAuthorityPolicy] | None = None,
        dynamic: AuthorityResolver | None = None,
    ) -> None:
        chosen = instance("default", default, SourceAuthorityPolicy, optional=True)
        super().__init__(_NO_RULES if chosen is None else chosen, overrides, dynamic)

    @property
    def has_rules(self) -> bool:
        """Whether any value can have another rank than 0."""
        return bool(self.overrides) or self.dynamic is not None or self.default != _NO_RULES

    def rank_for(self, key: ResourceKey, source: str) -> int:
        """Return the rank of the source of this name, for ``key``."""
        return self.resolve(key).rank_for(source)
