"""What one unit of work did: how each key was obtained, what it waited for, which calls were made.

A trace is a record, made of facts that were noted on the way. All times are seconds since the unit
of work began, on the clock of its event loop; what another unit of work had begun before that has
negative ones. What follows the records puts them into words, and into rows of a picture; it says
nothing that they do not hold.

Laws of a picture: whatever its rows say, every bar lies within the span, every line of text within
its width; it is bounded in size, since what is alike is put together and the least interesting left
out, which is said; nothing is taken for markup; it needs neither a network nor a script. Colour is
never all that tells two things apart: calls are tall bars, waits are flat ones, and what failed is
crossed.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from coalestra.core import errors
from coalestra.core.frozen import FrozenDict, filled, frozen
from coalestra.core.keys import ResourceKey
from coalestra.core.serialization import json_safe, utc_text
from coalestra.core.validation import integer, readable
from coalestra.core.values import RefreshState, SnapshotValue

__all__ = [
    "AttemptTrace", "CallTrace", "Foundation", "KeyTrace", "Obtained", "SourceRefusal",
    "StageTrace", "Trace", "Wait", "WaitReason",
]  # fmt: skip

_SCHEMA = {"schema": "coalestra.trace", "schema_version": 1}
"""The name and version of the JSON form; it grows when a reader of the older one would misread."""

# The records -------------------------------------------------------------------------------------


class Obtained(str, Enum):
    """How a unit of work came by the value of a key."""

    CACHE = "cache"
    """Fresh in the cache."""
    NEAR_CACHE = "near_cache"
    """Fresh in the memory that lies before a shared cache."""
    STALE = "stale"
    """Stale in the cache, served while it is refreshed in the background."""
    PINNED = "pinned"
    """Read by an earlier stage of the session."""
    FETCHED = "fetched"
    """From a source, by a call that was made meanwhile."""
    DERIVED = "derived"
    """From a derived source, by a call that was made meanwhile."""
    PUBLISHED = "published"
    """By an event that came, or a newer value that was stored, while it was being acquired."""
    FALLBACK = "fallback"
    """A stale value that stands in, as every source failed or the deadline passed."""
    FAILED = "failed"
    """Not at all."""


class WaitReason(str, Enum):
    """What a key waited for, beside the calls that were made for it."""

    FLIGHT = "flight"
    """For an acquisition that another unit of work had begun."""
    CACHE = "cache"
    """For the answer of a cache that has to be awaited."""
    DEPENDENCIES = "dependencies"
    """For what it is derived from."""
    PUBLICATION = "publication"
    """For the end of a publication of the same key."""
    STORE = "store"
    """For the value to be stored in a cache that has to be awaited."""


@dataclass(frozen=True)
class Wait:
    """One stretch of waiting of a key.

    Attributes:
        reason: what it waited for.
        start, end: from when to when; `end` is that of the trace if it was not over by then.
        detail: for a flight the id of the snapshot it had been begun for, else empty.
    """

    reason: WaitReason
    start: float
    end: float
    detail: str = ""


@dataclass(frozen=True)
class SourceRefusal:
    """That a source brought nothing for a key, and why.

    Attributes:
        source: its name.
        at: when that was known.
        status: ``failure``, ``stale``, ``circuit_open``, ``invalid_timestamp`` or ``absent``.
        error_type, message: what it failed with.
    """

    source: str
    at: float
    status: str
    error_type: str
    message: str


@dataclass(frozen=True)
class Foundation:
    """One revision that a derived value was made from.

    Attributes:
        key: what it is a value of.
        version, source: which one, and where it came from.
        observed_at: when it held true, in wall-clock seconds since the epoch.
    """

    key: ResourceKey
    version: str
    source: str
    observed_at: float


@dataclass(frozen=True)
class KeyTrace:
    """How one key was obtained.

    Attributes:
        key: the key.
        obtained: how its value was come by.
        start, end: from when it was looked for to when the unit of work had it.
        requested: whether it was asked for; else a derived value needed it.
        source: where the value came from; None if there is none.
        version: of the value; None if there is none.
        joined: the id of the snapshot that had begun to acquire it; None if this one did, or
            nobody had to.
        waits: what it waited for beside calls, in order.
        calls: the calls that carried it, as indexes of `Trace.calls`.
        refusals: the sources that were tried in vain.
        rests_on: what a derived value was made from.
        refresh: ``scheduled`` if it set off a refresh, ``under_way`` if one was, else None.
        error_type, error: why it has no value, or what a fallback stands in for; None if neither.
        omitted_inputs: how many more it was made from than there is room for.
    """

    key: ResourceKey
    obtained: Obtained
    start: float
    end: float
    requested: bool = True
    source: str | None = None
    version: str | None = None
    joined: str | None = None
    waits: tuple[Wait, ...] = ()
    calls: tuple[int, ...] = ()
    refusals: tuple[SourceRefusal, ...] = ()
    rests_on: tuple[Foundation, ...] = ()
    refresh: str | None = None
    error_type: str | None = None
    error: str | None = None
    omitted_inputs: int = 0


@dataclass(frozen=True)
class AttemptTrace:
    """One attempt of a call.

    Attributes:
        number: 1 for the first.
        start: when it asked for capacity (and before that, for copies of its inputs).
        called: when the source was called; None if it never was.
        end: when its outcome was known.
        outcome: ``success``, ``failure``, ``timeout``, ``deadline``, ``abandoned`` or
            ``under_way``.
        holders: who held the capacity that it waited for, by name of source, with the number of
            slots.
        error_type, error: what it failed with, or None.
        pause_seconds: how long the call then rested before the next attempt; None if it was the
            last.
    """

    number: int
    start: float
    called: float | None
    end: float
    outcome: str
    holders: tuple[tuple[str, int], ...] = ()
    error_type: str | None = None
    error: str | None = None
    pause_seconds: float | None = None


@dataclass(frozen=True)
class CallTrace:
    """One call of a source, for one key or a batch of them.

    Attributes:
        source: its name.
        kind: ``single``, ``batch`` or ``derived``.
        snapshot_id: of the unit of work that made it, which may be another one.
        keys: how many keys it was made for.
        start: when it was made; its first attempt may begin later.
        end: when its last key was settled.
        outcome: that of its last attempt, or ``circuit_open``.
        attempts: its attempts in order, of very many the first and the latest; none if it was never
            let through.
        error_type, error: what it failed with, or None.
    """

    source: str
    kind: str
    snapshot_id: str
    keys: int
    start: float
    end: float
    outcome: str
    attempts: tuple[AttemptTrace, ...] = ()
    error_type: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class StageTrace:
    """One stage of a unit of work, such as a ``resolve`` of a session.

    Attributes:
        name: ``build``, ``resolve``, ``revalidate`` or ``refresh``; ``delivery`` for the copies
            that the reader gets.
        start, end: from when to when.
        keys: how many keys it was for.
    """

    name: str
    start: float
    end: float
    keys: int


@dataclass(frozen=True, repr=False)
class Trace:
    """What one unit of work did.

    Attributes:
        snapshot_id: the id of its snapshot.
        kind: ``build``, ``session`` or ``refresh``.
        parent_snapshot_id: the snapshot that set off a refresh, else None.
        started_at: when it began, in wall-clock seconds since the epoch.
        duration_seconds: how long it had taken when the trace was made.
        stages: in order.
        keys: how each was obtained, in the order in which they were looked for.
        calls: the calls that its keys took part in.
        omitted_keys, omitted_stages: how many more there were than a trace has room for.
    """

    snapshot_id: str
    kind: str
    parent_snapshot_id: str | None
    started_at: float
    duration_seconds: float
    stages: tuple[StageTrace, ...] = ()
    keys: Mapping[ResourceKey, KeyTrace] = field(default_factory=FrozenDict)
    calls: tuple[CallTrace, ...] = ()
    omitted_keys: int = 0
    omitted_stages: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", frozen(self.keys))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Have the records made when somebody looks at one: few traces are ever read."""
            facts = vars(self)
            if name in _RECORDS and (records := facts.get("_records")) is not None:
                facts.update(records())
                facts.pop("_records", None)
            if name not in facts:
                raise AttributeError(f"a trace has no attribute {name!r}", name=name, obj=self)
            return facts[name]

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def __repr__(self) -> str:
        return (
            f"Trace({self.kind} {self.snapshot_id}, {self.duration_seconds * 1000:.3f} ms, "
            f"keys={len(self.keys)}, calls={len(self.calls)})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as JSON-safe data.

        ``keys`` is keyed by their canonical texts, in order; see the reference of data.
        """
        return {
            **_SCHEMA,
            **json_safe(replace(self, keys={})),
            "started_at": utc_text(self.started_at),
            "keys": {key.canonical: _key_data(found) for key, found in self.keys.items()},
        }

    def to_text(self, *, width: int = 100, limit: int = 24, ascii_only: bool = False) -> str:
        """Return the trace as a waterfall for a terminal.

        Stages, calls and keys come in the order of time. Where there are more than ``limit`` of
        one kind, those that tell the same story share a row; if that is not enough, what failed,
        stood in, or took longest is shown, and the rest counted.

        Args:
            width: how many cells a line may have, at least 40.
            limit: how many rows there may be of stages, of calls, and of keys.
            ascii_only: whether bars are drawn, and names escaped, in plain ASCII.

        Raises:
            TypeError, ValueError: for a width below 40 or a limit below 1.
        """
        return Text(width, ascii_only=ascii_only).drawn(_pictured(self, limit))

    def to_svg(self, *, limit: int = 60) -> str:
        """Return the trace as a picture, light or dark as its reader prefers.

        It stands alone or within a page, and needs neither a network nor a script; ``limit`` is as
        in ``to_text``.
        """
        return svg(_pictured(self, limit))

    def to_html(self, *, limit: int = 200) -> str:
        """Return the trace as a page of its own, on which every call and key opens to sentences.

        It needs neither a network nor a script; ``limit`` is as in ``to_text``.
        """
        return html(_pictured(self, limit))

    def to_chrome(self) -> dict[str, Any]:
        """Return the trace in the Trace Event Format, which Perfetto and ``chrome://tracing`` open.

        Write it to a file with ``json.dump``. Arrows lead from each key to the calls that served
        it. Times are microseconds since the earliest event.
        """
        return _Events(self).written()

    def explain(self, key: ResourceKey) -> str:
        """Return in sentences how ``key`` was obtained, and what it waited for.

        Raises:
            KeyError: if the trace has nothing on it.
        """
        if key not in self.keys:
            more = f"; there was no room for {many(self.omitted_keys, 'key')}"
            raise KeyError(f"{key.display} is not in this trace{more if self.omitted_keys else ''}")
        return " ".join(_told(self, self.keys[key]))

    @cached_property
    def _resting_on(self) -> Mapping[ResourceKey, Sequence[KeyTrace]]:
        """By key the values that were made from it, in order."""
        found: dict[ResourceKey, list[KeyTrace]] = {}
        for value in self.keys.values():
            for below in value.rests_on:
                found.setdefault(below.key, []).append(value)
        return found


_FACTS = ("snapshot_id", "kind", "parent_snapshot_id", "started_at", "duration_seconds")
_RECORDS = ("stages", "keys", "calls", "omitted_keys", "omitted_stages")
for _default in ("stages", "calls", "omitted_keys", "omitted_stages"):
    delattr(Trace, _default)  # it would hide what is not made yet


def pending_trace(records: Callable[[], dict[str, Any]], *facts: Any) -> Trace:
    """Return a trace with these first facts, whose ``records`` are made when one is looked at."""
    return filled(Trace, {**dict(zip(_FACTS, facts, strict=True)), "_records": records})


def _key_data(found: KeyTrace) -> dict[str, Any]:
    told = json_safe(replace(found, rests_on=()))
    below = [_foundation_data(each).copy() for each in found.rests_on]
    return {**told, **_name_data(found.key), "rests_on": below}


@lru_cache(maxsize=4_096)  # many keys rest on one
def _foundation_data(each: Foundation) -> dict[str, Any]:
    facts = {"version": each.version, "source": each.source}
    return {**_name_data(each.key), **facts, "observed_at": utc_text(each.observed_at)}


def _name_data(key: ResourceKey) -> dict[str, Any]:
    return {"key": key.canonical, "resource": key.display}


# How times and numbers are written ---------------------------------------------------------------


def duration(seconds: float) -> str:
    """Return a length of time in words that suit it: ``0.412 ms``, ``42.1 ms``, ``1.25 s``."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 0.000_999_5:
        return f"{seconds * 1000:.3f} ms" if seconds >= 0.000_000_5 else "0 ms"
    if seconds < 0.999_95:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 99.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    for unit, size, smaller, part in _LONG:
        if seconds < 100 * size or (unit == "d" and seconds < 1e10):
            count, rest = divmod(round(seconds / part), size // part)
            return f"{count} {unit} {rest} {smaller}" if rest else f"{count} {unit}"
    return f"{seconds:.3g} s"


_LONG = (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600))


def many(count: int, noun: str) -> str:
    """Return ``1 key``, ``2 keys``, ``1,000 keys``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


# In words ----------------------------------------------------------------------------------------

_OUTCOMES = {
    Obtained.CACHE: ("was fresh in the cache", "from the cache"),
    Obtained.NEAR_CACHE: ("was fresh in the near cache", "from the near cache"),
    Obtained.STALE: ("was stale in the cache, and served while it is refreshed", "stale"),
    Obtained.PINNED: ("had been read by an earlier stage", "pinned"),
    Obtained.FETCHED: ("was fetched", "fetched"),
    Obtained.DERIVED: ("was derived", "derived"),
    Obtained.PUBLISHED: ("was published while it was being acquired", "published"),
    Obtained.FALLBACK: ("is a stale value that stands in", "stale, standing in"),
    Obtained.FAILED: ("has no value", "failed"),
}
"""Of each way, what a sentence and what a picture says."""

_AT_ONCE = (Obtained.CACHE, Obtained.NEAR_CACHE, Obtained.STALE, Obtained.PINNED)

_ENDINGS = {
    "success": "succeeded in",
    "failure": "failed after",
    "timeout": "timed out after",
    "deadline": "was ended by the deadline after",
    "abandoned": "was given up after",
    "under_way": "was still under way after",
}

_SAID_NONE = "said that there is none"
_REFUSALS = {
    "failure": "{} brought nothing",
    "stale": "what {} brought was stale already",
    "circuit_open": "the circuit of {} was open, so it was not asked",
    "invalid_timestamp": "{} dated its value in the future",
    "absent": f"{{}} {_SAID_NONE}",
}

_WAITS = {
    WaitReason.CACHE: "for the cache to answer",
    WaitReason.DEPENDENCIES: "for what it is derived from",
    WaitReason.PUBLICATION: "for the end of a publication of it",
    WaitReason.STORE: "to be stored in the cache",
}

_REFRESHES = {
    "scheduled": "It set off a refresh in the background.",
    "under_way": "A refresh of it was under way already.",
}

_NO_SOURCE, _EXISTS_NOT = "no source had one", "it does not exist"

_LISTED = 5
"""How many inputs, attempts or steps a sentence names before it counts the rest."""

_NOTICED = 0.001
"""From how many seconds on it is told that a call was not made at once, if nobody held it up."""


def _named(source: str | None) -> str:
    return f"'{readable(source or '')}'"


def _why(error_type: str | None, error: str | None) -> str:
    """Return an error as ``Type: message``, empty if there is none."""
    parts = (error_type and readable(error_type), error and errors.folded_message(error))
    return ": ".join(part for part in parts if part)


def _ended(*parts: str) -> str:
    """Return the parts that are not empty, with colons between, as a sentence begun as it is."""
    text = ": ".join(part for part in parts if part)
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _sentence(*parts: str) -> str:
    text = _ended(*parts)
    return text[:1].upper() + text[1:]


def _listed(parts: Sequence[str], between: str = ", ", more: int = 0) -> str:
    """Return the parts in a row; of many the last, and of the rest (and ``more``) how many."""
    if len(parts) <= _LISTED:
        return between.join(parts)
    rest = f"({len(parts) - _LISTED + more:,} more)"
    return between.join([*parts[: _LISTED - 1], rest, parts[-1]])


def _told(trace: Trace, found: KeyTrace) -> Iterator[str]:
    yield _told_outcome(trace, found)
    if not found.requested:
        users = [each.key.display for each in trace._resting_on.get(found.key, ())]
        named = _listed(users) or "something derived"
        by = f"{named} need it" if len(users) > 1 else f"{named} needs it"
        yield _sentence("It was not asked for", by)
    if found.obtained is Obtained.FALLBACK:
        yield _sentence("It stands in for what failed", _told_error(found))
    if _missed(trace, found):
        yield "The cache had nothing fresh."
    yield from _told_waits(found)
    yield from _told_tries(trace, found)
    if found.rests_on:
        yield from _told_foundations(trace, found)
    if found.refresh is not None:
        yield _REFRESHES[found.refresh]


def _missed(trace: Trace, found: KeyTrace) -> bool:
    """Whether it is certain that the cache was looked into, for this key and by this work."""
    forced = trace.kind == "refresh" or any(stage.name == "revalidate" for stage in trace.stages)
    tried = found.joined is None and bool(found.calls or found.refusals)
    return tried and not forced and found.obtained not in (*_AT_ONCE, Obtained.FALLBACK)


def _told_outcome(trace: Trace, found: KeyTrace) -> str:
    lead = f"{found.key.display} {_OUTCOMES[found.obtained][0]}"
    facts = [] if found.version is None else [f"version {readable(found.version)}"]
    if found.source is not None:
        if found.obtained in (Obtained.FETCHED, Obtained.DERIVED):
            by = "from" if found.obtained is Obtained.FETCHED else "by"
            lead += f" {by} {_named(found.source)}"
        else:
            facts.insert(0, f"from {_named(found.source)}")
    lead += f" ({', '.join(facts)})" if facts else ""
    failed = found.obtained is Obtained.FAILED
    known = ", as was known" if failed else ","
    lead += f"{known} {duration(found.end)} after the {readable(trace.kind)} began"
    return _ended(lead, _told_error(found) if failed else "")


def _told_error(found: KeyTrace) -> str:
    if found.refusals and found.error_type == errors.ResourceResolutionError.__name__:
        return _NO_SOURCE  # why is told of each
    if found.refusals and _absent(found):
        return _EXISTS_NOT
    remembered = _absent(found) and found.joined is None and not found.calls
    why = _why(found.error_type, found.error)
    return f"it was remembered not to exist: {why}" if remembered else why


def _absent(found: KeyTrace) -> bool:
    return found.error_type == errors.ResourceAbsentError.__name__


def _told_waits(found: KeyTrace) -> Iterator[str]:
    spent: dict[tuple[WaitReason, str], float] = {}
    for wait in found.waits:
        which = wait.reason, wait.detail
        spent[which] = spent.get(which, 0.0) + wait.end - wait.start
    if found.joined is not None and (WaitReason.FLIGHT, found.joined) not in spent:
        yield _sentence(f"Snapshot {_named(found.joined)} had begun to acquire it")
    for (reason, detail), seconds in spent.items():
        if reason is WaitReason.FLIGHT:
            whose = f"snapshot {_named(detail)}" if detail else "another unit of work"
            waited = f"it waited {duration(seconds)} for that"
            yield _sentence(f"{whose} had begun to acquire it; {waited}")
        else:
            who = "it" if found.joined is None else "the acquisition"
            yield _sentence(f"{who} waited {duration(seconds)} {_WAITS[reason]}")


def _told_tries(trace: Trace, found: KeyTrace) -> list[str]:
    """Return what was tried, call by call and source by source, in order."""
    calls = [trace.calls[index] for index in found.calls]
    spoken = {call.source for call in calls if call.outcome not in ("success", "under_way")}
    told = [(call.start, _told_call(trace, call)) for call in calls]
    for refusal in found.refusals:
        if refusal.source not in spoken or refusal.status not in ("failure", "circuit_open"):
            said = _REFUSALS.get(refusal.status, _REFUSALS["failure"])
            why = _why(refusal.error_type, refusal.message)
            told.append((refusal.at, _sentence(said.format(_named(refusal.source)), why)))
    return [sentence for _, sentence in sorted(told, key=lambda each: each[0])]


def _told_call(trace: Trace, call: CallTrace) -> str:
    source, why = _named(call.source), _why(call.error_type, call.error)
    if call.outcome == "circuit_open":
        return _sentence(f"the circuit of {source} was open, so it was not called", why)
    if not call.attempts:
        return _sentence(f"{source} was not reached", why)
    lead = f"the call of {source}"
    if call.snapshot_id != trace.snapshot_id:
        lead += f" by snapshot {_named(call.snapshot_id)}"
    if call.kind == "batch":
        lead += f" for {many(call.keys, 'key')}"
    if len(call.attempts) == 1:
        return _sentence(f"{lead} {_told_attempt(call.attempts[0])}")
    attempts: list[str] = []
    count, later = call.attempts[-1].number, ""
    for attempt in call.attempts:
        attempts.append(f"attempt {attempt.number}{later} {_told_attempt(attempt)}")
        pause = attempt.pause_seconds
        later = "" if pause is None else f", {duration(pause)} later,"
    listed = _listed(attempts, "; ", more=count - len(attempts))
    return _sentence(f"{lead} took {many(count, 'attempt')}", listed)


def _told_attempt(attempt: AttemptTrace) -> str:
    held = [f"{_named(source)} ({slots})" for source, slots in attempt.holders]
    by = f" held by {_listed(held)}" if held else ""
    why = _why(attempt.error_type, attempt.error)
    because = f" ({why})" if why else ""
    if attempt.called is None:
        spent = duration(attempt.end - attempt.start)
        return f"never reached it in {spent} of waiting for capacity{by}{because}"
    ending = _ENDINGS.get(attempt.outcome, f"ended as {readable(attempt.outcome)} after")
    text = f"{ending} {duration(attempt.end - attempt.called)}{because}"
    waited = attempt.called - attempt.start
    if held:
        return f"waited {duration(waited)} for capacity{by} and {text}"
    return text if waited < _NOTICED else f"was made {duration(waited)} later and {text}"


def _told_foundations(trace: Trace, found: KeyTrace) -> Iterator[str]:
    below = sorted(found.rests_on, key=lambda each: each.observed_at)
    values = []
    for each in below:
        ago = each.observed_at - trace.started_at
        when = f"{duration(abs(ago))} {'before' if ago < 0 else 'after'} the {readable(trace.kind)}"
        source = _named(each.source)
        values.append(f"{each.key.display} from {source} (observed {when} began)")
    first = ", the oldest first" if len(below) > 1 else ""
    count, listed = len(below) + found.omitted_inputs, _listed(values, "; ", found.omitted_inputs)
    yield _sentence(f"It rests on {many(count, 'value')}{first}", listed)
    path = critical_path(trace, found.key)
    if len(path) > 1:
        steps = [f"{key.display} after {duration(trace.keys[key].end)}" for key in path]
        yield _sentence("The critical path", _listed(steps))


def critical_path(trace: Trace, key: ResourceKey) -> list[ResourceKey]:
    """Return which keys held up ``key``, if it was derived, from the first to itself.

    Each is the input of the next that was there last, as long as that one was waiting by then.
    """
    path, seen = [key], {key}
    while True:
        found = trace.keys[path[-1]]
        below = found.rests_on if found.obtained is Obtained.DERIVED else ()
        inputs = [trace.keys[each.key] for each in below if each.key in trace.keys]
        late = [each for each in inputs if found.start < each.end and each.key not in seen]
        if not late:
            return path[::-1]
        path.append(max(late, key=lambda each: each.end).key)
        seen.add(path[-1])


def told_value(value: SnapshotValue[Any]) -> str:
    """Return in sentences what a value itself tells of how it was come by."""
    where = "was in the cache" if value.from_cache else "was acquired"
    origin = f"from {_named(value.source)}, version {readable(value.version)}"
    calls, took = many(value.attempts, "attempt"), duration(value.latency_ms / 1000)
    brought = f"Its source took {calls} and {took}." if value.attempts else "It was published."
    sentences = [f"{value.key.display} {where} ({origin}).", brought]
    facts = value.metadata
    if "fallback_error" in facts:
        why = _why(str(facts.get("fallback_error_type")), str(facts["fallback_error"]))
        sentences.append(_sentence("It stands in for what failed", why))
    if facts.get("coalesced_request"):
        sentences.append("It was being acquired for another unit of work already.")
    if value.refresh is not RefreshState.NONE:
        sentences.append(_REFRESHES["scheduled" if facts["refresh_scheduled"] else "under_way"])
    if value.dependency_versions:
        below = [key.display for key in value.dependency_versions]
        sentences.append(_sentence(f"It rests on {many(len(below), 'value')}", _listed(below)))
    return " ".join([*sentences, told_state(value)])


def told_state(value: SnapshotValue[Any]) -> str:
    """Return in sentences how old a value was when it was delivered, and what is stale of it."""
    age = f"It was observed {duration(value.age_seconds)} before it was delivered"
    culprit = value.stale_key
    if value.stale:
        inherited = culprit is not None and value.inherits_freshness
        because = f"{culprit.display} below it is" if culprit and inherited else "that is too long"
        age += f" and is stale, as {because}"
    sentences = [_ended(age)]
    if culprit is not None and not value.stale:
        sentences.append(f"{culprit.display}, which it rests on, is stale.")
    if value.oldest_key != value.key:
        sentences.append(f"The oldest of what it rests on is {value.oldest_key.display}.")
    if value.refresh is RefreshState.FAILING:
        facts = value.metadata
        why = _why(str(facts["refresh_error_type"]), str(facts.get("refresh_error")))
        sentences.append(_sentence("The last refresh of it has failed", why))
    return " ".join(sentences)


def told_error(key: ResourceKey, error: BaseException) -> str:
    """Return in sentences what an error itself tells of why ``key`` has no value."""
    failures = error.failures if isinstance(error, errors.ResourceResolutionError) else ()
    if not failures:
        why = _why(errors.type_name(error), errors.message_of(error))
        return _ended(f"{key.display} has no value", why)
    absent = isinstance(error, errors.ResourceAbsentError)
    sentences = [f"{key.display} has no value, as {_EXISTS_NOT if absent else _NO_SOURCE}."]
    for each in failures:
        how = f"failed in {many(each.attempts, 'attempt')}" if each.attempts else "was not called"
        how = _SAID_NONE if each.error_type == errors.ResourceAbsent.__name__ else how
        why = _why(each.error_type, each.message)
        sentences.append(_ended(f"{_named(each.source)} {how}", why))
    return " ".join(sentences)


# As a picture ------------------------------------------------------------------------------------

_SEVERITY = {Obtained.FAILED: 3, Obtained.FALLBACK: 2, Obtained.STALE: 1}


def _pictured(trace: Trace, limit: int) -> Waterfall:
    keys = [_key_row(trace, found) for found in trace.keys.values()]
    sections = (
        Section("Stages", [_stage_row(stage) for stage in trace.stages], trace.omitted_stages),
        Section("Calls", [_call_row(trace, call) for call in trace.calls]),
        Section("Keys", keys, trace.omitted_keys),
    )
    integer("limit", limit, minimum=1)
    shown = [each.fitting(limit) for each in sections if each.rows or each.omitted]
    title = f"{readable(trace.kind)} {readable(trace.snapshot_id)}"
    return Waterfall(title, [*_facts(trace)], trace.duration_seconds, shown)


def _facts(trace: Trace) -> Iterator[str]:
    yield duration(trace.duration_seconds)
    began = utc_text(trace.started_at)
    if began is not None:
        yield f"began {began[:23].replace('T', ' ')} UTC"
    if trace.parent_snapshot_id is not None:
        yield f"set off by {readable(trace.parent_snapshot_id)}"
    yield many(len(trace.keys) + trace.omitted_keys, "key")
    for way, count in Counter(map(_way, trace.keys.values())).most_common():
        yield f"{count:,} {way}"
    yield many(len(trace.calls), "call")
    last = max(trace.keys.values(), key=lambda found: found.end, default=None)
    path = critical_path(trace, last.key) if last else []
    if len(path) > 1:
        yield f"critical path: {_listed([key.display for key in path])}"


def _way(found: KeyTrace) -> str:
    failed = found.obtained is Obtained.FAILED
    return "absent" if failed and _absent(found) else _OUTCOMES[found.obtained][1]


def _stage_row(stage: StageTrace) -> Row:
    bars = (Bar("span", stage.start, stage.end),)
    label = readable(stage.name)
    return Row(label, many(stage.keys, "key"), stage.start, stage.end, bars, alike=label)


def _call_row(trace: Trace, call: CallTrace) -> Row:
    notes = [many(call.keys, "key")] if call.kind == "batch" else []
    if len(call.attempts) > 1:
        notes.append(many(call.attempts[-1].number, "attempt"))
    if call.outcome != "success":
        notes.append(readable(call.error_type or call.outcome))
    if call.snapshot_id != trace.snapshot_id:
        notes.append(f"for {readable(call.snapshot_id)}")
    return Row(
        readable(call.source),
        ", ".join(notes),
        call.start,
        call.end,
        (Bar("span", call.start, call.end), *_bars(call)),
        alike=(call.source, call.kind, call.outcome, call.error_type, len(call.attempts)),
        severity=0 if call.outcome == "success" else 2,
        details=lambda: [_told_call(trace, call)],
    )


def _bars(call: CallTrace) -> Iterator[Bar]:
    for kind, start, end, attempt in _stretches(call):
        if kind == "call" and attempt.outcome not in ("success", "under_way"):
            kind = "failed"
        yield Bar(kind, start, end)


def _stretches(call: CallTrace) -> Iterator[tuple[str, float, float, AttemptTrace]]:
    """Yield what the attempts of a call consist of: waits, calls and pauses, from when to when."""
    for attempt in call.attempts:
        called = attempt.end if attempt.called is None else attempt.called
        if called > attempt.start:
            yield "capacity", attempt.start, called, attempt
        if attempt.called is not None:
            yield "call", called, attempt.end, attempt
        if attempt.pause_seconds is not None:
            yield "pause", attempt.end, attempt.end + attempt.pause_seconds, attempt


def _key_row(trace: Trace, found: KeyTrace) -> Row:
    note = _way(found)
    if found.error_type is not None and not _absent(found):
        # What the last source failed with tells most.
        last = found.refusals[-1].error_type if found.refusals else found.error_type
        note = f"{note}: {readable(last)}"
    elif found.source is not None:
        note = f"{note}, {readable(found.source)}"
    calls = [trace.calls[index] for index in found.calls if found.joined is None]
    at_once = not (found.waits or calls) and found.obtained in _AT_ONCE
    bars = [
        Bar("at_once" if at_once else "span", found.start, found.end),
        *(Bar(wait.reason.value, wait.start, wait.end) for wait in found.waits),
        *(bar for call in calls for bar in _bars(call)),
    ]
    return Row(
        found.key.display,
        note,
        found.start,
        found.end,
        tuple(
            Bar(kind, max(start, found.start), min(end, found.end))
            for kind, start, end in bars
            if start <= found.end and end >= found.start
        ),
        alike=(found.key.namespace, found.key.name, note, found.joined is None, found.requested),
        severity=1 if _absent(found) else _SEVERITY.get(found.obtained, 0),
        details=lambda: _told(trace, found),
    )


# Rows of bars over one span of time --------------------------------------------------------------


class Look(NamedTuple):
    """How bars of one kind look.

    Attributes:
        legend: what they stand for.
        glyph, ascii: what a cell of text is filled with.
        light, dark: their colours; each has a contrast of 3 to its background at the least.
        high: how high they are, in pixels.
        dash: the lengths of their dashes and gaps, in pixels; solid without.
    """

    legend: str
    glyph: str
    ascii: str
    light: str
    dark: str
    high: int = 5
    dash: str = ""


LOOKS = {
    "span": Look("under way", "─", "-", "#7b8895", "#6f7f8f", 2),
    "at_once": Look("there at once", "◆", "*", "#0f766e", "#45cfc0", 14),
    "call": Look("call", "█", "#", "#1f6feb", "#58a6ff", 14),
    "failed": Look("call that failed", "✕", "x", "#c2410c", "#ff8a5c", 14),
    "capacity": Look("wait for capacity", "░", ".", "#a16207", "#e3b341"),
    "pause": Look("pause before a retry", "·", ",", "#7b8895", "#8494a3", 3, "2 3"),
    "flight": Look("wait for another's flight", "═", "~", "#7c3aed", "#b79cff"),
    "dependencies": Look("wait for dependencies", "╌", "=", "#64748b", "#94a3b8", 3, "7 3"),
    "cache": Look("wait for the cache", "▪", "c", "#0f766e", "#45cfc0"),
    "publication": Look("wait for a publication", "▫", "p", "#be185d", "#f472b6"),
    "store": Look("wait to be stored", "▿", "s", "#0e7490", "#4cc9e8"),
}


class Bar(NamedTuple):
    """One stretch of time, of one of the kinds in `LOOKS`, in seconds."""

    kind: str
    start: float
    end: float


class Row(NamedTuple):
    """One line of a picture.

    Attributes:
        label: what it is about.
        note: how it ended, in a few words.
        start, end: from when to when.
        bars: what happened meanwhile; later ones cover earlier ones.
        alike: what it shares with rows that may be told as one.
        severity: how much it deserves to be seen, before its duration counts.
        details: makes the sentences that tell more; None if there are none.
        number: how many it stands for.
    """

    label: str
    note: str
    start: float
    end: float
    bars: tuple[Bar, ...]
    alike: Hashable = None
    severity: int = 0
    details: Callable[[], Iterable[str]] | None = None
    number: int = 1

    @property
    def others(self) -> str:
        """What is said of those that it stands for besides."""
        return f" and {self.number - 1:,} alike" if self.number > 1 else ""

    @property
    def interest(self) -> tuple[int, float]:
        """What rows are chosen by when there are too many."""
        return self.severity, self.end - self.start


class Section(NamedTuple):
    """Rows under one heading.

    Attributes:
        heading: what they are.
        rows: those that are shown.
        omitted: how many more there would have been.
        rest: what is said of those that are not shown.
    """

    heading: str
    rows: Sequence[Row]
    omitted: int = 0
    rest: str = ""

    def fitting(self, limit: int) -> Section:
        """Return it with at most ``limit`` rows, in the order of time.

        Only if there are more are those put together that tell the same story; if these are still
        too many, the worst and then the slowest are kept.
        """
        rows = list(self.rows)
        if len(rows) > limit:
            groups: dict[Hashable, list[Row]] = {}
            for row in rows:
                groups.setdefault(row.alike, []).append(row)
            rows = [_together(group) for group in groups.values()]
            rows = sorted(rows, key=lambda row: row.interest, reverse=True)[:limit]
        left = len(self.rows) - sum(row.number for row in rows)
        told = [f"and {left:,} more, faster and with less to tell"] if left else []
        if self.omitted:
            told.append(f"{self.omitted:,} that there was no room to note")
        rows.sort(key=lambda row: (row.start, row.end))
        return self._replace(rows=rows, rest="; ".join(told))


class Waterfall(NamedTuple):
    """What can be shown as text, SVG or HTML; each fact is a few words."""

    title: str
    facts: Sequence[str]
    seconds: float
    sections: Sequence[Section]

    @property
    def legend(self) -> list[tuple[str, Look]]:
        """The kinds of bars that can be seen."""
        seen = {bar.kind for each in self.sections for row in each.rows for bar in row.bars}
        return [(kind, look) for kind, look in LOOKS.items() if kind in seen]


def _together(group: Sequence[Row]) -> Row:
    slowest = max(group, key=lambda row: row.interest)
    if len(group) == 1:
        return slowest
    start, end = min(row.start for row in group), max(row.end for row in group)
    told = slowest.alike, slowest.severity, slowest.details
    bars = (Bar("span", start, end), *slowest.bars)
    return Row(slowest.label, slowest.note, start, end, bars, *told, number=len(group))


def _share(seconds: float, whole: float) -> float:
    """Return which part of the whole a time is, from 0 to 1."""
    return min(max(seconds / whole, 0.0), 1.0) if whole > 0 else 0.0


# As text -----------------------------------------------------------------------------------------

_ZERO_WIDTH = {"Mn", "Me", "Cf"}


def _cells(character: str) -> int:
    if unicodedata.category(character) in _ZERO_WIDTH:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _size(text: str) -> int:
    """Return how many cells of a terminal ``text`` takes."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def _fitted(text: str, room: int, ending: str = "…") -> str:
    """Return ``text``, cut if it takes more cells than there are."""
    if _size(text) <= room:
        return text
    kept = sum(cells <= room - len(ending) for cells in accumulate(map(_cells, text)))
    return (text[:kept] + ending)[: max(room, 0)]


class Text:
    """Draws with characters, into lines of at most ``width`` cells of a terminal."""

    def __init__(self, width: int, *, ascii_only: bool) -> None:
        self._width = integer("width", width, minimum=40)
        self._ascii = ascii_only

    def drawn(self, picture: Waterfall) -> str:
        """Return the lines of a whole picture, as one text."""
        rows = [row for section in picture.sections for row in section.rows]
        names = [self._plain(row.label) + row.others for row in rows]
        label = min(max(map(_size, names), default=0) + 2, self._width * 2 // 5)
        note = max((_size(self._plain(row.note)) for row in rows), default=0)
        note = min(note, self._width // 4) if self._width >= 72 else 0
        track = self._width - label - 1 - _TIME - (note + 2 if note else 0)
        lines = [*self.wrapped([picture.title], ""), *self.wrapped(picture.facts, " · "), ""]
        lines.append(f"{'':{label}} 0{duration(picture.seconds):>{track - 1}}")
        for section in picture.sections:
            lines.append(section.heading)
            for row in section.rows:
                name = self._fitted(f"  {row.label}", label - len(row.others)) + row.others
                name = self._fitted(name, label) + " " * (label - _size(name))
                took = f"{duration(row.end - row.start):>{_TIME}}"
                bars = self._bars(row, picture.seconds, track)
                lines.append(f"{name} {bars}{took}  {self._fitted(row.note, note)}".rstrip())
            lines += self.wrapped([section.rest] if section.rest else [], "", "  ")
        legend = [f"{self._glyph(look)} {look.legend}" for _, look in picture.legend]
        return "\n".join([*lines, "", *self.wrapped(legend, "   ")]).rstrip() + "\n"

    def _glyph(self, look: Look) -> str:
        return look.ascii if self._ascii else look.glyph

    def _bars(self, row: Row, whole: float, track: int) -> str:
        cells = [" "] * track
        for kind, start, end in row.bars:
            first = min(int(_share(start, whole) * track), track - 1)
            last = max(round(_share(end, whole) * track), first + 1)
            cells[first:last] = self._glyph(LOOKS[kind]) * (last - first)
        return "".join(cells)

    def wrapped(self, parts: Iterable[str], between: str, indent: str = "") -> list[str]:
        """Return the parts in lines, as many on each as there is room for."""
        between = between.replace("·", "-") if self._ascii else between
        lines: list[str] = []
        for part in parts:
            fitted = self._fitted(part, self._width - len(indent))
            if lines and _size(lines[-1] + between + fitted) <= self._width:
                lines[-1] += between + fitted
            else:
                lines.append(indent + fitted)
        return lines

    def _plain(self, text: str) -> str:
        return text.encode("ascii", "backslashreplace").decode() if self._ascii else text

    def _fitted(self, text: str, room: int) -> str:
        return _fitted(self._plain(text), room, "..." if self._ascii else "…")


_TIME = 11
"""How many cells a length of time takes in a row, with the room before it."""


# As SVG and HTML ---------------------------------------------------------------------------------

_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})


def _safe(text: str) -> str:
    return text.translate(_ENTITIES)


# Light and dark; text has a contrast of 4.5 to its background at the least.
_COLOURS = {
    "ground": ("#ffffff", "#0f151c"),
    "text": ("#1b2530", "#e6ebf0"),
    "quiet": ("#566373", "#9aa9b8"),
    "grid": ("#dde3e9", "#2a3541"),
    "bad": ("#b93a08", "#ff8a5c"),
}
_FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif'


def _style() -> str:
    """Return the colours, for whoever prefers light and for whoever prefers dark."""

    def rules(which: int) -> str:
        ground, text, quiet, grid, bad = (each[which] for each in _COLOURS.values())
        found = [
            f"{{background:{ground};color:{text}}}",
            f" text{{fill:{text}}}",
            f" .ground{{fill:{ground}}}",
            f" .grid{{stroke:{grid}}}",
            f" .quiet{{fill:{quiet};color:{quiet}}}",
            f" .bad{{fill:{bad};color:{bad}}}",
            f" .cross{{fill:{ground}}}",
        ]
        for kind, look in LOOKS.items():
            paint = "stroke" if look.dash else "fill"
            found.append(f" .{kind}{{{paint}:{look[3 + which]}}}")
        return "".join(f".coalestra-trace{rule}" for rule in found)

    return f"{rules(0)}@media (prefers-color-scheme:dark){{{rules(1)}}}"


def _marks(bars: Iterable[Bar], whole: float) -> Iterator[str]:
    """Yield bars: in per cent of whatever they are put into, 20 pixels high."""
    for kind, start, end in bars:
        look = LOOKS[kind]
        left = _share(start, whole) * 100
        wide = max(_share(end, whole) * 100 - left, 0.6 if kind == "at_once" else 0.25)
        left = min(left, 100 - wide)
        title = f"<title>{look.legend}: {duration(end - start)}</title>"
        if look.dash:
            yield f'<rect class="ground" x="{left:.2f}%" y="8" width="{wide:.2f}%" height="4"/>'
            yield (
                f'<line class="{kind}" x1="{left:.2f}%" x2="{left + wide:.2f}%" y1="10" y2="10" '
                f'stroke-width="{look.high}" stroke-dasharray="{look.dash}">{title}</line>'
            )
        else:
            yield (
                f'<rect class="{kind}" x="{left:.2f}%" y="{10 - look.high / 2:g}" '
                f'width="{wide:.2f}%" height="{look.high}" rx="{look.high // 7}">{title}</rect>'
            )
        if kind == "failed" and wide > 2.5:
            middle = left + wide / 2
            yield f'<text class="cross" x="{middle:.2f}%" y="14" text-anchor="middle">✕</text>'


def _sample(kind: str) -> str:
    return "".join(_marks([Bar(kind, 0, 1)], 1))


def _tone(row: Row) -> str:
    return "bad" if row.severity > 1 else "quiet"


_LINES = "".join(
    f'<line class="grid" x1="{share}%" x2="{share}%" y1="0" y2="100%"/>'
    for share in (0, 25, 50, 75, 100)
)
"""The lines of a grid, in per cent of whatever they are put into."""


def _ticks(whole: float) -> list[tuple[int, str, str]]:
    """Return where on the axis which time stands, and how it is aligned."""
    half, all_of_it = duration(whole / 2), duration(whole)
    return [(0, "0", "start"), (50, half, "middle"), (100, all_of_it, "end")]


_LABEL, _TRACK, _TOOK, _NOTE = 290, 370, 90, 210
_WIDE = _LABEL + _TRACK + _TOOK + _NOTE
_ROW = 24


def svg(picture: Waterfall) -> str:
    """Return a picture that stands alone, or within a page."""
    parts: list[str] = []
    top = 28
    for line in Text(_WIDE // 7, ascii_only=False).wrapped(picture.facts, " · "):
        top += 20
        parts.append(f'<text class="quiet" x="16" y="{top}">{_safe(line)}</text>')
    for section in picture.sections:
        top += 30
        parts.append(f'<text class="head" x="16" y="{top}">{section.heading}</text>')
        top += 10
        parts += (
            f'<text class="quiet" x="{_LABEL + _TRACK * share // 100}" y="{top - 8}" '
            f'text-anchor="{anchor}">{text}</text>'
            for share, text, anchor in _ticks(picture.seconds)
        )
        high = _ROW * len(section.rows)
        parts.append(f'<svg x="{_LABEL}" y="{top}" width="{_TRACK}" height="{high}">{_LINES}</svg>')
        for row in section.rows:
            parts.append(_svg_row(row, picture.seconds, top))
            top += _ROW
        if section.rest:
            top += 18
            parts.append(f'<text class="quiet" x="16" y="{top}">{section.rest}</text>')
    top += 26
    for index, (kind, look) in enumerate(picture.legend):
        left, down = 16 + index % 4 * 230, top + index // 4 * 22
        parts.append(
            f'<svg x="{left}" y="{down - 14}" width="28" height="20">{_sample(kind)}</svg>'
            f'<text class="quiet" x="{left + 36}" y="{down}">{look.legend}</text>'
        )
    high = top + 20 + 22 * ((len(picture.legend) - 1) // 4)
    style = (
        f".coalestra-trace text{{font:13px {_FONT}}}.coalestra-trace .head{{font-weight:600}}"
        f".coalestra-trace .title{{font-size:16px;font-weight:600}}"
        f".coalestra-trace .cross{{font-weight:700}}{_style()}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="coalestra-trace" role="img" '
        f'viewBox="0 0 {_WIDE} {high}" width="{_WIDE}" height="{high}" style="max-width:100%">'
        f"<title>{_safe(picture.title)}</title><desc>{_safe(' · '.join(picture.facts))}</desc>"
        f"<style>{style}</style>"
        f'<rect class="ground" width="100%" height="100%" rx="8"/>'
        f'<text class="title" x="16" y="28">{_safe(_fitted(picture.title, _WIDE // 10))}</text>'
        f"{''.join(parts)}</svg>"
    )


def _svg_row(row: Row, whole: float, top: int) -> str:
    took = duration(row.end - row.start)
    name = _fitted(row.label, _LABEL // 8 - len(row.others)) + row.others
    return (
        f"<g><title>{_safe(f'{row.label}{row.others}: {took}. {row.note}')}</title>"
        f"{_svg_text(16, top, _LABEL - 26, name)}"
        f'<svg x="{_LABEL}" y="{top + 2}" width="{_TRACK}" height="20">'
        f"{''.join(_marks(row.bars, whole))}</svg>"
        f'<text x="{_LABEL + _TRACK + _TOOK - 14}" y="{top + 17}" text-anchor="end">{took}</text>'
        f"{_svg_text(_WIDE - _NOTE, top, _NOTE, _fitted(row.note, _NOTE // 8), _tone(row))}</g>"
    )


def _svg_text(left: int, top: int, wide: int, text: str, tone: str = "") -> str:
    """Return a line of text; whatever its letters, none is seen outside of its place."""
    return (
        f'<svg x="{left}" y="{top}" width="{wide}" height="{_ROW}">'
        f'<text class="{tone}" y="17">{_safe(text)}</text></svg>'
    )


_PAGE_STYLE = (
    f"body{{margin:0;font:15px/1.45 {_FONT}}}"
    ".coalestra-trace{min-height:100vh;box-sizing:border-box;"
    "padding:1.5rem max(1rem,calc(50% - 36rem))}"
    "h1{font-size:1.35rem;margin:0 0 .4rem;overflow-wrap:anywhere}"
    "h2{font-size:1rem;margin:1.6rem 0 0}"
    "ul,ol{list-style:none;margin:0;padding:0}"
    ".facts,.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}"
    ".legend{margin-top:1.4rem;font-size:.85rem}"
    ".legend li{display:flex;gap:.5rem;align-items:center}"
    ".legend svg{width:28px}"
    "svg{display:block;width:100%;height:20px;overflow:visible}"
    "svg text{font:700 13px system-ui,sans-serif}"
    ".row{display:grid;grid-template-columns:minmax(0,17rem) minmax(0,1fr) 5.5rem minmax(0,14rem);"
    "gap:0 .9rem;align-items:center;padding:.15rem .3rem;border-radius:4px}"
    ".label,.note{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;unicode-bidi:isolate}"
    ".took{text-align:right;font-variant-numeric:tabular-nums}"
    "summary{cursor:pointer;list-style:none}summary::-webkit-details-marker{display:none}"
    "summary .label::before{content:'▸';display:inline-block;width:1.1em}"
    "details[open]>summary .label::before{content:'▾'}"
    "summary:focus-visible{outline:2px solid #1f6feb;outline-offset:1px}"
    "details[open] .label{white-space:normal;overflow-wrap:anywhere}"
    "details p{margin:.4rem 0 .5rem 1.4rem;max-width:48rem;overflow-wrap:anywhere}"
    ".ticks{font-size:.8rem}.times{display:flex;justify-content:space-between}"
    "@media (max-width:46rem){.row{grid-template-columns:minmax(0,1fr) auto;gap:.1rem .8rem}"
    ".row .track{grid-column:1/-1;grid-row:2}.row .note{grid-column:1/-1;grid-row:3}"
    ".row{padding:.4rem .3rem}}"
    "@media (prefers-color-scheme:dark){summary:focus-visible{outline-color:#58a6ff}}"
    "@media (forced-colors:active){rect{forced-color-adjust:none}}"
    "@media print{.coalestra-trace{padding:0}}"
)


def html(picture: Waterfall) -> str:
    """Return a page of its own."""
    facts = "".join(f"<li>{_safe(fact)}</li>" for fact in picture.facts)
    times = "".join(f"<span>{text}</span>" for _, text, _ in _ticks(picture.seconds))
    sections = ""
    for section in picture.sections:
        shown = "".join(_html_row(row, picture.seconds) for row in section.rows)
        left = f'<p class="quiet">{section.rest}</p>' if section.rest else ""
        sections += (
            f"<section><h2>{section.heading}</h2>"
            f'<div class="row ticks quiet" aria-hidden="true"><span></span>'
            f'<span class="track times">{times}</span></div><ol>{shown}</ol>{left}</section>'
        )
    legend = "".join(
        f'<li><svg aria-hidden="true">{_sample(kind)}</svg>{look.legend}</li>'
        for kind, look in picture.legend
    )
    title = _safe(picture.title)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{_PAGE_STYLE}{_style()}</style></head>"
        f'<body><main class="coalestra-trace"><h1>{title}</h1><ul class="facts quiet">{facts}</ul>'
        f'{sections}<ul class="legend quiet" aria-label="Legend">{legend}</ul></main></body>'
        "</html>\n"
    )


def _html_row(row: Row, whole: float) -> str:
    line = (
        f'<span class="label">{_safe(row.label)}{row.others}</span> '
        f'<span class="track"><svg aria-hidden="true">{_LINES}{"".join(_marks(row.bars, whole))}'
        f'</svg></span> <span class="took">{duration(row.end - row.start)}</span> '
        f'<span class="note {_tone(row)}">{_safe(row.note)}</span>'
    )
    if row.details is None:
        return f'<li class="row">{line}</li>'
    told = "".join(f"<p>{_safe(each)}</p>" for each in row.details())
    return f'<li><details><summary class="row">{line}</summary>{told}</details></li>'


# As events of a trace file -----------------------------------------------------------------------

_Record = StageTrace | CallTrace | KeyTrace

_Part = tuple[str, float, float, Any]
"""A slice within a slice: its name, from when to when, and the record that tells more."""


class _Events:
    """The Trace Event Format: slices on threads, where one lies within another or beside it.

    The stages, each source, and the keys have as many threads of their name as have work at once.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        records: list[_Record] = [*trace.stages, *trace.calls, *trace.keys.values()]
        self._began = min((each.start for each in records), default=0.0)
        self._busy_until: dict[str, list[float]] = {}
        self._threads: dict[tuple[str, int], int] = {}
        self._events: list[dict[str, Any]] = []

    def written(self) -> dict[str, Any]:
        """Return all of them as the object that a trace file consists of."""
        trace = self._trace
        self._name("process", 0, f"{trace.kind} {trace.snapshot_id}")
        for stage in trace.stages:
            self._slice("stages", stage.name, stage, ())
        called = [self._slice(f"source {c.source}", c.source, c, _parts(c)) for c in trace.calls]
        for found in trace.keys.values():
            waits = [(wait.reason.value, wait.start, wait.end, wait) for wait in found.waits]
            thread = self._slice("keys", found.key.display, found, waits)
            for index in found.calls:
                self._arrow(thread, found, called[index], trace.calls[index])
        return {
            "traceEvents": self._events,
            "displayTimeUnit": "ms",
            "otherData": {
                **_SCHEMA,
                "snapshot_id": trace.snapshot_id,
                "started_at": utc_text(trace.started_at),
                "omitted_keys": trace.omitted_keys,
            },
        }

    def _slice(self, track: str, name: str, record: _Record, parts: Iterable[_Part]) -> int:
        """Write one slice and what lies within it; return the thread that it is on."""
        thread = self._free_thread(track, record.start, record.end)
        told = _key_data(record) if isinstance(record, KeyTrace) else json_safe(record)
        self._write("X", thread, name, record.start, record.end, args=told)
        free = record.start
        for part, start, end, inner in parts:
            start, end = max(start, free), min(end, record.end)
            if start < end:
                self._write("X", thread, part, start, end, args=json_safe(inner))
                free = end
        return thread

    def _free_thread(self, track: str, start: float, end: float) -> int:
        busy = self._busy_until.setdefault(track, [])
        lane = next((lane for lane, until in enumerate(busy) if until <= start), len(busy))
        busy[lane : lane + 1] = [end]
        if (track, lane) not in self._threads:
            thread = self._threads[track, lane] = len(self._threads) + 1
            self._name("thread", thread, track)
            order = 10_000 * list(self._busy_until).index(track) + lane
            self._write("M", thread, "thread_sort_index", args={"sort_index": order})
        return self._threads[track, lane]

    def _arrow(self, thread: int, found: KeyTrace, to: int, call: CallTrace) -> None:
        """Lead from a key to the call that carried it: from when both were there."""
        at = max(found.start, call.start)
        if at <= min(found.end, call.end):
            arrow = len(self._events)
            self._write("s", thread, "carried by", at, id=arrow)
            self._write("f", to, "carried by", at, id=arrow, bp="e")

    def _name(self, what: str, thread: int, name: str) -> None:
        self._write("M", thread, f"{what}_name", args={"name": readable(name)})

    def _write(self, phase: str, thread: int, name: str, *times: float, **more: Any) -> None:
        event: dict[str, Any] = {"name": readable(name), "ph": phase, "pid": 1, "tid": thread}
        microseconds = [round((each - self._began) * 1e6, 3) for each in times]
        if times:
            event |= {"cat": "coalestra", "ts": microseconds[0]}
        if len(times) > 1:
            event["dur"] = round(microseconds[1] - microseconds[0], 3)
        self._events.append(event | more)


def _parts(call: CallTrace) -> Iterator[_Part]:
    for kind, start, end, attempt in _stretches(call):
        if kind == "call":
            yield f"attempt {attempt.number}", start, end, attempt
        else:
            told = {"holders": attempt.holders} if kind == "capacity" else {}
            yield LOOKS[kind].legend, start, end, told
