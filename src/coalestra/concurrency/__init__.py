"""Waiting, capacity, deadlines, threads and copying: how work shares one event loop.

The public names are those in ``__all__``; everything else is for the library itself.
"""

# ruff: noqa: F403, F405 - what is imported is told by the modules, in ``__all__``

import typing as _typing

from coalestra.concurrency.capacity import *
from coalestra.concurrency.copying import *

if not _typing.TYPE_CHECKING:
    __all__ = capacity.__all__ + copying.__all__
