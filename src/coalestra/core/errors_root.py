"""The root of every exception that the library raises on its own account."""

from __future__ import annotations

from typing import Any, TypeVar

E = TypeVar("E", bound="CoalestraError")


class CoalestraError(Exception):
    """Something went wrong that the library knows by name.

    Each kind keeps the facts it was made from as attributes, survives pickling with them whatever
    its constructor asks for, and can be copied: a copy has the same facts and the same cause, and
    a traceback of its own.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        # The inherited form calls the constructor with the message, which few of these accept.
        return _without_facts, (type(self), self.args), self.__dict__ or None

    def __copy__(self: E) -> E:
        twin = _without_facts(type(self), self.args)
        twin.__dict__.update(self.__dict__)
        twin.__cause__ = self.__cause__
        twin.__context__ = self.__context__
        twin.__suppress_context__ = self.__suppress_context__
        return twin


def _without_facts(kind: type[E], args: tuple[Any, ...]) -> E:
    return kind.__new__(kind, *args)
