"""What is known about a sealed payload: how to open it, and whether that takes long."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar


class Seal:
    """How one sealed payload is opened; found out once, when it was sealed.

    Attributes:
        name: the kind of seal, to read.
        opener: makes a copy of the payload that shares nothing mutable with it.
        brief: whether the opener is quick enough for the event loop.
    """

    __slots__ = ("brief", "name", "opener")

    SHARED: ClassVar[Seal]
    """Deeply immutable: the payload is its own copy."""

    DEEP: ClassVar[Seal]
    """Holds something that only ``copy.deepcopy`` can copy, for as long as that may take."""

    def __init__(self, name: str, opener: Callable[[Any], Any], *, brief: bool) -> None:
        self.name: str = name
        self.opener: Callable[[Any], Any] = opener
        self.brief: bool = brief

    def __repr__(self) -> str:
        return f"<Seal {self.name}{'' if self.brief else ', takes a thread'}>"


def _same(payload: Any) -> Any:
    return payload


Seal.SHARED = Seal("shared", _same, brief=True)
Seal.DEEP = Seal("deep", copy.deepcopy, brief=False)
FLAT: dict[type, Seal] = {
    dict: Seal("flat dict", dict.copy, brief=True),
    list: Seal("flat list", list.copy, brief=True),
    set: Seal("flat set", set.copy, brief=True),
    bytearray: Seal("flat bytearray", bytearray.copy, brief=True),
}
"""The seals of brief containers that hold only immutable objects."""

Sealed = tuple[Any, Seal]
"""A payload that only the library has, with its seal."""
