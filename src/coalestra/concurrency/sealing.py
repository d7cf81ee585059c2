"""Sealing: one private copy of a payload, and the knowledge of how to copy it again.

Every copy is what ``copy.deepcopy`` makes, except that immutable objects may stay the same. Laws:

1. What is immutable is told by exact type, never by ``isinstance``: a subclass of ``str`` may carry
   a mutable attribute. It is an *atom* (what ``copy.deepcopy`` returns as it is, the immutable
   values of the standard library, members of enumerations), or a *holder* of immutable parts only
   (a tuple, named tuple or frozen set, an aware time, a frozen dataclass as in law 2).
2. A frozen dataclass can fill itself lazily, past its own guard. So it is a holder only if it has
   nowhere to keep anything but its fields, and no code of its own that could. Any other is copied.
3. A class may be given a say in its copying at any time, so it is asked for each payload that is
   sealed, and once more when that is opened.
4. Exact lists, dictionaries, sets, byte arrays, tuples with something mutable in them, and plain
   instances are copied as a graph, aliases and cycles included. A payload that holds anything else
   where a copy is needed, or a key or a member of a set that is copied itself, is left to
   ``copy.deepcopy`` as a whole.
5. Brief is what may be done on the event loop. For a graph it is counted in steps when it is
   sealed. How long ``copy.deepcopy`` takes nobody can know, so its last copy is timed. Where code
   of an application's takes part, which may wait for something, many must have been brief first.
"""

from __future__ import annotations

import copy
import copyreg
import dataclasses
import enum
import gc
import math
import reprlib
import sys
import time
import types
import typing
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from graphlib import TopologicalSorter
from typing import Any, ClassVar

PORTION = 32
"""The weight that may be opened on the event loop between two looks at the clock."""


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Seal:
    """How one sealed payload is opened; found out once, when it was sealed.

    Attributes:
        name: the kind of seal, to read.
        opener: makes a copy of the payload that shares nothing mutable with it.
        brief: whether the opener is quick enough for the event loop.
        weight: how much of a `PORTION` opening it takes. One of unknown size takes it all.
    """

    name: str
    opener: Callable[[Any], Any]
    brief: bool
    weight: int = PORTION

    SHARED: ClassVar[Seal]
    """Deeply immutable: the payload is its own copy."""

    def __repr__(self) -> str:
        return f"<Seal {self.name}{'' if self.brief else ', takes a thread'}>"


Seal.SHARED = Seal("shared", lambda payload: payload, brief=True, weight=1)
_COPIED: tuple[Any, ...] = (dict, list, set, bytearray)
FLAT: dict[type, Seal] = {
    kind: Seal(f"flat {kind.__name__}", kind.copy, brief=True, weight=2) for kind in _COPIED
}
"""The seals of brief containers that hold only immutable objects."""

Sealed = tuple[Any, Seal]
"""A payload that only the library has, with its seal."""

BRIEF_SECONDS = 0.0005
"""A copy that took no longer is made on the event loop: a thread would cost about as much."""

_worked_seconds = getattr(time, "thread_time", time.perf_counter)  # not every system has it

_WAITING = 20
"""So many times as long it may last on the wall clock, as threads keep each other waiting."""

_ENOUGH = 20
"""So many brief copies in a row show that a class of an application's is copied in no time."""

_brief_in_a_row: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()


class DeepSeal(Seal):
    """Holds something that only ``copy.deepcopy`` can copy, for as long as that may take."""

    __slots__ = ("_doubtful",)

    def __init__(self, payload: Any = None) -> None:
        self.name = "deep"
        self.brief = False
        self.weight = PORTION
        self._doubtful = doubtful_class(payload)

    def opener(self, payload: Any) -> Any:  # not a slot: a bound method in it would be a cycle
        """Copy a payload, and remember whether that was brief."""
        began, worked = time.perf_counter(), _worked_seconds()
        copied = copy.deepcopy(payload)
        worked, lasted = _worked_seconds() - worked, time.perf_counter() - began
        brief = worked <= BRIEF_SECONDS and lasted <= BRIEF_SECONDS * _WAITING
        cls = self._doubtful
        if cls is not None:
            in_a_row = _brief_in_a_row[cls] = _brief_in_a_row.get(cls, 0) + 1 if brief else 0
            brief = in_a_row > _ENOUGH
        self.brief = brief
        return copied


# Which types are immutable ------------------------------------------------------------------------

ATOMS: set[type] = {
    type(None), type(Ellipsis), type(NotImplemented), bool, int, float, complex, str, bytes, range,
    type, property, types.CodeType, types.FunctionType, types.BuiltinFunctionType, weakref.ref,
}  # fmt: skip
"""The exact types whose instances are shared; grows as known types are met, to ``MOST_ATOMS``."""

MOST_ATOMS = 1000

Parts = Callable[[Any], Collection[Any]]
"""Tells what a holder holds."""


def _nothing(_: object) -> tuple[()]:
    return ()


def _itself(holder: Collection[Any]) -> Collection[Any]:
    return holder


_IMMUTABLE = """
    datetime.date datetime.timedelta datetime.timezone decimal.Decimal fractions.Fraction
    ipaddress.IPv4Address ipaddress.IPv6Address pathlib.PosixPath pathlib.PurePosixPath
    pathlib.PureWindowsPath pathlib.WindowsPath re.Pattern uuid.UUID zoneinfo.ZoneInfo
"""
_STANDARD: dict[str, Parts] = {
    **dict.fromkeys(_IMMUTABLE.split(), _nothing),
    **dict.fromkeys(("datetime.datetime", "datetime.time"), lambda moment: (moment.tzinfo,)),
}
"""Named, not imported: an instance can only exist where the module has been imported."""


def parts_of(cls: type) -> Parts | None:
    """Return how to list what an instance of ``cls`` holds; None if ``cls`` is no holder.

    A type that turns out to be an atom joins ``ATOMS``.
    """
    if cls is tuple or cls is frozenset:
        return _itself
    parts = _known_parts(cls)
    if parts is _nothing and len(ATOMS) < MOST_ATOMS:
        ATOMS.add(cls)
    if parts is not None or cls.__dictoffset__ or not copies_by_default(cls, hooks_of(cls)):
        return parts
    if issubclass(cls, tuple):
        return _itself if hasattr(cls, "_fields") else None
    if cls not in _fields:
        _fields[cls] = _find_fields(cls)
    return _fields[cls]


def _known_parts(cls: type) -> Parts | None:
    if issubclass(cls, type):
        return _nothing
    if isinstance(cls, enum.EnumMeta):
        as_usual = getattr(cls, "__deepcopy__", None) is getattr(enum.Enum, "__deepcopy__", None)
        return _nothing if as_usual else None
    # Modules may be parts of others, as pathlib is a package in newer versions.
    module, name = str(cls.__module__).partition(".")[0], cls.__qualname__
    parts = None if cls.__dictoffset__ else _STANDARD.get(f"{module}.{name}")
    return parts if getattr(sys.modules.get(module), name, None) is cls else None


_OBJECT: Any = object  # whose attributes have other types than those of the same name elsewhere
_GENERATED = frozenset(
    {"__init__", "__repr__", "__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"}
    | {"__setattr__", "__delattr__", "__getstate__", "__setstate__", "__replace__"}
)
_GENERATED_IN = {
    function.__code__.co_filename for function in (dataclasses.dataclass, reprlib.recursive_repr)
} | {"<string>"}


_fields: weakref.WeakKeyDictionary[type, Parts | None] = weakref.WeakKeyDictionary()


def _find_fields(cls: type) -> Parts | None:
    """Return how to list the fields of a frozen dataclass that can keep nothing else."""
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen or cls.__new__ is not _OBJECT.__new__:
        return None
    fields, slots = cls.__dict__.get("__dataclass_fields__", {}), []
    for base in cls.__mro__[:-1]:
        if base is typing.Generic:
            continue
        for name, attribute in base.__dict__.items():
            if isinstance(attribute, types.MemberDescriptorType):
                if name not in fields:
                    return None  # somebody may fill it once the record is made
                slots.append(name)
            elif not _keeps_nothing(name, attribute):
                return None
    return lambda record: [getattr(record, name, None) for name in slots]


def _keeps_nothing(name: str, attribute: Any) -> bool:
    """Whether a class attribute is data, or code that cannot fill an instance once it is made."""
    if not hasattr(type(attribute), "__get__") or name in ("__post_init__", "__weakref__"):
        return True
    if name not in _GENERATED or not isinstance(attribute, types.FunctionType):
        return False
    return attribute.__code__.co_filename in _GENERATED_IN


# Which classes leave their copying to ``copy.deepcopy`` -------------------------------------------


class UnknownPayload(Exception):
    """The payload holds something that only its own class knows how to copy."""


_HOOKS = frozenset({"__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__"})
"""What a class, or by accident an instance, can define to be asked how it is copied."""

_NEW_OBJECT: Any = object().__reduce_ex__(2)[0]


def hooks_of(cls: type) -> list[Any]:
    """Return what a class says at this moment about its copying, and the registry about it."""
    # One by one, as each copy of an instance asks; not every class has every one of them.
    return [
        getattr(cls, "__deepcopy__", None),
        cls.__reduce_ex__,
        cls.__reduce__,
        getattr(cls, "__getstate__", None),
        getattr(cls, "__setstate__", None),
        copyreg.dispatch_table.get(cls),
    ]


_NO_HOOKS = hooks_of(object)


_MOST_LOOKED_AT = 1_000
_LARGE: tuple[Any, ...] = (dict, list, tuple, set, frozenset, deque)


def doubtful_class(payload: Any) -> type | None:
    """Return a class in a payload that runs code of an application's to be copied, if there is one.

    Of a large payload it is the first that is too large to be looked at.
    """
    seen: dict[int, Any] = {}
    left = [payload]
    while left:
        each = left.pop()
        cls = type(each)
        if cls in ATOMS or id(each) in seen or issubclass(cls, (type, types.ModuleType)):
            continue
        seen[id(each)] = each
        size = next((kind.__len__(each) for kind in _LARGE if issubclass(cls, kind)), 0)
        if len(seen) + size > _MOST_LOOKED_AT or any(map(_is_foreign, hooks_of(cls))):
            return cls
        left += gc.get_referents(each)
    return None


def _is_foreign(hook: Any) -> bool:
    """Whether what a class says about its copying is code in Python, and not the library's own."""
    module = str(getattr(hook, "__module__", ""))
    return isinstance(hook, types.FunctionType) and (
        module.partition(".")[0] not in sys.stdlib_module_names
    )


def copies_by_default(cls: type, hooks: list[Any]) -> bool:
    """Whether ``copy.deepcopy`` takes instances apart by itself, running no code of the class."""
    if hooks != _NO_HOOKS and not _has_state_of_dataclass(hooks):
        return False
    # A tuple has an attribute access of its own, in C.
    plain = issubclass(cls, tuple) or cls.__getattribute__ is _OBJECT.__getattribute__
    return plain and not hasattr(cls, "__getattr__")


def _has_state_of_dataclass(hooks: list[Any]) -> bool:
    """Whether all that a class says is what ``dataclasses`` adds for frozen slots."""
    *others, get_state, set_state, registered = hooks
    return (
        [*others, registered] == [*_NO_HOOKS[:3], None]
        and getattr(get_state, "__module__", "") == "dataclasses"
        and getattr(set_state, "__module__", "") == "dataclasses"
    )


def is_plain(cls: type, hooks: list[Any]) -> bool:
    """Whether instances are all that their attributes are, and copied by these."""
    builds_itself = hasattr(cls, "__getnewargs__") or hasattr(cls, "__getnewargs_ex__")
    own_new = cls.__new__ is not _OBJECT.__new__
    return copies_by_default(cls, hooks) and not own_new and not builds_itself


def state_of(
    instance: Any, cls: type[Any], hooks: list[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an instance of a plain class has in its dictionary, and in its slots: two places.

    Raises `UnknownPayload` if it has a say in its copying.
    """
    try:
        builder, arguments, state, *more = instance.__reduce_ex__(4)
        if type(state) is list and _has_state_of_dataclass(hooks):
            names = [field.name for field in dataclasses.fields(cls)]
            return {}, dict(zip(names, state, strict=True))
    except Exception:
        raise UnknownPayload from None  # copy.deepcopy will meet it again, and report it
    attributes, slots = state if isinstance(state, tuple) else (state, None)
    attributes = {} if attributes is None else attributes
    slots = {} if slots is None else slots
    if (
        builder is not _NEW_OBJECT
        or arguments != (cls,)
        or any(more)
        or type(attributes) is not dict
        or not _HOOKS.isdisjoint(attributes)
        or (slots and cls.__setattr__ is not _OBJECT.__setattr__)
    ):
        raise UnknownPayload
    return attributes, slots


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


@dataclasses.dataclass(slots=True, eq=False)
class HugeShell:
    """The shell of a container that other threads can interrupt the copying of."""

    items: Any

    def copy(self) -> Any:
        """Return a new dictionary, set or list with the same items in the same order."""
        if type(self.items) is dict:
            return {key: value for key, value in self.items.items()}  # noqa: C416 - see HUGE
        if type(self.items) is set:
            return {item for item in self.items}  # noqa: C416 - see HUGE
        return [item for item in self.items]  # noqa: C416 - see HUGE


@dataclasses.dataclass(slots=True, eq=False)
class InstanceShell:
    """The shell of a plain instance: its class, and what it has in its two places."""

    cls: type
    attributes: dict[str, Any]
    slots: dict[str, Any]

    def copy(self) -> Any:
        """Return a new instance with the same attributes, without calling its class."""
        instance: Any = object.__new__(self.cls)
        if self.attributes:
            instance.__dict__.update(self.attributes)
        for name, value in self.slots.items():
            object.__setattr__(instance, name, value)
        return instance


def _set_attribute(instance: Any, name: str, value: Any) -> None:
    instance.__dict__[name] = value  # whatever the class has under that name


Put = Callable[[Any, str, Any], object]
Links = tuple[int, Sequence[Any], Sequence[int]]
"""Parent, keys, children: a key and a child at a time; those never met before stand in a row."""


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Blueprint:
    """How to make one more copy of a graph; the first shell is the whole.

    Attributes:
        shells: one per container; that of a tuple makes a list.
        tuples: the links into each tuple, a tuple inside another one before it.
        items: the links into lists and dictionaries.
        places: the links into plain instances, with what puts them into one of their two places.
        classes: the classes of plain instances, and what they said when these were sealed.
    """

    shells: list[Any]
    tuples: list[Links]
    items: list[Links]
    places: list[tuple[Put, Links]]
    classes: dict[type, list[Any]]

    def open(self, payload: Any) -> Any:
        """Return one more copy of the sealed graph, sharing nothing that could change."""
        for cls, hooks in self.classes.items():
            if hooks_of(cls) != hooks:
                return copy.deepcopy(payload)
        return self.link([shell.copy() for shell in self.shells])

    def link(self, copies: list[Any]) -> Any:
        """Put every copy of a shell where it belongs, and return the whole."""
        for parent, keys, children in self.tuples:
            target = copies[parent]
            for key, child in zip(keys, children, strict=True):
                target[key] = copies[child]
            copies[parent] = tuple(target)
        for parent, keys, children in self.items:
            target = copies[parent]
            for key, child in zip(keys, children, strict=True):
                target[key] = copies[child]
        for put, (parent, names, children) in self.places:
            for name, child in zip(names, children, strict=True):
                put(copies[parent], name, copies[child])
        return copies[0]


# Finding the containers of a payload and their links, in one walk, breadth first -----------------

_DEEPEST_HOLDER = 50
_FEW = 8
_CONTAINER_STEPS = 16
_SIZED = {*FLAT, tuple}


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

    Args:
        allowed: how many steps it may take: one for an item, several for a container.

    Attributes:
        walked: how many it took.
    """

    def __init__(self, allowed: float) -> None:
        self._allowed = allowed
        self.walked: int = 0
        self._originals: list[Any] = []
        self._indexes: dict[int, int] = {}
        self._tuples: dict[int, Links] = {}
        self._made = Blueprint([], [], [], [], {})
        self._verdicts: dict[int, bool] = {}
        self._parts: dict[type, Parts | None] = {}

    def private_copy(self, value: Any) -> tuple[Any, Blueprint | None]:
        """Return a first copy and the blueprint for more; the value and None if immutable."""
        if not self._children([(None, value)])[0]:
            return value, None
        # The walk finds more originals as it goes; each is visited in the order it was found.
        copies = [self._visit(place, original) for place, original in enumerate(self._originals)]
        self._made.tuples = self._tuples_inside_out()
        return self._made.link(copies), self._made

    def _walk(self, items: int) -> None:
        self.walked += items + _CONTAINER_STEPS
        if self.walked > self._allowed:
            raise LargePayload

    def _visit(self, parent: int, original: Any) -> Any:
        """Keep a shell for one container, note its links, and return a first copy of it."""
        cls = type(original)
        if cls not in _SIZED:
            return self._visit_instance(parent, cls, original)
        self._walk(len(original))
        first: Any
        if len(original) < HUGE or cls is bytearray:
            shell = first = list(original) if cls is tuple else original.copy()
        else:
            first = HugeShell(original).copy()
            shell = HugeShell(first)
        self._made.shells.append(shell)
        if cls is tuple:
            self._tuples[parent] = (parent, *self._children(enumerate(first)))
        elif cls is list:
            if not only_atoms(first):
                self._link(parent, enumerate(first))
        elif cls is set:
            self._require_shared(first)
        elif cls is dict and not is_flat(first):
            self._require_shared(first)
            self._link(parent, first.items())
        return first

    def _visit_instance(self, parent: int, cls: type, original: Any) -> Any:
        hooks = self._made.classes.get(cls)
        if hooks is None:
            hooks = self._made.classes[cls] = hooks_of(cls)
            if not is_plain(cls, hooks):
                raise UnknownPayload
        attributes, slots = state_of(original, cls, hooks)
        self._walk(len(attributes) + len(slots))
        shell = InstanceShell(cls, attributes, slots)
        first = shell.copy()
        self._made.shells.append(shell)
        # From here on nothing is read that the source, or another thread, may change.
        if attributes:
            shell.attributes = first.__dict__
            self._place(parent, _set_attribute, shell.attributes)
        if slots:
            slots.update(dict.fromkeys(self._place(parent, object.__setattr__, slots)))
        return first

    def _place(self, parent: int, put: Put, held: dict[str, Any]) -> Sequence[str]:
        """Note what goes where in one place of an instance, and return under which names."""
        names, children = self._children(held.items())
        if names:
            self._made.places.append((put, (parent, names, children)))
        return names

    def _link(self, parent: int, items: Iterable[tuple[Any, Any]]) -> None:
        """Note what goes where in a list or dictionary."""
        first = len(self._originals)
        keys, children = self._children(items)
        if keys:
            row = range(first, len(self._originals))
            self._made.items.append((parent, keys, row if len(row) == len(keys) else children))

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
                if cls not in FLAT and self._is_immutable(child):
                    continue
                index = indexes[id(child)] = len(originals)
                originals.append(child)
            keys.append(key)
            children.append(index)
        return tuple(keys), children

    def _require_shared(self, keys: Collection[Any]) -> None:
        """Leave keys that are copied, and so may need a hash before they are whole, to others."""
        if not only_atoms(keys) and not all(map(self._is_immutable, keys)):
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
        if cls not in self._parts:
            self._parts[cls] = parts_of(cls)
        parts = self._parts[cls]
        if parts is None or depth > _DEEPEST_HOLDER:
            return False
        held = parts(value)
        self._walk(len(held))
        verdict = only_atoms(held) or all(self._is_immutable(part, depth + 1) for part in held)
        self._verdicts[id(value)] = verdict
        return verdict

    def _tuples_inside_out(self) -> list[Links]:
        """The links into tuples, ordered so that a tuple is whole before another one takes it."""
        if len(self._tuples) < 2:
            return list(self._tuples.values())
        inside = {
            parent: [child for child in children if child in self._tuples]
            for parent, (_, _, children) in self._tuples.items()
        }
        return [self._tuples[index] for index in TopologicalSorter(inside).static_order()]


# Sealing a payload --------------------------------------------------------------------------------

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
    try:
        return _survey(value, BRIEF)
    except (UnknownPayload, LargePayload):
        return None


def seal_anyhow(value: Any) -> Sealed:
    """Seal any payload, for as long as it may take; raises what the classes inside it raise."""
    try:
        return seal_flat(value) or _survey(value, math.inf)
    except UnknownPayload:
        seal = DeepSeal(value)
        return seal.opener(value), seal


def copy_anyhow(value: Any) -> Any:
    """Return a copy of any payload, of which no other will be made; raises as `seal_anyhow`."""
    try:
        return (seal_flat(value) or _survey(value, math.inf))[0]
    except UnknownPayload:
        return copy.deepcopy(value)


def _survey(value: Any, allowed: float) -> Sealed:
    survey = Survey(allowed)
    payload, blueprint = survey.private_copy(value)
    if blueprint is None:
        return payload, _SHARED
    brief = survey.walked <= BRIEF
    is_flat = len(blueprint.shells) == 1 and not blueprint.items  # it may be in itself
    if brief and is_flat and type(payload) in FLAT:
        return payload, FLAT[type(payload)]
    return payload, Seal("graph", blueprint.open, brief=brief)
