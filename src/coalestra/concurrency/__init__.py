"""Waiting, capacity, deadlines, threads and copying: how work shares one event loop.

The public names are those in ``__all__``; everything else is for the library itself.
"""

from coalestra.concurrency.capacity import (
    CapacityController,
    CapacityLease,
    CapacityLimiter,
    CapacitySnapshot,
)
from coalestra.concurrency.copying import PayloadCopier, PayloadIsolator, deepcopy_payload

__all__ = [
    "CapacityController",
    "CapacityLease",
    "CapacityLimiter",
    "CapacitySnapshot",
    "PayloadCopier",
    "PayloadIsolator",
    "deepcopy_payload",
]
