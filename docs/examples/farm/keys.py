"""What there is to know about a field: one key for each value."""

from __future__ import annotations

from coalestra import ResourceKey

FIELDS = ("north", "south", "east")


def target(field: str) -> ResourceKey:
    """Return the key of the moisture that the field should have, in mm."""
    return ResourceKey("farm", "target", field)


def valve(field: str) -> ResourceKey:
    """Return the key of the name of the valve that waters the field."""
    return ResourceKey("farm", "valve", field)


def rain(field: str) -> ResourceKey:
    """Return the key of the rain to come, in mm."""
    return ResourceKey("weather", "rain", field)


def moisture(field: str) -> ResourceKey:
    """Return the key of the moisture that the field has, in mm."""
    return ResourceKey("probe", "moisture", field)


def need(field: str) -> ResourceKey:
    """Return the key of the water that the field needs, in mm."""
    return ResourceKey("plan", "need", field)
