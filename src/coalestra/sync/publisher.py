"""Publishing from threads that have no event loop: blocking, or submitted and forgotten.

Both kinds take turns per key: what concerns one key happens in the order of the calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, TypeVar

from coalestra.cache.lanes import KeyLanes
from coalestra.cache.publisher import ResourcePublisher
from coalestra.concurrency.copying import PayloadIsolator
from coalestra.core.keys import ResourceKey
from coalestra.core.published import PublishResult
from coalestra.core.validation import instance, number, text
from coalestra.core.values import ResourceUpdate
from coalestra.sync.backlog import SubmissionBacklog
from coalestra.sync.loop_thread import LoopThread
from coalestra.sync.operation import Work

T = TypeVar("T")

_CONTEXT = "a submission"


@dataclasses.dataclass(frozen=True, slots=True)
class _Errand(Generic[T]):
    """Something for the publisher to do, and the keys that it concerns."""

    keys: tuple[ResourceKey, ...]
    work: Work[T]


class SyncResourcePublisher:
    """Writes events into a builder's cache; its methods are for any thread.

    ``publish*`` and ``invalidate*`` wait for the outcome. ``submit_*`` return a future at once;
    by then values, metadata and collections have been copied, so that later changes do not
    matter. A bounded number of submissions may be under way. Cancelling a future takes its
    submission back, unless it was done already.
    """

    __slots__ = ("_backlog", "_isolator", "_lanes", "_publisher", "_thread")

    def __init__(
        self,
        publisher: ResourcePublisher,
        thread: LoopThread,
        backlog: SubmissionBacklog,
        isolator: PayloadIsolator,
    ) -> None:
        """Publish through `publisher` on the loop of `thread`; made by `SyncSnapshotBuilder`."""
        self._publisher = publisher
        self._thread = thread
        self._backlog = backlog
        self._isolator = isolator
        self._lanes = KeyLanes()

    def __repr__(self) -> str:
        return f"<SyncResourcePublisher {self._backlog!r} over {self._publisher!r}>"

    @property
    def pending_submissions(self) -> int:
        """How many submissions are under way."""
        return self._backlog.pending

    @property
    def max_pending_submissions(self) -> int:
        """How many submissions may be under way."""
        return self._backlog.limit

    # Waiting ----------------------------------------------------------------------------------

    def publish(
        self,
        key: ResourceKey,
        value: Any,
        *,
        source: str,
        observed_at: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        replace_equal: bool = False,
    ) -> PublishResult:
        """Publish one value and return what became of it; see `ResourcePublisher.publish`."""
        update = ResourceUpdate(key, value, source, observed_at, _given(metadata))
        return self._wait("publish()", self._one(update, force, replace_equal))

    def publish_update(
        self, update: ResourceUpdate[Any], *, force: bool = False, replace_equal: bool = False
    ) -> PublishResult:
        """Publish one update and return what became of it."""
        return self._wait("publish_update()", self._one(update, force, replace_equal))

    def publish_many(
        self,
        updates: Collection[ResourceUpdate[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Mapping[ResourceKey, PublishResult]:
        """Publish the best update per key and return what became of them."""
        return self._wait("publish_many()", self._many(tuple(updates), force, replace_equal))

    def invalidate(self, key: ResourceKey, *, reason: str = "") -> None:
        """Remove `key` from the cache."""
        self._wait("invalidate()", self._removal((key,), reason))

    def invalidate_many(self, keys: Collection[ResourceKey], *, reason: str = "") -> None:
        """Remove `keys` from the cache."""
        self._wait("invalidate_many()", self._removal(keys, reason))

    def flush(self, *, timeout_seconds: float | None = None) -> None:
        """Wait until every submission accepted before this call is done.

        Raises:
            TimeoutError: if they take longer than `timeout_seconds` (None: wait for ever).
            RuntimeError: on the facade's own event loop thread, or in a forked process.
        """
        number("timeout_seconds", timeout_seconds, minimum=0, optional=True)
        self._thread.require_this_process()
        self._thread.require_other_thread("flush()")
        self._backlog.flush(timeout_seconds)

    # Submitting -------------------------------------------------------------------------------

    def submit_publish(
        self,
        key: ResourceKey,
        value: Any,
        *,
        source: str,
        observed_at: float | None = None,
        metadata: Mapping[str, Any] | None = None,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Future[PublishResult]:
        """Submit one value; the future gives what `publish` returns or raises.

        Raises:
            SubmissionBacklogFullError: at once, if too many submissions are under way.
            PayloadIsolationError: if the value or metadata cannot be copied.
            RuntimeError: if the facade is closed or the process forked.
        """
        update = ResourceUpdate(key, value, source, observed_at, _given(metadata))
        return self.submit_publish_update(update, force=force, replace_equal=replace_equal)

    def submit_publish_update(
        self, update: ResourceUpdate[Any], *, force: bool = False, replace_equal: bool = False
    ) -> Future[PublishResult]:
        """Submit one update; see `submit_publish`."""
        return self._submit(lambda: self._one(self._captured(update), force, replace_equal))

    def submit_publish_many(
        self,
        updates: Collection[ResourceUpdate[Any]],
        *,
        force: bool = False,
        replace_equal: bool = False,
    ) -> Future[Mapping[ResourceKey, PublishResult]]:
        """Submit several updates as one; see `submit_publish`."""
        return self._submit(
            lambda: self._many(tuple(map(self._captured, updates)), force, replace_equal)
        )

    def submit_invalidate(self, key: ResourceKey, *, reason: str = "") -> Future[None]:
        """Submit the removal of `key`; see `submit_publish`."""
        return self._submit(lambda: self._removal((key,), reason))

    def submit_invalidate_many(
        self, keys: Collection[ResourceKey], *, reason: str = ""
    ) -> Future[None]:
        """Submit the removal of `keys` as one; see `submit_publish`."""
        return self._submit(lambda: self._removal(keys, reason))

    # Errands ----------------------------------------------------------------------------------

    def _one(
        self, update: ResourceUpdate[Any], force: bool, replace_equal: bool
    ) -> _Errand[PublishResult]:
        instance("update", update, ResourceUpdate)
        publish = self._publisher.publish_update
        work = partial(publish, update, force=force, replace_equal=replace_equal)
        return _Errand((update.key,), work)

    def _many(
        self, updates: tuple[ResourceUpdate[Any], ...], force: bool, replace_equal: bool
    ) -> _Errand[Mapping[ResourceKey, PublishResult]]:
        for update in updates:
            instance("updates", update, ResourceUpdate)
        publish = self._publisher.publish_many
        work = partial(publish, updates, force=force, replace_equal=replace_equal)
        return _Errand(_distinct(update.key for update in updates), work)

    def _removal(self, keys: Iterable[ResourceKey], reason: str) -> _Errand[None]:
        text("reason", reason, empty=True)
        distinct = _distinct(keys)
        for key in distinct:
            instance("keys", key, ResourceKey)
        return _Errand(distinct, partial(self._publisher.invalidate_many, distinct, reason=reason))

    def _captured(self, update: ResourceUpdate[Any]) -> ResourceUpdate[Any]:
        instance("update", update, ResourceUpdate)
        return dataclasses.replace(
            update,
            value=self._isolator.copy(update.value, context=_CONTEXT),
            metadata=self._isolator.copy_metadata(update.metadata, context=_CONTEXT),
        )

    def _wait(self, call: str, errand: _Errand[T]) -> T:
        return self._thread.run(call, partial(self._in_turn, errand))

    def _submit(self, capture: Callable[[], _Errand[T]]) -> Future[T]:
        self._thread.require_usable()
        place = self._backlog.take()
        try:
            operation = self._thread.operation(partial(self._in_turn, capture()))
            operation.call_at_end(partial(self._backlog.leave, place))
            place.future = operation.future
            self._thread.start(operation)
        except BaseException:
            self._backlog.leave(place)
            raise
        return operation.future

    async def _in_turn(self, errand: _Errand[T]) -> T:
        async with self._lanes.turn(errand.keys):
            return await errand.work()


def _distinct(keys: Iterable[ResourceKey]) -> tuple[ResourceKey, ...]:
    return tuple(dict.fromkeys(keys))


def _given(metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {} if metadata is None else metadata
