"""What a reader holds while it works: readings, failures, and how a flight ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from coalestra.concurrency.pace import Slices, at_once
from coalestra.core import errors
from coalestra.core.frozen import FrozenDict
from coalestra.core.keys import ResourceKey
from coalestra.core.values import Revision

_JOINED = FrozenDict({"coalesced_request": True})
_PER_SLICE = 512
"""Of how many values the lineage is looked at in one slice."""
_MANY_TIMES = 8
"""So many pins are copied in the time in which one key tells its hash."""


@dataclass(slots=True, eq=False, repr=False)
class Reading:
    """One reader's view of a sealed revision, and how the reader came by it.

    How old it is, is told when it is delivered: `ttl_seconds` is how long it counts as fresh, None
    if that is to be asked then; `stale` says that it did not any more when it was read. `notes` is
    metadata for this reader; `fallback` is the error that a stale value stands in for. One is made
    for every key that is read, by place, as naming what is passed would take longer than all else.
    """

    revision: Revision
    ttl_seconds: float | None
    from_cache: bool = False
    stale: bool = False
    notes: Mapping[str, Any] | None = None
    fallback: Exception | None = None
    _joined: Reading | None = None

    def joined(self) -> Reading:
        """Return the same reading for all who have joined the flight of another unit of work.

        What counts as fresh may have changed since that began.
        """
        noted = self._joined
        if noted is None:
            notes = {**self.notes, **_JOINED} if self.notes else _JOINED
            told = self.from_cache, self.stale, notes, self.fallback
            noted = self._joined = Reading(self.revision, None, *told)
        return noted

    def __repr__(self) -> str:
        return f"<Reading {self.revision.key} from_cache={self.from_cache} stale={self.stale}>"


@dataclass(slots=True, eq=False, repr=False)
class Failure:
    """Why a key has no value, kept as facts.

    Every reader gets an exception of its own, because a raised exception grows a traceback; and
    only those that are looked at are made. `absent` says that there is no value to be had.
    """

    key: ResourceKey
    make: Callable[[], Exception]
    _: KW_ONLY
    cycle: tuple[ResourceKey, ...] | None = None
    absent: bool = False

    @classmethod
    def of_sources(cls, key: ResourceKey, failures: tuple[errors.SourceFailure, ...]) -> Failure:
        """Return the failure of a key that no source had a value of; if none failed, it is absent.

        A source that failed might have had it, whatever the others say.
        """
        absent = bool(failures) and all(
            isinstance(failure.exception, errors.ResourceAbsent) for failure in failures
        )
        kind = errors.ResourceAbsentError if absent else errors.ResourceResolutionError
        return cls(key, lambda: kind(key, failures), absent=absent)

    @classmethod
    def of_cycle(cls, key: ResourceKey, path: tuple[ResourceKey, ...]) -> Failure:
        """Return the failure of a key that takes part in, or depends on, a cycle."""
        return cls(key, lambda: errors.DependencyCycleError(path), cycle=path)

    @classmethod
    def of_error(cls, key: ResourceKey, error: BaseException, by: str = "coalestra") -> Failure:
        """Return the failure of a key that no source is to blame for, but what `by` names."""

        def make() -> Exception:
            failed = errors.ResourceResolutionError(key, (errors.SourceFailure.of(by, error, 0),))
            failed.__cause__ = error
            return failed

        return cls(key, make)

    @classmethod
    def given_up(cls, key: ResourceKey, why: str = "nobody waits for it") -> Failure:
        """Return the failure of a key that was given up, and why."""
        text = f"{key.display} was given up: {why}"
        return cls(key, lambda: errors.SourceUnavailableError(text))


@dataclass(slots=True, eq=False)
class Failed:
    """How a flight ended that brought no value: a failure, with the best stale candidate."""

    failure: Failure
    stale: Reading | None = None


Settlement = Reading | Failed
"""How a flight ended: with a reading for everyone, or without."""


# The values one unit of work has settled on, and whether new readings agree with them ------------
#
# A derived value is only as good as the revisions it was made from. Readings that arrive on
# different ways (one from the cache, one from a source) may rest on different revisions of the same
# key. The rules here find that out. They know nothing of time, tasks or sources.


@dataclass(slots=True, eq=False)
class Demand:
    """What somebody who waits insists on, beyond any usable value.

    `forced` keys bypass the cache and accept no stale value; those of them that are `private` are
    derived under the pins. A `refresh` bypasses the cache and accepts fresh values only.
    """

    forced: frozenset[ResourceKey] = frozenset()
    private: frozenset[ResourceKey] = frozenset()
    refresh: bool = False


class Pins(dict[ResourceKey, Reading]):
    """The readings that a unit of work, or one derivation, must stay consistent with.

    `demand` is what the derivations that serve these pins ask of their dependencies; `private`
    holds those under way, and `own` the keys that are to be derived so in any case; `generation`
    counts how often pinned readings were replaced.
    """

    __slots__ = ("demand", "generation", "own", "private")

    def __init__(
        self, readings: Mapping[ResourceKey, Reading] | None = None, demand: Demand | None = None
    ) -> None:
        if readings:
            super().__init__(readings)
        self.demand: Demand | None = demand
        self.private: dict[ResourceKey, Any] = {}
        self.own: set[ResourceKey] = set()
        self.generation: int = 0

    @property
    def stamp(self) -> tuple[int, int]:
        """What changes with every reading that is pinned anew or replaced."""
        return self.generation, len(self)


NO_PINS = Pins()
"""What a derivation starts with that has to agree with nobody; never changed."""


def lineage(revisions: Iterable[Revision]) -> dict[int, Revision]:
    """Return every revision that the given ones rest on, themselves included, each once."""
    found: dict[int, Revision] = {}
    stack = list(revisions)
    while stack:
        revision = stack.pop()
        if id(revision) not in found:
            found[id(revision)] = revision
            stack.extend(revision.dependencies)
    return found


def _stands(revision: Revision, pins: Mapping[ResourceKey, Reading]) -> bool:
    """Whether a revision is pinned, and so agrees with all that is, down to what it rests on."""
    pin = pins.get(revision.key)
    return pin is not None and pin.revision.version == revision.version


def _newest_hidden(
    derived: Iterable[Revision],
    readings: Mapping[ResourceKey, Reading],
    pins: Mapping[ResourceKey, Reading],
) -> Slices[dict[ResourceKey, Revision]]:
    """Return, for keys known only as somebody's dependency, the revision that was fetched last."""
    hidden: dict[ResourceKey, Revision] = {}
    seen: set[int] = set()
    stack = list(derived)
    roots = set(map(id, stack))
    while stack:
        revision = stack.pop()
        if id(revision) in seen:
            continue
        seen.add(id(revision))
        key = revision.key
        if id(revision) not in roots and _stands(revision, pins):
            continue  # what it rests on is pinned with it
        stack += revision.dependencies
        if key not in readings and key not in pins:
            known = hidden.get(key)
            if known is None or known.fetched_at < revision.fetched_at:
                hidden[key] = revision
        if not len(seen) % _PER_SLICE:
            yield
    return hidden


def at_odds(
    readings: Mapping[ResourceKey, Reading], pins: Mapping[ResourceKey, Reading]
) -> Slices[set[ResourceKey]]:
    """Return the keys whose derived values rest on other revisions than the rest of the readings.

    What is pinned stands. Then comes what was read in its own right, then the newest of what is
    known only as a dependency. Linear in the number of entries and dependencies.
    """
    odd: set[ResourceKey] = set()
    derived = _derived(readings)
    if not derived or (len(readings) == 1 and not pins):
        return odd
    hidden = yield from _newest_hidden(derived.values(), readings, pins)
    chosen = {key: revision.version for key, revision in hidden.items()}
    wrong: dict[int, bool] = {}

    def differs_at_once(revision: Revision) -> bool:
        """Whether a direct dependency differs; what is not yet chosen is now."""
        for key, version in revision.dependency_versions.items():
            known = pins.get(key) or readings.get(key)
            stands = known.revision.version if known else chosen.setdefault(key, version)
            if stands != version:
                return True
        return False

    def differs(root: Revision) -> Slices[bool]:
        """Return whether anything that a revision rests on differs from what stands."""
        if not any(each.dependency_versions for each in root.dependencies):
            return differs_at_once(root)
        stack = [root]
        while stack:
            revision = stack[-1]
            if id(revision) in wrong or _stands(revision, pins):
                wrong.setdefault(id(revision), False)
                stack.pop()
                continue
            unknown = [each for each in revision.dependencies if id(each) not in wrong]
            if unknown:
                stack.extend(unknown)
                continue
            stack.pop()
            below = any(wrong[id(each)] for each in revision.dependencies)
            wrong[id(revision)] = differs_at_once(revision) or below
            if not len(wrong) % _PER_SLICE:
                yield
        return wrong[id(root)]

    for number, (key, revision) in enumerate(derived.items(), 1):
        if (yield from differs(revision)):
            odd.add(key)
        if not number % _PER_SLICE:
            yield
    return odd


def _derived(readings: Mapping[ResourceKey, Reading]) -> dict[ResourceKey, Revision]:
    return {k: r.revision for k, r in readings.items() if r.revision.dependency_versions}


class View:
    """What one unit of work has seen of each key: a certificate that saves judging again.

    Revisions that it covers agree with each other, down to the last thing they rest on. What it
    does not cover may agree or not, and has to be judged by `at_odds`.
    """

    __slots__ = ("_seen", "_sound")

    def __init__(self) -> None:
        self._seen: dict[ResourceKey, str] = {}
        self._sound: dict[int, Revision] = {}

    def covers(self, readings: Iterable[Reading]) -> Slices[bool]:
        """Return whether all readings agree with what was seen before.

        Linear in what is new in them.
        """
        for number, reading in enumerate(readings, 1):
            if not self._admit(reading.revision):
                return False
            if not number % _PER_SLICE:
                yield
        return True

    def _admit(self, root: Revision) -> bool:
        """Enter `root` and all it rests on, unless something differs from what was seen."""
        sound, seen = self._sound, self._seen
        if seen.setdefault(root.key, root.version) != root.version:
            return False
        found: list[Revision] = []
        stack = [root]
        while stack:
            revision = stack.pop()
            if not revision.dependency_versions or id(revision) in sound:
                continue
            for key, version in revision.dependency_versions.items():
                if seen.setdefault(key, version) != version:
                    for each in found:
                        del sound[id(each)]
                    return False
            sound[id(revision)] = revision
            found.append(revision)
            stack += revision.dependencies
        return True


def beneath(
    readings: Mapping[ResourceKey, Reading], pins: Mapping[ResourceKey, Reading], since: int = 0
) -> Slices[dict[ResourceKey, Reading]]:
    """Return what is to be pinned out of sight with `readings`: what they rest on, in slices.

    What was read `since` that number was not in the cache already, unless it was published.
    """
    derived = _derived(readings)
    if not derived:
        return {}
    hidden = yield from _newest_hidden(derived.values(), readings, pins)
    found: dict[ResourceKey, Reading] = {}
    for number, (key, revision) in enumerate(hidden.items(), 1):
        found[key] = Reading(revision, None, revision.began < since or not revision.attempts)
        if not number % _PER_SLICE:
            yield
    return found


def pin_all(
    pins: dict[ResourceKey, Reading],
    readings: Mapping[ResourceKey, Reading],
    below: Mapping[ResourceKey, Reading] | None = None,
    since: int = 0,
) -> None:
    """Pin readings, and out of sight what they rest on, unless other values are pinned already.

    `below` is what `beneath` has said of these readings and pins, if it was asked; else it is.
    """
    more = {**readings, **(at_once(beneath(readings, pins, since)) if below is None else below)}
    if len(pins) < _MANY_TIMES * len(more):
        pins.update({**more, **pins})  # which asks no key for its hash, as a look at each would
    else:
        for key, reading in more.items():
            pins.setdefault(key, reading)


def reach(
    pins: Mapping[ResourceKey, Reading],
    visible: Collection[ResourceKey],
    keys: Collection[ResourceKey],
) -> Slices[tuple[dict[ResourceKey, None], dict[ResourceKey, None]]]:
    """Return what goes when `keys` are replaced, in order, and what is then needed no longer.

    The first are `keys` and every pinned key that was derived from one of them, directly or not;
    the second is what is pinned out of sight and serves nothing but these.
    """
    used_by: dict[ResourceKey, list[ResourceKey]] = {}
    for number, (key, revision) in enumerate(_derived(pins).items(), 1):
        for name in revision.dependency_versions:
            used_by.setdefault(name, []).append(key)
        if not number % _PER_SLICE:
            yield
    going = dict.fromkeys(keys)
    stack = [key for key in keys if key in used_by] if used_by else []
    while stack:
        for key in used_by.get(stack.pop(), ()):
            if key not in going:
                going[key] = None
                stack.append(key)
                if not len(going) % _PER_SLICE:
                    yield
    hidden = set(pins).difference(visible)
    if not hidden:
        return going, {}
    yield
    needed: set[ResourceKey] = set()
    stack = [key for key in visible if key in pins and key not in going]
    while stack:
        key = stack.pop()
        if key in pins and key not in needed:
            needed.add(key)
            stack.extend(pins[key].revision.dependency_versions)
            if not len(needed) % _PER_SLICE:
                yield
    return going, dict.fromkeys(hidden.difference(needed, going))
