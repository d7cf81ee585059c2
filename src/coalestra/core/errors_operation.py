"""Errors about running the library itself: copies, closing, backlogs and capabilities."""

from __future__ import annotations

from collections.abc import Mapping

from coalestra.core.errors_root import CoalestraError
from coalestra.core.frozen import FrozenDict


class SessionClosedError(CoalestraError):
    """A session was used after it had been closed; open another one. Takes a free message."""


class BuilderClosedError(CoalestraError, RuntimeError):
    """A builder, or something that belongs to it, was used after it had been closed.

    Attributes:
        component: what was closed, as the text names it.
    """

    def __init__(self, component: str = "the snapshot builder") -> None:
        self.component = component
        super().__init__(f"{component} is closed and takes no more work; create a new one")


class PayloadIsolationError(CoalestraError):
    """A payload cannot be copied, so it cannot be shared safely. ``__cause__`` says why.

    Attributes:
        context: what the copy was for.
        value_type: the name of the payload's type.
    """

    def __init__(self, *, context: str, value_type: str) -> None:
        self.context = context
        self.value_type = value_type
        super().__init__(
            f"payloads must be copyable, got {value_type} while copying for {context}; return "
            "plain data or configure payload_copier"
        )


class PayloadCopySubsystemClosedError(CoalestraError):
    """A copy was asked for, or still waiting for its turn, when copying was closed.

    Attributes:
        component: whose copies: ``builder``, ``cache`` or ``publisher``.
    """

    def __init__(self, *, component: str) -> None:
        self.component = component
        super().__init__(f"payload copying of the {component} is closed and takes no more copies")


class PayloadCopyShutdownTimeoutError(CoalestraError):
    """Closing left threads behind that still copy payloads; they cannot be stopped.

    Attributes:
        timeout_seconds: how long closing waited for them.
        active_components: copies still active, by component.
        active_copies: their sum.
    """

    def __init__(self, *, timeout_seconds: float, active_components: Mapping[str, int]) -> None:
        self.timeout_seconds = timeout_seconds
        self.active_components: Mapping[str, int] = FrozenDict(active_components)
        self.active_copies: int = sum(self.active_components.values())
        super().__init__(
            f"payload copies must end within {timeout_seconds:g} s of closing, got "
            f"{self.active_copies} still active ({_amounts(self.active_components)}); allow more "
            "time with copy_shutdown_timeout_seconds or copy less at once"
        )


class ObservabilityShutdownTimeoutError(CoalestraError):
    """Closing left event or metric records undelivered: a sink is too slow, or stuck.

    Attributes:
        timeout_seconds: how long closing waited for the sinks.
        pending_components: records still pending, by component.
        pending_records: their sum.
    """

    def __init__(self, *, timeout_seconds: float, pending_components: Mapping[str, int]) -> None:
        self.timeout_seconds = timeout_seconds
        self.pending_components: Mapping[str, int] = FrozenDict(pending_components)
        self.pending_records: int = sum(self.pending_components.values())
        super().__init__(
            f"observability must be delivered within {timeout_seconds:g} s of closing, got "
            f"{self.pending_records} records still pending ({_amounts(self.pending_components)}); "
            "allow more time with observability_shutdown_timeout_seconds or do not drain"
        )


class SubmissionBacklogFullError(CoalestraError):
    """A submission was refused at once because too many are waiting already.

    Attributes:
        limit: how many may wait.
        pending: how many did.
    """

    def __init__(self, *, limit: int, pending: int) -> None:
        self.limit = limit
        self.pending = pending
        super().__init__(
            f"at most {limit} submissions may be pending, got {pending}; submit more slowly, "
            "flush, or raise max_pending_submissions"
        )


class CapabilityRequirementError(CoalestraError):
    """The installed version lacks features or schemas that the application needs.

    Attributes:
        missing_features: the features it does not have.
        schema_mismatches: for each schema that is too old or absent, the version that was asked
            for and the one that is installed (or None).
    """

    def __init__(
        self,
        *,
        missing_features: tuple[str, ...],
        schema_mismatches: Mapping[str, tuple[int, int | None]],
    ) -> None:
        self.missing_features: tuple[str, ...] = tuple(missing_features)
        self.schema_mismatches: Mapping[str, tuple[int, int | None]] = FrozenDict(schema_mismatches)
        problems = [f"feature {name!r} is missing" for name in self.missing_features]
        for name, (minimum, installed) in self.schema_mismatches.items():
            found = "absent" if installed is None else f"version {installed}"
            problems.append(f"schema {name!r} must be version {minimum} or later, is {found}")
        super().__init__(
            f"the installed coalestra does not satisfy the application: {'; '.join(problems)}; "
            "install another version"
        )


def _amounts(components: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {amount}" for name, amount in components.items()) or "none named"
