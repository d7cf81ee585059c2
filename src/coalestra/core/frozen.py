"""A dictionary that cannot be changed: what every read-only mapping of the library is made of."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

K = TypeVar("K")
T = TypeVar("T")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A ``dict`` that refuses every change with a `TypeError`.

    It reads, compares and serialises as the dictionary it is. ``copy()`` and ``|`` give plain
    dictionaries; ``copy.deepcopy`` and ``pickle`` give frozen ones again.
    """

    __slots__ = ()

    def _refuse(self, *arguments: Any, **named: Any) -> NoReturn:
        raise TypeError("this mapping is read-only; change a copy: dict(mapping)")

    __setitem__: Any = _refuse
    __delitem__: Any = _refuse
    __ior__: Any = _refuse
    clear: Any = _refuse
    pop: Any = _refuse
    popitem: Any = _refuse
    setdefault: Any = _refuse
    update: Any = _refuse

    def __copy__(self) -> FrozenDict[K, V]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict[K, V]:
        twin: FrozenDict[K, V] = type(self)()
        memo[id(self)] = twin  # first, for values that lead back here
        dict.update(twin, {copy.deepcopy(k, memo): copy.deepcopy(v, memo) for k, v in self.items()})
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


EMPTY: FrozenDict[Any, Any] = FrozenDict()
"""The empty one, for everybody who has nothing to say."""


def empty() -> FrozenDict[Any, Any]:
    """Return the empty one: what fields of dataclasses take as their default."""
    return EMPTY


def frozen(mapping: Mapping[K, V]) -> FrozenDict[K, V]:
    """Return ``mapping`` if it is frozen already, else a frozen copy."""
    if isinstance(mapping, FrozenDict):
        return mapping
    return FrozenDict(mapping) if mapping else EMPTY


if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Any:
        """Tell type checkers, and nobody else, that something makes dataclasses."""
        return lambda made: made


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(kind: Any = None, *, final: bool = False, **options: Any) -> Any:
    """Make a class a frozen dataclass with slots; every change is a `FrozenInstanceError`.

    What `dataclasses` makes of the two raises `TypeError` for a name that is no field, and
    ``Model[int](...)`` sets one: before Python 3.13 it forgives an `AttributeError` only, which
    `FrozenInstanceError` is.

    From one that is ``final`` nothing can be derived. Its instances are shared between readers on
    the promise that they cannot change, and may be built by a draft of their own layout: a subclass
    could keep neither.
    """
    if kind is None:
        return partial(record, final=final, **options)
    kind = dataclass(frozen=True, slots=True, **options)(kind)
    names = {each.name for each in fields(kind)}

    def refuse(method: str, done: str) -> None:
        def change(self: Any, name: str, *value: Any) -> None:
            if type(self) is kind or name in names:
                raise FrozenInstanceError(f"cannot {done} field {name!r}")
            getattr(super(kind, self), method)(name, *value)

        change.__name__, change.__qualname__ = method, f"{kind.__qualname__}.{method}"
        setattr(kind, method, change)

    refuse("__setattr__", "assign to")
    refuse("__delattr__", "delete")
    kind.__getstate__, kind.__setstate__ = _state_of, _restore
    if final:
        kind.__init_subclass__ = staticmethod(partial(_refuse_subclass, kind.__name__))
    return kind


def _refuse_subclass(kind: str) -> NoReturn:
    raise TypeError(f"{kind} is final and cannot be subclassed; wrap it instead")


def _state_of(self: Any) -> Any:
    """Return what a copy has: the fields, and what a class that derives from it keeps besides."""
    state = [getattr(self, each.name) for each in fields(self)]
    more = getattr(self, "__dict__", None)
    return (state, more) if more else state


def _restore(self: Any, state: Any) -> None:
    values, more = state if isinstance(state, tuple) else (state, {})
    told = dict(zip([each.name for each in fields(self)], values, strict=True))
    for name, value in {**told, **more}.items():
        object.__setattr__(self, name, value)


def filled(kind: type[T], attributes: dict[str, Any]) -> T:
    """Return an instance of a frozen dataclass without slots, past its constructor and checks.

    It keeps ``attributes``, which must be its own.
    """
    made = object.__new__(kind)
    object.__setattr__(made, "__dict__", attributes)
    return made


# Building frozen, slotted objects at the speed of plain ones -------------------------------------
#
# A frozen dataclass fills itself through ``object.__setattr__``, one slow call for each field. Keys
# and values, of which there are thousands, are filled in as a draft instead: a twin class with the
# very same slots that is not frozen yet, whose instance then changes its class. Measured on CPython
# 3.10 to 3.13 this takes a third of the time. Where Python runs threads side by side, changing a
# class stops all of them: there slots are written one by one, past ``__setattr__``.

FREE_THREADED: bool = not getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether threads run side by side in this interpreter."""


def draft_of(kind: type[Any]) -> type[Any]:
    """Return the mutable twin of the slotted class ``kind``."""
    slots: Any = vars(kind)["__slots__"]
    namespace: dict[str, Any] = {"__slots__": slots, "__doc__": f"A {kind.__name__} being built."}
    if "__orig_bases__" in vars(kind):
        namespace["__orig_bases__"] = vars(kind)["__orig_bases__"]
    return type(f"_{kind.__name__}Draft", kind.__bases__, namespace)
