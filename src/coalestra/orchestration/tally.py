"""What a call counts for: in the diagnostics of its unit of work, and in the metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra.core.diagnostics import DiagnosticsRecorder
from coalestra.orchestration.chains import Link, SourceKind

if TYPE_CHECKING:
    from coalestra.observability.reporting import Reporter


class Tally:
    """Counts one call to one source, whatever the number of its tries."""

    __slots__ = ("_link", "_record", "_report")

    def __init__(self, link: Link, record: DiagnosticsRecorder, report: Reporter | None) -> None:
        self._link = link
        self._record = record
        self._report = report

    def called(self, keys: int) -> None:
        """Count a call for so many keys."""
        record, link = self._record, self._link
        record.source_calls += 1
        by_source = record.source_calls_by_source
        by_source[link.name] = by_source.get(link.name, 0) + 1
        record.derived_calls += link.kind is SourceKind.DERIVED
        if link.kind is SourceKind.BATCH:
            record.batch_calls += 1
            if self._report is not None:
                self._report.batch_size(link.name, keys)

    def took(self, latency_ms: float) -> None:
        """Add what one try took, in milliseconds."""
        by_source = self._record.source_latency_ms_by_source
        by_source[self._link.name] = by_source.get(self._link.name, 0.0) + latency_ms
        if self._report is not None:
            self._report.fetch_latency(self._link.name, latency_ms)

    def batch_ended(self, status: str) -> None:
        """Count how a batch call ended; other calls are counted by their keys alone."""
        if self._report is not None and self._link.kind is SourceKind.BATCH:
            self._report.batch_call(self._link.name, status)

    def __repr__(self) -> str:
        return f"<Tally of source {self._link.name}>"
