"""Carrying publications out: announce, seal, write, report, and copy the outcome out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from coalestra.cache.access import CacheAccess
from coalestra.cache.pacing import Pace
from coalestra.cache.publication import Publication, PublicationRules
from coalestra.cache.sealing import Sealing
from coalestra.cache.write_order import best_per_key
from coalestra.cache.written import Written
from coalestra.concurrency.copying import PayloadCopies
from coalestra.core.keys import ResourceKey
from coalestra.core.published import PublishResult, PublishStatus
from coalestra.core.records import CacheWriteStatus
from coalestra.core.revision import Revision
from coalestra.core.values import ResourceUpdate, SnapshotValue
from coalestra.observability.reporting import Reporter

_IN = "published value"
_OUT = "publish result"
_STATUS = {
    CacheWriteStatus.STORED: PublishStatus.PUBLISHED,
    CacheWriteStatus.IGNORED_OLDER: PublishStatus.IGNORED_OLDER,
    CacheWriteStatus.IGNORED_DUPLICATE: PublishStatus.IGNORED_DUPLICATE,
    CacheWriteStatus.IGNORED_LOWER_AUTHORITY: PublishStatus.IGNORED_LOWER_AUTHORITY,
}


class Publishing:
    """The work behind a publisher, over one cache with one component's copies."""

    __slots__ = ("_access", "_reporter", "_rules", "_sealing")

    def __init__(
        self,
        access: CacheAccess,
        copies: PayloadCopies,
        rules: PublicationRules,
        reporter: Reporter | None,
    ) -> None:
        self._access = access
        self._sealing = Sealing(copies)
        self._rules = rules
        self._reporter = reporter

    def __repr__(self) -> str:
        return f"Publishing({self._access!r})"

    async def publish(
        self, updates: Iterable[ResourceUpdate[Any]], *, force: bool, replace_equal: bool
    ) -> dict[ResourceKey, PublishResult]:
        """Offer the best update per key to the cache; nothing is written if one is unfit."""
        run = _Run(self._access, self._sealing)
        try:
            best = await run.judge(updates, self._rules)
            revisions = await run.seal(best.values())
            written = await run.write(revisions, force=force, replace_equal=replace_equal)
        finally:
            run.conclude()
        if self._reporter is not None:
            for revision in revisions:
                _report(self._reporter, revision, written[revision.key], force)
        return await self._results(best, written)

    async def invalidate(self, keys: Collection[ResourceKey], reason: str) -> None:
        """Remove ``keys`` from the cache."""
        await self._access.invalidate(keys)
        if self._reporter is not None:
            for key in keys:
                self._reporter.resource_invalidated(key, reason)

    async def _results(
        self, best: Mapping[ResourceKey, Publication], written: Mapping[ResourceKey, Written]
    ) -> dict[ResourceKey, PublishResult]:
        results = {}
        pace = Pace()
        for key, publication in best.items():
            outcome = written[key]
            stored = outcome.status is CacheWriteStatus.STORED
            value = self._opened_now(outcome.current, publication, not stored)
            if value is None:
                value = await self._opened(outcome.current, publication, not stored)
            previous = None
            if outcome.previous is not None:
                previous = self._opened_now(outcome.previous, publication, True)
                if previous is None:
                    previous = await self._opened(outcome.previous, publication, True)
            results[key] = PublishResult(_STATUS[outcome.status], value, previous)
            if pace.due():
                await pace.rest()
        return results

    def _opened_now(
        self, revision: Revision, publication: Publication, from_cache: bool
    ) -> SnapshotValue[Any] | None:
        age = max(0.0, publication.published_at - revision.observed_at)
        return self._sealing.open_now(
            revision, _OUT, (age, age > publication.policy.ttl_seconds, from_cache)
        )

    async def _opened(
        self, revision: Revision, publication: Publication, from_cache: bool
    ) -> SnapshotValue[Any]:
        age = max(0.0, publication.published_at - revision.observed_at)
        return await self._sealing.open(
            revision,
            context=_OUT,
            age=age,
            stale=age > publication.policy.ttl_seconds,
            from_cache=from_cache,
        )


class _Run:
    """One call of `Publishing.publish`.

    Before anything is awaited, whatever has been judged so far is announced, so that a fetch under
    way cannot slip in between an event and its writing.
    """

    __slots__ = ("_access", "_announced", "_judged", "_pace", "_sealing")

    def __init__(self, access: CacheAccess, sealing: Sealing) -> None:
        self._access = access
        self._sealing = sealing
        self._judged: list[Publication] = []
        self._announced: list[Publication] = []
        self._pace = Pace()

    async def judge(
        self, updates: Iterable[ResourceUpdate[Any]], rules: PublicationRules
    ) -> dict[ResourceKey, Publication]:
        """Return the best publication per key; raises for the first that is unfit."""
        now = rules.clock.now()
        for update in updates:
            self._judged.append(rules.judge(update, now))
            if self._pace.due():
                await self._breathe()
        return best_per_key(self._judged)

    async def seal(self, publications: Iterable[Publication]) -> list[Revision]:
        """Return the publications as revisions with sealed payloads."""
        revisions = []
        copies = self._sealing.copies
        for each in publications:
            sealed = copies.seal_now(each.value, context=_IN)
            if sealed is None:
                self._announce()
                sealed = await copies.seal(each.value, context=_IN)
            metadata = copies.seal_metadata_now(each.metadata, context=_IN)
            revisions.append(each.revision(*sealed, metadata))
            if self._pace.due():
                await self._breathe()
        return revisions

    async def write(
        self, revisions: Collection[Revision], *, force: bool, replace_equal: bool
    ) -> dict[ResourceKey, Written]:
        """Offer the revisions to the cache."""
        store = self._access.store
        if store is None:
            self._announce()
            return await self._access.write(
                revisions, force=force, replace_equal=replace_equal, want_previous=True
            )
        written = {}
        for revision in revisions:
            outcome = store.put(revision, force=force, replace_equal=replace_equal)
            written[revision.key] = Written(*outcome)
            if self._pace.due():
                await self._breathe()
        return written

    def conclude(self) -> None:
        """Declare everything that was announced ended."""
        if self._announced:
            self._access.conclude(self._announced)

    def _announce(self) -> None:
        news = self._judged[len(self._announced) :]
        if news:
            self._announced += news
            self._access.announce(news)

    async def _breathe(self) -> None:
        self._announce()
        await self._pace.rest()


def _report(reporter: Reporter, candidate: Revision, outcome: Written, force: bool) -> None:
    status = _STATUS[outcome.status]
    if status is PublishStatus.PUBLISHED:
        reporter.resource_published(candidate, replaced=outcome.previous is not None, forced=force)
    else:
        reporter.resource_publish_ignored(candidate, outcome.current, status)
