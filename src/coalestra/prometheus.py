"""Metrics and health for Prometheus: needs the extra ``prometheus``.

Laws:

1. A report waits for nobody: it joins a line, which is settled by whoever finds it long and nobody
   at it, and before every scrape. The locks of ``prometheus_client``, which a signal handler or a
   finalizer could meet locked by its own thread, are taken only there, and never across a fork.
2. The number of series is bounded: beyond ``max_series`` of one metric, the values that an
   application chose (sources, kinds of resources) become ``other``; subjects never come here.
3. Nothing here keeps a builder alive, and a builder that fails to tell its health takes no other
   with it.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from coalestra._lockfree import LONGEST_WAIT_SECONDS, Cell, Changes
from coalestra._telemetry import COUNTERS, FACTS, OBSERVATIONS, Builder, Labels, Reading, Watched
from coalestra.core.validation import instance, integer, mapping, number, readable, refusal, text
from coalestra.orchestration.builder import SnapshotBuilder
from coalestra.sync import SyncSnapshotBuilder

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, values
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        "coalestra.prometheus must have the package prometheus_client, which cannot be imported; "
        "install this package with its extra: python -m pip install '.[prometheus]'"
    ) from error

__all__ = ["LATENCY_BUCKETS", "HealthCollector", "PrometheusMetrics"]

LATENCY_BUCKETS = (
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
"""The upper bounds of the buckets of latencies and waits, in seconds, unless told otherwise."""

OTHER = "other"
"""What stands in a label for all values that found no room."""

_SIZE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

# What the sink shows -----------------------------------------------------------------------------

Pairs = tuple[tuple[str, str], ...]
Step = Counter | tuple[Any, ...]
"""A counter that grows by one, or what is to be called with which arguments; like ones are one."""

_LINE: deque[Step] = deque()
_PATIENCE_SECONDS = 1.0


class _Turn:
    """At the line is who holds one that he took: no interrupt, wherever it strikes, loses it."""

    def take(self) -> bool:
        """Take the turn if nobody has it; return whether it is this one."""
        mine = ref(self)
        _AT_IT.change(lambda at_it: mine if at_it() is None else at_it)
        return _AT_IT.value is mine

    def end(self) -> None:
        """Let the next one have it."""
        mine = ref(self)
        _AT_IT.change(lambda at_it: _nobody if at_it is mine else at_it)
        _ENDS.tell()


def _nobody() -> None:
    return None


_AT_IT: Cell[Callable[[], _Turn | None]] = Cell(_nobody)
_ENDS = Changes()

if hasattr(os, "register_at_fork"):
    _held: list[_Turn] = []

    def _hold() -> None:
        _held.append(_Turn())
        _ENDS.wait_for(_held[-1].take, _PATIENCE_SECONDS)

    def _begin_anew() -> None:
        _held.clear()
        _AT_IT.change(lambda _: _nobody)  # a thread may have it that is not there in the child

    os.register_at_fork(
        before=_hold, after_in_parent=lambda: _held.pop().end(), after_in_child=_begin_anew
    )


def _in_several_processes() -> bool:
    """Whether ``prometheus_client`` was imported with PROMETHEUS_MULTIPROC_DIR set."""
    return values.ValueClass is not values.MutexValue


_LONGEST_LINE = 1 if _in_several_processes() else 1000
"""How long the line may grow; not at all where another process is scraped for this one."""


def _report(step: Step) -> None:
    _LINE.append(step)
    while len(_LINE) >= _LONGEST_LINE:
        turn = _Turn()
        try:
            if not turn.take():
                return
            _settle()
        finally:
            turn.end()


@contextmanager
def _turn() -> Iterator[None]:
    """Settle what has been reported, and let no fork into the block; another's turn is waited for.

    Not for ever: what holds out longer than a fork waits, a fork need not wait for either.
    """
    turn = _Turn()
    try:
        if _ENDS.wait_for(turn.take, _PATIENCE_SECONDS):
            _settle()
        yield
    finally:
        turn.end()


def _settle() -> None:
    for step, times in Tally(_LINE.popleft() for _ in range(len(_LINE))).items():
        if isinstance(step, tuple):
            for _ in range(times):
                step[0](*step[1:])
        else:
            step.inc(times)


class _Family:
    """One metric of the library as one of ``prometheus_client``, with a bound on its series."""

    def __init__(self, metric: Counter | Histogram, labels: Labels, max_series: int) -> None:
        self.metric = metric
        self.labels = {name: tuple(every.split()) for name, every in labels.items()}
        together = math.prod(len(every) or 1 for every in self.labels.values())
        self._room = max_series - (together if isinstance(metric, Counter) else 1)
        self._known: dict[tuple[str, ...], Any] = {}

    def series(self, builder: str, given: Mapping[str, str]) -> tuple[Any, bool]:
        """Return the series with these labels, and whether it is theirs alone."""
        labels = {name: readable(str(given.get(name, ""))) for name in self.labels}
        found = self._known.get((builder, *labels.values()))
        if found is None and len(self._known) > self._room:
            folded = (each if each in self.labels[n] else OTHER for n, each in labels.items())
            return self.metric.labels(builder, *folded), False
        if found is None and isinstance(self.metric, Counter):
            self.begin(builder, labels)
        return found or self._made(builder, *labels.values()), True

    def begin(self, builder: str, given: Mapping[str, str]) -> None:
        """Have each outcome start at zero, so that the first failure counts as an increase."""
        for values in itertools.product(*(all_ or (given[n],) for n, all_ in self.labels.items())):
            self._made(builder, *values)

    def _made(self, *values: str) -> Any:
        return self._known.setdefault(values, self.metric.labels(*values))


def _plain(name: str, value: str) -> str:
    if not re.fullmatch(r"[A-Za-z]\w*", text(name, value), re.ASCII):
        raise ValueError(refusal(name, "a name of letters, digits and _", value))
    return value


def _about(name: str, description: str, labels: Iterable[str], namespace: str) -> dict[str, Any]:
    return {
        "name": name,
        "documentation": description,
        "labelnames": ("builder", *labels),
        "namespace": namespace,
        "registry": None,  # what collects it is registered
    }


class _Families(Collector):
    """The metrics of all sinks of one namespace on one registry, by name as they are shown."""

    def __init__(self, namespace: str, buckets: tuple[float, ...], max_series: int) -> None:
        self.settings = buckets, max_series
        self._families: dict[str, _Family] = {}
        made: Counter | Histogram
        for metric, (_, _, description, labels) in {**COUNTERS, **OBSERVATIONS}.items():
            name = f"{metric[:-3]}_seconds" if metric.endswith("_ms") else metric
            about = _about(name, description, labels, namespace)
            if metric in COUNTERS:
                made = Counter(**about)
            else:
                made = Histogram(**about, buckets=_SIZE_BUCKETS if name == metric else buckets)
            self._families[metric] = _Family(made, labels, max_series)

    def of(self, kind: type[Counter | Histogram], metric: str) -> _Family:
        """Return the family of a metric; ValueError if the library has none of this kind."""
        family = self._families.get(metric)
        if family is None or not isinstance(family.metric, kind):
            wanted = f"a {kind.__name__.lower()} of the library's"
            raise ValueError(refusal("metric", wanted, metric))
        return family

    def begin(self, builder: str) -> None:
        """Start at zero what has no label that an application chooses."""
        for metric, (*_, labels) in COUNTERS.items():
            if all(labels.values()):
                self._families[metric].begin(builder, {})

    def collect(self) -> Iterator[Metric]:
        """Return every series, with all that was reported before."""
        with _turn():
            families = self._families.values()
            return iter([each for family in families for each in family.metric.collect()])

    def describe(self) -> Iterator[Metric]:
        """Return the metrics without series, for the registry to know their names."""
        return (each for family in self._families.values() for each in family.metric.describe())


_SHARED: WeakKeyDictionary[CollectorRegistry, dict[str, _Families]] = WeakKeyDictionary()
_SHARING = threading.Lock()


class PrometheusMetrics:
    """A metrics sink that shows the library's counts and observations to Prometheus.

    A count ``x_total`` becomes the counter ``coalestra_x_total``, an observation ``x_ms`` the
    histogram ``coalestra_x_seconds``, each with the label ``builder`` before its own. Sinks on one
    registry share their metrics. In multiprocess mode every report is in the shared files at once.

    Args:
        builder: stands in the label ``builder``; another one for each builder of a process.
        registry: where to register; the default one of ``prometheus_client`` unless told otherwise.
        namespace: what all names begin with.
        latency_buckets: the upper bounds of the buckets of latencies, in seconds, ascending.
        max_series: how many series each metric may have; in any more, sources and kinds of
            resources are called ``other``.

    Raises:
        ValueError: another sink of this namespace on this registry has other buckets or another
            bound, or something else in the registry has such names.
    """

    __slots__ = ("_counts", "_families", "_observations", "builder")

    coalestra_non_blocking = True

    def __init__(
        self,
        builder: str = "default",
        *,
        registry: CollectorRegistry = REGISTRY,
        namespace: str = "coalestra",
        latency_buckets: Sequence[float] = LATENCY_BUCKETS,
        max_series: int = 1000,
    ) -> None:
        self.builder: str = readable(text("builder", builder))
        instance("registry", registry, CollectorRegistry)
        _plain("namespace", namespace)
        instance("latency_buckets", latency_buckets, Sequence)
        buckets = tuple(number("latency_buckets", each, above=0) for each in latency_buckets)
        if not buckets or list(buckets) != sorted(set(buckets)):
            raise ValueError(f"latency_buckets must be one or more, ascending, got {buckets}")
        settings = buckets, integer("max_series", max_series, minimum=1)
        with _SHARING:
            of_registry = _SHARED.setdefault(registry, {})
            families = of_registry.get(namespace)
            if families is None:
                families = _Families(namespace, *settings)
                registry.register(families)
                of_registry[namespace] = families
        if families.settings != settings:
            raise ValueError(
                "latency_buckets and max_series must be the same for all sinks of one namespace "
                f"on one registry, got {settings} beside {families.settings}; give the same, or "
                "another namespace"
            )
        self._families = families
        self._counts: dict[tuple[str, ...], Counter] = {}
        self._observations: dict[tuple[str, ...], Histogram] = {}
        _report((families.begin, self.builder))

    def increment(self, metric: str, value: int = 1, **labels: str) -> None:
        """Add ``value``, which must not be negative, to the counter with these labels."""
        series = self._counts.get((metric, *labels, *labels.values()))
        if series is not None and value == 1:
            _report(series)
        elif not value >= 0:
            raise ValueError(f"value must not be negative, got {value!r} for {metric!r}")
        elif series is not None:
            _report((series.inc, float(value)))
        else:
            family = self._families.of(Counter, metric)
            _report((self._take, family, metric, tuple(labels.items()), float(value)))

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Add one observation to the histogram with these labels."""
        value = value / 1000.0 if metric.endswith("_ms") else float(value)
        series = self._observations.get((metric, *labels, *labels.values()))
        if series is not None:
            _report((series.observe, value))
        else:
            family = self._families.of(Histogram, metric)
            _report((self._take, family, metric, tuple(labels.items()), value))

    def _take(self, family: _Family, metric: str, pairs: Pairs, value: float) -> None:
        """Take in a first report; the next one with its labels finds their series at once."""
        labels = dict(pairs)
        series, alone = family.series(self.builder, labels)
        counts = isinstance(series, Counter)
        if alone and labels.keys() == family.labels.keys():
            known = self._counts if counts else self._observations
            series_of = (metric, *labels, *labels.values())
            known[series_of] = series
        (series.inc if counts else series.observe)(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.builder!r})"


# Health ------------------------------------------------------------------------------------------

_COPYING = "copying health into the files that processes share"


class HealthCollector(Collector):
    """Shows the health of builders to Prometheus; a scrape asks no source and waits for no loop.

    A closed builder drops out, and so does one that nobody holds any more. Where several processes
    are scraped as one (PROMETHEUS_MULTIPROC_DIR), nobody asks collectors: there a thread copies
    health into gauges every ``interval_seconds``, in which a builder that is gone leaves zeros, and
    ends with the last builder. Make it in each worker process then, not before the fork.

    Args:
        builders: the builders, of either kind, by what stands in the label ``builder``.
        registry: where to register; the default one of ``prometheus_client`` unless told otherwise.
        namespace: what all names begin with.
        interval_seconds: how often health is copied where several processes are scraped as one.

    Raises:
        ValueError: the registry has such names already, perhaps another collector's: let that one
            `watch` these builders too.
    """

    def __init__(
        self,
        builders: Mapping[str, Builder],
        *,
        registry: CollectorRegistry = REGISTRY,
        namespace: str = "coalestra",
        interval_seconds: float = 5.0,
    ) -> None:
        instance("registry", registry, CollectorRegistry)
        self._namespace: str = _plain("namespace", namespace)
        self._interval: float = number("interval_seconds", interval_seconds, above=0)
        self._watched = Watched()
        self._copies = _HealthCopies(namespace) if _in_several_processes() else None
        self._copying = threading.Lock()
        self._copier: threading.Thread | None = None
        for name, builder in mapping("builders", builders).items():
            self.watch(name, builder)
        if self._copies is None:
            registry.register(self)

    def watch(self, name: str, builder: Builder) -> None:
        """Show one more builder; it takes the place of an earlier one of this name."""
        instance("builder", builder, (SnapshotBuilder, SyncSnapshotBuilder))
        with self._copying:
            self._watched.add(readable(text("name", name)), builder)
            if self._copies is None:
                return
            self._copies.renew(self._watched.read(FACTS.values()))
            if self._copier is None or not self._copier.is_alive():
                copy, title = partial(self._keep_copying, self._copies), "coalestra-prometheus"
                self._copier = threading.Thread(target=copy, name=title, daemon=True)
                self._copier.start()

    def _keep_copying(self, copies: _HealthCopies) -> None:
        while True:
            time.sleep(min(self._interval, LONGEST_WAIT_SECONDS))
            with self._copying:
                try:
                    copies.renew(self._watched.read(FACTS.values()))
                except Exception as error:  # of the files that are shared
                    self._watched.changes.failed(_COPYING, error)
                else:
                    self._watched.changes.works(_COPYING)
                if not self._watched.open():
                    self._copier = None
                    return

    def collect(self) -> Iterator[Metric]:
        """Return the health of the builders that are open."""
        return self._families(self._watched.read(FACTS.values()))

    def describe(self) -> Iterator[Metric]:
        """Return the metrics without series, for the registry to know their names."""
        return self._families({})

    def _families(self, reading: Reading) -> Iterator[Metric]:
        for fact in FACTS.values():
            kind = CounterMetricFamily if fact.counts else GaugeMetricFamily
            name = f"{self._namespace}_{fact.name}"
            family = kind(name, fact.description, labels=("builder", *fact.labels))
            for labels, figure in reading.get(fact.name, ()):
                family.add_metric(labels, figure)
            yield family

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(self._watched.open()) or 'no builder'}>"


class _HealthCopies:
    """Health in gauges and counters, which are in the files that processes share."""

    def __init__(self, namespace: str) -> None:
        self._metrics: dict[str, Counter | Gauge] = {}
        for fact in FACTS.values():
            about = _about(fact.name, fact.description, fact.labels, namespace)
            self._metrics[fact.name] = (
                Counter(**about) if fact.counts else Gauge(**about, multiprocess_mode=fact.merged)
            )
        self._shown: dict[tuple[str, tuple[str, ...]], float] = {}

    def renew(self, reading: Reading) -> None:
        """Show these figures instead of the last ones; counters grow by what is new."""
        shown = {(name, labels): each for name, some in reading.items() for labels, each in some}
        for (name, labels), figure in {**dict.fromkeys(self._shown, 0.0), **shown}.items():
            series = self._metrics[name].labels(*labels)
            if isinstance(series, Gauge):
                if (name, labels) in shown or not name.endswith("_timestamp_seconds"):
                    series.set(figure)
            else:
                last = self._shown.get((name, labels), 0.0)
                series.inc(figure - last if figure >= last else figure)
        self._shown = shown
