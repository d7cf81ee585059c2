"""Plain instances: objects of Python classes that leave their copying to ``copy.deepcopy``."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from coalestra.concurrency.immutables import COPY_HOOKS, copies_by_default, inherits

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
