"""Checks of what a caller passed in: each returns the value, or raises with a full sentence.

A wrong type is a `TypeError`, a wrong value a `ValueError`. Every message has the same form: the
name of the parameter, the rule, what was given, and the remedy where there is one.
"""

from __future__ import annotations

import enum
import inspect
import math
import reprlib
from binascii import crc32
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from functools import partial
from typing import Any, TypeVar

from coalestra.core.frozen import EMPTY

T = TypeVar("T")
E = TypeVar("E", bound=enum.Enum)

_SHOWN = 200


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80

    # Looked for by the name of the type.
    repr_FrozenDict = reprlib.Repr.repr_dict  # noqa: N815

    def repr_ResourceKey(self, key: object, _level: int) -> str:  # noqa: N802
        """Return all of it: a key bounds itself."""
        return repr(key)


_brief = _Brief()


def shown(value: object) -> str:
    """Return a short representation of ``value`` that never raises."""
    try:
        text = _brief.repr(value)
    except BaseException:  # whatever it is, the sentence that it is for says more
        return f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def readable(text: str) -> str:
    """Return ``text`` in one line of bounded length, for errors, events and labels.

    What cannot be printed is escaped. What is too long is cut, and ends in its length and checksum,
    so that it can still be told from another one that begins alike. Anything else stays as it is.
    """
    if len(text) <= _SHOWN and text.isprintable():
        return text
    line = printable(text, _SHOWN)
    if len(text) <= _SHOWN and len(line) <= _SHOWN:
        return line
    end = f"... ({len(text)} characters, {crc32(text.encode('utf-8', 'surrogatepass')):08x})"
    return line[: _SHOWN - len(end)] + end


def printable(text: str, max_length: int) -> str:
    """Return at most ``max_length`` characters of ``text``, and more if some must be escaped."""
    head = text[:max_length]
    if head.isprintable():
        return head
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in head)


def refusal(name: str, rule: str, value: object, remedy: str = "", kind: str = "") -> str:
    """Return the sentence of an error: what ``name`` must be, what it was, and what to do."""
    sentence = f"{name} must be {rule}, got {shown(value)}{kind}"
    return f"{sentence}; {remedy}" if remedy else sentence


def wrong_type(name: str, rule: str, value: object, remedy: str = "") -> TypeError:
    """Return the error for a value of another type; the message names that type too."""
    return TypeError(refusal(name, rule, value, remedy, f" of type {type(value).__name__}"))


def number(
    name: str,
    value: T,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    optional: bool = False,
) -> T:
    """Return a finite int or float within its bounds, or None if that is allowed.

    ``minimum`` and ``maximum`` are inclusive, ``above`` is not.
    """
    if value is None and optional:
        return value
    given: Any = value
    if (
        _is_real(given)
        and _is_finite(given)
        and (minimum is None or given >= minimum)
        and (above is None or given > above)
        and (maximum is None or given <= maximum)
    ):
        return value
    rule = _ranged("a finite number", minimum, above, maximum, optional)
    raise _no_number(name, rule, value)


def _no_number(name: str, rule: str, value: object) -> Exception:
    if _is_real(value):
        return ValueError(refusal(name, rule, value))
    told = [each for each in ("total_seconds", "timestamp") if hasattr(type(value), each)]
    return wrong_type(name, rule, value, f"give its {told[0]}()" if told else "")


def span(name: str, value: T) -> T:
    """Return a length of time that is not negative but may be infinite."""
    given: Any = value
    if _is_real(given) and (given == math.inf or (_is_finite(given) and given >= 0)):
        return value
    raise _no_number(name, "a number of at least 0", value)


def integer(name: str, value: T, *, minimum: int | None = None, optional: bool = False) -> T:
    """Return an int of at least ``minimum``, or None if that is allowed."""
    if value is None and optional:
        return value
    given: Any = value
    whole = isinstance(given, int) and not isinstance(given, bool)
    if whole and (minimum is None or given >= minimum):
        return value
    rule = _ranged("an integer", minimum, None, None, optional)
    raise ValueError(refusal(name, rule, value)) if whole else wrong_type(name, rule, value)


def flag(name: str, value: T, *, optional: bool = False) -> T:
    """Return a bool, for which nothing else counts, or None if that is allowed."""
    if isinstance(value, bool) or (value is None and optional):
        return value
    raise wrong_type(name, "True, False or None" if optional else "True or False", value)


def text(name: str, value: object, *, empty: bool = False) -> str:
    """Return a plain string; unless ``empty``, one with more in it than white space."""
    if not isinstance(value, str):
        raise wrong_type(name, "a string" if empty else "a non-empty string", value)
    if not empty and not value.strip():
        raise ValueError(refusal(name, "a non-empty string", value))
    return str.__str__(value)  # a class of the application's, such as an enum, may read otherwise


def instance(
    name: str, value: T, kinds: type[Any] | tuple[type[Any], ...], *, optional: bool = False
) -> T:
    """Return an instance of ``kinds``, or None if that is allowed."""
    if isinstance(value, kinds) or (value is None and optional):
        return value
    raise wrong_type(name, f"{a_kind_of(kinds)} or None" if optional else a_kind_of(kinds), value)


def a_kind_of(kinds: Any) -> str:
    """Return one or several types in words, each with its article."""
    accepted = kinds if isinstance(kinds, tuple) else (kinds,)
    names = [getattr(kind, "__name__", str(kind)) for kind in accepted]
    return " or ".join(f"{'an' if name[:1] in 'aeiouAEIOU' else 'a'} {name}" for name in names)


def mapping(name: str, value: object, *, optional: bool = False) -> Mapping[Any, Any]:
    """Return a mapping; None becomes an empty one if it is allowed."""
    if value is None and optional:
        return EMPTY
    if not isinstance(value, Mapping):
        raise wrong_type(name, "a mapping or None" if optional else "a mapping", value)
    return value


def rule(check: Callable[..., object], *arguments: Any, **bounds: Any) -> Mapping[str, Any]:
    """Return the metadata of a dataclass field that `check_fields` checks.

    By ``check(name, value, *arguments, **bounds)``, which is one of the functions of this module or
    like them.
    """
    return {"rule": (check, arguments, bounds)}


def ruled(default: T, check: Callable[..., object], *arguments: Any, **bounds: Any) -> T:
    """Return a dataclass field with a default that `check_fields` checks; see `rule`."""
    return field(default=default, metadata=rule(check, *arguments, **bounds))


def check_fields(record: Any) -> None:
    """Check every field of a dataclass that has a rule."""
    for each in fields(record):
        if "rule" in each.metadata:
            check, arguments, bounds = each.metadata["rule"]
            check(each.name, getattr(record, each.name), *arguments, **bounds)


def callable_(name: str, value: T, *, optional: bool = False) -> T:
    """Return something that can be called, or None if that is allowed."""
    if callable(value) or (value is None and optional):
        return value
    raise wrong_type(name, "a callable or None" if optional else "a callable", value)


def plain_function(name: str, value: T, *, optional: bool = False) -> T:
    """Return something that can be called and answers at once, or None if that is allowed."""
    callable_(name, value, optional=optional)
    if value is not None and is_coroutine_function(value):
        raise wrong_type(name, "a plain function", value, "it must answer without waiting")
    return value


_ANSWERS = frozenset({bool, dict, float, int, list, str, tuple, type(None)})
"""What functions most often return; of others it takes a closer look whether they are awaitable."""


def is_awaitable(answer: object) -> bool:
    """Whether what a function has returned has yet to be awaited."""
    return type(answer) not in _ANSWERS and inspect.isawaitable(answer)


def at_once(name: str, answer: Any, refused: type[Exception] = TypeError) -> Any:
    """Return what a function has answered; an error if that has yet to be awaited."""
    if is_awaitable(answer):
        if hasattr(answer, "close"):
            answer.close()
        raise refused(f"{name} must answer at once, got an awaitable; use a plain function")
    return answer


def is_coroutine_function(function: Any) -> bool:
    """Whether calling ``function`` only makes a coroutine, so that it has not answered yet."""
    while isinstance(function, partial):
        function = function.func
    if type(getattr(getattr(function, "__code__", None), "co_flags", 0)) is not int:
        return False  # it stands in for a function, as mocks do, and inspect believes all flags set
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def concealed(record: Any, *payloads: str) -> str:
    """Return the ``repr`` of a dataclass that tells of some fields no more than their type.

    Payloads may be secret, or large, and whoever prints a record for its times wants neither.
    """
    texts = []
    for name in record.__dataclass_fields__:
        value = getattr(record, name)
        text = f"<{type(value).__qualname__}>" if name in payloads else shown(value)
        texts.append(f"{name}={text}")
    return f"{type(record).__qualname__}({', '.join(texts)})"


def require_methods(
    name: str, value: object, *methods: str, optional: bool = False, plain: bool = False
) -> None:
    """Raise `TypeError` unless ``value`` has methods of these names, or is None if allowed.

    Those that are ``plain`` answer at once: no coroutine function will do.
    """
    for method in () if value is None and optional else methods:
        found = getattr(value, method, None)
        if not callable(found):
            raise TypeError(
                f"{name} must have a method {method}(), got {type(value).__name__}; give an object "
                f"with {' and '.join(methods)}"
            )
        if plain:
            plain_function(f"{method}() of {name}", found)


def choice(name: str, value: object, kind: type[E]) -> E:
    """Return a member of the enumeration ``kind``; its bare value is not one."""
    if isinstance(value, kind):
        return value
    members = ", ".join(str(member.name) for member in kind)
    raise wrong_type(name, a_kind_of(kind), value, f"choose from {members}")


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float can hold
        return False


def _ranged(
    noun: str, minimum: float | None, above: float | None, maximum: float | None, optional: bool
) -> str:
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("of at least", minimum), ("above", above), ("of at most", maximum))
        if bound is not None
    ]
    rule = " ".join([noun, " and ".join(bounds)]) if bounds else noun
    return f"{rule}, or None" if optional else rule
