"""Events and metrics: the sinks that come with the library, and buffers for any other."""

# ruff: noqa: F403, F405 - what is imported is told by the modules, in ``__all__``

import typing as _typing

from coalestra.observability.sinks import *

if not _typing.TYPE_CHECKING:
    __all__ = sinks.__all__
