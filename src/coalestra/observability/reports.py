"""What the library reports: events, which count if there is a counter for such, and metrics.

An event, a count or an observation that is the whole of a report is made by its name; a method of
its own has what is told in more than one way, or worked out of something else.

Laws:

1. Nothing that a sink raises leaves this module: failures are counted. What ends a program is
   passed on to it, after the step that reported is over.
2. A label never holds a subject, a qualifier or a rendered key: the number of time series must not
   grow with the number of resources. Events name the resource in full.
3. Every text in a label or an event is one line of bounded length, whatever an application put
   into a name. An event holds nothing but texts, numbers, and lists and dictionaries of such.
4. What nobody listens to costs one look at a flag: it is not put into words.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from coalestra._endings import pass_on
from coalestra._lockfree import Cell
from coalestra.core import errors
from coalestra.core.acceptance import SnapshotAcceptanceViolation
from coalestra.core.errors import SnapshotConsistencyError, SourceFailure
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.snapshot import SnapshotDiagnostics
from coalestra.core.validation import flag, readable, require_methods
from coalestra.core.values import Revision
from coalestra.observability import sinks
from coalestra.observability.changes import ChangeLog, subject_of

if TYPE_CHECKING:
    Buffer = sinks.BufferedEventSink | sinks.BufferedMetricsSink

Reported = BaseException | SourceFailure
"""What went wrong: an exception, or the record that was made of one."""


COUNTED: Mapping[str, tuple[str, str]] = {
    "cache_hit": ("cache_access_total", "resource status=freshness"),
    "cache_bypassed": ("cache_access_total", "resource status=revalidation_bypass"),
    "cache_failed": ("cache_failure_total", "operation"),
    "resource_joined": ("singleflight_join_total", "resource"),
    "resource_resolved": ("source_fetch_total", "source status=success"),
    "resource_refresh_scheduled": ("resource_refresh_total", "resource status=scheduled"),
    "resource_refresh_completed": ("resource_refresh_total", "resource status=success"),
    "resource_refresh_failed": ("resource_refresh_total", "resource status=failure"),
    "resource_published": ("resource_publish_total", "resource source status=published"),
    "resource_publish_ignored": ("resource_publish_total", "resource source status"),
    "resource_invalidated": ("resource_invalidation_total", "resource"),
    "payload_copy_deadline_exceeded": ("payload_copy_deadline_total", "phase"),
}
"""The events that count, each with its counter and the labels of that.

A label has the fact of its name or of the one behind ``=``, or else that word. ``resource`` stands
for the two labels that say of which kind it is.
"""

_LABELS = {
    event_type: [
        (label, fact or label)
        for label, _, fact in (each.partition("=") for each in labels.split())
    ]
    for event_type, (_, labels) in COUNTED.items()
}

_DIAGNOSTICS = tuple(field.name for field in dataclasses.fields(SnapshotDiagnostics))


class ReportedDiagnostics(dict[str, Any]):
    """The diagnostics of a snapshot in the form of JSON; the fields are attributes all the same."""

    @classmethod
    def of(cls, diagnostics: SnapshotDiagnostics) -> ReportedDiagnostics:
        """Return the fields of ``diagnostics`` by name, mappings as dictionaries of their own."""
        fields = {name: getattr(diagnostics, name) for name in _DIAGNOSTICS}
        return cls({name: dict(v) if isinstance(v, Mapping) else v for name, v in fields.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r} in the diagnostics of a snapshot") from None

    def __eq__(self, other: object) -> bool:
        fields = self.of(other) if isinstance(other, SnapshotDiagnostics) else other
        return dict.__eq__(self, fields) is True

    __hash__ = None


class Reporter:
    """Hands counts, observations and events to the two sinks of one builder.

    Get one from ``reporter_for``.
    """

    __slots__ = ("_counting", "_events", "_failures", "_log", "_metrics", "_telling")

    def __init__(self, metrics: MetricsSink, events: EventSink, log: ChangeLog) -> None:
        self._log = log
        self._metrics = metrics
        self._events = events
        # Subclasses of the null sinks may listen after all.
        self._counting = type(_innermost(metrics)) is not sinks.NullMetrics
        self._telling = type(_innermost(events)) is not sinks.NullEventSink
        self._failures = Cell(0)

    @property
    def listens(self) -> bool:
        """Whether there is a sink that does not discard what it gets."""
        return self._counting or self._telling

    @property
    def failures(self) -> int:
        """How often a sink has raised since this reporter was made."""
        return self._failures.value

    def __repr__(self) -> str:
        metrics = type(self._metrics).__name__ if self._counting else "off"
        events = type(self._events).__name__ if self._telling else "off"
        return f"<{type(self).__name__} metrics={metrics} events={events} failures={self.failures}>"

    def count(
        self, metric: str, key: ResourceKey | None = None, times: int = 1, /, **labels: str
    ) -> None:
        """Count so many; of a key the labels say what kind of resource it is, and not which."""
        if self._counting:
            if key is not None:
                labels.update(resource_namespace=key.namespace, resource_name=key.name)
            self._hand("metrics", "increment", (metric, times), labels.items())

    def _count_status(self, metric: str, succeeded: bool, **labels: str) -> str:
        status = "success" if succeeded else "error"
        self.count(metric, status=status, **labels)
        return status

    def observe(self, metric: str, value: float, **labels: str) -> None:
        """Observe a value, in the unit that the name of the metric tells."""
        if self._counting:
            self._hand("metrics", "observe", (metric, value), labels.items())

    def tell(self, event_type: str, **facts: Any) -> None:
        """Tell these facts of an event, and count it if it counts.

        Errors and resources are given as they are.
        """
        if self._counting and event_type in COUNTED:
            labels = {label: facts.get(fact, fact) for label, fact in _LABELS[event_type]}
            self.count(COUNTED[event_type][0], labels.pop("resource", None), **labels)
        if self._telling:
            self._hand("event", "emit", (event_type,), facts.items())

    def _hand(
        self, kind: str, method: str, said: tuple[Any, ...], facts: Iterable[tuple[str, Any]]
    ) -> None:
        """Hand something to a sink, each fact as it is shown by its name or type."""
        sink: object = self._events if kind == "event" else self._metrics
        shown: dict[str, Any] = {}
        try:
            for name, fact in facts:
                if type(fact) is str:
                    shown[name] = readable(fact)
                elif name in _FORMS:
                    shown[name] = _FORMS[name](fact)
                elif isinstance(fact, str):  # of a class of the application's, such as an enum
                    shown[name] = readable(str.__str__(fact))
                else:
                    shown[name] = fact
            getattr(sink, method)(*said, **shown)
        except BaseException as error:
            self._failures.change(lambda count: count + 1)
            self._log.failed(subject_of(kind, sink), error)
            pass_on(error)
        else:
            if self._log.troubled:
                self._log.works(subject_of(kind, sink))

    # What is told in more than one way, or worked out ------------------------------------------

    def resource_resolved(self, value: Revision, source_kind: str, snapshot_id: str) -> None:
        """Report a fresh value of a ``single``, ``batch`` or ``derived`` source."""
        self.tell(
            "resource_resolved",
            resource=value.key,
            source=value.source,
            latency_ms=value.latency_ms,
            attempts=value.attempts,
            source_kind=source_kind,
            authority_rank=value.authority_rank,
            snapshot_id=snapshot_id,
        )

    def source_failed(
        self,
        key: ResourceKey,
        source: str,
        error: Reported,
        snapshot_id: str,
        status: str = "failure",
    ) -> None:
        """Report that a source brought no fresh value for a key, whatever the reason.

        The status is ``failure``, ``stale``, ``invalid_timestamp`` (a payload that was rejected),
        ``circuit_open`` (no call at all) or ``absent`` (it answered that there is none, which is no
        failure); the last three have events of their own.
        """
        self.count("source_fetch_total", source=source, status=status)
        told: dict[str, Any] = {"error_type": error, "resource": key, "source": source}
        if status in _OTHER_FAILURES:
            del told["error_type"]
        if status != "absent":
            told["error"] = error
        self.tell(_OTHER_FAILURES.get(status, "source_failed"), **told, snapshot_id=snapshot_id)

    def warm_hits(self, keys: Collection[ResourceKey], snapshot_id: str) -> None:
        """Report fresh values served together: those of one kind are one count."""
        if self._counting:
            kinds: dict[tuple[str, str], int] = {}  # quicker than a Counter of few
            for key in keys:
                kind = key.namespace, key.name
                kinds[kind] = kinds.get(kind, 0) + 1
            for (namespace, name), times in kinds.items():
                kind_of = {"resource_namespace": namespace, "resource_name": name}
                self.count("cache_access_total", None, times, status="fresh", **kind_of)
        if self._telling:
            for key in keys:
                facts = {"resource": key, "freshness": "fresh", "snapshot_id": snapshot_id}
                self._hand("event", "emit", ("cache_hit",), facts.items())

    def cache_failed(self, operation: str, error: Reported) -> None:
        """Report that a cache raised as it was to ``read`` or ``write``; it was done without."""
        self.tell("cache_failed", operation=operation, error_type=error, error=error)

    # Builds and sessions as a whole, and the policies they must meet ---------------------------

    def snapshot_built(
        self,
        snapshot_id: str,
        diagnostics: SnapshotDiagnostics,
        *,
        build_failed: bool,
        strict: bool,
    ) -> None:
        """Report a finished build; the counts of keys are those of its diagnostics."""
        status = self._count_status("snapshot_build_total", not build_failed)
        self.observe("snapshot_build_latency_ms", diagnostics.duration_ms, status=status)
        self.tell(
            "snapshot_built",
            snapshot_id=snapshot_id,
            resources=diagnostics.requested_resources,
            resolved=diagnostics.resolved_resources,
            failed=diagnostics.failed_resources,
            build_failed=build_failed,
            strict=strict,
            diagnostics=diagnostics,
        )

    def session_resolved(self, *, succeeded: bool, latency_ms: float, **facts: Any) -> None:
        """Report a finished ``resolve``; ``succeeded`` unless it is about to raise.

        ``requested``, ``resolved`` and ``failed`` count keys of this call, ``total_resources``
        those of the snapshot that it returned.
        """
        status = self._count_status("snapshot_session_resolve_total", succeeded)
        self.observe("snapshot_session_resolve_latency_ms", latency_ms, status=status)
        self.tell("snapshot_session_resolved", **facts)

    def session_revalidated(self, *, committed: bool, **facts: Any) -> None:
        """Report a finished ``revalidate``; it has succeeded if its values were ``committed``.

        Else the previous ones were retained. ``requested`` counts keys of this call, ``affected``
        these and the pinned ones derived from them, ``refreshed`` and ``failed`` those of them with
        and without a new value.
        """
        self._count_status("snapshot_session_revalidate_total", committed)
        kept = {"committed": committed, "retained_previous": not committed}
        self.tell("snapshot_session_revalidated", **facts, **kept)

    def acceptance_judged(
        self, snapshot_id: str, violations: Collection[SnapshotAcceptanceViolation]
    ) -> None:
        """Report that an acceptance policy lets a snapshot through, or each reason against it."""
        self._count_status("snapshot_acceptance_total", not violations)
        reasons = [violation.reason.value for violation in violations]
        for reason, times in Counter(reasons).items():
            self.count("snapshot_acceptance_violation_total", None, times, reason=reason)
        if reasons:
            told = {"violations": len(reasons), "reasons": tuple(dict.fromkeys(reasons))}
            self.tell("snapshot_acceptance_failed", snapshot_id=snapshot_id, **told)

    def consistency_judged(self, snapshot_id: str, error: SnapshotConsistencyError | None) -> None:
        """Report whether the observations of a snapshot lie close enough together."""
        self._count_status("snapshot_consistency_total", error is None, rule="observation_skew")
        if error is not None:
            self.tell(
                "snapshot_consistency_failed",
                snapshot_id=snapshot_id,
                resources=len(error.keys),
                oldest_resource=error.oldest_key,
                newest_resource=error.newest_key,
                observation_skew_ms=error.observation_skew_seconds * 1e3,
                max_observation_skew_ms=error.max_observation_skew_seconds * 1e3,
            )


_OTHER_FAILURES = {
    "absent": "resource_absent",
    "circuit_open": "source_circuit_open",
    "invalid_timestamp": "source_payload_rejected",
}
"""The statuses of failures that have an event of their own."""


def _error_type_of(error: Reported) -> str:
    return error.error_type if isinstance(error, SourceFailure) else errors.type_name(error)


def _error_text_of(error: Reported) -> str:
    text = error.message if isinstance(error, SourceFailure) else errors.message_of(error)
    return errors.folded_message(text)


_FORMS: Mapping[str, Callable[[Any], object]] = {
    **dict.fromkeys(("resource", "oldest_resource", "newest_resource"), attrgetter("display")),
    "error": _error_text_of,
    "error_type": _error_type_of,
    "diagnostics": ReportedDiagnostics.of,
}
"""How the facts of these names are told."""


def reporter_for(
    metrics: MetricsSink, events: EventSink, log: ChangeLog | None = None
) -> Reporter | None:
    """Return the reporter to these sinks, or None if both are null sinks, inside a buffer or not.

    Sinks that raise are named in the ``log``.
    """
    report = Reporter(metrics, events, ChangeLog(silent=True) if log is None else log)
    return report if report.listens else None


def _innermost(sink: MetricsSink | EventSink) -> MetricsSink | EventSink:
    while isinstance(sink, (sinks.BufferedMetricsSink, sinks.BufferedEventSink)):
        sink = sink.downstream
    return sink


class ObservabilitySinks:
    """The sinks of one builder as it uses them: behind a buffer where they need one.

    Args:
        metrics, events: where these go; None discards them.
        buffer: True for every sink, False for none, None for those that do not say
            ``coalestra_non_blocking = True``. A buffered sink never gets a second buffer.
        max_pending: how many records may wait in each buffer (at least 1).
        overflow: what happens to one more.

    Attributes:
        log: says what begins to fail, and what works again; nothing if the event sink logs it all.
        sink_log: says that of sinks, which no event sink is told of.
        metrics, events: the sinks, buffered or not.
        buffers: every buffered sink by component, ``events`` and ``metrics``.
        owned: those of them that were put there on the builder's behalf, and are its to close.
    """

    __slots__ = ("buffers", "events", "log", "metrics", "owned", "sink_log")

    def __init__(
        self,
        metrics: MetricsSink | None,
        events: EventSink | None,
        *,
        buffer: bool | None = None,
        max_pending: int = sinks.DEFAULT_MAX_PENDING,
        overflow: sinks.BufferOverflowPolicy = sinks.BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        if buffer is not None:
            flag("buffer_observability", buffer)
        self.metrics: MetricsSink = sinks.NullMetrics() if metrics is None else metrics
        self.events: EventSink = sinks.NullEventSink() if events is None else events
        require_methods("metrics", self.metrics, "increment", "observe", plain=True)
        require_methods("events", self.events, "emit", plain=True)
        self.buffers: dict[str, Buffer] = {}
        self.owned: dict[str, Buffer] = {}
        self.log = self.sink_log = ChangeLog()
        if isinstance(_innermost(self.events), sinks.LoggingEventSink):
            self.log = ChangeLog(silent=True)
        limits: dict[str, Any] = {"max_pending": max_pending, "overflow": overflow}
        for name, kind in (
            ("events", sinks.BufferedEventSink),
            ("metrics", sinks.BufferedMetricsSink),
        ):
            sink = getattr(self, name)
            blocks = getattr(sink, "coalestra_non_blocking", False) is not True
            if not isinstance(sink, kind) and (blocks if buffer is None else buffer):
                sink = self.owned[name] = kind(sink, **limits)
                setattr(self, name, sink)
            if isinstance(sink, kind):
                self.buffers[name] = sink

    def reporter(self) -> Reporter | None:
        """Return what reports to these sinks, or None if both discard what they get."""
        return reporter_for(self.metrics, self.events, self.sink_log)

    def stats(self) -> dict[str, sinks.BufferedSinkStats]:
        """Return the state of every buffered sink, by component."""
        return {name: buffer.stats() for name, buffer in self.buffers.items()}

    async def aclose(
        self, *, timeout_seconds: float | None = 5.0, drain: bool = True
    ) -> dict[str, int]:
        """Close the owned buffers, on a loop, and wait for what is being logged.

        Args:
            timeout_seconds: for all of them together; None waits as long as it takes.
            drain: deliver what is pending instead of discarding it.

        Returns:
            The pending records of each component whose worker still runs; empty if all is done.
            Calling again waits for those.
        """
        for buffer in self.owned.values():
            buffer.queue.refuse(discard=not drain)
        now = asyncio.get_running_loop().time
        end = None if timeout_seconds is None else now() + timeout_seconds

        def left() -> float | None:
            return None if end is None else max(0.0, end - now())

        late = {}
        for name, buffer in self.owned.items():
            if not await buffer.queue.until_ended(left()):
                late[name] = buffer.queue.pending
        if lines := await self.sink_log.end(left(), drain=drain):
            late["log"] = lines
        return late

    def call_after_last_record(self, sink: object, callback: Callable[[], object]) -> bool:
        """Have ``callback`` called once no buffer will hand ``sink`` any more records.

        That happens in the thread of the last worker. Returns False, and forgets the callback, if
        none is at work for the sink now.
        """
        queues = [each.queue for each in self.owned.values() if each.downstream is sink]
        left = [each for each in queues if not each.ended]
        for each in left:  # at the end of one look for that of the next
            callback = partial(each.call_at_end, callback)
        if left:
            callback()
        return bool(left)
