"""A sealed graph of containers, and the quickest way to make one more of it.

The graph is kept flat: a list of *shells* (one per container, each able to ``copy()`` itself
without its children) and the *links* that say which copy belongs where in which other copy.
Making one more is a pass over the shells and a pass over the links: no recursion, no look-up by
identity, no look at a single leaf. References that the graph shares, cycles too, are links like
any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from coalestra.concurrency.instances import InstanceShell

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
