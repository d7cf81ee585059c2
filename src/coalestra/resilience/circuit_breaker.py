"""The public face of the circuits: the same steps, as coroutines, by source and key."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from coalestra.core.clock import Clock
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import instance
from coalestra.resilience.circuit import (
    CircuitBreakerPolicy,
    CircuitIdentity,
    CircuitState,
)
from coalestra.resilience.circuits import Circuits

if TYPE_CHECKING:
    from coalestra.resilience.circuit_snapshot import CircuitSnapshot


class CircuitBreaker(Circuits):
    """Stops calling a source that keeps failing, and tries it again after a while.

    Closed, it lets calls through; open, after `failure_threshold` failures in a row, it refuses
    them; half-open, `recovery_timeout_seconds` later, it lets one probe through, which decides.

    Args:
        failure_threshold: of the default policy.
        recovery_timeout_seconds: of the default policy.
        clock: whose monotonic seconds count; by default the system's.
        default_policy: in place of the one made of the two numbers.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or outside of its range.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 3,
        recovery_timeout_seconds: float = 10.0,
        clock: Clock | None = None,
        default_policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        instance("default_policy", default_policy, CircuitBreakerPolicy, optional=True)
        from_numbers = CircuitBreakerPolicy(
            failure_threshold=failure_threshold, recovery_timeout_seconds=recovery_timeout_seconds
        )
        super().__init__(default_policy or from_numbers, clock=clock)

    async def before_call(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> CircuitIdentity:
        """Let a call through and return its circuit; a half-open one admits a single probe.

        Report afterwards, once: `record_success`, `record_failure`, `record_abandoned` or
        `record_skipped`.

        Raises:
            CircuitOpenError: if the circuit is open, or its probe is under way.
            ValueError: if the policy's scope needs a key and there is none.
        """
        return self.admit(source, key, policy or self.default_policy)

    async def record_success(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call that returned something fresh: the count of failures begins anew."""
        self.succeed(*self._resolve(source, key, policy))

    async def record_failure(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call that failed, once for all its retries; a failed probe reopens."""
        self.fail(*self._resolve(source, key, policy))

    async def record_abandoned(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call that was cancelled under way: a probe so ended reopens the circuit."""
        self.abandon(*self._resolve(source, key, policy))

    async def record_skipped(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Report a call never made, for want of time or capacity: it frees the probe, no more."""
        self.skip(*self._resolve(source, key, policy))

    async def state_for(
        self,
        source: str,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> CircuitState:
        """Return the state of the circuit that a call would belong to."""
        identity, _ = self._resolve(source, key, policy)
        return self.state_of(identity)

    async def reset(
        self,
        source: str | None = None,
        *,
        key: ResourceKey | None = None,
        policy: CircuitBreakerPolicy | None = None,
    ) -> None:
        """Close circuits as if nothing had failed.

        Args:
            source: the source whose circuits to close; None for all of them.
            key: with a source, close only the circuit that this key belongs to.
            policy: tells by its scope which circuit that is.

        Raises:
            ValueError: if there is a key but no source.
        """
        if source is None and key is not None:
            raise ValueError(f"source must be given together with a key, got None and {key}")
        if source is None or key is None:
            self.forget_source(source)
        else:
            identity, _ = self._resolve(source, key, policy)
            self.forget(identity)

    async def snapshot(self) -> Mapping[CircuitIdentity, CircuitSnapshot]:
        """Return the figures of every circuit that has failures or is not closed."""
        return MappingProxyType(self.view())

    def _resolve(
        self, source: str, key: ResourceKey | None, policy: CircuitBreakerPolicy | None
    ) -> tuple[CircuitIdentity, CircuitBreakerPolicy]:
        chosen = policy or self.default_policy
        return self.identity_for(source, key=key, scope=chosen.scope), chosen
