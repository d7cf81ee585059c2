"""Sources made from plain or async functions.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from __future__ import annotations

from coalestra.adapters.batch import (
    BatchFetcherFunction,
    BatchSupportsFunction,
    CallableBatchSource,
)
from coalestra.adapters.derived import (
    CallableDerivedSource,
    DependenciesFunction,
    DerivedSupportsFunction,
    DeriverFunction,
)
from coalestra.adapters.single import CallableSource, FetcherFunction, SupportsFunction

__all__ = [
    "BatchFetcherFunction",
    "BatchSupportsFunction",
    "CallableBatchSource",
    "CallableDerivedSource",
    "CallableSource",
    "DependenciesFunction",
    "DerivedSupportsFunction",
    "DeriverFunction",
    "FetcherFunction",
    "SupportsFunction",
]
