"""Which sources may serve a key, and in which order: the chain that every key walks."""

from __future__ import annotations

import asyncio
import enum
import inspect
import math
from collections import OrderedDict
from collections.abc import Iterable
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from coalestra.core.errors import (
    DependencyCycleError,
    SourceProtocolError,
    SourceUnavailableError,
    legible,
)
from coalestra.core.health import SourceTimeoutGuarantee, inspect_source_timeout_guarantee
from coalestra.core.keys import ResourceKey
from coalestra.core.protocols import Source, is_own
from coalestra.core.snapshot import DiagnosticsRecorder
from coalestra.core.validation import (
    at_once,
    flag,
    instance,
    integer,
    number,
    plain_function,
    text,
    wrong_type,
)
from coalestra.resilience import SourceResiliencePolicy


class SourceKind(enum.Enum):
    """How a source is asked. If it could be asked in several ways, the first one here wins."""

    DERIVED = "derived"
    BATCH = "batch"
    SINGLE = "single"


_METHODS = {
    SourceKind.DERIVED: ("dependencies", "derive"),
    SourceKind.BATCH: ("fetch_many",),
    SourceKind.SINGLE: ("fetch",),
}


@dataclass(frozen=True, slots=True)
class SourceHealth:
    """How a source has fared: lately, in seconds before now, and since the builder was made.

    Attributes:
        seconds_since_success: since it last answered; None if it never did.
        seconds_since_error: since a call of it last failed, retries included; None if none did.
        last_error: the type of that error. Its text may name a resource, and is not kept.
        attempt_count: attempts that have come to an answer or an error.
        failed_attempt_count: those that have come to an error, or were cut off by a deadline.
        total_latency_ms: how long all of them took together, in milliseconds.
        deadline_cuts_in_a_row: calls that came to nothing, or answered too late, because of the
            deadlines of their readers, since the source last answered in time.
    """

    seconds_since_success: float | None
    seconds_since_error: float | None
    last_error: str | None
    attempt_count: int = 0
    failed_attempt_count: int = 0
    total_latency_ms: float = 0.0
    deadline_cuts_in_a_row: int = 0


class Link:
    """One source in the chain, with what the engine needs to know of it.

    `context` names its payloads in errors. `inherits` says that what it derives is as fresh as what
    that is derived from. `asked` is its bit among the answers that are remembered of a key;
    `served` has one more for a yes. What has been counted is told by `SourceHealth`, but that
    `succeeded_at`, `failed_at` are monotonic seconds.
    """

    __slots__ = (
        "asked", "attempts", "context", "deadline_cuts", "declared_resilience", "failed_at",
        "failed_attempts", "guarantee", "inherits", "kind", "last_error", "latency_ms", "memoized",
        "name", "protected", "served", "source", "succeeded_at",
    )  # fmt: skip

    def __init__(self, index: int, source: Any, *, memoized: bool) -> None:
        self.asked: int = 1 << 2 * index
        self.served: int = 3 << 2 * index
        self.source: Any = source
        self.name: str = text("source name", source.name)
        self.context: str = f"payload of {self.name}"
        self.kind: SourceKind = kind_of(source)
        derived = self.kind is SourceKind.DERIVED
        for method in ("supports", "dependencies") if derived else ("supports",):
            plain_function(f"{method}() of source {self.name!r}", getattr(source, method))
        self.inherits: bool = derived and getattr(source, "inherit_freshness", False)
        self.guarantee: SourceTimeoutGuarantee = inspect_source_timeout_guarantee(source)
        self.protected: bool = self.guarantee.protected
        self.memoized: bool = memoized and bool(getattr(source, "cache_supports", True))
        self.declared_resilience: Any = getattr(source, "resilience_policy", None)
        self.succeeded_at: float | None = None
        self.failed_at: float | None = None
        self.last_error: str | None = None
        self.attempts: int = 0
        self.failed_attempts: int = 0
        self.latency_ms: float = 0.0
        self.deadline_cuts: int = 0

    @property
    def timeout_seconds(self) -> float | None:
        """The longest that one call may take, in seconds, or None for no limit of its own."""
        return _seconds_of(self.source, self.name, "timeout_seconds")

    @property
    def queue_timeout_seconds(self) -> float | None:
        """The longest wait for capacity, in seconds: the source timeout unless declared."""
        timeout = _seconds_of(self.source, self.name, "queue_timeout_seconds")
        return self.timeout_seconds if timeout is None else timeout

    @property
    def max_batch_size(self) -> int | None:
        """The most keys that one batch call may carry, or None for any number."""
        return _limit_of(self.source, self.name, "max_batch_size")

    def health(self, now: float) -> SourceHealth:
        """Return how the source has fared, at `now` in monotonic seconds; to the microsecond."""
        answered = None if self.succeeded_at is None else round(now - self.succeeded_at, 6)
        failed = None if self.failed_at is None else round(now - self.failed_at, 6)
        counts = self.attempts, self.failed_attempts, round(self.latency_ms, 3), self.deadline_cuts
        return SourceHealth(answered, failed, self.last_error, *counts)

    def __repr__(self) -> str:
        return f"<Link {self.name} {self.kind.value}>"


# What a source declares may change, and so is checked whenever it is asked.


def _seconds_of(source: Any, name: str, setting: str) -> float | None:
    seconds: float | None = getattr(source, setting, None)
    if seconds is None or (type(seconds) is float and 0.0 < seconds < math.inf):
        return seconds  # without the name for a refusal
    return number(f"{setting} of source {name!r}", seconds, above=0, optional=True)


def _limit_of(source: Any, name: str, setting: str) -> int | None:
    limit: int | None = getattr(source, setting, None)
    return integer(f"{setting} of source {name!r}", limit, minimum=1, optional=True)


def kind_of(source: Any) -> SourceKind:
    """Return how a source is to be asked; `TypeError` if it cannot be asked at all."""
    for kind, methods in _METHODS.items():
        if all(is_own(getattr(source, method, None)) for method in methods):
            return kind
    raise TypeError(
        f"source {getattr(source, 'name', source)!r} offers none of fetch, fetch_many, or "
        "dependencies with derive; give it one of them"
    )


class Chains:
    """The sources by descending priority, and a bounded memory of what each supports.

    `inheriting` are the names of those whose values are as fresh as what they are derived from;
    `entries` is how many answers are remembered. Those about one key are kept as the bits of one
    number, and forgotten together.
    """

    def __init__(
        self, sources: Iterable[Source], *, memoize: bool = True, max_entries: int | None = 100_000
    ) -> None:
        ordered = sorted(_checked(sources), key=lambda source: -source.priority)
        self.links: tuple[Link, ...] = tuple(
            Link(index, source, memoized=memoize) for index, source in enumerate(ordered)
        )
        self.inheriting: frozenset[str] = frozenset(
            each.name for each in self.links if each.inherits
        )
        self._limit = math.inf if max_entries is None else max_entries
        self.entries: int = 0
        self._answers: OrderedDict[ResourceKey, int] = OrderedDict()
        self._asked = sum(link.asked for link in self.links)

    def forget(self) -> None:
        """Forget every remembered answer."""
        self._answers.clear()
        self.entries = 0

    def supports(
        self,
        link: Link,
        keys: Iterable[ResourceKey],
        record: DiagnosticsRecorder,
        variables: Context,
    ) -> list[bool | BaseException]:
        """Return for each key whether the source of `link` serves it, or what it raised.

        It is asked in a copy of the variables, so that nothing that it sets reaches anybody else.
        """
        answers, asked, served = self._answers, link.asked, link.served
        memoized, bounded, supports = link.memoized, self._limit < math.inf, link.source.supports
        copied = variables.copy
        said: list[bool | BaseException] = []
        hits = 0
        for key in keys:
            known = answers.get(key, 0) if memoized else 0
            if known & asked:
                hits += 1
                if bounded:
                    answers.move_to_end(key)
                said.append(known & served == served)
                continue
            held = len(answers)
            try:
                answer = copied().run(supports, key)
                if answer is not True and answer is not False:
                    name = f"supports() of source {link.name!r}"
                    answer = bool(at_once(name, answer, SourceProtocolError))
            except BaseException as error:
                said.append(_own(link, error))
                continue
            said.append(answer)
            if memoized:
                # Looked at anew if the source may have had answers forgotten, or more remembered.
                known = answers.pop(key, 0) if known or len(answers) != held else 0
                self.entries += not known & asked
                answers[key] = known | (served if answer else asked)
        if memoized:
            record.support_cache_hits += hits
            record.support_cache_misses += len(said) - hits
            while self.entries > self._limit:
                _, forgotten = answers.popitem(last=False)
                self.entries -= (forgotten & self._asked).bit_count()
        return said

    def __repr__(self) -> str:
        return f"<Chains {' > '.join(link.name for link in self.links)} entries={self.entries}>"


def _own(link: Link, error: BaseException) -> BaseException:
    """Return what a source raised without the frame that asked it, which has the answers."""
    error = legible(error)
    if isinstance(error, asyncio.CancelledError):
        own = SourceUnavailableError(f"source {link.name!r} cancelled itself")
        own.__cause__ = error
        return own
    traceback = error.__traceback__
    return BaseException.with_traceback(error, None if traceback is None else traceback.tb_next)


def dependencies_of(link: Link, key: ResourceKey, variables: Context) -> tuple[ResourceKey, ...]:
    """Return what a derived source needs for `key`, each once; raises what the source raises.

    Raises:
        SourceProtocolError: if that is no key.
        DependencyCycleError: if the key itself is among them.
    """
    try:
        return variables.copy().run(_declared, link, key)
    except asyncio.CancelledError as error:
        raise _own(link, error) from error


def _declared(link: Link, key: ResourceKey) -> tuple[ResourceKey, ...]:
    """Ask a source, and take what it names one by one: it may think of that only meanwhile."""
    declared = link.source.dependencies(key)
    try:
        rest = iter(declared)
    except TypeError:
        rest = iter((declared,))
    keys: dict[ResourceKey, None] = {}
    for each in rest:
        if not isinstance(each, ResourceKey):
            if inspect.iscoroutine(each):
                each.close()
            raise SourceProtocolError(
                f"dependencies() of source {link.name!r} for {key.display} must be ResourceKeys, "
                f"got {type(each).__qualname__}"
            )
        keys[each] = None
    if key in keys:  # not even from a value of it that there is
        raise DependencyCycleError((key, key))
    return tuple(keys)


def _checked(sources: Iterable[Source]) -> list[Any]:
    """Validate what every source must declare; names the source in each error."""
    found: list[Any] = list(sources)
    names: set[str] = set()
    for source in found:
        if not hasattr(source, "name"):
            remedy = "wrap a function in a callable adapter"
            raise wrong_type("each source", "an object with a name", source, remedy)
        name = text("source name", source.name)
        if name in names:
            raise ValueError(f"source names must be unique, got {name!r} twice; rename one of them")
        names.add(name)
        integer(f"priority of source {name!r}", getattr(source, "priority", None))
        if not is_own(getattr(source, "supports", None)):
            raise TypeError(f"source {name!r} has no supports(key) method; add one")
        timeout = _seconds_of(source, name, "timeout_seconds")
        _seconds_of(source, name, "queue_timeout_seconds")
        for setting in ("max_concurrency", "max_batch_size"):
            _limit_of(source, name, setting)
        flag(f"inherit_freshness of source {name!r}", getattr(source, "inherit_freshness", False))
        policy, asked = getattr(source, "resilience_policy", None), "resilience_policy of source"
        instance(f"{asked} {name!r}", policy, SourceResiliencePolicy, optional=True)
        if policy is not None and policy.finish_late and timeout is None:
            raise ValueError(
                f"a source that may finish_late must have a timeout, got None for source {name!r}; "
                "give it timeout_seconds"
            )
    return found
