"""Sealing: one private copy of a payload, and the knowledge of how to copy it again.

The copies are ``copy.deepcopy``'s, except that immutable objects may stay the same.
"""

from __future__ import annotations

import copy
import copyreg
import enum
import math
import sys
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from graphlib import TopologicalSorter
from typing import Any, ClassVar, Protocol

# What is known about a sealed payload: how to open it, and whether that takes long ---------------


PORTION = 32
"""The weight that may be opened on the event loop between two looks at the clock."""


class Seal:
    """How one sealed payload is opened; found out once, when it was sealed.

    Attributes:
        name: the kind of seal, to read.
        opener: makes a copy of the payload that shares nothing mutable with it.
        brief: whether the opener is quick enough for the event loop.
        weight: how much of a `PORTION` opening it takes. One of unknown size takes it all.
    """

    __slots__ = ("brief", "name", "opener", "weight")

    SHARED: ClassVar[Seal]
    """Deeply immutable: the payload is its own copy."""

    DEEP: ClassVar[Seal]
    """Holds something that only ``copy.deepcopy`` can copy, for as long as that may take."""

    def __init__(
        self, name: str, opener: Callable[[Any], Any], *, brief: bool, weight: int = PORTION
    ) -> None:
        self.name: str = name
        self.opener: Callable[[Any], Any] = opener
        self.brief: bool = brief
        self.weight: int = weight

    def __repr__(self) -> str:
        return f"<Seal {self.name}{'' if self.brief else ', takes a thread'}>"


def _same(payload: Any) -> Any:
    return payload


Seal.SHARED = Seal("shared", _same, brief=True, weight=1)
Seal.DEEP = Seal("deep", copy.deepcopy, brief=False)
_FLAT = 2
FLAT: dict[type, Seal] = {
    dict: Seal("flat dict", dict.copy, brief=True, weight=_FLAT),
    list: Seal("flat list", list.copy, brief=True, weight=_FLAT),
    set: Seal("flat set", set.copy, brief=True, weight=_FLAT),
    bytearray: Seal("flat bytearray", bytearray.copy, brief=True, weight=_FLAT),
}
"""The seals of brief containers that hold only immutable objects."""

Sealed = tuple[Any, Seal]
"""A payload that only the library has, with its seal."""


# Which objects can be passed around without a copy, because nobody can change them ---------------
#
# The answer is given by exact type, never by ``isinstance``: a subclass of ``str`` may carry a
# mutable attribute. Three groups of types count:
#
# - *atoms*: what ``copy.deepcopy`` returns as it is, the immutable values of the standard library,
#   and the members of enumerations;
# - *holders*: tuples, named tuples, frozen sets, frozen dataclasses and aware times, which are
#   immutable if everything they hold is;
# - everything else, which is not immutable as far as anybody knows.


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


# Plain instances: objects of Python classes that leave their copying to ``copy.deepcopy`` --------


_BUILDERS = ("__new__", "__getnewargs__", "__getnewargs_ex__")
_NEW_OBJECT: Any = object().__reduce_ex__(2)[0]

_plain: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


class InstanceShell:
    """One instance without regard to what its attributes hold."""

    __slots__ = ("_attributes", "_cls", "_slots")

    def __init__(self, cls: type, attributes: dict[str, Any], slots: dict[str, Any]) -> None:
        self._cls = cls
        self._attributes = attributes
        self._slots = slots

    def copy(self) -> Any:
        """Return a new instance with the same attributes, without calling its class."""
        instance: Any = object.__new__(self._cls)
        if self._attributes:
            instance.__dict__.update(self._attributes)
        for name, value in self._slots.items():
            object.__setattr__(instance, name, value)
        return instance

    def items(self) -> list[tuple[str, Any]]:
        """Every attribute with its value."""
        return [*self._attributes.items(), *self._slots.items()]

    def forget(self, names: Iterable[str]) -> None:
        """Keep the places of attributes that ``attach`` will fill, but not what they hold."""
        for name in names:
            held = self._slots if name in self._slots else self._attributes
            held[name] = None

    def attach(self, instance: Any, names: Iterable[str], children: Iterable[Any]) -> None:
        """Give attributes of a copy the values that belong to it."""
        for name, child in zip(names, children, strict=True):
            if name in self._slots:
                object.__setattr__(instance, name, child)
            else:
                instance.__dict__[name] = child


def shell_of(instance: Any) -> InstanceShell | None:
    """Return the shell of a plain instance; None for one whose class has a say in its copying."""
    cls = type(instance)
    if not _is_plain(cls):
        return None
    try:
        builder, arguments, state, *more = instance.__reduce_ex__(4)
    except Exception:  # copy.deepcopy will meet it again, and report it
        return None
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    attributes = {} if attributes is None else attributes
    slots = {} if slots is None else slots
    if builder is not _NEW_OBJECT or arguments != (cls,) or any(more):
        return None
    if type(attributes) is not dict or not COPY_HOOKS.isdisjoint(attributes):
        return None
    if slots and not inherits(cls, "__setattr__"):
        return None
    return InstanceShell(cls, attributes.copy(), slots)


def _is_plain(cls: type) -> bool:
    try:
        return _plain[cls]
    except KeyError:
        verdict = _plain[cls] = copies_by_default(cls) and inherits(cls, *_BUILDERS)
        return verdict


# A sealed graph of containers, and the quickest way to make one more of it -----------------------
#
# The graph is kept flat: a list of *shells* (one per container, each able to ``copy()`` itself
# without its children) and the *links* that say which copy belongs where in which other copy.
# Making one more is a pass over the shells and a pass over the links: no recursion, no look-up by
# identity, no look at a single leaf. References that the graph shares, cycles too, are links like
# any other.


HUGE = 100_000
"""From so many items on, a container is copied in Python rather than in one C call: a C call
keeps every other thread, the event loop's too, waiting until it ends."""


class Shell(Protocol):
    """One container without regard to what it contains."""

    def copy(self) -> Any:
        """Return a new container with the same items."""


class HugeList:
    """A long list that other threads can interrupt the copying of."""

    __slots__ = ("_items",)

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def copy(self) -> list[Any]:
        """Return a new list with the same items."""
        return [item for item in self._items]  # noqa: C416 - see HUGE


class HugeDict:
    """A large dictionary that other threads can interrupt the copying of."""

    __slots__ = ("_items",)

    def __init__(self, items: dict[Any, Any]) -> None:
        self._items = items

    def copy(self) -> dict[Any, Any]:
        """Return a new dictionary with the same items in the same order."""
        return {key: value for key, value in self._items.items()}  # noqa: C416 - see HUGE


Span = tuple[int, Sequence[Any], int]
"""Parent, keys, first child: the children stand side by side, in the order of the keys."""

Crossing = tuple[int, Sequence[Any], Sequence[int]]
"""Parent, keys, children: a key and a child at a time; some were met before, here or elsewhere."""


class Blueprint:
    """How to make one more copy of a graph; the first shell is the whole."""

    __slots__ = ("_crossings", "_instances", "_shells", "_spans", "_tuples")

    def __init__(
        self,
        shells: list[Shell],
        tuples: Sequence[Crossing],
        spans: Sequence[Span],
        crossings: Sequence[Crossing],
        instances: Sequence[Crossing],
    ) -> None:
        """Take the parts.

        Args:
            shells: one per container; that of a tuple makes a list.
            tuples: the links into each tuple, a tuple inside another one before it.
            spans: the links into lists and dictionaries whose children stand side by side.
            crossings: the links into all other lists and dictionaries.
            instances: the links into attributes of plain instances.
        """
        self._shells = shells
        self._tuples = tuples
        self._spans = spans
        self._crossings = crossings
        self._instances = instances

    def __repr__(self) -> str:
        return f"<Blueprint of {len(self._shells)} containers>"

    @property
    def is_flat(self) -> bool:
        """Whether there is only one container."""
        return len(self._shells) == 1 and not self._tuples and not self._crossings

    def open(self, _: object = None) -> Any:
        """Return one more copy of the graph, sharing nothing that could change."""
        return self.link([shell.copy() for shell in self._shells])

    def link(self, copies: list[Any]) -> Any:
        """Put every copy of a shell where it belongs, and return the whole."""
        for parent, keys, children in self._tuples:
            target = copies[parent]
            for key, child in zip(keys, children, strict=True):
                target[key] = copies[child]
            copies[parent] = tuple(target)
        for parent, keys, first in self._spans:
            target = copies[parent]
            for child, key in enumerate(keys, first):
                target[key] = copies[child]
        for parent, keys, children in self._crossings:
            target = copies[parent]
            for key, child in zip(keys, children, strict=True):
                target[key] = copies[child]
        for parent, names, children in self._instances:
            shell = self._shells[parent]
            assert isinstance(shell, InstanceShell)
            shell.attach(copies[parent], names, [copies[child] for child in children])
        return copies[0]


# Finding the containers of a payload and their links, in one walk, breadth first -----------------


_DEEPEST_HOLDER = 50
_FEW = 8
_CONTAINER_STEPS = 16
_MUTABLE = frozenset({dict, list, set, bytearray})
_SIZED = _MUTABLE | {tuple}


class UnknownPayload(Exception):
    """The payload holds something that only its own class knows how to copy."""


class LargePayload(Exception):
    """The walk would take more steps than were allowed."""


def only_atoms(items: Collection[Any]) -> bool:
    """Whether every item is of a type that is shared."""
    if len(items) < HUGE:
        return ATOMS.issuperset(map(type, items))
    return all(type(item) in ATOMS for item in items)


def is_flat(container: dict[Any, Any]) -> bool:
    """Whether every key and every value of a dictionary is of a type that is shared."""
    if len(container) > _FEW:
        return only_atoms(container.values()) and only_atoms(container)
    for key, item in container.items():
        if type(item) not in ATOMS or type(key) not in ATOMS:
            return False
    return True


class Survey:
    """One walk over one payload.

    Attributes:
        walked: how many steps it took: one for an item, several for a container.
    """

    __slots__ = (
        "_allowed",
        "_crossings",
        "_indexes",
        "_instances",
        "_originals",
        "_shells",
        "_spans",
        "_tuples",
        "_verdicts",
        "walked",
    )

    def __init__(self, allowed: float) -> None:
        """Allow so many steps."""
        self._allowed = allowed
        self.walked: int = 0
        self._originals: list[Any] = []
        self._indexes: dict[int, int] = {}
        self._verdicts: dict[int, bool] = {}
        self._shells: list[Shell] = []
        self._tuples: dict[int, Crossing] = {}
        self._spans: list[Span] = []
        self._crossings: list[Crossing] = []
        self._instances: list[Crossing] = []

    def private_copy(self, value: Any) -> tuple[Any, Blueprint | None]:
        """Return a first copy and the blueprint for more; the value and None if immutable.

        Raises:
            UnknownPayload: if only ``copy.deepcopy`` will do.
            LargePayload: if it takes more steps than allowed.
        """
        if not self._children([(None, value)])[0]:
            return value, None
        # The walk finds more originals as it goes; each is visited in the order it was found.
        copies = [self._visit(place, original) for place, original in enumerate(self._originals)]
        blueprint = Blueprint(
            self._shells,
            self._tuples_inside_out(),
            tuple(self._spans),
            tuple(self._crossings),
            tuple(self._instances),
        )
        return blueprint.link(copies), blueprint

    def _walk(self, items: int) -> None:
        self.walked += items + _CONTAINER_STEPS
        if self.walked > self._allowed:
            raise LargePayload

    def _visit(self, parent: int, original: Any) -> Any:
        """Keep a shell for one container, note its links, and return a first copy of it."""
        cls = type(original)
        if cls not in _SIZED:
            return self._visit_instance(parent, original)
        self._walk(len(original))
        if cls is dict:
            return self._visit_dict(parent, original)
        if cls is list or cls is tuple:
            return self._visit_row(parent, original)
        shell = original.copy()
        if cls is set:
            self._require_immutable(shell)
        self._shells.append(shell)
        return shell

    def _visit_dict(self, parent: int, original: dict[Any, Any]) -> dict[Any, Any]:
        is_huge = len(original) >= HUGE
        shell = HugeDict(original).copy() if is_huge else original.copy()
        self._shells.append(HugeDict(shell) if is_huge else shell)
        if not is_flat(shell):
            self._require_immutable(shell)
            self._link(parent, shell.items())
        return shell

    def _visit_row(self, parent: int, original: Any) -> list[Any]:
        is_huge = len(original) >= HUGE
        shell = HugeList(original).copy() if is_huge else list(original)
        self._shells.append(HugeList(shell) if is_huge else shell)
        if type(original) is tuple:
            self._tuples[parent] = (parent, *self._children(enumerate(shell)))
        elif not only_atoms(shell):
            self._link(parent, enumerate(shell))
        return shell

    def _visit_instance(self, parent: int, original: Any) -> Any:
        shell = shell_of(original)
        if shell is None:
            raise UnknownPayload
        items = shell.items()
        self._walk(len(items))
        self._shells.append(shell)
        names, children = self._children(items)
        if names:
            shell.forget(names)
            self._instances.append((parent, names, children))
        return shell.copy()

    def _link(self, parent: int, items: Iterable[tuple[Any, Any]]) -> None:
        """Note what goes where in a list or dictionary."""
        first = len(self._originals)
        keys, children = self._children(items)
        if len(keys) > len(self._originals) - first:
            self._crossings.append((parent, keys, children))
        elif keys:
            self._spans.append((parent, keys, first))

    def _children(self, items: Iterable[tuple[Any, Any]]) -> tuple[tuple[Any, ...], list[int]]:
        """Return the keys under which containers stand, and the places of these.

        Each container gets its place at first sight, so those never met before stand in a row.
        """
        keys = []
        children = []
        originals, indexes = self._originals, self._indexes
        for key, child in items:
            cls = type(child)
            if cls in ATOMS:
                continue
            index = indexes.get(id(child))
            if index is None:
                if cls not in _MUTABLE and self._is_immutable(child):
                    continue
                index = indexes[id(child)] = len(originals)
                originals.append(child)
            keys.append(key)
            children.append(index)
        return tuple(keys), children

    def _require_immutable(self, items: Collection[Any]) -> None:
        if not (only_atoms(items) or all(self._is_immutable(item) for item in items)):
            raise UnknownPayload

    def _is_immutable(self, value: Any, depth: int = 0) -> bool:
        """Whether a value can be shared; False when in doubt."""
        cls = type(value)
        if cls in ATOMS:
            return True
        verdict = self._verdicts.get(id(value))
        if verdict is not None:
            return verdict
        self._verdicts[id(value)] = False
        parts = parts_of(cls)
        if parts is None or depth > _DEEPEST_HOLDER:
            return False
        held = parts(value)
        self._walk(len(held))
        verdict = only_atoms(held) or all(self._is_immutable(part, depth + 1) for part in held)
        self._verdicts[id(value)] = verdict
        return verdict

    def _tuples_inside_out(self) -> tuple[Crossing, ...]:
        """The links into tuples, ordered so that a tuple is whole before another one takes it."""
        if len(self._tuples) < 2:
            return tuple(self._tuples.values())
        inside = {
            parent: [child for child in children if child in self._tuples]
            for parent, (_, _, children) in self._tuples.items()
        }
        return tuple(self._tuples[index] for index in TopologicalSorter(inside).static_order())


# Sealing: one private copy of a payload, and the knowledge of how to copy it again ---------------


BRIEF = 20_000
"""So many steps are walked on the event loop at a time: one or two milliseconds."""

_SHARED = Seal.SHARED


def seal_flat(value: Any) -> Sealed | None:
    """Seal an atom, or a small container of atoms; the quick way for what is most common."""
    cls = type(value)
    if cls in ATOMS:
        return value, _SHARED
    if cls is dict:
        if len(value) < BRIEF:
            copied = value.copy()
            if is_flat(copied):
                return copied, FLAT[dict]
    elif cls is list and len(value) < BRIEF:
        row = value.copy()
        if only_atoms(row):
            return row, FLAT[list]
    return None


def seal_briefly(value: Any) -> Sealed | None:
    """Seal a payload that is not large and of known types; return None for any other."""
    sealed = seal_flat(value)
    if sealed is not None:
        return sealed
    try:
        return _survey(value, BRIEF)
    except (UnknownPayload, LargePayload):
        return None


def seal_anyhow(value: Any) -> Sealed:
    """Seal any payload, for as long as it may take; raises what the classes inside it raise."""
    sealed = seal_flat(value)
    if sealed is not None:
        return sealed
    try:
        return _survey(value, math.inf)
    except UnknownPayload:
        return copy.deepcopy(value), Seal.DEEP


def _survey(value: Any, allowed: float) -> Sealed:
    survey = Survey(allowed)
    payload, blueprint = survey.private_copy(value)
    if blueprint is None:
        return payload, _SHARED
    brief = survey.walked <= BRIEF
    if brief and blueprint.is_flat and type(payload) in FLAT:
        return payload, FLAT[type(payload)]
    return payload, Seal("graph", blueprint.open, brief=brief)
