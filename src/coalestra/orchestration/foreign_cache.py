"""Reads of a cache that has to be awaited: grouped by step, shared by everyone who asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from coalestra.core.keys import ResourceKey
from coalestra.core.policies import FreshnessPolicy
from coalestra.core.results import CacheWriteStatus
from coalestra.core.values import Revision
from coalestra.orchestration.flights import Acquisition, Gather, Interest, Read, ReadGroup
from coalestra.orchestration.parts import Equipment

# Reads of a cache that has to be awaited: grouped by step, shared by everyone who asks -----------


class CacheReads:
    """Carries questions to the cache in groups, and each answer to everyone who asked.

    `answered` is called with each read and what the cache held. A cache that fails to answer is
    taken to hold nothing: its failure is reported, and the sources are asked.
    """

    def __init__(
        self,
        equipment: Equipment,
        answered: Callable[[Read, Revision | None], None],
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self._equipment = equipment
        self._answered = answered
        self._tasks = tasks
        self._open: dict[ResourceKey, Read] = {}
        self._next: ReadGroup | None = None
        self._groups: dict[ReadGroup, None] = {}

    def ask(self, gather: Gather, key: ResourceKey, policy: FreshnessPolicy) -> Read:
        """Let `gather` wait for what the cache holds of `key`; return the read to wait for."""
        read = self._open.get(key)
        if read is None:
            if self._next is None:
                self._next = ReadGroup()
                self._groups[self._next] = None
                asyncio.get_running_loop().call_soon(self._send, self._next)
            read = self._open[key] = Read(key, policy, self._next)
            self._next.reads.append(read)
        read.waiters[gather] = None
        gather.pending[key] = read
        return read

    def find(self, key: ResourceKey) -> Read | None:
        """Return the read of `key` that newcomers would share."""
        return self._open.get(key)

    def leave(self, gather: Gather, read: Read) -> None:
        """Let `gather` wait no longer; a group of reads that nobody waits for is given up."""
        gather.pending.pop(read.key, None)
        read.waiters.pop(gather, None)
        if not read.waiters and read.group.task is not None and not read.group.interest.alive:
            self._close(read.group.reads)
            read.group.task.cancel()

    def hide(self, changed: Collection[ResourceKey]) -> None:
        """Keep newcomers from sharing reads that began before news of some keys.

        No read of whatever key is shared: what a derived entry rests on is not known before it
        has been read.
        """
        self._open.clear()
        for group in self._groups:
            group.changed.update(changed)

    def forget(self) -> None:
        """Drop everything: the event loop it belonged to has ended."""
        self._open.clear()
        self._groups.clear()
        self._next = None

    def _send(self, group: ReadGroup) -> None:
        self._next = None
        loop = asyncio.get_running_loop()
        group.task = loop.create_task(self._read(group.reads), name="coalestra cache read")
        self._tasks.add(group.task)
        group.task.add_done_callback(self._tasks.discard)
        group.task.add_done_callback(lambda _: self._groups.pop(group, None))

    async def _read(self, group: list[Read]) -> None:
        wanted = [read for read in group if read.wanted]
        self._close(read for read in group if not read.wanted)
        found: Mapping[ResourceKey, Revision] = {}
        try:
            if wanted:
                found = await self._ask(wanted)
        finally:
            self._close(group)
        for read in wanted:
            self._answered(read, found.get(read.key))

    def _close(self, reads: Iterable[Read]) -> None:
        """Keep newcomers from sharing reads that are over, or will not be made."""
        for read in reads:
            if self._open.get(read.key) is read:
                del self._open[read.key]

    async def _ask(self, reads: list[Read]) -> Mapping[ResourceKey, Revision]:
        for work in {gather.work for read in reads for gather in read.waiters}:
            work.record.cache_batch_reads += 1
        policies = {read.key: read.policy for read in reads}
        now = self._equipment.clock.now()
        try:
            return await self._equipment.access.read(tuple(policies), now, policies)
        except Exception as error:
            if self._equipment.report is not None:
                self._equipment.report.cache_failed("read", error)
            return {}

    def __repr__(self) -> str:
        return f"<CacheReads open={len(self._open)}>"


# Writes to a cache that has to be awaited, grouped by the step in which their values arrived -----


class CacheWrites:
    """Carries settled values to the cache in groups, and each group's outcome back.

    A cache that fails to write costs the value its place in the cache, not its readers the value.
    """

    def __init__(
        self,
        equipment: Equipment,
        fit: Callable[[Acquisition], bool],
        written: Callable[[Acquisition, CacheWriteStatus, Revision], None],
        tasks: set[asyncio.Task[Any]],
    ) -> None:
        self._equipment = equipment
        self._fit = fit
        self._written = written
        self._tasks = tasks
        self.storing: dict[int, Revision] = {}
        self._next: dict[Acquisition, None] = {}
        self._under_way: dict[Acquisition, tuple[asyncio.Task[Any], Interest]] = {}

    def add(self, flight: Acquisition) -> None:
        """Write the value that a flight offers, together with the others of this step."""
        if not self._next:
            asyncio.get_running_loop().call_soon(self._send)
        self._next[flight] = None

    def add_stale(self, revision: Revision) -> None:
        """Write a stale value, for which nobody waits."""
        self.storing[id(revision)] = revision
        task = asyncio.get_running_loop().create_task(
            self._write_stale(revision), name="coalestra cache write"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self.storing.pop(id(revision)))

    async def _write_stale(self, revision: Revision) -> None:
        try:
            await self._equipment.access.write((revision,))
        except Exception as error:
            if self._equipment.report is not None:
                self._equipment.report.cache_failed("write", error)

    def unwanted(self, flight: Acquisition) -> bool:
        """Give up a write if none of its group is waited for; return whether one is under way."""
        under_way = self._under_way.get(flight)
        if under_way is None:
            return flight in self._next
        task, interest = under_way
        if not interest.alive:
            task.cancel()
        return True

    def forget(self) -> None:
        """Drop everything: the event loop it belonged to has ended."""
        self._next = {}
        self._under_way.clear()

    def _send(self) -> None:
        group = [flight for flight in self._next if self._fit(flight)]
        self._next = {}
        for forced in (False, True):
            flights = [flight for flight in group if flight.forced is forced]
            if flights:
                task = asyncio.get_running_loop().create_task(
                    self._write(flights, forced), name="coalestra cache write"
                )
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(partial(self._ended, flights))
                self._under_way.update(dict.fromkeys(flights, (task, Interest(flights))))

    def _ended(self, flights: list[Acquisition], task: asyncio.Task[Any]) -> None:
        """Settle the flights of a write that was given up: who still waits gets the value."""
        for flight in flights:
            self._under_way.pop(flight, None)
            if flight.offered is not None:
                self._written(flight, CacheWriteStatus.STORED, flight.offered)

    async def _write(self, flights: list[Acquisition], forced: bool) -> None:
        # Looked at in the very step that queues for the keys: there may have been news since.
        fit = [flight for flight in flights if self._fit(flight)]
        offers = {flight: flight.offered for flight in fit if flight.offered is not None}
        if not offers:
            return
        for work in {flight.sponsor for flight in flights}:
            work.record.cache_batch_writes += 1
        try:
            outcome = await self._equipment.access.write(
                tuple(offers.values()), replace_equal=forced
            )
        except Exception as error:
            outcome = {}
            if self._equipment.report is not None:
                self._equipment.report.cache_failed("write", error)
        for flight, revision in offers.items():
            written = outcome.get(flight.key)
            if written is None:
                self._written(flight, CacheWriteStatus.STORED, revision)
            else:
                self._written(flight, written.status, written.current)

    def __repr__(self) -> str:
        return f"<CacheWrites waiting={len(self._next)} under_way={len(self._under_way)}>"
