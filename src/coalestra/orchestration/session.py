"""Sessions: one unit of work in several stages, which pins what it has read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from coalestra.core.acceptance import SnapshotAcceptancePolicy
from coalestra.core.errors import SessionClosedError, SnapshotBuildError
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotConsistencyPolicy, SnapshotRequest
from coalestra.core.snapshot import FetchContext, Snapshot
from coalestra.core.validation import flag, instance
from coalestra.orchestration.revalidation import Revalidation, Revalidations
from coalestra.orchestration.unit import Judge, Stage, Unit, distinct


class SnapshotSession:
    """A unit of work that reads in stages under one id, one deadline and one set of values.

    A key, once resolved, keeps its value for the life of the session, and so does whatever it was
    derived from. Get one from `SnapshotBuilder.session`; use it with ``async with``. Stages may
    run side by side.
    """

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
        self._closed = False
        self._revalidations = Revalidations(unit)

    @property
    def snapshot_id(self) -> str:
        """The id that every snapshot of the session bears."""
        return self._unit.work.context.snapshot_id

    @property
    def created_at(self) -> float:
        """When the session began, in seconds since the epoch on the builder's clock."""
        return self._unit.created_at

    @property
    def context(self) -> FetchContext:
        """What sources are told about the session."""
        return self._unit.work.context

    @property
    def closed(self) -> bool:
        """Whether the session takes no more calls."""
        return self._closed

    async def resolve(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        retry_errors: bool = False,
    ) -> Snapshot:
        """Resolve further keys and return the snapshot of everything asked for so far.

        Args:
            keys: what is needed now. What is pinned already is not read again.
            strict: raise if any of `keys` has no value; else the snapshot says so in `errors`.
            retry_errors: try those of `keys` again that failed before.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the partial snapshot.
            SessionClosedError: the session is closed.
            RuntimeError: the builder is closed.
        """
        flag("strict", strict)
        self._require_open()
        stage = Stage(self._unit, keys, retry_errors=flag("retry_errors", retry_errors))
        return await stage.run(strict=strict)

    async def resolve_request(
        self, request: SnapshotRequest, *, retry_errors: bool = False
    ) -> Snapshot:
        """Resolve a request: its required keys must have values, and its policies must hold.

        Raises:
            SnapshotBuildError: a required key failed; it holds the partial snapshot.
            SnapshotConsistencyError: observations lie too far apart.
            SnapshotAcceptanceError: values are not acceptable.
            SessionClosedError: the session is closed.
            RuntimeError: the builder is closed.
        """
        instance("request", request, SnapshotRequest)
        self._require_open()
        stage = Stage(self._unit, request.keys, retry_errors=flag("retry_errors", retry_errors))
        judge = self._judge(request.consistency_policy, request.acceptance_policy)
        return await stage.run_request(request, judge)

    # Revalidation -----------------------------------------------------------------------------

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
            keys: resolved keys of the session.
            strict: raise if a value could not be had; else the retained values are returned, with
                the errors of this call.
            force_refresh: read from the sources, past the cache, and accept no stale value.
            consistency_policy: must hold between the values of `keys` before they are pinned.
            acceptance_policy: must hold for the values of `keys` before they are pinned.

        Raises:
            SnapshotBuildError: with `strict`, if a key failed; it holds the retained snapshot.
            SnapshotConsistencyError, SnapshotAcceptanceError: a policy is violated, strict or not;
                they hold the snapshot that was turned down.
            ValueError: no keys, or one that the session has not resolved, or a policy names
                another.
            SessionClosedError: the session is closed.
            RuntimeError: the builder is closed.
        """
        flag("strict", strict)
        flag("force_refresh", force_refresh)
        named = self._resolved(distinct(keys))
        judge = self._judge(consistency_policy, acceptance_policy)
        if acceptance_policy is not None:
            _require_named(acceptance_policy, named)
        self._require_open()
        attempt = Revalidation(self._unit, named, forced=force_refresh)
        return await self._revalidations.run(
            attempt, judge, strict=strict, check=self._require_open
        )

    def _resolved(self, named: dict[ResourceKey, None]) -> dict[ResourceKey, None]:
        if not named:
            raise ValueError("keys must name at least one resolved key of the session, got none")
        for key in named:
            if key not in self._unit.pins or key not in self._unit.requested:
                raise ValueError(
                    f"keys: {key.display} is not resolved in this session; resolve it first"
                )
        return named

    def _judge(
        self,
        consistency: SnapshotConsistencyPolicy | None,
        acceptance: SnapshotAcceptancePolicy | None,
    ) -> Judge:
        instance("consistency_policy", consistency, SnapshotConsistencyPolicy, optional=True)
        instance("acceptance_policy", acceptance, SnapshotAcceptancePolicy, optional=True)
        return Judge(self._unit.engine.equipment, consistency, acceptance)

    # Snapshots and the end --------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the snapshot of everything asked for so far; copies at once, however large.

        Raises:
            SessionClosedError: the session is closed.
        """
        self._require_open()
        return self._unit.snapshot_now()

    async def snapshot_async(self) -> Snapshot:
        """Return the snapshot of everything asked for so far, within the deadline.

        Raises:
            SnapshotBuildError: copying did not fit the deadline; it holds what did.
            SessionClosedError: the session is closed.
        """
        self._require_open()
        snapshot = await self._unit.snapshot()
        if self._unit.cut_short:
            raise SnapshotBuildError(
                snapshot.errors, snapshot=None if self._unit.undelivered else snapshot
            )
        return snapshot

    async def close(self) -> None:
        """Take no more calls. Snapshots that were returned stay good."""
        self._closed = True
        self._unit.work.closed = True

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


def _require_named(policy: SnapshotAcceptancePolicy, named: Mapping[ResourceKey, None]) -> None:
    for key in policy.referenced_keys:
        if key not in named:
            raise ValueError(
                f"acceptance_policy names {key.display}, which is not among keys; add it there"
            )
