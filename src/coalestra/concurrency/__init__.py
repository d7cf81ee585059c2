"""Waiting, capacity, deadlines, threads and copying: how work shares one event loop.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coalestra._exports import names_by_module as _names

if TYPE_CHECKING:
    from coalestra.concurrency.capacity import (
        CapacityController,
        CapacityLease,
        CapacityLimiter,
        CapacitySnapshot,
    )
    from coalestra.concurrency.isolation import PayloadCopier, PayloadIsolator, deepcopy_payload
else:
    __getattr__, __dir__ = _names(
        __name__,
        {
            "capacity": (
                "CapacityController",
                "CapacityLease",
                "CapacityLimiter",
                "CapacitySnapshot",
            ),
            "isolation": ("PayloadCopier", "PayloadIsolator", "deepcopy_payload"),
        },
    )

__all__ = [
    "CapacityController",
    "CapacityLease",
    "CapacityLimiter",
    "CapacitySnapshot",
    "PayloadCopier",
    "PayloadIsolator",
    "deepcopy_payload",
]
