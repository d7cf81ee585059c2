"""Sealing: one private copy of a payload, and the knowledge of how to copy it again.

The copies are ``copy.deepcopy``'s, except that immutable objects may stay the same.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from coalestra.concurrency.immutables import ATOMS
from coalestra.concurrency.seals import FLAT, Seal, Sealed
from coalestra.concurrency.survey import LargePayload, Survey, UnknownPayload, is_flat, only_atoms

BRIEF = 20_000
"""So many steps are walked on the event loop at a time: one or two milliseconds."""

_SHARED = Seal.SHARED


def seal_flat(value: Any) -> Sealed | None:
    """Seal an atom, or a small container of atoms; the quick way for what is most common."""
    cls = type(value)
    if cls in ATOMS:
        return value, _SHARED
    if cls is dict:
        if len(value) < BRIEF:
            copied = value.copy()
            if is_flat(copied):
                return copied, FLAT[dict]
    elif cls is list and len(value) < BRIEF:
        row = value.copy()
        if only_atoms(row):
            return row, FLAT[list]
    return None


def seal_briefly(value: Any) -> Sealed | None:
    """Seal a payload that is not large and of known types; return None for any other."""
    sealed = seal_flat(value)
    if sealed is not None:
        return sealed
    try:
        return _survey(value, BRIEF)
    except (UnknownPayload, LargePayload):
        return None


def seal_anyhow(value: Any) -> Sealed:
    """Seal any payload, for as long as it may take; raises what the classes inside it raise."""
    sealed = seal_flat(value)
    if sealed is not None:
        return sealed
    try:
        return _survey(value, math.inf)
    except UnknownPayload:
        return copy.deepcopy(value), Seal.DEEP


def _survey(value: Any, allowed: float) -> Sealed:
    survey = Survey(allowed)
    payload, blueprint = survey.private_copy(value)
    if blueprint is None:
        return payload, _SHARED
    brief = survey.walked <= BRIEF
    if brief and blueprint.is_flat and type(payload) in FLAT:
        return payload, FLAT[type(payload)]
    return payload, Seal("graph", blueprint.open, brief=brief)
