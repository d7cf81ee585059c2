"""Data and pure rules: nothing in here waits, locks, or asks what time it is."""

# ruff: noqa: F403 - what is imported is told by the modules, in ``__all__``

import typing as _typing
from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from coalestra.core.capability import *
from coalestra.core.errors import *
from coalestra.core.health import *
from coalestra.core.keys import *
from coalestra.core.policies import *
from coalestra.core.protocols import *
from coalestra.core.request import *
from coalestra.core.snapshot import *
from coalestra.core.trace import *
from coalestra.core.values import *

if not _typing.TYPE_CHECKING:
    __all__ = [
        name
        for name, value in globals().items()
        if not (name.startswith("_") or isinstance(value, _ModuleType))
    ]

    def __getattr__(name: str) -> object:
        """Bring in what copies payloads and was exported here once: it has moved up a layer."""
        if name in ("PayloadCopier", "PayloadIsolator", "deepcopy_payload"):
            return getattr(_import_module("coalestra.concurrency"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
