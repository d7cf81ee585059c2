"""A session for threads that have no event loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from coalestra.core.acceptance import SnapshotAcceptancePolicy
from coalestra.core.consistency import SnapshotConsistencyPolicy
from coalestra.core.errors import BuilderClosedError
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotRequest
from coalestra.core.snapshot import Snapshot
from coalestra.orchestration.session import SnapshotSession
from coalestra.orchestration.unit import distinct
from coalestra.sync.loop_thread import LoopThread


class SyncSnapshotSession:
    """Several stages of one piece of work that share an id, a deadline and pinned values.

    Each method waits for its outcome; see `SnapshotSession` for what it means and raises.
    """

    __slots__ = ("_session", "_thread")

    def __init__(self, session: SnapshotSession, thread: LoopThread) -> None:
        """Work with `session` on the loop of `thread`; made by `SyncSnapshotBuilder.session`."""
        self._session = session
        self._thread = thread

    def __repr__(self) -> str:
        return f"<SyncSnapshotSession {self.snapshot_id!r} closed={self.closed}>"

    def __enter__(self) -> SyncSnapshotSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def snapshot_id(self) -> str:
        """The id that all snapshots of this session carry."""
        return self._session.snapshot_id

    @property
    def created_at(self) -> float:
        """When the session was made, in wall seconds since the epoch."""
        return self._session.created_at

    @property
    def closed(self) -> bool:
        """Whether the session, or the builder that it belongs to, is closed."""
        return self._session.closed or self._thread.closing

    def resolve(
        self, keys: Iterable[ResourceKey], *, strict: bool = True, retry_errors: bool = False
    ) -> Snapshot:
        """Resolve `keys` and return everything requested so far."""
        wanted = distinct(keys)
        return self._thread.run(
            "resolve()",
            lambda: self._session.resolve(wanted, strict=strict, retry_errors=retry_errors),
        )

    def resolve_request(self, request: SnapshotRequest, *, retry_errors: bool = False) -> Snapshot:
        """Resolve a request and return everything requested so far."""
        return self._thread.run(
            "resolve_request()",
            lambda: self._session.resolve_request(request, retry_errors=retry_errors),
        )

    def revalidate(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        force_refresh: bool = False,
        consistency_policy: SnapshotConsistencyPolicy | None = None,
        acceptance_policy: SnapshotAcceptancePolicy | None = None,
    ) -> Snapshot:
        """Replace pinned values and what was derived from them, all or none."""
        wanted = distinct(keys)
        return self._thread.run(
            "revalidate()",
            lambda: self._session.revalidate(
                wanted,
                strict=strict,
                force_refresh=force_refresh,
                consistency_policy=consistency_policy,
                acceptance_policy=acceptance_policy,
            ),
        )

    def snapshot(self) -> Snapshot:
        """Return everything requested so far, copied within the session's deadline."""
        return self._thread.run("snapshot()", self._session.snapshot_async)

    def close(self) -> None:
        """Close the session; nothing to do if it is closed, also by its builder."""
        if self.closed or self._thread.forked:
            return
        with contextlib.suppress(BuilderClosedError):
            self._thread.run("close()", self._session.close)
