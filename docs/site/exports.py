"""What mkdocstrings is told of what the library makes as it runs: ``__all__``, and methods."""

from __future__ import annotations

from typing import Any

import griffe


class AllThatIsThere(griffe.Extension):
    """Exports whatever is public of a module that does not say it in so many words."""

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        if not all(isinstance(each, str) for each in mod.exports or (None,)):
            mod.exports = None


class BlockingMethods(griffe.Extension):
    """Gives the methods that are made from async ones the parameters of these."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for facade in pkg["sync"].classes.values():
            for attribute in tuple(facade.attributes.values()):
                made = attribute.value
                if isinstance(made, griffe.ExprCall) and "blocking" in str(made.function):
                    owner, _, name = str(made.arguments[1]).partition(".")
                    original = pkg.modules_collection[facade.resolve(owner)][name]
                    method = griffe.Function(
                        attribute.name,
                        parameters=original.parameters,
                        returns=original.returns,
                        docstring=attribute.docstring,
                    )
                    facade.set_member(attribute.name, method)
