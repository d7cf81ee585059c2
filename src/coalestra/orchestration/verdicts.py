"""Whether a snapshot will do, and telling so: by raising, by a result, or by many of them.

Laws:

1. What speaks against a snapshot is decided once, as an error that is returned. Whether that is
   raised or put into a result is all that the two forms of a request differ in.
2. A result takes any `Exception`, of the policies too, but those that say that a builder is closed.
   Cancellation, what ends a program, and every other `BaseException` go on.
3. Of many requests none is begun before there is room, and none outlives the call.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

from coalestra.concurrency.pace import Slices
from coalestra.core import errors
from coalestra.core.acceptance import violations_of
from coalestra.core.frozen import FrozenDict
from coalestra.core.request import RequestResult, SnapshotRequest, inconsistency_of
from coalestra.core.snapshot import Snapshot
from coalestra.core.validation import instance, integer, shown, wrong_type
from coalestra.orchestration.deliveries import all_or_none
from coalestra.orchestration.parts import Parts

# What speaks against a snapshot ------------------------------------------------------------------


def objection(
    parts: Parts, request: SnapshotRequest, snapshot: Snapshot
) -> Slices[Exception | None]:
    """Return what speaks against a snapshot: what it lacks, then consistency, then acceptance.

    Both policies are reported on, as far as they are asked.
    """
    report, required, optional = parts.report, request.required, request.optional
    failed = {key: e for key, e in snapshot.errors.items() if request.is_required(key)}
    if failed:
        return errors.SnapshotBuildError(failed, snapshot=snapshot)
    if request.consistency_policy is not None:
        found = inconsistency_of(request.consistency_policy, required, optional, snapshot)
        if report is not None:
            report.consistency_judged(snapshot.snapshot_id, found)
        if found is not None:
            return found
    if request.acceptance_policy is not None:
        violations = yield from violations_of(
            request.acceptance_policy,
            required,
            optional,
            snapshot,
            parts.clock.now(),
            parts.policies,
        )
        if report is not None:
            report.acceptance_judged(snapshot.snapshot_id, violations)
        if violations:
            return (yield from errors.not_accepted(violations, snapshot))
    return None


# Telling it: by raising, or by a result ----------------------------------------------------------


Decided = tuple[Snapshot | None, Exception | None]
"""A snapshot, if there is one, and what speaks against it or kept it from being made."""


def accepted(snapshot: Snapshot | None, error: Exception | None) -> Snapshot:
    """Return the snapshot, or raise the error."""
    if error is None:
        assert snapshot is not None
        return snapshot
    try:
        raise error
    finally:
        del error  # whose traceback leads here


def result_of(
    request: SnapshotRequest, snapshot: Snapshot | None, error: Exception | None
) -> RequestResult:
    """Return what came of a request; the error loses its traceback, which keeps all alive."""
    if isinstance(error, (errors.BuilderClosedError, errors.PayloadCopySubsystemClosedError)):
        accepted(snapshot, error)
    if error is not None:
        errors.without_frames(error, spared=sys.exc_info()[1])  # the caller's own trouble, if any
    return RequestResult(request, snapshot, error)


# Many at once ------------------------------------------------------------------------------------


K = TypeVar("K")
P = ParamSpec("P")

Requests = Mapping[Any, SnapshotRequest] | Iterable[SnapshotRequest]
Results = Mapping[Any, RequestResult] | tuple[RequestResult, ...]


class Several(Protocol[P]):
    """What takes requests by name, or in order, and returns the results in the same form."""

    @overload
    async def __call__(  # type: ignore[overload-overlap]  # a mapping is taken for one
        self, requests: Mapping[K, SnapshotRequest], *args: P.args, **kwargs: P.kwargs
    ) -> Mapping[K, RequestResult]: ...

    @overload
    async def __call__(
        self, requests: Iterable[SnapshotRequest], *args: P.args, **kwargs: P.kwargs
    ) -> tuple[RequestResult, ...]: ...


def in_same_form(method: Callable[Concatenate[Any, Requests, P], Awaitable[Results]]) -> Several[P]:
    """Tell type checkers that the results of a method have the form of the requests."""
    return cast("Several[P]", method)


async def several(
    parts: Parts,
    requests: Requests,
    attempt: Callable[[SnapshotRequest], Awaitable[RequestResult]],
    max_concurrency: int | None,
) -> Results:
    """Attempt many requests; return their results by name if they have names, else in their order.

    No more are under way at once than `max_concurrency`.
    """
    if not isinstance(requests, Iterable):
        rule = "an iterable of SnapshotRequests, or a mapping to them"
        raise wrong_type("requests", rule, requests, "put a single one in a list")
    named = FrozenDict(requests if isinstance(requests, Mapping) else enumerate(requests))
    for name, request in named.items():
        if not isinstance(request, SnapshotRequest):
            instance(f"requests[{shown(name)}]", request, SnapshotRequest)
    integer("max_concurrency", max_concurrency, minimum=1, optional=True)
    limit = parts.max_pending_tasks if max_concurrency is None else max_concurrency
    results: dict[Any, Any] = dict.fromkeys(named)
    rest = iter(named.items())

    async def work() -> None:
        for name, request in rest:
            results[name] = await attempt(request)
            await parts.pace.keep()  # many that wait for nothing would hold the event loop

    await all_or_none(work() for _ in range(min(limit, len(named))))
    return FrozenDict(results) if isinstance(requests, Mapping) else tuple(results.values())
