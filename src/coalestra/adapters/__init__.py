"""Sources made from plain or async functions.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
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
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "batch": ("BatchFetcherFunction", "BatchSupportsFunction", "CallableBatchSource"),
            "derived": (
                "CallableDerivedSource",
                "DependenciesFunction",
                "DerivedSupportsFunction",
                "DeriverFunction",
            ),
            "single": ("CallableSource", "FetcherFunction", "SupportsFunction"),
        },
    )

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
