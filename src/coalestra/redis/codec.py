"""Values as bytes, and back as exactly what they were: MessagePack with a tag for every other type.

Laws:

1. What is read has the very types that were written, at every depth. Objects that appeared twice
   in a value come back as two.
2. A type that the codec does not know is refused when it is written: by name, with its place in the
   value and the remedy.
3. Nothing in the bytes is ever called or imported: they name a registered type or they are
   unreadable (`UnreadableEntryError`), whoever wrote them.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import uuid
import zoneinfo
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import partial
from operator import attrgetter, getitem
from typing import Any, Final, NamedTuple, Protocol

import msgspec
from msgspec.msgpack import Decoder, Encoder, Ext

from coalestra.core.errors import CoalestraError
from coalestra.core.frozen import FrozenDict
from coalestra.core.serialization import qualified_type
from coalestra.core.validation import instance, plain_function, readable, shown, text


class UnstorableValueError(CoalestraError, TypeError):
    """A value holds something that cannot be written to a shared cache.

    The fault is the value's: it needs a type that is built in or registered, or a bounded size.

    Attributes:
        type_name: the full name of the type that is not known, or of the value that is too large.
        place: where in the value it is, as Python would write it; cut if that is long.
    """

    def __init__(self, type_name: str, place: str, reason: str) -> None:
        self.type_name: str = type_name
        self.place: str = place
        super().__init__(f"{place} cannot be stored in the shared cache: {reason}")


class UnreadableEntryError(CoalestraError, ValueError):
    """Bytes of a shared cache are not what this version of the program can read.

    Another version wrote them, a model is not registered here, or they are damaged. The entry
    counts as missing and is replaced by the next write.
    """


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """How values of one type of the application's travel.

    Attributes:
        kind: the type itself; values of a subclass are not values of it.
        name: what the bytes call it. Keep it when the class moves or is renamed.
        dump: returns what a value is made of, out of types the codec knows.
        load: returns the value made of that.
    """

    kind: type[Any]
    name: str
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]

    def __post_init__(self) -> None:
        instance("kind", self.kind, type)
        text("name", self.name)
        plain_function("dump", self.dump)
        plain_function("load", self.load)

    @classmethod
    def of(cls, kind: type[Any]) -> Model:
        """Return the model of an enum, dataclass, named tuple or ``msgspec.Struct``.

        Its name is the module's and the class's. Dataclasses come back field by field, without a
        call of ``__init__`` or ``__post_init__``, as after copying.
        """
        instance("models", kind, type)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if issubclass(kind, enum.Flag):
            return cls(kind, name, attrgetter("_value_"), kind)
        if issubclass(kind, enum.Enum):
            # One of strings has their ``__getitem__``, and may have a ``name`` of its own.
            return cls(kind, name, attrgetter("_name_"), partial(getitem, kind))
        if dataclasses.is_dataclass(kind):
            return _of_fields(kind, name, [field.name for field in dataclasses.fields(kind)])
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return _of_named_tuple(kind, name)
        if issubclass(kind, msgspec.Struct):
            return cls(kind, name, msgspec.structs.asdict, lambda parts: kind(**parts))
        raise TypeError(
            f"models must be enums, dataclasses, named tuples or msgspec.Structs, got {name}; for "
            "another type give Model(kind, name, dump=..., load=...)"
        )


def _of_named_tuple(kind: Any, name: str) -> Model:
    make, fields, defaults = attrgetter("_make", "_fields", "_field_defaults")(kind)

    def load(parts: list[Any]) -> Any:
        # What was written before the class had its last fields has their defaults.
        return make([*parts, *(defaults[each] for each in fields[len(parts) :])])

    return Model(kind, name, list, load)


def _of_fields(kind: type[Any], name: str, fields: list[str]) -> Model:
    def dump(value: Any) -> dict[str, Any]:
        return {field: getattr(value, field) for field in fields if hasattr(value, field)}

    def load(parts: Mapping[str, Any]) -> Any:
        if not parts.keys() <= set(fields):
            raise ValueError(f"{name} has no field {sorted(parts.keys() - set(fields))}")
        value = object.__new__(kind)
        for field, part in parts.items():
            object.__setattr__(value, field, part)
        return value

    return Model(kind, name, dump, load)


class ValueCodec(Protocol):
    """What a shared cache writes values with."""

    def encode(self, value: Any) -> bytes:
        """Return the value as bytes; `UnstorableValueError` if that is not possible."""

    def decode(self, data: bytes) -> Any:
        """Return the value of these bytes; `UnreadableEntryError` if it cannot be told."""


_MODEL, _LARGE_INT, _PAIRS = 1, 2, 12
_PLAIN: Final = frozenset({type(None), bool, float, bytes})
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1
_encode: Final = Encoder().encode


class _Refused(Exception):
    """Ends the writing of a value, with the culprit and the reason; its place is found later."""


class MessagePackCodec:
    """MessagePack with exact types: the default of `RedisCache`.

    It knows ``None``, bool, int of any size, float, str, bytes, bytearray, list, dict with keys of
    any kind, tuple, set, frozenset, Decimal, UUID, datetime, date, time (with ``zoneinfo`` or fixed
    zones), timedelta, and what is registered.

    Args:
        models: the application's own types: enums, dataclasses, named tuples and
            ``msgspec.Struct`` as they are, any other as a `Model`.

    Raises:
        ValueError: for two models of one name or type.
    """

    def __init__(self, models: Iterable[type[Any] | Model] = ()) -> None:
        self._models: dict[type[Any], Model] = {}
        self._named: dict[str, Model] = {}
        for given in instance("models", models, Iterable):
            model = given if isinstance(given, Model) else Model.of(given)
            if model.kind in self._models or model.name in self._named:
                raise ValueError(f"models must be different, got {model.name} twice")
            self._models[model.kind] = self._named[model.name] = model
        self._writers: dict[type[Any], Callable[[Any], Any]] = {
            str: _text,
            int: _integer,
            list: self._list,
            dict: self._dict,
            **{kind: self._tagged(tag) for kind, tag in _TAGS.items()},
        }
        self._decoder = Decoder(ext_hook=self._read)

    def __repr__(self) -> str:
        return f"MessagePackCodec(models=[{', '.join(self._named)}])"

    def encode(self, value: Any) -> bytes:
        """Return the value as bytes.

        Raises `UnstorableValueError` for a type that is not known, or a value within itself.
        """
        try:
            try:
                return _encode(self._write(value))
            except _Refused as refused:
                culprit, reason = refused.args
                place = readable(_place_of(culprit, value, "value"))
                raise UnstorableValueError(qualified_type(culprit), place, reason) from None
        except RecursionError:  # to find a place goes deeper than to write what stands before it
            reason = "it is nested too deeply, or contains itself"
            raise UnstorableValueError(qualified_type(value), "value", reason) from None

    def decode(self, data: bytes) -> Any:
        """Return the value of these bytes.

        Raises `UnreadableEntryError` if they are not what ``encode`` made with the same models.
        """
        try:
            return self._decoder.decode(data)
        except Exception as error:
            raise UnreadableEntryError(f"{type(error).__name__}: {error}") from error

    # Writing ----------------------------------------------------------------------------------

    def _write(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        write = self._writers.get(kind)
        if write is not None:
            return write(value)
        model = self._models.get(kind)
        if model is None:
            name = kind.__name__
            raise _Refused(
                value,
                f"{qualified_type(value)} is not known to the codec; register it, "
                f"RedisCache(..., models=[{name}]), or store built-in types",
            )
        return Ext(_MODEL, _encode([model.name, self._write(model.dump(value))]))

    def _list(self, value: list[Any]) -> list[Any]:
        write = self._write
        return [item if type(item) in _PLAIN else write(item) for item in value]

    def _dict(self, value: dict[Any, Any]) -> Any:
        write = self._write
        if all(type(key) is str for key in value):
            return {
                key if key.isascii() else _text(key): item if type(item) in _PLAIN else write(item)
                for key, item in value.items()
            }
        return Ext(_PAIRS, _encode([[write(key), write(item)] for key, item in value.items()]))

    def _tagged(self, tag: _Tag) -> Callable[[Any], Ext]:
        write = self._write
        return lambda value: Ext(tag.code, _encode(write(tag.write(value))))

    # Reading ----------------------------------------------------------------------------------

    def _read(self, code: int, data: memoryview) -> Any:
        told = self._decoder.decode(data)
        if code == _MODEL:
            name, parts = told
            return self._named[name].load(parts)
        return _READERS[code](told)


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            reason = "the string has half a surrogate pair, which no encoding has"
            raise _Refused(value, reason) from None
    return value


def _integer(value: int) -> Any:
    if _SMALLEST <= value <= _LARGEST:
        return value
    size = value.bit_length() // 8 + 1
    return Ext(_LARGE_INT, _encode(value.to_bytes(size, "big", signed=True)))


def _zone(value: Any) -> Any:
    zone = value.tzinfo
    if zone is None:
        return None
    if type(zone) is dt.timezone:
        name = None if zone is dt.timezone.utc else zone.tzname(None)
        return [*_told_span(zone.utcoffset(None)), name]
    if type(zone) is zoneinfo.ZoneInfo and zone.key is not None:
        return zone.key
    name = qualified_type(zone)
    raise _Refused(value, f"its zone is a {name}; use datetime.timezone or zoneinfo.ZoneInfo")


def _zone_of(told: Any) -> dt.tzinfo | None:
    if told is None:
        return None
    if isinstance(told, str):
        return zoneinfo.ZoneInfo(told)
    *offset, name = told
    span = dt.timedelta(*offset)
    if name is None:
        return dt.timezone.utc
    unnamed = dt.timezone(span)
    return unnamed if unnamed.tzname(None) == name else dt.timezone(span, name)


def _told_span(value: dt.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _told_moment(value: Any) -> list[Any]:
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _zone(value)]


def _moment(kind: Any, parts: Any) -> Any:
    naive, fold, zone = parts
    return kind.fromisoformat(naive).replace(tzinfo=_zone_of(zone), fold=fold)


class _Tag(NamedTuple):
    """How a type is told from others: by a number, and what stands for its values."""

    code: int
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


_TAGS: Final[Mapping[type[Any], _Tag]] = {
    Decimal: _Tag(3, str, Decimal),
    dt.datetime: _Tag(4, _told_moment, partial(_moment, dt.datetime)),
    dt.date: _Tag(5, dt.date.isoformat, dt.date.fromisoformat),
    dt.time: _Tag(6, _told_moment, partial(_moment, dt.time)),
    dt.timedelta: _Tag(7, _told_span, lambda parts: dt.timedelta(*parts)),
    uuid.UUID: _Tag(8, attrgetter("bytes"), lambda data: uuid.UUID(bytes=data)),
    tuple: _Tag(9, list, tuple),
    set: _Tag(10, list, set),
    frozenset: _Tag(11, list, frozenset),
    bytearray: _Tag(13, bytes, bytearray),
    FrozenDict: _Tag(14, dict, FrozenDict),
}
_READERS: Final[Mapping[int, Callable[[Any], Any]]] = {
    _LARGE_INT: partial(int.from_bytes, byteorder="big", signed=True),
    _PAIRS: dict,
    **{tag.code: tag.read for tag in _TAGS.values()},
}


_SEQUENCES: Final = frozenset({list, tuple, set, frozenset})
_LEAVES: Final = {*_PLAIN, str, int, *_TAGS}.difference(_SEQUENCES, {FrozenDict})
_MANY: Final = 5_000
"""So many parts of a value are written on the event loop: a millisecond or two."""


def is_large(value: Any) -> bool:
    """Whether writing a value takes longer than an event loop may be held."""
    parts, left = 0, [value]
    while left:
        each = left.pop()
        kind, held = type(each), each
        if kind is dict or kind is FrozenDict:
            held = each.values()
        elif kind in _LEAVES:
            continue
        elif kind not in _SEQUENCES:
            fields = ("__struct_fields__", "__dataclass_fields__", "_fields")
            names = next((getattr(kind, name) for name in fields if hasattr(kind, name)), ())
            held = [getattr(each, name, None) for name in names]
        parts += len(held)
        if parts > _MANY:
            return True
        left += [part for part in held if type(part) not in _LEAVES]
    return False


def _place_of(culprit: Any, value: Any, place: str) -> str:
    """Return where `culprit` is within a value, as Python would write it."""
    if value is culprit:
        return place
    within: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        within = [(f"a key of {place}", key) for key in value]
        within += [(f"{place}[{shown(key)}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        within = ((f"{place}[{number}]", item) for number, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        within = ((f"an element of {place}", item) for item in value)
    found = (_place_of(culprit, item, named) for named, item in within)
    return next((each for each in found if each), "" if place != "value" else "a part of value")
