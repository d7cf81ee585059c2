"""The lines of the table, with what is asked of each."""

from __future__ import annotations

from tests.benchmarks import fetching, growth, observing, publishing, reading, staging
from tests.benchmarks.footprint import cached_floats
from tests.benchmarks.holding import HOLDS, longest_hold
from tests.benchmarks.importing import beyond_asyncio, with_a_builder
from tests.benchmarks.observing import watched_cold, watched_warm
from tests.benchmarks.sharing import callers
from tests.benchmarks.stock import single_source
from tests.benchmarks.subjects import BYTES, MICROSECONDS, MILLISECONDS, PER_KEY, Aim, Line, Unit

TABLE = (
    Line("warm-dicts", 'warm snapshot of 1,000 keys, `{"price": "65000.00"}`', PER_KEY, "320",
        reading.flat_payloads, Aim(4, floors=1.8)),
    Line("warm-floats", "the same with a float payload", PER_KEY, "316", reading.floats, Aim(3)),
    Line("warm-one", "warm snapshot of 1 key", MICROSECONDS, "577", reading.one_key,
        Aim(20, floors=8)),
    Line("warm-nested", "warm 10 keys, each 200 dictionaries in one (yardstick: `copy.deepcopy`)",
        PER_KEY, "2,050", reading.nested_payloads, Aim(80, share=0.25)),
    Line("cold-batch", "cold batch of 1,000 keys", PER_KEY, "456", fetching.batch,
        Aim(10, floors=2.5)),
    Line("cold-single", "cold 500 keys from an inline single source", PER_KEY, "473",
        fetching.single, Aim(25, floors=5)),
    Line("cold-derived", "cold 200 derived keys over 200 batched bases", PER_KEY, "1,230",
        fetching.derived, Aim(45, floors=5)),
    Line("publish-one", "publish one", MICROSECONDS, "1,084", publishing.one, Aim(22, floors=6)),
    Line("publish-many", "publish_many of 1,000", PER_KEY, "535", publishing.many,
        Aim(8, floors=2.5)),
    Line("callers", "500 callers of one key at once", Unit("us/caller"), "331", callers,
        Aim(30, floors=2)),
    Line("session", "session, 20 keys in 3 stages with a revalidation", MILLISECONDS, "11",
        staging.session, Aim(0.3)),
    Line("facade", "blocking facade, warm, 1 key", MICROSECONDS, "600", staging.facade, Aim(120)),
    Line("memory", "memory per cached float", BYTES, "672", cached_floats, Aim(370), rounds=1),
    Line("hold", "longest hold of the event loop, warm 10,000 keys", MILLISECONDS, "138",
        longest_hold, Aim(5)),
    *(
        Line(f"hold-{name}", f"the same, {work}", MILLISECONDS, "", subjects, Aim(5), rounds=3)
        for name, (work, subjects) in HOLDS.items()
    ),
    Line("trace-warm", "warm 1,000 keys with `trace=True` (floor: without)", PER_KEY, "",
        watched_warm(observing.traced)),
    Line("trace-cold", "cold batch of 1,000 keys with `trace=True` (floor: without)", PER_KEY, "",
        watched_cold(observing.traced)),
    Line("prometheus-warm", "warm 1,000 keys with `PrometheusMetrics` (floor: without)", PER_KEY,
        "", watched_warm(observing.counted_by_prometheus)),
    Line("prometheus-one", "warm snapshot of 1 key with `PrometheusMetrics` (floor: without)",
        MICROSECONDS, "", watched_warm(observing.counted_by_prometheus, 1)),
    Line("prometheus-cold", "cold batch of 1,000 keys with `PrometheusMetrics` (floor: without)",
        PER_KEY, "", watched_cold(observing.counted_by_prometheus)),
    Line("spans-off", "warm 1 key with `OpenTelemetryTracer`, not sampled (floor: without)",
        MICROSECONDS, "", watched_warm(observing.unsampled, 1)),
    Line("spans-warm", "the same, sampled and exported in batches", MICROSECONDS, "",
        watched_warm(observing.exported, 1)),
    Line("spans-cold", "the same, cold batch of 1,000 keys", PER_KEY, "",
        watched_cold(observing.exported)),
    Line("spans-single", "the same, cold 500 keys from an inline single source, a span for each",
        PER_KEY, "", watched_cold(observing.exported, 500, single_source)),
    Line("otel-warm", "warm 1,000 keys with `OpenTelemetryMetrics` (floor: without)", PER_KEY, "",
        watched_warm(observing.measured)),
    Line("import", "`import coalestra` beyond `import asyncio`", MILLISECONDS, "36",
        beyond_asyncio, Aim(20)),
    Line("import-builder", "the same with `SnapshotBuilder`, a source and keys named",
        MILLISECONDS, "", with_a_builder),
)  # fmt: skip
LINES = {line.name: line for line in (*TABLE, *growth.LINES)}
