"""What the library reports: one method per fact, which counts it and emits its event if it has one.

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
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from coalestra._endings import pass_on
from coalestra._lockfree import Cell
from coalestra.core.acceptance import SnapshotAcceptanceViolation
from coalestra.core.errors import (
    SnapshotConsistencyError,
    SourceFailure,
    folded_message,
    message_of,
    type_name,
)
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import EventSink, MetricsSink
from coalestra.core.results import PublishStatus
from coalestra.core.snapshot import SnapshotDiagnostics
from coalestra.core.validation import flag, readable, require_methods
from coalestra.core.values import Revision
from coalestra.observability.buffered import (
    BufferedEventSink,
    BufferedMetricsSink,
    BufferedSinkStats,
)
from coalestra.observability.changes import ChangeLog, subject_of
from coalestra.observability.sinks import (
    DEFAULT_MAX_PENDING,
    BufferOverflowPolicy,
    LoggingEventSink,
    NullEventSink,
    NullMetrics,
)

if TYPE_CHECKING:
    Buffer = BufferedEventSink | BufferedMetricsSink

Reported = BaseException | SourceFailure
"""What went wrong: an exception, or the record that was made of one."""


EVENTS: Mapping[str, tuple[str, ...]] = {
    event_type: tuple(facts.split())
    for event_type, facts in {
        "snapshot_started": "kind snapshot_id",
        "snapshot_built": "snapshot_id resources resolved failed build_failed strict diagnostics",
        "snapshot_session_resolved": (
            "snapshot_id requested resolved failed total_resources strict retry_errors"
        ),
        "snapshot_session_revalidated": (
            "snapshot_id requested affected refreshed failed committed retained_previous strict "
            "force_refresh consistency_failed acceptance_failed"
        ),
        "snapshot_acceptance_failed": "snapshot_id violations reasons",
        "snapshot_consistency_failed": (
            "snapshot_id resources oldest_resource newest_resource observation_skew_ms "
            "max_observation_skew_ms"
        ),
        "cache_hit": "resource freshness snapshot_id",
        "cache_bypassed": "resource reason snapshot_id",
        "cache_failed": "operation error_type error",
        "stale_fallback_used": "resource error_type snapshot_id",
        "resource_joined": "resource snapshot_id joined_snapshot_id",
        "source_call_queued": "source keys snapshot_id",
        "source_call_started": "source keys attempt snapshot_id",
        "source_call_retried": "source attempt delay_seconds error_type error snapshot_id",
        "resource_resolved": (
            "resource source latency_ms attempts source_kind authority_rank snapshot_id"
        ),
        "resource_absent": "resource source snapshot_id",
        "source_failed": "error_type resource source error snapshot_id",
        "source_payload_rejected": "resource source error snapshot_id",
        "source_circuit_open": "resource source error snapshot_id",
        "source_transport_timeout_violated": (
            "source resource outcome snapshot_id declared_transport_timeout_seconds "
            "observed_elapsed_seconds grace_seconds"
        ),
        "source_transport_budget_rejected": (
            "source resource transport_timeout_seconds available_budget_seconds snapshot_id"
        ),
        "resource_refresh_scheduled": "resource reason snapshot_id",
        "resource_refresh_completed": "resource reason source snapshot_id parent_snapshot_id",
        "resource_refresh_failed": (
            "resource reason error_type error snapshot_id parent_snapshot_id"
        ),
        "resource_published": "resource source observed_at replaced forced authority_rank",
        "resource_publish_ignored": (
            "resource source status observed_at cached_observed_at candidate_authority_rank "
            "cached_authority_rank"
        ),
        "resource_invalidated": "resource reason",
        "payload_copy_deadline_exceeded": "snapshot_id phase",
    }.items()
}
"""The facts that each event tells, in order."""

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
        self._counting = type(_innermost(metrics)) is not NullMetrics
        self._telling = type(_innermost(events)) is not NullEventSink
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

    def _count(
        self, metric: str, key: ResourceKey | None = None, times: int = 1, /, **labels: str
    ) -> None:
        """Count so many; of a key the labels say what kind of resource it is, and not which."""
        if self._counting:
            if key is not None:
                labels.update(resource_namespace=key.namespace, resource_name=key.name)
            self._hand("metrics", "increment", (metric, times), labels.items())

    def _count_status(self, metric: str, succeeded: bool, **labels: str) -> None:
        self._count(metric, status="success" if succeeded else "error", **labels)

    def _observe(self, metric: str, value: float, **labels: str) -> None:
        if self._counting:
            self._hand("metrics", "observe", (metric, value), labels.items())

    def _tell(self, event_type: str, *facts: Any) -> None:
        """Tell of an event the facts that `EVENTS` names, in this order."""
        if self._telling:
            told = zip(EVENTS[event_type], facts, strict=True)
            self._hand("event", "emit", (event_type,), told)

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

    # Calls to sources, and what came of them -----------------------------------------------------

    def call_queued(self, source: str, keys: int, snapshot_id: str) -> None:
        """Report a call for so many keys that waits for capacity."""
        self._tell("source_call_queued", source, keys, snapshot_id)

    def call_started(self, source: str, keys: int, attempt: int, snapshot_id: str) -> None:
        """Report that a source is asked for so many keys, for the first time or again."""
        self._tell("source_call_started", source, keys, attempt, snapshot_id)

    def call_retried(
        self, source: str, attempt: int, delay: float, error: BaseException, snapshot_id: str
    ) -> None:
        """Report that a call is made again in so many seconds, after which attempt and error."""
        self._tell("source_call_retried", source, attempt, delay, error, error, snapshot_id)

    def resource_resolved(self, value: Revision, source_kind: str, snapshot_id: str) -> None:
        """Report a fresh value of a ``single``, ``batch`` or ``derived`` source."""
        self._count("source_fetch_total", source=value.source, status="success")
        facts = value.latency_ms, value.attempts, source_kind, value.authority_rank
        self._tell("resource_resolved", value.key, value.source, *facts, snapshot_id)

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
        self._count("source_fetch_total", source=source, status=status)
        if status == "absent":
            self._tell("resource_absent", key, source, snapshot_id)
        elif status in _OTHER_FAILURES:
            self._tell(_OTHER_FAILURES[status], key, source, error, snapshot_id)
        else:
            self._tell("source_failed", error, key, source, error, snapshot_id)

    def fetch_latency(self, source: str, latency_ms: float) -> None:
        """Observe how long one call took, in milliseconds."""
        self._observe("source_fetch_latency_ms", latency_ms, source=source)

    def batch_call(self, source: str, status: str) -> None:
        """Count a batch call as success, failure, deadline_exceeded or queue_timeout."""
        self._count("source_batch_call_total", source=source, status=status)

    def batch_size(self, source: str, size: int) -> None:
        """Observe how many keys one batch call is made for."""
        self._observe("source_batch_size", size, source=source)

    def capacity_wait(self, source: str, waited_ms: float) -> None:
        """Observe how long one call waited for its slots, in milliseconds."""
        self._observe("source_capacity_wait_ms", waited_ms, source=source)

    def capacity_timeout(self, source: str, reason: str) -> None:
        """Count a call that got no slot: ``queue_timeout`` or ``snapshot_deadline``."""
        self._count("source_capacity_timeout_total", source=source, reason=reason)

    def transport_violated(
        self,
        keys: Collection[ResourceKey],
        source: str,
        outcome: str,
        snapshot_id: str,
        **seconds: float,
    ) -> None:
        """Report one call that ran longer than its transport timeout allows.

        It counts once, as ``completed_late``, ``failed_late`` or ``coalestra_timeout``; each of its
        keys has an event, which tells the ``seconds`` by their names.
        """
        self._count("source_transport_timeout_violation_total", source=source, outcome=outcome)
        facts = {"source": source, "outcome": outcome, "snapshot_id": snapshot_id, **seconds}
        for key in keys:
            self._tell_named("source_transport_timeout_violated", {**facts, "resource": key})

    def transport_budget_rejected(
        self,
        keys: Collection[ResourceKey],
        source: str,
        reason: str,
        declared: float,
        available: float,
        snapshot_id: str,
    ) -> None:
        """Report one call that was not made, as it could have outlived its budget (in seconds).

        What sets the budget is the reason: ``snapshot_deadline`` or ``source_timeout``. It counts
        once, and each key has an event.
        """
        self._count("source_transport_budget_rejection_total", source=source, reason=reason)
        seconds = declared, available
        for key in keys:
            self._tell("source_transport_budget_rejected", source, key, *seconds, snapshot_id)

    # Reading the cache, and sharing work in flight ---------------------------------------------

    def cache_access(self, key: ResourceKey, status: str) -> None:
        """Count one look into the cache, by what it found or why it was not taken."""
        self._count("cache_access_total", key, status=status)

    def cache_hit(self, key: ResourceKey, freshness: str, snapshot_id: str) -> None:
        """Report a value served from the cache, ``fresh`` or ``stale_while_revalidate``."""
        self.cache_access(key, freshness)
        self._tell("cache_hit", key, freshness, snapshot_id)

    def warm_hits(self, keys: Collection[ResourceKey], snapshot_id: str) -> None:
        """Report fresh values served together: those of one kind are one count."""
        if self._counting:
            kinds: dict[tuple[str, str], int] = {}
            for key in keys:
                kind = key.namespace, key.name
                kinds[kind] = kinds.get(kind, 0) + 1
            for (namespace, name), times in kinds.items():
                kind_of = {"resource_namespace": namespace, "resource_name": name}
                self._count("cache_access_total", None, times, status="fresh", **kind_of)
        if self._telling:
            for key in keys:
                self._tell("cache_hit", key, "fresh", snapshot_id)

    def cache_bypassed(self, key: ResourceKey, reason: str, snapshot_id: str) -> None:
        """Report that the cache was passed over on purpose, and why."""
        self.cache_access(key, "revalidation_bypass")
        self._tell("cache_bypassed", key, reason, snapshot_id)

    def stale_fallback_used(
        self, key: ResourceKey, error: Reported, snapshot_id: str, *, from_cache: bool = True
    ) -> None:
        """Report that a stale value stands in, as every source has failed with ``error``.

        One that the last source brought, and not the cache, is no cache access.
        """
        if from_cache:
            self.cache_access(key, "stale_fallback")
        self._tell("stale_fallback_used", key, error, snapshot_id)

    def cache_failed(self, operation: str, error: Reported) -> None:
        """Report that a cache raised as it was to ``read`` or ``write``; it was done without."""
        self._count("cache_failure_total", operation=operation)
        self._tell("cache_failed", operation, error, error)

    def flight_joined(self, key: ResourceKey, snapshot_id: str, joined: str) -> None:
        """Report a unit of work that shares what another one, ``joined``, had begun to acquire."""
        self._count("singleflight_join_total", key)
        self._tell("resource_joined", key, snapshot_id, joined)

    # Refreshes in the background ---------------------------------------------------------------

    def refresh_scheduled(self, key: ResourceKey, reason: str, snapshot_id: str) -> None:
        """Report a new refresh, why, and the snapshot that gave the occasion."""
        self.refresh_came_to(key, "scheduled")
        self._tell("resource_refresh_scheduled", key, reason, snapshot_id)

    def refresh_completed(
        self, key: ResourceKey, reason: str, source: str, snapshot_id: str, parent: str
    ) -> None:
        """Report a refresh that brought a fresh value: from which source, and who set it off."""
        self.refresh_came_to(key, "success")
        self._tell("resource_refresh_completed", key, reason, source, snapshot_id, parent)

    def refresh_failed(
        self, key: ResourceKey, reason: str, error: Reported, snapshot_id: str, parent: str
    ) -> None:
        """Report a refresh that brought no fresh value: what went wrong, and who set it off."""
        self.refresh_came_to(key, "failure")
        self._tell("resource_refresh_failed", key, reason, error, error, snapshot_id, parent)

    def refresh_came_to(self, key: ResourceKey, status: str) -> None:
        """Count a refresh; one that found that there is none, or was called off, has no event."""
        self._count("resource_refresh_total", key, status=status)

    # Events written into the cache, and entries taken out of it --------------------------------

    def resource_published(self, value: Revision, *, replaced: bool, forced: bool) -> None:
        """Report a published value that is in the cache now, and whether it replaced another."""
        self._count_publish(value, PublishStatus.PUBLISHED)
        facts = value.observed_at, replaced, forced, value.authority_rank
        self._tell("resource_published", value.key, value.source, *facts)

    def resource_publish_ignored(
        self, candidate: Revision, cached: Revision, status: PublishStatus
    ) -> None:
        """Report a published value that lost to the one in the cache, and by which rule."""
        self._count_publish(candidate, status)
        what = candidate.key, candidate.source, status.value
        observed = candidate.observed_at, cached.observed_at
        ranks = candidate.authority_rank, cached.authority_rank
        self._tell("resource_publish_ignored", *what, *observed, *ranks)

    def resource_invalidated(self, key: ResourceKey, reason: str) -> None:
        """Report an entry taken out of the cache by request, for ``reason`` (may be empty)."""
        self._count("resource_invalidation_total", key)
        self._tell("resource_invalidated", key, reason)

    def _count_publish(self, value: Revision, status: PublishStatus) -> None:
        self._count("resource_publish_total", value.key, source=value.source, status=status.value)

    # Builds and sessions as a whole, and the policies they must meet ---------------------------

    def work_begun(self, kind: str, snapshot_id: str) -> None:
        """Report that a ``build``, ``session`` or ``refresh`` has begun."""
        self._tell("snapshot_started", kind, snapshot_id)

    def snapshot_built(
        self,
        snapshot_id: str,
        diagnostics: SnapshotDiagnostics,
        *,
        build_failed: bool,
        strict: bool,
    ) -> None:
        """Report a finished build; the counts of keys are those of its diagnostics."""
        self._count_status("snapshot_build_total", not build_failed)
        status = "error" if build_failed else "success"
        self._observe("snapshot_build_latency_ms", diagnostics.duration_ms, status=status)
        self._tell(
            "snapshot_built",
            snapshot_id,
            diagnostics.requested_resources,
            diagnostics.resolved_resources,
            diagnostics.failed_resources,
            build_failed,
            strict,
            diagnostics,
        )

    def session_resolved(self, *, succeeded: bool, latency_ms: float, **facts: Any) -> None:
        """Report a finished ``resolve``; ``succeeded`` unless it is about to raise.

        ``requested``, ``resolved`` and ``failed`` count keys of this call, ``total_resources``
        those of the snapshot that it returned.
        """
        self._count_status("snapshot_session_resolve_total", succeeded)
        status = "success" if succeeded else "error"
        self._observe("snapshot_session_resolve_latency_ms", latency_ms, status=status)
        self._tell_named("snapshot_session_resolved", facts)

    def session_revalidated(self, *, committed: bool, **facts: Any) -> None:
        """Report a finished ``revalidate``; it has succeeded if its values were ``committed``.

        Else the previous ones were retained. ``requested`` counts keys of this call, ``affected``
        these and the pinned ones derived from them, ``refreshed`` and ``failed`` those of them with
        and without a new value.
        """
        self._count_status("snapshot_session_revalidate_total", committed)
        kept = {"committed": committed, "retained_previous": not committed}
        self._tell_named("snapshot_session_revalidated", {**facts, **kept})

    def _tell_named(self, event_type: str, facts: Mapping[str, Any]) -> None:
        self._tell(event_type, *(facts[name] for name in EVENTS[event_type]))

    def acceptance_judged(
        self, snapshot_id: str, violations: Collection[SnapshotAcceptanceViolation]
    ) -> None:
        """Report that an acceptance policy lets a snapshot through, or each reason against it."""
        self._count_status("snapshot_acceptance_total", not violations)
        reasons = [violation.reason.value for violation in violations]
        for reason in reasons:
            self._count("snapshot_acceptance_violation_total", reason=reason)
        if reasons:
            different = tuple(dict.fromkeys(reasons))
            self._tell("snapshot_acceptance_failed", snapshot_id, len(reasons), different)

    def consistency_judged(self, snapshot_id: str, error: SnapshotConsistencyError | None) -> None:
        """Report whether the observations of a snapshot lie close enough together."""
        self._count_status("snapshot_consistency_total", error is None, rule="observation_skew")
        if error is not None:
            skew, most = error.observation_skew_seconds, error.max_observation_skew_seconds
            facts = len(error.keys), error.oldest_key, error.newest_key, skew * 1e3, most * 1e3
            self._tell("snapshot_consistency_failed", snapshot_id, *facts)

    def copy_deadline_exceeded(self, snapshot_id: str, phase: str) -> None:
        """Report that a deadline struck while a payload was being copied, and in which phase."""
        self._count("payload_copy_deadline_total", phase=phase)
        self._tell("payload_copy_deadline_exceeded", snapshot_id, phase)


_OTHER_FAILURES = {
    "circuit_open": "source_circuit_open",
    "invalid_timestamp": "source_payload_rejected",
}
"""The statuses of failures that have an event of their own."""


def _error_type_of(error: Reported) -> str:
    return error.error_type if isinstance(error, SourceFailure) else type_name(error)


def _error_text_of(error: Reported) -> str:
    return folded_message(error.message if isinstance(error, SourceFailure) else message_of(error))


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
    while isinstance(sink, (BufferedMetricsSink, BufferedEventSink)):
        sink = sink.downstream
    return sink


class ObservabilitySinks:
    """The sinks of one builder as it uses them: behind a buffer where they need one.

    Args:
        metrics: where counts and observations go; None discards them.
        events: where events go; None discards them.
        buffer: True for every sink, False for none, None for those that do not say
            ``coalestra_non_blocking = True``. A buffered sink never gets a second buffer.
        max_pending: how many records may wait in each buffer (at least 1).
        overflow: what happens to one more.

    Attributes:
        log: says what begins to fail, and what works again; nothing if the event sink logs it all.
        sink_log: says that of sinks, which no event sink is told of.
        metrics: the metrics sink, buffered or not.
        events: the event sink, buffered or not.
        buffers: every buffered sink by component, ``events`` and ``metrics``.
        owned: those of them that were put there on the builder's behalf, and are its to close.

    Raises:
        TypeError: an argument has the wrong type, or a sink lacks a method.
        ValueError: ``max_pending`` is below 1.
    """

    __slots__ = ("buffers", "events", "log", "metrics", "owned", "sink_log")

    def __init__(
        self,
        metrics: MetricsSink | None,
        events: EventSink | None,
        *,
        buffer: bool | None = None,
        max_pending: int = DEFAULT_MAX_PENDING,
        overflow: BufferOverflowPolicy = BufferOverflowPolicy.DROP_OLDEST,
    ) -> None:
        if buffer is not None:
            flag("buffer_observability", buffer)
        self.metrics: MetricsSink = NullMetrics() if metrics is None else metrics
        self.events: EventSink = NullEventSink() if events is None else events
        require_methods("metrics", self.metrics, "increment", "observe", plain=True)
        require_methods("events", self.events, "emit", plain=True)
        self.buffers: dict[str, Buffer] = {}
        self.owned: dict[str, Buffer] = {}
        self.log = self.sink_log = ChangeLog()
        if isinstance(_innermost(self.events), LoggingEventSink):
            self.log = ChangeLog(silent=True)
        limits: dict[str, Any] = {"max_pending": max_pending, "overflow": overflow}
        for name, kind in (("events", BufferedEventSink), ("metrics", BufferedMetricsSink)):
            sink = getattr(self, name)
            if not isinstance(sink, kind) and _wants_buffer(sink, buffer):
                sink = self.owned[name] = kind(sink, **limits)
                setattr(self, name, sink)
            if isinstance(sink, kind):
                self.buffers[name] = sink

    def reporter(self) -> Reporter | None:
        """Return what reports to these sinks, or None if both discard what they get."""
        return reporter_for(self.metrics, self.events, self.sink_log)

    def stats(self) -> dict[str, BufferedSinkStats]:
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

        once = [callback]

        def ended() -> None:
            if all(each.ended for each in left):
                with contextlib.suppress(IndexError):  # another worker ended at the same time
                    once.pop()()

        for each in left:
            each.call_at_end(ended)
        return bool(left)


def _wants_buffer(sink: object, buffer: bool | None) -> bool:
    if buffer is None:
        return getattr(sink, "coalestra_non_blocking", False) is not True
    return buffer
