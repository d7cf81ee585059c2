"""The library as files and syntax trees: what the architecture tests look at."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tests.support.running import without_collector

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "coalestra"

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Module:
    """One file of the library."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All of the tree, outer nodes before inner ones."""
        return tuple(ast.walk(self.tree))

    @cached_property
    def where(self) -> str:
        """The path inside the package, as ``core/keys.py``."""
        return self.path.relative_to(PACKAGE).as_posix()

    @cached_property
    def name(self) -> str:
        """The name it is imported by."""
        parts = ["coalestra", *self.path.relative_to(PACKAGE).with_suffix("").parts]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @cached_property
    def layer(self) -> str:
        """The subpackage (or the single module) this file belongs to; empty for the root."""
        return self.where.removesuffix("__init__.py").partition("/")[0].removesuffix(".py")

    @cached_property
    def imports(self) -> tuple[tuple[int, str, str], ...]:
        """Every import in the file, at any depth: line, module, name taken from it or empty."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                found += [(node.lineno, module, alias.name) for alias in node.names]
        return tuple(found)

    @cached_property
    def for_types_only(self) -> frozenset[int]:
        """The lines that only a type checker reads."""
        return frozenset(
            line
            for node in self.nodes
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for each in node.body
            for line in range(each.lineno, (each.end_lineno or each.lineno) + 1)
        )

    def definitions(self) -> Iterator[Definition]:
        """Every class and function, at any depth."""
        return (node for node in self.nodes if isinstance(node, Definition))


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the library, read and parsed once."""
    with without_collector():
        found = tuple(Module(path) for path in sorted(PACKAGE.rglob("*.py")))
        assert all(module.nodes for module in found)
        gc.freeze()  # no collection of a later test goes through the trees
    return found


def length(node: Definition) -> int:
    """How many lines a definition spans."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def decorators(node: Definition) -> set[str]:
    """The last names of the decorators: ``overload`` for ``@typing.overload``."""
    names = set()
    for decorator in node.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        if isinstance(target, ast.Attribute):
            names.add(target.attr)
        elif isinstance(target, ast.Name):
            names.add(target.id)
    return names
