"""What is known about a sealed payload: how to open it, and whether that takes long."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

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
