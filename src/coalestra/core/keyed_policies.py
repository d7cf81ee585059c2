"""Which policy holds for a key: what freshness and authority have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import callable_, instance, mapping

P = TypeVar("P")


class KeyedPolicies(Generic[P]):
    """The override of a key, else the answer of a function, else a default."""

    __slots__ = ("default", "dynamic", "overrides")

    def __init__(
        self,
        default: P,
        overrides: Mapping[ResourceKey, P] | None,
        dynamic: Callable[[ResourceKey], P | None] | None,
    ) -> None:
        self.default: P = default
        self.overrides: Mapping[ResourceKey, P] = FrozenDict(
            mapping("overrides", overrides, optional=True)
        )
        self.dynamic: Callable[[ResourceKey], P | None] | None = callable_(
            "dynamic", dynamic, optional=True
        )
        for key, policy in self.overrides.items():
            instance("overrides key", key, ResourceKey)
            instance(f"overrides[{key}]", policy, type(default))

    def resolve(self, key: ResourceKey) -> P:
        """Return the policy of ``key``; raises what the dynamic resolver raises."""
        if self.overrides:
            override = self.overrides.get(key)
            if override is not None:
                return override
        if self.dynamic is not None:
            answer = self.dynamic(key)
            if answer is not None:
                return instance("dynamic result", answer, type(self.default))
        return self.default

    def __repr__(self) -> str:
        dynamic = ", dynamic" if self.dynamic is not None else ""
        name = type(self).__name__
        return f"{name}(default={self.default!r}, {len(self.overrides)} overrides{dynamic})"


def policy_of_all(policies: object) -> Any:
    """Return the policy that all keys have in common by these policies; None if they may differ."""
    kind = type(policies)
    if getattr(kind, "resolve", None) is not KeyedPolicies.resolve:
        return None
    keyed: Any = policies
    return None if keyed.overrides or keyed.dynamic is not None else keyed.default
