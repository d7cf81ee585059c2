"""A builder for threads that have no event loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from coalestra.concurrency.copying import PayloadIsolator
from coalestra.core.health import BuilderHealth
from coalestra.core.keys import ResourceKey
from coalestra.core.request import SnapshotRequest
from coalestra.core.snapshot import Snapshot
from coalestra.core.validation import flag, integer, number, wrong_type
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.orchestration.unit import distinct
from coalestra.sync.backlog import SubmissionBacklog
from coalestra.sync.loop_thread import LoopThread
from coalestra.sync.publisher import SyncResourcePublisher
from coalestra.sync.session import SyncSnapshotSession
from coalestra.sync.shutdown import Shutdown

THREAD_NAME = "coalestra-sync-loop"


class SyncSnapshotBuilder:
    """A `SnapshotBuilder` on an event loop in a thread of its own; its methods are for any thread.

    Keep one for the life of the application. A method that waits refuses to be called on the
    loop's own thread, and in a forked process, with a `RuntimeError`; so does everything once the
    builder is closed. Breaking a wait off (Ctrl-C) cancels what it waits for.

    Attributes:
        builder: the builder on the loop.
        publisher: publishes into the builder's cache.
        close_builder: whether closing closes the builder as well.
        shutdown_timeout_seconds: how long closing waits for accepted work.
    """

    def __init__(
        self,
        builder: SnapshotBuilder,
        *,
        close_builder: bool = True,
        shutdown_timeout_seconds: float = 5.0,
        max_pending_submissions: int = 1024,
    ) -> None:
        """Start the thread.

        Args:
            builder: not in use by another event loop.
            close_builder: close the builder together with this.
            shutdown_timeout_seconds: how long closing waits for accepted work, before it cancels
                what is left.
            max_pending_submissions: how many of the publisher's submissions may be under way.

        Raises:
            TypeError, ValueError: for a bad argument, naming it.
        """
        _require_builder(builder)
        self.builder = builder
        self.close_builder: bool = flag("close_builder", close_builder)
        self.shutdown_timeout_seconds: float = number(
            "shutdown_timeout_seconds", shutdown_timeout_seconds, minimum=0
        )
        self._backlog = SubmissionBacklog(
            integer("max_pending_submissions", max_pending_submissions, minimum=1)
        )
        isolator = PayloadIsolator(getattr(builder, "payload_copier", None))
        self._thread = LoopThread(name=THREAD_NAME, owner="the sync snapshot builder")
        self._shutdown = Shutdown(
            self._thread,
            builder,
            close_builder=close_builder,
            timeout_seconds=shutdown_timeout_seconds,
        )
        self.publisher: SyncResourcePublisher = SyncResourcePublisher(
            builder.publisher, self._thread, self._backlog, isolator
        )

    def __repr__(self) -> str:
        return f"<SyncSnapshotBuilder closed={self.closed} {self._backlog!r} over {self.builder!r}>"

    def __enter__(self) -> SyncSnapshotBuilder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether closing has begun, so that no new work is accepted."""
        return self._thread.closing

    @property
    def pending_submissions(self) -> int:
        """How many of the publisher's submissions are under way."""
        return self._backlog.pending

    @property
    def max_pending_submissions(self) -> int:
        """How many of the publisher's submissions may be under way."""
        return self._backlog.limit

    def build(
        self,
        keys: Iterable[ResourceKey],
        *,
        strict: bool = True,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> Snapshot:
        """Resolve `keys` and return their snapshot; see `SnapshotBuilder.build`."""
        wanted = distinct(keys)
        return self._thread.run(
            "build()",
            lambda: self.builder.build(
                wanted,
                strict=strict,
                deadline_seconds=deadline_seconds,
                metadata=metadata,
                snapshot_id=snapshot_id,
            ),
        )

    def build_request(
        self,
        request: SnapshotRequest,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> Snapshot:
        """Resolve a request and return its snapshot; see `SnapshotBuilder.build_request`."""
        return self._thread.run(
            "build_request()",
            lambda: self.builder.build_request(
                request,
                deadline_seconds=deadline_seconds,
                metadata=metadata,
                snapshot_id=snapshot_id,
            ),
        )

    def session(
        self,
        *,
        deadline_seconds: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        snapshot_id: str | None = None,
    ) -> SyncSnapshotSession:
        """Open a session; its deadline runs from now. See `SnapshotBuilder.session`."""

        async def opened() -> SyncSnapshotSession:
            session = self.builder.session(
                deadline_seconds=deadline_seconds, metadata=metadata, snapshot_id=snapshot_id
            )
            return SyncSnapshotSession(session, self._thread)

        return self._thread.run("session()", opened)

    def health_snapshot(self) -> BuilderHealth:
        """Return the builder's health, together with the backlog of submissions."""
        health = self._thread.run("health_snapshot()", self.builder.health_snapshot)
        return dataclasses.replace(
            health,
            pending_submissions=self._backlog.pending,
            max_pending_submissions=self._backlog.limit,
        )

    def wait_for_refreshes(self) -> None:
        """Wait for the background refreshes that have been scheduled."""
        self._thread.run("wait_for_refreshes()", self.builder.wait_for_refreshes)

    def flush_submissions(self, *, timeout_seconds: float | None = None) -> None:
        """Wait for the submissions accepted before; see `SyncResourcePublisher.flush`."""
        self.publisher.flush(timeout_seconds=timeout_seconds)

    def close(self) -> None:
        """Refuse new work, finish what was accepted, close the builder and end the thread.

        Accepted work and background refreshes have ``shutdown_timeout_seconds`` to end; then they
        are cancelled. Calls that come while another thread closes wait for the same closing and
        share its outcome; later ones do nothing. In a forked process there is nothing to close.

        Raises:
            PayloadCopyShutdownTimeoutError, ObservabilityShutdownTimeoutError: if copies or sinks
                are late. The thread lives on until they have ended, and then ends by itself.
            RuntimeError: on the thread of the loop.
            Exception: what closing the builder raised.
        """
        self._shutdown.wait()


def _require_builder(builder: object) -> None:
    if not (callable(getattr(builder, "aclose", None)) and hasattr(builder, "publisher")):
        raise wrong_type("builder", "a SnapshotBuilder", builder)
