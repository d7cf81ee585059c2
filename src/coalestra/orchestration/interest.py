"""Whether anyone still wants what many wait for."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol


class Sought(Protocol):
    """Anything that people may or may not be waiting for."""

    @property
    def wanted(self) -> bool:
        """Whether anyone waits."""


class Interest:
    """Finds out cheaply, again and again, whether anyone still waits for any of many things.

    It remembers one that was wanted, and looks for another only when that one no longer is.
    """

    __slots__ = ("_members", "_rest", "_witness")

    def __init__(self, members: Collection[Sought]) -> None:
        self._members = members
        self._rest: Iterator[Sought] | None = None
        self._witness: Sought | None = None

    @property
    def alive(self) -> bool:
        """Whether anyone waits for any of them."""
        if self._witness is not None and self._witness.wanted:
            return True
        if self._rest is not None and self._find(self._rest):
            return True
        return self._find(iter(tuple(self._members)))

    def _find(self, rest: Iterator[Sought]) -> bool:
        self._rest = rest
        self._witness = next((each for each in rest if each.wanted), None)
        return self._witness is not None
