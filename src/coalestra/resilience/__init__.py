"""Retries, circuits and the policies that govern them.

The public names are those in ``__all__``; everything else is for the library itself.
"""

# ruff: noqa: F403, F405 - what is imported is told by the modules, in ``__all__``

import typing as _typing

from coalestra.resilience.circuit_breaker import *
from coalestra.resilience.policies import *

if not _typing.TYPE_CHECKING:
    __all__ = circuit_breaker.__all__ + policies.__all__
