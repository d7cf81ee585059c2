"""Public names that are imported when somebody first asks for them.

A package that imported all it exports would make every program pay for all of it. Here it says
where its names live, and each is brought in, and kept, on first use. Type checkers read the
ordinary imports beside that, under ``TYPE_CHECKING``; a test holds the two together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

Lookup = Callable[[str], Any]
Listing = Callable[[], list[str]]


def names_by_module(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Lookup, Listing]:
    """Return the ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        homes: its modules, each with those of its names that the package exports.
    """
    module_of = {name: module for module, names in homes.items() for name in names}
    return _exports(package, module_of.get)


def names_of_parts(package: str, parts: Sequence[str]) -> tuple[Lookup, Listing]:
    """Return the ``__getattr__`` and ``__dir__`` of a package that exports names of its parts.

    Args:
        package: its name.
        parts: the packages in it, each of which exports names itself.
    """

    def part_with(name: str) -> str | None:
        if name not in sys.modules[package].__all__:
            return None
        return next(part for part in parts if name in import_module(f"{package}.{part}").__all__)

    return _exports(package, part_with)


def _exports(package: str, home_of: Callable[[str], str | None]) -> tuple[Lookup, Listing]:
    module = sys.modules[package]

    def bring(name: str) -> Any:
        home = home_of(name)
        if home is not None:
            value = getattr(import_module(f"{package}.{home}"), name)
        else:
            value = None if name.startswith("_") else _submodule(f"{package}.{name}")
            if value is None:
                text = f"module {package!r} has no attribute {name!r}"
                raise AttributeError(text, name=name, obj=module)
        setattr(module, name, value)  # Threads may meet here; they bring the same.
        return value

    def names() -> list[str]:
        return sorted({*vars(module), *module.__all__})

    return bring, names


def _submodule(name: str) -> ModuleType | None:
    """Return the module of that name, None if there is none.

    Without an import statement of their own, programs find submodules as attributes of a package
    that imports them. This one still seems to.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None
