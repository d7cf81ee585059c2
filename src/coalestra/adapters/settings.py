"""What the three callable adapters have in common: their settings and what these imply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coalestra.adapters.invocation import Invocation, is_coroutine_function
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import (
    callable_,
    flag,
    instance,
    integer,
    number,
    refusal,
    text,
    wrong_type,
)
from coalestra.core.values import SourcePayload
from coalestra.resilience.policies import SourceResiliencePolicy


@dataclass(eq=False, repr=False, kw_only=True)
class AdapterSettings:
    """The settings that every callable adapter takes.

    Attributes:
        name: the source's name, unique in a builder.
        priority: sources with a higher one are asked first.
        timeout_seconds: the longest a call may take; None: no limit of its own.
        queue_timeout_seconds: the longest a call may wait for capacity; None: as long as a call
            may take.
        max_concurrency: how many calls may run at once; None: no limit of its own.
        resilience_policy: retries and circuit of this source; None: the builder's.
        cache_supports: whether answers of ``supports`` may be remembered.
        run_sync_in_thread: whether a plain function runs in a worker thread.
        blocking_io: whether the function waits for a network, a disk or the like.
        transport_timeout_seconds: the longest its transport lets it wait.

    Raises:
        TypeError, ValueError: for a bad setting, naming it.
    """

    name: str
    priority: int
    timeout_seconds: float | None
    queue_timeout_seconds: float | None
    max_concurrency: int | None
    resilience_policy: SourceResiliencePolicy | None
    cache_supports: bool
    run_sync_in_thread: bool
    blocking_io: bool
    transport_timeout_seconds: float | None

    def __post_init__(self) -> None:
        text("name", self.name)
        integer("priority", self.priority)
        for setting in ("timeout_seconds", "queue_timeout_seconds", "transport_timeout_seconds"):
            number(setting, getattr(self, setting), above=0, optional=True)
        integer("max_concurrency", self.max_concurrency, minimum=1, optional=True)
        instance("resilience_policy", self.resilience_policy, SourceResiliencePolicy, optional=True)
        for setting in ("cache_supports", "run_sync_in_thread", "blocking_io"):
            flag(setting, getattr(self, setting))
        if self.transport_timeout_seconds is not None and not self.blocking_io:
            raise ValueError(
                refusal(
                    "transport_timeout_seconds",
                    "None unless blocking_io is True",
                    self.transport_timeout_seconds,
                    "set blocking_io=True if the callable blocks",
                )
            )


class CallableAdapter:
    """A source made from functions; every setting is an attribute under its parameter's name.

    Attributes:
        blocking_io_offloaded: whether calls leave the event loop: True for a plain function that
            runs in a worker thread.
    """

    name: str
    priority: int
    timeout_seconds: float | None
    queue_timeout_seconds: float | None
    max_concurrency: int | None
    resilience_policy: SourceResiliencePolicy | None
    cache_supports: bool
    run_sync_in_thread: bool
    blocking_io: bool
    transport_timeout_seconds: float | None
    blocking_io_offloaded: bool

    def __init__(
        self,
        settings: AdapterSettings,
        supports: Callable[[ResourceKey], bool],
        invocation: Invocation,
    ) -> None:
        vars(self).update(vars(settings))
        self._invocation = invocation
        self._supports = plain("supports", supports, source=settings.name)
        self.blocking_io_offloaded = invocation.in_thread

    def supports(self, key: ResourceKey) -> bool:
        """Return whether this source can answer for `key`: what the function says, as a bool."""
        answer = self._supports.answer_now(key)
        return answer if answer is True else bool(answer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, priority={self.priority!r})"


def invocation_of(
    parameter: str, function: Callable[..., Any], settings: AdapterSettings
) -> Invocation:
    """Return how to call `function`; TypeError if it cannot be called."""
    callable_(parameter, function)
    return Invocation(
        function,
        source=settings.name,
        parameter=parameter,
        in_thread=settings.run_sync_in_thread,
    )


def plain(parameter: str, function: Callable[..., Any], *, source: str) -> Invocation:
    """Return how to call a function whose answer is needed at once; TypeError if it is async."""
    callable_(parameter, function)
    if is_coroutine_function(function):
        raise wrong_type(parameter, "a plain function", function, "it must answer without waiting")
    return Invocation(function, source=source, parameter=parameter, in_thread=False)


def as_payload(value: Any) -> SourcePayload[Any]:
    """Return `value` as a payload: itself if it is one already."""
    return value if isinstance(value, SourcePayload) else SourcePayload(value)
