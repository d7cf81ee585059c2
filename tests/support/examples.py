"""How many examples a property is tried with, by the profile that was chosen."""

from __future__ import annotations

from hypothesis import settings


def times(factor: float) -> settings:
    """Try a property with so many times the usual number of examples."""
    return settings(max_examples=round(factor * settings().max_examples))
