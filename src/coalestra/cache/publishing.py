"""Carrying publications out: announce, seal, write, report, and copy the outcome out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from coalestra.cache.access import CacheAccess
from coalestra.cache.pacing import Pace
from coalestra.cache.publication import SEALING, Publication, PublicationRules
from coalestra.cache.sealing import presented
from coalestra.cache.write_order import best_per_key
from coalestra.cache.written import Outcome
from coalestra.concurrency.copying import OFFLOADED, PayloadCopies
from coalestra.core.keys import ResourceKey
from coalestra.core.records import CacheWriteStatus, PublishResult, PublishStatus
from coalestra.core.revision import Revision
from coalestra.core.values import ResourceUpdate
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
            revisions = await run.seal(best)
            outcomes = await run.write(revisions, force, replace_equal)
        finally:
            run.conclude()
        if self._reporter is not None:
            for revision, outcome in zip(revisions, outcomes, strict=True):
                _report(self._reporter, revision, outcome, force)
        return await self._results(best, outcomes, run.now)

    async def invalidate(self, keys: Collection[ResourceKey], reason: str) -> None:
        """Remove ``keys`` from the cache."""
        await self._access.invalidate(keys)
        if self._reporter is not None:
            for key in keys:
                self._reporter.resource_invalidated(key, reason)

    async def _results(
        self, best: Iterable[Publication], outcomes: Iterable[Outcome], now: float
    ) -> dict[ResourceKey, PublishResult]:
        results = {}
        copies = self._copies
        pace = Pace()
        for publication, (status, current, previous) in zip(best, outcomes, strict=True):
            ttl = publication.policy.ttl_seconds
            stored = status is _STORED
            payload = copies.open_now(current.payload, current.seal, context=_OUT)
            if payload is OFFLOADED:
                payload = await copies.open(current.payload, current.seal, context=_OUT)
            age = max(0.0, now - current.observed_at)
            value = presented(current, payload, copies, _OUT, (age, age > ttl, not stored))
            before = None
            if previous is not None:
                payload = copies.open_now(previous.payload, previous.seal, context=_OUT)
                if payload is OFFLOADED:
                    payload = await copies.open(previous.payload, previous.seal, context=_OUT)
                age = max(0.0, now - previous.observed_at)
                before = presented(previous, payload, copies, _OUT, (age, age > ttl, True))
            results[publication.key] = PublishResult(
                _PUBLISHED if stored else _STATUS[status], value, before
            )
            if pace.due():
                await pace.rest()
        return results


class _Run:
    """One call of `Publishing.publish`.

    Before anything is awaited, whatever has been judged so far is announced, so that a fetch under
    way cannot slip in between an event and its writing.
    """

    __slots__ = ("_access", "_announced", "_copies", "_judged", "_pace", "_rules", "now")

    def __init__(self, access: CacheAccess, copies: PayloadCopies, rules: PublicationRules) -> None:
        self.now: float = rules.clock.now()
        self._access = access
        self._copies = copies
        self._rules = rules
        self._judged: list[Publication] = []
        self._announced = 0
        self._pace = Pace()

    async def judge(self, updates: Iterable[ResourceUpdate[Any]]) -> list[Publication]:
        """Return the best publication per key; raises for the first that is unfit."""
        judge, judged = self._rules.judge, self._judged
        for update in updates:
            judged.append(judge(update, self.now))
            if self._pace.due():
                await self._breathe()
        return list(best_per_key(judged).values())

    async def seal(self, publications: Iterable[Publication]) -> list[Revision]:
        """Return the publications as revisions with sealed payloads."""
        revisions = []
        copies = self._copies
        for each in publications:
            sealed = copies.seal_now(each.update.value, context=SEALING)
            if sealed is None:
                self._announce()
                sealed = await copies.seal(each.update.value, context=SEALING)
            revisions.append(each.revision(sealed, copies, self.now))
            if self._pace.due():
                await self._breathe()
        return revisions

    async def write(
        self, revisions: Collection[Revision], force: bool, replace_equal: bool
    ) -> list[Outcome]:
        """Offer the revisions to the cache; return what became of each."""
        store = self._access.store
        if store is None:
            self._announce()
            written = await self._access.write(
                revisions, force=force, replace_equal=replace_equal, want_previous=True
            )
            return [written[revision.key] for revision in revisions]
        outcomes = []
        put = store.put
        for revision in revisions:
            outcomes.append(put(revision, force=force, replace_equal=replace_equal))
            if self._pace.due():
                await self._breathe()
        return outcomes

    def conclude(self) -> None:
        """Declare everything that was announced ended."""
        if self._announced:
            self._access.conclude(self._judged[: self._announced])

    def _announce(self) -> None:
        news = self._judged[self._announced :]
        if news:
            self._announced += len(news)
            self._access.announce(news)

    async def _breathe(self) -> None:
        self._announce()
        await self._pace.rest()


def _report(reporter: Reporter, candidate: Revision, outcome: Outcome, force: bool) -> None:
    status, current, previous = outcome
    if status is _STORED:
        reporter.resource_published(candidate, replaced=previous is not None, forced=force)
    else:
        reporter.resource_publish_ignored(candidate, current, _STATUS[status])
