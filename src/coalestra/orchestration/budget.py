"""How much time a call has: until its source's timeout, or until nobody wants its answer."""

from __future__ import annotations

import asyncio
import math

from coalestra.core.errors import SnapshotDeadlineExceededError, SourceTimeoutError
from coalestra.orchestration.chains import Link
from coalestra.orchestration.equipment import Equipment
from coalestra.orchestration.flights import Acquisition
from coalestra.orchestration.work import Work


class Budgeted:
    """A call to a source, as far as its time is concerned."""

    __slots__ = ()

    link: Link
    work: Work
    equipment: Equipment
    flights: dict[Acquisition, None]

    def cutoff(self) -> float:
        """Return the latest instant, on the loop's clock, at which anyone wants an answer."""
        latest = -math.inf
        for flight in self.flights:
            if flight.cutoff > latest:
                latest = flight.cutoff
        return latest

    def remaining(self) -> float:
        """Return the seconds until nobody wants an answer any more."""
        cutoff = self.cutoff()
        if cutoff == math.inf:
            return cutoff
        remaining = cutoff - asyncio.get_running_loop().time()
        work = self.work
        if work.deadline is not None and work.cutoff == cutoff:
            remaining = min(remaining, work.deadline.remaining())
        return remaining

    def limit(self, began: float) -> float | None:
        """Return when to cut a call off that `began` then, on the loop's clock; None for never."""
        timeout = self.link.timeout_seconds
        cutoff = self.cutoff()
        end = cutoff if timeout is None else min(began + timeout, cutoff)
        return None if end == math.inf else end

    def deadline_comes_first(self, began: float, timeout: float | None) -> bool:
        """Whether a wait that `began` then ends by a deadline rather than by its own timeout."""
        return timeout is None or self.cutoff() < began + timeout

    def of_deadline(self) -> str:
        """Return how long the deadline gave, for messages."""
        deadline = self.work.deadline
        return "" if deadline is None else f" of {deadline.budget_seconds:g} s"

    def refusal(self) -> Exception | None:
        """Return why a blocking call must not be started, as it could outlive its budget."""
        link = self.link
        declared = link.guarantee.transport_timeout_seconds
        if not link.guarantee.protected or declared is None:
            return None
        remaining = self.remaining()
        timeout = math.inf if link.timeout_seconds is None else link.timeout_seconds
        left = min(remaining, timeout)
        if declared < left:
            return None
        by_deadline = remaining < timeout
        report = self.equipment.report
        if report is not None:
            reason = "snapshot_deadline" if by_deadline else "source_timeout"
            keys = [flight.key for flight in self.flights]
            report.transport_budget_rejected(keys, link.name, reason, declared, left)
        kind = SnapshotDeadlineExceededError if by_deadline else SourceTimeoutError
        return kind(
            f"source {link.name!r} was not called: its transport timeout of {declared:g} s does "
            f"not fit into the {max(0.0, left):g} s left"
        )

    def watch_transport(self, elapsed: float, outcome: str) -> None:
        """Count a blocking call that outlived the transport timeout it declares.

        `elapsed` is seconds; `outcome` is completed_late, failed_late or coalestra_timeout.
        """
        link = self.link
        declared = link.guarantee.transport_timeout_seconds
        if not link.guarantee.protected or declared is None:
            return
        equipment = self.equipment
        grace = equipment.transport_grace_seconds
        if outcome != "coalestra_timeout" and elapsed <= declared + grace:
            return
        violations = equipment.counters.transport_violations
        violations[link.name] = violations.get(link.name, 0) + 1
        if equipment.report is not None:
            keys = [flight.key for flight in self.flights]
            equipment.report.transport_violated(keys, link.name, outcome, declared, elapsed, grace)
