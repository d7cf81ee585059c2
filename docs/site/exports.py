"""What mkdocstrings is told of what the library makes as it runs: exports, methods, defaults."""

from __future__ import annotations

import re
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


class WhatIsMeant(griffe.Extension):
    """Shows defaults in place of what checks them, and what the base says that is named."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        made = attr.value
        if isinstance(made, griffe.ExprCall) and str(made.function).endswith("ruled"):
            attr.value = made.arguments[0]

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in (pkg["adapters"], pkg["observability"]):
            for said in (each.docstring for each in module.classes.values() if each.docstring):
                if named := re.search(r" See `(\w+)`\.", said.value):
                    more = module[named[1]].docstring.value.partition("\n\n")[2]
                    said.value = f"{said.value.replace(named[0], '')}\n\n{more}"
