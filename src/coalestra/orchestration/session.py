"""Sessions: one unit of work in several stages, which pins what it has read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

from coalestra.core.acceptance import SnapshotAcceptancePolicy
from coalestra.core.errors import SessionClosedError, SnapshotBuildError
from coalestra.core.keys import ResourceKey
from coalestra.core.request import RequestResult, SnapshotConsistencyPolicy, SnapshotRequest
from coalestra.core.snapshot import FetchContext, Snapshot
from coalestra.core.validation import flag, instance
from coalestra.orchestration.revalidation import Revalidation
from coalestra.orchestration.unit import UnitOfWork, cut_short, distinct
from coalestra.orchestration.verdicts import (
    Requests,
    Results,
    in_form_of,
    in_same_form,
    named,
    several,
)


class SnapshotSession:
    """A unit of work that reads in stages under one id, one deadline and one set of values.

    A key, once resolved, keeps its value for the life of the session, and so does whatever it was
    derived from. Get one from `SnapshotBuilder.session`; use it with ``async with``. Calls may run
    side by side; those under way when it is closed still come to their end.

    Once it is closed every call raises `SessionClosedError`. What asks for values raises a
    `RuntimeError` if the builder is closed, or busy on another event loop, and a `TypeError` or
    `ValueError` for a wrong argument.
    """

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit
        self._closed = False
        self._turn: tuple[asyncio.AbstractEventLoop | None, asyncio.Lock] = None, asyncio.Lock()

    @property
    def snapshot_id(self) -> str:
        """The id that every snapshot of the session bears."""
        return self._unit.work.context.snapshot_id

    @property
    def created_at(self) -> float:
        """When the session began, in seconds since the epoch on the builder's clock."""
        return self._unit.work.context.requested_at

    @property
    def context(self) -> FetchContext:
        """What sources are told about the session."""
        return self._unit.work.context

    @property
    def closed(self) -> bool:
        """Whether the session takes no more calls."""
        return self._closed

    async def resolve(
        self, keys: Iterable[ResourceKey], *, strict: bool = True, retry_errors: bool = False
    ) -> Snapshot:
        """Resolve further keys and return the snapshot of everything asked for so far.

        Args:
            keys: what is needed now. What is pinned already is not read again.
            strict: raise if any of `keys` has no value; else the snapshot says so in `errors`.
            retry_errors: try those of `keys` again that failed before.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the partial snapshot.
        """
        self._require_open()
        flag("strict", strict)
        flag("retry_errors", retry_errors)
        return await self._unit.resolve(distinct(keys), strict=strict, retry_errors=retry_errors)

    async def resolve_request(
        self, request: SnapshotRequest, *, retry_errors: bool = False
    ) -> Snapshot:
        """Resolve a request: its required keys must have values, and its policies must hold.

        Raises:
            SnapshotBuildError: a required key failed; it holds the partial snapshot.
            SnapshotConsistencyError: observations lie too far apart.
            SnapshotAcceptanceError: values are not acceptable.
        """
        self._require_open()
        instance("request", request, SnapshotRequest)
        flag("retry_errors", retry_errors)
        return await self._unit.resolve_request(request, retry_errors=retry_errors)

    async def try_request(
        self, request: SnapshotRequest, *, retry_errors: bool = False
    ) -> RequestResult:
        """Return what comes of a request, whatever that is, where `resolve_request` would raise.

        What it has read is pinned, also if the request is turned down. The snapshot has everything
        that the session was asked for so far; the outcome is about the request alone.
        """
        self._require_open()
        instance("request", request, SnapshotRequest)
        flag("retry_errors", retry_errors)
        self._unit.engine.enter()
        return await self._unit.try_request(request, retry_errors=retry_errors)

    @in_same_form
    async def try_requests(
        self, requests: Requests, *, retry_errors: bool = False, max_concurrency: int | None = None
    ) -> Results:
        """Return what comes of each of many requests that rest on one set of pinned values.

        See `SnapshotBuilder.try_requests`.
        """
        self._require_open()
        flag("retry_errors", retry_errors)
        engine = self._unit.engine
        engine.enter()
        attempts = {
            name: partial(self._unit.try_request, request, retry_errors=retry_errors)
            for name, request in named(requests).items()
        }
        return in_form_of(requests, await several(engine.parts, attempts, max_concurrency))

    async def revalidate(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        force_refresh: bool = False,
        consistency_policy: SnapshotConsistencyPolicy | None = None,
        acceptance_policy: SnapshotAcceptancePolicy | None = None,
    ) -> Snapshot:
        """Replace pinned values by newer ones, together with all that was derived from them.

        It is all or nothing: on any failure, a deadline or a cancellation the session stays as it
        was.

        Args:
            keys: keys that the session has a value of: it was asked for them, or derived something
                from them.
            strict: raise if a value could not be had; else the retained values are returned, with
                the errors of this call.
            force_refresh: read from the sources, past the cache, and accept no stale value.
            consistency_policy: must hold between the values of `keys` before they are pinned.
            acceptance_policy: must hold for the values of `keys` before they are pinned.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the retained snapshot.
            SnapshotConsistencyError, SnapshotAcceptanceError: a policy is violated, strict or not;
                they hold the snapshot that was turned down.
            ValueError: no keys, or one that the session has no value of, or a policy names
                another.
        """
        self._require_open()
        flag("strict", strict)
        flag("force_refresh", force_refresh)
        request = SnapshotRequest(
            required=self._pinned(distinct(keys)),
            consistency_policy=consistency_policy,
            acceptance_policy=acceptance_policy,
        )
        loop = self._unit.engine.enter()
        if self._turn[0] is not loop:
            self._turn = loop, asyncio.Lock()  # whoever had the other one has ended with its loop
        revalidation = Revalidation(self._unit, request, forced=force_refresh, strict=strict)
        return await revalidation.run(self._turn[1])

    def _pinned(self, named: dict[ResourceKey, None]) -> dict[ResourceKey, None]:
        if not named:
            raise ValueError("keys must name at least one resolved key of the session, got none")
        pins = self._unit.pins
        for key in named if len({**pins, **named}) > len(pins) else ():  # which asks for no hash
            if key not in pins:
                raise ValueError(
                    f"keys must be resolved in this session, got {key.display}; resolve it first"
                )
        return named

    # Snapshots and the end --------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the snapshot of everything asked for so far; copies at once, however large."""
        self._require_open()
        return self._unit.snapshot_now()

    async def snapshot_async(self) -> Snapshot:
        """Return the snapshot of everything asked for so far, within the deadline.

        Raises:
            SnapshotBuildError: copying did not fit the deadline; it holds what did.
        """
        self._require_open()
        unit = self._unit
        snapshot, uncopied = await unit.snapshot(unit.work.deadline)
        if cut_short(uncopied):
            raise SnapshotBuildError(snapshot.errors, snapshot=snapshot if len(snapshot) else None)
        return snapshot

    async def close(self) -> None:
        """Take no more calls. Snapshots that were returned stay good."""
        self._closed = True
        self._unit.work.over = True

    def _require_open(self) -> None:
        if self._closed:
            raise SessionClosedError(
                f"session {self.snapshot_id} is closed; open another one with builder.session()"
            )

    async def __aenter__(self) -> SnapshotSession:
        self._require_open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<SnapshotSession {self.snapshot_id} {state} keys={len(self._unit.requested)}>"
