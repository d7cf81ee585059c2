"""Which retry and circuit policy applies to a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coalestra.core.policies import KeyedPolicies
from coalestra.core.validation import flag, instance, text
from coalestra.resilience.circuit_breaker import CircuitBreakerPolicy
from coalestra.resilience.retry import RetryPolicy

__all__ = ["ResiliencePolicyResolver", "ResilienceResolver", "SourceResiliencePolicy"]


@dataclass(frozen=True)
class SourceResiliencePolicy:
    """How calls to a source are retried, and when they stop.

    Attributes:
        retry: which failed calls are made again, and when.
        circuit: when the source is left alone.
        finish_late: whether a call that is under way when the deadlines of all its readers have
            passed goes on for as long as the ``timeout_seconds`` of its source allow, to fill the
            cache. It keeps its slot. A source without a timeout is cut off all the same.
    """

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    circuit: CircuitBreakerPolicy = field(default_factory=CircuitBreakerPolicy)
    finish_late: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        instance("retry", self.retry, RetryPolicy)
        instance("circuit", self.circuit, CircuitBreakerPolicy)
        flag("finish_late", self.finish_late)


ResilienceResolver = Callable[[str], SourceResiliencePolicy | None]
"""Chooses a policy by the name of a source; None leaves the choice to what comes next."""


class ResiliencePolicyResolver(KeyedPolicies[str, SourceResiliencePolicy]):
    """Chooses the policy of a source: by name, else dynamically, else as declared, else default.

    Attributes:
        default: for sources that nothing else covers.
        overrides: policies by source name; they win.
        dynamic: asked next, with the name of the source; or None.
    """

    __slots__ = ()

    def __init__(
        self,
        default: SourceResiliencePolicy | None = None,
        overrides: Mapping[str, SourceResiliencePolicy] | None = None,
        dynamic: ResilienceResolver | None = None,
    ) -> None:
        chosen = SourceResiliencePolicy() if default is None else default
        super().__init__(SourceResiliencePolicy, chosen, overrides, dynamic)

    def _named(self, key: Any) -> str:
        return repr(text("overrides key", key))

    def resolve(
        self, source: str, *, declared: SourceResiliencePolicy | None = None
    ) -> SourceResiliencePolicy:
        """Return the policy for a source of this name, which may declare one itself."""
        chosen = self._chosen(source)
        if chosen is None and declared is not None:
            chosen = instance("declared", declared, SourceResiliencePolicy)
        return self.default if chosen is None else chosen
