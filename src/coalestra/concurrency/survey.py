"""Finding the containers of a payload and their links, in one walk, breadth first."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from graphlib import TopologicalSorter
from typing import Any

from coalestra.concurrency.blueprint import (
    HUGE,
    Blueprint,
    Crossing,
    HugeDict,
    HugeList,
    Shell,
    Span,
)
from coalestra.concurrency.immutables import ATOMS, parts_of
from coalestra.concurrency.instances import shell_of

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
