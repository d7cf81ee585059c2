"""What it costs to be watched: the work of other lines with a watcher, and as their floor without.

A line of these is made by `watched_warm` and `watched_cold` of what there is to add to a builder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tests.benchmarks.stock import (
    FreshBuilder,
    Maker,
    batch_source,
    kept_builder,
    keys_of,
    preparing,
    price,
)
from tests.benchmarks.subjects import OURS, UNWATCHED, Subjects
from tests.benchmarks.workshop import Workshop

Watcher = Callable[[], dict[str, Any]]
"""Makes the settings of a builder that is watched."""


def traced() -> dict[str, Any]:
    """Keep a trace of every build."""
    return {"trace": True}


def counted_by_prometheus() -> dict[str, Any]:
    """Show every count and observation to Prometheus."""
    return {"metrics": _sink_for_prometheus()}


@functools.cache
def _sink_for_prometheus() -> Any:
    from prometheus_client import CollectorRegistry

    from coalestra.prometheus import PrometheusMetrics

    return PrometheusMetrics(registry=CollectorRegistry())


@functools.cache
def unsampled() -> dict[str, Any]:
    """Make spans that the SDK of OpenTelemetry does not record."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    from coalestra.opentelemetry import OpenTelemetryTracer

    return {"tracer": OpenTelemetryTracer(TracerProvider(ALWAYS_OFF))}


@functools.cache
def exported() -> dict[str, Any]:
    """Make spans that the SDK hands to an exporter in batches, in a thread of its own."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

    from coalestra.opentelemetry import OpenTelemetryTracer

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(SpanExporter()))
    return {"tracer": OpenTelemetryTracer(provider)}


@functools.cache
def measured() -> dict[str, Any]:
    """Count and measure for OpenTelemetry."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from coalestra.opentelemetry import OpenTelemetryMetrics

    return {"metrics": OpenTelemetryMetrics(MeterProvider([InMemoryMetricReader()]))}


def watched_warm(watcher: Watcher, count: int = 1000) -> Callable[[Workshop], Subjects]:
    """Return what makes the subjects of a line that reads so many cached keys."""

    def subjects(shop: Workshop) -> Subjects:
        keys = keys_of(shop.scale.size(count))

        def warm(settings: Watcher) -> Callable[[], float]:
            builder = kept_builder(shop, batch_source(price), **settings())
            shop.run(builder.build(keys))
            return shop.timed(lambda: builder.build(keys), len(keys))

        return {OURS: warm(watcher), UNWATCHED: warm(dict)}

    return subjects


def watched_cold(
    watcher: Watcher, count: int = 1000, make: Callable[[Maker], Any] = batch_source
) -> Callable[[Workshop], Subjects]:
    """Return the same for so many keys that are fetched, in a batch unless told otherwise."""

    def subjects(shop: Workshop) -> Subjects:
        keys = keys_of(shop.scale.size(count))

        def cold(settings: Watcher) -> Callable[[], float]:
            fresh = FreshBuilder(shop, lambda: make(price), settings=settings)
            prepare = preparing(fresh, lambda builder: builder.build(keys))
            return shop.timed_fresh(prepare, len(keys))

        return {OURS: cold(watcher), UNWATCHED: cold(dict)}

    return subjects
