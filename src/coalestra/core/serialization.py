"""Turning whatever a record holds into values that ``json.dumps`` takes as they are.

Law: the result consists of dicts with string keys, lists, strings, ints, finite floats, bools and
None, whatever went in; nothing of an unknown object is shown but its type, because its ``repr``
may hold secrets, addresses or megabytes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Set, Sized
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

_MAX_DEPTH = 32
_MOST_BITS = 14_000
"""Python refuses to write integers of more than 4,300 digits, unless it is told otherwise."""
_SEQUENCES = (list, tuple, deque)
_MOST_REPEATED = 100_000
"""So many items are written again because what holds them stands in several places: of n levels
that hold the next one twice there would be 2 ** n."""

_FIRST, _END = -62_135_596_800, 253_402_300_799
"""The first second of year 1, and the last one of year 9999."""


def json_safe(value: Any) -> Any:
    """Return ``value`` as JSON-safe data.

    Dataclasses and mappings become dicts (keys by ``str``), enums their values, sequences and
    sets lists, floats that are not finite ``nan``, ``infinity`` and ``-infinity``, and anything
    else the name of its type. So does what contains itself, is nested deeper than 32 levels, stands
    in so many places that it would be most of the result, has more digits than Python writes, or
    cannot be read.
    """
    return _safe(value, (), _Seen())


class _Seen:
    """The containers met so far; held, so that none of them leaves its identity to another one."""

    def __init__(self) -> None:
        self._met: dict[int, Any] = {}
        self._left = _MOST_REPEATED

    def too_often(self, container: Any) -> bool:
        """Whether a container has been met before and there is no room to write it once more."""
        if self._met.setdefault(id(container), self) is self:
            self._met[id(container)] = container
            return False
        self._left -= 1 + (len(container) if isinstance(container, Sized) else 0)
        return self._left < 0


def _safe(value: Any, path: tuple[int, ...], seen: _Seen) -> Any:
    try:
        if isinstance(value, Enum):
            return _safe(value.value, path, seen)
        if value is None or isinstance(value, bool):
            return value
        for kind, render in _SCALARS:
            if isinstance(value, kind):
                return render(value)
        if id(value) in path or len(path) >= _MAX_DEPTH or seen.too_often(value):
            return qualified_type(value)
        return _safe_container(value, (*path, id(value)), seen)
    except Exception:  # of the code that its type has for reading it
        return qualified_type(value)


def _safe_container(value: Any, path: tuple[int, ...], seen: _Seen) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _safe(getattr(value, item.name), path, seen) for item in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): _safe(item, path, seen) for key, item in value.items()}
    if isinstance(value, _SEQUENCES):
        return [_safe(item, path, seen) for item in value]
    if isinstance(value, Set):
        # Sets have no order of their own; two equal ones shall give equal JSON.
        return sorted((_safe(item, path, seen) for item in value), key=repr)
    return qualified_type(value)


def utc_text(seconds: float) -> str | None:
    """Return wall-clock seconds since the epoch as an ISO 8601 text in UTC, to the microsecond.

    What no calendar has, such as a time in the year 10,000, is None.
    """
    if not _FIRST <= seconds < _END:
        return None
    whole, part = divmod(round(seconds * 1_000_000), 1_000_000)
    year, month, day, hour, minute, second, *_ = time.gmtime(whole)
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{part:06}+00:00"


def qualified_type(value: object) -> str:
    """Return the full name of the type of ``value``, module included."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _key(key: object) -> str:
    try:
        return str.__str__(key) if isinstance(key, str) else str(key)
    except Exception:
        return qualified_type(key)


def _written(value: int) -> int | str:
    return int(value) if value.bit_length() <= _MOST_BITS else qualified_type(value)


def _finite(value: float) -> float | str:
    if math.isfinite(value):
        return float(value)
    if math.isnan(value):
        return "nan"
    return "infinity" if value > 0 else "-infinity"


# Subclasses are reduced to the built-in type: theirs may render themselves in other ways.
_SCALARS: tuple[tuple[type, Any], ...] = ((str, str.__str__), (int, _written), (float, _finite))
