"""Which objects can be passed around without a copy, because nobody can change them.

The answer is given by exact type, never by ``isinstance``: a subclass of ``str`` may carry a
mutable attribute. Three groups of types count:

- *atoms*: what ``copy.deepcopy`` returns as it is, the immutable values of the standard library,
  and the members of enumerations;
- *holders*: tuples, named tuples, frozen sets, frozen dataclasses and aware times, which are
  immutable if everything they hold is;
- everything else, which is not immutable as far as anybody knows.
"""

from __future__ import annotations

import copyreg
import enum
import sys
import types
import weakref
from collections.abc import Callable, Collection
from typing import Any

Parts = Callable[[Any], Collection[Any]]
"""Tells what a holder holds."""

ATOMS: set[type] = {
    type(None),
    type(Ellipsis),
    type(NotImplemented),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    type,
    property,
    types.CodeType,
    types.FunctionType,
    types.BuiltinFunctionType,
    weakref.ref,
}
"""The exact types whose instances are shared; grows as known types are met, to ``MOST_ATOMS``."""

MOST_ATOMS = 1000

COPY_HOOKS = frozenset(
    {"__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__"}
)
"""What a class, or by accident an instance, can define to be asked how it is copied."""

_STANDARD_ATOMS = {
    ("datetime", "date"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
    ("uuid", "UUID"),
    ("zoneinfo", "ZoneInfo"),
}
"""Named, not imported: an instance can only exist where the module has been imported."""

_STANDARD_TIMES = {("datetime", "datetime"), ("datetime", "time")}

_HARMLESS_DESCRIPTORS = (
    types.FunctionType,
    types.MemberDescriptorType,
    types.GetSetDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.BuiltinFunctionType,
    classmethod,
    staticmethod,
    property,
    type,
)
"""Class attributes that keep nothing in an instance, unlike ``functools.cached_property``."""

_parts: weakref.WeakKeyDictionary[type, Parts | None] = weakref.WeakKeyDictionary()


def parts_of(cls: type) -> Parts | None:
    """Return how to list what an instance of ``cls`` holds; None if ``cls`` is no holder.

    A type that turns out to be an atom joins ``ATOMS``.
    """
    if cls is tuple or cls is frozenset:
        return _itself
    try:
        return _parts[cls]
    except KeyError:
        parts = _parts[cls] = _find_parts(cls)
        return parts


def inherits(cls: type, *names: str) -> bool:
    """Whether a class has left these attributes as ``object`` has them, or does not."""
    return all(getattr(cls, name, None) is getattr(object, name, None) for name in names)


def copies_by_default(cls: type) -> bool:
    """Whether ``copy.deepcopy`` takes instances apart by itself, running no code of the class."""
    return (
        inherits(cls, "__reduce_ex__", "__reduce__", "__deepcopy__", "__getattr__")
        and (inherits(cls, "__getattribute__") or issubclass(cls, tuple))
        and all(_is_default_hook(cls, name) for name in ("__getstate__", "__setstate__"))
        and cls not in copyreg.dispatch_table
    )


def _is_default_hook(cls: type, name: str) -> bool:
    """Whether a hook is missing, ``object``'s, or what ``dataclasses`` adds for frozen slots."""
    hook = getattr(cls, name, None)
    return hook is getattr(object, name, None) or (getattr(hook, "__module__", "") == "dataclasses")


def _find_parts(cls: type) -> Parts | None:
    if _is_atom(cls):
        if len(ATOMS) < MOST_ATOMS:
            ATOMS.add(cls)
        return _nothing
    if _is_standard(cls, _STANDARD_TIMES):
        return _time_zone
    if not copies_by_default(cls):
        return None
    if issubclass(cls, tuple) and hasattr(cls, "_fields") and cls.__dictoffset__ == 0:
        return _itself
    return _parts_of_dataclass(cls) if _is_frozen_dataclass(cls) else None


def _is_atom(cls: type) -> bool:
    if issubclass(cls, type) or _is_standard(cls, _STANDARD_ATOMS):
        return True
    if not isinstance(cls, enum.EnumMeta):
        return False
    return getattr(cls, "__deepcopy__", None) is getattr(enum.Enum, "__deepcopy__", None)


def _is_standard(cls: type, names: set[tuple[str, str]]) -> bool:
    name = (cls.__module__, cls.__qualname__)
    return name in names and getattr(sys.modules.get(name[0]), name[1], None) is cls


def _is_frozen_dataclass(cls: type) -> bool:
    """Whether instances refuse changes, and their class has nothing that would keep one anyhow."""
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen or not inherits(cls, "__new__"):
        return False
    return all(
        isinstance(attribute, _HARMLESS_DESCRIPTORS) or not hasattr(type(attribute), "__get__")
        for base in cls.__mro__[:-1]
        for attribute in base.__dict__.values()
    )


def _parts_of_dataclass(cls: type) -> Parts:
    slots = [
        name
        for base in cls.__mro__
        for name, attribute in base.__dict__.items()
        if isinstance(attribute, types.MemberDescriptorType)
    ]
    if not slots:
        return _attributes
    if cls.__dictoffset__:
        return lambda record: [*vars(record).values(), *_slot_values(record, slots)]
    return lambda record: _slot_values(record, slots)


def _slot_values(record: object, slots: list[str]) -> list[Any]:
    return [getattr(record, name, None) for name in slots]


def _attributes(record: object) -> Collection[Any]:
    return vars(record).values()


def _nothing(_: object) -> tuple[()]:
    return ()


def _itself(holder: Collection[Any]) -> Collection[Any]:
    return holder


def _time_zone(moment: Any) -> tuple[Any]:
    return (moment.tzinfo,)
