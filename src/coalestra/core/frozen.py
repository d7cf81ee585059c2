"""A dictionary that cannot be changed: what every read-only mapping of the library is made of."""

from __future__ import annotations

import copy
from typing import Any, NoReturn, TypeVar

K = TypeVar("K")
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
