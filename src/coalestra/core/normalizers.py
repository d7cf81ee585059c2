"""How the parts of a key are brought into one form, so that one resource has one key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from coalestra.core.validation import callable_, text

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


@dataclass(frozen=True, slots=True)
class KeyNormalizer:
    """One transform for each kind of part; by default all strip surrounding white space.

    A transform does all there is to do to its part: one that replaces the default strips only if
    it says so itself.

    Raises:
        TypeError: for a transform that cannot be called.
    """

    namespace: StringTransform = str.strip
    name: StringTransform = str.strip
    subject: StringTransform = str.strip
    qualifier_name: StringTransform = str.strip
    qualifier_value: StringTransform = str.strip

    def __post_init__(self) -> None:
        for field in fields(self):
            callable_(field.name, getattr(self, field.name))

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
    result = transform(text(part, value, empty=True))
    if type(result) is str:
        return result
    # A plain string also out of a subclass, so that no key depends on foreign comparisons.
    return str.__str__(text(f"normalized {part}", result, empty=True))


PRESERVE_KEY_NORMALIZER = KeyNormalizer()
"""Strips white space and keeps the case: what keys use unless told otherwise."""

LEGACY_KEY_NORMALIZER = KeyNormalizer(
    namespace=stripped_lower,
    name=stripped_lower,
    subject=stripped_upper,
    qualifier_name=stripped_lower,
)
"""Names in lower case, subjects in upper case, values of qualifiers as they are."""

CASE_INSENSITIVE_KEY_NORMALIZER = KeyNormalizer(
    namespace=stripped_casefold,
    name=stripped_casefold,
    subject=stripped_casefold,
    qualifier_name=stripped_casefold,
    qualifier_value=stripped_casefold,
)
"""Makes keys equal that differ in case only, in whichever part."""
