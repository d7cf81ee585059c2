"""Carrying publications out: announce, seal, write, report, and copy the outcome out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from coalestra.cache.access import CacheAccess
from coalestra.cache.publication import SEALING, Publication, PublicationRules
from coalestra.cache.write_order import best_per_key
from coalestra.concurrency.copying import OFFLOADED, PayloadCopies
from coalestra.concurrency.pace import Pace
from coalestra.concurrency.seals import PORTION
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.published import PublishResult, PublishStatus
from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.core.values import ResourceUpdate, SnapshotValue
from coalestra.observability.reporting import Reporter

_OUT = "publish result"
_STORED = CacheWriteStatus.STORED
_PUBLISHED = PublishStatus.PUBLISHED
_STATUS = {
    CacheWriteStatus.IGNORED_OLDER: PublishStatus.IGNORED_OLDER,
    CacheWriteStatus.IGNORED_DUPLICATE: PublishStatus.IGNORED_DUPLICATE,
    CacheWriteStatus.IGNORED_LOWER_AUTHORITY: PublishStatus.IGNORED_LOWER_AUTHORITY,
}


class Publishing:
    """The work behind a publisher, over one cache with one component's copies."""

    __slots__ = ("_access", "_copies", "_reporter", "_rules")

    def __init__(
        self,
        access: CacheAccess,
        copies: PayloadCopies,
        rules: PublicationRules,
        reporter: Reporter | None,
    ) -> None:
        self._access = access
        self._copies = copies
        self._rules = rules
        self._reporter = reporter

    def __repr__(self) -> str:
        return f"Publishing({self._access!r})"

    async def publish(
        self, updates: Iterable[ResourceUpdate[Any]], *, force: bool, replace_equal: bool
    ) -> dict[ResourceKey, PublishResult]:
        """Offer the best update per key to the cache; nothing is written if one is unfit."""
        run = _Run(self._access, self._copies, self._rules)
        try:
            best = await run.judge(updates)
            await run.seal(best)
            await run.write(best, force, replace_equal)
        finally:
            run.conclude()
        if self._reporter is not None:
            for publication in best:
                _report(self._reporter, publication, force)
        return await run.results(best)

    async def invalidate(self, keys: Collection[ResourceKey], reason: str) -> None:
        """Remove ``keys`` from the cache."""
        await self._access.invalidate(keys)
        if self._reporter is not None:
            for key in keys:
                self._reporter.resource_invalidated(key, reason)


class _Run:
    """One call of `Publishing.publish`.

    Before anything is awaited, whatever has been judged so far is announced, so that a fetch under
    way cannot slip in between an event and its writing.
    """

    __slots__ = ("_access", "_announced", "_copies", "_judged", "_now", "_pace", "_rules")

    def __init__(self, access: CacheAccess, copies: PayloadCopies, rules: PublicationRules) -> None:
        self._now = rules.clock.now()
        self._access = access
        self._copies = copies
        self._rules = rules
        self._judged: list[Publication] = []
        self._announced = 0
        self._pace = Pace()

    async def judge(self, updates: Iterable[ResourceUpdate[Any]]) -> list[Publication]:
        """Return the best publication per key; raises for the first that is unfit."""
        judge, judged, now = self._rules.judge, self._judged, self._now
        for update in updates:
            judged.append(judge(update, now))
            if not len(judged) % PORTION and self._pace.due:
                await self._breathe()
        return list(best_per_key(judged).values())

    async def seal(self, publications: Iterable[Publication]) -> None:
        """Make a revision of each, with a sealed payload."""
        copies, now = self._copies, self._now
        for each in publications:
            value = each.update.value
            sealed = copies.seal_now(value, context=SEALING)
            if sealed is None:
                self._announce()
                sealed = await copies.seal(value, context=SEALING)
            each.stamp(sealed, copies, now)
            if self._pace.due:
                await self._breathe()

    async def write(
        self, publications: Collection[Publication], force: bool, replace_equal: bool
    ) -> None:
        """Offer the revisions to the cache, and note what became of each."""
        store = self._access.store
        if store is None:
            self._announce()
            revisions = [each.revision for each in publications]
            written = await self._access.write(
                revisions, force=force, replace_equal=replace_equal, want_previous=True
            )
            for each in publications:
                each.status, each.current, each.previous = written[each.key]
            return
        put = store.put
        for number, each in enumerate(publications, 1):
            outcome = put(each.revision, force=force, replace_equal=replace_equal)
            each.status, each.current, each.previous = outcome
            if not number % PORTION and self._pace.due:
                await self._breathe()

    def conclude(self) -> None:
        """Declare everything that was announced ended."""
        if self._announced:
            self._access.conclude(self._judged[: self._announced])

    async def results(
        self, publications: Iterable[Publication]
    ) -> dict[ResourceKey, PublishResult]:
        """Return what became of each, with copies of what the cache holds now and held before."""
        results = {}
        copies, pace = self._copies, self._pace
        left = PORTION
        for each in publications:
            ttl = each.policy.ttl_seconds
            current, previous = each.current, each.previous
            stored = each.status is _STORED
            payload = copies.open_now(current.payload, current.seal, context=_OUT)
            if payload is OFFLOADED:
                payload = await copies.open(current.payload, current.seal, context=_OUT)
            value = self._presented(current, payload, ttl, not stored)
            left -= current.seal.weight
            before = None
            if previous is not None:
                payload = copies.open_now(previous.payload, previous.seal, context=_OUT)
                if payload is OFFLOADED:
                    payload = await copies.open(previous.payload, previous.seal, context=_OUT)
                before = self._presented(previous, payload, ttl, True)
                each.previous = None  # large ones are let go one by one, not all at the end
                left -= previous.seal.weight
            status = _PUBLISHED if stored else _STATUS[each.status]
            results[each.key] = PublishResult(status, value, before)
            if left <= 0:
                left = PORTION
                if pace.due:
                    await pace.rest()
        return results

    def _presented(
        self, revision: Revision, payload: Any, ttl_seconds: float, from_cache: bool
    ) -> SnapshotValue[Any]:
        age = max(0.0, self._now - revision.observed_at)
        metadata = revision.metadata
        if type(metadata) is not FrozenDict:
            metadata = self._copies.open_metadata_now(metadata, context=_OUT)
        return revision.presented(payload, metadata, age, age > ttl_seconds, from_cache)

    def _announce(self) -> None:
        news = self._judged[self._announced :]
        if news:
            self._announced += len(news)
            self._access.announce(news)

    async def _breathe(self) -> None:
        self._announce()
        await self._pace.rest()


def _report(reporter: Reporter, publication: Publication, force: bool) -> None:
    revision, status = publication.revision, publication.status
    if status is _STORED:
        replaced = publication.previous is not None
        reporter.resource_published(revision, replaced=replaced, forced=force)
    else:
        reporter.resource_publish_ignored(revision, publication.current, _STATUS[status])
