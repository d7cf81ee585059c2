"""What an exporter would get, kept in memory and in a form to compare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler


class Meters:
    """A meter provider with one reader, which reads when it is told to."""

    def __init__(self, reader: InMemoryMetricReader | None = None) -> None:
        self.reader = reader or InMemoryMetricReader()
        self.provider = MeterProvider([self.reader])

    def metrics(self) -> dict[str, Metric]:
        """Read, and return the metrics by name."""
        data = self.reader.get_metrics_data()
        return {
            metric.name: metric
            for resource in ([] if data is None else data.resource_metrics)
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def points(self, name: str) -> list[Any]:
        """Read, and return the points of one metric."""
        metric = self.metrics().get(name)
        return [] if metric is None else list(metric.data.data_points)

    def values(self, name: str) -> dict[tuple[Any, ...], Any]:
        """Read, and return the values of one metric by those of its attributes, sorted by name."""
        return {
            tuple(value for _, value in sorted(point.attributes.items())): _value(point)
            for point in self.points(name)
        }


def _value(point: Any) -> Any:
    return point.value if hasattr(point, "value") else (point.count, point.sum)


class Spans:
    """A tracer provider, and the spans that have ended on it."""

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(sampler)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    @property
    def ended(self) -> tuple[ReadableSpan, ...]:
        """In the order in which they ended."""
        return self.exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        """Those of one name, in the order in which they began."""
        return sorted(
            (span for span in self.ended if span.name == name),
            key=lambda span: span.start_time or 0,
        )

    def one(self, name: str) -> ReadableSpan:
        """The only one of its name."""
        (span,) = self.named(name)
        return span

    def tree(self) -> list[str]:
        """The names, each below its parent and behind two spaces more, siblings by their names."""
        return [f"{'  ' * depth}{span.name}" for depth, span in self._walk(None, 0)]

    def _walk(self, parent: int | None, depth: int) -> Iterator[tuple[int, ReadableSpan]]:
        known = {span.context.span_id for span in self.ended if span.context is not None}
        for span in sorted(self.ended, key=lambda span: (span.name, span.start_time or 0)):
            above = None if span.parent is None else span.parent.span_id
            if (above if above in known else None) == parent and span.context is not None:
                yield depth, span
                yield from self._walk(span.context.span_id, depth + 1)


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a span, of an event of one, or of a point of a metric."""
    return dict(of.attributes or {})


def told(spans: Spans) -> str:
    """Everything that the spans say, as one text."""
    return "\n".join(span.to_json() for span in spans.ended)
