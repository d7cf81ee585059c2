"""Consistent, immutable snapshots of many resources, for one unit of work at a time.

What refuses an argument raises a `TypeError` for a wrong type, and a `ValueError` for a wrong
value; both name the argument, the rule, and what was given. Times are seconds: finite, and not
negative where they are lengths, unless their description says otherwise.

What the parts of the package export is exported here, and brought in when somebody first asks for
it, so that ``import coalestra`` alone costs next to nothing. Type checkers look into all parts.
"""

# ruff: noqa: F403 - what is imported is told by the parts, in ``__all__``

from __future__ import annotations

import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coalestra.adapters import *
    from coalestra.cache import *
    from coalestra.concurrency import *
    from coalestra.core import *
    from coalestra.observability import *
    from coalestra.orchestration import *
    from coalestra.resilience import *
    from coalestra.sync import *

__version__ = "0.6.0"
"""The version, as in the metadata of the package."""

_PARTS = (
    "core", "concurrency", "observability", "resilience", "cache", "orchestration", "adapters",
    "sync",
)  # fmt: skip


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Bring in a public name, a part of the package, or ``__all__``, and keep it."""
        value: object
        if name in _PARTS or name == "inspect":
            value = _import_module(f"{__name__}.{name}")
        elif name == "__all__":
            parts = [_import_module(f"{__name__}.{part}") for part in _PARTS]
            value = sorted({"__version__"}.union(*(part.__all__ for part in parts)))
        else:
            for part in () if name.startswith("_") else _PARTS:
                home = _import_module(f"{__name__}.{part}")
                if name in home.__all__:
                    value = getattr(home, name)
                    break
            else:
                text = f"module {__name__!r} has no attribute {name!r}"
                raise AttributeError(text, name=name, obj=_sys.modules[__name__])
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__"), *_PARTS})
