"""Names of resources: what a value is a value of.

Laws:

1. Two keys are equal exactly if their normalized namespace, name, subject and qualifiers are; the
   normalizer that made them so does not count.
2. A key never changes; its hash is computed once, each of its texts at most once.
3. Of its three texts, ``str(key)`` is as it has always been, ``canonical`` is one key's alone, and
   ``display`` is one short line for people. None of them ever raises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, InitVar, fields
from typing import TYPE_CHECKING, Any, final

from coalestra.core import validation
from coalestra.core.frozen import FREE_THREADED, draft_of, record

__all__ = [
    "CASE_INSENSITIVE_KEY_NORMALIZER", "LEGACY_KEY_NORMALIZER", "PRESERVE_KEY_NORMALIZER",
    "KeyNormalizer", "QualifierInput", "ResourceKey",
]  # fmt: skip

# How the parts of a key are brought into one form, so that one resource has one key --------------

StringTransform = Callable[[str], str]
"""What turns one part of a key into its normal form."""


def stripped_lower(value: str) -> str:
    """Return ``value`` without surrounding white space, in lower case."""
    return value.strip().lower()


def stripped_upper(value: str) -> str:
    """Return ``value`` without surrounding white space, in upper case."""
    return value.strip().upper()


def stripped_casefold(value: str) -> str:
    """Return ``value`` without surrounding white space, folded for comparing without case."""
    return value.strip().casefold()


@record
class KeyNormalizer:
    """One transform for each kind of part; by default all strip surrounding white space.

    A transform does all there is to do to its part: one that replaces the default strips only if
    it says so itself.
    """

    namespace: StringTransform = str.strip
    name: StringTransform = str.strip
    subject: StringTransform = str.strip
    qualifier_name: StringTransform = str.strip
    qualifier_value: StringTransform = str.strip

    def __post_init__(self) -> None:
        for field in fields(self):
            validation.plain_function(field.name, getattr(self, field.name))

    def normalize_namespace(self, value: str) -> str:
        """Return the normal form of a namespace; `TypeError` unless it is a string."""
        return _applied(self.namespace, "namespace", value)

    def normalize_name(self, value: str) -> str:
        """Return the normal form of a name; `TypeError` unless it is a string."""
        return _applied(self.name, "name", value)

    def normalize_subject(self, value: str) -> str:
        """Return the normal form of a subject; `TypeError` unless it is a string."""
        return _applied(self.subject, "subject", value)

    def normalize_qualifier_name(self, name: str) -> str:
        """Return the normal form of a qualifier's name; `TypeError` unless it is a string."""
        return _applied(self.qualifier_name, "qualifier name", name)

    def normalize_qualifier(self, name: str, value: Any) -> tuple[str, str]:
        """Return the normal form of a qualifier; its value is what ``str`` makes of it."""
        plain = _applied(self.qualifier_value, "qualifier value", str(value))
        return self.normalize_qualifier_name(name), plain


def _applied(transform: StringTransform, part: str, value: str) -> str:
    result = transform(validation.text(part, value, empty=True))
    if type(result) is str:
        return result
    # A plain string also out of a subclass, so that no key depends on foreign comparisons.
    return str.__str__(validation.text(f"normalized {part}", result, empty=True))


PRESERVE_KEY_NORMALIZER = KeyNormalizer()
"""Strips white space and keeps the case: what keys use unless told otherwise."""

LEGACY_KEY_NORMALIZER = KeyNormalizer(
    namespace=stripped_lower,
    name=stripped_lower,
    subject=stripped_upper,
    qualifier_name=stripped_lower,
)
"""Names in lower case, subjects in upper case, values of qualifiers as they are."""

CASE_INSENSITIVE_KEY_NORMALIZER = KeyNormalizer(*(stripped_casefold,) * 5)
"""Makes keys equal that differ in case only, in whichever part."""

AS_IT_IS = KeyNormalizer(str, str, str, str, str)
"""For parts that are normal already, by whatever normalizer an application has of its own."""


QualifierInput = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Qualifiers as they may be given: a mapping, or pairs of name and value."""

_strip = str.strip

_LONG = 500
"""From how many characters on a key is cut in its ``repr``, too."""

_PLAIN = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~"
_ENCODED = ["+" if b == 32 else chr(b) if b in _PLAIN else f"%{b:02X}" for b in range(256)]


_Pairs = tuple[tuple[str, str], ...]
_Parts = tuple[str, str, str, _Pairs]


class _Kept:
    """What a key keeps besides its fields, so that nothing is worked out twice."""

    __slots__ = ("_display", "_hash", "_normalizer", "_parts", "_text")

    _display: str
    _hash: int
    _normalizer: KeyNormalizer
    _parts: _Parts
    _text: str | None


@final
@record(final=True, order=True, init=False, repr=False)
class ResourceKey(_Kept):
    """The identity of a resource: immutable, hashable, ordered by its fields.

    ``str(key)`` is ``namespace:name``, then ``:subject`` if there is one, then ``?`` and the
    URL-encoded qualifiers. Different keys may share it: use ``canonical`` as a name.

    Attributes:
        namespace: the area it belongs to; never empty.
        name: what it is within that area; never empty.
        subject: which one of its kind; may be empty.
        qualifiers: pairs of name and value, sorted by name.

    Raises:
        TypeError: for a part that is not a string, or qualifiers that are not pairs.
        ValueError: for an empty namespace, name or qualifier name, or a qualifier name given
            twice, all judged after normalizing.
    """

    namespace: str
    name: str
    subject: str
    qualifiers: tuple[tuple[str, str], ...]
    if not TYPE_CHECKING:  # what is read off and handed on by `dataclasses.replace`
        _: KW_ONLY
        normalizer: InitVar[KeyNormalizer]

    def __init__(
        self,
        namespace: str,
        name: str,
        subject: str = "",
        qualifiers: QualifierInput | None = None,
        *,
        normalizer: KeyNormalizer | None = None,
    ) -> None:
        if normalizer is None:
            normalizer = PRESERVE_KEY_NORMALIZER
            try:
                namespace, name, subject = _strip(namespace), _strip(name), _strip(subject)
            except TypeError:
                parts = {"namespace": namespace, "name": name, "subject": subject}
                part = next(part for part, value in parts.items() if not isinstance(value, str))
                raise validation.wrong_type(part, "a string", parts[part]) from None
        else:
            validation.instance("normalizer", normalizer, KeyNormalizer)
            namespace = normalizer.normalize_namespace(namespace)
            name = normalizer.normalize_name(name)
            subject = normalizer.normalize_subject(subject)
        if not namespace or not name:
            part = "name" if namespace else "namespace"
            raise ValueError(validation.refusal(part, "a non-empty string", ""))
        pairs = () if qualifiers is None else _sorted_pairs(qualifiers, normalizer)
        _fill(self, (namespace, name, subject, pairs), normalizer)

    @classmethod
    def legacy(
        cls, namespace: str, name: str, subject: str = "", qualifiers: QualifierInput | None = None
    ) -> ResourceKey:
        """Return a key in the form of ``LEGACY_KEY_NORMALIZER``."""
        return cls(namespace, name, subject, qualifiers, normalizer=LEGACY_KEY_NORMALIZER)

    @property
    def normalizer(self) -> KeyNormalizer:
        """What brought the parts of this key into their form."""
        return self._normalizer

    @property
    def canonical(self) -> str:
        """The text that is this key's alone: for file names, rows, or keys of another store.

        Like ``str(key)``, with every part URL-encoded, so that it is plain ASCII. It is as long
        as the parts are; two keys are equal exactly if their canonical texts are.
        """
        return self._joined(_quoted)

    @property
    def display(self) -> str:
        """The text for people: ``str(key)`` in one line of bounded length.

        What cannot be printed is escaped, and what is too long is cut and ends in its length and a
        checksum. Errors, events and logs use it.
        """
        try:
            return self._display
        except AttributeError:
            line = validation.readable(str(self))
            object.__setattr__(self, "_display", line)
            return line

    def qualifier(self, name: str, default: str | None = None) -> str | None:
        """Return the value of the qualifier ``name``, or ``default`` if there is none."""
        wanted = self._normalizer.normalize_qualifier_name(name)
        return dict(self.qualifiers).get(wanted, default)

    def with_qualifiers(
        self, qualifiers: QualifierInput | None = None, **additional: Any
    ) -> ResourceKey:
        """Return this key with more qualifiers; a new one replaces an old one of the same name.

        Among the new ones, those given by keyword replace those of ``qualifiers``.
        """
        merged = dict(self.qualifiers)
        for given in (qualifiers, additional):
            if given is not None:
                merged.update(_sorted_pairs(given, self._normalizer))
        return _restored(*self._parts[:3], tuple(sorted(merged.items())), self._normalizer)

    def without_qualifiers(self, *names: str) -> ResourceKey:
        """Return this key without the qualifiers named, those it has; without names, with none."""
        dropped = {self._normalizer.normalize_qualifier_name(name) for name in names}
        kept = (pair for pair in self.qualifiers if names and pair[0] not in dropped)
        return _restored(*self._parts[:3], tuple(kept), self._normalizer)

    def normalized(self, normalizer: KeyNormalizer) -> ResourceKey:
        """Return this key in the form of another normalizer, which it keeps from then on.

        Raises:
            ValueError: if that leaves a part empty, or makes two qualifier names equal.
        """
        validation.instance("normalizer", normalizer, KeyNormalizer)
        return ResourceKey(
            self.namespace, self.name, self.subject, self.qualifiers, normalizer=normalizer
        )

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if other.__class__ is not ResourceKey:
            return NotImplemented
        return self._parts == other._parts

    def __str__(self) -> str:
        text = self._text
        if text is None:
            text = self._joined(str)
            object.__setattr__(self, "_text", text)
        return text

    def _joined(self, form: StringTransform) -> str:
        text = ":".join(form(part) for part in self._parts[:3] if part)
        encoded = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in self.qualifiers)
        return f"{text}?{encoded}" if encoded else text

    def __repr__(self) -> str:
        form = repr if len(str(self)) <= _LONG else validation.shown
        names = ("namespace", "name", "subject", "qualifiers")
        parts = (f"{name}={form(part)}" for name, part in zip(names, self._parts, strict=True))
        return f"ResourceKey({', '.join(parts)})"

    def __copy__(self) -> ResourceKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ResourceKey:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Neither normalized again nor with its hash, which differs from process to process.
        return _restored, (*self._parts, self._normalizer)


# These are no attributes, and Python 3.10 cannot read them as types.
del ResourceKey.__annotations__["_"], ResourceKey.__annotations__["normalizer"]

_become: Any = object.__dict__["__class__"].__set__
_Draft = draft_of(ResourceKey)
_NAMES = (*ResourceKey.__slots__, "_parts", "_hash", "_text", "_normalizer")
_SLOTS: Any = tuple(getattr(ResourceKey, name).__set__ for name in _NAMES)


def _fill(key: ResourceKey, parts: _Parts, normalizer: KeyNormalizer) -> None:
    hashed = hash(parts)
    if FREE_THREADED:
        for write, fact in zip(_SLOTS, (*parts, parts, hashed, None, normalizer), strict=True):
            write(key, fact)
        return
    draft: Any = key
    _become(draft, _Draft)
    draft.namespace, draft.name, draft.subject, draft.qualifiers = draft._parts = parts
    draft._hash = hashed
    draft._text = None
    draft._normalizer = normalizer
    draft.__class__ = ResourceKey


def _restored(
    namespace: str, name: str, subject: str, qualifiers: _Pairs, normalizer: KeyNormalizer
) -> ResourceKey:
    key = object.__new__(ResourceKey)
    _fill(key, (namespace, name, subject, qualifiers), normalizer)
    return key


def _quoted(text: str) -> str:
    """Return a text as `urllib.parse.urlencode` has it.

    That one takes as long to import as a fifth of this library does, and would have to be imported
    while an error is put into words.
    """
    if text.isalnum() and text.isascii():
        return text
    # Half of a surrogate pair, as in the name of a file that is not UTF-8, becomes bytes that no
    # other text has.
    return "".join(map(_ENCODED.__getitem__, text.encode("utf-8", "surrogatepass")))


def _sorted_pairs(qualifiers: QualifierInput, normalizer: KeyNormalizer) -> _Pairs:
    found: dict[str, str] = {}
    only_strips = normalizer is PRESERVE_KEY_NORMALIZER
    for given, plain in _given_pairs(qualifiers):
        if only_strips and type(given) is str:
            name, value = _strip(given), _strip(str(plain))
        else:
            name, value = normalizer.normalize_qualifier(given, plain)
        if not name:
            raise ValueError(validation.refusal("qualifier name", "a non-empty string", given))
        if name in found:
            twice = f"got {validation.shown(name)} twice; leave one of them out"
            raise ValueError(f"qualifiers must have different names, {twice}")
        found[name] = value
    return tuple(sorted(found.items()))


def _given_pairs(qualifiers: object) -> Iterable[tuple[str, Any]]:
    if type(qualifiers) is dict or isinstance(qualifiers, Mapping):
        return qualifiers.items()
    rule = "a mapping, or pairs of name and value"
    if isinstance(qualifiers, (str, bytes)) or not isinstance(qualifiers, Iterable):
        raise validation.wrong_type("qualifiers", rule, qualifiers)
    pairs = list(qualifiers)
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise validation.wrong_type("qualifiers", rule, pair)
    return pairs


def distinct_keys(name: str, keys: Iterable[ResourceKey]) -> dict[ResourceKey, None]:
    """Return each of ``keys`` once, in the order given; a `TypeError` says ``name``."""
    try:
        found: Collection[Any] = keys.copy() if type(keys) is dict else tuple(keys)
    except TypeError:
        if isinstance(keys, Iterable):
            raise  # which is its own
        remedy = "put a single one in a list" if isinstance(keys, ResourceKey) else ""
        raise validation.wrong_type(name, "a collection of ResourceKey", keys, remedy) from None
    for key in found:
        if type(key) is not ResourceKey:
            raise validation.wrong_type(name, "a ResourceKey", key)
    return dict.fromkeys(found)
