"""Payload isolation: copies with the meaning of ``copy.deepcopy``, made the cheapest safe way.

Inside the library a payload is *sealed*: one private copy, together with the knowledge of how to
open it, that is to make one more copy for a reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from coalestra.concurrency.copy_threads import CopyThreads
from coalestra.concurrency.deadline import Deadline
from coalestra.concurrency.isolation import (
    FAILURES,
    PayloadCopier,
    PayloadIsolator,
    deepcopy_payload,
    isolated,
    not_isolated,
)
from coalestra.concurrency.sealing import seal_anyhow, seal_briefly, seal_flat
from coalestra.concurrency.seals import FLAT, Seal, Sealed
from coalestra.concurrency.threads import WorkerThreads
from coalestra.core.errors import PayloadIsolationError
from coalestra.core.frozen import EMPTY, FrozenDict
from coalestra.core.validation import callable_, flag, integer

if TYPE_CHECKING:
    from coalestra.core.copy_health import PayloadCopyHealth

__all__ = [
    "OFFLOADED",
    "PayloadCopier",
    "PayloadCopies",
    "PayloadIsolator",
    "Seal",
    "Sealed",
    "deepcopy_payload",
]

T = TypeVar("T")


class _Offloaded:
    """The one value of its kind."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "OFFLOADED"


OFFLOADED: Final = _Offloaded()
"""What ``PayloadCopies.open_now`` returns for a payload that must be opened with ``await``."""

_SHARED = Seal.SHARED


class SealedMetadata(FrozenDict[str, Any]):
    """Metadata kept by the library that holds something mutable: each reader needs a copy."""

    __slots__ = ()


class PayloadCopies:
    """All copying of one component: what is brief happens at once, the rest in bounded threads.

    Attributes:
        component: the name in errors and health.
        run_in_thread: whether threads are used where copying takes long.
        max_concurrency: how many threads copy at a time.
        uses_default_copier: False if the application brought its own.
    """

    def __init__(
        self,
        component: str,
        *,
        copier: PayloadCopier | None = None,
        run_in_thread: bool | None = None,
        max_concurrency: int = 4,
        threads: WorkerThreads | None = None,
    ) -> None:
        """Copy for ``component``.

        Args:
            component: a name.
            copier: replaces the default copier, for every payload (not for metadata).
            run_in_thread: True always, False never, None where it takes long (with a ``copier``
                of one's own: never). Immutable payloads need no copy and so no thread.
            max_concurrency: the most copies in threads at a time.
            threads: the threads to use; by default those of whoever asks for a copy.
        """
        callable_("payload_copier", copier, optional=True)
        if run_in_thread is not None:
            flag("run_payload_copies_in_thread", run_in_thread)
        self.component = component
        self.max_concurrency: int = integer("max_copy_concurrency", max_concurrency, minimum=1)
        self.uses_default_copier: bool = copier is None or copier is deepcopy_payload
        self.run_in_thread: bool = (
            self.uses_default_copier if run_in_thread is None else run_in_thread
        )
        self._copier = None if self.uses_default_copier else copier
        self._own_seal = Seal("custom", copier or deepcopy_payload, brief=not self.run_in_thread)
        self._always_threads = run_in_thread is True
        self._is_direct = self.uses_default_copier and not self._always_threads
        self._threads = CopyThreads(component, self.max_concurrency, threads)
        self._inline = 0
        self._inline_failed = 0

    def __repr__(self) -> str:
        kind = "default" if self.uses_default_copier else "custom"
        return f"<PayloadCopies copier={kind} {self._threads!r}>"

    @property
    def active(self) -> int:
        """How many copies are in threads at this moment."""
        return self._threads.active

    @property
    def closed(self) -> bool:
        """Whether new copies are refused."""
        return self._threads.closed

    def seal_now(self, value: Any, *, context: str) -> Sealed | None:
        """Seal a payload without waiting; None if it takes ``await seal(...)``.

        Raises:
            PayloadIsolationError: if the payload cannot be copied; says ``context``.
            PayloadCopySubsystemClosedError: after ``close``, for immutable payloads too.
        """
        if self._is_direct:
            sealed = seal_flat(value)
            if sealed is not None:
                self._inline += sealed[1] is not _SHARED
                return sealed
        self._threads.require_open()
        if self._copier is not None:
            if self.run_in_thread:
                return None
            return self._copied(self._copier, value, context), self._own_seal
        sealer = seal_briefly if self.run_in_thread else seal_anyhow
        try:
            sealed = sealer(value)
        except FAILURES as error:
            raise self._failure(value, context) from error
        if sealed is None or (self._always_threads and sealed[1] is not _SHARED):
            return None
        self._inline += sealed[1] is not _SHARED
        return sealed

    async def seal(self, value: Any, *, context: str, deadline: Deadline | None = None) -> Sealed:
        """Seal a payload in a thread: one that ``seal_now`` returned None for.

        Raises:
            PayloadIsolationError: if the payload cannot be copied; says ``context``.
            SnapshotDeadlineExceededError: if ``deadline`` comes first.
            PayloadCopySubsystemClosedError: if closed before the copy began.
        """
        if self._copier is not None:
            return await self._in_thread(self._copier, value, context, deadline), self._own_seal
        return await self._in_thread(seal_anyhow, value, context, deadline)

    def open_now(self, payload: Any, seal: Seal, *, context: str) -> Any:
        """Return one reader's copy of a sealed payload; ``OFFLOADED`` if it takes ``await open``.

        Raises:
            PayloadIsolationError: if the payload cannot be copied; says ``context``.
            PayloadCopySubsystemClosedError: after ``close``.
        """
        if seal is _SHARED:
            return payload
        if self._is_direct and seal.brief:
            try:
                copied = seal.opener(payload)
            except FAILURES as error:
                raise self._failure(payload, context) from error
            self._inline += 1
            return copied
        self._threads.require_open()
        if self._always_threads or (self.run_in_thread and not seal.brief):
            return OFFLOADED
        return self._copied(self._copier or seal.opener, payload, context)

    async def open(
        self, payload: Any, seal: Seal, *, context: str, deadline: Deadline | None = None
    ) -> Any:
        """Open a payload in a thread: one that ``open_now`` returned ``OFFLOADED`` for.

        Raises:
            what `seal` raises.
        """
        copier = self._copier or seal.opener
        return await self._in_thread(copier, payload, context, deadline)

    def open_here(self, payload: Any, seal: Seal, *, context: str) -> Any:
        """Return one reader's copy of a sealed payload without a thread, however long it takes.

        Raises:
            PayloadIsolationError, PayloadCopySubsystemClosedError: as `open_now`.
        """
        if seal is _SHARED:
            return payload
        self._threads.require_open()
        return self._copied(self._copier or seal.opener, payload, context)

    def seal_metadata_now(
        self, metadata: Mapping[str, Any], *, context: str
    ) -> FrozenDict[str, Any]:
        """Return metadata to keep. It is small by nature, so this never takes a thread.

        Raises:
            PayloadIsolationError: if a value cannot be copied; says ``context``.
        """
        if not metadata:
            return EMPTY
        payload, seal = self._copied(seal_anyhow, dict(metadata), context)
        return FrozenDict(payload) if seal is FLAT[dict] else SealedMetadata(payload)

    def open_metadata_now(
        self, metadata: FrozenDict[str, Any], *, context: str
    ) -> FrozenDict[str, Any]:
        """Return one reader's copy of metadata that ``seal_metadata_now`` returned.

        Raises:
            PayloadIsolationError: if a value cannot be copied; says ``context``.
        """
        if type(metadata) is FrozenDict:
            return metadata
        return FrozenDict(self._copied(deepcopy_payload, dict(metadata), context))

    def health(self) -> PayloadCopyHealth:
        """Return the state and the counts; copies without a thread are among the completed."""
        return self._threads.health(
            run_in_thread=self.run_in_thread,
            inline=self._inline,
            inline_failed=self._inline_failed,
        )

    def close(self) -> None:
        """Refuse new copies, and everybody who still waits for a thread."""
        self._is_direct = False
        self._threads.close()

    async def drain(self, timeout_seconds: float | None) -> int:
        """Wait until no copy runs, for ``timeout_seconds`` at most; return how many still do."""
        return await self._threads.drain(timeout_seconds)

    def _copied(self, copier: Callable[[Any], T], value: Any, context: str) -> T:
        try:
            copied = copier(value)
        except FAILURES as error:
            raise self._failure(value, context) from error
        self._inline += 1
        return copied

    def _failure(self, value: Any, context: str) -> PayloadIsolationError:
        self._inline_failed += 1
        return not_isolated(value, context)

    async def _in_thread(
        self, copier: Callable[[Any], T], value: Any, context: str, deadline: Deadline | None
    ) -> T:
        return await self._threads.run(partial(isolated, copier, value, context), deadline)
