"""Every exception of the library, and the records and JSON shapes that they report with.

The tree is read best from here: ``CoalestraError`` is the root; below it are the errors of
sources and single resources, those of whole snapshots, and those of running the library.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from traceback import format_list
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from coalestra.core.frozen import FrozenDict, record
from coalestra.core.keys import ResourceKey
from coalestra.core.validation import flag, integer, printable, readable, span

if TYPE_CHECKING:
    from coalestra.core.request import SnapshotAcceptanceViolation


# The root of every exception that the library raises on its own account --------------------------

E = TypeVar("E", bound="CoalestraError")


class CoalestraError(Exception):
    """Something went wrong that the library knows by name.

    Each kind keeps the facts it was made from as attributes, survives pickling with them whatever
    its constructor asks for, and can be copied: a copy has the same facts and the same cause, and
    a traceback of its own.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The inherited form calls the constructor with the message, which few of these accept.
        return _without_facts, (type(self), self.args), self.__dict__ or None

    def __copy__(self: E) -> E:
        twin = _without_facts(type(self), self.args)
        twin.__dict__.update(self.__dict__)
        if notes := self.__dict__.get("__notes__"):  # one added to a copy is that copy's alone
            twin.__dict__["__notes__"] = list(notes)
        twin.__cause__ = self.__cause__
        twin.__context__ = self.__context__
        twin.__suppress_context__ = self.__suppress_context__
        return twin


def _without_facts(kind: type[E], args: tuple[Any, ...]) -> E:
    return kind.__new__(kind, *args)


# Failures of sources as records, and the JSON shapes in which errors are reported ----------------
#
# Law: whatever a source put into a message, a report holds it as one line of bounded length.


ERROR_DIAGNOSTICS_SCHEMA = "coalestra.error-diagnostics"
"""The name of the JSON schema that every ``to_dict`` of an error follows."""

ERROR_DIAGNOSTICS_SCHEMA_VERSION = 1
"""The version of that schema; it grows when a reader of the older one would misread."""

MAX_MESSAGE_LENGTH = 300
"""How many characters of a message are shown unless the caller asks for another number."""

_CUT = "..."
_EMPTY = "<no message>"


class _Serialized(TypedDict):
    schema: str
    schema_version: int
    error_type: str
    message: str


class SerializedSourceFailure(_Serialized):
    """One source's failure as JSON."""

    source: str
    attempts: int


class SerializedResourceError(_Serialized):
    """The error of one resource as JSON; ``failures`` is empty if no source was to blame."""

    resource: str
    failures: list[SerializedSourceFailure]


class SerializedSnapshotBuildError(_Serialized):
    """The error of a whole build as JSON; the two ``partial_snapshot`` flags are always equal."""

    errors: list[SerializedResourceError]
    partial_snapshot_available: bool
    has_partial_snapshot: bool


def folded_message(message: str, max_length: int = MAX_MESSAGE_LENGTH) -> str:
    """Return ``message`` in one line of at most ``max_length`` characters.

    White space of any kind becomes single spaces, what else cannot be printed is escaped, a cut
    shows as a trailing ``...``, and an empty message says that it is empty. Every such length is an
    int of at least 1; anything else raises a `TypeError` or `ValueError`.
    """
    integer("max_message_length", max_length, minimum=1)
    words = message.split(None, max_length + 1)[: max_length + 1]  # more do not fit, however short
    line = printable(" ".join(words), max_length + 1) or _EMPTY
    if len(line) <= max_length:
        return line
    return (line[: max(0, max_length - len(_CUT))] + _CUT)[:max_length]


def _serialized(error_type: str, message: str, max_length: int) -> _Serialized:
    return {
        "schema": ERROR_DIAGNOSTICS_SCHEMA,
        "schema_version": ERROR_DIAGNOSTICS_SCHEMA_VERSION,
        "error_type": error_type,
        "message": folded_message(message, max_length),
    }


def message_of(error: BaseException) -> str:
    """Return ``str(error)``, or what went wrong with it: a foreign ``__str__`` may raise.

    What it returns may be of a class with methods of its own, and is taken as a plain string.
    """
    try:
        return str.__str__(str(error))
    except BaseException as unreadable:
        return f"<message unreadable: {type_name(unreadable)}>"


# Where an exception was raised, without the frames: these hold every payload that was in sight,
# and from Python 3.12 on lead back through all that was running, so to whoever keeps the error.

_Place = tuple[str, int, str]
_PLACES_KEPT = 20
_NOTED = "_coalestra_places"
_UNFRAMED_KEPT = 20
"""How many exceptions without frames are followed to further ones; long chains are cut before."""

# Asked past the exception's own class, which may refuse to be read or written.
_TRACEBACK: Any = BaseException.__dict__["__traceback__"]
_CAUSE: Any = BaseException.__dict__["__cause__"]
_CONTEXT: Any = BaseException.__dict__["__context__"]
_NAME: Any = type.__dict__["__name__"]


class _Reading(suppress):
    """Reads foreign classes: whatever they raise is suppressed, but what ends the program."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        return error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit))


def without_frames(error: BaseException, spared: BaseException | None = None) -> tuple[_Place, ...]:
    """Take the traceback off ``error`` and off all that it was raised from, up to ``spared``.

    Return where it was raised, as file, line and function, the innermost places last; those within
    this library are left out. Nothing that an exception refuses, as a frozen one does, is raised.
    """
    places = _note_places(error)
    spare = _UNFRAMED_KEPT
    for each in _lineage(error, spared):
        if _TRACEBACK.__get__(each) is None:
            spare -= 1  # who has lost its frames before led on to others that have
            if spare < 0:
                break
        elif each is not error:
            _note_places(each)
        _TRACEBACK.__set__(each, None)
    return places


def _lineage(
    error: BaseException, spared: BaseException | None = None, *, hidden: bool = True
) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, nearest first, though not `spared`.

    What is ``hidden`` (by ``from None``, or a cause) is left out, as Python does, unless asked for.
    """
    line, seen = [error], {id(error), id(spared)}
    for each in line:
        yield each
        cause, context = _CAUSE.__get__(each), _CONTEXT.__get__(each)
        if not hidden and (cause is not None or each.__suppress_context__):
            context = None
        raised: tuple[object, ...] = (cause, context)
        with _Reading():
            raised += tuple(getattr(each, "exceptions", ()))
        for one in raised:
            if isinstance(one, BaseException) and id(one) not in seen:
                seen.add(id(one))
                line.append(one)


def _note_places(error: BaseException) -> tuple[_Place, ...]:
    """Let an error keep where it was raised, and return that; it may fail many keys."""
    places: tuple[_Place, ...] = ()
    with _Reading():
        places = getattr(error, _NOTED, ())
        trace = _TRACEBACK.__get__(error)
        if trace is not None:
            places = tuple(deque(_places(trace), _PLACES_KEPT))
            setattr(error, _NOTED, places)
    return places


def _raised_from(error: BaseException) -> list[BaseException]:
    """Return what an error was raised from, as far as it is known where that was; nearest first."""
    found = []
    with _Reading():
        for lower in islice(_lineage(error, hidden=False), 1, _UNFRAMED_KEPT):
            found += [lower] if getattr(lower, _NOTED, ()) else []
    return found


def _place_text(place: _Place) -> str:
    file, line, function = place
    return f"raised in {function} ({file}, line {line})"


def told(error: BaseException) -> str:
    """Return an error that has lost its frames in one line: its type, its text, and its place."""
    place = [_place_text(place) for place in getattr(error, _NOTED, ())[-1:]]
    return ", ".join([_named(error), *place])


def _named(error: BaseException) -> str:
    return f"{type_name(error)}({folded_message(message_of(error))})"


def legible(error: BaseException) -> BaseException:
    """Return an error, or one in its place if its class lets nobody ask what kind it is of."""
    with _Reading():
        if not isinstance(error, _Raised):
            return error
    return RuntimeError(f"{_named(error)} cannot be read")


def type_name(error: BaseException) -> str:
    """Return the name of the type of an exception, whatever its metaclass makes of that."""
    name: str = _NAME.__get__(type(error))
    return name


def _places(trace: TracebackType | None) -> Iterator[_Place]:
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__")
        if str(module).split(".", 1)[0] != "coalestra":
            code = trace.tb_frame.f_code
            yield code.co_filename, trace.tb_lineno, code.co_name
        trace = trace.tb_next


def _as_traceback(places: tuple[_Place, ...]) -> str:
    return "".join(format_list([(*place, None) for place in places]))


class _Raised:
    """What was raised, beside the facts: it is neither compared, printed, nor serialised."""

    __slots__ = ("_exception", "_places")

    _exception: BaseException
    _places: tuple[_Place, ...]


@record
class SourceFailure(_Raised):
    """Why one source gave no value for a resource.

    Attributes:
        source: the name of the source.
        error_type: the name of the exception type, or of the rule that was broken.
        message: the text of the error, as long as it was.
        attempts: how many calls were made, retries included; 0 if none was.
    """

    source: str
    error_type: str
    message: str
    attempts: int = 1

    @classmethod
    def of(cls, source: str, error: BaseException, attempts: int = 1) -> SourceFailure:
        """Record ``error``, raised by or on behalf of ``source``; it loses its traceback."""
        failure = cls(source, type_name(error), message_of(error), attempts)
        object.__setattr__(failure, "_exception", legible(error))
        object.__setattr__(failure, "_places", without_frames(error))
        return failure

    @property
    def exception(self) -> BaseException | None:
        """The exception itself; None if there was none, or the failure comes out of a pickle."""
        return getattr(self, "_exception", None)

    @property
    def traceback(self) -> str:
        """Where the exception was raised, as a traceback says it; empty if that is not known.

        Where that was raised from which it was raised comes first.
        """
        parts, error = [_as_traceback(self.places)], self.exception
        for lower in () if error is None else _raised_from(error):
            told_of = f"{_as_traceback(getattr(lower, _NOTED))}{_named(lower)}, which led to:\n"
            parts.insert(0, told_of)
        return "".join(parts)

    @property
    def places(self) -> tuple[_Place, ...]:
        """The same as file, line and function, the innermost last."""
        return getattr(self, "_places", ())

    def __copy__(self) -> SourceFailure:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SourceFailure:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.error_type, self.message, self.attempts)

    def format(self, *, max_message_length: int = MAX_MESSAGE_LENGTH) -> str:
        """Return the failure as one line: ``source: Type(message; attempts=N)``."""
        message = folded_message(self.message, max_message_length)
        return f"{readable(self.source)}: {self.error_type}({message}; attempts={self.attempts})"

    def to_dict(self, *, max_message_length: int = MAX_MESSAGE_LENGTH) -> SerializedSourceFailure:
        """Return the failure as JSON-safe data."""
        told = _serialized(self.error_type, self.message, max_message_length)
        return {**told, "source": self.source, "attempts": self.attempts}


# Errors about sources and about single resources: what a key may fail with -----------------------

MAX_FAILURES_SHOWN = 3
"""How many failures of one resource a text names before it counts the rest."""

MAX_RESOURCES_SHOWN = 5
"""How many resources a text names before it counts the rest."""


class SourceUnavailableError(CoalestraError):
    """A source cannot answer just now; asking again may help, so it is retried.

    Sources may raise it themselves. It takes a free message.
    """


class SourceTimeoutError(SourceUnavailableError):
    """A source took, or would have taken, longer than it may."""


class SnapshotDeadlineExceededError(SourceTimeoutError):
    """The time granted to a build, session or request was over before the work was."""


class SourceQueueTimeoutError(SourceTimeoutError):
    """No slot for a source became free in time: the source itself was never asked."""


class CircuitOpenError(SourceUnavailableError):
    """A source has failed so often that it is left alone for a while; it was not asked."""


class SourceProtocolError(CoalestraError):
    """A source broke the rules of being one: the mistake is in the source, so no retry helps."""


class ResourceAbsent(CoalestraError):
    """A source's answer that there is none: it has looked, and the resource does not exist.

    A source raises it, or a batch source gives it as the value of a key. That is no failure: it is
    not retried, and the source has answered as far as its circuit is concerned. Unless it is final
    the key goes on to the next source. If every source that was asked says so, readers find a
    `ResourceAbsentError`.

    Attributes:
        final: whether no further source is asked.
        ttl_seconds: for how long a builder may remember that there is none; None: not at all. A
            publication or an invalidation of the key ends that. Of several sources the shortest
            counts.

    Raises:
        TypeError, ValueError: for a field of the wrong type, or a time that is negative or NaN.
    """

    # Also of a subclass that forgets to call the constructor.
    final: bool = False
    ttl_seconds: float | None = None

    def __init__(
        self,
        message: str = "there is none",
        *,
        final: bool = False,
        ttl_seconds: float | None = None,
    ) -> None:
        self.final = flag("final", final)
        self.ttl_seconds = None if ttl_seconds is None else span("ttl_seconds", ttl_seconds)
        super().__init__(message)


class ResourceResolutionError(CoalestraError):
    """No source could give a usable value for a resource.

    Attributes:
        key: the resource.
        failures: one record for each source that was tried, in the order of trying; empty if no
            source supports the key.

    Its ``__cause__`` is what the last of them raised. From Python 3.11 on a note for each
    source says where.
    """

    def __init__(self, key: ResourceKey, failures: tuple[SourceFailure, ...]) -> None:
        self.key = key
        self.failures: tuple[SourceFailure, ...] = tuple(failures)
        super().__init__(self._sentence())
        # What is to be looked into first is what was raised by a source's own code.
        errors = [failure for failure in self.failures if failure.exception is not None]
        raised = [failure for failure in errors if failure.places] or errors
        self.__cause__ = raised[-1].exception if raised else None
        if hasattr(self, "add_note"):
            for failure in self.failures:
                for place in failure.places[-1:]:
                    self.add_note(f"{failure.source}: {_place_text(place)}")
                error = failure.exception
                for lower in () if error is None else _raised_from(error)[-1:]:
                    self.add_note(f"{failure.source}: from {told(lower)}")

    def _sentence(self) -> str:
        return f"cannot resolve {self.key.display}: {self.format_failures()}"

    def format_failures(
        self,
        *,
        max_failures: int = MAX_FAILURES_SHOWN,
        max_message_length: int = MAX_MESSAGE_LENGTH,
    ) -> str:
        """Return the failures in one line, the first ``max_failures`` by name."""
        integer("max_failures", max_failures, minimum=1)
        if not self.failures:
            return "no compatible source"
        shown = self.failures[:max_failures]
        texts = [failure.format(max_message_length=max_message_length) for failure in shown]
        return enumerated(texts, len(self.failures), "failure")

    def to_dict(self, *, max_message_length: int = MAX_MESSAGE_LENGTH) -> SerializedResourceError:
        """Return the error and every failure as JSON-safe data."""
        return serialized_error(self.key, self, max_message_length)


class ResourceAbsentError(ResourceResolutionError):
    """There is no such resource: every source that was asked for it has answered so.

    None of them failed, so asking again brings nothing new. No stale value stands in. The
    ``failures`` are the answers of the sources, in the order of asking.
    """

    def _sentence(self) -> str:
        return f"{self.key.display} does not exist: {self.format_failures()}"


class DependencyCycleError(CoalestraError):
    """A resource would have to be derived from itself.

    Its ``path`` are the keys from the resource, along its dependencies, back to itself.
    """

    def __init__(self, path: tuple[ResourceKey, ...]) -> None:
        self.path: tuple[ResourceKey, ...] = tuple(path)
        most, length = MAX_RESOURCES_SHOWN, len(self.path)
        # Each of very many keys may fail with the same path.
        shown = [key.display for key in (*self.path[:most], *self.path[max(most, length - most) :])]
        if length > 2 * most:
            shown.insert(most, f"({length - 2 * most} more)")
        super().__init__(
            f"dependencies must not form a cycle, got {' -> '.join(shown)}; "
            "remove one of these dependencies"
        )


class DependencyResolutionError(CoalestraError):
    """A resource cannot be derived because some of what it is derived from failed.

    Attributes:
        key: the resource to derive.
        source: the name of the derived source.
        errors: the error of each dependency that failed, by its key.
    """

    def __init__(
        self, key: ResourceKey, source: str, errors: Mapping[ResourceKey, Exception]
    ) -> None:
        self.key = key
        self.source = source
        self.errors: Mapping[ResourceKey, Exception] = FrozenDict(errors)
        super().__init__(f"source {source!r} cannot derive {key.display}: {described(self.errors)}")
        self.__cause__ = next(iter(self.errors.values()), None)


def enumerated(shown: list[str], total: int, noun: str) -> str:
    """Join the texts that are ``shown`` and say how many of ``total`` are not."""
    hidden = total - len(shown)
    if hidden:
        shown = [*shown, f"and {counted(hidden, f'more {noun}')}"]
    return "; ".join(shown)


def listed(keys: Sequence[ResourceKey]) -> str:
    """Return the first of the keys, and how many more there are."""
    shown = ", ".join(key.display for key in keys[:MAX_RESOURCES_SHOWN])
    hidden = len(keys) - MAX_RESOURCES_SHOWN
    return shown if hidden <= 0 else f"{shown} and {hidden} more"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def described(errors: Mapping[ResourceKey, Exception]) -> str:
    """Return the first errors by resource, each bounded, and how many more there are."""
    shown = []
    for key, error in islice(errors.items(), MAX_RESOURCES_SHOWN):
        if isinstance(error, ResourceResolutionError):
            why = error.format_failures()
        else:
            why = _named(error)
        shown.append(f"{key.display} [{why}]")
    return enumerated(shown, len(errors), "resource")


def serialized_error(
    key: ResourceKey, error: Exception, max_message_length: int
) -> SerializedResourceError:
    """Return any error of a resource as JSON-safe data."""
    told = _serialized(type_name(error), message_of(error), max_message_length)
    failures = error.failures if isinstance(error, ResourceResolutionError) else ()
    shown = [failure.to_dict(max_message_length=max_message_length) for failure in failures]
    return {**told, "resource": key.display, "failures": shown}


_REASONS = {
    "CircuitOpenError": "circuit_open",
    "DependencyCycleError": "dependency_cycle",
    "DependencyResolutionError": "dependency",
    "PayloadIsolationError": "payload",
    "ResourceAcceptanceError": "not_acceptable",
    "SnapshotDeadlineExceededError": "deadline",
    "SourceProtocolError": "protocol",
    "SourceQueueTimeoutError": "capacity",
    "SourceTimeoutError": "timeout",
    "StaleSourceData": "stale",
}


def described_error(key: ResourceKey, error: Exception) -> dict[str, Any]:
    """Return why a resource has no value as JSON-safe data, with the reason in a word.

    That is the one of the source that was tried last; ``absent`` if all of them said so,
    ``unsupported`` if there was none, and ``failure`` for what is no business of the library's.
    """
    failures = error.failures if isinstance(error, ResourceResolutionError) else None
    kind = type_name(error) if failures is None else failures[-1].error_type if failures else ""
    reason = _REASONS.get(kind, "failure") if kind else "unsupported"
    return {
        "resource": key.display,
        "type": type_name(error),
        "message": folded_message(message_of(error)),
        "reason": "absent" if isinstance(error, ResourceAbsentError) else reason,
        "failures": [failure.to_dict() for failure in failures or ()],
    }


# Errors about a whole snapshot: what a strict build, a request or a session raises ---------------


class SnapshotBuildError(CoalestraError):
    """A snapshot lacks what it must have.

    Attributes:
        errors: the error of each resource that is to blame, by key.
        snapshot: the snapshot of everything else, or None if there was no time to deliver one.

    Its ``__cause__`` is the first of ``errors``, unless it was raised because of something else.
    """

    def __init__(
        self, errors: Mapping[ResourceKey, Exception], *, snapshot: Any | None = None
    ) -> None:
        self.errors: Mapping[ResourceKey, Exception] = FrozenDict(errors)
        self.snapshot = snapshot
        super().__init__(self._sentence())
        self.__cause__ = next(iter(self.errors.values()), None)

    def _sentence(self) -> str:
        if not self.errors:
            return "the snapshot could not be built"
        return f"cannot resolve {counted(len(self.errors), 'resource')}: {described(self.errors)}"

    def to_dict(
        self, *, max_message_length: int = MAX_MESSAGE_LENGTH
    ) -> SerializedSnapshotBuildError:
        """Return the error, with that of every resource, as JSON-safe data."""
        length, partial = max_message_length, self.snapshot is not None
        return {
            **_serialized(type(self).__name__, str(self), length),
            "errors": [serialized_error(key, each, length) for key, each in self.errors.items()],
            "partial_snapshot_available": partial,
            "has_partial_snapshot": partial,
        }


class SnapshotConsistencyError(SnapshotBuildError):
    """The values of a request were observed too far apart to be used together.

    All resources were resolved, so ``errors`` is empty.

    Attributes:
        keys: the resources that were compared.
        oldest_key, oldest_observed_at: the earliest observation, in seconds since the epoch.
        newest_key, newest_observed_at: the latest one.
        observation_skew_seconds: how far these two lie apart.
        max_observation_skew_seconds: how far they may.
        snapshot: the complete snapshot.
    """

    def __init__(
        self,
        *,
        keys: tuple[ResourceKey, ...],
        oldest_key: ResourceKey,
        oldest_observed_at: float,
        newest_key: ResourceKey,
        newest_observed_at: float,
        observation_skew_seconds: float,
        max_observation_skew_seconds: float,
        snapshot: Any | None = None,
    ) -> None:
        self.keys: tuple[ResourceKey, ...] = tuple(keys)
        self.oldest_key, self.oldest_observed_at = oldest_key, oldest_observed_at
        self.newest_key, self.newest_observed_at = newest_key, newest_observed_at
        self.observation_skew_seconds = observation_skew_seconds
        self.max_observation_skew_seconds = max_observation_skew_seconds
        super().__init__({}, snapshot=snapshot)

    def _sentence(self) -> str:
        return (
            f"{counted(len(self.keys), 'resource')} must be observed within "
            f"{self.max_observation_skew_seconds:g} s of each other, got "
            f"{self.observation_skew_seconds:g} s between {self.oldest_key.display} (oldest) and "
            f"{self.newest_key.display} (newest)"
        )


class ResourceAcceptanceError(CoalestraError):
    """A resource has a value that the request's acceptance policy refuses.

    Attributes:
        key: the resource.
        violations: every rule that its value breaks or helps to break.
    """

    def __init__(
        self, key: ResourceKey, violations: tuple[SnapshotAcceptanceViolation, ...]
    ) -> None:
        self.key = key
        self.violations: tuple[SnapshotAcceptanceViolation, ...] = tuple(violations)
        super().__init__(
            f"{key.display} is not acceptable: {_listed(self.violations, MAX_FAILURES_SHOWN)}"
        )


class SnapshotAcceptanceError(SnapshotBuildError):
    """A snapshot has what was asked for, but not in the quality that was.

    Attributes:
        violations: every broken rule and requirement.
        errors: a ``ResourceAcceptanceError`` for each resource that a violation names.
        snapshot: the snapshot that was refused.
    """

    def __init__(
        self, *, violations: tuple[SnapshotAcceptanceViolation, ...], snapshot: Any | None = None
    ) -> None:
        for _ in self._made(tuple(violations), snapshot):
            pass

    def _made(
        self, violations: tuple[SnapshotAcceptanceViolation, ...], snapshot: Any
    ) -> Generator[None, None, SnapshotAcceptanceError]:
        """Be made in slices."""
        self.violations: tuple[SnapshotAcceptanceViolation, ...] = violations
        concerned: dict[ResourceKey, list[SnapshotAcceptanceViolation]] = {}
        for number, violation in enumerate(violations):
            for key in violation.keys:
                concerned.setdefault(key, []).append(violation)
            if not number % _PER_SLICE or len(violation.keys) > _PER_SLICE:
                yield
        errors: dict[ResourceKey, Exception] = {}
        for number, (key, own) in enumerate(concerned.items()):
            errors[key] = ResourceAcceptanceError(key, tuple(own))
            if not number % _PER_SLICE:
                yield
        super().__init__(errors, snapshot=snapshot)
        return self

    def _sentence(self) -> str:
        number = counted(len(self.violations), "violation")
        return f"snapshot not acceptable, {number}: {_listed(self.violations, MAX_RESOURCES_SHOWN)}"


def not_accepted(
    violations: tuple[SnapshotAcceptanceViolation, ...], snapshot: Any
) -> Generator[None, None, SnapshotAcceptanceError]:
    """Return the error of a snapshot, made in slices: there may be very many violations."""
    return _without_facts(SnapshotAcceptanceError, ())._made(violations, snapshot)


def _listed(violations: tuple[SnapshotAcceptanceViolation, ...], limit: int) -> str:
    shown = [folded_message(violation.message) for violation in violations[:limit]]
    return enumerated(shown, len(violations), "violation")


_PER_SLICE = 128


# Errors about running the library itself: copies, closing, backlogs and capabilities -------------


class SessionClosedError(CoalestraError):
    """A session was used after it had been closed; open another one. Takes a free message."""


class CacheUnavailableError(CoalestraError):
    """A cache of the application's own did not do, or answer, what it was asked.

    Builds go on without the cache; publishing and invalidating raise.
    """


class CacheTimeoutError(CacheUnavailableError):
    """A call to a cache took longer than ``timeout_seconds``; what came of it is not known."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        super().__init__(
            f"a call to the cache must end within {timeout_seconds:g} s, and did not; find out why "
            "it is slow, or give the cache timeout_seconds of its own"
        )


class CacheCircuitOpenError(CacheUnavailableError):
    """A cache has failed so often in a row that it is left alone for a while; it was not asked."""


class BuilderClosedError(CoalestraError, RuntimeError):
    """A builder, or a ``component`` that belongs to it, was used after it had been closed."""

    def __init__(self, component: str = "the snapshot builder") -> None:
        self.component = component
        super().__init__(f"{component} is closed and takes no more work; create a new one")


class PayloadIsolationError(CoalestraError):
    """A payload cannot be copied, so it cannot be shared safely. ``__cause__`` says why.

    The ``context`` is what the copy was for, ``value_type`` the name of the payload's type. What
    the copying raised, the ``cause``, is in the text.
    """

    def __init__(
        self, *, context: str, value_type: str, cause: BaseException | None = None
    ) -> None:
        self.context = context
        self.value_type = value_type
        why = "" if cause is None else f": {_named(cause)}"
        super().__init__(
            f"payloads must be copyable, got {value_type} while copying for {context}{why}; return "
            "plain data, or copy it in payload_copier"
        )


class PayloadCopySubsystemClosedError(CoalestraError):
    """A copy was asked for, waited for its turn or did not end when copying was closed.

    The ``component`` is whose copies: ``builder``, ``cache`` or ``publisher``.
    """

    def __init__(self, *, component: str) -> None:
        self.component = component
        super().__init__(f"payload copying of the {component} is closed and takes no more copies")


class PayloadCopyShutdownTimeoutError(CoalestraError):
    """Closing left threads behind that still copy payloads; they cannot be stopped.

    Attributes:
        timeout_seconds: how long closing waited for them.
        active_components: copies still active, by component.
        active_copies: their sum.
    """

    def __init__(self, *, timeout_seconds: float, active_components: Mapping[str, int]) -> None:
        self.timeout_seconds = timeout_seconds
        self.active_components: Mapping[str, int] = FrozenDict(active_components)
        self.active_copies: int = sum(self.active_components.values())
        super().__init__(
            f"payload copies must end within {timeout_seconds:g} s of closing, got "
            f"{self.active_copies} still active ({_amounts(self.active_components)}); allow more "
            "time with copy_shutdown_timeout_seconds or copy less at once"
        )


class ObservabilityShutdownTimeoutError(CoalestraError):
    """Closing left event or metric records undelivered: a sink is too slow, or stuck.

    Attributes:
        timeout_seconds: how long closing waited for the sinks.
        pending_components: records still pending, by component.
        pending_records: their sum.
    """

    def __init__(self, *, timeout_seconds: float, pending_components: Mapping[str, int]) -> None:
        self.timeout_seconds = timeout_seconds
        self.pending_components: Mapping[str, int] = FrozenDict(pending_components)
        self.pending_records: int = sum(self.pending_components.values())
        super().__init__(
            f"observability must be delivered within {timeout_seconds:g} s of closing, got "
            f"{counted(self.pending_records, 'record')} still pending "
            f"({_amounts(self.pending_components)}); allow "
            "more time with observability_shutdown_timeout_seconds or do not drain"
        )


class SubmissionBacklogFullError(CoalestraError):
    """A submission was refused at once, as too many wait: ``limit`` may, and ``pending`` did."""

    def __init__(self, *, limit: int, pending: int) -> None:
        self.limit = limit
        self.pending = pending
        super().__init__(
            f"at most {limit} submissions may be pending, got {pending}; submit more slowly, "
            "flush, or raise max_pending_submissions"
        )


class CapabilityRequirementError(CoalestraError):
    """The installed version lacks features or schemas that the application needs.

    Attributes:
        missing_features: the features it does not have.
        schema_mismatches: for each schema that is too old or absent, the version that was asked
            for and the one that is installed (or None).
    """

    def __init__(
        self,
        *,
        missing_features: tuple[str, ...],
        schema_mismatches: Mapping[str, tuple[int, int | None]],
    ) -> None:
        self.missing_features: tuple[str, ...] = tuple(missing_features)
        self.schema_mismatches: Mapping[str, tuple[int, int | None]] = FrozenDict(schema_mismatches)
        problems = [f"feature {name!r} is missing" for name in self.missing_features]
        for name, (minimum, installed) in self.schema_mismatches.items():
            found = "absent" if installed is None else f"version {installed}"
            problems.append(f"schema {name!r} must be version {minimum} or later, is {found}")
        super().__init__(
            f"the installed coalestra does not satisfy the application: {'; '.join(problems)}; "
            "install another version"
        )


def _amounts(components: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {amount}" for name, amount in components.items()) or "none named"


__all__ = [
    "CoalestraError", "SourceUnavailableError", "SourceTimeoutError",
    "SnapshotDeadlineExceededError", "SourceQueueTimeoutError", "CircuitOpenError",
    "SourceProtocolError", "ResourceAbsent", "ResourceResolutionError", "ResourceAbsentError",
    "DependencyCycleError", "DependencyResolutionError", "SnapshotBuildError",
    "SnapshotConsistencyError", "SnapshotAcceptanceError", "ResourceAcceptanceError",
    "SessionClosedError", "BuilderClosedError", "PayloadIsolationError",
    "PayloadCopySubsystemClosedError", "PayloadCopyShutdownTimeoutError",
    "ObservabilityShutdownTimeoutError", "SubmissionBacklogFullError", "CacheCircuitOpenError",
    "CacheTimeoutError", "CacheUnavailableError", "CapabilityRequirementError",
    "ERROR_DIAGNOSTICS_SCHEMA", "ERROR_DIAGNOSTICS_SCHEMA_VERSION", "SourceFailure",
    "SerializedSourceFailure", "SerializedResourceError", "SerializedSnapshotBuildError",
]  # fmt: skip
