"""Events and metrics: the sinks that come with the library, and buffers for any other."""

# ruff: noqa: F403 - what is imported is told by the modules, in ``__all__``

import typing as _typing
from types import ModuleType as _ModuleType

from coalestra.observability.buffered import *
from coalestra.observability.sinks import *

if not _typing.TYPE_CHECKING:
    __all__ = [
        name
        for name, value in globals().items()
        if not (name.startswith("_") or isinstance(value, _ModuleType))
    ]
